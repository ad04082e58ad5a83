//! Test failovers: any point, several at once, beside a replication that does not notice.

use std::{fs, os::unix::fs::FileExt, path::PathBuf};

use nix::fcntl::{FallocateFlags, OFlag, fallocate};
use understudy::{
    base::units::Epoch,
    disk::image::Format,
    node::status::{PointStatus, TestResult, TestStatus},
};

use crate::support::{Hosts, MACHINE, Node, assert_identical, can_mount, have, must, open_direct};
pub(super) use crate::support::{call, mark, marked, parsed};

pub(super) fn points(node: &Node) -> Vec<PointStatus> {
    parsed(node, &["points", MACHINE])
}

pub(super) fn start(node: &Node, point: Option<Epoch>) -> TestStatus {
    let point = point.map(|epoch| epoch.to_string());
    let mut args = vec!["failover", MACHINE, "--test"];
    if let Some(point) = &point {
        args.extend(["--point", point]);
    }
    parsed(node, &args)
}

/// A machine of two disks in two formats, replicated.
struct Stage {
    hosts: Hosts,
    primary: Node,
    images: [PathBuf; 2],
}

impl Stage {
    fn new(hosts: Hosts) -> Self {
        let images = [hosts.image("system.vhdx", 96), hosts.image("data.raw", 32)];
        let primary = hosts.primary(&[&images[0], &images[1]], &[]);
        primary.wait_replicating();
        Self {
            hosts,
            primary,
            images,
        }
    }

    /// Marks both disks in turn, and makes a point of it.
    fn epoch(&self, number: u8) -> Epoch {
        for disk in ["system", "data"] {
            mark(&self.hosts.disk(disk), 7, number);
            mark(&self.hosts.disk(disk), 1000 + u64::from(number), number);
        }
        self.primary.cut().epoch
    }
}

/// Both disks of a test are as they were at the mark `number`.
fn check(test: &TestStatus, number: u8) {
    for file in &test.files {
        assert_eq!(marked(file, 7), number, "{}", file.display());
        assert_eq!(marked(file, 1000 + u64::from(number)), number);
        assert_eq!(marked(file, 1001 + u64::from(number)), 0);
    }
}

/// What `points` says about five points, for programs and for people.
fn check_listing(replica: &Node, cuts: &[Epoch]) {
    let listed = points(replica);
    let (latest, earlier) = listed.split_last().unwrap();
    assert_eq!(latest.point.epoch, cuts[4]);
    assert_eq!((latest.lost_ms, latest.lost_bytes), (0, 0));
    for point in earlier {
        assert!(point.lost_bytes > 0, "{point:?}");
    }
    assert!(listed.is_sorted_by_key(|point| point.point.epoch));
    let (code, table, _) = call(replica, &["points", MACHINE]);
    assert_eq!(code, 0);
    assert!(
        table.contains("crash-consistent") && table.contains("UTC"),
        "{table}"
    );
}

/// One test by its number, the rest at once; nothing is left.
fn clean_up(stage: &Stage, replica: &Node, [old, newest]: [&TestStatus; 2]) {
    let (code, out, err) = call(replica, &["cancel", MACHINE, "--test", "2"]);
    assert_eq!(code, 0, "{out}{err}");
    check(newest, 5);
    let (code, out, err) = call(replica, &["cancel", MACHINE]);
    assert_eq!(code, 0, "{out}{err}");
    assert!(
        out.contains("failover 1 ") && out.contains("failover 3 "),
        "{out}"
    );
    assert!(!old.files[0].exists());
    let tests = stage.hosts.path("store").join(MACHINE).join("tests");
    let left: Vec<_> = fs::read_dir(&tests).unwrap().collect();
    assert!(left.is_empty(), "{left:?}");
    let status = replica.machine();
    assert!(status.tests.is_empty());
    let last = status.last_test.unwrap();
    assert_eq!((last.number, last.result), (3, TestResult::Ended));
    assert_eq!(last.point.epoch, newest.point.epoch);
    assert!(last.ended.is_some());
    let (code, said, _) = call(replica, &["status", MACHINE]);
    assert!(code == 0 && said.contains("last test"), "{said}");
}

