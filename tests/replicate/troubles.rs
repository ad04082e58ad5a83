//! What goes wrong on an ordinary day: lost links, full disks, images changed by others, lost records.

use std::fs;

use nix::fcntl::OFlag;
use understudy::{
    coord::state::{Health, ReplicationState},
    disk::image::Format,
};

use crate::support::{
    Hosts, Ledger, Load, SmallFileSystem, assert_identical, can_mount, have, must, open_direct,
};

const MIB: u64 = 1 << 20;

#[test]
fn a_lost_link_is_waited_out_and_caught_up() {
    if !can_mount() {
        return;
    }
    let hosts = Hosts::new();
    let image = hosts.image("disk.vhdx", 96);
    let replica = hosts.replica(&[]);
    let primary = hosts.primary(&[&image], &[]);
    primary.wait_replicating();
    let load = Load::start(hosts.disk("disk"), Ledger::new(96 * MIB, 19));
    load.wait_written(500);
    replica.stop();
    let suspended = primary.wait("suspension", |m| m.state == ReplicationState::Suspended);
    assert_eq!(suspended.health, Health::Warning);
    assert!(!suspended.reasons.is_empty());
    load.wait_written(2_000);
    primary.wait("owed bytes", |m| m.traffic.owed > 0);
    let refused = primary.try_cut().unwrap_err().to_string();
    assert!(refused.contains("cannot be reached"), "{refused}");
    let replica = hosts.replica(&[]);
    primary.wait_replicating();
    load.finish();
    primary.wait("nothing owed", |m| m.traffic.owed == 0);
    let lineage = primary.cut();
    assert_eq!(replica.merged().durable, Some(lineage));
    assert_eq!(primary.machine().health, Health::Normal);
    primary.stop();
    replica.stop();
    assert_identical(&image, &hosts.replica_image("disk", Format::Vhdx));
}

#[test]
fn a_replica_that_stands_still_does_not_hold_up_the_guest() {
    if !can_mount() {
        return;
    }
    let hosts = Hosts::new();
    let image = hosts.image("disk.raw", 128);
    let replica = hosts.replica(&[]);
    let primary = hosts.primary(&[&image], &["--compression", "none"]);
    primary.wait_replicating();
    let load = Load::start(hosts.disk("disk"), Ledger::new(128 * MIB, 43));
    load.wait_written(500);
    replica.pause();
    // More than all windows and grants together.
    load.wait_written(60_000);
    let behind = primary.machine();
    assert!(behind.traffic.owed > 0, "{behind:?}");
    replica.resume();
    load.wait_written(500);
    load.finish();
    let lineage = primary.cut();
    assert_eq!(replica.merged().durable, Some(lineage));
    // Neither does it hold up whoever wants to stop the primary.
    replica.pause();
    primary.stop();
    replica.resume();
    replica.stop();
    assert_identical(&image, &hosts.replica_image("disk", Format::Raw));
}

#[test]
fn a_full_disk_at_the_replica_is_the_replicas_trouble() {
    if !can_mount() || !have(&["mkfs.ext4", "mount", "losetup"]) {
        return;
    }
    let hosts = Hosts::new();
    let image = hosts.image("disk.raw", 64);
    let small = SmallFileSystem::new(&hosts.path("small.img"), &hosts.path("store"), 160);
    let replica = hosts.replica(&[]);
    let primary = hosts.primary(&[&image], &["--compression", "none"]);
    primary.wait_replicating();
    let mut ledger = Ledger::new(64 * MIB, 23);
    let file = open_direct(&hosts.disk("disk"), OFlag::empty()).unwrap();
    ledger.write(&file, 0, 16).unwrap();
    let point = primary.cut();
    replica.merged();
    small.fill();
    for start in (0..48 * 256).step_by(64) {
        ledger.write(&file, start, 64).unwrap();
    }
    let stopped = primary.wait("an error", |m| m.state == ReplicationState::Error);
    assert_eq!(stopped.health, Health::Critical);
    let reasons = stopped.reasons.join(" ");
    assert!(reasons.contains("No space left"), "{reasons}");
    let there = replica.wait("an error", |m| m.state == ReplicationState::Error);
    assert_eq!(there.health, Health::Critical);
    assert_eq!(there.durable, Some(point), "the last complete point stays");
    // The guest knows nothing of it.
    ledger.write(&file, 0, 64).unwrap();
    small.relieve();
    drop(file);
    primary.wait_replicating();
    let lineage = primary.cut();
    assert_eq!(replica.merged().durable, Some(lineage));
    ledger.verify(&hosts.disk("disk"));
    assert_eq!(replica.machine().state, ReplicationState::Replicating);
    primary.stop();
    replica.stop();
    assert_identical(&image, &hosts.replica_image("disk", Format::Raw));
    drop(small);
}

