//! Copy, changes, cuts, discards: the replica holds what the primary held.

use std::{
    collections::BTreeSet,
    fs,
    os::unix::fs::FileExt,
    os::unix::fs::MetadataExt,
    path::Path,
    thread::{self, JoinHandle},
};

use nix::fcntl::{FallocateFlags, OFlag, fallocate};
use understudy::{
    disk::image::Format,
    node::status::{PointStatus, TestStatus},
};

use crate::support::{
    Aligned, BLOCK, Hosts, Ledger, Load, MACHINE, assert_identical, call, can_mount, open_direct,
    open_image, parsed,
};

const MIB: u64 = 1 << 20;

/// Writes before the copy, during it, after it; cuts; compares.
fn copy_and_follow(image: &str, replica_args: &[&str], replica_format: Format) {
    if !can_mount() {
        return;
    }
    let hosts = Hosts::new();
    let image = hosts.image(image, 96);
    let replica = hosts.replica(replica_args);
    let primary = hosts.primary(&[&image], &[]);
    let mut ledger = Ledger::new(96 * MIB, 7);
    let disk = hosts.disk("disk");
    {
        let file = open_direct(&disk, OFlag::empty()).unwrap();
        for start in (0..4096).step_by(16) {
            ledger.write(&file, start, 16).unwrap();
        }
    }
    let load = Load::start(disk.clone(), ledger);
    primary.wait_replicating();
    load.wait_written(2_000);
    let mut ledger = load.finish();
    let lineage = primary.cut();
    assert!(lineage.epoch.0 >= 1);
    ledger.verify(&disk);
    let held = replica.merged();
    assert_eq!(
        held.durable,
        Some(lineage),
        "both sides know the same history"
    );
    assert_eq!(primary.machine().durable, Some(lineage));
    assert_eq!(primary.machine().traffic.owed, 0);
    primary.stop();
    replica.stop();
    assert_identical(&image, &hosts.replica_image("disk", replica_format));
}

#[test]
fn a_vhdx_is_followed_by_a_vhdx() {
    copy_and_follow("disk.vhdx", &[], Format::Vhdx);
}

#[test]
fn a_raw_disk_is_followed_by_a_raw_one() {
    copy_and_follow("disk.raw", &[], Format::Raw);
}

#[test]
fn a_vhdx_is_followed_by_a_raw_disk() {
    copy_and_follow("disk.vhdx", &["--format", "raw"], Format::Raw);
}

#[test]
fn a_first_copy_says_nothing_of_what_was_never_written() {
    if !can_mount() {
        return;
    }
    let hosts = Hosts::new();
    let image = hosts.image("disk.vhdx", 512 << 10);
    let replica = hosts.replica(&[]);
    let primary = hosts.primary(&[&image], &[]);
    let mut ledger = Ledger::new(64 * MIB, 41);
    let file = open_direct(&hosts.disk("disk"), OFlag::empty()).unwrap();
    ledger.write(&file, 0, 256).unwrap();
    drop(file);
    let lineage = primary.cut();
    assert_eq!(replica.merged().durable, Some(lineage));
    // A frame for each hole of a MiB would come to 20 MB.
    let sent = primary.machine().traffic.sent;
    assert!(
        sent < 4 * MIB,
        "{sent} bytes for 1 MiB on a disk of 512 GiB"
    );
    primary.stop();
    replica.stop();
}

fn write_counter(file: &fs::File, counter: u64) -> std::io::Result<()> {
    let mut buffer = Aligned::new(BLOCK);
    buffer.get_mut()[..8].copy_from_slice(&counter.to_le_bytes());
    file.write_all_at(buffer.get(), 0)
}

fn counter(image: &Path) -> u64 {
    let mut bytes = [0; 8];
    open_image(image).read_at(0, &mut bytes).unwrap();
    u64::from_le_bytes(bytes)
}

/// A guest writes a number to one disk and, once that is acknowledged, to the other: a replica that ever showed the
/// second without the first would have invented a state.
#[test]
fn the_order_of_writes_holds_across_disks() {
    if !can_mount() {
        return;
    }
    let hosts = Hosts::new();
    let (first, second) = (hosts.image("a.vhdx", 64), hosts.image("b.raw", 64));
    let (mut next, mut shown) = (1, 0);
    for lap in 0..5 {
        let replica = hosts.replica(&[]);
        let primary = hosts.primary(&[&first, &second], &["--interval", "100ms"]);
        primary.wait_replicating();
        let guest = Counting::start(&hosts, next, 3 + lap);
        let epochs = primary.machine().traffic.epochs;
        primary.wait("a few epochs under load", |m| {
            m.traffic.epochs >= epochs + 5
        });
        primary.kill();
        next = guest.end() + 1;
        replica.merged();
        replica.stop();
        let ahead = counter(&hosts.replica_image("a", Format::Vhdx));
        let behind = counter(&hosts.replica_image("b", Format::Raw));
        assert!(ahead == behind || ahead == behind + 1, "{ahead} {behind}");
        assert!(behind > shown, "the replica followed: {behind}");
        shown = behind;
    }
}

