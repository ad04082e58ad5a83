//! Floor 1: the conversation of a primary and a replica, without input or output.
//!
//! One connection carries one machine. The primary says [`message::Hello`]; the replica answers with where it stands,
//! and from then on the primary sends delta logs, each on a stream of its own, while the replica says what has become
//! durable. [`sender`] and [`receiver`] decide; they are driven by the node, or by a test in one thread.
//!
//! ```text
//!   primary                                   replica
//!     | Hello{machine, claim, disks}  -->       |   checks version, identity, role, disk table
//!     | <-- Welcome{follows, head, granted}     |   or Refused{refusal}
//!     | == delta log (stream) ==============>   |   at most `granted` log bytes in all
//!     | <-- Copied{frames}                      |   initial copy only: these frames are durable
//!     | <-- Granted{bytes}                      |
//!     | <-- Staged{lineage}                     |   the whole epoch is durable
//!     | Compare{number, at, samples}  -->       |   these blocks may differ: which of them do?
//!     | <-- Compared{number, differs}           |
//!     | Current{at}  -->                        |   nothing changed since the head, as of `at`
//! ```
//!
//! Changes of role are short calls on links of their own:
//!
//! ```text
//!   steps down  | HandOver{from, head}   -->  |   promotes itself at that head
//!               | <-- TookOver{generation}    |
//!
//!   primary     | Return{by}             -->  |   was the primary before
//!               | <-- Differs{disk, runs} *   |   where the images there may differ
//!               | <-- DiffersEnd              |
//!               | Taken{by, point, cut}  -->  |   they are durably owed: follow from that point
//!               | <-- Returned                |
//! ```
//!
//! Reading order: [`claim`], [`compare`], [`message`], [`sender`], [`receiver`].
#![forbid(unsafe_code)]

pub mod claim;
pub mod compare;
pub mod message;
pub mod receiver;
pub mod sender;
