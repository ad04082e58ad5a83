//! Power cuts and failing calls at every step of random histories, and the death of the process.
//!
//! Each sector written holds one tag throughout. The model knows for each sector what it may hold now, and what it may
//! hold after a power cut: what the last flush made durable and everything written since.

use std::io;

use super::*;
use crate::{
    base::{checksum::is_zero, units::Extent},
    disk::{DiskError, Fua, Space},
};

const SECTOR: u64 = 512;
const SIZE: u64 = 4 * BLOCK + 4096;
/// Sectors that are written: the first and last few of each block, so that the model stays small.
const NEAR: u64 = 4;

#[derive(Clone, Copy, Debug)]
enum Op {
    Write(Extent, u64, Fua),
    Zero(Extent, Space, Fua),
    Flush,
    Reopen,
}

/// What the sectors of the disk may hold.
struct Model {
    now: Vec<Vec<u64>>,
    cut: Vec<Vec<u64>>,
}

impl Model {
    fn new() -> Self {
        let sectors = usize::try_from(SIZE / SECTOR).unwrap();
        Self {
            now: vec![vec![0]; sectors],
            cut: vec![vec![0]; sectors],
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
    fn check(&mut self, disk: &VhdDisk, cut: bool, story: &str) {
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

fn history(seed: u64, len: u64) -> Vec<Op> {
    let mut random = Random(seed);
    let mut tag = seed << 32;
    let mut ops = Vec::new();
    for _ in 0..len {
        tag += 1;
        let block = random.below(SIZE.div_ceil(BLOCK)) * BLOCK;
        let end = (block + BLOCK).min(SIZE);
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
        ops.push(match random.below(16) {
            0..=8 => Op::Write(run, tag, fua),
            9 => Op::Zero(run, Space::Keep, fua),
            10 => Op::Zero(run, Space::Release, fua),
            11 | 12 => Op::Zero(Extent::new(block, end - block), Space::Release, fua),
            13 | 14 => Op::Flush,
            _ => Op::Reopen,
        });
    }
    ops
}

/// Runs a history until something fails for good. Returns whether it came to its end.
fn run(
    storage: &Arc<MemoryStorage>,
    ops: &[Op],
    model: &mut Model,
    retries: bool,
) -> Result<(), ()> {
    let mut disk = open(storage).map_err(drop)?;
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
                disk = open(storage).map_err(drop)?;
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
fn live_on(storage: &Arc<MemoryStorage>, model: &mut Model, cut: bool, story: &str) {
    let reader = open_as(Arc::clone(storage), Access::ReadOnly)
        .unwrap_or_else(|error| panic!("{story}: read-only: {error:?}"));
    let seen = read_all(&reader);
    let disk = open(storage).unwrap_or_else(|error| panic!("{story}: {error:?}"));
    assert!(seen == read_all(&disk), "{story}: repair changed the disk");
    model.check(&disk, cut, story);
    drop(disk);
    let again = history(99, 8);
    run(storage, &again, model, false).unwrap_or_else(|()| panic!("{story}: cannot go on"));
    let disk = open(storage).unwrap();
    model.check(&disk, false, story);
    disk.close().unwrap();
    let shared: Arc<dyn Storage> = Arc::clone(storage) as _;
    assert_eq!(check(&shared).errors, 0, "{story}");
    model.check(&open(storage).unwrap(), false, story);
}

fn blank(power: &Arc<Power>) -> Arc<MemoryStorage> {
    image(power, &options(SIZE, Kind::Dynamic))
}

#[test]
fn a_power_cut_at_any_step_loses_nothing_flushed() {
    for history_seed in 1..=3 {
        let ops = history(history_seed, 30);
        let power = Power::new();
        let storage = blank(&power);
        let before = power.steps();
        run(&storage, &ops, &mut Model::new(), false).unwrap();
        let steps = power.steps() - before;
        for step in 0..=steps {
            for seed in 0..8 {
                let power = Power::new();
                let storage = blank(&power);
                let mut model = Model::new();
                power.cut_after(step);
                let finished = run(&storage, &ops, &mut model, false).is_ok();
                assert!(finished || step < steps);
                power.restore(&mut kept(seed + step * 8));
                let story = format!("history {history_seed}, cut after {step}, kept {seed}");
                live_on(&storage, &mut model, true, &story);
            }
        }
    }
}

#[test]
fn a_process_that_is_killed_loses_nothing() {
    for seed in 0..30 {
        let storage = blank(&Power::new());
        let mut model = Model::new();
        run(&storage, &history(seed, 20 + seed * 5), &mut model, false).unwrap();
        live_on(&storage, &mut model, false, &format!("history {seed}"));
    }
}

/// A session that had not written anything itself took all for durable: it answered a flush without a sync, and a forced
/// write without one for the entry that leads to it. What a killed process had left in the page cache was lost then.
#[test]
fn what_a_killed_process_wrote_is_durable_after_the_next_flush_or_forced_write() {
    for kind in [Kind::Dynamic, Kind::Fixed] {
        for forced in [false, true] {
            let power = Power::new();
            let storage = image(&power, &options(SIZE, kind));
            let killed = open(&storage).unwrap();
            killed.write_at(0, &[1; 512], Fua::No).unwrap();
            drop(killed);
            let disk = open(&storage).unwrap();
            if forced {
                disk.write_at(0, &[2; 512], Fua::Yes).unwrap();
            } else {
                disk.flush().unwrap();
            }
            power.restore(&mut || false);
            let mut held = [0; 512];
            let disk = open(&storage).unwrap();
            disk.read_at(0, &mut held).unwrap();
            assert_eq!(held, [1 + u8::from(forced); 512], "{kind:?}");
        }
    }
}

#[test]
fn a_call_that_fails_once_at_any_step_does_no_harm() {
    let ops = history(7, 40);
    for kind in [io::ErrorKind::StorageFull, io::ErrorKind::Other] {
        for step in 0.. {
            let power = Power::new();
            let storage = blank(&power);
            let mut model = Model::new();
            let before = power.steps();
            power.fail_after(step, kind);
            let _ = run(&storage, &ops, &mut model, true);
            let happened = power.steps() - before > step;
            power.restore(&mut kept(step));
            live_on(&storage, &mut model, true, &format!("{kind} at {step}"));
            if !happened {
                break;
            }
        }
    }
}

#[test]
fn an_image_is_complete_or_none_while_it_is_made() {
    for kind in [Kind::Dynamic, Kind::Fixed] {
        for (step, seed) in (0..).flat_map(|step| (0..64).map(move |seed| (step, seed))) {
            let power = Power::new();
            let storage = MemoryStorage::new(&power);
            power.cut_after(step);
            let made = create(storage.as_ref(), &options(SIZE, kind), ids().as_ref()).is_ok();
            power.restore(&mut kept(step * 64 + seed));
            match open(&storage) {
                Ok(disk) => assert!(is_zero(&read_all(&disk))),
                Err(OpenError::NotVhd) => assert!(!made),
                Err(error) => panic!("{kind:?}, cut after {step}: {error:?}"),
            }
            if made {
                break;
            }
        }
    }
}

/// Bytes under clear bits never show, whenever the bits are set.
#[test]
fn a_power_cut_while_gaps_are_filled_shows_nothing_in_them() {
    for (step, seed) in (0..8).flat_map(|step| (0..16).map(move |seed| (step, seed))) {
        let power = Power::new();
        let storage = blank(&power);
        let disk = open(&storage).unwrap();
        disk.write_at(0, &[7; 8192], Fua::No).unwrap();
        let place = disk.blocks.as_ref().unwrap().bat.place(0).unwrap();
        storage.write_at(place, &[0x0F], Fua::No).unwrap();
        disk.close().unwrap();
        let disk = open(&storage).unwrap();
        power.cut_after(step);
        let done = disk.write_at(1024, &[9; 512], Fua::Yes).is_ok();
        power.restore(&mut kept(seed + step * 16));
        let bytes = read_all(&open(&storage).unwrap());
        for (sector, content) in bytes[..8192].chunks_exact(512).enumerate() {
            let byte = content[0];
            assert!(content.iter().all(|&other| other == byte));
            let old = if sector < 4 { 0 } else { 7 };
            let right = if sector == 2 { [old, 9] } else { [old, old] };
            assert!(
                right.contains(&byte),
                "step {step}: sector {sector}: {byte}"
            );
            assert!(sector != 2 || !done || byte == 9);
        }
    }
}

/// The footer that was the end of the file becomes a part of a block, and nobody sees it there.
#[test]
fn a_power_cut_while_the_file_grows_shows_no_old_footer() {
    let options = CreateOptions {
        block_size: 1 << 20,
        ..options(300 << 20, Kind::Dynamic)
    };
    for (step, seed) in (0..12).flat_map(|step| (0..16).map(move |seed| (step, seed))) {
        let power = Power::new();
        let storage = image(&power, &options);
        let disk = open(&storage).unwrap();
        let mut sectors = BTreeMap::new();
        let mut write = |block: u64| {
            sectors.insert(block * 2048, 3);
            disk.write_at(block << 20, &[3; 512], Fua::No).is_ok()
        };
        let old_len = (0..255)
            .map(|block| (write(block), storage.len().unwrap()).1)
            .last();
        disk.flush().unwrap();
        power.cut_after(step);
        let done = write(255);
        power.restore(&mut kept(seed + step * 16));
        let story = format!("cut after {step}, kept {seed}");
        drop(disk);
        let disk = open(&storage).unwrap();
        let mut held = [0];
        disk.read_at(255 << 20, &mut held).unwrap();
        sectors.insert(255 * 2048, held[0]);
        assert!([0, 3].contains(&held[0]));
        assert_holds(&disk, &sectors, &story);
        for block in 255..260u64 {
            disk.write_at(block << 20, &[4; 512], Fua::No).unwrap();
            sectors.insert(block * 2048, 4);
        }
        assert_holds(&disk, &sectors, &story);
        if done {
            assert!(
                storage.len().unwrap() > old_len.unwrap() + (200 << 20),
                "it grew"
            );
            break;
        }
    }
}

#[test]
fn a_failed_sync_stops_the_disk() {
    for kind in [Kind::Dynamic, Kind::Fixed] {
        let power = Power::new();
        let disk = open(&image(&power, &options(SIZE, kind))).unwrap();
        disk.write_at(0, &[1; 512], Fua::No).unwrap();
        power.fail_after(0, io::ErrorKind::Other);
        let flushed = disk.flush();
        assert!(matches!(
            flushed,
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
}
