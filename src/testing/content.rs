//! What disks hold, as the oracle knows it: for each sector the number of the write that put it there.
//!
//! A sector's bytes are one word of 8 bytes, 64 times: disk and sector in the upper half, the number of the write in the
//! lower one. So a sector that is torn, stale, or of another place is told from a right one, and a whole disk is compared
//! as a list of numbers. Zeros are the number 0.

use std::sync::Arc;

use crate::{
    base::units::{Extent, SECTOR_BYTES, to_u64, to_usize},
    disk::{Content, Disk},
};

/// Bytes of the simulated disks: more than one region, ends that are no block's.
pub(super) const SIZES: [u64; 2] = [(2 << 20) + 2560, (1 << 20) + 512];

/// The number of a sector that holds what nobody wrote there.
const DAMAGED: u32 = u32::MAX;
const SECTOR: usize = to_usize(SECTOR_BYTES);
const WORD: usize = 8;

/// The number of the write in each sector of each disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Contents(pub(super) Vec<Vec<u32>>);

impl Contents {
    /// Disks of which nothing was written.
    pub(super) fn blank(disks: usize) -> Self {
        let sectors = SIZES.map(|size| vec![0; to_usize(size / SECTOR_BYTES)]);
        Self(sectors.into_iter().take(disks).collect())
    }

    /// Write `number` went to `run` of a disk.
    pub(super) fn write(&mut self, disk: usize, run: Extent, number: u32) {
        let sectors = to_usize(run.offset / SECTOR_BYTES)..to_usize(run.end() / SECTOR_BYTES);
        self.0[disk][sectors].fill(number);
    }

    /// What the disks read as.
    pub(super) fn read(disks: &[Arc<dyn Disk>]) -> Result<Self, String> {
        Self::read_as(disks, decode)
    }

    /// The same, right or wrong.
    pub(super) fn look(disks: &[Arc<dyn Disk>]) -> Result<Self, String> {
        Self::read_as(disks, |disk, sector, bytes| {
            Ok(decode(disk, sector, bytes).unwrap_or(DAMAGED))
        })
    }

    fn read_as(
        disks: &[Arc<dyn Disk>],
        decode: impl Fn(usize, u64, &[u8]) -> Result<u32, String>,
    ) -> Result<Self, String> {
        let mut contents = Self::blank(disks.len());
        let mut buf = Vec::new();
        for (number, disk) in disks.iter().enumerate() {
            let size = SIZES[number];
            let mut offset = 0;
            while offset < size {
                let (run, kind) = disk.run_at(offset).map_err(|error| error.to_string())?;
                if kind == Content::Data {
                    let end = run.end().next_multiple_of(SECTOR_BYTES).min(size);
                    buf.resize(to_usize(end - offset), 0);
                    disk.read_at(offset, &mut buf)
                        .map_err(|error| error.to_string())?;
                    let first = offset / SECTOR_BYTES;
                    for (sector, bytes) in (first..).zip(buf.chunks_exact(SECTOR)) {
                        contents.0[number][to_usize(sector)] = decode(number, sector, bytes)?;
                    }
                    offset = end;
                } else {
                    // What is said to be zero is not read: where it is wrong, the number expected is not 0.
                    offset = (run.end() / SECTOR_BYTES * SECTOR_BYTES).max(offset + SECTOR_BYTES);
                }
            }
        }
        Ok(contents)
    }

    /// The places where the two differ: (disk, sector).
    pub(super) fn all_differences(&self, other: &Self) -> impl Iterator<Item = (usize, usize)> {
        let disks = self.0.iter().zip(&other.0).enumerate();
        disks.flat_map(|(disk, (one, two))| {
            let pairs = one.iter().zip(two).enumerate();
            pairs.filter_map(move |(sector, (a, b))| (a != b).then_some((disk, sector)))
        })
    }

    /// The first few of them: (disk, sector, here, there).
    pub(super) fn differences(&self, other: &Self) -> Vec<(usize, usize, u32, u32)> {
        let first = self.all_differences(other).take(8);
        let shown = first.map(|(disk, at)| (disk, at, self.0[disk][at], other.0[disk][at]));
        shown.collect()
    }
}

fn word(disk: usize, sector: u64, number: u32) -> u64 {
    if number == 0 {
        return 0;
    }
    (to_u64(disk + 1) << 56) | (sector << 32) | u64::from(number)
}

/// The bytes that write `number` puts into `run` of a disk.
pub(super) fn encode(disk: usize, run: Extent, number: u32) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(to_usize(run.len));
    for sector in run.offset / SECTOR_BYTES..run.end() / SECTOR_BYTES {
        let word = word(disk, sector, number).to_le_bytes();
        for _ in 0..SECTOR / WORD {
            bytes.extend_from_slice(&word);
        }
    }
    bytes
}

fn decode(disk: usize, sector: u64, bytes: &[u8]) -> Result<u32, String> {
    let (first, rest) = bytes.split_at(WORD);
    let found = u64::from_le_bytes(first.try_into().expect("a word has eight bytes"));
    let number = u32::try_from(found & u64::from(u32::MAX)).expect("it was masked");
    let whole = rest.chunks_exact(WORD).all(|other| other == first);
    if whole && found == word(disk, sector, number) {
        return Ok(number);
    }
    Err(format!(
        "sector {sector} of disk {disk} holds what nobody wrote there: {found:#018x}, {}",
        if whole { "whole" } else { "torn" }
    ))
}
