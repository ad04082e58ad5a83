//! A recovery point that is shown as writable disks: a view, a layer over each of its disks, a mount.
//!
//! The layers lie in a folder of their own, `<disk>.layer`; the view pins its point as long as this lives. Opened again
//! over the same point and folder, the disks are what they were: after the death of the process all that was
//! acknowledged, after a power cut all that was flushed.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
};

use uuid::Uuid;

use crate::{
    base::{checksum::Digest, ids::Name},
    disk::{
        Disk, DiskError,
        layered::{LayerError, LayeredDisk},
    },
    replica::{PointView, ReplicaError},
    shim::{
        Mount, MountError, MountOptions, MountedDisk, Mounter, Unmount, UnmountError, Writability,
        mount, users_of,
    },
    storage::{Folder, Open, file::FileFolder},
};

/// Why a point cannot be shown.
#[derive(Debug, thiserror::Error)]
pub(super) enum ExposeError {
    /// The replica does not give the point.
    #[error(transparent)]
    Point(#[from] ReplicaError),
    /// A folder or a file for it cannot be made.
    #[error("cannot use {}", path.display())]
    Place {
        /// What.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// A layer cannot be used.
    #[error("cannot open the layer of disk {disk}")]
    Layer {
        /// The disk.
        disk: Name,
        /// Why.
        #[source]
        source: LayerError,
    },
    /// The mount was not made.
    #[error(transparent)]
    Mount(#[from] MountError),
}

/// Why a shown point is still shown.
#[derive(Debug, thiserror::Error)]
pub(super) enum HideError {
    /// Somebody uses it.
    #[error("{} is in use by {}", dir.display(), list(users))]
    InUse {
        /// Where it is mounted.
        dir: PathBuf,
        /// Who, as far as this process can see.
        users: Vec<crate::shim::User>,
    },
    /// It cannot be unmounted for another reason.
    #[error(transparent)]
    Unmount(UnmountError),
    /// A layer could not be flushed.
    #[error("cannot flush the layer of a disk")]
    Flush(#[from] DiskError),
}

/// Names them.
pub(super) fn list(users: &[crate::shim::User]) -> String {
    if users.is_empty() {
        return "somebody this process cannot see".into();
    }
    let names: Vec<_> = users.iter().map(ToString::to_string).collect();
    names.join(", ")
}

/// A point as writable disks in a mount. Dropping it detaches the mount; the layers stay.
#[derive(Debug)]
pub(super) struct Exposure {
    // Dropped in this order: the mount goes before the disks.
    mount: Mount,
    layers: Vec<(Name, Arc<LayeredDisk>)>,
}

impl Exposure {
    /// Shows `view`, whose disks have these names, as `at/<machine>/<disk>.raw`. Both folders are made if need be.
    pub(super) fn open(
        view: PointView,
        names: &[Name],
        machine: &Name,
        layers: &Path,
        (at, mounter): (&Path, &Mounter),
    ) -> Result<Self, ExposeError> {
        let failed = |path: &Path| {
            let path = path.to_owned();
            move |source| ExposeError::Place { path, source }
        };
        make_mount_point(at, mounter).map_err(failed(at))?;
        let opened = open_layers(view, names, layers)?;
        let disks = opened.iter().map(|(name, layer)| MountedDisk {
            folder: Some(machine.clone()),
            file_name: name.clone(),
            disk: Arc::clone(layer) as Arc<dyn Disk>,
            writability: Writability::Writable,
        });
        let mut options = MountOptions::new(at);
        options.mounter = mounter.clone();
        let mount = mount(&options, disks.collect())?;
        Ok(Self {
            mount,
            layers: opened,
        })
    }

    /// The files, in the order of the disks.
    pub(super) fn paths(&self, machine: &Name) -> Vec<PathBuf> {
        let folder = self.mount.dir().join(machine.as_str());
        let path = |(name, _): &(Name, _)| folder.join(format!("{name}.raw"));
        self.layers.iter().map(path).collect()
    }

    /// Bytes that the layers hold.
    pub(super) fn held(&self) -> u64 {
        self.layers.iter().map(|(_, layer)| layer.held()).sum()
    }

    /// Unmounts, and says who is in the way if somebody is.
    pub(super) fn hide(&self, how: Unmount) -> Result<(), HideError> {
        self.mount.unmount(how).map_err(|error| match error {
            UnmountError::Busy { dir, .. } => HideError::InUse {
                users: users_of(&dir),
                dir,
            },
            other => HideError::Unmount(other),
        })
    }

    /// Makes the layers durable, after it was hidden.
    pub(super) fn flush(&self) -> Result<(), HideError> {
        for (_, layer) in &self.layers {
            layer.close()?;
        }
        Ok(())
    }
}

/// A layer over each disk of `view`, in the folder `layers`, which is made if need be.
pub(super) fn open_layers(
    view: PointView,
    names: &[Name],
    layers: &Path,
) -> Result<Vec<(Name, Arc<LayeredDisk>)>, ExposeError> {
    let identity = view.point.lineage.chain;
    let bases = view.disks.into_iter().zip(names.iter().cloned());
    let bases = bases.map(|(base, name)| (name, base as Arc<dyn Disk>));
    layers_over(bases.collect(), identity, layers)
}

/// A layer over each of these disks, whose content is called `identity`.
pub(super) fn layers_over(
    bases: Vec<(Name, Arc<dyn Disk>)>,
    identity: Digest,
    layers: &Path,
) -> Result<Vec<(Name, Arc<LayeredDisk>)>, ExposeError> {
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |source| ExposeError::Place { path, source }
    };
    let boot = boot().map_err(failed(Path::new("/proc/sys/kernel/random/boot_id")))?;
    let folder = FileFolder::open(layers).map_err(failed(layers))?;
    let mut opened = Vec::new();
    for (name, base) in bases {
        let file = layer_file(&name);
        let storage = folder
            .open(&file, Open::Create)
            .map_err(failed(&layers.join(&file)))?;
        let layer = LayeredDisk::open(base, storage, identity, boot).map_err(|source| {
            ExposeError::Layer {
                disk: name.clone(),
                source,
            }
        })?;
        opened.push((name, Arc::new(layer)));
    }
    folder.sync().map_err(failed(layers))?;
    Ok(opened)
}

/// Name of a disk's layer in the folder of layers.
pub(super) fn layer_file(disk: &Name) -> String {
    format!("{disk}.layer")
}

/// Makes a folder to mount at, if need be, and detaches what a dead process left there.
pub(super) fn make_mount_point(at: &Path, mounter: &Mounter) -> io::Result<()> {
    // A mount that is not there is not stale.
    match mounter.recover_stale(at) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    if let Some(above) = at.parent() {
        fs::create_dir_all(above)?;
    }
    match fs::create_dir(at) {
        // Whether it can be used is for whoever mounts to say: a process in a mount namespace of its own may go on seeing what
        // was mounted there once.
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        made => made,
    }
}

/// Names the present boot of the host.
fn boot() -> io::Result<Uuid> {
    let text = super::tracking::boot_id()?;
    Uuid::parse_str(&text).map_err(io::Error::other)
}
