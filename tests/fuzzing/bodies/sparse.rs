//! A file of which only what is not zero is kept, so that images of many MiB can be changed and opened thousands of times
//! a second, and an input of a few KiB can be one.

use std::sync::Arc;

use understudy::{
    base::units::{to_u64, to_usize},
    storage::{
        Fua, Storage,
        memory::{MemoryStorage, Power},
    },
};

use super::plan::Plan;

/// Unit of places in an input.
const SECTOR: u64 = 512;
/// Longest file of an input. A longer one may claim a table of up to 512 MiB, rightly, and all would be slow.
pub(crate) const FILE_BYTES_MAX: u64 = 64 << 20;

/// A file's length and the runs that are not zeros.
#[derive(Clone, Debug, Default)]
pub(crate) struct Sparse {
    pub(crate) len: u64,
    runs: Vec<(u64, Vec<u8>)>,
}

impl Sparse {
    /// What is in `storage`.
    pub(crate) fn of(storage: &MemoryStorage) -> Self {
        let mut file = Self {
            len: storage.len().expect("memory has a length"),
            runs: Vec::new(),
        };
        let bytes = storage.bytes();
        for (number, sector) in (0..).zip(bytes.chunks(to_usize(SECTOR))) {
            if sector.iter().any(|&byte| byte != 0) {
                file.write(number * SECTOR, sector);
            }
        }
        file
    }

    /// The file that an input describes: its length in sectors (4 bytes), then runs until the input ends: the sector
    /// where it begins (4 bytes), bytes (2 bytes), and these bytes.
    pub(crate) fn decode(plan: &mut Plan<'_>) -> Self {
        let limit = FILE_BYTES_MAX;
        let mut file = Self {
            len: u64::from(plan.u32()) * SECTOR % (limit + 1),
            runs: Vec::new(),
        };
        while !plan.is_empty() {
            let offset = u64::from(plan.u32()) * SECTOR % limit;
            let len = usize::from(plan.u16());
            file.write(offset, plan.take(len));
        }
        file
    }

    /// The input that describes this file.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let sectors = |bytes: u64| u32::try_from(bytes / SECTOR).expect("a short file");
        let mut input = sectors(self.len).to_le_bytes().to_vec();
        for (offset, bytes) in &self.runs {
            for (number, part) in (0..).zip(bytes.chunks(32 << 10)) {
                input.extend(sectors(offset + number * (32 << 10)).to_le_bytes());
                input.extend(u16::try_from(part.len()).expect("32 KiB").to_le_bytes());
                input.extend(part);
            }
        }
        input
    }

    /// Writes over whatever is there.
    pub(crate) fn write(&mut self, offset: u64, bytes: &[u8]) {
        match self.runs.last_mut() {
            Some((start, run)) if *start + to_u64(run.len()) == offset => run.extend(bytes),
            _ => self.runs.push((offset, bytes.to_vec())),
        }
        self.len = self.len.max(offset + to_u64(bytes.len()));
    }

    /// The bytes at `offset`.
    pub(crate) fn read(&self, offset: u64, len: usize) -> Vec<u8> {
        let mut found = vec![0; len];
        let end = offset + to_u64(len);
        for (start, run) in &self.runs {
            let (from, to) = (offset.max(*start), end.min(start + to_u64(run.len())));
            if from < to {
                found[to_usize(from - offset)..to_usize(to - offset)]
                    .copy_from_slice(&run[to_usize(from - start)..to_usize(to - start)]);
            }
        }
        found
    }

    /// The file, durable, on a power supply of its own.
    pub(crate) fn storage(&self) -> (Arc<Power>, Arc<MemoryStorage>) {
        let power = Power::new();
        let storage = MemoryStorage::new(&power);
        let made = (|| {
            for (offset, run) in &self.runs {
                storage.write_at(*offset, run, Fua::No)?;
            }
            storage.set_len(self.len)?;
            storage.sync()
        })();
        made.expect("memory takes everything");
        (power, storage)
    }
}
