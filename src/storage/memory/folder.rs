//! A folder in memory.

use std::{collections::BTreeMap, io, sync::Arc};

use parking_lot::Mutex;

use super::{
    super::{Folder, Open, Storage, check_component},
    Choice, MemoryStorage, Power,
};

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

    pub(super) fn lose(&self, kept: &mut Choice<'_>) {
        self.0.lock().names.lose(kept);
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
