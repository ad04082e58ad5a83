//! The primary's replication thread: one for each machine that has a replica.
//!
//! ```text
//!   select: messages, commands, time  ->  Sender (decides)  ->  act: cut, take, pack, send, acknowledge
//! ```
//! The thread owns the conversation; only the link's tasks run beside it. It dials, talks until the link is lost, gives
//! what was under way back to the maps, waits and dials again. Guest writes never wait for any of this: they mark
//! their blocks and go on.

use std::{
    collections::VecDeque,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use crossbeam_channel::{Receiver, Sender as ChannelSender, after, select, unbounded};
use parking_lot::Mutex;
use tokio::runtime::Handle;

use super::{
    pipeline::{Pipeline, Raw},
    progress::{Phase, Progress},
};
use crate::{
    base::{
        clock::Clock,
        ids::{Generation, Ids, Lineage, MachineId, Name},
        limits::FRAME_BYTES_MAX,
        units::{BLOCK_BYTES, DiskIndex, Epoch, Extent, to_u64},
    },
    delta::{DiskEntry, EncodedFrame, Encoder, Header, LogKind, policy::Setting},
    net::{self, Backoff, Control, Identity, Link, LogSender, Reason},
    protocol::{
        message::{self, DiskSpec, Hello, ToPrimary, ToReplica, Version},
        sender::{Action, Agreement, Log, Pace, Sender, Side, StopReason},
    },
    volume::{
        self, CopyScope, Cut, CutRefused, Machine, PieceContent, Reconcile, ReplicaHead, Taken,
    },
};

/// Owed bytes of the open epoch from which on they are sent ahead of the cut.
const AHEAD_BYTES: u64 = 16 << 20;
/// How often an idle machine says that its head is current.
const CURRENT_EVERY: Duration = Duration::from_secs(1);
/// Longest sleep of the thread while a link stands.
const LOOK_EVERY: Duration = Duration::from_millis(20);
/// First and longest pause between two dials.
const REDIAL: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(30));
/// Log bytes after which the pace of the link is told to the compression policy.
const MEASURE_BYTES: u64 = 8 << 20;

/// What to replicate, and to whom.
#[derive(Debug)]
pub(super) struct Target {
    pub(super) address: String,
    pub(super) peer: Option<Name>,
    pub(super) identity: Identity,
    pub(super) interval: Duration,
    pub(super) compression: Setting,
}

/// The machine as its replica should know it.
#[derive(Clone, Debug)]
pub(super) struct Subject {
    pub(super) id: MachineId,
    pub(super) name: Name,
    pub(super) generation: Generation,
    pub(super) disks: Vec<DiskSpec>,
}

/// Waits for an answer to one command.
type Answer = ChannelSender<Result<Lineage, String>>;

enum Command {
    Cut(Answer),
    Stop,
}

enum Heard {
    Message(ToPrimary),
    Lost(String),
}

