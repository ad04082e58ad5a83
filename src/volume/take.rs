//! What the sender reads: runs of blocks that are owed, with the content that belongs to their epoch.
//!
//! # Why no torn and no later content enters a closing epoch
//! Before a run is read its region is held alone for a moment: writes that were in flight at the cut are over. While the
//! run is being read its blocks stay owed, so that a writer who wants one of them must hold the region alone, and waits
//! for the reader, before it may preserve them. Blocks of the open epoch are read with their region held alone all the
//! time, because nobody preserves them. Whoever reads checks at the end that no merge happened meanwhile.
//!
//! # How the frames of a log stay few
//! A log may have `frames_max` frames, and after a long outage there may be more single blocks than that. Each piece
//! becomes a frame, so:
//! - no more is sent ahead of the cut once a quarter of the frames is used;
//! - before a cut, runs are joined, those that are nearest to each other, with the clean blocks between them, until the
//!   rest of the frames is enough. What is owed before the cut is sent as it is then, and preserved, like all else;
//! - after a sixteenth, pieces no longer end where zeros begin or end in less than 64 KiB, after a half in less than 1 MiB.
//!
//! Pieces of zeros become fewer and longer frames on their way (`node::pipeline`). What is left is an epoch with more than
//! half of `frames_max` MiB of data: it may have too many frames all the same, and is then not sent.
#![forbid(unsafe_code)]

use std::ops::Range;

use bytes::{Bytes, BytesMut};
use tracing::info;

use super::core::{Closing, ClosingKind, Core, Epochs, Tracked};
use crate::{
    base::{
        buffers::Buffers,
        ids::Name,
        limits::FRAME_BYTES_MAX,
        sync::atomic::Ordering,
        units::{
            BLOCK_BYTES, BLOCKS_PER_REGION, DiskIndex, Epoch, Extent, KIB, REGION_BYTES, to_u64,
            to_usize,
        },
    },
    disk::{Content, Disk, DiskError},
    protocol::sender::Side,
    track::{bits::Bits, header::Slot, preserve::Held},
};

const _: () = assert!(
    FRAME_BYTES_MAX <= REGION_BYTES,
    "a piece lies in one region"
);

/// A run of one disk for a delta log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    /// The disk.
    pub disk: DiskIndex,
    /// The run: whole blocks, or up to the end of the disk; at most [`FRAME_BYTES_MAX`] bytes.
    pub run: Extent,
    /// What it holds.
    pub content: PieceContent,
}

/// What a run holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PieceContent {
    /// These bytes, as many as the run has.
    Data(Bytes),
    /// Zeros.
    Zero,
}

/// The answer to [`Machine::take`](super::Machine::take).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Taken {
    /// The next run. Pieces go into the log in the order in which they are taken: of a block the last one wins.
    Piece(Piece),
    /// Nothing is owed to that epoch now, or nothing more of an open one is sent ahead. For a closing epoch that is final:
    /// its log is complete.
    Drained,
    /// That epoch is not there any more: it was merged into the next one, or cut, or the connection was reset. A piece
    /// that was being read was thrown away. After a merge the log of the closing epoch goes on as that of
    /// [`Machine::open_epoch`](super::Machine::open_epoch), and a second log of that epoch is dropped.
    Superseded,
}

/// A run that is owed cannot be read. It stays owed.
#[derive(Debug, thiserror::Error)]
#[error("cannot read disk {disk} for epoch {epoch}")]
pub struct TakeError {
    /// The disk.
    pub disk: Name,
    /// The epoch the run belongs to.
    pub epoch: Epoch,
    /// What the disk said, with the offset.
    #[source]
    pub source: DiskError,
}

/// Most buffers of [`FRAME_BYTES_MAX`] bytes that are used in turn: what a link keeps until it is acknowledged, and what is
/// being packed.
pub(super) const BUFFERS_MAX: usize = 48;
/// A shorter piece is not worth such a buffer.
const BUFFER_BYTES_MIN: usize = to_usize(128 * KIB);

/// A piece is at least so long, if its run is, when a log has many frames.
const LONG_PIECE_BYTES: u64 = 64 * KIB;

