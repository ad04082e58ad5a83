//! Bytes that nobody meant to be an image: errors, never a panic, and no memory for what is not there. Footers that were
//! lost, torn or are a byte short.

use proptest::prelude::*;

use super::*;
use crate::{
    base::units::to_usize,
    disk::Fua,
    disk::vhd::format::{self, FOOTER_BYTES, HEADER_BYTES},
};

/// An image that was not closed: its end is far behind its last block.
fn bytes_of(kind: Kind) -> Vec<u8> {
    let storage = image(&Power::new(), &options(8 * BLOCK, kind));
    let disk = open(&storage).unwrap();
    for block in [0, 3, 7] {
        disk.write_at(block * BLOCK, &[5; 4096], Fua::No).unwrap();
    }
    disk.close().unwrap();
    storage.bytes()
}

/// Opens for reading and for writing; what opens must also read, write, change its size and close without a panic.
fn use_it(bytes: &[u8]) {
    for access in [Access::ReadOnly, Access::ReadWrite] {
        let storage = MemoryStorage::with_bytes(bytes);
        let shared: Arc<dyn Storage> = Arc::clone(&storage) as _;
        let _ = inspect(&shared);
        let report = check(&shared);
        let Ok(disk) = open_as(storage, access) else {
            assert!(!report.is_sound(), "what does not open is not sound");
            continue;
        };
        let mut buf = vec![0; 8192];
        let size = disk.geometry().size;
        for at in [0, 3 * BLOCK, size.saturating_sub(8192)] {
            let _ = disk.read_at(at, &mut buf);
            let _ = disk.run_at(at);
            let _ = disk.write_at(at, &buf, Fua::No);
        }
        let _ = disk.flush();
        let _ = disk.close();
    }
    let _ = resize(MemoryStorage::with_bytes(bytes).as_ref(), 100 * BLOCK);
}

/// Puts right checksums on footers and header, so that changes reach the checks behind them.
fn reseal(bytes: &mut [u8]) {
    let len = bytes.len();
    for (at, size, checksum_at) in [
        (0, FOOTER_BYTES, 64),
        (512, HEADER_BYTES, 36),
        (len.saturating_sub(FOOTER_BYTES), FOOTER_BYTES, 64),
    ] {
        let signed = |mark: &[u8]| bytes[at..].starts_with(mark);
        if at + size <= len && (signed(b"conectix") || signed(b"cxsparse")) {
            format::seal(&mut bytes[at..at + size], checksum_at);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, ..ProptestConfig::default() })]

    #[test]
    fn random_bytes_are_refused(mut bytes in prop::collection::vec(any::<u8>(), 0..4096)) {
        use_it(&bytes);
        let signed = bytes.len().min(8);
        bytes[..signed].copy_from_slice(&b"conectix"[..signed]);
        use_it(&bytes);
        reseal(&mut bytes);
        use_it(&bytes);
    }

    #[test]
    fn changed_images_do_no_harm(
        fixed in any::<bool>(),
        // Footer, header and table, at the start or, counted backwards, at the end.
        changes in prop::collection::vec((0..1600usize, any::<bool>(), any::<u8>()), 1..6),
        cut in prop::option::of(0..2_000_000usize),
    ) {
        static IMAGES: std::sync::LazyLock<[Vec<u8>; 2]> =
            std::sync::LazyLock::new(|| [Kind::Dynamic, Kind::Fixed].map(bytes_of));
        let mut bytes = IMAGES[usize::from(fixed)].clone();
        let len = bytes.len();
        for (at, backwards, byte) in changes {
            bytes[if backwards { len - 1 - at % 512 } else { at }] = byte;
        }
        reseal(&mut bytes);
        if let Some(cut) = cut {
            bytes.truncate(cut);
        }
        use_it(&bytes);
    }
}

fn refused(kind: Kind, change: impl FnOnce(&mut Vec<u8>)) -> OpenError {
    let mut bytes = bytes_of(kind);
    change(&mut bytes);
    reseal(&mut bytes);
    let opened = open_as(MemoryStorage::with_bytes(&bytes), Access::ReadOnly);
    opened.expect_err("it must be refused")
}

