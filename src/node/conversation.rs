//! One link's conversation on the primary's side: what the [`Sender`] decides is done here, on the replication thread.
//!
//! Whatever ends it, [`Conversation::run`] gives the blocks of an unfinished log back to the maps before it returns: the
//! next conversation starts from what the maps and the replica know, and from nothing else.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

use bytes::Bytes;
use crossbeam_channel::{Receiver, never, select};

mod compare;
mod hold;

use self::compare::About;
use super::{
    driver::{BeginAnswer, Command, CutAnswer, Driver, Heard},
    pipeline::{Pipeline, Raw},
    portable::export::Export,
    sync_flush::Flushes,
};
use crate::{
    base::{
        chain::chain,
        ids::Lineage,
        limits::{DELTA_FRAMES_MAX, FRAME_BYTES_MAX},
        units::{BLOCK_BYTES, DiskIndex, Epoch, Extent, to_u64, to_usize},
    },
    delta::{EncodedFrame, Encoder, LogKind},
    net::{self, Link, LinkError, LogSender, Reason},
    protocol::{
        message::{self, ToReplica},
        sender::{Action, Agreement, Log, Pace, Seen, Sender, Side, StopReason},
    },
    volume::{Cut, CutRefused, PieceContent, Taken},
};

/// Longest sleep of the thread while a link stands.
const LOOK_EVERY: Duration = Duration::from_millis(20);
/// Log bytes after which the pace of the link is told to the compression policy.
const MEASURE_BYTES: u64 = 8 << 20;

/// Why a session ended.
pub(super) enum End {
    /// The node is being stopped.
    Stop,
    /// The machine is suspended, and nothing was under way any more.
    Suspended,
    /// The initial copy is written to a portable disk first.
    Export(Export),
    /// The link was lost, or this host had to give up on it.
    Lost(String),
    /// The other side does not want to.
    Refused(StopReason),
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

/// A conversation over one link.
pub(super) struct Conversation<'a> {
    driver: &'a Driver,
    sender: Sender,
    link: Link,
    mouth: net::ControlSender,
    ears: Receiver<Heard>,
    pipeline: Pipeline,
    log: Option<OpenLog>,
    cut: Option<Cut>,
    /// Commands that wait for a cut.
    waiting: Vec<CutAnswer>,
    /// Commands whose cut was made and is not durable yet.
    answering: Vec<CutAnswer>,
    /// Commands that wait until no epoch is closing.
    demanding: Vec<BeginAnswer>,
    /// Whether it ends as soon as nothing is under way.
    suspending: bool,
    /// What the replica has, while the initial copy waits. Nothing was compared yet.
    held: Option<message::Head>,
    /// A wish for an export that was not judged yet.
    export: Option<Export>,
    /// What the questions on the way are about, the oldest first.
    asked: VecDeque<About>,
    /// Bytes and time of saturated sending since the last measurement.
    measured: (u64, Duration),
}

impl<'a> Conversation<'a> {
    /// A conversation that has not begun.
    pub(super) fn new(
        driver: &'a Driver,
        pace: Pace,
        link: Link,
        mouth: net::ControlSender,
        ears: Receiver<Heard>,
        pipeline: Pipeline,
    ) -> Self {
        let sender = Sender::new(pace);
        let (log, cut, measured) = (None, None, (0, Duration::ZERO));
        let (waiting, answering, demanding) = (Vec::new(), Vec::new(), Vec::new());
        Self {
            driver,
            sender,
            link,
            mouth,
            ears,
            pipeline,
            log,
            cut,
            waiting,
            answering,
            demanding,
            suspending: false,
            held: None,
            export: None,
            asked: VecDeque::new(),
            measured,
        }
    }

    /// Talks until the link is lost or the node stops; and whether it came to replicating.
    pub(super) fn run(mut self) -> (End, bool) {
        self.sender.connected(self.driver.hello());
        let (Ok(end) | Err(end)) = self.talk();
        let replicated = self.sender.is_replicating() || self.held.is_some();
        self.leave(&end);
        (end, replicated)
    }

