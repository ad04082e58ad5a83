//! `understudy image`: make and examine image files.

use std::{fs, path::PathBuf, sync::Arc};

use anyhow::Context;

use super::output::Output;
use crate::{
    base::{
        ids::SystemIds,
        units::{Bytes, GIB, KIB, MIB, TIB},
    },
    disk::{
        Access, Content, Geometry,
        image::{self, Format},
    },
    node::images::ImageConfig,
    storage::file::FileStorage,
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
    Create {
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
    },
    /// Show what an image holds, without changing it.
    Inspect {
        /// The image file.
        path: PathBuf,
        /// Format [default: what the suffix says].
        #[arg(long, value_name = "raw|vhdx")]
        format: Option<Format>,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
}

/// What `inspect` prints.
#[derive(Debug, serde::Serialize)]
struct Inspection {
    image: String,
    format: String,
    geometry: Geometry,
    file_bytes: u64,
    data_bytes: u64,
}

/// Runs the verb.
pub fn run(args: &ImageArgs, out: &Output) -> anyhow::Result<()> {
    match &args.verb {
        ImageVerb::Create {
            path,
            size,
            format,
            block_size,
            sector,
        } => {
            let config = ImageConfig::new(path.clone(), *format)?;
            create(&config, *size, *block_size, *sector)?;
            out.line(&format!(
                "made {} ({}, {})",
                path.display(),
                config.format,
                Bytes(*size)
            ));
        }
        ImageVerb::Inspect { path, format, json } => {
            let inspection = inspect(&ImageConfig::new(path.clone(), *format)?)?;
            if *json {
                return out.json(&inspection);
            }
            let Geometry {
                size,
                logical_sector,
                physical_sector,
            } = inspection.geometry;
            out.line(&format!("image             {}", inspection.image));
            out.line(&format!("format            {}", inspection.format));
            out.line(&format!("size              {} ({size} bytes)", Bytes(size)));
            out.line(&format!(
                "sectors           {logical_sector} logical, {physical_sector} physical"
            ));
            out.line(&format!(
                "allocated         {}",
                Bytes(inspection.data_bytes)
            ));
            out.line(&format!(
                "file              {}",
                Bytes(inspection.file_bytes)
            ));
        }
    }
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

fn inspect(config: &ImageConfig) -> anyhow::Result<Inspection> {
    let path = &config.path;
    let at = || format!("cannot inspect {}", path.display());
    let storage = Arc::new(FileStorage::open(path, Access::ReadOnly).with_context(at)?);
    let file_bytes = crate::storage::Storage::len(&*storage)?;
    let disk = image::open(
        storage,
        config.format,
        Access::ReadOnly,
        Arc::new(SystemIds::default()),
    )
    .with_context(at)?;
    let geometry = disk.geometry();
    let mut data_bytes = 0;
    let mut offset = 0;
    while offset < geometry.size {
        let (run, content) = disk.run_at(offset)?;
        if content == Content::Data {
            data_bytes += run.len;
        }
        offset = run.end();
    }
    let (image, format) = (path.display().to_string(), config.format.to_string());
    Ok(Inspection {
        image,
        format,
        geometry,
        file_bytes,
        data_bytes,
    })
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
