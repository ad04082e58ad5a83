//! The side that mounts. Everything it reads is hostile.

use std::{
    fs, io,
    io::IoSlice,
    mem::MaybeUninit,
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::PermissionsExt,
    },
    path::{Component, Path, PathBuf},
    sync::Arc,
    thread,
};

use parking_lot::Mutex;
use rustix::{
    cmsg_space,
    net::{
        AddressFamily, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
        SocketAddrUnix, SocketFlags, SocketType, accept_with, bind, connect, listen, recv, sendmsg,
        socket_with,
        sockopt::{Timeout, set_socket_timeout, socket_peercred},
    },
    process::geteuid,
};

use super::{
    CONNECTIONS_MAX, HelperError, IDLE_MAX, MESSAGE_BYTES_MAX, PATH_BYTES_MAX,
    message::{Answer, Request, encode},
};
use crate::{
    base::chain::chain,
    shim::{
        mount::Owner,
        point::{Attached, MountPoint},
    },
    storage::beneath::Beneath,
};

/// Connections that wait to be accepted.
const BACKLOG: i32 = 16;

/// A mount helper that listens.
#[derive(Debug)]
pub struct Server {
    listener: OwnedFd,
    beneath: Vec<Beneath>,
    /// Whose requests are answered: this process's own user.
    user: u32,
    /// Held from the look at a folder to the mount at it.
    turn: Mutex<()>,
}

impl Server {
    /// Listens on `socket` for requests of this process's user to mount beneath these folders. A socket file that nobody
    /// listens on is replaced.
    pub fn bind(socket: &Path, beneath: &[PathBuf]) -> Result<Self, HelperError> {
        let open = |path: &PathBuf| {
            Beneath::open(path).map_err(|source| HelperError::Beneath {
                path: path.clone(),
                source,
            })
        };
        let beneath = beneath.iter().map(open).collect::<Result<_, _>>()?;
        let listener = listen_on(socket).map_err(|source| HelperError::Listen {
            path: socket.to_owned(),
            source,
        })?;
        Ok(Self {
            listener,
            beneath,
            user: geteuid().as_raw(),
            turn: Mutex::default(),
        })
    }

    /// Answers requests until the process is ended, which may happen at any time: see the crash contract.
    pub fn run(self) -> io::Result<()> {
        let server = Arc::new(self);
        let places = Arc::new(());
        loop {
            let connection = match accept_with(&server.listener, SocketFlags::CLOEXEC) {
                Ok(connection) => connection,
                Err(rustix::io::Errno::INTR | rustix::io::Errno::CONNABORTED) => continue,
                Err(error) => return Err(error.into()),
            };
            // One of the references is the loop's own.
            if Arc::strong_count(&places) > CONNECTIONS_MAX {
                tracing::warn!(
                    "{CONNECTIONS_MAX} requests are under way: one more is not answered"
                );
                continue;
            }
            let (server, place) = (Arc::clone(&server), Arc::clone(&places));
            thread::Builder::new().spawn(move || {
                server.answer(&connection);
                drop(place);
            })?;
        }
    }

    /// Answers the one request of a connection. The descriptor of the device is closed when this returns: the client has
    /// the only one.
    fn answer(&self, connection: &OwnedFd) {
        let (answer, attached) = match self.handle(connection) {
            Ok(answered) => answered,
            Err(why) => {
                tracing::warn!("refused: {why}");
                (Answer::Refused { why }, None)
            }
        };
        tell(connection, &answer, attached.as_ref());
    }

    fn handle(&self, connection: &OwnedFd) -> Result<(Answer, Option<OwnedFd>), String> {
        // Read first in any case: an answer is lost to whoever asked when the connection is closed on something unread.
        let request = receive(connection).map_err(|error| format!("no request: {error}"))?;
        let peer = socket_peercred(connection).map_err(|error| format!("who asks: {error}"))?;
        let peer = Owner {
            user: peer.uid.as_raw(),
            group: peer.gid.as_raw(),
        };
        if peer.user != self.user {
            return Err(format!(
                "user {} asks, and this helper works for user {}; start one for that user",
                peer.user, self.user
            ));
        }
        let failed = |dir: &Path| {
            let dir = dir.display().to_string();
            move |error: io::Error| format!("{dir}: {}", chain(&error))
        };
        match Request::parse(&request)? {
            Request::Mount { dir, access } => {
                let point = self.find(&dir)?.map_err(failed(&dir))?;
                point.recover().map_err(failed(&dir))?;
                let _turn = self.turn.lock();
                let folder = point.examine().map_err(|error| chain(&error))?;
                let attached = point.attach(&folder, access, peer);
                let Attached { device, mark } = attached.map_err(|error| chain(&error))?;
                tracing::info!(dir = %point.path().display(), ?access, "mounted");
                Ok((Answer::Mounted { mark }, Some(device)))
            }
            Request::Unmount { dir, mark, how } => {
                let point = self.find(&dir)?.map_err(failed(&dir))?;
                let _turn = self.turn.lock();
                let outcome = point.detach(&mark, how).map_err(failed(&dir))?;
                tracing::info!(dir = %point.path().display(), ?how, ?outcome, "unmounting");
                Ok((Answer::Unmounted { outcome }, None))
            }
            Request::Recover { dir } => {
                let found = match self.find(&dir)? {
                    Ok(point) => point.recover().map_err(failed(&dir))?,
                    // A mount that is not there is not dead.
                    Err(error) if error.kind() == io::ErrorKind::NotFound => false,
                    Err(error) => return Err(failed(&dir)(error)),
                };
                Ok((Answer::Recovered { found }, None))
            }
        }
    }

