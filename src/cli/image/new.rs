//! What a new image is to be: the options that `create` and `convert` share.

use std::path::Path;

use anyhow::Context as _;
use clap::ValueEnum;

use crate::{
    base::units::parse_size,
    disk::image::{Format, Kind},
    node::images::{self, ImageError},
};

/// Options for a new image.
#[derive(Clone, Debug, clap::Args)]
pub(super) struct NewImage {
    /// Format of the new image [default: what its suffix says].
    #[arg(long, value_name = "raw|vhd|vhdx")]
    format: Option<Format>,
    /// Whether blocks take space when they are first written, or all from the beginning. Not for raw.
    #[arg(long, value_enum)]
    kind: Option<KindName>,
    /// Unit of allocation: a power of two; VHDX 1M to 256M [default: 32M, with a parent 2M], dynamic VHD
    /// 512K to 256M [default: 2M]. Not for raw.
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    block_size: Option<u64>,
    /// Logical sector size in bytes: what the guest addresses.
    #[arg(long, value_name = "512|4096", value_parser = parse_sector)]
    sector: Option<u32>,
    /// Physical sector size in bytes: what the guest should align its writes to.
    #[arg(long, value_name = "512|4096", value_parser = parse_sector)]
    physical_sector: Option<u32>,
}

/// A kind as people write it.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum KindName {
    Dynamic,
    Fixed,
}

/// The options, parsed.
#[derive(Clone, Copy, Debug)]
pub(super) struct Parsed {
    pub(super) format: Format,
    pub(super) kind: Option<Kind>,
    pub(super) block_size: Option<u32>,
    pub(super) logical_sector: Option<u32>,
    pub(super) physical_sector: Option<u32>,
}

impl NewImage {
    /// The options for a new image at `path`.
    pub(super) fn options(&self, path: &Path) -> anyhow::Result<Parsed> {
        let format = self.format.or_else(|| images::suffix_format(path));
        let format = format.ok_or_else(|| ImageError::Suffix(path.to_owned()))?;
        let block_size = self.block_size.map(u32::try_from).transpose();
        Ok(Parsed {
            format,
            kind: self.kind.map(|kind| match kind {
                KindName::Dynamic => Kind::Dynamic,
                KindName::Fixed => Kind::Fixed,
            }),
            block_size: block_size.context("--block-size is too large")?,
            logical_sector: self.sector,
            physical_sector: self.physical_sector,
        })
    }
}

fn parse_sector(text: &str) -> Result<u32, String> {
    match text {
        "512" => Ok(512),
        "4096" => Ok(4096),
        _ => Err("a sector has 512 or 4096 bytes".into()),
    }
}
