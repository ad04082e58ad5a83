//! Bringing what runs for a machine in line with what its record says.

use std::{
    collections::BTreeMap,
    fs,
    sync::{Arc, Weak},
};

use super::{
    config::ReplicationConfig,
    member::{Member, Running, StartError},
    record::{ImageRecord, Record},
    serving::Serving,
};
use crate::{
    base::chain::chain,
    base::ids::MachineId,
    coord::role::{Active, Part},
    disk::Access,
    node::{
        driver::{self, Subject, Target},
        images::{self, ImageConfig},
        primary::PrimaryError,
        served::{Opening, Served, disk_spec},
        sources::{open_images, spec},
    },
    replica::{Head, ImageStatus, image_name},
    shim::{Unmount, Writability},
    storage::{Folder, file::FileFolder, placed::PlacedFolder},
    track::state::StateDir,
    volume,
};

impl Member {
    /// Brings what runs in line with the record.
    pub(super) fn arrange(&self) -> Result<(), StartError> {
        let record = self.record();
        let arranged = match record.role.part {
            Part::Primary | Part::FailedOver { .. } => self.serve(&record),
            Part::Split { was, .. } if !matches!(was, Active::SteppedDown { .. }) => {
                self.serve(&record)
            }
            Part::Fenced { .. } => self.fence(),
            Part::Split { .. } | Part::SteppedDown { .. } | Part::Returning { .. } => {
                self.idle(Unmount::IfUnused)
            }
            Part::Replica { .. } => self.follow(&record),
        };
        *self.trouble.lock() = arranged.as_ref().err().map(|error| chain(error));
        arranged
    }

    fn serve(&self, record: &Record) -> Result<(), StartError> {
        let serving = if let Some(serving) = self.serving() {
            serving
        } else {
            let below = self.following();
            if let Some(below) = &below {
                drop(below.end_session("this host takes over"));
            }
            self.serves(Serving::open(self, record, below)?)
        };
        let show = self.show();
        if show.access == Access::ReadWrite {
            serving.primary.set_writable(Writability::Writable);
        }
        if record.role.part != Part::Primary {
            serving.primary.end_replication();
            return Ok(());
        }
        if let Some(callee) = self.callee() {
            let replication = self.replication();
            let pacing = (self.shared.limiters).pacing(&replication, &self.shared.clock);
            let ReplicationConfig {
                interval,
                compression,
                ..
            } = replication;
            let subject = Subject {
                id: record.id,
                name: self.name.clone(),
                generation: record.role.generation,
                born: record.role.born,
                disks: serving.primary.specs(),
            };
            let me = Weak::clone(&self.me);
            let again = Weak::clone(&self.me);
            let host = driver::Host {
                clock: Arc::clone(&self.shared.clock),
                ids: Arc::clone(&self.shared.ids),
                runtime: self.shared.runtime.clone(),
                answered: Arc::new(move |answer| {
                    if let Some(member) = me.upgrade() {
                        member.answered(answer);
                    }
                }),
                set_copy_due: Arc::new(move |due| match again.upgrade() {
                    Some(member) => member.set_copy_due(due).map_err(|error| chain(&error)),
                    None => Err("the node is being stopped".into()),
                }),
            };
            let target = Target {
                copy_due: self.copy_due().map_err(StartError::other)?,
                callee,
                interval,
                compression,
                pacing,
            };
            match record.suspended {
                Some(since) => serving.primary.suspend(&target, since),
                None => serving.primary.replicate(subject, target, host)?,
            }
        } else {
            serving.primary.end_replication();
        }
        let folding = serving.fold(Weak::clone(&self.me));
        folding.map_err(|error| PrimaryError::Thread(error).into())
    }

    /// Nobody writes here any more. Whoever has a disk open reads on until he leaves.
    fn fence(&self) -> Result<(), StartError> {
        match self.serving() {
            Some(serving) => {
                serving.primary.refuse_writes();
                serving.primary.end_replication();
                Ok(())
            }
            None => self.idle(Unmount::IfUnused),
        }
    }

    /// Lets go of all disks. Only a mount that is still in use leaves everything as it was.
    pub(super) fn idle(&self, how: Unmount) -> Result<(), StartError> {
        let running = self.running.lock().clone();
        let below = match &running {
            Running::Idle => return Ok(()),
            Running::Serving(serving) => match serving.close(how) {
                Err(StartError::Primary(error @ PrimaryError::Unmount(_))) => {
                    return Err(error.into());
                }
                closed => closed,
            },
            Running::Following(served) => Ok(Some(Arc::clone(served))),
        };
        *self.running.lock() = Running::Idle;
        // The layers hold the point below them.
        drop(running);
        match below? {
            Some(below) => below.close().map_err(StartError::other),
            None => Ok(()),
        }
    }

