//! Every cut of short stories, and of some long ones: see [`crate::disk::enumeration`].

use std::{path::Path, process::Command};

use super::*;
use crate::{
    base::{checksum::Sha256, units::Extent},
    disk::{
        Fua, ResizeError, Space,
        check::Report,
        enumeration::{Enumeration, Op, Refused, Subject},
    },
};

const SIZE: u64 = (2 << 20) + 4096;

struct Vhdx(Kind);

impl Subject for Vhdx {
    type Disk = VhdxDisk;

    fn create(&self, storage: &dyn Storage) {
        create(storage, &options(SIZE, self.0), ids().as_ref()).unwrap();
    }

    fn open(&self, storage: Arc<dyn Storage>, access: Access) -> Result<VhdxDisk, Refused> {
        VhdxDisk::open(storage, &Opening::new(access, ids())).map_err(|error| match error {
            OpenError::NotVhdx => Refused::NoImage,
            error => Refused::Damaged(error.to_string()),
        })
    }

    fn resize(&self, disk: VhdxDisk, _: &Arc<dyn Storage>, size: u64) -> VhdxDisk {
        match disk.resize(size) {
            Ok(()) | Err(ResizeError::InUse { .. }) => disk,
            Err(error) => panic!("{error:?}"),
        }
    }

    fn check(&self, storage: &Arc<dyn Storage>) -> Report {
        check(storage)
    }

    fn second_opinion(&self, file: &Path, bytes: &[u8]) -> Option<Result<(), String>> {
        let tool = dumper()?;
        let run = |mode: &[&str]| {
            let output = Command::new("python3")
                .arg(&tool)
                .args(mode)
                .arg(file)
                .output();
            let output = output.expect("the dumper runs");
            String::from_utf8_lossy(&output.stdout).into_owned()
        };
        let told = run(&[]);
        let mut sum = Sha256::default();
        sum.update(bytes);
        let held = sum.finish().to_string();
        // A header that was being written may be torn: that is why there are two.
        let wrong = told.lines().find(|line| {
            line.contains("!!")
                && !line.contains("header1 invalid")
                && !line.contains("header2 invalid")
        });
        Some(match wrong {
            Some(_) => Err(told),
            None if run(&["--sha"]).starts_with(&held) => Ok(()),
            None => Err(format!("{told}it reads another content")),
        })
    }
}

fn dumper() -> Option<std::path::PathBuf> {
    let shared = std::env::var_os("UNDERSTUDY_SHARED").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared"),
        std::path::PathBuf::from,
    );
    let tool = shared.join("tools/vhdx_dump.py");
    if !tool.exists() {
        eprintln!(
            "SKIPPED: no second opinion, {} is not there",
            tool.display()
        );
        return None;
    }
    Some(tool)
}

const fn sectors(at: u64, count: u64) -> Extent {
    Extent::new(at, count * 512)
}

/// What a guest does, to two blocks and their border.
const OPS: [Op; 9] = [
    Op::Write(sectors((1 << 20) - 512, 9), Fua::No),
    Op::Write(sectors(512, 1), Fua::Yes),
    Op::Zero(Extent::new(0, 1 << 20), Space::Release, Fua::No),
    Op::Zero(Extent::new(0, SIZE), Space::Release, Fua::Yes),
    Op::Flush,
    Op::Reopen,
    Op::Kill,
    Op::Resize(SIZE - 4096),
    Op::Resize(SIZE + (2 << 20)),
];

#[test]
fn every_cut_of_every_short_story_of_a_dynamic_disk() {
    let enumeration = Enumeration::new(&Vhdx(Kind::Dynamic), 16, 8192);
    enumeration.all_stories(&OPS, 3);
    eprintln!("dynamic disk: {}", enumeration.counts());
}

/// A place goes from block to block: discarded, durably so, cleared, durably so, and only then another's.
#[test]
fn every_cut_while_a_place_is_used_again() {
    let enumeration = Enumeration::new(&Vhdx(Kind::Dynamic), 4, 1024);
    let discard = Op::Zero(Extent::new(0, 1 << 20), Space::Release, Fua::No);
    let other = Op::Write(sectors((1 << 20) + 4096, 3), Fua::No);
    for flushes in 0..4 {
        for last in [Op::Flush, Op::Kill, Op::Reopen, discard] {
            let mut story = vec![Op::Write(sectors(4096, 9), Fua::No), Op::Flush, discard];
            story.extend(std::iter::repeat_n(Op::Flush, flushes));
            story.extend([other, last, Op::Write(sectors(0, 1), Fua::No), Op::Flush]);
            enumeration.story(&story, 0);
        }
    }
    eprintln!("a place used again: {}", enumeration.counts());
}

/// The region of the table has room for 128 GiB: it moves.
#[test]
fn every_cut_while_the_table_moves() {
    let ops = [
        Op::Write(sectors(512, 9), Fua::No),
        Op::Zero(Extent::new(0, SIZE), Space::Release, Fua::No),
        Op::Flush,
        Op::Reopen,
        Op::Resize(129 << 30),
        Op::Resize(SIZE),
    ];
    let enumeration = Enumeration::new(&Vhdx(Kind::Dynamic), 16, 256);
    for first in ops {
        for last in ops {
            enumeration.story(&[first, Op::Resize(129 << 30), last], 1);
        }
    }
    // What was flushed before the table moved is there in the new one.
    let flushed = [
        ops[0],
        Op::Flush,
        Op::Resize(129 << 30),
        Op::Kill,
        Op::Reopen,
    ];
    enumeration.story(&flushed, 0);
    eprintln!("moving table: {}", enumeration.counts());
}

#[test]
fn every_cut_of_every_short_story_of_a_fixed_disk() {
    let ops = [
        Op::Write(sectors(512, 9), Fua::No),
        Op::Zero(Extent::new(0, SIZE), Space::Release, Fua::Yes),
        Op::Reopen,
        Op::Resize(SIZE + (2 << 20)),
        Op::Resize(SIZE - 4096),
    ];
    let enumeration = Enumeration::new(&Vhdx(Kind::Fixed), 8, 1024);
    enumeration.all_stories(&ops, 3);
    eprintln!("fixed disk: {}", enumeration.counts());
}

#[test]
fn every_cut_while_an_image_is_made() {
    for kind in [Kind::Dynamic, Kind::Fixed] {
        let subject = Vhdx(kind);
        let enumeration = Enumeration::new(&subject, 1, 1);
        enumeration.creation(SIZE);
        eprintln!("new {kind:?} image: {}", enumeration.counts());
    }
}
