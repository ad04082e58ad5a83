//! What a disk may hold. Each sector that is written holds the tag of its write throughout.

use std::collections::BTreeMap;

use super::{Op, SECTOR};
use crate::{
    base::{
        checksum::is_zero,
        units::{Extent, to_usize},
    },
    disk::{Content, Disk, Fua},
};

/// Tags by sector; the sectors that are not there hold zeros.
type Tags = BTreeMap<u64, Vec<u64>>;

/// What the disk may hold: any of some sizes, and in each sector any of some tags.
#[derive(Clone, Debug)]
pub(super) struct Model {
    sizes: Vec<u64>,
    /// To a reader, and after the death of the process.
    now: Tags,
    /// After a power cut.
    cut: Tags,
}

/// What a disk was found to hold.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Held {
    pub(super) size: u64,
    /// Sectors that are not zeros.
    pub(super) sectors: BTreeMap<u64, u64>,
}

impl Model {
    pub(super) fn new(size: u64) -> Self {
        Self {
            sizes: vec![size],
            now: Tags::new(),
            cut: Tags::new(),
        }
    }

    /// The model while operation number `tag` is under way and after it, when the disk has `size` bytes.
    pub(super) fn with(&self, op: Op, tag: u64, size: u64) -> (Self, Self) {
        let (mut during, mut after) = (self.clone(), self.clone());
        match op {
            Op::Write(run, fua) if run.end() <= size => {
                let sectors = || run.offset / SECTOR..run.end() / SECTOR;
                during.put(sectors(), tag, Fua::No, false);
                after.put(sectors(), tag, fua, true);
            }
            Op::Zero(run, _, fua) if run.end() <= size => {
                // Whatever was never written holds zeros already.
                let written: Vec<u64> = self
                    .cut
                    .range(run.offset / SECTOR..run.end() / SECTOR)
                    .map(|(&sector, _)| sector)
                    .collect();
                during.put(written.iter().copied(), 0, Fua::No, false);
                after.put(written.into_iter(), 0, fua, true);
            }
            Op::Write(..) | Op::Zero(..) | Op::Kill => {}
            Op::Flush | Op::Reopen => after.cut.clone_from(&self.now),
            // Refused, or as large as that already: nothing was done.
            Op::Resize(_) if self.sizes == [size] => {}
            Op::Resize(_) => {
                during.sizes.push(size);
                after.sizes = vec![size];
                after.cut.clone_from(&self.now);
            }
        }
        (during, after)
    }

    /// What the death of the process leaves.
    pub(super) fn killed(&self) -> Self {
        Self {
            cut: self.now.clone(),
            ..self.clone()
        }
    }

    pub(super) fn check(&self, held: &Held, story: &str) {
        assert!(
            self.sizes.contains(&held.size),
            "{story}: it has {} bytes, allowed {:?}",
            held.size,
            self.sizes
        );
        let allowed = |sector: &u64| self.cut.get(sector).map_or([0].as_slice(), Vec::as_slice);
        let end = held.size / SECTOR;
        for sector in held
            .sectors
            .keys()
            .chain(self.cut.range(..end).map(|(sector, _)| sector))
        {
            let tag = held.sectors.get(sector).copied().unwrap_or(0);
            assert!(
                allowed(sector).contains(&tag),
                "{story}: sector {sector:#x} holds {tag:#x}, allowed {:x?}",
                allowed(sector)
            );
        }
    }

    fn put(&mut self, sectors: impl Iterator<Item = u64>, tag: u64, fua: Fua, done: bool) {
        for sector in sectors {
            for (tags, replaces) in [
                (&mut self.now, done),
                (&mut self.cut, done && fua == Fua::Yes),
            ] {
                let tags = tags.entry(sector).or_insert_with(|| vec![0]);
                if replaces {
                    tags.clear();
                }
                tags.push(tag);
            }
        }
    }
}

/// The bytes of a write.
pub(super) fn content(run: Extent, tag: u64) -> Vec<u8> {
    std::iter::repeat_n(tag.to_le_bytes(), to_usize(run.len / 8))
        .flatten()
        .collect()
}

/// Everything that a disk holds; every sector is of one write or zeros.
pub(super) fn read(disk: &impl Disk, story: &str) -> Held {
    let size = disk.geometry().size;
    let mut sectors = BTreeMap::new();
    let mut at = 0;
    while at < size {
        let (run, kind) = disk.run_at(at).unwrap();
        assert!(
            run.offset == at && run.len > 0 && run.end() <= size,
            "{story}: {run:?}"
        );
        at = run.end();
        if kind == Content::Zero {
            for edge in [run.offset, run.end() - SECTOR] {
                let mut bytes = vec![0xAA; to_usize(SECTOR)];
                disk.read_at(edge, &mut bytes)
                    .unwrap_or_else(|error| panic!("{story}: {edge:#x}: {error:?}"));
                assert!(is_zero(&bytes), "{story}: {edge:#x} is not zero");
            }
            continue;
        }
        let mut bytes = vec![0xAA; to_usize(run.len)];
        disk.read_at(run.offset, &mut bytes).unwrap();
        for (number, content) in (run.offset / SECTOR..).zip(bytes.chunks(to_usize(SECTOR))) {
            let (words, _) = content.as_chunks::<8>();
            assert!(
                words.iter().all(|word| word == &words[0]),
                "{story}: sector {number:#x} is torn"
            );
            if !is_zero(content) {
                sectors.insert(number, u64::from_le_bytes(words[0]));
            }
        }
    }
    Held { size, sectors }
}
