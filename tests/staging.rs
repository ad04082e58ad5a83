//! The replica store against a model: what it holds after every epoch, and after a cut at every step.
//!
//! The scenario is fixed: an initial copy, then epochs that overwrite each other, with merges in between. The model keeps
//! the bytes of every disk at every cut. `SEED` is not needed: the cuts are enumerated, not drawn.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on stops")]

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use understudy::{
    base::{
        checksum::Digest,
        clock::Timestamp,
        ids::{Generation, Lineage, MachineId, Name},
        units::{DiskIndex, Epoch, Extent, to_u64, to_usize},
    },
    delta::{
        Codec, DiskEntry, EncodedFrame, Encoder, Header, LogKind, chain_of, encode_data,
        encode_zero,
        layout::{FRAME_HEADER_BYTES, PREAMBLE_BYTES, header_len},
        trailer::{FOOT_BYTES, Foot, TrailerHead},
    },
    disk::{Content, Disk, Fua, Geometry, Space},
    replica::{
        DiskSpec, Head, ImageFormat, IngestError, IngestEvent, MachineReplica, RawImages,
        ReplicaError, ReplicaOptions, Retention,
    },
    storage::{
        Folder, Open,
        file::FileFolder,
        ledger::Ledger,
        memory::{MemoryFolder, Power},
    },
};
use uuid::Uuid;

const MACHINE: MachineId = MachineId(Uuid::from_u128(0xCAFE));
const GENERATION: Generation = Generation {
    number: 1,
    id: Uuid::from_u128(7),
};
/// The second disk ends with half a block.
const DISK_BYTES: [u64; 2] = [24 * 4096, 8 * 4096 + 512];

type Disks = [Vec<u8>; 2];

/// The primary as the replica sees it: its disks, and the log of each epoch.
struct Model {
    disks: Disks,
    /// The disks at the cut of each epoch.
    history: BTreeMap<Epoch, Disks>,
    lineages: BTreeMap<Epoch, Lineage>,
}

fn entries() -> Vec<DiskEntry> {
    let entry = |(number, &size): (usize, &u64)| DiskEntry {
        name: Name::new(&format!("disk-{number}")).unwrap(),
        size,
        logical_sector: 512,
        physical_sector: 4096,
    };
    DISK_BYTES.iter().enumerate().map(entry).collect()
}

fn specs() -> Vec<DiskSpec> {
    let spec = |entry: DiskEntry| DiskSpec {
        name: entry.name,
        geometry: Geometry {
            size: entry.size,
            logical_sector: entry.logical_sector,
            physical_sector: entry.physical_sector,
        },
        format: ImageFormat::Raw,
    };
    entries().into_iter().map(spec).collect()
}

fn log_of(header: &Header, frames: &[EncodedFrame], epoch: Epoch) -> (Vec<u8>, Lineage) {
    let (mut encoder, first) = Encoder::new(header);
    let mut bytes = first.to_vec();
    for frame in frames {
        encoder.frame(frame);
        bytes.extend_from_slice(frame.bytes());
    }
    let (last, lineage) = encoder.finish(epoch, Timestamp(epoch.0 * 1_000_000));
    bytes.extend_from_slice(&last);
    (bytes, lineage)
}

impl Model {
    fn new() -> Self {
        Self {
            disks: DISK_BYTES.map(|size| vec![0; to_usize(size)]),
            history: BTreeMap::new(),
            lineages: BTreeMap::new(),
        }
    }

    /// The log of `epoch`, whose content is a function of its number, after `parent`.
    fn epoch(&mut self, epoch: u64, parent: Option<u64>) -> Vec<u8> {
        let byte = |n: usize| u8::try_from((to_u64(n / 512) * 31 + epoch * 57) % 251).unwrap() + 1;
        let codec = Codec::ALL[to_usize(epoch % 3)];
        let mut frames = Vec::new();
        let mut data = |disk: usize, block: usize, len: usize| {
            let raw: Vec<u8> = (0..len).map(|n| byte(n + block)).collect();
            let at = block * 4096;
            self.disks[disk][at..at + len].copy_from_slice(&raw);
            let index = DiskIndex(u16::try_from(disk).unwrap());
            frames.push(encode_data(index, to_u64(at), &raw, codec));
        };
        let start = to_usize(epoch) % 5;
        data(0, start, 4 * 4096);
        data(0, start + 3, 3 * 4096);
        data(0, 12 + start, 4096);
        data(1, start, 4096);
        if epoch.is_multiple_of(2) {
            data(1, 8, 512);
        }
        let zero = Extent::new((to_u64(start) + 1) * 4096, 2 * 4096);
        self.disks[0][to_usize(zero.offset)..to_usize(zero.end())].fill(0);
        frames.push(encode_zero(DiskIndex(0), zero));

        let header = Header {
            machine: MACHINE,
            generation: GENERATION,
            kind: if parent.is_some() {
                LogKind::Delta
            } else {
                LogKind::Initial
            },
            parent: parent.map(|parent| self.lineages[&Epoch(parent)]),
            disks: entries(),
        };
        let (bytes, lineage) = log_of(&header, &frames, Epoch(epoch));
        self.history.insert(Epoch(epoch), self.disks.clone());
        self.lineages.insert(Epoch(epoch), lineage);
        bytes
    }
}

