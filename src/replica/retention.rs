//! Which recovery points a replica keeps: a pure function of the points it has.
//!
//! The newest epochs, and of each of the last hours the first point. "Hour" is the hour of the cut time, and the last
//! one is that of the newest point, so that nothing is dropped because a primary is silent. The first point of an hour is
//! the one that stays what it is while more come; a bucket leaves as a whole, so a point that was passed over never
//! comes back.

use std::collections::BTreeSet;

use crate::base::{clock::Timestamp, units::Epoch};

/// Which recovery points are kept beside the latest; all zero keeps nothing else.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Retention {
    /// Newest epochs kept as logs, each a point beside the one they start from.
    pub newest: u32,
    /// Hours of which the first point is kept, counted back from the newest point.
    pub hourly: u32,
}

/// Microseconds of an hour.
const HOUR_US: u64 = 3_600_000_000;

/// Why a point is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kept {
    /// It is not.
    No,
    /// It is one of the newest, until others are newer.
    Newest,
    /// It is the first of its hour, or in use.
    Anchor,
}

/// A point that a decision is about.
#[derive(Clone, Copy, Debug)]
pub(super) struct Candidate {
    pub(super) epoch: Epoch,
    pub(super) cut: Timestamp,
    /// Whether it is a point by itself. Images that are on the way to one are not.
    pub(super) whole: bool,
}

impl Retention {
    /// What becomes of `points`, oldest first; the newest is always kept. `used` tells which ones are in use.
    pub(super) fn decide(self, points: &[Candidate], used: impl Fn(Epoch) -> bool) -> Vec<Kept> {
        let hour = |point: &Candidate| point.cut.0 / HOUR_US;
        let last = points.last().map_or(0, hour);
        let window = points.len().saturating_sub(1).saturating_sub(
            // A count that does not fit keeps everything.
            usize::try_from(self.newest).unwrap_or(usize::MAX),
        );
        let mut hours = BTreeSet::new();
        let decide = |(number, point): (usize, &Candidate)| {
            let first = point.whole
                && last.saturating_sub(hour(point)) < u64::from(self.hourly)
                && hours.insert(hour(point));
            if first || used(point.epoch) {
                Kept::Anchor
            } else if number >= window {
                Kept::Newest
            } else {
                Kept::No
            }
        };
        points.iter().enumerate().map(decide).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn points(minutes: &[u64]) -> Vec<Candidate> {
        let point = |(epoch, minute): (u64, &u64)| Candidate {
            epoch: Epoch(epoch),
            cut: Timestamp(minute * 60_000_000),
            whole: true,
        };
        (1..).zip(minutes).map(point).collect()
    }

    fn kept(newest: u32, hourly: u32, minutes: &[u64], used: &[u64]) -> Vec<u64> {
        let points = points(minutes);
        let retention = Retention { newest, hourly };
        let kept = retention.decide(&points, |epoch| used.contains(&epoch.0));
        let kept = points
            .iter()
            .zip(kept)
            .filter(|(_, kept)| *kept != Kept::No);
        kept.map(|(point, _)| point.epoch.0).collect()
    }

    #[test]
    fn the_newest_and_the_first_of_each_hour_are_kept() {
        let minutes = [10, 50, 61, 70, 119, 130, 170, 175, 179];
        assert_eq!(kept(0, 0, &minutes, &[]), [9], "the latest only");
        assert_eq!(kept(2, 0, &minutes, &[]), [7, 8, 9]);
        assert_eq!(kept(0, 2, &minutes, &[]), [3, 6, 9]);
        assert_eq!(kept(1, 3, &minutes, &[]), [1, 3, 6, 8, 9]);
        assert_eq!(kept(1, 0, &minutes, &[2]), [2, 8, 9]);
        assert_eq!(kept(u32::MAX, 0, &minutes, &[]).len(), 9);
        assert_eq!(kept(9, 9, &[], &[]), [0; 0]);
    }

    /// Decided step by step over what is left, or at once over all there ever was: the same points.
    #[test]
    fn a_point_that_was_dropped_never_comes_back() {
        let retention = Retention {
            newest: 3,
            hourly: 4,
        };
        let minutes: Vec<u64> = (0..400).map(|n| n * 7 + n % 5).collect();
        let all = points(&minutes);
        let mut held: Vec<Candidate> = Vec::new();
        for (number, point) in all.iter().enumerate() {
            held.push(*point);
            let kept = |points: &[Candidate]| -> Vec<Candidate> {
                let kept = retention.decide(points, |_| false);
                let both = points.iter().zip(kept);
                both.filter(|(_, kept)| *kept != Kept::No)
                    .map(|(point, _)| *point)
                    .collect()
            };
            held = kept(&held);
            let epochs = |points: &[Candidate]| -> Vec<_> {
                points.iter().map(|point| point.epoch).collect()
            };
            assert_eq!(epochs(&held), epochs(&kept(&all[..=number])));
        }
    }
}
