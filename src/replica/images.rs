//! The seam to the image formats: the replica says what it wants stored, somebody else knows the bytes.

use std::{error::Error, fmt, sync::Arc};

use crate::{
    disk::{Access, Disk, Geometry, raw::RawDisk},
    storage::Storage,
};

/// Why an image could not be made or opened, in the words of its format.
pub type ImageError = Box<dyn Error + Send + Sync>;

/// How a base image stores its disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ImageFormat {
    /// The disk's bytes and nothing else.
    Raw,
    /// Virtual Hard Disk, up to 2 TiB.
    Vhd,
    /// Hyper-V's current format.
    Vhdx,
}

impl ImageFormat {
    /// The end of the file name, without a dot.
    pub fn suffix(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Vhd => "vhd",
            Self::Vhdx => "vhdx",
        }
    }
}

impl fmt::Display for ImageFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.suffix())
    }
}

/// Makes and opens images.
pub trait Images: Send + Sync + fmt::Debug {
    /// Writes an image of an all-zero disk into `storage`, which is empty, and makes it durable.
    fn create(
        &self,
        storage: Arc<dyn Storage>,
        format: ImageFormat,
        geometry: Geometry,
    ) -> Result<(), ImageError>;

    /// The disk in `storage`.
    fn open(
        &self,
        storage: Arc<dyn Storage>,
        format: ImageFormat,
        access: Access,
    ) -> Result<Arc<dyn Disk>, ImageError>;
}

/// Raw images only.
#[derive(Clone, Copy, Debug, Default)]
pub struct RawImages;

impl RawImages {
    fn check(format: ImageFormat) -> Result<(), ImageError> {
        if format == ImageFormat::Raw {
            Ok(())
        } else {
            Err(format!("no support for {format} images here").into())
        }
    }
}

impl Images for RawImages {
    fn create(
        &self,
        storage: Arc<dyn Storage>,
        format: ImageFormat,
        geometry: Geometry,
    ) -> Result<(), ImageError> {
        Self::check(format)?;
        storage.set_len(geometry.size)?;
        Ok(storage.sync()?)
    }

    fn open(
        &self,
        storage: Arc<dyn Storage>,
        format: ImageFormat,
        access: Access,
    ) -> Result<Arc<dyn Disk>, ImageError> {
        Self::check(format)?;
        Ok(Arc::new(RawDisk::open(storage, access)?))
    }
}