    fn follow(&self, record: &Record) -> Result<(), StartError> {
        if self.following().is_some() {
            return Ok(());
        }
        self.idle(Unmount::IfUnused)?;
        self.forget_serving(record.id)?;
        let served = if let Some(adoption) = record.adoption {
            let images = self.images(record);
            let opened = open_images(&images, Access::ReadOnly, &self.shared.ids)?;
            let specs: Vec<_> = opened.iter().map(spec).collect();
            drop(opened);
            let specs = specs.iter().map(disk_spec).collect::<Result<Vec<_>, _>>();
            let specs = specs.map_err(StartError::other)?;
            let served = self.open_replica(record)?;
            if served.store.head() == Head::Empty {
                let adoption = adoption.by(record.role.generation);
                served
                    .store
                    .adopt(&specs, adoption)
                    .map_err(StartError::other)?;
            }
            self.change(|record| record.adoption = None)
                .map_err(StartError::other)?;
            served
        } else {
            self.open_replica(record)?
        };
        *self.running.lock() = Running::Following(served);
        Ok(())
    }

    /// Removes what a machine that is served leaves: its tracking, its layers. A replica needs neither.
    pub(super) fn forget_serving(&self, id: MachineId) -> Result<(), StartError> {
        let tracking = self.places.tracking();
        if tracking.exists() {
            let state = StateDir::open(&tracking).map_err(StartError::other)?;
            volume::forget(&self.shared.ledger, id, &state).map_err(StartError::other)?;
            fs::remove_dir_all(&tracking).map_err(StartError::other)?;
        }
        self.remove_layers()
    }

    /// Removes layers that nothing reads any more, durably: a power cut does not bring them back under a later failover.
    pub(super) fn remove_layers(&self) -> Result<(), StartError> {
        match fs::remove_dir_all(self.places.layers()) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(StartError::other(error));
            }
            _ => {}
        }
        let folder = FileFolder::open(&self.places.0).map_err(StartError::other)?;
        folder.sync().map_err(StartError::other)
    }

    /// What an earlier failover left must not be found under the next one: it is gone before a promotion is recorded.
    pub(super) fn clear_for_promotion(&self, record: &Record) -> Result<(), StartError> {
        match record.role.part {
            Part::Replica { .. } => self.forget_serving(record.id),
            // The role machine refuses the promotion.
            _ => Ok(()),
        }
    }

    /// Opens the replica of the machine, with configured images in their places.
    pub(super) fn open_replica(&self, record: &Record) -> Result<Arc<Served>, StartError> {
        let shared = &self.shared;
        let store = match &record.store {
            Some(store) => &FileFolder::open(store).map_err(StartError::other)?,
            None => &shared.folder,
        };
        let folder = store
            .folder(self.name.as_str())
            .map_err(StartError::other)?;
        let folder: Arc<dyn Folder> = match shared.config.machines.get(&self.name) {
            None => folder,
            Some(machine) => {
                let place = |image: &ImageConfig| {
                    (image_name(&image.name, image.format), image.path.clone())
                };
                let places: BTreeMap<_, _> = machine.images.iter().map(place).collect();
                Arc::new(PlacedFolder::new(folder, places))
            }
        };
        let configured = shared.config.machines.get(&self.name);
        let locks = configured.into_iter().flat_map(|machine| &machine.images);
        let locks = locks
            .map(|image| images::lock(&image.path, Access::ReadWrite))
            .collect::<Result<Vec<_>, _>>()
            .map_err(StartError::other)?;
        let opening = Opening {
            id: record.id,
            name: self.name.clone(),
            path: self.places.0.clone(),
            folder,
            ledger: Arc::clone(&shared.ledger),
            ids: Arc::clone(&shared.ids),
            clock: Arc::clone(&shared.clock),
            keeping: shared
                .config
                .keeping_of(&self.name, record.peer.as_ref())
                .clone(),
            mounter: shared.config.mounter.clone(),
            locks,
            held: record.layers.map(|layers| layers.point.epoch),
        };
        Served::open(opening).map_err(StartError::other)
    }

    /// The images of a replica, to be remembered when it becomes a primary.
    pub(super) fn image_records(served: &Served) -> Vec<ImageRecord> {
        let images = served.store.status().images;
        let record = |image: ImageStatus| ImageRecord {
            name: image.name,
            file: image.file,
            format: image.format,
        };
        images.into_iter().map(record).collect()
    }
}
