//! One door to all image formats.

use std::{fmt, io, str::FromStr, sync::Arc};

use super::{
    Access, Disk, Geometry,
    raw::{self, RawDisk, RawError},
    vhdx::{self, VhdxDisk},
};
use crate::{base::ids::Ids, storage::Storage};

/// How a file stores a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// The disk's bytes and nothing else.
    Raw,
    /// Hyper-V's format since 2012.
    Vhdx,
}

/// Why an image does not open.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// As a raw image.
    #[error(transparent)]
    Raw(#[from] RawError),
    /// As a VHDX image.
    #[error(transparent)]
    Vhdx(#[from] vhdx::OpenError),
}

/// Why an image is not made.
#[derive(Debug, thiserror::Error)]
pub enum CreateError {
    /// As a VHDX image.
    #[error(transparent)]
    Vhdx(#[from] vhdx::CreateError),
    /// The storage below failed.
    #[error("cannot write the new raw image")]
    Io(#[from] io::Error),
    /// There is something in the file already.
    #[error("the file has {0} bytes already; an image is made in an empty one")]
    NotEmpty(u64),
    /// What was asked for is none of the format's.
    #[error("a {format} image cannot have {what}")]
    Options {
        /// The format asked for.
        format: Format,
        /// What it cannot have.
        what: String,
    },
}

/// Why the disk in an image keeps its size.
#[derive(Debug, thiserror::Error)]
pub enum ResizeError {
    /// The image does not open.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The disk in it cannot have that size, or something failed.
    #[error(transparent)]
    Resize(#[from] super::ResizeError),
}

/// A text that names no format.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no image format is called {0:?}; there are raw and vhdx")]
pub struct FormatError(String);

/// Opens the image in `storage`, which must have the given format.
pub fn open(
    storage: Arc<dyn Storage>,
    format: Format,
    access: Access,
    ids: Arc<dyn Ids>,
) -> Result<Arc<dyn Disk>, OpenError> {
    Ok(match format {
        Format::Raw => Arc::new(RawDisk::open(storage, access)?),
        Format::Vhdx => Arc::new(VhdxDisk::open(storage, access, ids)?),
    })
}

/// The format that the first eight bytes name. Nothing is said of raw images, which have no signature: a guest writes
/// every byte of one and could make it look like anything, so a file is raw only if a person says so.
pub fn detect(storage: &dyn Storage) -> io::Result<Option<Format>> {
    let mut signature = [0; vhdx::SIGNATURE.len()];
    match storage.read_at(0, &mut signature) {
        Ok(()) => Ok((signature == *vhdx::SIGNATURE).then_some(Format::Vhdx)),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(None),
        Err(error) => Err(error),
    }
}

/// Makes an image in the empty `storage`, durable: a dynamic VHDX, or a sparse raw file. `block_size` is in bytes and
/// for VHDX only.
pub fn create(
    storage: &dyn Storage,
    format: Format,
    geometry: Geometry,
    block_size: Option<u32>,
    ids: &dyn Ids,
) -> Result<(), CreateError> {
    match format {
        Format::Raw => create_raw(storage, geometry, block_size),
        Format::Vhdx => {
            let options = vhdx::CreateOptions {
                size: geometry.size,
                block_size: block_size.unwrap_or(vhdx::BLOCK_BYTES_DEFAULT),
                kind: vhdx::Kind::Dynamic,
                logical_sector: geometry.logical_sector,
                physical_sector: geometry.physical_sector,
            };
            Ok(vhdx::create(storage, &options, ids)?)
        }
    }
}

/// Gives the disk in the closed image in `storage` another size, in bytes, durably: larger, or smaller by what holds no
/// data. After a power cut the disk has the old size or the new one.
pub fn resize(
    storage: Arc<dyn Storage>,
    format: Format,
    size: u64,
    ids: Arc<dyn Ids>,
) -> Result<(), ResizeError> {
    match format {
        Format::Raw => Ok(raw::resize(storage.as_ref(), size)?),
        Format::Vhdx => {
            let disk = VhdxDisk::open(storage, Access::ReadWrite, ids).map_err(OpenError::from)?;
            disk.resize(size)?;
            disk.close().map_err(super::ResizeError::from)?;
            Ok(())
        }
    }
}

fn create_raw(
    storage: &dyn Storage,
    geometry: Geometry,
    block_size: Option<u32>,
) -> Result<(), CreateError> {
    let refuse = |what: String| CreateError::Options {
        format: Format::Raw,
        what,
    };
    let size = geometry.size;
    raw::check_size(size)
        .map_err(|problem| refuse(format!("a size of {size} bytes: {problem}")))?;
    if let Some(block_size) = block_size {
        return Err(refuse(format!("blocks of {block_size} bytes")));
    }
    let len = storage.len()?;
    if len != 0 {
        return Err(CreateError::NotEmpty(len));
    }
    storage.set_len(size)?;
    Ok(storage.sync()?)
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Raw => "raw",
            Self::Vhdx => "vhdx",
        })
    }
}

impl FromStr for Format {
    type Err = FormatError;

    fn from_str(text: &str) -> Result<Self, FormatError> {
        match text {
            "raw" => Ok(Self::Raw),
            "vhdx" => Ok(Self::Vhdx),
            _ => Err(FormatError(text.to_owned())),
        }
    }
}
