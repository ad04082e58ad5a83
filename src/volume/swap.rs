//! What a machine knows and learns when the hosts of its primary and its replica swap roles.
//!
//! ```text
//!   old primary A                                new primary B, promoted at point P
//!   ────────────                                 ──────────────────────────────────
//!   runs until it dies, or steps down            open: nothing is known      continue_from(P, runs of the logs past P)
//!   comes back: open (adds hot regions           writes of the guest are marked
//!               after a power cut)
//!               divergence ────────────────────> owe(runs)
//!               forget                           cut: epoch P+1 holds what differs, and nothing else
//!   becomes the replica at P <────────────────── take, pending, staged
//! ```
//! A planned swap sends nothing: [`Machine::at_rest`] proves that A holds exactly P.
//!
//! # Why the blocks are right
//! Say A was at lineage L when it stopped. It differs from L in its [`divergence`](Machine::divergence) and nowhere else. B
//! differs from P in what it wrote since. P and L differ in the logs between them: those past P are what B was rolled back
//! by, and if P is the younger one (its acknowledgement never reached A) they are in A's divergence. The union of the
//! three is what A and B can differ in.
//!
//! # Crash contract
//! Marks that no guest write made have no hot region that would speak for them after a power cut: the open map is synced
//! before [`Machine::suspect`] returns, and before [`Machine::continue_from`] writes the record. A crash before the record
//! leaves marks that cost a resend; the call is repeated. [`forget`] removes the record first: what files a crash leaves
//! then are those of no machine, and an open makes them anew.
#![forbid(unsafe_code)]

use std::{borrow::Borrow, io, ops::Range};

use tracing::info;

use super::{
    answers::{ForgetError, MachineError},
    core::{ClosingKind, Control, Tracked},
    machine::{Machine, check_epoch},
    record::Record,
    take::Cursors,
    verify::SavedVerification,
};
use crate::{
    base::{
        ids::{Lineage, MachineId},
        limits::DIVERGENCE_RUNS_MAX,
        units::{BLOCKS_PER_REGION, DiskIndex, Extent},
    },
    storage::ledger::Ledger,
    track::{
        bits::Bits,
        header::{Slot, is_tracking_file},
        state::StateDir,
    },
};

impl Machine {
    /// The machine continues `point`, which it did not send itself: the next epoch is the one after it, and `runs` may
    /// differ from what the peer holds there. Whatever else differs was written through the machine's volumes before or
    /// will be. What is marked stays marked, and an initial copy under way becomes part of the next epoch. Durable when
    /// this returns.
    ///
    /// Repeated for the point it continued, also after epochs went out, the call only adds marks. Called without a
    /// connection or before anything is taken for it, as [`Machine::reconcile`] is. On an error nothing changed, but
    /// `runs` may be marked.
    pub fn continue_from(
        &self,
        point: Lineage,
        runs: &[(DiskIndex, Extent)],
    ) -> Result<(), MachineError> {
        let mut control = self.control()?;
        check_epoch(point)?;
        let marks = self.blocks_of(runs)?;
        let open = self.mark_durably(&mut control, &marks)?;
        let known = [control.record.lineage, control.record.origin];
        if known.contains(&Some(point)) {
            self.owe_marked(&marks);
            return Ok(());
        }
        self.record(&mut control, "the point to continue", |record| {
            record.copying = false;
            record.lineage = Some(point);
            record.origin = Some(point);
            record.pending = None;
        })?;
        let mut takes = self.core.takes.lock();
        let mut epochs = self.core.epochs.write();
        if epochs.closing.is_some() {
            self.core.merge(&mut epochs);
        }
        epochs.open = point.epoch.next();
        epochs.breaks += 1;
        for disk in &self.core.disks {
            disk.suspects.clear();
            disk.owed(open).add(disk.map(open));
        }
        drop(epochs);
        *takes = Cursors::default();
        drop(takes);
        info!(machine = %self.name(), epoch = %point.epoch, "a point of another host is continued");
        Ok(())
    }

    /// Every run that may differ from the point [`Machine::lineage`]: ascending for each disk, not touching each other,
    /// in whole blocks or up to the end of the disk. Where those are more than [`DIVERGENCE_RUNS_MAX`] they are told
    /// coarser, never less. Without a lineage, with an initial copy under way or with tracking lost: the whole disks.
    ///
    /// Of a disk that could not be flushed all hot regions may differ. What is written meanwhile may be missing: the
    /// caller stopped the guest.
    pub fn divergence(&self) -> Vec<(DiskIndex, Extent)> {
        let control = self.core.control.lock();
        let unknown = control.record.copying
            || control.record.lineage.is_none()
            || self.core.lost.get().is_some();
        let differing = self.core.disks.iter().map(|disk| {
            // Without memory for the union nothing is known of it either.
            let bits = (!unknown).then(|| differing(disk).ok()).flatten();
            (disk, bits)
        });
        let differing: Vec<(&Tracked, Option<Bits>)> = differing.collect();
        drop(control);
        told(&differing, DIVERGENCE_RUNS_MAX)
    }

