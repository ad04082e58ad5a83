//! The replica's half: the file is verified from its first to its last byte before anything of it is taken, and then
//! received like the log of a primary.

use std::{
    fs::{File, TryLockError},
    io,
    os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use nix::{errno::Errno, fcntl::OFlag};
use parking_lot::Mutex;

use super::{check_folder, file_name, free_bytes};
use crate::{
    base::{
        chain::chain,
        ids::{Generation, Lineage},
        limits::FRAME_BYTES_MAX,
        units::{Bytes, to_u64, to_usize},
    },
    delta::{Decoder, Event, Header, LogKind},
    node::{
        control::{ImportReport, OperateError},
        progress::rate,
        served::Served,
        status::CopyStatus,
    },
    replica::{Head, IngestEvent},
};

/// Bytes that are read at once.
const READ_BYTES: usize = to_usize(FRAME_BYTES_MAX);

/// The import of a replica, one at a time.
#[derive(Debug, Default)]
pub(in crate::node) struct Importing {
    running: AtomicBool,
    stop: AtomicBool,
    how_far: Mutex<Option<HowFar>>,
}

#[derive(Clone, Copy, Debug)]
struct HowFar {
    began: Duration,
    done: u64,
    total: u64,
}

/// An import that runs until this is dropped.
struct Running<'a>(&'a Importing);

impl Drop for Running<'_> {
    fn drop(&mut self) {
        *self.0.how_far.lock() = None;
        self.0.running.store(false, Ordering::Release);
    }
}

impl Importing {
    fn begin(&self) -> Option<Running<'_>> {
        let before = self.running.swap(true, Ordering::AcqRel);
        (!before).then_some(Running(self))
    }

    /// Whether one runs.
    pub(in crate::node) fn is_running(&self) -> bool {
        self.running.load(Ordering::Acquire)
    }

    /// Ends the one that runs at its next piece, and all that come.
    pub(in crate::node) fn stop(&self) {
        self.stop.store(true, Ordering::Release);
    }

    /// How far it is: the file is read twice.
    pub(in crate::node) fn status(&self, now: Duration) -> Option<CopyStatus> {
        let HowFar { began, done, total } = (*self.how_far.lock())?;
        let rate = rate(done, now.saturating_sub(began));
        Some(CopyStatus {
            done: done.min(total),
            total,
            rate,
            eta_s: total.saturating_sub(done).checked_div(rate),
        })
    }
}

/// A copy that was opened, and stays open.
struct Source {
    path: PathBuf,
    file: File,
    len: u64,
}

impl Served {
    /// Takes in the copy of the machine that lies in `folder`. Whoever feeds the replica is sent away until it is done.
    pub(in crate::node) fn import(
        &self,
        folder: &Path,
        generation: Generation,
    ) -> Result<ImportReport, OperateError> {
        let not_now = |why: String| OperateError::NotNow(format!("machine {}: {why}", self.name));
        let running = self.importing.begin();
        let _running =
            running.ok_or_else(|| not_now("a portable copy is being imported already".into()))?;
        self.has_nothing()?;
        check_folder(folder).map_err(not_now)?;
        let source = open(folder.join(file_name(&self.name))).map_err(not_now)?;
        *self.importing.how_far.lock() = Some(HowFar {
            began: self.clock.monotonic(),
            done: 0,
            total: 2 * source.len,
        });
        tracing::info!(machine = %self.name, file = %source.path.display(), bytes = source.len, "a portable copy is verified");
        self.verify(&source, generation)?;
        let _over = self.end_session("a portable copy is being imported");
        // Until now a primary could send.
        self.has_nothing()?;
        let lineage = self.take_in(&source, generation)?;
        tracing::info!(machine = %self.name, chain = %lineage.chain, "imported");
        let mut progress = self.progress.lock();
        progress.problem = None;
        progress.epochs += 1;
        drop(progress);
        self.wake_upkeep();
        Ok(ImportReport {
            bytes: source.len,
            lineage,
        })
    }

    fn has_nothing(&self) -> Result<(), OperateError> {
        match self.store.head() {
            Head::Empty | Head::Copying => Ok(()),
            Head::Copied(at) | Head::Complete(at) => Err(OperateError::NotNow(format!(
                "machine {}: its replica holds epoch {} already, and needs no initial copy",
                self.name, at.epoch
            ))),
        }
    }

    /// Reads the whole file as a peer's bytes; an error if it is not exactly a copy that this replica can take.
    fn verify(&self, source: &Source, generation: Generation) -> Result<(), OperateError> {
        let shown = source.path.display();
        let (mut decoder, mut data, mut whole) = (Decoder::new(), 0_u64, false);
        self.read(source, |piece| {
            decoder.feed(piece);
            loop {
                let next = decoder.next();
                match next.map_err(|error| format!("{shown} is damaged: {}", chain(&error)))? {
                    Some(Event::Header(header)) => self.check_header(&header, generation)?,
                    Some(Event::Frame { header, raw, .. }) => {
                        data = data.saturating_add(raw.map_or(0, |_| header.run.len));
                    }
                    Some(Event::Trailer(_)) => whole = true,
                    None => return Ok(()),
                }
            }
        })?;
        if !whole || !decoder.is_complete() {
            return Err(OperateError::Failed(format!(
                "{shown} ends before its trailer: it was cut short; copy it again"
            )));
        }
        self.check_space(data)
    }

