//! Why bytes are not a delta log.

use super::layout::VERSION;
use crate::base::checksum::Digest;

/// Why bytes are not a delta log, or not all of one. Nothing after it can be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// Something else.
    #[error("not a delta log: the magic at log offset 0 is missing")]
    Magic,
    /// Written by a newer program.
    #[error(
        "the delta log has version {0}, this program reads up to version {VERSION}: update this host"
    )]
    Version(u16),
    /// A checksum does not match.
    #[error("the {part} at log offset {offset:#x} is damaged: its checksum does not match")]
    Checksum {
        /// The part of the log.
        part: &'static str,
        /// Where it starts.
        offset: u64,
    },
    /// A value that no log has.
    #[error("the {part} at log offset {offset:#x} is not valid: {reason}")]
    Invalid {
        /// The part of the log.
        part: &'static str,
        /// Where it starts.
        offset: u64,
        /// What is wrong.
        reason: &'static str,
    },
    /// The chain hash in the foot is not the one of these frames.
    #[error("the chain hash of the delta log does not match: expected {computed}, found {stated}")]
    Chain {
        /// What the bytes add up to.
        computed: Digest,
        /// What the foot says.
        stated: Digest,
    },
    /// Bytes behind the end.
    #[error("the delta log ended at log offset {0:#x}, but more bytes follow")]
    Surplus(u64),
    /// An earlier error was final.
    #[error("the delta log was already found to be invalid")]
    Stopped,
}

pub(super) fn invalid(part: &'static str, offset: u64, reason: &'static str) -> DecodeError {
    DecodeError::Invalid {
        part,
        offset,
        reason,
    }
}
