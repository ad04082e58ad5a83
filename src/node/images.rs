//! Opening a machine's image files: names, formats, locks, identity.

use std::{
    fs::{File, TryLockError},
    io,
    path::{Path, PathBuf},
    sync::Arc,
};

use crate::{
    base::ids::{Ids, Name, NameError},
    disk::{
        Access, Disk, Opening,
        image::{self, Format},
        parents::ParentRoot,
    },
    storage::file::FileStorage,
    volume::ImageStamp,
};

/// One image of a machine.
#[derive(Clone, Debug)]
pub struct ImageConfig {
    /// The image file, or a block device for raw.
    pub path: PathBuf,
    /// Its format. It is never guessed from the content: a guest could write another format's signature into a raw disk.
    pub format: Format,
    /// The disk's name: the file's name without its suffix.
    pub name: Name,
    /// The folder that holds the parents of differencing images; without it such an image is refused.
    pub parents: Option<PathBuf>,
}

/// Why an image cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// The file name does not give a disk name.
    #[error("{} cannot name a disk", path.display())]
    Name {
        /// The image.
        path: PathBuf,
        /// Why not.
        #[source]
        source: NameError,
    },
    /// The suffix does not tell the format.
    #[error("{}: the suffix does not tell the format; say it with --format", .0.display())]
    Suffix(PathBuf),
    /// The file could not be opened or examined.
    #[error("cannot open image {}", path.display())]
    File {
        /// The image.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The folder of parents could not be opened.
    #[error("cannot look for parents in {}", folder.display())]
    Parents {
        /// The folder.
        folder: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// Another process serves it.
    #[error("image {} is in use by another process", .0.display())]
    InUse(PathBuf),
    /// The content is not what the format demands.
    #[error("image {} ({format}) cannot be used", path.display())]
    Content {
        /// The image.
        path: PathBuf,
        /// The format it was opened as.
        format: Format,
        /// What is wrong with it.
        #[source]
        source: Box<image::OpenError>,
    },
}

impl ImageConfig {
    /// The image at `path`, of `format` or of the one its suffix tells.
    pub fn new(path: PathBuf, format: Option<Format>) -> Result<Self, ImageError> {
        let stem = path.file_stem().unwrap_or_default().to_string_lossy();
        let name = Name::new(&stem).map_err(|source| ImageError::Name {
            path: path.clone(),
            source,
        })?;
        let Some(format) = format.or_else(|| suffix_format(&path)) else {
            return Err(ImageError::Suffix(path));
        };
        Ok(Self {
            path,
            format,
            name,
            parents: None,
        })
    }

    /// The same image, its parents being in `folder`.
    #[must_use]
    pub fn with_parents(self, folder: Option<PathBuf>) -> Self {
        Self {
            parents: folder,
            ..self
        }
    }

    /// How the image is opened.
    pub fn opening(&self, access: Access, ids: &Arc<dyn Ids>) -> Result<Opening, ImageError> {
        let opening = Opening::new(access, Arc::clone(ids));
        let Some(folder) = &self.parents else {
            return Ok(opening);
        };
        let root = ParentRoot::new(folder, &self.path).map_err(|source| ImageError::Parents {
            folder: folder.clone(),
            source,
        })?;
        Ok(opening.with_parents(Arc::new(root)))
    }
}

/// The format that a file's suffix tells.
pub fn suffix_format(path: &Path) -> Option<Format> {
    match path.extension()?.to_str()?.to_ascii_lowercase().as_str() {
        "vhd" | "avhd" => Some(Format::Vhd),
        "vhdx" | "avhdx" => Some(Format::Vhdx),
        "raw" | "img" => Some(Format::Raw),
        _ => None,
    }
}

/// An open image; its file is locked as long as anybody has the lock.
#[derive(Debug)]
pub struct OpenImage {
    /// What was asked for.
    pub config: ImageConfig,
    /// The disk in it.
    pub disk: Arc<dyn Disk>,
    /// The file as it was before it was opened.
    pub stamp: ImageStamp,
    /// The lock, unless somebody else keeps it.
    pub(super) lock: Option<Arc<File>>,
}

impl OpenImage {
    /// Locks and opens an image. A second writer is refused; readers share.
    pub fn open(
        config: &ImageConfig,
        access: Access,
        ids: &Arc<dyn Ids>,
    ) -> Result<Self, ImageError> {
        let lock = lock(&config.path, access)?;
        Self::open_under(Some(Arc::new(lock)), config, access, ids)
    }

    /// Opens an image that is locked already.
    pub(super) fn open_under(
        lock: Option<Arc<File>>,
        config: &ImageConfig,
        access: Access,
        ids: &Arc<dyn Ids>,
    ) -> Result<Self, ImageError> {
        let path = &config.path;
        let failed = |source| ImageError::File {
            path: path.clone(),
            source,
        };
        let stamp = stamp(path).map_err(failed)?;
        let storage = FileStorage::open(path, access).map_err(failed)?;
        let opening = config.opening(access, ids)?;
        let disk = image::open(Arc::new(storage), config.format, &opening).map_err(|source| {
            ImageError::Content {
                path: path.clone(),
                format: config.format,
                source: Box::new(source),
            }
        })?;
        Ok(Self {
            config: config.clone(),
            disk,
            stamp,
            lock,
        })
    }
}

/// Locks the image at `path` for as long as the file returned is open: readers share it, a writer has it alone.
pub fn lock(path: &Path, access: Access) -> Result<File, ImageError> {
    let failed = |source| ImageError::File {
        path: path.to_owned(),
        source,
    };
    let lock = File::open(path).map_err(failed)?;
    let locked = match access {
        Access::ReadOnly => lock.try_lock_shared(),
        Access::ReadWrite => lock.try_lock(),
    };
    match locked {
        Ok(()) => Ok(lock),
        Err(TryLockError::WouldBlock) => Err(ImageError::InUse(path.to_owned())),
        Err(TryLockError::Error(source)) => Err(failed(source)),
    }
}

/// Identity, size and time of last change of the file at `path`.
pub(super) fn stamp(path: &Path) -> io::Result<ImageStamp> {
    Ok(ImageStamp::from(&std::fs::metadata(path)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_suffix_tells_the_format_and_the_stem_the_name() {
        let config = ImageConfig::new("/x/My Disk.VHDX".into(), None).unwrap();
        assert_eq!(
            (config.format, config.name.as_str()),
            (Format::Vhdx, "My Disk")
        );
        assert!(matches!(
            ImageConfig::new("/x/disk".into(), None),
            Err(ImageError::Suffix(_))
        ));
        let forced = ImageConfig::new("/x/disk".into(), Some(Format::Raw)).unwrap();
        assert_eq!(forced.format, Format::Raw);
        assert!(matches!(
            ImageConfig::new("/".into(), None),
            Err(ImageError::Name { .. })
        ));
    }
}
