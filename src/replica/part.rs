//! A log that is being written, under a name that the next open removes.

use std::sync::Arc;

use super::{error::ReplicaError, log::LogFile};
use crate::{
    base::{limits::LOG_RESIDENT_BYTES_MAX, units::to_u64},
    storage::{Folder, Fua, Open, Storage},
};

/// End of the names of files that are being written.
pub(super) const PART_SUFFIX: &str = ".part";
/// Bytes gathered before they are written: frames of 4 KiB would otherwise cost a system call each.
const GATHER_BYTES: usize = 256 * 1024;

/// The file, and what is on the way to it.
#[derive(Debug)]
pub(super) struct Part {
    storage: Arc<dyn Storage>,
    name: &'static str,
    written: u64,
    gathered: Vec<u8>,
    /// All that was written, as long as it is short enough to be kept in memory.
    resident: Option<Vec<u8>>,
}

impl Part {
    /// A new file called `name`, which ends with [`PART_SUFFIX`].
    pub(super) fn create(folder: &dyn Folder, name: &'static str) -> Result<Self, ReplicaError> {
        let storage = folder
            .open(name, Open::CreateNew)
            .map_err(ReplicaError::io("create", name))?;
        Ok(Self {
            storage,
            name,
            written: 0,
            gathered: Vec::with_capacity(GATHER_BYTES),
            resident: Some(Vec::new()),
        })
    }

    /// The file, to sync it from another thread.
    pub(super) fn storage(&self) -> Arc<dyn Storage> {
        Arc::clone(&self.storage)
    }

    /// Bytes so far, written or not.
    pub(super) fn len(&self) -> u64 {
        self.written + to_u64(self.gathered.len())
    }

    /// Adds bytes. How many were written for it.
    pub(super) fn push(&mut self, bytes: &[u8]) -> Result<u64, ReplicaError> {
        self.gathered.extend_from_slice(bytes);
        if self.gathered.len() >= GATHER_BYTES {
            self.write()
        } else {
            Ok(0)
        }
    }

    /// Writes what was gathered. How many bytes.
    pub(super) fn write(&mut self) -> Result<u64, ReplicaError> {
        self.storage
            .write_at(self.written, &self.gathered, Fua::No)
            .map_err(ReplicaError::io("write", self.name))?;
        let len = to_u64(self.gathered.len());
        self.written += len;
        if self.written > LOG_RESIDENT_BYTES_MAX {
            self.resident = None;
        }
        if let Some(bytes) = &mut self.resident {
            bytes.extend_from_slice(&self.gathered);
        }
        self.gathered.clear();
        Ok(len)
    }

    /// Makes durable what was written.
    pub(super) fn sync(&self) -> Result<(), ReplicaError> {
        self.storage
            .sync()
            .map_err(ReplicaError::io("sync", self.name))
    }

    /// The complete log, synced, opened for reading: the handle that wrote it costs two descriptors, and there may be
    /// many logs.
    pub(super) fn finish(&mut self, folder: &dyn Folder) -> Result<LogFile, ReplicaError> {
        let storage = folder
            .open(self.name, Open::Read)
            .map_err(ReplicaError::io("open", self.name))?;
        LogFile::open_resident(storage, self.resident.take(), self.name)
    }
}
