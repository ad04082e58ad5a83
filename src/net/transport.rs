//! Limits, windows and sockets: everything about QUIC and TLS that is the same for every link.
//!
//! # Why these numbers
//! A window must hold what is under way on the fastest long link we promise to fill: 1 Gbit/s x 100 ms = 12.5 MB, and
//! twice that so that a lost packet does not stop the flow. The window of the whole connection is left open on
//! purpose: if log streams could use it up, a replica whose disk is slow could no longer be told anything. What a peer
//! can make us hold is therefore (streams) x (stream window), 50 MB for each link that is waiting for logs. A link may carry
//! none before somebody waits for one: who was let in and has not said yet what for holds a control stream, 25 MB.
//!
//! Packets grow to 16,250 bytes where the path carries them: every packet costs about a microsecond and a half of processor
//! time at each end, whatever its size, and with jumbo frames the path carries 8,952 bytes of payload. More gains little:
//! four such packets fill the largest send that the kernel takes (`net::socket` sees to that limit).
//!
//! The receive buffer holds a whole stream window. What it does not hold is lost, and the congestion controller takes a
//! receiver that was not scheduled for some milliseconds for a link that is full.
//!
//! # Why no tickets
//! A resumed session would skip the certificate: a host whose certificate was withdrawn could come back with a ticket.
//! Early data could be replayed. Both save one round trip per outage, which is worth neither.
//!
//! # Why a lasting reset key
//! A listener that was killed and started again knows nothing of its old links, and their dialers would wait for
//! [`IDLE_MAX`] before they dial anew. With a key that outlives the process it can tell them so with the token they were
//! given (RFC 9000 section 10.3), and they are back after one round trip. The key follows from the host's private key, so
//! nobody else can break a link with it.

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use nix::sys::socket::{setsockopt, sockopt};
use quinn::{
    ClientConfig, Connection, ConnectionId, ConnectionIdGenerator, Endpoint, EndpointConfig,
    IdleTimeout, MtuDiscoveryConfig, Runtime, ServerConfig, TokioRuntime, TransportConfig, VarInt,
    crypto::rustls::{HandshakeData, QuicClientConfig, QuicServerConfig},
    udp::{UdpSockRef, UdpSocketState},
};
use ring::{
    hmac,
    rand::{self, SystemRandom},
};
use rustls::{
    client::{Resumption, WebPkiServerVerifier},
    crypto::CryptoProvider,
    pki_types::{CertificateDer, PrivateKeyDer},
    server::{NoServerSessionStorage, danger::ClientCertVerifier},
    version::TLS13,
};

use super::socket::RowSocket;

/// What a link is for. The dialler names it in the handshake, so that a listener knows whom to let in before the first
/// byte: whoever may feed a host may not operate it, and the other way round.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// A host replicates machines to another, and asks about their roles.
    Replicate,
    /// An operator asks a host for its status, and gives it orders.
    Operate,
}

impl Protocol {
    const ALL: [Self; 2] = [Self::Replicate, Self::Operate];

    /// Its name in the handshake (ALPN, RFC 7301).
    pub const fn alpn(self) -> &'static [u8] {
        match self {
            Self::Replicate => b"understudy/1",
            Self::Operate => b"understudy-operate/1",
        }
    }

    /// What the handshake of a connection agreed on.
    pub(super) fn of(connection: &Connection) -> Option<Self> {
        let data = connection.handshake_data()?;
        let named = data.downcast::<HandshakeData>().ok()?.protocol?;
        Self::ALL
            .into_iter()
            .find(|protocol| protocol.alpn() == named)
    }
}

