//! Power cuts and failing calls at every step of random histories, and the death of the process.

use std::io;

use super::*;
use crate::{
    base::units::Extent,
    disk::{
        Fua, Space,
        histories::{self, Model, Op, assert_a_failed_sync_stops, run},
    },
    storage::memory::{MemoryStorage, Power},
};

pub(super) use crate::disk::histories::SECTOR;

pub(super) const SIZE: u64 = (5 << 20) + 4096;

fn history(seed: u64, len: u64) -> Vec<Op> {
    histories::history(seed, len, (SIZE, 1 << 20), |random, place| {
        let (block, near, fua) = (place.block, place.near, place.fua);
        match random.below(32) {
            0..=14 => Op::Write(near, place.tag, fua),
            15 => Op::Zero(near, Space::Keep, fua),
            16 => Op::Zero(near, Space::Release, fua),
            // Two blocks, and a head that stays.
            17 => {
                let start = block.offset.saturating_sub(SECTOR);
                Op::Zero(Extent::new(start, block.end() - start), Space::Release, fua)
            }
            18..=27 => Op::Zero(block, Space::Release, fua),
            28..=30 => Op::Flush,
            _ => Op::Reopen,
        }
    })
}

fn live_on(image: &Subject, model: &mut Model, cut: bool, story: &str) {
    histories::live_on(image, &history(99, 12), model, cut, story);
}

/// A new image and what it holds, on a supply.
pub(super) type Make<'a> = &'a dyn Fn(&Arc<Power>) -> (Subject, Model);

fn empty(power: &Arc<Power>) -> (Subject, Model) {
    let subject = Subject::new(new_image(power, &options(SIZE, Kind::Dynamic)));
    (subject, Model::new(SIZE))
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

/// What a killed process wrote is in the page cache, and its guest goes on in the next one: a flush there, with nothing
/// written since, must make it durable. It returned at once, since no log had begun, and a power cut took the writes.
#[test]
fn a_flush_after_a_kill_covers_what_the_killed_process_wrote() {
    for close in [false, true] {
        let power = Power::new();
        let storage = new_image(&power, &options(SIZE, Kind::Dynamic));
        let disk = open(&storage).unwrap();
        disk.write_at(0, &[1; 8192], Fua::No).unwrap();
        disk.flush().unwrap();
        disk.write_at(0, &[2; 4096], Fua::No).unwrap();
        drop(disk);
        let disk = open(&storage).unwrap();
        if close {
            disk.close().unwrap();
        } else {
            disk.flush().unwrap();
        }
        drop(disk);
        power.restore(&mut || false);
        let mut bytes = [0; 8192];
        let disk = open(&storage).unwrap();
        disk.read_at(0, &mut bytes).unwrap();
        assert!(bytes[..4096] == [2; 4096], "closed: {close}");
        assert!(bytes[4096..] == [1; 4096]);
    }
}

#[test]
fn a_failed_sync_stops_the_disk() {
    let power = Power::new();
    let disk = empty(&power).0.open().unwrap();
    assert_a_failed_sync_stops(&disk, &power);
}

#[test]
fn opening_without_writing_changes_nothing() {
    let storage = new_image(&Power::new(), &options(SIZE, Kind::Dynamic));
    let before = storage.bytes();
    let disk = open(&storage).unwrap();
    disk.flush().unwrap();
    disk.close().unwrap();
    assert!(storage.bytes() == before);
}
