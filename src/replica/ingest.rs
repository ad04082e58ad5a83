//! Receiving one log.
//!
//! A delta is appended to `incoming.part` as it comes; the decoder looks at the same bytes. At the trailer everything is
//! verified, made durable, renamed, recorded, and only then reported as staged. An initial copy is applied to the base
//! images frame by frame; what was applied is reported as durable after each sync. Its long frames are [`WriteTask`]s,
//! which may be carried out by others while more of it is received: see `writes`.
//!
//! # Crash contract
//! See the head of [`replica`](super). Dropping an [`Ingest`] at any time is like a crash, only tidier.

use std::{
    collections::VecDeque,
    sync::{Arc, atomic::Ordering},
};

use bytes::Bytes;

use super::{
    error::{IngestError, ReplicaError},
    log::{LogFile, log_name},
    part::Part,
    record::{Base, BasePoint, Record},
    state::{Complete, Shared, State, Unsure},
    status::Head,
    store::{MachineReplica, disk_failed},
    writes::{WriteTask, Writes},
};
use crate::{
    base::{
        clock::Timestamp,
        ids::{Generation, Lineage},
        limits::FRAME_BYTES_MAX,
        units::{KIB, to_u64, to_usize},
    },
    delta::{Decoder, Event, FrameHeader, Header, LogKind, Trailer},
    disk::{Disk, Fua, Space},
    storage::Storage,
};

const PART_NAME: &str = "incoming.part";
/// One frame's worth at a time: the decoder holds no more, whatever the caller brings.
const PIECE_BYTES: usize = to_usize(FRAME_BYTES_MAX);
/// A shorter write is not worth the way to another thread.
const TASK_BYTES_MIN: usize = to_usize(128 * KIB);

/// What became of the bytes of a log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IngestEvent {
    /// So much of the log, counted from its start, survives a power cut of this host. Of an initial copy these frames
    /// need not be sent again; a delta that is not staged in the end has to be sent again as a whole.
    Durable {
        /// Frames.
        frames: u64,
        /// Bytes of the log.
        bytes: u64,
    },
    /// The log is complete, verified and durable: the primary may forget that these blocks changed.
    Staged {
        /// The new head.
        lineage: Lineage,
        /// When the cut was made.
        cut: Timestamp,
    },
}

/// A log on its way in. One at a time for each replica; dropping it gives up.
#[derive(Debug)]
pub struct Ingest {
    shared: Arc<Shared>,
    generation: Generation,
    decoder: Decoder,
    received: u64,
    frames: u64,
    /// `received` at the last sync.
    synced: u64,
    stage: Stage,
    /// Writes of an initial copy that were begun.
    writes: Arc<Writes>,
    /// Those of them that nobody carries out yet: no more than one piece brings.
    due: VecDeque<WriteTask>,
}

/// Where the bytes go.
#[derive(Debug)]
enum Stage {
    /// The header is not complete: these bytes are kept.
    Header(Vec<u8>),
    /// Into a file.
    Delta(Part),
    /// Into the base images.
    Initial {
        disks: Vec<Arc<dyn Disk>>,
        header: Header,
    },
    /// The log was staged.
    Done,
    /// The log was refused.
    Failed,
}

impl MachineReplica {
    /// Begins to receive a log from a primary of `generation`.
    pub fn begin(&self, generation: Generation) -> Result<Ingest, IngestError> {
        let mut state = self.shared.state()?;
        if state.receiving {
            return Err(IngestError::Busy);
        }
        self.shared.conclude(&mut state)?;
        if state.record.is_none() {
            return Err(ReplicaError::NotPrepared.into());
        }
        check_generation(&state, generation)?;
        state.receiving = true;
        state.blank = false;
        Ok(Ingest {
            shared: Arc::clone(&self.shared),
            generation,
            decoder: Decoder::new(),
            received: 0,
            frames: 0,
            synced: 0,
            stage: Stage::Header(Vec::new()),
            writes: Arc::new(Writes::new(Arc::clone(&self.shared))),
            due: VecDeque::new(),
        })
    }
}

impl MachineReplica {
    /// How far it is, for a primary that goes on from there. An error if that cannot be said: the last log is complete,
    /// and it could not be recorded now either. The primary asks again.
    pub fn settled_head(&self) -> Result<Head, ReplicaError> {
        let mut state = self.shared.state()?;
        self.shared.conclude(&mut state)?;
        Ok(state.head())
    }
}