#[test]
fn tables_that_point_elsewhere_are_refused() {
    let mut blocks = [0; 4];
    blocks.copy_from_slice(&bytes_of(Kind::Dynamic)[1536..1540]);
    let first = u32::from_be_bytes(blocks);
    for (name, sector) in [
        ("over the footer", 0),
        ("over the header", 2),
        ("over the table", 3),
        ("over another block", first),
        ("just over another block", first + 1024),
        ("past the end", first + 3000),
        ("far past the end", 0xFFFF_FFFE),
    ] {
        let error = refused(Kind::Dynamic, |bytes| {
            // Block 1 is absent.
            bytes[1540..1544].copy_from_slice(&sector.to_be_bytes());
        });
        assert!(
            matches!(error, OpenError::Corrupt { part: "BAT", .. }),
            "{name}: {error}"
        );
    }
}

#[test]
fn fields_are_checked_before_use() {
    let both_footers = |at: usize, value: &'static [u8]| {
        move |bytes: &mut Vec<u8>| {
            let tail = bytes.len() - 512;
            for footer in [0, tail] {
                bytes[footer + at..footer + at + value.len()].copy_from_slice(value);
            }
        }
    };
    let header = |at: usize, value: &'static [u8]| {
        move |bytes: &mut Vec<u8>| bytes[512 + at..512 + at + value.len()].copy_from_slice(value)
    };
    let corrupt = |error: OpenError, wanted: &str| match error {
        OpenError::Corrupt { part, .. } => assert_eq!(part, wanted, "{error}"),
        other => panic!("{other}"),
    };
    let dynamic = |change: &dyn Fn(&mut Vec<u8>)| refused(Kind::Dynamic, |bytes| change(bytes));
    // Size: none, odd, too large, more than the file or the table has room for.
    corrupt(dynamic(&both_footers(48, &[0; 8])), "footer");
    corrupt(dynamic(&both_footers(55, &[1])), "footer");
    corrupt(dynamic(&both_footers(48, &[0, 0, 4])), "footer");
    corrupt(dynamic(&both_footers(50, &[1])), "header");
    corrupt(
        refused(Kind::Fixed, |bytes| {
            let tail = bytes.len() - 512;
            bytes[tail + 50] = 1;
        }),
        "footer",
    );
    // The header's place.
    corrupt(dynamic(&both_footers(16, &[0xFF; 8])), "header");
    corrupt(dynamic(&both_footers(16, &[0; 8])), "header");
    // Version, block size (none, odd, small, large), entries, table.
    corrupt(dynamic(&header(24, &[0, 2])), "header");
    for size in [
        &[0, 0, 0, 0],
        &[0, 8, 0, 1],
        &[0, 4, 0, 0],
        &[0x20, 0, 0, 0],
    ] {
        corrupt(dynamic(&header(32, size)), "header");
    }
    corrupt(dynamic(&header(28, &[0, 0, 0, 7])), "header");
    corrupt(dynamic(&header(28, &[0xFF; 4])), "header");
    corrupt(dynamic(&header(23, &[1])), "header");
    corrupt(dynamic(&header(16, &[0x7F])), "header");
    corrupt(dynamic(&header(16, &[0; 8])), "header");
    // Kinds and versions that nobody knows.
    for change in [
        both_footers(60, &[0, 0, 0, 6]),
        both_footers(12, &[0, 2, 0, 0]),
    ] {
        assert!(matches!(dynamic(&change), OpenError::Unsupported(_)));
    }
}

type Break<'a> = (&'a str, &'a dyn Fn(&mut Vec<u8>));

/// What remains readable when footers are lost, and what writing then puts right.
#[test]
fn one_good_footer_is_enough_for_a_dynamic_disk() {
    let good = bytes_of(Kind::Dynamic);
    let tail = good.len() - 512;
    let breaks: [Break<'_>; 7] = [
        ("tail missing", &|bytes| bytes.truncate(tail)),
        ("tail cut", &|bytes| bytes.truncate(tail + 100)),
        ("tail torn", &|bytes| bytes[tail + 256..].fill(0xEE)),
        ("tail zero", &|bytes| bytes[tail..].fill(0)),
        ("head zero", &|bytes| bytes[..512].fill(0)),
        ("head torn", &|bytes| bytes[300] = 1),
        ("head differs", &|bytes| {
            bytes[27] ^= 1;
            reseal(bytes);
        }),
    ];
    for (name, change) in breaks {
        let mut bytes = good.clone();
        change(&mut bytes);
        let storage = MemoryStorage::with_bytes(&bytes);
        let shared: Arc<dyn Storage> = Arc::clone(&storage) as _;
        let report = check(&shared);
        assert!(report.is_sound() && report.warnings > 0, "{name}");
        let mut held = [0; 512];
        let disk = open_as(Arc::clone(&storage), Access::ReadOnly).unwrap();
        disk.read_at(3 * BLOCK, &mut held).unwrap();
        assert_eq!(held, [5; 512], "{name}");
        assert!(storage.bytes() == bytes, "{name}: reading changes nothing");
        open(&storage).unwrap();
        assert!(storage.bytes() == good, "{name}: put right");
    }
    let mut neither = good.clone();
    neither[..512].fill(0);
    neither.truncate(tail);
    assert!(matches!(
        open(&MemoryStorage::with_bytes(&neither)),
        Err(OpenError::NotVhd)
    ));
}

