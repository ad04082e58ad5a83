//! A coordinator moves the machine, dies, and goes on; every job ends, and in what it says.

use std::time::Duration;

use super::{Checked, World};
use crate::{
    base::{clock::Clock, ids::Name},
    coord::{
        job::{Event, Failure, Kind, Next, Report, Task, Verb},
        role::Part,
        view::{self, Place, Seen, View},
    },
    testing::{
        Bug,
        coordinator::{Coordinator, ONLY, host_name, seen},
        host::{Unmount, machine_name},
        record::No,
    },
};

/// Events that are the coordinator's, in a hundred, where there is one.
const SHARE: u64 = 12;
/// Answers that it does not hear, and hosts that it cannot ask at a look, in a hundred.
const LOSS: u64 = 10;
const KINDS: [Kind; 6] = [
    Kind::Planned,
    Kind::Planned,
    Kind::Unplanned,
    Kind::Commit,
    Kind::Cancel,
    Kind::Reverse,
];

/// What became of what a host was asked for.
type Answered = Result<(), Option<Failure>>;

impl World {
    /// Whether it is the coordinator's turn.
    pub(super) fn is_coordinated(&mut self) -> bool {
        let coordinator = self.coordinator.as_mut();
        coordinator.is_some_and(|coordinator| coordinator.random.percent(SHARE))
    }

    /// The coordinator starts, dies, is asked for something, or does the next thing of its job.
    pub(super) fn coordinate(&mut self) -> Checked {
        let Some(coordinator) = &mut self.coordinator else {
            return Ok(());
        };
        if !coordinator.is_up() {
            let woken = coordinator.wake();
            self.coordinated(woken)?;
            return self.presume();
        }
        if coordinator.random.percent(6) {
            let calls = coordinator.random.below(40);
            coordinator.medium.die_after(calls);
        }
        if !coordinator.is_busy() {
            return self.begin_job();
        }
        if coordinator.random.percent(4) {
            self.note("somebody wants the job to stop");
            return self.happen(&Event::Cancel);
        }
        self.go_on()
    }

    /// What a coordinator would do that does not look at the hosts again after its restart.
    fn presume(&mut self) -> Checked {
        let step = self.coordinator.as_mut().and_then(Coordinator::step);
        let task = step.map(|(_, task, _)| task.clone());
        match task {
            Some(task) if self.setup.has(Bug::StepPresumedDone) => {
                self.ends(&task, &Event::Done(ONLY, Report::of("presumed")))
            }
            _ => Ok(()),
        }
    }

    /// An error of the coordinator's is one of its death, or a broken promise; the dead are carried away.
    fn coordinated(&mut self, done: Result<(), String>) -> Checked {
        let Some(coordinator) = &mut self.coordinator else {
            return Ok(());
        };
        if !coordinator.medium.is_dead() {
            return done;
        }
        let kept = coordinator.random.pick(&[0, 50, 100]);
        let cut = coordinator.random.percent(40);
        let mut chance = coordinator.random.clone();
        coordinator.random.next();
        coordinator.die(cut.then_some(&mut || chance.percent(kept)));
        self.report.coordinator_deaths += 1;
        self.note(&format!("the coordinator died; its power was cut: {cut}"));
        Ok(())
    }

    fn happen(&mut self, event: &Event) -> Checked {
        let Some(coordinator) = &mut self.coordinator else {
            return Ok(());
        };
        let happened = coordinator.happen(event);
        self.coordinated(happened)
    }

    /// What the coordinator sees of the machine.
    fn view(&mut self) -> View {
        let Some(coordinator) = &mut self.coordinator else {
            return View::new();
        };
        let hosts = [0, 1].map(|host| {
            let there = &self.hosts[host];
            let silent = coordinator.random.percent(LOSS) && self.setup.loss > 0;
            let seen = if !there.is_up() || there.medium.is_dead() || silent {
                Seen::Silent("no answer".into())
            } else {
                seen(there.role())
            };
            (host_name(host), seen)
        });
        hosts.into()
    }

    fn begin_job(&mut self) -> Checked {
        let view = self.view();
        let Some(coordinator) = &mut self.coordinator else {
            return Ok(());
        };
        let kind = coordinator.random.pick(&KINDS);
        let place = view::place(kind, &machine_name(), &view, None);
        let Ok(Place::On(host, generation)) = place else {
            return Ok(());
        };
        let force = coordinator.random.percent(70);
        let verb = view::verb(kind, force, uuid::Uuid::nil());
        let asked = coordinator.ask(kind, verb, index(&host), generation);
        self.report.jobs += 1;
        self.note(&format!("a job begins: {kind}, on {host}"));
        self.coordinated(asked)
    }

    /// One look, and what follows from it.
    fn go_on(&mut self) -> Checked {
        let view = self.view();
        let now = self.clock.monotonic();
        let Some(coordinator) = &mut self.coordinator else {
            return Ok(());
        };
        let Some((job, task, course)) = coordinator.step() else {
            return Ok(());
        };
        let (task, cancel) = (task.clone(), job.cancel);
        let look = task.look(&view, cancel);
        let next = course.follow(&task, look, cancel, now);
        self.note(&format!("the coordinator: {task}: {next:?}"));
        let host = index(&task.host);
        match next {
            Next::Wait(_) => {
                self.clock.advance(Duration::from_millis(500));
                Ok(())
            }
            Next::TakeBack => self.cancel(host, Unmount::Detach),
            Next::Ask => self.ask_host(host, &task),
            Next::Done(text) => self.ends(&task, &Event::Done(ONLY, Report::of(text))),
            Next::Undone(text) => self.ends(&task, &Event::Undone(ONLY, text)),
            Next::Failed(failure) => self.ends(&task, &Event::Failed(ONLY, failure)),
        }
    }

