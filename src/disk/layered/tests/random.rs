//! Operations at random against a model of all bytes, with the fold among them, and processes that die or close in between.

use std::sync::atomic::AtomicU64;

use super::*;
use crate::{
    base::ids::SeededIds,
    disk::{
        Opening,
        enumeration::Random,
        vhdx::{self, CreateOptions, Kind, VhdxDisk},
    },
};

/// Some regions, and half a block at the end.
const BYTES: u64 = 5 * REGION_BYTES + 8192 + 512;
const OPERATIONS: u64 = 400;

/// The files of one disk, and what it holds.
struct Story {
    random: Random,
    layer: Arc<MemoryStorage>,
    base: Arc<dyn Disk>,
    target: Arc<MemoryStorage>,
    open_target: fn(&Arc<MemoryStorage>) -> Arc<dyn Disk>,
    model: Vec<u8>,
    folding: bool,
}

impl Story {
    fn open(&self) -> LayeredDisk {
        let disk = LayeredDisk::open(
            Arc::clone(&self.base),
            Arc::clone(&self.layer) as _,
            IDENTITY,
            boot(1),
        )
        .unwrap();
        if self.folding {
            disk.fold_into((self.open_target)(&self.target)).unwrap();
        }
        disk
    }

    /// A run near a border of blocks or regions, or anywhere; short, or of several regions.
    fn run(&mut self) -> Extent {
        let unit = [SECTOR, BLOCK_BYTES, REGION_BYTES][to_usize(self.random.below(3))];
        let near = self.random.below(BYTES / unit + 1) * unit;
        let offset = near.saturating_sub(self.random.below(3) * SECTOR);
        let longest = [8 * SECTOR, 20 * BLOCK_BYTES, 2 * REGION_BYTES];
        let longest = longest[to_usize(self.random.below(3))];
        let len = self.random.below(longest / SECTOR);
        let offset = offset.min(BYTES - SECTOR);
        Extent::new(offset, ((len + 1) * SECTOR).min(BYTES - offset))
    }

    fn fua(&mut self) -> Fua {
        if self.random.below(4) == 0 {
            Fua::Yes
        } else {
            Fua::No
        }
    }

    fn step(&mut self, disk: LayeredDisk) -> LayeredDisk {
        match self.random.below(20) {
            0..8 => {
                let (run, fua) = (self.run(), self.fua());
                let value = u8::try_from(self.random.below(256)).unwrap();
                let bytes = vec![value; to_usize(run.len)];
                disk.write_at(run.offset, &bytes, fua).unwrap();
                self.model[to_usize(run.offset)..to_usize(run.end())].fill(value);
            }
            8..12 => {
                let (run, fua) = (self.run(), self.fua());
                let space = [Space::Keep, Space::Release][to_usize(self.random.below(2))];
                disk.zero(run, space, fua).unwrap();
                self.model[to_usize(run.offset)..to_usize(run.end())].fill(0);
            }
            12 => disk.flush().unwrap(),
            13..16 => {
                let run = self.run();
                let mut bytes = vec![0xEE; to_usize(run.len)];
                disk.read_at(run.offset, &mut bytes).unwrap();
                assert!(
                    bytes == self.model[to_usize(run.offset)..to_usize(run.end())],
                    "{run:?}"
                );
            }
            16 if self.folding => {
                let before = disk.held();
                let moved = disk.fold().unwrap();
                assert!(disk.held() <= before && (moved.is_some() || disk.held() == 0));
            }
            17 => {
                disk.close().unwrap();
                return self.open();
            }
            18 => {
                drop(disk);
                return self.open();
            }
            _ => check_runs(&disk, &self.model),
        }
        disk
    }
}

fn check_runs(disk: &dyn Disk, model: &[u8]) {
    let mut at = 0;
    while at < BYTES {
        let (run, content) = disk.run_at(at).unwrap();
        assert!(run.offset == at && run.len > 0 && run.end() <= BYTES);
        let bytes = &model[to_usize(at)..to_usize(run.end())];
        assert!(content == Content::Data || bytes.iter().all(|byte| *byte == 0));
        at = run.end();
    }
}

fn check_all(disk: &dyn Disk, model: &[u8], what: &str) {
    let mut bytes = vec![0xEE; to_usize(BYTES)];
    disk.read_at(0, &mut bytes).unwrap();
    let wrong = bytes.iter().zip(model).position(|(a, b)| a != b);
    assert_eq!(wrong, None, "{what}");
}

fn run(
    seed: u64,
    open_target: fn(&Arc<MemoryStorage>) -> Arc<dyn Disk>,
    make_target: fn(&MemoryStorage),
) {
    let mut random = Random(seed);
    let model: Vec<u8> = (0..BYTES / SECTOR)
        .flat_map(|_| [u8::try_from(random.below(3)).unwrap(); 512])
        .collect();
    let target = MemoryStorage::new(&Power::new());
    make_target(&target);
    let disk = open_target(&target);
    disk.write_at(0, &model, Fua::No).unwrap();
    disk.close().unwrap();
    let base = RawDisk::open(MemoryStorage::with_bytes(&model), Access::ReadOnly).unwrap();
    let mut story = Story {
        random,
        layer: MemoryStorage::new(&Power::new()),
        base: Arc::new(base),
        target,
        open_target,
        model,
        folding: false,
    };
    let mut disk = story.open();
    for _ in 0..OPERATIONS / 4 {
        disk = story.step(disk);
    }
    disk.fold_into(open_target(&story.target)).unwrap();
    story.folding = true;
    for _ in 0..OPERATIONS {
        disk = story.step(disk);
    }
    while disk.fold().unwrap().is_some() {}
    for _ in 0..OPERATIONS / 4 {
        disk = story.step(disk);
    }
    check_all(&disk, &story.model, "folded");
    assert_eq!((disk.held(), disk.fold().unwrap()), (0, None));
    disk.close().unwrap();
    assert_given_back(&*story.layer, &disk);
    check_all(
        &*open_target(&story.target),
        &story.model,
        "the target alone",
    );
}

#[test]
fn a_fold_into_a_raw_image_changes_nothing_that_a_guest_sees() {
    for seed in 0..12 {
        eprintln!("seed {seed}");
        run(
            seed,
            |storage| raw(Arc::clone(storage) as _),
            |storage| storage.set_len(BYTES).unwrap(),
        );
    }
}

#[test]
fn a_fold_into_a_vhdx_changes_nothing_that_a_guest_sees() {
    for seed in 100..104 {
        eprintln!("seed {seed}");
        run(
            seed,
            |storage| {
                // Other identities each time: two sessions must not give their logs the same name.
                static SEED: AtomicU64 = AtomicU64::new(0);
                let ids = SeededIds::new(SEED.fetch_add(1, Ordering::Relaxed) << 32);
                let opening = Opening::new(Access::ReadWrite, Arc::new(ids));
                Arc::new(VhdxDisk::open(Arc::clone(storage) as _, &opening).unwrap())
            },
            |storage| {
                let options = CreateOptions {
                    size: BYTES,
                    block_size: 1 << 20,
                    kind: Kind::Dynamic,
                    logical_sector: 512,
                    physical_sector: 4096,
                };
                vhdx::create(storage, &options, &SeededIds::new(7)).unwrap();
            },
        );
    }
}
