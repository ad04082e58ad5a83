//! A whole guest on a file of the mount: kernel, virtio-blk, QEMU with `cache=none`, shim, image.

use std::path::Path;

use crate::support::{Mounted, can_mount, guest_lab, have, must};

/// Boots the guest, which must be content, and returns the lines about files.
fn boot(lab: &Path, mounted: &Mounted, mode: &str, aio: &str) -> Vec<String> {
    let file = mounted.file().into_os_string().into_string().unwrap();
    let said = must(lab.to_str().unwrap(), ["--mode", mode, "--aio", aio, &file]);
    assert!(
        said.contains("cache=write-back"),
        "the guest knows that it must flush: {said}"
    );
    let lines = said.lines().filter(|line| line.starts_with("GUEST file "));
    lines.map(str::to_owned).collect()
}

#[test]
fn a_guest_reads_what_it_wrote() {
    if !can_mount() {
        return;
    }
    let Some(lab) = guest_lab() else {
        return;
    };
    let mounted = Mounted::new(64 << 20);
    boot(&lab, &mounted, "raw", "native");
    let latencies = mounted.mount.latencies();
    assert!(latencies.flush.count() > 0 && latencies.zero.bytes() >= 1 << 20);
    assert!(latencies.write.bytes() >= 12 << 20);
}

#[test]
fn a_file_system_survives_its_guest() {
    if !can_mount() || !have(&["mkfs.ext4", "e2fsck"]) {
        return;
    }
    let Some(lab) = guest_lab() else {
        return;
    };
    let mounted = Mounted::new(64 << 20);
    must("mkfs.ext4", ["-q".into(), mounted.file()]);
    let written = boot(&lab, &mounted, "ext4", "threads");
    assert_eq!(written.len(), 5, "{written:?}");
    assert_eq!(boot(&lab, &mounted, "keep", "native"), written);
    must("e2fsck", ["-fn".into(), mounted.image()]);
}
