//! Why a VHD cannot be opened, made or resized.

use std::io;

use uuid::Uuid;

use crate::disk::parents::ParentsError;

/// Why a file does not open as a VHD.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The storage below failed, or the file ends inside a structure.
    #[error("cannot {doing} the VHD {part} at file offset {offset:#x}")]
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
    /// There is no footer.
    #[error("not a VHD file: neither its end nor its start holds a footer (\"conectix\")")]
    NotVhd,
    /// A structure breaks a rule of the format.
    #[error(
        "the VHD {part} at file offset {offset:#x} is damaged: {problem}; restore the image from a copy"
    )]
    Corrupt {
        /// The structure concerned.
        part: &'static str,
        /// Where in the file.
        offset: u64,
        /// Which rule.
        problem: String,
    },
    /// The file is sound, as far as can be seen, and needs what this program does not do.
    #[error("the VHD file needs {0}, which is not supported")]
    Unsupported(String),
    /// Opened for writing.
    #[error(
        "it is a differencing VHD, which is opened for reading only; convert it to a dynamic one to write to it"
    )]
    Differencing,
    /// The parent was not found, or may not be used.
    #[error(transparent)]
    Parents(#[from] ParentsError),
    /// The parent was found and does not open.
    #[error("its parent {name} cannot be used")]
    Parent {
        /// The parent.
        name: String,
        /// Why not.
        #[source]
        source: Box<OpenError>,
    },
    /// The file found is another disk, or one that was made anew.
    #[error(
        "its parent {name} is another disk: it has the identity {found}, the child was made on {wanted}; restore the right parent"
    )]
    WrongParent {
        /// The file found.
        name: String,
        /// Its identity.
        found: Uuid,
        /// The one that the child knows.
        wanted: Uuid,
    },
    /// Parents of parents without end.
    #[error("its chain of parents has more than {0} images; merge some of them")]
    ChainTooLong(usize),
}

impl OpenError {
    pub(super) fn corrupt(part: &'static str, offset: u64, problem: impl Into<String>) -> Self {
        Self::Corrupt {
            part,
            offset,
            problem: problem.into(),
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

    pub(super) fn reading(part: &'static str, offset: u64) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io {
            doing: "read",
            part,
            offset,
            source,
        }
    }
}

/// Why a VHD cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum CreateError {
    /// The storage below failed.
    #[error("cannot write the new VHD file")]
    Io(#[from] io::Error),
    /// There is something in the file already.
    #[error("the file has {0} bytes already; a VHD is made in an empty one")]
    NotEmpty(u64),
    /// What the format does not know.
    #[error("a VHD cannot have {0}")]
    Options(String),
}
