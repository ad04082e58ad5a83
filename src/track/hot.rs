//! The table of hot regions: which regions the guest may write without touching the intent log first.
//!
//! A region is cold until its first write. The writer that finds it cold makes it hot, durably, and so does everybody who
//! comes meanwhile: one of them writes one record for all (group commit). A writer that follows a sequential stream
//! makes the regions ahead hot in the same record. Regions cool in batches: they are closed to writers one by one, the
//! image is flushed and the maps are synced once, and one checkpoint drops them all.
//!
//! # Order of locks
//! Whoever calls [`Hot::heat`] or [`Hot::cool_idle`] holds no region lock, because cooling takes them. The state of a
//! region goes from hot to cold only under its region lock held alone: a writer that holds it shared and sees the region
//! hot knows that it stays in the log until the write is over.
#![forbid(unsafe_code)]

use std::{
    collections::{BTreeSet, VecDeque},
    io,
    ops::Range,
};

use super::{
    intent::{HOT_REGIONS_MAX, IntentLog},
    locks::RegionLocks,
};
use crate::base::{
    sync::{
        Condvar, Mutex, MutexGuard,
        atomic::{AtomicU8, Ordering},
    },
    units::{REGION_BYTES, to_u64, to_usize},
};

/// Regions that a sequential stream makes hot at once: a synced record for each 64 MiB, which a disk of 1 GB/s asks
/// for 16 times a second.
const REGIONS_AHEAD: u64 = 64;
/// Regions that are cooled at once when the table is full.
const COOL_BATCH: usize = HOT_REGIONS_MAX / 4;
/// Fewer idle regions than this are not worth the flush that cooling them needs.
const COOL_IDLE_MIN: usize = 64;

const COLD: u8 = 0;
/// Hot, and not written since the last look at it.
const IDLE: u8 = 1;
const BUSY: u8 = 2;

/// Makes what the image and the maps hold durable, so that regions may leave the log.
pub type Settle<'a> = dyn Fn() -> io::Result<()> + 'a;

/// The hot regions of one disk.
#[derive(Debug)]
pub struct Hot {
    states: Box<[AtomicU8]>,
    table: Mutex<Table>,
    turned: Condvar,
    /// Written by the one caller for whom `table.writing` is set.
    log: Mutex<IntentLog>,
    regions_max: usize,
}

#[derive(Debug, Default)]
struct Table {
    /// Regions in the log, in the order in which they came.
    order: VecDeque<u64>,
    logged: BTreeSet<u64>,
    waiting: BTreeSet<u64>,
    /// Whether somebody is writing the log.
    writing: bool,
    /// Set by the first failed write of the log, which is final.
    failed: Option<String>,
}

impl Hot {
    /// The table over `log`, which holds no regions, for a disk of `size` bytes. Above `regions_max`, at most
    /// [`HOT_REGIONS_MAX`], regions are cooled; a single call that needs more may exceed it for a while.
    pub fn new(log: IntentLog, size: u64, regions_max: usize) -> Self {
        let regions = size.div_ceil(REGION_BYTES);
        let regions_max = regions_max.clamp(1, HOT_REGIONS_MAX);
        Self {
            states: (0..regions).map(|_| AtomicU8::new(COLD)).collect(),
            table: Mutex::default(),
            turned: Condvar::new(),
            log: Mutex::new(log),
            regions_max,
        }
    }

    /// Whether all of `regions` are hot; notes that they are in use.
    pub fn is_hot(&self, regions: Range<u64>) -> bool {
        self.states[to_usize(regions.start)..to_usize(regions.end)]
            .iter()
            .all(|state| match state.load(Ordering::Acquire) {
                COLD => false,
                // Fails where somebody else has noted it, or has just made the region cold: looked at again.
                IDLE => state
                    .compare_exchange(IDLE, BUSY, Ordering::AcqRel, Ordering::Acquire)
                    .map_or_else(|now| now != COLD, |_| true),
                _ => true,
            })
    }

