//! The state of one machine's replica, and who may touch it when.
//!
//! # Locks
//! `merging` is held for a whole merge or fold, `state` for moments (the longest is one commit of the node's store). A log
//! is received and a merge runs at the same time; both take `state` only to begin and to end. Order: `merging`, `state`,
//! `pins`.

use std::{
    io,
    sync::{Arc, atomic::AtomicU64},
};

use parking_lot::{Mutex, MutexGuard};

use super::{
    error::ReplicaError,
    log::LogFile,
    pins::Pins,
    record::{Base, BasePoint, DiskRecord, Record},
    retention::{Candidate, Kept, Retention},
    status::{Head, Point, ReplicaOptions},
    upkeep::UpkeepState,
};
use crate::{
    base::{
        ids::{Generation, Ids, MachineId},
        limits::LOG_RESIDENT_BYTES_MAX,
        units::Epoch,
    },
    disk::{Access, Disk, Opening, image},
    storage::{Folder, Open, ledger::Ledger},
};

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
    /// What is complete and was not seen recorded.
    pub(super) unsure: Option<Unsure>,
    /// What is remembered between two looks at what can be dropped.
    pub(super) upkeep: UpkeepState,
    pub(super) closed: bool,
}

/// What is durable, and may be recorded or not because the ledger failed. A primary that is told the head before it
/// would forget that the blocks may have arrived, and meet a history that it does not know when the next open takes it up.
#[derive(Clone, Debug)]
pub(super) struct Unsure {
    /// Whose it is.
    pub(super) generation: Generation,
    pub(super) what: Complete,
}

/// The end of a log.
#[derive(Clone, Debug)]
pub(super) enum Complete {
    /// A delta, which has its name.
    Delta(Arc<LogFile>),
    /// The initial copy.
    Initial(BasePoint),
}

/// [`Counters`] that several threads add to.
#[derive(Debug, Default)]
pub(super) struct Tally {
    pub(super) received: AtomicU64,
    pub(super) staged: AtomicU64,
    pub(super) log_read: AtomicU64,
    pub(super) folded: AtomicU64,
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

    /// The point in the base images, if there is nothing beside it.
    pub(super) fn settled(&self) -> Option<BasePoint> {
        let head = self.record.as_ref()?.head;
        let alone = self.logs.is_empty() && self.unsure.is_none();
        self.base_point()
            .filter(|point| alone && head == Some(point.lineage))
    }

    /// Says that the point of `epoch` is in use.
    pub(super) fn in_use(&self, epoch: Epoch) -> ReplicaError {
        match self.rescue() {
            Some(rescue) if rescue.lineage.epoch == epoch => ReplicaError::RescueInUse,
            _ => ReplicaError::PointInUse(epoch),
        }
    }

    /// What retention decides about the point in the base images and those of all logs, in this order. Images that hold
    /// no point by themselves take part as the place that the first log starts from. Those that a rescue point is in
    /// stay as if somebody looked at them.
    pub(super) fn decisions(&self, retention: Retention, pins: &Pins) -> Vec<Kept> {
        let floor = self.record.as_ref().and_then(|record| record.base.floor());
        let Some(floor) = floor else {
            return Vec::new();
        };
        let base = Candidate {
            epoch: floor.lineage.epoch,
            cut: floor.cut,
            whole: self.base_point().is_some(),
        };
        let logs = self.logs.iter().map(|log| Candidate {
            epoch: log.epoch(),
            cut: log.trailer().cut,
            whole: true,
        });
        let candidates: Vec<_> = std::iter::once(base).chain(logs).collect();
        let rescue = self.rescue().map(|rescue| rescue.lineage.epoch);
        retention.decide(&candidates, |epoch| {
            pins.holds(epoch) || rescue == Some(epoch)
        })
    }

    /// All recovery points, oldest first. What lies between two points that are kept is not one, although its log may
    /// still be there; what is older than all of them is one as long as the images are not past it.
    pub(super) fn points(&self, retention: Retention, pins: &Pins) -> Vec<Point> {
        let decisions = self.decisions(retention, pins);
        let oldest = decisions.iter().position(|kept| *kept != Kept::No);
        let base = self.base_point().map(|point| Point {
            lineage: point.lineage,
            cut: point.cut,
            consistency: point.consistency,
            bytes: 0,
        });
        let first = self.merge_target().unwrap_or(Epoch::INITIAL);
        let mut bytes = 0;
        let mut points: Vec<_> = base.into_iter().collect();
        for ((number, log), kept) in (1..).zip(&self.logs).zip(decisions.iter().skip(1)) {
            // Whatever was passed over belongs to the point after it.
            bytes += log.bytes();
            let passed_over = *kept == Kept::No && oldest.is_some_and(|oldest| number > oldest);
            if log.epoch() < first || passed_over {
                continue;
            }
            let trailer = log.trailer();
            points.push(Point {
                lineage: trailer.lineage,
                cut: trailer.cut,
                consistency: trailer.consistency,
                bytes: std::mem::take(&mut bytes),
            });
        }
        points
    }

    /// Adds the newest log, and lets go of the content of old ones beyond [`LOG_RESIDENT_BYTES_MAX`].
    pub(super) fn push_log(&mut self, log: Arc<LogFile>) {
        self.logs.push(log);
        self.trim_residents();
    }

    pub(super) fn trim_residents(&self) {
        let mut held = 0;
        for log in self.logs.iter().rev() {
            held += log.resident_bytes();
            if held > LOG_RESIDENT_BYTES_MAX {
                log.let_go();
            }
        }
    }

    /// Bytes that logs take, with one that others are being folded into.
    pub(super) fn space_used(&self) -> u64 {
        self.log_bytes().saturating_add(self.upkeep.folding)
    }

    pub(super) fn log_bytes(&self) -> u64 {
        self.logs.iter().map(|log| log.bytes()).sum()
    }
}

impl Shared {
    /// All recovery points, oldest first.
    pub(super) fn points(&self, state: &State) -> Vec<Point> {
        state.points(self.options.retention, &self.pins)
    }

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
            Some(epoch) => Err(state.in_use(epoch)),
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
            if expected == found || (record.growing && expected < found) {
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

    /// Names of all files in the folder.
    pub(super) fn names(&self) -> Result<Vec<String>, ReplicaError> {
        self.folder.names().map_err(ReplicaError::io("list", "."))
    }

    pub(super) fn sync_folder(&self) -> Result<(), ReplicaError> {
        self.folder.sync().map_err(ReplicaError::io("sync", "."))
    }
}
