//! Every cut of short stories, and of some long ones: see [`crate::disk::enumeration`].

use std::{path::Path, process::Command};

use super::*;
use crate::{
    base::{checksum::is_zero, units::Extent},
    disk::{
        Fua, Space,
        check::Report,
        enumeration::{Enumeration, Op, Refused, SECTOR, Subject},
    },
    storage::file::FileStorage,
};

/// Two blocks and a short one.
const SIZE: u64 = 2 * BLOCK + 4096;

struct Vhd(CreateOptions);

impl Vhd {
    fn new(kind: Kind) -> Self {
        Self(options(SIZE, kind))
    }
}

impl Subject for Vhd {
    type Disk = VhdDisk;

    fn create(&self, storage: &dyn Storage) {
        create(storage, &self.0, ids().as_ref()).unwrap();
    }

    fn open(&self, storage: Arc<dyn Storage>, access: Access) -> Result<VhdDisk, Refused> {
        VhdDisk::open(storage, &Opening::new(access, ids())).map_err(|error| match error {
            OpenError::NotVhd => Refused::NoImage,
            error => Refused::Damaged(error.to_string()),
        })
    }

    fn resize(&self, disk: VhdDisk, storage: &Arc<dyn Storage>, size: u64) -> VhdDisk {
        disk.close().unwrap();
        match resize(storage.as_ref(), size) {
            Ok(()) | Err(ResizeError::InUse { .. }) => {}
            Err(error) => panic!("{error:?}"),
        }
        self.open(Arc::clone(storage), Access::ReadWrite).unwrap()
    }

    fn check(&self, storage: &Arc<dyn Storage>) -> Report {
        check(storage)
    }

    fn second_opinion(&self, file: &Path, bytes: &[u8]) -> Option<Result<(), String>> {
        let content = tempfile::NamedTempFile::new().unwrap();
        let output = Command::new("qemu-img")
            .args(["convert", "-f", "vpc", "-O", "raw"])
            .args([file, content.path()])
            .output();
        let Ok(output) = output else {
            eprintln!("SKIPPED: no second opinion, qemu-img is not installed");
            return None;
        };
        if !output.status.success() {
            return Some(Err(String::from_utf8_lossy(&output.stderr).into_owned()));
        }
        Some(compare(file, bytes, &std::fs::read(content).unwrap()))
    }
}

/// Compares what we read of `file` with what qemu did, which goes by the footer at the start of the file, where a cut may
/// have left the size before a resize, and does not look at the bitmaps of blocks: we are right to see zeros there.
fn compare(file: &Path, ours: &[u8], qemus: &[u8]) -> Result<(), String> {
    let storage = FileStorage::open(file, Access::ReadOnly).unwrap();
    let disk = open_as(Arc::new(storage), Access::ReadOnly).unwrap();
    let sector = usize::try_from(SECTOR).unwrap();
    let both = ours.len().min(qemus.len());
    for (at, (our, qemu)) in (0..)
        .step_by(sector)
        .zip(ours.chunks(sector).zip(qemus.chunks(sector)))
    {
        if our != qemu && !(is_zero(our) && is_gap(&disk, at)) {
            return Err(format!("it reads another content at {at:#x}"));
        }
    }
    if !is_zero(&ours[both..]) || !is_zero(&qemus[both..]) {
        return Err(format!("{} bytes to qemu, and data behind", qemus.len()));
    }
    Ok(())
}

/// Whether the sector at `at` is one of a block in the file whose bitmap denies it.
fn is_gap(disk: &VhdDisk, at: u64) -> bool {
    let Some(blocks) = &disk.blocks else {
        return false;
    };
    let (block, within) = (at / BLOCK, at % BLOCK);
    blocks.bat.place(block).is_some_and(|place| {
        let bitmap = disk.sectors(blocks, block, place).unwrap();
        bitmap.is_some_and(|bitmap| !bitmap.run(within, SECTOR).0)
    })
}

const fn sectors(at: u64, count: u64) -> Extent {
    Extent::new(at, count * SECTOR)
}

/// What a guest does, to two blocks and their border and to the end of the disk.
const OPS: [Op; 10] = [
    Op::Write(sectors(BLOCK - 512, 9), Fua::No),
    Op::Write(sectors(512, 1), Fua::Yes),
    Op::Write(sectors(SIZE - 512, 1), Fua::No),
    Op::Zero(Extent::new(0, BLOCK), Space::Release, Fua::No),
    Op::Zero(Extent::new(0, SIZE), Space::Release, Fua::Yes),
    Op::Flush,
    Op::Reopen,
    Op::Kill,
    Op::Resize(SIZE - 4096),
    Op::Resize(SIZE + BLOCK),
];

#[test]
fn every_cut_of_every_short_story_of_a_dynamic_disk() {
    let subject = Vhd::new(Kind::Dynamic);
    let enumeration = Enumeration::new(&subject, 16, 512);
    enumeration.all_stories(&OPS, 3);
    eprintln!("dynamic VHD: {}", enumeration.counts());
}

#[test]
fn every_cut_of_every_short_story_of_a_fixed_disk() {
    let subject = Vhd::new(Kind::Fixed);
    let enumeration = Enumeration::new(&subject, 8, 512);
    enumeration.all_stories(&OPS, 3);
    eprintln!("fixed VHD: {}", enumeration.counts());
}

/// The sector of the table holds the entries of 64 MiB: with blocks behind it, it moves to the end of the file.
#[test]
fn every_cut_while_the_table_moves() {
    let large = Op::Resize((64 << 20) + BLOCK + 4096);
    let ops = [
        OPS[0],
        OPS[2],
        OPS[4],
        Op::Flush,
        Op::Kill,
        Op::Reopen,
        large,
        Op::Resize(SIZE),
    ];
    let subject = Vhd::new(Kind::Dynamic);
    let enumeration = Enumeration::new(&subject, 8, 64);
    for first in ops {
        for last in ops {
            enumeration.story(&[first, large, last], 1);
        }
    }
    // What was flushed before the table moved is there in the new one, and blocks come behind it.
    let flushed = [OPS[0], Op::Flush, large, OPS[2], Op::Kill, OPS[1]];
    enumeration.story(&flushed, 0);
    eprintln!("moving table of a VHD: {}", enumeration.counts());
}

/// Blocks so large that the second one needs the file to grow again: the footer at its end becomes a part of a block.
#[test]
fn every_cut_while_the_file_grows() {
    let block_size = 128 << 20;
    let subject = Vhd(CreateOptions {
        block_size,
        ..options(3 * u64::from(block_size), Kind::Dynamic)
    });
    let write = |block: u64, fua| Op::Write(sectors(block * u64::from(block_size), 3), fua);
    let ops = [Op::Flush, Op::Kill, Op::Reopen, write(2, Fua::Yes)];
    let enumeration = Enumeration::new(&subject, 8, u64::MAX);
    for between in ops {
        for last in ops {
            let story = [write(0, Fua::No), between, write(1, Fua::No), last];
            enumeration.story(&story, 0);
        }
    }
    eprintln!("growing VHD: {}", enumeration.counts());
}

#[test]
fn every_cut_while_an_image_is_made() {
    for kind in [Kind::Dynamic, Kind::Fixed] {
        let subject = Vhd::new(kind);
        let enumeration = Enumeration::new(&subject, 1, 1);
        enumeration.creation(SIZE);
        eprintln!("new {kind:?} VHD: {}", enumeration.counts());
    }
}
