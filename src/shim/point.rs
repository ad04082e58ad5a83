//! A mount point: a folder that is examined, mounted at and unmounted, by this process or by the mount helper.
//!
//! # Why it is opened once
//! Between a look at a path and its use, whoever may write to a folder on the way can lead the path elsewhere. So the folder
//! that the mount point lies in is opened once, and everything happens at its one name in there; the mount is put on the
//! very folder that was examined (`move_mount(2)` on its descriptor). A name that became a link is never followed.
//!
//! # What a death leaves
//! The device is opened before the mount is made, and whoever serves it holds its only descriptor. A death before
//! `move_mount(2)` leaves nothing; one at any time after it leaves a mount that answers `ENOTCONN`, which
//! [`MountPoint::recover`] takes away.

use std::{
    ffi::OsString,
    fs, io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
};

use nix::{
    errno::Errno,
    mount::{MntFlags, umount2},
    sys::statfs::statfs,
};
use rustix::{
    fs::{Dir, Mode, OFlags, fstat, open, openat},
    mount::{
        FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, fsconfig_create,
        fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen, move_mount,
    },
};
use serde::{Deserialize, Serialize};

use super::{
    mount::{MountError, Owner, Unmount, Visibility},
    table::{MountEntry, mounted_at},
};

pub(super) const FUSE_DEVICE: &str = "/dev/fuse";
/// File system type as `mount` and `df` show it.
const KIND: &str = "fuse.understudy";
/// What it is mounted from, and the second half of its type.
const SOURCE: &str = "understudy";

/// A folder to mount at, there or not.
#[derive(Debug)]
pub(super) struct MountPoint {
    /// The folder it lies in.
    parent: OwnedFd,
    name: OsString,
    /// Both as an absolute path without links.
    path: PathBuf,
    /// The one user whose folders and mounts may be touched; without it everybody's.
    whose: Option<u32>,
}

/// A mount that nobody serves yet.
#[derive(Debug)]
pub(super) struct Attached {
    /// The connection to the kernel. The mount is dead once its last descriptor is closed.
    pub(super) device: OwnedFd,
    /// What the kernel's table calls the mount, to know it again.
    pub(super) mark: String,
}

/// What became of a mount that was to go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Detached {
    /// It is unmounted.
    Done,
    /// It was not there any more.
    Gone,
    /// Somebody uses it.
    Busy,
    /// Something else is mounted over it.
    Covered,
}

impl MountPoint {
    /// The mount point at `dir`. Never looks at `dir` itself, which may be a mount that is dead.
    pub(super) fn at(dir: &Path) -> io::Result<Self> {
        // `.` and what ends in `..` have a name only once they are resolved.
        let resolved = match dir.file_name() {
            Some(_) => None,
            None => Some(dir.canonicalize()?),
        };
        let dir = resolved.as_deref().unwrap_or(dir);
        let Some(name) = dir.file_name() else {
            let why = "the root of the tree is in use";
            return Err(io::Error::new(io::ErrorKind::InvalidInput, why));
        };
        let parent = dir.parent().unwrap_or_else(|| Path::new("."));
        let parent = if parent.as_os_str().is_empty() {
            Path::new(".")
        } else {
            parent
        };
        let how = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let parent = open(parent, how, Mode::empty())?;
        Self::in_folder(parent, name.to_owned(), None)
    }

    /// The mount point `name` in a folder that was opened. Only folders and mounts of user `whose` are touched.
    pub(super) fn in_folder(
        parent: OwnedFd,
        name: OsString,
        whose: Option<u32>,
    ) -> io::Result<Self> {
        let path = fs::read_link(by_descriptor(parent.as_fd()))?.join(&name);
        Ok(Self {
            parent,
            name,
            path,
            whose,
        })
    }

    /// Where it is, as an absolute path without links.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// The folder itself, if it can be mounted at: nothing of ours is mounted there, and it is empty.
    pub(super) fn examine(&self) -> Result<OwnedFd, MountError> {
        let unreachable = |source: io::Error| MountError::Unreachable {
            dir: self.path.clone(),
            source,
        };
        let entry = mounted_at(&self.path).map_err(unreachable)?;
        if entry.is_some_and(|entry| entry.kind == KIND) {
            return Err(MountError::AlreadyMounted(self.path.clone()));
        }
        let how = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let folder = match openat(&self.parent, &self.name, how, Mode::empty()) {
            Ok(folder) => folder,
            Err(rustix::io::Errno::NOTDIR | rustix::io::Errno::LOOP) => {
                return Err(MountError::NotAFolder(self.path.clone()));
            }
            Err(error) => return Err(unreachable(error.into())),
        };
        let about = fstat(&folder).map_err(|error| unreachable(error.into()))?;
        if self.whose.is_some_and(|user| user != about.st_uid) {
            return Err(MountError::NotYours(self.path.clone()));
        }
        let listed = Dir::read_from(&folder).map_err(|error| unreachable(error.into()))?;
        for entry in listed {
            let entry = entry.map_err(|error| unreachable(error.into()))?;
            if ![&b"."[..], b".."].contains(&entry.file_name().to_bytes()) {
                return Err(MountError::NotEmpty(self.path.clone()));
            }
        }
        Ok(folder)
    }

