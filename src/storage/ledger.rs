//! The node's store: small named records that are durable when [`Ledger::put`] returns, all or nothing.
//!
//! A redb database over a [`Storage`], so that a simulated power cut reaches it too. Values are JSON: a person can read
//! them in an emergency, and an older program ignores fields it does not know.
//!
//! # Crash contract
//! A record is the old or the new one, never a mixture, and the new one for certain once the call returned (redb
//! commits with two syncs). Records written in one [`Ledger::put_all`] change together.

use std::{fmt, io, sync::Arc};

use redb::{Database, ReadableDatabase, StorageBackend, TableDefinition};
use serde::{Serialize, de::DeserializeOwned};

use super::{Folder, Fua, Open, Storage};

const RECORDS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("records");

/// A failed operation on the store.
#[derive(Debug, thiserror::Error)]
pub enum LedgerError {
    /// The database or the storage below failed.
    #[error("the node's store failed")]
    Store(#[source] Box<redb::Error>),
    /// A record does not have the form this program gives it.
    #[error("record {key:?} of the node's store is not readable")]
    Record {
        /// Its name.
        key: String,
        /// What is wrong with it.
        #[source]
        source: serde_json::Error,
    },
}

impl<E: Into<redb::Error>> From<E> for LedgerError {
    fn from(error: E) -> Self {
        Self::Store(Box::new(error.into()))
    }
}

/// A node's store. One process at a time holds it.
#[derive(Debug)]
pub struct Ledger(Database);

impl Ledger {
    /// Opens the store in `storage`, or makes one there if that is empty.
    pub fn open(storage: Arc<dyn Storage>) -> Result<Self, LedgerError> {
        let database = Database::builder().create_with_backend(Backend(storage))?;
        let write = database.begin_write()?;
        write.open_table(RECORDS)?;
        write.commit()?;
        Ok(Self(database))
    }

    /// Opens the store called `name`, or makes one. A store is made under another name first: one that a crash left
    /// half made would have no magic and be refused for ever.
    pub fn open_in(folder: &dyn Folder, name: &str) -> Result<Self, LedgerError> {
        match folder.open(name, Open::Write) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            found => {
                let storage = found.map_err(redb::StorageError::from)?;
                // Whoever made it may have died, or failed, before its name was durable: what is put into a file that a
                // power cut takes away is not durable either.
                folder.sync().map_err(redb::StorageError::from)?;
                return Self::open(storage);
            }
        }
        let made = || {
            let new = format!("{name}.new");
            match folder.remove(&new) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error.into()),
                _ => {}
            }
            drop(Self::open(folder.open(&new, Open::CreateNew)?)?);
            folder.rename(&new, name)?;
            folder.sync()?;
            Self::open(folder.open(name, Open::Write)?)
        };
        made()
    }

    /// The record called `key`.
    pub fn get<T: DeserializeOwned>(&self, key: &str) -> Result<Option<T>, LedgerError> {
        let table = self.0.begin_read()?.open_table(RECORDS)?;
        let Some(value) = table.get(key)? else {
            return Ok(None);
        };
        let record = serde_json::from_slice(value.value());
        record.map(Some).map_err(|source| LedgerError::Record {
            key: key.to_owned(),
            source,
        })
    }

    /// Writes the record called `key`.
    pub fn put<T: Serialize>(&self, key: &str, value: &T) -> Result<(), LedgerError> {
        self.put_all(&[(key, value)])
    }

    /// Writes several records at once.
    pub fn put_all<T: Serialize>(&self, records: &[(&str, &T)]) -> Result<(), LedgerError> {
        let write = self.0.begin_write()?;
        {
            let mut table = write.open_table(RECORDS)?;
            for (key, value) in records {
                let bytes = serde_json::to_vec(value).map_err(|source| LedgerError::Record {
                    key: (*key).to_owned(),
                    source,
                })?;
                table.insert(*key, bytes.as_slice())?;
            }
        }
        Ok(write.commit()?)
    }

    /// Removes the record called `key`, if there is one.
    pub fn remove(&self, key: &str) -> Result<(), LedgerError> {
        let write = self.0.begin_write()?;
        write.open_table(RECORDS)?.remove(key)?;
        Ok(write.commit()?)
    }

    /// Names of the records that start with `prefix`, sorted.
    pub fn keys(&self, prefix: &str) -> Result<Vec<String>, LedgerError> {
        let table = self.0.begin_read()?.open_table(RECORDS)?;
        let mut keys = Vec::new();
        for row in table.range(prefix..)? {
            let key = row?.0.value().to_owned();
            if !key.starts_with(prefix) {
                break;
            }
            keys.push(key);
        }
        Ok(keys)
    }
}

