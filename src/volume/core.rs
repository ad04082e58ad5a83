//! The state that volumes and machine share, and the steps that change it.
//!
//! # Who may change what
//! The epochs change only under the epoch lock held alone: by [`Core::merge`] (also called by a writer that finds the
//! side store full) and by the machine's control calls, which the control lock puts in a row. Writers and readers of
//! the maps hold the epoch lock shared for as long as they touch bits, never while they wait for a disk.
#![forbid(unsafe_code)]

use std::{
    io,
    ops::Range,
    sync::{Arc, OnceLock},
};

use tracing::{error, info, warn};

use super::{
    open::MachineOptions,
    record::{Record, Trust},
    take::{Cursors, PieceContent, read_content},
    trouble::Trouble,
};
use crate::{
    base::{
        buffers::Buffers,
        chain::chain,
        ids::Name,
        sync::{
            Mutex, RwLock,
            atomic::{AtomicU64, Ordering},
        },
        units::{BLOCK_BYTES, Block, DiskIndex, Epoch, Extent},
    },
    disk::{Disk, DiskError, Fua},
    storage::{
        self,
        ledger::{Ledger, LedgerError},
    },
    track::{
        bits::Bits,
        header::Slot,
        hot::Hot,
        locks::RegionLocks,
        map::Map,
        preserve::{Held, Preserve},
        suspects::Suspects,
    },
};

/// Which epochs there are. Two at most: one that is open and one that is cut and not yet durable on the replica.
#[derive(Clone, Copy, Debug)]
pub(super) struct Epochs {
    pub(super) open: Epoch,
    /// The map of the open epoch; the other one is that of the closing epoch.
    pub(super) slot: Slot,
    pub(super) closing: Option<Closing>,
    /// Whether the other map still holds bits of a merged epoch: they may go once the open map is synced.
    pub(super) stale: bool,
    /// Counts merges and disconnections: what was taken before one is not to be used after it.
    pub(super) breaks: u64,
}

/// The epoch that is cut and not yet durable on the replica.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Closing {
    pub(super) epoch: Epoch,
    pub(super) kind: ClosingKind,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ClosingKind {
    /// Epoch 0. What the guest rewrites belongs to epoch 1 as well, so nothing is preserved.
    Copy,
    /// Content as of the cut.
    Delta,
}

/// One disk and everything that tracks it.
#[derive(Debug)]
pub(super) struct Tracked {
    pub(super) index: DiskIndex,
    pub(super) name: Name,
    pub(super) size: u64,
    pub(super) inner: Arc<dyn Disk>,
    pub(super) maps: [Map; 2],
    pub(super) owed: [Bits; 2],
    /// Blocks of the open map that are not owed, because the replica may hold them as they are. Only while no epoch is
    /// closing.
    pub(super) suspects: Suspects,
    pub(super) locks: RegionLocks,
    pub(super) hot: Hot,
    /// Why the disk no longer takes writes.
    pub(super) stopped: OnceLock<String>,
    /// The errors it gave its guest.
    pub(super) trouble: Trouble,
}

impl Tracked {
    pub(super) fn map(&self, slot: Slot) -> &Bits {
        self.maps[slot.index()].bits()
    }

    pub(super) fn owed(&self, slot: Slot) -> &Bits {
        &self.owed[slot.index()]
    }

    pub(super) fn blocks(&self) -> Range<u64> {
        0..self.size.div_ceil(BLOCK_BYTES)
    }

    /// The bytes of `blocks`, cut at the end of the disk.
    pub(super) fn extent(&self, blocks: &Range<u64>) -> Extent {
        let offset = Block(blocks.start).offset();
        let end = Block(blocks.end).offset().min(self.size);
        Extent::new(offset, end - offset)
    }

    /// The disk takes no more writes.
    pub(super) fn note_stop(&self, error: &DiskError) -> bool {
        let first = self.stopped.set(chain(error)).is_ok();
        if first {
            error!(disk = %self.name, %error, "the disk stopped");
        }
        first
    }
}

/// What the control calls keep.
#[derive(Debug)]
pub(super) struct Control {
    pub(super) record: Record,
    pub(super) closed: bool,
}

/// A machine: its disks, its epochs, its side store.
#[derive(Debug)]
pub(super) struct Core {
    pub(super) options: MachineOptions,
    pub(super) ledger: Arc<Ledger>,
    pub(super) key: String,
    pub(super) disks: Vec<Tracked>,
    pub(super) control: Mutex<Control>,
    pub(super) takes: Mutex<Cursors>,
    pub(super) epochs: RwLock<Epochs>,
    pub(super) preserve: Mutex<Preserve>,
    /// Why the maps can no longer be trusted.
    pub(super) lost: OnceLock<String>,
    pub(super) merged: AtomicU64,
    pub(super) preserved: AtomicU64,
    /// Pieces that the log under way was given.
    pub(super) pieces: AtomicU64,
}

