//! What can go wrong on the replica: with the store itself, and with a log that is being received.

use std::io;

use crate::{
    base::{
        ids::{Generation, Lineage, MachineId},
        units::{Bytes, Epoch},
    },
    delta::DecodeError,
    disk::DiskError,
    storage::{self, ledger::LedgerError},
};

/// A failed operation on the replica of a machine. Its last complete recovery point is untouched.
#[derive(Debug, thiserror::Error)]
pub enum ReplicaError {
    /// The host's file system failed.
    #[error("cannot {operation} {name:?} in the replica's folder")]
    Io {
        /// What was tried.
        operation: &'static str,
        /// The file.
        name: String,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The node's store failed.
    #[error("cannot record the state of the replica")]
    Ledger(#[from] LedgerError),
    /// A base image could not be made or opened.
    #[error("cannot {operation} the base image {name:?}")]
    Image {
        /// What was tried.
        operation: &'static str,
        /// The file.
        name: String,
        /// What the format said.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A base image failed.
    #[error("the base image of disk {name:?} failed")]
    Disk {
        /// The disk.
        name: String,
        /// What it said.
        #[source]
        source: DiskError,
    },
    /// A log on disk is not what was staged.
    #[error("the delta log {name:?} is damaged: restore the file, or make a new initial copy")]
    Log {
        /// The file.
        name: String,
        /// What is wrong.
        #[source]
        source: DecodeError,
    },
    /// A log that was acknowledged is not there.
    #[error(
        "the delta log that ends with epoch {0} is missing: restore the file, or make a new initial copy"
    )]
    LogMissing(Epoch),
    /// The image in the folder has another size than the disk.
    #[error("the base image {name:?} holds {found} bytes, its disk has {expected}")]
    Size {
        /// The file.
        name: String,
        /// Bytes of the disk.
        expected: u64,
        /// Bytes of the image.
        found: u64,
    },
    /// The primary's disks are not those of this replica.
    #[error("the disks of the machine changed: {0}; remove the replica and make a new one")]
    Changed(String),
    /// No disks were named.
    #[error("a machine has 1 to 256 disks with names that differ, not {0}")]
    DiskCount(usize),
    /// There is no such recovery point, or no longer.
    #[error("there is no recovery point {0}")]
    NoPoint(Epoch),
    /// The disks are not known yet.
    #[error("the replica has no disks yet")]
    NotPrepared,
    /// A recovery point that must go is being looked at.
    #[error("recovery point {0} is in use")]
    PointInUse(Epoch),
    /// There is no rescue point, or no longer.
    #[error("there is no rescue point: none was made, or it was dropped")]
    NoRescue,
    /// The rescue point must go and is being looked at.
    #[error("the rescue point is in use: end what looks at it first")]
    RescueInUse,
    /// The images do not hold one recovery point and nothing else beside it.
    #[error(
        "the replica is not settled on one recovery point: end what looks at others, and settle it"
    )]
    NotSettled,
    /// A log is being received.
    #[error("the replica is receiving a delta log")]
    Receiving,
    /// The replica was closed.
    #[error("the replica is closed")]
    Closed,
}

impl ReplicaError {
    pub(super) fn io(operation: &'static str, name: &str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io {
            operation,
            name: name.to_owned(),
            source,
        }
    }

    pub(super) fn log(name: &str, source: DecodeError) -> Self {
        Self::Log {
            name: name.to_owned(),
            source,
        }
    }

    /// Whether the host's disk is full: the operation may be repeated when there is space again.
    pub fn is_full(&self) -> bool {
        let io = match self {
            Self::Io { source, .. }
            | Self::Disk {
                source: DiskError::Io { source, .. },
                ..
            } => Some(source),
            Self::Image { source, .. } => source.downcast_ref(),
            _ => None,
        };
        io.is_some_and(storage::is_full)
    }
}

