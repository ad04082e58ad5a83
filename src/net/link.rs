//! One authenticated connection: control messages both ways, log streams either way.
//!
//! ```text
//!   control    one bidirectional stream; a message is its length (u32 little-endian), then its bytes
//!   log        one unidirectional stream each: bytes from first to last, ended by finish() or broken by reset()
//! ```
//!
//! Each side begins its half of the control stream with an empty message. A QUIC stream does not exist for the peer
//! until bytes flow on it; and the listener's empty message is what tells the dialler that its certificate was
//! accepted, since in TLS 1.3 the dialler is done before the listener has seen it.
//!
//! Control goes first: its stream has the higher priority, so a message overtakes the log bytes that wait to be sent.
//!
//! Lengths are checked against [`MESSAGE_BYTES_MAX`] before anything is allocated. Receiving and sending are safe to
//! cancel: a half-read or half-written message is kept and completed by the next call.

use std::{fmt, mem, net::SocketAddr, sync::Arc, time::Duration};

use bytes::{Bytes, BytesMut};
use quinn::{
    Connection, ConnectionError, Endpoint, ReadError, RecvStream, SendStream, VarInt, WriteError,
};

use tokio::io::{AsyncRead, AsyncWrite};

use super::{
    bonds::Bond,
    transport::{LOG_STREAMS_MAX, Protocol},
};
use crate::base::{ids::Name, limits::MESSAGE_BYTES_MAX, units::to_usize};

/// Bytes of a message's length.
const LENGTH_BYTES: usize = 4;
/// Control goes before log streams, which have priority 0.
const CONTROL_PRIORITY: i32 = 1;
/// Most text that is sent with a reason, in bytes: it must fit one packet.
const TEXT_BYTES_MAX: usize = 512;
/// Longest wait for the closing message to leave.
pub(super) const DRAIN_MAX: Duration = Duration::from_secs(2);

/// Why a link was closed or a log stream broken, as both sides see it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// All is done.
    Done,
    /// The program is being stopped.
    Stopping,
    /// The peer's name is not on the allow list.
    NotAllowed,
    /// The peer's certificate holds no name.
    Unnamed,
    /// The peer broke the protocol.
    Protocol,
    /// No resources for this now.
    Busy,
    /// The peer's generation is over.
    Fenced,
    /// The epoch under way was given up; it is merged into the next one.
    Aborted,
    /// An operator suspended the replication: nothing comes until it is resumed.
    Suspended,
    /// The peer's certificate was revoked, or is not accepted any more, since the link began.
    Revoked,
    /// A reason of another version.
    Unknown(u64),
}

impl Reason {
    pub(super) fn code(self) -> VarInt {
        match self {
            Self::Done => VarInt::from_u32(0),
            Self::Stopping => VarInt::from_u32(1),
            Self::NotAllowed => VarInt::from_u32(2),
            Self::Unnamed => VarInt::from_u32(3),
            Self::Protocol => VarInt::from_u32(4),
            Self::Busy => VarInt::from_u32(5),
            Self::Fenced => VarInt::from_u32(6),
            Self::Aborted => VarInt::from_u32(7),
            Self::Suspended => VarInt::from_u32(8),
            Self::Revoked => VarInt::from_u32(9),
            Self::Unknown(code) => VarInt::from_u64(code).unwrap_or(VarInt::MAX),
        }
    }

    pub(super) fn from_code(code: VarInt) -> Self {
        match code.into_inner() {
            0 => Self::Done,
            1 => Self::Stopping,
            2 => Self::NotAllowed,
            3 => Self::Unnamed,
            4 => Self::Protocol,
            5 => Self::Busy,
            6 => Self::Fenced,
            7 => Self::Aborted,
            8 => Self::Suspended,
            9 => Self::Revoked,
            code => Self::Unknown(code),
        }
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Done => "done",
            Self::Stopping => "stopping",
            Self::NotAllowed => "not allowed",
            Self::Unnamed => "certificate without a name",
            Self::Protocol => "protocol broken",
            Self::Busy => "busy",
            Self::Fenced => "fenced",
            Self::Aborted => "aborted",
            Self::Suspended => "suspended",
            Self::Revoked => "certificate revoked",
            Self::Unknown(code) => return write!(f, "reason {code}"),
        })
    }
}

