//! What a dirty log holds: finding the active sequence, and bringing it about.
//!
//! A log is dirty when the file was not closed: its entries hold metadata that may not be in place yet. A disk opened
//! for writing puts them there; one opened for reading only sees them through an [`Overlay`] and leaves the file as it is.
//!
//! # Crash contract
//! Replay writes the final state of each page, so repeating it changes nothing. It begins with a sync: the entries that a
//! killed process left are in the page cache only, and a page in its place without its entry is half of a change. The log
//! stays valid until the header that declares it empty is durable, and that is written after everything replayed has been
//! synced.

use std::{collections::BTreeMap, io, sync::Arc};

use uuid::Uuid;

use crate::{
    base::units::{Extent, MIB, to_u64, to_usize},
    storage::{Fua, Space, Storage},
};

use super::{
    super::{
        error::OpenError,
        format::{PAGE, PAGE_BYTES, Page},
    },
    entry::{Change, LogEntry, Ring},
};

/// The outcome of all entries of an active sequence.
#[derive(Debug)]
pub(in super::super) struct Replay {
    pages: BTreeMap<u64, Box<Page>>,
    /// Runs that become zeros before the pages are written.
    zeros: Vec<Extent>,
    /// Length that the file has at least afterwards.
    len: u64,
    /// Entries replayed.
    pub(in super::super) entries: usize,
}

impl Replay {
    /// Reads the log at `place`, whose entries carry the identity `log`.
    pub(in super::super) fn read(
        storage: &dyn Storage,
        place: Extent,
        log: Uuid,
    ) -> Result<Self, OpenError> {
        let mut bytes = vec![0; to_usize(place.len)];
        storage
            .read_at(place.offset, &mut bytes)
            .map_err(OpenError::reading("log", place.offset))?;
        let ring = Ring {
            bytes: &bytes,
            place,
        };
        let Some(active) = active_sequence(&ring, log) else {
            return Err(OpenError::corrupt(
                "log",
                place.offset,
                "it was in use, and no valid sequence of entries is left in it",
            ));
        };
        let head = active.last().expect("a sequence is not empty");
        let len = storage.len().map_err(OpenError::reading("file", 0))?;
        if len < head.flushed_file_offset {
            return Err(OpenError::Truncated {
                len,
                flushed: head.flushed_file_offset,
            });
        }
        let mut replay = Self {
            pages: BTreeMap::new(),
            zeros: Vec::new(),
            len: len.max(head.last_file_offset.next_multiple_of(MIB)),
            entries: active.len(),
        };
        for change in active.iter().flat_map(|entry| ring.changes(entry)) {
            replay.add(change);
        }
        Ok(replay)
    }

    /// Writes everything into the file and makes it durable.
    pub(in super::super) fn apply(&self, storage: &dyn Storage) -> io::Result<()> {
        // What was read may have come from the page cache that a killed process left.
        storage.sync()?;
        if storage.len()? < self.len {
            storage.set_len(self.len)?;
        }
        for run in &self.zeros {
            storage.zero(*run, Space::Keep)?;
        }
        for (offset, page) in &self.pages {
            storage.write_at(*offset, page.as_slice(), Fua::No)?;
        }
        storage.sync()
    }

    fn add(&mut self, change: Change) {
        let run = match change {
            Change::Data(offset, page) => {
                self.pages.insert(offset, page);
                Extent::new(offset, PAGE_BYTES)
            }
            Change::Zero(run) if run.len == 0 => return,
            Change::Zero(run) => {
                let over: Vec<u64> = self
                    .pages
                    .range(run.offset..run.end())
                    .map(|(&offset, _)| offset)
                    .collect();
                for offset in over {
                    self.pages.remove(&offset);
                }
                self.zeros.push(run);
                run
            }
        };
        self.len = self.len.max(run.end());
    }
}

