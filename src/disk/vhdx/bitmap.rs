//! Sector bitmaps: which sectors of a partially present block are in this file and which in the parent.
//!
//! One bitmap of 1 MiB serves a chunk of 2^23 sectors. Bit i of it, counted from the lowest bit of the first byte, stands
//! for sector i of the chunk: one is this file, zero the parent. Bitmaps are read from the file whenever they are needed
//! (the page cache holds them), so that they cost no memory: those of the largest disk are 16 GiB. Nothing here changes
//! a bit; see [`write`](super::write) for how a partially present block becomes a whole one.

use std::io;

use crate::{
    base::units::{to_u64, to_usize},
    storage::Storage,
};

/// Bytes of a bitmap that are read at once: the bits of 2^15 sectors.
const READ_BYTES: u64 = 4096;

/// Sectors of a block that are in the same file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Run {
    /// In this file, not in the parent.
    pub(super) own: bool,
    /// From the start of the block, in bytes.
    pub(super) within: u64,
    /// In bytes.
    pub(super) len: u64,
}

/// The bits of one block.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bits<'a> {
    storage: &'a dyn Storage,
    /// File offset of the byte with the block's first bit.
    offset: u64,
    sector: u64,
}

impl<'a> Bits<'a> {
    pub(super) fn new(storage: &'a dyn Storage, offset: u64, logical_sector: u32) -> Self {
        Self {
            storage,
            offset,
            sector: u64::from(logical_sector),
        }
    }

    /// The runs that bytes `within..within + len` of the block consist of, up to the first that `visit` answers with
    /// `false`. Neighbours may be in the same file: a run ends at the latest where the bits that were read end.
    pub(super) fn runs(
        &self,
        within: u64,
        len: u64,
        mut visit: impl FnMut(Run) -> io::Result<bool>,
    ) -> io::Result<()> {
        let end = within + len;
        let mut bits = Vec::new();
        let mut at = within;
        while at < end {
            let first = at / self.sector / 8;
            let stop = ((end - 1) / self.sector / 8 + 1).min(first + READ_BYTES);
            bits.resize(to_usize(stop - first), 0);
            self.storage.read_at(self.offset + first, &mut bits)?;
            let base = first * 8;
            let mut sector = at / self.sector;
            while sector < stop * 8 && at < end {
                let own = bit(&bits, sector - base);
                sector = run_end(&bits, sector - base, own) + base;
                let run_end = (sector * self.sector).min(end);
                let run = Run {
                    own,
                    within: at,
                    len: run_end - at,
                };
                at = run_end;
                if !visit(run)? {
                    return Ok(());
                }
            }
        }
        Ok(())
    }
}

fn bit(bits: &[u8], number: u64) -> bool {
    bits[to_usize(number / 8)] >> (number % 8) & 1 == 1
}

/// The first bit after `number` that is not `value`, or the end.
fn run_end(bits: &[u8], mut number: u64, value: bool) -> u64 {
    let count = to_u64(bits.len()) * 8;
    let whole = if value { 0xFF } else { 0 };
    while number < count && bit(bits, number) == value {
        let skips = number.is_multiple_of(8) && bits[to_usize(number / 8)] == whole;
        number += if skips { 8 } else { 1 };
    }
    number
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::memory::MemoryStorage;

    fn runs(bytes: &[u8], within: u64, len: u64) -> Vec<(bool, u64, u64)> {
        let storage = MemoryStorage::with_bytes(bytes);
        let mut found = Vec::new();
        Bits::new(storage.as_ref(), 2, 512)
            .runs(within, len, |run| {
                found.push((run.own, run.within, run.len));
                Ok(true)
            })
            .unwrap();
        found
    }

    #[test]
    fn the_lowest_bit_is_the_first_sector() {
        let bytes = [9, 9, 0b0000_0001, 0xFF, 0b1000_0000];
        assert_eq!(
            runs(&bytes, 0, 24 * 512),
            [
                (true, 0, 512),
                (false, 512, 7 * 512),
                (true, 8 * 512, 8 * 512),
                (false, 16 * 512, 7 * 512),
                (true, 23 * 512, 512),
            ]
        );
        assert_eq!(runs(&bytes, 100, 500), [(true, 100, 412), (false, 512, 88)]);
        assert_eq!(runs(&bytes, 9 * 512, 100), [(true, 9 * 512, 100)]);
    }

    #[test]
    fn long_bitmaps_are_read_in_pieces() {
        let mut bytes = vec![0xFF; 10_002];
        bytes[2 + 9000] = 0;
        let found = runs(&bytes, 0, 80_000 * 512);
        let own: u64 = found.iter().filter(|run| run.0).map(|run| run.2).sum();
        assert_eq!(own, (80_000 - 8) * 512);
        assert!(found.contains(&(false, 72_000 * 512, 8 * 512)));
        assert_eq!(found.len(), 5, "two ends of what was read, and the gap");
    }
}
