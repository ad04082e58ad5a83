//! SIGKILL at any moment, on either side and on both: nothing acknowledged is lost, and nothing is copied twice.

use std::{fs, time::Duration};

use nix::fcntl::OFlag;
use understudy::{coord::state::ReplicationState, disk::image::Format};

use crate::support::{Hosts, Ledger, Load, Node, assert_identical, can_mount, open_direct};

const MIB: u64 = 1 << 20;
const LAPS: u64 = 5;

/// How often a node has decided to send everything.
fn full_copies(node: &Node) -> usize {
    let log = node.log();
    log.matches("reconciled=CopyNeeded").count()
}

#[test]
fn a_replica_that_dies_goes_on_where_it_was() {
    if !can_mount() {
        return;
    }
    let hosts = Hosts::new();
    let image = hosts.image("disk.vhdx", 96);
    let mut replica = hosts.replica(&[]);
    let primary = hosts.primary(&[&image], &[]);
    let mut chance = Ledger::new(MIB, 11);
    let load = Load::start(hosts.disk("disk"), Ledger::new(96 * MIB, 9));
    primary.wait_replicating();
    for _ in 0..LAPS {
        let epochs = primary.machine().traffic.epochs;
        load.wait_written(chance.pick(1_500));
        replica.kill();
        load.wait_written(200);
        replica = hosts.replica(&[]);
        primary.wait("the next epoch", |m| m.traffic.epochs > epochs + 1);
    }
    let mut ledger = load.finish();
    assert!(
        primary.log().contains("reset by peer"),
        "a replica that is back says that it knows nothing of old links"
    );
    let lineage = primary.cut();
    assert_eq!(replica.merged().durable, Some(lineage));
    assert_eq!(full_copies(&primary), 1, "only the first copy was whole");
    ledger.verify(&hosts.disk("disk"));
    primary.stop();
    replica.stop();
    assert_identical(&image, &hosts.replica_image("disk", Format::Vhdx));
}

fn primary_dies(image: &str, format: Format) {
    if !can_mount() {
        return;
    }
    let hosts = Hosts::new();
    let image = hosts.image(image, 96);
    let replica = hosts.replica(&[]);
    let mut ledger = Ledger::new(96 * MIB, 13);
    let mut primary = hosts.primary(&[&image], &[]);
    primary.wait_replicating();
    for _ in 0..LAPS {
        let moment = ledger.pick(8_000);
        let load = Load::start(hosts.disk("disk"), ledger);
        load.wait_written(moment + 1);
        primary.kill();
        ledger = load.ended();
        // The mount of the dead process is in the way, and is taken away by the new one.
        assert!(fs::read_dir(hosts.mount()).is_err(), "a stale mount");
        primary = hosts.primary(&[&image], &[]);
        ledger.verify(&hosts.disk("disk"));
        if ledger.pick(2) == 0 {
            primary.wait_replicating();
        }
    }
    let lineage = primary.cut();
    assert_eq!(replica.merged().durable, Some(lineage));
    assert_eq!(full_copies(&primary), 1, "only the first copy was whole");
    assert!(ledger.writes() > LAPS);
    ledger.verify(&hosts.disk("disk"));
    primary.stop();
    replica.stop();
    assert_identical(&image, &hosts.replica_image("disk", format));
}

#[test]
fn a_primary_with_a_vhdx_that_dies_loses_nothing() {
    primary_dies("disk.vhdx", Format::Vhdx);
}

#[test]
fn a_primary_with_a_raw_disk_that_dies_loses_nothing() {
    primary_dies("disk.raw", Format::Raw);
}

#[test]
fn a_copy_goes_on_after_both_sides_died() {
    if !can_mount() {
        return;
    }
    let hosts = Hosts::new();
    let image = hosts.image("disk.vhdx", 192);
    let mut ledger = Ledger::new(192 * MIB, 17);
    let state = hosts.path("state");
    {
        let unreached = hosts.primary(&[&image], &[]);
        let file = open_direct(&hosts.disk("disk"), OFlag::empty()).unwrap();
        for start in (0..192 * 256).step_by(256) {
            ledger.write(&file, start, 256).unwrap();
        }
        drop(file);
        unreached.stop();
    }
    assert!(state.is_dir());
    let mut resumed = 0;
    for lap in 0..4 {
        let replica = hosts.replica(&[]);
        let primary = hosts.primary(&[&image], &["--compression", "none"]);
        let load = Load::start(hosts.disk("disk"), ledger);
        let part = 24 * MIB * (lap + 1);
        let seen = primary.wait("part of the copy", |m| {
            m.state == ReplicationState::Replicating
                || m.copy
                    .is_some_and(|copy| copy.done > part.min(copy.total / 2))
        });
        if seen.state != ReplicationState::Replicating {
            resumed += 1;
        }
        std::thread::sleep(Duration::from_millis(30 * lap));
        primary.kill();
        replica.kill();
        ledger = load.ended();
    }
    assert!(
        resumed > 0,
        "at least one death was in the middle of the copy"
    );
    let replica = hosts.replica(&[]);
    let primary = hosts.primary(&[&image], &[]);
    let lineage = primary.cut();
    assert_eq!(replica.merged().durable, Some(lineage));
    assert_eq!(full_copies(&primary), 1, "the copy went on");
    ledger.verify(&hosts.disk("disk"));
    primary.stop();
    replica.stop();
    assert_identical(&image, &hosts.replica_image("disk", Format::Vhdx));
}
