//! The primary's half: the replication thread writes epoch 0 into a file instead of a stream, while the guest writes on.

use std::{
    io,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use crossbeam_channel::Sender as ChannelSender;

use super::{check_folder, file_name, free_bytes};
use crate::{
    base::{
        chain::chain,
        ids::Lineage,
        limits::FRAME_BYTES_MAX,
        units::{Bytes, Epoch, MIB, to_u64, to_usize},
    },
    delta::{Encoder, LogKind},
    disk::{Content, Disk as _, DiskError},
    node::{
        control::{ExportReport, OperateError},
        driver::{Command, Driver, workers},
        pipeline::{Pipeline, Raw},
        progress::Phase,
    },
    protocol::sender::Side,
    storage::{
        Fua, Storage,
        draft::{Draft, Durability},
    },
    volume::{CopyScope, Machine, MachineError, PieceContent, TakeError, Taken},
};

/// Bytes that are written at once.
const WRITE_BYTES: usize = to_usize(FRAME_BYTES_MAX);
/// What a MiB of a disk costs in the file, beside its data, at most.
const FRAMES_BYTES_PER_MIB: u64 = 256 * 32;

/// A wish for an export, and who waits for its end.
pub(in crate::node) struct Export {
    pub(in crate::node) folder: PathBuf,
    pub(in crate::node) answer: ChannelSender<Result<ExportReport, OperateError>>,
}

impl Export {
    /// Says that there will be none.
    pub(in crate::node) fn refuse(self, why: String) {
        // Whoever asked may have gone away.
        let _ = self.answer.send(Err(OperateError::NotNow(why)));
    }
}

/// A file that grows.
struct Appender {
    storage: Arc<dyn Storage>,
    written: u64,
    gathered: Vec<u8>,
}

impl Appender {
    fn add(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.gathered.extend_from_slice(bytes);
        if self.gathered.len() < WRITE_BYTES {
            return Ok(());
        }
        self.write()
    }

    fn write(&mut self) -> io::Result<()> {
        let gathered = &self.gathered;
        self.storage.write_at(self.written, gathered, Fua::No)?;
        self.written += to_u64(gathered.len());
        self.gathered.clear();
        Ok(())
    }
}

/// Why an export did not come to its end.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error("{0}")]
    Refused(String),
    #[error("the replication of the machine was ended meanwhile")]
    Halted,
    #[error("it was begun anew meanwhile")]
    Superseded,
    #[error("cannot start packing threads")]
    Threads(#[source] io::Error),
    #[error("cannot write the file")]
    File(#[source] io::Error),
    #[error("cannot tell how much there is to copy")]
    Survey(#[from] DiskError),
    #[error(transparent)]
    Take(#[from] TakeError),
    #[error(transparent)]
    Machine(#[from] MachineError),
    #[error("cannot remember that the machine waits for it: {0}")]
    Record(String),
}

impl Driver {
    /// Exports, and tells whoever waits; whether the thread has to end. The replica has nothing, as far as is known.
    pub(in crate::node) fn export(&mut self, export: &Export) -> bool {
        let name = &self.subject.name;
        let done = self.export_to(&export.folder);
        let halted = matches!(done, Err(Failure::Halted));
        if let Ok(report) = &done {
            self.target.copy_due = None;
            tracing::info!(machine = %name, bytes = report.bytes, chain = %report.lineage.chain, "exported");
        }
        let mut progress = self.progress.lock();
        progress.copy_ended();
        progress.phase = Phase::Connecting;
        drop(progress);
        // Whoever asked may have gone away.
        let _ = export.answer.send(done.map_err(|failure| match failure {
            Failure::Refused(why) => OperateError::NotNow(format!("machine {name}: {why}")),
            failure => {
                OperateError::Failed(format!("machine {name}: not exported: {}", chain(&failure)))
            }
        }));
        halted
    }

    fn export_to(&self, folder: &Path) -> Result<ExportReport, Failure> {
        check_folder(folder).map_err(Failure::Refused)?;
        let target = folder.join(file_name(&self.subject.name));
        let needed = needed(&self.machine)?;
        let free = free_bytes(folder).map_err(Failure::File)?;
        if free < needed.file {
            return Err(Failure::Refused(format!(
                "{} has {} free, and the copy may take {}",
                folder.display(),
                Bytes(free),
                Bytes(needed.file)
            )));
        }
        let draft = Draft::create(&target, self.host.ids.uuid(), Durability::Synced);
        let draft = draft.map_err(|error| match error.kind() {
            io::ErrorKind::AlreadyExists => Failure::Refused(format!(
                "{} exists: move it away, or name another folder",
                target.display()
            )),
            _ => Failure::File(error),
        })?;
        self.progress
            .lock()
            .exporting(needed.data, &*self.host.clock);
        tracing::info!(machine = %self.subject.name, file = %target.display(), "the initial copy is exported");
        // What was taken is owed again, if it was in vain.
        let written = self.write_copy(draft);
        let (bytes, lineage) = written.inspect_err(|_| self.machine.disconnected())?;
        Ok(ExportReport {
            file: target,
            bytes,
            lineage,
        })
    }

    /// Writes epoch 0 and gives the file its name; how long it is, and what a replica that has it is at.
    fn write_copy(&self, draft: Draft) -> Result<(u64, Lineage), Failure> {
        self.machine.begin_initial_copy(CopyScope::Everything)?;
        let mut file = Appender {
            storage: draft.storage(),
            written: 0,
            gathered: Vec::with_capacity(2 * WRITE_BYTES),
        };
        let (mut encoder, header) = Encoder::new(&self.header(LogKind::Initial, None));
        file.add(&header).map_err(Failure::File)?;
        self.write_frames(&mut encoder, &mut file)?;
        let (trailer, lineage) = encoder.finish(Epoch::INITIAL, self.host.clock.wall());
        file.add(&trailer).map_err(Failure::File)?;
        file.write().map_err(Failure::File)?;
        // Whoever has the file may have imported it from here on.
        self.machine.pending(lineage)?;
        let before = self.target.copy_due;
        (self.host.set_copy_due)(None).map_err(Failure::Record)?;
        if let Err(error) = draft.publish() {
            (self.host.set_copy_due)(before).map_err(Failure::Record)?;
            return Err(Failure::File(error));
        }
        self.machine.staged(lineage)?;
        Ok((file.written, lineage))
    }

    fn write_frames(&self, encoder: &mut Encoder, file: &mut Appender) -> Result<(), Failure> {
        let mut pipeline = Pipeline::start(self.target.compression, workers(), &self.host.clock)
            .map_err(Failure::Threads)?;
        let clock = &self.host.clock;
        let mut drained = false;
        let mut measured = (0, Duration::ZERO);
        loop {
            if self.hears_of_a_halt() {
                return Err(Failure::Halted);
            }
            while !drained && pipeline.has_room() {
                match self
                    .machine
                    .take(Side::Closing, Epoch::INITIAL, FRAME_BYTES_MAX)?
                {
                    Taken::Piece(piece) => {
                        let raw = match piece.content {
                            PieceContent::Data(bytes) => Raw::Data(bytes),
                            PieceContent::Zero => Raw::Zero,
                        };
                        pipeline.submit(piece.disk, piece.run, raw);
                    }
                    Taken::Drained => drained = true,
                    Taken::Superseded => return Err(Failure::Superseded),
                }
            }
            let Some(frame) = pipeline.next() else {
                return Ok(());
            };
            encoder.frame(&frame);
            let began = clock.monotonic();
            for part in frame.parts() {
                file.add(&part).map_err(Failure::File)?;
            }
            measured.0 += frame.header().frame_len();
            measured.1 += clock.monotonic().saturating_sub(began);
            if measured.0 >= 8 * MIB {
                let (bytes, took) = std::mem::take(&mut measured);
                pipeline.sent(bytes, took);
            }
            if frame.header().payload_len > 0 {
                self.progress.lock().copied(frame.header().run.len);
            }
        }
    }

    /// Answers what is asked meanwhile; whether the thread has to end.
    fn hears_of_a_halt(&self) -> bool {
        let why = || {
            format!(
                "machine {}: a portable copy is being exported",
                self.subject.name
            )
        };
        for command in self.commands.try_iter() {
            match command {
                Command::Cut(answer) => {
                    let _ = answer.send(Err(why()));
                }
                Command::Resync(answer) | Command::Verify(_, answer) => {
                    let _ = answer.send(Err(why()));
                }
                Command::Export(export) => export.refuse(why()),
                // Whoever sends it ends the thread next; it need not wait for that.
                Command::Suspend | Command::Stop => return true,
            }
        }
        self.is_halted()
    }
}

/// What an export has to move.
struct Needed {
    /// Bytes of the disks that are not known to be zeros.
    data: u64,
    /// Bytes of the file, at most.
    file: u64,
}

fn needed(machine: &Machine) -> Result<Needed, DiskError> {
    let (mut data, mut mib) = (0, 0);
    for volume in machine.volumes() {
        let size = volume.geometry().size;
        mib += size.div_ceil(MIB);
        let mut offset = 0;
        while offset < size {
            let (run, content) = volume.run_at(offset)?;
            if content == Content::Data {
                data += run.len;
            }
            offset = run.end().max(offset + 1);
        }
    }
    let frames = mib.saturating_mul(FRAMES_BYTES_PER_MIB);
    // Runs of data and holes in turn, a block each, cost a frame for every one of them.
    Ok(Needed {
        data,
        file: data.saturating_add(frames).saturating_add(MIB),
    })
}
