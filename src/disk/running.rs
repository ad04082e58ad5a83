//! Whether a disk still takes writes. What a failed sync leaves is unknown, so it is the end of all writing.

use std::{io, sync::OnceLock};

use super::DiskError;
use crate::storage;

/// The stop of a disk, which is final.
#[derive(Debug)]
pub(super) struct Running {
    format: &'static str,
    /// Why nothing may be written any more.
    stopped: OnceLock<String>,
}

impl Running {
    /// A disk that runs, of a `format` that has this name in the log.
    pub(super) fn new(format: &'static str) -> Self {
        Self {
            format,
            stopped: OnceLock::new(),
        }
    }

    /// Refuses, with the reason, what a stopped disk does not do.
    pub(super) fn check(&self) -> Result<(), DiskError> {
        match self.stopped.get() {
            Some(reason) => Err(DiskError::Stopped(reason.clone())),
            None => Ok(()),
        }
    }

    /// Nothing may be written from now on, because of `reason`. The first to stop the disk says why.
    pub(super) fn stop(&self, reason: &str) {
        if self.stopped.set(reason.to_owned()).is_ok() {
            tracing::error!(reason, "a {} disk stopped", self.format);
        }
    }

    /// Stops the disk after a failed sync.
    pub(super) fn sync_failed(&self) {
        self.stop("an earlier flush failed, and what it was to make durable may be lost");
    }

    /// Stops the disk after a failed forced write, unless the host is only out of space.
    pub(super) fn forced_write_failed(&self, error: &io::Error) {
        if !storage::is_full(error) {
            self.stop("a write that was to be durable failed");
        }
    }

    /// The disk was closed: everything later is refused, a second close as well. That is nothing for the log.
    pub(super) fn close(&self) {
        // The first to stop the disk says why.
        let _ = self.stopped.set("it was closed".into());
    }
}
