//! Tests of the whole disk over storage in memory: against a model, through power cuts, and with hostile bytes.

mod crash;
mod enumeration;
mod hostile;
mod large;
mod model;
mod threads;

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use super::*;
use crate::{
    base::ids::{Ids, SeededIds},
    disk::{Access, Disk, enumeration::Random},
    storage::Storage,
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
    VhdxDisk::open(Arc::clone(storage) as _, Access::ReadWrite, ids())
}

fn read_all(disk: &impl Disk) -> Vec<u8> {
    let len = usize::try_from(disk.geometry().size).unwrap();
    let mut bytes = vec![0xAA; len];
    disk.read_at(0, &mut bytes).unwrap();
    bytes
}