    fn talk(&mut self) -> Result<End, End> {
        loop {
            while let Some(action) = self.sender.poll() {
                self.act(action)?;
            }
            // What was staged is acknowledged by now.
            if let Some(export) = self.may_export() {
                return Ok(End::Export(export));
            }
            if let Some(head) = self.held.take_if(|_| !self.driver.waits_to_copy()) {
                self.compare(head)?;
            }
            if self.suspending && !self.sender.is_closing() {
                return Ok(End::Suspended);
            }
            if self.sender.is_open() {
                self.begin_demanded();
            }
            let idle = !self.advance()?;
            if let Some(end) = self.hear(idle) {
                return Ok(end);
            }
            if self.flushes(Flushes::want_cut) == Some(true) {
                self.sender.want_cut();
            }
            let clock = &self.driver.host.clock;
            // The time before the counters: a write in between must not be declared part of what the replica has.
            let (now, wall) = (clock.monotonic(), clock.wall());
            let counters = self.driver.machine.counters();
            let seen = Seen {
                changed: counters.open_blocks > 0,
                suspects: counters.suspect_blocks > 0,
            };
            self.sender.tick(now, wall, seen);
        }
    }

    /// Takes, packs and sends one step further; whether there was anything to do.
    fn advance(&mut self) -> Result<bool, End> {
        let mut busy = false;
        let owed = self.driver.machine.counters().owed_open_blocks * BLOCK_BYTES;
        if let Some(side) = self.sender.side(owed).filter(|_| self.pipeline.has_room()) {
            busy = self.take(side)?;
        }
        if self.sender.may_ask() {
            busy |= self.ask()? || self.verify()?;
        }
        // Frames are sent as soon as they are packed. The oldest one is waited for where there is nothing else to do, or
        // no room for more.
        while let Some(frame) = self.pipeline.ready() {
            self.send(&frame)?;
            busy = true;
        }
        if (!busy || !self.pipeline.has_room())
            && let Some(frame) = self.pipeline.next()
        {
            self.send(&frame)?;
            busy = true;
        }
        Ok(busy)
    }

    /// Takes the next run owed to `side`; whether that led to anything.
    fn take(&mut self, side: Side) -> Result<bool, End> {
        let machine = &self.driver.machine;
        let epoch = match side {
            Side::Closing => machine.closing_epoch(),
            Side::Open => Some(machine.open_epoch()),
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
            Taken::Drained if side == Side::Closing => self.sender.drained(Side::Closing),
            Taken::Drained => return Ok(false),
            // Nothing merges an initial copy; if it is gone all the same, the next conversation finds out what is left.
            Taken::Superseded if self.sender.is_copying() => {
                return Err(End::Lost("the initial copy was begun anew".into()));
            }
            Taken::Superseded => self.superseded(),
        }
        Ok(true)
    }

    /// The closing epoch was merged into the open one: its log goes on, and whoever waits for its cut gets a later one.
    fn superseded(&mut self) {
        self.cut = None;
        self.flushes(Flushes::merged);
        self.waiting.append(&mut self.answering);
        if !self.waiting.is_empty() {
            self.sender.want_cut();
        }
        self.sender.merged();
    }

    fn hear(&mut self, idle: bool) -> Option<End> {
        let wait = if idle { LOOK_EVERY } else { Duration::ZERO };
        let flushes = self.driver.flushes.as_ref();
        let flushes = flushes.map_or_else(never, |flushes| flushes.asked().clone());
        select! {
            // Nothing but a reason to look; what is wanted is asked for before time passes.
            recv(flushes) -> _ => {}
            recv(self.ears) -> heard => match heard {
                Ok(Heard::Message(message)) => self.sender.message(message),
                Ok(Heard::Lost(why)) => return Some(End::Lost(why)),
                Err(_) => return Some(End::Lost("the link ended".into())),
            },
            recv(self.driver.commands) -> command => match command {
                Ok(Command::Cut(answer)) if self.held.is_some() => {
                    let _ = answer.send(Err(self.driver.told_to_wait()));
                }
                Ok(Command::Resync(answer)) if self.held.is_some() => {
                    let _ = answer.send(Err(self.driver.told_to_wait()));
                }
                Ok(Command::Cut(answer)) => {
                    self.waiting.push(answer);
                    self.sender.want_cut();
                }
                Ok(Command::Resync(answer)) => self.demanding.push(answer),
                Ok(Command::Verify(request, answer)) => {
                    // Whoever asked may have gone away.
                    let _ = answer.send(self.driver.begin_verify(request));
                }
                Ok(Command::Export(export)) => {
                    if let Some(before) = self.export.replace(export) {
                        before.refuse("another export was asked for".into());
                    }
                }
                Ok(Command::Suspend) => self.suspending = true,
                Ok(Command::Stop) | Err(_) => return Some(End::Stop),
            },
            default(wait) => {}
        }
        None
    }

