//! The delta log: golden bytes, round trips, and what happens to bytes that nobody should trust.
//!
//! The golden files are compatibility-sensitive: hosts of different versions exchange these bytes and keep them on
//! disk. If one of these tests fails, the format changed; make a new version instead of new golden files.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on stops")]

mod forged;

use std::{fs, path::PathBuf};

use proptest::prelude::*;
use understudy::{
    base::{
        checksum::Digest,
        clock::Timestamp,
        ids::{Generation, Lineage, MachineId, Name},
        limits::{DISKS_PER_MACHINE_MAX, NAME_BYTES_MAX},
        units::{DiskIndex, Epoch, Extent, to_u64, to_usize},
    },
    delta::{
        Codec, DecodeError, Decoder, DiskEntry, EncodedFrame, Encoder, Event, FrameKind, Header,
        LogKind, encode_data, encode_zero,
        layout::{FRAME_HEADER_BYTES, HEADER_BYTES_MAX, PREAMBLE_BYTES},
        trailer::{FOOT_BYTES, Foot},
    },
};
use uuid::Uuid;

const DISK_BYTES: u64 = 1 << 20;
/// The second disk does not end with a whole block.
const ODD_DISK_BYTES: u64 = 64 * 1024 + 512;
/// Logs folded into one, to epoch 42.
const FOLDED: LogKind = LogKind::Folded(Lineage {
    epoch: Epoch(42),
    chain: Digest([0x5A; 32]),
});

fn header(kind: LogKind) -> Header {
    let disk = |name, size| DiskEntry {
        name: Name::new(name).unwrap(),
        size,
        logical_sector: 512,
        physical_sector: 4096,
    };
    Header {
        machine: MachineId(Uuid::from_u128(0x0011_2233_4455_6677_8899_aabb_ccdd_eeff)),
        generation: Generation {
            number: 3,
            id: Uuid::from_u128(0x1234),
        },
        kind,
        parent: (kind != LogKind::Initial).then_some(Lineage {
            epoch: Epoch(41),
            chain: Digest([0xA5; 32]),
        }),
        disks: vec![disk("system", DISK_BYTES), disk("größe", ODD_DISK_BYTES)],
    }
}

fn log(header: &Header, frames: &[EncodedFrame], epoch: u64) -> (Vec<u8>, Lineage) {
    let (mut encoder, first) = Encoder::new(header);
    let mut bytes = first.to_vec();
    for frame in frames {
        encoder.frame(frame);
        frame
            .parts()
            .iter()
            .for_each(|part| bytes.extend_from_slice(part));
    }
    let (last, lineage) = encoder.finish(Epoch(epoch), Timestamp(1_700_000_000_000_000));
    bytes.extend_from_slice(&last);
    (bytes, lineage)
}

/// All events of a log that arrives in pieces of `step` bytes.
fn decode(bytes: &[u8], step: usize) -> Result<Vec<Event>, DecodeError> {
    let mut decoder = Decoder::new();
    let mut events = Vec::new();
    for piece in bytes.chunks(step) {
        decoder.feed(piece);
        while let Some(event) = decoder.next()? {
            events.push(event);
        }
    }
    assert_eq!(
        decoder.is_complete(),
        matches!(events.last(), Some(Event::Trailer(_)))
    );
    Ok(events)
}

fn pattern(len: usize, seed: u8) -> Vec<u8> {
    (0..len)
        .map(|n| u8::try_from(n / 7 % 251).unwrap() ^ seed)
        .collect()
}

fn frames(codec: Codec) -> Vec<EncodedFrame> {
    vec![
        encode_data(DiskIndex(0), 8192, pattern(8192, 1), codec),
        encode_zero(DiskIndex(0), Extent::new(4096, DISK_BYTES - 4096)),
        encode_data(DiskIndex(1), 65536, pattern(512, 2), codec),
        encode_data(DiskIndex(0), 8192, pattern(4096, 3), codec),
    ]
}

