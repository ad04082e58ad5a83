//! Tests of the whole disk over storage in memory: against a model, through power cuts, and with hostile bytes.

mod crash;
mod differencing;
mod hostile;
mod linkage;
mod model;
mod survey;
mod threads;
mod traps;

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use super::*;
use crate::{
    base::ids::{Ids, SeededIds},
    disk::{
        Access, Disk, Opening,
        parents::{MemoryParents, Parents},
    },
    storage::{Storage, memory::MemoryStorage},
};

/// Other identities each time: two sessions must not give their logs the same name.
fn ids() -> Arc<dyn Ids> {
    static SEED: AtomicU64 = AtomicU64::new(0);
    let seed = SEED.fetch_add(1, Ordering::Relaxed);
    Arc::new(SeededIds::new(seed << 32))
}

fn options(size: u64, kind: Kind) -> CreateOptions {
    CreateOptions {
        size,
        block_size: 1 << 20,
        kind,
        logical_sector: 512,
        physical_sector: 4096,
    }
}

fn open(storage: &Arc<impl Storage + 'static>) -> Result<VhdxDisk, OpenError> {
    open_as(Arc::clone(storage), Access::ReadWrite)
}

fn open_as(storage: Arc<impl Storage + 'static>, access: Access) -> Result<VhdxDisk, OpenError> {
    VhdxDisk::open(storage, &Opening::new(access, ids()))
}

/// An image in memory, and the parents that it may have.
struct Subject {
    storage: Arc<MemoryStorage>,
    parents: Arc<dyn Parents>,
}

impl Subject {
    fn new(storage: Arc<MemoryStorage>) -> Self {
        Self {
            storage,
            parents: Arc::new(MemoryParents::default()),
        }
    }

    fn open(&self) -> Result<VhdxDisk, OpenError> {
        self.open_as(Access::ReadWrite)
    }

    fn open_as(&self, access: Access) -> Result<VhdxDisk, OpenError> {
        let opening = Opening::new(access, ids()).with_parents(Arc::clone(&self.parents));
        VhdxDisk::open(Arc::clone(&self.storage) as _, &opening)
    }
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
