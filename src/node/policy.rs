//! What an operator may say about when and how fast a machine is replicated.
//!
//! # Why UTC
//! Times of day are UTC, and shown as such. In local time a window would be an hour longer on one night of the year, missing
//! on another, and mean two different things on two hosts. In UTC every window is there once a day and as long as it says.

use std::{fmt, str::FromStr, time::Duration};

use crate::base::{
    clock::Timestamp,
    rate::{RATE_MAX, RATE_MIN},
    units::{Bytes, parse_size},
};

const MINUTES_PER_DAY: u32 = 24 * 60;
const MICROS_PER_MINUTE: u64 = 60_000_000;
const DAY_NAMES: [&str; 7] = ["mon", "tue", "wed", "thu", "fri", "sat", "sun"];
/// 1970-01-01 was a Thursday.
const FIRST_DAY: u64 = 3;

/// A time of day in UTC, to the minute: `08:00`. `24:00` is the end of the day.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct TimeOfDay(u32);

impl TimeOfDay {
    fn of(time: Timestamp) -> Self {
        let minutes = time.0 / MICROS_PER_MINUTE % u64::from(MINUTES_PER_DAY);
        Self(u32::try_from(minutes).expect("a day has 1,440 minutes"))
    }
}

impl TimeOfDay {
    /// The first time after `now` at which it is this late.
    pub fn next_after(self, now: Timestamp) -> Timestamp {
        let day = u64::from(MINUTES_PER_DAY) * MICROS_PER_MINUTE;
        let today = now.0 / day * day;
        let at = today.saturating_add(u64::from(self.0) * MICROS_PER_MINUTE);
        Timestamp(if at > now.0 {
            at
        } else {
            at.saturating_add(day)
        })
    }
}

impl fmt::Display for TimeOfDay {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:02}:{:02}", self.0 / 60, self.0 % 60)
    }
}

impl FromStr for TimeOfDay {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("{text:?} is not a time of day (UTC) from 00:00 to 24:00");
        let digits = |text: &str| {
            let plain = text.len() == 2 && text.bytes().all(|byte| byte.is_ascii_digit());
            plain.then(|| text.parse::<u32>().ok()).flatten()
        };
        let (hours, minutes) = text.split_once(':').ok_or_else(wrong)?;
        match (digits(hours), digits(minutes)) {
            (Some(hours), Some(minutes))
                if minutes < 60 && hours * 60 + minutes <= MINUTES_PER_DAY =>
            {
                Ok(Self(hours * 60 + minutes))
            }
            _ => Err(wrong()),
        }
    }
}

/// Days of the week: `mon-fri`, `sat,sun`, `fri-mon`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Days([bool; 7]);

impl Days {
    /// Every day.
    pub const ALL: Self = Self([true; 7]);
}

impl fmt::Display for Days {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if *self == Self::ALL {
            return f.write_str("every day");
        }
        let named = self.0.iter().zip(DAY_NAMES).filter(|(on, _)| **on);
        let named: Vec<_> = named.map(|(_, name)| name).collect();
        f.write_str(&named.join(","))
    }
}

impl FromStr for Days {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let day = |name: &str| {
            let found = DAY_NAMES.iter().position(|known| *known == name.trim());
            found.ok_or_else(|| format!("{name:?} is not a day: use mon, tue, wed, thu, fri, sat, sun, as mon-fri or sat,sun"))
        };
        let mut days = [false; 7];
        for part in text.split(',') {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            let (mut at, last) = (day(first)?, day(last)?);
            days[at] = true;
            while at != last {
                at = (at + 1) % days.len();
                days[at] = true;
            }
        }
        Ok(Self(days))
    }
}

/// Bytes per second that may be sent: `50M`, or `none` for as many as the link takes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limit(pub Option<u64>);

impl fmt::Display for Limit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(rate) => write!(f, "{}/s", Bytes(rate)),
            None => f.write_str("no limit"),
        }
    }
}

impl FromStr for Limit {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "none" {
            return Ok(Self(None));
        }
        let rate = parse_size(text).map_err(|_| {
            format!("{text:?} is not a bandwidth: use bytes per second with K, M or G (powers of 1024), or none")
        })?;
        if (RATE_MIN..=RATE_MAX).contains(&rate) {
            return Ok(Self(Some(rate)));
        }
        Err(format!(
            "{text} is not between {} and {}",
            Self(Some(RATE_MIN)),
            Self(Some(RATE_MAX))
        ))
    }
}

/// Another limit for a part of the day.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    from: TimeOfDay,
    to: TimeOfDay,
    days: Days,
    limit: Limit,
}

impl Window {
    /// From one time to another, on the days on which it begins; past midnight if `to` is not after `from`.
    pub fn new(from: TimeOfDay, to: TimeOfDay, days: Days, limit: Limit) -> Result<Self, String> {
        if from.0 == MINUTES_PER_DAY || from == to {
            return Err(format!(
                "no time passes from {from} to {to}: use 00:00 and 24:00 for whole days"
            ));
        }
        Ok(Self {
            from,
            to,
            days,
            limit,
        })
    }

    fn holds(&self, time: Timestamp) -> bool {
        let now = TimeOfDay::of(time);
        let days = time.0 / MICROS_PER_MINUTE / u64::from(MINUTES_PER_DAY) + FIRST_DAY;
        let begins = |day: u64| {
            let day = usize::try_from(day % 7).expect("a week has seven days");
            self.days.0[day]
        };
        if self.from < self.to {
            return begins(days) && self.from <= now && now < self.to;
        }
        (begins(days) && self.from <= now) || (begins(days + 6) && now < self.to)
    }
}