    /// Makes `regions` hot: durable in the log when this returns.
    pub fn heat(
        &self,
        regions: Range<u64>,
        locks: &RegionLocks,
        settle: &Settle<'_>,
    ) -> io::Result<()> {
        let wanted = self.with_regions_ahead(regions.clone());
        let mut table = self.table.lock();
        while !self.is_hot(regions.clone()) {
            if let Some(failure) = &table.failed {
                return Err(io::Error::other(failure.clone()));
            }
            let cold = wanted
                .clone()
                .filter(|&ahead| !self.is_hot(ahead..ahead + 1));
            // All of its own regions, so that none that is hot makes room for another.
            table.waiting.extend(cold.chain(regions.clone()));
            if table.writing {
                self.turned.wait(&mut table);
            } else {
                self.write_waiting(&mut table, locks, settle)?;
            }
        }
        Ok(())
    }

    /// Cools the regions that nobody wrote since the last call, if they are worth it. Called now and then: it bounds
    /// what a power cut makes us send again.
    pub fn cool_idle(&self, locks: &RegionLocks, settle: &Settle<'_>) -> io::Result<()> {
        let mut table = self.table.lock();
        if table.writing || table.failed.is_some() {
            return Ok(());
        }
        let mut idle = Vec::new();
        for &region in &table.order {
            let state = &self.states[to_usize(region)];
            match state.load(Ordering::Acquire) {
                BUSY => state.store(IDLE, Ordering::Release),
                _ => idle.push(region),
            }
        }
        if idle.len() < COOL_IDLE_MIN.min(self.regions_max.div_ceil(2)) {
            return Ok(());
        }
        table.writing = true;
        let done = self.cool(&mut table, &idle, &[], locks, settle);
        self.finish(&mut table, done)
    }

    /// Number of hot regions.
    pub fn count(&self) -> usize {
        self.table.lock().logged.len()
    }

    /// The hot regions, in ascending order.
    pub fn regions(&self) -> Vec<u64> {
        self.table.lock().logged.iter().copied().collect()
    }

    /// Empties the log. The caller has flushed the image and synced the maps, and no write is in flight.
    pub fn clear(&self) -> io::Result<()> {
        let mut table = self.table.lock();
        for state in &self.states {
            state.store(COLD, Ordering::Release);
        }
        table.order.clear();
        table.logged.clear();
        self.log.lock().checkpoint(&[])
    }

    /// `regions`, and those ahead of them if the ones before are hot already, as they are in a sequential stream.
    fn with_regions_ahead(&self, regions: Range<u64>) -> Range<u64> {
        let before = regions.start.checked_sub(1);
        let streaming = before
            .is_some_and(|before| self.states[to_usize(before)].load(Ordering::Acquire) != COLD);
        let ahead = if streaming {
            REGIONS_AHEAD.min(to_u64(self.regions_max / 4))
        } else {
            0
        };
        regions.start..(regions.end + ahead).min(to_u64(self.states.len()))
    }

    /// Writes one record for all who wait. The table is unlocked meanwhile, so that more can gather.
    fn write_waiting(
        &self,
        table: &mut MutexGuard<'_, Table>,
        locks: &RegionLocks,
        settle: &Settle<'_>,
    ) -> io::Result<()> {
        table.writing = true;
        let waiting = std::mem::take(&mut table.waiting);
        // Known are those that are hot, and those that are cold because cooling them failed.
        let (known, fresh): (Vec<u64>, Vec<u64>) = waiting
            .into_iter()
            .partition(|region| table.logged.contains(region));
        let done = if table.logged.len() + fresh.len() > self.regions_max {
            let victims = self.victims(table, &known);
            self.cool(table, &victims, &fresh, locks, settle)
        } else if fresh.is_empty() {
            Ok(())
        } else if self.log.lock().has_room(fresh.len()) {
            let added = MutexGuard::unlocked(table, || self.log.lock().add(&fresh));
            added.inspect(|()| Self::enter(table, &fresh))
        } else {
            self.cool(table, &[], &fresh, locks, settle)
        };
        if done.is_ok() {
            for region in known.into_iter().chain(fresh) {
                self.states[to_usize(region)].store(BUSY, Ordering::Release);
            }
        }
        self.finish(table, done)
    }

