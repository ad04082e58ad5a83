//! The rescue point: a former primary becomes a replica on its own images, and nothing of its own is lost until
//! somebody says so.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use understudy::{
    base::{
        clock::Timestamp,
        ids::{Generation, SystemIds},
        units::Epoch,
    },
    delta::Codec,
    disk::{
        Access, Disk, Fua, Opening,
        image::{self, CreateOptions, Format},
        layered::{LayerError, LayeredDisk},
    },
    replica::{
        Adoption, DiskSpec, Head, MachineReplica, ReplicaError, ReplicaOptions, Rescue, Retention,
        Squeeze,
    },
    storage::{
        Folder, Open,
        ledger::Ledger,
        memory::{MemoryStorage, Power},
    },
};
use uuid::Uuid;

use super::{
    Change, DISK_BYTES, Disks, GENERATION, Host, MACHINE, Model, check_points, content, head_epoch,
    observed::{Call, observed},
    options, send, specs,
};

/// The epoch that the former primary and the new one have in common.
pub(crate) const COMMON: u64 = 3;

/// What the former primary wrote after that, and what the first epoch of the new one holds at least.
const OWN: [(u16, u64, u64); 4] = [(0, 0, 2), (0, 13, 3), (0, 20, 1), (1, 8, 1)];

pub(crate) fn adoption(model: &Model, exact: bool) -> Adoption {
    Adoption {
        lineage: model.lineages[&Epoch(COMMON)],
        cut: Timestamp(COMMON * 1_000_000),
        exact,
        generation: GENERATION,
    }
}

/// The machine at the common point, and the disks that the former primary has.
pub(crate) fn parted() -> (Model, Disks) {
    let mut model = Model::new();
    // Everywhere data: what later epochs leave alone is seen only in the images.
    let whole = |disk: u16| Change {
        disk,
        block: 0,
        blocks: DISK_BYTES[usize::from(disk)].div_ceil(4096),
        data: Some((77, Codec::None)),
    };
    model.epoch_of(0, None, &[whole(0), whole(1)]);
    for epoch in 1..=COMMON {
        model.epoch(epoch, Some(epoch - 1));
    }
    let mut own = model.disks.clone();
    for (disk, block, blocks) in OWN {
        let bytes = &mut own[usize::from(disk)];
        let range = usize::try_from(block * 4096).unwrap()
            ..usize::try_from((block + blocks) * 4096)
                .unwrap()
                .min(bytes.len());
        bytes[range].fill(0xEE);
    }
    (model, own)
}

/// The first epoch after the common point writes at least what differs.
pub(crate) fn differing(seed: u8, codec: Codec) -> Vec<Change> {
    let change = |(disk, block, blocks)| Change {
        disk,
        block,
        blocks,
        data: Some((seed, codec)),
    };
    OWN.into_iter().map(change).collect()
}

pub(crate) fn specs_in(format: Format) -> Vec<DiskSpec> {
    let specs = specs().into_iter();
    specs.map(|spec| DiskSpec { format, ..spec }).collect()
}

/// Makes images with these bytes, as a primary leaves them.
pub(crate) fn leave_images(folder: &dyn Folder, specs: &[DiskSpec], disks: &Disks) {
    for (spec, bytes) in specs.iter().zip(disks) {
        let file = folder.open(&spec.file_name(), Open::CreateNew).unwrap();
        let ids = Arc::new(SystemIds::default());
        let options = CreateOptions::new(spec.format, spec.geometry);
        image::create(&*file, &options, &*ids).unwrap();
        let opening = Opening::new(Access::ReadWrite, ids);
        let disk = image::open(file, spec.format, &opening).unwrap();
        disk.write_at(0, bytes, Fua::No).unwrap();
        disk.close().unwrap();
    }
    folder.sync().unwrap();
}

/// A host whose replica has adopted its own images.
fn adopted(options: ReplicaOptions) -> (Host, Model, Disks, MachineReplica) {
    let host = Host::new();
    let (model, own) = parted();
    leave_images(&*host.folder, &specs(), &own);
    let replica = host.open_with(options).unwrap();
    replica.adopt(&specs(), adoption(&model, false)).unwrap();
    (host, model, own, replica)
}

pub(crate) fn check_rescue(replica: &MachineReplica, own: &Disks) {
    let view = replica.view_rescue().unwrap();
    for (disk, expected) in view.disks.iter().zip(own) {
        assert!(content(&**disk) == *expected, "the rescue point changed");
        assert!(disk.write_at(0, &[0; 512], Fua::No).is_err());
    }
}

pub(crate) fn keep_up(replica: &MachineReplica) {
    while replica.upkeep().unwrap().is_some() {}
}

/// A former primary whose images are watched.
struct Watched {
    host: Host,
    folder: Arc<dyn Folder>,
    /// Bytes of the images that were written.
    changed: Arc<AtomicU64>,
    specs: Vec<DiskSpec>,
    model: Model,
    own: Disks,
}