/// A running replication; it stops when this is dropped.
#[derive(Debug)]
pub(super) struct Replication {
    commands: ChannelSender<Command>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Replication {
    /// Starts the thread.
    pub(super) fn start(
        machine: Arc<Machine>,
        subject: Subject,
        target: Target,
        progress: Arc<Mutex<Progress>>,
        host: Host,
    ) -> std::io::Result<Self> {
        let (commands, receiver) = unbounded();
        let thread = thread::Builder::new()
            .name("replicate".into())
            .spawn(move || {
                let driver = Driver {
                    machine,
                    subject,
                    target,
                    progress,
                    host,
                    commands: receiver,
                };
                driver.run();
            })?;
        Ok(Self {
            commands,
            thread: Some(thread),
        })
    }

    /// Asks for a cut now; the answer comes when the epoch is durable on the replica.
    pub(super) fn request_cut(&self) -> PendingCut {
        let (answer, answered) = crossbeam_channel::bounded(1);
        // If the thread has ended the answer is dropped, which the caller sees when it waits.
        let _ = self.commands.send(Command::Cut(answer));
        PendingCut(answered)
    }
}

/// A cut that was asked for.
#[derive(Debug)]
pub(super) struct PendingCut(Receiver<Result<Lineage, String>>);

impl PendingCut {
    /// Waits until the epoch is durable on the replica.
    pub(super) fn wait(self) -> Result<Lineage, String> {
        self.0
            .recv()
            .unwrap_or_else(|_| Err("replication has stopped".into()))
    }
}

impl Drop for Replication {
    fn drop(&mut self) {
        // Both fail only if the thread has ended already, and then it has said why.
        let _ = self.commands.send(Command::Stop);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// What the node lends to the thread.
#[derive(Clone, Debug)]
pub(super) struct Host {
    pub(super) clock: Arc<dyn Clock>,
    pub(super) ids: Arc<dyn Ids>,
    pub(super) runtime: Handle,
}

struct Driver {
    machine: Arc<Machine>,
    subject: Subject,
    target: Target,
    progress: Arc<Mutex<Progress>>,
    host: Host,
    commands: Receiver<Command>,
}

/// Why a session ended.
enum End {
    /// The node is being stopped.
    Stop,
    /// The link was lost, or this host had to give up on it.
    Lost(String),
    /// The other side does not want to.
    Refused(StopReason),
}

impl Driver {
    fn run(self) {
        let mut backoff = Backoff::new(REDIAL.0, REDIAL.1);
        loop {
            let dialled = self.host.runtime.block_on(net::dial(
                &self.target.address,
                self.target.peer.as_ref(),
                &self.target.identity,
            ));
            let why = match dialled {
                Ok((link, control)) => {
                    let (end, was_replicating) = self.session(link, control);
                    if was_replicating {
                        backoff.reset();
                    }
                    match end {
                        End::Stop => return,
                        End::Lost(why) => {
                            self.progress.lock().phase = Phase::Unreachable(why.clone());
                            why
                        }
                        End::Refused(reason) => {
                            self.progress.lock().phase = Phase::Refused(reason.to_string());
                            reason.to_string()
                        }
                    }
                }
                Err(error) => {
                    let why = chain(&error);
                    self.progress.lock().phase = match error {
                        net::DialError::Refused { .. } => Phase::Refused(why.clone()),
                        _ => Phase::Unreachable(why.clone()),
                    };
                    why
                }
            };
            let random = self.host.ids.fresh();
            let pause = backoff.next(u32::from_le_bytes([
                random[0], random[1], random[2], random[3],
            ]));
            tracing::warn!(machine = %self.subject.name, retry_in = ?pause, "not replicating: {why}");
            if self.rest(pause, &why) {
                return;
            }
        }
    }

    /// Waits for `pause`; whether the node is being stopped.
    fn rest(&self, pause: Duration, why: &str) -> bool {
        let until = after(pause);
        loop {
            select! {
                recv(self.commands) -> command => match command {
                    Ok(Command::Cut(answer)) => {
                        let _ = answer.send(Err(format!("the replica cannot be reached: {why}")));
                    }
                    Ok(Command::Stop) | Err(_) => return true,
                },
                recv(until) -> _ => return false,
            }
        }
    }

    /// One link, from greeting to loss; and whether it came to replicating.
    fn session(&self, link: Link, control: Control) -> (End, bool) {
        let (heard, ears) = unbounded();
        let Control {
            sender: mouth,
            receiver,
        } = control;
        let listener = self
            .host
            .runtime
            .spawn(listen(receiver, link.clone(), heard));
        let workers = thread::available_parallelism().map_or(1, |n| n.get().min(4));
        let workers = u16::try_from(workers).expect("at most four");
        let pipeline = match Pipeline::start(self.target.compression, workers, &self.host.clock) {
            Ok(pipeline) => pipeline,
            Err(error) => {
                return (
                    End::Lost(format!("cannot start packing threads: {error}")),
                    false,
                );
            }
        };
        let pace = Pace {
            interval: self.target.interval,
            ahead_bytes: AHEAD_BYTES,
            current_every: CURRENT_EVERY,
        };
        let mut session = Session {
            driver: self,
            sender: Sender::new(pace),
            link: link.clone(),
            mouth,
            ears,
            pipeline,
            log: None,
            cut: None,
            waiting: Vec::new(),
            answering: Vec::new(),
            measured: (0, Duration::ZERO),
        };
        session.sender.connected(self.hello());
        let end = session.run();
        let replicated = session.sender.is_replicating();
        session.leave(&end);
        listener.abort();
        (end, replicated)
    }

    fn hello(&self) -> Hello {
        let Subject {
            id,
            name,
            generation,
            disks,
        } = self.subject.clone();
        Hello {
            version: Version::CURRENT,
            machine: id,
            name,
            generation,
            disks,
        }
    }
}

async fn listen(mut receiver: net::ControlReceiver, link: Link, heard: ChannelSender<Heard>) {
    loop {
        let next = match receiver.receive().await {
            Ok(Some(bytes)) => match message::decode_to_primary(&bytes) {
                Ok(message) => Heard::Message(message),
                Err(error) => Heard::Lost(chain(&error)),
            },
            Ok(None) => Heard::Lost(chain(&link.closed().await)),
            Err(error) => Heard::Lost(chain(&error)),
        };
        let last = matches!(next, Heard::Lost(_));
        if heard.send(next).is_err() || last {
            return;
        }
    }
}

/// A log that is being sent.
struct OpenLog {
    encoder: Encoder,
    stream: LogSender,
    /// Runs in the order of their frames, kept for the initial copy only: what a `Copied` stands for.
    runs: Option<VecDeque<(DiskIndex, Extent)>>,
    /// Frames that `runs` no longer holds.
    copied: u64,
}

struct Session<'a> {
    driver: &'a Driver,
    sender: Sender,
    link: Link,
    mouth: net::ControlSender,
    ears: Receiver<Heard>,
    pipeline: Pipeline,
    log: Option<OpenLog>,
    cut: Option<Cut>,
    /// Commands that wait for a cut.
    waiting: Vec<Answer>,
    /// Commands whose cut was made and is not durable yet.
    answering: Vec<Answer>,
    /// Bytes and time of saturated sending since the last measurement.
    measured: (u64, Duration),
}

impl Session<'_> {
    fn run(&mut self) -> End {
        match self.talk() {
            Ok(end) | Err(end) => end,
        }
    }

