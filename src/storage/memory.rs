//! [`Storage`] and [`Folder`] in memory, with a power supply that can be cut.
//!
//! Every file and folder of one [`Power`] shares its fate. Each changing call (write, zero, set length, sync, create,
//! rename, remove) is one step; [`Power::cut_after`] lets a number of steps happen and fails every later one, and
//! [`Power::restore`] then throws away what was not synced: of the unsynced steps any subset is kept, writes torn at
//! 512 bytes, as the given choice says. That is exactly what the crash contract of [`super`] allows.

use std::{
    collections::BTreeMap,
    io,
    sync::{Arc, Weak},
};

use parking_lot::Mutex;

use super::{Folder, Fua, Open, Space, Storage, check_component};
use crate::base::units::{Extent, SECTOR_BYTES, to_u64, to_usize};

/// Bytes of a page of the sparse content.
const PAGE_BYTES: u64 = 4096;

/// Decides, for each unsynced sector, name or length in turn, whether it reached the platter.
pub type Choice<'a> = dyn FnMut() -> bool + 'a;

/// The power supply of some files and folders, and the place where calls are made to fail.
#[derive(Debug, Default)]
pub struct Power(Mutex<PowerState>);

#[derive(Debug, Default)]
struct PowerState {
    steps: u64,
    /// Steps after which every call fails.
    cut_at: Option<u64>,
    /// The step that fails once, and how.
    fail_at: Option<(u64, io::ErrorKind)>,
    files: Vec<Weak<MemoryStorage>>,
    folders: Vec<Weak<MemoryFolder>>,
}

impl Power {
    /// A supply that is on.
    pub fn new() -> Arc<Self> {
        Arc::new(Self::default())
    }

    /// Changing calls so far.
    pub fn steps(&self) -> u64 {
        self.0.lock().steps
    }

    /// Lets `steps` more changing calls happen; every call after them fails.
    pub fn cut_after(&self, steps: u64) {
        let mut state = self.0.lock();
        state.cut_at = Some(state.steps + steps);
    }

    /// Lets `steps` more changing calls happen and fails the one after them once.
    pub fn fail_after(&self, steps: u64, kind: io::ErrorKind) {
        let mut state = self.0.lock();
        state.fail_at = Some((state.steps + steps, kind));
    }

    /// Turns the power on again: what was synced is there, of the rest what `kept` says.
    pub fn restore(&self, kept: &mut Choice<'_>) {
        let mut state = self.0.lock();
        state.cut_at = None;
        state.fail_at = None;
        for folder in state.folders.iter().filter_map(Weak::upgrade) {
            folder.0.lock().names.lose(kept);
        }
        for file in state.files.iter().filter_map(Weak::upgrade) {
            file.state.lock().lose(kept);
        }
    }

    fn alive(&self) -> io::Result<()> {
        let state = self.0.lock();
        match state.cut_at {
            Some(cut) if state.steps >= cut => Err(io::Error::other("the power is off")),
            _ => Ok(()),
        }
    }

    fn step(&self) -> io::Result<()> {
        self.alive()?;
        let mut state = self.0.lock();
        let step = state.steps;
        state.steps += 1;
        match state.fail_at {
            Some((at, kind)) if at == step => {
                state.fail_at = None;
                Err(kind.into())
            }
            _ => Ok(()),
        }
    }
}

/// Sparse bytes: pages that are not there read as zeros.
#[derive(Clone, Debug, Default)]
struct Bytes {
    len: u64,
    pages: BTreeMap<u64, Box<[u8]>>,
}

