//! Where new blocks go: the end of the file.
//!
//! # Crash contract
//! A place handed out reads as zeros, durably, its bitmap included: before the session's first block the file is cut off
//! behind the last one, and then it grows far beyond what is needed, with a footer at its new end, by one sync for many
//! blocks. So bitmap, data and table entry of a new block may become durable in any order and in any part: a sector of
//! it is zeros, as it was while the block was absent, or what was written.
//!
//! While the file grows its end may hold no footer; the copy at the start, which nothing touches, is the one that counts
//! then.

use std::io;

use crate::{
    base::units::{BLOCK_BYTES, Extent, MIB, SECTOR_BYTES},
    storage::{Fua, Space as Keeping, Storage},
};

use super::format::{ABSENT, FOOTER_BYTES, FOOTER_LEN};

/// The file grows by this much, and by a block at least: one sync for 128 blocks of 2 MiB. Closing gives the rest back;
/// until then it is a hole.
const GROWTH_BYTES: u64 = 256 * MIB;
/// Data of blocks from this size on starts at a multiple of 4 KiB, as Windows 10 does it. With smaller ones the gaps
/// would add up to more than the table can address in the largest disk.
const ALIGNED_FROM: u64 = 2 * MIB;

/// See the module.
#[derive(Debug)]
pub(super) struct Space {
    /// One past the last byte in use; a multiple of a sector.
    end: u64,
    /// Where the footer at the end of the file starts, or the file ends; blocks end here.
    limit: u64,
    /// Whether what lies between `end` and `limit` reads as zeros, durably.
    is_clean: bool,
    footer: [u8; FOOTER_BYTES],
}

impl Space {
    /// The space of a file that is in use up to `end` and has its footer at `limit`.
    pub(super) fn new(end: u64, limit: u64, footer: &[u8; FOOTER_BYTES]) -> Self {
        Self {
            end: end.next_multiple_of(SECTOR_BYTES),
            limit,
            is_clean: false,
            footer: *footer,
        }
    }

    /// A place for a bitmap and its block, and the sector it starts at. It stays free until it is taken.
    pub(super) fn find(&mut self, bitmap: u64, block_size: u64) -> io::Result<(u64, u32)> {
        let place = if block_size < ALIGNED_FROM {
            self.end
        } else {
            (self.end + bitmap).next_multiple_of(BLOCK_BYTES) - bitmap
        };
        match u32::try_from(place / SECTOR_BYTES) {
            Ok(sector) if sector != ABSENT => Ok((place, sector)),
            _ => Err(io::ErrorKind::FileTooLarge.into()),
        }
    }

    /// Whether everything up to `end` may be handed out.
    pub(super) fn holds(&self, end: u64) -> bool {
        self.is_clean && end <= self.limit
    }

    /// Makes the file longer, so that it holds everything up to `end`. To be synced before any of it is handed out, and
    /// then told by [`Space::grown`].
    pub(super) fn grow(&mut self, storage: &dyn Storage, end: u64) -> io::Result<u64> {
        if self.is_clean {
            // The old footer becomes part of a block.
            storage.zero(Extent::new(self.limit, FOOTER_LEN), Keeping::Release)?;
        } else {
            storage.set_len(self.end)?;
            self.limit = self.end;
        }
        let limit = end
            .max(self.limit + GROWTH_BYTES)
            .next_multiple_of(BLOCK_BYTES);
        storage.write_at(limit, &self.footer, Fua::No)?;
        Ok(limit)
    }

    /// The sync after [`Space::grow`] succeeded.
    pub(super) fn grown(&mut self, limit: u64) {
        self.limit = limit;
        self.is_clean = true;
    }

    /// Takes everything up to `end`.
    pub(super) fn take(&mut self, end: u64) {
        self.end = end;
    }

    /// Makes the file end behind its last block and the footer there. To be synced. Either part may become durable
    /// alone: without a footer at its end the file still has the copy at its start.
    pub(super) fn truncate(&mut self, storage: &dyn Storage) -> io::Result<()> {
        if self.limit == self.end {
            return Ok(());
        }
        storage.write_at(self.end, &self.footer, Fua::No)?;
        storage.set_len(self.end + FOOTER_LEN)?;
        self.limit = self.end;
        self.is_clean = false;
        Ok(())
    }
}
