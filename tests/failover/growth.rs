//! Disks that grow while their guest uses them: the replica follows, nothing is sent again, no request fails.

use std::{
    fs::{self, File},
    os::unix::fs::FileExt,
    path::Path,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use nix::fcntl::OFlag;
use understudy::{
    base::units::Epoch,
    coord::{role::Part, state::ReplicationState},
    node::{control::ResizeReport, status::TestStatus},
};

use super::{
    roles::{Pair, check, epoch, planned, refused, write},
    tests::{call, mark, marked, parsed, points, start},
};
use crate::support::{Aligned, BLOCK, MACHINE, Node, can_mount, open_direct};

const MIB: u64 = 1 << 20;

fn resize(node: &Node, disk: &str, size: &str) -> ResizeReport {
    parsed(node, &["resize", MACHINE, disk, size])
}

/// The kernel believes the old size for a second.
fn wait_for_size(file: &Path, size: u64) {
    let began = Instant::now();
    while fs::metadata(file).unwrap().len() != size {
        assert!(began.elapsed() < Duration::from_mins(1), "no new size");
        thread::sleep(Duration::from_millis(20));
    }
}

/// Writes one block again and again through a handle that stays open, until it is told to end; how often.
fn busy_guest(disk: &File, end: &AtomicBool) -> u8 {
    let mut bytes = Aligned::new(BLOCK);
    let mut number: u8 = 0;
    while !end.load(Ordering::Acquire) {
        number = number % 250 + 1;
        bytes.get_mut().fill(number);
        disk.write_all_at(bytes.get(), 3000 * 4096).unwrap();
        if number.is_multiple_of(16) {
            disk.sync_data().unwrap();
        }
    }
    number
}

/// Tells the guest to end, also if the test fails: it is waited for.
struct EndOnDrop<'a>(&'a AtomicBool);

impl Drop for EndOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}

/// A point from before the growth has the new size, and zeros behind the old end.
fn older_point(beta: &Node, point: Epoch) {
    let test = start(beta, Some(point));
    assert_eq!(fs::metadata(&test.files[0]).unwrap().len(), 160 * MIB);
    check(&test.files, 1);
    assert_eq!(marked(&test.files[0], 30_000), 0);
    // What is new can be written in a test as well.
    mark(&test.files[0], 30_000, 9);
    assert_eq!(call(beta, &["cancel", MACHINE]).0, 0);
}

#[test]
fn disks_grow_under_a_guest_and_the_replica_follows() {
    if !can_mount() {
        return;
    }
    let (pair, alpha, beta) = Pair::replicating();
    let (here, there) = (pair.on_alpha(), pair.on_beta());
    let first = epoch(&alpha, &here, 1);
    let test: TestStatus = start(&beta, None);

    let guest = open_direct(&here[0], OFlag::empty()).unwrap();
    let end = AtomicBool::new(false);
    let last = thread::scope(|scope| {
        let busy = scope.spawn(|| busy_guest(&guest, &end));
        let ending = EndOnDrop(&end);
        let report = resize(&alpha, "system", "160M");
        assert_eq!((report.before, report.size), (96 * MIB, 160 * MIB));
        resize(&alpha, "data", "64M");
        drop(ending);
        busy.join().unwrap()
    });
    wait_for_size(&here[0], 160 * MIB);
    wait_for_size(&here[1], 64 * MIB);
    assert_eq!(marked(&here[0], 3000), last);
    mark(&here[0], 30_000, 7);
    mark(&here[1], 12_000, 7);

    // What somebody looks at does not change its size; the guest goes on meanwhile, and so does what it is owed.
    alpha.wait("the reason why the replica waits", |m| {
        m.reasons.iter().any(|why| why.contains("in use"))
    });
    assert_eq!(marked(&test.files[0], 7), 1);
    assert_eq!(call(&beta, &["cancel", MACHINE]).0, 0);
    alpha.wait_replicating();
    epoch(&alpha, &here, 2);
    let sent = alpha.machine().traffic.sent;
    assert!(sent < 512 << 10, "changes and nothing else: {sent}");
    older_point(&beta, first);
    assert!(points(&beta).len() >= 2);
    drop(guest);

    // The new size outlives the host, and so does what was written there.
    alpha.kill();
    let alpha = pair.alpha();
    alpha.wait_replicating();
    assert_eq!(marked(&here[0], 30_000), 7);
    assert!(alpha.machine().reasons.is_empty());

    // And it goes along.
    planned(&alpha);
    beta.wait_replicating();
    check(&there, 2);
    assert_eq!(marked(&there[0], 30_000), 7);
    assert_eq!(marked(&there[1], 12_000), 7);
    alpha.wait("a replica", |m| m.state == ReplicationState::Replicating);
    beta.wait("the failover folded", |m| m.reasons.is_empty());
    resize(&beta, "data", "96M");
    wait_for_size(&there[1], 96 * MIB);
    mark(&there[1], 20_000, 8);
    beta.wait_replicating();
    epoch(&beta, &there, 3);
    planned(&beta);
    alpha.wait_replicating();
    check(&here, 3);
    assert_eq!(marked(&here[1], 20_000), 8);
    beta.wait("a replica", |m| m.state == ReplicationState::Replicating);
    alpha.wait("the failover folded", |m| m.reasons.is_empty());
    pair.end(alpha, beta);
}

#[test]
fn what_cannot_be_a_larger_disk_is_refused_and_changes_nothing() {
    if !can_mount() {
        return;
    }
    let (pair, alpha, beta) = Pair::replicating();
    let here = pair.on_alpha();
    let try_resize = |node, disk, size, why| {
        refused(node, &["resize", MACHINE, disk, size], why);
    };
    try_resize(&alpha, "system", "96M", "only grows");
    try_resize(&alpha, "system", "95M", "image resize");
    try_resize(&alpha, "system", "98765432", "multiple of 512");
    try_resize(&alpha, "system", "128T", "at most");
    try_resize(&alpha, "swap", "200M", "no disk called swap");
    try_resize(&beta, "system", "200M", "resized on the primary");
    epoch(&alpha, &here, 1);
    assert_eq!(alpha.machine().part, Some(Part::Primary));
    write(&here, 2);
    check(&here, 2);
    alpha.cut();
    pair.end(alpha, beta);
}
