//! Upkeep: what a replica does with its logs between epochs, one step at a time.
//!
//! ```text
//!   merge what retention no longer needs -> fold what it does not tell apart, where that pays
//!   space short:  fold as if only the hourly points were wanted -> merge everything but the latest -> refuse new logs
//! ```
//! Above a rescue point nothing is merged: everything but the latest is folded into one log instead, and only where that
//! is not enough the rescue point is given up, so that merging can go on.
//!
//! Space is short above half of the limit, so that there is room for the next log and for the copy that a fold makes,
//! and when the host's disk was full. No step touches the last complete point, and none goes beyond a point in use.

use std::collections::BTreeMap;

use super::{
    error::ReplicaError,
    fold::{FoldReport, Payoff, Weighed},
    merge::MergeReport,
    retention::Retention,
    state::{Shared, State},
    status::Squeeze,
    store::MachineReplica,
};
use crate::base::{clock::Timestamp, units::Epoch};

/// One step of the upkeep.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Upkeep {
    /// Logs went into the base images.
    Merged(MergeReport),
    /// Logs became one log.
    Folded(FoldReport),
}

/// What is remembered between two steps.
#[derive(Debug, Default)]
pub(super) struct UpkeepState {
    /// Groups that did not pay, by the point they start from.
    pub(super) weighed: BTreeMap<Epoch, Weighed>,
    /// Bytes that a fold under way will write.
    pub(super) folding: u64,
    /// The last log found no space.
    full: bool,
    /// The rescue point was given up for space.
    rescue_lost: bool,
    dropped: Option<Dropped>,
}

/// Points that retention would have kept, and the newest point when they were dropped.
#[derive(Clone, Copy, Debug)]
struct Dropped {
    how: Squeeze,
    head: Epoch,
    cut: Timestamp,
}

impl UpkeepState {
    /// How far the lack of space went.
    pub(super) fn squeeze(&self) -> Squeeze {
        if self.full {
            Squeeze::Refusing
        } else {
            let points = self.dropped.map_or(Squeeze::None, |dropped| dropped.how);
            if self.rescue_lost {
                points.max(Squeeze::NoRescue)
            } else {
                points
            }
        }
    }

    /// The rescue point was given up. It does not come back, so that is not forgiven.
    pub(super) fn lost_rescue(&mut self) {
        self.rescue_lost = true;
    }

    /// A log was staged.
    pub(super) fn found_space(&mut self) {
        self.full = false;
    }

    /// A log or a fold found no space.
    pub(super) fn found_none(&mut self) {
        self.full = true;
    }
}

impl MachineReplica {
    /// Takes the next step, if there is one to take. Takes as long as it takes; logs are received and views read
    /// meanwhile. Call it after each epoch until it gives nothing.
    pub fn upkeep(&self) -> Result<Option<Upkeep>, ReplicaError> {
        let shared = &*self.shared;
        let _merging = shared.merging.lock();
        let count = shared.surplus(&*shared.state()?);
        if let Some(report) = shared.merge_oldest(count)? {
            return Ok(Some(Upkeep::Merged(report)));
        }
        let retention = shared.options.retention;
        if let Some(report) = shared.try_fold(retention, Payoff::Half)? {
            return Ok(Some(Upkeep::Folded(report)));
        }
        if !shared.is_pressed(&*shared.state()?) {
            shared.forgive(&mut *shared.state()?);
            return Ok(None);
        }
        let coarse = Retention {
            newest: 0,
            ..retention
        };
        if let Some(report) = shared.try_fold(coarse, Payoff::Eighth)? {
            shared.note(&mut *shared.state()?, Squeeze::Finest);
            return Ok(Some(Upkeep::Folded(report)));
        }
        shared.keep_only_latest()
    }
}

impl Shared {
    /// Drops all points but the latest, or those before the oldest one in use.
    fn keep_only_latest(&self) -> Result<Option<Upkeep>, ReplicaError> {
        if self.state()?.rescue().is_some() {
            if let Some(report) = self.try_fold(Retention::default(), Payoff::Eighth)? {
                self.note(&mut *self.state()?, Squeeze::AllButOne);
                return Ok(Some(Upkeep::Folded(report)));
            }
            if !self.sacrifice_rescue()? {
                return Ok(None);
            }
        }
        let all = self.state()?.logs.len();
        let merged = self.merge_oldest(all)?;
        if merged.is_some() {
            self.note(&mut *self.state()?, Squeeze::AllButOne);
        }
        Ok(merged.map(Upkeep::Merged))
    }

    /// A fold that finds the disk full is no failure: the merge may still find space.
    fn try_fold(
        &self,
        retention: Retention,
        payoff: Payoff,
    ) -> Result<Option<FoldReport>, ReplicaError> {
        match self.fold_one(retention, payoff) {
            Err(error) if error.is_full() => {
                tracing::warn!(machine = %self.id, "no space to fold delta logs");
                self.state()?.upkeep.found_none();
                Ok(None)
            }
            other => other,
        }
    }

    fn is_pressed(&self, state: &State) -> bool {
        let half = self.options.space_max.map(|limit| limit / 2);
        state.upkeep.full || half.is_some_and(|half| state.log_bytes() > half)
    }

    /// Points that retention would have kept were dropped.
    fn note(&self, state: &mut State, how: Squeeze) {
        let Some(head) = self.points(state).pop() else {
            return;
        };
        let before = state.upkeep.dropped.map_or(Squeeze::None, |was| was.how);
        if before < how {
            tracing::warn!(machine = %self.id, ?how, "recovery points were dropped for space");
        }
        state.upkeep.dropped = Some(Dropped {
            how: how.max(before),
            head: head.lineage.epoch,
            cut: head.cut,
        });
    }

    /// Once retention asks for no point from before, nothing is missing any more.
    fn forgive(&self, state: &mut State) {
        let Some(dropped) = state.upkeep.dropped else {
            return;
        };
        let Retention { newest, hourly } = self.options.retention;
        let logs = state.logs.iter().map(|log| log.epoch());
        let newer = logs.filter(|epoch| *epoch > dropped.head).count();
        let head = self.points(state).pop();
        let hours = head.map_or(0, |head| head.cut.since(dropped.cut).as_secs() / 3600);
        if newer >= usize::try_from(newest).unwrap_or(usize::MAX) && hours >= u64::from(hourly) {
            state.upkeep.dropped = None;
        }
    }
}
