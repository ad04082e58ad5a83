//! The syncs of one file, one at a time, so that each of those who wait for one is told of its failure.
//!
//! # Why
//! The kernel tells an open file once of an error in writing back (`errseq_t`): of two `fdatasync`s at the same time on one
//! descriptor it fails one and lets the other succeed, although the pages that were lost may be those the other one waits
//! for. A flush would then be acknowledged whose data is gone. So nobody's sync overlaps another's, and after the first
//! failure every sync of the file fails: the next one would succeed and prove nothing.
//!
//! That costs no more syncs: of those who wait while one is under way the first syncs for all of them.

use std::{
    io,
    sync::atomic::{AtomicU64, Ordering},
};

use parking_lot::Mutex;

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Syncs {
    /// Syncs that began.
    begun: AtomicU64,
    /// Held by the one who syncs: whether a sync has failed.
    failed: Mutex<bool>,
}

impl Syncs {
    /// Returns after a `sync` that began after this call did, by whichever caller, if that and all before it succeeded.
    pub(super) fn run(&self, sync: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
        self.run_after(self.begun(), sync)
    }

    /// Syncs that began so far: what was written by now is with each later one.
    fn begun(&self) -> u64 {
        self.begun.load(Ordering::Acquire)
    }

    /// The same for somebody who came when `begun` syncs had begun.
    fn run_after(&self, begun: u64, sync: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
        let mut failed = self.failed.lock();
        if *failed {
            return Err(io::Error::other(
                "an earlier sync of the file failed, and what it was to make durable may be lost",
            ));
        }
        // Nobody else syncs now: what began since is over, and it did not fail.
        if self.begun() > begun {
            return Ok(());
        }
        self.begun.store(begun + 1, Ordering::Release);
        sync().inspect_err(|_| *failed = true)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Barrier;

    use super::*;

    /// A file whose kernel tells of an error once, to whoever comes first.
    struct Kernel {
        error: Mutex<bool>,
        calls: AtomicU64,
    }

    impl Kernel {
        fn new(error: bool) -> Self {
            Self {
                error: Mutex::new(error),
                calls: AtomicU64::new(0),
            }
        }

        fn sync(&self) -> io::Result<()> {
            self.calls.fetch_add(1, Ordering::AcqRel);
            if std::mem::take(&mut *self.error.lock()) {
                return Err(io::Error::other("lost"));
            }
            Ok(())
        }
    }

    /// Of these the kernel fails one alone; asked one by one or all at once, all must hear of it.
    #[test]
    fn everybody_is_told_of_a_failed_sync() {
        for _ in 0..50 {
            let (kernel, syncs, start) = (Kernel::new(true), Syncs::default(), Barrier::new(4));
            std::thread::scope(|scope| {
                for _ in 0..4 {
                    scope.spawn(|| {
                        start.wait();
                        syncs.run(|| kernel.sync()).unwrap_err();
                    });
                }
            });
            syncs.run(|| kernel.sync()).unwrap_err();
            assert_eq!(kernel.calls.into_inner(), 1, "no sync after a failed one");
        }
    }

    /// A sync under way may have passed by what was written since it began.
    #[test]
    fn one_sync_serves_all_who_waited_for_it_and_nobody_who_came_later() {
        let (kernel, syncs) = (Kernel::new(false), Syncs::default());
        let calls = || kernel.calls.load(Ordering::Acquire);
        let early = [syncs.begun(), syncs.begun()];
        let mut late = None;
        syncs
            .run_after(early[0], || {
                late = Some(syncs.begun());
                kernel.sync()
            })
            .unwrap();
        syncs.run_after(early[1], || kernel.sync()).unwrap();
        assert_eq!(calls(), 1, "it served both");
        syncs.run_after(late.unwrap(), || kernel.sync()).unwrap();
        assert_eq!(calls(), 2, "it began before this one came");
    }

    #[test]
    fn one_after_the_other_each_syncs() {
        let (kernel, syncs) = (Kernel::new(false), Syncs::default());
        for _ in 0..3 {
            syncs.run(|| kernel.sync()).unwrap();
        }
        assert_eq!(kernel.calls.into_inner(), 3);
    }
}
