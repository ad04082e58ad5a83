//! The disks that a machine is served from, and what tells whether somebody else wrote them.

use std::{fs::File, io, path::PathBuf, sync::Arc};

use super::{
    images::{ImageConfig, OpenImage, stamp},
    primary::PrimaryError,
};
use crate::{
    base::ids::{Ids, Name},
    disk::{Access, Disk, image::Format},
    protocol::message::DiskSpec,
    volume::ImageStamp,
};

/// A disk to serve.
#[derive(Debug)]
pub(super) struct Source {
    pub(super) name: Name,
    pub(super) disk: Arc<dyn Disk>,
    pub(super) format: Format,
    pub(super) image: PathBuf,
    /// What tells whether somebody else wrote the disk, and what it told before the machine was opened.
    pub(super) stamped: (Stamped, ImageStamp),
    /// The lock on the image, unless somebody else keeps it: the replica that the image belonged to before.
    pub(super) lock: Option<Arc<File>>,
}

/// The files that tell whether somebody else wrote a disk.
#[derive(Clone, Debug)]
pub(super) struct Stamped {
    /// Whose identity counts: the image's, also while a layer lies over it, so that the death of the process at any time of
    /// a fold is not taken for another image.
    pub(super) image: PathBuf,
    /// Whose length and time count: those of the file that every write goes to first.
    pub(super) written: PathBuf,
}

impl Stamped {
    /// A disk that is an image and nothing else.
    pub(super) fn image(image: PathBuf) -> Self {
        Self {
            written: image.clone(),
            image,
        }
    }

    pub(super) fn take(&self) -> io::Result<ImageStamp> {
        Ok(ImageStamp {
            inode: stamp(&self.image)?.inode,
            ..stamp(&self.written)?
        })
    }
}

impl From<OpenImage> for Source {
    fn from(image: OpenImage) -> Self {
        Self {
            name: image.config.name.clone(),
            disk: Arc::clone(&image.disk),
            format: image.config.format,
            image: image.config.path.clone(),
            stamped: (Stamped::image(image.config.path.clone()), image.stamp),
            lock: image.lock,
        }
    }
}

/// Opens images, no two of which may have one name.
pub(super) fn open_images(
    images: &[ImageConfig],
    access: Access,
    ids: &Arc<dyn Ids>,
) -> Result<Vec<Source>, PrimaryError> {
    for (index, image) in images.iter().enumerate() {
        if images[..index].iter().any(|other| other.name == image.name) {
            return Err(PrimaryError::DuplicateDisk(image.name.clone()));
        }
    }
    let open = |image| Ok(OpenImage::open(image, access, ids)?.into());
    images.iter().map(open).collect()
}

/// A disk as its replica has to know it.
pub(super) fn spec(disk: &Source) -> DiskSpec {
    let geometry = disk.disk.geometry();
    DiskSpec {
        name: disk.name.clone(),
        size: geometry.size,
        logical_sector: geometry.logical_sector,
        physical_sector: geometry.physical_sector,
        format: disk.format.to_string(),
    }
}
