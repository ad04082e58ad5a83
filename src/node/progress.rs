//! What the replication thread tells the status: where it stands, what went over the wire, how old the last point is.

use std::time::Duration;

use super::status::{CopyStatus, RpoRecord};
use crate::{
    base::{
        clock::{Clock, Timestamp},
        rate::Meter,
        units::BLOCK_BYTES,
    },
    coord::state::ReplicationState,
    protocol::sender::Agreement,
    volume::Machine,
};

/// Where a replication stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    /// Not connected yet.
    Connecting,
    /// The initial copy runs.
    Copying,
    /// Changes flow.
    Replicating,
    /// No link, and why; it is dialled again.
    Unreachable(String),
    /// The replica refused, and why; somebody has to act.
    Refused(String),
}

impl Phase {
    /// The state a person sees, and why replication does not go on where it does not. `complete`: the replica has
    /// acknowledged a recovery point.
    pub(super) fn state(&self, complete: bool) -> (ReplicationState, Option<String>) {
        match self {
            Self::Connecting if complete => (
                ReplicationState::Suspended,
                Some("connecting to the replica".into()),
            ),
            Self::Connecting => (ReplicationState::ReadyForInitialReplication, None),
            Self::Copying => (ReplicationState::InitialReplicationInProgress, None),
            Self::Replicating => (ReplicationState::Replicating, None),
            Self::Unreachable(why) if complete => (ReplicationState::Suspended, Some(why.clone())),
            Self::Unreachable(why) => (
                ReplicationState::ReadyForInitialReplication,
                Some(why.clone()),
            ),
            Self::Refused(why) => (ReplicationState::Error, Some(why.clone())),
        }
    }
}

/// A running initial copy.
#[derive(Clone, Copy, Debug)]
struct Copy {
    began: Duration,
    total: u64,
    done: u64,
}

/// The figures of one machine's replication.
#[derive(Debug)]
pub(super) struct Progress {
    pub(super) phase: Phase,
    pub(super) rpo: RpoRecord,
    copy: Option<Copy>,
    /// Raw bytes of blocks sent.
    pub(super) raw: u64,
    /// Log bytes sent.
    pub(super) sent: u64,
    /// Epochs that became durable.
    pub(super) epochs: u64,
    /// Log bytes as the link takes them.
    pub(super) meter: Meter,
}

impl Default for Progress {
    fn default() -> Self {
        Self {
            phase: Phase::Connecting,
            rpo: RpoRecord::default(),
            copy: None,
            raw: 0,
            sent: 0,
            epochs: 0,
            meter: Meter::default(),
        }
    }
}

impl Progress {
    /// The heads were compared. `complete`: the replica has a recovery point already.
    pub(super) fn connected(
        &mut self,
        agreement: Agreement,
        complete: bool,
        machine: &Machine,
        clock: &dyn Clock,
    ) {
        self.phase = if complete {
            Phase::Replicating
        } else {
            Phase::Copying
        };
        self.copy = (agreement == Agreement::CopyNeeded).then(|| Copy {
            began: clock.monotonic(),
            total: machine.counters().closing_blocks * BLOCK_BYTES,
            done: 0,
        });
    }

    /// A frame was handed to the link: `raw` bytes of blocks in `bytes` of log.
    pub(super) fn sent(&mut self, raw: u64, bytes: u64) {
        self.raw += raw;
        self.sent += bytes;
        if let Some(copy) = &mut self.copy {
            copy.done += raw;
        }
    }

    /// An epoch became durable; `cut` is nothing for the initial copy.
    pub(super) fn durable(&mut self, cut: Option<Timestamp>, now: Timestamp) {
        self.epochs += 1;
        if let Some(cut) = cut {
            self.rpo.durable(cut, now);
            // The first epoch after the initial copy makes the replica complete.
            self.copy = None;
            self.phase = Phase::Replicating;
        }
    }

    pub(super) fn copy_status(&self, now: Duration) -> Option<CopyStatus> {
        let copy = self.copy?;
        let elapsed = now.saturating_sub(copy.began).as_millis().max(1);
        let rate = u64::try_from(u128::from(copy.done) * 1000 / elapsed).unwrap_or(u64::MAX);
        let left = copy.total.saturating_sub(copy.done);
        let eta_s = left.checked_div(rate);
        Some(CopyStatus {
            done: copy.done.min(copy.total),
            total: copy.total,
            rate,
            eta_s,
        })
    }
}