    fn check_header(&self, header: &Header, generation: Generation) -> Result<(), Problem> {
        let name = &self.name;
        if header.machine != self.id {
            let (theirs, ours) = (header.machine, self.id);
            return refuse(format!(
                "it is a copy of machine {theirs}, and {name} is {ours}"
            ));
        }
        if header.kind != LogKind::Initial {
            return refuse("it is a delta log and no initial copy".into());
        }
        if header.generation != generation {
            return refuse(format!(
                "it was exported in generation {}, and this replica follows {generation}: export it again",
                header.generation
            ));
        }
        let images = self.store.status().images;
        let mut pairs = images.iter().zip(&header.disks);
        let same = images.len() == header.disks.len()
            && pairs
                .all(|(image, disk)| image.name == disk.name && image.geometry.size == disk.size);
        if !same {
            return refuse("its disks are not those of this replica: export it again".into());
        }
        Ok(())
    }

    /// Refuses data that the images have no room for. What they take already is written over.
    fn check_space(&self, data: u64) -> Result<(), OperateError> {
        let failed = |error: io::Error| OperateError::Failed(chain(&error));
        let free = free_bytes(&self.folder).map_err(failed)?;
        let images = self.store.status().images;
        let taken = images.iter().map(|image| {
            let about = self.folder.join(&image.file).metadata();
            about.map_or(0, |about| about.blocks() * 512)
        });
        let room = free.saturating_add(taken.sum());
        if data > room {
            return Err(OperateError::NotNow(format!(
                "machine {}: the copy holds {}, and there is room for {}",
                self.name,
                Bytes(data),
                Bytes(room)
            )));
        }
        Ok(())
    }

    /// Receives the file.
    fn take_in(&self, source: &Source, generation: Generation) -> Result<Lineage, OperateError> {
        let failed = |error: &dyn std::error::Error| {
            OperateError::Failed(format!(
                "machine {}: not imported: {}",
                self.name,
                chain(error)
            ))
        };
        let mut ingest = self
            .store
            .begin(generation)
            .map_err(|error| failed(&error))?;
        let mut staged = None;
        self.read(source, |piece| {
            let events = ingest.push(piece).map_err(|error| chain(&error))?;
            for event in events {
                if let IngestEvent::Staged { lineage, .. } = event {
                    staged = Some(lineage);
                }
            }
            Ok(())
        })?;
        ingest.finish().map_err(|error| failed(&error))?;
        Ok(staged.expect("a log that is finished was staged"))
    }

    /// Hands the file to `take`, piece by piece, exactly as long as it was when it was opened.
    fn read(
        &self,
        Source { path, file, len }: &Source,
        mut take: impl FnMut(&[u8]) -> Result<(), Problem>,
    ) -> Result<(), OperateError> {
        let shown = path.display();
        let (mut buffer, mut offset) = (vec![0; READ_BYTES], 0);
        loop {
            if self.importing.stop.load(Ordering::Acquire) {
                return Err(OperateError::Failed("the node is being stopped".into()));
            }
            let count = file.read_at(&mut buffer, offset).map_err(|error| {
                OperateError::Failed(format!("cannot read {shown} at {offset}: {error}"))
            })?;
            offset += to_u64(count);
            if offset > *len || (count == 0 && offset < *len) {
                return Err(OperateError::Failed(format!(
                    "{shown} changed while it was read"
                )));
            }
            if count == 0 {
                return Ok(());
            }
            take(&buffer[..count]).map_err(|problem| match problem {
                Problem::Refused(why) => OperateError::NotNow(format!("{shown}: {why}")),
                Problem::Failed(why) => OperateError::Failed(why),
            })?;
            if let Some(how_far) = &mut *self.importing.how_far.lock() {
                how_far.done += to_u64(count);
            }
        }
    }
}

/// What is wrong with a file.
enum Problem {
    /// It is whole, and not for here.
    Refused(String),
    Failed(String),
}

impl From<String> for Problem {
    fn from(why: String) -> Self {
        Self::Failed(why)
    }
}

fn refuse(why: String) -> Result<(), Problem> {
    Err(Problem::Refused(why))
}

/// Opens a copy, once and for all: not through a link, not a pipe that would make us wait, nothing that is being written.
fn open(path: PathBuf) -> Result<Source, String> {
    let shown = path.display();
    let flags = OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_NOCTTY;
    let opened = File::options()
        .read(true)
        .custom_flags(flags.bits())
        .open(&path);
    let file = opened.map_err(|error| match error.raw_os_error().map(Errno::from_raw) {
        Some(Errno::ELOOP) => format!("{shown} is a link, and none is followed"),
        _ => format!("cannot open {shown}: {error}"),
    })?;
    let about = file
        .metadata()
        .map_err(|error| format!("cannot examine {shown}: {error}"))?;
    if !about.is_file() {
        return Err(format!("{shown} is not a regular file"));
    }
    match file.try_lock_shared() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => return Err(format!("{shown} is being written")),
        // A file system without locks has no other writers that would tell either.
        Err(TryLockError::Error(error)) => tracing::debug!(%error, "{shown} is not locked"),
    }
    let len = about.len();
    Ok(Source { path, file, len })
}
