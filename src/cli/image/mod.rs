//! `understudy image`: make, examine and change image files. One file for each verb.

mod check;
mod create;
mod inspect;

use std::{fs::File, path::PathBuf, sync::Arc};

use super::output::Output;
use crate::{
    base::units::{GIB, KIB, MIB, TIB},
    disk::{Access, image::Format},
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
}

/// Runs the verb.
pub fn run(args: &ImageArgs, out: &Output) -> anyhow::Result<()> {
    match &args.verb {
        ImageVerb::Create(args) => create::run(args, out),
        ImageVerb::Inspect(args) => inspect::run(args, out),
        ImageVerb::Check(args) => check::run(args, out),
    }
}

/// An existing image and how it is to be read.
#[derive(Clone, Debug, clap::Args)]
struct Existing {
    /// The image file.
    path: PathBuf,
    /// Format [default: what the suffix says].
    #[arg(long, value_name = "raw|vhdx")]
    format: Option<Format>,
}

impl Existing {
    fn config(&self) -> Result<ImageConfig, ImageError> {
        ImageConfig::new(self.path.clone(), self.format)
    }
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

/// Reads `512`, `64K`, `20M`, `100G`, `2T`: powers of 1024.
fn parse_size(text: &str) -> Result<u64, String> {
    let wrong = || format!("{text:?} is not a size: use a number with K, M, G or T");
    let digits = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    let number: u64 = text[..digits].parse().map_err(|_| wrong())?;
    let unit = match text[digits..]
        .to_ascii_uppercase()
        .trim_end_matches("IB")
        .trim_end_matches('B')
    {
        "" => 1,
        "K" => KIB,
        "M" => MIB,
        "G" => GIB,
        "T" => TIB,
        _ => return Err(wrong()),
    };
    number.checked_mul(unit).ok_or_else(wrong)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_powers_of_1024() {
        assert_eq!(parse_size("512"), Ok(512));
        assert_eq!(parse_size("20M"), Ok(20 * MIB));
        assert_eq!(parse_size("2TiB"), Ok(2 * TIB));
        for bad in ["", "G", "1.5G", "-1", "1X", "99999999999T"] {
            assert!(parse_size(bad).is_err(), "{bad}");
        }
    }
}
