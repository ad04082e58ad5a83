//! A good VHDX image whose log was in use: entries as the input has them, with checksums that are right, so that replay
//! is reached and what it does to the image is opened.

use understudy::{
    base::units::{MIB, to_u64, to_usize},
    disk::image::Format,
};

use super::{
    exercise::exercise,
    plan::Plan,
    sparse::Sparse,
    vhdx::{BAT, HEADERS, LOG, METADATA, REGION_TABLES, bases, checksum, seal},
};

/// A sector of the log, and a page of the file.
const PAGE: usize = 4096;
const RING_PAGES: u64 = MIB / 4096;
/// The identity of the log in headers and entries.
const IDENTITY: [u8; 16] = [0x1D; 16];
/// Where a descriptor leads: structures, blocks, the log itself, where nothing may be written, past the end.
const TARGETS: [u64; 10] = [
    BAT,
    BAT + 0x8000,
    METADATA,
    METADATA + 0x1_0000,
    REGION_TABLES[0].0,
    REGION_TABLES[1].0,
    4 * MIB,
    LOG,
    HEADERS[0].0,
    64 * MIB,
];

/// An entry so far.
struct Entry {
    sequence: u64,
    descriptors: Vec<[u8; 32]>,
    sectors: Vec<[u8; PAGE]>,
}

/// Opens a good image with the log that `input` describes.
pub(crate) fn replay(input: &[u8]) {
    let mut plan = Plan::new(input);
    let number = usize::from(plan.u8()) % bases().len();
    let mut file = bases()[number].clone();
    for (offset, _) in HEADERS {
        file.write(offset + 48, &IDENTITY);
    }
    if plan.u8() == 1 {
        // Log version, version, length and offset in the header.
        let at = HEADERS[usize::from(plan.u8() % 2)].0 + 64 + plan.below(16);
        file.write(at, &plan.number().to_le_bytes()[..2]);
    }
    let mut position = plan.below(RING_PAGES);
    let mut sequence = plan.number().max(1);
    let mut tail = position;
    for _ in 0..=plan.u8() % 6 {
        let entry = entry(&file, sequence, &mut plan);
        let flags = plan.u8();
        if flags & 0x0F == 0x01 {
            tail = plan.below(RING_PAGES);
        }
        if flags & 0x0F == 0x02 {
            tail = position;
        }
        let bytes = encode(&entry, tail, &file, flags, &mut plan);
        let pages = to_u64(bytes.len() / PAGE);
        for (number, page) in (position..).zip(bytes.chunks(PAGE)) {
            file.write(LOG + number % RING_PAGES * 4096, page);
        }
        position = (position + pages) % RING_PAGES;
        sequence = match flags >> 4 {
            1 => plan.number(),
            2 => sequence,
            _ => sequence.wrapping_add(1),
        };
    }
    seal(&mut file);
    exercise(&file, Format::Vhdx, Some(&bases()[0]), &mut plan);
}

/// One entry with a page of each structure, on each image; two of them around the end of the ring.
pub(crate) fn seeds() -> Vec<Vec<u8>> {
    let mut seeds = Vec::new();
    for image in 0..5 {
        for target in 0..10 {
            seeds.push(vec![
                image, 0, 5, 0, 0, 3, 0, 1, target, 1, 0, 0, 8, 0, 0, 0x20,
            ]);
            seeds.push(vec![
                image, 0, 255, 0, 0, 3, 1, 2, target, 0, 1, 3, 0x10, 0, 0, 1, target,
            ]);
        }
    }
    seeds
}

