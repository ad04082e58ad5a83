//! What a replica holds: epochs become points, points become the base, views read them.

use std::{
    collections::BTreeSet,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use understudy::{
    base::{
        clock::Timestamp,
        ids::{Lineage, SystemIds},
        units::{DiskIndex, Epoch, Extent, to_u64, to_usize},
    },
    delta::{
        Header, chain_of,
        layout::{FRAME_HEADER_BYTES, PREAMBLE_BYTES, header_len},
        trailer::{FOOT_BYTES, Foot, TrailerHead},
    },
    disk::Fua,
    replica::{
        Adoption, Head, IngestEvent, MachineReplica, ReplicaError, ReplicaOptions, Retention,
    },
    storage::{Folder, Open, file::FileFolder, ledger::Ledger, memory::MemoryFolder},
};

use super::{
    GENERATION, Host, MACHINE, Model, check_points, content, grow, head_epoch, options, send, specs,
};

#[test]
fn epochs_become_points_and_points_become_the_base() {
    let host = Host::new();
    let mut model = Model::new();
    let replica = host.open(2).unwrap();
    assert_eq!(replica.head(), Head::Empty);
    replica.prepare(&specs()).unwrap();
    assert_eq!(
        replica.head(),
        Head::Empty,
        "new images are as good as none: holes need not be sent"
    );
    let first = model.epoch(0, None);
    send(&replica, &first).unwrap();
    assert!(
        matches!(replica.head(), Head::Copied(_)),
        "epoch 0 is no point by itself"
    );
    assert!(replica.points().is_empty());

    for epoch in 1..=6 {
        send(&replica, &model.epoch(epoch, Some(epoch - 1))).unwrap();
        check_points(&replica, &model);
        let report = replica.merge().unwrap();
        assert_eq!(report.is_some(), epoch > 2, "{epoch}");
        check_points(&replica, &model);
    }
    let epochs: Vec<u64> = replica
        .points()
        .iter()
        .map(|point| point.lineage.epoch.0)
        .collect();
    assert_eq!(epochs, [4, 5, 6]);
    let status = replica.status();
    assert_eq!(
        (status.base, status.logs, status.merging),
        (Some(Epoch(4)), 2, None)
    );
    assert_eq!(status.last_cut, Some(Timestamp(6_000_000)));
    replica.close().unwrap();
    assert!(matches!(replica.view(Epoch(6)), Err(ReplicaError::Closed)));

    let replica = host.open(0).unwrap();
    check_points(&replica, &model);
    replica.merge().unwrap();
    assert_eq!(replica.points().len(), 1);
    check_points(&replica, &model);
    let mut files = host.files();
    files.sort();
    assert_eq!(files, ["disk-0.raw", "disk-1.raw"]);
}

#[test]
fn merged_epochs_leave_gaps_and_go_on() {
    let host = Host::new();
    let mut model = Model::new();
    let replica = host.open(9).unwrap();
    grow(&replica, &mut model, 1);
    send(&replica, &model.epoch(5, Some(1))).unwrap();
    send(&replica, &model.epoch(6, Some(5))).unwrap();
    check_points(&replica, &model);
    assert_eq!(head_epoch(&replica), Some(Epoch(6)));
}

/// A view goes on reading its point while and after newer epochs come and merges want to pass it.
#[test]
fn an_open_view_holds_the_merge_back() {
    let host = Host::new();
    let mut model = Model::new();
    let replica = host.open(0).unwrap();
    grow(&replica, &mut model, 4);
    let view = replica.view(Epoch(2)).unwrap();
    let report = replica.merge().unwrap().unwrap();
    assert_eq!(report.to.epoch, Epoch(2));
    assert_eq!(replica.merge().unwrap(), None);
    for (disk, expected) in view.disks.iter().zip(&model.history[&Epoch(2)]) {
        assert!(content(&**disk) == *expected);
    }
    check_points(&replica, &model);
    assert!(matches!(
        replica.close(),
        Err(ReplicaError::PointInUse(Epoch(2)))
    ));
    drop(view);
    assert_eq!(replica.merge().unwrap().unwrap().to.epoch, Epoch(4));
    check_points(&replica, &model);
}

/// A failover has chosen a point and does not look at it yet.
#[test]
fn a_held_point_stays_although_it_is_not_looked_at() {
    let host = Host::new();
    let mut model = Model::new();
    let replica = host.open(0).unwrap();
    grow(&replica, &mut model, 4);
    let held = replica.hold(Epoch(2)).unwrap();
    assert_eq!(held.point.lineage.epoch, Epoch(2));
    while replica.upkeep().unwrap().is_some() {}
    let view = replica.view(Epoch(2)).unwrap();
    for (disk, expected) in view.disks.iter().zip(&model.history[&Epoch(2)]) {
        assert!(content(&**disk) == *expected);
    }
    drop((view, held));
    while replica.upkeep().unwrap().is_some() {}
    assert!(matches!(
        replica.hold(Epoch(2)),
        Err(ReplicaError::NoPoint(Epoch(2)))
    ));
}

/// Retention has passed over a point that a failover goes on from. After a restart nobody says that it is in use until the
/// failover asks for it, and it is a point again.
#[test]
fn a_point_in_use_is_one_again_after_a_restart() {
    let host = Host::new();
    let mut model = Model::new();
    let hourly = || ReplicaOptions {
        retention: Retention {
            newest: 0,
            hourly: 1,
        },
        ..options(0)
    };
    let listed = |replica: &MachineReplica| {
        let points = replica.points().into_iter();
        points
            .map(|point| point.lineage.epoch.0)
            .collect::<Vec<_>>()
    };
    let replica = host.open_with(hourly()).unwrap();
    grow(&replica, &mut model, 2);
    let held = replica.hold(Epoch(2)).unwrap();
    send(&replica, &model.epoch(3, Some(2))).unwrap();
    while replica.upkeep().unwrap().is_some() {}
    assert_eq!(listed(&replica), [1, 2, 3]);
    drop((held, replica));

    let replica = host.open_with(hourly()).unwrap();
    assert_eq!(listed(&replica), [1, 3]);
    let held = replica.hold(Epoch(2)).unwrap();
    assert_eq!(listed(&replica), [1, 2, 3]);
    let view = replica.view(Epoch(2)).unwrap();
    for (disk, expected) in view.disks.iter().zip(&model.history[&Epoch(2)]) {
        assert!(content(&**disk) == *expected);
    }
    drop((view, held));
    assert_eq!(listed(&replica), [1, 3]);
}

/// Two bytes written for each byte received, and none read but the logs, once.
#[test]
fn a_byte_received_is_written_twice() {
    let host = Host::new();
    let mut model = Model::new();
    let replica = host.open(0).unwrap();
    grow(&replica, &mut model, 0);
    let before = replica.status().counters;
    for epoch in 1..=3 {
        // Codec none only, so that bytes can be compared.
        send(&replica, &model.epoch(epoch * 3, Some(epoch * 3 - 3))).unwrap();
    }
    replica.merge().unwrap();
    let after = replica.status().counters;
    let received = after.received - before.received;
    assert_eq!(after.staged - before.staged, received);
    assert_eq!(after.log_read, 0, "what was received just now is in memory");
    assert!(after.image_written - before.image_written < received);
}

#[test]
fn an_initial_copy_reports_what_is_durable_and_can_start_again() {
    let host = Host::new();
    let mut model = Model::new();
    let replica = host.open(9).unwrap();
    replica.prepare(&specs()).unwrap();
    let log = model.epoch(0, None);
    let mut ingest = replica.begin(GENERATION).unwrap();
    let events = ingest.push(&log[..20_000]).unwrap();
    assert!(matches!(
        events[..],
        [IngestEvent::Durable {
            frames: 1..,
            bytes: 20_000
        }]
    ));
    drop(ingest);
    drop(replica);
    let replica = host.open(9).unwrap();
    assert_eq!(replica.head(), Head::Copying);
    assert!(replica.points().is_empty());
    send(&replica, &log).unwrap();
    send(&replica, &model.epoch(1, Some(0))).unwrap();
    check_points(&replica, &model);
    assert_eq!(replica.points().len(), 1);
}

#[test]
fn settling_keeps_one_point_and_names_what_is_lost() {
    for kept in 2..=5 {
        let host = Host::new();
        let mut model = Model::new();
        let replica = host.open(3).unwrap();
        grow(&replica, &mut model, 5);
        replica.merge().unwrap();
        let view = replica.view(Epoch(kept)).unwrap();
        let lost = replica.extents_after(Epoch(kept)).unwrap();
        let lineage = replica.settle(Epoch(kept)).unwrap();
        assert_eq!(lineage, model.lineages[&Epoch(kept)]);
        drop(view);
        assert_eq!(replica.points().len(), 1);
        check_points(&replica, &model);
        drop(replica);
        let replica = host.open(3).unwrap();
        assert_eq!(replica.points().len(), 1);
        check_points(&replica, &model);
        for (number, disk) in model.history[&Epoch(kept)].iter().enumerate() {
            for at in (0..disk.len()).filter(|&at| disk[at] != model.disks[number][at]) {
                let named = |(index, run): &(DiskIndex, Extent)| {
                    index.index() == number && (run.offset..run.end()).contains(&to_u64(at))
                };
                assert!(lost.iter().any(named), "disk {number} byte {at}");
            }
        }
    }
}

/// A log too long for an index is scanned, and proved all the same.
#[test]
fn a_log_without_an_index_is_scanned() {
    let host = Host::new();
    let mut model = Model::new();
    let replica = host.open(9).unwrap();
    grow(&replica, &mut model, 2);
    let log = strip_index(&model.epoch(3, Some(2)));
    send(&replica, &log.0).unwrap();
    model.lineages.insert(Epoch(3), log.1);
    check_points(&replica, &model);
    send(&replica, &model.epoch(4, Some(3))).unwrap();
    drop(replica);
    let replica = host.open(0).unwrap();
    check_points(&replica, &model);
    replica.merge().unwrap();
    check_points(&replica, &model);
}

/// The same log without its index.
fn strip_index(log: &[u8]) -> (Vec<u8>, Lineage) {
    let foot_at = log.len() - FOOT_BYTES;
    let mut foot = Foot::parse(log[foot_at..].try_into().unwrap(), to_u64(foot_at)).unwrap();
    let (body, rest) = log.split_at(to_usize(foot.trailer_at));
    let (head, rest) = rest.split_at(FRAME_HEADER_BYTES);
    let mut head = TrailerHead::parse(head.try_into().unwrap(), foot.trailer_at).unwrap();
    let index = &rest[..to_usize(head.index_len().unwrap())];
    let header_len = header_len(log[..PREAMBLE_BYTES].try_into().unwrap()).unwrap();
    let header = Header::parse(&log[..header_len]).unwrap();
    head.index_entries = 0;
    head.index_crc = 0;
    foot.log_len = to_u64(body.len() + FRAME_HEADER_BYTES + FOOT_BYTES);
    foot.chain = chain_of(&header, &log[..header_len], index, head, foot);
    let bytes = [body, &head.to_bytes(), &foot.to_bytes()].concat();
    let lineage = Lineage {
        epoch: foot.epoch,
        chain: foot.chain,
    };
    (bytes, lineage)
}

/// One thread receives, one merges, one looks at points: everything it sees is right.
#[test]
fn receiving_merging_and_reading_at_once() {
    let host = Host::new();
    let mut model = Model::new();
    let replica = host.open(2).unwrap();
    replica.prepare(&specs()).unwrap();
    let logs: Vec<_> = (0..=60u64)
        .map(|epoch| model.epoch(epoch, epoch.checked_sub(1)))
        .collect();
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for log in &logs {
                send(&replica, log).unwrap();
            }
            done.store(true, Ordering::Release);
        });
        scope.spawn(|| {
            while !done.load(Ordering::Acquire) {
                replica.merge().unwrap();
            }
        });
        let mut seen = BTreeSet::new();
        while !done.load(Ordering::Acquire) {
            for point in replica.points() {
                let epoch = point.lineage.epoch;
                // A merge may have passed it since it was listed.
                let Ok(view) = replica.view(epoch) else {
                    continue;
                };
                for (disk, expected) in view.disks.iter().zip(&model.history[&epoch]) {
                    assert!(content(&**disk) == *expected, "epoch {epoch}");
                }
                seen.insert(epoch);
            }
        }
        assert!(!seen.is_empty());
    });
    replica.merge().unwrap();
    check_points(&replica, &model);
    assert_eq!(head_epoch(&replica), Some(Epoch(60)));
    assert_eq!(replica.status().logs, 2);
}

