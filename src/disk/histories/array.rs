//! Random operations on a disk and on a plain array of bytes.

use proptest::prelude::*;

use super::{Image, read_all};
use crate::{
    base::units::{Extent, to_u64, to_usize},
    disk::{Access, Content, Disk, Fua, Space},
};

#[derive(Clone, Debug)]
pub(crate) enum Op {
    Write(u64, usize, u8),
    Zero(u64, u64, bool),
    Flush,
    Close,
    Kill,
}

/// Any of them, on a disk of `size` bytes. Any byte offset: the disk knows no alignment. Lengths from bytes to blocks.
pub(crate) fn op(size: u64, write_max: usize, zero_max: u64) -> impl Strategy<Value = Op> {
    let offset = 0..size;
    prop_oneof![
        6 => (offset.clone(), prop_oneof![1..4096usize, 1..write_max], 1..=255u8)
            .prop_map(|(at, len, byte)| Op::Write(at, len, byte)),
        4 => (offset, prop_oneof![1..4096u64, 1..zero_max, Just(size)], any::<bool>())
            .prop_map(|(at, len, release)| Op::Zero(at, len, release)),
        2 => Just(Op::Flush),
        1 => Just(Op::Close),
        1 => Just(Op::Kill),
    ]
}

/// Compares a disk with an array; runs that are called zeros must be.
pub(crate) fn check(disk: &impl Disk, model: &[u8]) {
    assert!(read_all(disk) == model, "the disk holds something else");
    let size = to_u64(model.len());
    let mut at = 0;
    while at < size {
        let (run, content) = disk.run_at(at).unwrap();
        assert!(run.offset == at && run.len > 0 && run.end() <= size);
        let range = to_usize(at)..to_usize(run.end());
        assert!(content == Content::Data || model[range].iter().all(|&byte| byte == 0));
        at = run.end();
    }
}

/// Does to an image and to an array what `ops` say, compares them now and then, and leaves the image closed.
pub(crate) fn change(image: &impl Image, model: &mut [u8], ops: &[Op]) {
    let open = || image.opened(Access::ReadWrite).unwrap();
    let size = to_u64(model.len());
    let mut disk = open();
    for op in ops {
        match *op {
            Op::Write(at, len, byte) => {
                let len = len.min(to_usize(size - at));
                disk.write_at(at, &vec![byte; len], Fua::No).unwrap();
                model[to_usize(at)..][..len].fill(byte);
            }
            Op::Zero(at, len, release) => {
                let len = len.min(size - at);
                let space = if release { Space::Release } else { Space::Keep };
                disk.zero(Extent::new(at, len), space, Fua::No).unwrap();
                model[to_usize(at)..][..to_usize(len)].fill(0);
            }
            Op::Flush => disk.flush().unwrap(),
            Op::Close => {
                disk.close().unwrap();
                disk = open();
                check(&disk, model);
            }
            Op::Kill => disk = open(),
        }
    }
    check(&disk, model);
    disk.close().unwrap();
    check(&open(), model);
}
