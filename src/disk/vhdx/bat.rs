//! The block allocation table: where each block of the disk is in the file.
//!
//! The whole table is in memory, one atomic word for each entry, so that finding a block on the hot path takes one load
//! and no lock. It is read in bulk at open because the check that no two blocks share space needs every entry anyway.
//! Memory is 8 bytes for each block of the disk (256 KiB for 1 TiB in 32 MiB blocks, 512 MiB for the largest disk the
//! format allows in the smallest blocks), never what the file claims beyond that.
//!
//! Every 2^23 sectors, a chunk, one entry for a sector bitmap stands between those of the blocks; a disk without
//! parent leaves it zero. Entries past the last block are padding: ignored when read, kept as they are.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::{
    base::units::{Extent, MIB, to_u64, to_usize},
    storage::Storage,
};

use super::{
    Kind,
    error::OpenError,
    format::{PAGE, PAGE_BYTES, Page},
    metadata::Parameters,
    occupancy::Occupancy,
};

const ENTRY_BYTES: u64 = 8;
const ENTRIES_PER_PAGE: u64 = PAGE_BYTES / ENTRY_BYTES;
const SECTORS_PER_CHUNK: u64 = 1 << 23;
const STATE_MASK: u64 = 0b111;
const OFFSET_MASK: u64 = !(MIB - 1);
/// Bytes of the table read at once.
const READ_BYTES: u64 = MIB;

/// Where the bytes of a block are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Source {
    /// In the file, at this offset.
    File(u64),
    /// Sector by sector, as the bitmap says, at this offset of the file or in the parent.
    Mixed(u64),
    /// In the parent.
    Parent,
    /// Nowhere: it reads as zeros.
    Zeros,
}

/// What an entry stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Role {
    Block(u64),
    Bitmap,
    Padding,
}

/// What an entry says of its block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    /// Never written: reads as the parent, or as zeros if there is none.
    NotPresent,
    /// Content given up: reads as zeros.
    Undefined,
    /// Reads as zeros.
    Zero,
    /// Discarded: reads as zeros.
    Unmapped,
    /// In the file.
    FullyPresent,
    /// Partly in the parent: only in differencing disks.
    PartiallyPresent,
}

/// A word of the table: the state in bits 0 to 2, the file offset in bits 20 to 63.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Entry(u64);

impl Entry {
    /// A block that reads as zeros and has no space.
    pub(super) const ZERO: Self = Self(2);

    /// A block at `offset` of the file.
    pub(super) fn present(offset: u64) -> Self {
        assert!(offset >= MIB && offset.is_multiple_of(MIB));
        Self(offset | 6)
    }

    /// The state; nothing for the reserved ones.
    pub(super) fn state(self) -> Option<State> {
        Some(match self.0 & STATE_MASK {
            0 => State::NotPresent,
            1 => State::Undefined,
            2 => State::Zero,
            3 => State::Unmapped,
            6 => State::FullyPresent,
            7 => State::PartiallyPresent,
            _ => return None,
        })
    }

    /// Where the block is, if all of it is in the file.
    pub(super) fn location(self) -> Option<u64> {
        (self.0 & STATE_MASK == 6).then_some(self.0 & OFFSET_MASK)
    }

    /// As it stands in the file.
    pub(super) fn to_bytes(self) -> [u8; 8] {
        self.0.to_le_bytes()
    }

    /// As it stands in a file that is only looked through: nothing is checked.
    pub(super) fn from_bytes(bytes: [u8; 8]) -> Self {
        Self(u64::from_le_bytes(bytes))
    }

    /// The whole word.
    pub(super) fn word(self) -> u64 {
        self.0
    }

    /// The offset, whatever the state is.
    pub(super) fn offset(self) -> u64 {
        self.0 & OFFSET_MASK
    }

    /// The reserved bits.
    pub(super) fn reserved(self) -> u64 {
        self.0 & !OFFSET_MASK & !STATE_MASK
    }
}

/// How blocks are numbered: disk offset to block to entry.
#[derive(Clone, Copy, Debug)]
pub(super) struct Numbering {
    /// Blocks of the disk, the last one perhaps short.
    pub(super) blocks: u64,
    /// Blocks of a chunk; a power of two.
    chunk_ratio: u64,
    /// There is a parent, and bitmaps with it.
    has_parent: bool,
}

