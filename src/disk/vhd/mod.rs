//! VHD, the older virtual disk format (Virtual PC, Hyper-V, Azure, Xen): dynamic and fixed disks, read and written in
//! place.
//!
//! Reading order: `format` is the bytes; `footer` checks what the disk is; `disk` is the disk; `create` makes new files.

mod create;
mod disk;
mod error;
mod footer;
mod format;

use std::io;

pub use create::create;
pub use disk::VhdDisk;
pub use error::{CreateError, OpenError};
pub use format::Chs;

use crate::storage::Storage;

/// The first bytes of a footer, and of dynamic and differencing files.
pub const SIGNATURE: &[u8; 8] = format::FOOTER_SIGNATURE;
/// Block size of a new disk unless told otherwise, in bytes: what everybody chooses.
pub const BLOCK_BYTES_DEFAULT: u32 = 2 * 1024 * 1024;

/// How blocks get their space.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// The disk's bytes one after the other, and a footer behind them.
    Fixed,
    /// A block takes space when it is first written.
    Dynamic,
    /// What is not in the file is in its parent.
    Differencing,
}

/// What a new disk is to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CreateOptions {
    /// Bytes that the guest sees: a multiple of 512, at most 2040 GiB.
    pub size: u64,
    /// Bytes of a block: a power of two from 512 KiB to 256 MiB. A fixed disk has none.
    pub block_size: u32,
    /// Fixed or dynamic.
    pub kind: Kind,
}

/// Whether the end of the file holds the footer of a fixed VHD, with the right checksum. A guest writes every byte of a
/// raw image and could put one there: ask only if a person wants to know.
pub fn is_fixed(storage: &dyn Storage) -> io::Result<bool> {
    footer::is_fixed(storage)
}