impl fmt::Display for Window {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            from,
            to,
            days,
            limit,
        } = self;
        write!(f, "{limit} from {from} to {to} UTC, {days}")
    }
}

/// How many bytes may be sent, and when.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Bandwidth {
    /// Outside of all windows.
    pub limit: Limit,
    /// Of those that hold at a time, the first one counts.
    pub windows: Vec<Window>,
}

impl Bandwidth {
    /// The limit at a time, in bytes per second.
    pub fn at(&self, time: Timestamp) -> Option<u64> {
        let window = self.windows.iter().find(|window| window.holds(time));
        window.map_or(self.limit, |window| window.limit).0
    }

    /// Whether nothing is ever limited.
    pub fn is_unlimited(&self) -> bool {
        self.limit.0.is_none() && self.windows.iter().all(|window| window.limit.0.is_none())
    }
}

impl From<Limit> for Bandwidth {
    fn from(limit: Limit) -> Self {
        Self {
            limit,
            windows: Vec::new(),
        }
    }
}

impl fmt::Display for Bandwidth {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.limit.fmt(f)?;
        self.windows
            .iter()
            .try_for_each(|window| write!(f, "; {window}"))
    }
}

/// A span of time as a configuration has it: `500ms`, `1s`, `15m`.
pub fn interval_text(interval: Duration) -> String {
    let millis = interval.as_millis();
    match (millis % 60_000, millis % 1_000) {
        (0, _) => format!("{}m", millis / 60_000),
        (_, 0) => format!("{}s", millis / 1_000),
        _ => format!("{millis}ms"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A time in the week of 2026-11-23, a Monday.
    fn time(day: u64, time: &str) -> Timestamp {
        let parts: Vec<u64> = time.split(':').map(|part| part.parse().unwrap()).collect();
        let seconds = (20_780 + day) * 86_400 + parts[0] * 3_600 + parts[1] * 60 + parts[2];
        Timestamp(seconds * 1_000_000)
    }

    fn window(from: &str, to: &str, days: &str, limit: &str) -> Window {
        let days = days.parse().unwrap();
        Window::new(
            from.parse().unwrap(),
            to.parse().unwrap(),
            days,
            limit.parse().unwrap(),
        )
        .unwrap()
    }

    #[test]
    fn a_window_is_there_once_a_day_on_its_days() {
        let office = window("08:00", "18:00", "mon-fri", "10M");
        for ((day, at), holds) in [
            ((0, "07:59:59"), false),
            ((0, "08:00:00"), true),
            ((0, "17:59:59"), true),
            ((0, "18:00:00"), false),
            ((4, "12:00:00"), true),
            ((5, "12:00:00"), false),
            ((6, "12:00:00"), false),
        ] {
            assert_eq!(office.holds(time(day, at)), holds, "{day} {at}");
        }
        let night = window("22:00", "06:00", "fri", "none");
        for ((day, at), holds) in [
            ((4, "21:59:59"), false),
            ((4, "22:00:00"), true),
            ((5, "05:59:59"), true),
            ((5, "06:00:00"), false),
            ((5, "22:00:00"), false),
            ((4, "05:00:00"), false),
        ] {
            assert_eq!(night.holds(time(day, at)), holds, "{day} {at}");
        }
        let always = window("00:00", "24:00", "sun", "1G");
        assert!(always.holds(time(6, "00:00:00")));
        assert!(always.holds(time(6, "23:59:59")));
        assert!(!always.holds(time(7, "00:00:00")));
    }

    #[test]
    fn the_first_window_that_holds_counts() {
        let bandwidth = Bandwidth {
            limit: "50M".parse().unwrap(),
            windows: vec![
                window("12:00", "13:00", "mon-sun", "none"),
                window("08:00", "18:00", "mon-fri", "10M"),
            ],
        };
        assert_eq!(bandwidth.at(time(0, "09:00:00")), Some(10 << 20));
        assert_eq!(bandwidth.at(time(0, "12:30:00")), None);
        assert_eq!(bandwidth.at(time(5, "09:00:00")), Some(50 << 20));
        assert!(!bandwidth.is_unlimited());
        assert!(Bandwidth::default().is_unlimited());
        assert_eq!(
            bandwidth.to_string(),
            "50.0 MiB/s; no limit from 12:00 to 13:00 UTC, every day; \
             10.0 MiB/s from 08:00 to 18:00 UTC, mon,tue,wed,thu,fri"
        );
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        for text in ["8:00", "08:60", "24:01", "0800", "+1:00", "08:00Z", ""] {
            assert!(text.parse::<TimeOfDay>().is_err(), "{text}");
        }
        for text in ["", "mo", "mon-", "mon;tue", "1-5"] {
            assert!(text.parse::<Days>().is_err(), "{text}");
        }
        assert_eq!("fri-mon".parse::<Days>(), "sat,sun,fri,mon".parse());
        for text in ["", "0", "63K", "10MB/s", "2T", "fast", "-1M"] {
            assert!(text.parse::<Limit>().is_err(), "{text}");
        }
        let parse = |text: &str| text.parse().unwrap();
        for (from, to) in [("08:00", "08:00"), ("24:00", "06:00")] {
            let refused = Window::new(parse(from), parse(to), Days::ALL, Limit(None));
            assert!(refused.is_err(), "{from} {to}");
        }
    }
}
