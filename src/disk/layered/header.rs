//! The first bytes of a layer's file; all of them in one sector, so that they change as a whole.
//!
//! | offset | bytes | field |
//! |---|---|---|
//! | 0  | 8  | magic, `UNDERLYR` |
//! | 8  | 2  | version, 1 |
//! | 10 | 2  | 1 since a fold began, before that 0 |
//! | 12 | 4  | reserved, zero |
//! | 16 | 8  | size of the disk in bytes |
//! | 24 | 32 | what the base holds: the chain hash of its recovery point |
//! | 56 | 16 | the boot of the host in which the low halves of the map are right |
//! | 72 | 4  | CRC-32C of bytes 0..72 |
//!
//! Numbers are little-endian. A program that knows no folds takes a layer whose fold began for one of a later version:
//! over its base it would show the disk without what was folded.

use std::io::{self, Cursor};

use binrw::{BinRead, BinWrite, binrw};
use uuid::Uuid;

use super::LayerError;
use crate::{
    base::{
        checksum::{Digest, crc32c},
        limits::DISK_BYTES_MAX,
        units::{BLOCK_BYTES, Extent, MIB, to_usize},
    },
    storage::{Fua, Storage},
};

const MAGIC: [u8; 8] = *b"UNDERLYR";
const VERSION: u16 = 1;
const CHECKED_BYTES: usize = 72;
const HEADER_BYTES: usize = CHECKED_BYTES + 4;
/// Where the map starts.
const MAP_AT: u64 = 4096;

/// What a layer says about itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    /// Bytes of the disk.
    pub(super) size: u64,
    /// What the base holds.
    pub(super) identity: Digest,
    /// In which boot the low halves of the map are right; nil for none.
    pub(super) boot: Uuid,
    /// The disk below is no longer the base but the one that the layer is folded into.
    pub(super) folding: bool,
}

#[binrw]
#[brw(little)]
struct HeaderBytes {
    magic: [u8; 8],
    version: u16,
    folding: u16,
    reserved: [u8; 4],
    size: u64,
    identity: [u8; 32],
    boot: [u8; 16],
}

impl Header {
    /// The header in `storage`; nothing if the making of the layer did not come as far.
    pub(super) fn read(storage: &dyn Storage) -> Result<Option<Self>, LayerError> {
        let mut bytes = [0; HEADER_BYTES];
        match storage.read_at(0, &mut bytes) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
            other => other?,
        }
        if bytes == [0; HEADER_BYTES] {
            return Ok(None);
        }
        let (body, stated) = bytes.split_at(CHECKED_BYTES);
        let fixed = HeaderBytes::read(&mut Cursor::new(body)).expect("72 bytes are there");
        if fixed.magic != MAGIC {
            return Err(LayerError::Invalid("its magic is missing"));
        }
        if crc32c(body).to_le_bytes() != *stated {
            return Err(LayerError::Invalid("the checksum of its header is wrong"));
        }
        if fixed.version != VERSION || fixed.folding > 1 || fixed.reserved != [0; 4] {
            return Err(LayerError::Invalid("it has another version"));
        }
        if fixed.size == 0 || fixed.size > DISK_BYTES_MAX {
            return Err(LayerError::Invalid("its size is out of range"));
        }
        Ok(Some(Self {
            size: fixed.size,
            identity: Digest(fixed.identity),
            boot: Uuid::from_bytes(fixed.boot),
            folding: fixed.folding == 1,
        }))
    }

    /// Writes the header; not durable.
    pub(super) fn write(&self, storage: &dyn Storage) -> io::Result<()> {
        let fixed = HeaderBytes {
            magic: MAGIC,
            version: VERSION,
            folding: self.folding.into(),
            reserved: [0; 4],
            size: self.size,
            identity: self.identity.0,
            boot: self.boot.into_bytes(),
        };
        let mut bytes = Cursor::new(Vec::with_capacity(HEADER_BYTES));
        fixed.write(&mut bytes).expect("memory takes every write");
        let mut bytes = bytes.into_inner();
        let crc = crc32c(&bytes);
        bytes.extend_from_slice(&crc.to_le_bytes());
        debug_assert_eq!(bytes.len(), HEADER_BYTES);
        storage.write_at(0, &bytes, Fua::No)
    }

    /// The map in the file.
    pub(super) fn map(&self) -> Extent {
        Extent::new(MAP_AT, self.size.div_ceil(BLOCK_BYTES))
    }

    /// Where the data starts.
    pub(super) fn data_at(&self) -> u64 {
        self.map().end().next_multiple_of(MIB)
    }
}

const _: () = assert!(HEADER_BYTES <= 512 && to_usize(MAP_AT) >= HEADER_BYTES);
