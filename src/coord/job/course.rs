//! How a step about a machine goes: what follows from each look at the hosts, and from what the asked one said.

use std::time::Duration;

use super::{Failure, Task, Verb, deed::Look};

/// How long a host that was not asked for anything yet, or that somebody no longer wants to wait for, may be silent. One
/// that may be in the middle of handing a machine over is waited for until a person cancels the job: to give up would leave
/// the machine where nobody knows.
pub const SILENT_MAX: Duration = Duration::from_mins(1);

/// What to do next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Next {
    /// The step is done.
    Done(String),
    /// It was cancelled, and nothing of it is left.
    Undone(String),
    /// It failed.
    Failed(Failure),
    /// The host is asked to do it; then [`Course::hears`].
    Ask,
    /// The host is asked to take it back; then it is looked again.
    TakeBack,
    /// It is looked again; what is waited for, for people.
    Wait(String),
}

/// How far a step has come since it was begun, by one coordinator that lives.
#[derive(Clone, Debug)]
pub struct Course {
    /// Whether the host was asked, or may have been.
    asked: bool,
    /// Whether it was in the middle of it when it was asked last.
    begun: bool,
    /// What it answered then, if it was no success.
    answered: Option<Failure>,
    /// Since when nothing moves.
    stuck: Option<Duration>,
}

impl Course {
    /// The course of a step that was begun so many times: one that is begun again may have asked before the coordinator
    /// died.
    pub fn new(attempts: u32) -> Self {
        Self {
            asked: attempts > 1,
            begun: false,
            answered: None,
            stuck: None,
        }
    }

    /// What follows from a look. `cancelled`: somebody wants it to stop. `now`: of a clock that never goes back.
    pub fn follow(&mut self, task: &Task, look: Look, cancelled: bool, now: Duration) -> Next {
        match look {
            Look::Done(text) => match self.answered.take() {
                // The host is what it should be, and could not serve its disks. A hand-over that was said to have failed
                // may have been finished since by the hosts themselves.
                Some(failure) if task.verb != Verb::Planned && !failure.refused => {
                    Next::Failed(failure)
                }
                _ => Next::Done(text),
            },
            Look::Undone(text) => Next::Undone(text),
            Look::Refused(why) => {
                let answered = self.answered.take();
                Next::Failed(answered.unwrap_or_else(|| Failure::refused(why)))
            }
            Look::Silent(why) => {
                let note = format!("{} cannot be asked: {why}", task.host);
                let waits = task.verb == Verb::Planned && self.asked && !cancelled;
                if self.is_stuck(now) && !waits {
                    let seconds = SILENT_MAX.as_secs();
                    return Next::Failed(Failure::of(format!("{note}; for {seconds} s")));
                }
                Next::Wait(note)
            }
            Look::TakeBack if self.is_stuck(now) => Next::Failed(Failure::of(format!(
                "{} has asked for the machine, and is its primary again as soon as the other host consents",
                task.host
            ))),
            Look::TakeBack => Next::TakeBack,
            Look::Ask { begun } => {
                // An answer stands, unless the host was in the middle of it and goes on.
                if let Some(failure) = self.answered.take()
                    && (!begun || failure.refused)
                {
                    return Next::Failed(failure);
                }
                (self.asked, self.begun, self.stuck) = (true, begun, None);
                Next::Ask
            }
        }
    }

    /// What the host said that was asked and did not do it; nothing if it was not heard.
    pub fn hears(&mut self, answer: Option<Failure>) {
        self.answered = answer;
    }

    /// Whether the next look is due at once: what the host says of itself now tells whether its answer was all.
    pub fn is_urgent(&self) -> bool {
        self.answered.is_some() && !self.begun
    }

    /// Somebody's wish changed: what is waited for is waited for anew.
    pub fn restart_clock(&mut self) {
        self.stuck = None;
    }

    /// Whether nothing has moved for too long.
    fn is_stuck(&mut self, now: Duration) -> bool {
        let since = *self.stuck.get_or_insert(now);
        now.saturating_sub(since) >= SILENT_MAX
    }
}
