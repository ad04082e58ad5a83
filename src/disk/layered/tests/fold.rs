//! A fold: what it refuses, what it does when something fails, and many threads at work meanwhile.

use std::sync::{Weak, atomic::AtomicU64};

use super::*;
use crate::disk::enumeration::Random;

/// A layer with something in four regions, not flushed, and the target it is folded into.
struct Folding {
    disk: LayeredDisk,
    layer: Arc<MemoryStorage>,
    layer_power: Arc<Power>,
    target: Arc<MemoryStorage>,
    target_power: Arc<Power>,
    shown: Model,
}

impl Folding {
    fn new() -> Self {
        let (layer_power, target_power) = (Power::new(), Power::new());
        let layer = MemoryStorage::new(&layer_power);
        let disk = open(&layer, 1).unwrap();
        let (_, shown, done) = tell(&disk);
        assert!(done);
        let target = image(&target_power);
        disk.fold_into(raw(Arc::clone(&target) as _)).unwrap();
        Self {
            disk,
            layer,
            layer_power,
            target,
            target_power,
            shown,
        }
    }

    fn act(&mut self, act: Act) {
        act.run(&self.disk).unwrap();
        self.shown.did(act);
    }

    /// Another process, in another boot if the number says so.
    fn reopen(&mut self, boot_number: u128) {
        self.disk = open(&self.layer, boot_number).unwrap();
        let target = raw(Arc::clone(&self.target) as _);
        self.disk.fold_into(target).unwrap();
    }

    fn finish(&self) {
        while self.disk.fold().unwrap().is_some() {}
        self.shown.check(&self.disk, "folded");
        self.disk.close().unwrap();
        self.shown
            .check(&*raw(Arc::clone(&self.target) as _), "the target alone");
    }
}

fn is_stopped<T>(result: &Result<T, DiskError>) -> bool {
    matches!(result, Err(DiskError::Stopped(_)))
}

#[test]
fn a_fold_moves_region_by_region_and_gives_the_space_back() {
    let folding = Folding::new();
    let held = folding.disk.held();
    let (mut moved, mut folds) = (0, 0);
    while let Some(bytes) = folding.disk.fold().unwrap() {
        moved += bytes;
        folds += 1;
        folding.shown.check(&folding.disk, "half folded");
    }
    assert_eq!((folding.disk.held(), folds), (0, 4));
    // What is zero in the layer is moved too; the disk ends within its last block.
    assert!(
        moved + BLOCK_BYTES > held && moved <= SIZE,
        "{moved} of {held}"
    );
    assert_given_back(&*folding.layer, &folding.disk);
    folding.finish();
}

#[test]
fn what_the_layer_does_not_hold_is_written_to_the_target_at_once() {
    let mut folding = Folding::new();
    let held = folding.disk.held();
    // A whole block, and a part of one, in the first region, which the layer holds in part.
    folding.act(Act::Write(64, 8, 50, Fua::No));
    folding.act(Act::Write(75, 1, 51, Fua::Yes));
    assert_eq!(folding.disk.held(), held);
    let at = |sector: u64| folding.target.bytes()[to_usize(sector * SECTOR)];
    assert_eq!((at(64), at(75), at(76)), (50, 51, base_value(76)));
    // The forced write alone is on the platter.
    folding.target_power.restore(&mut || false);
    assert_eq!((at(64), at(75)), (base_value(64), 51));
    // A discard reaches it as well, and a flush makes that durable.
    folding.act(Act::Write(64, 8, 50, Fua::No));
    folding.act(Act::Zero(72, 8, Space::Release, Fua::No));
    folding.act(Act::Flush);
    folding.target_power.restore(&mut || false);
    let at = |sector: u64| folding.target.bytes()[to_usize(sector * SECTOR)];
    assert_eq!((at(64), at(75)), (50, 0));
    folding.finish();
}

#[test]
fn a_layer_whose_fold_began_is_nothing_without_its_target() {
    for boot_number in [1, 2] {
        let mut folding = Folding::new();
        folding.act(Act::Flush);
        folding.disk.fold().unwrap();
        folding.disk = open(&folding.layer, boot_number).unwrap();
        let disk = &folding.disk;
        assert!(is_stopped(&disk.read_at(0, &mut [0; 512])));
        assert!(is_stopped(&disk.write_at(0, &[0; 512], Fua::No)));
        assert!(is_stopped(&disk.zero(
            Extent::new(0, 8192),
            Space::Release,
            Fua::No
        )));
        assert!(is_stopped(&disk.run_at(0)));
        assert!(is_stopped(&disk.fold()));
        disk.flush().unwrap();
        folding.reopen(boot_number);
        folding.finish();
    }
}

