//! Sifting: finding out which suspects really differ, before an epoch may contain them.
//!
//! ```text
//!                     ask: read, hash           equal: proved, no longer marked
//!   suspect (marked) ─────────────────> asked ──────────────────────────────────> ∅
//!     ^  │                               │ │  └── different: owed, as if written ──> sent with the epoch
//!     │  └── the guest writes it ────────│─┴──> owed
//!     └───── link lost, restart ─────────┘
//! ```
//! A resync marks every block that may differ in the open map, and the machine's record says why. As long as there are
//! suspects no epoch is cut, so the replica's head, which they are compared with, stands still, and its old points stay
//! until the new one is complete. The marks are the cursor: what was proved equal is not marked any more, so a resync that
//! is cut short goes on with what is left, whatever ended it.
//!
//! # Why no write is lost
//! A block is read and hashed with its region held alone, so no write is in flight. Any later write ends the suspicion
//! under the epoch lock before it touches the image. The answer is taken under the epoch lock held alone, and only for
//! blocks that are still asked about: those hold what was hashed. To look whether a block is owed would not be enough: a
//! write that was sent ahead is not owed any more, and still nothing that the replica holds durably. For the same reason
//! no block becomes a suspect of which a log under way may hold a frame.
//!
//! # Crash contract
//! Marks are durable before the record says that there is a resync; a crash in between sends them unsifted. With a resync in
//! the record each restart and each new link makes everything that is marked a suspect, known writes as well: that
//! costs a hash, and what was proved equal before is not marked any more. The epoch that completes the resync ends it in
//! the record. A mark that a power cut brings back costs a hash, too; one that is gone was cleared because the replica
//! holds the block as it was, and if the platter lost a later write to it, its region is in the intent log.
#![forbid(unsafe_code)]

use tracing::info;

use super::{
    answers::{CopyScope, MachineError},
    core::{Control, Core, Tracked},
    machine::{Machine, check_epoch, fleeting, held},
    record::{Record, ResyncReason},
    take::{BUFFERS_MAX, Cursor, Cursors, PieceContent, TakeError, read_content},
};
use crate::{
    base::{
        buffers::Buffers,
        ids::Lineage,
        units::{BLOCK_BYTES, BLOCKS_PER_REGION, Block, DiskIndex, Extent},
    },
    disk::{Content, DiskError},
    protocol::compare::{Differing, HASHES_MAX, Hashes, SAMPLES_MAX, Sample, ZERO_BLOCKS_MAX},
    track::bits::Bits,
};

/// Regions that are held together where a disk holds zeros.
const ZERO_REGIONS: u64 = ZERO_BLOCKS_MAX / BLOCKS_PER_REGION;

const _: () = assert!(ZERO_REGIONS <= crate::track::locks::REGIONS_TOGETHER_MAX);

/// What one question still has room for.
pub(super) struct Room {
    pub(super) samples: usize,
    pub(super) hashes: u64,
    pub(super) zeros: u64,
}

impl Room {
    /// Of an empty question.
    pub(super) fn new() -> Self {
        Self {
            samples: SAMPLES_MAX,
            hashes: HASHES_MAX,
            zeros: ZERO_BLOCKS_MAX,
        }
    }

    pub(super) fn is_left(&self) -> bool {
        self.samples > 0 && self.hashes > 0 && self.zeros > 0
    }

    pub(super) fn take(&mut self, sample: &Sample) {
        let blocks = sample.run().blocks();
        let left = match sample.hashes {
            Some(_) => &mut self.hashes,
            None => &mut self.zeros,
        };
        *left -= blocks.end - blocks.start;
        self.samples -= 1;
    }
}

/// What an answer proved.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sifted {
    /// Blocks that are equal: they are no longer marked.
    pub equal: u64,
    /// Blocks that differ: they are owed.
    pub differing: u64,
}

impl Machine {
    /// Begins to bring a replica back in step that is complete at `head`, a point this machine knows nothing of: all
    /// blocks are suspects of the open epoch, which follows that point. The replica keeps what it has until that epoch is
    /// complete. Called on a new connection, before anything is taken.
    pub fn begin_resync(&self, head: Lineage) -> Result<(), MachineError> {
        let mut control = self.control()?;
        check_epoch(head)?;
        let all = self.everything()?;
        self.suspect_more(&mut control, &all, |record| {
            record.copying = false;
            record.lineage = Some(head);
            record.pending = None;
            record.resync = Some(ResyncReason::HistoriesDiffer);
        })?;
        self.suspect_marked();
        self.core.epochs.write().open = head.epoch.next();
        info!(machine = %self.name(), epoch = %head.epoch, "resync of a replica with another history begins");
        Ok(())
    }