impl Bytes {
    fn read(&self, offset: u64, buf: &mut [u8]) {
        for (at, range) in pieces(offset, buf.len(), PAGE_BYTES) {
            let within = to_usize(at % PAGE_BYTES);
            let len = range.len();
            match self.pages.get(&(at / PAGE_BYTES)) {
                Some(page) => buf[range].copy_from_slice(&page[within..within + len]),
                None => buf[range].fill(0),
            }
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        for (at, range) in pieces(offset, data.len(), PAGE_BYTES) {
            let within = to_usize(at % PAGE_BYTES);
            let page = self
                .pages
                .entry(at / PAGE_BYTES)
                .or_insert_with(|| vec![0; to_usize(PAGE_BYTES)].into());
            page[within..within + range.len()].copy_from_slice(&data[range]);
        }
        self.len = self.len.max(offset + to_u64(data.len()));
    }

    fn zero(&mut self, run: Extent) {
        let whole = run.offset.div_ceil(PAGE_BYTES)..run.end() / PAGE_BYTES;
        let held: Vec<u64> = if whole.is_empty() {
            Vec::new()
        } else {
            self.pages.range(whole).map(|(&n, _)| n).collect()
        };
        for number in held {
            self.pages.remove(&number);
        }
        for edge in [run.offset / PAGE_BYTES, run.end() / PAGE_BYTES] {
            if let Some(page) = self.pages.get_mut(&edge) {
                let start = run.offset.max(edge * PAGE_BYTES) - edge * PAGE_BYTES;
                let end = run
                    .end()
                    .min((edge + 1) * PAGE_BYTES)
                    .saturating_sub(edge * PAGE_BYTES);
                if start < end {
                    page[to_usize(start)..to_usize(end)].fill(0);
                }
            }
        }
    }

    fn set_len(&mut self, len: u64) {
        if len < self.len {
            self.zero(Extent::new(len, self.len - len));
        }
        self.len = len;
    }

    fn apply(&mut self, change: &Change, kept: &mut Choice<'_>) {
        match change {
            Change::Write(offset, data) => {
                for (at, range) in pieces(*offset, data.len(), SECTOR_BYTES) {
                    if kept() {
                        self.write(at, &data[range]);
                    }
                }
            }
            Change::Forced(offset, data) => self.write(*offset, data),
            Change::Zero(run, space) => {
                if kept() {
                    self.zero(*run);
                    if *space == Space::Keep {
                        self.len = self.len.max(run.end());
                    }
                }
            }
            Change::SetLen(len) => {
                if kept() {
                    self.set_len(*len);
                }
            }
        }
    }
}

/// Cuts `len` bytes at `offset` where multiples of `unit` lie: (file offset, range of the buffer).
fn pieces(
    offset: u64,
    len: usize,
    unit: u64,
) -> impl Iterator<Item = (u64, std::ops::Range<usize>)> {
    let mut done = 0;
    std::iter::from_fn(move || {
        (done < len).then(|| {
            let at = offset + to_u64(done);
            let step = to_usize(unit - at % unit).min(len - done);
            done += step;
            (at, done - step..done)
        })
    })
}

#[derive(Clone, Debug)]
enum Change {
    Write(u64, Vec<u8>),
    /// A write with forced unit access: durable already, and again after any unsynced change that came before it.
    Forced(u64, Vec<u8>),
    Zero(Extent, Space),
    SetLen(u64),
}

#[derive(Debug, Default)]
struct FileState {
    current: Bytes,
    durable: Bytes,
    unsynced: Vec<Change>,
}

impl FileState {
    fn lose(&mut self, kept: &mut Choice<'_>) {
        for change in std::mem::take(&mut self.unsynced) {
            self.durable.apply(&change, kept);
        }
        self.current = self.durable.clone();
    }
}

/// A file in memory.
#[derive(Debug)]
pub struct MemoryStorage {
    power: Arc<Power>,
    state: Mutex<FileState>,
}

impl MemoryStorage {
    /// An empty file on `power`.
    pub fn new(power: &Arc<Power>) -> Arc<Self> {
        let file = Arc::new(Self {
            power: Arc::clone(power),
            state: Mutex::default(),
        });
        power.0.lock().files.push(Arc::downgrade(&file));
        file
    }

    /// A durable file that holds `bytes`, on a supply of its own.
    pub fn with_bytes(bytes: &[u8]) -> Arc<Self> {
        let file = Self::new(&Power::new());
        {
            let mut state = file.state.lock();
            state.current.write(0, bytes);
            state.durable = state.current.clone();
        }
        file
    }

    /// All bytes, as a reader sees them now.
    pub fn bytes(&self) -> Vec<u8> {
        let state = self.state.lock();
        let mut bytes = vec![0; to_usize(state.current.len)];
        state.current.read(0, &mut bytes);
        bytes
    }

