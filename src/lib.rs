//! understudy keeps a second, current copy of a virtual machine's disks on another Linux host.
//!
//! An understudy learns the lead's part while the play runs, and steps in the moment the lead falls. This crate does that
//! for disks: a primary host's VM disks are shown through a FUSE mount, every guest write is tracked as it passes, the
//! changes travel over QUIC to a second host, and there a replica holds, at every moment, a state the whole machine was
//! really in.
//!
//! # The central idea: everything is an epoch
//! A *cut* closes an *epoch* on all disks of a machine at one instant. Epoch N is all changes between cut N-1 and cut N.
//! The primary keeps no data of its own about an epoch, only *which blocks* changed; the content is read from the image
//! when it is sent, and preserved in memory where the guest is about to overwrite a block that was cut and not yet sent.
//! Initial copy is epoch 0: every allocated block, read while the guest goes on; what it rewrites belongs to epoch 1 as
//! well, so the first complete state is epoch 1. A resync is an epoch of what may differ, compared by hashes before it is
//! sent. An epoch that cannot be finished (the link is lost, the pre-images do not
//! fit) is merged into the next one. A slow link makes epochs longer and nothing else.
//!
//! # The journey of one write
//! ```text
//!   guest write                              primary                          |                 replica
//!     |                                                                       |
//!     v                                                                       |
//!   shim::fuse ── shim::file ── volume::Volume ── disk::{raw,vhdx} ── storage |
//!                                  | 1 region lock, shared                    |
//!                                  | 2 region cold? intent log (durable)      |
//!                                  | 3 still owed to the closing epoch?       |
//!                                  |   preserve its old content               |
//!                                  | 4 mark open + owed; write; reply         |
//!                                  v                                          |
//!   node::driver ── protocol::Sender: cut? take? seal?                        |
//!       | volume::Machine::take: runs of blocks, as of the cut                |
//!       v                                                                     |
//!   node::pipeline: pack on worker threads, in order ── delta::Encoder ── net ==QUIC==> net ── node::session
//!                                                                             |               | replica: N.part
//!       closing maps cleared  <── Staged{lineage} ────────────────────────────|── trailer: verify, fdatasync, rename
//!                                                                             |               v
//!                                                                             |            merge into the image
//! ```
//!
//! # Hosts, members, roles
//! A host ([`node::host`]) is primary for some machines and replica for others at the same time. Each machine on it is a
//! member with a durable role ([`coord::role`], a pure function); what runs for it follows from the role, never the
//! other way round.
//! ```text
//!   operator's verb ──> node::control ──┐
//!   the other host's claim or answer ───┼──> member ── coord::role: (state, event) -> state ──> record, durable
//!   a start after a crash ──────────────┘                                                           |
//!                                                                                                arrange
//!                       +------------------------------+------------------------------+-------------+
//!                       v                              v                              v
//!         serving: Primary, FailedOver     following: Replica               idle: stepped down, fenced,
//!         mount ── volume ── image         receive, points, tests, merge          returning
//!                    └─ after a failover a layer over a point of the own replica, folded into its image
//! ```
//! A *planned* failover cuts once more with all writers refused, proves that both hosts hold the same point, steps down
//! and hands over. An *unplanned* one promotes the replica at a point, on a layer that `commit` keeps and `cancel` drops.
//! A host that meets a higher generation is fenced; `reverse` tells the new primary where it may differ, and it follows.
//!
//! # Several hosts, several machines
//! A coordinator ([`node::coordinator`]), part of every host, drives machines on all hosts it knows. It asks them as an
//! *operator* ([`node::operate`]): the requests of the control socket, over links of their own protocol, for identities
//! that replicate nothing. What it does is a *job* ([`coord::job`]), durable step by step; a recovery *plan*
//! ([`coord::plan`]) becomes one. It owns no truth: it looks at the hosts, asks for what is not so yet, and looks again.
//!
//! # Invariants
//! - A block that differs between primary and replica is marked in a map, or its region is in the intent log.
//! - Marks precede the write; intent precedes the first write into a cold region; both precede the reply.
//! - The replica acknowledges an epoch after its log is durable under its final name, never before.
//! - Closing maps are cleared by that acknowledgement and by nothing else; a mark in the open map goes without being sent
//!   only when the block was found equal to what the replica holds durably.
//! - The image at the replica holds exactly the epoch its record names, or is on the way to it under cover of the logs.
//! - Equal chain hashes mean equal histories.
//! - A role is durable before any of its effects. A generation never goes back, and each promotion makes a new one.
//! - A host that was replaced writes nothing more as primary; what only it had is kept aside before anything is merged.
//! - Every write below [`net`] and [`node`] is synchronous; time and randomness are arguments up to floor 3.
//!
//! # Floors
//! A module uses strictly lower floors only; `tests/tidy.rs` holds the table. In reading order:
//!
//! | floor | modules |
//! | --- | --- |
//! | 0 | [`base`]: units, identities, clocks, checksums, limits |
//! | 1 | [`storage`]: bytes that last; [`delta`]: the `.hrl` codec; [`protocol`]: messages, sender, receiver |
//! | 2 | [`disk`]: what a guest sees; [`track`]: which blocks changed |
//! | 3 | [`volume`]: a disk that remembers; [`replica`]: stage, points, views, thinning, merge; [`coord`]: roles, health, jobs, plans |
//! | 4 | [`shim`]: FUSE; [`net`]: QUIC; [`mod@bench`]: measuring; [`testing`]: the simulator |
//! | 5 | [`node`]: configuration, loops, control socket, coordinator |
//! | 6 | [`cli`]: the verbs |
//!
//! Four seams are traits, each with a real and a testing implementation: [`storage::Storage`] with
//! [`storage::Folder`], [`disk::Disk`], [`base::clock::Clock`], [`base::ids::Ids`].
//!
//! # Words
//! - *machine*: a protected VM, a named set of disks that are always cut together.
//! - *disk*: what the guest sees; *image*: the file that stores it.
//! - *block*: 4 KiB, the unit of tracking; *region*: 1 MiB, the unit of the intent log.
//! - *cut*, *epoch*, *delta log* (`.hrl`): see above.
//! - *suspect*: a block that is marked because it may differ, not because it was written; it is *sifted*: compared first.
//! - *recovery point*: a cut that the replica holds complete.
//! - *rescue point*: what a former primary had when it was replaced, and nobody else has; not part of the history.
//! - *planned*, *unplanned* and *test failover*; *commit*, *cancel*, *reverse*: what an operator says; see above.
//! - *generation*: a counter of the machine, one more at each promotion, with a random identity: the fencing token.
//! - *lineage*: an epoch and the chain hash over everything that led to it.
//! - *host*: a process that serves machines and keeps replicas; *member*: one machine on one host.
//! - *operator*: who may give a host orders over the network. *coordinator*: what does that for several hosts.
//! - *job*: what a coordinator does, in *steps* of *stages*; *plan*: machines in *groups*, and the *actions* around them.
//! - *primary*, *replica*: the two roles. *fenced*: was primary, and another host was promoted since.
//! - *RPO as achieved*: now minus the cut time of the last epoch that is durable on the replica.

pub mod base;

pub mod delta;
pub mod protocol;
pub mod storage;

pub mod disk;
pub mod track;

pub mod coord;
pub mod replica;
pub mod volume;

pub mod bench;
pub mod net;
pub mod shim;
pub mod testing;

pub mod node;

pub mod cli;
