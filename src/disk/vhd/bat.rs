//! The block allocation table: where each block of the disk is in the file.
//!
//! The whole table is in memory, one atomic word for each block, so that finding a block on the hot path takes one load
//! and no lock. It is read in bulk at open, because the check that no two blocks share space needs every entry anyway:
//! 4 bytes for each block of the disk, at most 16 MiB, never what the file claims beyond that.
//!
//! A second bit of knowledge about each block is gathered as it is met: whether every bit of its bitmap is set. Then
//! nobody looks at the bitmap again; bits that are set stay so.

use std::{
    fmt,
    sync::atomic::{AtomicU32, AtomicU64, Ordering},
};

use crate::{
    base::units::{Extent, SECTOR_BYTES, to_u64, to_usize},
    storage::Storage,
};

use super::{
    error::OpenError,
    format::{ABSENT, bitmap_bytes},
    header::{Checked, overlap},
};

const ENTRY_BYTES: u64 = 4;
/// Bytes of the table read at once.
const READ_BYTES: u64 = 1024 * 1024;

/// The table.
pub(super) struct Bat {
    entries: Vec<AtomicU32>,
    /// One bit for each block: its bitmap is known to be all ones.
    full: Vec<AtomicU64>,
    /// File offset of the first entry.
    offset: u64,
    /// Bytes of a block.
    pub(super) block_size: u64,
    /// Bytes of the bitmap in front of it.
    pub(super) bitmap: u64,
}

/// Where blocks may not be.
#[derive(Clone, Debug)]
pub(super) struct Taken {
    /// Footer copy, header, table and locators.
    pub(super) structures: Vec<(&'static str, Extent)>,
    /// Where the footer at the end starts, or the file ends.
    pub(super) limit: u64,
}

/// What is wrong with an entry.
#[derive(Clone, Copy, Debug)]
pub(super) struct Fault {
    /// File offset of the entry.
    pub(super) offset: u64,
    block: u64,
    place: u64,
    kind: FaultKind,
}

#[derive(Clone, Copy, Debug)]
enum FaultKind {
    Over(&'static str),
    OverBlock(u64),
    PastEnd(u64),
}

impl Bat {
    /// Reads the entries of a disk of `size` bytes. Nothing is said of where they lead: see [`Bat::faults`].
    pub(super) fn read(
        storage: &dyn Storage,
        header: &Checked,
        size: u64,
    ) -> Result<Self, OpenError> {
        let block_size = u64::from(header.header.block_size);
        let blocks = size.div_ceil(block_size);
        let offset = header.header.bat_offset;
        let mut entries = Vec::with_capacity(to_usize(blocks));
        let mut buf = Vec::new();
        let end = offset + blocks * ENTRY_BYTES;
        let mut at = offset;
        while at < end {
            buf.resize(to_usize((end - at).min(READ_BYTES)), 0);
            storage
                .read_at(at, &mut buf)
                .map_err(OpenError::reading("BAT", at))?;
            let words = buf.as_chunks().0.iter();
            entries.extend(words.map(|&word| AtomicU32::new(u32::from_be_bytes(word))));
            at += to_u64(buf.len());
        }
        Ok(Self {
            full: (0..blocks.div_ceil(64))
                .map(|_| AtomicU64::new(0))
                .collect(),
            entries,
            offset,
            block_size,
            bitmap: bitmap_bytes(block_size),
        })
    }

    /// Blocks of the disk, the last one perhaps short.
    pub(super) fn blocks(&self) -> u64 {
        to_u64(self.entries.len())
    }

    /// Where the bitmap of `block` is, if it is in the file; the block follows it.
    pub(super) fn place(&self, block: u64) -> Option<u64> {
        match self.entries[to_usize(block)].load(Ordering::Acquire) {
            ABSENT => None,
            sector => Some(u64::from(sector) * SECTOR_BYTES),
        }
    }

    /// Bytes from one bitmap to the end of its block.
    pub(super) fn stride(&self) -> u64 {
        self.bitmap + self.block_size
    }

    /// Publishes the place of `block`, whose bitmap is all ones.
    pub(super) fn publish(&self, block: u64, sector: u32) {
        self.set_full(block);
        self.entries[to_usize(block)].store(sector, Ordering::Release);
    }

    /// File offset of the entry of `block`.
    pub(super) fn entry_offset(&self, block: u64) -> u64 {
        self.offset + block * ENTRY_BYTES
    }

    /// Whether the bitmap of `block` is known to be all ones.
    pub(super) fn is_full(&self, block: u64) -> bool {
        self.full[to_usize(block / 64)].load(Ordering::Acquire) >> (block % 64) & 1 == 1
    }

    /// The bitmap of `block` is all ones.
    pub(super) fn set_full(&self, block: u64) {
        self.full[to_usize(block / 64)].fetch_or(1 << (block % 64), Ordering::AcqRel);
    }

    /// Blocks in the file, with the places of their bitmaps.
    pub(super) fn present(&self) -> impl Iterator<Item = (u64, u64)> {
        (0..self.blocks()).filter_map(|block| Some((block, self.place(block)?)))
    }

    /// One past the last byte that a block takes, or 0.
    pub(super) fn end(&self) -> u64 {
        let places = self.present().map(|(_, place)| place + self.stride());
        places.max().unwrap_or(0)
    }

    /// Tells every entry whose block lies over something else or past the end of the file, until `note` says no more.
    pub(super) fn faults(&self, taken: &Taken, note: &mut dyn FnMut(Fault) -> bool) {
        let fault = |block: u64, place, kind| Fault {
            offset: self.entry_offset(block),
            block,
            place,
            kind,
        };
        let mut places: Vec<(u64, u64)> = Vec::new();
        for (block, place) in self.present() {
            let run = Extent::new(place, self.stride());
            let over = taken
                .structures
                .iter()
                .find(|(_, other)| overlap(run, *other));
            let kind = match over {
                Some((part, _)) => FaultKind::Over(part),
                None if run.end() > taken.limit => FaultKind::PastEnd(taken.limit),
                None => {
                    places.push((place, block));
                    continue;
                }
            };
            if !note(fault(block, place, kind)) {
                return;
            }
        }
        places.sort_unstable();
        for pair in places.windows(2) {
            let [(before, other), (place, block)] = [pair[0], pair[1]];
            if before + self.stride() > place
                && !note(fault(block, place, FaultKind::OverBlock(other)))
            {
                return;
            }
        }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { block, place, .. } = self;
        write!(f, "block {block} at {place:#x} ")?;
        match self.kind {
            FaultKind::Over(part) => write!(f, "lies over the {part}"),
            FaultKind::OverBlock(other) => write!(f, "lies over block {other}"),
            FaultKind::PastEnd(limit) => {
                write!(f, "reaches past the end of the file's data at {limit:#x}")
            }
        }
    }
}

impl fmt::Debug for Bat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Bat")
            .field("blocks", &self.blocks())
            .field("offset", &self.offset)
            .field("block_size", &self.block_size)
            .finish_non_exhaustive()
    }
}