/// The same for every point that is kept, and not only for the one that the images hold in the end.
#[test]
fn every_point_that_is_kept_has_the_order_of_the_writes() {
    if !can_mount() {
        return;
    }
    let hosts = Hosts::new();
    let (first, second) = (hosts.image("a.vhdx", 64), hosts.image("b.raw", 64));
    let replica = hosts.replica(&["--keep", "1000"]);
    let primary = hosts.primary(&[&first, &second], &["--interval", "100ms"]);
    primary.wait_replicating();
    let guest = Counting::start(&hosts, 1, 17);
    let epochs = primary.machine().traffic.epochs;
    primary.wait("many epochs under load", |m| {
        m.traffic.epochs >= epochs + 30
    });
    primary.kill();
    let last = guest.end();
    let points: Vec<PointStatus> = parsed(&replica, &["points", MACHINE]);
    assert!(points.len() >= 30, "{}", points.len());
    let mut shown = BTreeSet::new();
    for point in points {
        let epoch = point.point.epoch.to_string();
        let args = ["failover", MACHINE, "--test", "--point", &epoch];
        let test: TestStatus = parsed(&replica, &args);
        let [ahead, behind] = [&test.files[0], &test.files[1]].map(|file| {
            let mut bytes = [0; 8];
            let file = fs::File::open(file).unwrap();
            file.read_exact_at(&mut bytes, 0).unwrap();
            u64::from_le_bytes(bytes)
        });
        let what = format!("epoch {epoch} shows {ahead} and {behind}");
        assert!(ahead == behind || ahead == behind + 1, "{what}");
        assert!(
            shown.last().is_none_or(|&before| before <= behind),
            "{what}"
        );
        shown.insert(behind);
        assert_eq!(call(&replica, &["cancel", MACHINE]).0, 0);
    }
    assert!(
        shown.len() >= 20 && shown.last() <= Some(&last),
        "{shown:?}"
    );
    replica.stop();
}

/// A guest that counts, on disk `a` first and then on disk `b`, until they are gone. Between the two marks lies all that
/// another one writes on `a`: an epoch that were not as of its cut would read the second mark much later than the first.
struct Counting {
    counting: JoinHandle<u64>,
    busy: JoinHandle<()>,
}

impl Counting {
    fn start(hosts: &Hosts, mut next: u64, seed: u64) -> Self {
        let markers = [hosts.disk("a"), hosts.disk("b")];
        let disk = hosts.disk("a");
        let ledger = Ledger::new(64 * MIB, seed);
        Self {
            counting: thread::spawn(move || {
                let [a, b] = markers.map(|path| open_direct(&path, OFlag::O_DSYNC).unwrap());
                while write_counter(&a, next).is_ok() && write_counter(&b, next).is_ok() {
                    next += 1;
                }
                next
            }),
            busy: thread::spawn(move || churn_above_zero(&disk, ledger)),
        }
    }

    /// Waits for the end of the disks; the last number that was begun.
    fn end(self) -> u64 {
        self.busy.join().unwrap();
        self.counting.join().unwrap()
    }
}

fn churn_above_zero(disk: &Path, mut ledger: Ledger) {
    let file = open_direct(disk, OFlag::empty()).unwrap();
    loop {
        let first = 1 + ledger.pick(16_000);
        if ledger.write(&file, first, 64).is_err() {
            return;
        }
    }
}

#[test]
fn a_discard_arrives_as_zeros_and_takes_no_space() {
    if !can_mount() {
        return;
    }
    let hosts = Hosts::new();
    let image = hosts.image("disk.vhdx", 128);
    let replica = hosts.replica(&[]);
    let primary = hosts.primary(&[&image], &[]);
    primary.wait_replicating();
    let file = open_direct(&hosts.disk("disk"), OFlag::empty()).unwrap();
    let mut ledger = Ledger::new(128 * MIB, 5);
    for start in (0..64 * 256).step_by(64) {
        ledger.write(&file, start, 64).unwrap();
    }
    primary.cut();
    replica.merged();
    let copy = hosts.replica_image("disk", Format::Vhdx);
    let full = fs::metadata(&copy).unwrap().blocks();
    let mode = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    fallocate(&file, mode, 0, 48 << 20).unwrap();
    let sent = primary.machine().traffic.raw;
    primary.cut();
    assert!(
        primary.machine().traffic.raw - sent < MIB,
        "zeros travel as what they are"
    );
    replica.merged();
    drop(file);
    primary.stop();
    replica.stop();
    assert_identical(&image, &copy);
    let mut start = vec![1; 1 << 20];
    open_image(&copy).read_at(16 << 20, &mut start).unwrap();
    assert!(start.iter().all(|&byte| byte == 0));
    let left = fs::metadata(&copy).unwrap().blocks();
    assert!(
        left < full - (32 << 11),
        "the replica gives back what the guest trimmed: {full} sectors, then {left}"
    );
}
