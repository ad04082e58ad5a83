//! What a guest was told, and what may be found: numbered writes, one after the other, over all disks of a machine.
//!
//! A guest has one write under way at a time. So whatever a machine shows, at any cut on any host, is a *prefix* of what
//! it wrote: all of it up to some write, that one in whole or in part, and nothing later. A block says its own place and
//! the number of its last write, all over; a number is never used twice, not even after a failover that lost some.

use std::{fs::File, io, os::unix::fs::FileExt, path::PathBuf};

use nix::fcntl::OFlag;
use understudy::testing::Random;

use crate::support::{Aligned, BLOCK, open_direct};

/// Longest write, in blocks.
const RUN_MAX: u64 = 16;
/// Blocks that are read at once.
const READ_BLOCKS: usize = 256;
/// Wrong blocks that are named.
const NAMED: usize = 6;

/// A write that was begun.
#[derive(Clone, Debug)]
struct Write {
    serial: u64,
    disk: usize,
    first: u64,
    /// Which of its blocks it wrote, from the first one on.
    blocks: u32,
    /// Whether that is known: it was answered, or the disk was read since.
    known: bool,
}

impl Write {
    fn covered(&self) -> impl Iterator<Item = usize> + '_ {
        let first = usize::try_from(self.first).unwrap();
        (0..32)
            .filter(|bit| self.blocks >> bit & 1 == 1)
            .map(move |bit| first + bit)
    }
}

/// The number of the last write in each block of each disk.
type Contents = Vec<Vec<u64>>;

/// The prefix that a view shows.
#[derive(Clone, Copy, Debug)]
pub(super) struct Seen {
    /// The last write of it.
    pub(super) last: u64,
    /// Which of its blocks.
    blocks: u32,
}

/// The history of one machine.
#[derive(Clone, Debug)]
pub(super) struct History {
    machine: u64,
    base: Contents,
    base_last: u64,
    writes: Vec<Write>,
    serial: u64,
    random: Random,
}

impl History {
    /// A machine with empty disks of these numbers of blocks.
    pub(super) fn new(machine: u64, blocks: &[u64], seed: u64) -> Self {
        let empty = |&blocks| vec![0; usize::try_from(blocks).unwrap()];
        Self {
            machine,
            base: blocks.iter().map(empty).collect(),
            base_last: 0,
            writes: Vec::new(),
            serial: 0,
            random: Random::new(seed),
        }
    }

    /// The last write that was begun.
    pub(super) fn last(&self) -> u64 {
        self.serial
    }

    /// Numbers go on after those of another future of the same machine.
    pub(super) fn continue_after(&mut self, other: &Self) {
        self.serial = self.serial.max(other.serial);
    }

    /// Writes one run of blocks somewhere.
    pub(super) fn write(&mut self, disks: &[File]) -> io::Result<u64> {
        assert!(self.writes.iter().all(|write| write.known), "settled first");
        let disk = self.random.index(disks.len());
        let count = self.random.between(1, RUN_MAX);
        let blocks = u64::try_from(self.base[disk].len()).unwrap();
        // Half of the writes go to an eighth of the disk: blocks that are written again and again.
        let range = if self.random.percent(50) {
            blocks / 8
        } else {
            blocks
        };
        let first = self.random.below(range - count + 1);
        self.serial += 1;
        let mut bytes = Aligned::new(usize::try_from(count).unwrap() * BLOCK);
        for (block, bytes) in (first..).zip(bytes.get_mut().chunks_mut(BLOCK)) {
            fill(bytes, self.place(disk, block), self.serial);
        }
        self.writes.push(Write {
            serial: self.serial,
            disk,
            first,
            blocks: (1 << count) - 1,
            known: false,
        });
        disks[disk].write_all_at(bytes.get(), first * u64::try_from(BLOCK).unwrap())?;
        self.writes.last_mut().expect("pushed above").known = true;
        Ok(self.serial)
    }

    /// Whether it is time for a flush.
    pub(super) fn flushes(&mut self) -> bool {
        self.random.percent(5)
    }

    fn place(&self, disk: usize, block: u64) -> u64 {
        self.machine << 56 | u64::try_from(disk).unwrap() << 48 | block
    }

    /// Reads the machine where it runs: everything that was answered is there. Of a write that was not, what is found is
    /// known from now on.
    pub(super) fn settle(&mut self, disks: &[File]) -> io::Result<Result<(), String>> {
        let found = match self.read(disks)? {
            Ok(found) => found,
            Err(wrong) => return Ok(Err(wrong)),
        };
        let unknown = self.writes.iter_mut().find(|write| !write.known);
        if let Some(write) = unknown {
            let first = usize::try_from(write.first).unwrap();
            let there = |bit: &usize| found[write.disk].get(first + bit) == Some(&write.serial);
            let blocks = (0..32)
                .filter(there)
                .fold(0, |blocks, bit| blocks | 1 << bit);
            write.blocks &= blocks;
            write.known = true;
        }
        Ok(compare(&found, &self.at(self.serial)))
    }

