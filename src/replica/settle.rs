//! Giving the disks to one recovery point: what a commit of a failover does before the images become a primary's.

use super::{
    error::ReplicaError,
    log::log_name,
    record::Record,
    store::{Head, MachineReplica},
};
use crate::base::{
    ids::Lineage,
    units::{DiskIndex, Epoch, Extent},
};

impl MachineReplica {
    /// All runs that logs after point `epoch` changed: what the old primary has and this replica will not have after
    /// [`settle`](Self::settle). Runs may overlap. Keep them durable before settling, since it removes the logs.
    pub fn extents_after(&self, epoch: Epoch) -> Result<Vec<(DiskIndex, Extent)>, ReplicaError> {
        let state = self.shared.state()?;
        let known = state
            .points()
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
            let points = state.points();
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
}
