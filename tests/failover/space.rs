//! A replica without space: points give way, then changes are refused, and the guest on the primary notices nothing.

use std::{fs::File, os::unix::fs::FileExt};

use nix::fcntl::OFlag;
use understudy::{coord::state::Health, disk::image::Format, replica::Squeeze};

use super::tests::{call, start};
use crate::support::{Aligned, Hosts, MACHINE, Node, assert_identical, can_mount, open_direct};

const MIB: u64 = 1 << 20;

/// Writes a mebibyte that nothing packs, at mebibyte `number`.
fn write(file: &File, number: u64) {
    let mut bytes = Aligned::new(1 << 20);
    let mut state = number + 1;
    for word in bytes.get_mut().as_chunks_mut::<8>().0 {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        *word = state.to_le_bytes();
    }
    file.write_all_at(bytes.get(), number * MIB).unwrap();
}

fn squeeze(replica: &Node) -> Squeeze {
    replica.machine().recovery.unwrap().squeeze
}

#[test]
fn without_space_points_give_way_then_changes_and_never_the_guest() {
    if !can_mount() {
        return;
    }
    let hosts = Hosts::new();
    let image = hosts.image("disk.raw", 64);
    let replica = hosts.replica(&["--keep", "50", "--space-max", "8M"]);
    let primary = hosts.primary(&[&image], &["--interval", "15m", "--compression", "none"]);
    primary.wait_replicating();
    let file = open_direct(&hosts.disk("disk"), OFlag::O_DSYNC).unwrap();
    for number in 0..8 {
        write(&file, number);
        primary.cut();
    }
    replica.wait("points that were dropped for space", |machine| {
        machine.recovery.unwrap().squeeze == Squeeze::AllButOne
            && machine.health == Health::Warning
            && machine
                .reasons
                .iter()
                .any(|why| why.contains("space is short"))
    });

    // A test holds its point, and with it everything after it.
    let test = start(&replica, None);
    let mut number = 8;
    while squeeze(&replica) != Squeeze::Refusing {
        write(&file, number);
        number += 1;
        assert!(number < 64, "nothing is ever refused");
        if primary.try_cut().is_err() {
            break;
        }
    }
    replica.wait("the refusal in its status", |machine| {
        machine.health == Health::Critical
            && machine.reasons.iter().any(|why| why.contains("space"))
    });
    let used = replica.machine().recovery.unwrap();
    assert!(used.log_bytes <= 8 * MIB, "{used:?}");
    for more in 0..4 {
        write(&file, number + more);
    }

    // The point is let go of, and what was only marked until now arrives.
    drop(file);
    let (code, _, said) = call(&replica, &["cancel", MACHINE]);
    assert_eq!(code, 0, "{said}");
    assert!(!test.files[0].exists());
    primary.cut();
    assert_ne!(squeeze(&replica), Squeeze::Refusing);
    primary.stop();
    replica.stop();
    let replica = hosts.replica(&[]);
    replica.merged();
    replica.stop();
    assert_identical(&image, &hosts.replica_image("disk", Format::Raw));
}
