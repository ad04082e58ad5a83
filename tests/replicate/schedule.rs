//! An initial copy that waits for its time: until then changes are tracked and nothing is sent.

use std::fs;

use nix::fcntl::OFlag;
use understudy::{
    base::clock::{Clock, SystemClock, Timestamp},
    coord::state::ReplicationState,
    disk::image::Format,
    node::{initial_copy::InitialCopy, status::MachineStatus},
};

use crate::support::{
    Hosts, Ledger, Load, MACHINE, Node, assert_identical, call, can_mount, open_direct,
};

const MIB: u64 = 1 << 20;
/// No test waits for it.
const LATER: [&str; 2] = ["--initial-copy", "2999-01-01T00:00:00Z"];

fn waits(machine: &MachineStatus) -> bool {
    machine.state == ReplicationState::ReadyForInitialReplication
        && machine.reasons.join(" ").contains("has not begun")
}

fn copies(primary: &Node) -> usize {
    primary.log().matches("initial copy begins").count()
}

/// Over a death of the primary and a restart of the replica, which then no longer knows that nothing was ever sent.
#[test]
fn a_copy_waits_until_somebody_begins_it() {
    if !can_mount() {
        return;
    }
    let hosts = Hosts::new();
    let image = hosts.image("disk.vhdx", 64);
    let replica = hosts.replica(&[]);
    let primary = hosts.primary(&[&image], &LATER);
    let status = primary.wait("a copy that waits", waits);
    let reasons = status.reasons.join(" ");
    assert!(
        reasons.contains("until 2999-01-01 00:00:00 UTC") && reasons.contains("understudy copy"),
        "{reasons}"
    );
    let there = replica.machine();
    assert_eq!(there.state, ReplicationState::WaitingForInitialReplication);
    assert!(there.peer.is_some(), "linked");
    let mut ledger = Ledger::new(64 * MIB, 81);
    let file = open_direct(&hosts.disk("disk"), OFlag::empty()).unwrap();
    for start in (0..2048).step_by(64) {
        ledger.write(&file, start, 64).unwrap();
    }
    file.sync_all().unwrap();
    drop(file);
    let why = primary.try_cut().unwrap_err().to_string();
    assert!(why.contains("has not begun"), "{why}");
    let (code, _, why) = call(&primary, &["resync", MACHINE, "--no-wait"]);
    assert_eq!(code, 3, "{why}");
    assert!(why.contains("has not begun"), "{why}");

    replica.stop();
    let replica = hosts.replica(&[]);
    replica.wait("the primary", |m| m.peer.is_some());
    primary.wait("a copy that waits", waits);
    primary.kill();
    let primary = hosts.primary(&[&image], &LATER);
    let status = primary.wait("a copy that waits", waits);
    assert_eq!((status.traffic.sent, copies(&primary)), (0, 0));

    let load = Load::start(hosts.disk("disk"), ledger);
    let (code, out, err) = call(&primary, &["copy", MACHINE]);
    assert_eq!(code, 0, "{err}");
    assert!(out.contains("begins now"), "{out}");
    primary.wait_replicating();
    load.wait_written(200);
    let mut ledger = load.finish();
    let (code, _, why) = call(&primary, &["copy", MACHINE]);
    assert_eq!(code, 3, "{why}");
    assert!(why.contains("no initial copy waits"), "{why}");
    let lineage = primary.cut();
    assert_eq!(replica.merged().durable, Some(lineage));
    assert_eq!(copies(&primary), 1);
    ledger.verify(&hosts.disk("disk"));
    primary.stop();
    replica.stop();
    assert_identical(&image, &hosts.replica_image("disk", Format::Vhdx));
}

#[test]
fn a_copy_begins_when_its_time_has_come() {
    if !can_mount() {
        return;
    }
    let hosts = Hosts::new();
    let image = hosts.image("disk.raw", 32);
    let replica = hosts.replica(&[]);
    let clock = SystemClock::default();
    let due = Timestamp(clock.wall().0 / 1_000_000 * 1_000_000 + 5_000_000);
    let when = InitialCopy::At(due).to_string();
    let primary = hosts.primary(&[&image], &["--initial-copy", &when]);
    primary.wait_replicating();
    assert!(clock.wall() >= due);
    assert!(primary.log().contains("the initial copy waits"));
    primary.stop();
    replica.stop();
    assert_identical(&image, &hosts.replica_image("disk", Format::Raw));
}

#[test]
fn changes_never_wait_and_a_lost_replica_does() {
    if !can_mount() {
        return;
    }
    let hosts = Hosts::new();
    let image = hosts.image("disk.raw", 32);
    let replica = hosts.replica(&[]);
    let primary = hosts.primary(&[&image], &[]);
    primary.cut();
    primary.stop();
    let primary = hosts.primary(&[&image], &LATER);
    let mut ledger = Ledger::new(32 * MIB, 83);
    let file = open_direct(&hosts.disk("disk"), OFlag::empty()).unwrap();
    ledger.write(&file, 0, 64).unwrap();
    drop(file);
    let lineage = primary.cut();
    assert_eq!(replica.merged().durable, Some(lineage));
    let (code, _, why) = call(&primary, &["copy", MACHINE]);
    assert_eq!(code, 3, "{why}");

    replica.stop();
    fs::remove_dir_all(hosts.path("store")).unwrap();
    let replica = hosts.replica(&[]);
    primary.wait("a copy that waits", waits);
    assert_eq!(call(&primary, &["copy", MACHINE]).0, 0);
    let lineage = primary.cut();
    assert_eq!(replica.merged().durable, Some(lineage));
    primary.stop();
    replica.stop();
    assert_identical(&image, &hosts.replica_image("disk", Format::Raw));
}