    /// Which prefix a view of all disks shows.
    pub(super) fn seen(&self, disks: &[PathBuf]) -> Result<Seen, String> {
        let open = |path: &PathBuf| {
            let opened = open_direct(path, OFlag::empty());
            opened.map_err(|error| format!("{}: {error}", path.display()))
        };
        let files = disks.iter().map(open).collect::<Result<Vec<_>, _>>()?;
        let found = self.read(&files).map_err(|error| error.to_string())??;
        let last = found.iter().flatten().copied().max().unwrap_or_default();
        if last <= self.base_last {
            compare(&found, &self.base)?;
            return Ok(Seen { last, blocks: 0 });
        }
        let Some(write) = self.writes.iter().find(|write| write.serial == last) else {
            return Err(format!("write {last} is not of this history"));
        };
        let mut wanted = self.at(last - 1);
        let mut blocks = 0;
        let first = usize::try_from(write.first).unwrap();
        for block in write.covered() {
            if found[write.disk][block] == last {
                wanted[write.disk][block] = last;
                blocks |= 1 << (block - first);
            }
        }
        compare(&found, &wanted)?;
        Ok(Seen { last, blocks })
    }

    /// Whether a view holds a write and everything before it.
    pub(super) fn holds(&self, seen: Seen, serial: u64) -> bool {
        let there = |write: &Write| {
            let whole = write.serial == seen.last && write.blocks == seen.blocks;
            // A write that failed may have left no trace.
            write.serial < seen.last || whole || write.blocks == 0
        };
        self.writes
            .iter()
            .take_while(|write| write.serial <= serial)
            .all(there)
    }

    /// The machine goes on from there: what came later is lost.
    pub(super) fn roll_back(&mut self, seen: Seen) {
        self.writes.retain(|write| write.serial <= seen.last);
        if let Some(write) = self
            .writes
            .last_mut()
            .filter(|write| write.serial == seen.last)
        {
            write.blocks = seen.blocks;
            write.known = true;
        }
    }

    /// Nobody asks for an earlier point any more.
    pub(super) fn fold(&mut self) {
        self.base = self.at(self.serial);
        self.base_last = self.serial;
        self.writes.clear();
    }

    /// What all disks held after a write.
    fn at(&self, serial: u64) -> Contents {
        let mut contents = self.base.clone();
        for write in self
            .writes
            .iter()
            .take_while(|write| write.serial <= serial)
        {
            for block in write.covered() {
                contents[write.disk][block] = write.serial;
            }
        }
        contents
    }

    fn read(&self, disks: &[File]) -> io::Result<Result<Contents, String>> {
        let mut contents = Vec::new();
        let mut buffer = Aligned::new(READ_BLOCKS * BLOCK);
        let mut wanted = vec![0; BLOCK];
        for (disk, (file, base)) in disks.iter().zip(&self.base).enumerate() {
            let mut serials = Vec::with_capacity(base.len());
            while serials.len() < base.len() {
                let start = serials.len();
                let bytes = &mut buffer.get_mut()[..READ_BLOCKS.min(base.len() - start) * BLOCK];
                file.read_exact_at(bytes, u64::try_from(start * BLOCK).unwrap())?;
                for (block, bytes) in (start..).zip(bytes.chunks(BLOCK)) {
                    let serial = u64::from_le_bytes(bytes[8..16].try_into().unwrap());
                    fill(
                        &mut wanted,
                        self.place(disk, u64::try_from(block).unwrap()),
                        serial,
                    );
                    if *bytes != wanted[..] {
                        let head = &bytes[..32];
                        let text = format!("disk {disk} block {block} is not whole: {head:02x?}");
                        return Ok(Err(text));
                    }
                    serials.push(serial);
                }
            }
            contents.push(serials);
        }
        Ok(Ok(contents))
    }
}

fn compare(found: &Contents, wanted: &Contents) -> Result<(), String> {
    let mut wrong = Vec::new();
    for (disk, (found, wanted)) in found.iter().zip(wanted).enumerate() {
        let differing = (0..wanted.len()).filter(|&block| found[block] != wanted[block]);
        wrong.extend(differing.map(|block| (disk, block, found[block], wanted[block])));
    }
    if wrong.is_empty() {
        return Ok(());
    }
    let named: Vec<_> = wrong.iter().take(NAMED).collect();
    Err(format!(
        "{} blocks are wrong (disk, block, write found, write expected): {named:?}",
        wrong.len()
    ))
}

/// The content of a place after a write; zeros if there was none.
fn fill(bytes: &mut [u8], place: u64, serial: u64) {
    if serial == 0 {
        bytes.fill(0);
        return;
    }
    let pattern = serial.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ place;
    for word in bytes.chunks_mut(8) {
        word.copy_from_slice(&pattern.to_le_bytes());
    }
    bytes[..8].copy_from_slice(&place.to_le_bytes());
    bytes[8..16].copy_from_slice(&serial.to_le_bytes());
}
