//! Carrying out one step: look at the hosts, ask the one that has to act, look again.

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::sync::watch;

use super::{Coordinator, Looked, NotAsked, runner::Running, script};
use crate::{
    base::ids::Name,
    coord::{
        job::{
            At, Deed, Event, Failure, Job, JobId, Report, Script, StepState, Task, Verb, deed::Look,
        },
        view::Seen,
    },
    node::{
        control::{
            CancelRequest, FailoverKind, FailoverRequest, ReverseRequest, TestRequest, ask_cancel,
            ask_commit, ask_failover, ask_reverse, ask_test,
        },
        status::MachineStatus,
    },
};

/// Pause between two looks at hosts that are not where they should be.
const LOOK_EVERY: Duration = Duration::from_millis(500);
/// How long a host that was not asked for anything yet, or that somebody no longer wants to wait for, may be silent. One
/// that may be in the middle of handing a machine over is waited for until a person cancels the job: to give up would leave
/// the machine where nobody knows.
const SILENT_MAX: Duration = Duration::from_mins(1);

/// One step that is being done.
pub(super) struct Doing {
    coordinator: Arc<Coordinator>,
    running: Arc<Running>,
    job: JobId,
    at: At,
    attempts: u32,
    deed: Deed,
    /// For scripts: what they are told.
    environment: Vec<(&'static str, String)>,
}

impl Doing {
    /// What there is to do for a step that has begun; nothing if it waits for a person.
    pub(super) fn of(
        coordinator: &Arc<Coordinator>,
        running: &Arc<Running>,
        job: &Job,
        at: At,
    ) -> Option<Self> {
        let step = job.step(at)?;
        let environment = match &step.deed {
            Deed::Machine(_) => Vec::new(),
            Deed::Script(script) => environment(job, script, step.attempts),
            Deed::Manual { .. } | Deed::Nothing { .. } => return None,
        };
        Some(Self {
            coordinator: Arc::clone(coordinator),
            running: Arc::clone(running),
            job: job.id,
            at,
            attempts: step.attempts,
            deed: step.deed.clone(),
            environment,
        })
    }

    /// Does it; what became of it. `cancel`: somebody wants the job to stop.
    pub(super) async fn carry_out(self, mut cancel: watch::Receiver<bool>) -> Event {
        let at = self.at;
        match &self.deed {
            Deed::Machine(task) => self.machine(task, cancel).await,
            Deed::Script(script) => tokio::select! {
                ended = self.script(script) => match ended {
                    Ok(report) => Event::Done(at, report),
                    Err(failure) => Event::Failed(at, failure),
                },
                // The sender lives as long as whoever listens to this.
                _ = cancel.wait_for(|cancel| *cancel) => Event::Undone(at, "killed".into()),
            },
            Deed::Manual { .. } | Deed::Nothing { .. } => Event::Done(at, Report::default()),
        }
    }

    async fn script(&self, script: &Script) -> Result<Report, Failure> {
        if self.attempts > 1 {
            script::kill_left(&self.name()).await?;
        }
        let mut told = self.environment.clone();
        told.push((script::STEP, self.name()));
        script::run(script, &told).await
    }

    /// The step, told from those of any other job and coordinator.
    fn name(&self) -> String {
        let store = self.coordinator.host.shared().folder.path().display();
        let (job, At { stage, step }) = (self.job, self.at);
        format!("{store}:{job}:{stage}.{step}")
    }

    async fn machine(&self, task: &Task, mut cancel: watch::Receiver<bool>) -> Event {
        let mut course = Course {
            // A step that is begun again may have asked before the coordinator died.
            asked: self.attempts > 1,
            begun: false,
            answered: None,
            stuck: None,
        };
        loop {
            let looked = self.coordinator.look_for(task).await;
            let wanted = *cancel.borrow_and_update();
            let look = task.look(&looked.view, wanted);
            if let Some(event) = self.follow(task, look, &looked, wanted, &mut course).await {
                return event;
            }
            if course.answered.is_some() && !course.begun {
                // What the host says of itself now tells whether that was all.
                continue;
            }
            tokio::select! {
                () = tokio::time::sleep(LOOK_EVERY) => {}
                // The sender lives as long as whoever listens to this.
                _ = cancel.changed() => course.stuck = None,
            }
        }
    }

