//! Random operations against a plain array of bytes.

use proptest::prelude::*;

use super::*;
use crate::{
    base::units::Extent,
    disk::{Content, Fua, Space},
    storage::memory::{MemoryStorage, Power},
};

pub(super) const SIZE: u64 = (6 << 20) + 512;

#[derive(Clone, Debug)]
pub(super) enum Op {
    Write(u64, usize, u8),
    Zero(u64, u64, bool),
    Flush,
    Close,
    Kill,
}

pub(super) fn op() -> impl Strategy<Value = Op> {
    // Any byte offset: the disk knows no alignment. Lengths from bytes to blocks.
    let offset = 0..SIZE;
    prop_oneof![
        6 => (offset.clone(), prop_oneof![1..4096usize, 1..3_000_000usize], 1..=255u8)
            .prop_map(|(at, len, byte)| Op::Write(at, len, byte)),
        4 => (offset, prop_oneof![1..4096u64, 1..4_000_000u64, Just(SIZE)], any::<bool>())
            .prop_map(|(at, len, release)| Op::Zero(at, len, release)),
        2 => Just(Op::Flush),
        1 => Just(Op::Close),
        1 => Just(Op::Kill),
    ]
}

pub(super) fn check(disk: &VhdxDisk, model: &[u8]) {
    assert!(read_all(disk) == model, "the disk holds something else");
    let mut at = 0;
    while at < SIZE {
        let (run, content) = disk.run_at(at).unwrap();
        assert!(run.offset == at && run.len > 0 && run.end() <= SIZE);
        let range = usize::try_from(at).unwrap()..usize::try_from(run.end()).unwrap();
        assert!(content == Content::Data || model[range].iter().all(|&byte| byte == 0));
        at = run.end();
    }
}

fn run(kind: Kind, ops: &[Op]) {
    let storage = MemoryStorage::new(&Power::new());
    create(storage.as_ref(), &options(SIZE, kind), ids().as_ref()).unwrap();
    let mut model = vec![0; usize::try_from(SIZE).unwrap()];
    change(&Subject::new(storage), &mut model, ops);
}

/// Does to an image and to an array what `ops` say, compares them now and then, and leaves the image closed.
pub(super) fn change(image: &Subject, model: &mut [u8], ops: &[Op]) {
    let mut disk = image.open().unwrap();
    for op in ops {
        match *op {
            Op::Write(at, len, byte) => {
                let len = len.min(usize::try_from(SIZE - at).unwrap());
                disk.write_at(at, &vec![byte; len], Fua::No).unwrap();
                let at = usize::try_from(at).unwrap();
                model[at..at + len].fill(byte);
            }
            Op::Zero(at, len, release) => {
                let len = len.min(SIZE - at);
                let space = if release { Space::Release } else { Space::Keep };
                disk.zero(Extent::new(at, len), space, Fua::No).unwrap();
                let at = usize::try_from(at).unwrap();
                model[at..at + usize::try_from(len).unwrap()].fill(0);
            }
            Op::Flush => disk.flush().unwrap(),
            Op::Close => {
                disk.close().unwrap();
                disk = image.open().unwrap();
                check(&disk, model);
            }
            Op::Kill => disk = image.open().unwrap(),
        }
    }
    check(&disk, model);
    disk.close().unwrap();
    check(&image.open().unwrap(), model);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn a_dynamic_disk_is_an_array_of_bytes(ops in prop::collection::vec(op(), 1..40)) {
        run(Kind::Dynamic, &ops);
    }

    #[test]
    fn a_fixed_disk_is_an_array_of_bytes(ops in prop::collection::vec(op(), 1..20)) {
        run(Kind::Fixed, &ops);
    }
}

#[test]
fn discarded_space_serves_other_blocks() {
    let storage = MemoryStorage::new(&Power::new());
    create(
        storage.as_ref(),
        &options(64 << 20, Kind::Dynamic),
        ids().as_ref(),
    )
    .unwrap();
    let disk = open(&storage).unwrap();
    for block in 0..64u64 {
        disk.write_at(block << 20, &[1; 512], Fua::No).unwrap();
        disk.zero(Extent::new(block << 20, 1 << 20), Space::Release, Fua::No)
            .unwrap();
        disk.flush().unwrap();
        disk.flush().unwrap();
    }
    disk.write_at(0, &[2; 512], Fua::No).unwrap();
    assert!(read_all(&disk)[512..].iter().all(|&byte| byte == 0));
    disk.close().unwrap();
    // Headers, log, metadata, BAT, and a place or two.
    assert!(
        storage.len().unwrap() <= 6 << 20,
        "{}",
        storage.len().unwrap()
    );
}

#[test]
fn a_read_only_disk_refuses_writes() {
    let storage = MemoryStorage::new(&Power::new());
    create(
        storage.as_ref(),
        &options(1 << 20, Kind::Dynamic),
        ids().as_ref(),
    )
    .unwrap();
    let disk = open_as(storage, Access::ReadOnly).unwrap();
    assert!(disk.write_at(0, &[1], Fua::No).is_err());
    assert!(disk.zero(Extent::new(0, 1), Space::Keep, Fua::No).is_err());
    disk.flush().unwrap();
    disk.close().unwrap();
}
