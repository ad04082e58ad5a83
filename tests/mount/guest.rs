//! A whole guest on a file of the mount: kernel, virtio-blk, QEMU with `cache=none`, shim, image.

use std::path::{Path, PathBuf};

use crate::support::{Mounted, can_mount, have, must, run, skip};

/// The script that boots guests, if its downloads are there or are asked for.
fn guest_lab() -> Option<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let asked = std::env::var_os("UNDERSTUDY_GUEST_LAB").is_some_and(|value| value == "1");
    let cached = std::env::var_os("UNDERSTUDY_GUEST_CACHE")
        .map_or_else(|| root.join("target/guest-lab"), PathBuf::from)
        .join("ready")
        .is_file();
    if asked || cached {
        return Some(root.join("scripts/guest-lab"));
    }
    skip("no guest: run scripts/guest-lab once, or set UNDERSTUDY_GUEST_LAB=1");
    None
}

#[test]
fn a_guest_finds_what_it_wrote() {
    if !can_mount() || !have(&["mkfs.ext4", "e2fsck"]) {
        return;
    }
    let Some(lab) = guest_lab() else {
        return;
    };
    for (mode, aio) in [("raw", "native"), ("ext4", "threads")] {
        let mounted = Mounted::new(64 << 20);
        let file = mounted.file().into_os_string().into_string().unwrap();
        if mode == "ext4" {
            must("mkfs.ext4", ["-q".to_owned(), file.clone()]);
        }
        let guest = run(lab.to_str().unwrap(), ["--mode", mode, "--aio", aio, &file]);
        let said = String::from_utf8_lossy(&guest.stdout);
        assert!(
            guest.status.success(),
            "{mode}: {said}{}",
            String::from_utf8_lossy(&guest.stderr)
        );
        assert!(
            mounted.mount.latencies().flush.count() > 0,
            "{mode}: the guest's flushes arrive"
        );
        if mode == "ext4" {
            assert_eq!(said.matches("GUEST file ").count(), 5, "{said}");
            must("e2fsck", ["-fn".into(), mounted.image()]);
        }
    }
}
