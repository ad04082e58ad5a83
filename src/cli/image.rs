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
        Access, Content, Geometry, Opening,
        image::{self, Format},
        vhdx,
    },
    node::images::ImageConfig,
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
    Create {
        /// The image file.
        path: PathBuf,
        /// Size that the guest sees: a number with K, M, G or T.
        #[arg(long, value_name = "SIZE", value_parser = parse_size)]
        size: u64,
        /// Format [default: what the suffix says].
        #[arg(long, value_name = "raw|vhd|vhdx")]
        format: Option<Format>,
        /// VHD and VHDX: unit of allocation, a power of two: 512K or 1M to 256M.
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
        #[arg(long, value_name = "raw|vhd|vhdx")]
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
    /// Length of the file in bytes, holes included.
    file_bytes: u64,
    /// Bytes of the disk that are stored rather than known to be zeros.
    data_bytes: u64,
    /// What only a VHDX has.
    #[serde(skip_serializing_if = "Option::is_none")]
    vhdx: Option<vhdx::Inspection>,
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
            for (label, value) in rows(&inspection) {
                out.line(&format!("{label:<17} {value}"));
            }
        }
    }
    Ok(())
}

fn rows(inspection: &Inspection) -> Vec<(&'static str, String)> {
    let Geometry {
        size,
        logical_sector,
        physical_sector,
    } = inspection.geometry;
    let mut rows = vec![
        ("image", inspection.image.clone()),
        ("format", inspection.format.clone()),
        ("size", format!("{} ({size} bytes)", Bytes(size))),
        (
            "sectors",
            format!("{logical_sector} logical, {physical_sector} physical"),
        ),
        ("allocated", Bytes(inspection.data_bytes).to_string()),
        ("file", Bytes(inspection.file_bytes).to_string()),
    ];
    rows.extend(inspection.vhdx.iter().flat_map(vhdx_rows));
    rows
}

fn vhdx_rows(vhdx: &vhdx::Inspection) -> Vec<(&'static str, String)> {
    let kind = format!("{:?}, blocks of {}", vhdx.kind, Bytes(vhdx.block_size));
    let mut rows = vec![
        ("creator", vhdx.creator.clone()),
        ("kind", kind),
        ("disk id", vhdx.disk_id.to_string()),
    ];
    for (label, header) in ["header 1", "header 2"].into_iter().zip(&vhdx.headers) {
        let text = header.as_ref().map_or_else(
            || "damaged".into(),
            |header| {
                format!(
                    "sequence {}, data {}, log {}",
                    header.sequence, header.data_write, header.log
                )
            },
        );
        rows.push((label, text));
    }
    let log = &vhdx.log;
    let state = match log.entries {
        0 => "empty".into(),
        entries => format!("{entries} entries to replay"),
    };
    rows.push((
        "log",
        format!("{} at {:#x}, {state}", Bytes(log.len), log.offset),
    ));
    for region in &vhdx.regions {
        let place = format!("{} at {:#x}", Bytes(region.len), region.offset);
        rows.push(("region", format!("{} {}, {place}", region.name, region.id)));
    }
    if vhdx.region_tables_differ {
        rows.push((
            "region tables",
            "one copy is damaged or unlike the other".into(),
        ));
    }
    let vhdx::Blocks {
        total,
        present,
        not_present,
        zero,
        unmapped,
        undefined,
    } = vhdx.blocks;
    let absent = format!(
        "{not_present} not present, {zero} zero, {unmapped} unmapped, {undefined} undefined"
    );
    rows.push(("blocks", format!("{total}: {present} present, {absent}")));
    rows
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
        .context("a block has at most 256 MiB")?;
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
    let file = FileStorage::open(path, Access::ReadOnly).with_context(at)?;
    let storage: Arc<dyn Storage> = Arc::new(file);
    let file_bytes = storage.len()?;
    let vhdx = match config.format {
        Format::Vhdx => Some(vhdx::inspect(&storage).with_context(at)?),
        Format::Raw | Format::Vhd => None,
    };
    let opening = Opening::new(Access::ReadOnly, Arc::new(SystemIds::default()));
    let disk = image::open(storage, config.format, &opening).with_context(at)?;
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
        vhdx,
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