    /// Begins a resync because an operator asks for it. Refused during the initial copy and while one is under way. What
    /// is marked already is sent in any case. A closing epoch is merged: best called when there is none.
    pub fn demand_resync(&self) -> Result<(), MachineError> {
        let mut control = self.control()?;
        if control.record.copying || control.record.lineage.is_none() {
            return Err(MachineError::NothingToCompare);
        }
        if let Some(reason) = control.record.resync {
            return Err(MachineError::Resyncing(reason));
        }
        let all = self.everything()?;
        self.suspect_more(&mut control, &all, |record| {
            record.resync = Some(ResyncReason::Demanded);
        })?;
        info!(machine = %self.name(), "a resync was asked for and begins");
        Ok(())
    }

    /// `runs` may differ from what the peer holds for this `reason`: those that are not marked already become suspects, in
    /// whole blocks. Durable when this returns. On an error nothing is marked, or what is marked is owed. The guest may
    /// write meanwhile.
    ///
    /// An epoch that is closing is merged: without these runs it would make a point of the peer that this machine was
    /// never in (promise P2). Its log goes on, as after every merge. Epoch 0 makes no such point and goes on beside; then
    /// the runs are owed without being sifted. Best called before anything is taken for the peer: a trailer that was sent
    /// cannot be called back.
    pub fn suspect(
        &self,
        runs: &[(DiskIndex, Extent)],
        reason: ResyncReason,
    ) -> Result<(), MachineError> {
        let mut control = self.control()?;
        let marks = self.blocks_of(runs)?;
        if control.record.copying {
            self.mark_durably(&mut control, &marks)?;
            self.owe_marked(&marks);
            return Ok(());
        }
        if marks.is_empty() {
            return Ok(());
        }
        let wanted = self.core.disks.iter().map(fleeting);
        let wanted: Vec<Bits> = wanted.collect::<Result<_, _>>()?;
        for (disk, blocks) in marks {
            wanted[disk.index()].set(blocks);
        }
        self.suspect_more(&mut control, &wanted, |record| {
            record.resync = record.resync.or(Some(reason));
        })?;
        info!(machine = %self.name(), blocks = self.counters().suspect_blocks, "blocks may differ: {reason}");
        Ok(())
    }

    /// The next question about suspects: what the disks hold in them, at most as much as one question may tell. Empty if
    /// all were asked about. On an error [`Machine::disconnected`] must be called. Calls are made one after the other.
    pub fn ask(&self) -> Result<Vec<Sample>, TakeError> {
        self.core.ask()
    }

    /// The replica's head holds something else in those blocks of `runs`, counted through, that `differing` names, and
    /// the same in all others. Nothing if that is no answer about as many blocks. Blocks that were written since the
    /// question are left as they are.
    pub fn answered(&self, runs: &[(DiskIndex, Extent)], differing: &Differing) -> Option<Sifted> {
        self.core.answered(runs, differing)
    }

    /// Makes all that is marked in the open epoch suspects, known writes as well. Only while no log is under way: a
    /// frame of a block that is then found equal would bring back what the block held before.
    pub(super) fn suspect_marked(&self) {
        let mut takes = self.core.takes.lock();
        let mut epochs = self.core.epochs.write();
        epochs.breaks += 1;
        for disk in &self.core.disks {
            disk.suspects.suspect(disk.map(epochs.slot));
            disk.owed(epochs.slot).clear_all();
        }
        drop(epochs);
        *takes = Cursors::default();
    }

    fn everything(&self) -> Result<Vec<Bits>, MachineError> {
        let disks = self.core.disks.iter();
        disks
            .map(|disk| held(disk, CopyScope::Everything))
            .collect()
    }

    /// Marks the `wanted` blocks of each disk durably, changes the record, and makes those suspects that were not marked
    /// before: a log under way may hold frames of all others.
    fn suspect_more(
        &self,
        control: &mut Control,
        wanted: &[Bits],
        change: impl FnOnce(&mut Record),
    ) -> Result<(), MachineError> {
        let _takes = self.core.takes.lock();
        self.abort_closing();
        let open = self.core.epochs.read().slot;
        let disks = || self.core.disks.iter().zip(wanted);
        let fresh = disks().map(|(disk, wanted)| {
            let fresh = fleeting(disk)?;
            fresh.add_without(wanted, disk.map(open));
            Ok(fresh)
        });
        let fresh: Vec<Bits> = fresh.collect::<Result<_, MachineError>>()?;
        let marked = self.mark_held(control, wanted);
        let recorded = marked.and_then(|_| self.record(control, "the resync", change));
        let _epochs = self.core.epochs.write();
        for (disk, fresh) in self.core.disks.iter().zip(&fresh) {
            if recorded.is_err() {
                disk.owed(open).add(fresh);
            } else {
                disk.suspects.suspect_without(fresh, disk.owed(open));
            }
        }
        recorded
    }
}

