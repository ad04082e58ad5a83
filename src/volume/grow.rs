//! Disks that grew between two mounts.
//!
//! What is behind the old end reads as zeros on both hosts, so that nothing is owed for it: a disk that this program grew
//! needs no resync. One that somebody else grew has an image that changed while closed, and gets one.
//!
//! # Crash contract
//! The machine's record has the old size until the longer maps hold all bits and are synced. Should the power fail before,
//! the next open finds no maps of the old size, believes none of the new one, and owes the whole disk.
#![forbid(unsafe_code)]

use std::{io, ops::Range};

use crate::track::{
    header::{Owner, Slot},
    map::Map,
    state::StateDir,
};

/// Two new maps for the disk as it is `now`, with all bits of its maps from `before` in the first; and whether those were
/// found.
pub(super) fn maps(
    state: &StateDir,
    before: Owner,
    now: Owner,
    mounts: [u64; 2],
) -> io::Result<([Map; 2], bool)> {
    let mut changed: Vec<Range<u64>> = Vec::new();
    let mut found = true;
    for slot in Slot::BOTH {
        match Map::find(state, before, slot, mounts)? {
            Some(map) => changed.extend(map.bits().runs(0..u64::MAX)),
            None => found = false,
        }
    }
    let create = |slot| Map::create(state, now, slot, mounts[1]);
    let maps = [create(Slot::A)?, create(Slot::B)?];
    for run in changed {
        maps[0].bits().set(run);
    }
    Ok((maps, found))
}