    fn act(&mut self, action: Action) -> Result<(), End> {
        match action {
            Action::Say(message) => self.say(&message).map(|_| ()),
            Action::Compare(head) => self.compare(head),
            Action::OpenLog(log) => self.open(log),
            Action::Cut => self.cut(),
            Action::Seal => self.seal(),
            Action::Copied(frames) => self.copied(frames),
            Action::Answered(differing) => self.answered(differing.as_ref()),
            Action::Acknowledge(lineage) => self.acknowledge(lineage),
            Action::Stop(reason) => Err(End::Refused(reason)),
        }
    }

    /// Tells or asks the guest's flushes, if they wait for the replica.
    fn flushes<T>(&self, tell: impl FnOnce(&Flushes) -> T) -> Option<T> {
        self.driver.flushes.as_deref().map(tell)
    }

    /// Says it; how many bytes that took.
    fn say(&mut self, message: &ToReplica) -> Result<u64, End> {
        let bytes = message::encode(message);
        let len = to_u64(bytes.len());
        done(self.driver.until_stopped(self.mouth.send(bytes.into())))?;
        Ok(len)
    }

    fn compare(&mut self, head: message::Head) -> Result<(), End> {
        let has_nothing = matches!(head, message::Head::Empty | message::Head::Copying);
        if has_nothing && self.driver.waits_to_copy() {
            self.hold(head);
            return Ok(());
        }
        let machine = &self.driver.machine;
        let agreed = machine.agree(head);
        let (reconciled, agreement) = agreed.map_err(|error| End::Lost(chain(&error)))?;
        tracing::info!(machine = %self.driver.subject.name, ?head, ?reconciled, "connected to the replica");
        let complete = matches!(head, message::Head::Complete(_));
        self.driver.progress.lock().connected(
            agreement,
            complete,
            machine,
            &*self.driver.host.clock,
        );
        self.flushes(|flushes| flushes.linked(complete && agreement == Agreement::InStep));
        self.sender.agreed(agreement);
        if machine.state().resync.is_some() {
            // Also if nothing is left to compare: the resync ends with an epoch.
            self.sender.want_cut();
        }
        Ok(())
    }

    fn open(&mut self, log: Log) -> Result<(), End> {
        let (kind, parent) = match log {
            Log::InitialCopy => (LogKind::Initial, None),
            Log::Delta => (LogKind::Delta, self.driver.machine.lineage()),
        };
        let header = self.driver.header(kind, parent);
        let (encoder, bytes) = Encoder::new(&header);
        let stream = done(self.driver.until_stopped(self.link.open_log()))?;
        let runs = (kind == LogKind::Initial).then(VecDeque::new);
        self.log = Some(OpenLog {
            encoder,
            stream,
            runs,
            copied: 0,
        });
        self.write(&mut [bytes])
    }

    fn cut(&mut self) -> Result<(), End> {
        self.flushes(Flushes::cutting);
        match self.driver.machine.cut() {
            Ok(cut) => {
                self.cut = Some(cut);
                self.answering.append(&mut self.waiting);
                self.sender.was_cut(self.driver.host.clock.monotonic());
                Ok(())
            }
            Err(CutRefused::Closing(_) | CutRefused::Suspects(_)) => {
                self.flushes(Flushes::merged);
                self.sender.merged();
                Ok(())
            }
            Err(error) => Err(End::Lost(chain(&error))),
        }
    }

    fn send(&mut self, frame: &EncodedFrame) -> Result<(), End> {
        let log = self
            .log
            .as_mut()
            .expect("frames are only taken while a log is open");
        if log.encoder.is_full() {
            return Err(End::Lost(format!(
                "more changed in one epoch than {DELTA_FRAMES_MAX} frames of a log hold"
            )));
        }
        log.encoder.frame(frame);
        if let Some(runs) = &mut log.runs {
            runs.push_back((frame.header().disk, frame.header().run));
        }
        let raw = frame.header().run.len;
        let data = frame.header().payload_len > 0;
        let started = Instant::now();
        let len = frame.header().frame_len();
        self.write(&mut frame.parts())?;
        self.measure(len, started.elapsed());
        self.driver
            .progress
            .lock()
            .sent(if data { raw } else { 0 }, len);
        Ok(())
    }