impl Core {
    pub(super) fn suspect_count(&self) -> u64 {
        self.disks.iter().map(|disk| disk.suspects.count()).sum()
    }

    fn ask(&self) -> Result<Vec<Sample>, TakeError> {
        let mut cursors = self.takes.lock();
        let Cursors { sift, buffers, .. } = &mut *cursors;
        let mut samples: Vec<Sample> = Vec::new();
        let mut room = Room::new();
        while room.is_left() {
            let Some((disk, block)) = self.find(*sift, |disk| disk.suspects.waiting()) else {
                break;
            };
            *sift = Cursor {
                disk: disk.index.index(),
                block,
            };
            let sample = self.ask_run(disk, block, &room, buffers);
            let sample = sample.map_err(|source| TakeError {
                disk: disk.name.clone(),
                epoch: self.epochs.read().open,
                source,
            })?;
            let Some(sample) = sample else { continue };
            room.take(&sample);
            samples.push(sample);
        }
        Ok(samples)
    }

    /// Asks about the first run of suspects at or after `block` in its region, or beyond where there are zeros, as far as
    /// there is room. Nothing if it is gone.
    fn ask_run(
        &self,
        disk: &Tracked,
        block: u64,
        room: &Room,
        buffers: &mut Buffers<BUFFERS_MAX>,
    ) -> Result<Option<Sample>, DiskError> {
        let first = block / BLOCKS_PER_REGION;
        // Only a hint: it is looked at again once the regions are held.
        let regions = match disk.inner.run_at(Block(block).offset())?.1 {
            Content::Zero => ZERO_REGIONS,
            Content::Data => 1,
        };
        let end = (first + regions) * BLOCKS_PER_REGION;
        let end = end.min(disk.blocks().end);
        let alone = disk.locks.exclusive(first..end.div_ceil(BLOCKS_PER_REGION));
        let Some(run) = disk.suspects.waiting().run(block..end) else {
            return Ok(None);
        };
        let room = match disk.inner.run_at(Block(run.start).offset())?.1 {
            Content::Zero => room.zeros,
            Content::Data => room.hashes,
        };
        let run = run.start..run.end.min(run.start + room);
        {
            let _epochs = self.epochs.read();
            disk.suspects.ask(run.clone());
        }
        let (extent, content) =
            read_content(&*disk.inner, disk.extent(&run), BLOCK_BYTES, buffers)?;
        let left = extent.blocks().end..run.end;
        if !left.is_empty() {
            let _epochs = self.epochs.read();
            disk.suspects.take_back(left);
        }
        // What was read is hashed while the guest goes on.
        drop(alone);
        Ok(Some(sample(disk.index, extent, &content)))
    }

    fn answered(&self, runs: &[(DiskIndex, Extent)], differing: &Differing) -> Option<Sifted> {
        let differing = differing.places(runs)?;
        let mut sifted = Sifted::default();
        // Alone, so that a write marks its blocks before this or after it. No epoch was cut since the question.
        let epochs = self.epochs.write();
        for (disk, run) in differing {
            let disk = self.disk(disk);
            for meant in disk.suspects.answered(run.blocks()) {
                sifted.differing += meant.end - meant.start;
                disk.owed(epochs.slot).set(meant);
            }
        }
        for (disk, run) in runs {
            let disk = self.disk(*disk);
            for meant in disk.suspects.answered(run.blocks()) {
                sifted.equal += meant.end - meant.start;
                disk.map(epochs.slot).clear(meant);
            }
        }
        drop(epochs);
        Some(sifted)
    }
}

/// A run of a question, with what it holds.
pub(super) fn sample(disk: DiskIndex, run: Extent, content: &PieceContent) -> Sample {
    let hashes = match content {
        PieceContent::Zero => None,
        PieceContent::Data(bytes) => Some(Hashes::of(bytes)),
    };
    Sample {
        disk,
        offset: run.offset,
        len: run.len,
        hashes,
    }
}
