//! Random histories of a disk through power cuts, failing calls and the death of the process: what the crash tests of the
//! formats share. Which operations, and what a cut keeps, each format says itself.
//!
//! Each sector written holds one tag throughout. The model knows for each sector what it may hold now, and what it may
//! hold after a power cut: what the last flush made durable and everything written since.

pub(crate) mod array;

use std::io;

use crate::{
    base::{
        checksum::is_zero,
        units::{Extent, to_usize},
    },
    disk::{Access, Disk, DiskError, Fua, Space, enumeration::Random},
    storage::memory::Power,
};

/// Bytes of the unit in which a disk's content is followed.
pub(crate) const SECTOR: u64 = 512;
/// Sectors that are written: the first and last few of each block, so that the model stays small.
const NEAR: u64 = 4;

/// An image under test.
pub(crate) trait Image {
    /// Its disk.
    type Disk: Disk;

    /// The disk, opened.
    fn opened(&self, access: Access) -> Result<Self::Disk, String>;

    /// What else must be right of an image that was just closed.
    fn assert_sound(&self, _story: &str) {}
}

#[derive(Clone, Copy, Debug)]
pub(crate) enum Op {
    Write(Extent, u64, Fua),
    Zero(Extent, Space, Fua),
    Flush,
    Reopen,
}

/// Where an operation of a history takes place, and how.
pub(crate) struct Place {
    /// A block, as far as it is in the disk.
    pub(crate) block: Extent,
    /// A few sectors at one of its ends.
    pub(crate) near: Extent,
    pub(crate) tag: u64,
    pub(crate) fua: Fua,
}

/// What the sectors of the disk may hold.
pub(crate) struct Model {
    now: Vec<Vec<u64>>,
    cut: Vec<Vec<u64>>,
}

impl Model {
    /// A new disk of `size` bytes.
    pub(crate) fn new(size: u64) -> Self {
        Self::of(size, |_| 0)
    }

    /// A disk of which each sector holds what `tag_of` says.
    pub(crate) fn of(size: u64, tag_of: impl Fn(u64) -> u64) -> Self {
        let now: Vec<_> = (0..size / SECTOR).map(|n| vec![tag_of(n)]).collect();
        Self {
            cut: now.clone(),
            now,
        }
    }

    fn change(&mut self, run: Extent, tag: u64, fua: Fua, done: bool) {
        for sector in run.offset / SECTOR..run.end() / SECTOR {
            let sector = to_usize(sector);
            if done {
                self.now[sector].clear();
            }
            if done && fua == Fua::Yes {
                self.cut[sector].clear();
            }
            self.now[sector].push(tag);
            self.cut[sector].push(tag);
        }
    }

    fn flushed(&mut self) {
        self.cut.clone_from(&self.now);
    }

    /// Compares a disk with what it may hold and takes what it does hold for certain.
    fn check(&mut self, disk: &impl Disk, cut: bool, story: &str) {
        let bytes = read_all(disk);
        for (sector, content) in bytes.chunks_exact(to_usize(SECTOR)).enumerate() {
            let tag = u64::from_le_bytes(content[..8].try_into().unwrap());
            let whole = match tag {
                0 => is_zero(content),
                _ => content.chunks_exact(8).all(|part| part == &content[..8]),
            };
            let allowed = if cut { &self.cut } else { &self.now };
            assert!(
                whole && allowed[sector].contains(&tag),
                "{story}: sector {sector:#x} holds {tag:#x}, allowed {:x?}",
                allowed[sector]
            );
            if self.now[sector] != [tag] || self.cut[sector] != [tag] {
                self.now[sector] = vec![tag];
                self.cut[sector] = vec![tag];
            }
        }
    }
}

