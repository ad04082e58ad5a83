//! Verifying: comparing what the replica holds at a point with the disks, while the guest writes, without a false alarm.
//!
//! A block that is marked in neither map has not been written since the last acknowledged point: it holds what it held
//! at that cut, and so must the replica's point. Only such blocks are read, with their region held alone, and the
//! question names that point. What is marked waits for the next one. So whatever differs really differs.
//!
//! # Crash contract
//! Nothing is written but a record of what is left, now and then. One that is older than what was compared makes some
//! of it be compared again.
#![forbid(unsafe_code)]

use std::ops::Range;

use serde::{Deserialize, Serialize};

use super::{
    answers::MachineError,
    core::{Core, Tracked},
    machine::{Machine, fleeting},
    sift::{Room, sample},
    swap::told,
    take::{BUFFERS_MAX, Cursor, TakeError, read_content},
};
use crate::{
    base::{
        buffers::Buffers,
        ids::{Lineage, MachineId},
        units::{BLOCK_BYTES, BLOCKS_PER_REGION, DiskIndex, Extent},
    },
    disk::DiskError,
    protocol::compare::{Sample, runs_of},
    track::{bits::Bits, header::Slot},
};

/// Points at which a verification may find all that is left marked; then it is given up. What is left then was written in
/// nearly every epoch and sent with each, so what the replica has of it is as new as its last points.
const ROUNDS_MAX: u32 = 12;

/// Which blocks are still to be compared.
#[derive(Debug)]
pub struct Verification {
    left: Vec<Bits>,
    cursor: Cursor,
    /// The point at which all that is left was found marked, and how often there was one.
    idle_at: Option<Lineage>,
    rounds: u32,
}

/// Runs in which the node's store remembers what is left; where there are more, they are told coarser.
const LEFT_RUNS_MAX: usize = 4096;

/// A verification as the node's store remembers it, `verify/<machine>`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedVerification {
    /// What is not compared yet, or more.
    pub left: Vec<(DiskIndex, Extent)>,
    /// What differs, as far as it is known.
    pub found: Vec<(DiskIndex, Extent)>,
    /// Bytes of all disks.
    pub total: u64,
    /// Bytes that were compared.
    pub compared: u64,
    /// Bytes that were read for that.
    pub read: u64,
    /// Whether what differs is to be sent again.
    pub repair: bool,
    /// Bytes that may be read in a second, if there is a limit.
    pub throttle: Option<u64>,
}

impl SavedVerification {
    pub(super) fn key(machine: MachineId) -> String {
        format!("verify/{machine}")
    }
}

/// What comes next in a verification.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verify {
    /// Ask the replica what it holds at this point.
    Ask(Lineage, Vec<Sample>),
    /// Everything that is left was written since the last point: the next one has to come first.
    Later,
    /// Nothing is left, or only what is written in each epoch.
    Done,
}

impl Verification {
    /// Bytes of the blocks that are left.
    pub fn left(&self) -> u64 {
        self.left.iter().map(Bits::count).sum::<u64>() * BLOCK_BYTES
    }

    /// There was no answer about `runs`.
    pub fn put_back(&mut self, runs: &[(DiskIndex, Extent)]) {
        for (disk, run) in runs {
            self.left[disk.index()].set(run.blocks());
        }
        self.idle_at = None;
    }
}

impl Machine {
    /// Begins to verify all disks. Refused while the replica holds no complete copy.
    pub fn verification(&self) -> Result<Verification, MachineError> {
        let control = self.control()?;
        if control.record.copying || control.record.lineage.is_none() {
            return Err(MachineError::NothingToCompare);
        }
        let all = |disk| {
            let all = fleeting(disk)?;
            all.set_all();
            Ok(all)
        };
        let left = self.core.disks.iter().map(all);
        Ok(Verification {
            left: left.collect::<Result<_, MachineError>>()?,
            cursor: Cursor::default(),
            idle_at: None,
            rounds: 0,
        })
    }

    /// What is left of a verification, or more, for a record of it.
    pub fn left_of(&self, verification: &Verification) -> Vec<(DiskIndex, Extent)> {
        let disks = self.core.disks.iter().zip(&verification.left);
        let disks: Vec<_> = disks.map(|(disk, left)| (disk, Some(left))).collect();
        told(&disks, LEFT_RUNS_MAX)
    }

    /// Remembers a verification durably, or that there is none.
    pub fn save_verification(&self, saved: Option<&SavedVerification>) -> Result<(), MachineError> {
        let key = SavedVerification::key(self.id());
        let stored = match saved {
            Some(saved) => self.core.ledger.put(&key, saved),
            None => self.core.ledger.remove(&key),
        };
        let what = "the verification";
        stored.map_err(|source| MachineError::Record { what, source })
    }

