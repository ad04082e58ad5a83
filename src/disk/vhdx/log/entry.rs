//! One log entry: descriptor sectors, then a data sector for each page.
//!
//! A page of 4096 bytes is stored in a sector of 4096 bytes that also carries a signature and the sequence number at
//! both ends; the bytes that these displace stand in the page's descriptor. An entry is valid as a whole or not at all.

use uuid::Uuid;

use crate::base::units::{Extent, to_u64, to_usize};

use super::super::format::{
    self, Descriptor, FILE_BYTES_MAX, LogEntryHeader, PAGE, PAGE_BYTES, Page, REGION_TABLE_OFFSETS,
    checksum_of,
};

const HEADER_BYTES: usize = 64;
const DESCRIPTOR_BYTES: usize = 32;
const DATA_SIGNATURE: &[u8; 4] = b"data";

/// What a new entry says besides its pages.
#[derive(Clone, Copy, Debug)]
pub(super) struct Fields {
    pub(super) sequence: u64,
    /// Ring offset of the oldest entry still needed.
    pub(super) tail: u64,
    pub(super) log: Uuid,
    pub(super) flushed_file_offset: u64,
    pub(super) last_file_offset: u64,
}

/// Bytes of an entry that writes `pages` pages.
pub(super) fn encoded_len(pages: usize) -> u64 {
    to_u64((HEADER_BYTES + pages * DESCRIPTOR_BYTES).next_multiple_of(PAGE) + pages * PAGE)
}

/// The bytes of an entry that writes `pages`, each at its file offset.
pub(super) fn encode(fields: &Fields, pages: &[(u64, &Page)]) -> Vec<u8> {
    let mut bytes = vec![0; to_usize(encoded_len(pages.len()))];
    let small = |value: u64| u32::try_from(value).expect("a log has less than 4 GiB");
    let header = LogEntryHeader {
        checksum: 0,
        len: small(to_u64(bytes.len())),
        tail: small(fields.tail),
        sequence: fields.sequence,
        descriptors: small(to_u64(pages.len())),
        reserved: 0,
        log: fields.log,
        flushed_file_offset: fields.flushed_file_offset,
        last_file_offset: fields.last_file_offset,
    };
    format::encode(&header, &mut bytes);
    let (descriptors, sectors) = {
        let split = bytes.len() - pages.len() * PAGE;
        bytes.split_at_mut(split)
    };
    let places = descriptors[HEADER_BYTES..].chunks_exact_mut(DESCRIPTOR_BYTES);
    for (((offset, page), place), sector) in
        pages.iter().zip(places).zip(sectors.chunks_exact_mut(PAGE))
    {
        let descriptor = Descriptor::Data {
            trailing: page[PAGE - 4..].try_into().expect("four bytes"),
            leading: page[..8].try_into().expect("eight bytes"),
            offset: *offset,
            sequence: fields.sequence,
        };
        format::encode(&descriptor, place);
        let sequence = fields.sequence.to_le_bytes();
        sector[..4].copy_from_slice(DATA_SIGNATURE);
        sector[4..8].copy_from_slice(&sequence[4..]);
        sector[8..PAGE - 4].copy_from_slice(&page[8..PAGE - 4]);
        sector[PAGE - 4..].copy_from_slice(&sequence[..4]);
    }
    format::seal(&mut bytes);
    bytes
}

/// A valid entry of a ring.
#[derive(Clone, Debug)]
pub(super) struct LogEntry {
    /// Ring offset of its first byte.
    pub(super) position: u64,
    pub(super) len: u64,
    /// Ring offset of the oldest entry still needed.
    pub(super) tail: u64,
    pub(super) sequence: u64,
    pub(super) flushed_file_offset: u64,
    pub(super) last_file_offset: u64,
    descriptors: usize,
}

/// One change of an entry.
#[derive(Debug)]
pub(super) enum Change {
    /// The page at a file offset.
    Data(u64, Box<Page>),
    /// A run of the file becomes zeros.
    Zero(Extent),
}

/// The bytes of a log.
#[derive(Debug)]
pub(super) struct Ring<'a> {
    pub(super) bytes: &'a [u8],
    /// Where the log is in the file.
    pub(super) place: Extent,
}

