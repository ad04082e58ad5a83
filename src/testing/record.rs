//! What a host of the simulation remembers, and what it answers when it does not do what it is asked for.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::{
    base::{chain::chain, clock::Timestamp, ids::Lineage},
    coord::role::RoleState,
    protocol::message::Refusal,
};

/// What became of something; a text says why not.
pub(super) type Done<T = ()> = Result<T, String>;

/// What became of something that a person or the other host asked for.
pub(super) type Asked<T = ()> = Result<T, No>;

/// Why something was not done.
#[derive(Clone, Debug)]
pub(super) enum No {
    /// It is refused as things are: nothing is wrong.
    NotNow(String),
    /// It went wrong.
    Failed(String),
}

impl From<String> for No {
    fn from(why: String) -> Self {
        Self::Failed(why)
    }
}

impl fmt::Display for No {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (Self::NotNow(why) | Self::Failed(why)) = self;
        f.write_str(why)
    }
}

impl From<No> for Refusal {
    fn from(no: No) -> Self {
        match no {
            No::NotNow(detail) => Self::NotNow { detail },
            No::Failed(detail) => Self::Failed { detail },
        }
    }
}

pub(super) fn not_now<T>(why: &str) -> Asked<T> {
    Err(No::NotNow(why.into()))
}

pub(super) fn told(error: impl std::error::Error) -> String {
    chain(&error)
}

/// What a host remembers of the machine's role, as `node::host::record` has it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Record {
    pub(super) role: RoleState,
    pub(super) layers: Option<Layers>,
    pub(super) adoption: Option<AdoptionRecord>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Layers {
    pub(super) point: Lineage,
    pub(super) settled: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct AdoptionRecord {
    pub(super) lineage: Lineage,
    pub(super) cut: Timestamp,
    pub(super) exact: bool,
}

impl Record {
    pub(super) fn new(role: RoleState) -> Self {
        Self {
            role,
            layers: None,
            adoption: None,
        }
    }

    /// The disks are shown on layers over `point` from now on.
    pub(super) fn layer_over(&mut self, point: Lineage) {
        self.layers = Some(Layers {
            point,
            settled: false,
        });
    }
}
