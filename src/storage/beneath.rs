//! Files found below a folder by names that others wrote: no name, and no link on its way, leads out of the folder.
//!
//! The kernel resolves every name itself (`openat2` with `RESOLVE_BENEATH`), so nothing can be swapped between a check and
//! its use; a kernel without that call (before Linux 5.6) finds nothing rather than finding it less safely. Files are
//! opened for reading only and locked shared for as long as they are open: who writes to one holds the other lock.

use std::{
    fs::{File, TryLockError},
    io,
    os::{fd::OwnedFd, unix::fs::MetadataExt},
    path::{Path, PathBuf},
};

use nix::{
    dir::Dir,
    errno::Errno,
    fcntl::{OFlag, OpenHow, ResolveFlag, openat2},
};

use super::{check_component, file::FileStorage};

/// Attempts at a name while somebody renames folders: nobody does that for long but to do harm.
const ATTEMPTS_MAX: u32 = 64;

/// A folder that names are looked up beneath.
#[derive(Debug)]
pub struct Beneath {
    folder: OwnedFd,
    path: PathBuf,
}

/// A file that was found.
#[derive(Debug)]
pub struct Found {
    /// The file, open for reading and locked shared.
    pub storage: FileStorage,
    /// Its names from the folder down, as they are spelled there.
    pub names: Vec<String>,
    /// Device and inode: the same for every name of one file.
    pub id: (u64, u64),
}

impl Beneath {
    /// The existing folder at `path`.
    pub fn open(path: &Path) -> io::Result<Self> {
        let path = path.canonicalize()?;
        let folder = File::open(&path)?;
        if !folder.metadata()?.is_dir() {
            return Err(io::ErrorKind::NotADirectory.into());
        }
        Ok(Self {
            folder: folder.into(),
            path,
        })
    }

    /// Where the folder is, without links.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The names that lead from here to the existing folder at `path`; nothing if it is elsewhere.
    pub fn names_to(&self, path: &Path) -> Option<Vec<String>> {
        let path = path.canonicalize().ok()?;
        let below = path.strip_prefix(&self.path).ok()?;
        let names = below.iter().map(|name| Some(name.to_str()?.to_owned()));
        names.collect()
    }

    /// Finds a file: by its names as written, then by names that differ in case only, as Windows would find it.
    ///
    /// [`io::ErrorKind::NotFound`]: there is none. [`io::ErrorKind::CrossesDevices`]: a link leads out of the folder.
    /// [`io::ErrorKind::ResourceBusy`]: somebody has it open for writing. [`io::ErrorKind::InvalidInput`]: it is not a
    /// regular file, or two names differ in case only.
    pub fn find(&self, names: &[String]) -> io::Result<Found> {
        for name in names {
            check_component(name)?;
        }
        // A named pipe must not make the caller wait, nor a terminal become its own.
        let how = OFlag::O_RDONLY | OFlag::O_NONBLOCK | OFlag::O_NOCTTY;
        let (file, names) = match self.open_at(names, how) {
            Err(Errno::ENOENT) => {
                let names = self.spelled(names)?;
                (self.open_at(&names, how)?, names)
            }
            found => (found?, names.to_vec()),
        };
        let file = File::from(file);
        let about = file.metadata()?;
        if !about.is_file() {
            return Err(invalid("not a regular file"));
        }
        match file.try_lock_shared() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(io::ErrorKind::ResourceBusy.into()),
            Err(TryLockError::Error(error)) => return Err(error),
        }
        Ok(Found {
            storage: FileStorage::read_only(file)?,
            names,
            id: (about.dev(), about.ino()),
        })
    }

    /// Opens a folder, by its names as written, for looking further beneath it and for nothing else. None are the folder
    /// itself. The errors are those of [`find`](Self::find).
    pub fn folder(&self, names: &[String]) -> io::Result<OwnedFd> {
        for name in names {
            check_component(name)?;
        }
        Ok(self.open_at(names, OFlag::O_PATH | OFlag::O_DIRECTORY)?)
    }

    /// Device and inode of the file at `path`, as [`Found::id`] has them.
    pub fn id_of(path: &Path) -> io::Result<(u64, u64)> {
        let about = std::fs::metadata(path)?;
        Ok((about.dev(), about.ino()))
    }

    fn open_at(&self, names: &[String], how: OFlag) -> Result<OwnedFd, Errno> {
        let path = if names.is_empty() {
            ".".to_owned()
        } else {
            names.join("/")
        };
        let how = OpenHow::new()
            .flags(how | OFlag::O_CLOEXEC)
            .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_MAGICLINKS);
        for _ in 0..ATTEMPTS_MAX {
            match openat2(&self.folder, path.as_str(), how) {
                // A folder was renamed meanwhile: the kernel cannot tell whether the file is still beneath.
                Err(Errno::EAGAIN | Errno::EINTR) => {}
                outcome => return outcome,
            }
        }
        Err(Errno::EAGAIN)
    }

    /// The names as the folders spell them.
    fn spelled(&self, names: &[String]) -> io::Result<Vec<String>> {
        let mut found: Vec<String> = Vec::with_capacity(names.len());
        for name in names {
            found.push(name.clone());
            match self.open_at(&found, OFlag::O_PATH) {
                Err(Errno::ENOENT) => {
                    found.pop();
                    let spelled = self.ignoring_case(&found, name)?;
                    found.push(spelled);
                }
                other => drop(other?),
            }
        }
        Ok(found)
    }

    /// The one name in a folder that differs from `name` in case only.
    fn ignoring_case(&self, folder: &[String], name: &str) -> io::Result<String> {
        let folder = self.open_at(folder, OFlag::O_RDONLY | OFlag::O_DIRECTORY)?;
        let wanted = name.to_lowercase();
        let mut found = None;
        for entry in Dir::from_fd(folder)? {
            let entry = entry?;
            // A name that is not UTF-8 is no Windows name.
            let Ok(other) = entry.file_name().to_str() else {
                continue;
            };
            if other.to_lowercase() != wanted {
                continue;
            }
            if found.replace(other.to_owned()).is_some() {
                return Err(invalid("two names differ from it in case only"));
            }
        }
        found.ok_or_else(|| io::ErrorKind::NotFound.into())
    }
}

