//! One door to all image formats.

use std::{fmt, io, str::FromStr, sync::Arc};

pub use super::vhdx::Kind;
use super::{
    Access, Disk, Geometry, Opening,
    check::Report,
    raw::{RawDisk, RawError},
    vhd::{self, VhdDisk},
    vhdx::{self, VhdxDisk},
};
use crate::{
    base::{ids::Ids, limits::DISK_BYTES_MAX, units::SECTOR_BYTES},
    storage::Storage,
};

/// How a file stores a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// The disk's bytes and nothing else.
    Raw,
    /// Virtual PC's and Hyper-V's format before that, and Azure's.
    Vhd,
    /// Hyper-V's format since 2012.
    Vhdx,
}

/// Why an image does not open.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// As a raw image.
    #[error(transparent)]
    Raw(#[from] RawError),
    /// As a VHD image.
    #[error(transparent)]
    Vhd(#[from] vhd::OpenError),
    /// As a VHDX image.
    #[error(transparent)]
    Vhdx(#[from] vhdx::OpenError),
}

/// Why an image is not made.
#[derive(Debug, thiserror::Error)]
pub enum CreateError {
    /// As a VHD image.
    #[error(transparent)]
    Vhd(#[from] vhd::CreateError),
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

/// A text that names no format.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no image format is called {0:?}; there are raw, vhd and vhdx")]
pub struct FormatError(String);

/// Opens the image in `storage`, which must have the given format.
pub fn open(
    storage: Arc<dyn Storage>,
    format: Format,
    opening: &Opening,
) -> Result<Arc<dyn Disk>, OpenError> {
    Ok(match format {
        Format::Raw => Arc::new(RawDisk::open(storage, opening.access)?),
        Format::Vhd => Arc::new(VhdDisk::open(storage, opening)?),
        Format::Vhdx => Arc::new(VhdxDisk::open(storage, opening)?),
    })
}

/// The format whose signs the file bears: the first eight bytes, or, for a fixed VHD, the footer at its end. Two formats
/// at once are none. Nothing is said of raw images, which have no signature: a guest writes every byte of one and could
/// make it look like anything, so a file is raw only if a person says so.
pub fn detect(storage: &dyn Storage) -> io::Result<Option<Format>> {
    let mut signature = [0; 8];
    let first = match storage.read_at(0, &mut signature) {
        Ok(()) if signature == *vhdx::SIGNATURE => Some(Format::Vhdx),
        Ok(()) if signature == *vhd::SIGNATURE => Some(Format::Vhd),
        Ok(()) => None,
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        Err(error) => return Err(error),
    };
    Ok(match (first, vhd::is_fixed(storage)?) {
        (Some(Format::Vhdx), true) => None,
        (None, true) => Some(Format::Vhd),
        (first, _) => first,
    })
}

/// Checks the image in `storage`, which must have the given format, without changing it. A read that fails is a finding
/// like any other.
pub fn check(storage: &Arc<dyn Storage>, format: Format) -> Report {
    match format {
        Format::Raw => Report::of_opening(RawDisk::open(Arc::clone(storage), Access::ReadOnly)),
        Format::Vhd => vhd::check(storage),
        Format::Vhdx => vhdx::check(storage),
    }
}

/// What a new image is to be. What is not given is as usual for the format; what it cannot have is an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CreateOptions {
    /// How the file stores the disk.
    pub format: Format,
    /// Size and sectors. A raw image keeps only the size, and so does a VHD, whose sectors have 512 bytes.
    pub geometry: Geometry,
    /// Whether blocks take space from the beginning. Not for raw images.
    pub kind: Option<Kind>,
    /// Bytes of a block. Not for raw images.
    pub block_size: Option<u32>,
}

impl CreateOptions {
    /// An image as usual for `format`.
    pub fn new(format: Format, geometry: Geometry) -> Self {
        Self {
            format,
            geometry,
            kind: None,
            block_size: None,
        }
    }
}

/// Makes an image in the empty `storage`, durable. A VHD has no word for sectors larger than 512 bytes: physical ones do
/// not matter to it, logical ones are refused.
pub fn create(
    storage: &dyn Storage,
    options: &CreateOptions,
    ids: &dyn Ids,
) -> Result<(), CreateError> {
    let geometry = options.geometry;
    match options.format {
        Format::Raw => create_raw(storage, options),
        Format::Vhd => create_vhd(storage, options, ids),
        Format::Vhdx => {
            let options = vhdx::CreateOptions {
                size: geometry.size,
                block_size: options.block_size.unwrap_or(vhdx::BLOCK_BYTES_DEFAULT),
                kind: options.kind.unwrap_or(Kind::Dynamic),
                logical_sector: geometry.logical_sector,
                physical_sector: geometry.physical_sector,
            };
            Ok(vhdx::create(storage, &options, ids)?)
        }
    }
}

fn create_raw(storage: &dyn Storage, options: &CreateOptions) -> Result<(), CreateError> {
    let refuse = |what: String| CreateError::Options {
        format: Format::Raw,
        what,
    };
    let size = options.geometry.size;
    if size == 0 || size > DISK_BYTES_MAX || !size.is_multiple_of(SECTOR_BYTES) {
        return Err(refuse(format!("a size of {size} bytes")));
    }
    if let Some(kind) = options.kind {
        return Err(refuse(format!("the kind {kind}")));
    }
    if let Some(block_size) = options.block_size {
        return Err(refuse(format!("blocks of {block_size} bytes")));
    }
    let len = storage.len()?;
    if len != 0 {
        return Err(CreateError::NotEmpty(len));
    }
    storage.set_len(size)?;
    Ok(storage.sync()?)
}

fn create_vhd(
    storage: &dyn Storage,
    options: &CreateOptions,
    ids: &dyn Ids,
) -> Result<(), CreateError> {
    let Geometry {
        size,
        logical_sector,
        ..
    } = options.geometry;
    if u64::from(logical_sector) != SECTOR_BYTES {
        return Err(CreateError::Options {
            format: Format::Vhd,
            what: format!("sectors of {logical_sector} bytes"),
        });
    }
    let kind = match options.kind {
        None | Some(Kind::Dynamic) => vhd::Kind::Dynamic,
        Some(Kind::Fixed) => vhd::Kind::Fixed,
        Some(Kind::Differencing) => vhd::Kind::Differencing,
    };
    if let (vhd::Kind::Fixed, Some(block_size)) = (kind, options.block_size) {
        return Err(CreateError::Options {
            format: Format::Vhd,
            what: format!("blocks of {block_size} bytes when it is fixed"),
        });
    }
    let options = vhd::CreateOptions {
        size,
        block_size: options.block_size.unwrap_or(vhd::BLOCK_BYTES_DEFAULT),
        kind,
    };
    Ok(vhd::create(storage, &options, ids)?)
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Raw => "raw",
            Self::Vhd => "vhd",
            Self::Vhdx => "vhdx",
        })
    }
}

impl FromStr for Format {
    type Err = FormatError;

    fn from_str(text: &str) -> Result<Self, FormatError> {
        match text {
            "raw" => Ok(Self::Raw),
            "vhd" => Ok(Self::Vhd),
            "vhdx" => Ok(Self::Vhdx),
            _ => Err(FormatError(text.to_owned())),
        }
    }
}
