//! Entries of the block allocation table, and how they are numbered.

use crate::base::units::MIB;

use super::{Kind, format::PAGE_BYTES, metadata::Parameters};

pub(super) const ENTRY_BYTES: u64 = 8;
pub(super) const ENTRIES_PER_PAGE: u64 = PAGE_BYTES / ENTRY_BYTES;
const SECTORS_PER_CHUNK: u64 = 1 << 23;
const STATE_MASK: u64 = 0b111;
const OFFSET_MASK: u64 = !(MIB - 1);

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
pub(super) struct Entry(pub(super) u64);

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

    /// The state as a number.
    pub(super) fn state_bits(self) -> u64 {
        self.0 & STATE_MASK
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
    pub(super) chunk_ratio: u64,
    /// There is a parent, and bitmaps with it.
    pub(super) has_parent: bool,
}

impl Numbering {
    pub(super) fn new(parameters: &Parameters) -> Self {
        Self::of_size(parameters, parameters.geometry.size)
    }

    /// The numbering if the disk had `size` bytes: that of the blocks it has stays.
    pub(super) fn of_size(parameters: &Parameters, size: u64) -> Self {
        let chunk = SECTORS_PER_CHUNK * u64::from(parameters.geometry.logical_sector);
        Self {
            blocks: size.div_ceil(parameters.block_size),
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

    /// Bytes of the entries in use.
    pub(super) fn entries_len(self) -> u64 {
        self.entries() * ENTRY_BYTES
    }

    /// Bytes of a new table's region: there is room for sector bitmaps too, so that the disk can get a parent later.
    pub(super) fn region_len(self) -> u64 {
        (self.entries_with_bitmaps() * ENTRY_BYTES).next_multiple_of(MIB)
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
