//! Running nodes: what a second one may not have, who is let in, what `status` shows.

use std::{
    fs::{self, File},
    os::unix::fs::FileExt,
};

use understudy::{
    base::{
        clock::{Clock, SystemClock},
        ids::Name,
    },
    coord::state::{Health, ReplicationState},
    disk::image::Format,
    net::pki,
    node::status::NodeStatus,
};

use super::{assert_said, understudy};
use crate::support::{Hosts, assert_identical, can_mount};

#[test]
fn what_one_node_uses_no_other_gets() {
    if !can_mount() {
        return;
    }
    let hosts = Hosts::new();
    let image = hosts.image("disk.vhdx", 64);
    let replica = hosts.replica(&[]);
    let primary = hosts.primary(&[&image], &[]);
    primary.wait_replicating();

    let elsewhere = hosts.path("elsewhere");
    fs::create_dir(&elsewhere).unwrap();
    let (image_text, at) = (image.to_str().unwrap(), elsewhere.to_str().unwrap());
    for more in [&[][..], &["--read-only"]] {
        let called = understudy(&[&["mount", image_text, "--at", at], more].concat());
        assert_eq!(called.code, 1, "{}", called.err);
        assert_said(&called.err, &["disk.vhdx", "in use"]);
    }
    let mut taken = hosts.primary_command(&[&hosts.image("other.raw", 1)], &[]);
    taken.rename("taken");
    let (code, said) = taken.fails();
    assert_eq!(code, 1, "{said}");
    assert_said(&said, &["in use"]);

    let mut same_store = hosts.replica_command(&hosts.path("store"), &[]);
    same_store.rename("same-store");
    let (code, said) = same_store.fails();
    assert_eq!(code, 1, "{said}");
    assert_said(&said, &["store", "in use"]);
    let mut same_port = hosts.replica_command(&hosts.path("store-2"), &[]);
    same_port.rename("same-port");
    let (code, said) = same_port.fails();
    assert_eq!(code, 1, "{said}");
    assert_said(&said, &["port", "in use"]);
    let (code, said) = hosts.primary_command(&[&image], &[]).fails();
    assert_eq!(code, 1, "{said}");
    assert_said(&said, &["control socket"]);

    primary.cut();
    primary.stop();
    replica.stop();
}

#[test]
fn status_is_for_people_and_for_programs() {
    if !can_mount() {
        return;
    }
    let hosts = Hosts::new();
    let image = hosts.image("disk.vhdx", 64);
    let replica = hosts.replica(&[]);
    let primary = hosts.primary(&[&image], &[]);
    primary.wait_replicating();
    let lineage = primary.cut();
    for node in [&primary, &replica] {
        let socket = node.socket().to_str().unwrap();
        let json = understudy(&["status", "vm", "--json", "--control", socket]);
        assert_eq!((json.code, json.err.as_str()), (0, ""));
        let nodes: Vec<NodeStatus> = serde_json::from_str(&json.out).unwrap();
        assert_eq!(nodes[0].machines[0].durable, Some(lineage));
        let text = understudy(&["status", "--control", socket]);
        assert_eq!(text.code, 0);
        for word in [
            "Replicating",
            "durable epoch",
            "RPO",
            "on the wire",
            "disk.vhdx",
        ] {
            assert!(text.out.contains(word), "{word}: {}", text.out);
        }
        let unknown = understudy(&["status", "unknown", "--control", socket]);
        assert_eq!(unknown.code, 3);
        assert_said(&unknown.err, &["unknown"]);
    }
    primary.stop();
    replica.stop();
}

