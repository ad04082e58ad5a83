//! A former primary that differs is compared where it may differ, and nowhere else.

use std::{
    fs::{self, File},
    os::unix::fs::FileExt,
};

use nix::fcntl::OFlag;
use understudy::coord::state::ReplicationState;

use super::{
    roles::{Pair, verb},
    tests::mark,
};
use crate::support::{Aligned, MACHINE, Node, can_mount, open_direct};

const MIB: u64 = 1 << 20;
/// The divergence: stretches of a MiB all over the disk, written again after the last epoch.
const STRETCHES: u64 = 100;
/// Those of them that really hold something else.
const CHANGED: u64 = 5;
/// The disk, in MiB.
const DISK_MIB: u64 = 64 << 10;
/// Maps, delta logs, databases, requests of the guest.
const BESIDE: u64 = 24 * MIB;

/// Bytes that the node has read with system calls since it was started.
fn read_by(node: &Node) -> u64 {
    let text = fs::read_to_string(format!("/proc/{}/io", node.status().pid)).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix("rchar: "));
    line.unwrap().parse().unwrap()
}

/// Writes one stretch, past the page cache.
fn write_stretch(disk: &File, stretch: u64, fill: u8) {
    let mut bytes = Aligned::new(1 << 20);
    for (index, byte) in bytes.get_mut().iter_mut().enumerate() {
        *byte = fill ^ index.to_le_bytes()[0] ^ index.to_le_bytes()[1];
    }
    let at = stretch * (DISK_MIB / STRETCHES) * MIB;
    disk.write_all_at(bytes.get(), at).unwrap();
}

/// 64 GiB, nearly all of it never written; 100 MiB of it were written again by the old primary and never left it, most of
/// them with what they held before. Both hosts read that much and not the disk, and what travels is what differs.
#[test]
fn a_reversal_costs_what_diverged_and_not_the_disk() {
    if !can_mount() {
        return;
    }
    let pair = Pair::with([96, DISK_MIB]);
    let (alpha, beta) = (pair.alpha(), pair.beta());
    alpha.wait_replicating();
    let (here, there) = (pair.on_alpha(), pair.on_beta());
    let disk = open_direct(&here[1], OFlag::empty()).unwrap();
    for stretch in 0..STRETCHES {
        write_stretch(&disk, stretch, 1);
    }
    alpha.cut();
    beta.pause();
    for stretch in 0..STRETCHES {
        write_stretch(&disk, stretch, if stretch < CHANGED { 2 } else { 1 });
    }
    drop(disk);
    alpha.kill();
    beta.resume();
    beta.wait("the loss of the link", |m| {
        m.reasons.iter().any(|why| why.contains("not connected"))
    });
    verb(&beta, &["failover", MACHINE, "--unplanned"]);
    verb(&beta, &["commit", MACHINE]);
    mark(&there[1], 300, 3);
    beta.wait("the failover folded", |m| {
        !m.reasons.iter().any(|why| why.contains("folded"))
    });

    let before = read_by(&beta);
    let alpha = pair.alpha();
    verb(&alpha, &["reverse", MACHINE]);
    beta.wait_replicating();
    alpha.wait("a replica", |m| m.state == ReplicationState::Replicating);
    let (read, read_there) = (read_by(&beta) - before, read_by(&alpha));
    let machine = beta.machine();
    let resync = machine.resync.unwrap();
    assert!(
        resync.reason.contains("was the primary before"),
        "{resync:?}"
    );
    let divergence = STRETCHES * MIB;
    let may_differ = divergence..=divergence + MIB;
    assert!(may_differ.contains(&resync.compared), "{resync:?}");
    let differs = CHANGED * MIB..=CHANGED * MIB + 64 * 1024;
    assert!(differs.contains(&resync.differing), "{resync:?}");
    let sent = machine.traffic.raw + resync.asked;
    assert!(sent <= CHANGED * MIB + 2 * MIB, "{sent} bytes sent");
    assert!(resync.read + machine.traffic.raw <= 2 * divergence);
    assert!(read <= 2 * divergence + BESIDE, "{read} bytes read");
    assert!(
        read_there <= 2 * divergence + BESIDE,
        "{read_there} bytes read there"
    );
    println!(
        "diverged {divergence}, differing {}, compared {}, sent {sent}, read {read} and {read_there}",
        resync.differing, resync.compared
    );

    // What the old primary had is the new primary's now: the replica's test shows it.
    verb(&beta, &["failover", MACHINE, "--planned"]);
    alpha.wait_replicating();
    let (ours, theirs) = (File::open(&here[1]).unwrap(), 1 ^ 7_u8);
    let mut byte = [0];
    for stretch in 1..STRETCHES {
        let at = stretch * (DISK_MIB / STRETCHES) * MIB + 7;
        ours.read_exact_at(&mut byte, at).unwrap();
        assert_eq!(byte, [theirs], "stretch {stretch}");
    }
    ours.read_exact_at(&mut byte, 300 * 4096).unwrap();
    assert_eq!(byte, [3]);
}
