//! Why a VHD cannot be opened, made or resized.

use std::io;

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
}

impl OpenError {
    pub(super) fn corrupt(part: &'static str, offset: u64, problem: impl Into<String>) -> Self {
        Self::Corrupt {
            part,
            offset,
            problem: problem.into(),
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
