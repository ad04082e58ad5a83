//! Resync: what may differ is compared by hashes and only what differs is sent, while the guest goes on.

use std::{
    fs::{self, File},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use understudy::{
    coord::state::ReplicationState,
    disk::image::Format,
    node::status::{MachineStatus, ResyncStatus},
};

use crate::support::{Hosts, Ledger, Load, MACHINE, Node, assert_identical, call, can_mount};

const MIB: u64 = 1 << 20;

/// A raw image full of bytes that are no zeros.
pub(super) fn full_image(hosts: &Hosts, mib: u64) -> PathBuf {
    let image = hosts.image("disk.raw", mib);
    let file = File::options().write(true).open(&image).unwrap();
    for number in 0..mib {
        let piece: Vec<u8> = (0..MIB / 8)
            .flat_map(|word| (number << 32 | word | 1 << 60).to_le_bytes())
            .collect();
        file.write_all_at(&piece, number * MIB).unwrap();
    }
    image
}

/// Changes one byte in each of these blocks.
pub(super) fn flip(image: &Path, blocks: &[u64]) {
    let file = File::options().read(true).write(true).open(image).unwrap();
    for block in blocks {
        let mut byte = [0];
        file.read_exact_at(&mut byte, block * 4096 + 17).unwrap();
        file.write_all_at(&[byte[0] ^ 0x40], block * 4096 + 17)
            .unwrap();
    }
}

/// Runs `resync` as an operator does: exit code, standard output, standard error.
pub(super) fn demand(node: &Node, more: &[&str]) -> (i32, String, String) {
    call(node, &[&["resync", MACHINE], more].concat())
}

fn resynced(node: &Node) -> (MachineStatus, ResyncStatus) {
    let ended = |m: &MachineStatus| m.resync.as_ref().is_some_and(|resync| !resync.running);
    let status = node.wait("the end of a resync", ended);
    let resync = status.resync.clone().unwrap();
    (status, resync)
}

/// What two hosts compare against each other after everything was sent.
pub(super) fn end(hosts: &Hosts, image: &Path, primary: Node, replica: Node) {
    let lineage = primary.cut();
    assert_eq!(replica.merged().durable, Some(lineage));
    primary.stop();
    replica.stop();
    assert_identical(image, &hosts.replica_image("disk", Format::Raw));
}

/// The tracking files of one kind of the one machine.
fn remove_maps(folder: &Path) -> usize {
    let mut removed = 0;
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            removed += remove_maps(&path);
        } else if path.to_str().unwrap().contains(".map-") {
            fs::remove_file(&path).unwrap();
            removed += 1;
        }
    }
    removed
}

/// The image was changed while nobody tracked it, or the maps are gone: everything is compared, a few blocks are sent, and
/// the status says why.
#[test]
fn what_changed_behind_the_back_is_found_and_sent_alone() {
    if !can_mount() {
        return;
    }
    let hosts = Hosts::new();
    let image = full_image(&hosts, 64);
    let replica = hosts.replica(&[]);
    let primary = hosts.primary(&[&image], &[]);
    primary.wait_replicating();
    let before = primary.cut();
    primary.stop();
    flip(&image, &[5, 6, 7000]);
    let mut primary = hosts.primary(&[&image], &[]);
    let load = Load::start(hosts.disk("disk"), Ledger::new(4 * MIB, 41));
    let (status, resync) = resynced(&primary);
    assert!(
        resync
            .reason
            .contains("was changed while nobody tracked it"),
        "{resync:?}"
    );
    // What the guest wrote before the link stood is owed, and no suspect.
    assert!((60 * MIB..=64 * MIB).contains(&resync.total), "{resync:?}");
    assert!(resync.read <= 64 * MIB, "{resync:?}");
    // The guest's blocks are known to differ; of the others the three.
    assert!(resync.compared >= 60 * MIB, "{resync:?}");
    assert!(
        resync.equal >= 59 * MIB && resync.differing >= 4096,
        "{resync:?}"
    );
    assert!(resync.differing <= 5 * MIB, "{resync:?}");
    assert!(resync.asked < resync.compared / 64, "{resync:?}");
    assert!(
        status.durable.unwrap().epoch > before.epoch,
        "the old points stay a base"
    );
    load.finish();

    primary.cut();
    primary.stop();
    assert_eq!(remove_maps(&hosts.path("state")), 2);
    flip(&image, &[9000]);
    primary = hosts.primary(&[&image], &[]);
    let (status, resync) = resynced(&primary);
    assert!(
        resync.reason.contains("lost or of another mount"),
        "{resync:?}"
    );
    assert_eq!((resync.compared, resync.differing), (64 * MIB, 4096));
    assert!(status.traffic.raw < MIB, "{:?}", status.traffic);
    assert!(status.traffic.sent < MIB, "{:?}", status.traffic);
    primary.wait_replicating();
    end(&hosts, &image, primary, replica);
}

