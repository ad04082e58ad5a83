//! A machine that an operator suspends: it stays so over deaths, forgets nothing and sends nothing twice.

use std::{fs, os::unix::fs::FileExt, path::Path, thread};

use nix::fcntl::OFlag;
use understudy::{
    coord::{
        role::Part,
        state::{Health, ReplicationState},
    },
    disk::image::Format,
    node::{
        control::SuspendReport,
        status::{MachineStatus, SyncState},
    },
};

use crate::support::{
    Aligned, BLOCK, Hosts, Ledger, Load, MACHINE, Node, assert_identical, call, can_mount,
    open_direct, parsed,
};

const MIB: u64 = 1 << 20;

fn suspend(primary: &Node) -> SuspendReport {
    parsed(primary, &["suspend", MACHINE])
}

fn resume(primary: &Node) -> SuspendReport {
    parsed(primary, &["resume", MACHINE])
}

/// Calls a verb that is refused; why.
fn refused(node: &Node, args: &[&str]) -> String {
    let (code, out, err) = call(node, args);
    assert_eq!(code, 3, "{args:?}: {out}{err}");
    err
}

fn connections(primary: &Node) -> usize {
    primary.log().matches("connected to the replica").count()
}

fn is_suspended(machine: &MachineStatus) -> bool {
    machine.state == ReplicationState::Suspended && machine.suspended.is_some()
}

/// What the primary and its replica say, and what they refuse, while the primary is suspended.
fn says_so(primary: &Node, replica: &Node) {
    let status = primary.machine();
    assert!(is_suspended(&status), "{status:?}");
    assert_eq!(status.health, Health::Warning);
    let reasons = status.reasons.join("; ");
    assert!(reasons.contains("suspended since"), "{reasons}");
    let there = replica.wait("what the primary said", is_suspended);
    let reasons = there.reasons.join("; ");
    assert!(reasons.contains("suspended by the primary"), "{reasons}");
    assert!(!reasons.contains("not connected"), "{reasons}");
    for verb in [
        &["resync", MACHINE][..],
        &["verify", MACHINE],
        &["failover", MACHINE, "--planned"],
    ] {
        let why = refused(primary, verb);
        assert!(why.contains("understudy resume vm"), "{why}");
    }
    let why = primary.try_cut().unwrap_err().to_string();
    assert!(why.contains("understudy resume vm"), "{why}");
    let why = refused(replica, &["suspend", MACHINE]);
    assert!(why.contains("suspended on the primary"), "{why}");
}

/// Through a clean stop and a SIGKILL, with writes before, between and after them.
#[test]
fn a_suspended_machine_stays_so_and_sends_only_what_changed() {
    if !can_mount() {
        return;
    }
    let hosts = Hosts::new();
    let image = hosts.image("disk.raw", 64);
    let replica = hosts.replica(&[]);
    let mut primary = hosts.primary(&[&image], &[]);
    let mut ledger = Ledger::new(64 * MIB, 71);
    let write = |ledger: &mut Ledger, first: u64, count: u64| {
        let file = open_direct(&hosts.disk("disk"), OFlag::empty()).unwrap();
        for start in (first..first + count).step_by(16) {
            ledger.write(&file, start, 16).unwrap();
        }
    };
    write(&mut ledger, 0, 4096);
    let point = primary.cut();

    let since = suspend(&primary).since.unwrap();
    assert_eq!(suspend(&primary).since, Some(since), "it is so already");
    says_so(&primary, &replica);
    write(&mut ledger, 0, 64);
    let linked = connections(&primary);
    primary.stop();
    primary = hosts.primary(&[&image], &[]);
    assert_eq!(primary.machine().suspended, Some(since));
    write(&mut ledger, 5000 - 5000 % 16, 32);
    primary.kill();
    primary = hosts.primary(&[&image], &[]);
    says_so(&primary, &replica);
    write(&mut ledger, 8192, 16);
    assert_eq!(connections(&primary), linked, "it does not dial");
    assert_eq!(replica.machine().durable, Some(point));

    assert_eq!(resume(&primary).since, Some(since));
    assert_eq!(resume(&primary).since, None, "it is over already");
    let lineage = primary.cut();
    let status = primary.wait_replicating();
    assert_eq!(
        (status.suspended, status.traffic.raw),
        (None, (64 + 32 + 16) * 4096)
    );
    assert_eq!(status.health, Health::Normal);
    let held = replica.merged();
    assert_eq!((held.durable, held.suspended), (Some(lineage), None));
    assert_eq!(held.state, ReplicationState::Replicating);
    ledger.verify(&hosts.disk("disk"));
    primary.stop();
    replica.stop();
    assert_identical(&image, &hosts.replica_image("disk", Format::Raw));
}

