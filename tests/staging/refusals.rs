//! What a replica does not take: logs, disks and files that are not its own.

use understudy::{
    base::{
        checksum::Digest,
        ids::{Generation, MachineId, Name},
        units::{DiskIndex, Epoch},
    },
    delta::{Codec, Header, LogKind, encode_data},
    disk::Fua,
    replica::{Head, IngestError, ReplicaError, ReplicaOptions, Squeeze, Upkeep},
    storage::{Folder, Open},
};
use uuid::Uuid;

use super::{
    GENERATION, Host, MACHINE, Model, check_points, content, entries, grow, head_epoch, log_of,
    options, send, specs,
};

#[test]
fn what_does_not_continue_the_replica_is_refused_and_changes_nothing() {
    let host = Host::new();
    let mut model = Model::new();
    let replica = host.open(9).unwrap();
    assert!(matches!(
        replica.begin(GENERATION),
        Err(IngestError::Store(ReplicaError::NotPrepared))
    ));
    grow(&replica, &mut model, 2);
    let files = host.files();
    let good = Header {
        machine: MACHINE,
        generation: GENERATION,
        kind: LogKind::Delta,
        parent: Some(model.lineages[&Epoch(2)]),
        disks: entries(),
    };
    let frames = [encode_data(DiskIndex(0), 0, vec![9; 4096], Codec::None)];
    let refused = |header: &Header| {
        let (log, _) = log_of(header, &frames, Epoch(3));
        let steps = host.power.steps();
        let error = send(&replica, &log).unwrap_err();
        assert_eq!(host.power.steps(), steps, "nothing was written: {error}");
        assert_eq!(host.files(), files);
        error
    };
    let other = |change: &dyn Fn(&mut Header)| {
        let mut header = good.clone();
        change(&mut header);
        refused(&header)
    };
    assert!(matches!(
        other(&|header| header.machine = MachineId(Uuid::from_u128(1))),
        IngestError::Machine { .. }
    ));
    assert!(matches!(
        other(&|header| header.generation.number = 2),
        IngestError::Generation { .. }
    ));
    assert!(matches!(
        other(&|header| header.parent = Some(model.lineages[&Epoch(1)])),
        IngestError::Parent { .. }
    ));
    assert!(matches!(
        other(&|header| header.parent.as_mut().unwrap().chain = Digest([1; 32])),
        IngestError::Parent { .. }
    ));
    assert!(matches!(
        other(&|header| header.disks[1].size = 4096),
        IngestError::Disks
    ));
    assert!(matches!(
        other(&|header| header.disks.truncate(1)),
        IngestError::Disks
    ));
    assert!(matches!(
        other(&|header| {
            header.kind = LogKind::Initial;
            header.parent = None;
        }),
        IngestError::AlreadyComplete(_)
    ));
    check_points(&replica, &model);
    let log = log_of(&good, &frames, Epoch(3)).0;
    send(&replica, &log).unwrap();
    // The same once more, as somebody would who had recorded it.
    let replayed = send(&replica, &log).unwrap_err();
    assert!(matches!(replayed, IngestError::Parent { .. }), "{replayed}");
}

#[test]
fn a_primary_that_was_replaced_is_fenced() {
    let host = Host::new();
    let mut model = Model::new();
    let replica = host.open(9).unwrap();
    grow(&replica, &mut model, 1);
    let old = Generation {
        number: 0,
        id: GENERATION.id,
    };
    assert!(matches!(
        replica.begin(old),
        Err(IngestError::Fenced { .. })
    ));
    let twin = Generation {
        number: 1,
        id: Uuid::from_u128(8),
    };
    assert!(matches!(
        replica.begin(twin),
        Err(IngestError::SplitBrain { .. })
    ));
}

#[test]
fn a_damaged_or_broken_off_log_leaves_no_trace() {
    let host = Host::new();
    let mut model = Model::new();
    let replica = host.open(9).unwrap();
    grow(&replica, &mut model, 2);
    let files = host.files();
    let log = model.epoch(3, Some(2));
    for at in (0..log.len()).step_by(101) {
        let mut damaged = log.clone();
        damaged[at] ^= 0x40;
        assert!(send(&replica, &damaged).is_err(), "{at}");
        assert_eq!(host.files(), files);
        assert!(matches!(
            send(&replica, &log[..at]),
            Err(IngestError::Incomplete)
        ));
        assert_eq!(host.files(), files);
    }
    let mut ingest = replica.begin(GENERATION).unwrap();
    assert!(matches!(replica.begin(GENERATION), Err(IngestError::Busy)));
    assert!(ingest.push(b"#!/bin/sh, which is no log").is_err());
    assert!(matches!(ingest.push(&log), Err(IngestError::Incomplete)));
    drop(ingest);
    let mut long = log.clone();
    long.push(0);
    assert!(send(&replica, &long).is_err());
    assert_eq!(head_epoch(&replica), Some(Epoch(2)));
    send(&replica, &log).unwrap();
    check_points(&replica, &model);
}

#[test]
fn disks_that_changed_are_refused_clearly() {
    let host = Host::new();
    let replica = host.open(9).unwrap();
    replica.prepare(&specs()).unwrap();
    replica.prepare(&specs()).unwrap();
    let mut fewer = specs();
    fewer.pop();
    let mut renamed = specs();
    renamed[0].name = Name::new("system").unwrap();
    let mut shrunk = specs();
    shrunk[1].geometry.size -= 4096;
    for changed in [fewer, renamed, shrunk] {
        let error = replica.prepare(&changed).unwrap_err();
        assert!(matches!(error, ReplicaError::Changed(_)), "{error}");
    }
    let mut twice = specs();
    twice[1].name = twice[0].name.clone();
    assert!(matches!(
        host.open(9).unwrap().prepare(&twice),
        Err(ReplicaError::DiskCount(2))
    ));
    assert!(matches!(
        replica.prepare(&[]),
        Err(ReplicaError::DiskCount(0))
    ));
}

