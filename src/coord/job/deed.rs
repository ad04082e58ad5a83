//! What a step does, and what is left to do of it when the hosts say where they are.
//!
//! A step may be begun again at any moment of what it does, by a coordinator that remembers nothing but its journal. So it
//! does not remember what it asked for: it looks at the hosts, and [`Task::look`] says what follows. The generation that the
//! machine had when the job was made tells what happened since from what was so before.

use std::{fmt, time::Duration};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::{
    base::{
        ids::{Generation, Name},
        units::Epoch,
    },
    coord::{
        role::Part,
        view::{Seen, Sight, View},
    },
};

/// Which failover it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// With the primaries: nothing is lost.
    Planned,
    /// Without them.
    Unplanned,
    /// Beside the replication, cleaned up in the end.
    Test,
    /// Unplanned failovers are kept.
    Commit,
    /// Failovers that are not final are taken back.
    Cancel,
    /// Hosts that were the primary follow the new one.
    Reverse,
}

impl Kind {
    /// Whether the first error is the end of it. Otherwise what can be done is done, and the errors are reported.
    pub fn stops_on_error(self) -> bool {
        matches!(self, Self::Planned | Self::Test)
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Planned => "planned",
            Self::Unplanned => "unplanned",
            Self::Test => "test",
            Self::Commit => "commit",
            Self::Cancel => "cancel",
            Self::Reverse => "reverse",
        })
    }
}

/// What a step does.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Deed {
    /// Changes what a machine is on its hosts.
    Machine(Task),
    /// Runs a program on the coordinator.
    Script(Script),
    /// Nothing is done with a machine: it is where it should be, or no host is known that could do it.
    Nothing {
        /// The machine.
        machine: Name,
    },
    /// Waits for a person.
    Manual {
        /// What he is asked to do.
        text: String,
    },
}

/// A verb for a machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Task {
    /// The machine.
    pub machine: Name,
    /// What to do.
    pub verb: Verb,
    /// The host that has to do it.
    pub host: Name,
    /// The generation that host had when the job was made.
    pub generation: Generation,
}

/// What is done with a machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verb {
    /// The primary hands over.
    Planned,
    /// The replica is promoted.
    Unplanned {
        /// The epoch to go to; the latest point if there is none.
        point: Option<Epoch>,
        /// Also while the primary is connected.
        force: bool,
    },
    /// The failover is kept.
    Commit,
    /// What is not final is taken back.
    Cancel,
    /// The former primary follows.
    Reverse {
        /// Also if a disk is still in use there.
        force: bool,
    },
    /// A test failover is started.
    Test {
        /// By which it is known again.
        key: Uuid,
    },
    /// That test failover is ended.
    EndTest {
        /// By which it is known.
        key: Uuid,
    },
}

/// A program to run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Script {
    /// Its absolute path, and its arguments.
    pub run: Vec<String>,
    /// How long it may take.
    pub within: Duration,
    /// The group of the plan it belongs to.
    pub group: String,
    /// Whether it runs before or after the machines of that group.
    pub phase: Phase,
    /// The machines of that group.
    pub machines: Vec<Name>,
}

/// When an action is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// Before the machines of its group.
    Pre,
    /// After them.
    Post,
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Pre => "pre",
            Self::Post => "post",
        })
    }
}

/// What follows from a look at the hosts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Look {
    /// It is so already.
    Done(String),
    /// The host has to be asked.
    Ask {
        /// Whether it is in the middle of it: then an answer that it did not succeed is not the end.
        begun: bool,
    },
    /// The host has to be asked to take it back.
    TakeBack,
    /// Nothing of it was done, or nothing is left of it.
    Undone(String),
    /// The host cannot be reached: it is looked again.
    Silent(String),
    /// It cannot be done any more.
    Refused(String),
}

impl Deed {
    /// The host that has to do it, if one has.
    pub fn host(&self) -> Option<&Name> {
        match self {
            Self::Machine(task) => Some(&task.host),
            Self::Script(_) | Self::Nothing { .. } | Self::Manual { .. } => None,
        }
    }
}

impl fmt::Display for Deed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Machine(task) => task.fmt(f),
            Self::Script(script) => script.run.join(" ").fmt(f),
            Self::Manual { text } => text.fmt(f),
            Self::Nothing { machine } => machine.fmt(f),
        }
    }
}

