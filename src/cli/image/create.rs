//! `image create`: a new, empty image.

use std::{
    io,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, bail};

use super::{
    new::{NewImage, Parsed},
    open_shared,
};
use crate::{
    base::{
        ids::{Ids, SystemIds},
        units::{Bytes, parse_size},
    },
    cli::{output::Output, refused},
    disk::{
        Geometry,
        image::{self, CreateOptions, Format},
        parents::relative_path,
        vhdx::{self, CHILD_BLOCK_BYTES_DEFAULT, ParentPaths},
    },
    node::images::ImageConfig,
    storage::{
        Storage,
        draft::{Draft, Durability},
    },
};

/// Options of `create`.
#[derive(Clone, Debug, clap::Args)]
pub(super) struct CreateArgs {
    /// The image file.
    path: PathBuf,
    /// Size that the guest sees: a number with K, M, G or T.
    #[arg(long, value_name = "SIZE", value_parser = parse_size, required_unless_present = "parent")]
    size: Option<u64>,
    #[command(flatten)]
    new: NewImage,
    /// Make a differencing VHDX: it shows the disk of this VHDX, and keeps what is written to it. Nothing may write to
    /// the parent from then on.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["size", "kind", "sector", "physical_sector"])]
    parent: Option<PathBuf>,
}

/// Makes the image.
pub(super) fn run(args: &CreateArgs, out: &Output) -> anyhow::Result<()> {
    let path = &args.path;
    let new = args.new.options(path)?;
    let ids = SystemIds::default();
    let at = || format!("cannot create {}", path.display());
    let draft = Draft::create(path, ids.uuid(), Durability::Synced);
    let draft = draft
        .map_err(|error| not_made(path, error))
        .with_context(at)?;
    let storage = draft.storage();
    let made = match (&args.parent, args.size) {
        (Some(parent), _) => child(path, parent, &new, storage.as_ref(), &ids),
        (None, Some(size)) => disk(size, &new, storage.as_ref(), &ids),
        (None, None) => Err(anyhow::anyhow!("neither --size nor --parent is given")),
    };
    let what = made.with_context(at)?;
    let published = draft.publish();
    published
        .map_err(|error| not_made(path, error))
        .with_context(at)?;
    out.line(&format!("made {} ({}, {what})", path.display(), new.format));
    Ok(())
}

/// A disk of its own; what to tell of it.
fn disk(size: u64, new: &Parsed, storage: &dyn Storage, ids: &dyn Ids) -> anyhow::Result<String> {
    let options = CreateOptions {
        format: new.format,
        geometry: Geometry {
            size,
            logical_sector: new.logical_sector.unwrap_or(512),
            physical_sector: new.physical_sector.unwrap_or(4096),
        },
        kind: new.kind,
        block_size: new.block_size,
    };
    image::create(storage, &options, ids)?;
    Ok(Bytes(size).to_string())
}

/// A differencing image; what to tell of it.
fn child(
    path: &Path,
    parent: &Path,
    new: &Parsed,
    storage: &dyn Storage,
    ids: &dyn Ids,
) -> anyhow::Result<String> {
    let config = ImageConfig::new(parent.to_owned(), None)?;
    if (new.format, config.format) != (Format::Vhdx, Format::Vhdx) {
        bail!("--parent is for VHDX: both the image and its parent have to be one");
    }
    let (parent_storage, _lock) = open_shared(&config)?;
    let folder = path
        .parent()
        .filter(|folder| !folder.as_os_str().is_empty());
    let folder = folder.unwrap_or_else(|| Path::new(".")).canonicalize()?;
    let relative = relative_path(&folder, &parent.canonicalize()?);
    let relative = relative
        .with_context(|| format!("{} has a name that a VHDX cannot hold", parent.display()))?;
    let paths = ParentPaths {
        relative: Some(relative.clone()),
        ..ParentPaths::default()
    };
    let block_size = new.block_size.unwrap_or(CHILD_BLOCK_BYTES_DEFAULT);
    vhdx::create_child(storage, &parent_storage, &paths, block_size, ids)?;
    Ok(format!("a child of {relative}"))
}

fn not_made(path: &Path, error: io::Error) -> anyhow::Error {
    match error.kind() {
        io::ErrorKind::AlreadyExists => refused(format!(
            "{} exists already and is never overwritten; choose another name",
            path.display()
        )),
        _ => error.into(),
    }
}
