//! Quantities that must not be mixed up, and the only integer conversions of the program.
//!
//! Byte offsets and byte lengths are `u64`; everything that is counted in something else has a type of its own:
//! [`Epoch`], [`Block`], [`DiskIndex`].

use std::{fmt, ops::Range};

/// 1024 bytes.
pub const KIB: u64 = 1024;
/// 1024 KiB.
pub const MIB: u64 = 1024 * KIB;
/// 1024 MiB.
pub const GIB: u64 = 1024 * MIB;
/// 1024 GiB.
pub const TIB: u64 = 1024 * GIB;

/// Bytes of a sector, the smallest unit a guest addresses.
pub const SECTOR_BYTES: u64 = 512;
/// Bytes of a [`Block`], the unit of tracking.
pub const BLOCK_BYTES: u64 = 4 * KIB;
/// Bytes of a region, the unit of the intent log.
pub const REGION_BYTES: u64 = MIB;
/// Blocks of a region.
pub const BLOCKS_PER_REGION: u64 = REGION_BYTES / BLOCK_BYTES;

const _: () = assert!(
    usize::BITS == 64,
    "byte offsets are indexed with usize: a 64-bit host is required"
);

/// A `u64` as an index. Lossless on every host this program builds for.
#[expect(
    clippy::cast_possible_truncation,
    reason = "usize is 64 bits wide, asserted above"
)]
pub const fn to_usize(value: u64) -> usize {
    value as usize
}

/// A length or index as `u64`. Lossless.
pub const fn to_u64(value: usize) -> u64 {
    value as u64
}

/// The epoch a change belongs to: all changes between one cut and the one before. Epoch 0 is the initial copy.
#[derive(
    Clone,
    Copy,
    Debug,
    Default,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Hash,
    serde::Serialize,
    serde::Deserialize,
)]
#[serde(transparent)]
pub struct Epoch(pub u64);

impl Epoch {
    /// The initial copy.
    pub const INITIAL: Self = Self(0);

    /// The epoch after this one.
    #[must_use]
    pub fn next(self) -> Self {
        Self(
            self.0
                .checked_add(1)
                .expect("2^64 epochs outlast the hardware"),
        )
    }
}

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The position of a disk in its machine's disk table.
#[derive(
    Clone,
    Copy,
    Debug,
    Default,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Hash,
    serde::Serialize,
    serde::Deserialize,
)]
#[serde(transparent)]
pub struct DiskIndex(pub u16);

impl DiskIndex {
    /// As an index into a slice of disks.
    pub fn index(self) -> usize {
        usize::from(self.0)
    }
}

impl fmt::Display for DiskIndex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The index of a 4 KiB block of a disk: the unit of tracking.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Block(pub u64);

impl Block {
    /// Byte offset of the block's first byte.
    pub const fn offset(self) -> u64 {
        self.0 * BLOCK_BYTES
    }
}

/// A run of bytes of a disk or a file: `offset..offset + len`.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize,
)]
pub struct Extent {
    /// First byte.
    pub offset: u64,
    /// Number of bytes.
    pub len: u64,
}

impl Extent {
    /// The run of `len` bytes from `offset`.
    pub const fn new(offset: u64, len: u64) -> Self {
        Self { offset, len }
    }

    /// One past the last byte.
    ///
    /// # Panics
    /// If the run does not fit 64 bits; use [`Extent::checked_end`] on numbers that come from outside.
    pub const fn end(self) -> u64 {
        self.offset + self.len
    }

    /// Whether they share a byte. Ends past 64 bits count as the last byte.
    pub const fn overlaps(self, other: Self) -> bool {
        let (end, other_end) = (
            self.offset.saturating_add(self.len),
            other.offset.saturating_add(other.len),
        );
        self.offset < other_end && other.offset < end
    }

    /// One past the last byte, or nothing if that does not fit 64 bits.
    pub const fn checked_end(self) -> Option<u64> {
        self.offset.checked_add(self.len)
    }

    /// Indices of the blocks that the run touches.
    pub fn blocks(self) -> Range<u64> {
        let start = self.offset / BLOCK_BYTES;
        if self.len == 0 {
            start..start
        } else {
            start..self.end().div_ceil(BLOCK_BYTES)
        }
    }

    /// Indices of the regions that the run touches.
    pub fn regions(self) -> Range<u64> {
        let start = self.offset / REGION_BYTES;
        if self.len == 0 {
            start..start
        } else {
            start..self.end().div_ceil(REGION_BYTES)
        }
    }
}

/// Shows a byte count with a binary unit and three digits, as `4.00 KiB`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bytes(pub u64);

impl fmt::Display for Bytes {
    #[expect(clippy::cast_precision_loss, reason = "three digits are shown")]
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const UNITS: [&str; 5] = ["KiB", "MiB", "GiB", "TiB", "PiB"];
        if self.0 < KIB {
            return f.pad(&format!("{} B", self.0));
        }
        let mut value = self.0 as f64 / KIB as f64;
        let mut unit = 0;
        while value >= 1023.5 && unit + 1 < UNITS.len() {
            value /= KIB as f64;
            unit += 1;
        }
        let digits = if value < 9.995 {
            2
        } else {
            usize::from(value < 99.95)
        };
        f.pad(&format!("{value:.digits$} {}", UNITS[unit]))
    }
}

/// Reads `512`, `64K`, `20M`, `100G`, `2T`: powers of 1024.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let wrong = || format!("{text:?} is not a size: use a number with K, M, G or T");
    let digits = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    let number: u64 = text[..digits].parse().map_err(|_| wrong())?;
    let unit = match text[digits..]
        .to_ascii_uppercase()
        .trim_end_matches("IB")
        .trim_end_matches('B')
    {
        "" => 1,
        "K" => KIB,
        "M" => MIB,
        "G" => GIB,
        "T" => TIB,
        _ => return Err(wrong()),
    };
    number.checked_mul(unit).ok_or_else(wrong)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn extents_name_the_blocks_and_regions_they_touch() {
        assert_eq!(Extent::new(0, 0).blocks(), 0..0);
        assert_eq!(Extent::new(4095, 2).blocks(), 0..2);
        assert_eq!(Extent::new(4096, 4096).blocks(), 1..2);
        assert_eq!(Extent::new(5000, 0).blocks(), 1..1);
        assert_eq!(Extent::new(MIB - 1, 2).regions(), 0..2);
        assert_eq!(Extent::new(u64::MAX, 1).checked_end(), None);
    }

    #[test]
    fn byte_counts_read_well() {
        let shown = |n| Bytes(n).to_string();
        assert_eq!(shown(0), "0 B");
        assert_eq!(shown(4096), "4.00 KiB");
        assert_eq!(shown(12 * MIB + MIB / 2), "12.5 MiB");
        assert_eq!(shown(MIB - 1), "1.00 MiB");
        assert_eq!(shown(640 * GIB), "640 GiB");
    }

    #[test]
    fn sizes_are_powers_of_1024() {
        assert_eq!(parse_size("512"), Ok(512));
        assert_eq!(parse_size("20M"), Ok(20 * MIB));
        assert_eq!(parse_size("2TiB"), Ok(2 * TIB));
        for bad in ["", "G", "1.5G", "-1", "1X", "99999999999T"] {
            assert!(parse_size(bad).is_err(), "{bad}");
        }
    }
}
