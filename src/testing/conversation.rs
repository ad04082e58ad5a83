//! One link's conversation on the primary's side, driven step by step: `node::conversation` without its thread.

use std::{collections::VecDeque, sync::Arc};

use super::{
    content::Contents,
    host::machine_id,
    network::{Link, LogPart},
    oracle::{Broken, Oracle},
    record::told,
    setup::{Bug, Setup},
};
use crate::{
    base::{
        clock::{Clock, ManualClock},
        ids::{Generation, Lineage},
        units::{BLOCK_BYTES, DiskIndex, Epoch, Extent, to_u64},
    },
    delta::{
        DiskEntry, EncodedFrame, Encoder, Header, LogKind, encode_zero, policy::encode_sampled,
    },
    protocol::{
        compare::{Differing, Question, runs_of},
        message::{self, Hello, ToPrimary, ToReplica},
        sender::{Action, Log, Seen, Sender, Side, StopReason},
    },
    volume::{Cut, CutRefused, Machine, PieceContent, Reconcile, Taken},
};

/// Frames that are packed and not sent, at most.
const PACKED_MAX: usize = 8;

/// Why a conversation ended.
#[derive(Debug)]
pub(super) enum End {
    Lost(String),
    Refused(StopReason),
    /// The oracle saw something that must not be.
    Broken(Broken),
}

impl From<Broken> for End {
    fn from(broken: Broken) -> Self {
        Self::Broken(broken)
    }
}

/// What a conversation works with.
pub(super) struct Context<'a> {
    /// The host that is the primary.
    pub(super) host: usize,
    pub(super) machine: &'a Machine,
    pub(super) setup: &'a Setup,
    pub(super) clock: &'a Arc<ManualClock>,
    pub(super) link: &'a mut Link,
    pub(super) oracle: &'a mut Oracle,
    /// Whether no call ever failed on the primary.
    pub(super) calm: bool,
}

#[derive(Debug)]
struct OpenLog {
    encoder: Encoder,
    parent: Option<Lineage>,
    runs: Option<VecDeque<(DiskIndex, Extent)>>,
    copied: u64,
}

/// A conversation over one link.
#[derive(Debug)]
pub(super) struct Conversation {
    pub(super) link: u64,
    generation: Generation,
    disks: Vec<message::DiskSpec>,
    sender: Sender,
    packed: VecDeque<EncodedFrame>,
    log: Option<OpenLog>,
    cut: Option<Cut>,
    /// What the machine held at that cut.
    held: Option<Contents>,
    /// Where the suspects are that the replica was asked about, the oldest question first.
    asked: VecDeque<Vec<(DiskIndex, Extent)>>,
}

impl Conversation {
    /// A link stands: the greeting is the first thing to say.
    pub(super) fn new(link: u64, setup: &Setup, hello: Hello) -> Self {
        let mut sender = Sender::new(setup.pace);
        let (generation, disks) = (hello.claim.generation, hello.disks.clone());
        sender.connected(hello);
        Self {
            link,
            generation,
            disks,
            sender,
            packed: VecDeque::new(),
            log: None,
            cut: None,
            held: None,
            asked: VecDeque::new(),
        }
    }

    /// Asks for a cut now.
    pub(super) fn request_cut(&mut self) {
        self.sender.want_cut();
    }

    /// Does what was decided, takes and sends a step further, and lets time pass.
    pub(super) fn work(&mut self, context: &mut Context<'_>, send: usize) -> Result<(), End> {
        while let Some(action) = self.sender.poll() {
            self.act(action, context)?;
        }
        let owed = context.machine.counters().owed_open_blocks * BLOCK_BYTES;
        if self.packed.len() < PACKED_MAX
            && let Some(side) = self.sender.side(owed)
        {
            self.take(side, context)?;
        }
        for _ in 0..send {
            let Some(frame) = self.packed.pop_front() else {
                break;
            };
            self.send(&frame, context);
        }
        let (now, wall) = (context.clock.monotonic(), context.clock.wall());
        let counters = context.machine.counters();
        let seen = Seen {
            changed: counters.open_blocks > 0,
            suspects: counters.suspect_blocks > 0,
        };
        self.sender.tick(now, wall, seen);
        if seen.suspects && self.sender.may_ask() {
            self.ask(context)?;
        }
        Ok(())
    }

