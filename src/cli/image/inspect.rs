//! `image inspect`: what an image holds, for a person or as JSON.

use std::sync::Arc;

use anyhow::{Context, bail};

use super::Existing;
use crate::{
    base::{ids::SystemIds, units::Bytes},
    cli::output::{self, Output},
    disk::{
        Access, Content, Disk, DiskError, Geometry,
        image::{self, Format},
        vhd,
        vhdx::{self, LogState},
    },
    node::images::{self, ImageConfig, ImageError},
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
    /// Another process uses the image, so what is shown may change while it is read.
    in_use: bool,
    /// Length of the file in bytes, holes included.
    file_bytes: u64,
    /// Size and sectors, if the image opens.
    geometry: Option<Geometry>,
    /// Bytes of the disk that are stored rather than known to be zeros.
    data_bytes: Option<u64>,
    /// Why it does not open.
    refusal: Option<String>,
    /// What only a VHD has.
    #[serde(skip_serializing_if = "Option::is_none")]
    vhd: Option<vhd::Inspection>,
    /// What only a VHDX has.
    #[serde(skip_serializing_if = "Option::is_none")]
    vhdx: Option<vhdx::Inspection>,
    /// The parents of a differencing VHDX, nearest first, if their folder was named and they are there.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    parents: Vec<vhdx::Ancestor>,
}

/// Shows the image; that it is damaged is an error after all of it was shown.
pub(super) fn run(args: &InspectArgs, out: &Output) -> anyhow::Result<()> {
    let config = args.image.config(out)?;
    let inspection = inspect(&config)?;
    if args.json {
        out.json(&inspection)?;
    } else {
        for (label, value) in rows(&inspection) {
            out.line(&format!("{label:<17} {value}"));
        }
    }
    match inspection.refusal {
        Some(refusal) => bail!("{} does not open: {refusal}", config.path.display()),
        None => Ok(()),
    }
}

fn inspect(config: &ImageConfig) -> anyhow::Result<Inspection> {
    let path = &config.path;
    let at = || format!("cannot inspect {}", path.display());
    // Readers and writers go on while somebody looks; without the lock what is seen may be of different moments.
    let lock = images::lock(path, Access::ReadOnly);
    let in_use = matches!(lock, Err(ImageError::InUse(_)));
    let file = FileStorage::open(path, Access::ReadOnly).with_context(at)?;
    let storage: Arc<dyn Storage> = Arc::new(file);
    let vhdx = (config.format == Format::Vhdx).then(|| vhdx::inspect(&storage));
    let opening = config.opening(Access::ReadOnly, &(Arc::new(SystemIds::default()) as _))?;
    let mut inspection = Inspection {
        image: path.display().to_string(),
        format: config.format.to_string(),
        in_use,
        file_bytes: storage.len().with_context(at)?,
        geometry: None,
        data_bytes: None,
        refusal: None,
        vhd: None,
        vhdx,
        parents: Vec::new(),
    };
    if config.format == Format::Vhd {
        match vhd::inspect(&storage) {
            Ok(vhd) => inspection.vhd = Some(vhd),
            Err(error) => inspection.refusal = Some(output::chain(&error)),
        }
    }
    let is_child = inspection
        .vhdx
        .as_ref()
        .is_some_and(|vhdx| vhdx.parent.is_some());
    if is_child && config.parents.is_some() {
        // What is wrong with the chain is said by the open below.
        inspection.parents = vhdx::ancestors(&storage, &opening.parents).unwrap_or_default();
    }
    match image::open(storage, config.format, &opening) {
        Ok(disk) => {
            inspection.geometry = Some(disk.geometry());
            inspection.data_bytes = Some(stored(disk.as_ref()).with_context(at)?);
        }
        Err(error) => inspection.refusal = Some(output::chain(&error)),
    }
    Ok(inspection)
}

/// Bytes that are not known to be zeros.
fn stored(disk: &dyn Disk) -> Result<u64, DiskError> {
    let (mut bytes, mut offset) = (0, 0);
    while offset < disk.geometry().size {
        let (run, content) = disk.run_at(offset)?;
        if content == Content::Data {
            bytes += run.len;
        }
        offset = run.end();
    }
    Ok(bytes)
}

