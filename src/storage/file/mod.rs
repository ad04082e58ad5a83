//! [`Storage`] and [`Folder`] over the host's file system: positional I/O on one descriptor, no shared offset.
//!
//! I/O goes through the host's page cache. What is acknowledged therefore survives the death of the process, and a
//! sync makes it survive a power cut; there is no alignment to keep and no second copy to align writes with.
//!
//! The exception are the long writes of a file that is written aside ([`FileStorage::written_aside`]): see `direct`.

mod direct;
mod syncs;

use std::{
    fs::{self, File},
    io,
    os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::Arc,
};

use nix::{
    dir::Dir,
    errno::Errno,
    fcntl::{
        FallocateFlags, OFlag, PosixFadviseAdvice, fallocate, openat, posix_fadvise, renameat,
    },
    sys::{
        stat::{Mode, mkdirat},
        uio::pwrite,
    },
    unistd::{UnlinkatFlags, Whence, lseek64, unlinkat},
};

use self::{direct::Direct, syncs::Syncs};
use super::{Access, Folder, Fua, Open, Space, Storage, check_component};
use crate::base::units::{Extent, to_u64, to_usize};

/// Zeros written where the file system cannot zero a run by itself.
static ZEROS: [u8; 64 * 1024] = [0; 64 * 1024];

/// A file or a block device.
#[derive(Debug)]
pub struct FileStorage {
    file: File,
    /// The same file opened with `O_DSYNC`: its writes are forced unit access. Block devices and files alike.
    durable: Option<File>,
    /// The way past the page cache, where it was asked for.
    direct: Option<Direct>,
    block_device: bool,
    /// None for a file that is left to the page cache.
    syncs: Option<Syncs>,
}

impl FileStorage {
    /// Opens the existing file or block device at `path`.
    pub fn open(path: &Path, access: Access) -> io::Result<Self> {
        let write = access == Access::ReadWrite;
        let file = fs::OpenOptions::new()
            .read(true)
            .write(write)
            .custom_flags(OFlag::O_CLOEXEC.bits())
            .open(path)?;
        Self::new(file, path, write)
    }

    /// Creates the file at `path`; an existing one is an error.
    pub fn create_new(path: &Path) -> io::Result<Self> {
        let file = fs::OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .open(path)?;
        Self::new(file, path, true)
    }

    /// The same file, at `path`, its long writes going past the page cache where the file system can do that.
    #[must_use]
    pub fn written_aside(self, path: &Path) -> Self {
        Self {
            direct: Direct::open(path),
            ..self
        }
    }

    /// The same file, left to the page cache: its syncs do nothing, and no write is forced unit access. Only for a file
    /// that its user would rather make again than wait for.
    #[must_use]
    pub fn left_to_cache(self) -> Self {
        Self {
            durable: None,
            syncs: None,
            ..self
        }
    }

    /// Wraps a file that is open for reading.
    pub(super) fn read_only(file: File) -> io::Result<Self> {
        Self::new(file, Path::new(""), false)
    }

    /// `path` is looked at only to write.
    fn new(file: File, path: &Path, write: bool) -> io::Result<Self> {
        let again = |flags: OFlag| {
            let mut options = fs::OpenOptions::new();
            options.write(true).custom_flags(flags.bits()).open(path)
        };
        Self::wrap(file, write.then_some(&again))
    }

    /// `again` opens the same file with further flags, to write.
    fn wrap(file: File, again: Option<&impl Fn(OFlag) -> io::Result<File>>) -> io::Result<Self> {
        let kind = file.metadata()?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "neither a file nor a block device",
            ));
        }
        let durable = again.map(|again| again(OFlag::O_DSYNC)).transpose()?;
        if durable
            .as_ref()
            .is_some_and(|durable| !is_same(durable, &file))
        {
            return Err(io::Error::other(
                "another file took its name while it was opened",
            ));
        }
        Ok(Self {
            file,
            durable,
            direct: None,
            block_device: kind.is_block_device(),
            syncs: Some(Syncs::default()),
        })
    }

    /// The file itself, for locks and identity.
    pub fn file(&self) -> &File {
        &self.file
    }

    fn write_zeros(&self, run: Extent) -> io::Result<()> {
        let mut offset = run.offset;
        while offset < run.end() {
            let step = (run.end() - offset).min(to_u64(ZEROS.len()));
            self.file.write_all_at(&ZEROS[..to_usize(step)], offset)?;
            offset += step;
        }
        Ok(())
    }

    fn fallocate(&self, mode: FallocateFlags, run: Extent) -> Result<(), Errno> {
        fallocate(&self.file, mode, signed(run.offset), signed(run.len))
    }
}

impl Storage for FileStorage {
    fn len(&self) -> io::Result<u64> {
        if self.block_device {
            let end = lseek64(&self.file, 0, Whence::SeekEnd)?;
            return Ok(unsigned(end));
        }
        Ok(self.file.metadata()?.len())
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(buf, offset)
    }

