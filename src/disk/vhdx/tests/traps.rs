//! What other implementations got wrong, and what other writers do that the format allows: each was a bug somewhere.

use super::*;
use crate::{
    base::units::{GIB, MIB, TIB, to_usize},
    disk::{Fua, Geometry},
    storage::memory::Power,
};

const HEADERS: [usize; 2] = [0x10000, 0x20000];
const REGION_TABLES: [usize; 2] = [0x30000, 0x40000];
const METADATA_ITEMS: usize = (2 << 20) + 0x10000;
const BAT: usize = 3 << 20;

/// The bytes of a new, closed image of 8 MiB, the first block of which holds sevens.
fn image() -> Vec<u8> {
    let storage = new_image(&Power::new(), &options(8 << 20, Kind::Dynamic));
    let disk = open(&storage).unwrap();
    disk.write_at(0, &[7; 4096], Fua::No).unwrap();
    disk.close().unwrap();
    storage.bytes()
}

fn changed(change: impl FnOnce(&mut Vec<u8>)) -> Arc<MemoryStorage> {
    let mut bytes = image();
    change(&mut bytes);
    hostile::reseal(&mut bytes);
    MemoryStorage::with_bytes(&bytes)
}

fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    bytes[at..at + value.len()].copy_from_slice(value);
}

fn first_byte(storage: &Arc<MemoryStorage>) -> u8 {
    let mut held = [0];
    let disk = open_as(Arc::clone(storage), Access::ReadOnly).unwrap();
    disk.read_at(0, &mut held).unwrap();
    held[0]
}

/// Masks of 32 bits on entries of 64 lost everything past 4 GiB.
#[test]
fn blocks_far_into_the_file_are_found() {
    let storage = changed(|_| {});
    for place in [5 * GIB, 200 * TIB] {
        storage.set_len(place + MIB).unwrap();
        storage.write_at(place, &[9; 512], Fua::No).unwrap();
        let entry = (place | 6).to_le_bytes();
        storage.write_at(BAT as u64, &entry, Fua::No).unwrap();
        // Only what lies there is looked at, not what is between.
        if place < TIB {
            assert_eq!(first_byte(&storage), 9);
        } else {
            storage.set_len(place).unwrap();
            open_as(Arc::clone(&storage), Access::ReadOnly).unwrap_err();
        }
    }
}

#[test]
fn an_entry_of_zeros_has_no_offset_when_it_is_written() {
    let storage = changed(|_| {});
    let disk = open(&storage).unwrap();
    let whole = crate::base::units::Extent::new(0, MIB);
    disk.zero(whole, crate::disk::Space::Release, Fua::No)
        .unwrap();
    disk.close().unwrap();
    assert_eq!(storage.bytes()[BAT..BAT + 8], 2u64.to_le_bytes());
    assert_eq!(first_byte(&storage), 0);
}

/// Where an entry of zeros has one all the same, the place is nobody's.
#[test]
fn an_entry_of_zeros_may_have_an_offset_when_it_is_read() {
    let storage = changed(|bytes| put(bytes, BAT, &((4u64 << 20) | 2).to_le_bytes()));
    assert_eq!(first_byte(&storage), 0);
    let storage = changed(|bytes| put(bytes, BAT + 8, &((4u64 << 20) | 2).to_le_bytes()));
    assert_eq!(first_byte(&storage), 7, "and not its owner's neighbour's");
}

/// Disk2vhd writes both headers alike. Two that differ and claim the same turn leave nothing to go by.
#[test]
fn headers_of_one_turn_must_be_alike() {
    let twins = |bytes: &mut Vec<u8>| {
        let first = bytes[HEADERS[0]..HEADERS[0] + 4096].to_vec();
        put(bytes, HEADERS[1], &first);
    };
    let storage = changed(twins);
    assert_eq!(first_byte(&storage), 7);
    let disk = open(&storage).unwrap();
    disk.write_at(0, &[8; 512], Fua::No).unwrap();
    disk.close().unwrap();
    assert_eq!(first_byte(&storage), 8);
    let storage = changed(|bytes| {
        twins(bytes);
        bytes[HEADERS[1] + 40] ^= 1;
    });
    let error = open_as(storage, Access::ReadOnly).unwrap_err();
    assert!(matches!(error, OpenError::Corrupt { part: "header", .. }));
}

#[test]
fn the_newer_header_counts_as_an_unsigned_number() {
    let storage = changed(|bytes| {
        let newer = usize::from(bytes[HEADERS[0] + 8] < bytes[HEADERS[1] + 8]);
        put(bytes, HEADERS[newer] + 8, &(1u64 << 63).to_le_bytes());
        // The older one would not open.
        put(bytes, HEADERS[1 - newer] + 66, &[9, 0]);
    });
    assert_eq!(first_byte(&storage), 7);
    // The last number there is can be read, and not be followed.
    let storage = changed(|bytes| put(bytes, HEADERS[0] + 8, &u64::MAX.to_le_bytes()));
    let disk = open(&storage).unwrap();
    disk.write_at(0, &[8; 512], Fua::No).unwrap_err();
    assert_eq!(first_byte(&storage), 7);
}

