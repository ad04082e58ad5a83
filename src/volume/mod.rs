//! Floor 3: a disk that remembers what was written to it, and the machine whose disks are cut together.
//!
//! [`Volume`] is what a guest writes to; [`Machine`] is what the sender of a replica talks to: it cuts epochs, takes what
//! is owed, and learns what the replica holds. Reading order: [`machine`] (the life of a machine), `meet` (where it goes on
//! with a replica), [`swap`] (what changes when roles do),
//! [`answers`] (what it says), `core` (the shared state and its locks), [`disk`] (the write path), [`take`] (what the
//! sender reads), [`sift`] (what need not be sent), [`verify`] (whether all is well), `open` (what a restart finds), `grow`
//! (disks that grew meanwhile), `between` (what is noted of a machine that is closed), [`record`] (what the node's store
//! remembers).
//!
//! # One epoch's journey
//! ```text
//!  write ──> open map + owed ──cut──> closing map + owed ──take──> frames ──pending──> trailer ──staged──> cleared
//!                  ^                          │
//!                  └───── merge, disconnect, restart: owed again, in the epoch that is open ─┘
//! ```
//! A writer that meets a block still owed to the closing epoch preserves the old content first. Where the side store has
//! no room for it, the writer merges the epoch and goes on at once; the sender learns it from the next [`Machine::take`],
//! which answers [`Taken::Superseded`].
//!
//! # Order of locks
//! control > takes > region > epoch > preserve. Cooling regions takes region locks and is entered without any of them.
#![forbid(unsafe_code)]

pub mod answers;
mod between;
mod core;
pub mod disk;
mod grow;
pub mod machine;
mod meet;
mod open;
pub mod record;
pub mod sift;
pub mod swap;
pub mod take;
mod trouble;
pub mod verify;

pub use crate::protocol::sender::Side;

pub use self::{
    answers::{
        CopyScope, Counters, Cut, CutRefused, ForgetError, MachineError, MachineState, Reconcile,
        ReplicaHead, Standing,
    },
    between::{grew, will_write},
    disk::Volume,
    machine::Machine,
    open::{DiskSource, MachineOptions, OpenError},
    record::{ImageStamp, ResyncReason},
    sift::Sifted,
    swap::forget,
    take::{Piece, PieceContent, TakeError, Taken},
    verify::{SavedVerification, Verification, Verify},
};
