//! A file that comes into being whole or not at all.
//!
//! # Crash contract
//! A draft has a name of its own in the folder of its target, `.understudy-<random>.part`. It is synced before it is
//! renamed, and the folder after that, so the target's name never stands for less than all of it. Dropping the draft
//! removes it. A killed process or a power cut may leave it behind: it can be deleted, and nothing reads it.
//!
//! A draft that is only cached ([`Durability::Cached`]) is whole for every process from its publication on, and after a
//! power cut in the next minutes it may be anything.

use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    sync::Arc,
};

use nix::{
    errno::Errno,
    fcntl::{AT_FDCWD, RenameFlags, renameat2},
};
use uuid::Uuid;

use super::{Storage as _, file::FileStorage};

/// What a published file promises.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Durability {
    /// It is whole after a power cut, too.
    Synced,
    /// The kernel writes it to the disk when it sees fit.
    Cached,
}

/// A new file on its way to its name.
#[derive(Debug)]
pub struct Draft {
    durability: Durability,
    storage: Arc<FileStorage>,
    folder: File,
    path: PathBuf,
    target: PathBuf,
}

impl Draft {
    /// Creates an empty draft of `target`, told from others by `id`. A target that exists is an
    /// [`io::ErrorKind::AlreadyExists`], now or when the draft is published.
    pub fn create(target: &Path, id: Uuid, durability: Durability) -> io::Result<Self> {
        // A link that leads nowhere is a name that is taken, too.
        if target.symlink_metadata().is_ok() {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        let folder = match target.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        let path = folder.join(format!(".understudy-{}.part", id.simple()));
        let storage = FileStorage::create_new(&path)?;
        Ok(Self {
            durability,
            storage: Arc::new(match durability {
                // It is written once and not read again.
                Durability::Synced => storage.written_aside(&path),
                Durability::Cached => storage.left_to_cache(),
            }),
            folder: File::open(folder)?,
            path,
            target: target.to_owned(),
        })
    }

    /// The bytes.
    pub fn storage(&self) -> Arc<FileStorage> {
        Arc::clone(&self.storage)
    }

    /// Makes the file as durable as it is to be and gives it its name, never replacing another file.
    pub fn publish(self) -> io::Result<()> {
        self.storage.sync()?;
        let flags = RenameFlags::RENAME_NOREPLACE;
        match renameat2(AT_FDCWD, &self.path, AT_FDCWD, &self.target, flags) {
            Ok(()) => {}
            // The file system has no such flag; a second link does not replace either, and the drop removes the first.
            Err(Errno::EINVAL | Errno::ENOSYS) => fs::hard_link(&self.path, &self.target)?,
            Err(error) => return Err(error.into()),
        }
        if self.durability == Durability::Cached {
            return Ok(());
        }
        self.folder.sync_all().inspect_err(|_| {
            // A name that may be gone after a power cut is none.
            let _ = fs::remove_file(&self.target);
        })
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        // Once published the name is gone.
        let _ = fs::remove_file(&self.path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::Fua;

    fn names(dir: &Path) -> Vec<String> {
        let names = fs::read_dir(dir).unwrap();
        names
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect()
    }

    #[test]
    fn a_draft_is_published_whole_or_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("image");
        let draft = Draft::create(&target, Uuid::from_u128(1), Durability::Synced).unwrap();
        draft.storage().write_at(0, b"half", Fua::No).unwrap();
        assert!(!target.exists());
        drop(draft);
        assert!(names(dir.path()).is_empty());
        let draft = Draft::create(&target, Uuid::from_u128(1), Durability::Synced).unwrap();
        draft.storage().write_at(0, b"whole", Fua::No).unwrap();
        draft.publish().unwrap();
        assert_eq!(names(dir.path()), ["image"]);
        assert_eq!(fs::read(&target).unwrap(), b"whole");
    }

    #[test]
    fn nothing_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("image");
        let exists = |error: io::Error| assert_eq!(error.kind(), io::ErrorKind::AlreadyExists);
        let late = Draft::create(&target, Uuid::from_u128(1), Durability::Synced).unwrap();
        fs::write(&target, b"somebody else's").unwrap();
        exists(late.publish().unwrap_err());
        exists(Draft::create(&target, Uuid::from_u128(2), Durability::Synced).unwrap_err());
        assert_eq!(fs::read(&target).unwrap(), b"somebody else's");
        assert_eq!(names(dir.path()), ["image"]);
        let dangling = dir.path().join("link");
        std::os::unix::fs::symlink("/nowhere/at/all", &dangling).unwrap();
        exists(Draft::create(&dangling, Uuid::from_u128(3), Durability::Synced).unwrap_err());
    }
}
