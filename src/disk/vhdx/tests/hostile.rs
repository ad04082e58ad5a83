//! Bytes that nobody meant to be an image: errors, never a panic, and no memory for what is not there.

use proptest::prelude::*;

use super::*;
use crate::{
    base::units::to_usize,
    disk::{
        Fua,
        parents::NoParents,
        vhdx::{format, header},
    },
    storage::memory::{MemoryStorage, Power},
};

/// A dirty image: its log holds entries.
fn dirty_image() -> Vec<u8> {
    let storage = new_image(&Power::new(), &options(8 << 20, Kind::Dynamic));
    let disk = open(&storage).unwrap();
    for block in [0u64, 3, 7] {
        disk.write_at(block << 20, &[5; 4096], Fua::No).unwrap();
    }
    drop(disk);
    storage.bytes()
}

fn none() -> Arc<dyn Parents> {
    Arc::new(NoParents)
}

/// Opens for reading and for writing; what opens must also read, write and close without a panic.
pub(super) fn use_it(bytes: &[u8], parents: &Arc<dyn Parents>) {
    for access in [Access::ReadOnly, Access::ReadWrite] {
        let storage = MemoryStorage::with_bytes(bytes);
        let subject = Subject {
            storage,
            parents: Arc::clone(parents),
        };
        let Ok(disk) = subject.open_as(access) else {
            continue;
        };
        let mut buf = vec![0; 8192];
        let size = disk.geometry().size;
        for at in [0, 3 << 20, size.saturating_sub(8192)] {
            let _ = disk.read_at(at, &mut buf);
            let _ = disk.run_at(at);
            let _ = disk.write_at(at, &buf, Fua::No);
        }
        let _ = disk.flush();
        let _ = disk.close();
    }
}

/// A check finds errors in what does not open, and in what opens only those that Hyper-V refuses and we do not.
fn agree(bytes: &[u8]) {
    let storage: Arc<dyn Storage> = MemoryStorage::with_bytes(bytes);
    let report = check(&storage);
    let opened = VhdxDisk::open(storage, &Opening::new(Access::ReadOnly, ids()));
    let mut errors = report
        .findings
        .iter()
        .filter(|finding| finding.severity == crate::disk::check::Severity::Error);
    match opened {
        Ok(_) => assert!(
            errors.all(|finding| finding.message.contains("Hyper-V")),
            "it opens: {report:#?}"
        ),
        // Its parent is not here, and the file is not to blame for that.
        Err(OpenError::NoParent { .. }) => {}
        Err(error) => assert!(!report.is_sound(), "{error}: {report:#?}"),
    }
}

/// Puts right checksums on headers and region tables, so that changes reach the checks behind them.
pub(super) fn reseal(bytes: &mut [u8]) {
    let headers = format::HEADER_OFFSETS.map(|at| (at, format::HEADER_BYTES));
    let tables = format::REGION_TABLE_OFFSETS.map(|at| (at, format::REGION_TABLE_BYTES));
    for (at, len) in headers.into_iter().chain(tables) {
        let at = to_usize(at);
        if bytes.len() >= at + len {
            format::seal(&mut bytes[at..at + len]);
        }
    }
    let log = 1 << 20;
    if bytes.len() >= log + (1 << 20) {
        for entry in (log..log + (1 << 20)).step_by(4096) {
            let len: [u8; 4] = bytes[entry + 8..entry + 12].try_into().unwrap();
            let len = to_usize(u64::from(u32::from_le_bytes(len)));
            if bytes[entry..].starts_with(b"loge")
                && (64..1 << 20).contains(&len)
                && bytes.len() >= entry + len
            {
                format::seal(&mut bytes[entry..entry + len]);
            }
        }
    }
}

