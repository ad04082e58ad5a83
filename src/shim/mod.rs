//! Floor 4: disks as raw files in a FUSE mount, which any virtual machine monitor opens.
//!
//! ```text
//!   guest -> QEMU, Cloud Hypervisor, loop -> kernel -> fuse.rs (glue) -> files.rs (tree) -> file.rs -> Disk
//!                                                      mount.rs attaches and detaches; latency.rs measures
//!   mount.rs -> mounter.rs -> point.rs (the system calls), or helper/ -> another process -> point.rs
//! ```
//! Reading order: [`mount()`], then `file` (what one request does to one disk), `files` (the tree), `fuse` (the glue).
//!
//! # What a guest is promised
//! A write is acknowledged when the [`Disk`](crate::disk::Disk) has taken it. A sync, or a write opened or flagged
//! `O_DSYNC`, is answered when the disk has made it durable. Every file bypasses the kernel's page cache, so that two
//! openers see each other's writes at once and nothing lies in a cache that a failover would have to find.
//! Files have a fixed size: they cannot be created, removed, renamed, truncated or extended.
//!
//! # Why requests run on the threads that read them
//! A handler works on the host's page cache and mostly returns without waiting, so handing requests to a pool would
//! cost one wake-up each and win nothing. What does wait (a cold read, a sync) occupies one of
//! [`THREADS_DEFAULT`] threads. An `io_uring` transport would save wake-ups where the device is faster than the
//! path; on a machine where that can be measured it would replace `fuse.rs` and nothing else.
#![forbid(unsafe_code)]

pub mod mount;

pub mod helper;
pub mod mounter;

pub mod latency;

mod file;
mod files;
mod fuse;
mod point;
mod table;
mod users;

pub use file::{Refusal, Writability};
pub use latency::{Latencies, OperationLatency};
pub use mount::{
    FileIndex, Held, Mount, MountError, MountOptions, MountedDisk, Owner, THREADS_DEFAULT, Unmount,
    UnmountError, Visibility, mount,
};
pub use mounter::Mounter;
pub use users::{User, users_of};