    /// The point [`Machine::lineage`], if nothing was written since: both maps are empty, no epoch is closing, no trailer
    /// is on its way, no copy runs, tracking was not lost and no disk stopped. This is what a planned failover needs to
    /// know (promise P7), once no writer is left. It does not say that the image is durable: flush it before the peer
    /// goes on.
    pub fn at_rest(&self) -> Option<Lineage> {
        let control = self.core.control.lock();
        let epochs = self.core.epochs.read();
        let unmarked = |disk: &Tracked| Slot::BOTH.iter().all(|&slot| disk.map(slot).count() == 0);
        let rests = epochs.closing.is_none()
            && control.record.pending.is_none()
            && !control.record.copying
            && self.core.lost.get().is_none()
            && (self.core.disks.iter()).all(|disk| unmarked(disk) && disk.stopped.get().is_none());
        control.record.lineage.filter(|_| rests)
    }

    /// The blocks of `runs`, if all of them lie on the machine's disks.
    pub(super) fn blocks_of(
        &self,
        runs: &[(DiskIndex, Extent)],
    ) -> Result<Vec<(DiskIndex, Range<u64>)>, MachineError> {
        let blocks = runs.iter().map(|&(index, run)| {
            let disk = self.core.disks.get(index.index());
            let disk = disk.ok_or(MachineError::UnknownDisk {
                disk: index,
                offset: run.offset,
                disks: self.core.disks.len(),
            })?;
            match run.checked_end() {
                Some(end) if end <= disk.size => Ok((index, run.blocks())),
                _ => Err(MachineError::OutsideDisk {
                    disk: disk.name.clone(),
                    offset: run.offset,
                    len: run.len,
                    size: disk.size,
                }),
            }
        });
        blocks.collect()
    }

    /// Marks blocks in the open map, durably; its slot, which only holders of the control lock change.
    pub(super) fn mark_durably(
        &self,
        control: &mut Control,
        marks: &[(DiskIndex, Range<u64>)],
    ) -> Result<Slot, MachineError> {
        let open = self.core.epochs.read().slot;
        for (index, blocks) in marks {
            self.core.disk(*index).map(open).set(blocks.clone());
        }
        for disk in &self.core.disks {
            if let Err(source) = disk.map(open).sync() {
                return Err(self.sync_failed(control, disk, source));
            }
        }
        Ok(open)
    }

    /// Makes blocks that are marked in the open map owed, and the point they would be missing from impossible.
    pub(super) fn owe_marked(&self, marks: &[(DiskIndex, Range<u64>)]) {
        if marks.is_empty() {
            return;
        }
        let mut epochs = self.core.epochs.write();
        let closing = epochs.closing.map(|closing| closing.kind);
        if closing == Some(ClosingKind::Delta) {
            self.core.merge(&mut epochs);
            info!(machine = %self.name(), into = %epochs.open, "epoch merged: the peer differs in more");
        }
        for (index, blocks) in marks {
            let disk = self.core.disk(*index);
            disk.owed(epochs.slot).set(blocks.clone());
        }
    }
}

/// Forgets all tracking of a machine: its record in the node's store and the tracking files in its folder `state`. Called
/// when its host became a replica, so that a later promotion begins with a machine that is new. Nothing of it may be open
/// any more, and what it knew ([`Machine::divergence`]) must be owed by the new primary. Durable when this returns; interrupted or failed, it is called again. What is not there is no error.
pub fn forget(ledger: &Ledger, id: MachineId, state: &StateDir) -> Result<(), ForgetError> {
    for key in [Record::key(id), SavedVerification::key(id)] {
        ledger.remove(&key).map_err(|source| ForgetError::Record {
            machine: id,
            source,
        })?;
    }
    let failed = |what: &str| {
        let what = what.to_owned();
        move |source| ForgetError::Files {
            what,
            machine: id,
            source,
        }
    };
    let folder = state.folder();
    let names = folder.names().map_err(failed("list the files"))?;
    for name in names.iter().filter(|name| is_tracking_file(name)) {
        match folder.remove(name) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(failed(&format!("remove {name}"))(error));
            }
            _ => {}
        }
    }
    folder.sync().map_err(failed("sync the folder"))?;
    info!(machine = %id, "tracking forgotten");
    Ok(())
}

/// The blocks of a tracked disk that may differ from the lineage.
fn differing(disk: &Tracked) -> io::Result<Bits> {
    let blocks = disk.blocks().end;
    let bits = Bits::fleeting(blocks)?;
    for slot in Slot::BOTH {
        bits.add(disk.map(slot));
    }
    if disk.stopped.get().is_some() {
        for region in disk.hot.regions() {
            let first = region * BLOCKS_PER_REGION;
            bits.set(first..(first + BLOCKS_PER_REGION).min(blocks));
        }
    }
    Ok(bits)
}

