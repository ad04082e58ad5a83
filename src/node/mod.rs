//! Floor 5: a host: configuration, the loops that drive the floors below, the control socket.
//!
//! ```text
//!   primary    images -> machine (tracked) -> mount                   secondary   listener -> session for each machine
//!   driver     the replication thread: dial, talk, dial again         session     Receiver + replica store + link
//!   conversation   one link: Sender + maps + log                      admission   who may feed which replica
//!   exposure   a recovery point as writable disks in a mount            test_failover   several of them
//!   pipeline   packs frames on worker threads, in order               status      what all of them tell
//!   control    the socket that `status` and operators use
//! ```
//! Async code is confined to links and sockets. What owns state (a replication, a receiving session, a merge) is one
//! thread with one loop: select, handle, act.
#![forbid(unsafe_code)]

mod admission;
pub mod control;
mod conversation;
pub mod convert;
mod driver;
mod exposure;
pub mod images;
mod pipeline;
pub mod primary;
mod progress;
mod replicas;
pub mod secondary;
mod session;
pub mod status;
mod test_failover;
mod tracking;
mod writers;

use std::{
    fs::{File, TryLockError},
    io,
    path::Path,
    sync::Arc,
    time::Duration,
};

use tokio::signal::unix::{Signal, SignalKind, signal};

use self::primary::{Primary, PrimaryError};
use crate::shim::{Unmount, UnmountError};

/// Where tracking state lives unless told otherwise.
pub const STATE_FOLDER: &str = "/var/lib/understudy";
/// Time between two attempts to unmount what is still in use.
const UNMOUNT_AGAIN: Duration = Duration::from_millis(500);

/// Locks a folder for this process by a file in it; nothing if another process holds it. The lock lasts as long as the
/// file is open.
fn lock_folder(folder: &Path) -> io::Result<Option<File>> {
    let lock = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(folder.join("lock"))?;
    match lock.try_lock() {
        Ok(()) => Ok(Some(lock)),
        Err(TryLockError::WouldBlock) => Ok(None),
        Err(TryLockError::Error(error)) => Err(error),
    }
}

/// SIGTERM and SIGINT, in the order in which they come.
#[derive(Debug)]
pub struct StopSignals {
    terminate: Signal,
    interrupt: Signal,
}

/// Catches SIGTERM and SIGINT from now on.
pub fn stop_signals() -> io::Result<StopSignals> {
    Ok(StopSignals {
        terminate: signal(SignalKind::terminate())?,
        interrupt: signal(SignalKind::interrupt())?,
    })
}

impl StopSignals {
    /// Waits for the next one.
    pub async fn next(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}

/// Stops a primary: unmounts as soon as nobody uses the mount, or at the next signal in any case, and closes the images.
pub async fn shut_down(
    primary: &Arc<Primary>,
    stop: &mut StopSignals,
    say: impl Fn(&str),
) -> Result<(), PrimaryError> {
    let mut how = Unmount::IfUnused;
    let mut told = false;
    loop {
        let stopping = Arc::clone(primary);
        let stopped = tokio::task::spawn_blocking(move || stopping.stop(how)).await;
        match stopped.expect("stopping does not panic") {
            Err(PrimaryError::Unmount(busy @ UnmountError::Busy { .. })) => {
                if !told {
                    say(&format!("{busy}; waiting, signal again to detach"));
                    told = true;
                }
            }
            other => return other,
        }
        tokio::select! {
            () = stop.next() => how = Unmount::Detach,
            () = tokio::time::sleep(UNMOUNT_AGAIN) => {}
        }
    }
}
