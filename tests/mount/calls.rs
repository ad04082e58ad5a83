//! System calls on a file of the mount: what each does and which error it gives.

use std::{
    fs::{self, OpenOptions},
    io,
    os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt},
};

use nix::{
    errno::Errno,
    fcntl::{FallocateFlags, OFlag, fallocate},
    sys::statvfs::statvfs,
    unistd::{Whence, lseek64},
};
use understudy::shim::{FileIndex, Refusal, Writability};

use crate::support::{Mounted, can_mount};

const MIB: u64 = 1 << 20;

fn open(mounted: &Mounted, flags: OFlag) -> fs::File {
    OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(flags.bits())
        .open(mounted.file())
        .unwrap()
}

/// The error of a call that failed.
fn errno(result: io::Result<impl Sized>) -> Option<Errno> {
    result.err()?.raw_os_error().map(Errno::from_raw)
}

#[test]
fn a_file_has_the_size_of_its_disk_and_keeps_it() {
    if !can_mount() {
        return;
    }
    let mounted = Mounted::new(8 * MIB);
    let meta = fs::metadata(mounted.file()).unwrap();
    assert_eq!(
        (meta.len(), meta.blksize(), meta.mode() & 0o777),
        (8 * MIB, 4096, 0o600)
    );
    let file = open(&mounted, OFlag::empty());
    file.set_len(8 * MIB).unwrap();
    for len in [0, 8 * MIB - 512, 8 * MIB + 512] {
        assert_eq!(errno(file.set_len(len)), Some(Errno::EPERM), "{len}");
    }
    let truncated = OpenOptions::new()
        .write(true)
        .truncate(true)
        .open(mounted.file());
    assert_eq!(errno(truncated), Some(Errno::EPERM));
    file.set_modified(std::time::SystemTime::UNIX_EPOCH)
        .unwrap();
    assert_eq!(fs::metadata(mounted.file()).unwrap().len(), 8 * MIB);
    let usage = statvfs(mounted.mount.dir()).unwrap();
    assert_eq!(
        (usage.block_size(), usage.blocks(), usage.blocks_free()),
        (4096, 2048, 0)
    );
}

#[test]
fn files_cannot_be_made_removed_or_renamed() {
    if !can_mount() {
        return;
    }
    let mounted = Mounted::new(MIB);
    let dir = mounted.mount.dir();
    let refused = Some(Errno::EPERM);
    assert_eq!(errno(fs::write(dir.join("new"), "")), refused);
    assert_eq!(errno(fs::create_dir(dir.join("new"))), refused);
    assert_eq!(errno(fs::remove_file(mounted.file())), refused);
    assert_eq!(
        errno(fs::rename(mounted.file(), dir.join("other"))),
        refused
    );
    assert_eq!(
        errno(fs::hard_link(mounted.file(), dir.join("other"))),
        refused
    );
    assert_eq!(errno(fs::metadata(dir.join("other"))), Some(Errno::ENOENT));
    let names: Vec<_> = fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    assert_eq!(names, ["disk.raw"]);
}

#[test]
fn the_end_of_the_disk_is_the_end_of_the_file() {
    if !can_mount() {
        return;
    }
    let mounted = Mounted::new(4 * MIB);
    let file = open(&mounted, OFlag::empty());
    let mut buf = vec![1; 8192];
    assert_eq!(file.read_at(&mut buf, 4 * MIB - 100).unwrap(), 100);
    assert_eq!(file.read_at(&mut buf, 4 * MIB).unwrap(), 0);
    for offset in [4 * MIB - 100, 4 * MIB, 5 * MIB] {
        assert_eq!(
            errno(file.write_at(&buf, offset)),
            Some(Errno::EFBIG),
            "{offset:#x}"
        );
    }
    file.read_exact_at(&mut buf[..100], 4 * MIB - 100).unwrap();
    assert_eq!(
        buf[..100],
        [0; 100],
        "a refused write leaves no part behind"
    );
    file.write_all_at(&[7; 100], 4 * MIB - 100).unwrap();
    assert_eq!(
        fs::read(mounted.image()).unwrap()[4 * (1 << 20) - 100..],
        [7; 100]
    );
}

