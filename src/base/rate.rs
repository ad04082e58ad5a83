//! Bytes in time: a token bucket that bounds them, a meter that shows them.
//!
//! Time is an argument, from a clock that never goes back.
//!
//! # What a bucket promises
//! In any span of time no more than `rate x span + burst` bytes pass, whatever the calls; and a caller who waits as long as
//! he is told gets his bytes. Credit is counted in billionths of a byte, so nothing is lost to rounding.

use std::time::Duration;

use super::units::{KIB, MIB};

/// The lowest limit, in bytes per second: a frame of 1 MiB that is on its way takes a quarter of a minute.
pub const RATE_MIN: u64 = 64 * KIB;
/// The highest limit, in bytes per second: more than any link, and few enough to be counted in.
pub const RATE_MAX: u64 = 1 << 40;
/// Smallest and largest burst, in bytes: a few packets, and what passes at 80 MiB/s while a timer is late.
const BURST: (u64, u64) = (16 * KIB, 4 * MIB);
/// Bursts in a second between those two.
const BURSTS_PER_SECOND: u64 = 20;
const NANOS: u128 = 1_000_000_000;

/// A token bucket.
#[derive(Clone, Debug)]
pub struct Bucket {
    rate: u64,
    /// Billionths of a byte that may pass now.
    credit: u128,
    /// When that was so.
    at: Duration,
}

impl Bucket {
    /// A full bucket for `rate` bytes per second, between [`RATE_MIN`] and [`RATE_MAX`].
    pub fn new(rate: u64, now: Duration) -> Self {
        let rate = rate.clamp(RATE_MIN, RATE_MAX);
        Self {
            rate,
            credit: u128::from(burst(rate)) * NANOS,
            at: now,
        }
    }

    /// Bytes per second.
    pub fn rate(&self) -> u64 {
        self.rate
    }

    /// Most bytes that pass at once.
    pub fn burst(&self) -> u64 {
        burst(self.rate)
    }

    /// Another rate from now on. Credit beyond the new burst is lost; a lower burst than before promises more, never less.
    pub fn set_rate(&mut self, rate: u64, now: Duration) {
        self.fill(now);
        self.rate = rate.clamp(RATE_MIN, RATE_MAX);
        self.credit = self.credit.min(u128::from(self.burst()) * NANOS);
    }

    /// Bytes that may pass now.
    pub fn free(&mut self, now: Duration) -> u64 {
        self.fill(now);
        u64::try_from(self.credit / NANOS).expect("a burst is counted in bytes")
    }

    /// How long until `bytes`, at most a burst, may pass: zero if they may now.
    pub fn wait_for(&mut self, bytes: u64, now: Duration) -> Duration {
        self.fill(now);
        let missing = u128::from(bytes.min(self.burst())) * NANOS;
        let missing = missing.saturating_sub(self.credit);
        let nanos = missing.div_ceil(u128::from(self.rate));
        Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
    }

    /// Lets `bytes` pass.
    ///
    /// # Panics
    /// If they may not pass yet: [`wait_for`](Self::wait_for) says when.
    pub fn take(&mut self, bytes: u64, now: Duration) {
        self.fill(now);
        let bytes = u128::from(bytes) * NANOS;
        assert!(bytes <= self.credit, "the caller asks before he takes");
        self.credit -= bytes;
    }

    fn fill(&mut self, now: Duration) {
        let passed = now.saturating_sub(self.at);
        self.at = self.at.max(now);
        let full = u128::from(self.burst()) * NANOS;
        let gained = passed.as_nanos().saturating_mul(u128::from(self.rate));
        self.credit = self.credit.saturating_add(gained).min(full);
    }
}

fn burst(rate: u64) -> u64 {
    (rate / BURSTS_PER_SECOND).clamp(BURST.0, BURST.1)
}

/// Span over which a [`Meter`] counts.
const METER_SPAN: Duration = Duration::from_secs(2);

/// Counts bytes, and shows their rate over the last complete span of two seconds.
#[derive(Clone, Copy, Debug, Default)]
pub struct Meter {
    /// Number of the span that is being counted, from time zero.
    span: u64,
    counted: u64,
    /// Bytes of the span before.
    last: u64,
}

impl Meter {
    /// `bytes` passed.
    pub fn add(&mut self, bytes: u64, now: Duration) {
        self.turn(now);
        self.counted = self.counted.saturating_add(bytes);
    }

