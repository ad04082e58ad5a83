//! `image inspect`: what an image holds, for a person or as JSON.

use std::sync::Arc;

use anyhow::Context;

use super::Existing;
use crate::{
    base::{ids::SystemIds, units::Bytes},
    cli::output::Output,
    disk::{
        Access, Content, Geometry, Opening,
        image::{self, Format},
        vhd, vhdx,
    },
    node::images::ImageConfig,
    storage::{Storage, file::FileStorage},
};

/// Options of `inspect`.
#[derive(Clone, Debug, clap::Args)]
pub(super) struct InspectArgs {
    #[command(flatten)]
    image: Existing,
    /// Print JSON.
    #[arg(long)]
    json: bool,
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
    /// What only a VHD has.
    #[serde(skip_serializing_if = "Option::is_none")]
    vhd: Option<vhd::Inspection>,
    /// What only a VHDX has.
    #[serde(skip_serializing_if = "Option::is_none")]
    vhdx: Option<vhdx::Inspection>,
}

/// Shows the image.
pub(super) fn run(args: &InspectArgs, out: &Output) -> anyhow::Result<()> {
    let inspection = inspect(&args.image.config(out)?)?;
    if args.json {
        return out.json(&inspection);
    }
    for (label, value) in rows(&inspection) {
        out.line(&format!("{label:<17} {value}"));
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
    rows.extend(inspection.vhd.iter().flat_map(vhd_rows));
    rows.extend(inspection.vhdx.iter().flat_map(vhdx_rows));
    rows
}

fn vhd_rows(vhd: &vhd::Inspection) -> Vec<(&'static str, String)> {
    let mut rows = vec![("kind", format!("{:?}", vhd.kind))];
    for (label, footer) in [("footer", &vhd.tail), ("footer copy", &vhd.head)] {
        let Some(footer) = footer else {
            if vhd.kind != vhd::Kind::Fixed || label == "footer" {
                rows.push((label, "missing".into()));
            }
            continue;
        };
        let vhd::Chs {
            cylinders,
            heads,
            sectors,
        } = footer.geometry;
        rows.push((
            label,
            format!(
                "at {:#x}, checksum {}, by {}, id {}",
                footer.offset,
                good_or_wrong(footer.checksum_good),
                footer.creator,
                footer.id
            ),
        ));
        rows.push((
            "",
            format!(
                "{} bytes, {} when it was made, geometry {cylinders}/{heads}/{sectors}",
                footer.current_size, footer.original_size
            ),
        ));
    }
    if let Some(dynamic) = &vhd.dynamic {
        rows.push((
            "header",
            format!(
                "at {:#x}, checksum {}, blocks of {}",
                dynamic.offset,
                good_or_wrong(dynamic.checksum_good),
                Bytes(dynamic.block_size)
            ),
        ));
        rows.push((
            "table",
            format!(
                "{} entries at {:#x}",
                dynamic.bat_entries, dynamic.bat_offset
            ),
        ));
        rows.push((
            "blocks",
            format!(
                "{}: {} present, {} damaged",
                dynamic.blocks, dynamic.blocks_present, dynamic.blocks_damaged
            ),
        ));
        if let Some(parent) = &dynamic.parent {
            rows.push(("parent", format!("{:?}, id {}", parent.name, parent.id)));
            for locator in &parent.locators {
                rows.push(("", format!("{} {:?}", locator.platform, locator.path)));
            }
        }
    }
    rows
}

fn good_or_wrong(good: bool) -> &'static str {
    if good { "good" } else { "wrong" }
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

fn inspect(config: &ImageConfig) -> anyhow::Result<Inspection> {
    let path = &config.path;
    let at = || format!("cannot inspect {}", path.display());
    let file = FileStorage::open(path, Access::ReadOnly).with_context(at)?;
    let storage: Arc<dyn Storage> = Arc::new(file);
    let file_bytes = storage.len()?;
    let (vhd, vhdx) = match config.format {
        Format::Raw => (None, None),
        Format::Vhd => (Some(vhd::inspect(&storage).with_context(at)?), None),
        Format::Vhdx => (None, Some(vhdx::inspect(&storage).with_context(at)?)),
    };
    let disk = image::open(
        storage,
        config.format,
        &Opening::new(Access::ReadOnly, Arc::new(SystemIds::default())),
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
        vhd,
        vhdx,
    })
}