impl fmt::Display for Task {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { machine, host, .. } = self;
        match self.verb {
            Verb::Planned => write!(f, "failover {machine} --planned, from {host}"),
            Verb::Unplanned { .. } => write!(f, "failover {machine} --unplanned, to {host}"),
            Verb::Commit => write!(f, "commit {machine} on {host}"),
            Verb::Cancel => write!(f, "cancel {machine} on {host}"),
            Verb::Reverse { .. } => write!(f, "reverse {machine} on {host}"),
            Verb::Test { .. } => write!(f, "failover {machine} --test, on {host}"),
            Verb::EndTest { .. } => write!(f, "end the test of {machine} on {host}"),
        }
    }
}

impl Task {
    /// What is left to do. `cancel`: somebody wants it to stop.
    pub fn look(&self, view: &View, cancel: bool) -> Look {
        let host = &self.host;
        let sight = match view.get(host) {
            Some(Seen::Present(sight)) => sight,
            Some(Seen::Absent) | None => {
                return match self.verb {
                    Verb::EndTest { .. } => Look::Done("there is no test".into()),
                    _ => Look::Refused(format!(
                        "{host} has no machine called {} any more",
                        self.machine
                    )),
                };
            }
            Some(Seen::Silent(why)) => {
                return match self.moved(view) {
                    Some(by) => Look::Done(by),
                    None => Look::Silent(why.clone()),
                };
            }
        };
        match self.verb {
            Verb::Planned => self.look_planned(sight, view, cancel),
            Verb::Unplanned { .. } => self.look_unplanned(sight, cancel),
            Verb::Commit => match sight.part {
                Part::Primary => Look::Done(format!("{host} is the primary")),
                Part::FailedOver { .. } => ask_unless(cancel),
                _ => self.changed(sight),
            },
            Verb::Cancel => match sight.part {
                Part::FailedOver { .. } | Part::SteppedDown { .. } => ask_unless(cancel),
                Part::Primary | Part::Replica { .. } => Look::Done("taken back".into()),
                _ => self.changed(sight),
            },
            Verb::Reverse { .. } => match sight.part {
                Part::Fenced { .. } => ask_unless(cancel),
                Part::Returning { .. } | Part::Replica { .. } => {
                    Look::Done(format!("{host} follows"))
                }
                _ => self.changed(sight),
            },
            Verb::Test { key } => match sight.part {
                _ if sight.test(key).is_some() => Look::Done("the test runs".into()),
                Part::Replica { .. } | Part::FailedOver { .. } => ask_unless(cancel),
                _ => self.changed(sight),
            },
            // What cleans up is not cancelled.
            Verb::EndTest { key } => match sight.test(key) {
                Some(_) => Look::Ask { begun: true },
                None => Look::Done("the test has ended".into()),
            },
        }
    }

    fn look_planned(&self, sight: &Sight, view: &View, cancel: bool) -> Look {
        if let Some(by) = self.moved(view) {
            return Look::Done(by);
        }
        let later = sight.generation.number > self.generation.number;
        match sight.part {
            Part::Primary if later => Look::Undone(format!("taken back by {}", self.host)),
            Part::Primary => ask_unless(cancel),
            Part::SteppedDown { .. } if cancel => Look::TakeBack,
            Part::SteppedDown { .. } => Look::Ask { begun: true },
            // It was handed over, and whoever has it is not seen.
            Part::Replica { .. } if later => Look::Done(format!("{} follows", self.host)),
            _ => self.changed(sight),
        }
    }

    fn look_unplanned(&self, sight: &Sight, cancel: bool) -> Look {
        let later = sight.generation.number > self.generation.number;
        match sight.part {
            Part::FailedOver { point, .. } if later => {
                Look::Done(format!("failed over to epoch {}", point.epoch))
            }
            Part::Primary if later => Look::Done(format!("{} is the primary", self.host)),
            Part::Replica { .. } if !later => ask_unless(cancel),
            _ => self.changed(sight),
        }
    }

    /// Who became the primary since, if this was about handing the machine over.
    fn moved(&self, view: &View) -> Option<String> {
        if self.verb != Verb::Planned {
            return None;
        }
        let mut others = view.iter().filter(|(host, _)| **host != self.host);
        others.find_map(|(host, seen)| match seen {
            Seen::Present(sight)
                if sight.part == Part::Primary
                    && sight.generation.number > self.generation.number =>
            {
                Some(format!(
                    "{host} is the primary, in generation {}",
                    sight.generation
                ))
            }
            _ => None,
        })
    }

    fn changed(&self, sight: &Sight) -> Look {
        Look::Refused(format!(
            "{} is {} by now, in generation {}: look at the status",
            self.host,
            sight.part.describe(),
            sight.generation
        ))
    }
}

fn ask_unless(cancel: bool) -> Look {
    if cancel {
        Look::Undone("nothing was done".into())
    } else {
        Look::Ask { begun: false }
    }
}
