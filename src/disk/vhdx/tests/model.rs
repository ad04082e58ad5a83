//! Random operations against a plain array of bytes.

use proptest::prelude::*;

use super::*;
use crate::{
    base::units::Extent,
    disk::{
        Fua, Space,
        histories::array::{self, Op},
    },
    storage::memory::Power,
};

pub(super) use crate::disk::histories::array::{change, check};

pub(super) const SIZE: u64 = (6 << 20) + 512;

pub(super) fn op() -> impl Strategy<Value = Op> {
    array::op(SIZE, 3_000_000, 4_000_000)
}

fn run(kind: Kind, ops: &[Op]) {
    let storage = new_image(&Power::new(), &options(SIZE, kind));
    let mut model = vec![0; usize::try_from(SIZE).unwrap()];
    change(&Subject::new(storage), &mut model, ops);
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
    let storage = new_image(&Power::new(), &options(64 << 20, Kind::Dynamic));
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
    let storage = new_image(&Power::new(), &options(1 << 20, Kind::Dynamic));
    let disk = open_as(storage, Access::ReadOnly).unwrap();
    assert!(disk.write_at(0, &[1], Fua::No).is_err());
    assert!(disk.zero(Extent::new(0, 1), Space::Keep, Fua::No).is_err());
    disk.flush().unwrap();
    disk.close().unwrap();
}
