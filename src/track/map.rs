//! A persistent map: the blocks of one disk that changed in one epoch, in a file that is mapped.
//!
//! The body of the file is one bit for each block, in words of 64 bits in the host's byte order: the file never leaves
//! its host. See [`super::header`] for what comes before.
//!
//! # Crash contract
//! A killed process loses no bit. A power cut may bring back what the last [`Bits::sync`] wrote, word by word: bits set
//! since may be missing (their regions are in the intent log) and bits cleared since may be back (they cost a resend).
#![forbid(unsafe_code)]

use std::{io, sync::Arc};

use super::{
    bits::Bits,
    header::{HEADER_BYTES, Kind, Owner, Slot},
    state::StateDir,
};
use crate::{
    base::units::{BLOCK_BYTES, to_u64},
    storage::{Fua, Storage},
};

/// One of the two maps of a disk.
#[derive(Debug)]
pub struct Map {
    owner: Owner,
    slot: Slot,
    storage: Arc<dyn Storage>,
    bits: Bits,
}

impl Map {
    /// The map as an earlier mount left it, or nothing if there is none of this owner and these `mounts`.
    pub fn find(
        state: &StateDir,
        owner: Owner,
        slot: Slot,
        mounts: [u64; 2],
    ) -> io::Result<Option<Self>> {
        let found = owner.find(state, Kind::Map(slot), body_bytes(owner.size), mounts)?;
        found
            .map(|storage| Self::over(state, owner, slot, storage))
            .transpose()
    }

    /// A new, empty map.
    pub fn create(state: &StateDir, owner: Owner, slot: Slot, mount: u64) -> io::Result<Self> {
        let storage = owner.create(state, Kind::Map(slot), body_bytes(owner.size), mount)?;
        Self::over(state, owner, slot, storage)
    }

    fn over(
        state: &StateDir,
        owner: Owner,
        slot: Slot,
        storage: Arc<dyn Storage>,
    ) -> io::Result<Self> {
        let blocks = owner.size.div_ceil(BLOCK_BYTES);
        let name = owner.file_name(Kind::Map(slot));
        let words = state.map(&name, HEADER_BYTES, Bits::words_for(blocks))?;
        Ok(Self {
            owner,
            slot,
            storage,
            bits: Bits::load(words, blocks),
        })
    }

    /// The set itself.
    pub fn bits(&self) -> &Bits {
        &self.bits
    }

    /// Notes durably that the file belongs to the mount number `mount`.
    pub fn adopt(&self, mount: u64) -> io::Result<()> {
        let header = self.owner.encode(Kind::Map(self.slot), mount);
        self.storage.write_at(0, &header, Fua::Yes)
    }
}

fn body_bytes(size: u64) -> u64 {
    to_u64(Bits::words_for(size.div_ceil(BLOCK_BYTES))) * 8
}
