//! Delta logs (`.hrl`): any bytes, and good logs of which fields were changed and the checksums made right again.
//!
//! What comes out does not depend on the pieces in which the bytes arrive, no frame is longer than the limit, and what
//! a frame unpacks to is as long as its run.

use understudy::{
    base::{
        checksum::crc32c,
        limits::FRAME_BYTES_MAX,
        units::{to_u64, to_usize},
    },
    delta::{Decoder, Event},
};

use super::plan::Plan;

const GOLDEN: [&[u8]; 4] = [
    include_bytes!("../../golden/initial-v1.hrl"),
    include_bytes!("../../golden/delta-v1.hrl"),
    include_bytes!("../../golden/delta-v1-lz4.hrl"),
    include_bytes!("../../golden/delta-v1-zstd.hrl"),
];
const FRAME_HEADER: usize = 32;
const TRAILER_KIND: u8 = 3;
const FOOT: usize = 72;

/// Any bytes for odd first bytes, a good log with changed fields for even ones.
pub(crate) fn decode(input: &[u8]) {
    let mut plan = Plan::new(input);
    let kind = plan.u8();
    let piece = usize::from(plan.u8()) + 1;
    let bytes = if kind % 2 == 1 {
        plan.rest().to_vec()
    } else {
        changed(GOLDEN[usize::from(kind / 2 % 4)], &mut plan)
    };
    let whole = events(&bytes, bytes.len().max(1));
    assert_eq!(whole, events(&bytes, piece), "it depends on the pieces");
}

/// Good logs as raw bytes, whole and cut short, and with one field changed.
pub(crate) fn seeds() -> Vec<Vec<u8>> {
    let mut seeds = Vec::new();
    for (number, log) in (0..).step_by(2).zip(GOLDEN) {
        // Long ones only slow the search down.
        let len = log.len().min(16 << 10);
        seeds.push([&[1, 40], &log[..len]].concat());
        seeds.push([&[1, 200], &log[..200]].concat());
        for place in [10, 12, 40, 100, 130, 200] {
            seeds.push(vec![number, 17, 1, place, 0, 0, 3]);
        }
    }
    seeds
}

/// What a decoder says of `bytes` that arrive in pieces, and whether it found the log whole.
fn events(bytes: &[u8], piece: usize) -> (Vec<Event>, Result<bool, String>) {
    let mut decoder = Decoder::new();
    let mut found = Vec::new();
    for part in bytes.chunks(piece) {
        decoder.feed(part);
        loop {
            match decoder.next() {
                Ok(Some(event)) => found.push(checked(event)),
                Ok(None) => break,
                Err(error) => return (found, Err(error.to_string())),
            }
        }
    }
    (found, Ok(decoder.is_complete()))
}

fn checked(event: Event) -> Event {
    if let Event::Frame { header, raw, .. } = &event {
        if let Some(raw) = raw {
            assert!(to_u64(raw.len()) == header.run.len && raw.len() <= to_usize(FRAME_BYTES_MAX));
        }
        assert!(u64::from(header.payload_len) <= 2 * FRAME_BYTES_MAX);
    }
    event
}

/// A log with some fields changed and right checksums in front of the chain hash.
fn changed(log: &[u8], plan: &mut Plan<'_>) -> Vec<u8> {
    let mut bytes = log.to_vec();
    for _ in 0..plan.u8() % 16 {
        let near = plan.u8();
        let at = if near < 250 {
            usize::from(near) * 2
        } else {
            to_usize(plan.below(to_u64(bytes.len())))
        };
        let width = plan.choose(&[1, 2, 4, 8]);
        let value = plan.number().to_le_bytes();
        if let Some(field) = bytes.get_mut(at..at + width) {
            field.copy_from_slice(&value[..width]);
        }
    }
    reseal(&mut bytes);
    bytes
}

/// The checksums of the header, of each frame header, and of the foot, as far as the lengths lead to them.
fn reseal(bytes: &mut [u8]) {
    let number = |bytes: &[u8], at: usize| {
        let field = bytes.get(at..at + 4)?.try_into().ok()?;
        usize::try_from(u32::from_le_bytes(field)).ok()
    };
    let Some(mut at) = number(bytes, 12).filter(|&len| len >= 16) else {
        return;
    };
    if at > bytes.len() {
        return;
    }
    seal(&mut bytes[..at]);
    while let Some(header) = bytes.get_mut(at..at + FRAME_HEADER) {
        seal(header);
        let is_end = header[0] == TRAILER_KIND;
        let Some(len) = number(bytes, at + 4).filter(|_| !is_end) else {
            break;
        };
        at += FRAME_HEADER + len;
    }
    let foot = bytes.len().saturating_sub(FOOT);
    // The end mark follows the checksum.
    if let Some(foot) = bytes.get_mut(foot..foot + FOOT - 4) {
        seal(foot);
    }
}

/// Puts the CRC-32C of all but the last four bytes there.
fn seal(bytes: &mut [u8]) {
    let (body, field) = bytes.split_at_mut(bytes.len() - 4);
    field.copy_from_slice(&crc32c(body).to_le_bytes());
}
