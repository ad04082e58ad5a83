//! What a replica answers when the primary asks which blocks differ.

use std::{
    collections::BTreeSet,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use understudy::{
    base::{
        ids::{Lineage, SystemIds},
        units::{DiskIndex, Epoch, to_u64, to_usize},
    },
    disk::Fua,
    protocol::compare::{Differing, Hashes, Question, Sample},
    replica::{CompareError, Head, MachineReplica, ReplicaError},
    storage::{Folder, Open, ledger::Ledger},
};

use super::{
    Change, DISK_BYTES, Disks, Host, MACHINE, Model, content, grow,
    observed::{Call, observed},
    options, send, specs,
};

/// A question about every block of both disks, so many in a sample, as whoever holds `disks` asks it: by hashes, if they
/// are not all zeros.
fn question(at: Lineage, disks: &Disks, blocks: usize) -> Question {
    let mut samples = Vec::new();
    for (index, disk) in (0..).zip(disks) {
        for (number, run) in disk.chunks(blocks * 4096).enumerate() {
            let zero = run.iter().all(|&byte| byte == 0);
            samples.push(Sample {
                disk: DiskIndex(index),
                offset: to_u64(number * blocks) * 4096,
                len: to_u64(run.len()),
                hashes: (!zero).then(|| Hashes::of(run)),
            });
        }
    }
    Question {
        number: 1,
        at,
        samples,
    }
}

/// The blocks in which these differ, counted as in [`question`].
fn expected(ours: &Disks, theirs: &Disks) -> Differing {
    let mut differing = Differing::default();
    let blocks = |disks: &Disks| -> Vec<Vec<u8>> {
        let blocks = disks.iter().flat_map(|disk| disk.chunks(4096));
        blocks.map(<[u8]>::to_vec).collect()
    };
    for (number, (ours, theirs)) in blocks(ours).iter().zip(&blocks(theirs)).enumerate() {
        if ours != theirs {
            differing.push(to_u64(number));
        }
    }
    differing
}

/// Compares what each epoch left with each point that the replica still has.
fn check(replica: &MachineReplica, model: &Model, points: std::ops::RangeInclusive<u64>) {
    for (epoch, &lineage) in &model.lineages {
        let view = replica.view_at(lineage);
        if !points.contains(&epoch.0) {
            let refused = view.unwrap_err();
            assert!(matches!(refused, ReplicaError::NoPoint(gone) if gone == *epoch));
            continue;
        }
        let view = view.unwrap();
        for disks in model.history.values() {
            for blocks in [1, 5, 32] {
                let differing = view.compare(&question(lineage, disks, blocks)).unwrap();
                let expected = expected(disks, &model.history[epoch]);
                assert_eq!(differing, expected, "{epoch}, {blocks} blocks");
            }
        }
    }
}

#[test]
fn every_point_is_compared_as_it_is() {
    let host = Host::new();
    let mut model = Model::new();
    let replica = host.open(2).unwrap();
    grow(&replica, &mut model, 0);
    assert!(matches!(replica.head(), Head::Copied(_)), "no point yet");
    check(&replica, &model, 0..=0);
    for epoch in 1..=5 {
        send(&replica, &model.epoch(epoch, Some(epoch - 1))).unwrap();
    }
    check(&replica, &model, 0..=5);
    // A merge does not go beyond what is being compared with.
    let held = replica.view_at(model.lineages[&Epoch(1)]).unwrap();
    replica.merge().unwrap();
    check(&replica, &model, 1..=5);
    drop(held);
    replica.merge().unwrap();
    check(&replica, &model, 3..=5);
    let other = Lineage {
        epoch: Epoch(4),
        ..model.lineages[&Epoch(5)]
    };
    assert!(replica.view_at(other).is_err(), "another history");
}

#[test]
fn what_a_disk_knows_to_be_zeros_is_not_read() {
    let host = Host::new();
    let read = Arc::new(AtomicU64::new(0));
    let count = Arc::clone(&read);
    let folder = observed(host.folder.clone(), move |name, call| {
        if let Call::Read(bytes) = call
            && name.starts_with("disk-")
        {
            count.fetch_add(bytes, Ordering::Relaxed);
        }
    });
    let ledger = Arc::new(Ledger::open_in(&*host.store, "store").unwrap());
    let ids = Arc::new(SystemIds::default());
    let replica = MachineReplica::open(folder, ledger, ids, MACHINE, options(0)).unwrap();
    let mut model = Model::new();
    grow(&replica, &mut model, 1);
    let end = Change {
        disk: 1,
        block: 8,
        blocks: 1,
        data: None,
    };
    send(&replica, &model.epoch_of(2, Some(1), &[end])).unwrap();
    replica.merge().unwrap();
    let at = model.lineages[&Epoch(2)];
    let view = replica.view_at(at).unwrap();
    let blocks = model.disks.iter().flat_map(|disk| disk.chunks(4096));
    let data = blocks.filter(|block| block.iter().any(|&byte| byte != 0));
    let data: u64 = data.map(|block| to_u64(block.len())).sum();
    for blocks in [1, 32] {
        read.store(0, Ordering::Relaxed);
        let differing = view.compare(&question(at, &model.disks, blocks)).unwrap();
        assert_eq!(differing, Differing::default());
        // The half block at the end of the second disk is read, whatever it holds.
        let read = read.load(Ordering::Relaxed);
        assert!((data..=data + 512).contains(&read), "{read} of {data}");
    }
}

/// While the images are on their way to a point, that one and those after it are compared, and none before.
#[test]
fn a_merge_that_is_under_way_leaves_the_points_ahead() {
    let mut merging = 0;
    for steps in 0.. {
        let host = Host::new();
        let mut model = Model::new();
        let replica = host.open(1).unwrap();
        grow(&replica, &mut model, 4);
        host.power.cut_after(steps);
        let merged = replica.merge().is_ok();
        host.power.restore(&mut || true);
        drop(replica);
        let replica = host.open(1).unwrap();
        let first = replica.points()[0].lineage.epoch.0;
        assert!(first == 1 || first == 3, "{steps}: {first}");
        merging += u32::from(first == 3 && !merged);
        // The images are a point that nobody can choose, but the one that the next log starts from.
        check(&replica, &model, first - u64::from(first == 1)..=4);
        if merged {
            break;
        }
    }
    assert!(merging > 3, "the cuts reach into the merge: {merging}");
}

/// Images that somebody put there become the replica's or stay nobody's, wherever the power is cut, and are as they were.
#[test]
fn a_seed_is_taken_whole_or_not_at_all() {
    let put = |host: &Host| {
        for (spec, size) in specs().iter().zip(DISK_BYTES) {
            let name = spec.file_name();
            let file = host.folder.open(&name, Open::CreateNew).unwrap();
            file.write_at(0, &vec![0x5E; to_usize(size)], Fua::No)
                .unwrap();
            file.sync().unwrap();
        }
        host.folder.sync().unwrap();
    };
    let host = Host::new();
    let replica = host.open(1).unwrap();
    assert!(!replica.seed(&specs()).unwrap(), "there is nothing");
    put(&host);
    assert!(
        replica.prepare(&specs()).is_err(),
        "not without being asked to"
    );
    let mut seeds = BTreeSet::new();
    for steps in 0.. {
        let host = Host::new();
        put(&host);
        drop(host.open(1).unwrap());
        host.power.cut_after(steps);
        let done = host.open(1).and_then(|replica| replica.seed(&specs()));
        host.power.restore(&mut || steps % 2 == 0);
        let replica = host.open(1).unwrap();
        let taken = match replica.head() {
            Head::Copied(_) => true,
            Head::Empty => false,
            head => panic!("{steps}: {head:?}"),
        };
        assert!(taken || done.is_err(), "{steps}");
        assert_eq!(replica.seed(&specs()).unwrap(), !taken, "{steps}");
        replica.prepare(&specs()).unwrap();
        let seed = replica.head().lineage().unwrap();
        assert!(seeds.insert(seed.chain.0), "each is a point of its own");
        let view = replica.view_at(seed).unwrap();
        for disk in &view.disks {
            assert!(content(&**disk).iter().all(|&byte| byte == 0x5E));
        }
        if done.is_ok() {
            assert!(steps > 3, "the cuts reach into the call: {steps}");
            break;
        }
    }
}

#[test]
fn a_question_that_makes_no_sense_is_refused() {
    let host = Host::new();
    let mut model = Model::new();
    let replica = host.open(2).unwrap();
    grow(&replica, &mut model, 1);
    let at = model.lineages[&Epoch(1)];
    let view = replica.view_at(at).unwrap();
    let mut beyond = question(at, &model.disks, 1);
    beyond.samples.last_mut().unwrap().len = 4096;
    let refused = view.compare(&beyond).unwrap_err();
    assert!(matches!(refused, CompareError::Malformed(_)), "{refused}");
}