#[test]
fn points_are_tested_side_by_side_while_epochs_arrive() {
    if !can_mount() {
        return;
    }
    let hosts = Hosts::new();
    let replica = hosts.replica(&["--keep", "30"]);
    let stage = Stage::new(hosts);
    let cuts: Vec<Epoch> = (1..=5).map(|number| stage.epoch(number)).collect();

    check_listing(&replica, &cuts);

    // Three at once, two of them of the same point.
    let old = start(&replica, Some(cuts[1]));
    let twin = start(&replica, Some(cuts[1]));
    let newest = start(&replica, None);
    assert_eq!([old.number, twin.number, newest.number], [1, 2, 3]);
    for test in [&old, &twin] {
        let text = test.files[0].to_str().unwrap();
        let place = format!("point-{}-test-{}/vm/system.raw", cuts[1], test.number);
        assert!(text.ends_with(&place), "{text}");
        check(test, 2);
    }
    check(&newest, 5);
    mark(&old.files[0], 7, 201);
    mark(&old.files[1], 9, 202);
    let file = open_direct(&old.files[0], OFlag::empty()).unwrap();
    let mode = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    fallocate(&file, mode, 1002 * 4096, 4096).unwrap();
    drop(file);
    assert_eq!(marked(&old.files[0], 7), 201);
    assert_eq!(marked(&old.files[0], 1002), 0, "discarded");
    check(&twin, 2);
    check(&newest, 5);

    // Replication goes on, and what was tested does not change.
    for number in 6..=9 {
        stage.epoch(number);
    }
    assert_eq!(points(&replica).last().unwrap().lost_bytes, 0);
    check(&twin, 2);
    check(&newest, 5);
    let status = replica.machine();
    assert_eq!(status.tests.len(), 3);
    assert!(status.tests[0].written >= 2 * 4096, "{:?}", status.tests[0]);
    let used: Vec<_> = points(&replica)
        .into_iter()
        .filter(|point| point.point.epoch == cuts[1])
        .map(|point| point.tests)
        .collect();
    assert_eq!(used, [[1, 2]]);

    clean_up(&stage, &replica, [&old, &newest]);
    stage.primary.stop();
    replica.stop();
    // The tests left no trace in the images either.
    let replica = stage.hosts.replica(&[]);
    replica.merged();
    replica.stop();
    let copies = [
        stage.hosts.replica_image("system", Format::Vhdx),
        stage.hosts.replica_image("data", Format::Raw),
    ];
    for (image, copy) in stage.images.iter().zip(&copies) {
        assert_identical(image, copy);
    }
}

/// With little retention merges go right up to the point that is being looked at, and not beyond.
#[test]
fn a_view_stays_right_while_merges_run_below_it() {
    if !can_mount() {
        return;
    }
    let hosts = Hosts::new();
    let replica = hosts.replica(&["--keep", "3"]);
    let stage = Stage::new(hosts);
    for number in 1..=4 {
        stage.epoch(number);
    }
    let test = start(&replica, None);
    check(&test, 4);
    for number in 5..=14 {
        stage.epoch(number);
        check(&test, 4);
    }
    replica.wait("a merge up to the point in use", |machine| {
        machine.base_epoch == Some(test.point.epoch)
    });
    check(&test, 4);
    assert_eq!(call(&replica, &["cancel", MACHINE]).0, 0);
    let latest = stage.primary.machine().durable.unwrap().epoch;
    replica.wait("a merge beyond it", |machine| {
        let base = machine.base_epoch.unwrap();
        base > test.point.epoch && base < latest
    });
    let test = start(&replica, None);
    check(&test, 14);
    stage.primary.stop();
    replica.stop();
}

#[test]
fn what_was_written_in_a_test_survives_the_death_and_the_stop_of_the_node() {
    if !can_mount() {
        return;
    }
    let hosts = Hosts::new();
    let mut replica = hosts.replica(&["--keep", "30"]);
    let stage = Stage::new(hosts);
    let chosen = stage.epoch(1);
    stage.epoch(2);
    let test = start(&replica, Some(chosen));
    mark(&test.files[0], 7, 99);
    mark(&test.files[1], 50, 98);
    let mut files = test.files.clone();
    for (round, killed) in [(3, true), (4, false), (5, true)] {
        if killed {
            replica.kill();
        } else {
            replica.stop();
        }
        replica = stage.hosts.replica(&["--keep", "0"]);
        let back = replica.machine().tests;
        assert_eq!(back.len(), 1, "brought back");
        assert_eq!((back[0].number, &back[0].files), (1, &files));
        assert_eq!(back[0].point, test.point);
        stage.epoch(round);
        files.clone_from(&back[0].files);
        assert_eq!(marked(&files[0], 7), 99);
        assert_eq!(marked(&files[0], 1001), 1);
        assert_eq!(marked(&files[0], 1002), 0, "a later epoch");
        assert_eq!(marked(&files[1], 50), 98);
        mark(&files[1], 60 + u64::from(round), round);
    }
    for round in 3..=5 {
        assert_eq!(marked(&files[1], 60 + u64::from(round)), round);
    }
    // Of a test that is over nothing comes back.
    assert_eq!(call(&replica, &["cancel", MACHINE]).0, 0);
    replica.kill();
    let replica = stage.hosts.replica(&[]);
    assert!(replica.machine().tests.is_empty());
    assert!(!files[0].exists());
    let last = replica.machine().last_test.unwrap();
    assert_eq!((last.number, last.result), (1, TestResult::Ended));
    stage.primary.cut();
    replica.merged();
    stage.primary.stop();
    replica.stop();
}

