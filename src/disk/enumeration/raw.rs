//! Every cut of short stories of a raw disk.

use std::path::Path;

use super::*;
use crate::disk::{
    ResizeError,
    image::{self, Format},
    raw::{self, RawDisk},
};

const SIZE: u64 = 64 << 10;

struct Raw;

impl Subject for Raw {
    type Disk = RawDisk;

    fn create(&self, storage: &dyn Storage) {
        storage.set_len(SIZE).unwrap();
        storage.sync().unwrap();
    }

    fn open(&self, storage: Arc<dyn Storage>, access: Access) -> Result<RawDisk, Refused> {
        RawDisk::open(storage, access).map_err(|_| Refused::NoImage)
    }

    fn resize(&self, disk: RawDisk, storage: &Arc<dyn Storage>, size: u64) -> RawDisk {
        disk.close().unwrap();
        match raw::resize(storage.as_ref(), size) {
            Ok(()) | Err(ResizeError::InUse { .. }) => {}
            Err(error) => panic!("{error:?}"),
        }
        self.open(Arc::clone(storage), Access::ReadWrite).unwrap()
    }

    fn check(&self, storage: &Arc<dyn Storage>) -> Report {
        image::check(storage, Format::Raw)
    }

    fn second_opinion(&self, file: &Path, bytes: &[u8]) -> Option<Result<(), String>> {
        let same = std::fs::read(file).unwrap() == bytes;
        Some(
            same.then_some(())
                .ok_or_else(|| "it reads another content".to_owned()),
        )
    }
}

#[test]
fn every_cut_of_every_short_story() {
    let run = |at, count| Extent::new(at, count * SECTOR);
    let ops = [
        Op::Write(run(0, 9), Fua::No),
        Op::Write(run(512, 1), Fua::Yes),
        Op::Write(run(SIZE - 512, 1), Fua::No),
        Op::Zero(run(0, 8), Space::Release, Fua::No),
        Op::Zero(run(SIZE - 8192, 16), Space::Keep, Fua::Yes),
        Op::Flush,
        Op::Kill,
        Op::Reopen,
        Op::Resize(SIZE - 4096),
        Op::Resize(2 * SIZE),
    ];
    let enumeration = Enumeration::new(&Raw, 8, 512);
    enumeration.all_stories(&ops, 3);
    enumeration.creation(SIZE);
    eprintln!("raw disk: {}", enumeration.counts());
}
