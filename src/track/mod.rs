//! Floor 2: which blocks changed: maps, intent log, region locks, preserved blocks.
//!
//! Per disk there are two persistent maps ([`map`]) that serve as open and closing map in turn, two maps in memory of
//! what is still owed to the replica ([`bits`]) and two of what may be equal there ([`suspects`]), the table of hot regions with its intent log ([`hot`], [`intent`]) and
//! the region locks ([`locks`]). Per machine there is the side store of preserved blocks ([`preserve`]). How they work
//! together at a write, a cut and a take is decided one floor up, in `volume`.
//!
//! # The invariant everything here serves
//! If the image and the replica may differ in a block, its bit is set in one of the two maps, or its region is in the
//! intent log. Three rules keep it:
//! 1. A region is durable in the intent log before the image is written there.
//! 2. A region leaves the intent log only after the image was flushed and both maps were synced.
//! 3. A bit is cleared only when the replica holds the block durably (acknowledged, or found equal by its hash), or after
//!    its copy in the other map is durable.
//!
//! Rule 2 asks for the flush as well as the sync: a write that the replica already holds but that the platter lost to
//! a power cut makes the two sides differ just as a write that was never sent.

pub mod bits;
pub mod header;
pub mod hot;
pub mod intent;
pub mod locks;
pub mod map;
#[cfg(not(shuttle))]
pub mod mapping;
/// Words that a scheduler watches are objects, which cannot lie in a mapping.
#[cfg(shuttle)]
#[path = "unmapped.rs"]
pub mod mapping;
pub mod preserve;
pub mod state;
pub mod suspects;
