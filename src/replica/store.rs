//! One machine's replica: what it holds, and who may touch it when.
//!
//! # Locks
//! `merging` is held for a whole merge, `state` for moments (the longest is one commit of the node's store). A log is
//! received and a merge runs at the same time; both take `state` only to begin and to end. Order: `merging`, `state`,
//! `pins`.

use std::{
    collections::BTreeSet,
    io,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use parking_lot::{Mutex, MutexGuard};

use super::{
    error::ReplicaError,
    log::LogFile,
    pins::Pins,
    record::{Base, BasePoint, DiskRecord, Record},
};
use crate::{
    base::{
        clock::Timestamp,
        ids::{Generation, Ids, Lineage, MachineId, Name},
        limits::DISKS_PER_MACHINE_MAX,
        units::{Epoch, MIB},
    },
    delta::Consistency,
    disk::{
        Access, Disk, Geometry, Opening,
        image::{self, Format},
    },
    storage::{Folder, Open, ledger::Ledger},
};

/// How a replica is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReplicaOptions {
    /// Format of the base images; nothing for the primary's.
    pub format: Option<Format>,
    /// Which recovery points are kept.
    pub retention: Retention,
    /// Bytes that delta logs may take. Above half of it a merge drops points that retention would keep, the oldest
    /// first; a log that would go beyond it is refused.
    pub log_bytes_max: Option<u64>,
    /// Bytes received between two syncs, each of which is reported as durable. Of an initial copy that is lost in the
    /// middle, at most twice this is sent again.
    pub sync_bytes: u64,
}

impl ReplicaOptions {
    /// Enough that a sync is one long write and not a seek, and less than a second's worth of a fast link.
    pub const SYNC_BYTES: u64 = 64 * MIB;
}

/// Which recovery points are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Retention {
    /// Newest epochs kept as logs, each a point beside the one in the base images; 0 keeps the latest point only.
    pub newest: u32,
}

/// A disk as the primary announces it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskSpec {
    /// What people call it.
    pub name: Name,
    /// Its size and sectors.
    pub geometry: Geometry,
    /// The primary's image format.
    pub format: Format,
}

/// How far a replica is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Head {
    /// Nothing was ever received; the images, if they are made yet, read as zeros.
    Empty,
    /// The initial copy is not complete. Also said when nobody remembers whether it began.
    Copying,
    /// The initial copy is complete, or the images of a former primary were adopted; the next epoch makes the first
    /// recovery point.
    Copied(Lineage),
    /// The newest recovery point.
    Complete(Lineage),
}

impl Head {
    /// What the next log has to continue.
    pub fn lineage(self) -> Option<Lineage> {
        match self {
            Self::Empty | Self::Copying => None,
            Self::Copied(lineage) | Self::Complete(lineage) => Some(lineage),
        }
    }
}

/// A recovery point.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Point {
    /// Its epoch and chain hash.
    pub lineage: Lineage,
    /// When the cut was made.
    pub cut: Timestamp,
    /// What it is worth to the guest.
    pub consistency: Consistency,
    /// Bytes of its log; 0 for the point in the base images.
    pub bytes: u64,
}

/// Bytes that passed through a replica since it was opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Received, as they came.
    pub received: u64,
    /// Written to delta logs.
    pub staged: u64,
    /// Read from delta logs to merge them.
    pub merge_read: u64,
    /// Written to base images, by the initial copy and by merges.
    pub image_written: u64,
}

/// The state of a replica at one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReplicaStatus {
    /// How far it is.
    pub head: Head,
    /// Epoch of the base images, or where a merge that is under way started; nothing before the initial copy is
    /// complete.
    pub base: Option<Epoch>,
    /// Target of a merge that is under way or was interrupted.
    pub merging: Option<Epoch>,
    /// Cut time of the newest recovery point.
    pub last_cut: Option<Timestamp>,
    /// The latest generation that wrote here.
    pub generation: Option<Generation>,
    /// Complete delta logs.
    pub logs: usize,
    /// Bytes of the complete delta logs.
    pub log_bytes: u64,
    /// Bytes that passed through.
    pub counters: Counters,
    /// The base images.
    pub images: Vec<ImageStatus>,
}

