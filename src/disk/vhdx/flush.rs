//! How all of it becomes durable: flush, checkpoint, close.
//!
//! Everything is done in rounds. A round notes what is logged, syncs, and then knows that to be durable; what may
//! follow from it (pages put in place, places cleared) is left for the next round's sync to make durable. A guest that
//! flushes therefore pays one sync for each flush and gets its checkpoints for nothing; only a ring that runs low
//! without flushes makes somebody sync for its sake. No round holds a lock that reads and writes of present blocks need.

use std::{io, sync::atomic::Ordering};

use crate::{
    base::units::MIB,
    disk::{Access, DiskError, failed},
};

use super::disk::VhdxDisk;

/// What a round does with pages that are not in place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Pages {
    /// Puts them there.
    Place,
    /// Nothing.
    Leave,
}

impl VhdxDisk {
    /// Makes every acknowledged write durable.
    pub(super) fn flush_disk(&self) -> Result<(), DiskError> {
        if self.access == Access::ReadOnly {
            return Ok(());
        }
        self.running.check()?;
        if !self.journal.has_begun() {
            // Nothing was written since the image was opened. A process that was killed before may have: what it wrote
            // into present blocks is in no log, and not durable yet.
            return self.sync();
        }
        // Who finds a checkpoint under way leaves the rest to it and only syncs.
        let Some(mut placed) = self.checkpoint.try_lock() else {
            let mark = self.journal.mark();
            let len = self.space.len();
            self.sync()?;
            self.journal.synced(&mark, len);
            return Ok(());
        };
        let pages = if self.journal.is_due() && placed.is_none() {
            Pages::Place
        } else {
            Pages::Leave
        };
        self.round(&mut placed, pages)
    }

    /// Makes room in a log that runs low.
    pub(super) fn make_room(&self) -> Result<(), DiskError> {
        let mut placed = self.checkpoint.lock();
        self.running.check()?;
        if !self.journal.is_low() {
            return Ok(());
        }
        self.empty_log(&mut placed)
    }

    /// Puts all pages in place, durably, and writes down that nothing of the log is needed any more but the entry that
    /// says so: nothing older is ever replayed.
    pub(super) fn empty_log(&self, placed: &mut Option<u64>) -> Result<(), DiskError> {
        self.round(placed, Pages::Place)?;
        self.round(placed, Pages::Leave)?;
        // Only a durable entry that names the new tail frees the space before it.
        self.journal
            .record_tail(&self.space)
            .map_err(|error| self.commit_failed("flush", 0, &error))?;
        self.round(placed, Pages::Leave)
    }

    /// Flushes and leaves the image clean and no longer than need be.
    pub(super) fn close_disk(&self) -> Result<(), DiskError> {
        if self.access == Access::ReadOnly {
            return Ok(());
        }
        self.running.check()?;
        if self.journal.has_begun() {
            let mut placed = self.checkpoint.lock();
            self.round(&mut placed, Pages::Place)?;
            self.round(&mut placed, Pages::Leave)?;
            self.leave_clean().map_err(|source| {
                self.running.stop("closing the image failed");
                failed("flush", 0)(source)
            })?;
        } else {
            self.sync()?;
        }
        self.running.close();
        Ok(())
    }

    /// One sync and what it allows. `placed` is the position up to which pages are in place, not yet durably.
    pub(super) fn round(&self, placed: &mut Option<u64>, pages: Pages) -> Result<(), DiskError> {
        let mark = self.journal.mark();
        let snapshot = (pages == Pages::Place).then(|| self.journal.snapshot());
        let cleared = self.space.punched();
        let len = self.space.len();
        self.sync()?;
        self.journal.synced(&mark, len);
        self.space.free(cleared);
        if let Some(position) = placed.take() {
            self.journal.retire(position);
        }
        self.space
            .recycle(self.storage.as_ref(), self.journal.durable(), &self.flights);
        if let Some(snapshot) = snapshot {
            // The flush itself is done; what failed here is tried again.
            self.journal.apply(&snapshot).map_err(failed("flush", 0))?;
            *placed = Some(snapshot.head);
        }
        Ok(())
    }

    fn sync(&self) -> Result<(), DiskError> {
        self.storage.sync().map_err(|source| {
            self.running.sync_failed();
            failed("flush", 0)(source)
        })
    }

    fn leave_clean(&self) -> io::Result<()> {
        self.journal.finish()?;
        let blocks = self.bat.end(self.space.end());
        let used = blocks.max(self.fixed_end.load(Ordering::Acquire));
        assert!(used.is_multiple_of(MIB));
        if used != self.space.len() {
            self.space.truncate(self.storage.as_ref(), used)?;
            self.storage.sync()?;
        }
        Ok(())
    }
}
