//! What a host remembers of a machine's role: one record for each machine, changed as a whole.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::{
    base::{
        clock::Timestamp,
        ids::{Generation, Lineage, MachineId, Name},
    },
    coord::role::RoleState,
    disk::image::Format,
    node::initial_copy::InitialCopy,
    replica::Adoption,
};

/// Records with this prefix bind a name to a machine and its role.
pub(super) const PREFIX: &str = "role/";

/// The record of one machine, `role/<name>`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Record {
    pub(super) id: MachineId,
    pub(super) role: RoleState,
    /// The other host, by the name in its certificate: nobody else feeds or claims the machine.
    pub(super) peer: Option<Name>,
    /// The images of a machine that was promoted here. One that is configured has its images in the configuration.
    pub(super) images: Vec<ImageRecord>,
    /// What lies over the images since a promotion, and is not folded into them yet.
    pub(super) layers: Option<Layers>,
    /// The images are to become a replica's, holding this.
    pub(super) adoption: Option<AdoptionRecord>,
    /// Since when an operator wants it not to be replicated. A change of parts ends that.
    #[serde(default)]
    pub(super) suspended: Option<Timestamp>,
    /// When the initial copy begins. Nothing if that is at once, or if nobody asked for one in this part.
    #[serde(default)]
    pub(super) initial_copy: Option<CopyDue>,
    /// The folder that its own folder is in, if not the host's store. Where a replica lies does not change with the
    /// configuration.
    #[serde(default)]
    pub(super) store: Option<PathBuf>,
}

/// When an initial copy begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct CopyDue {
    /// What the configuration said when this was decided. Once it says something else, that counts.
    pub(super) setting: InitialCopy,
    /// Nothing if it waits for a portable disk.
    pub(super) due: Option<Timestamp>,
}

/// An image of a promoted machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct ImageRecord {
    pub(super) name: Name,
    /// Name of the file in the machine's folder.
    pub(super) file: String,
    pub(super) format: Format,
}

/// Layers over a recovery point.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Layers {
    pub(super) point: Lineage,
    /// The images hold exactly the point, belong to no replica any more, and the layers are being folded into them.
    pub(super) settled: bool,
}

impl Layers {
    /// The same, once the images are theirs alone.
    pub(super) fn settled(self) -> Self {
        Self {
            settled: true,
            ..self
        }
    }
}

/// An [`Adoption`] that has to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct AdoptionRecord {
    pub(super) lineage: Lineage,
    pub(super) cut: Timestamp,
    pub(super) exact: bool,
}

impl AdoptionRecord {
    /// The same, for the generation that continues it.
    pub(super) fn by(self, generation: Generation) -> Adoption {
        Adoption {
            lineage: self.lineage,
            cut: self.cut,
            exact: self.exact,
            generation,
        }
    }
}

impl Record {
    /// A machine that begins in this role.
    pub(super) fn new(id: MachineId, role: RoleState, peer: Option<Name>) -> Self {
        Self {
            id,
            role,
            peer,
            images: Vec::new(),
            layers: None,
            adoption: None,
            suspended: None,
            initial_copy: None,
            store: None,
        }
    }

    /// Its name in the node's store.
    pub(super) fn key(machine: &Name) -> String {
        format!("{PREFIX}{machine}")
    }
}

/// Where a machine's files lie in a host's store: a folder of its own.
#[derive(Clone, Debug)]
pub(super) struct Places(pub(super) PathBuf);

impl Places {
    /// Maps and intent logs.
    pub(super) fn tracking(&self) -> PathBuf {
        self.0.join("tracking")
    }

    /// Layers of a failover.
    pub(super) fn layers(&self) -> PathBuf {
        self.0.join("layers")
    }

    /// Where a machine that was promoted here is mounted, unless configured.
    pub(super) fn disks(&self) -> PathBuf {
        self.0.join("disks")
    }
}
