//! How fast a replication may send: the limits of its host, its group and itself, all of which it keeps.
//!
//! What is counted is delta log, handed to the link; headers of packets and what is sent again after a loss come on top.
//! Guest writes know nothing of it: a machine that may send less than its guest writes has longer epochs. A flush that waits
//! for the replica waits for the limit as well.

use std::{sync::Arc, time::Duration};

use parking_lot::Mutex;

use super::policy::Bandwidth;
use crate::base::{
    clock::{Clock, Timestamp},
    rate::Bucket,
    units::KIB,
};

/// Fewest bytes that pass at once, unless fewer are left. The same for everybody: of those who share a limit, one who waited
/// for more would get nothing while others take less at a time.
const PIECE_MIN: u64 = 4 * KIB;

/// A limit that one machine, those of a group or all of a host keep together.
#[derive(Debug)]
pub(super) struct Limiter {
    bandwidth: Bandwidth,
    /// Nothing while there is no limit.
    bucket: Mutex<Option<Bucket>>,
}

impl Limiter {
    pub(super) fn new(bandwidth: Bandwidth) -> Self {
        Self {
            bandwidth,
            bucket: Mutex::default(),
        }
    }
}

/// The limits that one replication keeps.
#[derive(Clone, Debug)]
pub(super) struct Pacing {
    /// In the same order for everybody, since they are locked together.
    limiters: Vec<Arc<Limiter>>,
    clock: Arc<dyn Clock>,
}

impl Pacing {
    /// Keeps all of these: the widest first, so that everybody who shares some has them in one order.
    pub(super) fn new(limiters: Vec<Arc<Limiter>>, clock: Arc<dyn Clock>) -> Self {
        let limiters = limiters
            .into_iter()
            .filter(|limiter| !limiter.bandwidth.is_unlimited());
        Self {
            limiters: limiters.collect(),
            clock,
        }
    }

    /// The lowest limit at a time, in bytes per second.
    pub(super) fn limit(&self, wall: Timestamp) -> Option<u64> {
        let limits = self.limiters.iter();
        limits
            .filter_map(|limiter| limiter.bandwidth.at(wall))
            .min()
    }

    /// Lets some of `bytes` pass now, and says how many; or says how long to wait before asking again.
    pub(super) fn pass(&self, bytes: u64) -> Result<u64, Duration> {
        if self.limiters.is_empty() {
            return Ok(bytes);
        }
        let (wall, now) = (self.clock.wall(), self.clock.monotonic());
        let mut buckets: Vec<_> = self
            .limiters
            .iter()
            .map(|limiter| (limiter.bandwidth.at(wall), limiter.bucket.lock()))
            .collect();
        for (rate, bucket) in &mut buckets {
            match (*rate, &mut **bucket) {
                (Some(rate), Some(bucket)) if bucket.rate() != rate => bucket.set_rate(rate, now),
                (Some(_), Some(_)) => {}
                (Some(rate), none @ None) => *none = Some(Bucket::new(rate, now)),
                (None, bucket) => *bucket = None,
            }
        }
        let mut buckets: Vec<&mut Bucket> = buckets
            .iter_mut()
            .filter_map(|(_, bucket)| bucket.as_mut())
            .collect();
        let free = buckets.iter_mut().map(|bucket| bucket.free(now));
        let free = free.fold(bytes, u64::min);
        if free >= bytes.min(PIECE_MIN) {
            for bucket in &mut buckets {
                bucket.take(free, now);
            }
            return Ok(free);
        }
        // Half a burst: while one half is waited for, a timer that is late loses nothing of the other.
        let waits = buckets.iter_mut();
        let waits = waits.map(|bucket| bucket.wait_for(bytes.min(bucket.burst() / 2), now));
        Err(waits.max().unwrap_or_default())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        base::{clock::ManualClock, units::MIB},
        node::policy::{Days, Limit, Window},
    };

