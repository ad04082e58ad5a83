//! What a host's bytes lie on: the storage in memory, with the death of the process and failing calls added.
//!
//! [`Power`] knows what a power cut leaves. A [`Medium`] adds the rest: after a number of changing calls the process is
//! dead and every call fails, so that a kill and a power cut can come between any two steps of an operation; one call on a
//! kind of file fails, a write torn; a sync fails; no space is left.

use std::{
    collections::BTreeMap,
    io,
    sync::{Arc, Weak},
};

use parking_lot::Mutex;

use crate::{
    base::units::{Extent, SECTOR_BYTES, to_u64, to_usize},
    storage::{
        Folder, Fua, Open, Space, Storage,
        memory::{MemoryFolder, Power},
    },
    volume::ImageStamp,
};

/// Files that fail apart from each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Kind {
    Ledger,
    Image,
    Log,
    Layer,
    Tracking,
}

impl Kind {
    /// What a file is, in a folder whose files are all of one kind if that is given.
    pub(super) fn of(folder: Option<Self>, name: &str) -> Self {
        let log = [".hrl", ".part"].iter().any(|end| name.ends_with(end));
        match folder {
            Some(kind) => kind,
            None if log => Self::Log,
            None if name.starts_with("node.redb") => Self::Ledger,
            None => Self::Image,
        }
    }
}

/// A call that fails once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Fault {
    Read,
    /// Of a write some sectors may have arrived.
    Write,
    Sync,
}

#[derive(Debug, Default)]
struct State {
    /// Changing calls so far.
    calls: u64,
    dies_at: Option<u64>,
    /// The fault that waits for its call, and how many such calls go well before.
    fault: Option<(Kind, Fault, u64)>,
    /// Delta logs and layers find no space.
    full: bool,
    /// Syncs of delta logs are answered and not made.
    forgets_logs: bool,
    /// A sync or a forced write of a layer failed: what the page cache holds of it means nothing any more.
    doubted: bool,
}

/// The disks of one host.
#[derive(Debug)]
pub(super) struct Medium {
    pub(super) power: Arc<Power>,
    state: Mutex<State>,
}

fn dead() -> io::Error {
    io::Error::other("the process is dead")
}

fn broken(what: &str) -> io::Error {
    io::Error::other(format!("an injected fault: {what}"))
}

impl Medium {
    pub(super) fn new() -> Arc<Self> {
        Arc::new(Self {
            power: Power::new(),
            state: Mutex::default(),
        })
    }

    /// Lets so many more changing calls happen; then the process is dead.
    pub(super) fn die_after(&self, calls: u64) {
        let mut state = self.state.lock();
        state.dies_at = Some(state.calls + calls);
    }

    pub(super) fn is_dead(&self) -> bool {
        self.state.lock().is_dead()
    }

    /// Lets a process go: what its end would still write does not arrive. The next one finds the files as they are.
    pub(super) fn end_process(&self, end: impl FnOnce()) {
        self.die_after(0);
        end();
        let mut state = self.state.lock();
        state.dies_at = None;
        state.fault = None;
    }

    pub(super) fn forget_log_syncs(&self, forgets: bool) {
        self.state.lock().forgets_logs = forgets;
    }

    pub(super) fn fail(&self, kind: Kind, fault: Fault, after: u64) {
        self.state.lock().fault = Some((kind, fault, after));
    }

    pub(super) fn set_full(&self, full: bool) {
        self.state.lock().full = full;
    }

    pub(super) fn is_full(&self) -> bool {
        self.state.lock().full
    }

    /// Whether a layer gave up its trust in what was not flushed since this was asked last.
    pub(super) fn take_doubt(&self) -> bool {
        std::mem::take(&mut self.state.lock().doubted)
    }

    /// No fault waits any more, no death either, and there is space.
    pub(super) fn mend(&self) {
        let mut state = self.state.lock();
        state.fault = None;
        state.full = false;
        state.dies_at = None;
    }

    /// Changing calls so far: two runs that are equal have made equally many.
    pub(super) fn calls(&self) -> u64 {
        self.state.lock().calls
    }

    fn read(&self, kind: Kind) -> io::Result<()> {
        let mut state = self.state.lock();
        if state.is_dead() {
            return Err(dead());
        }
        if state.due(kind, Fault::Read) {
            return Err(broken("read"));
        }
        Ok(())
    }

    /// A call that makes a file of this kind durable failed. A dead process gives nothing up: what it wrote is there.
    fn doubt(&self, kind: Kind) {
        let mut state = self.state.lock();
        state.doubted |= kind == Kind::Layer && !state.is_dead();
    }

    /// Counts a changing call; whether it fails although the process lives.
    fn change(&self, kind: Kind, fault: Option<Fault>) -> io::Result<bool> {
        let mut state = self.state.lock();
        if state.is_dead() {
            return Err(dead());
        }
        state.calls += 1;
        let grows = matches!(kind, Kind::Log | Kind::Layer);
        if state.full && grows && fault == Some(Fault::Write) {
            return Err(io::ErrorKind::StorageFull.into());
        }
        Ok(fault.is_some_and(|fault| state.due(kind, fault)))
    }
}

impl State {
    fn is_dead(&self) -> bool {
        self.dies_at.is_some_and(|at| self.calls >= at)
    }

    fn due(&mut self, kind: Kind, fault: Fault) -> bool {
        match &mut self.fault {
            Some((of, what, after)) if (*of, *what) == (kind, fault) => {
                if *after > 0 {
                    *after -= 1;
                    return false;
                }
                self.fault = None;
                true
            }
            _ => false,
        }
    }
}