    fn finish(&self, table: &mut Table, done: io::Result<()>) -> io::Result<()> {
        table.writing = false;
        if let Err(error) = &done {
            table.failed = Some(error.to_string());
        }
        self.turned.notify_all();
        done
    }

    fn enter(table: &mut Table, regions: &[u64]) {
        for &region in regions {
            if table.logged.insert(region) {
                table.order.push_back(region);
            }
        }
    }

    /// The regions to cool so that others find room: the oldest that were not written lately.
    fn victims(&self, table: &mut Table, keep: &[u64]) -> Vec<u64> {
        let batch = COOL_BATCH.min(self.regions_max.div_ceil(4)).max(1);
        let mut victims = Vec::with_capacity(batch);
        for _ in 0..2 * table.order.len() {
            if victims.len() == batch {
                break;
            }
            let Some(region) = table.order.pop_front() else {
                break;
            };
            let state = &self.states[to_usize(region)];
            let busy = state
                .compare_exchange(BUSY, IDLE, Ordering::AcqRel, Ordering::Acquire)
                .is_ok();
            if busy || keep.contains(&region) {
                table.order.push_back(region);
            } else {
                victims.push(region);
            }
        }
        // They are in the log until the checkpoint without them is durable.
        table.order.extend(&victims);
        victims
    }

