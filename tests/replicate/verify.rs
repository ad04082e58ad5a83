//! Verification: whatever differs is found and named, and nothing else, while the guest writes.

use std::path::Path;

use understudy::{
    disk::image::Format,
    node::status::{FoundStatus, MachineStatus, VerifyStatus},
};

use super::resync::{demand, end, flip, full_image};
use crate::support::{
    Hosts, Ledger, Load, MACHINE, Node, PROGRAM, assert_identical, can_mount, run,
};

const MIB: u64 = 1 << 20;

/// Runs `verify` as an operator does: exit code, what it found, standard error.
fn verify(node: &Node, more: &[&str]) -> (i32, VerifyStatus, String) {
    let socket = node.socket().to_str().unwrap();
    let args = ["verify", MACHINE, "--json", "--control", socket];
    let done = run(PROGRAM, [&args[..], more].concat());
    let err = String::from_utf8(done.stderr).unwrap();
    let found = serde_json::from_slice(&done.stdout);
    let found = found.unwrap_or_else(|error| panic!("{error}: {err}"));
    (done.status.code().unwrap(), found, err)
}

fn block(number: u64) -> FoundStatus {
    FoundStatus {
        disk: "disk".parse().unwrap(),
        offset: number * 4096,
        len: 4096,
    }
}

/// Everything of an idle machine is compared, and nothing is found.
#[track_caller]
fn check_clean(node: &Node, more: &[&str], total: u64) {
    let (code, done, err) = verify(node, more);
    assert_eq!((code, &done.found[..]), (0, &[][..]), "{err}");
    assert_eq!((done.total, done.left), (total, 0), "{done:?}");
    assert!(done.compared >= total && done.problem.is_none(), "{done:?}");
}

/// A guest that writes everywhere as fast as it can, epochs as short as they get: many rounds, and no false alarm.
#[test]
fn a_busy_guest_causes_no_false_alarm() {
    if !can_mount() {
        return;
    }
    let hosts = Hosts::new();
    let image = full_image(&hosts, 96);
    let replica = hosts.replica(&[]);
    let primary = hosts.primary(&[&image], &["--interval", "100ms"]);
    primary.wait_replicating();
    let load = Load::start(hosts.disk("disk"), Ledger::new(96 * MIB, 51));
    load.wait_written(1000);
    let (mut compared, epochs) = (0, primary.machine().traffic.epochs);
    for _ in 0..8 {
        let (code, done, err) = verify(&primary, &[]);
        assert_eq!((code, &done.found[..]), (0, &[][..]), "{err}");
        assert!(done.compared > 32 * MIB, "{done:?}");
        compared += done.compared;
    }
    let epochs = primary.machine().traffic.epochs - epochs;
    assert!(epochs > 20, "{compared} bytes over {epochs} epochs");
    load.finish();
    primary.cut();
    check_clean(&primary, &[], 96 * MIB);
    end(&hosts, &image, primary, replica);
}

/// The same with a VHDX that grows beneath the guest, whose holes are compared without being read, and with logs that stay.
#[test]
fn an_image_with_holes_is_verified_and_resynced_without_reading_them() {
    if !can_mount() {
        return;
    }
    let hosts = Hosts::new();
    let image = hosts.image("disk.vhdx", 1024);
    let replica = hosts.replica(&["--keep", "5"]);
    let primary = hosts.primary(&[&image], &[]);
    primary.wait_replicating();
    let load = Load::start(hosts.disk("disk"), Ledger::new(48 * MIB, 57));
    for _ in 0..3 {
        load.wait_written(500);
        let (code, done, err) = verify(&primary, &[]);
        assert_eq!((code, &done.found[..]), (0, &[][..]), "{err}");
        assert!(
            done.compared >= 900 * MIB && done.read < 300 * MIB,
            "{done:?}"
        );
    }
    let (code, _, err) = demand(&primary, &["--json"]);
    assert_eq!(code, 0, "{err}");
    load.finish();
    let resync = primary.machine().resync.unwrap();
    assert!(
        resync.compared >= 900 * MIB && resync.read < 300 * MIB,
        "{resync:?}"
    );
    assert_eq!(resync.differing, 0, "{resync:?}");
    primary.cut();
    check_clean(&primary, &[], 1024 * MIB);
    primary.stop();
    replica.stop();
    let replica = hosts.replica(&[]);
    replica.merged();
    replica.stop();
    assert_identical(&image, &hosts.replica_image("disk", Format::Vhdx));
}

