//! Mounting and unmounting, and what is left when a process dies.

use std::{
    fs,
    io::{BufRead, BufReader, Write},
    os::unix::{
        fs::{FileExt, PermissionsExt},
        process::CommandExt,
    },
    path::Path,
    process::{Child, Command, Stdio},
};

use nix::mount::{MntFlags, umount2};
use understudy::shim::{
    FileIndex, MountError, MountOptions, Mounter, Owner, Unmount, UnmountError, Visibility, mount,
};

use crate::support::{Mounted, can_mount, raw_disk, skip, sparse_file};

const MIB: u64 = 1 << 20;
/// A user who is not root on any Linux.
const NOBODY: u32 = 65_534;
/// Set for a copy of this program that serves a mount until it is killed: the folder with `image` and `mnt`.
const SERVE: &str = "UNDERSTUDY_TEST_SERVE";
/// Set for a copy of this program that may not mount: the folder where it tries.
const UNPRIVILEGED: &str = "UNDERSTUDY_TEST_UNPRIVILEGED";

fn is_mounted(dir: &Path) -> bool {
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
    table
        .lines()
        .any(|line| line.split(' ').nth(4) == dir.to_str())
}

#[test]
fn an_unmount_waits_for_nobody_and_tells_who_is_there() {
    if !can_mount() {
        return;
    }
    let mounted = Mounted::new(MIB);
    let dir = mounted.mount.dir().to_owned();
    let file = fs::OpenOptions::new()
        .write(true)
        .open(mounted.file())
        .unwrap();
    match mounted.mount.unmount(Unmount::IfUnused) {
        Err(UnmountError::Busy {
            writers: 1,
            readers: 0,
            ..
        }) => {}
        other => panic!("one writer holds it: {other:?}"),
    }
    file.write_all_at(&[1; 512], 0).unwrap();
    mounted.mount.unmount(Unmount::Detach).unwrap();
    assert!(!is_mounted(&dir));
    let refused = file.write_at(&[2; 512], 0).unwrap_err();
    assert_eq!(
        refused.raw_os_error(),
        Some(5),
        "no request reaches the disk any more: {refused}"
    );
    assert_eq!(fs::read(mounted.image()).unwrap()[..512], [1; 512]);
    assert!(
        !*mounted.mount.ended().borrow(),
        "the opener is still there"
    );
    drop(file);
    mounted.mount.wait();
    assert!(*mounted.mount.ended().borrow());
}

#[test]
fn a_person_may_unmount() {
    if !can_mount() {
        return;
    }
    let mounted = Mounted::new(MIB);
    umount2(mounted.mount.dir(), MntFlags::empty()).unwrap();
    mounted.mount.wait();
    assert!(*mounted.mount.ended().borrow());
    mounted.mount.unmount(Unmount::IfUnused).unwrap();
}

#[test]
fn a_lazy_unmount_by_a_person_leaves_those_who_hold_files_open() {
    if !can_mount() {
        return;
    }
    let mounted = Mounted::new(MIB);
    let file = fs::OpenOptions::new()
        .write(true)
        .open(mounted.file())
        .unwrap();
    umount2(mounted.mount.dir(), MntFlags::MNT_DETACH).unwrap();
    file.write_all_at(&[1; 512], 0).unwrap();
    let refused = mounted.mount.unmount(Unmount::IfUnused);
    assert!(
        matches!(refused, Err(UnmountError::Busy { writers: 1, .. })),
        "{refused:?}"
    );
    file.write_all_at(&[2; 512], 0).unwrap();
    drop(file);
    mounted.mount.wait();
    mounted.mount.unmount(Unmount::IfUnused).unwrap();
    assert_eq!(fs::read(mounted.image()).unwrap()[..512], [2; 512]);
}