#[test]
fn requests_of_any_size_and_place_arrive_whole() {
    if !can_mount() {
        return;
    }
    let mounted = Mounted::new(16 * MIB);
    let file = open(&mounted, OFlag::empty());
    // Larger than a FUSE request, and beginning and ending inside of sectors.
    let data: Vec<u8> = (0..5_000_003_u32)
        .map(|n| n.to_le_bytes()[0] ^ n.to_le_bytes()[1])
        .collect();
    file.write_all_at(&data, 12_345).unwrap();
    let mut back = vec![0; data.len()];
    file.read_exact_at(&mut back, 12_345).unwrap();
    assert!(back == data);
    let image = fs::read(mounted.image()).unwrap();
    assert!(image[12_345..12_345 + data.len()] == data);
    assert!(image[..12_345].iter().all(|byte| *byte == 0));
    let latencies = mounted.mount.latencies();
    assert_eq!(latencies.write.bytes(), 5_000_003);
    assert!(latencies.write.count() >= 5, "a request has at most 1 MiB");
}

#[test]
fn a_dsync_write_needs_no_flush_after_it() {
    if !can_mount() {
        return;
    }
    let mounted = Mounted::new(MIB);
    open(&mounted, OFlag::O_DSYNC)
        .write_all_at(&[3; 512], 512)
        .unwrap();
    assert_eq!(
        mounted.mount.latencies().flush.count(),
        0,
        "the write itself carries the flag"
    );
    let file = open(&mounted, OFlag::empty());
    file.sync_data().unwrap();
    file.sync_all().unwrap();
    assert_eq!(mounted.mount.latencies().flush.count(), 2);
}

#[test]
fn holes_are_punched_found_and_skipped() {
    if !can_mount() {
        return;
    }
    let mounted = Mounted::new(4 * MIB);
    let file = open(&mounted, OFlag::empty());
    file.write_all_at(&vec![9; 1 << 20], MIB).unwrap();
    let keep = FallocateFlags::FALLOC_FL_KEEP_SIZE;
    let punch = keep | FallocateFlags::FALLOC_FL_PUNCH_HOLE;
    fallocate(&file, punch, (1 << 20) + 65_536, 65_536).unwrap();
    assert_eq!(lseek64(&file, 0, Whence::SeekData), Ok(1 << 20));
    assert_eq!(
        lseek64(&file, 1 << 20, Whence::SeekHole),
        Ok((1 << 20) + 65_536)
    );
    assert_eq!(
        lseek64(&file, (1 << 20) + 65_536, Whence::SeekData),
        Ok((1 << 20) + 131_072)
    );
    assert_eq!(lseek64(&file, 2 << 20, Whence::SeekData), Err(Errno::ENXIO));
    let zero = FallocateFlags::FALLOC_FL_ZERO_RANGE;
    fallocate(&file, zero, 1 << 20, 4096).unwrap();
    let mut buf = [1; 4096];
    file.read_exact_at(&mut buf, MIB).unwrap();
    assert_eq!(buf, [0; 4096]);
    fallocate(&file, FallocateFlags::empty(), 0, 4 << 20).unwrap();
    fallocate(&file, keep, 0, 8 << 20).unwrap();
    for mode in [FallocateFlags::empty(), zero] {
        assert_eq!(
            fallocate(&file, mode, 3 << 20, 2 << 20),
            Err(Errno::EFBIG),
            "{mode:?}"
        );
    }
    let collapse = FallocateFlags::FALLOC_FL_COLLAPSE_RANGE;
    assert_eq!(fallocate(&file, collapse, 0, 4096), Err(Errno::EOPNOTSUPP));
    assert_eq!(mounted.mount.latencies().zero.bytes(), 65_536 + 4096);
}

#[test]
fn fencing_refuses_writers_at_once_and_lets_readers_be() {
    if !can_mount() {
        return;
    }
    let mounted = Mounted::new(MIB);
    let disk = FileIndex(0);
    let file = open(&mounted, OFlag::empty());
    file.write_all_at(&[5; 512], 0).unwrap();
    assert_eq!(mounted.mount.open_writers(disk), 1);
    for (refusal, expected) in [
        (Refusal::ReadOnly, Errno::EROFS),
        (Refusal::IoError, Errno::EIO),
    ] {
        mounted
            .mount
            .set_writable(disk, Writability::Refused(refusal));
        assert_eq!(errno(file.write_at(&[6; 512], 0)), Some(expected));
        let opened = OpenOptions::new().write(true).open(mounted.file());
        assert_eq!(errno(opened), Some(Errno::EROFS));
        let mut buf = [0; 512];
        file.read_exact_at(&mut buf, 0).unwrap();
        assert_eq!(buf, [5; 512]);
        file.sync_data().unwrap();
    }
    mounted.mount.set_writable(disk, Writability::Writable);
    file.write_all_at(&[6; 512], 0).unwrap();
    drop(file);
    // The kernel releases a handle after close(2) has returned.
    while mounted.mount.open_writers(disk) != 0 {
        std::thread::yield_now();
    }
}
