//! The tree of files: a root, at most one level of folders, one file for each disk. It never changes while mounted.
//!
//! Inode numbers are positions in one table: 1 is the root, then come folders and files in the order they were given.
//! What a kernel sends is looked up in that table, so a number that was never given out is `ENOENT` and nothing else.

use std::{collections::HashSet, ffi::OsStr, time::SystemTime};

use nix::errno::Errno;

use super::{
    file::{File, Writability},
    latency::Recorders,
    mount::{FileIndex, MountError, MountOptions, MountedDisk, Owner, Visibility},
};
use crate::base::units::{BLOCK_BYTES, to_u64, to_usize};

/// What every file name ends with: monitors and people tell a raw image by it.
const SUFFIX: &str = ".raw";

/// The number of a file or folder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Inode(pub u64);

impl Inode {
    pub(super) const ROOT: Self = Self(1);

    fn at(position: usize) -> Self {
        Self(to_u64(position) + 1)
    }
}

/// File or folder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Folder,
    File,
}

/// What stat(2) tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Attributes {
    pub inode: Inode,
    pub kind: Kind,
    /// Bytes.
    pub size: u64,
    /// Permission bits.
    pub mode: u16,
    pub links: u32,
    pub owner: Owner,
    pub modified: SystemTime,
}

/// What statfs(2) tells, in units of [`BLOCK_BYTES`]. Nothing is ever free: no file can be made or grown here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Usage {
    pub blocks: u64,
    pub files: u64,
}

#[derive(Debug)]
struct Node {
    name: String,
    parent: Inode,
    content: Content,
}

#[derive(Debug)]
enum Content {
    Folder(Vec<Inode>),
    File(FileIndex),
}

/// The tree, with the disks behind its files.
#[derive(Debug)]
pub(super) struct Files {
    /// Inode `n` is at `n - 1`.
    nodes: Vec<Node>,
    disks: Vec<File>,
    owner: Owner,
    file_mode: u16,
    folder_mode: u16,
    mounted: SystemTime,
    recorders: Recorders,
}

impl Files {
    /// The tree of `disks`. Two files of the same name in one folder are an error, as is a file named like a folder.
    pub(super) fn new(options: &MountOptions, disks: Vec<MountedDisk>) -> Result<Self, MountError> {
        let mut tree = Self {
            nodes: vec![Node {
                name: String::new(),
                parent: Inode::ROOT,
                content: Content::Folder(Vec::new()),
            }],
            disks: Vec::with_capacity(disks.len()),
            owner: options.owner,
            file_mode: options.file_mode & 0o666,
            folder_mode: match options.access {
                Visibility::Owner => 0o500,
                Visibility::AllUsers => 0o555,
            },
            mounted: SystemTime::now(),
            recorders: Recorders::new(options.threads),
        };
        // Folders first, so that a file of the same name is found out whatever the order.
        let mut folders = HashSet::new();
        for folder in disks.iter().filter_map(|disk| disk.folder.as_ref()) {
            if folders.insert(folder.as_str()) {
                tree.add(Inode::ROOT, folder.as_str(), Content::Folder(Vec::new()))?;
            }
        }
        for disk in disks {
            let name = format!("{}{SUFFIX}", disk.file_name);
            let (parent, label) = match &disk.folder {
                None => (Inode::ROOT, name.clone()),
                Some(folder) => {
                    let parent = tree
                        .child(Inode::ROOT, OsStr::new(folder.as_str()))
                        .expect("the folders of all disks were added above");
                    (parent, format!("{folder}/{name}"))
                }
            };
            let index = FileIndex(tree.disks.len());
            tree.add(parent, &name, Content::File(index))?;
            tree.disks
                .push(File::new(label, disk.disk, disk.writability));
        }
        Ok(tree)
    }

    fn add(&mut self, parent: Inode, name: &str, content: Content) -> Result<(), MountError> {
        if self.child(parent, OsStr::new(name)).is_ok() {
            return Err(MountError::Duplicate(name.to_owned()));
        }
        let inode = Inode::at(self.nodes.len());
        self.nodes.push(Node {
            name: name.to_owned(),
            parent,
            content,
        });
        match &mut self.nodes[to_usize(parent.0 - 1)].content {
            Content::Folder(children) => children.push(inode),
            Content::File(_) => unreachable!("only folders are given as parents"),
        }
        Ok(())
    }

