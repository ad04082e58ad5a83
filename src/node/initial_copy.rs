//! When the initial copy of a machine begins: at once, at a time, or not at all, because a portable disk brings it.
//!
//! Until then the machine is linked, its guest writes, and its changes are tracked as always. Only the copy for a replica
//! that has nothing waits; changes and resyncs never do. Times are UTC, for the reasons of [`policy`](super::policy).
//!
//! # Why the time is remembered
//! `22:00` is the next one after the host was told so. A host that was down at ten, or had no link, copies as soon as
//! it can, and not a day later: what was read from the setting is durable, until the setting is another one.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

use super::policy::TimeOfDay;
use crate::base::clock::Timestamp;

/// When the initial copy begins.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum InitialCopy {
    /// With the first connection.
    #[default]
    Now,
    /// The next time it is this late.
    Daily(TimeOfDay),
    /// At this time.
    At(Timestamp),
    /// Not by itself: it is brought on a portable disk.
    Portable,
}

impl InitialCopy {
    /// When a copy begins by itself that is asked for at `now`; nothing if it does not.
    pub fn due(self, now: Timestamp) -> Option<Timestamp> {
        match self {
            // However the clock is set later.
            Self::Now => Some(Timestamp::default()),
            Self::Daily(time) => Some(time.next_after(now)),
            Self::At(time) => Some(time),
            Self::Portable => None,
        }
    }
}

/// Whether a copy that is due then has to wait at `now`.
pub fn waits(due: Option<Timestamp>, now: Timestamp) -> bool {
    due.is_none_or(|due| now < due)
}

impl fmt::Display for InitialCopy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Now => f.pad("now"),
            Self::Daily(time) => time.fmt(f),
            Self::At(time) => f.pad(&time.to_string().replacen(' ', "T", 1).replace(" UTC", "Z")),
            Self::Portable => f.pad("portable"),
        }
    }
}

impl FromStr for InitialCopy {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "now" => return Ok(Self::Now),
            "portable" => return Ok(Self::Portable),
            _ => {}
        }
        let daily = text.parse().map(Self::Daily);
        let at = || text.parse().map(Self::At);
        daily.or_else(|_| at()).map_err(|_| {
            format!("{text:?} is neither now, nor portable, nor a time in UTC: 22:00 for the next time it is that late, or 2026-11-30T22:00:00Z")
        })
    }
}

impl TryFrom<String> for InitialCopy {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<InitialCopy> for String {
    fn from(copy: InitialCopy) -> Self {
        copy.to_string()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::base::clock::{Clock, ManualClock};

    const HOUR: Duration = Duration::from_hours(1);

    fn parsed(text: &str) -> InitialCopy {
        text.parse().unwrap()
    }

    /// A clock that stands at 2026-11-23 `hour`:00 UTC.
    fn clock(hour: u32) -> ManualClock {
        let clock = ManualClock::default();
        clock.advance(Duration::from_hours(20_780 * 24) + HOUR * hour);
        clock
    }

    /// How long a copy waits that is asked for now.
    fn waited(setting: &str, clock: &ManualClock) -> Option<Duration> {
        let due = parsed(setting).due(clock.wall())?;
        let began = clock.monotonic();
        while waits(Some(due), clock.wall()) {
            clock.advance(Duration::from_mins(1));
        }
        Some(clock.monotonic().saturating_sub(began))
    }

    #[test]
    fn a_copy_begins_at_once_or_the_next_time_it_is_that_late() {
        for (setting, hour, wait) in [
            ("now", 9, Duration::ZERO),
            ("22:00", 9, HOUR * 13),
            ("22:00", 21, HOUR),
            ("22:00", 22, HOUR * 24),
            ("22:00", 23, HOUR * 23),
            ("00:00", 0, HOUR * 24),
            ("24:00", 23, HOUR),
            ("2026-11-23T11:00:00Z", 9, HOUR * 2),
            ("2026-11-24T08:30Z", 9, HOUR * 23 + HOUR / 2),
            ("2026-11-22T11:00:00Z", 9, Duration::ZERO),
        ] {
            assert_eq!(
                waited(setting, &clock(hour)),
                Some(wait),
                "{setting} at {hour}"
            );
        }
    }

    #[test]
    fn what_is_due_stays_due_and_a_portable_copy_never_is() {
        let clock = clock(21);
        let due = parsed("22:00").due(clock.wall());
        clock.advance(HOUR * 30);
        assert!(!waits(due, clock.wall()), "a link that came late is used");
        let portable = parsed("portable").due(clock.wall());
        clock.advance(HOUR * 10_000);
        assert!(waits(portable, clock.wall()));
        assert!(!waits(parsed("now").due(clock.wall()), Timestamp(0)));
    }

    #[test]
    fn what_is_written_is_read_again() {
        for text in ["now", "portable", "22:00", "2026-11-30T22:00:00Z"] {
            let copy = parsed(text);
            assert_eq!(copy.to_string(), text);
            let json = serde_json::to_string(&copy).unwrap();
            assert_eq!(json, format!("{text:?}"));
            assert_eq!(serde_json::from_str::<InitialCopy>(&json).unwrap(), copy);
        }
        for text in [
            "",
            "later",
            "22",
            "25:00",
            "2026-11-30",
            "2026-11-30T22:00:00",
            "2026-11-30T22:00:00+01:00",
            "2026-02-29T22:00:00Z",
            "2026-13-01T22:00:00Z",
            "2026-11-30T24:00:00Z",
            "9999999-11-30T22:00:00Z",
            "+026-11-30T22:00:00Z",
        ] {
            assert!(text.parse::<InitialCopy>().is_err(), "{text}");
        }
    }
}
