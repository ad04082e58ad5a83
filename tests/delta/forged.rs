//! Headers and frame headers with right checksums and one wrong field: each rule of the format is kept to the bit.

use understudy::{
    base::{
        checksum::crc32c,
        limits::{DISK_BYTES_MAX, FRAME_BYTES_MAX},
    },
    delta::layout::FrameHeader,
};

use super::*;

/// `bytes`, which end with their checksum, with others at `at` and the checksum made right.
fn forged(mut bytes: Vec<u8>, at: usize, others: &[u8]) -> Vec<u8> {
    bytes[at..at + others.len()].copy_from_slice(others);
    let body = bytes.len() - 4;
    let crc = crc32c(&bytes[..body]);
    bytes[body..].copy_from_slice(&crc.to_le_bytes());
    bytes
}

/// What is wrong with a header, or nothing.
fn wrong(bytes: &[u8]) -> String {
    match Header::parse(bytes) {
        Ok(_) => String::new(),
        Err(DecodeError::Invalid { reason, .. }) => reason.to_owned(),
        Err(other) => panic!("{other:?}"),
    }
}

#[test]
fn each_field_of_a_header_is_checked() {
    const RESERVED: &str = "a reserved byte is set";
    let delta = header(LogKind::Delta).to_bytes();
    let initial = header(LogKind::Initial).to_bytes();
    assert_eq!(wrong(&delta), "");
    assert_eq!(wrong(&initial), "");
    assert_eq!(wrong(&header(FOLDED).to_bytes()), "");
    let parentless = "an initial copy has no parent and every other log has one";
    for (bytes, at, others, reason) in [
        (&delta, 10, [3].as_slice(), "its kind is unknown"),
        (&delta, 10, &[0], parentless),
        (&initial, 10, &[1], parentless),
        (&delta, 11, &[2], "it has unknown flags"),
        (&delta, 11, &[0], RESERVED),
        (&initial, 56, &[1], RESERVED),
        (&initial, 95, &[1], RESERVED),
        (&initial, 98, &[1], RESERVED),
        (&delta, 103, &[1], RESERVED),
        (&delta, 96, &[0, 0], "a machine has 1 to 256 disks"),
        (&delta, 96, &[1, 1], "a machine has 1 to 256 disks"),
        (&delta, 96, &[3, 0], "it is too short"),
        (&delta, 96, &[1, 0], "its length does not match its content"),
        (&delta, 121, b"/", "a name is not valid"),
        (&delta, 121, &[0xff], "a name is not valid"),
    ] {
        assert_eq!(wrong(&forged(bytes.clone(), at, others)), reason, "{at}");
    }
}

#[test]
fn each_field_of_a_disk_is_checked() {
    let wrong_with = |change: &dyn Fn(&mut DiskEntry)| {
        let mut header = header(LogKind::Delta);
        change(&mut header.disks[1]);
        wrong(&header.to_bytes())
    };
    let name = wrong_with(&|disk| disk.name = Name::new("system").unwrap());
    assert_eq!(name, "a name is there twice");
    for (logical, physical, right) in [
        (512, 512, true),
        (512, 4096, true),
        (4096, 4096, true),
        (512, 1024, false),
        (1024, 4096, false),
    ] {
        let found = wrong_with(&|disk| {
            disk.size = DISK_BYTES;
            (disk.logical_sector, disk.physical_sector) = (logical, physical);
        });
        assert_eq!(found.is_empty(), right, "{logical} {physical}: {found}");
    }
    for (size, right) in [
        (512, true),
        (DISK_BYTES_MAX, true),
        (0, false),
        (DISK_BYTES_MAX + 512, false),
        (1000, false),
    ] {
        let found = wrong_with(&|disk| disk.size = size);
        assert_eq!(found.is_empty(), right, "{size}: {found}");
    }
}

#[test]
fn each_field_of_a_frame_is_checked() {
    let mut disks = header(LogKind::Delta).disks;
    disks[0].size = 2 * FRAME_BYTES_MAX;
    let parse = |frame: FrameHeader| FrameHeader::parse(&frame.to_bytes(), &disks, 0);
    let short = |len: u64| u32::try_from(len).unwrap();
    let data = |disk, offset, len, codec, payload_len| FrameHeader {
        kind: FrameKind::Data,
        codec,
        disk: DiskIndex(disk),
        run: Extent::new(offset, len),
        payload_len,
        crc: 7,
    };
    let zero = FrameHeader {
        kind: FrameKind::Zero,
        crc: 0,
        ..data(0, 0, 2 * FRAME_BYTES_MAX, Codec::None, 0)
    };
    let longest = short(FRAME_BYTES_MAX);
    for frame in [
        data(0, 4096, 8192, Codec::None, 8192),
        data(0, 4096, 8192, Codec::Lz4, 8191),
        data(0, 4096, 8192, Codec::Zstd, 1),
        data(0, 4096, FRAME_BYTES_MAX, Codec::None, longest),
        data(1, 65536, 512, Codec::None, 512),
        zero,
    ] {
        assert_eq!(parse(frame).unwrap(), frame);
    }
    for frame in [
        data(2, 0, 4096, Codec::None, 4096),
        data(0, 0, 0, Codec::None, 0),
        data(0, 2 * FRAME_BYTES_MAX, 4096, Codec::None, 4096),
        data(0, 2 * FRAME_BYTES_MAX - 4096, 8192, Codec::None, 8192),
        data(0, 512, 3584, Codec::None, 3584),
        data(0, 0, 512, Codec::None, 512),
        data(1, 65536 - 512, 1024, Codec::None, 1024),
        data(0, 0, FRAME_BYTES_MAX + 4096, Codec::None, longest + 4096),
        data(0, 0, 8192, Codec::None, 8191),
        data(0, 0, 8192, Codec::None, 8193),
        data(0, 0, 8192, Codec::Lz4, 8192),
        data(0, 0, 8192, Codec::Zstd, 8193),
        FrameHeader {
            payload_len: 1,
            ..zero
        },
        FrameHeader { crc: 1, ..zero },
        FrameHeader {
            codec: Codec::Lz4,
            ..zero
        },
    ] {
        assert!(parse(frame).is_err(), "{frame:?}");
    }
    let whole = data(0, 4096, 8192, Codec::None, 8192).to_bytes().to_vec();
    for (at, byte) in [(0, 0), (0, 3), (0, 4), (1, 3)] {
        let bytes = forged(whole.clone(), at, &[byte]).try_into().unwrap();
        assert!(FrameHeader::parse(&bytes, &disks, 0).is_err(), "{at}");
    }
}