    /// Does what follows from a look; the end of the step, if this was it.
    async fn follow(
        &self,
        task: &Task,
        look: Look,
        looked: &Looked,
        cancelled: bool,
        course: &mut Course,
    ) -> Option<Event> {
        let at = self.at;
        let fail = |why: String| Some(Event::Failed(at, Failure::of(why)));
        match look {
            Look::Done(text) => Some(match course.answered.take() {
                // The host is what it should be, and could not serve its disks. A hand-over that was said to have failed
                // may have been finished since by the hosts themselves.
                Some(failure) if task.verb != Verb::Planned && !failure.refused => {
                    Event::Failed(at, failure)
                }
                _ => Event::Done(at, looked.report(task, text)),
            }),
            Look::Undone(text) => Some(Event::Undone(at, text)),
            Look::Refused(why) => {
                let answered = course.answered.take();
                let failure = answered.unwrap_or_else(|| Failure::refused(why));
                Some(Event::Failed(at, failure))
            }
            Look::Silent(why) => {
                let note = format!("{} cannot be asked: {why}", task.host);
                self.running.note(at, note.clone());
                let waits = task.verb == Verb::Planned && course.asked && !cancelled;
                if course.is_stuck() && !waits {
                    return fail(format!("{note}; for {} s", SILENT_MAX.as_secs()));
                }
                None
            }
            Look::TakeBack => {
                let told = self.coordinator.take_back(task).await;
                let told = told.unwrap_or_else(|error| error.text().into());
                self.running.note(at, told);
                if course.is_stuck() {
                    return fail(format!(
                        "{} has asked for the machine, and is its primary again as soon as the other host consents",
                        task.host
                    ));
                }
                None
            }
            Look::Ask { begun } => self.ask(task, begun, looked, course).await,
        }
    }

    async fn ask(
        &self,
        task: &Task,
        begun: bool,
        looked: &Looked,
        course: &mut Course,
    ) -> Option<Event> {
        let at = self.at;
        // An answer stands, unless the host was in the middle of it and goes on.
        if let Some(failure) = course.answered.take()
            && (!begun || failure.refused)
        {
            return Some(Event::Failed(at, failure));
        }
        (course.asked, course.begun, course.stuck) = (true, begun, None);
        match self.coordinator.ask(task, looked).await {
            Ok(text) => {
                let looked = self.coordinator.look_for(task).await;
                Some(Event::Done(at, looked.report(task, text)))
            }
            Err(error) => {
                self.running.note(at, error.text().into());
                course.answered = error.answer();
                None
            }
        }
    }
}

/// How a step about a machine goes.
struct Course {
    /// Whether the host was asked, or may have been.
    asked: bool,
    /// Whether it was in the middle of it when it was asked last.
    begun: bool,
    /// What it answered then, if it was no success.
    answered: Option<Failure>,
    /// Since when nothing moves.
    stuck: Option<Instant>,
}

impl Course {
    /// Whether nothing has moved for too long.
    fn is_stuck(&mut self) -> bool {
        let since = *self.stuck.get_or_insert_with(Instant::now);
        since.elapsed() >= SILENT_MAX
    }
}

impl NotAsked {
    fn text(&self) -> &str {
        match self {
            Self::Refused(text) | Self::Failed(text) | Self::Lost(text) => text,
        }
    }

    /// What the host said, if it was heard.
    fn answer(self) -> Option<Failure> {
        match self {
            Self::Refused(why) => Some(Failure::refused(why)),
            Self::Failed(why) => Some(Failure::of(why)),
            Self::Lost(_) => None,
        }
    }
}

impl Coordinator {
    /// Asks the hosts on which a task depends: whether a machine was handed over, the other one may know first.
    async fn look_for(&self, task: &Task) -> Looked {
        let all = task.verb == Verb::Planned;
        self.look(&task.machine, |host| all || *host == task.host)
            .await
    }