    fn node(&self, inode: Inode) -> Result<&Node, Errno> {
        let position = inode.0.checked_sub(1).ok_or(Errno::ENOENT)?;
        self.nodes.get(to_usize(position)).ok_or(Errno::ENOENT)
    }

    fn children(&self, folder: Inode) -> Result<&[Inode], Errno> {
        match &self.node(folder)?.content {
            Content::Folder(children) => Ok(children),
            Content::File(_) => Err(Errno::ENOTDIR),
        }
    }

    /// The file or folder called `name` in `folder`.
    pub(super) fn child(&self, folder: Inode, name: &OsStr) -> Result<Inode, Errno> {
        for child in self.children(folder)? {
            if OsStr::new(&self.node(*child)?.name) == name {
                return Ok(*child);
            }
        }
        Err(Errno::ENOENT)
    }

    /// The disk behind an inode; `EISDIR` for a folder.
    pub(super) fn file(&self, inode: Inode) -> Result<&File, Errno> {
        match self.node(inode)?.content {
            Content::File(index) => Ok(&self.disks[index.0]),
            Content::Folder(_) => Err(Errno::EISDIR),
        }
    }

    /// All files, in the order of their disks.
    pub(super) fn files(&self) -> &[File] {
        &self.disks
    }

    /// Waits for all requests under way and lets go of every disk.
    pub(super) fn withdraw(&self) {
        for disk in &self.disks {
            disk.withdraw();
        }
    }

    /// How long requests took so far.
    pub(super) fn recorders(&self) -> &Recorders {
        &self.recorders
    }

    /// What stat(2) tells about an inode.
    pub(super) fn attributes(&self, inode: Inode) -> Result<Attributes, Errno> {
        Ok(match &self.node(inode)?.content {
            Content::Folder(children) => {
                let mut links = 2;
                for child in children {
                    links += u32::from(matches!(self.node(*child)?.content, Content::Folder(_)));
                }
                Attributes {
                    inode,
                    kind: Kind::Folder,
                    size: 0,
                    mode: self.folder_mode,
                    links,
                    owner: self.owner,
                    modified: self.mounted,
                }
            }
            Content::File(index) => {
                let file = &self.disks[index.0];
                let writable = file.writability() == Writability::Writable;
                Attributes {
                    inode,
                    kind: Kind::File,
                    size: file.size(),
                    mode: self.file_mode & if writable { 0o666 } else { 0o444 },
                    links: 1,
                    owner: self.owner,
                    modified: file.modified(),
                }
            }
        })
    }

    /// What setattr is allowed to change: nothing. Setting the size it has, and times, is accepted and ignored, because
    /// tools do both without need; `EPERM` is what truncate(2) documents for a file system that cannot resize.
    pub(super) fn check_change(&self, inode: Inode, change: &Change) -> Result<(), Errno> {
        let node = self.node(inode)?;
        let same_size = match (change.size, &node.content) {
            (None, _) => true,
            (Some(_), Content::Folder(_)) => return Err(Errno::EISDIR),
            (Some(size), Content::File(index)) => size == self.disks[index.0].size(),
        };
        if same_size && !change.permissions {
            Ok(())
        } else {
            Err(Errno::EPERM)
        }
    }

    /// The entries of a folder, with `.` and `..`.
    pub(super) fn entries(&self, folder: Inode) -> Result<Vec<(Inode, Kind, &str)>, Errno> {
        let children = self.children(folder)?;
        let mut entries = vec![
            (folder, Kind::Folder, "."),
            (self.node(folder)?.parent, Kind::Folder, ".."),
        ];
        for child in children {
            let node = self.node(*child)?;
            let kind = match node.content {
                Content::Folder(_) => Kind::Folder,
                Content::File(_) => Kind::File,
            };
            entries.push((*child, kind, &node.name));
        }
        Ok(entries)
    }

    /// What statfs(2) tells.
    pub(super) fn usage(&self) -> Usage {
        let blocks = |file: &File| file.size().div_ceil(BLOCK_BYTES);
        Usage {
            blocks: self.disks.iter().map(blocks).sum(),
            files: to_u64(self.disks.len()),
        }
    }
}