/// A folder on a medium.
#[derive(Debug)]
pub(super) struct MediumFolder {
    me: Weak<Self>,
    medium: Arc<Medium>,
    inner: Arc<MemoryFolder>,
    /// What its files are, if they are all alike.
    kind: Option<Kind>,
    /// Identity and changes of each file, by its name: what a file system says of who wrote it.
    files: Arc<Mutex<BTreeMap<String, Written>>>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Written {
    inode: u64,
    changes: i64,
}

impl MediumFolder {
    pub(super) fn new(medium: &Arc<Medium>, kind: Option<Kind>) -> Arc<Self> {
        Arc::new_cyclic(|me| Self {
            me: Weak::clone(me),
            medium: Arc::clone(medium),
            inner: MemoryFolder::new(&medium.power),
            kind,
            files: Arc::default(),
        })
    }

    /// Flips a bit of a file, as a disk does that forgets.
    pub(super) fn flip(&self, name: &str, at: u64) -> io::Result<()> {
        let file = self.inner.open(name, Open::Write)?;
        let (at, bit) = (at / 8 % file.len()?.max(1), at % 8);
        let mut byte = [0];
        file.read_at(at, &mut byte)?;
        file.write_at(at, &[byte[0] ^ (1 << bit)], Fua::Yes)
    }

    /// What tells that somebody else wrote the file `name`.
    pub(super) fn stamp(&self, name: &str) -> io::Result<ImageStamp> {
        let bytes = self.inner.open(name, Open::Read)?.len()?;
        let written = self.files.lock().get(name).copied().unwrap_or_default();
        Ok(ImageStamp {
            inode: written.inode,
            bytes,
            modified: (written.changes, 0),
        })
    }
}

impl Folder for MediumFolder {
    fn open(&self, name: &str, how: Open) -> io::Result<Arc<dyn Storage>> {
        let kind = Kind::of(self.kind, name);
        let there = self.inner.open(name, Open::Read).is_ok();
        if !there && matches!(how, Open::CreateNew | Open::Create) {
            if self.medium.change(kind, Some(Fault::Write))? {
                return Err(broken("create"));
            }
        } else {
            self.medium.read(kind)?;
        }
        let inner = self.inner.open(name, how)?;
        if !there {
            let written = Written {
                inode: self.medium.calls(),
                changes: 0,
            };
            self.files.lock().insert(name.to_owned(), written);
        }
        Ok(Arc::new(MediumFile {
            medium: Arc::clone(&self.medium),
            files: Arc::clone(&self.files),
            name: name.to_owned(),
            inner,
            kind,
        }))
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        let kind = Kind::of(self.kind, from);
        if self.medium.change(kind, Some(Fault::Write))? {
            return Err(broken("rename"));
        }
        self.inner.rename(from, to)
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        self.medium.change(Kind::of(self.kind, name), None)?;
        self.inner.remove(name)
    }

    fn names(&self) -> io::Result<Vec<String>> {
        self.medium.read(self.kind.unwrap_or(Kind::Log))?;
        self.inner.names()
    }

    fn folder(&self, _: &str) -> io::Result<Arc<dyn Folder>> {
        let me = self.me.upgrade();
        me.map(|me| me as Arc<dyn Folder>).ok_or_else(dead)
    }

    fn sync(&self) -> io::Result<()> {
        if self
            .medium
            .change(self.kind.unwrap_or(Kind::Log), Some(Fault::Sync))?
        {
            return Err(broken("sync"));
        }
        self.inner.sync()
    }
}

#[derive(Debug)]
struct MediumFile {
    medium: Arc<Medium>,
    files: Arc<Mutex<BTreeMap<String, Written>>>,
    name: String,
    inner: Arc<dyn Storage>,
    kind: Kind,
}

impl MediumFile {
    fn changed(&self) {
        if let Some(written) = self.files.lock().get_mut(&self.name) {
            written.changes += 1;
        }
    }
}

impl Storage for MediumFile {
    fn len(&self) -> io::Result<u64> {
        self.medium.read(self.kind)?;
        self.inner.len()
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.medium.read(self.kind)?;
        self.inner.read_at(offset, buf)
    }

    fn write_at(&self, offset: u64, buf: &[u8], fua: Fua) -> io::Result<()> {
        let fails = self.medium.change(self.kind, Some(Fault::Write));
        if fua == Fua::Yes && !matches!(fails, Ok(false)) {
            self.medium.doubt(self.kind);
        }
        let fails = fails?;
        self.changed();
        if !fails {
            return self.inner.write_at(offset, buf, fua);
        }
        // Every second failing write is torn in the middle, at a sector of the file.
        if self.medium.calls().is_multiple_of(2) {
            let half = offset + to_u64(buf.len()) / 2;
            let part = (half / SECTOR_BYTES * SECTOR_BYTES).saturating_sub(offset);
            self.inner
                .write_at(offset, &buf[..to_usize(part)], Fua::No)?;
        }
        Err(broken("write"))
    }

    fn zero(&self, run: Extent, space: Space) -> io::Result<()> {
        let fails = self.medium.change(self.kind, Some(Fault::Write))?;
        if fails {
            return Err(broken("zero"));
        }
        self.changed();
        self.inner.zero(run, space)
    }

    fn data_after(&self, offset: u64) -> io::Result<Option<Extent>> {
        self.medium.read(self.kind)?;
        self.inner.data_after(offset)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        let fails = self.medium.change(self.kind, Some(Fault::Write))?;
        if fails {
            return Err(broken("set length"));
        }
        self.changed();
        self.inner.set_len(len)
    }

    fn sync(&self) -> io::Result<()> {
        if self.medium.change(self.kind, Some(Fault::Sync))? {
            self.medium.doubt(self.kind);
            return Err(broken("sync"));
        }
        if self.kind == Kind::Log && self.medium.state.lock().forgets_logs {
            return Ok(());
        }
        self.inner.sync()
    }
}
