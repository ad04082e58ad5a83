//! Programs that people use on disks, run on a file of the mount.

use std::{
    ffi::OsString,
    fs,
    path::{Path, PathBuf},
};

use understudy::shim::Unmount;

use crate::support::{Mounted, can_mount, find_program, have, must, run, skip};

const MIB: u64 = 1 << 20;

fn fio(file: &Path, scratch: &Path, job: &[&str]) {
    let mut arguments: Vec<OsString> = vec![
        "--name=verify".into(),
        format!("--filename={}", file.display()).into(),
        format!("--aux-path={}", scratch.display()).into(),
    ];
    arguments.extend(job.iter().map(Into::into));
    must("fio", arguments);
}

#[test]
fn fio_finds_every_block_it_wrote() {
    if !can_mount() || !have(&["fio"]) {
        return;
    }
    let mounted = Mounted::new(64 * MIB);
    let jobs: [&[&str]; 2] = [
        &["--bs=4k", "--iodepth=32"],
        &[
            "--bsrange=512-256k",
            "--bs_unaligned=0",
            "--blockalign=512",
            "--iodepth=32",
        ],
    ];
    for job in jobs {
        let mut arguments = vec![
            "--ioengine=libaio",
            "--direct=1",
            "--rw=randwrite",
            "--size=48m",
            "--verify=crc32c",
            "--verify_fatal=1",
            "--randseed=11",
        ];
        arguments.extend(job);
        fio(&mounted.file(), mounted.scratch(), &arguments);
        arguments.push("--verify_only");
        fio(&mounted.file(), mounted.scratch(), &arguments);
        // The image itself holds what the mount showed.
        arguments.retain(|argument| *argument != "--direct=1");
        fio(&mounted.image(), mounted.scratch(), &arguments);
    }
    assert_eq!(mounted.mount.latencies().write.errors(), 0);
}

#[test]
fn fsx_finds_no_fault() {
    if !can_mount() {
        return;
    }
    let Some(fsx) = find_fsx() else {
        return skip("fsx: cargo install fsx --version 0.3.2 --root target/tools");
    };
    let mounted = Mounted::new(4 * MIB);
    let config = mounted.scratch().join("fsx.toml");
    let settings = "flen = 4194304\nblockmode = true\nnosizechecks = true\n\
        [opsize]\nmax = 131072\n\
        [weights]\nclose_open = 0\ntruncate = 0\nposix_fallocate = 0\nmapread = 0\nmapwrite = 0\n\
        punch_hole = 2\nfsync = 1\nfdatasync = 1\ncopy_file_range = 2\n";
    fs::write(&config, settings).unwrap();
    let arguments: [OsString; 9] = [
        "-N".into(),
        "5000".into(),
        "-S".into(),
        "7".into(),
        "-P".into(),
        mounted.scratch().into(),
        "-f".into(),
        config.into(),
        mounted.file().into(),
    ];
    must(fsx.to_str().unwrap(), arguments);
    let latencies = mounted.mount.latencies();
    assert!(latencies.write.count() > 1000 && latencies.read.count() > 1000);
    assert!(latencies.zero.count() > 100 && latencies.flush.count() > 50);
}

fn find_fsx() -> Option<PathBuf> {
    let built = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/tools/bin/fsx");
    std::env::var_os("UNDERSTUDY_FSX")
        .map(PathBuf::from)
        .or_else(|| Some(built).filter(|path| path.is_file()))
        .or_else(|| find_program("fsx"))
}

/// Runs commands of qemu-io on a file with `O_DIRECT`.
fn qemu_io(file: &Path, aio: &str, commands: &[&str]) {
    let mut arguments: Vec<OsString> = ["-f", "raw", "-n", "-d", "unmap", "-i", aio]
        .map(Into::into)
        .to_vec();
    for command in commands {
        arguments.push("-c".into());
        arguments.push(command.into());
    }
    arguments.push(file.into());
    let output = run("qemu-io", arguments);
    let text = String::from_utf8_lossy(&output.stdout).into_owned()
        + &String::from_utf8_lossy(&output.stderr);
    let failed = text.contains("failed") || text.contains("error");
    assert!(output.status.success() && !failed, "{aio}: {text}");
}