impl Watched {
    fn new(format: Format) -> Self {
        let host = Host::new();
        let (model, own) = parted();
        let specs = specs_in(format);
        leave_images(&*host.folder, &specs, &own);
        let changed = Arc::new(AtomicU64::new(0));
        let counter = Arc::clone(&changed);
        let folder = observed(host.folder.clone(), move |name, call| match call {
            Call::Write(bytes) | Call::Change(bytes) if name.starts_with("disk-") => {
                counter.fetch_add(bytes, Ordering::Relaxed);
            }
            _ => {}
        });
        Self {
            host,
            folder,
            changed,
            specs,
            model,
            own,
        }
    }

    /// What was written when the images were opened is not counted: a format may note that they were.
    fn open(&self) -> MachineReplica {
        let ledger = Arc::new(Ledger::open_in(&*self.host.store, "store").unwrap());
        let (folder, ids) = (Arc::clone(&self.folder), Arc::new(SystemIds::default()));
        let replica = MachineReplica::open(folder, ledger, ids, MACHINE, options(2)).unwrap();
        self.changed.store(0, Ordering::Relaxed);
        replica
    }

    fn adopt(&self) -> MachineReplica {
        let replica = self.open();
        let adoption = adoption(&self.model, false);
        replica.adopt(&self.specs, adoption).unwrap();
        self.changed.store(0, Ordering::Relaxed);
        replica
    }

    fn changed(&self) -> u64 {
        self.changed.load(Ordering::Relaxed)
    }

    fn catch_up(&mut self, replica: &MachineReplica) {
        let changes = differing(9, Codec::Lz4);
        let log = self.model.epoch_of(COMMON + 1, Some(COMMON), &changes);
        send(replica, &log).unwrap();
    }

    fn epoch(&mut self, replica: &MachineReplica, epoch: u64) {
        send(replica, &self.model.epoch(epoch, Some(epoch - 1))).unwrap();
        keep_up(replica);
        check_points(replica, &self.model);
    }
}

#[test]
fn as_long_as_it_is_kept_the_images_are_not_written() {
    for format in [Format::Raw, Format::Vhdx] {
        let mut watched = Watched::new(format);
        let mut replica = watched.adopt();
        let head = watched.model.lineages[&Epoch(COMMON)];
        let rescue = Rescue {
            lineage: head,
            cut: Timestamp(COMMON * 1_000_000),
            generation: GENERATION,
        };
        assert_eq!(
            (replica.head(), replica.points()),
            (Head::Copied(head), vec![])
        );
        assert_eq!(replica.rescue(), Some(rescue));
        let settled = replica.settle(Epoch(COMMON));
        assert!(matches!(settled, Err(ReplicaError::NoPoint(_))));

        watched.catch_up(&replica);
        let first = watched.model.lineages[&Epoch(COMMON + 1)];
        assert_eq!(replica.head(), Head::Complete(first));
        let mut folded = 0;
        for epoch in COMMON + 2..=COMMON + 30 {
            watched.epoch(&replica, epoch);
            assert_eq!(replica.merge().unwrap(), None);
            check_rescue(&replica, &watched.own);
            assert_eq!(watched.changed(), 0, "{format}: epoch {epoch}");
            if epoch % 10 == 0 {
                folded += replica.status().counters.folded;
                drop(replica);
                replica = watched.open();
                assert_eq!(replica.rescue(), Some(rescue));
                check_points(&replica, &watched.model);
            }
        }
        let status = replica.status();
        assert!(folded > 0 && status.logs < 12, "{status:?}");
        let points = replica.points();
        let epochs = points.iter().map(|point| point.lineage.epoch.0 - COMMON);
        let epochs: Vec<_> = epochs.collect();
        assert_eq!(epochs, [28, 29, 30], "retention goes on above it");
    }
}

#[test]
fn it_stays_until_it_is_dropped_and_nobody_looks_at_it() {
    for format in [Format::Raw, Format::Vhdx] {
        let mut watched = Watched::new(format);
        let replica = watched.adopt();
        watched.catch_up(&replica);
        for epoch in COMMON + 2..=COMMON + 4 {
            watched.epoch(&replica, epoch);
        }
        let view = replica.view_rescue().unwrap();
        for refused in [
            replica.drop_rescue(),
            replica.close(),
            replica.destroy(),
            replica.settle(Epoch(COMMON + 3)).map(drop),
        ] {
            let in_use = matches!(refused, Err(ReplicaError::RescueInUse));
            assert!(in_use, "{refused:?}");
        }
        drop(view);
        replica.drop_rescue().unwrap();
        replica.drop_rescue().unwrap();
        assert_eq!(replica.rescue(), None);
        assert!(matches!(replica.view_rescue(), Err(ReplicaError::NoRescue)));
        assert_eq!(watched.changed(), 0);
        keep_up(&replica);
        assert!(watched.changed() > 0, "{format}");
        assert_eq!(replica.status().logs, 2);
        check_points(&replica, &watched.model);
        drop(replica);
        let replica = watched.open();
        assert_eq!(replica.rescue(), None);
        check_points(&replica, &watched.model);
    }
}

