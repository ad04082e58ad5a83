//! What went wrong with a disk while its guest used it, for whoever asks how the machine fares.
//!
//! An error that is no stop is the guest's to deal with: a sector that cannot be read, a write that failed and may be tried
//! again. The guest is told, and so is the person who looks after the host: a broken device is told of until the machine is
//! opened again, a lack of space until a write succeeds.
#![forbid(unsafe_code)]

use crate::{
    base::{
        chain::chain,
        sync::{
            Mutex,
            atomic::{AtomicBool, AtomicU64, Ordering},
        },
    },
    disk::DiskError,
    storage,
};

/// The errors that one disk gave its guest.
#[derive(Debug, Default)]
pub(super) struct Trouble {
    failed: AtomicU64,
    /// The last error.
    last: Mutex<String>,
    full: AtomicBool,
}

impl Trouble {
    /// A request of the guest failed.
    pub(super) fn note(&self, error: &DiskError) {
        match error {
            DiskError::Io { source, .. } if storage::is_full(source) => {
                self.full.store(true, Ordering::Relaxed);
            }
            DiskError::Io { .. } => {
                *self.last.lock() = chain(error);
                self.failed.fetch_add(1, Ordering::Relaxed);
            }
            // What the guest asked for was wrong, or the disk has stopped, which is told elsewhere.
            DiskError::OutOfRange { .. } | DiskError::ReadOnly | DiskError::Stopped(_) => {}
        }
    }

    /// A write of the guest succeeded.
    pub(super) fn wrote(&self) {
        if self.full.load(Ordering::Relaxed) {
            self.full.store(false, Ordering::Relaxed);
        }
    }

    /// What is wrong, if anything is.
    pub(super) fn told(&self) -> Option<String> {
        let failed = self.failed.load(Ordering::Relaxed);
        if failed > 0 {
            let last = self.last.lock();
            return Some(format!(
                "{failed} requests of its guest failed, the last one: {last}"
            ));
        }
        let full = self.full.load(Ordering::Relaxed);
        full.then(|| "there is no space for what its guest writes".into())
    }
}