/// A host: its power, its folder and its node's store.
struct Host {
    power: Arc<Power>,
    folder: Arc<MemoryFolder>,
    store: Arc<MemoryFolder>,
}

impl Host {
    fn new() -> Self {
        let power = Power::new();
        Self {
            folder: MemoryFolder::new(&power),
            store: MemoryFolder::new(&power),
            power,
        }
    }

    fn open_with(&self, options: ReplicaOptions) -> Result<MachineReplica, ReplicaError> {
        let ledger = Arc::new(Ledger::open_in(&*self.store, "store")?);
        let folder: Arc<dyn Folder> = self.folder.clone();
        MachineReplica::open(folder, ledger, Arc::new(RawImages), MACHINE, options)
    }

    fn open(&self, newest: u32) -> Result<MachineReplica, ReplicaError> {
        self.open_with(options(newest))
    }

    fn files(&self) -> Vec<String> {
        self.folder.names().unwrap()
    }
}

fn options(newest: u32) -> ReplicaOptions {
    ReplicaOptions {
        format: None,
        retention: Retention { newest },
        log_bytes_max: None,
        sync_bytes: 8192,
    }
}

fn send(replica: &MachineReplica, log: &[u8]) -> Result<Vec<IngestEvent>, IngestError> {
    let mut ingest = replica.begin(GENERATION)?;
    let mut events = Vec::new();
    for piece in log.chunks(5000) {
        events.extend(ingest.push(piece)?);
    }
    ingest.finish()?;
    Ok(events)
}

fn content(disk: &dyn Disk) -> Vec<u8> {
    let mut bytes = vec![0; to_usize(disk.geometry().size)];
    disk.read_at(0, &mut bytes).unwrap();
    bytes
}

/// Every recovery point of the replica is what the model says, and reads the same in small pieces.
fn check_points(replica: &MachineReplica, model: &Model) {
    for point in replica.points() {
        let epoch = point.lineage.epoch;
        assert_eq!(point.lineage, model.lineages[&epoch]);
        assert_eq!(point.cut, Timestamp(epoch.0 * 1_000_000));
        let view = replica.view(epoch).unwrap();
        for (disk, expected) in view.disks.iter().zip(&model.history[&epoch]) {
            assert!(content(&**disk) == *expected, "epoch {epoch}");
            check_runs(&**disk, expected);
            assert!(disk.write_at(0, &[0; 512], Fua::No).is_err());
            assert!(
                disk.zero(Extent::new(0, 512), Space::Keep, Fua::No)
                    .is_err()
            );
        }
    }
}

fn check_runs(disk: &dyn Disk, expected: &[u8]) {
    let mut at = 0;
    while at < to_u64(expected.len()) {
        let (run, kind) = disk.run_at(at).unwrap();
        assert!(run.offset == at && run.len > 0);
        let bytes = &expected[to_usize(run.offset)..to_usize(run.end())];
        assert!(kind == Content::Data || bytes.iter().all(|&byte| byte == 0));
        let mut piece = vec![0xEE; bytes.len().min(700)];
        disk.read_at(at, &mut piece).unwrap();
        assert_eq!(piece, bytes[..piece.len()]);
        at = run.end();
    }
}

fn head_epoch(replica: &MachineReplica) -> Option<Epoch> {
    replica.head().lineage().map(|lineage| lineage.epoch)
}

/// Brings a replica to epoch `last`, without merging.
fn grow(replica: &MachineReplica, model: &mut Model, last: u64) {
    replica.prepare(&specs()).unwrap();
    for epoch in 0..=last {
        let log = model.epoch(epoch, epoch.checked_sub(1));
        let events = send(replica, &log).unwrap();
        let staged = IngestEvent::Staged {
            lineage: model.lineages[&Epoch(epoch)],
            cut: Timestamp(epoch * 1_000_000),
        };
        assert_eq!(events.last(), Some(&staged));
    }
}

