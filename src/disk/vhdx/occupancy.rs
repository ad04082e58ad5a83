//! Which MiB of the file are taken: the check that nothing overlaps, and where the gaps are.

use crate::base::units::{Extent, MIB, to_u64, to_usize};

use super::format::FILE_BYTES_MAX;

/// Most gaps that are told, 8 bytes each. A file of nothing but gaps, up to 256 TiB, takes no space on its host and would
/// have 2^28 of them; what is not told stays unused until the file is opened again.
const GAPS_MAX: usize = 1 << 20;

/// One bit for each MiB of the file up to the last one taken: at most 32 MiB of memory.
#[derive(Debug)]
pub(super) struct Occupancy {
    file_len: u64,
    bits: Vec<u64>,
    /// One past the last MiB taken.
    end: u64,
}

impl Occupancy {
    /// A file of `file_len` bytes, of which the first MiB holds the headers.
    pub(super) fn new(file_len: u64) -> Self {
        let mut taken = Self {
            file_len,
            bits: Vec::new(),
            end: 0,
        };
        taken.mark(0..1).expect("nothing was taken before");
        taken
    }

    /// Takes the space of the log or of a region, which must lie inside the file.
    pub(super) fn take(&mut self, run: Extent) -> Result<(), String> {
        self.check(run, self.file_len)?;
        self.mark(run.offset / MIB..run.end() / MIB)
    }

    /// Takes the space of a block. The disk's last one may reach past the end of the file, as in the fixed images of
    /// qemu, as long as it starts inside.
    pub(super) fn take_block(&mut self, run: Extent, last: bool) -> Result<(), String> {
        let past = if last { run.len - 1 } else { 0 };
        self.check(run, self.file_len.saturating_add(past))?;
        self.mark(run.offset / MIB..run.end() / MIB)
    }

    /// One past the last byte that is taken.
    pub(super) fn end(&self) -> u64 {
        self.end * MIB
    }

    /// Whether a block could have this place if nothing else had it.
    pub(super) fn holds(&self, run: Extent, last: bool) -> bool {
        let past = if last { run.len - 1 } else { 0 };
        self.check(run, self.file_len.saturating_add(past)).is_ok()
    }

    /// How many bytes before [`end`](Self::end) nothing has taken, and where the first of them is.
    pub(super) fn unused(&self) -> (u64, Option<u64>) {
        let mut free = (0..self.end)
            .filter(|&unit| !self.is_taken(unit))
            .peekable();
        let first = free.peek().map(|unit| unit * MIB);
        (to_u64(free.count()) * MIB, first)
    }

    /// Places for blocks of `block_size` in the gaps between what is taken: the first of them, at most [`GAPS_MAX`].
    pub(super) fn gaps(&self, block_size: u64) -> Vec<u64> {
        let wanted = block_size / MIB;
        let mut found = Vec::new();
        let mut free = 0;
        for unit in 0..self.end {
            free = if self.is_taken(unit) { 0 } else { free + 1 };
            if free == wanted {
                found.push((unit + 1 - wanted) * MIB);
                if found.len() == GAPS_MAX {
                    break;
                }
                free = 0;
            }
        }
        found
    }

    fn check(&self, run: Extent, limit: u64) -> Result<(), String> {
        let Extent { offset, len } = run;
        match run.checked_end() {
            _ if offset < MIB => Err(format!("{len} bytes at {offset:#x} lie over the headers")),
            Some(end) if end <= limit.min(FILE_BYTES_MAX) => Ok(()),
            _ => Err(format!(
                "{len} bytes at {offset:#x} reach past the end of the file at {:#x}",
                self.file_len
            )),
        }
    }

    fn mark(&mut self, units: std::ops::Range<u64>) -> Result<(), String> {
        if let Some(twice) = units.clone().find(|&unit| self.is_taken(unit)) {
            return Err(format!(
                "the space at {:#x} belongs to something else",
                twice * MIB
            ));
        }
        let words = to_usize(units.end.div_ceil(64));
        if self.bits.len() < words {
            self.bits.resize(words, 0);
        }
        self.end = self.end.max(units.end);
        for unit in units {
            self.bits[to_usize(unit / 64)] |= 1 << (unit % 64);
        }
        Ok(())
    }

    fn is_taken(&self, unit: u64) -> bool {
        let word = unit / 64;
        word < to_u64(self.bits.len()) && self.bits[to_usize(word)] >> (unit % 64) & 1 == 1
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(offset_mib: u64, len_mib: u64) -> Extent {
        Extent::new(offset_mib * MIB, len_mib * MIB)
    }

    #[test]
    fn space_is_taken_once_and_inside_the_file() {
        let mut taken = Occupancy::new(100 * MIB);
        taken.take(run(1, 1)).unwrap();
        taken.take(run(64, 32)).unwrap();
        for bad in [
            run(0, 1),
            run(1, 1),
            run(63, 2),
            run(95, 2),
            run(60, 40),
            run(99, 2),
        ] {
            taken.take(bad).unwrap_err();
        }
        taken.take(Extent::new(!(MIB - 1), MIB)).unwrap_err();
        taken.take_block(run(99, 2), false).unwrap_err();
        taken.take_block(run(100, 2), true).unwrap_err();
        taken.take_block(run(99, 2), true).unwrap();
        assert_eq!(taken.end(), 101 * MIB);
    }

    #[test]
    fn gaps_are_found_between_what_is_taken() {
        let mut taken = Occupancy::new(100 * MIB);
        taken.take(run(1, 2)).unwrap();
        taken.take(run(10, 1)).unwrap();
        assert_eq!(taken.gaps(4 * MIB), [3 * MIB]);
        assert_eq!(taken.gaps(8 * MIB), Vec::<u64>::new());
    }

    /// A block at the end of a long file without content made a list of 2 GiB.
    #[test]
    fn gaps_of_a_hostile_file_are_bounded() {
        let mut taken = Occupancy::new(FILE_BYTES_MAX);
        taken
            .take_block(Extent::new(FILE_BYTES_MAX - MIB, MIB), false)
            .unwrap();
        let gaps = taken.gaps(MIB);
        assert_eq!(gaps.len(), GAPS_MAX);
        assert_eq!(gaps[0], MIB);
    }
}