impl Numbering {
    pub(super) fn new(parameters: &Parameters) -> Self {
        let chunk = SECTORS_PER_CHUNK * u64::from(parameters.geometry.logical_sector);
        Self {
            blocks: parameters.geometry.size.div_ceil(parameters.block_size),
            chunk_ratio: chunk / parameters.block_size,
            has_parent: parameters.kind == Kind::Differencing,
        }
    }

    /// The entry of `block`: one bitmap entry follows those of each chunk.
    pub(super) fn entry(self, block: u64) -> u64 {
        block + block / self.chunk_ratio
    }

    /// Entries in use.
    pub(super) fn entries(self) -> u64 {
        if self.has_parent {
            self.entries_with_bitmaps()
        } else {
            self.entry(self.blocks - 1) + 1
        }
    }

    /// Entries that a disk with a parent uses; what every new table has room for.
    pub(super) fn entries_with_bitmaps(self) -> u64 {
        self.blocks.div_ceil(self.chunk_ratio) * (self.chunk_ratio + 1)
    }

    /// What an entry stands for.
    pub(super) fn role(self, entry: u64) -> Role {
        let (chunk, within) = (
            entry / (self.chunk_ratio + 1),
            entry % (self.chunk_ratio + 1),
        );
        let block = chunk * self.chunk_ratio + within;
        if within == self.chunk_ratio {
            Role::Bitmap
        } else if block < self.blocks {
            Role::Block(block)
        } else {
            Role::Padding
        }
    }

    /// The entry of the bitmap of `block`, and at which byte of the bitmap its bits begin.
    pub(super) fn bitmap(self, block: u64) -> (u64, u64) {
        let entry = block / self.chunk_ratio * (self.chunk_ratio + 1) + self.chunk_ratio;
        (entry, block % self.chunk_ratio * (MIB / self.chunk_ratio))
    }
}

/// The table.
pub(super) struct Bat {
    entries: Vec<AtomicU64>,
    numbering: Numbering,
    /// File offset of the first entry.
    offset: u64,
}

impl Bat {
    /// Reads the table in `region`, checks every entry, and marks the space of the blocks as taken.
    pub(super) fn read(
        storage: &dyn Storage,
        region: Extent,
        parameters: &Parameters,
        taken: &mut Occupancy,
    ) -> Result<Self, OpenError> {
        let numbering = Numbering::new(parameters);
        let used = numbering.entries();
        if used * ENTRY_BYTES > region.len {
            return Err(OpenError::corrupt(
                "BAT",
                region.offset,
                format!("{} bytes cannot hold {used} entries", region.len),
            ));
        }
        let padded = used.next_multiple_of(ENTRIES_PER_PAGE);
        let bat = Self {
            entries: (0..padded).map(|_| AtomicU64::new(0)).collect(),
            numbering,
            offset: region.offset,
        };
        bat.load(storage, used)?;
        bat.check(used, parameters.block_size, taken)?;
        Ok(bat)
    }

    /// The entry of `block`.
    pub(super) fn get(&self, block: u64) -> Entry {
        Entry(self.slot(block).load(Ordering::Acquire))
    }

    /// Where `block` is, if all of it is in the file.
    pub(super) fn location(&self, block: u64) -> Option<u64> {
        self.get(block).location()
    }

    /// Where the bytes of `block` are.
    pub(super) fn source(&self, block: u64) -> Source {
        let entry = self.get(block);
        match entry.state() {
            Some(State::FullyPresent) => Source::File(entry.offset()),
            Some(State::PartiallyPresent) => Source::Mixed(entry.offset()),
            Some(State::NotPresent) if self.numbering.has_parent => Source::Parent,
            _ => Source::Zeros,
        }
    }

    /// The file offset of the first bit of `block`, one that is partially present.
    pub(super) fn bits(&self, block: u64) -> u64 {
        let (entry, within) = self.numbering.bitmap(block);
        Entry(self.entries[to_usize(entry)].load(Ordering::Acquire)).offset() + within
    }