impl Shared {
    /// Records what is complete, if anything waits for that. Until it succeeds nobody knows whether the ledger names it,
    /// so that no head is told and no log taken in; the next open decides otherwise.
    fn conclude(&self, state: &mut State) -> Result<(), ReplicaError> {
        let Some(Unsure { generation, what }) = state.unsure.clone() else {
            return Ok(());
        };
        let record = state.record.clone().ok_or(ReplicaError::NotPrepared)?;
        let (head, base) = match &what {
            Complete::Delta(log) => {
                self.sync_folder()?;
                (log.lineage(), record.base)
            }
            Complete::Initial(point) => (point.lineage, Base::At(*point)),
        };
        let recorded = Record {
            head: Some(head),
            generation: Some(generation),
            base,
            ..record
        };
        self.record(state, recorded)?;
        state.unsure = None;
        if let Complete::Delta(log) = what {
            state.push_log(log);
        }
        Ok(())
    }
}

fn check_generation(state: &State, found: Generation) -> Result<(), IngestError> {
    let known = state.record.as_ref().and_then(|record| record.generation);
    match known {
        Some(known) if found.number < known.number => Err(IngestError::Fenced { known, found }),
        Some(known) if found.number == known.number && found.id != known.id => {
            Err(IngestError::SplitBrain { known, found })
        }
        _ => Ok(()),
    }
}

impl Ingest {
    /// Takes the next bytes of the log, writes them, and syncs whenever that is due. After an error the log is lost and
    /// every later call fails.
    pub fn push(&mut self, bytes: &[u8]) -> Result<Vec<IngestEvent>, IngestError> {
        let mut events = Vec::new();
        for piece in bytes.chunks(PIECE_BYTES) {
            events.extend(self.feed(piece)?);
            self.settle().inspect_err(|_| self.fail())?;
            if let Some(task) = self.sync_due()? {
                events.push(task.run()?);
            }
        }
        Ok(events)
    }

    /// As [`Ingest::push`], but leaves it to the caller to ask for writes and for a sync, and to run them where they
    /// disturb nobody. A write that failed fails a later call.
    pub fn feed(&mut self, bytes: &[u8]) -> Result<Option<IngestEvent>, IngestError> {
        let mut staged = None;
        for piece in bytes.chunks(PIECE_BYTES) {
            match self.feed_piece(piece) {
                Ok(event) => staged = staged.or(event),
                Err(error) => {
                    self.fail();
                    if error.is_full() {
                        self.shared.state.lock().upkeep.found_none();
                    }
                    return Err(error);
                }
            }
        }
        Ok(staged)
    }

    /// A write that is to be carried out, before or while more is fed, and by any thread. What nobody asked for when
    /// more is fed is written then.
    pub fn write_due(&mut self) -> Option<WriteTask> {
        self.due.pop_front()
    }

    /// Whether the log is staged.
    pub fn is_done(&self) -> bool {
        matches!(self.stage, Stage::Done)
    }

    /// Ends a log that should be complete.
    pub fn finish(self) -> Result<(), IngestError> {
        if self.is_done() {
            Ok(())
        } else {
            Err(IngestError::Incomplete)
        }
    }

    fn feed_piece(&mut self, piece: &[u8]) -> Result<Option<IngestEvent>, IngestError> {
        if matches!(self.stage, Stage::Failed) {
            return Err(IngestError::Incomplete);
        }
        self.due.drain(..).for_each(WriteTask::run);
        self.writes.check()?;
        let len = to_u64(piece.len());
        self.received += len;
        self.shared.tally.received.fetch_add(len, Ordering::Relaxed);
        if let Stage::Header(kept) = &mut self.stage {
            kept.extend_from_slice(piece);
        }
        self.decoder.feed(piece);
        // The bytes kept so far, with this piece, go to the log when its header is complete.
        let kept = matches!(self.stage, Stage::Header(_));
        let mut end = None;
        while let Some(event) = self.decoder.next()? {
            match event {
                Event::Header(header) => self.begin_stage(header)?,
                Event::Frame { header, raw, .. } => self.apply(&header, raw)?,
                Event::Trailer(trailer) => end = Some(trailer),
            }
        }
        if !kept {
            self.gather(piece)?;
        }
        end.map(|trailer| self.complete(&trailer)).transpose()
    }