#[test]
fn a_fold_begins_once_and_into_a_disk_of_the_same_size() {
    let refused = |result: Result<(), DiskError>| match result {
        Err(DiskError::Io {
            operation, source, ..
        }) => operation == "fold" && source.kind() == io::ErrorKind::InvalidInput,
        _ => false,
    };
    let storage = MemoryStorage::new(&Power::new());
    let disk = open(&storage, 1).unwrap();
    assert!(refused(disk.fold().map(|_| ())));
    let smaller = MemoryStorage::with_bytes(&[0; 4096]);
    assert!(refused(disk.fold_into(raw(smaller))));
    disk.write_at(0, &[1; 512], Fua::No).unwrap();
    disk.fold_into(raw(image(&Power::new()))).unwrap();
    assert!(refused(disk.fold_into(raw(image(&Power::new())))));
    disk.close().unwrap();
    assert!(is_stopped(&disk.fold()));
}

#[test]
fn the_target_is_closed_with_the_disk_and_the_base_is_not() {
    for folded in [false, true] {
        let storage = MemoryStorage::new(&Power::new());
        let under = raw(image(&Power::new()));
        let disk = LayeredDisk::open(Arc::clone(&under), storage, IDENTITY, boot(1)).unwrap();
        disk.write_at(0, &[1; 512], Fua::No).unwrap();
        let target = raw(image(&Power::new()));
        disk.fold_into(Arc::clone(&target)).unwrap();
        while folded && disk.fold().unwrap().is_some() {}
        assert_eq!(Arc::strong_count(&under), 1, "the base is let go of");
        disk.close().unwrap();
        assert!(is_stopped(&target.flush()));
        under.flush().unwrap();
    }
}

/// Whatever call of a fold to the target fails, except a flush, nothing is lost and the next fold makes up for it.
#[test]
fn a_target_that_fails_is_tried_again() {
    let mut failures = 0;
    for steps in 0.. {
        let mut folding = Folding::new();
        folding
            .target_power
            .fail_after(steps, io::ErrorKind::StorageFull);
        let error = loop {
            match folding.disk.fold() {
                Ok(None) => break None,
                Ok(Some(_)) => {}
                Err(error) => break Some(error),
            }
        };
        match error {
            None => break,
            Some(DiskError::Io {
                operation: "flush", ..
            }) => {
                assert!(is_stopped(&folding.disk.write_at(0, &[1; 512], Fua::No)));
                assert!(is_stopped(&folding.disk.flush()));
                assert!(is_stopped(&folding.disk.fold()));
                folding.shown.check(&folding.disk, "readable all the same");
                folding.reopen(1);
            }
            Some(_) => failures += 1,
        }
        folding.shown.check(&folding.disk, "after the failure");
        folding.act(Act::Write(2044, 9, 60, Fua::Yes));
        folding.act(Act::Write(5, 3, 61, Fua::No));
        folding.finish();
    }
    assert!(failures > 4, "{failures}");
}

/// The same for the layer's file: a failed write of the cleared map ends the disk, and what was flushed is there.
#[test]
fn a_layer_that_fails_loses_nothing_that_was_flushed() {
    for steps in 0.. {
        let mut folding = Folding::new();
        folding.act(Act::Flush);
        folding.layer_power.fail_after(steps, io::ErrorKind::Other);
        let failed = loop {
            match folding.disk.fold() {
                Ok(None) => break false,
                Ok(Some(_)) => {}
                Err(_) => break true,
            }
        };
        if failed {
            assert!(is_stopped(&folding.disk.write_at(0, &[1; 512], Fua::No)));
            let again = open(&folding.layer, 1).unwrap();
            assert!(
                is_stopped(&again.read_at(0, &mut [0; 512])),
                "it forgot its fold"
            );
        }
        folding.layer_power.restore(&mut || false);
        folding.target_power.restore(&mut || false);
        folding.reopen(1);
        folding.finish();
        // Steps that fail without consequence are the giving back of space.
        if steps > 40 {
            break;
        }
    }
}

#[test]
fn a_failed_flush_of_the_target_ends_the_disk() {
    let mut folding = Folding::new();
    folding.act(Act::Write(64, 8, 50, Fua::Yes));
    folding.act(Act::Flush);
    folding.act(Act::Write(64, 8, 51, Fua::No));
    folding.target_power.fail_after(0, io::ErrorKind::Other);
    assert!(folding.disk.flush().is_err());
    // Also for what the layer holds.
    assert!(is_stopped(&folding.disk.write_at(4096, &[1; 512], Fua::No)));
    assert!(is_stopped(&folding.disk.write_at(0, &[1; 4096], Fua::Yes)));
    assert!(is_stopped(&folding.disk.fold()));
    assert!(is_stopped(&folding.disk.close()));
    folding.target_power.restore(&mut || false);
    folding.shown.did(Act::Write(64, 8, 50, Fua::No));
    folding.reopen(2);
    folding.shown.check(&folding.disk, "what was flushed");
    folding.finish();
}

/// A file that looks, while it is used, which locks of a disk are held.
#[derive(Debug)]
struct Watched {
    file: Arc<MemoryStorage>,
    disk: OnceLock<Weak<LayeredDisk>>,
    is_layer: bool,
    looks: AtomicU64,
}

impl Watched {
    fn new(file: Arc<MemoryStorage>, is_layer: bool) -> Arc<Self> {
        Arc::new(Self {
            file,
            disk: OnceLock::new(),
            is_layer,
            looks: AtomicU64::new(0),
        })
    }