/// A base image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageStatus {
    /// The disk.
    pub name: Name,
    /// The file in the machine's folder.
    pub file: String,
    /// How it is stored.
    pub format: Format,
    /// What the guest sees.
    pub geometry: Geometry,
}

/// One machine's replica.
#[derive(Debug)]
pub struct MachineReplica {
    pub(super) shared: Arc<Shared>,
}

#[derive(Debug)]
pub(super) struct Shared {
    pub(super) folder: Arc<dyn Folder>,
    pub(super) ledger: Arc<Ledger>,
    pub(super) ids: Arc<dyn Ids>,
    pub(super) id: MachineId,
    pub(super) options: ReplicaOptions,
    pub(super) merging: Mutex<()>,
    pub(super) state: Mutex<State>,
    pub(super) pins: Arc<Pins>,
    pub(super) tally: Tally,
}

#[derive(Debug, Default)]
pub(super) struct State {
    pub(super) record: Option<Record>,
    /// The open base images, as many as the record has disks.
    pub(super) disks: Vec<Arc<dyn Disk>>,
    /// Logs from the base to the head, each the parent of the next.
    pub(super) logs: Vec<Arc<LogFile>>,
    pub(super) receiving: bool,
    /// The images were made in this life and no log was begun since: they read as zeros.
    pub(super) blank: bool,
    /// A complete log in the folder of which nobody knows whether it was recorded.
    pub(super) unsure: Option<String>,
    pub(super) closed: bool,
}

/// [`Counters`] that several threads add to.
#[derive(Debug, Default)]
pub(super) struct Tally {
    pub(super) received: AtomicU64,
    pub(super) staged: AtomicU64,
    pub(super) merge_read: AtomicU64,
    pub(super) image_written: AtomicU64,
}

impl State {
    pub(super) fn head(&self) -> Head {
        let Some(record) = &self.record else {
            return Head::Empty;
        };
        match (record.head, record.base) {
            (None, _) if self.blank => Head::Empty,
            (None, _) => Head::Copying,
            (Some(head), Base::At(base)) if base.lineage == head && !base.exact => {
                Head::Copied(head)
            }
            (Some(head), _) => Head::Complete(head),
        }
    }

    /// The point in the base images, if they hold one.
    pub(super) fn base_point(&self) -> Option<BasePoint> {
        match self.record.as_ref()?.base {
            Base::At(point) if point.exact => Some(point),
            _ => None,
        }
    }

    /// Target of a merge that began.
    pub(super) fn merge_target(&self) -> Option<Epoch> {
        match self.record.as_ref()?.base {
            Base::Merging { to, .. } => Some(to.lineage.epoch),
            _ => None,
        }
    }

    pub(super) fn points(&self) -> Vec<Point> {
        let base = self.base_point().map(|point| Point {
            lineage: point.lineage,
            cut: point.cut,
            consistency: point.consistency,
            bytes: 0,
        });
        let first = self.merge_target().unwrap_or(Epoch::INITIAL);
        let logs = self.logs.iter().filter(|log| log.epoch() >= first);
        let logs = logs.map(|log| {
            let trailer = log.trailer();
            Point {
                lineage: trailer.lineage,
                cut: trailer.cut,
                consistency: trailer.consistency,
                bytes: log.bytes(),
            }
        });
        base.into_iter().chain(logs).collect()
    }

    pub(super) fn log_bytes(&self) -> u64 {
        self.logs.iter().map(|log| log.bytes()).sum()
    }
}