#[test]
fn versions_are_looked_at_where_they_matter() {
    let both = |bytes: &mut Vec<u8>, at: usize, value: &[u8]| {
        for header in HEADERS {
            put(bytes, header + at, value);
        }
    };
    let refused = |storage| open_as(storage, Access::ReadOnly).unwrap_err();
    let version = refused(changed(|bytes| both(bytes, 66, &[2, 0])));
    assert!(matches!(version, OpenError::Unsupported(_)), "{version}");
    // An empty log may have any version; one in use may not.
    assert_eq!(first_byte(&changed(|bytes| both(bytes, 64, &[1, 0]))), 7);
    let log_version = refused(changed(|bytes| {
        both(bytes, 64, &[1, 0]);
        both(bytes, 48, &[1; 16]);
    }));
    assert!(matches!(log_version, OpenError::Unsupported(_)));
    let no_entries = refused(changed(|bytes| both(bytes, 48, &[1; 16])));
    assert!(matches!(no_entries, OpenError::Corrupt { part: "log", .. }));
    let no_ring = refused(changed(|bytes| {
        both(bytes, 48, &[1; 16]);
        both(bytes, 68, &[0; 4]);
    }));
    assert!(matches!(no_ring, OpenError::Corrupt { part: "header", .. }));
    // No log at all is fine as long as nobody writes to one: what needs none still works.
    let storage = changed(|bytes| both(bytes, 68, &[0; 4]));
    let disk = open(&storage).unwrap();
    disk.write_at(0, &[8; 512], Fua::No).unwrap();
    disk.write_at(MIB, &[8; 512], Fua::No).unwrap_err();
    drop(disk);
    assert_eq!(first_byte(&storage), 8);
}

/// Appends an unknown region of 1 MiB, full of 0xAB, at the end of the file.
fn with_unknown_region(required: u32) -> Arc<MemoryStorage> {
    changed(|bytes| {
        let at = bytes.len() as u64;
        bytes.resize(bytes.len() + (1 << 20), 0xAB);
        for table in REGION_TABLES {
            put(bytes, table + 8, &3u32.to_le_bytes());
            let entry = table + 16 + 2 * 32;
            put(bytes, entry, &[0x5A; 16]);
            put(bytes, entry + 16, &at.to_le_bytes());
            put(bytes, entry + 24, &(1u32 << 20).to_le_bytes());
            put(bytes, entry + 28, &required.to_le_bytes());
        }
    })
}

#[test]
fn unknown_regions_are_kept_unless_they_are_required() {
    let error = open_as(with_unknown_region(1), Access::ReadOnly).unwrap_err();
    assert!(matches!(error, OpenError::Unsupported(_)), "{error}");
    let storage = with_unknown_region(0);
    let before = storage.bytes();
    let disk = open(&storage).unwrap();
    for block in 0..8 {
        disk.write_at(block * MIB, &[1; 512], Fua::No).unwrap();
    }
    disk.close().unwrap();
    let (after, at) = (storage.bytes(), before.len() - (1 << 20));
    assert!(
        after[at..at + (1 << 20)] == before[at..],
        "its bytes are its own"
    );
    for table in REGION_TABLES {
        assert!(after[table..table + 0x10000] == before[table..table + 0x10000]);
    }
}

/// Tables in any order, regions not required as QEMU writes them, the block size of one as the sector of the other.
#[test]
fn sectors_of_every_kind_are_known() {
    for (logical_sector, physical_sector) in [(512, 512), (512, 4096), (4096, 512), (4096, 4096)] {
        let storage = MemoryStorage::new(&Power::new());
        let options = CreateOptions {
            logical_sector,
            physical_sector,
            ..options(12 << 20, Kind::Dynamic)
        };
        create(storage.as_ref(), &options, ids().as_ref()).unwrap();
        let geometry = open(&storage).unwrap().geometry();
        let expected = Geometry {
            size: 12 << 20,
            logical_sector,
            physical_sector,
        };
        assert_eq!(geometry, expected);
    }
    for bad in [0u32, 256, 520, 2048, 8192] {
        for at in [16, 20] {
            let storage = changed(|bytes| put(bytes, METADATA_ITEMS + at, &bad.to_le_bytes()));
            open_as(storage, Access::ReadOnly).unwrap_err();
        }
    }
}

#[test]
fn the_largest_disk_is_read_and_written_to_its_last_sector() {
    for logical_sector in [512, 4096] {
        let storage = MemoryStorage::new(&Power::new());
        let options = CreateOptions {
            size: 64 * TIB,
            block_size: 64 << 20,
            logical_sector,
            ..options(0, Kind::Dynamic)
        };
        create(storage.as_ref(), &options, ids().as_ref()).unwrap();
        let disk = open(&storage).unwrap();
        let last = 64 * TIB - u64::from(logical_sector);
        // Both sides of a chunk's end, and the end of all.
        let chunk = u64::from(logical_sector) << 23;
        for (byte, at) in (1u8..).zip([chunk - 512, chunk, 32 * TIB, last]) {
            disk.write_at(at, &[byte; 512], Fua::No).unwrap();
        }
        disk.close().unwrap();
        let disk = open_as(Arc::clone(&storage), Access::ReadOnly).unwrap();
        for (byte, at) in (1u8..).zip([chunk - 512, chunk, 32 * TIB, last]) {
            let mut held = [0; 512];
            disk.read_at(at, &mut held).unwrap();
            assert_eq!(held, [byte; 512], "{at:#x}");
        }
        disk.read_at(64 * TIB - 100, &mut [0; 101]).unwrap_err();
        assert!(to_usize(storage.len().unwrap()) < 1 << 30);
    }
    let too_large = CreateOptions {
        size: 64 * TIB + 512,
        ..options(0, Kind::Dynamic)
    };
    let refused = create(
        MemoryStorage::new(&Power::new()).as_ref(),
        &too_large,
        ids().as_ref(),
    );
    assert!(matches!(refused, Err(CreateError::Options(_))));
}
