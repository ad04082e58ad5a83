//! A disk that grows while the guest uses it.
//!
//! The guest's requests wait while the machine is closed, the image is resized and everything is opened again: what a start
//! does, without a second way to do it for maps, locks and caches of another size. The replication begins anew with the
//! larger disk; nothing is sent again.
//!
//! # Crash contract
//! The image has its old size or, durably, the new one. A crash before the machine's record knows of it costs a resync.

use std::{io, path::PathBuf, sync::Arc, time::Duration};

use super::{Opened, Primary, PrimaryError, shown};
use crate::{
    base::{
        ids::{Ids, Name},
        units::Bytes,
    },
    disk::{
        self, Access,
        image::{self, ResizeError},
    },
    node::{
        images::{ImageConfig, OpenImage, stamp},
        sources::Source,
        tracking::{Tracked, Tracking},
    },
    storage::{file::FileStorage, ledger::LedgerError},
    volume,
};

/// How long requests under way may take to end. Later ones wait for them.
const HOLD_WITHIN: Duration = Duration::from_secs(5);

/// Why a disk did not grow.
#[derive(Debug, thiserror::Error)]
pub(in crate::node) enum GrowError {
    #[error("there is no disk called {0}")]
    NoSuchDisk(Name),
    #[error(
        "the disk has {} already: a disk in use only grows; to shrink it, stop the machine and use `understudy image resize`",
        Bytes(*.0)
    )]
    NotLarger(u64),
    #[error(
        "requests of the guest do not end: a disk does not answer, or a flush waits for the replica; try again later"
    )]
    Busy,
    #[error(transparent)]
    Image(#[from] ResizeError),
    #[error("cannot use {}", path.display())]
    File {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error(
        "the disk has grown, which could not be recorded: its blocks are compared with the replica's"
    )]
    Record(#[from] LedgerError),
    /// The disks are gone until the next start.
    #[error("the machine cannot go on, its disks fail until this node is started again")]
    Lost(#[source] PrimaryError),
}

impl GrowError {
    /// Whether everything is as it was, because it cannot be otherwise.
    pub(in crate::node) fn is_refusal(&self) -> bool {
        match self {
            Self::NoSuchDisk(_) | Self::NotLarger(_) | Self::Busy => true,
            Self::Image(error) => !matches!(error, ResizeError::Resize(disk::ResizeError::Disk(_))),
            Self::File { .. } | Self::Record(_) | Self::Lost(_) => false,
        }
    }
}

impl Primary {
    /// Gives disk `name` a `size` of more bytes than it has; what it had before. `images` are the machine's, in the order
    /// of its disks. Whoever calls this starts the replication again.
    pub(in crate::node) fn grow(
        &self,
        (name, size): (&Name, u64),
        images: &[ImageConfig],
        tracking: Tracking<'_>,
        ids: &Arc<dyn Ids>,
    ) -> Result<u64, GrowError> {
        let opened = self.opened();
        let disk = opened.disks.iter().find(|disk| disk.name == *name);
        let disk = disk.ok_or_else(|| GrowError::NoSuchDisk(name.clone()))?;
        let before = disk.disk.geometry().size;
        if size <= before {
            return Err(GrowError::NotLarger(before));
        }
        let Some(tracked) = &opened.tracked else {
            return Err(GrowError::NoSuchDisk(name.clone()));
        };
        let held = self.mount.hold(HOLD_WITHIN).ok_or(GrowError::Busy)?;
        drop(self.replication.lock().take());
        if let Some(flushes) = &self.flushes {
            flushes.unlinked("a disk is being resized");
        }
        self.close(tracked).map_err(GrowError::Lost)?;
        let resized = resize(disk, size, tracking, ids);
        let again = self.open_again(&opened, images, tracking, ids);
        let again = Arc::new(again.map_err(GrowError::Lost)?);
        held.release_with(shown(&again, self.flushes.as_ref()));
        *self.opened.write() = again;
        resized.map(|()| before)
    }

    /// The disks of `before`, which are closed, and their tracking.
    fn open_again(
        &self,
        before: &Opened,
        images: &[ImageConfig],
        tracking: Tracking<'_>,
        ids: &Arc<dyn Ids>,
    ) -> Result<Opened, PrimaryError> {
        let open = |disk: &Source| -> Result<Source, PrimaryError> {
            let config = images.iter().find(|image| image.name == disk.name);
            let config = config.ok_or_else(|| PrimaryError::Begin {
                machine: self.name.clone(),
                why: format!("disk {} has no image any more", disk.name),
            })?;
            let lock = disk.lock.clone();
            Ok(OpenImage::open_under(lock, config, Access::ReadWrite, ids)?.into())
        };
        let disks = before
            .disks
            .iter()
            .map(open)
            .collect::<Result<Vec<_>, _>>()?;
        let tracked = Tracked::open(&self.name, tracking, &disks, &self.clock)?;
        Ok(Opened {
            disks,
            tracked: Some(tracked),
        })
    }
}

/// Resizes the image of a disk that is closed, and notes that nobody else did.
fn resize(
    disk: &Source,
    size: u64,
    tracking: Tracking<'_>,
    ids: &Arc<dyn Ids>,
) -> Result<(), GrowError> {
    let path = &disk.image;
    let failed = |source| GrowError::File {
        path: path.clone(),
        source,
    };
    let storage = FileStorage::open(path, Access::ReadWrite).map_err(failed)?;
    image::resize(Arc::new(storage), disk.format, size, Arc::clone(ids))?;
    let stamp = stamp(path).map_err(failed)?;
    // Should this fail, the machine is opened all the same, and everything is compared.
    volume::grew(tracking.ledger, tracking.id, &disk.name, stamp)?;
    Ok(())
}
