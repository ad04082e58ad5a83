//! What the tests of the kernel's side share: mounts that clean up after themselves, programs, loud skips.

mod hosts;
mod load;
mod space;

use std::{
    ffi::OsStr,
    fs,
    io::Write,
    os::unix::fs::FileTypeExt,
    path::{Path, PathBuf},
    process::{Command, Output},
    sync::Arc,
};

use understudy::{
    base::ids::Name,
    disk::{Access, raw::RawDisk},
    shim::{Mount, MountOptions, MountedDisk, Writability, mount},
    storage::file::FileStorage,
};

pub(crate) use self::{hosts::*, load::*, space::*};

/// Says that a test did not run. Written past the harness's capture, so that it is seen in a green run as well.
pub(crate) fn skip(reason: &str) {
    let name = std::thread::current().name().unwrap_or("?").to_owned();
    let _ = writeln!(std::io::stderr(), "SKIPPED: {name}: {reason}");
}

/// Whether this process can mount; says so if not.
pub(crate) fn can_mount() -> bool {
    let device = fs::metadata("/dev/fuse").is_ok_and(|meta| meta.file_type().is_char_device());
    let able = device && nix::unistd::geteuid().is_root();
    if !able {
        skip("mounting needs /dev/fuse and root");
    }
    able
}

/// The folder of sample images and tools beside the package, or wherever `UNDERSTUDY_SHARED` says; says so if it is not
/// there.
pub(crate) fn shared() -> Option<PathBuf> {
    let place = std::env::var_os("UNDERSTUDY_SHARED").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared"),
        PathBuf::from,
    );
    if place.join("disks/catalog.toml").is_file() && place.join("disks/crafted").is_dir() {
        return Some(place);
    }
    skip(&format!("no sample images at {}", place.display()));
    None
}

/// Whether all `programs` are installed; says so if not.
pub(crate) fn have(programs: &[&str]) -> bool {
    let missing: Vec<_> = programs
        .iter()
        .filter(|program| find_program(program).is_none())
        .collect();
    if !missing.is_empty() {
        skip(&format!("not installed: {missing:?}"));
    }
    missing.is_empty()
}

/// The path of a program of the PATH or of sbin.
pub(crate) fn find_program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/sbin", "/usr/sbin"].map(PathBuf::from))
        .map(|dir| dir.join(name))
        .find(|candidate| candidate.is_file())
}

/// Runs a program to its end.
pub(crate) fn run<I: AsRef<OsStr>>(
    program: &str,
    arguments: impl IntoIterator<Item = I>,
) -> Output {
    let path = find_program(program).unwrap_or_else(|| program.into());
    Command::new(path)
        .args(arguments)
        .output()
        .unwrap_or_else(|error| panic!("{program} does not start: {error}"))
}

/// Runs a program that must succeed, and returns what it printed.
pub(crate) fn must<I: AsRef<OsStr>>(
    program: &str,
    arguments: impl IntoIterator<Item = I>,
) -> String {
    let arguments: Vec<_> = arguments
        .into_iter()
        .map(|argument| argument.as_ref().to_owned())
        .collect();
    let output = run(program, &arguments);
    assert!(
        output.status.success(),
        "{program} {arguments:?}: {}\n{}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// A raw image of `size` bytes that does not take space yet.
pub(crate) fn sparse_file(path: &Path, size: u64) {
    fs::File::create_new(path).unwrap().set_len(size).unwrap();
}

/// The raw image at `path` as a disk that is shown as `folder/name.raw`.
pub(crate) fn raw_disk(path: &Path, folder: Option<&str>, name: &str) -> MountedDisk {
    let storage = FileStorage::open(path, Access::ReadWrite).unwrap();
    MountedDisk {
        folder: folder.map(|folder| Name::new(folder).unwrap()),
        file_name: Name::new(name).unwrap(),
        disk: Arc::new(RawDisk::open(Arc::new(storage), Access::ReadWrite).unwrap()),
        writability: Writability::Writable,
    }
}

/// One raw image shown as a file. Dropping it detaches the mount, whatever happened before.
pub(crate) struct Mounted {
    // Dropped in this order: the mount goes before the folder it is in.
    pub(crate) mount: Mount,
    folder: tempfile::TempDir,
}

impl Mounted {
    /// A fresh image of `size` bytes.
    pub(crate) fn new(size: u64) -> Self {
        Self::with(size, |image| raw_disk(image, None, "disk"))
    }

    /// A fresh image of `size` bytes, shown as whatever disk `make` makes of it, under the name `disk`.
    pub(crate) fn with(size: u64, make: impl FnOnce(&Path) -> MountedDisk) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let image = folder.path().join("image");
        sparse_file(&image, size);
        let dir = folder.path().join("mnt");
        fs::create_dir(&dir).unwrap();
        let mount = mount(&MountOptions::new(dir), vec![make(&image)]).unwrap();
        Self { mount, folder }
    }

    /// The file in the mount.
    pub(crate) fn file(&self) -> PathBuf {
        self.mount.dir().join("disk.raw")
    }

    /// The image behind it.
    pub(crate) fn image(&self) -> PathBuf {
        self.folder.path().join("image")
    }

    /// A folder for whatever the test needs, gone with the test.
    pub(crate) fn scratch(&self) -> &Path {
        self.folder.path()
    }
}

/// The script that boots guests, if its downloads are there or are asked for.
pub(crate) fn guest_lab() -> Option<PathBuf> {
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
