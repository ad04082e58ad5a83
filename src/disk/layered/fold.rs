//! Folding: what a layer holds moves into a disk that stands in the base's place, while the guest goes on.
//!
//! ```text
//!   before        reads: layer, else base       writes: layer
//!   fold_into     the header says that a fold began, durably; the target takes the base's place
//!   fold, fold..  reads: layer, else target     writes: layer where it holds the block, else target
//!   folded        everything is the target's
//! ```
//!
//! # Invariants
//! - A block is the target's or the layer's. While a fold is under way it leaves the layer once and never comes back.
//! - A region moves with its lock held exclusively: copy, flush the target, clear both halves of its map durably, let go.
//!
//! # Crash contract
//! The map of a region is one sector's part: after a power cut it says all or nothing of a move. If it still says that
//! the layer holds the region, the layer does, and the next fold copies it again over whatever part of the copy arrived. If
//! it says that it does not, the target was flushed before. What the guest writes to the target afterwards can therefore
//! not be hidden by what the layer held before. Space in the layer's file is given back only then.
//! A block whose write was not flushed may by then be in the target, as written, while the certain half of the map falls
//! back to the target: as before or as written, as without a fold.
//!
//! A target that took a direct write holds more than the base. So the header says durably that a fold began before the
//! first of them: a layer that is opened then refuses everything until it has its target again. The death of the process
//! may leave a cleared map that is in the page cache only; [`LayeredDisk::fold_into`] syncs it before anything else happens.
//!
//! # Failures
//! If reading the layer or writing the target fails, the map is as it was: the layer holds the region, and the next fold
//! tries again. A failed flush of the target, or a failed write of the cleared map, ends the disk: nobody knows what is on the
//! platter. Nothing that was flushed is lost by that; a later process opens the layer and folds on.

use std::{io, sync::Arc, sync::atomic::Ordering};

use super::{LayeredDisk, Place, map::State};
use crate::{
    base::units::{BLOCKS_PER_REGION, Extent, REGION_BYTES, SECTOR_BYTES, to_usize},
    disk::{Disk, DiskError, Fua, Space, failed},
};

/// What is read where the layer holds nothing.
#[derive(Clone, Debug)]
pub(super) enum Below {
    /// The base, never written.
    Base(Arc<dyn Disk>),
    /// A fold began in an earlier process, and its target is not here yet.
    Awaited,
    /// What the layer is folded into. It is written where the layer holds nothing.
    Target(Arc<dyn Disk>),
}

impl Below {
    pub(super) fn disk(&self) -> Result<&dyn Disk, DiskError> {
        match self {
            Self::Base(disk) | Self::Target(disk) => Ok(&**disk),
            Self::Awaited => Err(DiskError::Stopped(
                "its layer is being folded into another disk, and cannot be used without that"
                    .into(),
            )),
        }
    }

    /// Where a block of this state is written.
    pub(super) fn place(&self, state: State) -> Place {
        match (state, self) {
            (State::Held, _) => Place::Layer,
            (State::Base, Self::Target(_)) => Place::Target,
            (State::Base | State::Zero, _) => Place::Fresh,
        }
    }
}

impl LayeredDisk {
    /// From now on `target` stands in the place of the base, which is let go of. `target` must hold what the base holds, and
    /// what earlier folds of this layer brought into it; nobody else may write it. What the layer does not hold is read
    /// from it and written to it; what the layer holds lives on there until [`fold`](Self::fold) moved it.
    ///
    /// Called once for an open layer. After a restart it is called again with the same target, before anything is read
    /// or written, and so resumes the fold. Syncs, and waits for the reads and writes in flight.
    ///
    /// # Errors
    /// Nothing has changed if `target` has another size or there is one already ([`io::ErrorKind::InvalidInput`]), or if
    /// the disk stopped or was closed. If the layer's file fails, the base stays in place here, and after a restart the
    /// layer may ask for its target. A failed sync ends the disk.
    pub fn fold_into(&self, target: Arc<dyn Disk>) -> Result<(), DiskError> {
        let size = target.geometry().size;
        if size != self.size() {
            return Err(refused(format!(
                "the disk to fold into has {size} bytes, the layer {}",
                self.size()
            )));
        }
        {
            let _one = self.flushing.lock();
            self.check_write()?;
            if matches!(*self.below.read(), Below::Target(_)) {
                return Err(refused("the layer is being folded already".into()));
            }
            let mut header = self.header;
            header.folding = true;
            header.write(&*self.storage).map_err(failed("fold", 0))?;
            self.sync()?;
        }
        // Whoever read or writes a region looked below it with its lock held.
        let _all: Vec<_> = self.regions.iter().map(|region| region.write()).collect();
        *self.below.write() = Below::Target(target);
        Ok(())
    }

