//! A volume: a disk of a machine as the guest writes it. The write path.
//!
//! # Crash contract
//! A volume adds nothing that could be lost to what the disk below promises, and takes nothing away: the bits of a write
//! are in the maps and its region is in the intent log before the image is touched. A flush and a forced unit access
//! therefore need no sync of the maps: until the maps are synced the intent log speaks for them.
#![forbid(unsafe_code)]

use std::{
    ops::{ControlFlow, Range},
    sync::Arc,
};

use super::core::{Core, Tracked};
use crate::{
    base::{
        ids::Name,
        units::{DiskIndex, Extent, REGION_BYTES, to_usize},
    },
    disk::{Content, Disk, DiskError, Fua, Geometry, Space, check_run},
    track::locks::{REGIONS_TOGETHER_MAX, Shared},
};

/// Longest run that is marked and written at once. Longer ones are cut at its multiples.
const STEP_BYTES: u64 = REGIONS_TOGETHER_MAX * REGION_BYTES;

/// A disk that remembers what was written to it.
#[derive(Debug)]
pub struct Volume {
    core: Arc<Core>,
    index: DiskIndex,
}

impl Volume {
    pub(super) fn new(core: Arc<Core>, index: DiskIndex) -> Self {
        Self { core, index }
    }

    /// Its name in the machine.
    pub fn name(&self) -> &Name {
        &self.disk().name
    }

    /// Its position in the machine's disk table.
    pub fn index(&self) -> DiskIndex {
        self.index
    }

    fn disk(&self) -> &Tracked {
        self.core.disk(self.index)
    }

    /// Makes sure that a change of `run` is known, whatever happens from here on, and that nobody reads the run for the
    /// replica until the guard is dropped.
    fn enter(&self, run: Extent) -> Result<Shared<'_>, DiskError> {
        let disk = self.disk();
        let (regions, blocks) = (run.regions(), run.blocks());
        if let Some(reason) = disk.stopped.get() {
            return Err(DiskError::Stopped(reason.clone()));
        }
        loop {
            // Without any lock, because making room in the log takes region locks.
            if !self.is_hot(regions.clone()) {
                self.core.heat(disk, regions.clone())?;
            }
            let held = disk.locks.shared(regions.clone());
            if !self.is_hot(regions.clone()) {
                continue;
            }
            if let Some(folded) = self.core.mark(disk, blocks.clone()) {
                disk.locks.count(regions.start, run.len, folded);
                return Ok(held);
            }
            drop(held);
            if let ControlFlow::Break(held) = self.enter_preserving(run) {
                return Ok(held);
            }
        }
    }

    /// The rare part of [`Volume::enter`]: a block is still owed to the closing epoch.
    #[cold]
    fn enter_preserving(&self, run: Extent) -> ControlFlow<Shared<'_>> {
        let disk = self.disk();
        let alone = disk.locks.exclusive(run.regions());
        if !self.is_hot(run.regions()) {
            return ControlFlow::Continue(());
        }
        let folded = self.core.preserve_and_mark(disk, run.blocks());
        disk.locks.count(run.regions().start, run.len, folded);
        ControlFlow::Break(alone.downgrade())
    }

    fn is_hot(&self, regions: Range<u64>) -> bool {
        self.disk().hot.is_hot(regions) || self.core.lost.get().is_some()
    }

    /// Calls `change` for the parts of `run` that are marked and written at once.
    fn in_steps(
        &self,
        run: Extent,
        fua: Fua,
        change: impl Fn(Extent) -> Result<(), DiskError>,
    ) -> Result<(), DiskError> {
        let mut offset = run.offset;
        while offset < run.end() {
            let end = (offset / STEP_BYTES + 1) * STEP_BYTES;
            let step = Extent::new(offset, end.min(run.end()) - offset);
            let held = self.enter(step)?;
            let changed = change(step);
            drop(held);
            changed.inspect_err(|error| self.core.write_failed(self.disk(), error, fua))?;
            offset = step.end();
        }
        self.disk().trouble.wrote();
        Ok(())
    }
}

impl Disk for Volume {
    fn geometry(&self) -> Geometry {
        self.disk().inner.geometry()
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), DiskError> {
        let disk = self.disk();
        let read = disk.inner.read_at(offset, buf);
        read.inspect_err(|error| disk.trouble.note(error))
    }

    fn write_at(&self, offset: u64, buf: &[u8], fua: Fua) -> Result<(), DiskError> {
        let disk = self.disk();
        let run = check_run(offset, buf.len(), disk.size)?;
        self.in_steps(run, fua, |step| {
            let from = to_usize(step.offset - offset);
            let part = &buf[from..from + to_usize(step.len)];
            disk.inner.write_at(step.offset, part, fua)
        })
    }

    fn zero(&self, run: Extent, space: Space, fua: Fua) -> Result<(), DiskError> {
        let disk = self.disk();
        let run = check_run(run.offset, to_usize(run.len), disk.size)?;
        self.in_steps(run, fua, |step| disk.inner.zero(step, space, fua))
    }

    fn flush(&self) -> Result<(), DiskError> {
        self.core.flush(self.disk())
    }

    fn run_at(&self, offset: u64) -> Result<(Extent, Content), DiskError> {
        self.disk().inner.run_at(offset)
    }

    /// Flushes. The image itself is closed by [`Machine::close`](super::Machine::close), together with its maps.
    fn close(&self) -> Result<(), DiskError> {
        self.flush()
    }
}