/// Why a link or one of its streams ended.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// The peer closed the link.
    #[error("{peer} closed the link ({reason}): {text}")]
    Closed {
        /// Who.
        peer: Name,
        /// Why, for the program.
        reason: Reason,
        /// Why, for people.
        text: String,
    },
    /// This side closed the link.
    #[error("the link to {0} was closed by this host")]
    ClosedHere(Name),
    /// Nothing is heard from the peer any more, or its QUIC stack gave up.
    #[error("the link to {peer} is lost")]
    Lost {
        /// Who.
        peer: Name,
        /// What happened.
        source: ConnectionError,
    },
    /// The sender gave up a log stream before its end: what was received of it is no log.
    #[error("{peer} broke off the stream ({reason})")]
    Reset {
        /// Who.
        peer: Name,
        /// Why.
        reason: Reason,
    },
    /// The receiver wants no more of a stream.
    #[error("{peer} stopped reading the stream ({reason})")]
    Stopped {
        /// Who.
        peer: Name,
        /// Why.
        reason: Reason,
    },
    /// A message beyond the limit, ours or the peer's.
    #[error("a control message of {0} bytes is over the limit of {MESSAGE_BYTES_MAX} bytes")]
    TooLong(usize),
    /// The control stream ended inside a message.
    #[error("the control stream of {0} ended inside a message")]
    Truncated(Name),
    /// Writing after the end of a stream.
    #[error("the stream is already finished")]
    Finished,
}

/// Who is at the other end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    /// The first DNS name of its certificate, which it proved to hold.
    pub name: Name,
    /// Where it was when the link began.
    pub address: SocketAddr,
}

/// What a link carried so far.
#[derive(Clone, Copy, Debug)]
pub struct LinkStats {
    /// Smoothed round-trip time.
    pub round_trip: Duration,
    /// UDP payload bytes sent, headers and repeats included.
    pub sent_bytes: u64,
    /// UDP payload bytes received.
    pub received_bytes: u64,
    /// Packets sent.
    pub sent_packets: u64,
    /// Packets sent that were declared lost.
    pub lost_packets: u64,
    /// Bytes the congestion controller lets be under way.
    pub congestion_window_bytes: u64,
    /// Largest UDP payload the path carries.
    pub packet_bytes: u16,
}

/// A handle on one connection; clones share it. Dropping the last handle and the last stream closes it.
#[derive(Clone)]
pub struct Link {
    bond: Arc<Bond>,
    protocol: Protocol,
    peer: Arc<Peer>,
    /// The socket of a dialled link, which serves it alone.
    own_endpoint: Option<Endpoint>,
}

impl Link {
    pub(super) fn new(
        bond: Arc<Bond>,
        protocol: Protocol,
        name: Name,
        own_endpoint: Option<Endpoint>,
    ) -> Self {
        let address = bond.connection.remote_address();
        Self {
            bond,
            protocol,
            peer: Arc::new(Peer { name, address }),
            own_endpoint,
        }
    }

    fn connection(&self) -> &Connection {
        &self.bond.connection
    }

    /// Who is at the other end.
    pub fn peer(&self) -> &Peer {
        &self.peer
    }

    /// What it is for.
    pub fn protocol(&self) -> Protocol {
        self.protocol
    }

    /// Opens a log stream. Waits while the peer already has as many as it takes.
    pub async fn open_log(&self) -> Result<LogSender, LinkError> {
        let stream = self.connection().open_uni().await;
        let stream = stream.map_err(|error| lost(&self.peer, error))?;
        Ok(LogSender {
            stream,
            peer: Arc::clone(&self.peer),
            open: true,
        })
    }