    /// The host of a task is asked to do it; its answer may be lost.
    fn ask_host(&mut self, host: usize, task: &Task) -> Checked {
        let answered = self.asked(host, task)?;
        let Some(coordinator) = &mut self.coordinator else {
            return Ok(());
        };
        let deaf = coordinator.random.percent(LOSS) || self.hosts[host].medium.is_dead();
        let answer = match answered {
            Ok(()) if !deaf => return self.ends(task, &Event::Done(ONLY, Report::of("asked"))),
            Err(answer) if !deaf => answer,
            _ => None,
        };
        if let Some((_, _, course)) = coordinator.step() {
            course.hears(answer);
        }
        Ok(())
    }

    fn asked(&mut self, host: usize, task: &Task) -> Result<Answered, String> {
        if !self.hosts[host].is_up() {
            return Ok(Err(None));
        }
        let done = match task.verb {
            Verb::Planned => {
                self.planned(host)?;
                let part = self.hosts[host].role().map(|role| role.part);
                return Ok(match part {
                    Some(Part::Primary) => Err(Some(Failure::refused("it cannot be handed over"))),
                    Some(Part::SteppedDown { .. }) => Err(Some(Failure::of("nobody took over"))),
                    // Whoever took over is seen at the next look.
                    _ => Err(None),
                });
            }
            Verb::Unplanned { point, force } => self.hosts[host].promote(point, force),
            Verb::Commit => self.hosts[host].commit(),
            Verb::Cancel => {
                self.cancel(host, Unmount::Detach)?;
                return Ok(Err(None));
            }
            Verb::Reverse { .. } => self.hosts[host].reverse(Unmount::Detach),
            Verb::Test { .. } | Verb::EndTest { .. } => return Ok(Err(None)),
        };
        let answered = match &done {
            Ok(()) => Ok(()),
            Err(No::NotNow(why)) => Err(Some(Failure::refused(why))),
            Err(No::Failed(why)) => Err(Some(Failure::of(why))),
        };
        self.allow(host, &task.to_string(), done)?;
        self.check_serving(host)?;
        self.check_replica(host)?;
        Ok(answered)
    }

    /// A step ends: what is said of it is so.
    fn ends(&mut self, task: &Task, event: &Event) -> Checked {
        self.happen(event)?;
        let Some(coordinator) = &self.coordinator else {
            return Ok(());
        };
        if !coordinator.is_up() || coordinator.is_busy() {
            // It died over this.
            return Ok(());
        }
        self.report.jobs_ended += 1;
        self.check_job(task, event)
    }

    /// Compares the end of a step with what the hosts are, not with what the coordinator saw.
    fn check_job(&mut self, task: &Task, event: &Event) -> Checked {
        let host = index(&task.host);
        let known = |host: usize| self.oracle.hosts[host].role;
        let newest = [0, 1].into_iter().filter_map(known);
        let newest = newest.map(|role| role.generation.number).max();
        let (Some(here), Some(newest)) = (known(host), newest) else {
            return Ok(());
        };
        let since = task.generation.number;
        let moved = here.generation.number > since;
        let holds = match (task.verb, event) {
            (Verb::Planned | Verb::Unplanned { .. }, Event::Done(..)) => newest > since,
            (Verb::Planned, Event::Undone(..)) => {
                moved || !matches!(here.part, Part::SteppedDown { .. })
            }
            (Verb::Commit, Event::Done(..)) => {
                moved || !matches!(here.part, Part::FailedOver { .. })
            }
            (Verb::Cancel, Event::Done(..)) => {
                let open = matches!(
                    here.part,
                    Part::FailedOver { .. } | Part::SteppedDown { .. }
                );
                moved || !open
            }
            (Verb::Reverse { .. }, Event::Done(..)) => {
                moved || !matches!(here.part, Part::Fenced { .. })
            }
            _ => true,
        };
        if holds {
            return Ok(());
        }
        Err(format!(
            "P6: {task}: {event:?}, and the host is {here:?} in generation {newest}"
        ))
    }

    /// The coordinator lives from here on, and does what is next of what it has begun. `late`: somebody has waited enough.
    pub(super) fn coordinate_to_the_end(&mut self, late: bool) -> Checked {
        let Some(coordinator) = &mut self.coordinator else {
            return Ok(());
        };
        if coordinator.medium.is_dead() {
            coordinator.die(None);
        }
        coordinator.medium.mend();
        if !coordinator.is_up() {
            coordinator.wake()?;
        }
        if !coordinator.is_busy() {
            return Ok(());
        }
        self.go_on()?;
        // A planned failover lets time pass: hosts may be stopped in it, and tests begun.
        for host in 0..2 {
            if !self.hosts[host].is_up() {
                self.wake(host)?;
            }
            self.hosts[host].process().tests.clear();
        }
        // A job that waits for what nobody does is ended by a person.
        let open = self.coordinator.as_mut().and_then(Coordinator::step);
        match open {
            Some((job, _, _)) if late && !job.cancel => self.happen(&Event::Cancel),
            _ => Ok(()),
        }
    }
}

fn index(host: &Name) -> usize {
    usize::from(*host != host_name(0))
}
