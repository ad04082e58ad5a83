//! Why an image cannot be opened or made.

use std::io;

use uuid::Uuid;

use crate::disk::parents::ParentsError;

/// Why a file does not open as a VHDX disk.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The storage below failed, or the file ends inside a structure.
    #[error("cannot {doing} the VHDX {part} at file offset {offset:#x}")]
    Io {
        /// `read` or `write`.
        doing: &'static str,
        /// The structure concerned.
        part: &'static str,
        /// Where in the file.
        offset: u64,
        /// What the storage said.
        #[source]
        source: io::Error,
    },
    /// The first bytes are another file's.
    #[error("not a VHDX file: it does not start with \"vhdxfile\"")]
    NotVhdx,
    /// A structure breaks a rule of the format.
    #[error(
        "the VHDX {part} at file offset {offset:#x} is damaged: {problem}; restore the image from a copy"
    )]
    Corrupt {
        /// The structure concerned.
        part: &'static str,
        /// Where in the file.
        offset: u64,
        /// Which rule.
        problem: String,
    },
    /// The file is shorter than its log says it was.
    #[error(
        "the VHDX file was truncated: it has {len} bytes, its log knows of {flushed}; restore the image from a copy"
    )]
    Truncated {
        /// Bytes now.
        len: u64,
        /// Bytes that were durable when the log was last written.
        flushed: u64,
    },
    /// The file is sound, as far as can be seen, and needs what this program does not do.
    #[error("the VHDX file needs {0}, which is not supported")]
    Unsupported(String),
    /// The parent of a differencing image is not there.
    #[error("{child} has no parent")]
    NoParent {
        /// The image: the one to be opened or one of its parents.
        child: String,
        /// Why it was not found.
        #[source]
        source: ParentsError,
    },
    /// The parent does not open.
    #[error("the parent {parent} of {child} cannot be used")]
    Parent {
        /// The image: the one to be opened or one of its parents.
        child: String,
        /// Its parent.
        parent: String,
        /// What is wrong with the parent.
        #[source]
        source: Box<OpenError>,
    },
    /// The parent was written to since the child was made, or is another image.
    #[error(
        "{child} was made over another state of its parent {parent}: it expects the data identity {}, the parent has {found}; \
         restore the parent as it was then",
        .expected.iter().map(Uuid::to_string).collect::<Vec<_>>().join(" or ")
    )]
    Linkage {
        /// The image: the one to be opened or one of its parents.
        child: String,
        /// Its parent.
        parent: String,
        /// What the child's locator names.
        expected: Vec<Uuid>,
        /// The parent's `DataWriteGuid`.
        found: Uuid,
    },
    /// A sector of the child is none of the parent.
    #[error(
        "{child} has sectors of {expected} bytes, its parent {parent} of {found}: find the parent that it was made over"
    )]
    ParentSectors {
        /// The image: the one to be opened or one of its parents.
        child: String,
        /// Its parent.
        parent: String,
        /// Bytes of the child's logical sectors.
        expected: u32,
        /// Bytes of the parent's.
        found: u32,
    },
    /// The chain of parents does not end in time.
    #[error("{child} has a parent still, after a chain of {limit}: merge some of them")]
    TooManyParents {
        /// The last image that was opened.
        child: String,
        /// Longest chain of parents.
        limit: usize,
    },
}

impl OpenError {
    pub(super) fn corrupt(part: &'static str, offset: u64, problem: impl Into<String>) -> Self {
        Self::Corrupt {
            part,
            offset,
            problem: problem.into(),
        }
    }

    /// For those who find out after the image was opened.
    pub(super) fn into_io(self) -> io::Error {
        match self {
            Self::Io { source, .. } => source,
            error => io::Error::new(io::ErrorKind::InvalidData, error),
        }
    }

    pub(super) fn reading(part: &'static str, offset: u64) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io {
            doing: "read",
            part,
            offset,
            source,
        }
    }

    pub(super) fn writing(part: &'static str, offset: u64) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io {
            doing: "write",
            part,
            offset,
            source,
        }
    }
}

/// Why a VHDX file cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum CreateError {
    /// The storage below failed.
    #[error("cannot write the new VHDX file")]
    Io(#[from] io::Error),
    /// There is something in the file already.
    #[error("the file has {0} bytes already; a VHDX disk is made in an empty one")]
    NotEmpty(u64),
    /// The parent of a new child cannot be read.
    #[error("the parent of a new VHDX disk cannot be used")]
    Parent(#[source] OpenError),
    /// Sizes that the format does not know.
    #[error("a VHDX disk cannot have {0}")]
    Options(String),
}
