//! Where a differencing image finds its parent.
//!
//! A child's file names its parent by paths of the machine that made it: relative to the child, and absolute ones with
//! drive letters or volume names. All of them are text from a file that nobody vouches for. So they are looked up beneath
//! one folder that a person named, and nowhere else; whether the file found is the right one is for the image format to
//! say, which compares identities. A parent is opened for reading only, and as long as it is in use nobody who honours
//! locks opens it for writing.
//!
//! # How a path is read
//! - Relative (`.\base.vhdx`, `..\..\base\b.vhdx`): from the child's own folder if that is beneath the root, otherwise
//!   as if the child stood in the root itself. A path that climbs out of the root is refused.
//! - Absolute (`C:\vm\b.vhdx`, `\\?\Volume{..}\vm\b.vhdx`, `\\host\share\b.vhdx`): its last names beneath the root, the
//!   most of them first: `vm/b.vhdx`, then `b.vhdx`.
//!
//! Each name is tried as written and then in any case.

use std::{fmt, io, path::Path, path::PathBuf, sync::Arc};

use crate::storage::{
    Storage,
    beneath::{Beneath, Found},
};

/// Most names of a path: Windows paths have at most 32767 letters, and folders of this depth nobody keeps disks in.
const PATH_NAMES_MAX: usize = 64;

/// Finds parents. What an implementation gives away is read-only and stays as it is while it is in use.
pub trait Parents: Send + Sync + fmt::Debug {
    /// The first of `paths`, which a child names in the order to try them, that is there.
    ///
    /// A file that the chain holds already is [`ParentsError::Loop`].
    fn find(&self, paths: &[String]) -> Result<Parent, ParentsError>;
}

/// A parent that was found.
#[derive(Debug)]
pub struct Parent {
    /// Its bytes; for reading only.
    pub storage: Arc<dyn Storage>,
    /// What to call it in messages.
    pub name: String,
    /// Where it may find its own parent.
    pub parents: Arc<dyn Parents>,
}

/// Why a parent was not found. The child's own name is in the error around this one.
#[derive(Debug, thiserror::Error)]
pub enum ParentsError {
    /// Nobody said where parents are.
    #[error(
        "it is a differencing image and needs its parent ({}); name the folder that holds its parents with --parents DIR",
        .paths.join(", ")
    )]
    NotConfigured {
        /// What the child calls it.
        paths: Vec<String>,
    },
    /// None of the names is there.
    #[error("no parent called {} is beneath {}; copy it there", .paths.join(", "), root.display())]
    NotFound {
        /// What the child calls it.
        paths: Vec<String>,
        /// Where it was looked for.
        root: PathBuf,
    },
    /// The only place a name could mean is outside of the folder.
    #[error(
        "the parent's path {path} leads out of {}; name a folder that holds the whole chain with --parents DIR",
        root.display()
    )]
    Outside {
        /// What the child calls it.
        path: String,
        /// Where it was looked for.
        root: PathBuf,
    },
    /// Somebody has it open for writing.
    #[error("the parent {name} is opened for writing elsewhere; stop what writes to it")]
    InUse {
        /// The file.
        name: String,
    },
    /// The chain comes back to a file that is part of it.
    #[error("the parent {name} is its own descendant; restore the right parent from a copy")]
    Loop {
        /// The file.
        name: String,
    },
    /// The file is there and does not open.
    #[error("cannot open the parent {name}")]
    Io {
        /// The file.
        name: String,
        /// What the system said.
        #[source]
        source: io::Error,
    },
}

/// No parents: a differencing image is refused.
#[derive(Clone, Copy, Debug)]
pub struct NoParents;

impl Parents for NoParents {
    fn find(&self, paths: &[String]) -> Result<Parent, ParentsError> {
        Err(ParentsError::NotConfigured {
            paths: paths.to_vec(),
        })
    }
}

/// A folder of the host in which parents are looked for, as seen from one image of a chain.
#[derive(Clone, Debug)]
pub struct ParentRoot {
    root: Arc<Beneath>,
    /// The folder of the image, from the root.
    folder: Vec<String>,
    /// The files of the chain so far.
    chain: Vec<(u64, u64)>,
}

impl ParentRoot {
    /// The folder `root`, for the parents of the image at `child`.
    pub fn new(root: &Path, child: &Path) -> io::Result<Self> {
        let root = Beneath::open(root)?;
        let child = child.canonicalize()?;
        let folder = child.parent().and_then(|folder| root.names_to(folder));
        Ok(Self {
            folder: folder.unwrap_or_default(),
            chain: vec![Beneath::id_of(&child)?],
            root: Arc::new(root),
        })
    }

    fn name_of(&self, names: &[String]) -> String {
        let below: PathBuf = names.iter().collect();
        self.root.path().join(below).display().to_string()
    }

