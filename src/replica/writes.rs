//! Writes of an initial copy that others carry out while more of it is being received.
//!
//! # Which order they keep
//! None among themselves, and none is needed: before a frame is begun that touches a run under way, that run is waited
//! for ([`Writes::disturbs`]), so that of a block the last frame wins. A sync waits for all that were begun before it,
//! and an [`Ingest`](super::Ingest) does not go away before the last one has ended: no late write meets a later log.
//!
//! # Crash contract
//! What is under way is not acknowledged. A cut leaves any subset of it, in blocks that the primary sends again.

use std::{collections::BTreeMap, sync::Arc};

use bytes::Bytes;
use parking_lot::{Condvar, Mutex};

use super::{
    error::{IngestError, ReplicaError},
    state::Shared,
    store::disk_failed,
};
use crate::{
    base::{
        ids::Name,
        units::{DiskIndex, Extent, to_u64},
    },
    disk::{Disk, Fua},
};

/// The writes of one log that have not ended.
#[derive(Debug)]
pub(super) struct Writes {
    shared: Arc<Shared>,
    state: Mutex<UnderWay>,
    ended: Condvar,
}

#[derive(Debug, Default)]
struct UnderWay {
    /// Number of the next one.
    next: u64,
    runs: BTreeMap<u64, (DiskIndex, Extent)>,
    failed: bool,
    /// Why, until it was told.
    error: Option<ReplicaError>,
}

impl UnderWay {
    fn check(&mut self) -> Result<(), IngestError> {
        match (self.error.take(), self.failed) {
            (Some(error), _) => Err(error.into()),
            (None, true) => Err(IngestError::Incomplete),
            (None, false) => Ok(()),
        }
    }

    fn touches(&self, disk: DiskIndex, run: Extent) -> bool {
        let mut runs = self.runs.values();
        runs.any(|&(index, other)| {
            index == disk && other.offset < run.end() && run.offset < other.end()
        })
    }
}

impl Writes {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        Self {
            shared,
            state: Mutex::default(),
            ended: Condvar::new(),
        }
    }

    /// A write that has begun with this call. It touches no run that is under way.
    pub(super) fn begin(
        self: &Arc<Self>,
        index: DiskIndex,
        (disk, name): (Arc<dyn Disk>, Name),
        offset: u64,
        raw: Bytes,
    ) -> WriteTask {
        let run = Extent::new(offset, to_u64(raw.len()));
        let mut state = self.state.lock();
        let number = state.next;
        state.next += 1;
        state.runs.insert(number, (index, run));
        WriteTask {
            writes: Arc::clone(self),
            number,
            disk,
            name,
            offset,
            raw,
        }
    }

    /// Whether `run` touches one that is under way.
    pub(super) fn disturbs(&self, disk: DiskIndex, run: Extent) -> bool {
        self.state.lock().touches(disk, run)
    }

    /// How many were begun so far.
    pub(super) fn begun(&self) -> u64 {
        self.state.lock().next
    }

    /// Fails if a write failed.
    pub(super) fn check(&self) -> Result<(), IngestError> {
        self.state.lock().check()
    }

    /// Waits until the first `count` of them have ended. Fails if a write failed.
    pub(super) fn wait(&self, count: u64) -> Result<(), IngestError> {
        let mut state = self.state.lock();
        while state.runs.keys().next().is_some_and(|&first| first < count) {
            self.ended.wait(&mut state);
        }
        state.check()
    }
}

/// A write of an initial copy. One that is dropped without having run fails its log.
#[derive(Debug)]
pub struct WriteTask {
    writes: Arc<Writes>,
    number: u64,
    disk: Arc<dyn Disk>,
    name: Name,
    offset: u64,
    raw: Bytes,
}

impl WriteTask {
    /// Writes. The log is told how it went.
    pub fn run(self) {
        let written = self.disk.write_at(self.offset, &self.raw, Fua::No);
        let error = written.err().map(|source| disk_failed(&self.name, source));
        if error.as_ref().is_some_and(ReplicaError::is_full) {
            self.writes.shared.state.lock().upkeep.found_none();
        }
        let mut state = self.writes.state.lock();
        state.runs.remove(&self.number);
        state.failed |= error.is_some();
        state.error = state.error.take().or(error);
    }
}

impl Drop for WriteTask {
    fn drop(&mut self) {
        let mut state = self.writes.state.lock();
        state.failed |= state.runs.remove(&self.number).is_some();
        drop(state);
        self.writes.ended.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whoever waits for more than it has to makes a copy slow, and nobody would know why.
    #[test]
    fn only_a_run_that_is_touched_is_waited_for() {
        let state = UnderWay {
            runs: [(0, (DiskIndex(1), Extent::new(4096, 8192)))].into(),
            ..UnderWay::default()
        };
        let touches = |disk, offset, len| state.touches(DiskIndex(disk), Extent::new(offset, len));
        assert!(touches(1, 4096, 8192) && touches(1, 8192, 4096) && touches(1, 0, 16384));
        assert!(touches(1, 0, 4097) && touches(1, 12287, 1));
        assert!(!touches(1, 0, 4096) && !touches(1, 12288, 4096));
        assert!(!touches(0, 4096, 8192));
    }
}
