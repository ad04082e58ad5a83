//! What differs from one simulated run to the next, drawn from its seed; and the faults that a test may build into the
//! simulator to see that it notices them.

use std::time::Duration;

use super::{content::SIZES, random::Random};
use crate::{
    base::{ids::Name, limits::DELTA_FRAMES_MAX, units::BLOCK_BYTES},
    delta::Codec,
    disk::{Geometry, image::Format},
    protocol::{message, sender::Pace},
    replica::{DiskSpec, Retention},
};

/// A shortcut that must not go unnoticed. It is taken by the simulator's account of a host, not by the product.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bug {
    /// The primary takes an epoch for durable as soon as it is sent.
    AcknowledgedUnheard,
    /// The primary takes what it sent of an initial copy for durable.
    CopiedUnheard,
    /// The replica's disk says that a delta log is synced, and forgets it.
    LogNotSynced,
    /// The lineage of a trailer is not noted before it is sent.
    PendingNotNoted,
    /// What was packed when an epoch was merged is dropped, and its log goes on.
    MergedFramesLost,
    /// The maps are kept in the memory of the process.
    MapsLost,
    /// After a power cut the intent log is not looked at.
    IntentIgnored,
    /// A guest's flush is answered and not made.
    FlushIgnored,
    /// A promotion has effects and is not durable.
    PromotionNotDurable,
    /// A primary that steps down says so, and does not make it durable.
    StepDownNotDurable,
    /// What a host learns from a claim is forgotten with its process.
    FencingNotDurable,
    /// A fenced host goes on serving its guest.
    FencedGoesOn,
    /// A primary steps down without proving that it is at rest.
    StepsDownTooEarly,
    /// A hand-over is taken back without asking the other host.
    ReclaimedAlone,
    /// Whoever calls may feed the replica.
    GenerationIgnored,
    /// A failover is kept, and what was written in it is not folded into the images.
    CommitForgetsLayer,
    /// A cancelled failover leaves its layers and its tracking behind.
    CancelKeepsLayers,
    /// The new primary does not take the blocks in which the returning host differs.
    DivergenceIgnored,
    /// The images of a returning host pass for the point exactly.
    RescueSkipped,
    /// The coordinator does what is in its memory, and its journal is empty.
    JobNotDurable,
    /// A coordinator that is started again takes the step that it was at for done.
    StepPresumedDone,
}

impl Bug {
    /// All of them.
    pub const ALL: [Self; 21] = [
        Self::AcknowledgedUnheard,
        Self::CopiedUnheard,
        Self::LogNotSynced,
        Self::PendingNotNoted,
        Self::MergedFramesLost,
        Self::MapsLost,
        Self::IntentIgnored,
        Self::FlushIgnored,
        Self::PromotionNotDurable,
        Self::StepDownNotDurable,
        Self::FencingNotDurable,
        Self::FencedGoesOn,
        Self::StepsDownTooEarly,
        Self::ReclaimedAlone,
        Self::GenerationIgnored,
        Self::CommitForgetsLayer,
        Self::CancelKeepsLayers,
        Self::DivergenceIgnored,
        Self::RescueSkipped,
        Self::JobNotDurable,
        Self::StepPresumedDone,
    ];
}

/// How the hosts of one run are made, and what may happen to them.
#[derive(Clone, Debug)]
pub(super) struct Setup {
    pub(super) disks: usize,
    /// Formats of the images on the two hosts.
    pub(super) formats: [Format; 2],
    pub(super) retention: Retention,
    pub(super) space_max: Option<u64>,
    pub(super) sync_bytes: u64,
    pub(super) preserve_bytes_max: u64,
    pub(super) hot_regions_max: usize,
    /// Most frames of a log.
    pub(super) frames_max: u64,
    pub(super) pace: Pace,
    pub(super) codec: Codec,
    /// Bytes that are taken from the maps at once.
    pub(super) take_bytes: u64,
    /// Sectors that most of the guest's writes keep to, so that it writes the same blocks often.
    pub(super) spread: u64,
    /// Times in a thousand steps.
    pub(super) kills: u64,
    pub(super) power_cuts: u64,
    pub(super) link_cuts: u64,
    pub(super) partitions: u64,
    pub(super) faults: u64,
    pub(super) verbs: u64,
    /// Calls about roles that are lost or come twice, in a hundred.
    pub(super) loss: u64,
    pub(super) bug: Option<Bug>,
}

impl Setup {
    /// `random` is that of `seed`.
    pub(super) fn draw(random: &mut Random, seed: u64, bug: Option<Bug>) -> Self {
        let format = |random: &mut Random| random.pick(&[Format::Raw, Format::Raw, Format::Vhdx]);
        let rarely = |random: &mut Random, often: u64| random.pick(&[0, often / 4, often]);
        Self {
            disks: random.pick(&[1, 1, 2]),
            formats: [format(random), format(random)],
            retention: Retention {
                newest: random.pick(&[0, 2, 5, 20]),
                hourly: random.pick(&[0, 0, 0, 3]),
            },
            space_max: random.pick(&[None, None, None, Some(1 << 20)]),
            sync_bytes: random.pick(&[4 << 10, 64 << 10, 1 << 20]),
            preserve_bytes_max: random.pick(&[0, 6, 4000]) * (BLOCK_BYTES + 128),
            hot_regions_max: random.pick(&[1, 2, 16]),
            // By the seed itself: all others are the runs that they were before there was such a limit.
            frames_max: if seed % 8 == 5 { 8 } else { DELTA_FRAMES_MAX },
            pace: Pace {
                interval: Duration::from_millis(random.pick(&[100, 1000, 5000])),
                ahead_bytes: random.pick(&[0, 8 * BLOCK_BYTES, 16 << 20]),
                current_every: Duration::from_secs(1),
            },
            codec: random.pick(&Codec::ALL),
            take_bytes: random.pick(&[4096, 12288, 1 << 20]),
            spread: random.pick(&[64, 512, 2048]),
            kills: rarely(random, 16),
            power_cuts: rarely(random, 16),
            link_cuts: rarely(random, 24),
            partitions: rarely(random, 8),
            faults: rarely(random, 12),
            verbs: random.pick(&[0, 10, 30, 60]),
            loss: random.pick(&[0, 10, 20]),
            bug,
        }
    }

    pub(super) fn has(&self, bug: Bug) -> bool {
        self.bug == Some(bug)
    }

    /// The disks as a replica knows them.
    pub(super) fn specs(&self) -> Vec<DiskSpec> {
        let spec = |index| DiskSpec {
            name: disk_name(index),
            geometry: geometry(index),
            format: self.formats[0],
        };
        (0..self.disks).map(spec).collect()
    }

    /// The disks as a greeting tells them.
    pub(super) fn announced(&self) -> Vec<message::DiskSpec> {
        let spec = |spec: DiskSpec| message::DiskSpec {
            name: spec.name,
            size: spec.geometry.size,
            logical_sector: spec.geometry.logical_sector,
            physical_sector: spec.geometry.physical_sector,
            format: spec.format.to_string(),
        };
        self.specs().into_iter().map(spec).collect()
    }
}

pub(super) fn disk_name(index: usize) -> Name {
    Name::new(["sda", "sdb"][index]).expect("they are plain words")
}

pub(super) fn geometry(index: usize) -> Geometry {
    Geometry {
        size: SIZES[index],
        logical_sector: 512,
        physical_sector: 4096,
    }
}
