//! Identities: machines, disks, generations, and the names people give them.
//!
//! A name or an identity that comes from outside is parsed here once; code further up never sees an unchecked one, so
//! no path is ever built from bytes that could hold `../` or a NUL.

use std::{fmt, str::FromStr};

use ring::rand::{SecureRandom, SystemRandom};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{checksum::Digest, limits::NAME_BYTES_MAX, units::Epoch};

/// Where fresh random identities come from; an argument, so that a simulation can repeat a run.
pub trait Ids: Send + Sync + fmt::Debug {
    /// Sixteen random bytes, never given before.
    fn fresh(&self) -> [u8; 16];

    /// A random (version 4) UUID.
    fn uuid(&self) -> Uuid {
        uuid::Builder::from_random_bytes(self.fresh()).into_uuid()
    }
}

/// The operating system's random numbers.
#[derive(Debug)]
pub struct SystemIds(SystemRandom);

impl Default for SystemIds {
    fn default() -> Self {
        Self(SystemRandom::new())
    }
}

impl Ids for SystemIds {
    fn fresh(&self) -> [u8; 16] {
        let mut bytes = [0; 16];
        self.0
            .fill(&mut bytes)
            .expect("getrandom(2) does not fail once the system is up");
        bytes
    }
}

/// Repeatable identities for tests and simulation: a counter mixed with a seed.
#[derive(Debug)]
pub struct SeededIds(parking_lot::Mutex<u64>);

impl SeededIds {
    /// Identities that are the same for the same `seed`.
    pub fn new(seed: u64) -> Self {
        Self(parking_lot::Mutex::new(seed))
    }

    fn next(&self) -> u64 {
        // SplitMix64 (Steele, Lea, Flood 2014): every seed gives a full-period sequence.
        let mut state = self.0.lock();
        *state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = *state;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }
}

impl Ids for SeededIds {
    fn fresh(&self) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&self.next().to_le_bytes());
        bytes[8..].copy_from_slice(&self.next().to_le_bytes());
        bytes
    }
}

/// A protected machine, for as long as it exists anywhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct MachineId(pub Uuid);

impl fmt::Display for MachineId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The fencing token of a machine: `number` grows by one at each promotion; `id` is random, so that two hosts that
/// were promoted apart from each other are told apart although their numbers are equal (a split brain).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Generation {
    /// Grows by one at each promotion.
    pub number: u64,
    /// Random, chosen at the promotion.
    pub id: Uuid,
}

impl Generation {
    /// The first generation of a new machine.
    pub fn first(ids: &dyn Ids) -> Self {
        Self {
            number: 1,
            id: ids.uuid(),
        }
    }
}

impl fmt::Display for Generation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.number, &self.id.simple().to_string()[..8])
    }
}

/// One point of a machine's history: the epoch, and the chain hash over everything that led to it. Two hosts with the
/// same lineage hold the same bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Lineage {
    /// The last epoch.
    pub epoch: Epoch,
    /// SHA-256 over all delta logs up to it.
    pub chain: Digest,
}

/// A name of a machine, a disk or a peer that is safe as a file name: 1 to 128 bytes of printable text without `/`
/// and `\`, not starting with a dot.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Name(String);

/// Why a text is not a [`Name`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// No text at all.
    #[error("a name must not be empty")]
    Empty,
    /// More than [`NAME_BYTES_MAX`] bytes.
    #[error("a name has at most {NAME_BYTES_MAX} bytes, this one has {0}")]
    TooLong(usize),
    /// A dot in front: hidden, or a way up.
    #[error("a name must not start with a dot: {0:?}")]
    LeadingDot(String),
    /// A separator or a control character.
    #[error("a name must not contain {0:?}")]
    Forbidden(char),
}

impl Name {
    /// Parses `text`.
    pub fn new(text: &str) -> Result<Self, NameError> {
        if text.is_empty() {
            return Err(NameError::Empty);
        }
        if text.len() > NAME_BYTES_MAX {
            return Err(NameError::TooLong(text.len()));
        }
        if let Some(bad) = text
            .chars()
            .find(|c| matches!(c, '/' | '\\') || c.is_control())
        {
            return Err(NameError::Forbidden(bad));
        }
        if text.starts_with('.') {
            return Err(NameError::LeadingDot(text.to_owned()));
        }
        Ok(Self(text.to_owned()))
    }

    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

impl FromStr for Name {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        Self::new(text)
    }
}

impl TryFrom<String> for Name {
    type Error = NameError;

    fn try_from(text: String) -> Result<Self, NameError> {
        Self::new(&text)
    }
}

impl From<Name> for String {
    fn from(name: Name) -> Self {
        name.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_could_leave_their_folder_are_refused() {
        for bad in [
            "", ".", "..", "../x", "a/b", "a\\b", "a\0b", "a\nb", ".hidden",
        ] {
            assert!(Name::new(bad).is_err(), "{bad:?}");
        }
        assert_eq!(Name::new(&"n".repeat(300)), Err(NameError::TooLong(300)));
        for good in ["web-1", "SQL Server 2019", "größe", "a..b"] {
            assert_eq!(Name::new(good).unwrap().as_str(), good);
        }
    }

    #[test]
    fn seeded_identities_repeat_and_differ() {
        let (a, b) = (SeededIds::new(7), SeededIds::new(7));
        let first = a.fresh();
        assert_eq!(first, b.fresh());
        assert_ne!(first, a.fresh());
    }
}