    fn look(&self, look: impl FnOnce(&LayeredDisk)) {
        if let Some(disk) = self.disk.get().and_then(Weak::upgrade) {
            look(&disk);
            self.looks.fetch_add(1, Ordering::Relaxed);
        }
    }
}

impl Storage for Watched {
    fn len(&self) -> io::Result<u64> {
        self.file.len()
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        if self.is_layer {
            self.look(|disk| {
                let region = disk.lock(offset - disk.header.data_at());
                assert!(
                    region.try_write().is_none(),
                    "it could be moved and punched"
                );
            });
        }
        self.file.read_at(offset, buf)
    }

    fn write_at(&self, offset: u64, buf: &[u8], fua: Fua) -> io::Result<()> {
        self.file.write_at(offset, buf, fua)
    }

    fn zero(&self, run: Extent, space: Space) -> io::Result<()> {
        self.file.zero(run, space)
    }

    fn data_after(&self, offset: u64) -> io::Result<Option<Extent>> {
        self.file.data_after(offset)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.file.set_len(len)
    }

    fn sync(&self) -> io::Result<()> {
        self.look(|disk| assert!(disk.flushing.try_lock().is_none(), "two syncs at once"));
        self.file.sync()
    }
}

/// What no schedule of threads shows for certain: what is read stays where it is, and while a region is let go of no flush
/// is half done with the states of before.
#[test]
fn reads_hold_the_region_and_syncs_come_one_by_one() {
    let layer = Watched::new(MemoryStorage::new(&Power::new()), true);
    let target = Watched::new(image(&Power::new()), false);
    let disk = LayeredDisk::open(base(), Arc::clone(&layer) as _, IDENTITY, boot(1)).unwrap();
    let disk = Arc::new(disk);
    for file in [&layer, &target] {
        file.disk.set(Arc::downgrade(&disk)).unwrap();
    }
    let (_, shown, done) = tell(&disk);
    assert!(done);
    disk.fold_into(raw(Arc::clone(&target) as _)).unwrap();
    shown.check(&*disk, "all held");
    disk.flush().unwrap();
    while disk.fold().unwrap().is_some() {
        shown.check(&*disk, "half folded");
    }
    for file in [&layer, &target] {
        assert!(file.looks.load(Ordering::Relaxed) > 4);
    }
}

/// Threads own sectors side by side in the same blocks; each reads what it wrote before, all through the fold.
#[test]
fn writers_and_a_fold_do_not_disturb_each_other() {
    const THREADS: u64 = 4;
    const SECTORS: u64 = 3 * REGION_BYTES / SECTOR;
    let storage = MemoryStorage::new(&Power::new());
    let disk = LayeredDisk::open(Arc::new(Yielding(base())), storage, IDENTITY, boot(1)).unwrap();
    let target = image(&Power::new());
    let mut start = vec![0; to_usize(SECTORS * SECTOR)];
    disk.read_at(0, &mut start).unwrap();
    let begin = std::sync::Barrier::new(to_usize(THREADS) + 1);
    let held: Vec<Vec<u8>> = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..THREADS)
            .map(|thread| {
                let (disk, begin, start) = (&disk, &begin, &start);
                scope.spawn(move || {
                    let mut random = Random(thread);
                    let mut own: Vec<u8> = (0..SECTORS / THREADS)
                        .map(|n| start[to_usize((n * THREADS + thread) * SECTOR)])
                        .collect();
                    for round in 0..4000 {
                        if round == 1000 {
                            begin.wait();
                        }
                        let n = random.below(SECTORS / THREADS);
                        let offset = (n * THREADS + thread) * SECTOR;
                        let mut bytes = [0; 512];
                        disk.read_at(offset, &mut bytes).unwrap();
                        assert_eq!(bytes, [own[to_usize(n)]; 512], "sector {offset:#x}");
                        let value = u8::try_from(random.below(256)).unwrap();
                        let fua = [Fua::No, Fua::Yes][usize::from(round % 16 == 0)];
                        if random.below(8) == 0 {
                            let run = Extent::new(offset, SECTOR);
                            disk.zero(run, Space::Release, fua).unwrap();
                            own[to_usize(n)] = 0;
                        } else {
                            disk.write_at(offset, &[value; 512], fua).unwrap();
                            own[to_usize(n)] = value;
                        }
                        if round % 100 == 0 {
                            disk.flush().unwrap();
                        }
                    }
                    own
                })
            })
            .collect();
        begin.wait();
        let target = Yielding(raw(Arc::clone(&target) as _));
        disk.fold_into(Arc::new(target)).unwrap();
        while disk.fold().unwrap().is_some() {}
        workers
            .into_iter()
            .map(|worker| worker.join().unwrap())
            .collect()
    });
    disk.close().unwrap();
    let bytes = target.bytes();
    for sector in 0..SECTORS {
        let own = held[to_usize(sector % THREADS)][to_usize(sector / THREADS)];
        let found = &bytes[to_usize(sector * SECTOR)..][..512];
        assert!(found.iter().all(|byte| *byte == own), "sector {sector}");
    }
}
