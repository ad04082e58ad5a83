//! The coordinator of the simulation: what is durable on it, and the job that its process works on.
//!
//! This is `node::coordinator` without threads and sockets, one job at a time. The steps of a job, what a look means and
//! what follows from it are the product's; the journal is a record of a ledger, as there.

use std::sync::Arc;

use super::{
    host::machine_name,
    medium::{Medium, MediumFolder},
    random::Random,
    record::{Done, told},
    setup::Bug,
};
use crate::{
    base::{
        clock::{Clock, ManualClock},
        ids::{Generation, Name},
    },
    coord::{
        job::{At, Course, Deed, Event, Job, JobId, Kind, Stage, Step, StepState, Task, Verb},
        role::RoleState,
        state::{Health, ReplicationState},
        view::{Seen, Sight},
    },
    storage::{ledger::Ledger, memory::Choice},
};

const LEDGER_FILE: &str = "node.redb";
const JOB_KEY: &str = "job/machine";
/// The one step of a job.
pub(super) const ONLY: At = At { stage: 0, step: 0 };
/// Runs that have a coordinator, in a hundred.
const SHARE: u64 = 25;
/// Parts its chance from that of the run: a run without it is the same as if there were none.
const CHANCE: u64 = 0xC00D_1AA7_0000_0000;

pub(super) fn host_name(host: usize) -> Name {
    Name::new(["alpha", "beta"][host]).expect("they are plain words")
}

/// A process of the coordinator.
#[derive(Debug)]
struct Process {
    ledger: Ledger,
    job: Option<Job>,
    /// How the step that is under way goes.
    course: Option<Course>,
}

/// The coordinator.
#[derive(Debug)]
pub(super) struct Coordinator {
    /// When it acts, what it is asked for, what it does not hear.
    pub(super) random: Random,
    pub(super) medium: Arc<Medium>,
    folder: Arc<MediumFolder>,
    clock: Arc<ManualClock>,
    process: Option<Process>,
    /// The job that somebody was told of, or that a step was begun or ended by.
    durable: Option<Job>,
    /// The one that was being made durable when the process died.
    doubtful: Option<Job>,
    next: u64,
    bug: Option<Bug>,
}

impl Coordinator {
    /// The coordinator of this run, if it has one.
    pub(super) fn of(seed: u64, clock: &Arc<ManualClock>, bug: Option<Bug>) -> Option<Self> {
        let mut random = Random::new(seed ^ CHANCE);
        let medium = Medium::new();
        random.percent(SHARE).then(|| Self {
            random,
            folder: MediumFolder::new(&medium, None),
            medium,
            clock: Arc::clone(clock),
            process: None,
            durable: None,
            doubtful: None,
            next: 1,
            bug,
        })
    }

    pub(super) fn is_up(&self) -> bool {
        self.process.is_some()
    }

    /// The process ends; with `kept`, the power is cut, too.
    pub(super) fn die(&mut self, kept: Option<&mut Choice<'_>>) {
        self.medium.end_process(|| self.process = None);
        if let Some(kept) = kept {
            self.medium.power.restore(kept);
        }
    }

    /// A process begins, and finds its journal; a job that was under way is gone on with.
    pub(super) fn wake(&mut self) -> Done {
        let ledger = Ledger::open_in(&*self.folder, LEDGER_FILE).map_err(told)?;
        let found: Option<Job> = ledger.get(JOB_KEY).map_err(told)?;
        if found != self.durable && (self.doubtful.is_none() || found != self.doubtful) {
            return Err(format!(
                "P6: the journal has {found:?} instead of {:?}",
                self.durable
            ));
        }
        self.durable.clone_from(&found);
        self.doubtful = None;
        let open = found.as_ref().is_some_and(|job| job.ended.is_none());
        self.process = Some(Process {
            ledger,
            job: found,
            course: None,
        });
        if open { self.begin() } else { Ok(()) }
    }

    /// The job, its task, and the course of its step, if one is under way.
    pub(super) fn step(&mut self) -> Option<(&Job, &Task, &mut Course)> {
        let process = self.process.as_mut()?;
        let (job, course) = (process.job.as_ref()?, process.course.as_mut()?);
        let step = job.step(ONLY)?;
        match &step.deed {
            Deed::Machine(task) if step.state == StepState::UnderWay => Some((job, task, course)),
            _ => None,
        }
    }

    /// Whether a job is to be ended.
    pub(super) fn is_busy(&self) -> bool {
        let job = match &self.process {
            Some(process) => process.job.as_ref(),
            None => self.doubtful.as_ref().or(self.durable.as_ref()),
        };
        job.is_some_and(|job| job.ended.is_none())
    }

    /// A person wants a machine moved; what is asked for is in the journal before anything is done.
    pub(super) fn ask(&mut self, kind: Kind, verb: Verb, host: usize, of: Generation) -> Done {
        let task = Task {
            machine: machine_name(),
            verb,
            host: host_name(host),
            generation: of,
        };
        let stage = Stage {
            name: kind.to_string(),
            always: false,
            steps: vec![Step::new(Deed::Machine(task))],
        };
        let id = JobId(self.next);
        self.next += 1;
        self.put(Job::new(id, None, kind, vec![stage], self.clock.wall()))?;
        self.begin()
    }

    fn begin(&mut self) -> Done {
        self.happen(&Event::Begin(ONLY))?;
        if let Some(process) = &mut self.process {
            let step = process.job.as_ref().and_then(|job| job.step(ONLY));
            process.course = step.map(|step| Course::new(step.attempts));
        }
        Ok(())
    }

    /// Something happens to the job; durable before anything else is done.
    pub(super) fn happen(&mut self, event: &Event) -> Done {
        let job = self
            .process
            .as_ref()
            .and_then(|process| process.job.as_ref());
        let job = job.ok_or("there is no job")?;
        let next = job.apply(event, self.clock.wall()).map_err(told)?;
        self.put(next)
    }

    fn put(&mut self, job: Job) -> Done {
        let process = self.process.as_mut().ok_or("there is no process")?;
        self.doubtful = Some(job.clone());
        if self.bug != Some(Bug::JobNotDurable) {
            process.ledger.put(JOB_KEY, &job).map_err(told)?;
        }
        process.job = Some(job);
        self.durable = self.doubtful.take();
        Ok(())
    }
}

/// What a host says of the machine to whoever asks.
pub(super) fn seen(role: Option<RoleState>) -> Seen {
    let Some(role) = role else {
        return Seen::Absent;
    };
    Seen::Present(Sight {
        part: role.part,
        generation: role.generation,
        state: ReplicationState::Replicating,
        health: Health::Normal,
        reasons: Vec::new(),
        tests: Vec::new(),
    })
}
