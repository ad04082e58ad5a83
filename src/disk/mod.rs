//! Floor 2: what a guest sees. A [`Disk`] is bytes `0..size`; an image format gives it a place in a file.
//!
//! Reading order: this seam, then `raw`, then `parents`, `pieces` and `running`, which `vhd` and `vhdx` share, then these,
//! then `image`, the one door to all formats; `check` is what their checkers find, `layered` a disk over another one.
#![forbid(unsafe_code)]

pub mod check;
pub mod image;
pub mod layered;
pub mod parents;
mod pieces;
pub mod raw;
mod resize;
mod running;
pub mod vhd;
pub mod vhdx;

use std::{fmt, io, sync::Arc};

use self::parents::{NoParents, Parents};
use crate::base::{ids::Ids, units::Extent};
pub use crate::storage::{Access, Fua, Space};
pub use resize::ResizeError;

/// The properties of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Geometry {
    /// Bytes that the guest sees; a multiple of the logical sector size.
    pub size: u64,
    /// Smallest unit the guest addresses: 512 or 4096 bytes.
    pub logical_sector: u32,
    /// Smallest unit the medium writes without reading first: 512 or 4096 bytes.
    pub physical_sector: u32,
}

/// How an image is opened.
#[derive(Clone, Debug)]
pub struct Opening {
    /// For reading, or for writing as well.
    pub access: Access,
    /// Where new identities in the image come from.
    pub ids: Arc<dyn Ids>,
    /// Where a differencing image finds its parent.
    pub parents: Arc<dyn Parents>,
}

impl Opening {
    /// Without parents: a differencing image is refused.
    pub fn new(access: Access, ids: Arc<dyn Ids>) -> Self {
        Self {
            access,
            ids,
            parents: Arc::new(NoParents),
        }
    }

    /// With parents.
    #[must_use]
    pub fn with_parents(self, parents: Arc<dyn Parents>) -> Self {
        Self { parents, ..self }
    }
}

/// What a run of a disk holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// Bytes of its own, which may be zeros.
    Data,
    /// Nothing: it reads as zeros and takes no space.
    Zero,
}

/// A failed operation on a disk.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// The storage below failed.
    #[error("{operation} failed at disk offset {offset:#x}")]
    Io {
        /// The guest's operation: `read`, `write`, `zero`, `flush`, `resize`.
        operation: &'static str,
        /// First byte of the run concerned.
        offset: u64,
        /// What the storage said.
        #[source]
        source: io::Error,
    },
    /// The run reaches past the end of the disk.
    #[error("{} bytes at disk offset {:#x} reach past its end at {size:#x}", run.len, run.offset)]
    OutOfRange {
        /// The run asked for.
        run: Extent,
        /// Size of the disk in bytes.
        size: u64,
    },
    /// The disk was opened for reading only, or its host lost the right to write.
    #[error("the disk is read-only")]
    ReadOnly,
    /// An earlier failure left the disk in a state in which going on could lose data; it says which.
    #[error("the disk stopped: {0}")]
    Stopped(String),
}

/// A disk as a guest sees it.
///
/// Calls may come from any thread at once. Overlapping writes in flight together end in either order, sector by sector.
/// Callers check nothing: a run past the end is [`DiskError::OutOfRange`]. An acknowledged write survives the death of
/// the process; after [`flush`](Disk::flush), or with [`Fua::Yes`], a power cut as well. After a failed flush the disk
/// stops: every later write and flush fails.
pub trait Disk: Send + Sync + fmt::Debug {
    /// Its properties. The sectors never change; the size does when somebody resizes the disk while it is open, so it is
    /// one atomic load in a format that can. Whoever needs it twice in one operation asks once.
    fn geometry(&self) -> Geometry;

    /// Fills `buf` from `offset`.
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), DiskError>;

    /// Writes all of `buf` at `offset`.
    fn write_at(&self, offset: u64, buf: &[u8], fua: Fua) -> Result<(), DiskError>;

    /// Makes `run` read as zeros, whatever its alignment; [`Space::Release`] is the guest's discard or unmap.
    fn zero(&self, run: Extent, space: Space, fua: Fua) -> Result<(), DiskError>;

    /// Makes every acknowledged write durable.
    fn flush(&self) -> Result<(), DiskError>;

    /// The longest run known to be of one kind that starts at `offset`, which lies inside the disk. What is `Data` may
    /// still read as zeros; what is `Zero` does.
    fn run_at(&self, offset: u64) -> Result<(Extent, Content), DiskError>;

    /// Flushes and leaves the image cleanly closed. Called once, with no other call in flight; later calls fail.
    fn close(&self) -> Result<(), DiskError>;
}

/// What the storage said, as a failure of the guest's `operation` at disk offset `offset`.
fn failed(operation: &'static str, offset: u64) -> impl FnOnce(io::Error) -> DiskError {
    move |source| DiskError::Io {
        operation,
        offset,
        source,
    }
}

/// The run, if it lies inside a disk of `size` bytes.
pub fn check_run(offset: u64, len: usize, size: u64) -> Result<Extent, DiskError> {
    let run = Extent::new(offset, crate::base::units::to_u64(len));
    match run.checked_end() {
        Some(end) if end <= size => Ok(run),
        _ => Err(DiskError::OutOfRange { run, size }),
    }
}

#[cfg(test)]
pub(crate) mod enumeration;
#[cfg(test)]
pub(crate) mod histories;
