//! What befalls the stage in a lap, drawn from a seed.

use std::{fmt, time::Duration};

use understudy::testing::Random;

use super::{
    network::Weather,
    stage::{COORD, NODES},
};

/// Something that goes wrong, and is mended before the lap ends.
#[derive(Clone, Copy, Debug)]
pub(super) enum Fault {
    /// Processes are killed at once, and started again after a while.
    Kill(&'static [usize], Duration),
    /// A process stands still for a while.
    Pause(usize, Duration),
    /// The links are like this for a while.
    Links(&'static str, Weather, Duration),
    /// The store (0) or the images (1) of a host find no space for a while.
    Full(usize, usize, Duration),
    /// A wall clock jumps to so many seconds after the true time.
    Clock(usize, i64),
}

/// Which processes are killed together.
const KILLED: [&[usize]; 5] = [&[0], &[1], &[COORD], &[0, 1], &[0, 1, COORD]];
/// Seconds by which clocks are wrong: all of them are within the validity of certificates that were issued an hour ago.
const SKEWS: [i64; 6] = [-3_000, 0, 0, 3_700, 90_000, 30 * 86_400];

impl Fault {
    pub(super) fn draw(random: &mut Random) -> Self {
        let mut millis = |from, to| Duration::from_millis(random.between(from, to));
        let (short, long) = (millis(0, 250), millis(300, 1_200));
        let host = random.index(2);
        match random.below(10) {
            0..=2 => Self::Kill(random.pick(&KILLED), short),
            3 => Self::Pause(random.index(3), long),
            4..=6 => {
                let (name, weather) = weather(random);
                Self::Links(name, weather, long)
            }
            7 | 8 => Self::Full(host, random.index(2), long),
            _ => Self::Clock(host, random.pick(&SKEWS)),
        }
    }

    /// Whether nothing gets from host to host until it is mended.
    pub(super) fn cuts_links(&self) -> bool {
        matches!(self, Self::Links(_, weather, _) if weather.cut)
    }

    /// Under which name it is counted.
    pub(super) fn name(&self) -> &'static str {
        match self {
            Self::Kill(nodes, _) => match nodes {
                [COORD] => "coordinator killed",
                [_] => "host killed",
                _ => "several killed at once",
            },
            Self::Pause(..) => "process stood still",
            Self::Links(name, ..) => name,
            Self::Full(_, 0, _) => "store full",
            Self::Full(..) => "images full",
            Self::Clock(..) => "clock jumped",
        }
    }
}

/// One way in which links are bad, or all at once.
fn weather(random: &mut Random) -> (&'static str, Weather) {
    let cut = Weather {
        cut: true,
        ..Weather::default()
    };
    let loss = Weather {
        loss: 20,
        ..Weather::default()
    };
    let delay = Weather {
        delay: Duration::from_millis(200),
        ..Weather::default()
    };
    let reorder = Weather {
        jitter: Duration::from_millis(40),
        ..Weather::default()
    };
    let repeat = Weather {
        repeat: 30,
        ..Weather::default()
    };
    let slow = Weather {
        rate: Some(1 << 20),
        ..Weather::default()
    };
    let storm = Weather {
        loss: 5,
        repeat: 10,
        delay: Duration::from_millis(50),
        jitter: Duration::from_millis(50),
        rate: Some(4 << 20),
        cut: false,
    };
    random.pick(&[
        ("links cut", cut),
        ("20 % of packets lost", loss),
        ("200 ms of delay", delay),
        ("packets reordered", reorder),
        ("packets repeated", repeat),
        ("slow links", slow),
        ("all of that on the links", storm),
    ])
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = |node: &usize| NODES[*node];
        match self {
            Self::Kill(nodes, back) => {
                let names: Vec<_> = nodes.iter().map(name).collect();
                write!(f, "{} killed for {} ms", names.join(", "), back.as_millis())
            }
            Self::Pause(node, time) => {
                write!(f, "{} stands still for {} ms", name(node), time.as_millis())
            }
            Self::Links(what, _, time) => write!(f, "{what} for {} ms", time.as_millis()),
            Self::Full(host, what, time) => {
                let what = ["store", "images"][*what];
                write!(
                    f,
                    "{what} of {} full for {} ms",
                    name(host),
                    time.as_millis()
                )
            }
            Self::Clock(node, seconds) => write!(f, "clock of {} {seconds} s ahead", name(node)),
        }
    }
}

/// What an operator does in a lap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Errand {
    /// Nothing.
    Watch,
    /// A test failover of a machine while its guest writes.
    Test(usize),
    /// A planned failover of a machine by the coordinator, and a node that is killed so many milliseconds later.
    Planned(usize, Option<(usize, u64)>),
    /// A host is lost: its machines are failed over; the failovers are kept or taken back when it returns.
    Lost(usize, Keep),
}

/// What becomes of an unplanned failover.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Keep {
    /// It is committed.
    Committed,
    /// It is cancelled, and the primary that returns goes on.
    Cancelled,
}

impl Errand {
    pub(super) fn draw(random: &mut Random, machines: usize) -> Self {
        let machine = random.index(machines);
        match random.below(10) {
            0..=2 => Self::Watch,
            3 | 4 => Self::Test(machine),
            5..=7 => {
                let killed = random
                    .percent(60)
                    .then(|| (random.index(3), random.below(400)));
                Self::Planned(machine, killed)
            }
            _ => {
                let keep = if random.percent(70) {
                    Keep::Committed
                } else {
                    Keep::Cancelled
                };
                Self::Lost(random.index(2), keep)
            }
        }
    }

    /// Under which name it is counted.
    pub(super) fn name(&self) -> &'static str {
        match self {
            Self::Watch => "no errand",
            Self::Test(_) => "test failover under load",
            Self::Planned(_, None) => "planned failover",
            Self::Planned(_, Some(_)) => "planned failover with a kill in it",
            Self::Lost(_, Keep::Committed) => "unplanned failover, commit, reverse",
            Self::Lost(_, Keep::Cancelled) => "unplanned failover, cancel",
        }
    }
}