#[test]
fn an_image_that_others_changed_is_sent_again() {
    if !can_mount() || !have(&["qemu-io"]) {
        return;
    }
    let hosts = Hosts::new();
    let image = hosts.image("disk.raw", 64);
    let replica = hosts.replica(&[]);
    let primary = hosts.primary(&[&image], &[]);
    let mut ledger = Ledger::new(64 * MIB, 29);
    {
        let file = open_direct(&hosts.disk("disk"), OFlag::empty()).unwrap();
        ledger.write(&file, 0, 256).unwrap();
    }
    primary.cut();
    primary.stop();
    let change = [
        "-f",
        "raw",
        "-c",
        "write -P 0x5a 20M 64k",
        image.to_str().unwrap(),
    ];
    must("qemu-io", change);
    let primary = hosts.primary(&[&image], &[]);
    primary.wait_replicating();
    let lineage = primary.cut();
    assert_eq!(replica.merged().durable, Some(lineage));
    primary.stop();
    replica.stop();
    assert_identical(&image, &hosts.replica_image("disk", Format::Raw));
}

#[test]
fn a_primary_without_its_records_does_not_touch_the_replica() {
    if !can_mount() {
        return;
    }
    let hosts = Hosts::new();
    let image = hosts.image("disk.raw", 64);
    let replica = hosts.replica(&[]);
    let primary = hosts.primary(&[&image], &[]);
    primary.wait_replicating();
    let mut ledger = Ledger::new(64 * MIB, 31);
    {
        let file = open_direct(&hosts.disk("disk"), OFlag::empty()).unwrap();
        ledger.write(&file, 0, 256).unwrap();
    }
    let lineage = primary.cut();
    replica.merged();
    primary.stop();
    fs::remove_dir_all(hosts.path("state")).unwrap();
    let copy = hosts.replica_image("disk", Format::Raw);
    let before = fs::read(&copy).unwrap();
    let primary = hosts.primary(&[&image], &[]);
    let refused = primary.wait("a refusal", |m| m.state == ReplicationState::Error);
    assert_eq!(refused.health, Health::Critical);
    let reasons = refused.reasons.join(" ");
    assert!(
        reasons.contains("already holds another machine"),
        "{reasons}"
    );
    // The guest works all the same.
    let file = open_direct(&hosts.disk("disk"), OFlag::empty()).unwrap();
    ledger.write(&file, 512, 64).unwrap();
    drop(file);
    let held = replica.machine();
    assert_eq!(
        (held.durable, held.base_epoch),
        (Some(lineage), Some(lineage.epoch))
    );
    primary.stop();
    replica.stop();
    assert!(
        fs::read(&copy).unwrap() == before,
        "the replica is as it was"
    );
}

#[test]
fn a_replica_that_was_lost_is_made_again() {
    if !can_mount() {
        return;
    }
    let hosts = Hosts::new();
    let image = hosts.image("disk.vhdx", 64);
    let replica = hosts.replica(&[]);
    let primary = hosts.primary(&[&image], &[]);
    let mut ledger = Ledger::new(64 * MIB, 37);
    let file = open_direct(&hosts.disk("disk"), OFlag::empty()).unwrap();
    for start in (0..8192).step_by(64) {
        ledger.write(&file, start, 64).unwrap();
    }
    drop(file);
    primary.cut();
    replica.stop();
    fs::remove_dir_all(hosts.path("store")).unwrap();
    let replica = hosts.replica(&[]);
    let lineage = primary.cut();
    assert_eq!(replica.merged().durable, Some(lineage));
    primary.stop();
    replica.stop();
    assert_identical(&image, &hosts.replica_image("disk", Format::Vhdx));
}