    /// Publishes a new entry of `block`.
    pub(super) fn set(&self, block: u64, entry: Entry) {
        self.slot(block).store(entry.0, Ordering::Release);
    }

    /// One past the last byte of the file, up to `limit`, that an entry refers to. What refers to more is the place of
    /// an unmapped block that was not there when the table was read.
    pub(super) fn end(&self, block_size: u64, limit: u64) -> u64 {
        let ends = (0..self.numbering.entries()).filter_map(|number| {
            let entry = Entry(self.entries[to_usize(number)].load(Ordering::Acquire));
            let len = match (entry.state()?, self.numbering.role(number)) {
                (State::NotPresent | State::Zero, _) | (_, Role::Padding) => return None,
                (_, Role::Bitmap) => MIB,
                (_, Role::Block(_)) => block_size,
            };
            (entry.offset() != 0).then(|| entry.offset().saturating_add(len))
        });
        ends.filter(|&end| end <= limit).max().unwrap_or(0)
    }

    /// The number of the page that holds the entry of `block`.
    pub(super) fn page_of(&self, block: u64) -> u64 {
        self.numbering.entry(block) / ENTRIES_PER_PAGE
    }

    /// File offset of a page.
    pub(super) fn page_offset(&self, page: u64) -> u64 {
        self.offset + page * PAGE_BYTES
    }

    /// A page as it would stand in the file now.
    pub(super) fn page(&self, page: u64) -> Box<Page> {
        let mut image = Box::new([0; PAGE]);
        let first = to_usize(page * ENTRIES_PER_PAGE);
        let entries = &self.entries[first..first + to_usize(ENTRIES_PER_PAGE)];
        for (entry, bytes) in entries.iter().zip(image.chunks_exact_mut(8)) {
            bytes.copy_from_slice(&entry.load(Ordering::Acquire).to_le_bytes());
        }
        image
    }

    /// Changes the entry of `block` in the image of its page.
    pub(super) fn put(&self, page: &mut Page, block: u64, entry: Entry) {
        let at = to_usize(self.numbering.entry(block) % ENTRIES_PER_PAGE * ENTRY_BYTES);
        page[at..at + 8].copy_from_slice(&entry.0.to_le_bytes());
    }

    fn has_bitmap(&self, block: u64) -> bool {
        let (entry, _) = self.numbering.bitmap(block);
        let entry = Entry(self.entries[to_usize(entry)].load(Ordering::Relaxed));
        matches!(
            entry.state(),
            Some(State::FullyPresent | State::PartiallyPresent)
        )
    }

    fn slot(&self, block: u64) -> &AtomicU64 {
        &self.entries[to_usize(self.numbering.entry(block))]
    }

    /// Fills the table from the file, leaving out its holes.
    fn load(&self, storage: &dyn Storage, used: u64) -> Result<(), OpenError> {
        let reading = || OpenError::reading("BAT", self.offset);
        let end = self.offset + used * ENTRY_BYTES;
        let mut at = self.offset;
        let mut buf = Vec::new();
        while at < end {
            let Some(data) = storage.data_after(at).map_err(reading())? else {
                break;
            };
            // Whole entries, whatever the boundaries of the host's holes are.
            let start = data.offset.max(at) / ENTRY_BYTES * ENTRY_BYTES;
            if start >= end {
                break;
            }
            let stop = data.end().next_multiple_of(ENTRY_BYTES).min(end);
            at = stop.min(start + READ_BYTES);
            buf.resize(to_usize(at - start), 0);
            storage.read_at(start, &mut buf).map_err(reading())?;
            let first = to_usize((start - self.offset) / ENTRY_BYTES);
            for (word, entry) in buf.chunks_exact(8).zip(&self.entries[first..]) {
                let word = word.try_into().expect("chunks of eight bytes");
                entry.store(u64::from_le_bytes(word), Ordering::Relaxed);
            }
        }
        Ok(())
    }