    fn change(&self, change: Change) -> io::Result<()> {
        self.power.step()?;
        let mut state = self.state.lock();
        state.current.apply(&change, &mut || true);
        state.unsynced.push(change);
        Ok(())
    }
}

impl Storage for MemoryStorage {
    fn len(&self) -> io::Result<u64> {
        self.power.alive()?;
        Ok(self.state.lock().current.len)
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.power.alive()?;
        let state = self.state.lock();
        if offset + to_u64(buf.len()) > state.current.len {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        state.current.read(offset, buf);
        Ok(())
    }

    fn write_at(&self, offset: u64, buf: &[u8], fua: Fua) -> io::Result<()> {
        // Forced unit access is for this run only: what else is unsynced stays so, and must not come over it later.
        self.change(match fua {
            Fua::No => Change::Write(offset, buf.to_vec()),
            Fua::Yes => Change::Forced(offset, buf.to_vec()),
        })
    }

    fn zero(&self, run: Extent, space: Space) -> io::Result<()> {
        self.change(Change::Zero(run, space))
    }

    fn data_after(&self, offset: u64) -> io::Result<Option<Extent>> {
        self.power.alive()?;
        let state = self.state.lock();
        let len = state.current.len;
        let first = state
            .current
            .pages
            .range(offset / PAGE_BYTES..)
            .map(|(&n, _)| n)
            .next();
        Ok(first.and_then(|first| {
            let mut last = first;
            while state.current.pages.contains_key(&(last + 1)) {
                last += 1;
            }
            let start = (first * PAGE_BYTES).max(offset);
            let end = ((last + 1) * PAGE_BYTES).min(len);
            (start < end).then(|| Extent::new(start, end - start))
        }))
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.change(Change::SetLen(len))
    }

    fn sync(&self) -> io::Result<()> {
        self.power.step()?;
        let mut state = self.state.lock();
        let FileState {
            durable, unsynced, ..
        } = &mut *state;
        for change in unsynced.drain(..) {
            durable.apply(&change, &mut || true);
        }
        Ok(())
    }
}

type Names = BTreeMap<String, Entry>;

#[derive(Clone, Debug)]
enum Entry {
    File(Arc<MemoryStorage>),
    Folder(Arc<MemoryFolder>),
}

#[derive(Clone, Debug)]
enum NameChange {
    Add(String, Entry),
    Rename(String, String),
    Remove(String),
}

impl NameChange {
    fn apply(&self, names: &mut Names) {
        match self {
            Self::Add(name, entry) => {
                names.insert(name.clone(), entry.clone());
            }
            Self::Rename(from, to) => {
                if let Some(entry) = names.remove(from) {
                    names.insert(to.clone(), entry);
                }
            }
            Self::Remove(name) => {
                names.remove(name);
            }
        }
    }
}

#[derive(Debug, Default)]
struct FolderNames {
    current: Names,
    durable: Names,
    unsynced: Vec<NameChange>,
}

impl FolderNames {
    fn lose(&mut self, kept: &mut Choice<'_>) {
        for change in std::mem::take(&mut self.unsynced) {
            if kept() {
                change.apply(&mut self.durable);
            }
        }
        self.current = self.durable.clone();
    }

    fn change(&mut self, change: NameChange) {
        change.apply(&mut self.current);
        self.unsynced.push(change);
    }
}

#[derive(Debug)]
struct FolderState {
    power: Arc<Power>,
    names: FolderNames,
}

/// A folder in memory.
#[derive(Debug)]
pub struct MemoryFolder(Mutex<FolderState>);

impl MemoryFolder {
    /// An empty folder on `power`.
    pub fn new(power: &Arc<Power>) -> Arc<Self> {
        let state = FolderState {
            power: Arc::clone(power),
            names: FolderNames::default(),
        };
        let folder = Arc::new(Self(Mutex::new(state)));
        power.0.lock().folders.push(Arc::downgrade(&folder));
        folder
    }

