//! What the node's store remembers of a machine between two mounts.
#![forbid(unsafe_code)]

use std::{fmt, fs::Metadata, os::unix::fs::MetadataExt};

use serde::{Deserialize, Serialize};

use crate::base::{
    ids::{Lineage, MachineId, Name},
    units::DiskIndex,
};

/// What tells that an image was changed while nobody was tracking it. Taken by the caller from the image file, because
/// a disk does not know what it is stored in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageStamp {
    /// The file's inode number. Not the device's: that number may change at each boot.
    pub inode: u64,
    /// Length of the file in bytes.
    pub bytes: u64,
    /// Time of the last change of its content: seconds since 1970, and nanoseconds.
    pub modified: (i64, i64),
}

impl From<&Metadata> for ImageStamp {
    fn from(meta: &Metadata) -> Self {
        Self {
            inode: meta.ino(),
            bytes: meta.len(),
            modified: (meta.mtime(), meta.mtime_nsec()),
        }
    }
}

/// Why blocks are suspects: they may differ from the replica although nobody is known to have written them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ResyncReason {
    /// The image's identity, length or time is not the one it had when it was closed.
    ImageChanged(DiskIndex),
    /// The maps of the disk are missing, damaged, or of another mount.
    MapsLost(DiskIndex),
    /// After a power cut the intent log of the disk could not be read.
    IntentLost(DiskIndex),
    /// The replica is complete at a point this machine knows nothing of.
    HistoriesDiffer,
    /// Names or order of the disks are not the ones that were replicated, or one is smaller: a new initial copy is needed.
    DisksChanged,
    /// The node's store could not be written or read while the machine ran, so that tracking ended.
    TrackingLost,
    /// The replica was the primary before, and may have what this host has not.
    Reversed,
    /// An operator asked for it.
    Demanded,
    /// A verification found blocks that differ, and is to repair them.
    Repair,
}

impl fmt::Display for ResyncReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::ImageChanged(disk) => write!(
                f,
                "the image of disk number {disk} was changed while nobody tracked it"
            ),
            Self::MapsLost(disk) => {
                write!(
                    f,
                    "the maps of disk number {disk} are lost or of another mount"
                )
            }
            Self::IntentLost(disk) => write!(
                f,
                "after a power cut the intent log of disk number {disk} was not readable"
            ),
            Self::HistoriesDiffer => {
                f.write_str("the replica holds a point that this host knows nothing of")
            }
            Self::DisksChanged => f.write_str("the machine's disks are not those of the replica"),
            Self::TrackingLost => f.write_str("tracking had ended because it could not be written"),
            Self::Reversed => f.write_str("the replica was the primary before"),
            Self::Demanded => f.write_str("an operator asked for it"),
            Self::Repair => f.write_str("a verification found differences that are to be repaired"),
        }
    }
}

/// The record of one machine in the node's store, `machine/<id>`.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(super) struct Record {
    /// Counts how often the machine was opened; the tracking files carry it too.
    pub(super) mount: u64,
    /// The boot in which it was opened last.
    pub(super) boot_id: String,
    /// How far it can be believed.
    pub(super) trust: Trust,
    pub(super) disks: Vec<DiskRecord>,
    /// The head that the replica acknowledged last.
    pub(super) lineage: Option<Lineage>,
    /// The point that this host continued without having sent it, if its history began so. Tells a call that is
    /// repeated from one that begins anew.
    pub(super) origin: Option<Lineage>,
    /// The head that the replica will have if a trailer that was about to be sent arrived.
    pub(super) pending: Option<Lineage>,
    /// Whether an initial copy is under way.
    pub(super) copying: bool,
    pub(super) resync: Option<ResyncReason>,
}

/// How far maps and image can be believed at the next open.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Trust {
    /// Closed: maps and images are durable, and the images' stamps are known.
    Clean,
    /// Open or about to be, or killed then: the maps are exact, unless the host was booted again.
    #[default]
    Open,
    /// An image could not be flushed: as after a power cut, its hot regions may hold anything.
    Suspect,
    /// The maps cannot be believed at all.
    Lost,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct DiskRecord {
    pub(super) name: Name,
    /// Bytes that the guest sees.
    pub(super) size: u64,
    pub(super) stamp: ImageStamp,
}

impl Record {
    /// Its name in the node's store.
    pub(super) fn key(machine: MachineId) -> String {
        format!("machine/{machine}")
    }

    /// Whether `later` describes the same disks, whatever happened to their images. They may have grown.
    pub(super) fn same_disks(&self, later: &[DiskRecord]) -> bool {
        let mut pairs = self.disks.iter().zip(later);
        self.disks.len() == later.len()
            && pairs.all(|(disk, later)| disk.name == later.name && disk.size <= later.size)
    }
}