#[test]
fn hosts_that_do_not_trust_each_other_say_what_to_do() {
    if !can_mount() {
        return;
    }
    let hosts = Hosts::new();
    let image = hosts.image("disk.raw", 16);
    let replica = hosts.replica(&[]);
    let now = SystemClock::default().wall();
    pki::init(&hosts.path("foreign-ca"), now).unwrap();
    let (foreign, name) = (hosts.path("foreign"), Name::new("alpha").unwrap());
    pki::issue(&hosts.path("foreign-ca"), &name, &[], &foreign, now).unwrap();
    hosts.issue("gamma");
    for (identity, words) in [("foreign", "ca.crt"), ("gamma", "gamma")] {
        let identity = hosts.path(identity).to_str().unwrap().to_owned();
        let primary = hosts.primary_as(&identity, &[&image], &[]);
        let refused = primary.wait("a refusal", |m| m.state == ReplicationState::Error);
        assert_eq!(refused.health, Health::Critical);
        let reasons = refused.reasons.join(" ");
        assert!(reasons.contains(words), "{reasons}");
        primary.stop();
    }
    assert!(replica.status().machines.is_empty(), "nothing was begun");
    replica.stop();
}

#[test]
fn an_identity_that_is_none_is_named() {
    if !can_mount() {
        return;
    }
    let hosts = Hosts::new();
    let image = hosts.image("disk.raw", 16);
    let nowhere = hosts.path("nowhere").to_str().unwrap().to_owned();
    let (code, said) = hosts.primary_command_as(&nowhere, &[&image], &[]).fails();
    assert_eq!(code, 1, "{said}");
    assert_said(&said, &["nowhere", "pki issue"]);
    assert!(!hosts.path("state").exists(), "nothing was begun");
}

#[test]
fn a_stop_waits_for_the_guest_and_a_second_one_does_not() {
    if !can_mount() {
        return;
    }
    let hosts = Hosts::new();
    let image = hosts.image("disk.raw", 16);
    let replica = hosts.replica(&[]);
    let primary = hosts.primary(&[&image], &[]);
    primary.wait_replicating();
    let guest = File::options()
        .write(true)
        .open(hosts.disk("disk"))
        .unwrap();
    primary.ask_to_stop();
    primary.wait_logged("signal again to detach");
    guest.write_all_at(&[7; 512], 0).unwrap();
    // A guest that takes its time to shut down is replicated to the end.
    let lineage = primary.cut();
    assert_eq!(replica.merged().durable, Some(lineage));
    primary.stop();
    assert!(guest.write_at(&[8; 512], 0).is_err());
    assert_eq!(fs::read(&image).unwrap()[..512], [7; 512]);
    drop(guest);
    let primary = hosts.primary(&[&image], &[]);
    let lineage = primary.cut();
    assert_eq!(replica.merged().durable, Some(lineage));
    primary.stop();
    replica.stop();
    assert_identical(&image, &hosts.replica_image("disk", Format::Raw));
}

#[test]
fn disks_that_changed_are_refused() {
    if !can_mount() {
        return;
    }
    let hosts = Hosts::new();
    let (first, second) = (hosts.image("a.raw", 16), hosts.image("b.raw", 16));
    let replica = hosts.replica(&[]);
    let primary = hosts.primary(&[&first], &[]);
    let lineage = primary.cut();
    replica.merged();
    primary.stop();
    // A disk more, and a disk that shrank: said clearly, and the replica stays what it was.
    for change in [&[&first, &second][..], &[&first]] {
        if change.len() == 1 {
            fs::OpenOptions::new()
                .write(true)
                .open(&first)
                .unwrap()
                .set_len(8 << 20)
                .unwrap();
        }
        let images: Vec<_> = change.iter().map(|path| path.as_path()).collect();
        let primary = hosts.primary(&images, &[]);
        let refused = primary.wait("a refusal", |m| m.state == ReplicationState::Error);
        assert_eq!(refused.health, Health::Critical);
        let reasons = refused.reasons.join(" ");
        assert!(
            reasons.contains("remove the replica and make a new one"),
            "{reasons}"
        );
        // The guest goes on all the same.
        let guest = File::options().write(true).open(hosts.disk("a")).unwrap();
        guest.write_all_at(&[7; 4096], 0).unwrap();
        drop(guest);
        primary.stop();
        assert_eq!(fs::read(&first).unwrap()[..4096], [7; 4096]);
    }
    assert_eq!(replica.machine().durable, Some(lineage));
    replica.stop();
}
