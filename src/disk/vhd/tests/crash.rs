//! Power cuts and failing calls at every step of random histories, and the death of the process.

use std::io;

use super::*;
use crate::{
    base::checksum::is_zero,
    disk::{
        Fua, Space,
        histories::{self, Model, Op, assert_a_failed_sync_stops, run},
    },
};

const SIZE: u64 = 4 * BLOCK + 4096;

fn history(seed: u64, len: u64) -> Vec<Op> {
    histories::history(seed, len, (SIZE, BLOCK), |random, place| {
        let (near, fua) = (place.near, place.fua);
        match random.below(16) {
            0..=8 => Op::Write(near, place.tag, fua),
            9 => Op::Zero(near, Space::Keep, fua),
            10 => Op::Zero(near, Space::Release, fua),
            11 | 12 => Op::Zero(place.block, Space::Release, fua),
            13 | 14 => Op::Flush,
            _ => Op::Reopen,
        }
    })
}

fn live_on(storage: &Arc<MemoryStorage>, model: &mut Model, cut: bool, story: &str) {
    histories::live_on(storage, &history(99, 8), model, cut, story);
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
        run(&storage, &ops, &mut Model::new(SIZE), false).unwrap();
        let steps = power.steps() - before;
        for step in 0..=steps {
            for seed in 0..8 {
                let power = Power::new();
                let storage = blank(&power);
                let mut model = Model::new(SIZE);
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
        let mut model = Model::new(SIZE);
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
            let mut model = Model::new(SIZE);
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
        assert_a_failed_sync_stops(&disk, &power);
    }
}