/// Why a log is not taken. Nothing of it is visible; a delta leaves no trace, an initial copy may have changed blocks
/// that are not acknowledged.
#[derive(Debug, thiserror::Error)]
pub enum IngestError {
    /// The bytes are not a valid log.
    #[error("the received delta log is not valid")]
    Decode(#[from] DecodeError),
    /// Another log is being received.
    #[error("another delta log is being received for this machine")]
    Busy,
    /// The log is of another machine.
    #[error("the delta log is of machine {found}, this is the replica of {expected}")]
    Machine {
        /// Whose replica this is.
        expected: MachineId,
        /// Whose log it is.
        found: MachineId,
    },
    /// The log is not of the generation that was agreed upon.
    #[error("the delta log is of generation {found}, the session has {expected}")]
    Generation {
        /// What was agreed upon.
        expected: Generation,
        /// What the log says.
        found: Generation,
    },
    /// The replica already knows a later generation.
    #[error("the delta log is of generation {found}, but generation {known} is known: refused")]
    Fenced {
        /// The latest known.
        known: Generation,
        /// What the log says.
        found: Generation,
    },
    /// Two hosts were promoted apart from each other.
    #[error(
        "split brain: the delta log is of generation {found}, this replica has seen {known}; decide which side loses"
    )]
    SplitBrain {
        /// The one seen here.
        known: Generation,
        /// What the log says.
        found: Generation,
    },
    /// The log does not continue what is here.
    #[error("the delta log continues {}, the replica is at {}", point(*found), point(*expected))]
    Parent {
        /// Where the replica is.
        expected: Option<Lineage>,
        /// What the log builds upon.
        found: Option<Lineage>,
    },
    /// An initial copy for a replica that is complete.
    #[error("the replica already holds a complete copy at {}", point(Some(*.0)))]
    AlreadyComplete(Lineage),
    /// A log that another host folded.
    #[error("the delta log was folded by another host: only what a primary sends is taken")]
    Folded,
    /// The disk table is not that of the replica.
    #[error("the disks of the delta log are not those of the replica: announce them first")]
    Disks,
    /// The log needs more space than logs may take.
    #[error("the delta logs of the machine would take more than {}", Bytes(*limit))]
    Space {
        /// Bytes that logs may take.
        limit: u64,
    },
    /// The log ended before its trailer, or the ingest had already failed.
    #[error("the log is not complete, or was already refused")]
    Incomplete,
    /// The replica itself failed.
    #[error("cannot keep the received delta log")]
    Store(#[from] ReplicaError),
}

fn point(lineage: Option<Lineage>) -> String {
    lineage.map_or_else(
        || "nothing".to_owned(),
        |lineage| format!("epoch {} ({:.8})", lineage.epoch, lineage.chain.to_string()),
    )
}

impl IngestError {
    /// Whether there is no space: the log may be sent again when there is.
    pub fn is_full(&self) -> bool {
        match self {
            Self::Space { .. } => true,
            Self::Store(error) => error.is_full(),
            _ => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::checksum::Digest;

    #[test]
    fn only_a_lack_of_space_is_told_as_one() {
        let file = |kind: io::ErrorKind| ReplicaError::io("write", "x")(kind.into());
        let disk = |kind: io::ErrorKind| ReplicaError::Disk {
            name: "sda".into(),
            source: DiskError::Io {
                operation: "write",
                offset: 0,
                source: kind.into(),
            },
        };
        let image = |kind: io::ErrorKind| ReplicaError::Image {
            operation: "open",
            name: "sda".into(),
            source: Box::new(io::Error::from(kind)),
        };
        for (kind, full) in [
            (io::ErrorKind::StorageFull, true),
            (io::ErrorKind::QuotaExceeded, true),
            (io::ErrorKind::PermissionDenied, false),
        ] {
            for error in [file(kind), disk(kind), image(kind)] {
                assert_eq!(error.is_full(), full, "{error:?}");
                assert_eq!(IngestError::Store(error).is_full(), full);
            }
        }
        assert!(!ReplicaError::NotPrepared.is_full());
        assert!(IngestError::Space { limit: 1 }.is_full());
        assert!(!IngestError::Disks.is_full());
    }

    #[test]
    fn a_point_is_told_by_its_epoch_and_the_beginning_of_its_chain() {
        let lineage = Lineage {
            epoch: Epoch(7),
            chain: Digest([0xAB; 32]),
        };
        let error = IngestError::AlreadyComplete(lineage).to_string();
        assert!(error.ends_with("at epoch 7 (abababab)"), "{error}");
        assert_eq!(point(None), "nothing");
    }
}