    /// Bytes per second.
    pub fn rate(mut self, now: Duration) -> u64 {
        self.turn(now);
        self.last / METER_SPAN.as_secs()
    }

    fn turn(&mut self, now: Duration) {
        let span = now.as_secs() / METER_SPAN.as_secs();
        if span > self.span {
            self.last = if span == self.span + 1 {
                self.counted
            } else {
                0
            };
            (self.span, self.counted) = (span, 0);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    proptest! {
        /// Somebody who takes as much as he can, after pauses of any length, never gets more than the rate and one burst
        /// in any span between two of his takes.
        #[test]
        fn no_span_carries_more_than_its_share(
            rate in RATE_MIN..(1 << 30),
            steps in prop::collection::vec((0_u64..200_000_000, 1_u64..(8 << 20)), 1..60),
        ) {
            let mut now = Duration::from_secs(7);
            let mut bucket = Bucket::new(rate, now);
            let burst = bucket.burst();
            let mut passed: Vec<(Duration, u64)> = Vec::new();
            for (pause, wish) in steps {
                now += Duration::from_nanos(pause);
                let bytes = wish.min(burst);
                now += bucket.wait_for(bytes, now);
                prop_assert_eq!(bucket.wait_for(bytes, now), Duration::ZERO, "told to wait and may not pass");
                bucket.take(bytes, now);
                passed.push((now, bytes));
            }
            for from in 0..passed.len() {
                let mut sum = 0;
                for (at, bytes) in &passed[from..] {
                    sum += u128::from(*bytes) * NANOS;
                    let span = at.saturating_sub(passed[from].0).as_nanos();
                    prop_assert!(sum <= span * u128::from(rate) + u128::from(burst) * NANOS);
                }
            }
        }

        /// Who always has something to send gets the whole rate, but for the burst he began with.
        #[test]
        fn nothing_of_the_rate_is_lost(rate in RATE_MIN..(1 << 30), piece in 1_u64..(1 << 20)) {
            let (mut now, mut sum) = (Duration::ZERO, 0);
            let mut bucket = Bucket::new(rate, now);
            let piece = piece.min(bucket.burst() / 2).max(1).max(rate / 2000);
            while now < SECOND {
                now += bucket.wait_for(piece, now);
                bucket.take(piece, now);
                sum += piece;
            }
            prop_assert!(sum + piece >= rate, "{} of {}", sum, rate);
        }
    }

    #[test]
    fn another_rate_counts_from_when_it_was_set() {
        let mut bucket = Bucket::new(MIB, Duration::ZERO);
        bucket.take(bucket.burst(), Duration::ZERO);
        bucket.set_rate(10 * MIB, SECOND / 1000);
        let gained = MIB / 1000;
        let wait = bucket.wait_for(gained + 10 * MIB / 1000, SECOND / 1000);
        assert!(wait <= SECOND / 1000 && wait > SECOND / 1100, "{wait:?}");
        bucket.set_rate(0, SECOND);
        assert_eq!(
            bucket.rate(),
            RATE_MIN,
            "a link that stands still is no limit"
        );
        assert_eq!(bucket.wait_for(bucket.burst(), SECOND), Duration::ZERO);
    }

    #[test]
    fn a_clock_that_stands_still_gives_nothing() {
        let mut bucket = Bucket::new(MIB, SECOND);
        bucket.take(bucket.burst(), SECOND);
        let wait = bucket.wait_for(16 * KIB, SECOND);
        assert_eq!(bucket.wait_for(16 * KIB, SECOND / 2), wait);
        assert_eq!(wait, Duration::from_micros(15_625));
    }

    #[test]
    fn a_meter_shows_the_last_span() {
        let mut meter = Meter::default();
        meter.add(3 * MIB, SECOND);
        meter.add(MIB, SECOND + SECOND / 2);
        assert_eq!(meter.rate(SECOND), 0, "not over yet");
        assert_eq!(meter.rate(2 * SECOND), 2 * MIB);
        meter.add(8 * MIB, 2 * SECOND);
        assert_eq!(meter.rate(3 * SECOND), 2 * MIB);
        assert_eq!(meter.rate(4 * SECOND), 4 * MIB);
        assert_eq!(meter.rate(6 * SECOND), 0, "nothing passed since");
    }
}
