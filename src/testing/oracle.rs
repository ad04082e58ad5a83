//! The truth: what every guest was told, and what the machine really held at every cut.

use std::collections::BTreeMap;

use super::content::Contents;
use crate::{
    base::{
        ids::Lineage,
        units::{BLOCK_BYTES, DiskIndex, Extent, SECTOR_BYTES, to_u64, to_usize},
    },
    disk::Fua,
};

/// A promise that was broken, in words.
pub(super) type Broken = String;

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
}

/// A cut that became a point of the history.
#[derive(Clone, Debug)]
struct Known {
    /// Nothing for an initial copy, which is no state the machine was ever in.
    contents: Option<Contents>,
    parent: Option<Lineage>,
}

/// What is true.
#[derive(Debug)]
pub(super) struct Oracle {
    /// What the guest's disks hold.
    pub(super) truth: Truth,
    /// The last point that the replica said to be durable.
    pub(super) said: Option<Lineage>,
    history: BTreeMap<[u8; 32], Known>,
    numbers: u32,
}

impl Oracle {
    pub(super) fn new(disks: usize) -> Self {
        Self {
            truth: Truth::new(Contents::blank(disks)),
            said: None,
            history: BTreeMap::new(),
            numbers: 0,
        }
    }

    /// The number of the next write.
    pub(super) fn number(&mut self) -> u32 {
        self.numbers += 1;
        self.numbers
    }

    /// A log was sealed: its point may become durable on the replica.
    pub(super) fn sealed(
        &mut self,
        lineage: Lineage,
        parent: Option<Lineage>,
        contents: Option<Contents>,
    ) -> Result<(), Broken> {
        if parent.is_some_and(|parent| parent.epoch >= lineage.epoch) {
            return Err(format!("{} follows {parent:?}", lineage.epoch));
        }
        let known = Known { contents, parent };
        match self.history.insert(lineage.chain.0, known.clone()) {
            // A log that was lost may be sent again word for word.
            Some(before) if before.contents != known.contents || before.parent != parent => Err(
                format!("two histories lead to the point of {}", lineage.epoch),
            ),
            _ => Ok(()),
        }
    }

    /// What the machine held at a point, if it was ever in it.
    pub(super) fn at(&self, point: Lineage) -> Option<&Contents> {
        self.history.get(&point.chain.0)?.contents.as_ref()
    }

    /// A replica shows a point.
    pub(super) fn shows(&self, point: Lineage, found: &Contents) -> Result<(), Broken> {
        let Some(truth) = self.at(point) else {
            return Err(format!("P2: {point:?} is a point that was never cut"));
        };
        if truth == found {
            return Ok(());
        }
        Err(format!(
            "P2: the view of {} is not what the machine held: (disk, sector, found, true) {:?}",
            point.epoch,
            found.differences(truth)
        ))
    }

    /// The replica has `head`: nothing that it had said to be durable is gone.
    pub(super) fn holds(&self, head: Option<Lineage>) -> Result<(), Broken> {
        let Some(said) = self.said else {
            return Ok(());
        };
        let mut at = head;
        while let Some(lineage) = at {
            if lineage == said {
                return Ok(());
            }
            let known = self.history.get(&lineage.chain.0);
            at = known.and_then(|known| known.parent);
        }
        Err(format!(
            "P2: the replica said that {} is durable, and its head is {head:?}",
            said.epoch
        ))
    }

    /// Every block in which the primary's disks differ from point `lineage` is in `told`.
    pub(super) fn covers(
        &self,
        lineage: Lineage,
        told: &[(DiskIndex, Extent)],
    ) -> Result<(), Broken> {
        let Some(point) = self.at(lineage) else {
            return Ok(());
        };
        for (disk, (now, then)) in self.truth.now.0.iter().zip(&point.0).enumerate() {
            let runs = told.iter().filter(|(index, _)| index.index() == disk);
            let mut runs = runs.map(|(_, run)| *run).peekable();
            let pairs = now.iter().zip(then).enumerate();
            for (sector, _) in pairs.filter(|(_, (now, then))| now != then) {
                let offset = to_u64(sector) * SECTOR_BYTES;
                while runs.next_if(|run| run.end() <= offset).is_some() {}
                if runs.peek().is_none_or(|run| run.offset > offset) {
                    return Err(format!(
                        "P3: block {} of disk {disk} differs from {} and is not marked",
                        offset / BLOCK_BYTES,
                        lineage.epoch
                    ));
                }
            }
        }
        Ok(())
    }

    /// Points of the history so far.
    pub(super) fn points(&self) -> usize {
        self.history.len()
    }
}
