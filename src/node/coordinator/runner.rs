//! One job under way: a thread that owns its state, makes each change durable, and begins what is due.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    time::Duration,
};

use parking_lot::{Condvar, Mutex};
use tokio::{
    sync::{oneshot, watch},
    task::AbortHandle,
};

use super::{Coordinator, deeds};
use crate::{
    base::chain::chain,
    coord::job::{At, Event, Job, StepState},
    node::control::OperateError,
};

/// Pause before the journal is tried again after it failed.
const JOURNAL_AGAIN: Duration = Duration::from_secs(1);

/// A job, and whoever works on it.
#[derive(Debug)]
pub(super) struct Running {
    job: Mutex<Job>,
    changed: Condvar,
    stopped: AtomicBool,
    /// What is being waited for, for people; not in the journal.
    notes: Mutex<BTreeMap<At, String>>,
    inbox: mpsc::Sender<Message>,
}

#[derive(Debug)]
enum Message {
    /// A step ended.
    Step(Event),
    /// A person said something.
    Person(Event, oneshot::Sender<Result<Job, OperateError>>),
    Stop,
}

impl Running {
    /// Goes on with a job that is in the journal.
    pub(super) fn start(coordinator: &Arc<Coordinator>, job: Job) -> Arc<Self> {
        let (inbox, messages) = mpsc::channel();
        let running = Arc::new(Self {
            job: Mutex::new(job.clone()),
            changed: Condvar::new(),
            stopped: AtomicBool::new(false),
            notes: Mutex::default(),
            inbox,
        });
        if job.ended.is_none() {
            let worker = Worker {
                coordinator: Arc::clone(coordinator),
                running: Arc::clone(&running),
                job,
                cancel: watch::Sender::new(false),
                acts: Vec::new(),
            };
            std::thread::spawn(move || worker.run(&messages));
        }
        running
    }

    /// As it is now.
    pub(super) fn job(&self) -> Job {
        self.job.lock().clone()
    }

    pub(super) fn notes(&self) -> BTreeMap<At, String> {
        self.notes.lock().clone()
    }

    /// Says what a step waits for.
    pub(super) fn note(&self, at: At, text: String) {
        self.notes.lock().insert(at, text);
    }

    /// What a person wants; durable before it returns.
    pub(super) fn wish(&self, event: Event) -> Result<Job, OperateError> {
        let (reply, answer) = oneshot::channel();
        let id = self.job.lock().id;
        let over = || OperateError::NotNow(format!("job {id} has ended"));
        // Nobody listens any more once it has ended.
        self.inbox
            .send(Message::Person(event, reply))
            .map_err(|_| over())?;
        answer.blocking_recv().unwrap_or_else(|_| Err(over()))
    }

    /// Ends the work, not the job.
    pub(super) fn stop(&self) {
        // Nobody listens any more once it has ended.
        let _ = self.inbox.send(Message::Stop);
        // Under the lock, so that nobody begins to wait in between.
        let _job = self.job.lock();
        self.stopped.store(true, Ordering::Release);
        self.changed.notify_all();
    }

    /// Waits until it has ended, or the work on it has.
    pub(super) fn wait(&self) -> Job {
        let mut job = self.job.lock();
        while job.ended.is_none() && !self.stopped.load(Ordering::Acquire) {
            self.changed.wait(&mut job);
        }
        job.clone()
    }
}

/// The thread of a job.
struct Worker {
    coordinator: Arc<Coordinator>,
    running: Arc<Running>,
    job: Job,
    /// Tells those who work on steps that somebody wants the job to stop.
    cancel: watch::Sender<bool>,
    acts: Vec<AbortHandle>,
}

impl Worker {
    fn run(mut self, messages: &mpsc::Receiver<Message>) {
        self.cancel.send_replace(self.job.cancel);
        let mut again = self.job.under_way();
        loop {
            again.extend(self.job.due());
            for at in again.drain(..) {
                if self.happen(&Event::Begin(at)) {
                    self.act(at);
                }
            }
            if let Some(ended) = self.job.ended {
                tracing::info!(job = %self.job.id, outcome = %ended.outcome, "a job has ended");
                return;
            }
            match messages.recv() {
                Ok(Message::Step(event)) => {
                    self.happen(&event);
                }
                Ok(Message::Person(event, reply)) => {
                    let answer = self.hear(&event);
                    // Whoever asked may be gone.
                    let _ = reply.send(answer);
                }
                Ok(Message::Stop) | Err(mpsc::RecvError) => break,
            }
        }
        for act in &self.acts {
            act.abort();
        }
    }

    /// An event of our own: it can happen, and it is durable before anything else is done. Whether it has happened.
    fn happen(&mut self, event: &Event) -> bool {
        let now = self.coordinator.clock.wall();
        let next = match self.job.apply(event, now) {
            Ok(next) => next,
            Err(refused) => {
                tracing::error!(job = %self.job.id, ?event, "{refused}");
                return false;
            }
        };
        while let Err(error) = self.coordinator.journal.put(&next) {
            tracing::error!(job = %next.id, "the journal is tried again: {}", chain(&error));
            std::thread::sleep(JOURNAL_AGAIN);
        }
        self.is(next);
        true
    }

    /// A person's wish: what cannot be made durable is not done.
    fn hear(&mut self, event: &Event) -> Result<Job, OperateError> {
        let applied = self.job.apply(event, self.coordinator.clock.wall());
        let next = applied.map_err(|refused| OperateError::NotNow(refused.to_string()))?;
        self.coordinator.journal.put(&next)?;
        self.is(next.clone());
        Ok(next)
    }

    fn is(&mut self, next: Job) {
        for ((at, step), (_, was)) in next.steps().zip(self.job.steps()) {
            if step.state != was.state || step.attempts != was.attempts {
                tell(&next, at);
            }
            if step.state.is_final() {
                self.running.notes.lock().remove(&at);
            }
        }
        self.cancel.send_replace(next.cancel);
        self.job = next.clone();
        *self.running.job.lock() = next;
        self.running.changed.notify_all();
    }

    /// Begins to do a step that the journal says is under way.
    fn act(&mut self, at: At) {
        let Some(deeds) = deeds::Doing::of(&self.coordinator, &self.running, &self.job, at) else {
            return;
        };
        let (inbox, cancel) = (self.running.inbox.clone(), self.cancel.subscribe());
        let act = self.coordinator.runtime.spawn(async move {
            let event = deeds.carry_out(cancel).await;
            // Nobody listens to the end of a step when the work has been stopped.
            let _ = inbox.send(Message::Step(event));
        });
        self.acts.retain(|act| !act.is_finished());
        self.acts.push(act.abort_handle());
    }
}

/// What a step has come to, for the log.
fn tell(job: &Job, at: At) {
    let (Some(step), Some(stage)) = (job.step(at), job.stages.get(at.stage)) else {
        return;
    };
    let (id, stage, deed) = (job.id, &stage.name, &step.deed);
    match &step.state {
        StepState::Waiting => {}
        StepState::UnderWay => {
            tracing::info!(job = %id, stage, attempt = step.attempts, "begins: {deed}");
        }
        StepState::Done(report) => {
            tracing::info!(job = %id, stage, "done: {deed}: {}", report.text);
        }
        StepState::Undone(text) => tracing::info!(job = %id, stage, "undone: {deed}: {text}"),
        StepState::Skipped => tracing::info!(job = %id, stage, "skipped: {deed}"),
        StepState::Failed(failure) => {
            tracing::warn!(job = %id, stage, "failed: {deed}: {}", failure.why);
        }
    }
}
