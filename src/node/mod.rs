//! Floor 5: a host: configuration, the loops that drive the floors below, the control socket.
//!
//! ```text
//!   host       machines in their parts, and the peers that call       admission   what a link is for, and whether it may
//!   audit      who asked for what, and who was refused           allowance   for which machines a peer may speak, how much
//!   primary    disks (sources) -> machine (tracked) -> mount          served      a replica: received into, kept, tested
//!   driver     the replication thread: dial, talk, dial again         session     Receiver + replica store + link
//!   conversation   one link: Sender + maps + log                      writers     writes of an initial copy, beside it
//!   call       short questions about roles                            test_failover   several exposures
//!   exposure   a recovery point as writable disks in a mount          progress    what the status knows of a link
//!   pipeline   packs frames on worker threads, in order               status      what all of them tell
//!   policy     when and how fast an operator lets it replicate        pacing      keeps to that while sending
//!   initial_copy   when it begins                                   portable   it as a file that is carried
//!   control    what operators ask, on a socket                        operate      the same over the network
//!   coordinator   jobs and plans: what concerns several hosts
//!   hardening  what the process gives up before it begins
//!   sync_flush   flushes that wait for the replica                 verify   how far a verification is, and what it found
//! ```
//! Async code is confined to links and sockets. What owns state (a replication, a receiving session, a merge) is one
//! thread with one loop: select, handle, act.
#![forbid(unsafe_code)]

mod admission;
mod allowance;
pub mod audit;
mod call;
pub mod control;
mod conversation;
pub mod convert;
pub mod coordinator;
mod driver;
mod exposure;
pub mod hardening;
pub mod host;
pub mod images;
pub mod initial_copy;
pub mod operate;
mod pacing;
mod pipeline;
pub mod policy;
mod portable;
pub mod primary;
mod progress;
mod served;
mod session;
mod sources;
pub mod status;
pub mod sync_flush;
mod test_failover;
mod tracking;
mod verify;
mod writers;

use std::{
    fs::{File, TryLockError},
    io,
    path::Path,
    time::{Duration, Instant},
};

use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::shim::{Unmount, UnmountError};

/// Where tracking state lives unless told otherwise.
pub const STATE_FOLDER: &str = "/var/lib/understudy";
/// Time between two attempts to unmount what is still in use.
const UNMOUNT_AGAIN: Duration = Duration::from_millis(500);

/// How long what another process holds may be what a dead one left: a node that is killed while it begins a script leaves its
/// files open in the child until that has become the script.
const LEFT_OPEN_MAX: Duration = Duration::from_millis(500);
/// Pause before it is looked again.
const LEFT_OPEN_AGAIN: Duration = Duration::from_millis(10);

/// Locks a folder for this process by a file in it; nothing if another process holds it. The lock lasts as long as the
/// file is open.
fn lock_folder(folder: &Path) -> io::Result<Option<File>> {
    let lock = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(folder.join("lock"))?;
    let began = Instant::now();
    loop {
        match lock.try_lock() {
            Ok(()) => return Ok(Some(lock)),
            Err(TryLockError::WouldBlock) if began.elapsed() < LEFT_OPEN_MAX => {
                std::thread::sleep(LEFT_OPEN_AGAIN);
            }
            Err(TryLockError::WouldBlock) => return Ok(None),
            Err(TryLockError::Error(error)) => return Err(error),
        }
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

/// Stops what `stopping` stops: unmounts as soon as nobody uses the mount, or at the next signal in any case, and closes
/// the images.
pub async fn shut_down<E, F>(
    stop: &mut StopSignals,
    say: impl Fn(&str),
    stopping: impl Fn(Unmount) -> F,
    busy: impl Fn(&E) -> Option<&UnmountError>,
) -> Result<(), E>
where
    F: Future<Output = Result<(), E>>,
{
    let mut how = Unmount::IfUnused;
    let mut told = false;
    loop {
        match stopping(how).await {
            Err(error) => match busy(&error) {
                Some(busy) if !told => {
                    say(&format!("{busy}; waiting, signal again to detach"));
                    told = true;
                }
                Some(_) => {}
                None => return Err(error),
            },
            Ok(()) => return Ok(()),
        }
        tokio::select! {
            () = stop.next() => how = Unmount::Detach,
            () = tokio::time::sleep(UNMOUNT_AGAIN) => {}
        }
    }
}