    fn power(&self) -> Arc<Power> {
        Arc::clone(&self.0.lock().power)
    }
}

impl Folder for MemoryFolder {
    fn open(&self, name: &str, how: Open) -> io::Result<Arc<dyn Storage>> {
        check_component(name)?;
        let power = self.power();
        power.alive()?;
        let found = self.0.lock().names.current.get(name).cloned();
        match (found, how) {
            (Some(Entry::Folder(_)), _) => Err(io::ErrorKind::IsADirectory.into()),
            (Some(_), Open::CreateNew) => Err(io::ErrorKind::AlreadyExists.into()),
            (Some(Entry::File(file)), _) => Ok(file),
            (None, Open::Read | Open::Write | Open::WriteAside) => {
                Err(io::ErrorKind::NotFound.into())
            }
            (None, Open::CreateNew | Open::Create) => {
                power.step()?;
                let file = MemoryStorage::new(&power);
                let entry = Entry::File(Arc::clone(&file));
                self.0
                    .lock()
                    .names
                    .change(NameChange::Add(name.to_owned(), entry));
                Ok(file)
            }
        }
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        check_component(from)?;
        check_component(to)?;
        self.power().step()?;
        let names = &mut self.0.lock().names;
        if !names.current.contains_key(from) {
            return Err(io::ErrorKind::NotFound.into());
        }
        names.change(NameChange::Rename(from.to_owned(), to.to_owned()));
        Ok(())
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        check_component(name)?;
        self.power().step()?;
        let names = &mut self.0.lock().names;
        if !names.current.contains_key(name) {
            return Err(io::ErrorKind::NotFound.into());
        }
        names.change(NameChange::Remove(name.to_owned()));
        Ok(())
    }

    fn names(&self) -> io::Result<Vec<String>> {
        self.power().alive()?;
        Ok(self.0.lock().names.current.keys().cloned().collect())
    }

    fn folder(&self, name: &str) -> io::Result<Arc<dyn Folder>> {
        check_component(name)?;
        let power = self.power();
        power.alive()?;
        let found = self.0.lock().names.current.get(name).cloned();
        match found {
            Some(Entry::Folder(folder)) => Ok(folder),
            Some(Entry::File(_)) => Err(io::ErrorKind::NotADirectory.into()),
            None => {
                power.step()?;
                let folder = Self::new(&power);
                let entry = Entry::Folder(Arc::clone(&folder));
                self.0
                    .lock()
                    .names
                    .change(NameChange::Add(name.to_owned(), entry));
                Ok(folder)
            }
        }
    }

    fn sync(&self) -> io::Result<()> {
        self.power().step()?;
        let names = &mut self.0.lock().names;
        names.unsynced.clear();
        names.durable = names.current.clone();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_forced_write_is_not_undone_by_an_older_one() {
        for keep in [false, true] {
            let power = Power::new();
            let file = MemoryStorage::new(&power);
            file.write_at(0, &[1; 1024], Fua::No).unwrap();
            file.write_at(0, &[2; 512], Fua::Yes).unwrap();
            power.restore(&mut || keep);
            assert_eq!(file.bytes()[..512], [2; 512]);
            file.write_at(0, &[3; 512], Fua::No).unwrap();
            file.write_at(0, &[4; 512], Fua::Yes).unwrap();
            file.sync().unwrap();
            power.restore(&mut || keep);
            assert_eq!(file.bytes()[..512], [4; 512]);
        }
    }

    #[test]
    fn a_power_cut_keeps_what_was_synced_and_any_subset_of_the_rest() {
        let power = Power::new();
        let folder = MemoryFolder::new(&power);
        let file = folder.open("a", Open::CreateNew).unwrap();
        file.write_at(0, &[1; 1024], Fua::No).unwrap();
        file.sync().unwrap();
        folder.sync().unwrap();
        file.write_at(0, &[2; 1024], Fua::No).unwrap();
        file.write_at(1024, &[3; 512], Fua::Yes).unwrap();
        folder.rename("a", "b").unwrap();
        power.cut_after(0);
        assert!(file.sync().is_err(), "a dead file takes no calls");

        // The rename is lost, of the torn write only the second sector arrives.
        let mut choices = [false, false, true].into_iter();
        power.restore(&mut || choices.next().unwrap());
        let file = folder.open("a", Open::Read).unwrap();
        let mut bytes = [0; 1536];
        file.read_at(0, &mut bytes).unwrap();
        assert_eq!(bytes[..512], [1; 512]);
        assert_eq!(bytes[512..1024], [2; 512]);
        assert_eq!(bytes[1024..], [3; 512]);
    }

    #[test]
    fn one_failed_step_is_not_the_end() {
        let power = Power::new();
        let file = MemoryStorage::new(&power);
        power.fail_after(1, io::ErrorKind::StorageFull);
        file.write_at(0, &[1], Fua::No).unwrap();
        assert_eq!(
            file.write_at(0, &[2], Fua::No).unwrap_err().kind(),
            io::ErrorKind::StorageFull
        );
        file.write_at(0, &[3], Fua::No).unwrap();
        assert_eq!(file.bytes(), [3]);
    }
}