/// Old versions of Virtual PC left the last byte out.
#[test]
fn footers_of_511_bytes_are_read() {
    for kind in [Kind::Dynamic, Kind::Fixed] {
        let mut bytes = bytes_of(kind);
        bytes.pop();
        let storage = MemoryStorage::with_bytes(&bytes);
        let before = read_all(&open_as(Arc::clone(&storage), Access::ReadOnly).unwrap());
        let disk = open(&storage).unwrap();
        disk.write_at(BLOCK, &[9; 512], Fua::No).unwrap();
        disk.close().unwrap();
        let after = read_all(&open(&storage).unwrap());
        let at = to_usize(BLOCK);
        assert_eq!(after[at..at + 512], [9; 512]);
        assert!(after[..at] == before[..at] && after[at + 512..] == before[at + 512..]);
    }
}

/// Tools that change an identity and no checksum are put up with, for reading; a torn footer is not like that.
#[test]
fn equal_footers_with_a_wrong_checksum_are_read_and_not_written_to() {
    let mut bytes = bytes_of(Kind::Dynamic);
    let tail = bytes.len() - 512;
    bytes[70] ^= 1;
    bytes[tail + 70] ^= 1;
    let storage = MemoryStorage::with_bytes(&bytes);
    open_as(Arc::clone(&storage), Access::ReadOnly).unwrap();
    let shared: Arc<dyn Storage> = Arc::clone(&storage) as _;
    assert!(!check(&shared).is_sound());
    let error = open(&storage).unwrap_err().to_string();
    assert!(error.contains("checksum is wrong"), "{error}");
    assert!(matches!(
        resize(storage.as_ref(), 100 * BLOCK),
        Err(ResizeError::Open(OpenError::Corrupt { .. }))
    ));
    // Not a change that makes the sum right again.
    bytes[tail + 71] ^= 4;
    let storage = MemoryStorage::with_bytes(&bytes);
    assert!(open_as(storage, Access::ReadOnly).is_err());
    let mut fixed = bytes_of(Kind::Fixed);
    let tail = fixed.len() - 512;
    fixed[tail + 70] ^= 1;
    let storage = MemoryStorage::with_bytes(&fixed);
    assert!(open_as(storage, Access::ReadOnly).is_err());
}

/// Virtual PC showed its guests what the geometry covers, everybody else the current size.
#[test]
fn the_size_is_by_geometry_for_virtual_pc_alone() {
    let with = |creator: &[u8; 4], geometry: [u8; 4]| {
        let mut bytes = bytes_of(Kind::Dynamic);
        let tail = bytes.len() - 512;
        for footer in [0, tail] {
            bytes[footer + 28..footer + 32].copy_from_slice(creator);
            bytes[footer + 56..footer + 60].copy_from_slice(&geometry);
        }
        reseal(&mut bytes);
        let disk = open_as(MemoryStorage::with_bytes(&bytes), Access::ReadOnly).unwrap();
        disk.geometry().size
    };
    let size = 8 * BLOCK;
    let covered = 120 * 4 * 17 * 512;
    assert!(covered < size);
    assert_eq!(with(b"vpc ", [0, 120, 4, 17]), covered);
    assert_eq!(with(b"win ", [0, 120, 4, 17]), size);
    assert_eq!(with(b"qem2", [0, 120, 4, 17]), size);
    assert_eq!(with(b"vpc ", [0xFF, 0xFF, 16, 255]), size, "no geometry");
    assert_eq!(with(b"vpc ", [0, 0, 4, 17]), size, "no geometry either");
    assert_eq!(with(b"vpc ", [1, 120, 4, 17]), size, "more than there is");
}