    fn limiter(limit: &str) -> Arc<Limiter> {
        let limit: Limit = limit.parse().unwrap();
        Arc::new(Limiter::new(limit.into()))
    }

    /// Bytes that links get which always have more to send, until the clock says `until`: each sleeps for as long as it is
    /// told to, and a little longer.
    fn sent(pacing: &[&Pacing], clock: &ManualClock, until: Duration) -> Vec<u64> {
        let mut sums = vec![0; pacing.len()];
        let mut wakes = vec![clock.monotonic(); pacing.len()];
        loop {
            let now = clock.monotonic();
            let (index, wake) = (wakes.iter().copied().enumerate())
                .min_by_key(|(_, wake)| *wake)
                .unwrap();
            if wake.max(now) >= until {
                clock.advance(until.saturating_sub(now));
                return sums;
            }
            clock.advance(wake.saturating_sub(now));
            match pacing[index].pass(MIB) {
                Ok(bytes) => sums[index] += bytes,
                Err(wait) => wakes[index] = wake.max(now) + wait + Duration::from_micros(100),
            }
        }
    }

    #[test]
    fn every_limit_is_kept_and_shared_by_whom_it_is_for() {
        let clock = Arc::new(ManualClock::default());
        let pacing = |limiters: &[&Arc<Limiter>]| {
            let limiters = limiters.iter().map(|limiter| Arc::clone(limiter)).collect();
            Pacing::new(limiters, Arc::clone(&clock) as Arc<dyn Clock>)
        };
        let (host, group, own) = (limiter("10M"), limiter("6M"), limiter("1M"));
        let free = limiter("none");
        let small = pacing(&[&host, &group, &own]);
        let grouped = pacing(&[&host, &group, &free]);
        let other = pacing(&[&host, &free]);
        assert_eq!(small.limit(Timestamp(0)), Some(MIB));
        assert_eq!(other.limit(Timestamp(0)), Some(10 * MIB));
        let sums = sent(
            &[&small, &grouped, &other],
            &clock,
            Duration::from_secs(100),
        );
        let [small, grouped, other] = sums[..] else {
            panic!("three sums");
        };
        let at_most = |sum: u64, rate: u64| {
            let most = 100 * rate + rate / 20 + MIB;
            assert!(sum <= most, "{sum} of {most}");
        };
        at_most(small, MIB);
        at_most(small + grouped, 6 * MIB);
        at_most(small + grouped + other, 10 * MIB);
        assert!(small + grouped + other >= 98 * 10 * MIB, "nothing is lost");
        assert!(small > 10 * MIB, "nobody starves: {small}");
    }

    #[test]
    fn a_window_takes_effect_when_it_begins() {
        let clock = Arc::new(ManualClock::default());
        let windows = [("00:00", "00:01", "1M"), ("00:02", "00:03", "none")];
        let windows = windows.map(|(from, to, limit)| {
            let days = Days::ALL;
            let (from, to) = (from.parse().unwrap(), to.parse().unwrap());
            Window::new(from, to, days, limit.parse().unwrap()).unwrap()
        });
        let bandwidth = Bandwidth {
            limit: "4M".parse().unwrap(),
            windows: windows.to_vec(),
        };
        let limiter = Arc::new(Limiter::new(bandwidth));
        let pacing = Pacing::new(vec![limiter], Arc::clone(&clock) as Arc<dyn Clock>);
        let first = sent(&[&pacing], &clock, Duration::from_mins(1))[0];
        assert!((59 * MIB..=62 * MIB).contains(&first), "{first}");
        let second = sent(&[&pacing], &clock, Duration::from_mins(2))[0];
        assert!((4 * 59 * MIB..=4 * 62 * MIB).contains(&second), "{second}");
        assert_eq!(pacing.pass(1 << 40), Ok(1 << 40), "no limit for a minute");
        clock.advance(Duration::from_secs(61));
        assert!(pacing.pass(1 << 40).unwrap() < MIB);
    }
}
