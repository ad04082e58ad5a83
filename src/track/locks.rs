//! Region locks: a writer holds the regions it writes shared, a reader for the replica holds its region alone.
//!
//! The locks are striped: region `r` has lock `r mod stripes`. Whoever takes several takes them in ascending order of
//! stripes, whoever holds one waits for nothing but further ones and the epoch lock, and whoever holds the epoch lock
//! waits for no region: so nobody waits in a circle.
//!
//! Each stripe also carries the traffic counters of its regions. Its cache line belongs to the writer at that moment
//! anyway, so counting costs nothing, where one counter for the disk would be fought over.
#![forbid(unsafe_code)]

use std::ops::Range;

use crate::base::{
    sync::{
        RwLock, RwLockReadGuard, RwLockWriteGuard,
        atomic::{AtomicU64, Ordering},
    },
    units::{REGION_BYTES, to_usize},
};

/// Most locks of one disk.
const STRIPES_MAX: u64 = 1024;
/// Most regions that are locked together: 256 MiB of a disk, a whole block of the largest VHDX block size.
pub const REGIONS_TOGETHER_MAX: u64 = 256;

const _: () = assert!(REGIONS_TOGETHER_MAX <= STRIPES_MAX);

/// The region locks of one disk.
#[derive(Debug)]
pub struct RegionLocks {
    stripes: Box<[Stripe]>,
}

#[derive(Debug, Default)]
#[repr(align(64))]
struct Stripe {
    lock: RwLock<()>,
    writes: AtomicU64,
    bytes: AtomicU64,
    folded: AtomicU64,
}

/// What passed through the locks since the disk was opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Writes and zeroings.
    pub writes: u64,
    /// Bytes written and zeroed.
    pub bytes: u64,
    /// Blocks written that were already marked in the open epoch: changes that are sent once instead of twice.
    pub folded_blocks: u64,
}

/// Guards of one, two or many stripes; a write of at most 1 MiB needs no allocation.
#[derive(Debug)]
enum Guards<G> {
    One(G),
    Two(G, G),
    Many(Vec<G>),
}

/// Regions held together with other writers.
#[derive(Debug)]
pub struct Shared<'a>(
    #[expect(dead_code, reason = "held for its drop")] Guards<RwLockReadGuard<'a, ()>>,
);

/// Regions held alone.
#[derive(Debug)]
pub struct Exclusive<'a>(Guards<RwLockWriteGuard<'a, ()>>);

impl<'a> Exclusive<'a> {
    /// Lets other writers in, without a moment in which somebody else could hold the regions alone.
    pub fn downgrade(self) -> Shared<'a> {
        let down = RwLockWriteGuard::downgrade;
        Shared(match self.0 {
            Guards::One(only) => Guards::One(down(only)),
            Guards::Two(first, second) => Guards::Two(down(first), down(second)),
            Guards::Many(all) => Guards::Many(all.into_iter().map(down).collect()),
        })
    }
}

impl RegionLocks {
    /// Locks for a disk of `size` bytes.
    pub fn new(size: u64) -> Self {
        let stripes = size.div_ceil(REGION_BYTES).clamp(1, STRIPES_MAX);
        Self {
            stripes: (0..stripes).map(|_| Stripe::default()).collect(),
        }
    }

    /// Takes `regions`, at most [`REGIONS_TOGETHER_MAX`], together with other writers.
    pub fn shared(&self, regions: Range<u64>) -> Shared<'_> {
        Shared(self.take(regions, |stripe| stripe.lock.read()))
    }

    /// Takes `regions`, at most [`REGIONS_TOGETHER_MAX`], alone.
    pub fn exclusive(&self, regions: Range<u64>) -> Exclusive<'_> {
        Exclusive(self.take(regions, |stripe| stripe.lock.write()))
    }

    fn take<'a, G>(&'a self, regions: Range<u64>, lock: impl Fn(&'a Stripe) -> G) -> Guards<G> {
        let count = regions.end - regions.start;
        debug_assert!((1..=REGIONS_TOGETHER_MAX).contains(&count));
        let stripes = crate::base::units::to_u64(self.stripes.len());
        debug_assert!(count <= stripes, "no stripe twice");
        let first = regions.start % stripes;
        // What wraps around comes first: ascending order of stripes.
        let wrapped = (first + count).saturating_sub(stripes);
        let order = (0..wrapped).chain(first..(first + count).min(stripes));
        let mut order = order.map(|stripe| lock(&self.stripes[to_usize(stripe)]));
        let mut next = || order.next().expect("as many stripes as regions");
        match count {
            1 => Guards::One(next()),
            2 => Guards::Two(next(), next()),
            _ => Guards::Many(order.collect()),
        }
    }

    /// Counts one write of `bytes` that starts in `region`.
    pub fn count(&self, region: u64, bytes: u64, folded_blocks: u64) {
        let stripes = crate::base::units::to_u64(self.stripes.len());
        let stripe = &self.stripes[to_usize(region % stripes)];
        stripe.writes.fetch_add(1, Ordering::Relaxed);
        stripe.bytes.fetch_add(bytes, Ordering::Relaxed);
        if folded_blocks > 0 {
            stripe.folded.fetch_add(folded_blocks, Ordering::Relaxed);
        }
    }

    /// What was counted so far.
    pub fn traffic(&self) -> Traffic {
        let sum = |counter: fn(&Stripe) -> &AtomicU64| {
            let counts = self.stripes.iter();
            counts.map(|s| counter(s).load(Ordering::Relaxed)).sum()
        };
        Traffic {
            writes: sum(|s| &s.writes),
            bytes: sum(|s| &s.bytes),
            folded_blocks: sum(|s| &s.folded),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn regions_that_wrap_around_are_locked_in_the_order_of_stripes() {
        let locks = RegionLocks::new(8 * REGION_BYTES);
        let order = parking_lot::Mutex::new(Vec::new());
        let base = locks.stripes.as_ptr() as usize;
        let _ = locks.take(6..11, |stripe| {
            order
                .lock()
                .push((std::ptr::from_ref(stripe) as usize - base) / size_of::<Stripe>());
        });
        assert_eq!(*order.lock(), [0, 1, 2, 6, 7]);
    }

    #[test]
    fn a_downgrade_keeps_readers_out_and_lets_writers_in() {
        let locks = RegionLocks::new(4 * REGION_BYTES);
        let shared = locks.exclusive(1..4).downgrade();
        assert!(locks.stripes[2].lock.try_write().is_none());
        assert!(locks.stripes[2].lock.try_read().is_some());
        drop(shared);
        assert!(locks.stripes[2].lock.try_write().is_some());
    }
}
