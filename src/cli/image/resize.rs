//! `image resize`: another size for the disk in a closed image.

use std::sync::Arc;

use anyhow::Context as _;

use super::Existing;
use crate::{
    base::{
        ids::SystemIds,
        units::{Bytes, parse_size},
    },
    cli::output::Output,
    disk::{
        Access,
        image::{self, ResizeError},
    },
    node::images,
    storage::file::FileStorage,
};

/// Options of `resize`.
#[derive(Clone, Debug, clap::Args)]
pub(super) struct ResizeArgs {
    #[command(flatten)]
    image: Existing,
    /// The new size that the guest sees: a number with K, M, G or T. A smaller one has to leave everything stored inside.
    #[arg(value_name = "SIZE", value_parser = parse_size)]
    size: u64,
}

/// Resizes the image.
pub(super) fn run(args: &ResizeArgs, out: &Output) -> anyhow::Result<()> {
    let config = args.image.config(out)?;
    let path = &config.path;
    let _lock = images::lock(path, Access::ReadWrite)?;
    let at = || format!("cannot resize {}", path.display());
    let storage = FileStorage::open(path, Access::ReadWrite).with_context(at)?;
    let ids = Arc::new(SystemIds::default());
    let resized: Result<(), ResizeError> =
        image::resize(Arc::new(storage), config.format, args.size, ids);
    resized.with_context(at)?;
    out.line(&format!(
        "{} has {} now ({})",
        path.display(),
        Bytes(args.size),
        config.format
    ));
    out.note("partitions and file systems in it keep their size: the guest changes those");
    Ok(())
}