    /// Asks about the next suspects.
    fn ask(&mut self, context: &mut Context<'_>) -> Result<(), End> {
        let Some(at) = context.machine.lineage() else {
            return Ok(());
        };
        let samples = context.machine.ask();
        let samples = samples.map_err(|error| End::Lost(told(error)))?;
        if samples.is_empty() {
            return Ok(());
        }
        self.asked.push_back(runs_of(&samples));
        context.link.say(ToReplica::Compare(Question {
            number: self.sender.ask(),
            at,
            samples,
        }));
        Ok(())
    }

    fn answered(
        &mut self,
        differing: Option<&Differing>,
        context: &Context<'_>,
    ) -> Result<(), End> {
        let runs = self.asked.pop_front();
        let runs = runs.ok_or_else(|| End::Broken("an answer without a question".into()))?;
        let differing =
            differing.ok_or_else(|| End::Broken("P2: the replica's head is gone".into()))?;
        let sifted = context.machine.answered(&runs, differing);
        sifted.ok_or_else(|| End::Broken("an answer about other blocks".into()))?;
        Ok(())
    }

    /// The replica said something.
    pub(super) fn hear(
        &mut self,
        message: ToPrimary,
        context: &mut Context<'_>,
    ) -> Result<(), End> {
        let staged = matches!(message, ToPrimary::Staged { .. });
        if staged && context.setup.has(Bug::AcknowledgedUnheard) {
            return Ok(());
        }
        self.sender.message(message);
        while let Some(action) = self.sender.poll() {
            self.act(action, context)?;
        }
        Ok(())
    }

    /// Gives what was under way back to the maps.
    pub(super) fn leave(mut self, machine: &Machine) {
        self.sender.disconnected();
        machine.disconnected();
    }

    fn take(&mut self, side: Side, context: &mut Context<'_>) -> Result<(), End> {
        let machine = context.machine;
        let epoch = match side {
            Side::Closing => machine.closing_epoch(),
            Side::Open => Some(machine.open_epoch()),
        };
        let taken = match epoch {
            Some(epoch) => machine
                .take(side, epoch, context.setup.take_bytes)
                .map_err(|error| End::Lost(told(error)))?,
            None => Taken::Superseded,
        };
        match taken {
            Taken::Piece(piece) => self.packed.push_back(match piece.content {
                PieceContent::Zero => encode_zero(piece.disk, piece.run),
                PieceContent::Data(bytes) => {
                    encode_sampled(piece.disk, piece.run.offset, bytes, context.setup.codec)
                }
            }),
            Taken::Drained if side == Side::Closing => self.sender.drained(Side::Closing),
            Taken::Drained => {}
            Taken::Superseded if self.sender.is_copying() => {
                return Err(End::Lost("the initial copy was begun anew".into()));
            }
            Taken::Superseded => {
                if context.setup.has(Bug::MergedFramesLost) {
                    self.packed.clear();
                }
                self.cut = None;
                self.held = None;
                self.sender.merged();
            }
        }
        Ok(())
    }

    fn act(&mut self, action: Action, context: &mut Context<'_>) -> Result<(), End> {
        match action {
            Action::Say(message) => {
                context.link.say(message);
                Ok(())
            }
            Action::Compare(head) => self.compare(head, context),
            Action::OpenLog(log) => {
                self.open(log, context);
                Ok(())
            }
            Action::Cut => self.cut(context),
            Action::Seal => self.seal(context),
            Action::Copied(frames) => self.copied(frames, context),
            Action::Answered(differing) => self.answered(differing.as_ref(), context),
            Action::Acknowledge(lineage) => self.acknowledge(lineage, context),
            Action::Stop(reason) => Err(End::Refused(reason)),
        }
    }

    fn compare(&mut self, head: message::Head, context: &mut Context<'_>) -> Result<(), End> {
        let machine = context.machine;
        let before = machine.lineage();
        let agreed = machine.agree(head);
        let (reconciled, agreement) = agreed.map_err(|error| End::Lost(told(error)))?;
        let at = matches!(head, message::Head::Copied(_) | message::Head::Complete(_));
        if reconciled == Reconcile::CopyNeeded && context.calm && (before.is_some() || at) {
            return Err(End::Broken(format!(
                "P3: the whole disks have to be sent, from {before:?} to {head:?}, and nothing was wrong"
            )));
        }
        self.sender.agreed(agreement);
        if machine.state().resync.is_some() {
            self.sender.want_cut();
        }
        Ok(())
    }