#[test]
fn a_test_in_use_is_not_taken_away_unless_asked_to() {
    if !can_mount() {
        return;
    }
    let hosts = Hosts::new();
    let places = hosts.path("places");
    let replica = hosts.replica(&["--keep", "9", "--tests", places.to_str().unwrap()]);
    let stage = Stage::new(hosts);
    stage.epoch(1);
    let (idle, used) = (start(&replica, None), start(&replica, None));
    assert!(used.files[0].starts_with(&places), "{used:?}");
    let open = fs::File::options()
        .write(true)
        .open(&used.files[0])
        .unwrap();
    let (code, _, said) = call(&replica, &["cancel", MACHINE]);
    assert_eq!(code, 3, "{said}");
    let me = format!("(process {})", std::process::id());
    for word in [&me, "test failover 2", "ended: [1]", "--force"] {
        assert!(said.contains(word), "{word} is not in: {said}");
    }
    assert!(!idle.files[0].exists(), "the other one went");
    check(&used, 1);
    open.write_all_at(&[5; 512], 0).unwrap();
    let (code, out, said) = call(&replica, &["cancel", MACHINE, "--force"]);
    assert_eq!(code, 0, "{out}{said}");
    assert!(
        open.write_all_at(&[6; 512], 0).is_err(),
        "nobody writes there any more"
    );
    assert!(!used.files[0].exists());
    stage.epoch(2);
    stage.primary.stop();
    replica.stop();
}

#[test]
fn what_cannot_be_tested_is_refused_and_leaves_nothing() {
    if !can_mount() {
        return;
    }
    let hosts = Hosts::new();
    let replica = hosts.replica(&[]);
    let (code, _, said) = call(&replica, &["failover", "nobody", "--test"]);
    assert_eq!(code, 3, "{said}");
    assert!(said.contains("nobody"), "{said}");
    let stage = Stage::new(hosts);
    stage.epoch(1);
    for args in [
        &["failover", MACHINE, "--test", "--point", "999999"][..],
        &["cancel", MACHINE],
        &["cancel", MACHINE, "--test", "7"],
        &["points", "nobody"],
    ] {
        let (code, _, said) = call(&replica, args);
        assert_eq!(code, 3, "{args:?}: {said}");
    }
    for args in [
        &["failover", MACHINE][..],
        &["failover", MACHINE, "--test", "--point", "yesterday"],
    ] {
        assert_eq!(call(&replica, args).0, 2, "{args:?}");
    }
    // A primary keeps no recovery points.
    let (code, _, said) = call(&stage.primary, &["points", MACHINE]);
    assert_eq!(code, 3, "{said}");

    // Something lies where the disks would be shown: a failed test is a failure, and is remembered as one.
    let point = points(&replica).last().unwrap().point.epoch;
    let at = stage
        .hosts
        .path("store")
        .join(MACHINE)
        .join(format!("tests/point-{point}-test-1"));
    fs::create_dir_all(at.join("something")).unwrap();
    let (code, _, said) = call(
        &replica,
        &["failover", MACHINE, "--test", "--point", &point.to_string()],
    );
    assert_eq!(code, 1, "{said}");
    assert!(said.contains("not empty"), "{said}");
    let last = replica.machine().last_test.unwrap();
    assert!(matches!(last.result, TestResult::Failed(why) if why.contains("not empty")));
    let test = start(&replica, Some(point));
    assert_eq!(test.number, 2);
    check(&test, 1);
    assert_eq!(call(&replica, &["cancel", MACHINE]).0, 0);
    stage.primary.stop();
    replica.stop();
}

/// A file system that was in use at the cut is repaired by its own journal and checks clean.
#[test]
fn a_file_system_in_a_test_checks_clean() {
    if !can_mount() || !have(&["mkfs.ext4", "e2fsck"]) {
        return;
    }
    let hosts = Hosts::new();
    let replica = hosts.replica(&["--keep", "5"]);
    let stage = Stage::new(hosts);
    let disk = stage.hosts.disk("system");
    must("mkfs.ext4", ["-q", "-F", disk.to_str().unwrap()]);
    stage.primary.cut();
    let test = start(&replica, None);
    let file = test.files[0].to_str().unwrap();
    must("e2fsck", ["-f", "-y", file]);
    must("e2fsck", ["-f", "-n", file]);
    assert_eq!(call(&replica, &["cancel", MACHINE]).0, 0);
    stage.primary.stop();
    replica.stop();
}
