//! A new VHD file, laid out as Windows does it: footer copy, dynamic header, table, blocks, footer.
//!
//! Readers take a disk's size from different fields: the current size, the original size, or the geometry, which covers
//! a little less. The first two are made equal, and the file calls its creator "win ", whose geometry nobody takes for
//! the size: so all of them see every byte. The time of creation is not known on this floor and stays at the start of
//! the format's calendar; nobody checks it.
//!
//! # Crash contract
//! The footers are written last, after everything else is durable: what a power cut leaves is a complete file or none
//! that anybody would open as VHD.

use crate::{
    base::{
        ids::Ids,
        units::{SECTOR_BYTES, to_usize},
    },
    storage::{Fua, Storage},
};

use uuid::Uuid;

use super::{
    CreateOptions, Kind,
    error::CreateError,
    format::{
        BLOCK_BYTES_MAX, BLOCK_BYTES_MIN, Chs, FEATURE_RESERVED, FOOTER_LEN, Footer, HEADER_LEN,
        Header, KIND_DYNAMIC, KIND_FIXED, Locator, NO_OFFSET, SIZE_MAX, VERSION, WINDOWS,
    },
};

/// Where the dynamic header stands.
const HEADER_OFFSET: u64 = FOOTER_LEN;
/// Where the table stands.
const BAT_OFFSET: u64 = HEADER_OFFSET + HEADER_LEN;
/// Windows 10.
const CREATOR_VERSION: u32 = 0x000A_0000;

/// Makes a complete, clean file in the empty `storage` and makes it durable.
pub fn create(
    storage: &dyn Storage,
    options: &CreateOptions,
    ids: &dyn Ids,
) -> Result<(), CreateError> {
    check_size(options.size).map_err(CreateError::Options)?;
    let len = storage.len()?;
    if len != 0 {
        return Err(CreateError::NotEmpty(len));
    }
    let fixed = Footer {
        features: FEATURE_RESERVED,
        version: VERSION,
        header_offset: NO_OFFSET,
        created: 0,
        creator: WINDOWS,
        creator_version: CREATOR_VERSION,
        creator_host: *b"Wi2k",
        original_size: options.size,
        current_size: options.size,
        geometry: Chs::of(options.size),
        kind: KIND_FIXED,
        checksum: 0,
        id: ids.uuid(),
        saved_state: 0,
    };
    match options.kind {
        Kind::Fixed => {
            // Of one sector that makes the file longer either all is there or nothing.
            storage.write_at(options.size, &fixed.encode(), Fua::No)?;
        }
        Kind::Dynamic => {
            let footer = Footer {
                header_offset: HEADER_OFFSET,
                kind: KIND_DYNAMIC,
                ..fixed
            };
            let end = write_table(storage, options)?;
            storage.sync()?;
            storage.write_at(0, &footer.encode(), Fua::No)?;
            storage.write_at(end, &footer.encode(), Fua::No)?;
        }
        Kind::Differencing => {
            return Err(CreateError::Options(
                "a parent: new VHD disks are dynamic or fixed".into(),
            ));
        }
    }
    Ok(storage.sync()?)
}

/// Whether a VHD can have `size` bytes; if not, what it cannot have, and what it could have instead.
pub(super) fn check_size(size: u64) -> Result<(), String> {
    if size == 0 || size > SIZE_MAX {
        return Err(format!(
            "a size of {size} bytes: at least {SECTOR_BYTES}, at most {SIZE_MAX} (2040 GiB)"
        ));
    }
    if !size.is_multiple_of(SECTOR_BYTES) {
        let below = size - size % SECTOR_BYTES;
        return Err(format!(
            "a size of {size} bytes: it must be a multiple of {SECTOR_BYTES}, such as {}",
            below + SECTOR_BYTES
        ));
    }
    Ok(())
}

/// Writes header and table; tells where the file ends.
fn write_table(storage: &dyn Storage, options: &CreateOptions) -> Result<u64, CreateError> {
    let block_size = u64::from(options.block_size);
    if !block_size.is_power_of_two() || !(BLOCK_BYTES_MIN..=BLOCK_BYTES_MAX).contains(&block_size) {
        return Err(CreateError::Options(format!(
            "blocks of {block_size} bytes: a power of two from {BLOCK_BYTES_MIN} to {BLOCK_BYTES_MAX}"
        )));
    }
    let entries = options.size.div_ceil(block_size);
    let header = Header {
        next: NO_OFFSET,
        bat_offset: BAT_OFFSET,
        version: VERSION,
        entries: u32::try_from(entries).expect("2040 GiB in the smallest blocks are 2^22"),
        block_size: options.block_size,
        checksum: 0,
        parent_id: Uuid::nil(),
        parent_created: 0,
        reserved: 0,
        parent_name: [0; 256],
        locators: [Locator::default(); 8],
    };
    storage.write_at(HEADER_OFFSET, &header.encode(), Fua::No)?;
    let bat = (entries * 4).next_multiple_of(SECTOR_BYTES);
    // Absent, and so is the padding: at most 16 MiB.
    storage.write_at(BAT_OFFSET, &vec![0xFF; to_usize(bat)], Fua::No)?;
    Ok(BAT_OFFSET + bat)
}
