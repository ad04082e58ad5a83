//! VHD, the older virtual disk format (Virtual PC, Hyper-V, Azure, Xen): fixed and dynamic disks, read and written in
//! place, and differencing disks, read.
//!
//! Reading order: `format` is the bytes; `footer`, `header` and `bat` check them; `open` puts these together; `parent`
//! finds what a differencing disk lacks; `space` finds room; `disk` is the disk, `write` how blocks come, `flush` how all
//! of it becomes durable; `create` makes new files, `resize` changes their size, `inspect` tells what is in one and
//! `check` what is wrong with it.
//!
//! # A write's journey
//! ```text
//!   fixed, or block present: one load of its table entry, one positional write. No lock.
//!   block absent:  the lock -> a place that durably reads as zeros -> bitmap -> entry -> entry published -> as above
//!   discard:       a hole in the block, which keeps its place
//! ```
//! The format has no log. It needs none here: a place handed out reads as zeros, and so did the block, so bitmap, data
//! and entry may become durable in any order (see `space`). One sync prepares the places of many blocks.
//!
//! # Crash contract
//! A power cut loses nothing flushed, and of the rest each sector is old or new. The death of the process loses nothing
//! acknowledged: entry and bitmap are in the page cache before the write returns, and the next session's first flush or
//! forced write makes them durable. The footer at the end of a dynamic
//! file may be missing after a cut; the copy at its start is never touched, and opening for writing puts the other right.
//!
//! # Choices
//! The bitmap of a dynamic disk's block is believed: a sector whose bit is clear reads as zeros, as the specification
//! has it. Some readers (qemu) do not look at it. They differ only where a writer left bytes under a clear bit, as Xen
//! does on volumes that were not cleared, and there the guest never wrote them. We write blocks with all bits set and
//! with zeros where nothing was written, so that all readers agree on our files.

mod bat;
mod check;
mod create;
mod disk;
mod error;
mod flush;
mod footer;
mod format;
mod header;
mod inspect;
mod open;
mod parent;
mod resize;
mod space;
mod write;

use std::io;

pub use check::check;
pub use create::create;
pub use disk::VhdDisk;
pub use error::{CreateError, OpenError};
pub use format::Chs;
pub use inspect::{Dynamic, FooterCopy, Inspection, ParentLocator, ParentName, inspect};
pub use resize::{ResizeError, resize};

pub use crate::disk::vhdx::Kind;
use crate::storage::Storage;

/// The first bytes of a footer, and of dynamic and differencing files.
pub const SIGNATURE: &[u8; 8] = format::FOOTER_SIGNATURE;
/// Block size of a new disk unless told otherwise, in bytes: what everybody chooses.
pub const BLOCK_BYTES_DEFAULT: u32 = 2 * 1024 * 1024;

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

#[cfg(test)]
mod tests;