fn golden(name: &str) -> Vec<u8> {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("tests/golden")
        .join(name);
    fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

#[test]
fn the_bytes_of_version_1_stay_what_they_are() {
    let (delta, lineage) = log(&header(LogKind::Delta), &frames(Codec::None), 42);
    assert!(delta == golden("delta-v1.hrl"), "see the head of this file");
    assert_eq!(
        lineage.chain.to_string(),
        "b5406261a442189ec727080d4c762b323c6d83e30c0e22680879d12f77f0779a"
    );
    let (initial, lineage) = log(&header(LogKind::Initial), &frames(Codec::None), 0);
    assert!(
        initial == golden("initial-v1.hrl"),
        "see the head of this file"
    );
    assert_eq!(
        lineage.chain.to_string(),
        "0f1570920a259b92acbdeac260ce58ad7251ec3909b32d8fca37c9c5c77cee5f"
    );
}

#[test]
fn the_bytes_of_a_folded_log_stay_what_they_are() {
    let (folded, lineage) = log(&header(FOLDED), &frames(Codec::None), 42);
    assert!(
        folded == golden("folded-v1.hrl"),
        "see the head of this file"
    );
    assert_eq!(
        LogKind::Folded(lineage),
        FOLDED,
        "the point is the one named"
    );
    let events = decode(&folded, 33).unwrap();
    assert_eq!(events[0], Event::Header(header(FOLDED)));
    let Some(Event::Trailer(trailer)) = events.last() else {
        panic!("no trailer");
    };
    assert_eq!(trailer.lineage, lineage);
    let foot_at = folded.len() - FOOT_BYTES;
    let foot = Foot::parse(folded[foot_at..].try_into().unwrap(), to_u64(foot_at)).unwrap();
    assert_ne!(foot.chain, lineage.chain, "the hash is that of these bytes");
}

/// Whoever changes the named point, or anything else, would have to change the hash in the foot as well.
#[test]
fn the_hash_of_a_folded_log_covers_the_point_it_names() {
    let (one, point) = log(&header(FOLDED), &[], 42);
    let other = Lineage {
        chain: Digest([0x5B; 32]),
        ..point
    };
    let (two, _) = log(&header(LogKind::Folded(other)), &[], 42);
    let header_len = one.len() - FRAME_HEADER_BYTES - FOOT_BYTES;
    let mixed = [&two[..header_len], &one[header_len..]].concat();
    assert!(matches!(decode(&mixed, 64), Err(DecodeError::Chain { .. })));
}

/// Compressors may pack differently in another version; what they packed once must stay readable.
#[test]
fn packed_logs_of_version_1_stay_readable() {
    for (name, codec) in [
        ("delta-v1-lz4.hrl", Codec::Lz4),
        ("delta-v1-zstd.hrl", Codec::Zstd),
    ] {
        let bytes = golden(name);
        let events = decode(&bytes, bytes.len()).unwrap();
        let plain = decode(&golden("delta-v1.hrl"), 100).unwrap();
        let content = |events: &[Event]| -> Vec<_> {
            let frames = events.iter().filter_map(|event| match event {
                Event::Frame { header, raw, .. } => Some((header.run, raw.clone())),
                _ => None,
            });
            frames.collect()
        };
        assert_eq!(content(&events), content(&plain));
        let packed =
            |event: &&Event| matches!(event, Event::Frame { header, .. } if header.codec == codec);
        assert_eq!(events.iter().filter(packed).count(), 3, "{name}");
    }
}

#[test]
fn a_log_may_arrive_in_pieces_of_any_size() {
    for codec in Codec::ALL {
        let header = header(LogKind::Delta);
        let (bytes, lineage) = log(&header, &frames(codec), 42);
        let whole = decode(&bytes, bytes.len()).unwrap();
        assert_eq!(whole.len(), 6);
        assert_eq!(whole[0], Event::Header(header));
        let Event::Frame { header, at, raw } = &whole[2] else {
            panic!("{:?}", whole[2]);
        };
        assert_eq!((header.kind, raw), (FrameKind::Zero, &None));
        assert!(*at > 8192 || codec != Codec::None);
        let Event::Trailer(trailer) = &whole[5] else {
            panic!("{:?}", whole[5]);
        };
        assert_eq!((trailer.lineage, trailer.frames), (lineage, 4));
        for step in [1, 2, 3, 31, 32, 33, 71, 72, 73, 1000, 4096] {
            assert_eq!(decode(&bytes, step).unwrap(), whole, "{step}");
        }
        for cut in 1..bytes.len() {
            let mut decoder = Decoder::new();
            decoder.feed(&bytes[..cut]);
            let mut count = 0;
            while decoder.next().unwrap().is_some() {
                count += 1;
            }
            assert!(count < 6, "a log cut at {cut} is not whole");
            decoder.feed(&bytes[cut..]);
            while decoder.next().unwrap().is_some() {
                count += 1;
            }
            assert_eq!(count, 6, "{cut}");
        }
    }
}

/// A changed bit is an error, or it makes a packed payload another way to say the same.
#[test]
fn one_changed_bit_never_changes_content() {
    for codec in Codec::ALL {
        let (bytes, _) = log(&header(LogKind::Delta), &frames(codec), 42);
        let whole = decode(&bytes, bytes.len());
        let step = if codec == Codec::None { 37 } else { 1 };
        for at in (0..bytes.len()).step_by(step) {
            let mut changed = bytes.clone();
            changed[at] ^= 1 << (at % 8);
            let found = decode(&changed, 4096);
            let harmless = codec != Codec::None && found == whole;
            let incomplete = found == Ok(Vec::new());
            assert!(found.is_err() || incomplete || harmless, "{codec:?} {at}");
        }
    }
}

/// A trailer behind valid checksums that belongs to another history.
#[test]
fn a_forged_trailer_breaks_the_chain() {
    let (bytes, _) = log(&header(LogKind::Delta), &frames(Codec::None), 42);
    let foot_at = bytes.len() - FOOT_BYTES;
    let foot = bytes[foot_at..].try_into().unwrap();
    let mut foot = Foot::parse(foot, u64::try_from(foot_at).unwrap()).unwrap();
    foot.epoch = Epoch(43);
    let forged = [&bytes[..foot_at], &foot.to_bytes()].concat();
    assert!(matches!(
        decode(&forged, 1000),
        Err(DecodeError::Chain { .. })
    ));
}

#[test]
fn what_follows_the_end_is_refused_and_an_error_is_final() {
    let (mut bytes, _) = log(&header(LogKind::Delta), &frames(Codec::Lz4), 42);
    let len = bytes.len() as u64;
    bytes.push(0);
    assert_eq!(decode(&bytes, 7), Err(DecodeError::Surplus(len)));

    let mut decoder = Decoder::new();
    decoder.feed(b"#!/bin/sh\n      ");
    assert_eq!(decoder.next(), Err(DecodeError::Magic));
    assert_eq!(decoder.next(), Err(DecodeError::Stopped));
}

#[test]
fn epochs_go_forward() {
    for (kind, epoch) in [
        (LogKind::Delta, 41),
        (LogKind::Delta, 0),
        (LogKind::Initial, 1),
        (FOLDED, 41),
        (FOLDED, 43),
    ] {
        let (bytes, _) = log(&header(kind), &[], epoch);
        assert!(decode(&bytes, 100).is_err(), "{kind:?} {epoch}");
    }
    let (bytes, _) = log(&header(LogKind::Delta), &[], 50);
    assert_eq!(
        decode(&bytes, 100).unwrap().len(),
        2,
        "merged epochs leave gaps"
    );
}

#[test]
fn frames_that_do_not_fit_their_disk_are_refused() {
    let bad = [
        encode_data(DiskIndex(2), 0, vec![1; 4096], Codec::None),
        encode_data(DiskIndex(0), DISK_BYTES, vec![1; 4096], Codec::None),
        encode_data(DiskIndex(0), DISK_BYTES - 4096, vec![1; 8192], Codec::None),
        encode_data(DiskIndex(0), 512, vec![1; 4096], Codec::None),
        encode_data(DiskIndex(0), 0, vec![1; 512], Codec::None),
        encode_data(DiskIndex(1), 65536, vec![1; 4096], Codec::None),
        encode_zero(DiskIndex(0), Extent::new(4096, u64::MAX - 4095)),
        encode_zero(DiskIndex(0), Extent::new(0, 0)),
    ];
    for frame in bad {
        let (bytes, _) = log(&header(LogKind::Delta), std::slice::from_ref(&frame), 42);
        let refused = decode(&bytes, 4096);
        assert!(
            matches!(
                refused,
                Err(DecodeError::Invalid {
                    part: "frame header",
                    ..
                })
            ),
            "{:?}: {refused:?}",
            frame.header()
        );
    }
}

#[test]
fn long_content_can_be_written_from_where_it_is() {
    let frames: Vec<_> = (0..3)
        .map(|n| encode_data(DiskIndex(0), n * 131_072, pattern(131_072, 9), Codec::None))
        .collect();
    let (bytes, _) = log(&header(LogKind::Delta), &frames, 42);
    for step in [1000, 6500, 16_250, 65_000] {
        let events = decode(&bytes, step).unwrap();
        let starts: Vec<_> = events
            .iter()
            .filter_map(|event| match event {
                Event::Frame { raw, .. } => Some(raw.as_ref()?.as_ptr().align_offset(4096)),
                _ => None,
            })
            .collect();
        assert_eq!(starts, [0; 3], "in pieces of {step} bytes");
    }
}

#[test]
fn an_initial_copy_has_frames_and_no_index() {
    let (bytes, _) = log(&header(LogKind::Initial), &frames(Codec::Lz4), 0);
    let events = decode(&bytes, 1000).unwrap();
    assert!(
        events
            .iter()
            .any(|event| matches!(event, Event::Frame { .. }))
    );
}

#[test]
fn the_longest_header_is_read_and_none_that_claims_to_be_longer_or_nothing() {
    let longest = Header {
        disks: (0..DISKS_PER_MACHINE_MAX)
            .map(|n| DiskEntry {
                name: Name::new(&format!("{n:0>NAME_BYTES_MAX$}")).unwrap(),
                size: DISK_BYTES,
                logical_sector: 512,
                physical_sector: 4096,
            })
            .collect(),
        ..header(FOLDED)
    };
    let mut bytes = log(&longest, &[], 42).0;
    let len = u32::try_from(HEADER_BYTES_MAX).unwrap();
    assert_eq!(bytes[12..16], len.to_le_bytes(), "as long as it can be");
    assert!(decode(&bytes, 1000).is_ok());
    for (len, right) in [(len + 1, false), (108, true), (107, false)] {
        bytes[12..16].copy_from_slice(&len.to_le_bytes());
        let mut decoder = Decoder::new();
        decoder.feed(&bytes[..PREAMBLE_BYTES]);
        let found = decoder.next();
        assert_eq!(found.is_ok(), right, "before anything is kept for {len}");
    }
}

fn any_frame() -> impl Strategy<Value = EncodedFrame> {
    let codec = prop::sample::select(Codec::ALL.to_vec());
    (
        any::<bool>(),
        0..200u64,
        1..40u64,
        any::<u8>(),
        codec,
        any::<bool>(),
    )
        .prop_map(|(data, block, blocks, seed, codec, odd)| {
            if odd {
                return encode_data(DiskIndex(1), 65536, pattern(512, seed), codec);
            }
            let run = Extent::new(block * 4096, blocks * 4096);
            if data {
                encode_data(
                    DiskIndex(0),
                    run.offset,
                    pattern(to_usize(run.len), seed),
                    codec,
                )
            } else {
                encode_zero(DiskIndex(0), run)
            }
        })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn logs_round_trip(frames in prop::collection::vec(any_frame(), 0..12), step in 1..9000usize) {
        let (bytes, lineage) = log(&header(LogKind::Delta), &frames, 42);
        let events = decode(&bytes, step).unwrap();
        prop_assert_eq!(events.len(), frames.len() + 2);
        for (event, frame) in events[1..].iter().zip(&frames) {
            let Event::Frame { header, .. } = event else { panic!("{event:?}") };
            prop_assert_eq!(header, frame.header());
        }
        let Some(Event::Trailer(trailer)) = events.last() else { panic!("no trailer") };
        prop_assert_eq!(trailer.lineage, lineage);
        prop_assert_eq!(trailer.log_len, bytes.len() as u64);
    }

    #[test]
    fn foreign_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..400), step in 1..50usize) {
        let _ = decode(&bytes, step);
        let mut behind_magic = b"UNDERHRL\x01\0".to_vec();
        behind_magic.extend_from_slice(&bytes);
        let _ = decode(&behind_magic, step);
    }

    /// Behind valid checksums too: whoever writes the log computes them.
    #[test]
    fn foreign_frames_and_trailers_never_panic(
        kind in 0..5u8,
        mut bytes in prop::array::uniform28(any::<u8>()),
        rest in prop::collection::vec(any::<u8>(), 0..300),
    ) {
        let (_, first) = Encoder::new(&header(LogKind::Delta));
        bytes[0] = kind;
        let mut log = first.to_vec();
        log.extend_from_slice(&bytes);
        log.extend_from_slice(&understudy::base::checksum::crc32c(&bytes).to_le_bytes());
        log.extend_from_slice(&rest);
        let _ = decode(&log, 50);
    }
}

/// Writes the golden files: `cargo test write_golden -- --ignored`, for a new version only.
#[test]
#[ignore = "writes the golden files of a new version"]
fn write_golden_files() {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    for (name, kind, codec, epoch) in [
        ("delta-v1.hrl", LogKind::Delta, Codec::None, 42),
        ("initial-v1.hrl", LogKind::Initial, Codec::None, 0),
        ("folded-v1.hrl", FOLDED, Codec::None, 42),
        ("delta-v1-lz4.hrl", LogKind::Delta, Codec::Lz4, 42),
        ("delta-v1-zstd.hrl", LogKind::Delta, Codec::Zstd, 42),
    ] {
        let (bytes, lineage) = log(&header(kind), &frames(codec), epoch);
        fs::write(folder.join(name), bytes).unwrap();
        eprintln!("{name} {lineage:?}");
    }
}