/// A file of somebody else is not overwritten.
#[test]
fn an_image_that_is_not_ours_stays() {
    let host = Host::new();
    let file = host.folder.open("disk-1.raw", Open::CreateNew).unwrap();
    file.write_at(0, b"precious", Fua::No).unwrap();
    let replica = host.open(9).unwrap();
    assert!(replica.prepare(&specs()).is_err());
    assert_eq!(replica.head(), Head::Empty);
    assert_eq!(host.files(), ["disk-1.raw"]);
    assert_eq!(file.len().unwrap(), 8);
}

#[test]
fn a_lost_or_damaged_log_is_named() {
    let host = Host::new();
    let mut model = Model::new();
    let replica = host.open(9).unwrap();
    grow(&replica, &mut model, 4);
    drop(replica);
    let name = format!("{:020}.hrl", 3);
    let file = host.folder.open(&name, Open::Write).unwrap();
    // In the payload: found when the frame is read. The merge can go on when the file is whole again.
    let mut byte = [0];
    file.read_at(3000, &mut byte).unwrap();
    file.write_at(3000, &[byte[0] ^ 1], Fua::No).unwrap();
    let replica = host.open(0).unwrap();
    let error = replica.merge().unwrap_err();
    assert!(
        matches!(&error, ReplicaError::Log { name: found, .. } if *found == name),
        "{error}"
    );
    drop(replica);
    // In the index.
    file.write_at(3000, &byte, Fua::No).unwrap();
    let at = file.len().unwrap() - 100;
    file.read_at(at, &mut byte).unwrap();
    file.write_at(at, &[byte[0] ^ 1], Fua::No).unwrap();
    let replica = host.open(0).unwrap();
    assert!(matches!(
        replica.view(Epoch(4)),
        Err(ReplicaError::Log { .. })
    ));
    drop(replica);
    // In its end: such a log is removed only if nobody was told of it.
    file.write_at(at, &byte, Fua::No).unwrap();
    let end = file.len().unwrap() - 1;
    file.read_at(end, &mut byte).unwrap();
    file.write_at(end, &[byte[0] ^ 1], Fua::No).unwrap();
    let error = host.open(0).unwrap_err();
    assert!(
        matches!(&error, ReplicaError::Log { name: found, .. } if *found == name),
        "{error}"
    );
    file.write_at(end, &byte, Fua::No).unwrap();
    check_points(&host.open(9).unwrap(), &model);
    host.folder.remove(&name).unwrap();
    assert!(matches!(
        host.open(0),
        Err(ReplicaError::LogMissing(Epoch(3)))
    ));
}

/// Logs that would continue the replica, but are those of another machine, or of other disks: somebody copied them here.
#[test]
fn logs_of_something_else_are_neither_taken_up_nor_removed() {
    let host = Host::new();
    let mut model = Model::new();
    let replica = host.open(9).unwrap();
    grow(&replica, &mut model, 3);
    replica.settle(Epoch(2)).unwrap();
    drop(replica);
    let ours = Header {
        machine: MACHINE,
        generation: GENERATION,
        kind: LogKind::Delta,
        parent: Some(model.lineages[&Epoch(2)]),
        disks: entries(),
    };
    let machine = Header {
        machine: MachineId(Uuid::from_u128(1)),
        ..ours.clone()
    };
    let mut disks = ours.clone();
    disks.disks[1].name = Name::new("another").unwrap();
    let frames = [encode_data(DiskIndex(0), 0, vec![9; 4096], Codec::None)];
    let put = |header: &Header, epoch: u64| {
        let name = format!("{epoch:020}.hrl");
        let file = host.folder.open(&name, Open::CreateNew).unwrap();
        let (log, _) = log_of(header, &frames, Epoch(epoch));
        file.write_at(0, &log, Fua::Yes).unwrap();
        name
    };
    let foreign = [put(&machine, 3), put(&disks, 4)];
    // One of ours is taken up, as if the process had died before it was recorded.
    let ours = put(&ours, 5);
    let replica = host.open(9).unwrap();
    assert_eq!(head_epoch(&replica), Some(Epoch(5)));
    let files = host.files();
    assert!(
        foreign
            .iter()
            .chain([&ours])
            .all(|name| files.contains(name))
    );
    assert_eq!(
        content(&*replica.view(Epoch(2)).unwrap().disks[0]),
        model.history[&Epoch(2)][0]
    );
}

#[test]
fn logs_take_no_more_space_than_they_may() {
    let host = Host::new();
    let mut model = Model::new();
    let replica = host.open(9).unwrap();
    grow(&replica, &mut model, 3);
    let bytes = replica.status().log_bytes;
    drop(replica);
    let tight = ReplicaOptions {
        space_max: Some(bytes + 500),
        ..options(9)
    };
    let replica = host.open_with(tight).unwrap();
    let log = model.epoch(4, Some(3));
    let error = send(&replica, &log).unwrap_err();
    assert!(matches!(error, IngestError::Space { .. }) && error.is_full());
    assert_eq!(head_epoch(&replica), Some(Epoch(3)));
    check_points(&replica, &model);
    assert_eq!(replica.status().squeeze, Squeeze::Refusing);
    let step = replica.upkeep().unwrap();
    assert!(
        matches!(step, Some(Upkeep::Merged(report)) if report.to.epoch == Epoch(3)),
        "points give way to space, the latest stays: {step:?}"
    );
    send(&replica, &log).unwrap();
    check_points(&replica, &model);
}
