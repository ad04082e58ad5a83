//! What two hosts of a machine say about its role: the claim of the one that calls, the answer of the other.
//!
//! What follows from them is decided by the role machine, `coord::role`; here they are only words.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::base::ids::{Generation, Lineage};

/// What a primary, or one that wants to be one, says first on a link.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Claim {
    /// The generation it is in.
    pub generation: Generation,
    /// Whether it is a committed primary. If not, it asks whether it may be one again.
    pub active: bool,
    /// Where that one began, if it began there.
    pub born: Option<Lineage>,
    /// The generation it asks the peer to move to.
    pub wants: Option<Generation>,
}

/// What the peer answers to a [`Claim`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Answer {
    /// It follows this generation.
    Follows(Generation),
    /// It will follow once the caller has durably taken the blocks in which its images may differ.
    Diverged(Generation),
    /// It obeys a higher generation.
    Higher {
        /// Which.
        theirs: Generation,
        /// Nobody is primary of it: its failover was cancelled.
        abandoned: bool,
    },
    /// It has an equal number and another identity.
    Split {
        /// Which.
        theirs: Generation,
    },
    /// It was active itself until this claim; a person has to reverse it first.
    NotReversed,
    /// It has a lower generation and does not follow a host that is not active.
    Lower(Generation),
}

impl fmt::Display for Answer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Follows(theirs) => write!(f, "the peer follows generation {theirs}"),
            Self::Diverged(theirs) => write!(
                f,
                "the peer will follow generation {theirs} once this host has taken the blocks in which the peer may differ"
            ),
            Self::Higher {
                theirs,
                abandoned: false,
            } => write!(
                f,
                "this machine was failed over: generation {theirs} is active, this host has an older one and must not write"
            ),
            Self::Higher {
                theirs,
                abandoned: true,
            } => write!(
                f,
                "a failover of this machine to generation {theirs} was cancelled; this host takes it back"
            ),
            Self::Split { theirs } => write!(
                f,
                "split brain: the peer holds generation {theirs}, equal in number and different in identity"
            ),
            Self::NotReversed => f.write_str(
                "the peer was the primary itself before the failover: run `understudy reverse` there to let it follow",
            ),
            Self::Lower(theirs) => write!(
                f,
                "the peer follows generation {theirs} and waits for its primary"
            ),
        }
    }
}