/// Runs that are farther apart, in blocks, are not joined: a disk of 64 TiB has no more than 2^22 of them.
const JOINED_BLOCKS_MAX: usize = 4096;

/// What [`Core::take`] keeps from one call to the next.
#[derive(Debug, Default)]
pub(super) struct Cursors {
    /// Where the search for owed blocks goes on, for each slot.
    slots: [Cursor; 2],
    /// The same for suspects.
    pub(super) sift: Cursor,
    pub(super) buffers: Buffers<BUFFERS_MAX>,
}

#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Cursor {
    pub(super) disk: usize,
    pub(super) block: u64,
}

impl Core {
    /// See [`Machine::take`](super::Machine::take).
    pub(super) fn take(&self, side: Side, epoch: Epoch, max: u64) -> Result<Taken, TakeError> {
        let max = max.clamp(BLOCK_BYTES, FRAME_BYTES_MAX);
        let mut cursors = self.takes.lock();
        let Cursors { slots, buffers, .. } = &mut *cursors;
        loop {
            let Some(slot) = slot_of(&self.epochs.read(), side, epoch) else {
                return Ok(Taken::Superseded);
            };
            if side == Side::Open && self.pieces() > self.options.frames_max / 4 {
                return Ok(Taken::Drained);
            }
            if side == Side::Closing
                && let Some(taken) = self.take_preserved(epoch, max)
            {
                return Ok(self.counted(taken));
            }
            let cursor = &mut slots[slot.index()];
            let Some((disk, block)) = self.find(*cursor, |disk| disk.owed(slot)) else {
                if let Some(end) = self.check_end(side, epoch) {
                    buffers.clear();
                    return Ok(end);
                }
                continue;
            };
            *cursor = Cursor {
                disk: disk.index.index(),
                block,
            };
            let taken = match side {
                Side::Closing => self.take_closing(disk, block, epoch, max, buffers),
                Side::Open => self.take_open(disk, block, epoch, max, buffers),
            };
            match taken {
                Ok(Some(taken)) => return Ok(self.counted(taken)),
                Ok(None) => {}
                Err(source) => {
                    return Err(TakeError {
                        disk: disk.name.clone(),
                        epoch,
                        source,
                    });
                }
            }
        }
    }

    /// Joins runs that are owed to the open epoch until there are frames for all. Under the control lock. What the guest
    /// writes meanwhile makes a few more.
    pub(super) fn join_runs(&self) {
        let frames_max = self.options.frames_max;
        let slot = self.epochs.read().slot;
        let owed = || self.disks.iter().map(|disk| disk.owed(slot));
        let blocks = owed().map(Bits::count).sum::<u64>();
        // Long runs need one for each MiB; an eighth is for pieces that end early.
        let others = self.pieces() + blocks / (FRAME_BYTES_MAX / BLOCK_BYTES) + frames_max / 8;
        // Of zeros a frame holds more than a MiB, so a long discard leaves half of the frames for runs, too.
        let runs_max = frames_max.saturating_sub(others).max(frames_max / 2);
        if blocks <= runs_max || self.suspect_count() > 0 {
            return;
        }
        let _takes = self.takes.lock();
        // How many gaps there are of 1 block, of 2, and so on; the last ones are longer.
        let mut gaps = vec![0; JOINED_BLOCKS_MAX + 1];
        let len = |gap: &Range<u64>| to_usize(gap.end - gap.start);
        for gap in owed().flat_map(Bits::gaps) {
            gaps[len(&gap).min(JOINED_BLOCKS_MAX)] += 1;
        }
        let mut runs = gaps.iter().sum::<u64>() + to_u64(self.disks.len());
        let mut shorter = 0;
        while runs > runs_max && shorter < JOINED_BLOCKS_MAX {
            runs -= gaps[shorter];
            shorter += 1;
        }
        let mut joined = 0;
        for bits in owed() {
            for gap in bits.gaps().filter(|gap| len(gap) < shorter) {
                joined += bits.set(gap);
            }
        }
        if joined > 0 {
            info!(machine = %self.options.name, runs, clean_blocks = joined, "too many single blocks for a log: neighbours are joined");
        }
    }

    /// Pieces of the log under way.
    fn pieces(&self) -> u64 {
        self.pieces.load(Ordering::Relaxed)
    }

