//! Time as an argument: the system's clocks, and one that a test moves by hand.

use std::{
    fmt,
    str::FromStr,
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use serde::{Deserialize, Serialize};

/// A point in wall-clock time: microseconds since 1970-01-01 00:00:00 UTC. Shown and stored, never used to order
/// events or to measure how long something took.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct Timestamp(pub u64);

impl Timestamp {
    /// Time from `earlier` to this, zero if the clock was set back in between.
    pub fn since(self, earlier: Self) -> Duration {
        Duration::from_micros(self.0.saturating_sub(earlier.0))
    }
}

impl fmt::Display for Timestamp {
    /// As `2026-11-23 03:04:05 UTC`, in the proleptic Gregorian calendar.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const DAYS_PER_400_YEARS: u64 = 146_097;
        let seconds = self.0 / 1_000_000;
        // Counted from 0000-03-01, so that a leap day is the last of its year.
        let days = seconds / 86_400 + 719_468;
        let (era, day) = (days / DAYS_PER_400_YEARS, days % DAYS_PER_400_YEARS);
        let year = (day - day / 1_460 + day / 36_524 - day / 146_096) / 365;
        let day = day - (365 * year + year / 4 - year / 100);
        let month = (5 * day + 2) / 153;
        let of_month = day - (153 * month + 2) / 5 + 1;
        let month = if month < 10 { month + 3 } else { month - 9 };
        let year = era * 400 + year + u64::from(month <= 2);
        let (hour, minute) = (seconds / 3_600 % 24, seconds / 60 % 60);
        let second = seconds % 60;
        f.pad(&format!(
            "{year:04}-{month:02}-{of_month:02} {hour:02}:{minute:02}:{second:02} UTC"
        ))
    }
}

impl FromStr for Timestamp {
    type Err = String;

    /// Reads `2026-11-30T22:00:00Z` or `2026-11-30T22:00Z` (RFC 3339 in UTC), from 1970 to 9999.
    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("{text:?} is not a time like 2026-11-30T22:00:00Z");
        let parse = || {
            let (date, time) = text.strip_suffix('Z')?.split_once('T')?;
            let [year, month, day] = numbers(date, '-')?[..] else {
                return None;
            };
            let (hour, minute, second) = match numbers(time, ':')?[..] {
                [hour, minute] => (hour, minute, 0),
                [hour, minute, second] => (hour, minute, second),
                _ => return None,
            };
            if !(1970..=9999).contains(&year) || hour > 23 || minute > 59 || second > 59 {
                return None;
            }
            // The inverse of what is shown: counted from 0000-03-01, so that a leap day is the last of its year.
            let shifted = if month > 2 { month - 3 } else { month + 9 };
            let counted = year - u64::from(month <= 2);
            let days = counted * 365 + counted / 4 - counted / 100 + counted / 400;
            let days = days + (153 * shifted + 2) / 5 + day.checked_sub(1)? - 719_468;
            let seconds = days * 86_400 + hour * 3_600 + minute * 60 + second;
            let time = Self(seconds * 1_000_000);
            // A day that no month has is shown as another one.
            let same = time.to_string().starts_with(date);
            same.then_some(time)
        };
        parse().ok_or_else(wrong)
    }
}

/// Numbers of at most four plain digits.
fn numbers(text: &str, between: char) -> Option<Vec<u64>> {
    let number = |text: &str| {
        let plain = (1..=4).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_digit());
        plain.then(|| text.parse().ok()).flatten()
    };
    text.split(between).map(number).collect()
}

/// Two clocks: one that people read and one that only ever goes forward.
pub trait Clock: Send + Sync + fmt::Debug {
    /// Wall-clock time; may jump.
    fn wall(&self) -> Timestamp;

    /// Time since some fixed instant; never goes back.
    fn monotonic(&self) -> Duration;
}

/// The host's clocks.
#[derive(Debug)]
pub struct SystemClock {
    started: Instant,
}

impl Default for SystemClock {
    fn default() -> Self {
        Self {
            started: Instant::now(),
        }
    }
}

impl Clock for SystemClock {
    fn wall(&self) -> Timestamp {
        let since = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        Timestamp(u64::try_from(since.as_micros()).unwrap_or(u64::MAX))
    }

    fn monotonic(&self) -> Duration {
        self.started.elapsed()
    }
}

/// A clock that stands still until it is moved.
#[derive(Debug, Default)]
pub struct ManualClock(AtomicU64);

impl ManualClock {
    /// Moves both clocks forward.
    pub fn advance(&self, by: Duration) {
        let micros = u64::try_from(by.as_micros()).expect("a test does not wait 500,000 years");
        self.0.fetch_add(micros, Ordering::SeqCst);
    }
}

impl Clock for ManualClock {
    fn wall(&self) -> Timestamp {
        Timestamp(self.0.load(Ordering::SeqCst))
    }

    fn monotonic(&self) -> Duration {
        Duration::from_micros(self.0.load(Ordering::SeqCst))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Against `date -u -d @SECONDS`.
    #[test]
    fn times_read_as_people_write_them() {
        for (seconds, shown) in [
            (0, "1970-01-01 00:00:00 UTC"),
            (951_782_399, "2000-02-28 23:59:59 UTC"),
            (951_782_400, "2000-02-29 00:00:00 UTC"),
            (951_868_800, "2000-03-01 00:00:00 UTC"),
            (1_704_067_199, "2023-12-31 23:59:59 UTC"),
            (1_709_164_800, "2024-02-29 00:00:00 UTC"),
            (4_107_542_400, "2100-03-01 00:00:00 UTC"),
        ] {
            assert_eq!(Timestamp(seconds * 1_000_000 + 999_999).to_string(), shown);
            let written = shown.replacen(' ', "T", 1).replace(" UTC", "Z");
            assert_eq!(written.parse(), Ok(Timestamp(seconds * 1_000_000)));
        }
        assert!(!Timestamp(u64::MAX).to_string().is_empty());
        for wrong in [
            "2023-02-29T00:00Z",
            "2024-00-01T00:00Z",
            "2024-04-31T00:00Z",
            "1969-12-31T23:59:59Z",
            "2024-1-1T0:0",
            "T",
            "Z",
        ] {
            assert!(wrong.parse::<Timestamp>().is_err(), "{wrong}");
        }
    }
}