    fn accept(&self, found: Found) -> Result<Parent, ParentsError> {
        let Found {
            storage,
            mut names,
            id,
        } = found;
        let name = self.name_of(&names);
        if self.chain.contains(&id) {
            return Err(ParentsError::Loop { name });
        }
        names.pop();
        let parents = Self {
            root: Arc::clone(&self.root),
            folder: names,
            chain: self.chain.iter().copied().chain([id]).collect(),
        };
        Ok(Parent {
            storage: Arc::new(storage),
            name,
            parents: Arc::new(parents),
        })
    }

    /// Whether a file that cannot be locked is part of the chain: its writer is then the reader of this chain itself.
    fn is_in_chain(&self, names: &[String]) -> bool {
        let path: PathBuf = names.iter().collect();
        Beneath::id_of(&self.root.path().join(path)).is_ok_and(|id| self.chain.contains(&id))
    }
}

impl Parents for ParentRoot {
    fn find(&self, paths: &[String]) -> Result<Parent, ParentsError> {
        let root = || self.root.path().to_owned();
        let mut outside = None;
        for path in paths {
            let Some(places) = places(path, &self.folder) else {
                outside.get_or_insert(path);
                continue;
            };
            for names in places {
                let error = match self.root.find(&names) {
                    Ok(found) => return self.accept(found),
                    Err(error) => error,
                };
                let name = self.name_of(&names);
                match error.kind() {
                    io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => {}
                    io::ErrorKind::CrossesDevices => {
                        outside.get_or_insert(path);
                    }
                    io::ErrorKind::ResourceBusy if self.is_in_chain(&names) => {
                        return Err(ParentsError::Loop { name });
                    }
                    io::ErrorKind::ResourceBusy => return Err(ParentsError::InUse { name }),
                    _ => {
                        return Err(ParentsError::Io {
                            name,
                            source: error,
                        });
                    }
                }
            }
        }
        Err(match outside {
            Some(path) => ParentsError::Outside {
                path: path.clone(),
                root: root(),
            },
            None => ParentsError::NotFound {
                paths: paths.to_vec(),
                root: root(),
            },
        })
    }
}

/// The places beneath the root that `path` may mean, in the order to try, for a child in `folder`; nothing if it climbs
/// out of the root. See the module.
fn places(path: &str, folder: &[String]) -> Option<Vec<Vec<String>>> {
    let separators = ['\\', '/'];
    let absolute = path.starts_with(separators) || path.chars().nth(1) == Some(':');
    let mut names: Vec<String> = if absolute {
        Vec::new()
    } else {
        folder.to_vec()
    };
    let mut last_is_name = false;
    for name in path.split(separators) {
        last_is_name = false;
        match name {
            "" | "." => {}
            ".." => drop(names.pop()?),
            name => {
                names.push(name.to_owned());
                last_is_name = true;
            }
        }
    }
    if !last_is_name {
        return Some(Vec::new());
    }
    if !absolute {
        return Some(vec![names]);
    }
    let first = names.len().saturating_sub(PATH_NAMES_MAX);
    Some(
        (first..names.len())
            .map(|at| names[at..].to_vec())
            .collect(),
    )
}

/// Parents in memory, each known by its file name alone.
#[derive(Clone, Debug, Default)]
pub struct MemoryParents {
    files: Vec<(String, Arc<dyn Storage>)>,
    chain: Vec<Arc<dyn Storage>>,
}

impl MemoryParents {
    /// Parents by their file names.
    pub fn new(files: Vec<(String, Arc<dyn Storage>)>) -> Self {
        Self {
            files,
            chain: Vec::new(),
        }
    }
}

