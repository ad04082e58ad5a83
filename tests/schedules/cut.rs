//! Writers, a flusher and a sender: each completed epoch is one instant of both disks, and nothing is forgotten.

use std::sync::atomic::{AtomicU64 as Plain, Ordering::SeqCst};

use shuttle::thread;

use super::*;

/// Numbers that each writer writes.
const ROUNDS: u64 = 3;
/// Epochs that are cut while they write.
const EPOCHS: usize = 3;

/// For each pair the last number that is acknowledged on both disks, and the last one submitted. No place to switch.
#[derive(Debug, Default)]
struct Progress {
    done: [Plain; PAIRS.len()],
    begun: [Plain; PAIRS.len()],
}

fn numbers(counts: &[Plain; PAIRS.len()]) -> [u64; PAIRS.len()] {
    [0, 1].map(|pair| counts[pair].load(SeqCst))
}

fn write(machine: &Machine, progress: &Progress, pair: usize) {
    for number in 1..=ROUNDS {
        progress.begun[pair].store(number, SeqCst);
        for (volume, block) in machine.volumes().iter().zip(PAIRS[pair]) {
            let at = block * BLOCK_BYTES;
            volume.write_at(at, &filled(number), Fua::No).unwrap();
        }
        progress.done[pair].store(number, SeqCst);
    }
}

/// Cuts once and sends the epoch; whether it was merged instead.
fn cut(machine: &Machine, replica: &mut Replica, progress: &Progress) -> bool {
    let before = numbers(&progress.done);
    let cut = machine.cut().unwrap();
    let after = numbers(&progress.begun);
    match send(machine, replica, Side::Closing, cut.epoch, usize::MAX).unwrap() {
        Sent::All => {}
        Sent::Some => unreachable!("there is no limit"),
        Sent::Superseded => return true,
    }
    machine.pending(lineage(cut.epoch)).unwrap();
    replica.apply();
    for (pair, [on_a, on_b]) in PAIRS.into_iter().enumerate() {
        let (a, b) = (replica.number(0, on_a), replica.number(1, on_b));
        assert!(a == b || a == b + 1, "{}: {a} on A, {b} on B", cut.epoch);
        let (low, high) = (before[pair], after[pair]);
        assert!(low <= b && a <= high, "{low} <= {b}, {a} <= {high}");
    }
    machine.staged(lineage(cut.epoch)).unwrap();
    false
}

fn scenario(preserve_bytes_max: u64) {
    let host = Host::new();
    // Room for one region, so that each write on B cools the region of another one.
    let machine = host.open("boot", preserve_bytes_max, 1);
    let mut replica = Replica::default();
    copy(&machine, &mut replica);
    let progress = Arc::new(Progress::default());
    let writers: Vec<_> = (0..PAIRS.len())
        .map(|pair| {
            let (machine, progress) = (Arc::clone(&machine), Arc::clone(&progress));
            thread::spawn(move || write(&machine, &progress, pair))
        })
        .collect();
    let keeper = Arc::clone(&machine);
    let keeper = thread::spawn(move || {
        for volume in keeper.volumes() {
            volume.flush().unwrap();
            keeper.maintain().unwrap();
        }
    });
    for _ in 0..EPOCHS {
        let epoch = machine.open_epoch();
        let ahead = thread_rng().gen_range(0..3);
        send(&machine, &mut replica, Side::Open, epoch, ahead).unwrap();
        cut(&machine, &mut replica, &progress);
    }
    for thread in writers.into_iter().chain([keeper]) {
        thread.join().unwrap();
    }
    // Nobody writes any more: what is owed now is what was written and not sent.
    while cut(&machine, &mut replica, &progress) {}
    for [on_a, on_b] in PAIRS {
        for (disk, block) in [(0, on_a), (1, on_b)] {
            let number = replica.number(disk, block);
            assert_eq!([number; 2], host.number(disk, block), "a forgotten write");
            assert_eq!(number, ROUNDS);
        }
    }
    let counters = machine.counters();
    assert_eq!((counters.open_blocks, counters.closing_blocks), (0, 0));
}

#[test]
fn a_cut_is_one_instant_and_forgets_nothing() {
    explore(|| scenario(1 << 20));
}

#[test]
fn also_when_the_side_store_overflows() {
    // Room for one block: the second one that is preserved merges the epoch.
    explore(|| scenario(BLOCK_BYTES + 200));
}
