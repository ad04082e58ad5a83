//! Floor 3: the secondary side of a machine: staging, recovery points, views, merge.
//!
//! A machine's folder holds a base image for each disk (`<disk>.vhdx`), complete delta logs (`<epoch>.hrl`) and at most
//! one log that is being received (`incoming.part`). A record in the node's store says what the base images are.
//!
//! ```text
//! bytes -> [ingest] -> incoming.part --verify, sync, rename--> N.hrl --[merge]--> base images
//!                                                              |   |                  |
//!                                                           [fold] +----- [view] of P ---+
//! ```
//! Which points are kept is decided by [retention](Retention); [upkeep](MachineReplica::upkeep) merges and folds what
//! need not be told apart, and gives way when space is short.
//!
//! # Invariants
//! - Once a machine is complete, there is always a recovery point that nobody is writing: the newest log is never
//!   touched, and a merge changes only blocks that the logs above the old base hold again.
//! - What was acknowledged is durable; what is visible was verified as a whole.
//! - A view of point P = base images + index over the logs up to P. A merge never goes beyond the oldest view in use.
//! - As long as a [rescue point](Rescue) is kept, the base images are not written.
//!
//! # Crash contract
//! A cut while receiving leaves `incoming.part`, which the next open removes. A cut between the rename and the record
//! leaves a complete log that continues the head: the next open takes it. A cut while merging leaves a record that says
//! so, and all logs it needs: views read through them, the next merge starts again. A cut after it leaves logs that the
//! base already holds: the next open removes them. A cut while folding leaves the logs that went in, or the one that came
//! out and leads to the same point: see the head of `fold`.
#![forbid(unsafe_code)]

mod compare;
mod error;
mod fold;
mod grow;
mod handover;
mod index;
mod ingest;
mod log;
mod merge;
mod part;
mod pins;
mod record;
mod recover;
mod rescue;
mod retention;
mod state;
mod status;
mod store;
mod upkeep;
mod view;
mod writes;

pub use compare::CompareError;
pub use error::{IngestError, ReplicaError};
pub use fold::FoldReport;
pub use handover::{Adoption, GivenImage};
pub use ingest::{Ingest, IngestEvent, SyncTask};
pub use merge::MergeReport;
pub use rescue::Rescue;
pub use retention::Retention;
pub use status::{
    Counters, DiskSpec, Head, ImageStatus, Point, ReplicaOptions, ReplicaStatus, Squeeze,
    image_name,
};
pub use store::MachineReplica;
pub use upkeep::Upkeep;
pub use view::{Held, PointView};
pub use writes::WriteTask;
