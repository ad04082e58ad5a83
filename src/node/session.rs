//! One primary's connection to the replica of one machine.
//!
//! ```text
//!   link ── tasks: messages, log bytes ──> channel ──> session thread: Ingest + Receiver ── answers ──> link
//! ```
//! The thread owns what is being received; when the link is lost, the log under way is given up and the store is as if
//! it had never begun. Nothing is said that is not durable: every answer follows the store's word.

use std::{sync::Arc, thread};

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::sync::mpsc::{self, Receiver as EventReceiver, Sender as EventSender, UnboundedSender};

use super::{
    allowance::{OverQuota, Quota},
    pacing::Pacing,
    served::Served,
    writers::Writers,
};
use crate::{
    base::{chain::chain, clock::Timestamp, ids::Generation, units::to_u64},
    net::{ControlReceiver, ControlSender, Link, LinkError, LogReceiver, Reason},
    protocol::{
        compare::Question,
        message::{self, Refusal, ToPrimary, ToReplica},
        receiver::Receiver,
    },
    replica::{
        CompareError, Head, Ingest, IngestError, IngestEvent, PointView, ReplicaError, SyncTask,
    },
};

/// Pieces of a log that are read from the connection at once.
const PIECES: usize = 64;
/// Batches of pieces between the connection and the thread: 0.7 MiB at an MTU of 1.5 KiB, 8 MiB at the largest. What
/// waits longer than that is no longer in the processor's cache when it is looked at; the connection holds what is more.
const BATCHES: usize = 8;

enum Event {
    Begin,
    Bytes(Vec<Bytes>),
    End,
    Broken(String),
    Message(ToReplica),
    /// A sync of the log with this number ended.
    Synced(u64, Result<IngestEvent, IngestError>),
    Lost(String),
}

/// What one connection may do.
pub(super) struct Allowance {
    /// The rate that it keeps with the other connections of its peer.
    pub(super) pacing: Pacing,
    pub(super) quota: Quota,
}

/// Serves one greeted connection until it ends; why the primary ended it, if it did. Answers through `control` from now
/// on.
pub(super) async fn serve(
    (served, generation): (Arc<Served>, Generation),
    Allowance { pacing, quota }: Allowance,
    link: Link,
    sender: ControlSender,
    receiver: ControlReceiver,
) -> Option<Reason> {
    let (events, inbox) = mpsc::channel(BATCHES);
    let (answers, outbox) = mpsc::unbounded_channel();
    let ears = tokio::spawn(hear(receiver, link.clone(), events.clone()));
    let logs = tokio::spawn(receive_logs(link.clone(), pacing, events.clone()));
    let mouth = tokio::spawn(speak(sender, outbox));
    let syncer = Syncer::start(events.clone());
    let session = Session {
        served,
        generation,
        answers,
        receiver: Receiver::default(),
        ingest: None,
        log: 0,
        quota,
        writers: Writers::start(),
        syncer,
        compared: None,
    };
    let closing = link.clone();
    let (ended, end) = tokio::sync::oneshot::channel();
    let spawned = thread::Builder::new()
        .name("receive".into())
        .spawn(move || {
            // Whoever waits may be gone; then nobody wants to know.
            let _ = ended.send(session.run(inbox));
        });
    let why = match spawned {
        Ok(_) => end
            .await
            .unwrap_or_else(|_| "the receiving thread failed".into()),
        Err(error) => format!("cannot start a receiving thread: {error}"),
    };
    ears.abort();
    logs.abort();
    // Everything that was said is on its way before the link is closed.
    let _ = mouth.await;
    let by_peer = closing.closed_by_peer();
    closing.close(Reason::Done, &why);
    by_peer
}

async fn hear(mut receiver: ControlReceiver, link: Link, events: EventSender<Event>) {
    loop {
        let event = match receiver.receive().await {
            Ok(Some(bytes)) => match message::decode_to_replica(&bytes) {
                Ok(message) => Event::Message(message),
                Err(error) => Event::Lost(chain(&error)),
            },
            Ok(None) => Event::Lost(chain(&link.closed().await)),
            Err(error) => Event::Lost(chain(&error)),
        };
        let last = matches!(event, Event::Lost(_));
        if events.send(event).await.is_err() || last {
            return;
        }
    }
}

async fn receive_logs(link: Link, pacing: Pacing, events: EventSender<Event>) {
    while let Ok(log) = link.accept_log().await {
        if events.send(Event::Begin).await.is_err() {
            return;
        }
        let end = match receive_log(log, &pacing, &events).await {
            Ok(()) => Event::End,
            Err(error) => Event::Broken(chain(&error)),
        };
        if events.send(end).await.is_err() {
            return;
        }
    }
}

