//! Locks and atomic words, from one place: so that a test can decide which thread goes on at each of them.
//!
//! An ordinary build takes them from `parking_lot` and the standard library. Built with `--cfg shuttle` (see
//! `scripts/shuttle`) they are shuttle's, which runs all threads of a test in one, and chooses at each lock and each
//! atomic access who goes on. What has to be right under every such schedule, [`track`](crate::track) and
//! [`volume`](crate::volume), takes them from here; all else takes the originals.
#![forbid(unsafe_code)]

#[cfg(not(shuttle))]
pub use {
    parking_lot::{Condvar, Mutex, MutexGuard, RwLock, RwLockReadGuard, RwLockWriteGuard},
    std::sync::atomic,
};

#[cfg(shuttle)]
pub use {
    self::scheduled::Condvar,
    shuttle::sync::atomic,
    shuttle_parking_lot_impl::{Mutex, MutexGuard, RwLock, RwLockReadGuard, RwLockWriteGuard},
};

#[cfg(shuttle)]
mod scheduled {
    //! What is missing between shuttle and `parking_lot`.

    use shuttle::sync;

    use super::MutexGuard;

    /// A condition variable for the scheduled [`Mutex`](super::Mutex).
    #[derive(Debug, Default)]
    pub struct Condvar {
        /// How often it was notified.
        turns: sync::Mutex<u64>,
        turned: sync::Condvar,
    }

    impl Condvar {
        /// One that nobody waits for.
        pub fn new() -> Self {
            Self::default()
        }

        /// Lets go of `guard` until this is notified. Nothing that happens once the guard is let go of is missed.
        pub fn wait<T>(&self, guard: &mut MutexGuard<'_, T>) {
            // Held before the guard is let go of, and `notify_all` takes it: no turn comes in between.
            let turns = self.turns.lock().expect("no holder panics");
            let seen = *turns;
            MutexGuard::unlocked(guard, || {
                let waited = self.turned.wait_while(turns, |turns| *turns == seen);
                drop(waited.expect("no holder panics"));
            });
        }

        /// Wakes all who wait.
        pub fn notify_all(&self) {
            *self.turns.lock().expect("no holder panics") += 1;
            self.turned.notify_all();
        }
    }
}
