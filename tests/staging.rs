//! The replica store against a model that keeps the bytes of every disk at every cut.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on stops")]

mod bytes;
mod compare;
mod cuts;
mod elsewhere;
mod growth;
mod handover;
mod observed;
mod points;
mod random;
mod refusals;
mod rescue;
mod rescue_cuts;
mod thinning;
mod writes;

use std::{collections::BTreeMap, sync::Arc};

use understudy::{
    base::{
        clock::Timestamp,
        ids::{Generation, Lineage, MachineId, Name, SystemIds},
        units::{DiskIndex, Epoch, Extent, to_u64, to_usize},
    },
    delta::{Codec, DiskEntry, EncodedFrame, Encoder, Header, LogKind, encode_data, encode_zero},
    disk::{Content, Disk, Fua, Geometry, Space, image::Format},
    replica::{
        DiskSpec, IngestError, IngestEvent, MachineReplica, ReplicaError, ReplicaOptions, Retention,
    },
    storage::{
        Folder,
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

/// What the guest did to some blocks; the last block of a disk may be half a one.
#[derive(Clone, Debug)]
struct Change {
    disk: u16,
    block: u64,
    blocks: u64,
    /// A seed for the bytes and their codec, or zeros.
    data: Option<(u8, Codec)>,
}

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
        format: Format::Raw,
    };
    entries().into_iter().map(spec).collect()
}

/// A disk of a machine that has no other.
pub(crate) fn one_disk(size: u64, format: Format) -> (DiskEntry, DiskSpec) {
    let geometry = Geometry {
        size,
        logical_sector: 512,
        physical_sector: 4096,
    };
    let entry = DiskEntry {
        name: Name::new("disk").unwrap(),
        size,
        logical_sector: geometry.logical_sector,
        physical_sector: geometry.physical_sector,
    };
    let spec = DiskSpec {
        name: entry.name.clone(),
        geometry,
        format,
    };
    (entry, spec)
}

/// The log of one disk with these frames; its cut is at second `epoch`.
pub(crate) fn log_after(
    (machine, generation): (MachineId, Generation),
    parent: Option<Lineage>,
    disk: &DiskEntry,
    frames: &[EncodedFrame],
    epoch: u64,
) -> (Vec<u8>, Lineage) {
    let header = Header {
        machine,
        generation,
        kind: parent.map_or(LogKind::Initial, |_| LogKind::Delta),
        parent,
        disks: vec![disk.clone()],
    };
    log_of(&header, frames, Epoch(epoch))
}

fn log_of(header: &Header, frames: &[EncodedFrame], epoch: Epoch) -> (Vec<u8>, Lineage) {
    let (mut encoder, first) = Encoder::new(header);
    let mut bytes = first.to_vec();
    for frame in frames {
        encoder.frame(frame);
        frame
            .parts()
            .iter()
            .for_each(|part| bytes.extend_from_slice(part));
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
        let codec = Codec::ALL[to_usize(epoch % 3)];
        let seed = u8::try_from(epoch * 57 % 251).unwrap();
        let start = epoch % 5;
        let data = |disk, block, blocks| Change {
            disk,
            block,
            blocks,
            data: Some((seed, codec)),
        };
        let mut changes = vec![
            data(0, start, 4),
            data(0, start + 3, 3),
            data(0, 12 + start, 1),
            data(1, start, 1),
            Change {
                data: None,
                ..data(0, start + 1, 2)
            },
        ];
        if epoch.is_multiple_of(2) {
            changes.push(data(1, 8, 1));
        }
        self.epoch_of(epoch, parent, &changes)
    }

    /// The log of `epoch` with these changes, after `parent`.
    fn epoch_of(&mut self, epoch: u64, parent: Option<u64>, changes: &[Change]) -> Vec<u8> {
        let frames: Vec<_> = changes.iter().map(|change| self.apply(change)).collect();
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

    fn apply(&mut self, change: &Change) -> EncodedFrame {
        let bytes = &mut self.disks[usize::from(change.disk)];
        let start = to_usize(change.block * 4096);
        let end = to_usize((change.block + change.blocks) * 4096).min(bytes.len());
        let index = DiskIndex(change.disk);
        let run = &mut bytes[start..end];
        let Some((seed, codec)) = change.data else {
            run.fill(0);
            return encode_zero(index, Extent::new(to_u64(start), to_u64(run.len())));
        };
        for (n, byte) in run.iter_mut().enumerate() {
            *byte = u8::try_from((n / 512 * 31 + usize::from(seed)) % 251).unwrap() + 1;
        }
        encode_data(index, to_u64(start), run.to_vec(), codec)
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
        MachineReplica::open(
            folder,
            ledger,
            Arc::new(SystemIds::default()),
            MACHINE,
            options,
        )
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
        retention: Retention { newest, hourly: 0 },
        space_max: None,
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
