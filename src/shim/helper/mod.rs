//! The mount helper: a process that does nothing but mount and unmount, so that whoever serves disks need not be able to.
//!
//! ```text
//!   understudy serve                              understudy mount-helper
//!   no capability, a mount namespace of its own   CAP_SYS_ADMIN, the host's mount namespace, no network
//!     | Client ── one request ── seqpacket socket ──> Server: SO_PEERCRED, parse, find beneath
//!     |                                                 | point.rs: examine, mount
//!     | <── answer, descriptor of /dev/fuse ──────────  |
//!     v                                                 v closes the descriptor, forgets everything
//!   serves the disks through it                       waits for the next request
//! ```
//! A FUSE mount is served through a descriptor, so it does not matter in which namespace its server lives; where it is seen
//! is decided by who mounts. Systemd makes the namespace of every unit that has one a slave of the host's: nothing mounted
//! in it is seen by a hypervisor. So a unit either mounts or is confined, and this makes two units of one.
//!
//! # What the helper believes
//! Nothing. Whoever serves disks reads what guests and peers send, and may have been taken over.
//! - It answers processes of its own user and of nobody else, as the kernel names them.
//! - A request is one message below [`MESSAGE_BYTES_MAX`], strictly parsed. There are three of them.
//! - It mounts at empty folders of that user, beneath the folders it was told, which no `..` and no link leads out of, with
//!   fixed options: nosuid, nodev, noexec. It unmounts file systems of type `fuse.understudy` of that user there.
//!
//! Whoever may rename folders beneath and outside can carry a mount out afterwards, to a place of its own: no more than it
//! could do without the helper, and less than a mount namespace of its own would let it see.
//!
//! # Why it runs as the user it works for
//! With that user's identity the kernel itself checks each folder on the way, and `CAP_SYS_ADMIN` is all that is needed: root
//! without more could not enter a store of mode 0700. The user can stop the helper, but not enter it: a process with a
//! capability that others lack cannot be traced by them.
//!
//! # Crash contract
//! Neither process keeps a state of the other; a request carries all that it needs and may be repeated.
//!
//! | who dies | when | what is left |
//! | --- | --- | --- |
//! | helper | before the mount is made | nothing; the request is repeated for [`REACH_MAX`], then it fails |
//! | helper | mount made, descriptor not sent | a dead mount, which the repeated request takes away first |
//! | helper | at any other time | all mounts, served as before; a new helper can unmount them |
//! | helper | unmounted, not told | nothing mounted; the repeated request finds that |
//! | server of the disks | at any time | a dead mount, until the next start asks to recover it |
//! | both | at any time | the same |
//!
//! A dead mount is left on purpose: it answers `ENOTCONN` to a guest that is started on it. Unmounted, its folder would be an
//! empty one of the host, in which a tool that creates what it does not find makes a disk that nobody tracks.
//! Where nothing can be unmounted because there is no helper, nothing changes: the disks are served on.

mod client;
mod message;
mod server;

use std::{io, path::PathBuf, time::Duration};

pub use self::{client::Client, server::Server};

/// Longest path of a mount point, in bytes: half of a path of Linux, and far above what a person types.
pub const PATH_BYTES_MAX: usize = 1024;
/// Longest message either way, in bytes: a path of which each byte is escaped, twice, and some words.
pub const MESSAGE_BYTES_MAX: usize = 16 << 10;
/// Connections that the helper answers at once; the next ones are closed, and their clients try again. A host asks for one
/// mount at a time for each machine.
pub const CONNECTIONS_MAX: usize = 32;
/// How long a connection may say nothing before it is closed.
pub const IDLE_MAX: Duration = Duration::from_secs(5);
/// How long a client waits for an answer. Only a mount whose server hangs lets the helper wait.
pub const ANSWER_MAX: Duration = Duration::from_secs(30);
/// How long a client tries to reach a helper that is not there, or dies meanwhile: it may be on its way up.
pub const REACH_MAX: Duration = Duration::from_secs(5);

const _: () = assert!(MESSAGE_BYTES_MAX > 2 * 6 * PATH_BYTES_MAX);

/// Why a mount helper cannot work, or did not do what it was asked for.
#[derive(Debug, thiserror::Error)]
pub enum HelperError {
    /// The socket cannot be bound.
    #[error("cannot listen on {}", path.display())]
    Listen {
        /// The socket.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// A folder to mount beneath cannot be opened.
    #[error("cannot mount beneath {}", path.display())]
    Beneath {
        /// The folder.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// No helper answers.
    #[error(
        "the mount helper does not answer on {}; start it (systemctl start understudy-mount), as the same user",
        path.display()
    )]
    Unreachable {
        /// Its socket.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// It said no.
    #[error("the mount helper refuses: {0}")]
    Refused(String),
    /// It said something else than what it was asked for.
    #[error("the mount helper answers otherwise than expected; both must be of the same version")]
    NotUnderstood,
}
