//! Every limit of the program has a name here, with what it bounds and where its value comes from.

use super::units::{GIB, KIB, MIB, TIB};

/// Longest name of a machine, a disk or a peer, in bytes: a file name of 255 bytes less any suffix we add.
pub const NAME_BYTES_MAX: usize = 128;
/// Largest disk, in bytes: what VHDX allows (MS-VHDX 2.6.2.2).
pub const DISK_BYTES_MAX: u64 = 64 * TIB;
/// Most disks of one machine: what a Hyper-V generation 2 machine can hold on four controllers.
pub const DISKS_PER_MACHINE_MAX: usize = 256;
/// Largest FUSE request, in bytes: 256 pages, the kernel's default `fs.fuse.max_pages_limit`.
pub const REQUEST_BYTES_MAX: u64 = MIB;
/// Largest raw content of one delta-log frame, in bytes: a staged frame is decoded in one buffer of this size.
pub const FRAME_BYTES_MAX: u64 = MIB;
/// Most frames of a delta log that still gets an index: 32 MiB of memory at the primary, and at least 4 GiB of scattered
/// 4 KiB blocks. A longer log has none, and its reader scans it.
pub const INDEX_FRAMES_MAX: u64 = MIB;
/// Most frames of a delta log: a reader of the log spends about 150 bytes of memory for each, 2.4 GiB in all. A primary
/// with more scattered blocks than that in one epoch sends clean blocks between them along (`volume::take`): frames of
/// 1 MiB cover 16 TiB at best.
pub const DELTA_FRAMES_MAX: u64 = 16 * MIB;
/// Highest epoch of a point that somebody else may name: a cut each millisecond gets there in 146 million years, and as many
/// fit behind it before the number overflows.
pub const EPOCH_MAX: u64 = 1 << 62;
/// Most runs in which the difference between two hosts is told: 24 MiB of memory. Where there are more, neighbours are told
/// as one run, with the equal blocks between them.
pub const DIVERGENCE_RUNS_MAX: usize = 1 << 20;
/// Memory for pre-images of one machine, in bytes. When it is full the epoch is merged into the next one.
pub const PRESERVE_BYTES_MAX: u64 = 256 * MIB;
/// Delta-log bytes that a primary may send beyond what the replica has made durable.
pub const CREDIT_BYTES: u64 = 64 * MIB;
/// Delta-log bytes of one machine that a replica keeps in memory after it wrote them, so that a merge or a fold that
/// follows soon reads nothing: as much as a primary may send ahead.
pub const LOG_RESIDENT_BYTES_MAX: u64 = CREDIT_BYTES;
/// Delta logs of one machine that may lie on a replica before neighbours are folded although that saves little: what a
/// view still opens in a moment, and far below the files a process may have open by default at its hard limit.
pub const LOGS_MAX: usize = 1024;
/// Most newest epochs that a replica may be told to keep as points of a machine: each is an open file.
pub const KEEP_NEWEST_MAX: u32 = 4096;
/// Most hours of which a replica may be told to keep the first point: a year.
pub const KEEP_HOURS_MAX: u32 = 8784;
/// Largest control message, in bytes: a greeting with [`DISKS_PER_MACHINE_MAX`] disks and their names.
pub const MESSAGE_BYTES_MAX: usize = 256 * 1024;

const _: () = assert!(FRAME_BYTES_MAX >= REQUEST_BYTES_MAX);
const _: () = assert!(INDEX_FRAMES_MAX <= DELTA_FRAMES_MAX);
const _: () = assert!(
    CREDIT_BYTES > 2 * FRAME_BYTES_MAX,
    "a sender must always be able to send one more frame"
);
const _: () = assert!(PRESERVE_BYTES_MAX >= 64 * REQUEST_BYTES_MAX && PRESERVE_BYTES_MAX < GIB);
const _: () = assert!(MESSAGE_BYTES_MAX > DISKS_PER_MACHINE_MAX * (NAME_BYTES_MAX + KIB_USIZE / 2));

const KIB_USIZE: usize = super::units::to_usize(KIB);
