//! How long to wait before dialling again: doubling, bounded, and spread by chance.
//!
//! A pure function of its state and a random number, so that a simulation can repeat it. The delay is drawn from the
//! upper half of the current step: a hundred primaries that lost the same replica come back spread out, and none of
//! them comes back at once.

use std::time::Duration;

/// Growing delays between `min` and `max`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Backoff {
    min: Duration,
    max: Duration,
    step: Duration,
}

impl Backoff {
    /// Delays from half of `min` up to `max`.
    pub fn new(min: Duration, max: Duration) -> Self {
        Self {
            min,
            max: max.max(min),
            step: min,
        }
    }

    /// The next delay, for a `random` number drawn evenly from all of its type.
    pub fn next(&mut self, random: u32) -> Duration {
        let half = self.step / 2;
        let share = f64::from(random) / (f64::from(u32::MAX) + 1.0);
        self.step = self.step.saturating_mul(2).min(self.max);
        half + half.mul_f64(share)
    }

    /// Makes the next delay no longer than `most`.
    pub fn limit(&mut self, most: Duration) {
        self.step = self.step.min(most);
    }

    /// Starts again from the shortest delay: the last attempt succeeded.
    pub fn reset(&mut self) {
        self.step = self.min;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn delays_grow_to_the_bound_and_no_further(
            min in 1_u64..5_000, max in 1_u64..100_000, random: [u32; 24],
        ) {
            let (min, max) = (Duration::from_millis(min), Duration::from_millis(max));
            let mut backoff = Backoff::new(min, max);
            let mut step = min;
            for random in random {
                let delay = backoff.next(random);
                prop_assert!(delay >= step / 2 && delay <= step, "{delay:?} of {step:?}");
                step = (step * 2).min(max.max(min));
            }
            prop_assert_eq!(step, max.max(min));
            backoff.limit(max / 3);
            prop_assert!(backoff.next(u32::MAX) <= max / 3);
            backoff.reset();
            prop_assert!(backoff.next(u32::MAX) <= min);
        }
    }

    #[test]
    fn chance_spreads_the_delays() {
        let delay = |random| Backoff::new(Duration::from_secs(2), Duration::MAX).next(random);
        assert_eq!(delay(0), Duration::from_secs(1));
        assert!(delay(u32::MAX) > Duration::from_millis(1_999));
        assert_eq!(delay(1 << 31), Duration::from_millis(1_500));
    }
}