/// `len` operations on a disk of `size` bytes in blocks of `block_size`; `pick` says which one takes place where.
pub(crate) fn history(
    seed: u64,
    len: u64,
    (size, block_size): (u64, u64),
    pick: impl Fn(&mut Random, &Place) -> Op,
) -> Vec<Op> {
    let mut random = Random(seed);
    let first = (seed << 32) + 1;
    (first..first + len)
        .map(|tag| {
            let start = random.below(size.div_ceil(block_size)) * block_size;
            let end = (start + block_size).min(size);
            let count = 1 + random.below(NEAR);
            let near = match random.below(2) {
                0 => Extent::new(start, count * SECTOR),
                _ => Extent::new(end - NEAR * SECTOR, count * SECTOR),
            };
            let fua = match random.below(12) {
                0 => Fua::Yes,
                _ => Fua::No,
            };
            let block = Extent::new(start, end - start);
            let place = Place {
                block,
                near,
                tag,
                fua,
            };
            pick(&mut random, &place)
        })
        .collect()
}

/// Runs a history until something fails for good. Returns whether it came to its end.
pub(crate) fn run(
    image: &impl Image,
    ops: &[Op],
    model: &mut Model,
    retries: bool,
) -> Result<(), ()> {
    let mut disk = image.opened(Access::ReadWrite).map_err(drop)?;
    for op in ops {
        let outcome = match *op {
            Op::Write(run, tag, fua) => {
                let bytes: Vec<u8> = std::iter::repeat_n(tag.to_le_bytes(), to_usize(run.len / 8))
                    .flatten()
                    .collect();
                let outcome = disk.write_at(run.offset, &bytes, fua);
                model.change(run, tag, fua, outcome.is_ok());
                outcome
            }
            Op::Zero(run, space, fua) => {
                let outcome = disk.zero(run, space, fua);
                model.change(run, 0, fua, outcome.is_ok());
                outcome
            }
            Op::Flush => disk.flush().map(|()| model.flushed()),
            Op::Reopen => {
                disk.close().map_err(drop)?;
                model.flushed();
                disk = image.opened(Access::ReadWrite).map_err(drop)?;
                Ok(())
            }
        };
        match outcome {
            Ok(()) => {}
            Err(DiskError::Io { .. }) if retries => {}
            Err(_) => return Err(()),
        }
    }
    Ok(())
}

/// After a cut, or only the death of the process: opens, holds what it may, and does what `again` says.
pub(crate) fn live_on(image: &impl Image, again: &[Op], model: &mut Model, cut: bool, story: &str) {
    let open = |access| {
        image
            .opened(access)
            .unwrap_or_else(|error| panic!("{story}: opening it {access:?}: {error}"))
    };
    let seen = read_all(&open(Access::ReadOnly));
    let disk = open(Access::ReadWrite);
    assert!(
        seen == read_all(&disk),
        "{story}: it reads otherwise when writable"
    );
    model.check(&disk, cut, story);
    drop(disk);
    run(image, again, model, false).unwrap_or_else(|()| panic!("{story}: cannot go on"));
    let disk = open(Access::ReadWrite);
    model.check(&disk, false, story);
    disk.close().unwrap();
    image.assert_sound(story);
    model.check(&open(Access::ReadWrite), false, story);
}

/// A failed flush is the last one of a new `disk` on this supply, and nothing is written any more.
pub(crate) fn assert_a_failed_sync_stops(disk: &impl Disk, power: &Power) {
    disk.write_at(0, &[1; 512], Fua::No).unwrap();
    power.fail_after(0, io::ErrorKind::Other);
    let flushed = disk.flush();
    assert!(
        matches!(
            flushed,
            Err(DiskError::Io {
                operation: "flush",
                ..
            })
        ),
        "{flushed:?}"
    );
    for refused in [
        disk.flush(),
        disk.write_at(0, &[2; 512], Fua::No),
        disk.zero(Extent::new(0, 512), Space::Keep, Fua::No),
        disk.close(),
    ] {
        assert!(matches!(refused, Err(DiskError::Stopped(_))), "{refused:?}");
    }
    let mut held = [0; 512];
    disk.read_at(0, &mut held).unwrap();
    assert_eq!(held, [1; 512], "reading goes on");
}

/// All bytes of a disk.
pub(crate) fn read_all(disk: &impl Disk) -> Vec<u8> {
    let mut bytes = vec![0xAA; to_usize(disk.geometry().size)];
    disk.read_at(0, &mut bytes).unwrap();
    bytes
}
