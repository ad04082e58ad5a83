//! `image create`: a new, empty image.

use std::{io, path::PathBuf};

use anyhow::Context as _;

use super::{new::NewImage, parse_size};
use crate::{
    base::{
        ids::{Ids as _, SystemIds},
        units::Bytes,
    },
    cli::{output::Output, refused},
    disk::{
        Geometry,
        image::{self, CreateOptions},
    },
    storage::draft::Draft,
};

/// Options of `create`.
#[derive(Clone, Debug, clap::Args)]
pub(super) struct CreateArgs {
    /// The image file.
    path: PathBuf,
    /// Size that the guest sees: a number with K, M, G or T.
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    size: u64,
    #[command(flatten)]
    new: NewImage,
}

/// Makes the image.
pub(super) fn run(args: &CreateArgs, out: &Output) -> anyhow::Result<()> {
    let path = &args.path;
    let new = args.new.options(path)?;
    let ids = SystemIds::default();
    let options = CreateOptions {
        format: new.format,
        geometry: Geometry {
            size: args.size,
            logical_sector: new.logical_sector.unwrap_or(512),
            physical_sector: new.physical_sector.unwrap_or(4096),
        },
        kind: new.kind,
        block_size: new.block_size,
    };
    let at = || format!("cannot create {}", path.display());
    let draft = Draft::create(path, ids.uuid());
    let draft = draft
        .map_err(|error| not_made(path, error))
        .with_context(at)?;
    image::create(draft.storage().as_ref(), &options, &ids).with_context(at)?;
    let published = draft.publish();
    published
        .map_err(|error| not_made(path, error))
        .with_context(at)?;
    out.line(&format!(
        "made {} ({}, {})",
        path.display(),
        new.format,
        Bytes(args.size)
    ));
    Ok(())
}

fn not_made(path: &std::path::Path, error: io::Error) -> anyhow::Error {
    match error.kind() {
        io::ErrorKind::AlreadyExists => refused(format!(
            "{} exists already and is never overwritten; choose another name",
            path.display()
        )),
        _ => error.into(),
    }
}
