//! Converting an image: the same disk in another file, in any format.
//!
//! ```text
//!   source, locked shared, read-only -> cursor over its runs -> worker: read, find zeros, write -> draft of the target
//!                                                            -> worker: ...
//!                                                                          syncer: every 64 MiB, beside the workers
//! ```
//! Each worker takes the next piece, reads it and writes it itself, so a piece is still in its processor's cache when it
//! is written; handing pieces from readers to writers would move every byte between processors once more. One worker
//! writes at a time: file systems let one writer into a file at once, and waiting asleep here is cheaper than spinning
//! there. Memory is one piece for each worker. The disk works while the copy goes on, so little is left to wait for when
//! the last byte is written.
//!
//! What reads as zeros is not written, whether the source knows it or stores it: the target is new, so it reads as
//! zeros there. A log that the source's last user left is replayed in memory; its file is not changed.
//!
//! # Crash contract
//! The target gets its name when it is complete and durable, or only complete if that was asked for (see [`Draft`]). Whatever ends the conversion before that
//! leaves no file, or, if the process was killed or the power failed, one with the name of a draft.

use std::{
    io,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
};

use crossbeam_channel::{Receiver, Sender};
use parking_lot::Mutex;

use super::images::{ImageConfig, ImageError, OpenImage};
use crate::{
    base::{
        checksum::is_zero,
        ids::Ids,
        units::{BLOCK_BYTES, Extent, MIB, to_u64, to_usize},
    },
    disk::{
        Access, Content, Disk, DiskError, Fua, Geometry, Opening,
        image::{self, CreateOptions, Format, Kind},
    },
    storage::{
        Storage,
        draft::{Draft, Durability},
        file::FileStorage,
    },
};

/// Bytes that a worker reads and writes at once: large enough that a write past the page cache is worth its way.
const PIECE_BYTES: u64 = MIB;
/// Threads that read and write: one writes while another reads and a third waits for the disk.
const WORKERS: usize = 3;
/// Bytes written between two syncs.
const SYNC_BYTES: u64 = 64 * MIB;
/// The smallest run of stored zeros that is left out, and its alignment: a block of the usual file systems.
const ZERO_RUN_BYTES: u64 = BLOCK_BYTES;

/// What is to become of which image.
#[derive(Clone, Debug)]
pub struct Conversion {
    /// The image to read.
    pub source: ImageConfig,
    /// The file to make; none may have the name.
    pub target: PathBuf,
    /// Its format.
    pub format: Format,
    /// Whether its blocks take space from the beginning.
    pub kind: Option<Kind>,
    /// Bytes of its blocks.
    pub block_size: Option<u32>,
    /// Its logical sector size in bytes; the source's unless told otherwise.
    pub logical_sector: Option<u32>,
    /// Its physical sector size in bytes; the source's unless told otherwise.
    pub physical_sector: Option<u32>,
    /// What the file holds where the disk or the format has only zeros.
    pub holes: Holes,
    /// What the new image promises when the conversion is done.
    pub durability: Durability,
}

/// What a file holds where it could have holes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Holes {
    /// Holes: they take no space.
    Keep,
    /// Zeros, written: Windows does not attach an image whose file is sparse, and copies can keep it so.
    Fill,
}

/// What a conversion did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Converted {
    /// The disk as the source shows it.
    pub source: Geometry,
    /// The disk as the target shows it.
    pub target: Geometry,
    /// Bytes written, without zeros that were left out.
    pub written: u64,
}

