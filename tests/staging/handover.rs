//! A replica is settled on one point under the eyes of a guest, and gives its images away.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
        mpsc,
    },
};

use parking_lot::Mutex;
use understudy::{
    base::{ids::SystemIds, units::Epoch},
    delta::Codec,
    disk::{Disk, Fua, image::Format, layered::LayeredDisk},
    replica::{Head, MachineReplica, PointView, ReplicaError},
    storage::{
        Folder, Open,
        ledger::Ledger,
        memory::{MemoryStorage, Power},
    },
};
use uuid::Uuid;

use super::{
    Disks, GENERATION, Host, MACHINE, Model, check_points, content,
    cuts::keeps,
    grow, head_epoch,
    observed::{Call, observed},
    options,
    rescue::{COMMON, adoption, check_rescue, differing, leave_images, parted, specs_in},
    send, specs,
};

/// A guest on an uncommitted failover: a layer over each disk of a view, and something written to it.
struct Guest {
    view: PointView,
    layers: Vec<LayeredDisk>,
    point: Disks,
    sees: Disks,
}

impl Guest {
    fn start(view: PointView, point: &Disks) -> Self {
        let identity = view.point.lineage.chain;
        let mut sees = point.clone();
        let layers = view.disks.iter().zip(&mut sees).map(|(disk, sees)| {
            let file = MemoryStorage::new(&Power::new());
            let layer = LayeredDisk::open(Arc::clone(disk), file, identity, Uuid::nil()).unwrap();
            layer.write_at(5000, &[0x77; 3000], Fua::No).unwrap();
            sees[5000..8000].fill(0x77);
            layer
        });
        Self {
            layers: layers.collect(),
            view,
            point: point.clone(),
            sees,
        }
    }

    fn check(&self) {
        for (disk, expected) in self.view.disks.iter().zip(&self.point) {
            assert!(content(&**disk) == *expected, "the view changed");
        }
        for (disk, expected) in self.layers.iter().zip(&self.sees) {
            assert!(content(disk) == *expected, "what the guest sees changed");
        }
    }
}

/// A former primary that was replaced, caught up and is promoted again at a point that is not its newest: its base is
/// no point, its oldest logs are folded, and all of it is folded into the base while a guest reads on.
///
/// Before each change of an image another thread reads everything, so that every state in between is seen; with
/// VHDX, where the image may hold a lock then, that thread reads as it can.
#[test]
fn a_view_of_the_point_is_right_while_the_replica_settles_on_it() {
    for (format, lockstep) in [(Format::Raw, true), (Format::Vhdx, false)] {
        let host = Host::new();
        let (mut model, own) = parted();
        let specs = specs_in(format);
        leave_images(&*host.folder, &specs, &own);
        let (ask, asked) = mpsc::channel();
        let (answer, answered) = mpsc::channel();
        let (answered, end) = (Mutex::new(answered), mpsc::Sender::clone(&ask));
        let settling = Arc::new(AtomicBool::new(false));
        let changes = Arc::new(AtomicU64::new(0));
        let (active, count) = (Arc::clone(&settling), Arc::clone(&changes));
        let folder = observed(host.folder.clone(), move |name, call| {
            let reads = matches!(call, Call::Read(_)) || !name.starts_with("disk-");
            if reads || !active.load(Ordering::Acquire) {
                return;
            }
            count.fetch_add(1, Ordering::Relaxed);
            if lockstep {
                ask.send(true).unwrap();
                answered.lock().recv().unwrap();
            }
        });
        let ledger = Arc::new(Ledger::open_in(&*host.store, "store").unwrap());
        let ids = Arc::new(SystemIds::default());
        let replica = MachineReplica::open(folder, ledger, ids, MACHINE, options(3)).unwrap();
        replica.adopt(&specs, adoption(&model, false)).unwrap();
        let first = model.epoch_of(COMMON + 1, Some(COMMON), &differing(9, Codec::Zstd));
        send(&replica, &first).unwrap();
        for epoch in COMMON + 2..=COMMON + 20 {
            send(&replica, &model.epoch(epoch, Some(epoch - 1))).unwrap();
            while replica.upkeep().unwrap().is_some() {}
        }
        check_rescue(&replica, &own);
        assert!(replica.status().counters.folded > 0);
        let chosen = Epoch(COMMON + 18);
        let guest = Guest::start(replica.view(chosen).unwrap(), &model.history[&chosen]);
        std::thread::scope(|scope| {
            let (guest, active) = (&guest, Arc::clone(&settling));
            settling.store(true, Ordering::Release);
            scope.spawn(move || {
                if !lockstep {
                    while active.load(Ordering::Acquire) {
                        guest.check();
                    }
                    return;
                }
                while asked.recv().unwrap() {
                    guest.check();
                    answer.send(()).unwrap();
                }
            });
            let settled = replica.settle(chosen);
            settling.store(false, Ordering::Release);
            if lockstep {
                end.send(false).unwrap();
            }
            assert_eq!(settled.unwrap(), model.lineages[&chosen]);
        });
        assert!(
            changes.load(Ordering::Relaxed) > 8,
            "the images were written"
        );
        guest.check();
        let given = replica.retire().unwrap();
        drop(replica);
        guest.check();
        for ((_, disk), expected) in given.iter().zip(&model.history[&chosen]) {
            assert!(content(&**disk) == *expected);
        }
    }
}