/// Places where a structure has fields.
pub(super) fn place() -> impl Strategy<Value = usize> {
    prop_oneof![
        0..16usize,
        0x10000..0x10050usize,
        0x20000..0x20050usize,
        0x30000..0x30060usize,
        0x40000..0x40060usize,
        0x10_0000..0x10_8000usize,
        0x20_0000..0x20_00D0usize,
        0x21_0000..0x21_0030usize,
        0x30_0000..0x30_0060usize,
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, ..ProptestConfig::default() })]

    #[test]
    fn random_bytes_are_refused(mut bytes in prop::collection::vec(any::<u8>(), 0..4096)) {
        agree(&bytes);
        use_it(&bytes, &none());
        let signed = bytes.len().min(8);
        bytes[..signed].copy_from_slice(&b"vhdxfile"[..signed]);
        use_it(&bytes, &none());
    }

    #[test]
    fn changed_images_do_no_harm(
        changes in prop::collection::vec((place(), any::<u8>()), 1..6),
        cut in prop::option::of(0..9usize << 20),
    ) {
        static IMAGE: std::sync::LazyLock<Vec<u8>> = std::sync::LazyLock::new(dirty_image);
        let mut bytes = IMAGE.clone();
        for (at, byte) in changes {
            bytes[at] = byte;
        }
        reseal(&mut bytes);
        if let Some(cut) = cut {
            bytes.truncate(cut);
        }
        agree(&bytes);
        use_it(&bytes, &none());
    }
}

fn refused(change: impl FnOnce(&mut Vec<u8>)) -> OpenError {
    let storage = new_image(&Power::new(), &options(8 << 20, Kind::Fixed));
    let mut bytes = storage.bytes();
    change(&mut bytes);
    reseal(&mut bytes);
    let opened = open_as(MemoryStorage::with_bytes(&bytes), Access::ReadOnly);
    opened.expect_err("it must be refused")
}

#[test]
fn tables_that_point_elsewhere_are_refused() {
    let entry = |at: u64, value: u64| {
        let at = to_usize(0x30_0000 + at * 8);
        move |bytes: &mut Vec<u8>| bytes[at..at + 8].copy_from_slice(&value.to_le_bytes())
    };
    for (name, value) in [
        ("reserved bits", (5 << 20) | 8 | 6),
        ("reserved state", 4),
        ("unmapped in the draft of the format", 5),
        ("partly present", (5 << 20) | 7),
        ("over the headers", 6),
        ("over the log", (1 << 20) | 6),
        ("over the metadata", (2 << 20) | 6),
        ("over another block", (5 << 20) | 6),
        ("past the end", (12 << 20) | 6),
        ("far past the end", !0xFFFFF | 6),
    ] {
        let error = refused(entry(0, value));
        assert!(
            matches!(error, OpenError::Corrupt { part: "BAT", .. }),
            "{name}: {error}"
        );
    }
}

#[test]
fn either_header_and_either_region_table_will_do() {
    for broken in [0x10000, 0x20000, 0x30000, 0x40000] {
        let mut bytes = dirty_image();
        bytes[broken + 20] ^= 1;
        // Both headers name the log: the older one is one step behind, not one session.
        let storage = MemoryStorage::with_bytes(&bytes);
        let disk = open(&storage).unwrap();
        let mut held = [0; 512];
        disk.read_at(3 << 20, &mut held).unwrap();
        assert_eq!(held, [5; 512]);
        disk.write_at(0, &[1; 512], Fua::No).unwrap();
        disk.close().unwrap();
        let bytes = storage.bytes();
        for at in [0x10000, 0x20000] {
            let copy = bytes[at..at + 4096].try_into().unwrap();
            assert!(
                header::decode(copy).is_some(),
                "both headers are good again"
            );
        }
        assert!(
            bytes[0x30000..0x40000] == bytes[0x40000..0x50000],
            "and both region tables"
        );
    }
    let neither = refused(|bytes| {
        bytes[0x10000..0x10004].fill(0);
        bytes[0x20000..0x20004].fill(0);
    });
    assert!(matches!(neither, OpenError::Corrupt { part: "header", .. }));
}