#[test]
fn without_the_right_to_mount_the_error_says_so() {
    if !can_mount() {
        return;
    }
    if let Some(dir) = std::env::var_os(UNPRIVILEGED) {
        let refused = mount(&MountOptions::new(dir), Vec::new());
        assert!(
            matches!(refused, Err(MountError::NotPermitted(_))),
            "{refused:?}"
        );
        return;
    }
    let scratch = tempfile::tempdir().unwrap();
    // Root without a single capability: the device opens, since root owns it, and mount(2) is refused.
    let attempt = Command::new("setpriv")
        .args(["--bounding-set=-all", "--inh-caps=-all", "--"])
        .arg(std::env::current_exe().unwrap())
        .args([
            "--exact",
            "mount::attach::without_the_right_to_mount_the_error_says_so",
        ])
        .env(UNPRIVILEGED, scratch.path())
        .output();
    match attempt {
        Ok(output) => assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stdout)
        ),
        Err(error) => skip(&format!("setpriv: {error}")),
    }
}

#[test]
fn only_its_own_mount_is_unmounted() {
    if !can_mount() {
        return;
    }
    let below = Mounted::new(MIB);
    let dir = below.mount.dir();
    // Somebody mounts over it.
    let flags = nix::mount::MsFlags::empty();
    nix::mount::mount(Some("tmpfs"), dir, Some("tmpfs"), flags, None::<&str>).unwrap();
    let refused = below.mount.unmount(Unmount::Detach);
    umount2(dir, MntFlags::empty()).unwrap();
    assert!(
        matches!(refused, Err(UnmountError::Covered(_))),
        "{refused:?}"
    );
    assert!(is_mounted(dir), "what was covered is untouched");
    below.mount.unmount(Unmount::IfUnused).unwrap();
}

#[test]
fn folders_that_cannot_be_used_are_refused_with_the_reason() {
    if !can_mount() {
        return;
    }
    let mounted = Mounted::new(MIB);
    let attempt = |dir: &Path| mount(&MountOptions::new(dir), Vec::new()).unwrap_err();
    let here = mounted.scratch();
    assert!(matches!(
        attempt(&here.join("nothing")),
        MountError::Unreachable { .. }
    ));
    assert!(matches!(
        attempt(&here.join("image")),
        MountError::NotAFolder(_)
    ));
    assert!(matches!(attempt(here), MountError::NotEmpty(_)));
    assert!(matches!(
        attempt(mounted.mount.dir()),
        MountError::AlreadyMounted(_)
    ));
    assert!(
        !Mounter::Itself.recover_stale(mounted.mount.dir()).unwrap(),
        "a living mount is left alone"
    );
    assert!(!Mounter::Itself.recover_stale(here).unwrap());
    fs::metadata(mounted.file()).unwrap();
}

#[test]
fn many_machines_in_one_mount_and_many_mounts_at_once() {
    if !can_mount() {
        return;
    }
    let scratch = tempfile::tempdir().unwrap();
    std::thread::scope(|scope| {
        for number in 0..4_u8 {
            let root = scratch.path().join(number.to_string());
            scope.spawn(move || {
                fs::create_dir_all(root.join("mnt")).unwrap();
                let disks = [("web", "os"), ("web", "data"), ("db", "os")].map(|(folder, name)| {
                    let image = root.join(format!("{folder}-{name}"));
                    sparse_file(&image, MIB);
                    raw_disk(&image, Some(folder), name)
                });
                let mount = mount(&MountOptions::new(root.join("mnt")), disks.to_vec()).unwrap();
                for (index, path) in ["web/os.raw", "web/data.raw", "db/os.raw"]
                    .iter()
                    .enumerate()
                {
                    let file = fs::OpenOptions::new()
                        .write(true)
                        .open(mount.dir().join(path))
                        .unwrap();
                    let mark = 16 * number + u8::try_from(index).unwrap() + 1;
                    file.write_all_at(&[mark; 4096], 8192).unwrap();
                    assert_eq!(mount.open_writers(FileIndex(index)), 1, "{path}");
                }
                mount.unmount(Unmount::Detach).unwrap();
                for (index, image) in ["web-os", "web-data", "db-os"].iter().enumerate() {
                    let mark = 16 * number + u8::try_from(index).unwrap() + 1;
                    assert_eq!(
                        fs::read(root.join(image)).unwrap()[8192..12288],
                        [mark; 4096]
                    );
                }
            });
        }
    });
}

