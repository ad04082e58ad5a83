//! Tests of the whole disk over storage in memory: against a model, through power cuts, and with hostile bytes.

mod crash;
mod differencing;
mod enumeration;
mod hostile;
mod identity;
mod large;
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
        enumeration::Random,
        histories::{Image, read_all},
        parents::{MemoryParents, Parents},
    },
    storage::{
        Storage,
        memory::{MemoryStorage, Power},
    },
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

impl Image for Subject {
    type Disk = VhdxDisk;

    fn opened(&self, access: Access) -> Result<VhdxDisk, String> {
        self.open_as(access).map_err(|error| format!("{error:?}"))
    }
}

/// A new image on a supply.
fn new_image(power: &Arc<Power>, options: &CreateOptions) -> Arc<MemoryStorage> {
    let storage = MemoryStorage::new(power);
    create(storage.as_ref(), options, ids().as_ref()).unwrap();
    storage
}
