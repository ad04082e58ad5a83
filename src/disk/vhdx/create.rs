//! A new VHDX file, laid out as Windows does it: log, metadata, BAT, blocks.
//!
//! # Crash contract
//! The file identifier is written last, after everything else is durable: what a power cut leaves is a complete file
//! or none that anybody would open as VHDX.

use std::{io, sync::Arc};

use uuid::Uuid;

use crate::{
    base::{
        ids::Ids,
        units::{Extent, MIB, to_u64, to_usize},
    },
    disk::Geometry,
    storage::{Fua, Storage},
};

use super::{
    CreateOptions, Kind,
    error::CreateError,
    format::{
        FILE_BYTES_MAX, FILE_IDENTIFIER_BYTES, FILE_SIGNATURE, HEADER_OFFSETS, Header,
        REGION_TABLE_OFFSETS,
    },
    header,
    locator::Locator,
    metadata::Parameters,
    numbering::{Entry, Numbering},
    open::{Image, Replaying},
    region,
};

const LOG: Extent = Extent::new(MIB, MIB);
const METADATA: Extent = Extent::new(2 * MIB, MIB);
const BAT_OFFSET: u64 = 3 * MIB;
const ENTRY_BYTES: u64 = 8;
/// Longest path of a parent: what Windows knows, 32767 letters, as UTF-8 never has fewer bytes than letters.
const PATH_BYTES_MAX: usize = 32767;
/// Diagnostic only; readers must not look at it.
const CREATOR: &str = concat!("understudy ", env!("CARGO_PKG_VERSION"));

/// Paths of a new child's parent, as Windows writes them. At least one is needed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ParentPaths {
    /// From the child's folder: `.\parent.vhdx`.
    pub relative: Option<String>,
    /// With the volume: `\\?\Volume{..}\folder\parent.vhdx`.
    pub volume: Option<String>,
    /// With the drive: `\\?\d:\folder\parent.vhdx`.
    pub absolute: Option<String>,
}

/// Makes a complete, clean differencing file in the empty `storage` and makes it durable: a child of the image in
/// `parent`, which nobody may write to from now on. It shows the same disk, identity included. `block_size` is in
/// bytes, as [`CreateOptions::block_size`]; Windows takes [`CHILD_BLOCK_BYTES_DEFAULT`](super::CHILD_BLOCK_BYTES_DEFAULT).
pub fn create_child(
    storage: &dyn Storage,
    parent: &Arc<dyn Storage>,
    paths: &ParentPaths,
    block_size: u32,
    ids: &dyn Ids,
) -> Result<(), CreateError> {
    let parent = Image::read(Arc::clone(parent), &Replaying::InMemory);
    let parent = parent.map_err(CreateError::Parent)?;
    let paths = [&paths.relative, &paths.volume, &paths.absolute].map(|path| path.as_deref());
    let bad = |path: &str| path.is_empty() || path.len() > PATH_BYTES_MAX || path.contains('\0');
    if paths.iter().flatten().count() == 0 || paths.into_iter().flatten().any(bad) {
        return Err(CreateError::Options(format!(
            "{paths:?} as the paths of its parent"
        )));
    }
    let linkage = parent.headers.current().data_write;
    if linkage.is_nil() {
        return Err(CreateError::Options(
            "a parent whose data has no identity".into(),
        ));
    }
    let parameters = Parameters {
        block_size: u64::from(block_size),
        kind: Kind::Differencing,
        ..parent.parameters
    };
    let locator = Locator::new(linkage, paths);
    lay_out(storage, &parameters, Some(&locator), ids)
}

/// Makes a complete, clean file in the empty `storage` and makes it durable.
pub fn create(
    storage: &dyn Storage,
    options: &CreateOptions,
    ids: &dyn Ids,
) -> Result<(), CreateError> {
    let parameters = Parameters {
        geometry: Geometry {
            size: options.size,
            logical_sector: options.logical_sector,
            physical_sector: options.physical_sector,
        },
        block_size: u64::from(options.block_size),
        kind: options.kind,
        disk_id: ids.uuid(),
    };
    if options.kind == Kind::Differencing {
        return Err(CreateError::Options("a parent that nobody named".into()));
    }
    lay_out(storage, &parameters, None, ids)
}

fn lay_out(
    storage: &dyn Storage,
    parameters: &Parameters,
    locator: Option<&Locator>,
    ids: &dyn Ids,
) -> Result<(), CreateError> {
    parameters.check().map_err(CreateError::Options)?;
    let len = storage.len()?;
    if len != 0 {
        return Err(CreateError::NotEmpty(len));
    }
    let numbering = Numbering::new(parameters);
    let bat = Extent::new(BAT_OFFSET, numbering.region_len());
    let end = match parameters.kind {
        Kind::Dynamic | Kind::Differencing => bat.end(),
        Kind::Fixed => bat.end() + numbering.blocks * parameters.block_size,
    };
    if end > FILE_BYTES_MAX {
        return Err(CreateError::Options(format!("{end} bytes in its file")));
    }
    storage.set_len(end)?;
    if parameters.kind == Kind::Fixed {
        write_fixed_bat(storage, bat, numbering, parameters.block_size)?;
    }
    storage.write_at(METADATA.offset, &parameters.encode(locator), Fua::No)?;
    for offset in REGION_TABLE_OFFSETS {
        storage.write_at(offset, &region::encode(bat, METADATA), Fua::No)?;
    }
    let (file_write, data_write) = (ids.uuid(), ids.uuid());
    for (sequence, offset) in (1..).zip(HEADER_OFFSETS) {
        let header = Header {
            checksum: 0,
            sequence,
            file_write,
            data_write,
            log: Uuid::nil(),
            log_version: 0,
            version: 1,
            log_len: u32::try_from(LOG.len).expect("1 MiB"),
            log_offset: LOG.offset,
        };
        storage.write_at(offset, &header::encode(&header), Fua::No)?;
    }
    storage.sync()?;
    storage.write_at(0, &identifier(), Fua::No)?;
    Ok(storage.sync()?)
}

/// All blocks present, one behind the other.
fn write_fixed_bat(
    storage: &dyn Storage,
    bat: Extent,
    numbering: Numbering,
    block_size: u64,
) -> io::Result<()> {
    let mut buf = Vec::with_capacity(to_usize(MIB));
    let mut at = bat.offset;
    let mut entry = 0;
    for block in 0..numbering.blocks {
        // The entry of a bitmap stands in between and stays zero.
        let bitmaps = numbering.entry(block) - entry;
        buf.resize(buf.len() + to_usize(bitmaps * ENTRY_BYTES), 0);
        buf.extend(Entry::present(bat.end() + block * block_size).to_bytes());
        entry = numbering.entry(block) + 1;
        if to_u64(buf.len()) >= MIB - 2 * ENTRY_BYTES {
            storage.write_at(at, &buf, Fua::No)?;
            at += to_u64(buf.len());
            buf.clear();
        }
    }
    storage.write_at(at, &buf, Fua::No)
}

fn identifier() -> Vec<u8> {
    let mut bytes = FILE_SIGNATURE.to_vec();
    bytes.extend(CREATOR.encode_utf16().flat_map(u16::to_le_bytes));
    bytes.resize(FILE_IDENTIFIER_BYTES, 0);
    bytes
}