#[test]
fn epochs_become_points_and_points_become_the_base() {
    let host = Host::new();
    let mut model = Model::new();
    let replica = host.open(2).unwrap();
    assert_eq!(replica.head(), Head::Empty);
    replica.prepare(&specs()).unwrap();
    assert_eq!(replica.head(), Head::Copying);
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
    assert!(after.merge_read < received);
    assert!(after.image_written - before.image_written < received);
}

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
    let frames = [encode_data(DiskIndex(0), 0, &[9; 4096], Codec::None)];
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
    send(&replica, &log_of(&good, &frames, Epoch(3)).0).unwrap();
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
fn disks_that_changed_are_refused_clearly() {
    let host = Host::new();
    let replica = host.open(9).unwrap();
    replica.prepare(&specs()).unwrap();
    replica.prepare(&specs()).unwrap();
    let mut fewer = specs();
    fewer.pop();
    let mut renamed = specs();
    renamed[0].name = Name::new("system").unwrap();
    let mut grown = specs();
    grown[1].geometry.size += 4096;
    for changed in [fewer, renamed, grown] {
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
    host.folder.remove(&name).unwrap();
    assert!(matches!(
        host.open(0),
        Err(ReplicaError::LogMissing(Epoch(3)))
    ));
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
        log_bytes_max: Some(bytes + 500),
        ..options(9)
    };
    let replica = host.open_with(tight).unwrap();
    let log = model.epoch(4, Some(3));
    let error = send(&replica, &log).unwrap_err();
    assert!(matches!(error, IngestError::Space { .. }) && error.is_full());
    assert_eq!(head_epoch(&replica), Some(Epoch(3)));
    check_points(&replica, &model);
    let report = replica.merge().unwrap().unwrap();
    assert!(report.logs > 0, "points give way to space");
    send(&replica, &log).unwrap();
    check_points(&replica, &model);
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

/// Says of each unsynced sector, name or length whether it is kept. The first two are the extremes.
fn keeps(variant: u64) -> impl FnMut() -> bool {
    let mut state = variant;
    move || match variant {
        0 => false,
        1 => true,
        _ => {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            state >> 63 == 0
        }
    }
}

/// What happened before the end of a story.
#[derive(Debug, Default)]
struct Told {
    prepared: bool,
    acknowledged: Option<Epoch>,
    /// Bytes of epoch 0 that were reported as durable.
    finished: bool,
}

const LAST_EPOCH: u64 = 4;

/// The whole life of a replica, up to the first error: an initial copy, epochs, merges, all behind an opened store.
fn tell(host: &Host, logs: &[Vec<u8>], told: &mut Told) -> Result<(), Box<dyn std::error::Error>> {
    let replica = host.open(1)?;
    replica.prepare(&specs())?;
    told.prepared = true;
    let next = head_epoch(&replica).map_or(0, |epoch| epoch.0 + 1);
    for epoch in next..=LAST_EPOCH {
        send(&replica, &logs[to_usize(epoch)])?;
        told.acknowledged = Some(Epoch(epoch));
        replica.merge()?;
    }
    told.finished = true;
    Ok(())
}

fn story() -> (Model, Vec<Vec<u8>>) {
    let mut model = Model::new();
    let logs = (0..=LAST_EPOCH).map(|epoch| model.epoch(epoch, epoch.checked_sub(1)));
    let logs = logs.collect();
    (model, logs)
}

/// What must be true when a host that told so much is opened again.
fn check_survivor(host: &Host, model: &Model, told: &Told, what: &str) {
    let replica = host
        .open(1)
        .unwrap_or_else(|error| panic!("{what}: {error:?}"));
    let head = head_epoch(&replica);
    let in_flight = told.acknowledged.map_or(Epoch::INITIAL, Epoch::next);
    assert!(
        head == told.acknowledged || head == Some(in_flight),
        "{what}: {told:?}, found {head:?}"
    );
    assert!(!told.prepared || replica.head() != Head::Empty, "{what}");
    if head.is_some_and(|head| head > Epoch::INITIAL) {
        let newest = replica.points().last().map(|point| point.lineage.epoch);
        assert_eq!(newest, head, "{what}");
    }
    assert!(
        host.files().iter().all(|name| !name.contains(".part")),
        "{what}"
    );
    check_points(&replica, model);
    drop(replica);
}

/// Goes on from what is left, to the end.
fn check_goes_on(host: &Host, model: &Model, logs: &[Vec<u8>], what: &str) {
    let mut told = Told::default();
    if let Err(error) = tell(host, logs, &mut told) {
        panic!("{what}: {error:?}");
    }
    let replica = host.open(1).unwrap();
    replica.merge().unwrap();
    assert_eq!(head_epoch(&replica), Some(Epoch(LAST_EPOCH)), "{what}");
    check_points(&replica, model);
    let status = replica.status();
    assert_eq!((status.logs, status.merging), (1, None), "{what}");
    assert_eq!(host.files().len(), 3, "{what}: {:?}", host.files());
}

/// The power is cut after every step of the story; of what was not synced nothing, everything or some is kept.
#[test]
fn a_power_cut_at_any_step_loses_nothing_acknowledged() {
    let (model, logs) = story();
    let mut cuts = 0;
    for steps in 0.. {
        let mut finished = false;
        for variant in 0..4 {
            let host = Host::new();
            host.power.cut_after(steps);
            let mut told = Told::default();
            let end = tell(&host, &logs, &mut told);
            assert_eq!(end.is_ok(), told.finished);
            host.power.restore(&mut keeps(variant));
            let what = format!("cut after step {steps}, variant {variant}");
            check_survivor(&host, &model, &told, &what);
            check_goes_on(&host, &model, &logs, &what);
            finished = told.finished;
        }
        cuts += 1;
        if finished {
            break;
        }
    }
    assert!(cuts > 80, "the cuts reach into the story: {cuts}");
}

/// A second cut while the first one is being repaired.
#[test]
fn a_power_cut_while_recovering_loses_nothing_either() {
    let (model, logs) = story();
    for steps in (0..400).step_by(7) {
        for again in 0..12 {
            let host = Host::new();
            host.power.cut_after(steps);
            let mut told = Told::default();
            let _ = tell(&host, &logs, &mut told);
            host.power.restore(&mut keeps(steps));
            host.power.cut_after(again);
            let before = told.acknowledged;
            told.acknowledged = None;
            let _ = tell(&host, &logs, &mut told);
            told.acknowledged = told.acknowledged.max(before);
            host.power.restore(&mut keeps(again + 1));
            let what = format!("cut after step {steps}, again after {again}");
            let replica = host
                .open(1)
                .unwrap_or_else(|error| panic!("{what}: {error:?}"));
            assert!(head_epoch(&replica) >= told.acknowledged, "{what}");
            check_points(&replica, &model);
            drop(replica);
            check_goes_on(&host, &model, &logs, &what);
        }
    }
}

/// The process is killed after every step: all that was written is there, nothing was closed.
#[test]
fn a_killed_process_loses_nothing() {
    let (model, logs) = story();
    for steps in 0.. {
        let host = Host::new();
        host.power.cut_after(steps);
        let mut told = Told::default();
        let _ = tell(&host, &logs, &mut told);
        host.power.restore(&mut || true);
        check_survivor(&host, &model, &told, &format!("killed after step {steps}"));
        if told.finished {
            break;
        }
    }
}

/// Each changing call in turn finds the disk full, once. The replica says so and stays what it was; the same open store
/// takes the epoch when there is space again, or, where a failed sync stopped an image, a reopened one does.
#[test]
fn a_full_disk_at_any_step_is_an_error_and_no_more() {
    let (model, logs) = story();
    let mut failures = 0;
    for steps in 0.. {
        let host = Host::new();
        host.power.fail_after(steps, io::ErrorKind::StorageFull);
        let what = format!("full at step {steps}");
        let mut told = Told::default();
        let end = tell(&host, &logs, &mut told);
        if end.is_err() {
            failures += 1;
            check_survivor(&host, &model, &told, &what);
        } else if host.power.steps() <= steps {
            break;
        }
        check_goes_on(&host, &model, &logs, &what);
    }
    assert!(
        failures > 80,
        "the failures reach into the story: {failures}"
    );
}

/// A process that dies between the rename and the sync of the folder leaves a name that is not durable. The next one
/// tells the primary that it has the epoch: from then on a power cut must not take it away.
#[test]
fn what_a_reopened_replica_claims_survives_a_power_cut() {
    let (model, logs) = story();
    for steps in 0.. {
        let host = Host::new();
        host.power.fail_after(steps, io::ErrorKind::Other);
        let mut told = Told::default();
        let end = tell(&host, &logs, &mut told);
        if end.is_ok() && host.power.steps() <= steps {
            break;
        }
        let claimed = head_epoch(&host.open(1).unwrap());
        host.power.restore(&mut || false);
        let replica = host.open(1).unwrap();
        assert_eq!(head_epoch(&replica), claimed, "failed at step {steps}");
        check_points(&replica, &model);
    }
}

/// Frames of an initial copy that were reported as durable are in the images after any cut: the primary does not send
/// them again.
#[test]
fn durable_frames_of_an_initial_copy_survive_a_power_cut() {
    let frames: Vec<EncodedFrame> = (0..20)
        .map(|block: u8| {
            let raw = [block + 1; 4096];
            encode_data(DiskIndex(0), u64::from(block) * 4096, &raw, Codec::None)
        })
        .collect();
    let header = Header {
        machine: MACHINE,
        generation: GENERATION,
        kind: LogKind::Initial,
        parent: None,
        disks: entries(),
    };
    let (log, _) = log_of(&header, &frames, Epoch::INITIAL);
    let mut most = 0;
    for steps in 0..60 {
        let host = Host::new();
        let replica = host.open(1).unwrap();
        replica.prepare(&specs()).unwrap();
        host.power.cut_after(steps);
        let mut durable = 0;
        let mut ingest = replica.begin(GENERATION).unwrap();
        for piece in log.chunks(3000) {
            for event in ingest.push(piece).unwrap_or_default() {
                if let IngestEvent::Durable { frames, .. } = event {
                    durable = frames;
                }
            }
        }
        drop(ingest);
        drop(replica);
        host.power.restore(&mut || false);
        let image = host.folder.open("disk-0.raw", Open::Read).unwrap();
        for block in 0..durable {
            let mut bytes = [0; 4096];
            image.read_at(block * 4096, &mut bytes).unwrap();
            assert_eq!(u64::from(bytes[4095]), block + 1, "cut after step {steps}");
        }
        most = most.max(durable);
    }
    assert!(most > 10, "the cuts reach into the copy: {most}");
}

/// A commit of a failover that is cut at any step, and then repeated, ends where it should; before that, the replica is
/// at the old head or at the chosen point.
#[test]
fn settling_survives_a_power_cut_at_any_step() {
    let chosen = Epoch(2);
    for steps in 0.. {
        let mut done = false;
        for variant in 0..3 {
            let host = Host::new();
            let mut model = Model::new();
            let replica = host.open(9).unwrap();
            grow(&replica, &mut model, 4);
            host.power.cut_after(steps);
            done = replica.settle(chosen).is_ok();
            drop(replica);
            host.power.restore(&mut keeps(variant));
            let replica = host.open(9).unwrap();
            let head = head_epoch(&replica).unwrap();
            assert!(
                head == chosen || (head == Epoch(4) && !done),
                "step {steps}: {head}"
            );
            check_points(&replica, &model);
            replica.settle(chosen).unwrap();
            assert_eq!(replica.points().len(), 1);
            check_points(&replica, &model);
            assert_eq!(host.files().len(), 2, "step {steps}");
        }
        if done {
            assert!(steps > 10, "the cuts reach into the settling: {steps}");
            break;
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
            Arc::new(RawImages),
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

/// Without reopening: what failed for space is repeated on the same store.
#[test]
fn an_epoch_that_found_the_disk_full_is_taken_later() {
    let (model, logs) = story();
    for steps in 0.. {
        let host = Host::new();
        let replica = host.open(9).unwrap();
        replica.prepare(&specs()).unwrap();
        for log in &logs[..3] {
            send(&replica, log).unwrap();
        }
        let before = host.power.steps();
        host.power.fail_after(steps, io::ErrorKind::StorageFull);
        let first = send(&replica, &logs[3]);
        let what = format!("full at step {steps}");
        if let Err(error) = first {
            assert_eq!(head_epoch(&replica), Some(Epoch(2)), "{what}: {error}");
            check_points(&replica, &model);
            let second = send(&replica, &logs[3]);
            // The node's store takes nothing any more after a failed commit; everything else can be repeated.
            if second.is_err() {
                drop(replica);
                check_goes_on(&host, &model, &logs, &what);
                continue;
            }
            assert_eq!(head_epoch(&replica), Some(Epoch(3)), "{what}");
        } else if host.power.steps() - before <= steps {
            break;
        }
        check_points(&replica, &model);
        let names = host.files();
        assert!(
            names.iter().all(|name| !name.contains(".part")),
            "{what}: {names:?}"
        );
    }
}