struct Backend(Arc<dyn Storage>);

impl fmt::Debug for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl StorageBackend for Backend {
    fn len(&self) -> io::Result<u64> {
        self.0.len()
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.0.read_at(offset, out)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.0.set_len(len)
    }

    fn sync_data(&self) -> io::Result<()> {
        self.0.sync()
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.0.write_at(offset, data, Fua::No)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::memory::{MemoryFolder, MemoryStorage, Power};

    /// Cuts the power after every number of steps of a fixed history, keeping half of what was not synced, and looks
    /// at what is left: the last acknowledged value or the one that was being written.
    #[test]
    fn a_record_is_old_or_new_after_a_power_cut() {
        let mut cuts = 0;
        for steps in 0.. {
            let power = Power::new();
            let storage = MemoryStorage::new(&power);
            let ledger = Ledger::open(storage.clone()).unwrap();
            ledger.put("machine", &0u32).unwrap();
            power.cut_after(steps);
            let acknowledged = (1..=3u32)
                .take_while(|value| ledger.put("machine", value).is_ok())
                .count();
            drop(ledger);
            let mut turn = steps;
            power.restore(&mut || {
                turn += 1;
                turn % 3 != 0
            });
            let found: u32 = Ledger::open(storage)
                .unwrap()
                .get("machine")
                .unwrap()
                .unwrap();
            let acknowledged = u32::try_from(acknowledged).unwrap();
            assert!(
                found == acknowledged || found == acknowledged + 1,
                "{steps}: {acknowledged}, found {found}"
            );
            cuts += 1;
            if acknowledged == 3 {
                break;
            }
        }
        assert!(cuts > 6, "the cuts reach into the history: {cuts}");
    }

    /// Cuts the power at every step of making a store; whatever is kept, it can be made afterwards.
    #[test]
    fn a_store_can_be_made_after_a_power_cut_while_it_was_made() {
        for steps in 0.. {
            let mut made = false;
            for variant in 0..5u64 {
                let power = Power::new();
                let folder = MemoryFolder::new(&power);
                power.cut_after(steps);
                made = Ledger::open_in(&*folder, "store").is_ok();
                let mut turn = variant;
                power.restore(&mut || {
                    turn += variant;
                    variant == 1 || turn % 3 == 1
                });
                let ledger = Ledger::open_in(&*folder, "store").unwrap();
                ledger.put("role", &1u32).unwrap();
                drop(ledger);
                let ledger = Ledger::open_in(&*folder, "store").unwrap();
                assert_eq!(ledger.get::<u32>("role").unwrap(), Some(1), "{steps}");
            }
            if made {
                assert!(steps > 6, "the cuts reach into the making: {steps}");
                break;
            }
        }
    }

    /// The making failed at some step, also at the last one; what is put into the store afterwards is durable.
    #[test]
    fn a_store_whose_making_failed_keeps_what_is_put_into_it_later() {
        for steps in 0.. {
            let power = Power::new();
            let folder = MemoryFolder::new(&power);
            power.fail_after(steps, io::ErrorKind::Other);
            let made = Ledger::open_in(&*folder, "store").is_ok();
            let ledger = Ledger::open_in(&*folder, "store").unwrap();
            ledger.put("role", &1u32).unwrap();
            drop(ledger);
            power.restore(&mut || false);
            let ledger = Ledger::open_in(&*folder, "store").unwrap();
            assert_eq!(ledger.get::<u32>("role").unwrap(), Some(1), "{steps}");
            if made && power.steps() > steps {
                assert!(steps > 6, "the failures reach into the making: {steps}");
                break;
            }
        }
    }

    #[test]
    fn records_are_found_by_prefix() {
        let ledger = Ledger::open(MemoryStorage::new(&Power::new())).unwrap();
        ledger
            .put_all(&[("replica/b", &2), ("primary/a", &1), ("replica/a", &3)])
            .unwrap();
        assert_eq!(ledger.keys("replica/").unwrap(), ["replica/a", "replica/b"]);
        ledger.remove("replica/a").unwrap();
        assert_eq!(ledger.get::<u32>("replica/a").unwrap(), None);
        assert!(matches!(
            ledger.get::<String>("primary/a"),
            Err(LedgerError::Record { .. })
        ));
    }
}
