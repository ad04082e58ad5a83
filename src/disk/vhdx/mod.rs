//! VHDX, the virtual disk format of Hyper-V (MS-VHDX): dynamic, fixed and differencing disks, read and written in place.
//!
//! Reading order: `format` is the bytes; `header`, `region`, `metadata` and `bat` check them; `log` replays and writes
//! metadata; `open` puts these together; `locator` names the parent of a differencing disk, `chain` opens it and its own,
//! `bitmap` tells which sectors are in which file; `space` finds room; `flight` knows who is still looking at an old
//! place; `disk` is the disk, `write` how blocks come and go, `flush` how all of it becomes durable; `create` makes new
//! files; `survey` looks through a whole file past its faults, for `check`, which finds them, and `inspect`, which shows
//! the rest.
//!
//! # A write's journey
//! ```text
//!   block present: one load of its table entry, one positional write. No lock.
//!   block absent:  its stripe's lock -> a place that durably reads as zeros -> log entry (page cache) with everybody
//!                  who waits -> table entry published -> as above
//!   in the parent: its stripe's lock -> a place -> the block's bytes and the new ones into it, durably -> log entry ->
//!                  table entry published
//!   discard:       stripe's lock -> log entry -> entry published -> the place rests until nobody can reach it
//! ```
//! A place durably reads as its block did before any entry leads to it: as zeros (see `space`), or as the parent (see
//! `write`). The table entry may then become durable before or after the payload and a sector is still old or new.
//!
//! # Crash contract
//! Order of what is made durable in a session; each arrow is a sync or a forced write:
//! ```text
//!   open dirty:  new FileWriteGuid -> pages replayed -> LogGuid nil, in both headers
//!   first write: new FileWriteGuid and DataWriteGuid, in both headers -> unused end of the file cut off
//!   first log:   empty entry -> LogGuid in both headers
//!   flush:       payload and log entries, together
//!   checkpoint:  log entries -> pages in place -> entry with the new tail -> ring space used again
//!   close:       log entries -> pages in place -> LogGuid nil -> unused end of the file cut off
//! ```
//! Therefore: a power cut loses nothing flushed, and of the rest each sector is old or new. The death of the process
//! loses nothing acknowledged: the log is in the page cache before the write returns, and the next open replays it.
//!
//! # Choices
//! A discarded block becomes `ZERO` without a place, not `UNMAPPED` with one: its space serves other blocks.
//! Fixed disks keep their blocks; a discard writes zeros. A child never writes sector bitmaps: the first write into a
//! block of its parent copies the block up (see `write` for why).

mod bat;
mod bitmap;
mod chain;
mod check;
mod create;
mod disk;
mod error;
mod flight;
mod flush;
mod format;
mod header;
mod inspect;
mod locator;
mod log;
mod metadata;
mod occupancy;
mod open;
mod region;
mod space;
mod survey;
mod write;

pub use check::check;
pub use create::{ParentPaths, create, create_child};
pub use disk::VhdxDisk;
pub use error::{CreateError, OpenError};
pub use inspect::{
    Ancestor, Blocks, HeaderCopy, Inspection, Item, Log, LogState, ParentLocator, Region,
    ancestors, inspect,
};

/// The first bytes of every VHDX file.
pub const SIGNATURE: &[u8; 8] = format::FILE_SIGNATURE;
/// Block size of a new disk unless told otherwise, in bytes: what Windows chooses.
pub const BLOCK_BYTES_DEFAULT: u32 = 32 * 1024 * 1024;

/// Block size of a new child unless told otherwise, in bytes: what Windows chooses.
pub const CHILD_BLOCK_BYTES_DEFAULT: u32 = 2 * 1024 * 1024;

/// Whether blocks take space from the beginning.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// A block takes space when it is first written.
    Dynamic,
    /// All blocks have their space from the beginning and keep it.
    Fixed,
    /// As dynamic, over a parent that holds what was not written.
    Differencing,
}

impl std::fmt::Display for Kind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            Self::Dynamic => "dynamic",
            Self::Fixed => "fixed",
            Self::Differencing => "differencing",
        })
    }
}

/// What a new disk is to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CreateOptions {
    /// Bytes that the guest sees: a multiple of `logical_sector`, at most 64 TiB.
    pub size: u64,
    /// Bytes of a block: a power of two from 1 to 256 MiB.
    pub block_size: u32,
    /// Dynamic or fixed.
    pub kind: Kind,
    /// 512 or 4096 bytes.
    pub logical_sector: u32,
    /// 512 or 4096 bytes.
    pub physical_sector: u32,
}

#[cfg(test)]
mod tests;
