//! Where maps and intent logs live: a folder of the host whose files can be mapped, or one in memory for tests.
//!
//! # Crash contract
//! Mapped words survive the death of the process. After a power cut each word is the one of the last sync or any
//! later one. The folder in memory behaves the same: its words live in the [`StateDir`] (the page cache), a restart of
//! the program finds them again, and [`StateDir::lose`] is the power cut.
#![forbid(unsafe_code)]

use std::{
    collections::BTreeMap,
    fmt, fs, io,
    ops::Deref,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    sync::Arc,
};

use nix::fcntl::OFlag;

use super::mapping::Mapping;
use crate::{
    base::{
        sync::{
            Mutex,
            atomic::{AtomicU64, Ordering},
        },
        units::to_u64,
    },
    storage::{Folder, Fua, Open, Storage, file::FileFolder, memory::Choice},
};

/// The folder of one machine's tracking files. One process at a time uses it.
pub struct StateDir {
    folder: Arc<dyn Folder>,
    backing: Backing,
}

enum Backing {
    Files(PathBuf),
    Memory(Mutex<BTreeMap<String, Arc<CachedWords>>>),
}

impl fmt::Debug for StateDir {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.folder.fmt(f)
    }
}

impl StateDir {
    /// The folder at `path`, created if it is not there.
    pub fn open(path: &Path) -> io::Result<Self> {
        Ok(Self {
            folder: Arc::new(FileFolder::open(path)?),
            backing: Backing::Files(path.to_owned()),
        })
    }

    /// A state folder without a host: files in `folder`, mapped words in this value.
    pub fn memory(folder: Arc<dyn Folder>) -> Self {
        Self {
            folder,
            backing: Backing::Memory(Mutex::default()),
        }
    }

    /// The files.
    pub fn folder(&self) -> &dyn Folder {
        &*self.folder
    }

    /// Maps `words` words of the existing file `name` from byte `offset`.
    pub fn map(&self, name: &str, offset: u64, words: usize) -> io::Result<Words> {
        match &self.backing {
            Backing::Files(path) => {
                let file = fs::OpenOptions::new()
                    .read(true)
                    .write(true)
                    .custom_flags(OFlag::O_NOFOLLOW.bits())
                    .open(path.join(name))?;
                Mapping::file(&file, offset, words).map(Words::Mapped)
            }
            Backing::Memory(cache) => {
                let mut cache = cache.lock();
                if let Some(cached) = cache.get(name).filter(|cached| cached.words.len() == words) {
                    return Ok(Words::Cached(Arc::clone(cached)));
                }
                let storage = self.folder.open(name, Open::Write)?;
                let cached = Arc::new(CachedWords::load(storage, offset, words)?);
                cache.insert(name.to_owned(), Arc::clone(&cached));
                Ok(Words::Cached(cached))
            }
        }
    }

    /// Drops what is cached of the file `name`, which is about to be replaced.
    pub fn forget(&self, name: &str) {
        if let Backing::Memory(cache) = &self.backing {
            cache.lock().remove(name);
        }
    }

    /// Cuts the power of a folder in memory: each word that changed since its last sync is kept if `kept` says so.
    /// Called after the storage below was restored, with nothing mapped any more.
    pub fn lose(&self, kept: &mut Choice<'_>) -> io::Result<()> {
        if let Backing::Memory(cache) = &self.backing {
            for (_, cached) in std::mem::take(&mut *cache.lock()) {
                cached.write_back(kept)?;
            }
        }
        Ok(())
    }
}

/// Words that outlive the process.
#[derive(Debug)]
pub enum Words {
    /// Of a file of the host, or of nothing.
    Mapped(Mapping),
    /// Of a file in memory.
    Cached(Arc<CachedWords>),
}

impl Words {
    /// `words` zero words that last as long as the process.
    pub fn fleeting(words: usize) -> io::Result<Self> {
        Mapping::anonymous(words).map(Self::Mapped)
    }

    /// Makes all words stored so far durable.
    pub fn sync(&self) -> io::Result<()> {
        match self {
            Self::Mapped(mapping) => mapping.sync(),
            Self::Cached(cached) => cached.write_back(&mut || true),
        }
    }
}

impl Deref for Words {
    type Target = [AtomicU64];

    fn deref(&self) -> &[AtomicU64] {
        match self {
            Self::Mapped(mapping) => mapping,
            Self::Cached(cached) => &cached.words,
        }
    }
}

/// The page cache of one mapped file in memory.
#[derive(Debug)]
pub struct CachedWords {
    words: Box<[AtomicU64]>,
    storage: Arc<dyn Storage>,
    offset: u64,
    /// What the platter holds.
    synced: Mutex<Vec<u64>>,
}

impl CachedWords {
    fn load(storage: Arc<dyn Storage>, offset: u64, words: usize) -> io::Result<Self> {
        let mut bytes = vec![0; words * 8];
        storage.read_at(offset, &mut bytes)?;
        let synced: Vec<u64> = bytes
            .chunks_exact(8)
            .map(|word| u64::from_le_bytes(word.try_into().expect("chunks of eight bytes")))
            .collect();
        Ok(Self {
            words: synced.iter().copied().map(AtomicU64::new).collect(),
            storage,
            offset,
            synced: Mutex::new(synced),
        })
    }

    fn write_back(&self, kept: &mut Choice<'_>) -> io::Result<()> {
        let mut synced = self.synced.lock();
        for (index, (word, old)) in self.words.iter().zip(synced.iter_mut()).enumerate() {
            let now = word.load(Ordering::SeqCst);
            if now != *old && kept() {
                let at = self.offset + to_u64(index) * 8;
                self.storage.write_at(at, &now.to_le_bytes(), Fua::No)?;
                *old = now;
            }
        }
        self.storage.sync()
    }
}
