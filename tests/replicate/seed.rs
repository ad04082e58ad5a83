//! A replica that begins with an old copy of the images: it is compared, and what differs is sent.

use std::{fs, path::PathBuf};

use understudy::{coord::state::ReplicationState, disk::image::Format};

use super::resync::{end, flip, full_image};
use crate::support::{Hosts, Ledger, Load, MACHINE, can_mount};

const MIB: u64 = 1 << 20;

/// The place of a replica's image.
fn seed(hosts: &Hosts) -> PathBuf {
    let folder = hosts.path("store").join(MACHINE);
    fs::create_dir_all(&folder).unwrap();
    folder.join("disk.raw")
}

#[test]
fn an_old_copy_is_compared_and_brought_up_to_date() {
    if !can_mount() {
        return;
    }
    let hosts = Hosts::new();
    let image = full_image(&hosts, 64);
    let copy = seed(&hosts);
    fs::copy(&image, &copy).unwrap();
    flip(&copy, &[4, 9000, 9001]);
    let replica = hosts.replica(&["--seed"]);
    let primary = hosts.primary(&[&image], &[]);
    let load = Load::start(hosts.disk("disk"), Ledger::new(MIB, 61));
    primary.wait_replicating();
    let status = primary.machine();
    let resync = status.resync.unwrap();
    assert!(
        !resync.running && resync.reason.contains("knows nothing of"),
        "{resync:?}"
    );
    assert!(resync.compared >= 63 * MIB, "{resync:?}");
    assert!(
        resync.differing >= 2 * 4096 && resync.differing <= MIB + 8192,
        "{resync:?}"
    );
    assert!(status.traffic.raw < 16 * MIB, "{:?}", status.traffic);
    load.finish();
    end(&hosts, &image, primary, replica);
}

/// Images that nobody offered as a seed are nobody's to write, and a seed of another size is no copy.
#[test]
fn images_that_are_no_seed_are_refused_and_left_alone() {
    if !can_mount() {
        return;
    }
    for (more, mib, why) in [
        (&[][..], 64, "already exists"),
        (&["--seed"], 32, "its disk has"),
    ] {
        let hosts = Hosts::new();
        let image = full_image(&hosts, 64);
        let copy = seed(&hosts);
        let other = vec![7; usize::try_from(mib * MIB).unwrap()];
        fs::write(&copy, &other).unwrap();
        let replica = hosts.replica(more);
        let primary = hosts.primary(&[&image], &[]);
        let refused = primary.wait("a refusal", |m| m.state == ReplicationState::Error);
        let reasons = refused.reasons.join(" ");
        assert!(reasons.to_lowercase().contains(why), "{reasons}");
        primary.stop();
        replica.stop();
        assert_eq!(hosts.replica_image("disk", Format::Raw), copy);
        assert!(fs::read(&copy).unwrap() == other);
    }
}