fn invalid(problem: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, problem)
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        os::unix::{fs::symlink, net::UnixListener},
    };

    use super::*;
    use crate::storage::Storage;

    fn names(path: &str) -> Vec<String> {
        path.split('/').map(str::to_owned).collect()
    }

    #[test]
    fn files_are_found_by_their_names_in_any_case() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("Base/sub")).unwrap();
        fs::write(dir.path().join("Base/sub/Disk.vhdx"), "1").unwrap();
        fs::write(dir.path().join("two"), "2").unwrap();
        fs::write(dir.path().join("TWO"), "2").unwrap();
        let beneath = Beneath::open(dir.path()).unwrap();
        for path in ["Base/sub/Disk.vhdx", "base/SUB/disk.VHDX"] {
            let found = beneath.find(&names(path)).unwrap();
            assert_eq!(found.names, names("Base/sub/Disk.vhdx"), "{path}");
            assert_eq!(found.storage.len().unwrap(), 1);
        }
        assert_eq!(beneath.find(&names("TWO")).unwrap().names, names("TWO"));
        for (path, kind) in [
            ("Two", io::ErrorKind::InvalidInput),
            ("base/none", io::ErrorKind::NotFound),
            ("none/Disk.vhdx", io::ErrorKind::NotFound),
            ("two/x", io::ErrorKind::NotADirectory),
        ] {
            assert_eq!(
                beneath.find(&names(path)).unwrap_err().kind(),
                kind,
                "{path}"
            );
        }
        let sub = dir.path().join("Base/sub");
        assert_eq!(beneath.names_to(&sub), Some(names("Base/sub")));
        assert_eq!(beneath.names_to(Path::new("/")), None);
    }

    #[test]
    fn nothing_leads_out_of_the_folder() {
        let outside = tempfile::tempdir().unwrap();
        fs::write(outside.path().join("secret"), "s").unwrap();
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("in")).unwrap();
        fs::write(dir.path().join("in/file"), "f").unwrap();
        symlink(outside.path(), dir.path().join("absolute")).unwrap();
        symlink("../..", dir.path().join("in/up")).unwrap();
        symlink("in/file", dir.path().join("inside")).unwrap();
        symlink("/proc/self/cwd", dir.path().join("magic")).unwrap();
        let _socket = UnixListener::bind(dir.path().join("socket")).unwrap();
        let beneath = Beneath::open(dir.path()).unwrap();
        beneath.find(&names("inside")).unwrap();
        for path in ["absolute/secret", "in/up/x", "magic/Cargo.toml"] {
            let error = beneath.find(&names(path)).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::CrossesDevices, "{path}");
        }
        for path in ["..", "in/../../x", "", "in/"] {
            let error = beneath.find(&names(path)).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidInput, "{path}");
        }
        assert_eq!(
            beneath.find(&names("in")).unwrap_err().kind(),
            io::ErrorKind::InvalidInput,
            "a folder is not a file"
        );
        beneath.find(&names("socket")).unwrap_err();
    }

    #[test]
    fn what_somebody_writes_to_is_not_opened_and_the_other_way_round() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        fs::write(&path, "f").unwrap();
        let beneath = Beneath::open(dir.path()).unwrap();
        let writer = File::open(&path).unwrap();
        writer.try_lock().unwrap();
        let error = beneath.find(&names("file")).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ResourceBusy);
        drop(writer);
        let found = beneath.find(&names("file")).unwrap();
        let _shared = beneath.find(&names("file")).unwrap();
        assert_eq!(found.id, Beneath::id_of(&path).unwrap());
        File::open(&path).unwrap().try_lock().unwrap_err();
    }
}