    /// Asks the host of a task to do it.
    async fn ask(&self, task: &Task, looked: &Looked) -> Result<String, NotAsked> {
        let way = self.way_of(task)?;
        let machine = &task.machine;
        let failover = |kind, point, force| FailoverRequest { kind, point, force };
        Ok(match task.verb {
            Verb::Planned => {
                let request = failover(FailoverKind::Planned, None, false);
                ask_failover(way, machine, request).await?.text
            }
            Verb::Unplanned { point, force } => {
                let request = failover(FailoverKind::Unplanned, point, force);
                ask_failover(way, machine, request).await?.text
            }
            Verb::Commit => ask_commit(way, machine).await?.text,
            Verb::Cancel => return self.take_back(task).await,
            Verb::Reverse { force } => {
                ask_reverse(way, machine, ReverseRequest { force })
                    .await?
                    .text
            }
            Verb::Test { key } => {
                let request = TestRequest {
                    key: Some(key),
                    ..TestRequest::default()
                };
                let test = ask_test(way, machine, request).await?;
                format!(
                    "test failover {} at epoch {}",
                    test.number, test.point.epoch
                )
            }
            Verb::EndTest { key } => {
                let number = looked.test(task, key);
                let request = CancelRequest {
                    number,
                    tests: true,
                    // Whoever still uses it knows that a test ends.
                    force: true,
                    ..CancelRequest::default()
                };
                ask_cancel(way, machine, request).await?;
                "the test has ended; its disks and all that was written in it are gone".into()
            }
        })
    }

    /// Asks the host of a task to take back what is not final.
    async fn take_back(&self, task: &Task) -> Result<String, NotAsked> {
        let request = CancelRequest::default();
        let report = ask_cancel(self.way_of(task)?, &task.machine, request).await?;
        Ok(report.failover.unwrap_or_default())
    }

    fn way_of(&self, task: &Task) -> Result<&super::Way, NotAsked> {
        let unknown = || NotAsked::Refused(format!("no host called {} is known here", task.host));
        self.way(&task.host).ok_or_else(unknown)
    }
}

impl Looked {
    /// The number of a test.
    fn test(&self, task: &Task, key: uuid::Uuid) -> Option<u32> {
        match self.view.get(&task.host) {
            Some(Seen::Present(sight)) => sight.test(key),
            _ => None,
        }
    }

    /// What a task led to: where the machine's disks are now.
    fn report(&self, task: &Task, text: String) -> Report {
        let report = Report::of(text);
        if let Verb::Test { key } = task.verb {
            let machine = self.machines.get(&task.host);
            let mut tests = machine.into_iter().flat_map(|machine| &machine.tests);
            let test = tests.find(|test| test.key == Some(key));
            return Report {
                host: Some(task.host.clone()),
                files: test.map(|test| test.files.clone()).unwrap_or_default(),
                ..report
            };
        }
        let disks = |machine: &MachineStatus| {
            let disks = machine.disks.iter();
            disks
                .filter_map(|disk| disk.path.as_ref().map(Into::into))
                .collect::<Vec<_>>()
        };
        let served = |machines: &BTreeMap<Name, MachineStatus>| {
            let mut served = machines
                .iter()
                .map(|(host, machine)| (host.clone(), machine, disks(machine)));
            served
                .find(|(_, _, disks)| !disks.is_empty())
                .map(|(host, machine, disks)| (host, machine.generation, disks))
        };
        match served(&self.machines) {
            Some((host, generation, files)) => Report {
                generation,
                host: Some(host),
                files,
                ..report
            },
            None => report,
        }
    }
}

/// What a script is told.
fn environment(job: &Job, script: &Script, attempt: u32) -> Vec<(&'static str, String)> {
    let lines = |names: &[Name]| {
        let names: Vec<_> = names.iter().map(Name::as_str).collect();
        names.join("\n")
    };
    let mut disks = Vec::new();
    for (_, step) in job.steps() {
        if let (Deed::Machine(task), StepState::Done(report)) = (&step.deed, &step.state)
            && let Some(host) = &report.host
        {
            let files = report.files.iter();
            disks.extend(files.map(|file| format!("{}\t{host}\t{}", task.machine, file.display())));
        }
    }
    vec![
        (
            "UNDERSTUDY_PLAN",
            job.plan
                .as_ref()
                .map(ToString::to_string)
                .unwrap_or_default(),
        ),
        ("UNDERSTUDY_JOB", job.id.to_string()),
        ("UNDERSTUDY_KIND", job.kind.to_string()),
        ("UNDERSTUDY_GROUP", script.group.clone()),
        ("UNDERSTUDY_PHASE", script.phase.to_string()),
        ("UNDERSTUDY_MACHINES", lines(&script.machines)),
        ("UNDERSTUDY_DISKS", disks.join("\n")),
        ("UNDERSTUDY_ATTEMPT", attempt.to_string()),
    ]
}
