//! Why a disk is not resized.

use super::DiskError;

/// Why a disk keeps its size.
#[derive(Debug, thiserror::Error)]
pub enum ResizeError {
    /// No disk of the format can be that large.
    #[error("a disk of this format cannot have {size} bytes: {problem}")]
    Size {
        /// The size asked for, in bytes.
        size: u64,
        /// Which rule it breaks.
        problem: String,
    },
    /// There is, or may be, data behind the new end.
    #[error(
        "the disk cannot shrink to {size} bytes: what lies behind is in use, {smallest} bytes is the smallest size"
    )]
    InUse {
        /// The size asked for, in bytes.
        size: u64,
        /// The smallest size that loses nothing, in bytes.
        smallest: u64,
    },
    /// Its parent's size would have to fit, and what lies behind must not become visible.
    #[error("a differencing disk keeps the size it was made with")]
    Differencing,
    /// The disk or the file below failed. The size is the old one or, after a power cut, perhaps the new one.
    #[error("resizing the disk failed")]
    Disk(#[from] DiskError),
}
