//! What a machine answers: cuts, refusals, states and numbers.
#![forbid(unsafe_code)]

use std::io;

use serde::Serialize;

use super::record::ResyncReason;
use crate::{
    base::{
        clock::Timestamp,
        ids::{Lineage, MachineId, Name},
        limits::EPOCH_MAX,
        units::{DiskIndex, Epoch},
    },
    disk::DiskError,
    protocol::message::Head,
    storage::ledger::LedgerError,
};

/// An epoch that was just closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cut {
    /// The epoch.
    pub epoch: Epoch,
    /// When: every write acknowledged before is in it, none submitted after.
    pub time: Timestamp,
    /// Blocks that were written in it.
    pub blocks: u64,
}

/// Why no epoch can be closed now.
#[derive(Debug, thiserror::Error)]
pub enum CutRefused {
    /// The epoch before is not durable on the replica yet.
    #[error("epoch {0} is closed and not yet durable on the replica")]
    Closing(Epoch),
    /// There is no copy that an epoch could be a change of.
    #[error("there is no initial copy to add an epoch to")]
    NoCopy,
    /// Of so many blocks nobody knows yet whether the replica holds them.
    #[error("{0} blocks are not compared with the replica yet")]
    Suspects(u64),
    /// The maps can no longer be trusted.
    #[error("{0}: a resync is needed")]
    TrackingLost(String),
    /// The machine was closed.
    #[error("the machine was closed")]
    Closed,
    /// The maps could not be synced.
    #[error("cannot sync the maps before a cut")]
    Sync(#[source] io::Error),
}

/// A failed or refused control call. Nothing changed, unless it says otherwise.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// The node's store failed.
    #[error("cannot record {what} of the machine")]
    Record {
        /// What was to be recorded.
        what: &'static str,
        /// What the store said.
        #[source]
        source: LedgerError,
    },
    /// Maps, intent log or image stamps failed.
    #[error("cannot {what} of disk {disk}")]
    State {
        /// What was to be done.
        what: &'static str,
        /// The disk.
        disk: Name,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// A disk failed.
    #[error("disk {disk} failed")]
    Disk {
        /// The disk.
        disk: Name,
        /// What it said.
        #[source]
        source: DiskError,
    },
    /// The epoch is not the closing one: it was merged, or staged already.
    #[error("epoch {0} is not the one that is closing")]
    NotClosing(Epoch),
    /// The epoch cannot be complete on the replica: some of it was never taken.
    #[error("{owed} blocks of epoch {epoch} were never sent")]
    Owed {
        /// The epoch.
        epoch: Epoch,
        /// Blocks that are still owed.
        owed: u64,
    },
    /// A run of a disk that the machine does not have.
    #[error(
        "a run at offset {offset:#x} of disk number {disk}, but the machine has {disks} disks: compare the disk tables of both hosts"
    )]
    UnknownDisk {
        /// The disk, counted from 0.
        disk: DiskIndex,
        /// Where the run begins, in bytes.
        offset: u64,
        /// Disks of the machine.
        disks: usize,
    },
    /// A run that leaves its disk.
    #[error(
        "{len} bytes at offset {offset:#x} lie outside of disk {disk}, which has {size} bytes: compare the sizes on both hosts"
    )]
    OutsideDisk {
        /// The disk.
        disk: Name,
        /// Where the run begins, in bytes.
        offset: u64,
        /// Bytes of the run.
        len: u64,
        /// Bytes of the disk.
        size: u64,
    },
    /// A point that no machine can have reached.
    #[error(
        "epoch {0} is above {EPOCH_MAX}, the highest there can be: the point it names is damaged"
    )]
    EpochTooHigh(Epoch),
    /// The replica holds no complete copy.
    #[error("there is nothing to compare with: the initial copy is not complete")]
    NothingToCompare,
    /// It is being done already.
    #[error("a resync is under way already: {0}")]
    Resyncing(ResyncReason),
    /// The maps can no longer be trusted; the next open marks everything.
    #[error("{0}: a resync is needed")]
    TrackingLost(String),
    /// The machine was closed.
    #[error("the machine was closed")]
    Closed,
}

