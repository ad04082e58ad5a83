//! A whole guest changes hosts with its disk: what it fsynced on one is there on the other, it writes on, and beside it
//! a second one starts from a test failover.

use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, umount2};
use understudy::node::status::TestStatus;

use super::{
    roles::{Pair, check, planned, write},
    tests::{call, parsed},
};
use crate::support::{MACHINE, can_mount, guest_lab, have, must};

/// Names and hashes of the files that a guest found and wrote, as it said.
type Found = Vec<(String, String)>;

/// Starts a guest on a disk and waits until it has shut down.
fn boot(lab: &Path, mode: &str, disk: &Path) -> Found {
    let lab = lab.to_str().unwrap();
    let said = must(lab, ["--mode", mode, disk.to_str().unwrap()]);
    let files = said
        .lines()
        .filter_map(|line| line.strip_prefix("GUEST file "));
    let pair = |line: &str| {
        let (name, sum) = line.split_once(' ').unwrap();
        (name.to_owned(), sum.to_owned())
    };
    files.map(pair).collect()
}

/// The ext4 on a disk, mounted for reading. Dropping it unmounts.
struct FileSystem(PathBuf);

impl FileSystem {
    fn mount(disk: &Path, at: PathBuf) -> Self {
        std::fs::create_dir(&at).unwrap();
        let options = ["-o".as_ref(), "loop,ro".as_ref()];
        must(
            "mount",
            [&options[..], &[disk.as_os_str(), at.as_os_str()]].concat(),
        );
        Self(at)
    }
}

impl Drop for FileSystem {
    fn drop(&mut self) {
        if umount2(&self.0, MntFlags::empty()).is_err() {
            let _ = umount2(&self.0, MntFlags::MNT_DETACH);
        }
    }
}

#[test]
fn a_guest_goes_on_where_its_machine_went() {
    if !can_mount() || !have(&["mkfs.ext4", "e2fsck", "mount", "sha256sum"]) {
        return;
    }
    let Some(lab) = guest_lab() else {
        return;
    };
    let (pair, alpha, beta) = Pair::replicating();
    let (here, there) = (pair.on_alpha(), pair.on_beta());
    must("mkfs.ext4", ["-q".as_ref(), here[0].as_os_str()]);

    let first = boot(&lab, "ext4", &here[0]);
    assert_eq!(first.len(), 5, "{first:?}");
    planned(&alpha);
    beta.wait_replicating();
    // The guest itself compares what it finds with the hashes it wrote on the other host.
    let second = boot(&lab, "more", &there[0]);
    assert_eq!(second.len(), 8, "{second:?}");
    assert_eq!(second[..5], first);

    // The other way round by now: a second guest on a test failover, while the machine is written and replicated.
    beta.cut();
    let test: TestStatus = parsed(&alpha, &["failover", MACHINE, "--test"]);
    let guest = std::thread::spawn({
        let (lab, disk) = (lab.clone(), test.files[0].clone());
        move || boot(&lab, "more", &disk)
    });
    let data = [there[1].clone()];
    for number in 1..=5 {
        write(&data, number);
        beta.cut();
    }
    let tested = guest.join().unwrap();
    assert_eq!(tested.len(), 11, "{tested:?}");
    assert_eq!(tested[..8], second);
    assert_eq!(call(&alpha, &["cancel", MACHINE]).0, 0);

    // Home again, with everything but what the test wrote.
    beta.wait("the failover folded", |m| m.reasons.is_empty());
    planned(&beta);
    alpha.wait_replicating();
    check(&[here[1].clone()], 5);
    must("e2fsck", ["-fn".as_ref(), here[0].as_os_str()]);
    let files = FileSystem::mount(&here[0], pair.hosts.path("look"));
    for (name, sum) in &second {
        let found = must("sha256sum", [files.0.join(name)]);
        assert!(
            found.starts_with(sum),
            "{name}: {found}, the guest said {sum}"
        );
    }
    assert!(!files.0.join(&tested[8].0).exists(), "of the test");
    drop(files);
    alpha.wait("the failover folded", |m| m.reasons.is_empty());
    pair.end(alpha, beta);
}