impl Parents for MemoryParents {
    fn find(&self, paths: &[String]) -> Result<Parent, ParentsError> {
        let named = |path: &String| {
            let name = path.rsplit(['\\', '/']).next()?;
            let found = |(other, _): &&(String, _)| other.eq_ignore_ascii_case(name);
            self.files.iter().find(found).cloned()
        };
        let Some((name, storage)) = paths.iter().find_map(named) else {
            return Err(ParentsError::NotFound {
                paths: paths.to_vec(),
                root: "memory".into(),
            });
        };
        if self.chain.iter().any(|other| Arc::ptr_eq(other, &storage)) {
            return Err(ParentsError::Loop { name });
        }
        let mut parents = self.clone();
        parents.chain.push(Arc::clone(&storage));
        Ok(Parent {
            storage,
            name,
            parents: Arc::new(parents),
        })
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn names(paths: &[&str]) -> Vec<Vec<String>> {
        let split = |path: &&str| path.split('/').map(str::to_owned).collect();
        paths.iter().map(split).collect()
    }

    #[test]
    fn paths_of_windows_are_read_beneath_the_root() {
        let folder = [String::from("a"), String::from("b")];
        let cases: [(&str, &[&str]); 12] = [
            (r".\x.vhdx", &["a/b/x.vhdx"]),
            ("x.vhdx", &["a/b/x.vhdx"]),
            ("./x.vhdx", &["a/b/x.vhdx"]),
            (r"..\..\p\x.vhdx", &["p/x.vhdx"]),
            (r"c\..\.\x.vhdx", &["a/b/x.vhdx"]),
            (r"C:\v\x.vhdx", &["C:/v/x.vhdx", "v/x.vhdx", "x.vhdx"]),
            (r"\\?\d:\x.vhdx", &["?/d:/x.vhdx", "d:/x.vhdx", "x.vhdx"]),
            (
                r"\\?\Volume{7}\v\x.vhdx",
                &[
                    "?/Volume{7}/v/x.vhdx",
                    "Volume{7}/v/x.vhdx",
                    "v/x.vhdx",
                    "x.vhdx",
                ],
            ),
            ("/v/x.vhdx", &["v/x.vhdx", "x.vhdx"]),
            (r"C:\v\..\x.vhdx", &["C:/x.vhdx", "x.vhdx"]),
            (r".\", &[]),
            ("", &[]),
        ];
        for (path, expected) in cases {
            assert_eq!(places(path, &folder), Some(names(expected)), "{path}");
        }
        for path in [r"..\..\..\x.vhdx", r"\\..\x.vhdx", r"a\..\..\..\..\x"] {
            assert_eq!(places(path, &folder), None, "{path}");
        }
        let deep = format!(r"C:\{}x.vhdx", r"d\".repeat(1000));
        assert_eq!(places(&deep, &folder).unwrap().len(), PATH_NAMES_MAX);
    }

    fn find(root: &ParentRoot, paths: &[&str]) -> Result<Parent, ParentsError> {
        let paths: Vec<String> = paths.iter().map(|&path| path.to_owned()).collect();
        root.find(&paths)
    }

    #[test]
    fn parents_are_found_from_the_folder_of_their_child() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        fs::create_dir_all(at("root/vm/base")).unwrap();
        fs::write(at("root/vm/child"), "1").unwrap();
        fs::write(at("root/vm/base/P.vhdx"), "22").unwrap();
        fs::write(at("root/grand.vhdx"), "333").unwrap();
        fs::write(at("outside"), "4444").unwrap();
        let root = ParentRoot::new(&at("root"), &at("root/vm/child")).unwrap();
        let parent = find(&root, &[r".\gone.vhdx", r".\base\p.vhdx"]).unwrap();
        assert_eq!(parent.storage.len().unwrap(), 2);
        assert!(
            parent.name.ends_with("root/vm/base/P.vhdx"),
            "{}",
            parent.name
        );
        let grand = parent.parents.find(&[r"..\..\grand.vhdx".into()]).unwrap();
        assert_eq!(grand.storage.len().unwrap(), 3);
        let back = grand.parents.find(&["vm/base/p.vhdx".into()]);
        assert!(matches!(back, Err(ParentsError::Loop { .. })), "{back:?}");
        let own = find(&root, &["child"]);
        assert!(matches!(own, Err(ParentsError::Loop { .. })), "{own:?}");
        for (paths, is_outside) in [
            ([r"..\..\outside", r"Z:\x"], true),
            ([r"Z:\x", r".\y"], false),
        ] {
            match find(&root, &paths) {
                Err(ParentsError::Outside { path, .. }) if is_outside => assert_eq!(path, paths[0]),
                Err(ParentsError::NotFound { .. }) if !is_outside => {}
                other => panic!("{paths:?}: {other:?}"),
            }
        }
        // A child that is not beneath the root looks from the root itself.
        let elsewhere = ParentRoot::new(&at("root"), &at("outside")).unwrap();
        find(&elsewhere, &[r".\grand.vhdx"]).unwrap();
        find(&elsewhere, &[r"D:\old\vm\base\p.vhdx"]).unwrap();
    }

    #[test]
    fn a_parent_that_is_written_to_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        fs::write(at("child"), "1").unwrap();
        fs::write(at("parent"), "2").unwrap();
        let root = ParentRoot::new(dir.path(), &at("child")).unwrap();
        let writers = [at("parent"), at("child")].map(|path| fs::File::open(path).unwrap());
        for writer in &writers {
            writer.try_lock().unwrap();
        }
        let error = find(&root, &["parent"]).unwrap_err();
        assert!(matches!(error, ParentsError::InUse { .. }), "{error}");
        let error = find(&root, &["child"]).unwrap_err();
        assert!(matches!(error, ParentsError::Loop { .. }), "{error}");
    }

    #[test]
    fn without_a_root_the_flag_is_named() {
        let error = NoParents.find(&["a".into(), "b".into()]).unwrap_err();
        let text = error.to_string();
        assert!(
            text.contains("--parents") && text.contains("a, b"),
            "{text}"
        );
    }
}