    fn counted(&self, taken: Taken) -> Taken {
        if matches!(taken, Taken::Piece(_)) {
            self.pieces.fetch_add(1, Ordering::Relaxed);
        }
        taken
    }

    /// Least bytes in which the next piece of a delta ends before its run does.
    fn piece_min(&self) -> u64 {
        let (pieces, frames_max) = (self.pieces(), self.options.frames_max);
        if pieces <= frames_max / 16 {
            BLOCK_BYTES
        } else if pieces <= frames_max / 2 {
            LONG_PIECE_BYTES
        } else {
            FRAME_BYTES_MAX
        }
    }

    /// The next preserved run: they come first because they hold memory and their blocks are hot.
    fn take_preserved(&self, epoch: Epoch, max: u64) -> Option<Taken> {
        let epochs = self.epochs.read();
        if slot_of(&epochs, Side::Closing, epoch).is_none() {
            return Some(Taken::Superseded);
        }
        let (disk, run, held) = self.preserve.lock().pop(max)?;
        let content = match held {
            Held::Data(bytes) => PieceContent::Data(bytes.into()),
            Held::Zero(_) => PieceContent::Zero,
        };
        Some(Taken::Piece(Piece { disk, run, content }))
    }

    /// Whether really nothing is owed. The maps are looked at before the side store: a block moves from there to here.
    fn check_end(&self, side: Side, epoch: Epoch) -> Option<Taken> {
        let epochs = self.epochs.read();
        let Some(slot) = slot_of(&epochs, side, epoch) else {
            return Some(Taken::Superseded);
        };
        let owed = self.disks.iter().any(|disk| disk.owed(slot).count() > 0);
        let preserved = side == Side::Closing && !self.preserve.lock().is_empty();
        (!owed && !preserved).then_some(Taken::Drained)
    }

    /// A block of these sets at or after the cursor, or else before it.
    pub(super) fn find(
        &self,
        from: Cursor,
        set: impl Fn(&Tracked) -> &Bits,
    ) -> Option<(&Tracked, u64)> {
        let count = self.disks.len();
        (0..=count).find_map(|step| {
            let disk = &self.disks[(from.disk + step) % count];
            if set(disk).count() == 0 {
                return None;
            }
            let start = if step == 0 { from.block } else { 0 };
            let found = set(disk).next(start..disk.blocks().end)?;
            Some((disk, found))
        })
    }

    /// Reads a run of the closing epoch that starts at or after `block` in its region; nothing if it is gone.
    fn take_closing(
        &self,
        disk: &Tracked,
        block: u64,
        epoch: Epoch,
        max: u64,
        buffers: &mut Buffers<BUFFERS_MAX>,
    ) -> Result<Option<Taken>, DiskError> {
        let region = block / BLOCKS_PER_REGION;
        let alone = disk.locks.exclusive(region..region + 1);
        let (slot, run, breaks, kind) = {
            let epochs = self.epochs.read();
            let Some(slot) = slot_of(&epochs, Side::Closing, epoch) else {
                return Ok(Some(Taken::Superseded));
            };
            let Some(run) = owed_run(disk, slot, block, max) else {
                return Ok(None);
            };
            let kind = epochs.closing.map(|closing| closing.kind);
            (slot, run, epochs.breaks, kind)
        };
        let (mut held, mut shared) = (Some(alone), None);
        if kind == Some(ClosingKind::Delta) {
            // Writers of other blocks of the region go on; writers of these find them owed and wait.
            shared = held.take().map(crate::track::locks::Exclusive::downgrade);
        }
        let least = if kind == Some(ClosingKind::Delta) {
            self.piece_min()
        } else {
            // The log of an initial copy has any number of frames.
            BLOCK_BYTES
        };
        let (extent, content) = read_content(&*disk.inner, disk.extent(&run), least, buffers)?;
        let epochs = self.epochs.read();
        if epochs.breaks != breaks {
            return Ok(Some(Taken::Superseded));
        }
        disk.owed(slot).clear(extent.blocks());
        drop(epochs);
        drop((held, shared));
        Ok(Some(piece(disk, extent, content)))
    }