    /// Waits for the peer to open a log stream, which it cannot before this is called. Safe to cancel.
    pub async fn accept_log(&self) -> Result<LogReceiver, LinkError> {
        let connection = self.connection();
        connection.set_max_concurrent_uni_streams(VarInt::from_u32(LOG_STREAMS_MAX));
        let stream = connection.accept_uni().await;
        let stream = stream.map_err(|error| lost(&self.peer, error))?;
        Ok(LogReceiver {
            stream,
            peer: Arc::clone(&self.peer),
        })
    }

    /// What the link carried so far.
    pub fn stats(&self) -> LinkStats {
        let stats = self.connection().stats();
        LinkStats {
            round_trip: stats.path.rtt,
            sent_bytes: stats.udp_tx.bytes,
            received_bytes: stats.udp_rx.bytes,
            sent_packets: stats.path.sent_packets,
            lost_packets: stats.path.lost_packets,
            congestion_window_bytes: stats.path.cwnd,
            packet_bytes: stats.path.current_mtu,
        }
    }

    /// Closes the link at once: what is under way in either direction is lost. The peer learns `reason` and `text`.
    pub fn close(&self, reason: Reason, text: &str) {
        let text = &text.as_bytes()[..text.len().min(TEXT_BYTES_MAX)];
        self.connection().close(reason.code(), text);
    }

    /// Waits until the link is closed, by either side, and says why. Safe to cancel.
    pub async fn closed(&self) -> LinkError {
        lost(&self.peer, self.connection().closed().await)
    }

    /// Why the peer closed the link, if it did.
    pub fn closed_by_peer(&self) -> Option<Reason> {
        match self.connection().close_reason()? {
            ConnectionError::ApplicationClosed(close) => Some(Reason::from_code(close.error_code)),
            _ => None,
        }
    }

    /// Waits until the message of [`Link::close`] has left a dialled link, at most two seconds: to be called before the
    /// process ends. The links of a listener are drained by [`super::Listener::close`].
    pub async fn drained(&self) {
        if let Some(endpoint) = &self.own_endpoint {
            // A peer that is gone need not be told anything.
            let _ = tokio::time::timeout(DRAIN_MAX, endpoint.wait_idle()).await;
        }
    }
}

impl fmt::Debug for Link {
    /// Without the connection's secrets.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Link")
            .field("peer", &self.peer)
            .finish_non_exhaustive()
    }
}

/// The control stream of a link.
#[derive(Debug)]
pub struct Control {
    /// Our half.
    pub sender: ControlSender,
    /// The peer's half.
    pub receiver: ControlReceiver,
}

impl Control {
    pub(super) fn new(link: &Link, send: SendStream, recv: RecvStream) -> Self {
        // Fails only on a stream that is closed, which the first message will report.
        let _ = send.set_priority(CONTROL_PRIORITY);
        Self {
            sender: ControlSender {
                stream: send,
                peer: Arc::clone(&link.peer),
                unsent: [Bytes::new(), Bytes::new()],
            },
            receiver: ControlReceiver {
                stream: recv,
                link: link.clone(),
                partial: Partial::Length(BytesMut::with_capacity(LENGTH_BYTES)),
            },
        }
    }

    /// The stream as plain bytes both ways, for a protocol that frames itself. To be called between two messages, on
    /// both sides.
    pub fn into_stream(self) -> impl AsyncRead + AsyncWrite + Unpin + Send + 'static {
        tokio::io::join(self.receiver.stream, self.sender.stream)
    }
}

/// Sends control messages.
pub struct ControlSender {
    stream: SendStream,
    peer: Arc<Peer>,
    /// What is left of the message under way: its length, its bytes.
    unsent: [Bytes; 2],
}

impl ControlSender {
    /// Sends `message`. Waits while the link is full. If it is cancelled the message is sent by the next call, whole,
    /// before its own.
    ///
    /// # Errors
    /// [`LinkError::TooLong`] if it has more than [`MESSAGE_BYTES_MAX`] bytes; the link is still good then.
    pub async fn send(&mut self, message: Bytes) -> Result<(), LinkError> {
        let length = u32::try_from(message.len())
            .ok()
            .filter(|_| message.len() <= MESSAGE_BYTES_MAX)
            .ok_or(LinkError::TooLong(message.len()))?;
        self.flush().await?;
        self.unsent = [Bytes::copy_from_slice(&length.to_le_bytes()), message];
        self.flush().await
    }