    /// Moves the next region into the target, durably. The bytes moved, or `None` when the layer holds nothing any more:
    /// then every access is the target's, at the cost of one check. Reads and writes of the region wait meanwhile, and so
    /// do those of one region in 64.
    ///
    /// # Errors
    /// Without [`fold_into`](Self::fold_into) there is nothing to fold into ([`io::ErrorKind::InvalidInput`]). A failed
    /// read of the layer or write of the target leaves the region in the layer, and the next call tries again. A failed
    /// flush of the target or write of the map ends the disk.
    pub fn fold(&self) -> Result<Option<u64>, DiskError> {
        let Below::Target(target) = self.below()? else {
            return Err(refused(
                "the layer was not given a disk to fold into".into(),
            ));
        };
        loop {
            let next = self.map.read().first_region();
            let Some(region) = next else {
                // A flush in flight that fails ends the disk before this or sees no layer after it.
                let _one = self.flushing.lock();
                self.check_write()?;
                self.folded.get_or_init(|| target);
                return Ok(None);
            };
            let moved = self.fold_region(&*target, region)?;
            // Otherwise another thread moved it first.
            if moved > 0 {
                return Ok(Some(moved));
            }
        }
    }

    fn fold_region(&self, target: &dyn Disk, region: u64) -> Result<u64, DiskError> {
        let offset = region * REGION_BYTES;
        let run = Extent::new(offset, REGION_BYTES.min(self.size() - offset));
        let _alone = self.lock(offset).write();
        self.check_write()?;
        let mut parts = self.parts(run, |state| state);
        parts.retain(|(state, _)| *state != State::Base);
        for &(state, part) in &parts {
            self.copy(target, state, part)?;
        }
        self.let_go(run)?;
        for &(state, part) in &parts {
            if state == State::Held {
                let data = Extent::new(self.at(part.offset), part.len);
                if let Err(error) = self.storage.zero(data, Space::Release) {
                    tracing::warn!(%error, "cannot give back the space of what was folded");
                }
            }
        }
        Ok(parts.iter().map(|(_, part)| part.len).sum())
    }

    fn copy(&self, target: &dyn Disk, state: State, part: Extent) -> Result<(), DiskError> {
        if state == State::Zero {
            return target.zero(part, Space::Release, Fua::No);
        }
        let mut bytes = vec![0; to_usize(part.len)];
        self.storage
            .read_at(self.at(part.offset), &mut bytes)
            .map_err(failed("fold", part.offset))?;
        target.write_at(part.offset, &bytes, Fua::No)
    }

    /// The target holds what the layer holds in `run`: makes that durable, then the map of the region says so.
    fn let_go(&self, run: Extent) -> Result<(), DiskError> {
        // No flush of the guest copies states of before into the high halves meanwhile.
        let _one = self.flushing.lock();
        self.check_write()?;
        self.flush_target()?;
        let blocks = run.blocks();
        let cleared = vec![0; to_usize(blocks.end - blocks.start)];
        let at = self.header.map().offset + blocks.start;
        // Outside the map's lock: the rest of the disk goes on while this waits for the platter.
        self.storage
            .write_at(at, &cleared, Fua::Yes)
            .map_err(|source| self.end(source))?;
        self.map.write().let_go(blocks);
        Ok(())
    }

    /// What is below, if it is there. It stays while a region is locked.
    pub(super) fn below(&self) -> Result<Below, DiskError> {
        let below = self.below.read().clone();
        below.disk()?;
        Ok(below)
    }

    /// Makes the target durable, if there is one. The caller holds `flushing`.
    pub(super) fn flush_target(&self) -> Result<(), DiskError> {
        let Below::Target(target) = self.below.read().clone() else {
            return Ok(());
        };
        target
            .flush()
            .inspect_err(|_| self.stopped.store(true, Ordering::Release))
    }
}

// The map of a region is in one sector, and in one page.
const _: () = assert!(SECTOR_BYTES.is_multiple_of(BLOCKS_PER_REGION));

fn refused(why: String) -> DiskError {
    failed("fold", 0)(io::Error::new(io::ErrorKind::InvalidInput, why))
}