impl Core {
    pub(super) fn disk(&self, index: DiskIndex) -> &Tracked {
        &self.disks[index.index()]
    }

    /// Writes the record with `change` made to it; on an error it is as before.
    pub(super) fn store(
        &self,
        control: &mut Control,
        change: impl FnOnce(&mut Record),
    ) -> Result<(), LedgerError> {
        let mut record = control.record.clone();
        change(&mut record);
        self.ledger.put(&self.key, &record)?;
        control.record = record;
        Ok(())
    }

    /// Marks `blocks` as written in the open epoch; the number that was marked before. Nothing is marked, and the
    /// answer is nothing, if one of them is still owed to the closing epoch.
    pub(super) fn mark(&self, disk: &Tracked, blocks: Range<u64>) -> Option<u64> {
        let epochs = self.epochs.read();
        let preserving = epochs
            .closing
            .is_some_and(|closing| closing.kind == ClosingKind::Delta);
        if preserving && disk.owed(epochs.slot.other()).any(blocks.clone()) {
            return None;
        }
        Some(mark_open(disk, epochs.slot, blocks))
    }

    /// Preserves what `blocks` still owe to the closing epoch, and marks them. The caller holds their regions alone.
    /// If the side store is full, the epoch is merged instead.
    pub(super) fn preserve_and_mark(&self, disk: &Tracked, blocks: Range<u64>) -> u64 {
        loop {
            let (closing, owed) = {
                let epochs = self.epochs.read();
                let closing = epochs
                    .closing
                    .filter(|closing| closing.kind == ClosingKind::Delta);
                let owed: Vec<Range<u64>> = match closing {
                    Some(_) => disk
                        .owed(epochs.slot.other())
                        .runs(blocks.clone())
                        .collect(),
                    None => Vec::new(),
                };
                let Some(closing) = closing.filter(|_| !owed.is_empty()) else {
                    return mark_open(disk, epochs.slot, blocks);
                };
                (closing, owed)
            };
            // Read without the epoch lock: only this caller, who holds the regions alone, could change the content.
            let old = read_old(disk, &owed);
            let epochs = self.epochs.read();
            if epochs.closing != Some(closing) {
                continue;
            }
            let count = old.as_ref().map_or(0, Vec::len);
            let kept = match old {
                Ok(old) => self.preserve.lock().keep(disk.index, old).is_ok(),
                Err(error) => {
                    // The guest's write does not fail for the replica's sake.
                    warn!(disk = %disk.name, %error, "cannot preserve a block");
                    false
                }
            };
            if kept {
                let owed_bits = disk.owed(epochs.slot.other());
                for run in owed {
                    owed_bits.clear(run);
                }
                self.preserved
                    .fetch_add(crate::base::units::to_u64(count), Ordering::Relaxed);
                return mark_open(disk, epochs.slot, blocks);
            }
            drop(epochs);
            self.merge_epoch(closing.epoch);
        }
    }

    /// Merges the closing epoch into the open one, if it still is `epoch`.
    fn merge_epoch(&self, epoch: Epoch) {
        let mut epochs = self.epochs.write();
        if epochs.closing.is_some_and(|closing| closing.epoch == epoch) {
            self.merge(&mut epochs);
            info!(machine = %self.options.name, %epoch, into = %epochs.open, "epoch merged: the side store is full");
        }
    }

    /// Merges the closing epoch into the open one. What was sent of the closing epoch and not written since need not be
    /// sent again in the same log; what was sent of the open one, into a second log, must.
    pub(super) fn merge(&self, epochs: &mut Epochs) {
        let (open, closing) = (epochs.slot, epochs.slot.other());
        for disk in &self.disks {
            disk.owed(open).add(disk.map(open));
            disk.owed(open).add(disk.owed(closing));
            disk.owed(closing).clear_all();
            disk.map(open).add(disk.map(closing));
        }
        self.preserve.lock().clear();
        epochs.closing = None;
        epochs.stale = true;
        epochs.breaks += 1;
        self.merged.fetch_add(1, Ordering::Relaxed);
    }

    /// Empties the map that the next closing epoch will leave behind. Its bits were merged into the open map; they go
    /// when that is durable, or a power cut between the two could lose them. Under the control lock.
    pub(super) fn clear_stale(&self) -> Result<(), (&Tracked, io::Error)> {
        let epochs = *self.epochs.read();
        if !epochs.stale {
            return Ok(());
        }
        for disk in &self.disks {
            disk.map(epochs.slot)
                .sync()
                .map_err(|error| (disk, error))?;
        }
        for disk in &self.disks {
            disk.map(epochs.slot.other()).clear_all();
        }
        self.epochs.write().stale = false;
        Ok(())
    }

