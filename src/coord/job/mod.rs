//! A job: steps in stages, what became of each, and what is due now, as a pure function.
//!
//! ```text
//!   job     stage 1 ──> stage 2 ──> ... ──> stages that are always done
//!   stage   its steps begin together; the next stage begins when all of them have ended
//!
//!            Begin              Done
//!   Waiting ──────> UnderWay ──────────> Done
//!      |             |  ^  | ─────────> Failed
//!      |             +--+  +──────────> Undone          cancelled, and nothing of it is left
//!      |            Begin again, after a restart
//!      +──────────────────────────────> Skipped         an error stopped the job, or a person did
//! ```
//!
//! # Crash contract
//! Whoever drives this keeps each job in a journal. The state after [`Event::Begin`] is durable *before* the step does
//! anything; the state after the event that ends a step is made durable *after* the step did it. So a step that is
//! under way in the journal may have done all, some or nothing of its work, and is begun again after a restart; a step
//! that waits has done nothing; a step that has ended is not touched any more. Hence every [`Deed`] can be repeated: what
//! concerns machines [looks](deed) at what is true before it asks for anything, and a script is told that it is repeated.

pub mod course;
pub mod deed;

use std::{collections::BTreeSet, fmt, path::PathBuf, str::FromStr};

use serde::{Deserialize, Serialize};

pub use self::{
    course::{Course, Next},
    deed::{Deed, Kind, Phase, Script, Task, Verb},
};
use crate::base::{
    clock::Timestamp,
    ids::{Generation, Name},
};

/// Most of what a script prints that is kept, in bytes: the end of it.
pub const OUTPUT_BYTES_MAX: usize = 8 * 1024;

/// The number of a job on its coordinator, counted up and not used again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct JobId(pub u64);

impl fmt::Display for JobId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl FromStr for JobId {
    type Err = std::num::ParseIntError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        text.parse().map(Self)
    }
}

/// What is to be done, and how far it is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Job {
    /// Its number.
    pub id: JobId,
    /// The plan it carries out, if it is one.
    pub plan: Option<Name>,
    /// Which failover it is.
    pub kind: Kind,
    /// What is done, in this order.
    pub stages: Vec<Stage>,
    /// When it was asked for.
    pub begun: Timestamp,
    /// Whether somebody wants it to stop.
    pub cancel: bool,
    /// What became of it, once nothing is left to do.
    pub ended: Option<Ended>,
}

/// Steps that are done beside each other.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stage {
    /// What people call it.
    pub name: String,
    /// Whether it is done in any case, also after an error or a cancel: what cleans up.
    pub always: bool,
    /// Its steps.
    pub steps: Vec<Step>,
}

/// One thing to do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Step {
    /// What.
    pub deed: Deed,
    /// How often it was begun.
    pub attempts: u32,
    /// How far it is.
    pub state: StepState,
}

impl Step {
    /// A step that waits.
    pub fn new(deed: Deed) -> Self {
        Self {
            deed,
            attempts: 0,
            state: StepState::Waiting,
        }
    }
}

/// How far a step is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum StepState {
    /// Not begun.
    Waiting,
    /// Begun, and not known to have ended.
    UnderWay,
    /// Done.
    Done(Report),
    /// Tried in vain.
    Failed(Failure),
    /// Cancelled, and nothing of it is left.
    Undone(String),
    /// Never begun.
    Skipped,
}

impl StepState {
    /// Whether nothing happens to it any more.
    pub fn is_final(&self) -> bool {
        !matches!(self, Self::Waiting | Self::UnderWay)
    }
}

/// What a step led to.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// For people.
    pub text: String,
    /// The generation that the machine is in.
    #[serde(default)]
    pub generation: Option<Generation>,
    /// The host on which its disks are now.
    #[serde(default)]
    pub host: Option<Name>,
    /// Its disks there, as raw files.
    #[serde(default)]
    pub files: Vec<PathBuf>,
    /// The end of what a script printed, at most [`OUTPUT_BYTES_MAX`] bytes.
    #[serde(default)]
    pub output: String,
}

impl Report {
    /// Only words.
    pub fn of(text: impl Into<String>) -> Self {
        Self {
            text: text.into(),
            ..Self::default()
        }
    }
}

/// Why a step failed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// For people.
    pub why: String,
    /// Whether a host said no, rather than trying in vain.
    #[serde(default)]
    pub refused: bool,
    /// The end of what a script printed, at most [`OUTPUT_BYTES_MAX`] bytes.
    #[serde(default)]
    pub output: String,
}

impl Failure {
    /// Tried in vain.
    pub fn of(why: impl Into<String>) -> Self {
        Self {
            why: why.into(),
            refused: false,
            output: String::new(),
        }
    }

    /// A host said no.
    pub fn refused(why: impl Into<String>) -> Self {
        Self {
            refused: true,
            ..Self::of(why)
        }
    }
}

/// The end of a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ended {
    /// When.
    pub at: Timestamp,
    /// How.
    pub outcome: Outcome,
}

/// What became of a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// All of it was done.
    Done,
    /// Some of it failed.
    Failed,
    /// A person stopped it before it was done.
    Cancelled,
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Done => "done",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
        })
    }
}

/// A step of a job: the index of its stage, and its own in there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct At {
    /// Its stage.
    pub stage: usize,
    /// Its place there.
    pub step: usize,
}

/// What happens to a job.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// A step is about to be done, for the first time or again.
    Begin(At),
    /// A step was done.
    Done(At, Report),
    /// A step failed.
    Failed(At, Failure),
    /// A step was cancelled, and nothing of it is left.
    Undone(At, String),
    /// A person did what a manual action asks for.
    Continue,
    /// A person wants the job to stop.
    Cancel,
}