    fn talk(&mut self) -> Result<End, End> {
        loop {
            while let Some(action) = self.sender.poll() {
                self.act(action)?;
            }
            let idle = !self.advance()?;
            if let Some(end) = self.hear(idle) {
                return Ok(end);
            }
            let counters = self.driver.machine.counters();
            let clock = &self.driver.host.clock;
            self.sender
                .tick(clock.monotonic(), clock.wall(), counters.open_blocks > 0);
        }
    }

    /// Takes, packs and sends one step further; whether there was anything to do.
    fn advance(&mut self) -> Result<bool, End> {
        let mut busy = false;
        let owed = self.driver.machine.counters().owed_open_blocks * BLOCK_BYTES;
        if let Some(side) = self.sender.side(owed).filter(|_| self.pipeline.has_room()) {
            busy = self.take(side)?;
        }
        // Frames are sent as soon as they are packed; only a full pipeline is worth waiting for.
        while let Some(frame) = if self.pipeline.has_room() {
            self.pipeline.ready()
        } else {
            self.pipeline.next()
        } {
            self.send(frame)?;
            busy = true;
        }
        Ok(busy || !self.pipeline.is_empty())
    }

    /// Takes the next run owed to `side`; whether there was one.
    fn take(&mut self, side: Side) -> Result<bool, End> {
        let machine = &self.driver.machine;
        let (side, epoch) = match side {
            Side::Closing => (volume::Side::Closing, machine.closing_epoch()),
            Side::Open => (volume::Side::Open, Some(machine.open_epoch())),
        };
        let taken = match epoch {
            Some(epoch) => machine
                .take(side, epoch, FRAME_BYTES_MAX)
                .map_err(|error| End::Lost(chain(&error)))?,
            None => Taken::Superseded,
        };
        match taken {
            Taken::Piece(piece) => {
                let raw = match piece.content {
                    PieceContent::Data(bytes) => Raw::Data(bytes),
                    PieceContent::Zero => Raw::Zero,
                };
                self.pipeline.submit(piece.disk, piece.run, raw);
                return Ok(true);
            }
            Taken::Drained if side == volume::Side::Closing => self.sender.drained(Side::Closing),
            Taken::Drained => {}
            Taken::Superseded => self.superseded(),
        }
        Ok(false)
    }

    /// The closing epoch was merged into the open one: its log goes on, and whoever waits for its cut gets a later one.
    fn superseded(&mut self) {
        self.cut = None;
        self.waiting.append(&mut self.answering);
        if !self.waiting.is_empty() {
            self.sender.want_cut();
        }
        self.sender.merged();
    }

    fn hear(&mut self, idle: bool) -> Option<End> {
        let wait = if idle { LOOK_EVERY } else { Duration::ZERO };
        select! {
            recv(self.ears) -> heard => match heard {
                Ok(Heard::Message(message)) => self.sender.message(message),
                Ok(Heard::Lost(why)) => return Some(End::Lost(why)),
                Err(_) => return Some(End::Lost("the link ended".into())),
            },
            recv(self.driver.commands) -> command => match command {
                Ok(Command::Cut(answer)) => {
                    self.waiting.push(answer);
                    self.sender.want_cut();
                }
                Ok(Command::Stop) | Err(_) => return Some(End::Stop),
            },
            default(wait) => {}
        }
        None
    }

