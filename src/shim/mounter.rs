//! Who makes mounts: this process, or a mount helper that has the privilege in its stead.

use std::{
    io,
    path::{Path, PathBuf, absolute},
    sync::Arc,
};

use nix::unistd::{getgid, getuid};

use super::{
    helper::Client,
    mount::{MountError, Owner, Unmount, Visibility},
    point::{Attached, Detached, MountPoint},
};

/// Who makes the mounts of a process.
#[derive(Clone, Debug, Default)]
pub enum Mounter {
    /// The process, which needs `CAP_SYS_ADMIN` for that.
    #[default]
    Itself,
    /// A mount helper, which may live in another mount namespace: what is mounted is for it to say, and no path of a mount
    /// is looked at here.
    Helper(Arc<Client>),
}

impl Mounter {
    /// Detaches a mount at `dir` whose process has died, and says whether there was one. Never touches a living one.
    pub fn recover_stale(&self, dir: &Path) -> io::Result<bool> {
        match self {
            Self::Itself => MountPoint::at(dir)?.recover(),
            Self::Helper(helper) => {
                let recovered = helper.recover(&absolute(dir)?);
                recovered.map_err(io::Error::other)
            }
        }
    }

    /// Mounts at `dir`, an existing and empty folder, after a stale mount there was detached. Also says where that is, as an
    /// absolute path.
    pub(super) fn attach(
        &self,
        dir: &Path,
        access: Visibility,
    ) -> Result<(Attached, PathBuf), MountError> {
        let unreachable = |source| MountError::Unreachable {
            dir: dir.to_owned(),
            source,
        };
        match self {
            Self::Itself => {
                self.recover_stale(dir).map_err(unreachable)?;
                let dir = dir.canonicalize().map_err(unreachable)?;
                let point = MountPoint::at(&dir).map_err(unreachable)?;
                let folder = point.examine()?;
                let user = Owner {
                    user: getuid().as_raw(),
                    group: getgid().as_raw(),
                };
                Ok((point.attach(&folder, access, user)?, dir))
            }
            Self::Helper(helper) => {
                let dir = absolute(dir).map_err(unreachable)?;
                match helper.mount(&dir, access) {
                    Ok(attached) => Ok((attached, dir)),
                    Err(source) => Err(MountError::Helper { dir, source }),
                }
            }
        }
    }

    /// Takes the mount at `dir` with this mark out of the tree.
    pub(super) fn detach(&self, dir: &Path, mark: &str, how: Unmount) -> io::Result<Detached> {
        match self {
            Self::Itself => match MountPoint::at(dir) {
                Ok(point) => point.detach(mark, how),
                // The folder above it is gone, and so is the mount.
                Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Detached::Gone),
                Err(error) => Err(error),
            },
            Self::Helper(helper) => {
                let detached = helper.unmount(dir, mark, how);
                detached.map_err(io::Error::other)
            }
        }
    }
}