async fn receive_log(
    mut log: LogReceiver,
    pacing: &Pacing,
    events: &EventSender<Event>,
) -> Result<(), LinkError> {
    let mut pieces = vec![Bytes::new(); PIECES];
    while let Some(count) = log.read_chunks(&mut pieces).await? {
        let batch: Vec<_> = pieces[..count].iter_mut().map(std::mem::take).collect();
        // Nothing else waits for it: what is not read fills the stream's window, and then the peer stops sending.
        let mut left = batch.iter().map(|piece| to_u64(piece.len())).sum();
        while left > 0 {
            match pacing.pass(left) {
                Ok(passed) => left -= passed,
                Err(wait) => tokio::time::sleep(wait).await,
            }
        }
        if events.send(Event::Bytes(batch)).await.is_err() {
            return Ok(());
        }
    }
    Ok(())
}

async fn speak(mut sender: ControlSender, mut outbox: mpsc::UnboundedReceiver<ToPrimary>) {
    while let Some(message) = outbox.recv().await {
        if let Err(error) = sender.send(message::encode(&message).into()).await {
            tracing::debug!("an answer to a primary was not sent: {error}");
            return;
        }
    }
    sender.finish();
}

/// Runs syncs beside the receiving, one at a time, and reports them as events.
struct Syncer {
    tasks: Option<crossbeam_channel::Sender<(u64, SyncTask)>>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Syncer {
    fn start(events: EventSender<Event>) -> Self {
        let (tasks, inbox) = crossbeam_channel::bounded::<(u64, SyncTask)>(1);
        let spawned = thread::Builder::new().name("sync".into()).spawn(move || {
            for (log, task) in inbox {
                // The session may be over; then nobody wants to know.
                let _ = events.blocking_send(Event::Synced(log, task.run()));
            }
        });
        match spawned {
            Ok(thread) => Self {
                tasks: Some(tasks),
                thread: Some(thread),
            },
            // Without a thread everything is synced at the trailer.
            Err(_) => Self {
                tasks: None,
                thread: None,
            },
        }
    }

    /// Whether no sync is waiting for its turn.
    fn is_idle(&self) -> bool {
        self.tasks
            .as_ref()
            .is_some_and(crossbeam_channel::Sender::is_empty)
    }

    fn run(&self, log: u64, task: SyncTask) {
        if let Some(tasks) = &self.tasks {
            // The thread lives as long as this value.
            let _ = tasks.send((log, task));
        }
    }
}

impl Drop for Syncer {
    fn drop(&mut self) {
        self.tasks = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Why the replica cannot go on.
#[derive(Debug, thiserror::Error)]
enum Trouble {
    #[error(transparent)]
    Ingest(#[from] IngestError),
    #[error(transparent)]
    Compare(#[from] CompareError),
    #[error(transparent)]
    Quota(#[from] OverQuota),
}

struct Session {
    served: Arc<Served>,
    generation: Generation,
    answers: UnboundedSender<ToPrimary>,
    receiver: Receiver,
    ingest: Option<Ingest>,
    /// Counts the logs of this connection.
    log: u64,
    quota: Quota,
    writers: Writers,
    syncer: Syncer,
    /// The point that is being compared with. No merge goes beyond it, so it is let go of when an epoch was staged.
    compared: Option<PointView>,
}

impl Session {
    /// Receives until the link is lost; why it ended.
    fn run(mut self, mut inbox: EventReceiver<Event>) -> String {
        let head = match self.served.store.settled_head() {
            Ok(head) => head,
            Err(error) => return self.give_up(&chain(&error)),
        };
        let welcome = self.receiver.welcome(self.generation, head.into());
        self.say(welcome);
        while let Some(event) = inbox.blocking_recv() {
            let done: Result<(), Trouble> = match event {
                Event::Lost(why) => return why,
                Event::Begin => self.begin().map_err(Trouble::from),
                Event::Bytes(pieces) => pieces.iter().try_for_each(|piece| self.take(piece)),
                Event::End => {
                    let finished = self.ingest.take().map_or(Ok(()), Ingest::finish);
                    finished.map_err(Trouble::from)
                }
                Event::Broken(why) => {
                    tracing::info!(machine = %self.served.name, "a delta log was given up: {why}");
                    self.ingest = None;
                    Ok(())
                }
                Event::Message(message) => self.hear(&message).map_err(Trouble::from),
                Event::Synced(log, synced) => self.synced(log, synced).map_err(Trouble::from),
            };
            if let Err(error) = done {
                return self.give_up(&chain(&error));
            }
        }
        "the link ended".into()
    }

    /// Tells the primary, and whoever looks, that it cannot go on; why.
    fn give_up(&mut self, detail: &str) -> String {
        tracing::error!(machine = %self.served.name, "cannot take changes: {detail}");
        self.served.progress.lock().problem = Some(detail.to_owned());
        // If space was the trouble, points give way.
        self.served.wake_upkeep();
        self.say(ToPrimary::Refused(Refusal::Failed {
            detail: detail.to_owned(),
        }));
        detail.to_owned()
    }

    fn say(&self, message: ToPrimary) {
        // The writer ends only with the link, which ends this session too.
        let _ = self.answers.send(message);
    }

    fn hear(&mut self, message: &ToReplica) -> Result<(), CompareError> {
        match message {
            ToReplica::Current { at } => self.served.progress.lock().rpo.current(*at),
            ToReplica::Compare(question) => self.compare(question)?,
            ToReplica::Hello(_)
            | ToReplica::HandOver { .. }
            | ToReplica::Return { .. }
            | ToReplica::Taken { .. } => {}
        }
        Ok(())
    }

    fn compare(&mut self, question: &Question) -> Result<(), CompareError> {
        let held = self.compared.take();
        let held = held.filter(|view| view.point.lineage == question.at);
        self.compared = match held.map_or_else(|| self.served.store.view_at(question.at), Ok) {
            Ok(view) => Some(view),
            // A merge was quicker.
            Err(ReplicaError::NoPoint(_)) => None,
            Err(error) => return Err(error.into()),
        };
        let view = self.compared.as_ref();
        self.say(ToPrimary::Compared {
            number: question.number,
            differs: view.map(|view| view.compare(question)).transpose()?,
        });
        Ok(())
    }

    fn begin(&mut self) -> Result<(), IngestError> {
        self.ingest = None;
        self.log += 1;
        self.ingest = Some(self.served.store.begin(self.generation)?);
        Ok(())
    }

    fn take(&mut self, piece: &Bytes) -> Result<(), Trouble> {
        let Some(ingest) = &mut self.ingest else {
            return Ok(());
        };
        self.quota.take(to_u64(piece.len()))?;
        let staged = ingest.feed(piece)?;
        while let Some(task) = ingest.write_due() {
            self.writers.run(task);
        }
        if self.syncer.is_idle()
            && let Some(task) = ingest.sync_due()?
        {
            self.syncer.run(self.log, task);
        }
        match self.receiver.received(to_u64(piece.len())) {
            Ok(Some(grant)) => self.say(grant),
            Ok(None) => {}
            Err(overrun) => tracing::warn!(machine = %self.served.name, "{overrun}"),
        }
        if let Some(event) = staged {
            self.report(event);
        }
        Ok(())
    }

    fn synced(
        &mut self,
        log: u64,
        synced: Result<IngestEvent, IngestError>,
    ) -> Result<(), IngestError> {
        let event = synced?;
        // What is durable of a log that was given up means nothing to the one that follows.
        if log == self.log {
            self.report(event);
        }
        Ok(())
    }

    fn report(&mut self, event: IngestEvent) {
        match event {
            IngestEvent::Durable { frames, .. } => {
                if matches!(self.served.store.head(), Head::Empty | Head::Copying) {
                    self.say(ToPrimary::Copied { frames });
                }
            }
            IngestEvent::Staged { lineage, cut } => {
                self.compared = None;
                self.say(ToPrimary::Staged { lineage });
                let mut progress = self.served.progress.lock();
                progress.problem = None;
                progress.epochs += 1;
                if lineage.epoch > crate::base::units::Epoch::INITIAL {
                    progress.rpo.durable(cut, self.served.clock.wall());
                }
                drop(progress);
                self.served.wake_upkeep();
            }
        }
    }
}

/// What a session tells the status.
#[derive(Debug, Default)]
pub(super) struct ReceiveProgress {
    pub(super) rpo: super::status::RpoRecord,
    /// Epochs staged since the node started.
    pub(super) epochs: u64,
    /// Why changes cannot be taken, until one was.
    pub(super) problem: Option<String>,
    /// The primary's name, while it is connected.
    pub(super) connected: Option<String>,
    /// Since when the primary has suspended the replication, as far as it said so.
    pub(super) suspended: Option<Timestamp>,
}

impl ReceiveProgress {
    /// Since when the primary has suspended the replication. What it said before a link that stands now is over.
    pub(super) fn suspended(&self) -> Option<Timestamp> {
        self.suspended.filter(|_| self.connected.is_none())
    }
}

/// Shared between the session, the upkeep thread and the status.
pub(super) type SharedProgress = Mutex<ReceiveProgress>;