#[test]
fn other_users_get_in_where_they_are_let_in() {
    if !can_mount() {
        return;
    }
    let scratch = tempfile::tempdir().unwrap();
    fs::set_permissions(scratch.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let (image, dir) = (scratch.path().join("image"), scratch.path().join("mnt"));
    sparse_file(&image, MIB);
    fs::create_dir(&dir).unwrap();
    for (access, file_mode, owner, let_in) in [
        (Visibility::Owner, 0o644, 0, false),
        (Visibility::AllUsers, 0o600, 0, false),
        (Visibility::AllUsers, 0o644, 0, true),
        (Visibility::AllUsers, 0o600, NOBODY, true),
    ] {
        let mut options = MountOptions::new(&dir);
        (options.access, options.file_mode) = (access, file_mode);
        options.owner = Owner {
            user: owner,
            group: owner,
        };
        let mount = mount(&options, vec![raw_disk(&image, None, "disk")]).unwrap();
        let read = Command::new("head")
            .args(["-c", "512"])
            .arg(dir.join("disk.raw"))
            .uid(NOBODY)
            .stderr(Stdio::null())
            .output()
            .unwrap();
        assert_eq!(
            read.status.success(),
            let_in,
            "{access:?} {file_mode:o} {owner}"
        );
        mount.unmount(Unmount::IfUnused).unwrap();
    }
}

/// Not a test: what [`Server`] runs.
#[test]
fn serve_until_killed() {
    let Some(root) = std::env::var_os(SERVE) else {
        return;
    };
    let root = Path::new(&root);
    let mut options = MountOptions::new(root.join("mnt"));
    if let Ok(threads) = std::env::var("UNDERSTUDY_TEST_THREADS") {
        options.threads = threads.parse().unwrap();
    }
    let mount = mount(&options, vec![raw_disk(&root.join("image"), None, "disk")]).unwrap();
    let _ = writeln!(std::io::stderr(), "READY");
    mount.wait();
}

/// A process of its own that serves a mount.
struct Server(Child);

impl Server {
    fn start(root: &Path) -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args([
                "--exact",
                "mount::attach::serve_until_killed",
                "--nocapture",
            ])
            .env(SERVE, root)
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let ready = lines.any(|line| line.unwrap() == "READY");
        let server = Self(child);
        assert!(ready, "the server did not mount");
        server
    }

    fn kill(mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Detaches whatever is at a path when the test ends.
struct Detached<'a>(&'a Path);

impl Drop for Detached<'_> {
    fn drop(&mut self) {
        let _ = umount2(self.0, MntFlags::MNT_DETACH);
    }
}

#[test]
fn a_killed_process_loses_no_acknowledged_write_and_its_mount_is_recovered() {
    if !can_mount() {
        return;
    }
    let scratch = tempfile::tempdir().unwrap();
    let root = scratch.path().canonicalize().unwrap();
    let dir = root.join("mnt");
    fs::create_dir(&dir).unwrap();
    sparse_file(&root.join("image"), MIB);
    let server = Server::start(&root);
    let _detached = Detached(&dir);
    let file = fs::OpenOptions::new()
        .write(true)
        .open(dir.join("disk.raw"))
        .unwrap();
    file.write_all_at(&[8; 16_384], 4096).unwrap();
    server.kill();
    assert_eq!(
        fs::read(root.join("image")).unwrap()[4096..4096 + 16_384],
        [8; 16_384]
    );
    let dead = fs::metadata(&dir).unwrap_err();
    assert_eq!(dead.raw_os_error(), Some(107), "ENOTCONN: {dead}");
    assert!(Mounter::Itself.recover_stale(&dir).unwrap());
    assert!(!is_mounted(&dir) && !Mounter::Itself.recover_stale(&dir).unwrap());

    // Mounting recovers by itself; the file that was open stays dead and does not keep the new one from coming.
    let server = Server::start(&root);
    server.kill();
    let disks = vec![raw_disk(&root.join("image"), None, "disk")];
    let mount = mount(&MountOptions::new(&dir), disks).unwrap();
    assert_eq!(
        fs::read(dir.join("disk.raw")).unwrap()[4096..4096 + 16_384],
        [8; 16_384]
    );
    assert!(file.write_at(&[9; 512], 0).is_err());
    mount.unmount(Unmount::IfUnused).unwrap();
}