#[test]
fn a_settled_replica_gives_its_images_away() {
    let host = Host::new();
    let mut model = Model::new();
    let replica = host.open(9).unwrap();
    assert!(matches!(replica.retire(), Err(ReplicaError::NotPrepared)));
    replica.prepare(&specs()).unwrap();
    assert!(matches!(replica.retire(), Err(ReplicaError::NotSettled)));
    send(&replica, &model.epoch(0, None)).unwrap();
    assert!(
        matches!(replica.retire(), Err(ReplicaError::NotSettled)),
        "no point yet"
    );
    for epoch in 1..=5 {
        send(&replica, &model.epoch(epoch, Some(epoch - 1))).unwrap();
        assert!(
            matches!(replica.retire(), Err(ReplicaError::NotSettled)),
            "{epoch}"
        );
    }
    let chosen = Epoch(4);
    replica.settle(chosen).unwrap();
    let ingest = replica.begin(GENERATION).unwrap();
    assert!(matches!(replica.retire(), Err(ReplicaError::Receiving)));
    drop(ingest);
    let expected = model.history[&chosen].clone();
    let view = replica.view(chosen).unwrap();
    let given = replica.retire().unwrap();

    assert!(matches!(replica.retire(), Err(ReplicaError::Closed)));
    assert!(matches!(replica.view(chosen), Err(ReplicaError::Closed)));
    assert!(matches!(replica.view_rescue(), Err(ReplicaError::Closed)));
    assert!(matches!(replica.drop_rescue(), Err(ReplicaError::Closed)));
    assert!(matches!(replica.settle(chosen), Err(ReplicaError::Closed)));
    assert!(matches!(replica.upkeep(), Err(ReplicaError::Closed)));
    assert!(matches!(
        replica.prepare(&specs()),
        Err(ReplicaError::Closed)
    ));
    assert!(matches!(replica.destroy(), Err(ReplicaError::Closed)));
    assert!(replica.begin(GENERATION).is_err());
    drop(replica);

    let names: Vec<_> = given.iter().map(|(image, _)| image.file.clone()).collect();
    assert_eq!(names, ["disk-0.raw", "disk-1.raw"]);
    for ((image, disk), (spec, expected)) in given.iter().zip(specs().iter().zip(&expected)) {
        assert_eq!((&image.name, &image.file), (&spec.name, &spec.file_name()));
        assert!(content(&**disk) == *expected);
        disk.write_at(4096, &[0x11; 4096], Fua::Yes).unwrap();
    }
    let mut now = expected.clone();
    for (disk, bytes) in view.disks.iter().zip(&mut now) {
        bytes[4096..8192].fill(0x11);
        assert!(
            content(&**disk) == *bytes,
            "a view of images alone shows what is written to them"
        );
    }
    drop(view);
    for (_, disk) in &given {
        disk.close().unwrap();
    }
    drop(given);
    let mut files = host.files();
    files.sort();
    assert_eq!(files, names);

    // The same images, as those of a former primary.
    let replica = host.open(9).unwrap();
    assert_eq!(replica.head(), Head::Empty);
    assert!(replica.prepare(&specs()).is_err(), "they are not made anew");
    let mut own = adoption(&model, false);
    own.lineage = model.lineages[&chosen];
    replica.adopt(&specs(), own).unwrap();
    check_rescue(&replica, &now);
}

