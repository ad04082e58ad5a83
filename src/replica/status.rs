//! What a replica is told and what it tells: options, points, counters, status.

use super::{rescue::Rescue, retention::Retention};
use crate::{
    base::{
        clock::Timestamp,
        ids::{Generation, Lineage, Name},
        units::{Epoch, MIB},
    },
    delta::Consistency,
    disk::{Geometry, image::Format},
    protocol::message,
};

/// How a replica is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReplicaOptions {
    /// Format of the base images; nothing for the primary's.
    pub format: Option<Format>,
    /// Which recovery points are kept.
    pub retention: Retention,
    /// Bytes that delta logs may take beside the images, with one that is being received. Above half of it points that
    /// retention would keep are dropped, see [`Squeeze`]; a log that would go beyond it is refused.
    pub space_max: Option<u64>,
    /// Bytes received between two syncs, each of which is reported as durable. Of an initial copy that is lost in the
    /// middle, at most twice this is sent again.
    pub sync_bytes: u64,
}

impl ReplicaOptions {
    /// Enough that a sync is one long write and not a seek, and less than a second's worth of a fast link.
    pub const SYNC_BYTES: u64 = 64 * MIB;
}

/// A disk as the primary announces it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskSpec {
    /// What people call it.
    pub name: Name,
    /// Its size and sectors.
    pub geometry: Geometry,
    /// The primary's image format.
    pub format: Format,
}

impl DiskSpec {
    /// What its image is called in the machine's folder, in the format given here.
    pub fn file_name(&self) -> String {
        image_name(&self.name, self.format)
    }
}

/// What the image of a disk is called in its machine's folder.
pub fn image_name(disk: &Name, format: Format) -> String {
    format!("{disk}.{format}")
}

/// How far a replica is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Head {
    /// Nothing was ever received; the images, if they are made yet, read as zeros.
    Empty,
    /// The initial copy is not complete. Also said when nobody remembers whether it began.
    Copying,
    /// The initial copy is complete, or the images of a former primary were adopted; the next epoch makes the first
    /// recovery point.
    Copied(Lineage),
    /// The newest recovery point.
    Complete(Lineage),
}

impl From<Head> for message::Head {
    fn from(head: Head) -> Self {
        match head {
            Head::Empty => Self::Empty,
            Head::Copying => Self::Copying,
            Head::Copied(lineage) => Self::Copied(lineage),
            Head::Complete(lineage) => Self::Complete(lineage),
        }
    }
}

impl Head {
    /// What the next log has to continue.
    pub fn lineage(self) -> Option<Lineage> {
        match self {
            Self::Empty | Self::Copying => None,
            Self::Copied(lineage) | Self::Complete(lineage) => Some(lineage),
        }
    }
}

/// A recovery point.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Point {
    /// Its epoch and chain hash.
    pub lineage: Lineage,
    /// When the cut was made.
    pub cut: Timestamp,
    /// What it is worth to the guest.
    pub consistency: Consistency,
    /// Bytes of its log; 0 for the point in the base images.
    pub bytes: u64,
}

/// How far the lack of space went, worst last. The last complete point is never touched.
#[derive(
    Clone,
    Copy,
    Debug,
    Default,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    serde::Serialize,
    serde::Deserialize,
)]
#[serde(rename_all = "kebab-case")]
pub enum Squeeze {
    /// There is space for every point that retention asks for.
    #[default]
    None,
    /// The finest points were dropped: of the newest epochs only the latest is left, the hourly points stay.
    Finest,
    /// All points but the latest were dropped, or those before the oldest one that is in use.
    AllButOne,
    /// That was not enough, and the rescue point of a former primary was given up. Said until the replica is opened again.
    NoRescue,
    /// Nothing more is accepted until there is space; the primary goes on with its maps.
    Refusing,
}

/// Bytes that passed through a replica since it was opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Received, as they came.
    pub received: u64,
    /// Written to delta logs.
    pub staged: u64,
    /// Read back from delta logs, to merge or to fold them. What is still in memory is not read.
    pub log_read: u64,
    /// Written to logs that others were folded into.
    pub folded: u64,
    /// Written to base images, by the initial copy and by merges.
    pub image_written: u64,
}

/// The state of a replica at one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReplicaStatus {
    /// How far it is.
    pub head: Head,
    /// Epoch of the base images, or where a merge that is under way started; nothing before the initial copy is
    /// complete.
    pub base: Option<Epoch>,
    /// Target of a merge that is under way or was interrupted.
    pub merging: Option<Epoch>,
    /// Cut time of the newest recovery point.
    pub last_cut: Option<Timestamp>,
    /// The latest generation that wrote here.
    pub generation: Option<Generation>,
    /// Complete delta logs.
    pub logs: usize,
    /// Bytes of the complete delta logs.
    pub log_bytes: u64,
    /// Bytes that delta logs may take, if there is a limit.
    pub space_max: Option<u64>,
    /// What the lack of space cost.
    pub squeeze: Squeeze,
    /// What a former primary had and nobody else has, if it is kept.
    pub rescue: Option<Rescue>,
    /// Bytes that passed through.
    pub counters: Counters,
    /// The base images.
    pub images: Vec<ImageStatus>,
}

/// A base image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageStatus {
    /// The disk.
    pub name: Name,
    /// The file in the machine's folder.
    pub file: String,
    /// How it is stored.
    pub format: Format,
    /// What the guest sees.
    pub geometry: Geometry,
}