/// Why there is no new image. Nothing of it was left.
#[derive(Debug, thiserror::Error)]
pub enum ConvertError {
    /// The source cannot be used.
    #[error(transparent)]
    Source(#[from] ImageError),
    /// Source and target are one file.
    #[error("{} and {} are the same file; an image is not converted in place", source_path.display(), target.display())]
    SameFile {
        /// The source.
        source_path: PathBuf,
        /// The target.
        target: PathBuf,
    },
    /// Something has the target's name.
    #[error("{} exists already and is never overwritten; choose another name", .0.display())]
    Exists(PathBuf),
    /// The target's file cannot be made or completed.
    #[error("cannot make {}", target.display())]
    File {
        /// The target.
        target: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The target's format cannot hold the disk, or not with these options.
    #[error("cannot make {} ({format})", target.display())]
    Create {
        /// The target.
        target: PathBuf,
        /// Its format.
        format: Format,
        /// Why not.
        #[source]
        source: Box<image::CreateError>,
    },
    /// The image just made does not open.
    #[error("cannot open the new image {}", target.display())]
    Open {
        /// The target.
        target: PathBuf,
        /// Why not.
        #[source]
        source: Box<image::OpenError>,
    },
    /// The source cannot be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// The source.
        path: PathBuf,
        /// Why, and where.
        #[source]
        source: DiskError,
    },
    /// The target cannot be written.
    #[error("cannot write {}", path.display())]
    Write {
        /// The target.
        path: PathBuf,
        /// Why, and where.
        #[source]
        source: DiskError,
    },
    /// It was told to stop.
    #[error("interrupted; {} was not made", .0.display())]
    Interrupted(PathBuf),
}

impl ConvertError {
    /// Whether it was not tried, because of what it could do to existing data.
    pub fn is_refusal(&self) -> bool {
        matches!(
            self,
            Self::SameFile { .. } | Self::Exists(_) | Self::Source(ImageError::InUse(_))
        )
    }
}

/// Makes the new image. `progress` hears how many bytes of how many are done, on the calling thread; `stop` ends the
/// work soon after it is set.
pub fn convert(
    plan: &Conversion,
    ids: &Arc<dyn Ids>,
    stop: &AtomicBool,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Converted, ConvertError> {
    let path = &plan.target;
    let failed = |source| ConvertError::File {
        target: path.clone(),
        source,
    };
    refuse_same(&plan.source.path, path)?;
    let source = OpenImage::open(&plan.source, Access::ReadOnly, ids)?;
    let draft =
        Draft::create(path, ids.uuid(), plan.durability).map_err(|error| match error.kind() {
            io::ErrorKind::AlreadyExists => ConvertError::Exists(path.clone()),
            _ => failed(error),
        })?;
    let geometry = source.disk.geometry();
    let target = new_disk(plan, geometry, &draft.storage(), ids)?;
    let copy = Copy {
        source: source.disk.as_ref(),
        target: target.as_ref(),
        plan,
        file: draft.storage(),
        cursor: Mutex::new(Cursor::default()),
        writing: Mutex::new(()),
        unsynced: AtomicU64::new(0),
        stop,
        failed: AtomicBool::new(false),
    };
    let written = copy.run(progress)?;
    target.close().map_err(|source| ConvertError::Write {
        path: path.clone(),
        source,
    })?;
    if plan.holes == Holes::Fill {
        fill_holes(draft.storage().as_ref(), stop).map_err(failed)?;
    }
    if stop.load(Ordering::Relaxed) {
        return Err(ConvertError::Interrupted(path.clone()));
    }
    draft.publish().map_err(|error| match error.kind() {
        io::ErrorKind::AlreadyExists => ConvertError::Exists(path.clone()),
        _ => failed(error),
    })?;
    Ok(Converted {
        source: geometry,
        target: target.geometry(),
        written,
    })
}

/// A target that exists is refused anyway; this says what would have happened.
fn refuse_same(source: &Path, target: &Path) -> Result<(), ConvertError> {
    use std::os::unix::fs::MetadataExt as _;
    let identity = |path: &Path| path.metadata().ok().map(|meta| (meta.dev(), meta.ino()));
    match (identity(source), identity(target)) {
        (Some(source_file), Some(target_file)) if source_file == target_file => {
            Err(ConvertError::SameFile {
                source_path: source.to_owned(),
                target: target.to_owned(),
            })
        }
        _ => Ok(()),
    }
}

/// The empty disk that the draft becomes.
fn new_disk(
    plan: &Conversion,
    geometry: Geometry,
    storage: &Arc<FileStorage>,
    ids: &Arc<dyn Ids>,
) -> Result<Arc<dyn Disk>, ConvertError> {
    let options = CreateOptions {
        format: plan.format,
        geometry: Geometry {
            size: geometry.size,
            logical_sector: plan.logical_sector.unwrap_or(geometry.logical_sector),
            physical_sector: plan.physical_sector.unwrap_or(geometry.physical_sector),
        },
        kind: plan.kind,
        block_size: plan.block_size,
    };
    let target = || plan.target.clone();
    image::create(storage.as_ref(), &options, ids.as_ref()).map_err(|source| {
        ConvertError::Create {
            target: target(),
            format: plan.format,
            source: Box::new(source),
        }
    })?;
    let storage: Arc<dyn Storage> = Arc::clone(storage) as _;
    let opening = Opening::new(Access::ReadWrite, Arc::clone(ids));
    image::open(storage, plan.format, &opening).map_err(|source| ConvertError::Open {
        target: target(),
        source: Box::new(source),
    })
}

/// One copy under way.
struct Copy<'a> {
    source: &'a dyn Disk,
    target: &'a dyn Disk,
    plan: &'a Conversion,
    /// The file of the target.
    file: Arc<dyn Storage>,
    /// What the pieces are taken from next.
    cursor: Mutex<Cursor>,
    /// Held by the one who writes.
    writing: Mutex<()>,
    /// Bytes written since a sync was asked for.
    unsynced: AtomicU64,
    stop: &'a AtomicBool,
    /// A worker failed: the others end as well.
    failed: AtomicBool,
}

/// The rest of a run of the source.
#[derive(Clone, Copy, Debug)]
struct Cursor {
    rest: Extent,
    content: Content,
}

impl Default for Cursor {
    fn default() -> Self {
        Self {
            rest: Extent::new(0, 0),
            content: Content::Zero,
        }
    }
}

/// What a worker did: bytes of the disk passed, and bytes written for them.
type Step = Result<(u64, u64), ConvertError>;

impl Copy<'_> {
    fn run(&self, progress: &mut dyn FnMut(u64, u64)) -> Result<u64, ConvertError> {
        let size = self.source.geometry().size;
        let (mut done, mut written, mut failure) = (0, 0, None);
        progress(0, size);
        thread::scope(|scope| {
            let (sender, steps) = crossbeam_channel::bounded(2 * WORKERS);
            let (due, syncs) = crossbeam_channel::bounded(1);
            for _ in 0..WORKERS {
                let (sender, due) = (sender.clone(), due.clone());
                scope.spawn(move || self.work(&sender, &due));
            }
            // The workers hold the other ends: when they are through, so are the syncs and the steps.
            drop(due);
            scope.spawn(move || self.sync(&syncs, &sender));
            for step in steps {
                match step {
                    Ok((passed, stored)) => {
                        done += passed;
                        written += stored;
                        progress(done, size);
                    }
                    Err(error) => {
                        self.failed.store(true, Ordering::Relaxed);
                        failure.get_or_insert(error);
                    }
                }
            }
        });
        match failure {
            Some(error) => Err(error),
            None if done < size => Err(ConvertError::Interrupted(self.plan.target.clone())),
            None => Ok(written),
        }
    }

