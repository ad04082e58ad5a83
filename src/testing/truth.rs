//! What a guest was told, and so what its disks hold.

use std::collections::BTreeMap;

use super::{content::Contents, oracle::Broken};
use crate::{
    base::units::{Extent, SECTOR_BYTES, to_usize},
    disk::Fua,
};

type Sector = (usize, usize);

/// What the disks hold, as the guest knows it.
#[derive(Clone, Debug)]
pub(super) struct Truth {
    pub(super) now: Contents,
    /// What else a sector may hold after a power cut: it was written since the last flush.
    unsynced: BTreeMap<Sector, Vec<u32>>,
    /// What a sector may hold, since nobody was told: the next reading decides.
    unsure: BTreeMap<Sector, Vec<u32>>,
}

impl Truth {
    pub(super) fn new(now: Contents) -> Self {
        Self {
            now,
            unsynced: BTreeMap::new(),
            unsure: BTreeMap::new(),
        }
    }

    /// The guest wrote, or zeroed with the number 0; `told`: whether it was told that this is done.
    pub(super) fn write(&mut self, disk: usize, run: Extent, number: u32, told: bool, fua: Fua) {
        for sector in run.offset / SECTOR_BYTES..run.end() / SECTOR_BYTES {
            let at = (disk, to_usize(sector));
            let old = self.now.0[disk][at.1];
            let last = self.unsynced.entry(at).or_insert_with(|| vec![old]);
            last.push(number);
            if !told {
                let either = self.unsure.entry(at).or_insert_with(|| vec![old]);
                either.push(number);
                continue;
            }
            self.now.0[disk][at.1] = number;
            self.unsure.remove(&at);
            if fua == Fua::Yes {
                self.unsynced.remove(&at);
            }
        }
    }

    /// The guest was told that everything before is durable.
    pub(super) fn flushed(&mut self, disk: usize) {
        self.unsynced.retain(|at, _| at.0 != disk);
    }

    /// The host lost its power.
    pub(super) fn lost_power(&mut self) {
        for (at, mut candidates) in std::mem::take(&mut self.unsynced) {
            self.unsure.entry(at).or_default().append(&mut candidates);
        }
    }

    /// The disks were read. What could be two things is what was found.
    pub(super) fn meets(&mut self, found: &Contents) -> Result<(), Broken> {
        for (&(disk, sector), candidates) in &self.unsure {
            let number = found.0[disk][sector];
            if !candidates.contains(&number) && number != self.now.0[disk][sector] {
                return Err(format!(
                    "P1: sector {sector} of disk {disk} holds write {number}, it can only be one of {candidates:?}"
                ));
            }
            self.now.0[disk][sector] = number;
        }
        self.unsure.clear();
        if *found == self.now {
            return Ok(());
        }
        Err(format!(
            "P1: the disks are not what the guest was told: (disk, sector, found, told) {:?}",
            found.differences(&self.now)
        ))
    }

    /// The disks were closed, or opened again after a death: all that was not lost by then is durable.
    pub(super) fn rests(&mut self) {
        self.unsynced.clear();
    }

    /// Whether it is known what every sector holds.
    pub(super) fn is_sure(&self) -> bool {
        self.unsure.is_empty()
    }
}