/// The entries from the head's tail to the head, where the head is the last entry of the newest run that holds its own
/// tail.
fn active_sequence(ring: &Ring<'_>, log: Uuid) -> Option<Vec<LogEntry>> {
    let ring_len = to_u64(ring.bytes.len());
    let entries: BTreeMap<u64, LogEntry> = (0..ring_len)
        .step_by(PAGE)
        .filter_map(|position| ring.entry(position, log))
        .map(|entry| (entry.position, entry))
        .collect();
    let next = |entry: &LogEntry| {
        let next = entries.get(&((entry.position + entry.len) % ring_len))?;
        (Some(next.sequence) == entry.sequence.checked_add(1)).then_some(next)
    };
    let mut has_previous: std::collections::HashSet<u64> = std::collections::HashSet::new();
    has_previous.extend(
        entries
            .values()
            .filter_map(next)
            .map(|entry| entry.position),
    );
    let mut newest: Option<Vec<LogEntry>> = None;
    for first in entries.values() {
        if has_previous.contains(&first.position) {
            continue;
        }
        let run: Vec<&LogEntry> = std::iter::successors(Some(first), |entry| next(entry)).collect();
        let head = *run.last().expect("it starts with an entry");
        let Some(tail) = run.iter().position(|entry| entry.position == head.tail) else {
            continue;
        };
        if newest
            .as_ref()
            .and_then(|run| run.last())
            .is_none_or(|other| other.sequence < head.sequence)
        {
            newest = Some(run[tail..].iter().map(|&entry| entry.clone()).collect());
        }
    }
    newest
}

/// A file seen as if its log had been replayed.
#[derive(Debug)]
pub(in super::super) struct Overlay {
    below: Arc<dyn Storage>,
    replay: Replay,
}

impl Overlay {
    pub(in super::super) fn new(below: Arc<dyn Storage>, replay: Replay) -> Self {
        Self { below, replay }
    }

    fn read_only<T>() -> io::Result<T> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }
}

/// The part of `buf`, which starts at `offset`, that lies in `run`; and how far into the run it starts.
fn part(buf: &mut [u8], offset: u64, run: Extent) -> Option<(&mut [u8], usize)> {
    let start = run.offset.max(offset);
    let end = run.end().min(offset + to_u64(buf.len()));
    (start < end).then(|| {
        let range = to_usize(start - offset)..to_usize(end - offset);
        (&mut buf[range], to_usize(start - run.offset))
    })
}

impl Storage for Overlay {
    fn len(&self) -> io::Result<u64> {
        Ok(self.replay.len)
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let end = offset + to_u64(buf.len());
        if end > self.replay.len {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let below = self.below.len()?.clamp(offset, end) - offset;
        let (stored, grown) = buf.split_at_mut(to_usize(below));
        if !stored.is_empty() {
            self.below.read_at(offset, stored)?;
        }
        grown.fill(0);
        for run in &self.replay.zeros {
            if let Some((part, _)) = part(buf, offset, *run) {
                part.fill(0);
            }
        }
        let first = offset / PAGE_BYTES * PAGE_BYTES;
        for (&at, page) in self.replay.pages.range(first..end) {
            if let Some((part, within)) = part(buf, offset, Extent::new(at, PAGE_BYTES)) {
                part.copy_from_slice(&page[within..within + part.len()]);
            }
        }
        Ok(())
    }

    fn write_at(&self, _: u64, _: &[u8], _: Fua) -> io::Result<()> {
        Self::read_only()
    }

    fn zero(&self, _: Extent, _: Space) -> io::Result<()> {
        Self::read_only()
    }

    fn data_after(&self, offset: u64) -> io::Result<Option<Extent>> {
        let first = offset / PAGE_BYTES * PAGE_BYTES;
        let page = self.replay.pages.range(first..).next();
        let page = page.map(|(&at, _)| {
            let start = at.max(offset);
            Extent::new(start, at + PAGE_BYTES - start)
        });
        let below = self.below.data_after(offset)?;
        Ok(match (page, below) {
            (Some(page), Some(below)) if page.offset < below.offset => Some(page),
            (page, below) => below.or(page),
        })
    }

    fn set_len(&self, _: u64) -> io::Result<()> {
        Self::read_only()
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }
}