    fn act(&mut self, action: Action) -> Result<(), End> {
        match action {
            Action::Say(message) => self.say(&message),
            Action::Compare(head) => self.compare(head),
            Action::OpenLog(log) => self.open(log),
            Action::Cut => self.cut(),
            Action::Seal => self.seal(),
            Action::Copied(frames) => self.copied(frames),
            Action::Acknowledge(lineage) => self.acknowledge(lineage),
            Action::Stop(reason) => Err(End::Refused(reason)),
        }
    }

    fn say(&mut self, message: &ToReplica) -> Result<(), End> {
        let bytes = message::encode(message).into();
        self.driver
            .host
            .runtime
            .block_on(self.mouth.send(bytes))
            .map_err(|error| End::Lost(chain(&error)))
    }

    fn compare(&mut self, head: message::Head) -> Result<(), End> {
        let machine = &self.driver.machine;
        let lost = |error: volume::MachineError| End::Lost(chain(&error));
        let known = match head {
            message::Head::Complete(lineage) => ReplicaHead::At(lineage),
            message::Head::Empty => ReplicaHead::Empty,
            message::Head::Copying => ReplicaHead::Copying,
        };
        let reconciled = machine.reconcile(known).map_err(lost)?;
        let agreement = match (reconciled, head) {
            (Reconcile::InStep | Reconcile::AckLost, _) => Agreement::InStep,
            (Reconcile::CopyResumes, _) => Agreement::CopyNeeded,
            (Reconcile::CopyNeeded, message::Head::Complete(lineage)) => {
                // The replica keeps the points it has: what this host holds becomes one epoch on top of them.
                machine.begin_resync(lineage).map_err(lost)?;
                Agreement::InStep
            }
            (Reconcile::CopyNeeded, message::Head::Empty) => {
                machine
                    .begin_initial_copy(CopyScope::Allocated)
                    .map_err(lost)?;
                Agreement::CopyNeeded
            }
            (Reconcile::CopyNeeded, message::Head::Copying) => {
                // Half a copy of an unknown past lies there: holes have to be told as well.
                machine
                    .begin_initial_copy(CopyScope::Everything)
                    .map_err(lost)?;
                Agreement::CopyNeeded
            }
        };
        tracing::info!(machine = %self.driver.subject.name, ?head, ?reconciled, "connected to the replica");
        self.driver
            .progress
            .lock()
            .connected(agreement, machine, &*self.driver.host.clock);
        self.sender.agreed(agreement);
        Ok(())
    }

    fn open(&mut self, log: Log) -> Result<(), End> {
        let subject = &self.driver.subject;
        let (kind, parent) = match log {
            Log::InitialCopy => (LogKind::Initial, None),
            Log::Delta => (LogKind::Delta, self.driver.machine.lineage()),
        };
        let disks = subject.disks.iter().map(|disk| DiskEntry {
            name: disk.name.clone(),
            size: disk.size,
            logical_sector: disk.logical_sector,
            physical_sector: disk.physical_sector,
        });
        let header = Header {
            machine: subject.id,
            generation: subject.generation,
            kind,
            parent,
            disks: disks.collect(),
        };
        let (encoder, bytes) = Encoder::new(&header);
        let stream = self
            .driver
            .host
            .runtime
            .block_on(self.link.open_log())
            .map_err(|error| End::Lost(chain(&error)))?;
        let runs = (kind == LogKind::Initial).then(VecDeque::new);
        self.log = Some(OpenLog {
            encoder,
            stream,
            runs,
            copied: 0,
        });
        self.write(bytes)
    }

    fn cut(&mut self) -> Result<(), End> {
        match self.driver.machine.cut() {
            Ok(cut) => {
                self.cut = Some(cut);
                self.answering.append(&mut self.waiting);
                self.sender.was_cut(self.driver.host.clock.monotonic());
                Ok(())
            }
            Err(CutRefused::Closing(_)) => {
                self.sender.merged();
                Ok(())
            }
            Err(error) => Err(End::Lost(chain(&error))),
        }
    }

