//! Power cuts and failing calls at every step of random histories, and the death of the process.
//!
//! Each sector written holds one tag throughout. The model knows for each sector what it may hold now, and what it may
//! hold after a power cut: what the last flush made durable and everything written since.

use std::io;

use super::*;
use crate::{
    base::{checksum::is_zero, units::Extent},
    disk::{DiskError, Fua, Space},
    storage::memory::{MemoryStorage, Power},
};

pub(super) const SECTOR: u64 = 512;
pub(super) const SIZE: u64 = (5 << 20) + 4096;
/// Sectors that are written: the first and last few of each block, so that the model stays small.
const NEAR: u64 = 4;

#[derive(Clone, Copy, Debug)]
pub(super) enum Op {
    Write(Extent, u64, Fua),
    Zero(Extent, Space, Fua),
    Flush,
    Reopen,
}

/// What the sectors of the disk may hold.
pub(super) struct Model {
    now: Vec<Vec<u64>>,
    cut: Vec<Vec<u64>>,
}

impl Model {
    fn new() -> Self {
        Self::of(|_| 0)
    }

    /// A disk of which each sector holds what `tag_of` says.
    pub(super) fn of(tag_of: impl Fn(u64) -> u64) -> Self {
        let now: Vec<_> = (0..SIZE / SECTOR).map(|n| vec![tag_of(n)]).collect();
        Self {
            cut: now.clone(),
            now,
        }
    }