    /// Drops `victims` from the log and adds `fresh` to it, with one checkpoint.
    fn cool(
        &self,
        table: &mut MutexGuard<'_, Table>,
        victims: &[u64],
        fresh: &[u64],
        locks: &RegionLocks,
        settle: &Settle<'_>,
    ) -> io::Result<()> {
        let gone: BTreeSet<u64> = victims.iter().copied().collect();
        let left = table.logged.iter().filter(|region| !gone.contains(region));
        let left: Vec<u64> = left.copied().chain(fresh.iter().copied()).collect();
        MutexGuard::unlocked(table, || {
            for &region in victims {
                // Alone, so that no write that saw the region hot is still under way.
                let _alone = locks.exclusive(region..region + 1);
                self.states[to_usize(region)].store(COLD, Ordering::Release);
            }
            if !victims.is_empty() {
                settle()?;
            }
            self.log.lock().checkpoint(&left)
        })?;
        table.logged.retain(|region| !gone.contains(region));
        table.order.retain(|region| !gone.contains(region));
        Self::enter(table, fresh);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;
    use crate::{
        base::{ids::MachineId, units::DiskIndex},
        storage::memory::{MemoryFolder, Power},
        track::{header::Owner, state::StateDir},
    };

    const SIZE: u64 = 400 * REGION_BYTES;

    /// The hot regions of a disk, and what an open after a death would find of them.
    struct Host {
        hot: Hot,
        locks: RegionLocks,
        state: StateDir,
        power: std::sync::Arc<Power>,
        settled: Cell<u32>,
    }

    fn owner() -> Owner {
        Owner {
            machine: MachineId(uuid::Uuid::from_u128(1)),
            disk: DiskIndex(0),
            size: SIZE,
        }
    }

    impl Host {
        fn new(regions_max: usize) -> Self {
            let power = Power::new();
            let state = StateDir::memory(MemoryFolder::new(&power));
            let log = IntentLog::create(&state, owner(), 1).unwrap();
            Self {
                hot: Hot::new(log, SIZE, regions_max),
                locks: RegionLocks::new(SIZE),
                state,
                power,
                settled: Cell::new(0),
            }
        }

        /// Settles the disk, which counts it.
        fn settle(&self) -> impl Fn() -> io::Result<()> {
            || {
                self.settled.set(self.settled.get() + 1);
                Ok(())
            }
        }

        fn heat(&self, regions: Range<u64>) {
            let heated = self.hot.heat(regions.clone(), &self.locks, &self.settle());
            heated.unwrap();
            assert!(self.hot.is_hot(regions));
        }

        fn cool_idle(&self) {
            self.hot.cool_idle(&self.locks, &self.settle()).unwrap();
        }

        /// The hot regions, which are also those in the log.
        fn regions(&self) -> Vec<u64> {
            let found = IntentLog::find(&self.state, owner(), [1, 2]);
            let (_, logged) = found.unwrap().unwrap();
            let regions = self.hot.regions();
            assert_eq!(regions, logged.into_iter().collect::<Vec<_>>());
            assert_eq!(self.hot.count(), regions.len());
            regions
        }
    }

    #[test]
    fn a_stream_makes_the_regions_ahead_hot_in_the_same_record() {
        for (regions_max, ahead) in [(400, REGIONS_AHEAD), (40, 10)] {
            let host = Host::new(regions_max);
            host.heat(7..8);
            assert_eq!(host.regions(), [7]);
            // Not beside the one before: no stream.
            host.heat(9..10);
            assert_eq!(host.regions(), [7, 9]);
            let steps = host.power.steps();
            host.heat(10..11);
            let stream = [7].into_iter().chain(9..11 + ahead);
            assert_eq!(host.regions(), stream.collect::<Vec<_>>());
            for region in 11..11 + ahead {
                host.heat(region..region + 1);
            }
            assert_eq!(host.power.steps() - steps, 1, "one record for all");
        }
        // There is nothing ahead of the end.
        let host = Host::new(400);
        host.heat(398..399);
        host.heat(399..400);
        assert_eq!(host.regions(), [398, 399]);
    }

    #[test]
    fn the_oldest_that_are_not_in_use_make_room_when_there_is_none() {
        let host = Host::new(8);
        for region in (0..16).step_by(2) {
            host.heat(region..region + 1);
        }
        assert_eq!(host.regions(), [0, 2, 4, 6, 8, 10, 12, 14]);
        assert_eq!(host.settled.get(), 0, "there was room for as many");
        // All were in use: after one look at each, the oldest two are not any more, but for one that is.
        host.heat(20..21);
        assert_eq!(host.regions(), [4, 6, 8, 10, 12, 14, 20]);
        assert_eq!(host.settled.get(), 1, "what they held is durable first");
        assert!(!host.hot.is_hot(0..1) && !host.hot.is_hot(2..3));
        assert!(host.hot.is_hot(4..5));
        host.heat(30..31);
        assert_eq!(host.settled.get(), 1, "there was room");
        host.heat(40..41);
        assert_eq!(host.regions(), [4, 10, 12, 14, 20, 30, 40]);
        // One call that needs more than there may be gets it.
        host.heat(100..120);
        assert!(host.hot.count() > 8 && host.regions().ends_with(&[118, 119]));
    }

    #[test]
    fn what_nobody_wrote_between_two_looks_is_cooled_if_it_is_worth_it() {
        let host = Host::new(400);
        host.heat(0..64);
        host.cool_idle();
        assert_eq!((host.hot.count(), host.settled.get()), (64, 0));
        host.heat(5..6);
        host.cool_idle();
        assert_eq!(host.hot.count(), 64, "63 are not worth a flush");
        host.heat(100..101);
        host.cool_idle();
        assert_eq!((host.regions(), host.settled.get()), (vec![100], 1));
        host.hot.clear().unwrap();
        assert_eq!(host.regions(), [0; 0]);
        assert!(!host.hot.is_hot(100..101));
    }

    #[test]
    fn a_log_that_fails_takes_nothing_more() {
        let host = Host::new(400);
        host.power.fail_after(0, io::ErrorKind::Other);
        let settle = || Ok(());
        host.hot.heat(0..1, &host.locks, &settle).unwrap_err();
        host.hot.heat(1..2, &host.locks, &settle).unwrap_err();
        assert!(!host.hot.is_hot(0..1) && !host.hot.is_hot(1..2));
        host.cool_idle();
        assert_eq!(host.hot.count(), 0);
        // A failed flush of the image is one, too: what would have been cooled stays in the log.
        let host = Host::new(4);
        host.heat(0..4);
        let settle = || Err(io::Error::other("the image"));
        host.hot.heat(9..10, &host.locks, &settle).unwrap_err();
        assert_eq!(host.regions(), [0, 1, 2, 3]);
    }
}
