//! Floor 1: the conversation of a primary and a replica, without input or output.
//!
//! One connection carries one machine. The primary says [`message::Hello`]; the replica answers with where it stands,
//! and from then on the primary sends delta logs, each on a stream of its own, while the replica says what has become
//! durable. [`sender`] and [`receiver`] decide; they are driven by the node, or by a test in one thread.
//!
//! ```text
//!   primary                                   replica
//!     | Hello{machine, generation, disks}  -->  |   checks version, identity, generation, disk table
//!     | <-- Welcome{head, granted}              |   or Refused{refusal}
//!     | == delta log (stream) ==============>   |   at most `granted` log bytes in all
//!     | <-- Copied{frames}                      |   initial copy only: these frames are durable
//!     | <-- Granted{bytes}                      |
//!     | <-- Staged{lineage}                     |   the whole epoch is durable
//!     | Current{at}  -->                        |   nothing changed since the head, as of `at`
//! ```
//!
//! Reading order: [`message`], [`sender`], [`receiver`].
#![forbid(unsafe_code)]

pub mod message;

pub mod receiver;
pub mod sender;