    /// Mounts at the folder that was [examined](Self::examine), for `user`.
    pub(super) fn attach(
        &self,
        folder: &OwnedFd,
        access: Visibility,
        user: Owner,
    ) -> Result<Attached, MountError> {
        let device = fs::File::options().read(true).write(true).open(FUSE_DEVICE);
        let device = OwnedFd::from(device.map_err(MountError::Device)?);
        let mount = make(device.as_fd(), access, user).and_then(|mount| {
            let onto =
                MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
            move_mount(&mount, "", folder, "", onto)?;
            Ok(mount)
        });
        let mount = mount.map_err(|errno| match errno {
            rustix::io::Errno::PERM | rustix::io::Errno::ACCESS => {
                MountError::NotPermitted(self.path.clone())
            }
            errno => MountError::Kernel {
                dir: self.path.clone(),
                source: errno.into(),
            },
        })?;
        match mounted_at(&self.path) {
            Ok(Some(entry)) if entry.kind == KIND => Ok(Attached {
                device,
                mark: entry.device,
            }),
            other => {
                // The folder is elsewhere by now: this very mount goes, wherever it is.
                let _ = umount2(&by_descriptor(mount.as_fd()), MntFlags::MNT_DETACH);
                let source = other.err();
                let source = source.unwrap_or_else(|| {
                    io::Error::other("the mount is not in the kernel's table: the folder was moved")
                });
                let dir = self.path.clone();
                Err(MountError::Serve { dir, source })
            }
        }
    }

    /// Takes the mount with this mark out of the tree.
    pub(super) fn detach(&self, mark: &str, how: Unmount) -> io::Result<Detached> {
        let flags = match how {
            Unmount::IfUnused => MntFlags::empty(),
            Unmount::Detach => MntFlags::MNT_DETACH,
        };
        match mounted_at(&self.path)? {
            None => return Ok(Detached::Gone),
            Some(entry) if entry.device != mark || !self.may_touch(&entry) => {
                return Ok(Detached::Covered);
            }
            Some(_) => {}
        }
        match umount2(&self.by_parent(), flags | MntFlags::UMOUNT_NOFOLLOW) {
            Ok(()) => Ok(Detached::Done),
            // Somebody was faster.
            Err(Errno::EINVAL) => Ok(Detached::Gone),
            Err(Errno::EBUSY) => Ok(Detached::Busy),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Takes away a mount whose process has died, and says whether there was one. Never touches a living one.
    pub(super) fn recover(&self) -> io::Result<bool> {
        let Some(entry) = mounted_at(&self.path)? else {
            return Ok(false);
        };
        let dead = || statfs(&self.by_parent()).err() == Some(Errno::ENOTCONN);
        if !self.may_touch(&entry) || !dead() {
            return Ok(false);
        }
        let flags = MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW;
        umount2(&self.by_parent(), flags)?;
        tracing::info!(dir = %self.path.display(), "detached a mount whose process had died");
        Ok(true)
    }

    fn may_touch(&self, entry: &MountEntry) -> bool {
        match self.whose {
            Some(user) => entry.kind == KIND && entry.user == Some(user),
            None => entry.is_fuse(),
        }
    }

    /// The name in the folder that was opened, for calls that want a path.
    fn by_parent(&self) -> PathBuf {
        by_descriptor(self.parent.as_fd()).join(&self.name)
    }
}

/// A mount of `device` that is nowhere in the tree.
fn make(
    device: BorrowedFd<'_>,
    access: Visibility,
    user: Owner,
) -> Result<OwnedFd, rustix::io::Errno> {
    let making = fsopen("fuse", FsOpenFlags::FSOPEN_CLOEXEC)?;
    for (key, value) in [
        ("source", SOURCE.to_owned()),
        ("subtype", SOURCE.to_owned()),
        ("fd", device.as_raw_fd().to_string()),
        ("rootmode", "40000".to_owned()),
        ("user_id", user.user.to_string()),
        ("group_id", user.group.to_string()),
    ] {
        fsconfig_set_string(&making, key, value)?;
    }
    fsconfig_set_flag(&making, "default_permissions")?;
    if access == Visibility::AllUsers {
        fsconfig_set_flag(&making, "allow_other")?;
    }
    fsconfig_create(&making)?;
    let attributes = MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NODEV
        | MountAttrFlags::MOUNT_ATTR_NOEXEC
        | MountAttrFlags::MOUNT_ATTR_NOATIME;
    fsmount(&making, FsMountFlags::FSMOUNT_CLOEXEC, attributes)
}

/// A path that leads to what a descriptor of this process is open on.
fn by_descriptor(descriptor: BorrowedFd<'_>) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", descriptor.as_raw_fd()))
}