impl Ring<'_> {
    /// The entry at ring offset `position`, if there is a valid one of the log `log`.
    pub(super) fn entry(&self, position: u64, log: Uuid) -> Option<LogEntry> {
        let header: LogEntryHeader = format::decode(self.sector(position, 0))?;
        let ring_len = to_u64(self.bytes.len());
        let (len, tail) = (u64::from(header.len), u64::from(header.tail));
        let descriptors = to_usize(u64::from(header.descriptors));
        let fits = len.is_multiple_of(PAGE_BYTES)
            && len >= PAGE_BYTES
            && len <= ring_len
            && tail.is_multiple_of(PAGE_BYTES)
            && tail < ring_len
            && header.sequence != 0
            && descriptors <= to_usize(len) / DESCRIPTOR_BYTES
            && header.flushed_file_offset <= FILE_BYTES_MAX
            && header.last_file_offset <= FILE_BYTES_MAX;
        if header.log != log || !fits {
            return None;
        }
        let entry = LogEntry {
            position,
            len,
            tail,
            sequence: header.sequence,
            flushed_file_offset: header.flushed_file_offset,
            last_file_offset: header.last_file_offset,
            descriptors,
        };
        // Structure before checksum: entries that pass this test do not overlap, so a crafted log costs no more than
        // its own length.
        (self.is_sound(&entry) && self.checksum(&entry) == header.checksum).then_some(entry)
    }

    /// The log and the sequence number that an entry at `position` claims to have, valid or not.
    pub(super) fn claimed(&self, position: u64) -> Option<(Uuid, u64)> {
        let header: LogEntryHeader = format::decode(self.sector(position, 0))?;
        Some((header.log, header.sequence))
    }

    /// The changes of a valid entry, in order.
    pub(super) fn changes(&self, entry: &LogEntry) -> impl Iterator<Item = Change> {
        let mut sector = descriptor_sectors(entry.descriptors);
        self.descriptors(entry).map(move |descriptor| {
            match descriptor.expect("only valid entries are given out") {
                Descriptor::Zero { len, offset, .. } => Change::Zero(Extent::new(offset, len)),
                Descriptor::Data {
                    trailing,
                    leading,
                    offset,
                    ..
                } => {
                    let mut page = Box::new([0; PAGE]);
                    page.copy_from_slice(self.sector(entry.position, sector));
                    page[..8].copy_from_slice(&leading);
                    page[PAGE - 4..].copy_from_slice(&trailing);
                    sector += 1;
                    Change::Data(offset, page)
                }
            }
        })
    }

    fn is_sound(&self, entry: &LogEntry) -> bool {
        let sectors = entry.len / PAGE_BYTES;
        let mut sector = descriptor_sectors(entry.descriptors);
        for descriptor in self.descriptors(entry) {
            let (target, sequence) = match descriptor {
                Some(Descriptor::Zero {
                    len,
                    offset,
                    sequence,
                    ..
                }) => (Extent::new(offset, len), sequence),
                Some(Descriptor::Data {
                    offset, sequence, ..
                }) => {
                    if to_u64(sector) >= sectors
                        || !is_data(self.sector(entry.position, sector), entry.sequence)
                    {
                        return false;
                    }
                    sector += 1;
                    (Extent::new(offset, PAGE_BYTES), sequence)
                }
                None => return false,
            };
            if sequence != entry.sequence || !self.may_change(target) {
                return false;
            }
        }
        to_u64(sector) == sectors
    }

    /// Neither the identifier, nor the headers, nor the log itself is ever changed through the log.
    fn may_change(&self, target: Extent) -> bool {
        let aligned =
            target.offset.is_multiple_of(PAGE_BYTES) && target.len.is_multiple_of(PAGE_BYTES);
        let inside = target.checked_end().is_some_and(|end| {
            end <= FILE_BYTES_MAX && (end <= self.place.offset || target.offset >= self.place.end())
        });
        aligned && inside && target.offset >= REGION_TABLE_OFFSETS[0]
    }

    fn checksum(&self, entry: &LogEntry) -> u32 {
        let start = to_usize(entry.position);
        let len = to_usize(entry.len);
        let first = len.min(self.bytes.len() - start);
        checksum_of([
            &self.bytes[start..start + first],
            &self.bytes[..len - first],
        ])
    }

    fn descriptors(&self, entry: &LogEntry) -> impl Iterator<Item = Option<Descriptor>> {
        let position = entry.position;
        (0..entry.descriptors).map(move |number| {
            let at = HEADER_BYTES + number * DESCRIPTOR_BYTES;
            let sector = self.sector(position, at / PAGE);
            format::decode(&sector[at % PAGE..at % PAGE + DESCRIPTOR_BYTES])
        })
    }

    /// The sector number `index` of the entry at `position`, around the end of the ring.
    fn sector(&self, position: u64, index: usize) -> &[u8] {
        let at = (to_usize(position) + index * PAGE) % self.bytes.len();
        &self.bytes[at..at + PAGE]
    }
}