    async fn flush(&mut self) -> Result<(), LinkError> {
        while self.unsent.iter().any(|bytes| !bytes.is_empty()) {
            self.stream
                .write_chunks(&mut self.unsent)
                .await
                .map_err(|error| write_failed(&self.peer, error))?;
        }
        Ok(())
    }

    /// Ends our half: the peer receives what was sent, then the end.
    pub fn finish(mut self) {
        // An error says that the stream is over already, which is what was asked for.
        let _ = self.stream.finish();
    }
}

/// Receives control messages.
pub struct ControlReceiver {
    stream: RecvStream,
    link: Link,
    partial: Partial,
}

/// What of a message has arrived. Lives outside the future that reads it, so that dropping the future loses nothing.
#[derive(Debug)]
enum Partial {
    /// Up to [`LENGTH_BYTES`] bytes of the length.
    Length(BytesMut),
    /// Some bytes of a message of `len` bytes.
    Body { len: usize, bytes: BytesMut },
}

impl ControlReceiver {
    /// The next message, or nothing after the peer ended its half between two messages. Safe to cancel.
    ///
    /// # Errors
    /// [`LinkError::TooLong`] if the peer announces more than [`MESSAGE_BYTES_MAX`] bytes: nothing of it is stored and
    /// the link is closed.
    pub async fn receive(&mut self) -> Result<Option<Bytes>, LinkError> {
        loop {
            let missing = match &self.partial {
                Partial::Length(bytes) => LENGTH_BYTES - bytes.len(),
                Partial::Body { len, bytes } => len - bytes.len(),
            };
            if missing == 0 {
                if let Some(message) = self.advance()? {
                    return Ok(Some(message));
                }
                continue;
            }
            let chunk = self.stream.read_chunk(missing, true).await;
            let chunk = chunk.map_err(|error| read_failed(&self.link.peer, error))?;
            match (chunk, &mut self.partial) {
                (Some(chunk), Partial::Length(bytes) | Partial::Body { bytes, .. }) => {
                    bytes.extend_from_slice(&chunk.bytes);
                }
                (None, Partial::Length(bytes)) if bytes.is_empty() => return Ok(None),
                (None, _) => return Err(LinkError::Truncated(self.link.peer.name.clone())),
            }
        }
    }

    /// From a whole length to an empty message, from a whole message to the next length.
    fn advance(&mut self) -> Result<Option<Bytes>, LinkError> {
        match &mut self.partial {
            Partial::Length(bytes) => {
                let mut length = [0; LENGTH_BYTES];
                length.copy_from_slice(bytes);
                let len = to_usize(u64::from(u32::from_le_bytes(length)));
                if len > MESSAGE_BYTES_MAX {
                    self.link
                        .close(Reason::Protocol, "control message over the limit");
                    return Err(LinkError::TooLong(len));
                }
                self.partial = Partial::Body {
                    len,
                    bytes: BytesMut::with_capacity(len),
                };
                Ok(None)
            }
            Partial::Body { bytes, .. } => {
                let message = mem::take(bytes).freeze();
                self.partial = Partial::Length(BytesMut::with_capacity(LENGTH_BYTES));
                Ok(Some(message))
            }
        }
    }
}

/// Sends one log. Dropped before [`LogSender::finish`], it breaks the stream off: a task that died in the middle never
/// looks like a log that ended.
pub struct LogSender {
    stream: SendStream,
    peer: Arc<Peer>,
    open: bool,
}

impl LogSender {
    /// Sends `chunks` without copying them; their memory is kept until the peer has acknowledged it. Waits while the
    /// link is full. Not safe to cancel: some of the bytes may have been sent, so drop the sender then.
    pub async fn write_chunks(&mut self, chunks: &mut [Bytes]) -> Result<(), LinkError> {
        let written = self.stream.write_all_chunks(chunks).await;
        written.map_err(|error| write_failed(&self.peer, error))
    }