    /// Checks the header against the replica before anything is written.
    fn begin_stage(&mut self, header: Header) -> Result<(), IngestError> {
        let state = self.shared.state()?;
        let record = state.record.as_ref().ok_or(ReplicaError::NotPrepared)?;
        if header.machine != self.shared.id {
            return Err(IngestError::Machine {
                expected: self.shared.id,
                found: header.machine,
            });
        }
        if header.generation != self.generation {
            return Err(IngestError::Generation {
                expected: self.generation,
                found: header.generation,
            });
        }
        check_generation(&state, header.generation)?;
        if !record.has_disks(&header.disks) {
            return Err(IngestError::Disks);
        }
        match (header.kind, state.head()) {
            (LogKind::Initial, Head::Copied(at) | Head::Complete(at)) => {
                return Err(IngestError::AlreadyComplete(at));
            }
            (LogKind::Initial, _) => {
                let disks = state.disks.clone();
                self.stage = Stage::Initial { disks, header };
                return Ok(());
            }
            (LogKind::Delta, head)
                if head.lineage().is_none() || head.lineage() != header.parent =>
            {
                return Err(IngestError::Parent {
                    expected: head.lineage(),
                    found: header.parent,
                });
            }
            (LogKind::Delta, _) => {}
            (LogKind::Folded(_), _) => return Err(IngestError::Folded),
        }
        drop(state);
        let part = Part::create(&*self.shared.folder, PART_NAME)?;
        let kept = match std::mem::replace(&mut self.stage, Stage::Failed) {
            Stage::Header(kept) => kept,
            _ => Vec::new(),
        };
        self.stage = Stage::Delta(part);
        self.gather(&kept)
    }

    /// Applies a frame of an initial copy.
    fn apply(&mut self, frame: &FrameHeader, raw: Option<Bytes>) -> Result<(), IngestError> {
        self.frames += 1;
        if self.writes.disturbs(frame.disk, frame.run) {
            self.settle()?;
        }
        let Stage::Initial { disks, header } = &self.stage else {
            return Ok(());
        };
        let disk = &disks[frame.disk.index()];
        let name = &header.disks[frame.disk.index()].name;
        let done = match raw {
            Some(raw) => {
                let written = &self.shared.tally.image_written;
                written.fetch_add(frame.run.len, Ordering::Relaxed);
                if raw.len() >= TASK_BYTES_MIN {
                    let whose = (Arc::clone(disk), name.clone());
                    let task = self.writes.begin(frame.disk, whose, frame.run.offset, raw);
                    self.due.push_back(task);
                    return Ok(());
                }
                disk.write_at(frame.run.offset, &raw, Fua::No)
            }
            None => disk.zero(frame.run, Space::Release, Fua::No),
        };
        Ok(done.map_err(|source| disk_failed(name, source))?)
    }

    /// Waits until every write that was begun has ended.
    fn settle(&mut self) -> Result<(), IngestError> {
        self.due.drain(..).for_each(WriteTask::run);
        self.writes.wait(self.writes.begun())
    }

    /// Adds bytes to the file of a delta.
    fn gather(&mut self, bytes: &[u8]) -> Result<(), IngestError> {
        let Stage::Delta(part) = &mut self.stage else {
            return Ok(());
        };
        if let Some(limit) = self.shared.options.space_max {
            let len = part.len().saturating_add(to_u64(bytes.len()));
            if self.shared.state.lock().space_used().saturating_add(len) > limit {
                return Err(IngestError::Space { limit });
            }
        }
        let written = part.push(bytes)?;
        self.count_staged(written);
        Ok(())
    }

    /// Writes what was gathered.
    fn write(&mut self) -> Result<(), ReplicaError> {
        if let Stage::Delta(part) = &mut self.stage {
            let written = part.write()?;
            self.count_staged(written);
        }
        Ok(())
    }

    fn count_staged(&self, bytes: u64) {
        self.shared.tally.staged.fetch_add(bytes, Ordering::Relaxed);
    }

    /// A sync of what was received so far, if [`ReplicaOptions::sync_bytes`](super::ReplicaOptions::sync_bytes) came
    /// since the last one. It may run on another thread while more is fed. At the trailer everything is synced anyway.
    pub fn sync_due(&mut self) -> Result<Option<SyncTask>, IngestError> {
        if self.received - self.synced < self.shared.options.sync_bytes {
            return Ok(None);
        }
        if let Err(error) = self.write() {
            self.fail();
            return Err(error.into());
        }
        let what = match &self.stage {
            Stage::Delta(part) => What::Part(part.storage()),
            Stage::Initial { disks, header } => {
                // The task waits for them and cannot know that nobody asks for these.
                self.due.drain(..).for_each(WriteTask::run);
                What::Images {
                    disks: disks.clone(),
                    header: header.clone(),
                    writes: (Arc::clone(&self.writes), self.writes.begun()),
                }
            }
            _ => return Ok(None),
        };
        self.synced = self.received;
        let durable = IngestEvent::Durable {
            frames: self.frames,
            bytes: self.received,
        };
        Ok(Some(SyncTask { what, durable }))
    }

