//! A new VHDX file, laid out as Windows does it: log, metadata, BAT, blocks.
//!
//! # Crash contract
//! The file identifier is written last, after everything else is durable: what a power cut leaves is a complete file
//! or none that anybody would open as VHDX.

use std::io;

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
    bat::{Entry, Numbering},
    error::CreateError,
    format::{
        FILE_BYTES_MAX, FILE_IDENTIFIER_BYTES, FILE_SIGNATURE, HEADER_OFFSETS, Header,
        REGION_TABLE_OFFSETS,
    },
    header,
    metadata::Parameters,
    region,
};

const LOG: Extent = Extent::new(MIB, MIB);
const METADATA: Extent = Extent::new(2 * MIB, MIB);
const BAT_OFFSET: u64 = 3 * MIB;
const ENTRY_BYTES: u64 = 8;
/// Diagnostic only; readers must not look at it.
const CREATOR: &str = concat!("understudy ", env!("CARGO_PKG_VERSION"));

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
    parameters.check().map_err(CreateError::Options)?;
    let len = storage.len()?;
    if len != 0 {
        return Err(CreateError::NotEmpty(len));
    }
    let numbering = Numbering::new(&parameters);
    let bat = Extent::new(BAT_OFFSET, numbering.region_len());
    let end = match options.kind {
        Kind::Dynamic => bat.end(),
        Kind::Fixed => bat.end() + numbering.blocks * parameters.block_size,
    };
    if end > FILE_BYTES_MAX {
        return Err(CreateError::Options(format!("{end} bytes in its file")));
    }
    storage.set_len(end)?;
    if options.kind == Kind::Fixed {
        write_fixed_bat(storage, bat, numbering, parameters.block_size)?;
    }
    storage.write_at(METADATA.offset, &parameters.encode(), Fua::No)?;
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