    fn change(&mut self, run: Extent, tag: u64, fua: Fua, done: bool) {
        for sector in run.offset / SECTOR..run.end() / SECTOR {
            let sector = usize::try_from(sector).unwrap();
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
    fn check(&mut self, disk: &VhdxDisk, cut: bool, story: &str) {
        let bytes = read_all(disk);
        for (sector, content) in bytes.chunks_exact(512).enumerate() {
            let tag = u64::from_le_bytes(content[..8].try_into().unwrap());
            let whole = match tag {
                0 => is_zero(content),
                _ => content.chunks_exact(8).all(|part| part == &content[..8]),
            };
            let allowed = if cut { &self.cut } else { &self.now };
            assert!(
                whole && allowed[sector].contains(&tag),
                "{story}: sector {sector:#x} (block {}) holds {tag:#x}, allowed {:x?}",
                sector / 2048,
                allowed[sector]
            );
            if self.now[sector] != [tag] || self.cut[sector] != [tag] {
                self.now[sector] = vec![tag];
                self.cut[sector] = vec![tag];
            }
        }
    }
}

pub(super) fn history(seed: u64, len: u64) -> Vec<Op> {
    let mut random = Random(seed);
    let mut tag = seed << 32;
    let mut ops = Vec::new();
    for _ in 0..len {
        tag += 1;
        let block = random.below(SIZE.div_ceil(1 << 20)) << 20;
        let end = (block + (1 << 20)).min(SIZE);
        let count = 1 + random.below(NEAR);
        let run = if random.below(2) == 0 {
            Extent::new(block, count * SECTOR)
        } else {
            Extent::new(end - NEAR * SECTOR, count * SECTOR)
        };
        let fua = if random.below(12) == 0 {
            Fua::Yes
        } else {
            Fua::No
        };
        ops.push(match random.below(32) {
            0..=14 => Op::Write(run, tag, fua),
            15 => Op::Zero(run, Space::Keep, fua),
            16 => Op::Zero(run, Space::Release, fua),
            // Two blocks, and a head that stays.
            17 => {
                let start = block.saturating_sub(SECTOR);
                Op::Zero(Extent::new(start, end - start), Space::Release, fua)
            }
            18..=27 => Op::Zero(Extent::new(block, end - block), Space::Release, fua),
            28..=30 => Op::Flush,
            _ => Op::Reopen,
        });
    }
    ops
}

/// Runs a history until something fails for good. Returns whether it came to its end.
pub(super) fn run(image: &Subject, ops: &[Op], model: &mut Model, retries: bool) -> Result<(), ()> {
    let mut disk = image.open().map_err(drop)?;
    for op in ops {
        let outcome = match *op {
            Op::Write(run, tag, fua) => {
                let len = usize::try_from(run.len / 8).unwrap();
                let bytes: Vec<u8> = std::iter::repeat_n(tag.to_le_bytes(), len)
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
                disk = image.open().map_err(drop)?;
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

/// After a cut: opens, holds what it may, and works.
pub(super) fn live_on(image: &Subject, model: &mut Model, cut: bool, story: &str) {
    let reader = image
        .open_as(Access::ReadOnly)
        .unwrap_or_else(|error| panic!("{story}: read-only: {error:?}"));
    let seen = read_all(&reader);
    let disk = image
        .open()
        .unwrap_or_else(|error| panic!("{story}: {error:?}"));
    assert!(seen == read_all(&disk), "{story}: replay in memory differs");
    model.check(&disk, cut, story);
    drop(disk);
    let again = history(99, 12);
    run(image, &again, model, false).unwrap_or_else(|()| panic!("{story}: cannot go on"));
    let disk = image.open().unwrap();
    model.check(&disk, false, story);
    disk.close().unwrap();
    let disk = image.open().unwrap();
    model.check(&disk, false, story);
}

/// A new image and what it holds, on a supply.
pub(super) type Make<'a> = &'a dyn Fn(&Arc<Power>) -> (Subject, Model);

fn empty(power: &Arc<Power>) -> (Subject, Model) {
    (image(power), Model::new())
}

fn image(power: &Arc<Power>) -> Subject {
    let storage = MemoryStorage::new(power);
    create(
        storage.as_ref(),
        &options(SIZE, Kind::Dynamic),
        ids().as_ref(),
    )
    .unwrap();
    Subject::new(storage)
}

/// Keeps unsynced sectors: none, all, or some. Those come in runs, or hardly any log entry would be kept whole.
fn kept(seed: u64) -> impl FnMut() -> bool {
    let mut random = Random(seed);
    let mut keep = seed % 2 == 1;
    let run = [0, 0, 16, 64][usize::try_from(seed % 4).unwrap()];
    move || {
        if run > 0 && random.below(run) == 0 {
            keep = !keep;
        }
        keep
    }
}

pub(super) fn cut_everywhere(
    make: Make<'_>,
    history_seed: u64,
    len: u64,
    seeds: std::ops::Range<u64>,
    stride: usize,
) {
    let ops = history(history_seed, len);
    let power = Power::new();
    let before = {
        let (image, mut model) = make(&power);
        let before = power.steps();
        run(&image, &ops, &mut model, false).unwrap();
        before
    };
    let steps = power.steps() - before;
    for step in (0..=steps).step_by(stride) {
        for seed in seeds.clone() {
            let power = Power::new();
            let (image, mut model) = make(&power);
            power.cut_after(step);
            let finished = run(&image, &ops, &mut model, false).is_ok();
            // A place that cannot be cleared fails nobody, so a history may end well one step early.
            assert!(finished || step < steps);
            power.restore(&mut kept(seed + step * 4));
            let story = format!("history {history_seed}, cut after {step} of {steps}, kept {seed}");
            live_on(&image, &mut model, true, &story);
        }
    }
}

#[test]
fn a_power_cut_at_any_step_loses_nothing_flushed() {
    for history_seed in 1..=2 {
        cut_everywhere(&empty, history_seed, 40, 0..4, 1);
    }
}

/// Long enough that the log wraps and checkpoints happen, with and without flushes.
#[test]
fn a_power_cut_around_checkpoints_loses_nothing_flushed() {
    cut_everywhere(&empty, 5, 400, 2..4, 7);
}

#[test]
fn a_process_that_is_killed_loses_nothing() {
    kill_after_histories(&empty, 40);
}

pub(super) fn kill_after_histories(make: Make<'_>, count: u64) {
    for seed in 0..count {
        let (image, mut model) = make(&Power::new());
        run(&image, &history(seed, 20 + seed * 10), &mut model, false).unwrap();
        let story = format!("killed after history {seed}");
        live_on(&image, &mut model, false, &story);
    }
}

#[test]
fn a_call_that_fails_once_at_any_step_does_no_harm() {
    fail_everywhere(&empty, 60);
}

pub(super) fn fail_everywhere(make: Make<'_>, len: u64) {
    let ops = history(7, len);
    for kind in [io::ErrorKind::StorageFull, io::ErrorKind::Other] {
        for step in 0.. {
            let power = Power::new();
            let (image, mut model) = make(&power);
            let before = power.steps();
            power.fail_after(step, kind);
            let _ = run(&image, &ops, &mut model, true);
            let happened = power.steps() - before > step;
            power.restore(&mut kept(step));
            let story = format!("{kind} at step {step}");
            live_on(&image, &mut model, true, &story);
            if !happened {
                break;
            }
        }
    }
}

#[test]
fn an_image_is_complete_or_none_while_it_is_made() {
    for kind in [Kind::Dynamic, Kind::Fixed] {
        for step in 0.. {
            let power = Power::new();
            let storage = MemoryStorage::new(&power);
            power.cut_after(step);
            let made = create(storage.as_ref(), &options(SIZE, kind), ids().as_ref()).is_ok();
            power.restore(&mut kept(step * 3 + 2));
            match open(&storage) {
                Ok(disk) => assert!(read_all(&disk).iter().all(|&byte| byte == 0)),
                Err(OpenError::NotVhdx) => assert!(!made),
                Err(error) => panic!("cut after {step}: {error:?}"),
            }
            if made {
                break;
            }
        }
    }
}

#[test]
fn a_failed_sync_stops_the_disk() {
    let power = Power::new();
    let disk = image(&power).open().unwrap();
    disk.write_at(0, &[1; 512], Fua::No).unwrap();
    power.fail_after(0, io::ErrorKind::Other);
    assert!(matches!(
        disk.flush(),
        Err(DiskError::Io {
            operation: "flush",
            ..
        })
    ));
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

#[test]
fn opening_without_writing_changes_nothing() {
    let power = Power::new();
    let storage = image(&power).storage;
    let before = storage.bytes();
    let disk = open(&storage).unwrap();
    disk.flush().unwrap();
    disk.close().unwrap();
    assert!(storage.bytes() == before);
}