    /// Makes durable what was received.
    fn sync(&mut self) -> Result<(), IngestError> {
        self.settle()?;
        self.write()?;
        match &self.stage {
            Stage::Delta(part) => part.sync()?,
            Stage::Initial { disks, header } => flush(disks, header)?,
            _ => {}
        }
        Ok(())
    }

    /// The log is whole and verified: makes it durable, visible and recorded, in this order.
    fn complete(&mut self, trailer: &Trailer) -> Result<IngestEvent, IngestError> {
        self.sync()?;
        match &mut self.stage {
            Stage::Delta(part) => {
                let log = part.finish(&*self.shared.folder)?;
                self.complete_delta(log, trailer)?;
            }
            Stage::Initial { .. } => {
                let mut state = self.shared.state()?;
                let point = BasePoint {
                    lineage: trailer.lineage,
                    cut: trailer.cut,
                    consistency: trailer.consistency,
                    exact: false,
                };
                state.unsure = Some(self.unsure(Complete::Initial(point)));
                self.shared.conclude(&mut state)?;
            }
            _ => return Err(IngestError::Incomplete),
        }
        self.stage = Stage::Done;
        let mut state = self.shared.state.lock();
        state.receiving = false;
        state.upkeep.found_space();
        tracing::debug!(machine = %self.shared.id, epoch = %trailer.lineage.epoch, "staged");
        Ok(IngestEvent::Staged {
            lineage: trailer.lineage,
            cut: trailer.cut,
        })
    }

    fn complete_delta(&self, log: LogFile, trailer: &Trailer) -> Result<(), IngestError> {
        let shared = &*self.shared;
        let name = log_name(trailer.lineage.epoch);
        // Held over rename and record: a merge that ends in between would write an older record over this one.
        let mut state = shared.state()?;
        shared
            .folder
            .rename(PART_NAME, &name)
            .map_err(ReplicaError::io("rename", PART_NAME))?;
        state.unsure = Some(self.unsure(Complete::Delta(Arc::new(log))));
        Ok(shared.conclude(&mut state)?)
    }

    fn unsure(&self, what: Complete) -> Unsure {
        Unsure {
            generation: self.generation,
            what,
        }
    }

    /// Gives the log up, once nothing of it is being written any more.
    fn fail(&mut self) {
        if let Err(error) = self.settle() {
            tracing::debug!(machine = %self.shared.id, %error, "a log is given up after a failed write");
        }
        let stage = std::mem::replace(&mut self.stage, Stage::Failed);
        match stage {
            Stage::Done | Stage::Failed => return,
            Stage::Delta(_) => {
                if let Err(error) = self.shared.remove(PART_NAME) {
                    tracing::warn!(machine = %self.shared.id, %error, "cannot remove an unfinished delta log now");
                }
            }
            Stage::Header(_) | Stage::Initial { .. } => {}
        }
        self.shared.state.lock().receiving = false;
    }
}

impl Drop for Ingest {
    fn drop(&mut self) {
        self.fail();
    }
}

/// A sync that was asked for by [`Ingest::sync_due`].
#[derive(Debug)]
pub struct SyncTask {
    what: What,
    durable: IngestEvent,
}

#[derive(Debug)]
enum What {
    Part(Arc<dyn Storage>),
    /// The images, once so many writes have ended.
    Images {
        disks: Vec<Arc<dyn Disk>>,
        header: Header,
        writes: (Arc<Writes>, u64),
    },
}

impl SyncTask {
    /// Syncs; the event says what is durable now.
    pub fn run(self) -> Result<IngestEvent, IngestError> {
        match &self.what {
            What::Part(part) => part.sync().map_err(ReplicaError::io("sync", PART_NAME))?,
            What::Images {
                disks,
                header,
                writes: (writes, count),
            } => {
                writes.wait(*count)?;
                flush(disks, header)?;
            }
        }
        Ok(self.durable)
    }
}

fn flush(disks: &[Arc<dyn Disk>], header: &Header) -> Result<(), ReplicaError> {
    for (disk, entry) in disks.iter().zip(&header.disks) {
        disk.flush()
            .map_err(|source| disk_failed(&entry.name, source))?;
    }
    Ok(())
}
