//! Floor 0: the words everything else is written in: units, identities, time, checksums, limits, rates, errors in words, locks.
//!
//! Nothing here does input or output. Conversions between integer types live in [`units`], so that an `as` anywhere
//! else is a finding.
#![forbid(unsafe_code)]

pub mod buffers;
pub mod chain;
pub mod checksum;
pub mod clock;
pub mod ids;
pub mod limits;
pub mod rate;
pub mod sync;
pub mod units;