/// Logs that a merge could not remove are gone when the images are given away: whoever uses the folder next would take
/// them for its own.
#[test]
fn a_retired_replica_leaves_nothing_but_its_images() {
    let mut left = 0;
    for steps in 0.. {
        let host = Host::new();
        let mut model = Model::new();
        let replica = host.open(9).unwrap();
        grow(&replica, &mut model, 4);
        let before = host.power.steps();
        host.power.fail_after(steps, io::ErrorKind::Other);
        let failed = replica.settle(Epoch(3)).is_err();
        if !failed && host.power.steps() - before <= steps {
            break;
        }
        let files = host.files().len();
        if replica.retire().is_ok() {
            left += files - 2;
            assert_eq!(host.files().len(), 2, "{steps}: {:?}", host.files());
        }
    }
    assert!(left > 0);
}

/// Interrupted, the replica is there, settled as it was, or gone, and its images are complete.
#[test]
fn retiring_survives_a_power_cut_at_any_step() {
    for steps in 0.. {
        let mut done = false;
        for variant in 0..3 {
            let what = format!("step {steps}, variant {variant}");
            let host = Host::new();
            let mut model = Model::new();
            let replica = host.open(9).unwrap();
            grow(&replica, &mut model, 4);
            replica.settle(Epoch(3)).unwrap();
            host.power.cut_after(steps);
            done = replica.retire().is_ok();
            drop(replica);
            host.power.restore(&mut keeps(variant));
            let replica = host.open(9).unwrap();
            if replica.head() != Head::Empty {
                assert!(!done, "{what}");
                check_points(&replica, &model);
                assert_eq!(head_epoch(&replica), Some(Epoch(3)), "{what}");
                replica.retire().unwrap();
            }
            assert_eq!(host.files().len(), 2, "{what}: {:?}", host.files());
            for (spec, expected) in specs().iter().zip(&model.history[&Epoch(3)]) {
                let image = host.folder.open(&spec.file_name(), Open::Read).unwrap();
                let mut bytes = vec![0; expected.len()];
                image.read_at(0, &mut bytes).unwrap();
                assert!(bytes == *expected, "{what}");
            }
        }
        if done {
            assert!(steps >= 3, "the cuts reach into it: {steps}");
            break;
        }
    }
}

/// A log that could not be removed when the replica went back, and was forgotten by the next attempt, was taken up as
/// the continuation of the chosen point when the store was opened again.
#[test]
fn a_log_that_could_not_be_removed_does_not_come_back() {
    let chosen = Epoch(2);
    let mut repeated = 0;
    for steps in 0.. {
        let host = Host::new();
        let mut model = Model::new();
        let replica = host.open(9).unwrap();
        grow(&replica, &mut model, 4);
        let before = host.power.steps();
        host.power.fail_after(steps, io::ErrorKind::Other);
        let failed = replica.settle(chosen).is_err();
        if !failed && host.power.steps() - before <= steps {
            break;
        }
        // The node's store takes nothing any more after a failed commit.
        let again = failed.then(|| replica.settle(chosen));
        drop(replica);
        match again {
            Some(Ok(_)) => repeated += 1,
            Some(Err(_)) => drop(host.open(9).unwrap().settle(chosen).unwrap()),
            None => {}
        }
        let replica = host.open(9).unwrap();
        assert_eq!(head_epoch(&replica), Some(chosen), "failed at step {steps}");
        check_points(&replica, &model);
        assert_eq!(
            (replica.points().len(), host.files().len()),
            (1, 2),
            "{steps}"
        );
    }
    assert!(repeated > 3, "{repeated}");
}
