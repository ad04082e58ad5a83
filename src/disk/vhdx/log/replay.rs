//! What a dirty log holds: finding the active sequence, and bringing it about.
//!
//! A log is dirty when the file was not closed: its entries hold metadata that may not be in place yet. A disk opened
//! for writing puts them there; one opened for reading only sees them through an [`Overlay`] and leaves the file as it is.
//!
//! # Crash contract
//! Replay writes the final state of each page, so repeating it changes nothing. The log stays valid until the header
//! that declares it empty is durable, and that is written after everything replayed has been synced.

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
    /// File offset of the entry behind the head, if a crash left it torn.
    pub(in super::super) torn: Option<u64>,
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
            torn: torn_after(&ring, head, log),
        };
        for change in active.iter().flat_map(|entry| ring.changes(entry)) {
            replay.add(change);
        }
        Ok(replay)
    }

    /// Writes everything into the file and makes it durable.
    pub(in super::super) fn apply(&self, storage: &dyn Storage) -> io::Result<()> {
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

/// Where an entry begins that should follow `head` and is not whole.
fn torn_after(ring: &Ring<'_>, head: &LogEntry, log: Uuid) -> Option<u64> {
    let position = (head.position + head.len) % to_u64(ring.bytes.len());
    let (found, sequence) = ring.claimed(position)?;
    (found == log && Some(sequence) == head.sequence.checked_add(1))
        .then_some(ring.place.offset + position)
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
        self.below.read_at(offset, stored)?;
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

#[cfg(test)]
mod tests {
    use super::{
        super::{
            super::format::{self, Descriptor, LogEntryHeader},
            entry::{self, Fields},
        },
        *,
    };
    use crate::storage::memory::MemoryStorage;

    const LOG: Uuid = Uuid::from_u128(5);
    const PLACE: Extent = Extent::new(MIB, MIB);
    /// An entry with one page.
    const ONE: u64 = 2 * PAGE_BYTES;

    /// A file of 4 MiB with a log in its second MiB.
    struct File(Vec<u8>);

    impl File {
        fn new() -> Self {
            Self(vec![0; to_usize(4 * MIB)])
        }

        /// Puts an entry at a ring offset and returns the one behind it.
        fn put(&mut self, position: u64, fields: &Fields, pages: &[(u64, u8)]) -> u64 {
            let images: Vec<_> = pages.iter().map(|&(at, n)| (at, [n; PAGE])).collect();
            let pages: Vec<_> = images.iter().map(|(at, page)| (*at, page)).collect();
            let bytes = entry::encode(fields, &pages);
            self.put_bytes(position, &bytes)
        }

        fn put_bytes(&mut self, position: u64, bytes: &[u8]) -> u64 {
            for (at, byte) in (position..).zip(bytes) {
                self.0[to_usize(PLACE.offset + at % PLACE.len)] = *byte;
            }
            (position + to_u64(bytes.len())) % PLACE.len
        }

        /// Replays in place, and checks that replaying in memory shows the same. Returns the bytes at 3 MiB, one for
        /// each page, and the length of the file.
        fn replay(&self) -> Result<(Vec<u8>, u64), OpenError> {
            let storage = MemoryStorage::with_bytes(&self.0);
            let overlay = Overlay::new(
                Arc::clone(&storage) as _,
                Replay::read(storage.as_ref(), PLACE, LOG)?,
            );
            let len = overlay.len().unwrap();
            let mut seen = vec![0xEE; to_usize(len)];
            overlay.read_at(0, &mut seen).unwrap();
            assert!(storage.bytes() == self.0, "the file stays as it is");
            let replay = Replay::read(storage.as_ref(), PLACE, LOG)?;
            replay.apply(storage.as_ref()).unwrap();
            assert!(storage.bytes() == seen);
            let pages = seen[to_usize(3 * MIB)..].chunks(PAGE).take(4);
            Ok((pages.map(|page| page[0]).collect(), len))
        }
    }

    fn fields(sequence: u64, tail: u64) -> Fields {
        Fields {
            sequence,
            tail,
            log: LOG,
            flushed_file_offset: 4 * MIB,
            last_file_offset: 4 * MIB,
        }
    }

    fn page_at(number: u64) -> u64 {
        3 * MIB + number * PAGE_BYTES
    }

    /// A reader that looked at one run from the start of the ring lost what stood at its end.
    #[test]
    fn a_sequence_that_wraps_is_replayed_from_its_tail() {
        let mut file = File::new();
        let tail = MIB - ONE - PAGE_BYTES;
        // Windows begins at numbers like these.
        let first = 80_100_000_000_000_000;
        let second = file.put(tail, &fields(first, tail), &[(page_at(0), 1)]);
        let third = file.put(second, &fields(first + 1, tail), &[(page_at(1), 2)]);
        assert_eq!(
            third, PAGE_BYTES,
            "the second one lies over the end of the ring"
        );
        file.put(third, &fields(first + 2, tail), &[(page_at(2), 3)]);
        assert_eq!(file.replay().unwrap().0, [1, 2, 3, 0]);
    }

    #[test]
    fn what_is_before_the_tail_is_not_replayed() {
        let mut file = File::new();
        let second = file.put(0, &fields(1, 0), &[(page_at(0), 1)]);
        let third = file.put(second, &fields(2, 0), &[(page_at(1), 2)]);
        file.put(third, &fields(3, second), &[]);
        assert_eq!(file.replay().unwrap().0, [0, 2, 0, 0]);
    }

    #[test]
    fn a_torn_head_ends_the_sequence_before_it() {
        let mut file = File::new();
        let second = file.put(0, &fields(1, 0), &[(page_at(0), 1)]);
        let third = file.put(second, &fields(2, 0), &[(page_at(1), 2)]);
        file.put(third, &fields(3, 0), &[(page_at(2), 3)]);
        file.0[to_usize(PLACE.offset + third + PAGE_BYTES + 600)] ^= 1;
        assert_eq!(file.replay().unwrap().0, [1, 2, 0, 0]);
    }

    #[test]
    fn a_gap_ends_a_sequence() {
        for (tail_of_last, expected) in [(0, [1, 2, 0, 0]), (2 * ONE, [0, 0, 3, 0])] {
            let mut file = File::new();
            file.put(0, &fields(5, 0), &[(page_at(0), 1)]);
            file.put(ONE, &fields(6, 0), &[(page_at(1), 2)]);
            // Number seven is not there. Whose tail lies before the gap is no head.
            file.put(2 * ONE, &fields(8, tail_of_last), &[(page_at(2), 3)]);
            assert_eq!(file.replay().unwrap().0, expected, "{tail_of_last}");
        }
    }

    #[test]
    fn a_log_in_use_without_a_head_is_refused() {
        let mut file = File::new();
        let other = Fields {
            log: Uuid::from_u128(6),
            ..fields(1, 0)
        };
        file.put(0, &other, &[(page_at(0), 1)]);
        file.put(ONE, &fields(2, 0), &[(page_at(0), 1)]);
        let error = file.replay().unwrap_err();
        assert!(matches!(error, OpenError::Corrupt { part: "log", .. }));
    }

    #[test]
    fn the_file_grows_to_what_the_head_names() {
        let mut file = File::new();
        let second = file.put(0, &fields(1, 0), &[]);
        let grown = Fields {
            last_file_offset: 36 * MIB,
            ..fields(2, 0)
        };
        file.put(second, &grown, &[(page_at(0), 1)]);
        assert_eq!(file.replay().unwrap(), (vec![1, 0, 0, 0], 36 * MIB));
        let odd = Fields {
            last_file_offset: 6 * MIB + 1,
            ..fields(2, 0)
        };
        file.put(second, &odd, &[(page_at(0), 1)]);
        assert_eq!(file.replay().unwrap().1, 7 * MIB);
        let far = MIB * 7 + page_at(0);
        file.put(second, &fields(2, 0), &[(far, 1)]);
        assert_eq!(
            file.replay().unwrap().1,
            far + PAGE_BYTES,
            "a page past the end"
        );
    }

    #[test]
    fn a_file_shorter_than_its_head_knows_was_truncated() {
        let mut file = File::new();
        let longer = |sequence| Fields {
            flushed_file_offset: 5 * MIB,
            ..fields(sequence, 0)
        };
        let second = file.put(0, &longer(1), &[(page_at(0), 1)]);
        file.put(second, &fields(2, 0), &[]);
        file.replay().expect("only the head counts");
        file.put(second, &longer(2), &[]);
        assert!(matches!(
            file.replay(),
            Err(OpenError::Truncated { len, flushed }) if (len, flushed) == (4 * MIB, 5 * MIB)
        ));
    }

    #[test]
    fn zeros_and_pages_come_in_the_order_of_their_entries() {
        let zeros = |sequence, run: Extent| {
            let mut bytes = vec![0; PAGE];
            let header = LogEntryHeader {
                checksum: 0,
                len: 4096,
                tail: 0,
                sequence,
                descriptors: 1,
                reserved: 0,
                log: LOG,
                flushed_file_offset: 0,
                last_file_offset: 0,
            };
            format::encode(&header, &mut bytes);
            let descriptor = Descriptor::Zero {
                reserved: 0,
                len: run.len,
                offset: run.offset,
                sequence,
            };
            format::encode(&descriptor, &mut bytes[64..]);
            format::seal(&mut bytes);
            bytes
        };
        let mut file = File::new();
        file.0[to_usize(3 * MIB)..].fill(9);
        let pages = [(page_at(0), 1), (page_at(1), 2), (page_at(2), 3)];
        let second = file.put(0, &fields(1, 0), &pages);
        let run = Extent::new(page_at(1), 2 * PAGE_BYTES);
        let third = file.put_bytes(second, &zeros(2, run));
        file.put(third, &fields(3, 0), &[(page_at(2), 4)]);
        assert_eq!(file.replay().unwrap().0, [1, 0, 4, 9]);
    }
}
