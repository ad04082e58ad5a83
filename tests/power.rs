//! Power cuts under a real guest: Linux with an ext4 writes, epochs flow, and then the power is cut at every instant.
//!
//! ```text
//!   guest ── QEMU ── FUSE mount ── volume ── VHDX or raw ──┐
//!                                    └── maps, intent log, store ──> tape: every call of every file, in one order,
//!   sender: cut, take, merge, lost links, lost answers ────────────> what the guest was told, what the replica holds
//!
//!   tape ──> for each instant, for each outcome: the files as they may be ──> image opens and is sound
//!                                                                             ext4 replays its journal and is clean
//!                                                                             every file that was fsynced is there
//!                                                                             what differs is known, and what is
//!                                                                             sent again was marked or hot
//! ```
//! What a cut may leave stands in [`understudy::storage`]. See `POWER` in `tests/README.md`.

mod files;
mod host;
mod hot;
mod replay;
mod sender;
mod tape;

use std::io::Write;

use understudy::disk::image::Format;

use crate::support::{can_mount, guest_lab, have};

/// Instants at which the power is cut unless all are asked for.
const INSTANTS: usize = 24;

fn check(format: Format) {
    if !can_mount() || !have(&["mkfs.ext4", "e2fsck", "debugfs"]) {
        return;
    }
    let Some(lab) = guest_lab() else {
        return;
    };
    let all = std::env::var_os("UNDERSTUDY_POWER_ALL").is_some_and(|value| value == "1");
    let seed = std::env::var("UNDERSTUDY_SEED").map_or(1, |seed| seed.parse().unwrap());
    let recording = host::record(&lab, format);
    let mut instants = replay::instants(&recording);
    let of = instants.len();
    if !all {
        instants = instants
            .into_iter()
            .step_by(of.div_ceil(INSTANTS))
            .collect();
    }
    let points = replay::look_at_points(&recording, if all { 1 } else { 4 });
    let counts = replay::cut_at(&recording, &instants, seed);
    let _ = writeln!(
        std::io::stderr(),
        "{format}, seed {seed}: {counts}; of {of} instants; {points} points, {} epochs merged, {} blocks preserved",
        recording.merged_epochs,
        recording.preserved_blocks
    );
    assert!(
        points > 3 && recording.merged_epochs > 0 && recording.preserved_blocks > 0,
        "the history has all that can happen to an epoch"
    );
}

#[test]
fn a_power_cut_under_a_guest_on_a_vhdx_loses_nothing_that_was_told() {
    check(Format::Vhdx);
}

#[test]
fn a_power_cut_under_a_guest_on_a_raw_image_loses_nothing_that_was_told() {
    check(Format::Raw);
}