    fn open(&mut self, log: Log, context: &mut Context<'_>) {
        let (kind, parent) = match log {
            Log::InitialCopy => (LogKind::Initial, None),
            Log::Delta => (LogKind::Delta, context.machine.lineage()),
        };
        let disks = self.disks.iter().map(|disk| DiskEntry {
            name: disk.name.clone(),
            size: disk.size,
            logical_sector: disk.logical_sector,
            physical_sector: disk.physical_sector,
        });
        let header = Header {
            machine: machine_id(),
            generation: self.generation,
            kind,
            parent,
            disks: disks.collect(),
        };
        let (encoder, bytes) = Encoder::new(&header);
        let runs = (kind == LogKind::Initial).then(VecDeque::new);
        self.log = Some(OpenLog {
            encoder,
            parent,
            runs,
            copied: 0,
        });
        context.link.send(LogPart::Begin);
        self.sender.sent(to_u64(bytes.len()));
        context.link.send(LogPart::Bytes(bytes));
    }

    fn cut(&mut self, context: &mut Context<'_>) -> Result<(), End> {
        match context.machine.cut() {
            Ok(cut) => {
                self.cut = Some(cut);
                self.held = context.oracle.held(context.host);
                self.sender.was_cut(context.clock.monotonic());
                Ok(())
            }
            Err(CutRefused::Closing(_) | CutRefused::Suspects(_)) => {
                self.sender.merged();
                Ok(())
            }
            Err(error) => Err(End::Lost(told(error))),
        }
    }

    fn send(&mut self, frame: &EncodedFrame, context: &mut Context<'_>) {
        let Some(log) = &mut self.log else {
            return;
        };
        log.encoder.frame(frame);
        if let Some(runs) = &mut log.runs {
            runs.push_back((frame.header().disk, frame.header().run));
        }
        if context.setup.has(Bug::CopiedUnheard) {
            context
                .machine
                .copied(&[(frame.header().disk, frame.header().run)]);
        }
        for part in frame.parts() {
            self.sender.sent(to_u64(part.len()));
            context.link.send(LogPart::Bytes(part));
        }
    }

    fn seal(&mut self, context: &mut Context<'_>) -> Result<(), End> {
        while let Some(frame) = self.packed.pop_front() {
            self.send(&frame, context);
        }
        let Some(log) = self.log.take() else {
            return Err(End::Broken("an epoch is sealed without a log".into()));
        };
        let (epoch, time) = match &self.cut {
            Some(cut) => (cut.epoch, cut.time),
            None => (Epoch::INITIAL, context.clock.wall()),
        };
        let (trailer, lineage) = log.encoder.finish(epoch, time);
        if !context.setup.has(Bug::PendingNotNoted) {
            let noted = context.machine.pending(lineage);
            noted.map_err(|error| End::Lost(told(error)))?;
        }
        context
            .oracle
            .sealed(lineage, log.parent, self.held.take())?;
        self.sender.sent(to_u64(trailer.len()));
        context.link.send(LogPart::Bytes(trailer));
        context.link.send(LogPart::End);
        self.sender.sealed(lineage);
        if context.setup.has(Bug::AcknowledgedUnheard) {
            self.sender.message(ToPrimary::Staged { lineage });
        }
        Ok(())
    }

    fn copied(&mut self, frames: u64, context: &mut Context<'_>) -> Result<(), End> {
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
            return Err(End::Broken("more frames copied than were sent".into()));
        }
        let done: Vec<_> = runs.drain(..count).collect();
        *copied = frames.max(*copied);
        context.machine.copied(&done);
        Ok(())
    }

    fn acknowledge(&mut self, lineage: Lineage, context: &mut Context<'_>) -> Result<(), End> {
        let staged = context.machine.staged(lineage);
        staged.map_err(|error| End::Lost(told(error)))?;
        self.cut = None;
        Ok(())
    }
}