/// What a setattr request wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Change {
    /// A new size in bytes.
    pub size: Option<u64>,
    /// Whether mode, user or group are to change.
    pub permissions: bool,
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::{
        base::ids::Name,
        disk::{Access, raw::RawDisk},
        shim::Refusal,
        storage::{
            Storage,
            memory::{MemoryStorage, Power},
        },
    };

    fn disk(folder: Option<&str>, name: &str) -> MountedDisk {
        let storage = MemoryStorage::new(&Power::new());
        storage.set_len(1 << 20).unwrap();
        MountedDisk {
            folder: folder.map(|folder| Name::new(folder).unwrap()),
            file_name: Name::new(name).unwrap(),
            disk: Arc::new(RawDisk::open(storage, Access::ReadWrite).unwrap()),
            writability: Writability::Writable,
        }
    }

    fn tree(disks: Vec<MountedDisk>) -> Result<Files, MountError> {
        Files::new(&MountOptions::new("/nowhere"), disks)
    }

    fn find(files: &Files, path: &str) -> Result<Inode, Errno> {
        path.split('/').try_fold(Inode::ROOT, |folder, name| {
            files.child(folder, OsStr::new(name))
        })
    }

    #[test]
    fn disks_are_found_where_they_were_put() {
        let disks = vec![
            disk(Some("web"), "os"),
            disk(None, "alone"),
            disk(Some("web"), "data"),
            disk(Some("db"), "os"),
        ];
        let files = tree(disks).unwrap();
        for path in ["web/os.raw", "web/data.raw", "db/os.raw", "alone.raw"] {
            let inode = find(&files, path).unwrap();
            let attributes = files.attributes(inode).unwrap();
            assert_eq!((attributes.kind, attributes.size), (Kind::File, 1 << 20));
            assert_eq!(attributes.mode, 0o600);
        }
        let missing = [
            ("os.raw", Errno::ENOENT),
            ("web/os", Errno::ENOENT),
            ("alone.raw/x", Errno::ENOTDIR),
        ];
        for (path, errno) in missing {
            assert_eq!(find(&files, path), Err(errno), "{path}");
        }
        let root = files.entries(Inode::ROOT).unwrap();
        let names: Vec<_> = root.iter().map(|(_, _, name)| *name).collect();
        assert_eq!(names, [".", "..", "web", "db", "alone.raw"]);
        assert_eq!(files.attributes(Inode::ROOT).unwrap().links, 4);
        let web = find(&files, "web").unwrap();
        assert_eq!(files.entries(web).unwrap()[1].0, Inode::ROOT);
        assert_eq!(
            files.usage(),
            Usage {
                blocks: 1024,
                files: 4
            }
        );
    }

    #[test]
    fn two_files_of_one_name_are_refused() {
        for disks in [
            vec![disk(None, "a"), disk(None, "a")],
            vec![disk(Some("m"), "a"), disk(Some("m"), "a")],
            vec![disk(None, "a"), disk(Some("a.raw"), "b")],
        ] {
            assert!(matches!(tree(disks), Err(MountError::Duplicate(_))));
        }
    }

    #[test]
    fn inodes_that_were_never_given_out_do_not_exist() {
        let files = tree(vec![disk(None, "a")]).unwrap();
        for number in [0, 3, u64::MAX] {
            assert_eq!(
                files.attributes(Inode(number)),
                Err(Errno::ENOENT),
                "{number}"
            );
            assert_eq!(files.file(Inode(number)).map(|_| ()), Err(Errno::ENOENT));
        }
        assert_eq!(files.file(Inode::ROOT).map(|_| ()), Err(Errno::EISDIR));
        assert_eq!(files.entries(Inode(2)).map(|_| ()), Err(Errno::ENOTDIR));
    }

    #[test]
    fn sizes_and_permissions_stay() {
        let files = tree(vec![disk(None, "a")]).unwrap();
        let change =
            |size, permissions| files.check_change(Inode(2), &Change { size, permissions });
        assert_eq!(change(Some(1 << 20), false), Ok(()));
        assert_eq!(change(None, false), Ok(()), "times are nobody's business");
        for size in [0, (1 << 20) - 1, (1 << 20) + 1] {
            assert_eq!(change(Some(size), false), Err(Errno::EPERM), "{size}");
        }
        assert_eq!(change(None, true), Err(Errno::EPERM));
    }

    #[test]
    fn a_file_that_refuses_writers_shows_it() {
        let files = tree(vec![disk(None, "a")]).unwrap();
        files.files()[0].set_writable(Writability::Refused(Refusal::IoError));
        assert_eq!(files.attributes(Inode(2)).unwrap().mode, 0o400);
    }
}
