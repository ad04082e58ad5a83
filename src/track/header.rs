//! The first page of every tracking file: whose it is, and of which mount.
//!
//! | byte | length | field                                                            |
//! |------|--------|------------------------------------------------------------------|
//! | 0    | 8      | magic `USTRACK1`                                                 |
//! | 8    | 4      | kind: 1 and 2 the two maps, 3 the intent log                     |
//! | 12   | 4      | index of the disk                                                |
//! | 16   | 16     | machine id                                                       |
//! | 32   | 8      | size of the disk in bytes                                        |
//! | 40   | 8      | mount: counts how often the machine was opened                   |
//! | 48   | 4      | CRC-32C of bytes 0 to 47                                         |
//!
//! Numbers are little-endian; the body starts at byte [`HEADER_BYTES`]. The mount number tells files that were restored
//! from a backup from the ones the node's store speaks of.
//!
//! # Crash contract
//! A file is made under another name, allocated and synced before it is renamed: a file with the right name is whole.
//! The header is one sector, so it is the old or the new one.
#![forbid(unsafe_code)]

use std::{io, sync::Arc};

use super::state::StateDir;
use crate::{
    base::{
        checksum::crc32c,
        ids::MachineId,
        units::{DiskIndex, to_usize},
    },
    storage::{Fua, Open, Storage},
};

/// Bytes before the body: one page, so that the body can be mapped.
pub const HEADER_BYTES: u64 = 4096;
const MAGIC: &[u8; 8] = b"USTRACK1";
const FIELDS: usize = 48;
/// Ends the name of a file that is being made.
const FRESH: &str = ".new";
static ZEROS: [u8; 64 * 1024] = [0; 64 * 1024];

/// What a tracking file is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// One of the two maps.
    Map(Slot),
    /// The intent log.
    Intent,
}

/// One of the two maps of a disk, which are open and closing map in turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Slot {
    /// The first.
    A,
    /// The second.
    B,
}

impl Kind {
    const ALL: [Self; 3] = [Self::Map(Slot::A), Self::Map(Slot::B), Self::Intent];
}

impl Slot {
    /// The two maps.
    pub const BOTH: [Self; 2] = [Self::A, Self::B];

    /// The other map.
    #[must_use]
    pub fn other(self) -> Self {
        match self {
            Self::A => Self::B,
            Self::B => Self::A,
        }
    }

    /// As an index into a pair.
    pub fn index(self) -> usize {
        match self {
            Self::A => 0,
            Self::B => 1,
        }
    }
}

/// Whose a tracking file is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Owner {
    /// The machine.
    pub machine: MachineId,
    /// The disk's position in it.
    pub disk: DiskIndex,
    /// Size of the disk in bytes.
    pub size: u64,
}

impl Owner {
    /// Name of the file of this `kind`.
    pub fn file_name(&self, kind: Kind) -> String {
        file_name(self.disk, kind)
    }

    /// The header's bytes for the mount number `mount`.
    pub fn encode(&self, kind: Kind, mount: u64) -> [u8; FIELDS + 4] {
        let mut bytes = [0; FIELDS + 4];
        let number: u32 = match kind {
            Kind::Map(Slot::A) => 1,
            Kind::Map(Slot::B) => 2,
            Kind::Intent => 3,
        };
        bytes[..8].copy_from_slice(MAGIC);
        bytes[8..12].copy_from_slice(&number.to_le_bytes());
        bytes[12..16].copy_from_slice(&u32::from(self.disk.0).to_le_bytes());
        bytes[16..32].copy_from_slice(self.machine.0.as_bytes());
        bytes[32..40].copy_from_slice(&self.size.to_le_bytes());
        bytes[40..48].copy_from_slice(&mount.to_le_bytes());
        let crc = crc32c(&bytes[..FIELDS]);
        bytes[FIELDS..].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    /// The existing file of this `kind`, if it is this owner's and of one of the `mounts`.
    pub fn find(
        &self,
        state: &StateDir,
        kind: Kind,
        body: u64,
        mounts: [u64; 2],
    ) -> io::Result<Option<Arc<dyn Storage>>> {
        let storage = match state.folder().open(&self.file_name(kind), Open::Write) {
            Ok(storage) => storage,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        if storage.len()? != HEADER_BYTES + body {
            return Ok(None);
        }
        let mut found = [0; FIELDS + 4];
        storage.read_at(0, &mut found)?;
        let known = mounts
            .iter()
            .any(|&mount| found == self.encode(kind, mount));
        Ok(known.then_some(storage))
    }

    /// Makes the file of this `kind` anew with a `body` of zeros, all of it allocated.
    pub fn create(
        &self,
        state: &StateDir,
        kind: Kind,
        body: u64,
        mount: u64,
    ) -> io::Result<Arc<dyn Storage>> {
        let name = self.file_name(kind);
        let fresh = format!("{name}{FRESH}");
        state.forget(&name);
        let storage = state.folder().open(&fresh, Open::Create)?;
        storage.set_len(0)?;
        // Written, not just reserved: a durable write into space that is only reserved has to commit the file
        // system's journal as well, and a mapped page without a block behind it can raise SIGBUS.
        let mut offset = 0;
        while offset < HEADER_BYTES + body {
            let step = (HEADER_BYTES + body - offset).min(crate::base::units::to_u64(ZEROS.len()));
            storage.write_at(offset, &ZEROS[..to_usize(step)], Fua::No)?;
            offset += step;
        }
        storage.write_at(0, &self.encode(kind, mount), Fua::No)?;
        storage.sync()?;
        state.folder().rename(&fresh, &name)?;
        state.folder().sync()?;
        Ok(storage)
    }
}

/// Whether `name` is that of a tracking file, of whatever disk, or of one that a crash left half made.
pub fn is_tracking_file(name: &str) -> bool {
    let name = name.strip_suffix(FRESH).unwrap_or(name);
    let disk = name.strip_prefix("disk-").and_then(|rest| {
        let (disk, _) = rest.split_once('.')?;
        disk.parse().ok().map(DiskIndex)
    });
    disk.is_some_and(|disk| Kind::ALL.iter().any(|&kind| file_name(disk, kind) == name))
}

fn file_name(disk: DiskIndex, kind: Kind) -> String {
    let suffix = match kind {
        Kind::Map(Slot::A) => "map-a",
        Kind::Map(Slot::B) => "map-b",
        Kind::Intent => "intent",
    };
    format!("disk-{disk}.{suffix}")
}