impl Shared {
    /// The state, if the replica is not closed.
    pub(super) fn state(&self) -> Result<MutexGuard<'_, State>, ReplicaError> {
        let state = self.state.lock();
        if state.closed {
            Err(ReplicaError::Closed)
        } else {
            Ok(state)
        }
    }

    /// The state, if the replica is not closed and nobody uses it.
    pub(super) fn idle_state(&self) -> Result<MutexGuard<'_, State>, ReplicaError> {
        let state = self.state()?;
        if state.receiving {
            return Err(ReplicaError::Receiving);
        }
        match self.pins.oldest() {
            Some(epoch) => Err(ReplicaError::PointInUse(epoch)),
            None => Ok(state),
        }
    }

    /// Makes `record` the durable one, then the one in memory.
    pub(super) fn record(&self, state: &mut State, record: Record) -> Result<(), ReplicaError> {
        self.ledger.put(&Record::key(self.id), &record)?;
        state.record = Some(record);
        Ok(())
    }

    /// Opens the base images of `record`.
    pub(super) fn open_images(&self, record: &Record) -> Result<Vec<Arc<dyn Disk>>, ReplicaError> {
        let open = |disk: &DiskRecord| {
            let name = disk.file_name();
            let storage = self
                .folder
                .open(&name, Open::WriteAside)
                .map_err(ReplicaError::io("open", &name))?;
            let opening = Opening::new(Access::ReadWrite, Arc::clone(&self.ids));
            let image = image::open(storage, disk.format, &opening).map_err(|source| {
                ReplicaError::Image {
                    operation: "open",
                    name: name.clone(),
                    source: Box::new(source),
                }
            })?;
            let (expected, found) = (disk.geometry.size, image.geometry().size);
            if expected == found {
                Ok(image)
            } else {
                Err(ReplicaError::Size {
                    name,
                    expected,
                    found,
                })
            }
        };
        record.disks.iter().map(open).collect()
    }

    /// Makes the empty base images of `record`.
    fn create_images(&self, record: &Record) -> Result<(), ReplicaError> {
        for disk in &record.disks {
            let name = disk.file_name();
            let storage = self
                .folder
                .open(&name, Open::CreateNew)
                .map_err(ReplicaError::io("create", &name))?;
            let made = image::create(
                &*storage,
                &image::CreateOptions::new(disk.format, disk.geometry),
                &*self.ids,
            );
            made.map_err(|source| ReplicaError::Image {
                operation: "create",
                name,
                source: Box::new(source),
            })?;
        }
        self.sync_folder()
    }

    /// Removes base images that were being made, and their record.
    pub(super) fn forget(&self, record: &Record) -> Result<(), ReplicaError> {
        for disk in &record.disks {
            self.remove(&disk.file_name())?;
        }
        self.sync_folder()?;
        Ok(self.ledger.remove(&Record::key(self.id))?)
    }

    /// Removes a file that may not be there.
    pub(super) fn remove(&self, name: &str) -> Result<(), ReplicaError> {
        match self.folder.remove(name) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(ReplicaError::io("remove", name)(error))
            }
            _ => Ok(()),
        }
    }

    pub(super) fn sync_folder(&self) -> Result<(), ReplicaError> {
        self.folder.sync().map_err(ReplicaError::io("sync", "."))
    }
}

impl MachineReplica {
    /// How far it is.
    pub fn head(&self) -> Head {
        self.shared.state.lock().head()
    }

    /// All recovery points, oldest first.
    pub fn points(&self) -> Vec<Point> {
        self.shared.state.lock().points()
    }

    /// Makes the base images at first contact; afterwards checks that the disks are still the same. Formats of later
    /// calls are not compared: the images keep theirs.
    pub fn prepare(&self, disks: &[DiskSpec]) -> Result<(), ReplicaError> {
        check_specs(disks)?;
        let shared = &*self.shared;
        let mut state = shared.state()?;
        if let Some(record) = &state.record {
            return compare(&record.disks, disks);
        }
        let creating = Record {
            disks: disks
                .iter()
                .map(|disk| to_record(disk, shared.options.format))
                .collect(),
            base: Base::Creating,
            head: None,
            generation: None,
            discarding: false,
        };
        for disk in &creating.disks {
            self.refuse_existing(&disk.file_name())?;
        }
        // From here on the record says that the images are ours to remove.
        shared.ledger.put(&Record::key(shared.id), &creating)?;
        let made = shared
            .create_images(&creating)
            .and_then(|()| shared.open_images(&creating));
        let images = match made {
            Ok(images) => images,
            Err(error) => {
                if let Err(error) = shared.forget(&creating) {
                    tracing::warn!(machine = %shared.id, %error, "cannot remove unfinished base images now");
                }
                return Err(error);
            }
        };
        // Should this fail, nobody knows which record is the durable one: the images stay, the next open decides.
        let copying = Record {
            base: Base::Copying,
            ..creating
        };
        shared.record(&mut state, copying)?;
        state.disks = images;
        state.blank = true;
        tracing::info!(machine = %shared.id, disks = disks.len(), "replica created");
        Ok(())
    }