    /// Checks every entry in use: blocks first, then the space that entries without content still hold on to.
    fn check(&self, used: u64, block_size: u64, taken: &mut Occupancy) -> Result<(), OpenError> {
        let words =
            || (0..used).map(|n| (n, Entry(self.entries[to_usize(n)].load(Ordering::Relaxed))));
        for (number, entry) in words() {
            let corrupt = |problem: String| {
                let place = self.offset + number * ENTRY_BYTES;
                OpenError::corrupt("BAT", place, format!("entry {number}: {problem}"))
            };
            let role = self.numbering.role(number);
            if role == Role::Padding {
                continue;
            }
            if entry.reserved() != 0 {
                return Err(corrupt(format!("reserved bits in {:#x}", entry.0)));
            }
            let has_parent = self.numbering.has_parent;
            let len = match (entry.state(), role) {
                (Some(State::PartiallyPresent), Role::Block(block)) if has_parent => {
                    if !self.has_bitmap(block) {
                        return Err(corrupt("its sector bitmap is not there".into()));
                    }
                    block_size
                }
                (Some(State::FullyPresent), Role::Block(_)) => block_size,
                // Microsoft's own parser takes either state for a bitmap.
                (Some(State::PartiallyPresent), Role::Bitmap) if has_parent => MIB,
                (Some(State::FullyPresent), Role::Bitmap) => MIB,
                (None | Some(State::PartiallyPresent), _) => {
                    return Err(corrupt(format!("state {}", entry.0 & STATE_MASK)));
                }
                _ => continue,
            };
            let last = role == Role::Block(self.numbering.blocks - 1);
            taken
                .take_block(Extent::new(entry.offset(), len), last)
                .map_err(corrupt)?;
        }
        for (number, entry) in words() {
            let is_block = matches!(self.numbering.role(number), Role::Block(_));
            // A place kept by an undefined or unmapped block must not be given away; one that cannot be is no promise.
            if is_block && matches!(entry.state(), Some(State::Undefined | State::Unmapped)) {
                let _ = taken.take_block(Extent::new(entry.offset(), block_size), false);
            }
        }
        Ok(())
    }
}

impl std::fmt::Debug for Bat {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Bat")
            .field("entries", &to_u64(self.entries.len()))
            .field("offset", &self.offset)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;
    use crate::disk::{Geometry, vhdx::Kind};

    fn numbering(size: u64, block_size: u64, logical_sector: u32) -> Numbering {
        Numbering::new(&Parameters {
            geometry: Geometry {
                size,
                logical_sector,
                physical_sector: 4096,
            },
            block_size,
            kind: Kind::Dynamic,
            disk_id: Uuid::nil(),
        })
    }

    #[test]
    fn a_bitmap_entry_follows_each_chunk() {
        let five_gib = numbering(5 << 30, 32 * MIB, 512);
        assert_eq!(five_gib.blocks, 160);
        assert_eq!([127, 128].map(|block| five_gib.entry(block)), [127, 129]);
        assert_eq!(five_gib.role(128), Role::Bitmap);
        assert_eq!(five_gib.role(129), Role::Block(128));
        assert_eq!(five_gib.role(161), Role::Padding);
        assert_eq!(five_gib.bitmap(127), (128, 127 * 8192));
        assert_eq!(five_gib.bitmap(129), (257, 8192));
        assert_eq!(five_gib.entries(), 161);
        assert_eq!(five_gib.entries_with_bitmaps(), 258);
        let exactly_one_chunk = numbering(4 << 30, 32 * MIB, 512);
        assert_eq!(exactly_one_chunk.entries(), 128);
        let large_sectors = numbering(64 << 30, 256 * MIB, 4096);
        assert_eq!(large_sectors.entry(128), 129);
        let largest = numbering(64 << 40, MIB, 512);
        let bitmaps = (64 << 40) / (4 << 30);
        assert_eq!(largest.entries_with_bitmaps(), (64 << 20) + bitmaps);
    }

    #[test]
    fn only_present_blocks_have_a_location() {
        assert_eq!(Entry::present(5 * MIB).location(), Some(5 * MIB));
        assert_eq!(Entry::ZERO.location(), None);
        assert_eq!(Entry((5 * MIB) | 3).location(), None);
        assert_eq!(Entry(4).state(), None);
        assert_eq!(Entry(5).state(), None);
    }
}