/// The tracking of a machine could not be removed completely. What is gone is gone: the machine is new at its next open,
/// or the call is repeated.
#[derive(Debug, thiserror::Error)]
pub enum ForgetError {
    /// The node's store failed.
    #[error("cannot remove the record of machine {machine} from the node's store")]
    Record {
        /// The machine.
        machine: MachineId,
        /// What the store said.
        #[source]
        source: LedgerError,
    },
    /// The state folder failed.
    #[error("cannot {what} in the state folder of machine {machine}")]
    Files {
        /// What was to be done.
        what: String,
        /// The machine.
        machine: MachineId,
        /// What the system said.
        #[source]
        source: io::Error,
    },
}

/// What an initial copy sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CopyScope {
    /// What is allocated: for a replica whose images are new and empty.
    Allocated,
    /// The whole disks, holes as zeros: for a replica that holds something else.
    Everything,
}

/// What a replica says it holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReplicaHead {
    /// Nothing of this machine.
    Empty,
    /// A part of the initial copy.
    Copying,
    /// Everything up to this point.
    At(Lineage),
}

impl From<Head> for ReplicaHead {
    fn from(head: Head) -> Self {
        match head {
            Head::Empty => Self::Empty,
            Head::Copying => Self::Copying,
            Head::Copied(lineage) | Head::Complete(lineage) => Self::At(lineage),
        }
    }
}

/// What two hosts that meet again have to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Reconcile {
    /// The replica is where its last acknowledgement said: go on with the open epoch.
    InStep,
    /// It holds the epoch whose acknowledgement was lost; this is recorded now. Go on with the open epoch.
    AckLost,
    /// The initial copy goes on: take from epoch 0.
    CopyResumes,
    /// The histories do not meet: an initial copy has to begin.
    CopyNeeded,
}

/// Where a machine stands towards its replica.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Standing {
    /// No initial copy was begun.
    Unprotected,
    /// The initial copy is under way: there is no recovery point yet.
    Copying,
    /// The replica follows.
    Following,
}

/// What a person wants to know about a machine first.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct MachineState {
    /// Where it stands towards its replica.
    pub standing: Standing,
    /// Why more is being sent than was written, until the replica has caught up.
    pub resync: Option<ResyncReason>,
    /// Why tracking ended, if it did.
    pub tracking_lost: Option<String>,
    /// Disks that take no more writes, and why.
    pub stopped: Vec<(Name, String)>,
    /// Disks that gave their guest errors since the machine was opened, and which.
    pub failing: Vec<(Name, String)>,
}

/// Numbers of a machine. Those that count events start at zero when the machine is opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Counters {
    /// Blocks written in the open epoch.
    pub open_blocks: u64,
    /// Blocks of the epoch that is cut and not yet durable on the replica.
    pub closing_blocks: u64,
    /// Blocks of the open epoch whose present content was not taken.
    pub owed_open_blocks: u64,
    /// Blocks of the open epoch that the replica may hold as they are: to be compared, or being compared.
    pub suspect_blocks: u64,
    /// Blocks of the closing epoch that were not taken, preserved ones included.
    pub owed_closing_blocks: u64,
    /// Epochs that were merged into the next one.
    pub merged_epochs: u64,
    /// Memory in use by the side store, in bytes.
    pub preserve_bytes: u64,
    /// Blocks preserved so far.
    pub preserved_blocks: u64,
    /// Regions that a power cut would make us send again.
    pub hot_regions: u64,
    /// Writes and zeroings by the guest.
    pub guest_writes: u64,
    /// Bytes written and zeroed by the guest.
    pub guest_bytes: u64,
    /// Blocks written again within one epoch: changes that need not be sent.
    pub folded_blocks: u64,
}
