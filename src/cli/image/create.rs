//! `image create`: a new, empty image.

use std::{fs, path::PathBuf};

use anyhow::Context;

use super::parse_size;
use crate::{
    base::{ids::SystemIds, units::Bytes},
    cli::output::Output,
    disk::{
        Geometry,
        image::{self, Format},
    },
    node::images::ImageConfig,
    storage::file::FileStorage,
};

/// Options of `create`.
#[derive(Clone, Debug, clap::Args)]
pub(super) struct CreateArgs {
    /// The image file.
    path: PathBuf,
    /// Size that the guest sees: a number with K, M, G or T.
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    size: u64,
    /// Format [default: what the suffix says].
    #[arg(long, value_name = "raw|vhdx")]
    format: Option<Format>,
    /// VHDX: unit of allocation, 1M to 256M, a power of two.
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    block_size: Option<u64>,
    /// Logical sector size in bytes.
    #[arg(long, value_name = "512|4096", default_value_t = 512)]
    sector: u32,
}

/// Makes the image.
pub(super) fn run(args: &CreateArgs, out: &Output) -> anyhow::Result<()> {
    let config = ImageConfig::new(args.path.clone(), args.format)?;
    create(&config, args.size, args.block_size, args.sector)?;
    out.line(&format!(
        "made {} ({}, {})",
        args.path.display(),
        config.format,
        Bytes(args.size)
    ));
    Ok(())
}

fn create(
    config: &ImageConfig,
    size: u64,
    block_size: Option<u64>,
    sector: u32,
) -> anyhow::Result<()> {
    let path = &config.path;
    let block_size = block_size
        .map(u32::try_from)
        .transpose()
        .context("a VHDX block has at most 256 MiB")?;
    let geometry = Geometry {
        size,
        logical_sector: sector,
        physical_sector: 4096,
    };
    let storage = FileStorage::create_new(path)
        .with_context(|| format!("cannot create {}", path.display()))?;
    let made = image::create(
        &storage,
        config.format,
        geometry,
        block_size,
        &SystemIds::default(),
    );
    if made.is_err() {
        // A half-made image would be taken for a damaged one.
        let _ = fs::remove_file(path);
    }
    made.with_context(|| format!("cannot create {}", path.display()))
}