    /// Makes `regions` of the disk hot.
    pub(super) fn heat(&self, disk: &Tracked, regions: Range<u64>) -> Result<(), DiskError> {
        let heated = disk.hot.heat(regions, &disk.locks, &|| self.settle(disk));
        heated.or_else(|error| self.hot_failed(disk, &error))
    }

    /// Makes what image and maps of the disk hold durable.
    pub(super) fn settle(&self, disk: &Tracked) -> io::Result<()> {
        self.flush(disk).map_err(io::Error::other)?;
        disk.maps.iter().try_for_each(|map| map.bits().sync())
    }

    /// Flushes the image. A failure is final for the disk, and remembered: what its hot regions hold on the platter is
    /// uncertain from then on, as after a power cut. The caller holds no lock.
    pub(super) fn flush(&self, disk: &Tracked) -> Result<(), DiskError> {
        disk.inner
            .flush()
            .inspect_err(|error| self.stop(disk, error))
    }

    /// A write or zeroing of the guest failed. If it was to be durable, or the disk below has stopped in it, that is as
    /// final as a failed flush; a lack of space is not. The caller holds no lock.
    pub(super) fn write_failed(&self, disk: &Tracked, error: &DiskError, fua: Fua) {
        let is_final = match error {
            DiskError::Stopped(_) => true,
            DiskError::Io { source, .. } => fua == Fua::Yes && !storage::is_full(source),
            DiskError::OutOfRange { .. } | DiskError::ReadOnly => false,
        };
        if is_final {
            self.stop(disk, error);
        } else {
            disk.trouble.note(error);
        }
    }

    fn stop(&self, disk: &Tracked, error: &DiskError) {
        if disk.stopped.get().is_some() {
            return;
        }
        let mut control = self.control.lock();
        // A machine that was closed has its disks closed, too.
        if control.closed || !disk.note_stop(error) {
            return;
        }
        if let Err(error) = self.store(&mut control, |record| {
            record.trust = record.trust.max(Trust::Suspect);
        }) {
            error!(machine = %self.options.name, %error, "cannot record that a disk stopped");
        }
    }

    /// The intent log could not be written, or the image not be flushed before it.
    pub(super) fn hot_failed(&self, disk: &Tracked, cause: &io::Error) -> Result<(), DiskError> {
        match disk.stopped.get() {
            Some(reason) => Err(DiskError::Stopped(reason.clone())),
            None => self.lose_tracking_under(&mut self.control.lock(), disk, cause),
        }
    }

    /// Intent log or maps cannot be written. If the node's store can, the machine goes on and everything is sent again
    /// later (the guest does not pay for the replica); if not, nobody would know, and the disk stops.
    pub(super) fn lose_tracking_under(
        &self,
        control: &mut Control,
        disk: &Tracked,
        cause: &io::Error,
    ) -> Result<(), DiskError> {
        if self.lost.get().is_some() {
            return Ok(());
        }
        let reason = format!("tracking of {} failed: {cause}", disk.name);
        match self.store(control, |record| record.trust = Trust::Lost) {
            Ok(()) => {
                error!(machine = %self.options.name, %reason, "tracking lost: a resync is needed");
                let _ = self.lost.set(reason);
                Ok(())
            }
            Err(error) => {
                let stopped =
                    DiskError::Stopped(format!("{reason}, and so did the node's store: {error}"));
                disk.note_stop(&stopped);
                Err(stopped)
            }
        }
    }
}

fn mark_open(disk: &Tracked, slot: Slot, blocks: Range<u64>) -> u64 {
    let all = blocks.end - blocks.start;
    disk.suspects.written(blocks.clone());
    let added = disk.map(slot).set(blocks.clone());
    disk.owed(slot).set(blocks);
    all - added
}

fn read_old(disk: &Tracked, owed: &[Range<u64>]) -> Result<Vec<(Block, Held)>, DiskError> {
    let mut old = Vec::new();
    for run in owed {
        let mut left = run.clone();
        while !left.is_empty() {
            let (extent, content) = read_content(
                &*disk.inner,
                disk.extent(&left),
                BLOCK_BYTES,
                &mut Buffers::<0>::default(),
            )?;
            let blocks = extent.blocks();
            left.start = blocks.end;
            for block in blocks {
                let of = disk.extent(&(block..block + 1));
                let held = match &content {
                    PieceContent::Zero => Held::Zero(of.len),
                    PieceContent::Data(bytes) => {
                        let from = crate::base::units::to_usize(of.offset - extent.offset);
                        let to = crate::base::units::to_usize(of.end() - extent.offset);
                        Held::Data(bytes[from..to].into())
                    }
                };
                old.push((Block(block), held));
            }
        }
    }
    Ok(old)
}
