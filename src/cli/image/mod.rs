//! `understudy image`: make, examine and change image files. One file for each verb.

mod check;
mod convert;
mod create;
mod inspect;
mod new;
mod resize;
mod vhd;

use std::{
    fs::File,
    path::{Path, PathBuf},
    str::FromStr,
    sync::Arc,
};

use anyhow::Context as _;

use super::output::Output;
use crate::{
    disk::{
        Access,
        image::{self, Format, FormatError},
    },
    node::images::{self, ImageConfig, ImageError},
    storage::{Storage, file::FileStorage},
};

/// Options of `image`.
#[derive(Clone, Debug, clap::Args)]
pub struct ImageArgs {
    #[command(subcommand)]
    verb: ImageVerb,
}

#[derive(Clone, Debug, clap::Subcommand)]
enum ImageVerb {
    /// Make a new, empty image; an existing file is never overwritten.
    Create(create::CreateArgs),
    /// Show what an image holds, without changing it.
    Inspect(inspect::InspectArgs),
    /// Find everything that is wrong with an image, without changing it: exit code 1 if there are errors.
    Check(check::CheckArgs),
    /// Make the same disk in another file, in any format and kind. SRC is not changed, DST is complete or not there.
    Convert(convert::ConvertArgs),
    /// Give the disk in an image another size: larger, or smaller by what holds no data. Not while it is in use.
    Resize(resize::ResizeArgs),
}

/// Runs the verb.
pub fn run(args: &ImageArgs, out: &Output) -> anyhow::Result<()> {
    match &args.verb {
        ImageVerb::Create(args) => create::run(args, out),
        ImageVerb::Inspect(args) => inspect::run(args, out),
        ImageVerb::Check(args) => check::run(args, out),
        ImageVerb::Convert(args) => convert::run(args, out),
        ImageVerb::Resize(args) => resize::run(args, out),
    }
}

/// An existing image and how it is to be read.
#[derive(Clone, Debug, clap::Args)]
struct Existing {
    /// The image file.
    path: PathBuf,
    /// Format [default: what the suffix says]; `detect` looks into the file, which a guest may have written.
    #[arg(long, value_name = "raw|vhd|vhdx|detect")]
    format: Option<Reading>,
    /// Folder in which a differencing image finds its parents; they are only read.
    #[arg(long, value_name = "DIR")]
    parents: Option<PathBuf>,
}

/// The source of a conversion and how it is to be read.
#[derive(Clone, Debug, clap::Args)]
struct Source {
    /// The image file to read.
    #[arg(value_name = "SRC")]
    path: PathBuf,
    /// Format of SRC [default: what its suffix says]; `detect` looks into the file, which a guest may have written.
    #[arg(long, value_name = "raw|vhd|vhdx|detect")]
    from: Option<Reading>,
    /// Folder in which a differencing image finds its parents; they are only read.
    #[arg(long, value_name = "DIR")]
    parents: Option<PathBuf>,
}

/// How a person says what an image is.
#[derive(Clone, Copy, Debug)]
enum Reading {
    As(Format),
    Detect,
}

impl FromStr for Reading {
    type Err = FormatError;

    fn from_str(text: &str) -> Result<Self, FormatError> {
        match text {
            "detect" => Ok(Self::Detect),
            _ => text.parse().map(Self::As),
        }
    }
}

impl Existing {
    fn config(&self, out: &Output) -> anyhow::Result<ImageConfig> {
        Ok(config(&self.path, self.format, out)?.with_parents(self.parents.clone()))
    }
}

impl Source {
    fn config(&self, out: &Output) -> anyhow::Result<ImageConfig> {
        Ok(config(&self.path, self.from, out)?.with_parents(self.parents.clone()))
    }
}

/// The image at `path`; what is detected is said.
fn config(path: &Path, reading: Option<Reading>, out: &Output) -> anyhow::Result<ImageConfig> {
    let format = match reading {
        None => None,
        Some(Reading::As(format)) => Some(format),
        Some(Reading::Detect) => {
            let storage = FileStorage::open(path, Access::ReadOnly);
            let seen = storage.and_then(|storage| image::detect(&storage));
            let seen = seen.with_context(|| format!("cannot look into {}", path.display()))?;
            let said = match seen {
                Some(format) => format!("it has the signature of {format}"),
                None => "it has no signature and is taken as raw".into(),
            };
            out.note(&format!("{}: {said}", path.display()));
            Some(seen.unwrap_or(Format::Raw))
        }
    };
    Ok(ImageConfig::new(path.to_owned(), format)?)
}

/// The file of an image that nobody writes to while the second value lives.
fn open_shared(config: &ImageConfig) -> Result<(Arc<dyn Storage>, File), ImageError> {
    let lock = images::lock(&config.path, Access::ReadOnly)?;
    let storage = FileStorage::open(&config.path, Access::ReadOnly);
    let storage = storage.map_err(|source| ImageError::File {
        path: config.path.clone(),
        source,
    })?;
    Ok((Arc::new(storage), lock))
}
