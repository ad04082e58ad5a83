//! What an operator lets a machine send, and when.

use nix::fcntl::OFlag;

use crate::support::{Hosts, Ledger, assert_identical, can_mount, open_direct};
use understudy::disk::image::Format;

const MIB: u64 = 1 << 20;

/// The guest writes and flushes as if there were no limit, the link carries what the limit allows, and a node that waits
/// for its next byte stops at once. Without the limit everything is there.
#[test]
fn a_limit_holds_the_link_and_never_the_guest() {
    if !can_mount() {
        return;
    }
    let hosts = Hosts::new();
    let image = hosts.image("disk.raw", 64);
    let replica = hosts.replica(&[]);
    let mut ledger = Ledger::new(64 * MIB, 11);
    let primary = hosts.primary(&[&image], &["--bandwidth", "64K", "--compression", "none"]);
    let file = open_direct(&hosts.disk("disk"), OFlag::empty()).unwrap();
    for start in (0..4096).step_by(16) {
        ledger.write(&file, start, 16).unwrap();
    }
    file.sync_all().unwrap();
    drop(file);
    let limited = primary.wait("bytes on a limited link", |machine| {
        machine.traffic.limit == Some(64 << 10) && machine.traffic.rate > 0
    });
    // Counted over two seconds, with a burst and with what was let go just before and counted within.
    let rate = limited.traffic.rate;
    assert!(rate <= (64 << 10) + 2 * (16 << 10) / 2, "{rate}");
    assert!(limited.traffic.owed > 0, "{limited:?}");
    primary.stop();
    let primary = hosts.primary(&[&image], &[]);
    let lineage = primary.cut();
    assert_eq!(primary.machine().traffic.limit, None);
    assert_eq!(replica.merged().durable, Some(lineage));
    primary.stop();
    replica.stop();
    assert_identical(&image, &hosts.replica_image("disk", Format::Raw));
}
