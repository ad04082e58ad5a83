//! Where replicas come from and go to, other than by an initial copy: a commit of a failover settles the images on one
//! point before they become a primary's; a reversal adopts the images of a former primary; a removal leaves nothing.

use super::{
    error::ReplicaError,
    log::log_name,
    record::{Base, BasePoint, Record},
    status::{DiskSpec, Head},
    store::{MachineReplica, check_specs, to_record},
};
use crate::{
    base::{
        clock::Timestamp,
        ids::{Generation, Lineage},
        units::{DiskIndex, Epoch, Extent},
    },
    delta::Consistency,
};

/// What the images of a former primary hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Adoption {
    /// The point that the next log continues.
    pub lineage: Lineage,
    /// When its cut was made.
    pub cut: Timestamp,
    /// Whether the images hold exactly that point. If not, the next log has to hold every block that may differ, and
    /// there is no recovery point before it.
    pub exact: bool,
    /// The generation that continues it.
    pub generation: Generation,
}

impl MachineReplica {
    /// All runs that logs after point `epoch` changed: what the old primary has and this replica will not have after
    /// [`settle`](Self::settle). Runs may overlap. Keep them durable before settling, since it removes the logs.
    pub fn extents_after(&self, epoch: Epoch) -> Result<Vec<(DiskIndex, Extent)>, ReplicaError> {
        let state = self.shared.state()?;
        let known = self
            .shared
            .points(&state)
            .iter()
            .any(|point| point.lineage.epoch == epoch);
        if !known {
            return Err(ReplicaError::NoPoint(epoch));
        }
        let later = state.logs.iter().filter(|log| log.epoch() > epoch);
        let later: Vec<_> = later.cloned().collect();
        drop(state);
        let mut extents = Vec::new();
        for log in later {
            let frames = log.frames()?;
            extents.extend(
                frames
                    .iter()
                    .map(|frame| (frame.header.disk, frame.header.run)),
            );
        }
        Ok(extents)
    }

    /// Drops all points but `epoch` and folds it into the base images, which hold nothing else afterwards. Refused while
    /// a log is being received or a view of another point is open. Interrupted, it is called again with the same point.
    pub fn settle(&self, epoch: Epoch) -> Result<Lineage, ReplicaError> {
        let shared = &*self.shared;
        let _merging = shared.merging.lock();
        let later = {
            let mut state = shared.state()?;
            if state.receiving {
                return Err(ReplicaError::Receiving);
            }
            if let Some(other) = shared.pins.other_than(epoch) {
                return Err(ReplicaError::PointInUse(other));
            }
            let points = shared.points(&state);
            let point = points.iter().find(|point| point.lineage.epoch == epoch);
            let lineage = point.ok_or(ReplicaError::NoPoint(epoch))?.lineage;
            let record = state.record.clone().ok_or(ReplicaError::NotPrepared)?;
            let back = Record {
                head: Some(lineage),
                discarding: true,
                ..record
            };
            shared.record(&mut state, back)?;
            let count = state.logs.iter().filter(|log| log.epoch() <= epoch).count();
            let later = state.logs.split_off(count);
            tracing::info!(machine = %shared.id, %epoch, dropped = later.len(), "settles on a recovery point");
            later
        };
        for log in later {
            shared.remove(&log_name(log.epoch()))?;
        }
        shared.sync_folder()?;
        let count = {
            let mut state = shared.state()?;
            let record = state.record.clone().ok_or(ReplicaError::NotPrepared)?;
            let done = Record {
                discarding: false,
                ..record
            };
            shared.record(&mut state, done)?;
            state.logs.len()
        };
        shared.merge_oldest(count)?;
        match self.head() {
            Head::Complete(lineage) if lineage.epoch == epoch => Ok(lineage),
            _ => Err(ReplicaError::NoPoint(epoch)),
        }
    }

    /// Makes a replica of images that lie in the folder already, called as the replica would call them: those of a primary
    /// that became a replica. Nobody else writes them any more, and they were closed cleanly.
    pub fn adopt(&self, disks: &[DiskSpec], adoption: Adoption) -> Result<(), ReplicaError> {
        check_specs(disks)?;
        let shared = &*self.shared;
        let mut state = shared.state()?;
        if state.record.is_some() {
            return Err(ReplicaError::Changed(
                "there is a replica already".to_owned(),
            ));
        }
        let record = Record {
            disks: disks.iter().map(|disk| to_record(disk, None)).collect(),
            base: Base::At(BasePoint {
                lineage: adoption.lineage,
                cut: adoption.cut,
                consistency: Consistency::Crash,
                exact: adoption.exact,
            }),
            head: Some(adoption.lineage),
            generation: Some(adoption.generation),
            discarding: false,
        };
        let images = shared.open_images(&record)?;
        // Whoever put them here may not have made their names durable.
        shared.sync_folder()?;
        shared.record(&mut state, record)?;
        state.disks = images;
        tracing::info!(machine = %shared.id, epoch = %adoption.lineage.epoch, "images adopted");
        Ok(())
    }

    /// Removes everything: images, logs and record. Refused while a view is open or a log is being received; waits for a
    /// merge. Interrupted, it is finished by the next open. Later calls fail.
    pub fn destroy(&self) -> Result<(), ReplicaError> {
        let shared = &*self.shared;
        let _merging = shared.merging.lock();
        let mut state = shared.idle_state()?;
        let Some(record) = state.record.clone() else {
            state.closed = true;
            return Ok(());
        };
        // From here on the next open removes what is left.
        let gone = Record {
            base: Base::Creating,
            head: None,
            ..record
        };
        shared.record(&mut state, gone.clone())?;
        state.closed = true;
        state.disks.clear();
        state.logs.clear();
        let names = shared
            .folder
            .names()
            .map_err(ReplicaError::io("list", "."))?;
        shared.remove_logs(&names)?;
        shared.forget(&gone)?;
        tracing::info!(machine = %shared.id, "replica removed");
        Ok(())
    }
}
