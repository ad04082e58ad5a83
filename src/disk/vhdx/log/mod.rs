//! The log: a ring of entries, each of which changes pages of metadata as one.
//!
//! [`entry`] is the bytes of one entry, [`replay`] finds what a dirty log holds and brings it about, and [`journal`]
//! writes new entries.

pub(super) mod entry;
pub(super) mod journal;
pub(super) mod replay;