/// Under load, at any moment of an epoch, and while the replica answers nothing: what was under way is staged or merged.
#[test]
fn what_was_under_way_is_staged_or_merged() {
    if !can_mount() {
        return;
    }
    let hosts = Hosts::new();
    let image = hosts.image("disk.vhdx", 64);
    let replica = hosts.replica(&[]);
    let primary = hosts.primary(&[&image], &["--interval", "100ms"]);
    let mut chance = Ledger::new(MIB, 73);
    let load = Load::start(hosts.disk("disk"), Ledger::new(64 * MIB, 75));
    primary.wait_replicating();
    for lap in 0..6 {
        load.wait_written(chance.pick(1_000));
        if lap == 5 {
            replica.pause();
            primary.wait("something under way", |m| m.traffic.owed > 0);
        }
        suspend(&primary);
        assert!(is_suspended(&primary.machine()));
        let sent = primary.machine().traffic.sent;
        load.wait_written(200);
        assert_eq!(primary.machine().traffic.sent, sent, "nothing is sent");
        if lap == 5 {
            replica.resume();
        }
        resume(&primary);
    }
    load.wait_written(200);
    let mut ledger = load.finish();
    let lineage = primary.cut();
    assert_eq!(replica.merged().durable, Some(lineage));
    assert!(!primary.log().contains("a resync"), "changes were enough");
    ledger.verify(&hosts.disk("disk"));
    primary.stop();
    replica.stop();
    assert_identical(&image, &hosts.replica_image("disk", Format::Vhdx));
}

/// A test failover is as always, and so is an unplanned one. It ends the suspension: the old primary learns of it when it
/// is resumed, and is fenced.
#[test]
fn the_replica_can_take_over_from_a_suspended_primary() {
    if !can_mount() {
        return;
    }
    let hosts = Hosts::new();
    let image = hosts.image("disk.raw", 32);
    let replica = hosts.replica(&[]);
    let primary = hosts.primary(&[&image], &[]);
    primary.cut();
    suspend(&primary);
    replica.wait("what the primary said", is_suspended);
    for verb in [
        &["failover", MACHINE, "--test"][..],
        &["cancel", MACHINE, "--tests"],
        &["failover", MACHINE, "--unplanned"],
        &["commit", MACHINE],
    ] {
        let (code, _, err) = call(&replica, verb);
        assert_eq!(code, 0, "{verb:?}: {err}");
    }
    resume(&primary);
    let fenced = primary.wait("fencing", |m| matches!(m.part, Some(Part::Fenced { .. })));
    assert_eq!(fenced.suspended, None);
    let why = refused(&primary, &["suspend", MACHINE]);
    assert!(why.contains("fenced"), "{why}");
    let why = refused(&primary, &["resume", MACHINE]);
    assert!(why.contains("fenced"), "{why}");
    primary.stop();
    replica.stop();
}

fn write_and_flush(disk: &Path) {
    let mut bytes = Aligned::new(BLOCK);
    bytes.get_mut().fill(7);
    let file = open_direct(disk, OFlag::empty()).unwrap();
    file.write_all_at(bytes.get(), 0).unwrap();
    file.sync_data().unwrap();
}

#[test]
fn flushes_of_a_suspended_machine_stand_as_if_the_link_were_lost() {
    if !can_mount() {
        return;
    }
    for policy in ["strict", "available"] {
        let hosts = Hosts::new();
        let image = hosts.image("disk.raw", 32);
        let replica = hosts.replica(&[]);
        let rarely = ["--sync-on-flush", policy, "--interval", "10m"];
        let primary = hosts.primary(&[&image], &rarely);
        primary.cut();
        primary.wait("flushes in sync", |m| {
            m.sync_on_flush.unwrap().state == SyncState::InSync
        });
        if policy == "strict" {
            let why = refused(&primary, &["suspend", MACHINE]);
            assert!(
                why.contains("flushes wait") && why.contains("--force"),
                "{why}"
            );
            assert_eq!(primary.machine().suspended, None);
            let _: SuspendReport = parsed(&primary, &["suspend", MACHINE, "--force"]);
        } else {
            suspend(&primary);
        }
        assert_eq!(
            primary.machine().sync_on_flush.unwrap().state,
            SyncState::Away
        );
        let disk = hosts.disk("disk");
        let guest = thread::spawn(move || write_and_flush(&disk));
        if policy == "strict" {
            primary.wait("a flush that waits", |m| {
                m.sync_on_flush.unwrap().waiting == 1
            });
            resume(&primary);
            guest.join().unwrap();
        } else {
            guest.join().unwrap();
            resume(&primary);
        }
        primary.wait("flushes in sync", |m| {
            m.sync_on_flush.unwrap().state == SyncState::InSync
        });
        primary.kill();
        replica.merged();
        replica.stop();
        let held = fs::read(hosts.replica_image("disk", Format::Raw)).unwrap();
        assert!(held[..BLOCK].iter().all(|&byte| byte == 7), "{policy}");
        let _ = nix::mount::umount2(&hosts.mount(), nix::mount::MntFlags::MNT_DETACH);
    }
}