    fn write_at(&self, offset: u64, buf: &[u8], fua: Fua) -> io::Result<()> {
        if let (Fua::Yes, Some(durable)) = (fua, &self.durable) {
            let mut done = 0;
            while done < buf.len() {
                match pwrite(durable, &buf[done..], signed(offset + to_u64(done))) {
                    Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                    Ok(count) => done += count,
                    Err(Errno::EINTR) => {}
                    Err(error) => return Err(error.into()),
                }
            }
            return Ok(());
        }
        let direct = self.direct.as_ref();
        let done = direct.map_or(Ok(0), |direct| direct.write(offset, buf))?;
        self.file.write_all_at(&buf[done..], offset + to_u64(done))
    }

    fn zero(&self, run: Extent, space: Space) -> io::Result<()> {
        if run.len == 0 {
            return Ok(());
        }
        let mode = match space {
            Space::Release => {
                FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE
            }
            Space::Keep => FallocateFlags::FALLOC_FL_ZERO_RANGE,
        };
        match self.fallocate(mode, run) {
            Ok(()) => Ok(()),
            Err(Errno::EOPNOTSUPP | Errno::ENODEV | Errno::ENOSYS) => {
                let run = match space {
                    Space::Keep => run,
                    // A hole never lengthens the file.
                    Space::Release => Extent::new(
                        run.offset,
                        run.end().min(self.len()?).saturating_sub(run.offset),
                    ),
                };
                self.write_zeros(run)
            }
            Err(error) => Err(error.into()),
        }
    }

    fn data_after(&self, offset: u64) -> io::Result<Option<Extent>> {
        let len = self.len()?;
        if offset >= len {
            return Ok(None);
        }
        let start = match lseek64(&self.file, signed(offset), Whence::SeekData) {
            Ok(start) => unsigned(start),
            Err(Errno::ENXIO) => return Ok(None),
            // No knowledge of holes: all of it may be data.
            Err(Errno::EINVAL | Errno::EOPNOTSUPP) => {
                return Ok(Some(Extent::new(offset, len - offset)));
            }
            Err(error) => return Err(error.into()),
        };
        let end = unsigned(lseek64(&self.file, signed(start), Whence::SeekHole)?);
        Ok(Some(Extent::new(start, end.saturating_sub(start))))
    }

    fn announce(&self, run: Extent) {
        let advice = PosixFadviseAdvice::POSIX_FADV_WILLNEED;
        // What cannot be fetched ahead is read when it is needed.
        let _ = posix_fadvise(&self.file, signed(run.offset), signed(run.len), advice);
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.file.set_len(len)
    }

    fn sync(&self) -> io::Result<()> {
        match &self.syncs {
            Some(syncs) => syncs.run(|| self.file.sync_data()),
            None => Ok(()),
        }
    }
}

/// A folder of the host's file system: the directory that it was opened as, whatever becomes of its path. Files and folders
/// in it are found by that directory and one name, and links are not followed: nothing that is put into a store while it is
/// in use leads a write out of it.
#[derive(Debug)]
pub struct FileFolder {
    path: PathBuf,
    dir: File,
}

impl FileFolder {
    /// The folder at `path`, created with its parents if it is not there.
    pub fn open(path: &Path) -> io::Result<Self> {
        fs::create_dir_all(path)?;
        Ok(Self {
            path: path.to_owned(),
            dir: File::open(path)?,
        })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn open_file(&self, name: &str, flags: OFlag) -> io::Result<File> {
        let flags = flags | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let opened = openat(&self.dir, name, flags, Mode::from_bits_truncate(0o666));
        Ok(opened?.into())
    }
}

impl Folder for FileFolder {
    fn open(&self, name: &str, how: Open) -> io::Result<Arc<dyn Storage>> {
        check_component(name)?;
        let flags = match how {
            Open::Read => OFlag::O_RDONLY,
            Open::Write | Open::WriteAside => OFlag::O_RDWR,
            Open::CreateNew => OFlag::O_RDWR | OFlag::O_CREAT | OFlag::O_EXCL,
            Open::Create => OFlag::O_RDWR | OFlag::O_CREAT,
        };
        let file = self.open_file(name, flags)?;
        let again = |flags: OFlag| self.open_file(name, OFlag::O_WRONLY | flags);
        let storage = FileStorage::wrap(file, (how != Open::Read).then_some(&again))?;
        Ok(Arc::new(match how {
            Open::WriteAside => {
                let direct = again(OFlag::O_DIRECT).ok();
                let direct = direct.filter(|direct| is_same(direct, &storage.file));
                FileStorage {
                    direct: direct.map(Direct::new),
                    ..storage
                }
            }
            _ => storage,
        }))
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        check_component(from)?;
        check_component(to)?;
        Ok(renameat(&self.dir, from, &self.dir, to)?)
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        check_component(name)?;
        Ok(unlinkat(&self.dir, name, UnlinkatFlags::NoRemoveDir)?)
    }