#[test]
fn a_layer_over_the_rescue_point_is_told_from_all_others() {
    let (_host, model, own, replica) = adopted(options(9));
    let view = replica.view_rescue().unwrap();
    let rescue = replica.rescue().unwrap();
    let identity = view.point.lineage.chain;
    assert_eq!(identity, rescue.identity());
    assert_ne!(identity, model.lineages[&Epoch(COMMON)].chain);
    let again = Rescue {
        generation: Generation {
            number: GENERATION.number + 2,
            ..GENERATION
        },
        ..rescue
    };
    assert_ne!(
        identity,
        again.identity(),
        "replaced at the same point once more"
    );

    let file = MemoryStorage::new(&Power::new());
    let boot = Uuid::from_u128(1);
    let layer =
        |identity| LayeredDisk::open(Arc::clone(&view.disks[0]), file.clone(), identity, boot);
    let disk = layer(identity).unwrap();
    disk.write_at(4096, &[5; 4096], Fua::No).unwrap();
    let mut expected = own[0].clone();
    expected[4096..8192].fill(5);
    assert!(content(&disk) == expected);
    drop(disk);
    assert!(content(&layer(identity).unwrap()) == expected);
    let other = layer(model.lineages[&Epoch(COMMON)].chain);
    assert!(matches!(other, Err(LayerError::OtherBase)));
    check_rescue(&replica, &own);
}

/// An epoch that writes six blocks of the first disk, and what differs if it is the first.
fn blocks(model: &mut Model, epoch: u64, parent: u64, first: u64) -> Vec<u8> {
    let seed = u8::try_from(epoch % 251).unwrap();
    let mut changes = vec![Change {
        disk: 0,
        block: first,
        blocks: 6,
        data: Some((seed, Codec::None)),
    }];
    if parent == COMMON {
        changes.extend(differing(seed, Codec::None));
    }
    model.epoch_of(epoch, Some(parent), &changes)
}

/// Every point is the first of its hour. Space runs short: the points go, then the rescue point, and before a log is
/// refused; a rescue point that somebody looks at stays, and logs are refused.
#[test]
fn the_rescue_point_is_the_last_to_give_way_to_space() {
    for watched in [false, true] {
        let tight = ReplicaOptions {
            retention: Retention {
                newest: 0,
                hourly: 999,
            },
            space_max: Some(200_000),
            ..options(0)
        };
        let (host, mut model, own, replica) = adopted(tight);
        let mut last = COMMON;
        let mut next = |first| {
            let before = model.disks.clone();
            let log = blocks(&mut model, last + 3600, last, first);
            let sent = send(&replica, &log);
            if sent.is_ok() {
                last += 3600;
                keep_up(&replica);
                check_points(&replica, &model);
                assert_eq!(head_epoch(&replica), Some(Epoch(last)));
            } else {
                model.disks = before;
            }
            (
                sent.is_ok(),
                replica.status().squeeze,
                replica.rescue().is_some(),
            )
        };
        // The same blocks again and again: one log holds them.
        let same: Vec<_> = (0..12).map(|_| next(0)).collect();
        assert!(same.iter().all(|&(sent, _, kept)| sent && kept), "{same:?}");
        assert_eq!(same[0].1, Squeeze::None);
        assert_eq!(same[11].1, Squeeze::AllButOne, "{same:?}");
        check_rescue(&replica, &own);
        let view = watched.then(|| replica.view_rescue().unwrap());
        let others: Vec<_> = (0..40).map(|n| next(n % 4 * 6)).collect();
        if let Some(view) = view {
            let refused = others.iter().position(|&(sent, ..)| !sent).unwrap();
            assert_eq!(others[refused].1, Squeeze::Refusing);
            check_rescue(&replica, &own);
            drop(view);
            keep_up(&replica);
            assert_eq!((next(0).0, replica.rescue()), (true, None));
        } else {
            let given_up = others.iter().position(|&(.., kept)| !kept);
            assert!(given_up.is_some_and(|at| at > 1), "{others:?}");
            assert!(
                others.iter().all(|&(sent, ..)| sent),
                "nothing is refused: {others:?}"
            );
        }
        assert_eq!(replica.status().squeeze, Squeeze::NoRescue);
        drop(replica);
        let replica = host.open_with(tight).unwrap();
        assert_eq!(
            (replica.rescue(), replica.status().squeeze),
            (None, Squeeze::None)
        );
        check_points(&replica, &model);
    }
}
