//! Floor 1: bytes that last. The only way the floors above touch a file.
//!
//! Two seams: [`Storage`] is one file, [`Folder`] the place it lives in. Each has a real implementation ([`mod@file`]) and
//! one in memory ([`memory`]) that forgets, tears and fails on demand, so that every crash contract above can be cut
//! at every sync boundary.
//!
//! [`beneath`] finds files by names that others wrote; in a [`placed`] folder some files lie elsewhere.
//!
//! # What a power cut leaves
//! Of the bytes written since the last successful [`Storage::sync`] any subset may be on the platter, each 512-byte
//! sector old or new. A name that was created, renamed or removed since the last [`Folder::sync`] is old or new.
//! A process that is killed loses nothing that was written.
#![forbid(unsafe_code)]

pub mod beneath;
pub mod draft;
pub mod file;
pub mod ledger;
pub mod memory;
pub mod placed;

use std::{fmt, io, sync::Arc};

use crate::base::units::Extent;

/// Whether a file may be changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Reading only.
    ReadOnly,
    /// Reading and writing.
    ReadWrite,
}

/// Whether one write must be durable before it returns (forced unit access).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fua {
    /// Durable after the next sync.
    No,
    /// Durable, with the metadata needed to read it back, when the call returns.
    Yes,
}

/// What happens to the space of a run that reads as zeros afterwards.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Space {
    /// Given back to the file system where it can do that.
    Release,
    /// Kept, or allocated if the run lies past the end of the file, so that later writes there do not fail for space.
    Keep,
}

/// One file, addressed by position.
///
/// Callers keep `offset + len` within 63 bits. In exchange: calls may come from any thread at once; calls on runs that
/// do not overlap do not disturb each other; a failed call may have changed any part of the run it was given.
/// After a failed [`sync`](Storage::sync) nothing written since the last good one can be trusted to last, and
/// repeating the call proves nothing (the kernel marks the pages clean): stop using the file. No sync succeeds
/// over bytes that another one, in flight with it, was told are lost.
pub trait Storage: Send + Sync + fmt::Debug {
    /// Length in bytes.
    fn len(&self) -> io::Result<u64>;

    /// Fills `buf` from `offset`. Bytes past the end are an [`io::ErrorKind::UnexpectedEof`].
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()>;

    /// Writes all of `buf` at `offset`, growing the file if need be (the gap reads as zeros).
    fn write_at(&self, offset: u64, buf: &[u8], fua: Fua) -> io::Result<()>;

    /// Makes the run read as zeros. With [`Space::Keep`] the file grows to hold the run.
    fn zero(&self, run: Extent, space: Space) -> io::Result<()>;

    /// The first run at or after `offset` that may hold data, or nothing up to the end of the file. Whatever lies
    /// outside the runs reads as zeros.
    fn data_after(&self, offset: u64) -> io::Result<Option<Extent>>;

    /// Sets the length; a grown part reads as zeros.
    fn set_len(&self, len: u64) -> io::Result<()>;

    /// Makes everything written so far durable, with the length.
    fn sync(&self) -> io::Result<()>;

    /// Says that the run will be read soon, and returns at once: many runs that are announced before the first is read
    /// come from the disk side by side. A hint that may be ignored.
    fn announce(&self, _run: Extent) {}

    /// Whether the file is empty.
    fn is_empty(&self) -> io::Result<bool> {
        Ok(self.len()? == 0)
    }
}

/// Whether the host is out of space, or the user's share of it: nothing is broken, and what failed may be tried again.
pub fn is_full(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
    )
}

/// How [`Folder::open`] treats a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Open {
    /// An existing file, for reading only.
    Read,
    /// An existing file.
    Write,
    /// An existing file whose long writes nobody reads again soon. They go past the host's page cache where that can be
    /// done, which changes what a write costs and nothing of what it promises.
    WriteAside,
    /// A new file; an existing one is an [`io::ErrorKind::AlreadyExists`].
    CreateNew,
    /// An existing file, or a new one.
    Create,
}

/// A folder of files. Names are single path components; anything else is an [`io::ErrorKind::InvalidInput`].
pub trait Folder: Send + Sync + fmt::Debug {
    /// Opens a file.
    fn open(&self, name: &str, how: Open) -> io::Result<Arc<dyn Storage>>;

    /// Renames a file, replacing any that has the name.
    fn rename(&self, from: &str, to: &str) -> io::Result<()>;

    /// Removes a file; one that is not there is an [`io::ErrorKind::NotFound`].
    fn remove(&self, name: &str) -> io::Result<()>;

    /// Names of all files and folders, in no particular order.
    fn names(&self) -> io::Result<Vec<String>>;

    /// The folder below this one, created if it is not there.
    fn folder(&self, name: &str) -> io::Result<Arc<dyn Folder>>;

    /// Makes all creations, renames and removals so far durable.
    fn sync(&self) -> io::Result<()>;
}

/// Refuses a `name` that is not a single path component.
fn check_component(name: &str) -> io::Result<()> {
    let plain = !name.is_empty() && name != "." && name != ".." && !name.contains(['/', '\0']);
    if plain {
        Ok(())
    } else {
        Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("not a plain file name: {name:?}"),
        ))
    }
}
