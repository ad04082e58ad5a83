//! How all of it becomes durable: flush and close. One sync is enough, for nothing written since the last one depends on
//! an order (see `space` and `write`).

use std::{io, sync::atomic::Ordering};

use crate::disk::{Access, DiskError, failed};

use super::disk::VhdDisk;

impl VhdDisk {
    /// Makes every acknowledged write durable.
    pub(super) fn flush_disk(&self) -> Result<(), DiskError> {
        if self.access == Access::ReadOnly {
            return Ok(());
        }
        self.running.check()?;
        // Also if nothing was written: what a process that died wrote may be in the page cache, and its guest goes on here.
        self.sync().map_err(failed("flush", 0))
    }

    /// Flushes and leaves the file no longer than need be.
    pub(super) fn close_disk(&self) -> Result<(), DiskError> {
        if self.access == Access::ReadOnly {
            return Ok(());
        }
        self.flush_disk()?;
        if let (Some(blocks), true) = (&self.blocks, self.written.load(Ordering::Acquire)) {
            blocks
                .space
                .lock()
                .truncate(self.storage.as_ref())
                .and_then(|()| self.sync())
                .map_err(|source| {
                    self.running.stop("closing the image failed");
                    failed("flush", 0)(source)
                })?;
        }
        self.running.close();
        Ok(())
    }

    /// Makes everything written so far durable; what a failed sync leaves is unknown, so it is the last one.
    pub(super) fn sync(&self) -> io::Result<()> {
        let blocks = self.blocks.as_ref();
        let changes = blocks.map_or(0, |blocks| blocks.changes.load(Ordering::Acquire));
        self.storage
            .sync()
            .inspect_err(|_| self.running.sync_failed())?;
        if let Some(blocks) = blocks {
            blocks.durable.fetch_max(changes, Ordering::AcqRel);
        }
        Ok(())
    }
}