    /// Reads a run of the open epoch that starts at or after `block` in its region; nothing if it is gone.
    fn take_open(
        &self,
        disk: &Tracked,
        block: u64,
        epoch: Epoch,
        max: u64,
        buffers: &mut Buffers<BUFFERS_MAX>,
    ) -> Result<Option<Taken>, DiskError> {
        let region = block / BLOCKS_PER_REGION;
        let _alone = disk.locks.exclusive(region..region + 1);
        let (run, breaks) = {
            let epochs = self.epochs.read();
            let Some(slot) = slot_of(&epochs, Side::Open, epoch) else {
                return Ok(Some(Taken::Superseded));
            };
            let Some(run) = owed_run(disk, slot, block, max) else {
                return Ok(None);
            };
            // Before the read: what a cut finds cleared here has this content, because nobody writes it meanwhile.
            disk.owed(slot).clear(run.clone());
            (run, epochs.breaks)
        };
        let read = read_content(&*disk.inner, disk.extent(&run), self.piece_min(), buffers);
        let epochs = self.epochs.read();
        if epochs.breaks != breaks {
            return Ok(Some(Taken::Superseded));
        }
        let done = read
            .as_ref()
            .map_or(run.start, |(extent, _)| extent.blocks().end);
        let left = done..run.end;
        if !left.is_empty() {
            let side = if epochs.open == epoch {
                Side::Open
            } else {
                Side::Closing
            };
            let slot = slot_of(&epochs, side, epoch).expect("without a break the epoch is there");
            disk.owed(slot).set(left);
        }
        drop(epochs);
        let (extent, content) = read?;
        Ok(Some(piece(disk, extent, content)))
    }
}

fn piece(disk: &Tracked, run: Extent, content: PieceContent) -> Taken {
    Taken::Piece(Piece {
        disk: disk.index,
        run,
        content,
    })
}

/// The maps of `epoch`, if it is the one on that `side`.
fn slot_of(epochs: &Epochs, side: Side, epoch: Epoch) -> Option<Slot> {
    match side {
        Side::Open => (epochs.open == epoch).then_some(epochs.slot),
        Side::Closing => match epochs.closing {
            Some(Closing { epoch: closing, .. }) if closing == epoch => Some(epochs.slot.other()),
            _ => None,
        },
    }
}

/// The first run of owed blocks at or after `block` in its region, at most `max` bytes.
fn owed_run(disk: &Tracked, slot: Slot, block: u64, max: u64) -> Option<Range<u64>> {
    let region_end = (block / BLOCKS_PER_REGION + 1) * BLOCKS_PER_REGION;
    let within = block..region_end.min(disk.blocks().end);
    let run = disk.owed(slot).run(within)?;
    Some(run.start..run.end.min(run.start + max / BLOCK_BYTES))
}

/// Reads the start of `run`, which is not empty: as much of it as is of one kind, in whole blocks or to its end. If that is
/// less than `least`, a multiple of a block, so much as data, or all of the run.
pub(super) fn read_content<const COUNT_MAX: usize>(
    disk: &dyn Disk,
    run: Extent,
    least: u64,
    buffers: &mut Buffers<COUNT_MAX>,
) -> Result<(Extent, PieceContent), DiskError> {
    let (known, kind) = disk.run_at(run.offset)?;
    let known = known.end().min(run.end()) - run.offset;
    let whole = |len: u64| {
        if len == run.len {
            len
        } else {
            len / BLOCK_BYTES * BLOCK_BYTES
        }
    };
    if kind == Content::Zero && whole(known) >= least.min(run.len) {
        return Ok((Extent::new(run.offset, whole(known)), PieceContent::Zero));
    }
    let len = known.next_multiple_of(BLOCK_BYTES).max(least).min(run.len);
    let count = to_usize(len);
    let long = count >= BUFFER_BYTES_MIN;
    let again = long.then(|| buffers.reclaim(count)).flatten();
    let mut bytes = again.unwrap_or_else(|| BytesMut::zeroed(count));
    bytes.resize(count, 0);
    disk.read_at(run.offset, &mut bytes)?;
    let bytes = bytes.freeze();
    if long {
        buffers.lend(&bytes);
    }
    Ok((Extent::new(run.offset, len), PieceContent::Data(bytes)))
}