    /// Ends the log: the receiver gets every byte, then the end. That it did is for the protocol to acknowledge.
    pub fn finish(mut self) -> Result<(), LinkError> {
        self.open = false;
        self.stream.finish().map_err(|_| LinkError::Finished)
    }

    /// Breaks the log off: the receiver gets [`LinkError::Reset`], and maybe not all bytes written before.
    pub fn reset(mut self, reason: Reason) {
        self.break_off(reason);
    }

    fn break_off(&mut self, reason: Reason) {
        if mem::take(&mut self.open) {
            // An error says that the stream is over already.
            let _ = self.stream.reset(reason.code());
        }
    }
}

impl Drop for LogSender {
    fn drop(&mut self) {
        self.break_off(Reason::Aborted);
    }
}

/// Receives one log. Dropped before its end, it tells the sender to stop.
pub struct LogReceiver {
    stream: RecvStream,
    peer: Arc<Peer>,
}

impl LogReceiver {
    /// The next bytes, at most `len_max` and often no more than one packet's; nothing after the last. Safe to cancel.
    ///
    /// # Errors
    /// [`LinkError::Reset`] if the sender broke the log off.
    pub async fn read_chunk(&mut self, len_max: usize) -> Result<Option<Bytes>, LinkError> {
        match self.stream.read_chunk(len_max, true).await {
            Ok(chunk) => Ok(chunk.map(|chunk| chunk.bytes)),
            Err(error) => Err(read_failed(&self.peer, error)),
        }
    }

    /// As [`LogReceiver::read_chunk`], as many pieces at once as have arrived and `chunks` takes. Safe to cancel.
    pub async fn read_chunks(&mut self, chunks: &mut [Bytes]) -> Result<Option<usize>, LinkError> {
        let count = self.stream.read_chunks(chunks).await;
        count.map_err(|error| read_failed(&self.peer, error))
    }

    /// Tells the sender that the rest is not wanted.
    pub fn stop(mut self, reason: Reason) {
        // An error says that the stream is over already.
        let _ = self.stream.stop(reason.code());
    }
}

/// The streams show whom they lead to and nothing of the connection.
macro_rules! debug_as_peer {
    ($($stream:ident: $($peer:ident).+),+ $(,)?) => {$(
        impl fmt::Debug for $stream {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.debug_struct(stringify!($stream))
                    .field("peer", &self.$($peer).+)
                    .finish_non_exhaustive()
            }
        }
    )+};
}

debug_as_peer! {
    ControlSender: peer,
    ControlReceiver: link.peer,
    LogSender: peer,
    LogReceiver: peer,
}

fn lost(peer: &Peer, error: ConnectionError) -> LinkError {
    let peer = peer.name.clone();
    match error {
        ConnectionError::ApplicationClosed(close) => LinkError::Closed {
            peer,
            reason: Reason::from_code(close.error_code),
            text: String::from_utf8_lossy(&close.reason).into_owned(),
        },
        ConnectionError::LocallyClosed => LinkError::ClosedHere(peer),
        source => LinkError::Lost { peer, source },
    }
}

fn read_failed(peer: &Peer, error: ReadError) -> LinkError {
    match error {
        ReadError::ConnectionLost(error) => lost(peer, error),
        ReadError::Reset(code) => LinkError::Reset {
            peer: peer.name.clone(),
            reason: Reason::from_code(code),
        },
        ReadError::ClosedStream | ReadError::IllegalOrderedRead | ReadError::ZeroRttRejected => {
            LinkError::Finished
        }
    }
}

fn write_failed(peer: &Peer, error: WriteError) -> LinkError {
    match error {
        WriteError::ConnectionLost(error) => lost(peer, error),
        WriteError::Stopped(code) => LinkError::Stopped {
            peer: peer.name.clone(),
            reason: Reason::from_code(code),
        },
        WriteError::ClosedStream | WriteError::ZeroRttRejected => LinkError::Finished,
    }
}
