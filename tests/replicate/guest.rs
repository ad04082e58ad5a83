//! A whole guest on a replicated disk: what it fsynced is found in the replica's file system.

use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, umount2};
use understudy::disk::image::Format;

use crate::support::{Hosts, assert_identical, can_mount, guest_lab, have, must};

struct Looking(PathBuf);

impl Looking {
    /// Mounts the file system in a raw image without replaying or writing anything.
    fn at(hosts: &Hosts, image: &Path) -> Self {
        let at = hosts.path("look");
        std::fs::create_dir(&at).unwrap();
        must(
            "mount",
            [
                "-o".as_ref(),
                "loop,ro".as_ref(),
                image.as_os_str(),
                at.as_os_str(),
            ],
        );
        Self(at)
    }
}

impl Drop for Looking {
    fn drop(&mut self) {
        if umount2(&self.0, MntFlags::empty()).is_err() {
            let _ = umount2(&self.0, MntFlags::MNT_DETACH);
        }
    }
}

#[test]
fn the_files_of_a_guest_arrive() {
    if !can_mount() || !have(&["mkfs.ext4", "e2fsck", "mount", "sha256sum"]) {
        return;
    }
    let Some(lab) = guest_lab() else {
        return;
    };
    let hosts = Hosts::new();
    let image = hosts.image("disk.vhdx", 64);
    let replica = hosts.replica(&["--format", "raw"]);
    let primary = hosts.primary(&[&image], &[]);
    primary.wait_replicating();
    let disk = hosts.disk("disk");
    must("mkfs.ext4", ["-q".as_ref(), disk.as_os_str()]);
    let said = must(
        lab.to_str().unwrap(),
        ["--mode", "ext4", "--aio", "native", disk.to_str().unwrap()],
    );
    let files: Vec<_> = said
        .lines()
        .filter_map(|line| line.strip_prefix("GUEST file "))
        .map(|line| line.split_once(' ').unwrap())
        .collect();
    assert_eq!(files.len(), 5, "{said}");
    let lineage = primary.cut();
    assert_eq!(replica.merged().durable, Some(lineage));
    primary.stop();
    replica.stop();
    let copy = hosts.replica_image("disk", Format::Raw);
    assert_identical(&image, &copy);
    must("e2fsck", ["-fn".as_ref(), copy.as_os_str()]);
    let looking = Looking::at(&hosts, &copy);
    for (name, sum) in files {
        let found = must("sha256sum", [looking.0.join(name)]);
        assert!(
            found.starts_with(sum),
            "{name}: {found}, the guest said {sum}"
        );
    }
}
