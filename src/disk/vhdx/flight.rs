//! Knowing when the reads and writes that may still use a block's old place have ended, without making them wait.
//!
//! Each read and write counts itself in one of two counters while it is under way, chosen by the parity of the current
//! turn. Turning sends newcomers to the other counter; when the first has come down to zero, everybody who might have
//! looked up a block before the turn is gone. Counters are spread over stripes, a cache line each, so that threads do
//! not share them: the price on the hot path is two uncontended atomic additions.
//!
//! # Why it holds
//! Whoever is counted has seen the same turn before and after counting, so the addition is ordered before the next
//! turn (all of these are sequentially consistent), and who turns afterwards finds it. Whoever saw the new turn also
//! sees every table entry that was changed before it.

use std::{
    cell::Cell,
    sync::atomic::{AtomicU64, AtomicUsize, Ordering},
};

const STRIPES: usize = 16;

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Flights {
    turn: AtomicU64,
    stripes: [Stripe; STRIPES],
}

#[derive(Debug, Default)]
#[repr(align(128))]
struct Stripe([AtomicU64; 2]);

/// One read or write under way.
#[derive(Debug)]
pub(super) struct Flight<'a>(&'a AtomicU64);

impl Flights {
    /// Counts the caller until the result is dropped.
    pub(super) fn start(&self) -> Flight<'_> {
        let stripe = &self.stripes[stripe_of_thread()];
        loop {
            let turn = self.turn.load(Ordering::SeqCst);
            let counter = &stripe.0[parity(turn)];
            counter.fetch_add(1, Ordering::SeqCst);
            let flight = Flight(counter);
            if self.turn.load(Ordering::SeqCst) == turn {
                return flight;
            }
        }
    }

    /// Sends newcomers to the other counter, which must have come down to zero: one caller at a time.
    pub(super) fn turn(&self) {
        self.turn.fetch_add(1, Ordering::SeqCst);
    }

    /// Whether all that started before the last turn has ended.
    pub(super) fn have_landed(&self) -> bool {
        let before = parity(self.turn.load(Ordering::SeqCst) + 1);
        self.stripes
            .iter()
            .all(|stripe| stripe.0[before].load(Ordering::SeqCst) == 0)
    }
}

impl Drop for Flight<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

fn parity(turn: u64) -> usize {
    usize::from(turn % 2 == 1)
}

fn stripe_of_thread() -> usize {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    thread_local! {
        static STRIPE: Cell<usize> = Cell::new(NEXT.fetch_add(1, Ordering::Relaxed) % STRIPES);
    }
    STRIPE.get()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_those_who_started_before_the_turn_are_waited_for() {
        let flights = Flights::default();
        let early = flights.start();
        flights.turn();
        assert!(!flights.have_landed());
        let late = flights.start();
        assert!(!flights.have_landed());
        drop(early);
        assert!(flights.have_landed(), "the late one is not waited for");
        flights.turn();
        assert!(!flights.have_landed(), "it is at the next turn");
        drop(late);
        assert!(flights.have_landed());
    }
}
