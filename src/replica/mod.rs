//! Floor 3: the secondary side of a machine: staging, recovery points, views, merge.
//!
//! A machine's folder holds a base image for each disk (`<disk>.vhdx`), complete delta logs (`<epoch>.hrl`) and at most
//! one log that is being received (`incoming.part`). A record in the node's store says what the base images are.
//!
//! ```text
//! bytes -> [ingest] -> incoming.part --verify, sync, rename--> N.hrl --[merge]--> base images
//!                                                                |                    |
//!                                                                +---- [view] of P ---+
//! ```
//!
//! # Invariants
//! - Once a machine is complete, there is always a recovery point that nobody is writing: the newest log is never
//!   touched, and a merge changes only blocks that the logs above the old base hold again.
//! - What was acknowledged is durable; what is visible was verified as a whole.
//! - A view of point P = base images + index over the logs up to P. A merge never goes beyond the oldest view in use.
//!
//! # Crash contract
//! A cut while receiving leaves `incoming.part`, which the next open removes. A cut between the rename and the record
//! leaves a complete log that continues the head: the next open takes it. A cut while merging leaves a record that says
//! so, and all logs it needs: views read through them, the next merge starts again. A cut after it leaves logs that the
//! base already holds: the next open removes them.
#![forbid(unsafe_code)]

mod error;
mod handover;
pub mod images;
mod index;
mod ingest;
mod log;
mod merge;
mod pins;
mod record;
mod recover;
mod store;
mod view;

pub use error::{IngestError, ReplicaError};
pub use handover::Adoption;
pub use images::{ImageError, ImageFormat, Images, RawImages};
pub use ingest::{Ingest, IngestEvent, SyncTask};
pub use merge::MergeReport;
pub use store::{
    Counters, DiskSpec, Head, ImageStatus, MachineReplica, Point, ReplicaOptions, ReplicaStatus,
    Retention,
};
pub use view::PointView;
