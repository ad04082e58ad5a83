//! What the replication thread tells the status: where it stands, what went over the wire, how old the last point is.

use std::time::Duration;

use super::{
    status::{CopyStatus, ResyncStatus, RpoRecord},
    verify::Verifying,
};
use crate::{
    base::{
        clock::{Clock, Timestamp},
        rate::Meter,
        units::BLOCK_BYTES,
    },
    coord::state::ReplicationState,
    protocol::sender::Agreement,
    volume::{Machine, ResyncReason, Sifted},
};

/// Where a replication stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    /// Not connected yet.
    Connecting,
    /// The replica has nothing, and its copy is not due yet; nothing if it is not due by itself.
    CopyWaits(Option<Timestamp>),
    /// The initial copy is being written to a portable disk.
    Exporting,
    /// The initial copy runs.
    Copying,
    /// Changes flow.
    Replicating,
    /// An operator stopped it until it is resumed.
    Suspended(Timestamp),
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
            Self::CopyWaits(due) => {
                let why = match due {
                    Some(due) => format!("it waits until {due}; `understudy copy` begins it at once"),
                    None => "it waits for a portable copy (`understudy export` and `import`); `understudy copy` sends it over the network".into(),
                };
                (
                    ReplicationState::ReadyForInitialReplication,
                    Some(format!("the initial copy has not begun: {why}")),
                )
            }
            Self::Exporting => (
                ReplicationState::InitialReplicationInProgress,
                Some("it is being exported to a portable disk".into()),
            ),
            Self::Copying => (ReplicationState::InitialReplicationInProgress, None),
            Self::Replicating => (ReplicationState::Replicating, None),
            Self::Suspended(since) => {
                let why = format!("suspended since {since}, until `understudy resume`");
                (ReplicationState::Suspended, Some(why))
            }
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

/// The resync that runs, or the last one since the node started.
#[derive(Clone, Copy, Debug)]
struct Resync {
    reason: ResyncReason,
    began: Duration,
    /// When it was over; nothing while it runs.
    ended: Option<Duration>,
    total: u64,
    compared: u64,
    equal: u64,
    differing: u64,
    read: u64,
    asked: u64,
}

/// The figures of one machine's replication.
#[derive(Debug)]
pub(super) struct Progress {
    pub(super) phase: Phase,
    pub(super) rpo: RpoRecord,
    copy: Option<Copy>,
    resync: Option<Resync>,
    /// The verification that runs, or the last one.
    pub(super) verify: Option<Verifying>,
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
            resync: None,
            verify: None,
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
        self.resync(machine, clock);
    }

    /// The initial copy, of `total` bytes, is written to a portable disk from now on.
    pub(super) fn exporting(&mut self, total: u64, clock: &dyn Clock) {
        self.phase = Phase::Exporting;
        self.copy = Some(Copy {
            began: clock.monotonic(),
            total,
            done: 0,
        });
    }

    /// So many bytes of the disks were written there.
    pub(super) fn copied(&mut self, raw: u64) {
        if let Some(copy) = &mut self.copy {
            copy.done += raw;
        }
    }

    /// No copy is under way any more.
    pub(super) fn copy_ended(&mut self) {
        self.copy = None;
    }

    /// Looks whether a resync of the machine is under way. One that is known already goes on.
    pub(super) fn resync(&mut self, machine: &Machine, clock: &dyn Clock) {
        let known = self.resync.filter(|resync| resync.ended.is_none());
        let reason = machine.state().resync;
        if known.map(|resync| resync.reason) == reason {
            return;
        }
        self.resync = reason.map(|reason| Resync {
            reason,
            began: clock.monotonic(),
            ended: None,
            total: machine.counters().suspect_blocks * BLOCK_BYTES,
            compared: 0,
            equal: 0,
            differing: 0,
            read: 0,
            asked: 0,
        });
    }

    /// A question took `asked` bytes on the wire and made `read` bytes of the disks be read.
    pub(super) fn asked(&mut self, read: u64, asked: u64) {
        if let Some(resync) = &mut self.resync {
            resync.read += read;
            resync.asked += asked;
        }
    }

    /// A question about `bytes` was answered.
    pub(super) fn compared(&mut self, bytes: u64, sifted: Sifted) {
        if let Some(resync) = &mut self.resync {
            resync.compared += bytes;
            resync.equal += sifted.equal * BLOCK_BYTES;
            resync.differing += sifted.differing * BLOCK_BYTES;
        }
    }

    /// A frame was handed to the link: `raw` bytes of blocks in `bytes` of log.
    pub(super) fn sent(&mut self, raw: u64, bytes: u64) {
        self.raw += raw;
        self.sent += bytes;
        self.copied(raw);
    }

    /// An epoch became durable; `cut` is nothing for the initial copy.
    pub(super) fn durable(&mut self, cut: Option<Timestamp>, clock: &dyn Clock) {
        self.epochs += 1;
        if let Some(cut) = cut {
            self.rpo.durable(cut, clock.wall());
            // No epoch is cut before everything is compared.
            if let Some(resync) = &mut self.resync {
                resync.ended.get_or_insert_with(|| clock.monotonic());
            }
            // The first epoch after the initial copy makes the replica complete.
            self.copy = None;
            self.phase = Phase::Replicating;
        }
    }

    /// `suspect`: bytes of which nobody knows yet whether they differ.
    pub(super) fn resync_status(&self, now: Duration, suspect: u64) -> Option<ResyncStatus> {
        let resync = self.resync?;
        let elapsed = resync.ended.unwrap_or(now).saturating_sub(resync.began);
        let rate = rate(resync.compared, elapsed);
        Some(ResyncStatus {
            reason: resync.reason.to_string(),
            running: resync.ended.is_none(),
            total: resync.total.max(resync.compared),
            compared: resync.compared,
            read: resync.read,
            equal: resync.equal,
            differing: resync.differing,
            asked: resync.asked,
            rate,
            eta_s: suspect.checked_div(rate),
        })
    }

    pub(super) fn copy_status(&self, now: Duration) -> Option<CopyStatus> {
        let copy = self.copy?;
        let rate = rate(copy.done, now.saturating_sub(copy.began));
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

/// Bytes per second.
pub(in crate::node) fn rate(bytes: u64, elapsed: Duration) -> u64 {
    let elapsed = elapsed.as_millis().max(1);
    u64::try_from(u128::from(bytes) * 1000 / elapsed).unwrap_or(u64::MAX)
}