    fn write(&mut self, parts: &mut [Bytes]) -> Result<(), End> {
        let log = self.log.as_mut().expect("bytes belong to an open log");
        self.sender.sent(self.driver.write(&mut log.stream, parts)?);
        Ok(())
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
            self.send(&frame)?;
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
            ..
        } = log;
        let (trailer, lineage) = encoder.finish(epoch, time);
        // A staged acknowledgement may get lost with the link. Whoever asks the replica then must know this lineage.
        self.driver
            .machine
            .pending(lineage)
            .map_err(|error| End::Lost(chain(&error)))?;
        let sent = self.driver.write(&mut stream, &mut [trailer])?;
        self.sender.sent(sent);
        stream.finish().map_err(|error| End::Lost(chain(&error)))?;
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
        let cut = self.cut.take();
        if cut.is_some() {
            self.flushes(Flushes::durable);
        }
        self.driver
            .progress
            .lock()
            .durable(cut.map(|cut| cut.time), &*self.driver.host.clock);
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
        self.unanswered();
        let (reason, text) = match end {
            End::Stop if !self.driver.is_suspended() => {
                (Reason::Stopping, "the primary is being stopped".to_owned())
            }
            End::Stop | End::Suspended => {
                (Reason::Suspended, "suspended by an operator".to_owned())
            }
            End::Export(_) => (
                Reason::Done,
                "the initial copy is being exported".to_owned(),
            ),
            End::Lost(why) => (Reason::Aborted, why.clone()),
            End::Refused(why) => (Reason::Protocol, why.to_string()),
        };
        self.flushes(|flushes| flushes.unlinked(&text));
        self.link.close(reason, &text);
        self.driver.host.runtime.block_on(self.link.drained());
        if let Some(export) = self.export.take() {
            export.refuse(format!("the link to the replica was lost: {text}"));
        }
        for answer in self.waiting.drain(..).chain(self.answering.drain(..)) {
            let _ = answer.send(Err(format!("the link to the replica was lost: {text}")));
        }
        for answer in self.demanding.drain(..) {
            let _ = answer.send(self.driver.begin_demanded());
        }
    }
}

impl Driver {
    /// Sends `parts` of a log as fast as the link takes them and the limits allow; how many bytes these are.
    fn write(&self, stream: &mut LogSender, parts: &mut [Bytes]) -> Result<u64, End> {
        let len = parts.iter().map(|part| to_u64(part.len())).sum();
        let mut left = len;
        while left > 0 {
            let bytes = match self.target.pacing.pass(left) {
                Ok(bytes) => bytes,
                Err(wait) => {
                    let waited = self.until_stopped(async { tokio::time::sleep(wait).await });
                    waited.ok_or(End::Stop)?;
                    continue;
                }
            };
            if bytes == left {
                done(self.until_stopped(stream.write_chunks(parts)))?;
            } else {
                let mut first = split_first(parts, to_usize(bytes));
                done(self.until_stopped(stream.write_chunks(&mut first)))?;
            }
            left -= bytes;
            let now = self.host.clock.monotonic();
            self.progress.lock().meter.add(bytes, now);
        }
        Ok(len)
    }
}

/// Takes the first `count` bytes out of `parts`, which hold more.
fn split_first(parts: &mut [Bytes], mut count: usize) -> Vec<Bytes> {
    let mut first = Vec::with_capacity(parts.len());
    for part in parts {
        let taken = part.split_to(count.min(part.len()));
        count -= taken.len();
        first.push(taken);
    }
    first
}

/// What became of a call on the link: nothing means that the node is being stopped.
fn done<T>(outcome: Option<Result<T, LinkError>>) -> Result<T, End> {
    match outcome {
        Some(Ok(value)) => Ok(value),
        Some(Err(error)) => Err(End::Lost(chain(&error))),
        None => Err(End::Stop),
    }
}