    /// Makes what was written durable beside the workers, whenever it is due.
    fn sync(&self, due: &Receiver<()>, steps: &Sender<Step>) {
        for () in due {
            if let Err(source) = self.file.sync() {
                let _ = steps.send(Err(ConvertError::File {
                    target: self.plan.target.clone(),
                    source,
                }));
                return;
            }
        }
    }

    fn work(&self, steps: &Sender<Step>, due: &Sender<()>) {
        let mut buf = vec![0; to_usize(PIECE_BYTES)];
        while !self.stop.load(Ordering::Relaxed) && !self.failed.load(Ordering::Relaxed) {
            let step = match self.next() {
                Ok(Some((passed, Content::Zero))) => Ok((passed.len, 0)),
                Ok(Some((piece, Content::Data))) => self
                    .transfer(piece, &mut buf[..to_usize(piece.len)])
                    .map(|stored| (piece.len, stored)),
                Ok(None) => return,
                Err(error) => Err(error),
            };
            let written = step.as_ref().map_or(0, |&(_, stored)| stored);
            let unsynced = self.unsynced.fetch_add(written, Ordering::Relaxed) + written;
            // A sync that is still under way is one more reason not to ask for another.
            if unsynced >= SYNC_BYTES && due.try_send(()).is_ok() {
                self.unsynced.store(0, Ordering::Relaxed);
            }
            let is_over = step.is_err();
            if steps.send(step).is_err() || is_over {
                return;
            }
        }
    }

