//! A folder of which some files lie elsewhere: the images of a former primary stay where their operator put them.
//!
//! The paths come from the operator, and so do the links in them: they are followed, unlike those in a
//! [`FileFolder`](super::file::FileFolder). Whoever makes such a folder holds the locks of the files: it takes none.
//!
//! # Crash contract
//! A placed file is never created and never renamed, and its removal is durable when the call returns.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    sync::Arc,
};

use super::{Access, Folder, Open, Storage, check_component, file::FileStorage};

/// A folder over another one, in which given names stand for files at given paths.
#[derive(Debug)]
pub struct PlacedFolder {
    inner: Arc<dyn Folder>,
    places: BTreeMap<String, PathBuf>,
}

impl PlacedFolder {
    /// `inner`, but for the names in `places`: they stand for these paths, whatever `inner` has under them.
    pub fn new(inner: Arc<dyn Folder>, places: BTreeMap<String, PathBuf>) -> Self {
        Self { inner, places }
    }

    /// Where `name` is, if it lies elsewhere.
    fn place(&self, name: &str) -> io::Result<Option<&Path>> {
        check_component(name)?;
        Ok(self.places.get(name).map(PathBuf::as_path))
    }
}

impl Folder for PlacedFolder {
    /// A placed file that is not there is an [`io::ErrorKind::NotFound`], however it is opened.
    fn open(&self, name: &str, how: Open) -> io::Result<Arc<dyn Storage>> {
        match self.place(name)? {
            Some(path) => open(path, how).map_err(at(path)),
            None => self.inner.open(name, how),
        }
    }

    /// Placed files keep their names: an [`io::ErrorKind::Unsupported`].
    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        for name in [from, to] {
            if let Some(path) = self.place(name)? {
                let keeps =
                    io::Error::new(io::ErrorKind::Unsupported, "a placed file is not renamed");
                return Err(at(path)(keeps));
            }
        }
        self.inner.rename(from, to)
    }

    /// Of a placed file links are left alone, what they lead to goes. A block device stays: its host made it.
    fn remove(&self, name: &str) -> io::Result<()> {
        match self.place(name)? {
            Some(path) => remove(path).map_err(at(path)),
            None => self.inner.remove(name),
        }
    }

    fn names(&self) -> io::Result<Vec<String>> {
        let mut names = self.inner.names()?;
        names.retain(|name| !self.places.contains_key(name));
        for (name, path) in &self.places {
            if path.try_exists().map_err(at(path))? {
                names.push(name.clone());
            }
        }
        Ok(names)
    }

    fn folder(&self, name: &str) -> io::Result<Arc<dyn Folder>> {
        match self.place(name)? {
            Some(path) => Err(at(path)(io::ErrorKind::NotADirectory.into())),
            None => self.inner.folder(name),
        }
    }

    /// Syncs the folders of the placed files as well, those that a link leads to and those that the links lie in.
    fn sync(&self) -> io::Result<()> {
        self.inner.sync()?;
        let mut folders = BTreeSet::new();
        for path in self.places.values() {
            folders.insert(folder_of(path).to_owned());
            match path.canonicalize() {
                Ok(real) => folders.insert(folder_of(&real).to_owned()),
                Err(error) if error.kind() == io::ErrorKind::NotFound => false,
                Err(error) => return Err(at(path)(error)),
            };
        }
        for folder in folders {
            match sync_folder(&folder) {
                // Nothing can be in it.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                done => done.map_err(at(&folder))?,
            }
        }
        Ok(())
    }
}

fn open(path: &Path, how: Open) -> io::Result<Arc<dyn Storage>> {
    // Links are followed here and nowhere below: direct writes do not go through one.
    let path = path.canonicalize()?;
    Ok(Arc::new(match how {
        Open::Read => FileStorage::open(&path, Access::ReadOnly)?,
        Open::Write | Open::Create => FileStorage::open(&path, Access::ReadWrite)?,
        Open::WriteAside => FileStorage::open(&path, Access::ReadWrite)?.written_aside(&path),
        Open::CreateNew => return Err(io::ErrorKind::AlreadyExists.into()),
    }))
}

fn remove(path: &Path) -> io::Result<()> {
    let path = path.canonicalize()?;
    if fs::metadata(&path)?.is_file() {
        fs::remove_file(&path)?;
        // Through a link that leads nowhere, a later sync would not find this folder.
        sync_folder(folder_of(&path))?;
    }
    Ok(())
}

fn folder_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