/// Log streams that a peer may have open at once on a link on which they are waited for: the one that is read, and the
/// next, begun when its sender gave the first one up.
pub const LOG_STREAMS_MAX: u32 = 2;
/// Bytes under way on one stream: twice 1 Gbit/s x 100 ms.
pub const STREAM_WINDOW_BYTES: u32 = 25_000_000;
/// Bytes that one link keeps until the peer has acknowledged them.
pub const SEND_WINDOW_BYTES: u64 = 32_000_000;
/// Largest packet, see above.
pub const PACKET_BYTES_MAX: u16 = 16_250;
/// A link on which nothing was heard for this long is lost.
pub const IDLE_MAX: Duration = Duration::from_secs(15);
/// How often a silent link says that it is there: three may be lost.
pub const KEEP_ALIVE: Duration = Duration::from_secs(4);
/// From the first packet to a usable link.
pub const HANDSHAKE_MAX: Duration = Duration::from_secs(10);
/// What a round trip is taken for until one was measured. It decides how soon a lost packet of a handshake is sent again:
/// after three times this, then twice as long each time. RFC 9002 (6.2.2) proposes 333 ms for whoever knows nothing; hosts
/// that replicate are closer, and on a link that loses a fifth of its packets a second lost with each makes dialling fail.
const ROUND_TRIP_FIRST: Duration = Duration::from_millis(100);
/// Handshakes under way at once; what comes beyond is refused until one of them ends.
pub const HANDSHAKES_MAX: usize = 64;
/// Handshakes of one address under way at once: of a host with many machines each dials for itself, and tries again.
pub const HANDSHAKES_PER_ADDRESS_MAX: usize = 32;
/// Handshakes under way from which on a caller must first prove that its address is its own.
pub const HANDSHAKES_UNPROVED_MAX: usize = 16;
/// Links of one listener at once.
pub const LINKS_MAX: usize = 256;
/// Links of one peer at once, whatever they are for.
pub const LINKS_PER_PEER_MAX: usize = LINKS_MAX / 2;
/// Length of the connection ids this host hands out, in bytes.
const CONNECTION_ID_BYTES: usize = 8;
/// Buffer asked of the kernel for each direction of a socket, in bytes; the kernel gives up to `net.core.rmem_max`.
const SOCKET_BYTES: usize = 8 << 20;
/// Receive buffer of a process that may go beyond `net.core.rmem_max`, in bytes; see above.
const RECEIVE_BYTES: usize = 32 << 20;
/// A receive buffer below this loses packets at 1 Gbit/s whenever the process is not scheduled for 8 ms.
const SOCKET_BYTES_MIN: usize = 1 << 20;

const _: () = assert!(2 * HANDSHAKES_PER_ADDRESS_MAX <= HANDSHAKES_MAX);
const _: () = assert!(IDLE_MAX.as_secs() > 3 * KEEP_ALIVE.as_secs());
const _: () = assert!(RECEIVE_BYTES > STREAM_WINDOW_BYTES as usize);
const _: () = assert!(SEND_WINDOW_BYTES > STREAM_WINDOW_BYTES as u64);

/// TLS for the listening side: TLS 1.3, a client certificate required, no resumption, no early data.
pub(super) fn server_crypto(
    callers: Arc<dyn ClientCertVerifier>,
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
) -> Result<QuicServerConfig, rustls::Error> {
    let mut config = rustls::ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13])?
        .with_client_cert_verifier(callers)
        .with_single_cert(chain, key)?;
    config.alpn_protocols = Protocol::ALL
        .map(|protocol| protocol.alpn().to_vec())
        .to_vec();
    config.send_tls13_tickets = 0;
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.max_early_data_size = 0;
    Ok(QuicServerConfig::try_from(config).expect("ring has the cipher suite QUIC begins with"))
}

/// TLS for the dialling side of a link for `protocol`.
pub(super) fn client_crypto(
    called: Arc<WebPkiServerVerifier>,
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
    protocol: Protocol,
) -> Result<QuicClientConfig, rustls::Error> {
    let mut config = rustls::ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13])?
        .with_webpki_verifier(called)
        .with_client_auth_cert(chain, key)?;
    config.alpn_protocols = vec![protocol.alpn().to_vec()];
    config.resumption = Resumption::disabled();
    config.enable_early_data = false;
    Ok(QuicClientConfig::try_from(config).expect("ring has the cipher suite QUIC begins with"))
}

pub(super) fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

/// QUIC for the listening side: the peer opens the one control stream.
pub(super) fn server_config(crypto: Arc<QuicServerConfig>) -> ServerConfig {
    let mut config = ServerConfig::with_crypto(crypto);
    config.transport_config(Arc::new(transport(1)));
    config.max_incoming(HANDSHAKES_MAX);
    config.incoming_buffer_size(64 * 1024);
    config.incoming_buffer_size_total(4 << 20);
    config
}

/// QUIC for the dialling side: the peer opens no control stream.
pub(super) fn client_config(crypto: Arc<QuicClientConfig>) -> ClientConfig {
    let mut config = ClientConfig::new(crypto);
    config.transport_config(Arc::new(transport(0)));
    config
}