pub(super) type Rows = Vec<(&'static str, String)>;

fn rows(inspection: &Inspection) -> Rows {
    let mut rows = vec![
        ("image", inspection.image.clone()),
        ("format", inspection.format.clone()),
    ];
    if inspection.in_use {
        rows.push((
            "in use",
            "by another process: what is shown may be changing".into(),
        ));
    }
    if let Some(Geometry {
        size,
        logical_sector,
        physical_sector,
    }) = inspection.geometry
    {
        rows.push(("size", format!("{} ({size} bytes)", Bytes(size))));
        let sectors = format!("{logical_sector} logical, {physical_sector} physical");
        rows.push(("sectors", sectors));
    }
    if let Some(bytes) = inspection.data_bytes {
        rows.push(("allocated", Bytes(bytes).to_string()));
    }
    rows.push(("file", Bytes(inspection.file_bytes).to_string()));
    rows.extend(inspection.vhd.iter().flat_map(super::vhd::vhd_rows));
    rows.extend(inspection.vhdx.iter().flat_map(vhdx_rows));
    rows.extend(inspection.parents.iter().map(|parent| {
        let text = format!(
            "{}, {}, {}, data {}",
            parent.name,
            parent.kind,
            Bytes(parent.geometry.size),
            parent.data_write
        );
        ("parent", text)
    }));
    rows
}

fn vhdx_rows(vhdx: &vhdx::Inspection) -> Rows {
    let mut rows = vec![("creator", vhdx.creator.clone())];
    if let (Some(kind), Some(block_size)) = (vhdx.kind, vhdx.block_size) {
        rows.push(("kind", format!("{kind}, blocks of {}", Bytes(block_size))));
    }
    rows.extend(vhdx.disk_id.map(|id| ("disk id", id.to_string())));
    rows.extend(header_rows(vhdx));
    let state = match vhdx.log.state {
        LogState::Clean => "clean".into(),
        LogState::Dirty { entries } => format!("{entries} entries to replay"),
        LogState::Damaged => "damaged".into(),
        LogState::Unknown => "unknown".into(),
    };
    let log = &vhdx.log;
    rows.push((
        "log",
        format!("{} at {:#x}, {state}", Bytes(log.len), log.offset),
    ));
    for (label, table) in ["region table 1", "region table 2"]
        .into_iter()
        .zip(&vhdx.region_tables)
    {
        match table {
            None => rows.push((label, "damaged".into())),
            Some(regions) => rows.extend(regions.iter().map(|region| (label, region_text(region)))),
        }
    }
    rows.extend(
        vhdx.metadata
            .iter()
            .map(|item| ("metadata item", item_text(item))),
    );
    if let Some(locator) = &vhdx.parent {
        rows.push(("parent locator", locator.id.to_string()));
        let entries = locator.entries.iter();
        rows.extend(entries.map(|(key, value)| ("", format!("{key} = {value}"))));
    }
    rows.extend(vhdx.blocks.map(|blocks| ("blocks", blocks_text(blocks))));
    let findings = vhdx.report.findings.iter();
    rows.extend(findings.map(|finding| ("finding", finding.to_string())));
    rows
}

fn header_rows(vhdx: &vhdx::Inspection) -> impl Iterator<Item = (&'static str, String)> {
    let labels = [(1, "header 1"), (2, "header 2")];
    labels
        .into_iter()
        .zip(&vhdx.headers)
        .map(|((number, label), header)| {
            let Some(header) = header else {
                return (label, "damaged".into());
            };
            let current = if vhdx.current_header == Some(number) {
                ", current"
            } else {
                ""
            };
            let text = format!(
                "sequence {}, file {}, data {}, log {}{current}",
                header.sequence, header.file_write, header.data_write, header.log
            );
            (label, text)
        })
}

fn region_text(region: &vhdx::Region) -> String {
    let need = if region.required {
        "required"
    } else {
        "optional"
    };
    let place = format!("{} at {:#x}", Bytes(region.len), region.offset);
    format!("{} {}, {place}, {need}", region.name, region.id)
}

fn item_text(item: &vhdx::Item) -> String {
    let flags = [
        (item.user, "user"),
        (item.virtual_disk, "virtual disk"),
        (item.required, "required"),
    ];
    let flags: Vec<_> = flags
        .into_iter()
        .filter_map(|(set, name)| set.then_some(name))
        .collect();
    let name = item.name.unwrap_or("unknown");
    format!(
        "{name} {}, {} bytes at {:#x}, {}",
        item.id,
        item.len,
        item.offset,
        flags.join(" + ")
    )
}

fn blocks_text(blocks: vhdx::Blocks) -> String {
    let vhdx::Blocks {
        total,
        present,
        partial,
        not_present,
        zero,
        unmapped,
        undefined,
        reserved,
        bitmaps,
    } = blocks;
    format!(
        "{total}: {present} present, {partial} partly present, {not_present} not present, {zero} zero, {unmapped} unmapped, \
         {undefined} undefined, {reserved} damaged; \
         {bitmaps} sector bitmaps"
    )
}