/// The same on the host's file system.
#[test]
fn a_replica_lives_in_real_files() {
    let dir = tempfile::tempdir().unwrap();
    let open = |newest| {
        let folder: Arc<dyn Folder> = Arc::new(FileFolder::open(dir.path()).unwrap());
        let ledger = Arc::new(Ledger::open_in(&*folder, "store").unwrap());
        let machine = folder.folder("machine").unwrap();
        MachineReplica::open(
            machine,
            ledger,
            Arc::new(SystemIds::default()),
            MACHINE,
            options(newest),
        )
        .unwrap()
    };
    let mut model = Model::new();
    let replica = open(3);
    grow(&replica, &mut model, 6);
    check_points(&replica, &model);
    drop(replica);
    let replica = open(3);
    check_points(&replica, &model);
    replica.merge().unwrap();
    let view = replica.view(Epoch(3)).unwrap();
    assert!(content(&*view.disks[0]) == model.history[&Epoch(3)][0]);
    drop(view);
    check_points(&replica, &model);
    replica.close().unwrap();
    let image = std::fs::read(dir.path().join("machine/disk-1.raw")).unwrap();
    assert!(image == model.history[&Epoch(3)][1]);
}

/// A former primary becomes a replica: exactly at the head, or with blocks of its own that the next epoch overwrites.
#[test]
fn the_images_of_a_former_primary_are_adopted() {
    for exact in [true, false] {
        let host = Host::new();
        let mut model = Model::new();
        let replica = host.open(9).unwrap();
        grow(&replica, &mut model, 3);
        replica.settle(Epoch(3)).unwrap();
        replica.close().unwrap();
        let folder = MemoryFolder::new(&host.power);
        for name in host.files() {
            let image = host.folder.open(&name, Open::Read).unwrap();
            let mut bytes = vec![0; to_usize(image.len().unwrap())];
            image.read_at(0, &mut bytes).unwrap();
            if !exact {
                bytes[..4096].fill(0xEE);
            }
            let copy = folder.open(&name, Open::CreateNew).unwrap();
            copy.write_at(0, &bytes, Fua::No).unwrap();
        }
        let other = Host {
            power: host.power.clone(),
            folder,
            store: MemoryFolder::new(&host.power),
        };
        let replica = other.open(9).unwrap();
        let lineage = model.lineages[&Epoch(3)];
        let adoption = Adoption {
            lineage,
            cut: Timestamp(3_000_000),
            exact,
            generation: GENERATION,
        };
        replica.adopt(&specs(), adoption).unwrap();
        assert_eq!(replica.rescue().is_some(), !exact);
        assert!(replica.adopt(&specs(), adoption).is_err());
        let (head, points) = if exact {
            (Head::Complete(lineage), 1)
        } else {
            (Head::Copied(lineage), 0)
        };
        assert_eq!((replica.head(), replica.points().len()), (head, points));
        drop(replica);
        let replica = other.open(9).unwrap();
        check_points(&replica, &model);
        // Epoch 5 starts with the blocks that differ.
        send(&replica, &model.epoch(5, Some(3))).unwrap();
        check_points(&replica, &model);
        assert_eq!(replica.points().len(), points + 1);
        drop(replica);
        let replica = other.open(0).unwrap();
        replica.drop_rescue().unwrap();
        replica.merge().unwrap();
        check_points(&replica, &model);
        assert_eq!(replica.points().len(), 1);
    }
}