/// The runs of all disks, at most `runs_max` and one for each disk; of a disk without a map, all of it.
pub(super) fn told<B: Borrow<Bits>>(
    disks: &[(&Tracked, Option<B>)],
    runs_max: usize,
) -> Vec<(DiskIndex, Extent)> {
    let runs = |granule| {
        disks.iter().flat_map(move |(disk, bits)| {
            let all = bits.is_none().then(|| disk.blocks());
            let some = bits
                .iter()
                .flat_map(move |bits| coarse(bits.borrow(), disk.blocks(), granule));
            let runs = all.into_iter().chain(some).filter(|run| !run.is_empty());
            runs.map(|run| (disk.index, disk.extent(&run)))
        })
    };
    let mut granule = 1;
    while granule < disks_blocks_max(disks) && runs(granule).count() > runs_max {
        granule *= 2;
    }
    runs(granule).collect()
}

fn disks_blocks_max<B>(disks: &[(&Tracked, Option<B>)]) -> u64 {
    let blocks = disks.iter().map(|(disk, _)| disk.blocks().end);
    blocks.max().unwrap_or(0)
}

/// The runs of `bits` in `within`, widened to multiples of `granule` and joined where they then touch.
fn coarse(bits: &Bits, within: Range<u64>, granule: u64) -> impl Iterator<Item = Range<u64>> {
    let end = within.end;
    let widened = bits.runs(within).map(move |run| {
        let start = run.start / granule * granule;
        start..run.end.next_multiple_of(granule).min(end)
    });
    let mut widened = widened.peekable();
    std::iter::from_fn(move || {
        let mut run = widened.next()?;
        while let Some(next) = widened.next_if(|next| next.start <= run.end) {
            run.end = next.end;
        }
        Some(run)
    })
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeSet, sync::Arc};

    use super::*;
    use crate::{
        base::{
            checksum::Digest,
            clock::ManualClock,
            ids::Name,
            limits::DELTA_FRAMES_MAX,
            units::{Epoch, MIB},
        },
        disk::{Access, raw::RawDisk},
        storage::{
            Storage,
            memory::{MemoryFolder, MemoryStorage, Power},
        },
        volume::{DiskSource, ImageStamp, MachineOptions},
    };

    fn machine() -> Arc<Machine> {
        let power = Power::new();
        let disks = [3 * MIB + 512, 64 * 1024].map(|size| {
            let storage = MemoryStorage::new(&power);
            storage.set_len(size).unwrap();
            DiskSource {
                name: Name::new(&format!("d{size}")).unwrap(),
                disk: Arc::new(RawDisk::open(storage, Access::ReadWrite).unwrap()),
                stamp: ImageStamp {
                    inode: 1,
                    bytes: size,
                    modified: (0, 0),
                },
            }
        });
        let options = MachineOptions {
            id: MachineId(uuid::Uuid::from_u128(1)),
            name: Name::new("m").unwrap(),
            clock: Arc::new(ManualClock::default()),
            boot_id: "boot".into(),
            preserve_bytes_max: MIB,
            hot_regions_max: 4,
            frames_max: DELTA_FRAMES_MAX,
        };
        let state = StateDir::memory(MemoryFolder::new(&power));
        let ledger = Arc::new(Ledger::open(MemoryStorage::new(&power)).unwrap());
        Machine::open(options, disks.into(), &state, ledger).unwrap()
    }

    /// More scattered blocks than there may be runs: fewer runs are told, which hold all of them, and not much more.
    #[test]
    fn too_many_runs_are_told_coarser_and_never_less() {
        let machine = machine();
        let head = Lineage {
            epoch: Epoch(3),
            chain: Digest([3; 32]),
        };
        let scattered = (0..768).step_by(3).map(|block| (0, block));
        let scattered = scattered.chain([(0, 768), (1, 2), (1, 15)]);
        let runs: Vec<(DiskIndex, Extent)> = scattered
            .map(|(disk, block)| (DiskIndex(disk), Extent::new(block * 4096, 1)))
            .collect();
        machine.continue_from(head, &runs).unwrap();
        let blocks = |runs: &[(DiskIndex, Extent)]| -> BTreeSet<(DiskIndex, u64)> {
            let blocks = runs
                .iter()
                .flat_map(|(disk, run)| run.blocks().map(|block| (*disk, block)));
            blocks.collect()
        };
        let disks = machine.core.disks.iter();
        let differing: Vec<_> = disks
            .map(|disk| (disk, Some(differing(disk).unwrap())))
            .collect();
        for (runs_max, runs_told) in [(300, 259), (258, 131), (130, 3), (2, 2), (0, 2)] {
            let told = told(&differing, runs_max);
            assert_eq!(told.len(), runs_told, "{runs_max}");
            assert!(blocks(&told).is_superset(&blocks(&runs)));
        }
        assert_eq!(blocks(&told(&differing, 300)), blocks(&runs));
        // In pairs of blocks, so that two pairs of each three touch.
        assert_eq!(
            told(&differing, 258)[129..],
            [
                (DiskIndex(1), Extent::new(2 * 4096, 2 * 4096)),
                (DiskIndex(1), Extent::new(14 * 4096, 2 * 4096)),
            ]
        );
    }
}