    /// The verification that the end of the process cut short, if there is one and the machine still has those disks.
    pub fn saved_verification(
        &self,
    ) -> Result<Option<(SavedVerification, Verification)>, MachineError> {
        let found: Result<Option<SavedVerification>, _> =
            self.core.ledger.get(&SavedVerification::key(self.id()));
        let what = "the verification";
        let found = found.map_err(|source| MachineError::Record { what, source })?;
        let Some(saved) = found else {
            return Ok(None);
        };
        let left = self.blocks_of(&saved.left)?;
        self.blocks_of(&saved.found)?;
        let verification = self.verification()?;
        verification.left.iter().for_each(Bits::clear_all);
        for (disk, blocks) in left {
            verification.left[disk.index()].set(blocks);
        }
        Ok(Some((saved, verification)))
    }

    /// The next question, with at most as much as one may tell. Its blocks are no longer left. After an error the
    /// verification is given up.
    pub fn verify(&self, verification: &mut Verification) -> Result<Verify, TakeError> {
        let Some(at) = self.lineage() else {
            return Ok(Verify::Later);
        };
        if verification.left() == 0 || verification.rounds >= ROUNDS_MAX {
            return Ok(Verify::Done);
        }
        if verification.idle_at == Some(at) {
            return Ok(Verify::Later);
        }
        let samples = self.core.unmarked_samples(verification)?;
        if self.lineage() != Some(at) {
            // Marks may have gone with another point than the one the question would name.
            verification.put_back(&runs_of(&samples));
            return Ok(Verify::Later);
        }
        if samples.is_empty() {
            verification.idle_at = Some(at);
            verification.rounds += 1;
            return Ok(Verify::Later);
        }
        Ok(Verify::Ask(at, samples))
    }
}

impl Core {
    fn unmarked_samples(&self, verification: &mut Verification) -> Result<Vec<Sample>, TakeError> {
        let mut cursors = self.takes.lock();
        let mut samples = Vec::new();
        let mut room = Room::new();
        while room.is_left() {
            let Some((disk, run)) = self.find_unmarked(verification) else {
                break;
            };
            verification.cursor = Cursor {
                disk: disk.index.index(),
                block: run.start,
            };
            let run = run.start..run.end.min(run.start + room.hashes.min(room.zeros));
            let read = self.verify_run(disk, run, verification, &mut cursors.buffers);
            let read = read.map_err(|source| TakeError {
                disk: disk.name.clone(),
                epoch: self.epochs.read().open,
                source,
            })?;
            if let Some(sample) = read {
                room.take(&sample);
                samples.push(sample);
            }
        }
        Ok(samples)
    }

    /// The next run of blocks that are left and not marked, within a region, from the cursor on and then from the
    /// beginning. A hint: nothing keeps it from being written now.
    fn find_unmarked(&self, verification: &Verification) -> Option<(&Tracked, Range<u64>)> {
        let (count, from) = (self.disks.len(), verification.cursor);
        (0..=count).find_map(|step| {
            let disk = &self.disks[(from.disk + step) % count];
            let start = if step == 0 { from.block } else { 0 };
            let left = &verification.left[disk.index.index()];
            Some((disk, unmarked(disk, left, start..disk.blocks().end)?))
        })
    }

    /// Reads the beginning of a run, if it still is not marked.
    fn verify_run(
        &self,
        disk: &Tracked,
        run: Range<u64>,
        verification: &Verification,
        buffers: &mut Buffers<BUFFERS_MAX>,
    ) -> Result<Option<Sample>, DiskError> {
        let region = run.start / BLOCKS_PER_REGION;
        let alone = disk.locks.exclusive(region..region + 1);
        let left = &verification.left[disk.index.index()];
        let run = {
            let _epochs = self.epochs.read();
            unmarked(disk, left, run)
        };
        let Some(run) = run else { return Ok(None) };
        // Nobody writes it, so it is what it was at the last point.
        let (extent, content) =
            read_content(&*disk.inner, disk.extent(&run), BLOCK_BYTES, buffers)?;
        drop(alone);
        left.clear(extent.blocks());
        Ok(Some(sample(disk.index, extent, &content)))
    }
}

/// The first run of `left` in `within` that is marked in neither map and lies in one region.
fn unmarked(disk: &Tracked, left: &Bits, within: Range<u64>) -> Option<Range<u64>> {
    let mut at = within.start;
    loop {
        let run = left.run(at..within.end)?;
        let region_end = (run.start / BLOCKS_PER_REGION + 1) * BLOCKS_PER_REGION;
        let run = run.start..run.end.min(region_end);
        let marks = Slot::BOTH.map(|slot| disk.map(slot).run(run.clone()));
        let first = marks.iter().flatten().map(|mark| mark.start).min();
        let end = first.unwrap_or(run.end);
        if end > run.start {
            return Some(run.start..end);
        }
        let behind = marks
            .iter()
            .flatten()
            .filter(|mark| mark.start == run.start);
        at = behind.map(|mark| mark.end).max()?;
    }
}
