//! The side that asks: one connection for each request, so that a helper may be restarted at any time.

use std::{
    io::{self, IoSlice, IoSliceMut},
    mem::MaybeUninit,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use rustix::{
    cmsg_space,
    net::{
        AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
        SendFlags, SocketAddrUnix, SocketFlags, SocketType, connect, recvmsg, sendmsg, socket_with,
        sockopt::{Timeout, set_socket_timeout},
    },
};

use super::{
    ANSWER_MAX, HelperError, MESSAGE_BYTES_MAX, REACH_MAX,
    message::{Answer, Request, encode},
};
use crate::shim::{
    mount::{Unmount, Visibility},
    point::{Attached, Detached},
};

/// Time between two attempts to reach a helper.
const REACH_AGAIN: Duration = Duration::from_millis(50);

/// A mount helper, as those see it who ask it for mounts.
#[derive(Debug)]
pub struct Client {
    socket: PathBuf,
}

impl Client {
    /// The helper that listens on `socket`, now or later.
    pub fn new(socket: PathBuf) -> Self {
        Self { socket }
    }

    /// Mounts at `dir`, an absolute path.
    pub(in crate::shim) fn mount(
        &self,
        dir: &Path,
        access: Visibility,
    ) -> Result<Attached, HelperError> {
        let dir = dir.to_owned();
        match self.ask(&Request::Mount { dir, access })? {
            (Answer::Mounted { mark }, Some(device)) => Ok(Attached { device, mark }),
            _ => Err(HelperError::NotUnderstood),
        }
    }

    /// Unmounts what has this mark.
    pub(in crate::shim) fn unmount(
        &self,
        dir: &Path,
        mark: &str,
        how: Unmount,
    ) -> Result<Detached, HelperError> {
        let (dir, mark) = (dir.to_owned(), mark.to_owned());
        match self.ask(&Request::Unmount { dir, mark, how })? {
            (Answer::Unmounted { outcome }, _) => Ok(outcome),
            _ => Err(HelperError::NotUnderstood),
        }
    }

    /// Takes away a dead mount, and says whether there was one.
    pub(in crate::shim) fn recover(&self, dir: &Path) -> Result<bool, HelperError> {
        let dir = dir.to_owned();
        match self.ask(&Request::Recover { dir })? {
            (Answer::Recovered { found }, _) => Ok(found),
            _ => Err(HelperError::NotUnderstood),
        }
    }

    fn ask(&self, request: &Request) -> Result<(Answer, Option<OwnedFd>), HelperError> {
        let too_long = || HelperError::Refused("the path is too long".into());
        let request = encode(request).ok_or_else(too_long)?;
        let until = Instant::now() + REACH_MAX;
        let (answer, device) = loop {
            match self.ask_once(&request) {
                Ok(answered) => break answered,
                // Every request may be repeated: see the crash contract.
                Err(error) if is_away(&error) && Instant::now() < until => {
                    thread::sleep(REACH_AGAIN);
                }
                Err(source) => {
                    let path = self.socket.clone();
                    return Err(HelperError::Unreachable { path, source });
                }
            }
        };
        match serde_json::from_slice(&answer) {
            Ok(Answer::Refused { why }) => Err(HelperError::Refused(why)),
            Ok(answer) => Ok((answer, device)),
            Err(_) => Err(HelperError::NotUnderstood),
        }
    }

    fn ask_once(&self, request: &[u8]) -> io::Result<(Vec<u8>, Option<OwnedFd>)> {
        let (kind, close) = (SocketType::SEQPACKET, SocketFlags::CLOEXEC);
        let socket = socket_with(AddressFamily::UNIX, kind, close, None)?;
        set_socket_timeout(&socket, Timeout::Send, Some(ANSWER_MAX))?;
        set_socket_timeout(&socket, Timeout::Recv, Some(ANSWER_MAX))?;
        connect(&socket, &SocketAddrUnix::new(&self.socket)?)?;
        let mut nothing = SendAncillaryBuffer::default();
        let request = [IoSlice::new(request)];
        sendmsg(&socket, &request, &mut nothing, SendFlags::NOSIGNAL)?;
        let mut answer = vec![0; MESSAGE_BYTES_MAX];
        let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut into = [IoSliceMut::new(&mut answer)];
        let message = recvmsg(&socket, &mut into, &mut control, RecvFlags::CMSG_CLOEXEC)?;
        let mut device = None;
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(mut descriptors) = message {
                device = descriptors.next();
            }
        }
        if message.bytes == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        answer.truncate(message.bytes);
        Ok((answer, device))
    }
}

/// Whether there is no helper at the moment, or it died before it answered.
fn is_away(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::NotFound
            | io::ErrorKind::ConnectionRefused
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::BrokenPipe
            | io::ErrorKind::NotConnected
            | io::ErrorKind::UnexpectedEof
    )
}