    /// The mount point at `dir`, if it is one that may be asked for, as far as it can be reached.
    fn find(&self, dir: &Path) -> Result<io::Result<MountPoint>, String> {
        let shown = dir.display();
        if dir.as_os_str().len() > PATH_BYTES_MAX {
            return Err(format!("a path over {PATH_BYTES_MAX} bytes"));
        }
        let below = |root: &Beneath| names(dir.strip_prefix(root.path()).ok()?);
        let found = self
            .beneath
            .iter()
            .find_map(|root| Some((root, below(root)?)));
        let Some((root, (folders, name))) = found else {
            let roots: Vec<_> = self.beneath.iter().map(Beneath::path).collect();
            return Err(format!(
                "{shown} is not beneath {roots:?}, spelled without `..` and links; start the helper with --beneath of the folder it is in"
            ));
        };
        let folder = root.folder(&folders);
        let point =
            folder.and_then(|folder| MountPoint::in_folder(folder, name.into(), Some(self.user)));
        Ok(point)
    }
}

/// The folders on the way to a path below a root, and its last name; nothing for the root itself and for what leads up.
fn names(below: &Path) -> Option<(Vec<String>, String)> {
    let name = |component| match component {
        Component::Normal(name) => Some(name.to_str()?.to_owned()),
        _ => None,
    };
    let mut names: Vec<_> = below.components().map(name).collect::<Option<_>>()?;
    let last = names.pop()?;
    Some((names, last))
}

fn listen_on(path: &Path) -> io::Result<OwnedFd> {
    let address = SocketAddrUnix::new(path)?;
    let socket = || {
        let (kind, close) = (SocketType::SEQPACKET, SocketFlags::CLOEXEC);
        socket_with(AddressFamily::UNIX, kind, close, None)
    };
    match connect(socket()?, &address) {
        Ok(()) => {
            let why = "another mount helper listens there";
            return Err(io::Error::new(io::ErrorKind::AddrInUse, why));
        }
        Err(rustix::io::Errno::CONNREFUSED) => fs::remove_file(path)?,
        // Nothing is there, or what `bind` has the right words for.
        Err(_) => {}
    }
    let listener = socket()?;
    bind(&listener, &address)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
    listen(&listener, BACKLOG)?;
    Ok(listener)
}

/// Receives one message. Descriptors that come with it are not taken.
fn receive(connection: &OwnedFd) -> io::Result<Vec<u8>> {
    set_socket_timeout(connection, Timeout::Recv, Some(IDLE_MAX))?;
    // One byte more than is allowed, so that what is too long is not taken for what fits.
    let mut bytes = vec![0; MESSAGE_BYTES_MAX + 1];
    let (_, len) = recv(connection, &mut bytes[..], RecvFlags::empty())?;
    bytes.truncate(len);
    Ok(bytes)
}

/// Sends an answer. Whoever does not take it has gone, and left a dead mount if it was one.
fn tell(connection: &OwnedFd, answer: &Answer, device: Option<&OwnedFd>) {
    let too_long = || Answer::Refused {
        why: "the answer is too long".into(),
    };
    let bytes = encode(answer)
        .or_else(|| encode(&too_long()))
        .unwrap_or_default();
    let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let descriptors = device.map(|device| [device.as_fd()]);
    if let Some(descriptors) = &descriptors {
        let fits = control.push(SendAncillaryMessage::ScmRights(descriptors));
        assert!(fits, "there is room for one descriptor");
    }
    let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
    if let Err(error) = sendmsg(connection, &[IoSlice::new(&bytes)], &mut control, flags) {
        tracing::warn!("an answer was not taken: {error}");
    }
}
