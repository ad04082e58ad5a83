//! Carrying out one step: look at the hosts, ask the one that has to act, look again.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use tokio::sync::watch;

use super::{Coordinator, Looked, NotAsked, runner::Running, script};
use crate::{
    base::ids::Name,
    coord::{
        job::{
            At, Course, Deed, Event, Failure, Job, JobId, Next, Report, Script, StepState, Task,
            Verb,
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
        let mut course = Course::new(self.attempts);
        loop {
            let looked = self.coordinator.look_for(task).await;
            let wanted = *cancel.borrow_and_update();
            let look = task.look(&looked.view, wanted);
            let now = self.coordinator.clock.monotonic();
            let next = course.follow(task, look, wanted, now);
            if let Some(event) = self.follow(task, next, &looked, &mut course).await {
                return event;
            }
            if course.is_urgent() {
                continue;
            }
            tokio::select! {
                () = tokio::time::sleep(LOOK_EVERY) => {}
                // The sender lives as long as whoever listens to this.
                _ = cancel.changed() => course.restart_clock(),
            }
        }
    }

    /// Does what is next; the end of the step, if this was it.
    async fn follow(
        &self,
        task: &Task,
        next: Next,
        looked: &Looked,
        course: &mut Course,
    ) -> Option<Event> {
        let at = self.at;
        let note = match next {
            Next::Done(text) => return Some(Event::Done(at, looked.report(task, text))),
            Next::Undone(text) => return Some(Event::Undone(at, text)),
            Next::Failed(failure) => return Some(Event::Failed(at, failure)),
            Next::Wait(note) => note,
            Next::TakeBack => {
                let told = self.coordinator.take_back(task).await;
                told.unwrap_or_else(|error| error.text().into())
            }
            Next::Ask => match self.coordinator.ask(task, looked).await {
                Ok(text) => {
                    let looked = self.coordinator.look_for(task).await;
                    return Some(Event::Done(at, looked.report(task, text)));
                }
                Err(error) => {
                    let note = error.text().to_owned();
                    course.hears(error.answer());
                    note
                }
            },
        };
        self.running.note(at, note);
        None
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