fn transport(control_streams: u32) -> TransportConfig {
    let mut discovery = MtuDiscoveryConfig::default();
    discovery.upper_bound(PACKET_BYTES_MAX);
    let mut config = TransportConfig::default();
    config
        .max_concurrent_bidi_streams(VarInt::from_u32(control_streams))
        .max_concurrent_uni_streams(VarInt::from_u32(0))
        .stream_receive_window(VarInt::from_u32(STREAM_WINDOW_BYTES))
        .send_window(SEND_WINDOW_BYTES)
        .datagram_receive_buffer_size(None)
        .initial_rtt(ROUND_TRIP_FIRST)
        .mtu_discovery_config(Some(discovery))
        .keep_alive_interval(Some(KEEP_ALIVE))
        .max_idle_timeout(Some(
            IdleTimeout::try_from(IDLE_MAX).expect("some seconds are a valid idle time"),
        ));
    config
}

/// What lets a host disown the links of its former life: the same for every process with the same private key.
#[derive(Clone, Copy)]
pub(super) struct ResetKey([u8; 32]);

impl ResetKey {
    pub(super) fn of(key: &PrivateKeyDer<'_>) -> Self {
        let key = hmac::Key::new(hmac::HMAC_SHA256, key.secret_der());
        let tag = hmac::sign(&key, b"understudy stateless reset");
        Self(tag.as_ref().try_into().expect("SHA-256 has 32 bytes"))
    }

    fn config(self) -> EndpointConfig {
        let mut config = EndpointConfig::new(Arc::new(hmac::Key::new(hmac::HMAC_SHA256, &self.0)));
        config.cid_generator(|| Box::new(AnyConnectionId));
        config
    }
}

/// Random connection ids, of which every one is taken for an own one: quinn's default answers no packets of a former
/// life. Its resets are never longer than what they answer, and fifty a second at most.
struct AnyConnectionId;

impl ConnectionIdGenerator for AnyConnectionId {
    fn generate_cid(&mut self) -> ConnectionId {
        let random = rand::generate::<[u8; CONNECTION_ID_BYTES]>(&SystemRandom::new())
            .expect("the system has random numbers");
        ConnectionId::new(&random.expose())
    }

    fn cid_len(&self) -> usize {
        CONNECTION_ID_BYTES
    }

    fn cid_lifetime(&self) -> Option<Duration> {
        None
    }
}

/// An endpoint on a socket bound to `address`, listening if `server` is given.
pub(super) fn endpoint(
    address: SocketAddr,
    reset: ResetKey,
    server: Option<Arc<ServerConfig>>,
) -> io::Result<Endpoint> {
    let socket = std::net::UdpSocket::bind(address)?;
    widen(&socket)?;
    let mut config = reset.config();
    config
        .max_udp_payload_size(PACKET_BYTES_MAX)
        .expect("the largest packet is one that QUIC allows");
    let runtime = Arc::new(TokioRuntime);
    let socket = Arc::new(RowSocket(runtime.wrap_udp_socket(socket)?));
    Endpoint::new_with_abstract_socket(config, server.map(Arc::unwrap_or_clone), socket, runtime)
}

/// Asks for large socket buffers: what does not fit is dropped by the kernel, and the sender takes it for congestion.
fn widen(socket: &std::net::UdpSocket) -> io::Result<()> {
    let state = UdpSocketState::new(UdpSockRef::from(socket))?;
    state.set_send_buffer_size(UdpSockRef::from(socket), SOCKET_BYTES)?;
    state.set_recv_buffer_size(UdpSockRef::from(socket), SOCKET_BYTES)?;
    // Needs CAP_NET_ADMIN, socket(7). Without it what the line above got has to do.
    let _ = setsockopt(socket, sockopt::RcvBufForce, &RECEIVE_BYTES);
    let received = state.recv_buffer_size(UdpSockRef::from(socket))?;
    if received < SOCKET_BYTES_MIN {
        tracing::warn!(
            "the kernel gives {received} bytes of UDP receive buffer: replication will be slow; \
             raise it with `sysctl -w net.core.rmem_max={SOCKET_BYTES}`"
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_privileged_receiver_has_room_for_a_window() {
        let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        if setsockopt(&socket, sockopt::RcvBufForce, &SOCKET_BYTES_MIN).is_err() {
            eprintln!("SKIPPED: only a process with CAP_NET_ADMIN may have large socket buffers");
            return;
        }
        widen(&socket).unwrap();
        let state = UdpSocketState::new(UdpSockRef::from(&socket)).unwrap();
        let received = state.recv_buffer_size(UdpSockRef::from(&socket)).unwrap();
        assert!(
            received > usize::try_from(STREAM_WINDOW_BYTES).unwrap(),
            "{received} bytes"
        );
    }
}