fn descriptor_sectors(descriptors: usize) -> usize {
    (HEADER_BYTES + descriptors * DESCRIPTOR_BYTES).div_ceil(PAGE)
}

fn is_data(sector: &[u8], sequence: u64) -> bool {
    let sequence = sequence.to_le_bytes();
    sector[..4] == *DATA_SIGNATURE
        && sector[4..8] == sequence[4..]
        && sector[PAGE - 4..] == sequence[..4]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::units::MIB;

    const LOG: Uuid = Uuid::from_u128(1);

    fn ring_with(position: usize, entry: &[u8]) -> Vec<u8> {
        let mut ring = vec![0; to_usize(MIB)];
        for (at, byte) in entry.iter().enumerate() {
            ring[(position + at) % to_usize(MIB)] = *byte;
        }
        ring
    }

    fn fields() -> Fields {
        Fields {
            sequence: 0x1_0000_0002,
            tail: 8192,
            log: LOG,
            flushed_file_offset: MIB,
            last_file_offset: 2 * MIB,
        }
    }

    #[test]
    fn an_entry_comes_back_also_around_the_end_of_the_ring() {
        let pages: Vec<Page> = (0..130u8).map(|n| [n.wrapping_add(1); PAGE]).collect();
        let placed: Vec<(u64, &Page)> = (0..)
            .map(|n| 3 * MIB + n * PAGE_BYTES)
            .zip(&pages)
            .collect();
        let bytes = encode(&fields(), &placed);
        assert_eq!(bytes.len(), (2 + 130) * PAGE);
        for position in [0, to_usize(MIB) - PAGE, to_usize(MIB) - 3 * PAGE] {
            let bytes = ring_with(position, &bytes);
            let ring = Ring {
                bytes: &bytes,
                place: Extent::new(MIB, MIB),
            };
            let entry = ring.entry(to_u64(position), LOG).unwrap();
            assert_eq!((entry.sequence, entry.tail), (0x1_0000_0002, 8192));
            assert_eq!(entry.last_file_offset, 2 * MIB);
            for (change, (offset, page)) in ring.changes(&entry).zip(&placed) {
                assert!(
                    matches!(change, Change::Data(at, got) if at == *offset && got == Box::new(**page))
                );
            }
            assert!(ring.entry(to_u64(position), Uuid::nil()).is_none());
        }
    }

    #[test]
    fn any_changed_byte_makes_an_entry_invalid() {
        let page = [7; PAGE];
        let good = encode(&fields(), &[(3 * MIB, &page)]);
        for at in (0..good.len())
            .step_by(97)
            .chain([0, 4, 8, 12, 16, 24, 32, 48, 56, 64, 8191])
        {
            let mut bytes = ring_with(0, &good);
            bytes[at] ^= 0x10;
            let ring = Ring {
                bytes: &bytes,
                place: Extent::new(MIB, MIB),
            };
            assert!(ring.entry(0, LOG).is_none(), "byte {at}");
        }
    }

    #[test]
    fn entries_do_not_reach_the_headers_or_the_log() {
        let page = [7; PAGE];
        for target in [
            0,
            0x10000,
            MIB,
            2 * MIB - PAGE_BYTES,
            3 * MIB + 512,
            FILE_BYTES_MAX,
        ] {
            let bytes = ring_with(0, &encode(&fields(), &[(target, &page)]));
            let ring = Ring {
                bytes: &bytes,
                place: Extent::new(MIB, MIB),
            };
            assert!(ring.entry(0, LOG).is_none(), "{target:#x}");
        }
    }
}
