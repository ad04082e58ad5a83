//! Tests of the whole disk over storage in memory: against a model, through power cuts, and with hostile bytes.

mod chain;
mod crash;
mod hostile;
mod model;
mod sizes;

use std::sync::Arc;

use super::*;
use crate::{
    base::ids::{Ids, SeededIds},
    disk::{Access, Disk, Opening},
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

fn read_all(disk: &impl Disk) -> Vec<u8> {
    let len = usize::try_from(disk.geometry().size).unwrap();
    let mut bytes = vec![0xAA; len];
    disk.read_at(0, &mut bytes).unwrap();
    bytes
}

/// `SplitMix64`.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        (z ^ (z >> 31)) % limit
    }
}

/// Keeps unsynced sectors: none, all, or some, single ones or runs of them.
fn kept(seed: u64) -> impl FnMut() -> bool {
    let mut random = Random(seed);
    let mut keep = seed % 2 == 1;
    let run = [0, 0, 2, 16][usize::try_from(seed % 4).unwrap()];
    move || {
        if run > 0 && random.below(run) == 0 {
            keep = !keep;
        }
        keep
    }
}