/// An operator asks for it: what rotted on the replica is found and mended while the guest writes.
#[test]
fn an_operator_has_everything_compared_while_the_guest_writes() {
    if !can_mount() {
        return;
    }
    let hosts = Hosts::new();
    let image = full_image(&hosts, 96);
    // Nobody there yet: there is nothing to compare with.
    let primary = hosts.primary(&[&image], &[]);
    let (code, _, err) = demand(&primary, &[]);
    assert_eq!(code, 3, "{err}");
    assert!(err.contains("the initial copy is not complete"), "{err}");
    primary.stop();

    let replica = hosts.replica(&[]);
    let primary = hosts.primary(&[&image], &[]);
    primary.wait_replicating();
    primary.cut();
    replica.merged();
    replica.stop();
    flip(&hosts.replica_image("disk", Format::Raw), &[12_000, 24_000]);
    let replica = hosts.replica(&[]);
    let load = Load::start(hosts.disk("disk"), Ledger::new(16 * MIB, 43));
    load.wait_written(500);
    primary.wait_replicating();
    let (code, out, err) = demand(&primary, &["--json"]);
    assert_eq!(code, 0, "{err}");
    let told: ResyncStatus = serde_json::from_str(&out).unwrap();
    assert!(
        !told.running && told.reason.contains("an operator asked"),
        "{told:?}"
    );
    assert!(
        told.differing >= 2 * 4096 && told.compared >= 64 * MIB,
        "{told:?}"
    );
    load.wait_written(500);
    load.finish();
    let (code, out, err) = demand(&primary, &[]);
    assert_eq!(code, 0, "{err}");
    assert!(
        out.contains("vm: in step; ") && err.contains("complete"),
        "{out}{err}"
    );
    let (_, resync) = resynced(&primary);
    assert_eq!(resync.differing, 0, "{resync:?}");
    end(&hosts, &image, primary, replica);
}

/// The link is cut, then both hosts are killed, in the middle of a resync: each time it goes on with what is left.
#[test]
fn a_resync_goes_on_after_a_cut_link_and_after_deaths() {
    if !can_mount() {
        return;
    }
    let hosts = Hosts::new();
    let image = full_image(&hosts, 512);
    let replica = hosts.replica(&[]);
    let primary = hosts.primary(&[&image], &[]);
    primary.wait_replicating();
    let point = primary.cut();
    replica.merged();
    let load = Load::start(hosts.disk("disk"), Ledger::new(MIB, 47));
    let (code, _, err) = demand(&primary, &["--no-wait"]);
    assert_eq!(code, 0, "{err}");
    let middle = |m: &MachineStatus| {
        let resync = m.resync.as_ref();
        resync.is_some_and(|resync| !resync.running || resync.compared > 32 * MIB)
    };
    let first = primary.wait("a part of the resync", middle);
    replica.kill();
    assert_eq!(first.state, ReplicationState::Resynchronizing);
    let reasons = first.reasons.join(" ");
    assert!(
        reasons.contains("in step: an operator asked for it"),
        "{reasons}"
    );
    let first = first.resync.unwrap();
    assert!(first.running, "the death was in the middle: {first:?}");
    // What the guest has written is known to differ.
    assert!(first.total >= 511 * MIB, "{first:?}");
    let (code, _, err) = demand(&primary, &["--no-wait"]);
    assert_eq!(code, 3);
    assert!(
        err.contains("under way already: an operator asked for it"),
        "{err}"
    );

    let replica = hosts.replica(&[]);
    let more = first.compared + 32 * MIB;
    let second = primary.wait("more of the resync", |m| {
        let resync = m.resync.as_ref();
        resync.is_some_and(|resync| !resync.running || resync.compared > more)
    });
    primary.kill();
    load.ended();
    let held = replica.machine();
    let second = second.resync.unwrap();
    assert!(second.running, "the death was in the middle: {second:?}");
    assert!(
        held.durable.unwrap().epoch >= point.epoch,
        "the old points stay"
    );

    let primary = hosts.primary(&[&image], &[]);
    let (_, last) = resynced(&primary);
    assert!(last.reason.contains("an operator asked for it"), "{last:?}");
    let left = 512 * MIB - second.equal + MIB;
    assert!(last.total <= left, "{second:?} {last:?}");
    assert!(last.compared <= left, "{second:?} {last:?}");
    assert!(last.differing <= 4 * MIB, "{last:?}");
    primary.wait("replication", |m| m.state == ReplicationState::Replicating);
    end(&hosts, &image, primary, replica);
}
