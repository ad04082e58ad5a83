//! Tests of the whole disk over storage in memory: against a model, through power cuts, and with hostile bytes.

mod chain;
mod crash;
mod enumeration;
mod hostile;
mod model;
mod sizes;

use std::{collections::BTreeMap, sync::Arc};

use super::*;
use crate::{
    base::ids::{Ids, SeededIds},
    disk::{
        Access, Content, Disk, Opening,
        enumeration::Random,
        histories::{Image, read_all},
    },
    storage::{
        Storage,
        memory::{MemoryStorage, Power},
    },
};

const KIB: u64 = 1024;
/// Bytes of a block in most tests.
const BLOCK: u64 = 512 * KIB;

fn ids() -> Arc<dyn Ids> {
    Arc::new(SeededIds::new(7))
}

fn options(size: u64, kind: Kind) -> CreateOptions {
    CreateOptions {
        size,
        block_size: 512 * 1024,
        kind,
    }
}

fn image(power: &Arc<Power>, options: &CreateOptions) -> Arc<MemoryStorage> {
    let storage = MemoryStorage::new(power);
    create(storage.as_ref(), options, ids().as_ref()).unwrap();
    storage
}

fn open(storage: &Arc<impl Storage + 'static>) -> Result<VhdDisk, OpenError> {
    open_as(Arc::clone(storage), Access::ReadWrite)
}

fn open_as(storage: Arc<impl Storage + 'static>, access: Access) -> Result<VhdDisk, OpenError> {
    VhdDisk::open(storage, &Opening::new(access, ids()))
}

impl Image for Arc<MemoryStorage> {
    type Disk = VhdDisk;

    fn opened(&self, access: Access) -> Result<VhdDisk, String> {
        open_as(Arc::clone(self), access).map_err(|error| format!("{error:?}"))
    }

    fn assert_sound(&self, story: &str) {
        let shared: Arc<dyn Storage> = Arc::clone(self) as _;
        assert_eq!(check(&shared).errors, 0, "{story}");
    }
}

/// Compares a disk with what its sectors hold, each one byte throughout; the others are zeros. Holes are not read.
fn assert_holds(disk: &VhdDisk, sectors: &BTreeMap<u64, u8>, story: &str) {
    let size = disk.geometry().size;
    let mut at = 0;
    while at < size {
        let (run, content) = disk.run_at(at).unwrap();
        let held = sectors.range(at / 512..run.end() / 512);
        if content == Content::Zero {
            assert!(held.clone().all(|(_, &byte)| byte == 0), "{story}: {run:?}");
        } else {
            let mut expected = vec![0; usize::try_from(run.len).unwrap()];
            let mut found = expected.clone();
            for (sector, &byte) in held {
                let within = usize::try_from(sector * 512 - at).unwrap();
                expected[within..within + 512].fill(byte);
            }
            disk.read_at(at, &mut found).unwrap();
            assert!(found == expected, "{story}: {run:?} holds something else");
        }
        at = run.end();
    }
}

/// Keeps unsynced sectors: none, all, or some, single ones or now and then runs of them.
fn kept(seed: u64) -> impl FnMut() -> bool {
    let mut random = Random(seed);
    let mut keep = seed % 2 == 1;
    let run = match seed % 8 {
        0 | 1 => 0,
        7 => 16,
        _ => 2,
    };
    move || {
        if run > 0 && random.below(run) == 0 {
            keep = !keep;
        }
        keep
    }
}