    fn names(&self) -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        for entry in Dir::openat(&self.dir, ".", flags, Mode::empty())?.iter() {
            // A name that is not UTF-8 is none of ours.
            if let Ok(name) = entry?.file_name().to_str()
                && name != "."
                && name != ".."
            {
                names.push(name.to_owned());
            }
        }
        Ok(names)
    }

    fn folder(&self, name: &str) -> io::Result<Arc<dyn Folder>> {
        check_component(name)?;
        match mkdirat(&self.dir, name, Mode::from_bits_truncate(0o777)) {
            Ok(()) | Err(Errno::EEXIST) => {}
            Err(error) => return Err(error.into()),
        }
        let dir = self.open_file(name, OFlag::O_RDONLY | OFlag::O_DIRECTORY)?;
        let path = self.path.join(name);
        Ok(Arc::new(Self { path, dir }))
    }

    fn sync(&self) -> io::Result<()> {
        self.dir.sync_all()
    }
}

/// Whether two descriptors are of one file.
fn is_same(one: &File, other: &File) -> bool {
    let id = |file: &File| file.metadata().map(|about| (about.dev(), about.ino())).ok();
    id(one).is_some() && id(one) == id(other)
}

fn signed(offset: u64) -> i64 {
    i64::try_from(offset).expect("callers of Storage keep offsets within 63 bits")
}

fn unsigned(offset: i64) -> u64 {
    u64::try_from(offset).expect("lseek(2) returns an offset or an error")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holes_zeros_and_ends_are_as_promised() {
        let dir = tempfile::tempdir().unwrap();
        let storage = FileStorage::create_new(&dir.path().join("f")).unwrap();
        storage.write_at(1 << 20, &[7; 8192], Fua::Yes).unwrap();
        assert_eq!(storage.len().unwrap(), (1 << 20) + 8192);
        assert_eq!(
            storage.data_after(0).unwrap(),
            Some(Extent::new(1 << 20, 8192))
        );
        storage
            .zero(Extent::new(1 << 20, 8192), Space::Release)
            .unwrap();
        assert_eq!(storage.data_after(0).unwrap(), None);
        storage
            .zero(Extent::new(2 << 20, 4096), Space::Keep)
            .unwrap();
        assert_eq!(storage.len().unwrap(), (2 << 20) + 4096);
        let past = storage.read_at(2 << 20, &mut [0; 4097]).unwrap_err();
        assert_eq!(past.kind(), io::ErrorKind::UnexpectedEof);
    }

    #[test]
    fn a_folder_never_leaves_itself() {
        let dir = tempfile::tempdir().unwrap();
        let folder = FileFolder::open(dir.path()).unwrap();
        for bad in ["", ".", "..", "../x", "a/b", "a\0b"] {
            assert_eq!(
                folder.open(bad, Open::Create).unwrap_err().kind(),
                io::ErrorKind::InvalidInput,
                "{bad:?}"
            );
        }
        std::os::unix::fs::symlink("/etc/passwd", dir.path().join("link")).unwrap();
        assert!(
            folder.open("link", Open::Read).is_err(),
            "links are not followed"
        );
    }

    /// Whoever can write to a store must not make the program write elsewhere.
    #[test]
    fn links_that_are_put_into_a_folder_in_use_lead_nowhere() {
        use std::os::unix::fs::symlink;
        let dir = tempfile::tempdir().unwrap();
        let (store, victim) = (dir.path().join("store"), dir.path().join("victim"));
        fs::create_dir(&victim).unwrap();
        let names = || fs::read_dir(&victim).unwrap().count();
        let root = FileFolder::open(&store).unwrap();
        let machine = root.folder("vm").unwrap();
        machine.open("1.part", Open::CreateNew).unwrap();

        // The folder is swapped for a link: what is open goes on in the old one.
        fs::rename(store.join("vm"), store.join("gone")).unwrap();
        symlink(&victim, store.join("vm")).unwrap();
        let log = machine.open("2.part", Open::CreateNew).unwrap();
        log.write_at(0, b"x", Fua::Yes).unwrap();
        machine.rename("2.part", "2.hrl").unwrap();
        machine.remove("1.part").unwrap();
        machine.sync().unwrap();
        assert_eq!(machine.names().unwrap(), ["2.hrl"]);
        assert!(store.join("gone/2.hrl").exists());
        assert!(root.folder("vm").is_err(), "a link is no folder");
        assert_eq!(names(), 0);

        // A file is swapped for a link, to be written to or to be made.
        for how in [Open::Write, Open::WriteAside, Open::Create, Open::CreateNew] {
            let _ = fs::remove_file(store.join("gone/3.hrl"));
            symlink(victim.join("3.hrl"), store.join("gone/3.hrl")).unwrap();
            assert!(machine.open("3.hrl", how).is_err(), "{how:?}");
        }
        assert_eq!(names(), 0);
    }
}