/// What an entry writes.
fn entry(file: &Sparse, sequence: u64, plan: &mut Plan<'_>) -> Entry {
    let mut entry = Entry {
        sequence,
        descriptors: Vec::new(),
        sectors: Vec::new(),
    };
    for _ in 0..plan.u8() % 5 {
        let offset = match plan.u8() {
            200.. => plan.number(),
            near => TARGETS[usize::from(near % 10)] + u64::from(near / 100) * 4096,
        };
        let kind = plan.u8();
        let mut descriptor = [0; 32];
        if kind & 3 == 1 {
            descriptor[..4].copy_from_slice(b"zero");
            let len = u64::from(plan.u16()) * 4096;
            let len = if kind & 0x80 == 0 { len } else { plan.number() };
            descriptor[8..16].copy_from_slice(&len.to_le_bytes());
        } else {
            let page = page(file, offset, kind, plan);
            descriptor[..4].copy_from_slice(b"desc");
            descriptor[4..8].copy_from_slice(&page[PAGE - 4..]);
            descriptor[8..16].copy_from_slice(&page[..8]);
            entry.sectors.push(page);
        }
        descriptor[16..24].copy_from_slice(&offset.to_le_bytes());
        descriptor[24..].copy_from_slice(&sequence.to_le_bytes());
        entry.descriptors.push(descriptor);
    }
    entry
}

/// The page at `offset` as it is, with a number or two changed; or all of it one byte.
fn page(file: &Sparse, offset: u64, kind: u8, plan: &mut Plan<'_>) -> [u8; PAGE] {
    if kind & 4 != 0 {
        return [plan.u8(); PAGE];
    }
    let mut page = [0; PAGE];
    if let Some(there) = (offset < file.len).then(|| file.read(offset, PAGE)) {
        page.copy_from_slice(&there);
    }
    for _ in 0..kind >> 6 {
        let at = to_usize(plan.below(64)) * 8;
        page[at..at + 8].copy_from_slice(&plan.number().to_le_bytes());
    }
    let table = REGION_TABLES.iter().find(|(table, _)| *table == offset);
    if let Some((_, len)) = table {
        let rest = file.read(offset + 4096, len - PAGE);
        let sum = checksum(&[&page[..], &rest].concat());
        page[4..8].copy_from_slice(&sum.to_le_bytes());
    }
    page
}

/// The bytes of an entry (MS-VHDX 2.3.1), with a right checksum unless `flags` say otherwise.
fn encode(entry: &Entry, tail: u64, file: &Sparse, flags: u8, plan: &mut Plan<'_>) -> Vec<u8> {
    let head = (64 + 32 * entry.descriptors.len()).next_multiple_of(PAGE);
    let len = head + entry.sectors.len() * PAGE;
    let mut bytes = vec![0; len];
    let small = |number: usize| u32::try_from(number).expect("a few pages").to_le_bytes();
    bytes[..4].copy_from_slice(b"loge");
    bytes[8..12].copy_from_slice(&small(len));
    bytes[12..16].copy_from_slice(&small(to_usize(tail * 4096)));
    bytes[16..24].copy_from_slice(&entry.sequence.to_le_bytes());
    bytes[24..28].copy_from_slice(&small(entry.descriptors.len()));
    bytes[32..48].copy_from_slice(&IDENTITY);
    bytes[48..56].copy_from_slice(&file.len.to_le_bytes());
    bytes[56..64].copy_from_slice(&file.len.next_multiple_of(MIB).to_le_bytes());
    for (place, descriptor) in bytes[64..].chunks_exact_mut(32).zip(&entry.descriptors) {
        place.copy_from_slice(descriptor);
    }
    let sequence = entry.sequence.to_le_bytes();
    for (sector, page) in bytes[head..].chunks_exact_mut(PAGE).zip(&entry.sectors) {
        sector.copy_from_slice(page);
        sector[..4].copy_from_slice(b"data");
        sector[4..8].copy_from_slice(&sequence[4..]);
        sector[PAGE - 4..].copy_from_slice(&sequence[..4]);
    }
    match flags & 0x0F {
        // A field of the entry, or of its first descriptors.
        3 => {
            let at = 8 + to_usize(plan.below(40)) * 4;
            bytes[at..at + 4].copy_from_slice(&plan.number().to_le_bytes()[..4]);
        }
        // The lengths of the file.
        4 => bytes[48..56].copy_from_slice(&plan.number().to_le_bytes()),
        5 => bytes[56..64].copy_from_slice(&plan.number().to_le_bytes()),
        _ => {}
    }
    let sum = checksum(&bytes);
    bytes[4..8].copy_from_slice(&sum.to_le_bytes());
    // A torn end.
    if flags & 0x0F == 6 {
        bytes[len - 1] ^= 1;
    }
    bytes
}
