//! The power goes while writers, a flusher and a sender are at work: what differs afterwards is owed.

use std::error::Error;

use shuttle::thread;
use understudy::volume::{Reconcile, ReplicaHead};

use super::*;

const ROUNDS: u64 = 3;
/// Changing calls of the storage within which the power goes.
const STEPS: u64 = 100;

/// Writes, and flushes now and then, until the power goes; the last number that was flushed on both disks.
fn write(machine: &Machine, pair: usize) -> u64 {
    let mut flushed = 0;
    for number in 1..=ROUNDS {
        let round = || {
            for (volume, block) in machine.volumes().iter().zip(PAIRS[pair]) {
                volume.write_at(block * BLOCK_BYTES, &filled(number), Fua::No)?;
            }
            // What is not flushed may reach the replica and not the platter.
            let flushes = thread_rng().r#gen::<bool>();
            if flushes {
                for volume in machine.volumes() {
                    volume.flush()?;
                }
            }
            Ok::<_, Box<dyn Error>>(flushes)
        };
        match round() {
            Ok(true) => flushed = number,
            Ok(false) => {}
            Err(_) => break,
        }
    }
    flushed
}

/// Cuts and sends until the power goes. `replica` is what the other host holds durably.
fn replicate(
    machine: &Machine,
    replica: &mut Replica,
    head: &mut Epoch,
) -> Result<(), Box<dyn Error>> {
    for _ in 0..2 {
        send(machine, replica, Side::Open, machine.open_epoch(), 1)?;
        let cut = machine.cut()?;
        if let Sent::All = send(machine, replica, Side::Closing, cut.epoch, usize::MAX)? {
            machine.pending(lineage(cut.epoch))?;
            // The trailer arrives; the acknowledgement may not.
            replica.apply();
            *head = cut.epoch;
            machine.staged(lineage(cut.epoch))?;
        }
    }
    Ok(())
}

fn scenario() {
    let host = Host::new();
    // Room for one region, so that regions cool while others are written.
    let machine = host.open("before", 4 * BLOCK_BYTES, 1);
    let mut replica = Replica::default();
    copy(&machine, &mut replica);
    host.power.cut_after(thread_rng().gen_range(0..STEPS));
    let writers: Vec<_> = (0..PAIRS.len())
        .map(|pair| {
            let machine = Arc::clone(&machine);
            thread::spawn(move || write(&machine, pair))
        })
        .collect();
    let keeper = Arc::clone(&machine);
    // The first call finds busy regions, the next ones cool them.
    let keeper = thread::spawn(move || (0..3).all(|_| keeper.maintain().is_ok()));
    let mut head = Epoch::INITIAL;
    // It ends with an error where the power goes first.
    let _ = replicate(&machine, &mut replica, &mut head);
    replica.log.clear();
    let flushed: Vec<u64> = writers.into_iter().map(|w| w.join().unwrap()).collect();
    keeper.join().unwrap();
    drop(machine);

    let mut kept = || thread_rng().r#gen();
    host.power.restore(&mut kept);
    host.state.lose(&mut kept).unwrap();
    let machine = host.open("after", 1 << 20, 1);
    let found = machine.reconcile(ReplicaHead::At(lineage(head))).unwrap();
    assert!(matches!(found, Reconcile::InStep | Reconcile::AckLost));
    // Torn blocks are the guest's: it was never told that they are written.
    let owed = machine.divergence();
    for (pair, places) in PAIRS.into_iter().enumerate() {
        for (disk, block) in places.into_iter().enumerate() {
            let image = host.number(disk, block);
            assert!(image.iter().all(|&n| n >= flushed[pair]), "lost a flush");
            let marked = owed
                .iter()
                .any(|(of, run)| of.index() == disk && run.blocks().contains(&block));
            let number = replica.number(disk, block);
            assert!(
                marked || image == [number; 2],
                "block {block} of {disk} holds {image:?}, the replica {number}, and nobody knows"
            );
        }
    }
}

#[test]
fn after_a_power_cut_what_differs_is_owed() {
    explore(scenario);
}
