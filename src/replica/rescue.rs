//! The rescue point: what a former primary had and nobody else has, kept until somebody has looked.
//!
//! After an unplanned failover the old primary becomes a replica on its own images. They hold writes that never left
//! the host, and the first epoch of the new primary overwrites them. So as long as the rescue point is kept, nothing is
//! merged: the images stay as they were adopted, and what comes is held in logs, of which neighbours that retention does
//! not tell apart are folded, so that they take space for what differs and not for what was sent.
//!
//! # Crash contract
//! The record that adopts the images says that they are kept, and the one that lets them go precedes the first merge.

use serde::{Deserialize, Serialize};

use super::{
    error::ReplicaError,
    record::{Base, Record},
    state::{Shared, State},
    status::Point,
    store::MachineReplica,
    view::PointView,
};
use crate::{
    base::{
        checksum::{Digest, Sha256},
        clock::Timestamp,
        ids::{Generation, Lineage},
    },
    delta::Consistency,
};

/// The last state of a former primary, crash-consistent: a point beside the history of its machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rescue {
    /// The last point of the history that it follows.
    pub lineage: Lineage,
    /// When the cut of that point was made: everything later is in the rescue point only.
    pub cut: Timestamp,
    /// The generation that took over.
    pub generation: Generation,
}

impl Rescue {
    /// Names its content: SHA-256 over the word `rescue`, the chain hash of the point it follows, and the generation
    /// (number, 8 bytes little-endian, and identity) that took over. A primary may be replaced at the same point twice.
    pub fn identity(&self) -> Digest {
        let mut hash = Sha256::default();
        hash.update(b"rescue");
        hash.update(&self.lineage.chain.0);
        hash.update(&self.generation.number.to_le_bytes());
        hash.update(self.generation.id.as_bytes());
        hash.finish()
    }

    /// As a point to look at. Its lineage is its own: the epoch it follows, and its identity for a chain hash.
    pub fn point(&self) -> Point {
        Point {
            lineage: Lineage {
                epoch: self.lineage.epoch,
                chain: self.identity(),
            },
            cut: self.cut,
            consistency: Consistency::Crash,
            bytes: 0,
        }
    }
}

impl MachineReplica {
    /// The rescue point, if there is one. It is none of the recovery points.
    pub fn rescue(&self) -> Option<Rescue> {
        self.shared.state.lock().rescue()
    }

    /// The disks of the rescue point, read-only. While one of them is in use the rescue point stays.
    pub fn view_rescue(&self) -> Result<PointView, ReplicaError> {
        let state = self.shared.state()?;
        let rescue = state.rescue().ok_or(ReplicaError::NoRescue)?;
        self.shared.show(state, rescue.point(), Vec::new())
    }

    /// Gives the rescue point up, if there is one: the next merge overwrites it. Refused while a view of it is open.
    pub fn drop_rescue(&self) -> Result<(), ReplicaError> {
        let shared = &*self.shared;
        let mut state = shared.state()?;
        let Some(rescue) = state.rescue() else {
            return Ok(());
        };
        if shared.pins.holds(rescue.lineage.epoch) {
            return Err(ReplicaError::RescueInUse);
        }
        shared.drop_rescue(&mut state)
    }
}

impl State {
    /// The rescue point. It is in images that are at rest: merges begin after it is dropped.
    pub(super) fn rescue(&self) -> Option<Rescue> {
        self.record.as_ref()?.rescue
    }
}

impl Shared {
    /// Durably; nobody looks at it.
    fn drop_rescue(&self, state: &mut State) -> Result<(), ReplicaError> {
        let Some(record) = state.record.clone() else {
            return Ok(());
        };
        debug_assert!(matches!(record.base, Base::At(_)));
        let dropped = Record {
            rescue: None,
            ..record
        };
        self.record(state, dropped)?;
        tracing::info!(machine = %self.id, "the rescue point was dropped");
        Ok(())
    }

    /// Drops the rescue point because there is no space for the logs above it. Not if somebody looks at it, and not
    /// where that would gain nothing.
    pub(super) fn sacrifice_rescue(&self) -> Result<bool, ReplicaError> {
        let mut state = self.state()?;
        let Some(rescue) = state.rescue() else {
            return Ok(false);
        };
        if state.logs.is_empty() || self.pins.holds(rescue.lineage.epoch) {
            return Ok(false);
        }
        tracing::warn!(machine = %self.id, follows = %rescue.lineage.epoch, "space is short: the rescue point is given up");
        self.drop_rescue(&mut state)?;
        state.upkeep.lost_rescue();
        Ok(true)
    }
}
