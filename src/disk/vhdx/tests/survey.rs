//! A check finds every fault of a file at once, each at its place, and does not change the file.

use super::*;
use crate::{
    base::units::to_usize,
    disk::{
        Fua,
        check::{Report, Severity},
        vhdx::format,
    },
    storage::memory::{MemoryStorage, Power},
};

const BAT: usize = 3 << 20;
const METADATA: usize = 2 << 20;

/// A clean image of 8 blocks of 1 MiB; blocks 0, 3 and 7 are at 4, 5 and 6 MiB.
fn image() -> Vec<u8> {
    let storage = new_image(&Power::new(), &options(8 << 20, Kind::Dynamic));
    let disk = open(&storage).unwrap();
    for block in [0u64, 3, 7] {
        disk.write_at(block << 20, &[5; 4096], Fua::No).unwrap();
    }
    disk.close().unwrap();
    storage.bytes()
}

fn checked(bytes: &[u8]) -> Report {
    let storage = MemoryStorage::with_bytes(bytes);
    let before = storage.bytes();
    let report = check(&(Arc::clone(&storage) as Arc<dyn Storage>));
    assert!(storage.bytes() == before, "a check changes nothing");
    report
}

fn entry(bytes: &mut [u8], block: usize, word: u64) {
    bytes[BAT + 8 * block..BAT + 8 * block + 8].copy_from_slice(&word.to_le_bytes());
}

#[track_caller]
fn assert_found(report: &Report, severity: Severity, offset: usize, words: &str) {
    let offset = Some(crate::base::units::to_u64(offset));
    let found = report.findings.iter().any(|finding| {
        finding.severity == severity && finding.offset == offset && finding.message.contains(words)
    });
    assert!(found, "no {severity} {words:?} at {offset:?}: {report:#?}");
}

#[test]
fn a_clean_image_has_no_findings() {
    assert_eq!(checked(&image()), Report::default());
}

#[test]
fn all_faults_of_the_table_are_listed_with_their_places() {
    let mut bytes = image();
    let at = |mib: u64| mib << 20;
    entry(&mut bytes, 0, at(4) | 6 | 0x10); // reserved bits
    entry(&mut bytes, 1, at(5) | 6); // where block 3 is
    entry(&mut bytes, 2, at(2) | 6); // over the metadata
    entry(&mut bytes, 4, at(100) | 6); // past the end
    entry(&mut bytes, 5, at(9) | 2); // ZERO with an offset
    entry(&mut bytes, 6, 5); // reserved state
    let report = checked(&bytes);
    let errors = [
        (0, "reserved bits"),
        (2, "over the metadata"),
        (4, "past the end"),
        (5, "ZERO with an offset"),
        (6, "state 5"),
    ];
    for (block, words) in errors {
        assert_found(&report, Severity::Error, BAT + 8 * block, words);
    }
    assert_found(&report, Severity::Error, BAT + 8 * 3, "lie over block 1");
    assert_eq!(report.errors, 6, "{report:#?}");
    entry(&mut bytes, 3, at(0) | 6);
    entry(&mut bytes, 1, at(1) | 6);
    entry(&mut bytes, 7, at(6) | 7);
    let report = checked(&bytes);
    assert_found(&report, Severity::Error, BAT + 8, "over the log");
    assert_found(&report, Severity::Error, BAT + 8 * 3, "over the headers");
    assert_found(&report, Severity::Error, BAT + 8 * 7, "without parent");
}

#[test]
fn one_torn_copy_is_a_warning_and_two_are_errors() {
    let copies: [(&str, [u64; 2]); 2] = [
        ("header", format::HEADER_OFFSETS),
        ("region table", format::REGION_TABLE_OFFSETS),
    ];
    for (part, offsets) in copies {
        let [first, second] = offsets.map(to_usize);
        let mut bytes = image();
        bytes[first + 20] ^= 1;
        let report = checked(&bytes);
        assert!(report.is_sound(), "{report:#?}");
        assert_found(&report, Severity::Warning, first, "checksum");
        bytes[second] = b'x';
        let report = checked(&bytes);
        assert_found(&report, Severity::Error, first, "checksum");
        assert_found(&report, Severity::Error, second, "no signature");
        let mut errors = report
            .findings
            .iter()
            .filter(|finding| finding.severity == Severity::Error);
        assert!(errors.all(|finding| finding.part == part), "{report:#?}");
    }
}

#[test]
fn a_check_goes_on_behind_bad_metadata() {
    let mut bytes = image();
    bytes[METADATA + 32 + 24] |= 8; // a reserved flag of the first item
    bytes[METADATA + 64 + 16] = 1; // the second item reaches over the table
    bytes[METADATA + 64 + 18] = 0;
    entry(&mut bytes, 0, (4 << 20) | 6 | 0x10);
    let report = checked(&bytes);
    assert_found(&report, Severity::Error, METADATA, "reserved flags");
    assert_found(
        &report,
        Severity::Error,
        METADATA,
        "cannot be 8 bytes at 0x1",
    );
}

#[test]
fn logs_and_unused_space_are_told() {
    let storage = new_image(&Power::new(), &options(8 << 20, Kind::Dynamic));
    let disk = open(&storage).unwrap();
    disk.write_at(0, &[5; 4096], Fua::No).unwrap();
    drop(disk);
    let mut bytes = storage.bytes();
    let report = checked(&bytes);
    assert!(report.is_sound(), "{report:#?}");
    assert_found(&report, Severity::Warning, 1 << 20, "replays 2 entries");
    // The head is the second entry: torn, it was never written; the first one stays.
    bytes[(1 << 20) + 4096 + 5000] ^= 1;
    let report = checked(&bytes);
    assert!(report.is_sound(), "{report:#?}");
    assert_found(&report, Severity::Warning, (1 << 20) + 4096, "torn");
    bytes[(1 << 20) + 100] ^= 1;
    let report = checked(&bytes);
    assert_found(&report, Severity::Error, 1 << 20, "no valid sequence");

    let mut bytes = image();
    entry(&mut bytes, 3, 0);
    bytes.resize(10 << 20, 0);
    let report = checked(&bytes);
    assert_eq!(report.errors, 0);
    assert_found(&report, Severity::Warning, 5 << 20, "1048576 bytes between");
    assert_found(
        &report,
        Severity::Warning,
        7 << 20,
        "the last 3145728 bytes",
    );
}