/// Bits flip in the image files, beneath blocks that the guest leaves alone: on either side they are found and named, and
/// nothing is changed until that is asked for.
#[test]
fn a_flipped_bit_on_either_side_is_found_and_repaired_when_asked() {
    if !can_mount() {
        return;
    }
    let hosts = Hosts::new();
    let image = full_image(&hosts, 64);
    let replica = hosts.replica(&[]);
    let primary = hosts.primary(&[&image], &[]);
    primary.wait_replicating();
    primary.cut();
    replica.merged();
    let copy = hosts.replica_image("disk", Format::Raw);
    check_clean(&primary, &[], 64 * MIB);
    let load = Load::start(hosts.disk("disk"), Ledger::new(8 * MIB, 53));
    load.wait_written(200);
    let find = |flipped: &[u64], on: &Path, more: &[&str], exit: i32| {
        flip(on, flipped);
        for _ in 0..2 {
            let (code, done, err) = verify(&primary, more);
            let wanted: Vec<_> = flipped.iter().map(|&number| block(number)).collect();
            assert_eq!((code, done.found), (exit, wanted), "{err}");
            if exit == 0 {
                break;
            }
            assert!(err.contains("find out which side is right"), "{err}");
        }
    };
    find(&[3000, 9001], &copy, &[], 1);
    flip(&copy, &[3000, 9001]);
    find(&[5000], &image, &[], 1);
    flip(&image, &[5000]);
    find(&[7777, 16_383], &copy, &["--repair"], 0);
    load.wait_written(200);
    load.finish();
    let mended = primary.machine().resync.unwrap();
    assert!(mended.reason.contains("to be repaired"), "{mended:?}");
    assert_eq!((mended.total, mended.differing), (8192, 8192));
    primary.cut();
    check_clean(&primary, &[], 64 * MIB);
    end(&hosts, &image, primary, replica);
}

/// As slow as it is told to be; over a lost link, over the death and over the end of the primary it goes on where it was, and
/// what it has found is not forgotten.
#[test]
fn a_throttled_verification_goes_on_after_a_lost_link_and_deaths() {
    if !can_mount() {
        return;
    }
    let hosts = Hosts::new();
    let image = full_image(&hosts, 64);
    let replica = hosts.replica(&[]);
    let primary = hosts.primary(&[&image], &[]);
    primary.wait_replicating();
    primary.cut();
    replica.merged();
    flip(&hosts.replica_image("disk", Format::Raw), &[3, 4]);
    let socket = primary.socket().to_str().unwrap();
    let args = ["verify", MACHINE, "--control", socket, "--no-wait"];
    let begun = run(PROGRAM, [&args[..], &["--throttle", "32M"]].concat());
    assert!(begun.status.success());
    let again = run(PROGRAM, args);
    let why = String::from_utf8(again.stderr).unwrap();
    assert_eq!(again.status.code(), Some(3), "{why}");
    assert!(why.contains("under way already"), "{why}");
    let running = |m: &MachineStatus| m.verify.clone().unwrap();
    primary.wait("a part", |m| running(m).compared > 8 * MIB);
    replica.kill();
    let replica = hosts.replica(&[]);
    primary.wait("more", |m| running(m).compared > 20 * MIB);
    // A clean end saves what is left; a death later on costs what was compared since then, at most.
    primary.stop();
    let primary = hosts.primary(&[&image], &[]);
    let resumed = |m: &MachineStatus| m.verify.as_ref().is_some_and(|v| v.compared > 20 * MIB);
    let status = primary.wait("the verification again", resumed);
    assert_eq!(running(&status).found, [two_blocks()]);
    primary.wait("more", |m| running(m).compared > 36 * MIB);
    primary.kill();
    let primary = hosts.primary(&[&image], &[]);
    let status = primary.wait("the end", |m| m.verify.as_ref().is_some_and(|v| !v.running));
    let done = running(&status);
    assert_eq!((done.left, done.total), (0, 64 * MIB));
    assert_eq!(
        (done.differing, &done.found[..]),
        (8192, &[two_blocks()][..])
    );
    // What was on the way when a link was lost is read twice, and what was compared after the last record.
    assert!(
        done.compared >= 64 * MIB && done.compared <= 84 * MIB,
        "{done:?}"
    );
    let (code, done, err) = verify(&primary, &["--repair"]);
    assert_eq!((code, done.found), (0, vec![two_blocks()]), "{err}");
    end(&hosts, &image, primary, replica);
}

fn two_blocks() -> FoundStatus {
    FoundStatus {
        len: 8192,
        ..block(3)
    }
}