    fn send(&mut self, frame: EncodedFrame) -> Result<(), End> {
        let log = self
            .log
            .as_mut()
            .expect("frames are only taken while a log is open");
        log.encoder.frame(&frame);
        if let Some(runs) = &mut log.runs {
            runs.push_back((frame.header().disk, frame.header().run));
        }
        let raw = frame.header().run.len;
        let data = frame.header().payload_len > 0;
        let started = Instant::now();
        let bytes = frame.bytes().clone();
        let len = to_u64(bytes.len());
        self.write(bytes)?;
        self.measure(len, started.elapsed());
        self.driver
            .progress
            .lock()
            .sent(if data { raw } else { 0 }, len);
        Ok(())
    }

    fn write(&mut self, bytes: bytes::Bytes) -> Result<(), End> {
        self.sender.sent(to_u64(bytes.len()));
        let log = self.log.as_mut().expect("bytes belong to an open log");
        self.driver
            .host
            .runtime
            .block_on(log.stream.write_chunk(bytes))
            .map_err(|error| End::Lost(chain(&error)))
    }

    fn measure(&mut self, bytes: u64, took: Duration) {
        self.measured.0 += bytes;
        self.measured.1 += took;
        if self.measured.0 >= MEASURE_BYTES {
            let (bytes, took) = std::mem::take(&mut self.measured);
            self.pipeline.sent(bytes, took);
        }
    }

    fn seal(&mut self) -> Result<(), End> {
        while let Some(frame) = self.pipeline.next() {
            self.send(frame)?;
        }
        let log = self.log.take().expect("an epoch is sealed in its log");
        let clock = &self.driver.host.clock;
        let (epoch, time) = match &self.cut {
            Some(cut) => (cut.epoch, cut.time),
            // The initial copy has no cut: it is complete as of its end and consistent only with the next epoch.
            None => (Epoch::INITIAL, clock.wall()),
        };
        let OpenLog {
            encoder,
            mut stream,
            runs,
            copied,
        } = log;
        let (trailer, lineage) = encoder.finish(epoch, time);
        // A staged acknowledgement may get lost with the link. Whoever asks the replica then must know this lineage.
        self.driver
            .machine
            .pending(lineage)
            .map_err(|error| End::Lost(chain(&error)))?;
        self.sender.sent(to_u64(trailer.len()));
        let runtime = &self.driver.host.runtime;
        runtime
            .block_on(stream.write_chunk(trailer))
            .map_err(|error| End::Lost(chain(&error)))?;
        stream.finish().map_err(|error| End::Lost(chain(&error)))?;
        drop((runs, copied));
        self.sender.sealed(lineage);
        Ok(())
    }

    fn copied(&mut self, frames: u64) -> Result<(), End> {
        let Some(OpenLog {
            runs: Some(runs),
            copied,
            ..
        }) = &mut self.log
        else {
            return Ok(());
        };
        let count = usize::try_from(frames.saturating_sub(*copied)).unwrap_or(usize::MAX);
        if count > runs.len() {
            return Err(End::Refused(StopReason::Protocol(
                "more frames copied than were sent",
            )));
        }
        let done: Vec<_> = runs.drain(..count).collect();
        *copied = frames.max(*copied);
        self.driver.machine.copied(&done);
        Ok(())
    }

    fn acknowledge(&mut self, lineage: Lineage) -> Result<(), End> {
        self.driver
            .machine
            .staged(lineage)
            .map_err(|error| End::Lost(chain(&error)))?;
        let now = self.driver.host.clock.wall();
        self.driver
            .progress
            .lock()
            .durable(self.cut.take().map(|cut| cut.time), now);
        for answer in self.answering.drain(..) {
            // Whoever asked may have gone away.
            let _ = answer.send(Ok(lineage));
        }
        if !self.waiting.is_empty() {
            self.sender.want_cut();
        }
        Ok(())
    }

    /// Gives what was under way back to the maps and takes leave of the replica.
    fn leave(mut self, end: &End) {
        self.pipeline.clear();
        if let Some(log) = self.log.take() {
            log.stream.reset(Reason::Aborted);
        }
        self.sender.disconnected();
        self.driver.machine.disconnected();
        let (reason, text) = match end {
            End::Stop => (Reason::Stopping, "the primary is being stopped".to_owned()),
            End::Lost(why) => (Reason::Aborted, why.clone()),
            End::Refused(why) => (Reason::Protocol, why.to_string()),
        };
        self.link.close(reason, &text);
        self.driver.host.runtime.block_on(self.link.drained());
        for answer in self.waiting.drain(..).chain(self.answering.drain(..)) {
            let _ = answer.send(Err(format!("the link to the replica was lost: {text}")));
        }
    }
}

/// An error with its causes in one line.
pub(super) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        source = cause.source();
    }
    text
}