fn sync_folder(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

/// Names the path: who asked for a name in a folder does not know where it led.
fn at(path: &Path) -> impl FnOnce(io::Error) -> io::Error {
    let path = path.display().to_string();
    move |error| io::Error::new(error.kind(), format!("{path}: {error}"))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;
    use crate::{
        base::units::{MIB, to_usize},
        storage::{Fua, file::FileFolder},
    };

    const WAYS: [Open; 5] = [
        Open::Read,
        Open::Write,
        Open::WriteAside,
        Open::Create,
        Open::CreateNew,
    ];

    /// A folder in which `a` and `b` lie elsewhere, `b` behind a link.
    fn placed(dir: &Path) -> PlacedFolder {
        fs::create_dir_all(dir.join("vm")).unwrap();
        fs::create_dir_all(dir.join("links")).unwrap();
        let _ = symlink("../vm/real-b", dir.join("links/b"));
        let inner: Arc<dyn Folder> = Arc::new(FileFolder::open(&dir.join("store")).unwrap());
        let places = [("a", "vm/a.img"), ("b", "links/b"), ("c", "gone/c")];
        let places = places.map(|(name, path)| (name.to_owned(), dir.join(path)));
        PlacedFolder::new(inner, places.into())
    }

    fn sorted_names(folder: &PlacedFolder) -> Vec<String> {
        let mut names = folder.names().unwrap();
        names.sort();
        names
    }

    fn kind<T: std::fmt::Debug>(outcome: io::Result<T>) -> io::ErrorKind {
        outcome.unwrap_err().kind()
    }

    #[test]
    fn a_placed_file_is_used_where_it_lies_and_never_made() {
        let dir = tempfile::tempdir().unwrap();
        let folder = placed(dir.path());
        for how in WAYS {
            let error = folder.open("a", how).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::NotFound, "{how:?}");
            assert!(error.to_string().contains("vm/a.img"), "{error}");
            assert_eq!(kind(folder.open("c", how)), io::ErrorKind::NotFound);
        }
        assert_eq!(kind(folder.remove("b")), io::ErrorKind::NotFound);
        assert_eq!(sorted_names(&folder), [""; 0]);
        folder.sync().unwrap();

        for (name, file) in [("a", "vm/a.img"), ("b", "vm/real-b")] {
            let path = dir.path().join(file);
            fs::write(&path, vec![1; to_usize(MIB)]).unwrap();
            assert_eq!(
                kind(folder.open(name, Open::CreateNew)),
                io::ErrorKind::AlreadyExists
            );
            let reader = folder.open(name, Open::Read).unwrap();
            assert!(reader.write_at(0, &[9], Fua::No).is_err());
            for (value, how) in (2..).zip([Open::Write, Open::WriteAside, Open::Create]) {
                let writer = folder.open(name, how).unwrap();
                writer
                    .write_at(4096, &vec![value; 200_000], Fua::No)
                    .unwrap();
                writer.write_at(0, &[value; 10], Fua::Yes).unwrap();
                writer.sync().unwrap();
                let bytes = fs::read(&path).unwrap();
                assert!(
                    bytes[..10] == [value; 10] && bytes[10] == 1,
                    "{name} {how:?}"
                );
                assert!(bytes[4096..204_096].iter().all(|&byte| byte == value));
                assert_eq!(bytes.len(), to_usize(MIB));
            }
        }
        assert_eq!(sorted_names(&folder), ["a", "b"]);
        folder.sync().unwrap();
        for name in ["a", "b"] {
            folder.remove(name).unwrap();
        }
        assert_eq!(fs::read_dir(dir.path().join("vm")).unwrap().count(), 0);
        assert!(
            dir.path().join("links/b").symlink_metadata().is_ok(),
            "the link is the operator's"
        );
        assert_eq!(sorted_names(&folder), [""; 0]);
        folder.sync().unwrap();
    }

    #[test]
    fn all_other_names_belong_to_the_folder_below() {
        let dir = tempfile::tempdir().unwrap();
        let folder = placed(dir.path());
        folder.open("x.part", Open::CreateNew).unwrap();
        folder.rename("x.part", "x").unwrap();
        folder.folder("sub").unwrap();
        fs::write(dir.path().join("store/a"), "hidden").unwrap();
        assert_eq!(sorted_names(&folder), ["sub", "x"]);
        assert_eq!(kind(folder.folder("a")), io::ErrorKind::NotADirectory);
        for (from, to) in [("a", "y"), ("x", "a")] {
            assert_eq!(kind(folder.rename(from, to)), io::ErrorKind::Unsupported);
        }
        for bad in ["../x", "vm/a.img", "", ".."] {
            assert_eq!(
                kind(folder.open(bad, Open::Read)),
                io::ErrorKind::InvalidInput
            );
            assert_eq!(kind(folder.remove(bad)), io::ErrorKind::InvalidInput);
        }
        folder.remove("x").unwrap();
        assert_eq!(sorted_names(&folder), ["sub"]);
        assert_eq!(fs::read(dir.path().join("store/a")).unwrap(), b"hidden");
    }
}