    fn refuse_existing(&self, name: &str) -> Result<(), ReplicaError> {
        match self.shared.folder.open(name, Open::Read) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(ReplicaError::io("open", name)(error)),
            Ok(_) => Err(ReplicaError::io("create", name)(
                io::ErrorKind::AlreadyExists.into(),
            )),
        }
    }

    /// What people and the primary want to know.
    pub fn status(&self) -> ReplicaStatus {
        let state = self.shared.state.lock();
        let tally = &self.shared.tally;
        let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let record = state.record.as_ref();
        let disks = record.map_or(&[][..], |record| &record.disks);
        ReplicaStatus {
            head: state.head(),
            base: record
                .and_then(|record| record.base.floor())
                .map(|point| point.lineage.epoch),
            merging: state.merge_target(),
            last_cut: state.points().last().map(|point| point.cut),
            generation: record.and_then(|record| record.generation),
            logs: state.logs.len(),
            log_bytes: state.log_bytes(),
            counters: Counters {
                received: count(&tally.received),
                staged: count(&tally.staged),
                merge_read: count(&tally.merge_read),
                image_written: count(&tally.image_written),
            },
            images: disks
                .iter()
                .map(|disk| ImageStatus {
                    name: disk.name.clone(),
                    file: disk.file_name(),
                    format: disk.format,
                    geometry: disk.geometry,
                })
                .collect(),
        }
    }

    /// Leaves the base images cleanly closed. Refused while a view is open or a log is being received; waits for a
    /// merge. Later calls fail.
    pub fn close(&self) -> Result<(), ReplicaError> {
        let _merging = self.shared.merging.lock();
        let mut state = self.shared.idle_state()?;
        state.closed = true;
        let disks = std::mem::take(&mut state.disks);
        let names = state.record.iter().flat_map(|record| &record.disks);
        for (disk, record) in disks.iter().zip(names) {
            disk.close()
                .map_err(|source| disk_failed(&record.name, source))?;
        }
        Ok(())
    }
}

pub(super) fn disk_failed(name: &Name, source: crate::disk::DiskError) -> ReplicaError {
    ReplicaError::Disk {
        name: name.to_string(),
        source,
    }
}

/// Refuses a set of disks that no machine has.
pub(super) fn check_specs(disks: &[DiskSpec]) -> Result<(), ReplicaError> {
    let names: BTreeSet<&Name> = disks.iter().map(|disk| &disk.name).collect();
    if (1..=DISKS_PER_MACHINE_MAX).contains(&disks.len()) && names.len() == disks.len() {
        Ok(())
    } else {
        Err(ReplicaError::DiskCount(disks.len()))
    }
}

pub(super) fn to_record(disk: &DiskSpec, format: Option<Format>) -> DiskRecord {
    DiskRecord {
        name: disk.name.clone(),
        geometry: disk.geometry,
        format: format.unwrap_or(disk.format),
    }
}

fn compare(known: &[DiskRecord], announced: &[DiskSpec]) -> Result<(), ReplicaError> {
    if known.len() != announced.len() {
        return Err(ReplicaError::Changed(format!(
            "the replica has {} disks, the primary {}",
            known.len(),
            announced.len()
        )));
    }
    for (known, announced) in known.iter().zip(announced) {
        if known.name != announced.name {
            return Err(ReplicaError::Changed(format!(
                "disk {:?} is called {:?} on the primary",
                known.name.as_str(),
                announced.name.as_str()
            )));
        }
        if known.geometry != announced.geometry {
            return Err(ReplicaError::Changed(format!(
                "disk {:?} has {:?} here and {:?} on the primary",
                known.name.as_str(),
                known.geometry,
                announced.geometry
            )));
        }
    }
    Ok(())
}