    /// The next run of zeros, or the next piece of data.
    fn next(&self) -> Result<Option<(Extent, Content)>, ConvertError> {
        let mut cursor = self.cursor.lock();
        if cursor.rest.len == 0 {
            let at = cursor.rest.offset;
            if at >= self.source.geometry().size {
                return Ok(None);
            }
            let (run, content) = self.source.run_at(at).map_err(|e| self.unread(e))?;
            *cursor = Cursor { rest: run, content };
        }
        let Cursor { rest, content } = *cursor;
        let mut piece = rest;
        if content == Content::Data {
            let piece_end = (rest.offset / PIECE_BYTES + 1) * PIECE_BYTES;
            piece.len = rest.len.min(piece_end - rest.offset);
        }
        cursor.rest = Extent::new(piece.end(), rest.len - piece.len);
        Ok(Some((piece, content)))
    }

    /// Copies a piece but for its zeros, and counts what is written.
    fn transfer(&self, piece: Extent, buf: &mut [u8]) -> Result<u64, ConvertError> {
        self.source
            .read_at(piece.offset, buf)
            .map_err(|e| self.unread(e))?;
        let runs: Vec<_> = stored_runs(piece.offset, buf).collect();
        let mut written = 0;
        let _one = self.writing.lock();
        for run in runs {
            let bytes = &buf[run.clone()];
            let offset = piece.offset + to_u64(run.start);
            self.target
                .write_at(offset, bytes, Fua::No)
                .map_err(|source| ConvertError::Write {
                    path: self.plan.target.clone(),
                    source,
                })?;
            written += to_u64(bytes.len());
        }
        Ok(written)
    }

    fn unread(&self, source: DiskError) -> ConvertError {
        ConvertError::Read {
            path: self.plan.source.path.clone(),
            source,
        }
    }
}

/// The runs of `buf`, which starts at `offset` of the disk, between its zeros; zeros count by whole aligned blocks.
fn stored_runs(offset: u64, buf: &[u8]) -> impl Iterator<Item = std::ops::Range<usize>> {
    let block = move |at: usize| {
        let disk = offset + to_u64(at);
        let end = at + to_usize((disk / ZERO_RUN_BYTES + 1) * ZERO_RUN_BYTES - disk);
        at..end.min(buf.len())
    };
    let mut at = 0;
    std::iter::from_fn(move || {
        while at < buf.len() && is_zero(&buf[block(at)]) {
            at = block(at).end;
        }
        let start = at;
        while at < buf.len() && !is_zero(&buf[block(at)]) {
            at = block(at).end;
        }
        (start < at).then_some(start..at)
    })
}