/// Why an event changes nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// It is over.
    #[error("job {0} has ended")]
    Ended(JobId),
    /// Nobody is waited for.
    #[error("job {0} does not wait for anybody: `understudy jobs {0}` shows what it does")]
    NotManual(JobId),
    /// The event is for a step that it cannot happen to: a fault of the driver.
    #[error("job {0} has no step for this")]
    NoSuchStep(JobId),
}

impl Job {
    /// A job that nothing was done for yet.
    pub fn new(
        id: JobId,
        plan: Option<Name>,
        kind: Kind,
        stages: Vec<Stage>,
        now: Timestamp,
    ) -> Self {
        let mut job = Self {
            id,
            plan,
            kind,
            stages,
            begun: now,
            cancel: false,
            ended: None,
        };
        job.settle(now);
        job
    }

    /// A step.
    pub fn step(&self, at: At) -> Option<&Step> {
        self.stages.get(at.stage)?.steps.get(at.step)
    }

    /// All steps in order.
    pub fn steps(&self) -> impl Iterator<Item = (At, &Step)> {
        let stages = self.stages.iter().enumerate();
        stages.flat_map(|(stage, steps)| {
            let steps = steps.steps.iter().enumerate();
            steps.map(move |(step, is)| (At { stage, step }, is))
        })
    }

    /// The machines it is about: nobody else may move them until it has ended.
    pub fn machines(&self) -> BTreeSet<&Name> {
        let machines = self.steps().filter_map(|(_, step)| match &step.deed {
            Deed::Machine(task) => Some(&task.machine),
            Deed::Nothing { machine } => Some(machine),
            Deed::Script(_) | Deed::Manual { .. } => None,
        });
        machines.collect()
    }

    /// The steps to begin now.
    pub fn due(&self) -> Vec<At> {
        let unfinished = |stage: &Stage| stage.steps.iter().any(|step| !step.state.is_final());
        let Some(stage) = self.stages.iter().position(unfinished) else {
            return Vec::new();
        };
        let of_it = self.steps().filter(|(at, _)| at.stage == stage);
        let waiting = of_it.filter(|(_, step)| step.state == StepState::Waiting);
        waiting.map(|(at, _)| at).collect()
    }

    /// The steps that were begun: to begin again after a restart.
    pub fn under_way(&self) -> Vec<At> {
        let begun = self.steps();
        let begun = begun.filter(|(_, step)| step.state == StepState::UnderWay);
        begun.map(|(at, _)| at).collect()
    }

    /// What is true after `event`.
    pub fn apply(&self, event: &Event, now: Timestamp) -> Result<Self, Refused> {
        if self.ended.is_some() {
            return Err(Refused::Ended(self.id));
        }
        let mut next = self.clone();
        match event {
            Event::Begin(at) => {
                let due = self.due().contains(at) || self.under_way().contains(at);
                let step = next.step_mut(*at).filter(|_| due);
                let step = step.ok_or(Refused::NoSuchStep(self.id))?;
                step.attempts = step.attempts.saturating_add(1);
                step.state = StepState::UnderWay;
            }
            Event::Done(at, report) => next.end(*at, StepState::Done(report.clone()))?,
            Event::Failed(at, failure) => next.end(*at, StepState::Failed(failure.clone()))?,
            Event::Undone(at, text) => next.end(*at, StepState::Undone(text.clone()))?,
            Event::Continue => {
                let waits = self.manual().next().ok_or(Refused::NotManual(self.id))?;
                next.end(waits, StepState::Done(Report::of("continued")))?;
            }
            Event::Cancel => {
                next.cancel = true;
                for at in self.manual() {
                    next.end(at, StepState::Undone("cancelled".into()))?;
                }
            }
        }
        next.settle(now);
        Ok(next)
    }

    /// Manual actions that wait for a person.
    pub fn manual(&self) -> impl Iterator<Item = At> {
        self.steps()
            .filter(|(_, step)| {
                matches!(step.deed, Deed::Manual { .. }) && step.state == StepState::UnderWay
            })
            .map(|(at, _)| at)
    }

    fn step_mut(&mut self, at: At) -> Option<&mut Step> {
        self.stages.get_mut(at.stage)?.steps.get_mut(at.step)
    }

    fn end(&mut self, at: At, state: StepState) -> Result<(), Refused> {
        let id = self.id;
        let step = self.step_mut(at);
        let step = step.filter(|step| step.state == StepState::UnderWay);
        step.ok_or(Refused::NoSuchStep(id))?.state = state;
        Ok(())
    }

    /// Skips what is not done any more, and ends when nothing is left.
    fn settle(&mut self, now: Timestamp) {
        let failed = |step: &Step| matches!(step.state, StepState::Failed(_));
        let fails = self.steps().any(|(_, step)| failed(step));
        if self.cancel || fails && self.kind.stops_on_error() {
            let stages = self.stages.iter_mut().filter(|stage| !stage.always);
            for step in stages.flat_map(|stage| &mut stage.steps) {
                if step.state == StepState::Waiting {
                    step.state = StepState::Skipped;
                }
            }
        }
        if self.steps().all(|(_, step)| step.state.is_final()) {
            let left =
                |step: &Step| matches!(step.state, StepState::Undone(_) | StepState::Skipped);
            let outcome = match () {
                () if fails => Outcome::Failed,
                () if self.steps().any(|(_, step)| left(step)) => Outcome::Cancelled,
                () => Outcome::Done,
            };
            self.ended = Some(Ended { at: now, outcome });
        }
    }
}

#[cfg(test)]
mod tests;
