//! One machine's replica: made, looked at, closed.

use std::{
    collections::BTreeSet,
    io,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use super::{
    error::ReplicaError,
    record::{Base, DiskRecord, Record},
    state::Shared,
    status::{Counters, DiskSpec, Head, Point, ReplicaStatus},
};
use crate::{
    base::{ids::Name, limits::DISKS_PER_MACHINE_MAX},
    disk::{
        Geometry,
        image::{self, Format},
    },
    storage::Open,
};

/// One machine's replica.
#[derive(Debug)]
pub struct MachineReplica {
    pub(super) shared: Arc<Shared>,
}

impl MachineReplica {
    /// How far it is.
    pub fn head(&self) -> Head {
        self.shared.state.lock().head()
    }

    /// All recovery points, oldest first.
    pub fn points(&self) -> Vec<Point> {
        let state = self.shared.state.lock();
        self.shared.points(&state)
    }

    /// Makes the base images at first contact; afterwards checks that the disks are still the same, and grows the images
    /// of those that are larger now, which is refused while a view is open or a log is being received. Formats of later
    /// calls are not compared: the images keep theirs.
    pub fn prepare(&self, disks: &[DiskSpec]) -> Result<(), ReplicaError> {
        check_specs(disks)?;
        let shared = &*self.shared;
        let mut state = shared.state()?;
        if let Some(record) = &state.record {
            let announced = same_disks(&record.disks, disks)?;
            if announced == record.disks {
                return Ok(());
            }
            drop(state);
            return self.grow(&announced);
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
            growing: false,
            rescue: None,
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
            last_cut: self.shared.points(&state).last().map(|point| point.cut),
            generation: record.and_then(|record| record.generation),
            logs: state.logs.len(),
            log_bytes: state.log_bytes(),
            space_max: self.shared.options.space_max,
            squeeze: state.upkeep.squeeze(),
            rescue: state.rescue(),
            counters: Counters {
                received: count(&tally.received),
                staged: count(&tally.staged),
                log_read: count(&tally.log_read),
                folded: count(&tally.folded),
                image_written: count(&tally.image_written),
            },
            images: disks.iter().map(DiskRecord::image).collect(),
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

impl Shared {
    /// Makes the empty base images of `record`.
    fn create_images(&self, record: &Record) -> Result<(), ReplicaError> {
        for disk in &record.disks {
            let name = disk.file_name();
            let storage = self
                .folder
                .open(&name, Open::CreateNew)
                .map_err(ReplicaError::io("create", &name))?;
            let options = image::CreateOptions::new(disk.format, disk.geometry);
            let made = image::create(&*storage, &options, &*self.ids);
            made.map_err(|source| ReplicaError::Image {
                operation: "create",
                name,
                source: Box::new(source),
            })?;
        }
        self.sync_folder()
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

/// The disks that are known, in the sizes that are announced.
fn same_disks(
    known: &[DiskRecord],
    announced: &[DiskSpec],
) -> Result<Vec<DiskRecord>, ReplicaError> {
    if known.len() != announced.len() {
        return Err(ReplicaError::Changed(format!(
            "the replica has {} disks, the primary {}",
            known.len(),
            announced.len()
        )));
    }
    let same = |(known, announced): (&DiskRecord, &DiskSpec)| {
        if known.name != announced.name {
            return Err(ReplicaError::Changed(format!(
                "disk {:?} is called {:?} on the primary",
                known.name.as_str(),
                announced.name.as_str()
            )));
        }
        let grown = Geometry {
            size: known.geometry.size.max(announced.geometry.size),
            ..known.geometry
        };
        if grown == announced.geometry {
            Ok(DiskRecord {
                geometry: grown,
                ..known.clone()
            })
        } else {
            Err(ReplicaError::Changed(format!(
                "disk {:?} has {:?} here and {:?} on the primary",
                known.name.as_str(),
                known.geometry,
                announced.geometry
            )))
        }
    };
    known.iter().zip(announced).map(same).collect()
}