#[test]
fn qemu_writes_sectors_as_sectors() {
    if !can_mount() || !have(&["qemu-io"]) {
        return;
    }
    for aio in ["threads", "native"] {
        let mounted = Mounted::new(8 * MIB);
        qemu_io(
            &mounted.file(),
            aio,
            &[
                "write -P 0x11 0 1M",
                "write -P 0x22 512 512",
                "read -P 0x22 512 512",
                "read -P 0x11 1024 3072",
            ],
        );
        let written = mounted.mount.latencies().write.bytes();
        assert_eq!(
            written,
            MIB + 512,
            "{aio}: a sector is written without the block around it"
        );
        qemu_io(
            &mounted.file(),
            aio,
            &[
                "write -f -P 0x33 64k 64k",
                "discard 128k 64k",
                "read -P 0 128k 64k",
                "write -z 256k 64k",
                "read -P 0 256k 64k",
                "write -z -u 384k 64k",
                "read -P 0 384k 64k",
                // Unaligned for the host: QEMU reads, changes and writes the sectors around.
                "write -P 0x44 700001 4099",
                "read -P 0x44 700001 4099",
                "read -P 0x11 699900 101",
                "aio_write -P 0x55 2M 1M",
                "aio_write -P 0x56 3M 1M",
                "aio_flush",
                "read -P 0x55 2M 1M",
                "read -P 0x56 3M 1M",
                "flush",
            ],
        );
        let latencies = mounted.mount.latencies();
        assert!(
            latencies.zero.bytes() >= 3 * 65_536,
            "{aio}: discards and zeroes arrive as such"
        );
        assert!(latencies.flush.count() > 0);
    }
}

#[test]
fn qemu_img_copies_compares_and_sees_holes() {
    if !can_mount() || !have(&["qemu-img", "qemu-io"]) {
        return;
    }
    let mounted = Mounted::new(16 * MIB);
    let file = mounted.file().into_os_string().into_string().unwrap();
    let image = mounted.image().into_os_string().into_string().unwrap();
    qemu_io(
        &mounted.file(),
        "native",
        &["write -P 0x61 1M 1M", "write -P 0x62 8M 64k"],
    );
    must(
        "qemu-img",
        ["compare", "-f", "raw", "-F", "raw", &file, &image],
    );
    let map: serde_json::Value = serde_json::from_str(&must(
        "qemu-img",
        ["map", "-f", "raw", "--output=json", &file],
    ))
    .unwrap();
    let data: Vec<_> = map
        .as_array()
        .unwrap()
        .iter()
        .filter(|run| run["data"] == true)
        .collect();
    assert_eq!(data.len(), 2, "{map}");
    assert_eq!(
        (data[0]["start"].as_u64(), data[0]["length"].as_u64()),
        (Some(MIB), Some(MIB))
    );

    let copy = mounted
        .scratch()
        .join("copy")
        .into_os_string()
        .into_string()
        .unwrap();
    must(
        "qemu-img",
        ["convert", "-f", "raw", "-O", "raw", &file, &copy],
    );
    must(
        "qemu-img",
        ["compare", "-f", "raw", "-F", "raw", &copy, &image],
    );
    // And into the mount: the target is there already and has its size.
    qemu_io(Path::new(&copy), "threads", &["write -P 0x63 3M 1M"]);
    must(
        "qemu-img",
        [
            "convert", "-n", "-t", "none", "-f", "raw", "-O", "raw", &copy, &file,
        ],
    );
    must(
        "qemu-img",
        ["compare", "-f", "raw", "-F", "raw", &copy, &image],
    );
}

/// A loop device that is detached when the test ends.
struct LoopDevice(String);

impl Drop for LoopDevice {
    fn drop(&mut self) {
        run("losetup", ["-d", &self.0]);
    }
}

/// A mount that is undone when the test ends.
struct PlainMount(PathBuf);

impl Drop for PlainMount {
    fn drop(&mut self) {
        let _ = nix::mount::umount2(&self.0, nix::mount::MntFlags::MNT_DETACH);
    }
}

#[test]
fn a_file_system_on_a_loop_device_stays_clean() {
    if !can_mount() || !have(&["losetup", "mkfs.ext4", "e2fsck"]) {
        return;
    }
    let mounted = Mounted::new(64 * MIB);
    let file = mounted.file().into_os_string().into_string().unwrap();
    let attach = run("losetup", ["--find", "--show", "--direct-io=on", &file]);
    if !attach.status.success() {
        return skip("no loop device can be had");
    }
    let device = LoopDevice(String::from_utf8(attach.stdout).unwrap().trim().to_owned());
    must("mkfs.ext4", ["-q", &device.0]);
    let dir = mounted.scratch().join("ext4");
    fs::create_dir(&dir).unwrap();
    let fs_type = Some("ext4");
    let flags = nix::mount::MsFlags::empty();
    nix::mount::mount(Some(device.0.as_str()), &dir, fs_type, flags, None::<&str>).unwrap();
    let plain = PlainMount(dir.clone());
    for number in 0..40_u8 {
        let file = dir.join(number.to_string());
        fs::write(&file, vec![number; 100_000 + usize::from(number)]).unwrap();
        fs::File::open(&file).unwrap().sync_all().unwrap();
    }
    for number in (0..40).step_by(2) {
        fs::remove_file(dir.join(number.to_string())).unwrap();
    }
    must("umount", [&plain.0]);
    must("e2fsck", ["-fn", &device.0]);
    drop(device);
    assert!(
        mounted.mount.latencies().flush.count() > 0,
        "a sync in the file system is a flush of the disk"
    );
    // losetup -d lets go a moment later if something still looks at the device.
    mounted.mount.unmount(Unmount::Detach).unwrap();
    must("e2fsck", ["-fn".into(), mounted.image()]);
}
