//! Random operations against a plain array of bytes.

use proptest::prelude::*;

use super::*;
use crate::{
    base::units::Extent,
    disk::{
        Content, Fua, Space,
        histories::array::{self, Op, change},
    },
};

pub(super) use crate::disk::histories::array::check;

const SIZE: u64 = 5 * BLOCK + 3 * 512;

fn op() -> impl Strategy<Value = Op> {
    array::op(SIZE, 1_500_000, 2_000_000)
}

fn run(storage: &Arc<MemoryStorage>, mut model: Vec<u8>, ops: &[Op]) {
    change(storage, &mut model, ops);
    // A session that writes cuts off what a killed one left behind the last block.
    let disk = open(storage).unwrap();
    disk.write_at(0, &model[..1], Fua::No).unwrap();
    disk.close().unwrap();
    check(&open(storage).unwrap(), &model);
    let shared: Arc<dyn Storage> = Arc::clone(storage) as _;
    assert_eq!(super::super::check(&shared).findings, []);
}

/// An image whose blocks have gaps, with bytes in them that nobody may see.
fn image_with_gaps() -> (Arc<MemoryStorage>, Vec<u8>) {
    let storage = image(&Power::new(), &options(SIZE, Kind::Dynamic));
    let mut model = vec![7; usize::try_from(SIZE).unwrap()];
    let disk = open(&storage).unwrap();
    disk.write_at(0, &model, Fua::No).unwrap();
    let mut random = Random(11);
    for (block, place) in disk.blocks.as_ref().unwrap().bat.present() {
        let mut bitmap = [0xFF; 128];
        for (number, byte) in (0u64..).zip(&mut bitmap) {
            if random.below(4) == 0 {
                *byte = u8::try_from(random.below(256)).unwrap();
            }
            for bit in 0..8 {
                let at = usize::try_from(block * BLOCK + (number * 8 + bit) * 512).unwrap();
                if *byte & (0x80 >> bit) == 0 && at < model.len() {
                    model[at..at + 512].fill(0);
                }
            }
        }
        storage.write_at(place, &bitmap, Fua::No).unwrap();
    }
    disk.close().unwrap();
    (storage, model)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn a_dynamic_disk_is_an_array_of_bytes(ops in prop::collection::vec(op(), 1..40)) {
        let storage = image(&Power::new(), &options(SIZE, Kind::Dynamic));
        run(&storage, vec![0; usize::try_from(SIZE).unwrap()], &ops);
    }

    #[test]
    fn a_fixed_disk_is_an_array_of_bytes(ops in prop::collection::vec(op(), 1..20)) {
        let storage = image(&Power::new(), &options(SIZE, Kind::Fixed));
        run(&storage, vec![0; usize::try_from(SIZE).unwrap()], &ops);
    }

    #[test]
    fn gaps_of_bitmaps_are_zeros(ops in prop::collection::vec(op(), 0..20)) {
        let (storage, model) = image_with_gaps();
        check(&open(&storage).unwrap(), &model);
        run(&storage, model, &ops);
    }
}

#[test]
fn a_discarded_block_is_a_hole_and_keeps_its_place() {
    let options = CreateOptions {
        block_size: 2 << 20,
        ..options(8 << 20, Kind::Dynamic)
    };
    let storage = image(&Power::new(), &options);
    let disk = open(&storage).unwrap();
    disk.write_at(0, &vec![1; 4 << 20], Fua::No).unwrap();
    let block = Extent::new(0, 2 << 20);
    disk.zero(block, Space::Release, Fua::No).unwrap();
    assert_eq!(disk.run_at(0).unwrap(), (block, Content::Zero));
    disk.close().unwrap();
    let len = storage.len().unwrap();
    let disk = open(&storage).unwrap();
    disk.write_at(0, &[2; 512], Fua::No).unwrap();
    disk.close().unwrap();
    assert_eq!(storage.len().unwrap(), len);
}

#[test]
fn allocation_syncs_once_for_many_blocks() {
    let power = Power::new();
    let options = CreateOptions {
        block_size: 2 << 20,
        ..options(200 << 20, Kind::Dynamic)
    };
    let disk = open(&image(&power, &options)).unwrap();
    let before = power.steps();
    for block in 0..100u64 {
        disk.write_at(block << 21, &[1; 512], Fua::No).unwrap();
    }
    // Bitmap, entry and data of each, and once: cut off, grow, sync.
    assert_eq!(power.steps() - before, 3 * 100 + 3);
}

#[test]
fn a_read_only_disk_refuses_writes() {
    for kind in [Kind::Dynamic, Kind::Fixed] {
        let storage = image(&Power::new(), &options(SIZE, kind));
        let disk = open_as(storage, Access::ReadOnly).unwrap();
        assert!(disk.write_at(0, &[1], Fua::No).is_err());
        assert!(disk.zero(Extent::new(0, 1), Space::Keep, Fua::No).is_err());
        disk.flush().unwrap();
        disk.close().unwrap();
    }
}

#[test]
fn opening_without_writing_changes_nothing() {
    for kind in [Kind::Dynamic, Kind::Fixed] {
        let storage = image(&Power::new(), &options(SIZE, kind));
        let before = storage.bytes();
        let disk = open(&storage).unwrap();
        disk.flush().unwrap();
        disk.close().unwrap();
        assert!(storage.bytes() == before);
    }
}

/// Four threads write to their own sectors of the same absent blocks; nobody's bytes get lost.
#[test]
fn threads_allocate_the_same_blocks_together() {
    let storage = image(&Power::new(), &options(16 * BLOCK, Kind::Dynamic));
    let disk = open(&storage).unwrap();
    std::thread::scope(|scope| {
        for owner in 1..=4u8 {
            let disk = &disk;
            scope.spawn(move || {
                for block in 0..16 {
                    let at = block * BLOCK + u64::from(owner) * 4096;
                    disk.write_at(at, &[owner; 4096], Fua::No).unwrap();
                    if block % 5 == 0 {
                        disk.flush().unwrap();
                    }
                }
            });
        }
    });
    disk.close().unwrap();
    let bytes = read_all(&open(&storage).unwrap());
    for (at, part) in bytes.chunks_exact(4096).enumerate() {
        let within = u8::try_from(at % 128).unwrap();
        let owner = if (1..=4).contains(&within) { within } else { 0 };
        assert!(part.iter().all(|&byte| byte == owner), "page {at}");
    }
}
