//! A file system that a test can fill.

use std::{
    fs,
    io::{self, Write as _},
    path::{Path, PathBuf},
};

use nix::mount::{MntFlags, umount2};

use super::{must, sparse_file};

/// Unit in which it is filled, in bytes: what is left of it is less than that.
const PIECE: usize = 1 << 18;

/// A small ext4, in a file. Dropping it unmounts it.
#[derive(Debug)]
pub(crate) struct SmallFileSystem(PathBuf);

impl SmallFileSystem {
    /// A new one of `mib` MiB in `file`, mounted at `at`, which is made.
    pub(crate) fn new(file: &Path, at: &Path, mib: u64) -> Self {
        sparse_file(file, mib << 20);
        must(
            "mkfs.ext4",
            ["-q".as_ref(), "-F".as_ref(), file.as_os_str()],
        );
        fs::create_dir(at).unwrap();
        let mount = [
            "-o".as_ref(),
            "loop".as_ref(),
            file.as_os_str(),
            at.as_os_str(),
        ];
        must("mount", mount);
        Self(at.to_owned())
    }

    fn ballast(&self) -> PathBuf {
        self.0.join("ballast")
    }

    /// Takes all space that is left.
    pub(crate) fn fill(&self) {
        let mut file = fs::File::create(self.ballast()).unwrap();
        let piece = vec![1; PIECE];
        while file.write_all(&piece).is_ok() {}
    }

    /// Gives the space back.
    pub(crate) fn relieve(&self) {
        match fs::remove_file(self.ballast()) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => panic!("{error}"),
            _ => {}
        }
    }
}

impl Drop for SmallFileSystem {
    fn drop(&mut self) {
        if umount2(&self.0, MntFlags::empty()).is_err() {
            let _ = umount2(&self.0, MntFlags::MNT_DETACH);
        }
    }
}