/// Writes zeros wherever the file has none stored.
fn fill_holes(file: &dyn Storage, stop: &AtomicBool) -> io::Result<()> {
    let zeros = vec![0; to_usize(PIECE_BYTES)];
    let len = file.len()?;
    let mut at = 0;
    while at < len {
        let data = file.data_after(at)?;
        let hole_end = data.map_or(len, |data| data.offset);
        while at < hole_end {
            if stop.load(Ordering::Relaxed) {
                return Ok(());
            }
            let step = (hole_end - at).min(PIECE_BYTES);
            file.write_at(at, &zeros[..to_usize(step)], Fua::No)?;
            at += step;
        }
        at = data.map_or(len, Extent::end);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        disk::raw::RawDisk,
        storage::{
            Space,
            memory::{MemoryStorage, Power},
        },
    };

    #[test]
    fn stored_zeros_are_found_by_aligned_blocks() {
        let mut buf = vec![0; 5 * 4096 + 100];
        assert_eq!(stored_runs(0, &buf).count(), 0);
        for at in [4095, 4096, 3 * 4096 + 7, 5 * 4096 + 99] {
            buf[at] = 1;
        }
        let runs: Vec<_> = stored_runs(8192, &buf).collect();
        assert_eq!(runs, [0..8192, 12288..16384, 20480..20580]);
        // Blocks are the disk's, not the buffer's.
        let runs: Vec<_> = stored_runs(512, &buf).collect();
        assert_eq!(runs, [3584..7680, 11776..15872, 19968..20580]);
        buf.fill(1);
        let all: Vec<_> = stored_runs(0, &buf).collect();
        assert_eq!((all.len(), all[0].len()), (1, buf.len()));
    }

    #[test]
    fn no_hole_stays_when_none_may() {
        let storage = MemoryStorage::new(&Power::new());
        storage.set_len(3 << 20).unwrap();
        storage.write_at(1 << 20, &[7; 4096], Fua::No).unwrap();
        storage
            .zero(Extent::new(1 << 20, 512), Space::Release)
            .unwrap();
        let before = {
            let mut bytes = vec![0; 3 << 20];
            storage.read_at(0, &mut bytes).unwrap();
            bytes
        };
        fill_holes(storage.as_ref(), &AtomicBool::new(false)).unwrap();
        let mut after = vec![1; 3 << 20];
        storage.read_at(0, &mut after).unwrap();
        assert!(before == after);
        assert_eq!(
            storage.data_after(0).unwrap(),
            Some(Extent::new(0, 3 << 20))
        );
    }

    #[test]
    fn a_failed_write_ends_all_workers_and_is_told() {
        let file = |power: &Arc<Power>| {
            let storage = MemoryStorage::new(power);
            storage.write_at(0, &vec![5; 16 << 20], Fua::No).unwrap();
            storage
        };
        let raw = |storage: &Arc<MemoryStorage>| {
            RawDisk::open(Arc::clone(storage) as _, Access::ReadWrite).unwrap()
        };
        let (power, stop) = (Power::new(), AtomicBool::new(false));
        let storage = file(&power);
        let (source, target) = (raw(&file(&Power::new())), raw(&storage));
        let plan = Conversion {
            source: ImageConfig::new("a.raw".into(), None).unwrap(),
            target: "b.raw".into(),
            format: Format::Raw,
            kind: None,
            block_size: None,
            logical_sector: None,
            physical_sector: None,
            holes: Holes::Keep,
            durability: Durability::Synced,
        };
        let copy = |stop| Copy {
            source: &source,
            target: &target,
            plan: &plan,
            file: Arc::clone(&storage) as _,
            cursor: Mutex::new(Cursor::default()),
            writing: Mutex::new(()),
            unsynced: AtomicU64::new(0),
            stop,
            failed: AtomicBool::new(false),
        };
        assert_eq!(copy(&stop).run(&mut |_, _| {}).unwrap(), 16 << 20);
        stop.store(true, Ordering::Relaxed);
        let stopped = copy(&stop).run(&mut |_, _| {});
        assert!(matches!(stopped, Err(ConvertError::Interrupted(_))));
        stop.store(false, Ordering::Relaxed);
        power.fail_after(3, io::ErrorKind::StorageFull);
        let failed = copy(&stop).run(&mut |_, _| {}).unwrap_err();
        assert!(matches!(failed, ConvertError::Write { .. }), "{failed}");
    }
}
