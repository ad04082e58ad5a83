//! An initial copy on a portable disk: epoch 0 as a file that one host writes and the other one takes in.
//!
//! ```text
//!   primary                                     somebody carries it                    replica
//!   export: take ── pack ── MACHINE.hrl.part                                  import: verify all of it, take nothing
//!           pending(epoch 0), waits for it                                            then Ingest, as from a link
//!           rename: MACHINE.hrl  ─────────────────────────────────────────>           head: Copied(epoch 0)
//!           lineage: epoch 0                                                                │
//!   next connection: the heads agree  <─────────────────────────────────────────────────────┘
//!           epoch 1: what was written since the export began
//! ```
//! The file is a delta log like any other, the bytes that a link would have carried ([`delta`](crate::delta)). It says of
//! every block what it holds, holes included: nobody knows what half a copy left on the replica.
//!
//! # Why the lineage is epoch 0 before the replica has it
//! With that the maps hold exactly what differs from the file, and go on doing so over restarts. Nothing is assumed by it:
//! every connection asks the replica for its head. One that was fed the file says epoch 0 and gets what changed. One
//! that has nothing is copied to, or waited for; one that was fed an older file has another head and is compared by hashes.
//!
//! # Crash contract
//! Export: the file has its name only when it is whole and durable, and before that the machine's record says `pending`, so
//! that a replica that has it is known. A death before leaves `.understudy-*.part`, which nothing reads and anybody may
//! delete, and a machine that waits or copies as it did. A death between the name and the lineage costs a copy of what was
//! copied: the replica's head is recognised, and all blocks are sent once more.
//! Import: as for an initial copy from a link, nothing counts before the trailer's record. A death leaves half a copy and
//! no point; it is imported again from the start.
//! `tests/replicate/portable.rs` kills both.
//!
//! # What the file is not
//! It is neither encrypted nor signed: it is to be carried like the disks themselves. A file that was changed on its way
//! has another chain hash or fails its checksums, but a checksum is no seal against somebody who means harm: `verify`
//! afterwards compares both sides by hashes.

pub(super) mod export;
pub(super) mod import;

use std::{io, path::Path};

use nix::sys::statvfs::statvfs;

use crate::base::ids::Name;

/// What the copy of a machine is called in the folder it is exported to.
fn file_name(machine: &Name) -> String {
    format!("{machine}.hrl")
}

/// Bytes that may still be written to the file system of `folder`.
fn free_bytes(folder: &Path) -> io::Result<u64> {
    let found = statvfs(folder)?;
    Ok(found
        .blocks_available()
        .saturating_mul(found.fragment_size()))
}

/// Refuses a folder that would mean another one to this process than to whoever asked.
fn check_folder(folder: &Path) -> Result<(), String> {
    let why = if !folder.is_absolute() {
        "is not an absolute path"
    } else if !folder.is_dir() {
        "is not a folder"
    } else {
        return Ok(());
    };
    Err(format!("{} {why}", folder.display()))
}
