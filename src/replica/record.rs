//! What the node's store knows about a replica: which disks, what the base images hold, and the newest point that was
//! acknowledged. The logs in between are found in the folder and linked by their chain hashes.

use serde::{Deserialize, Serialize};

use super::{
    rescue::Rescue,
    status::{ImageStatus, image_name},
};

use crate::{
    base::{
        clock::Timestamp,
        ids::{Generation, Lineage, MachineId, Name},
    },
    delta::{Consistency, DiskEntry},
    disk::{Geometry, image::Format},
};

/// The record of one machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Record {
    pub(super) disks: Vec<DiskRecord>,
    pub(super) base: Base,
    /// The newest acknowledged point; nothing until the initial copy is complete.
    pub(super) head: Option<Lineage>,
    /// The latest generation that wrote here.
    pub(super) generation: Option<Generation>,
    /// Logs beyond the head are being removed, not to be taken up again.
    pub(super) discarding: bool,
    /// The images may be larger than the disks, which take their sizes: growing them was begun.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(super) growing: bool,
    /// The images stay as they were adopted; what they hold besides the point below is kept for somebody to look at.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) rescue: Option<Rescue>,
}

/// One disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct DiskRecord {
    pub(super) name: Name,
    pub(super) geometry: Geometry,
    pub(super) format: Format,
}

/// What the base images hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Base {
    /// They are being made: the next open removes them.
    Creating,
    /// Part of the initial copy.
    Copying,
    /// This point.
    At(BasePoint),
    /// Something between the two; only with the logs up to `to` a point.
    Merging {
        /// Where the merge started.
        from: BasePoint,
        /// Where it goes.
        to: BasePoint,
    },
}

/// A point in the base images.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct BasePoint {
    pub(super) lineage: Lineage,
    pub(super) cut: Timestamp,
    pub(super) consistency: Consistency,
    /// Whether the images hold just that. If not, they become a recovery point with the log that follows: the initial
    /// copy was read while the guest wrote, and a former primary has blocks that nobody else has.
    pub(super) exact: bool,
}

impl Record {
    /// The name of the record of `machine`.
    pub(super) fn key(machine: MachineId) -> String {
        format!("replica/{machine}")
    }

    /// Whether the disk table of a log is that of this replica.
    pub(super) fn has_disks(&self, table: &[DiskEntry]) -> bool {
        let mut pairs = self.disks.iter().zip(table);
        self.had_disks(table) && pairs.all(|(disk, entry)| disk.geometry.size == entry.size)
    }

    /// Whether the disk table of a log is, or was before its disks grew, that of this replica.
    pub(super) fn had_disks(&self, table: &[DiskEntry]) -> bool {
        table.len() == self.disks.len()
            && self.disks.iter().zip(table).all(|(disk, entry)| {
                let Geometry {
                    size,
                    logical_sector,
                    physical_sector,
                } = disk.geometry;
                disk.name == entry.name
                    && logical_sector == entry.logical_sector
                    && physical_sector == entry.physical_sector
                    && size >= entry.size
            })
    }
}

impl DiskRecord {
    /// The name of the base image.
    pub(super) fn file_name(&self) -> String {
        image_name(&self.name, self.format)
    }

    /// As others see it.
    pub(super) fn image(&self) -> ImageStatus {
        ImageStatus {
            name: self.name.clone(),
            file: self.file_name(),
            format: self.format,
            geometry: self.geometry,
        }
    }
}

impl Base {
    /// The point that logs must continue: everything up to it is in the images, or part of it.
    pub(super) fn floor(&self) -> Option<BasePoint> {
        match self {
            Self::Creating | Self::Copying => None,
            Self::At(point) | Self::Merging { from: point, .. } => Some(*point),
        }
    }
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;
    use crate::base::{checksum::Digest, units::Epoch};

    /// A record as it was written before there were rescue points, and as it is written still where there is none.
    const WITHOUT: &str = concat!(
        r#"{"disks":[{"name":"sda","geometry":{"size":4096,"logical_sector":512,"physical_sector":4096},"format":"raw"}],"#,
        r#""base":{"at":{"lineage":LINEAGE,"cut":9,"consistency":"crash","exact":false}},"head":LINEAGE,"#,
        r#""generation":{"number":2,"id":"00000000-0000-0000-0000-000000000007"},"discarding":false"#,
    );

    /// What follows where there is one.
    const RESCUE: &str = concat!(
        r#","rescue":{"lineage":LINEAGE,"cut":9,"#,
        r#""generation":{"number":2,"id":"00000000-0000-0000-0000-000000000007"}}"#,
    );

    #[test]
    fn each_machine_has_a_record_of_its_own() {
        let key = |number| Record::key(MachineId(Uuid::from_u128(number)));
        assert_eq!(key(7), "replica/00000000-0000-0000-0000-000000000007");
        assert_ne!(key(7), key(8));
    }

    #[test]
    fn a_record_without_a_rescue_point_is_what_it_was() {
        let lineage = Lineage {
            epoch: Epoch(7),
            chain: Digest([1; 32]),
        };
        let text = serde_json::to_string(&lineage).unwrap();
        let golden = |parts: &[&str]| parts.concat().replace("LINEAGE", &text) + "}";
        let old = golden(&[WITHOUT]);
        let mut record: Record = serde_json::from_str(&old).unwrap();
        assert_eq!((record.rescue, record.head), (None, Some(lineage)));
        assert_eq!(serde_json::to_string(&record).unwrap(), old);
        record.rescue = Some(Rescue {
            lineage,
            cut: Timestamp(9),
            generation: Generation {
                number: 2,
                id: Uuid::from_u128(7),
            },
        });
        let new = golden(&[WITHOUT, RESCUE]);
        assert_eq!(serde_json::to_string(&record).unwrap(), new);
        assert_eq!(serde_json::from_str::<Record>(&new).unwrap(), record);
    }
}
