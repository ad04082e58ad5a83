//! The writer of metadata: headers, and log entries that carry changed BAT pages.
//!
//! Positions are bytes written to the log since it was started, growing for ever; modulo the ring's length they are
//! places in the ring. They order everything:
//!
//! ```text
//!   floor <= recorded tail <= tail <= head           durable <= head
//!   |        |                |       |
//!   |        |                |       where the next entry goes
//!   |        |                oldest entry still needed: what is before it is in place and durable
//!   |        the tail that the last entry wrote down
//!   the tail that the last *durable* entry wrote down: replay may start there, so nothing from here on is overwritten
//! ```
//!
//! # Crash contract
//! - The first entry of a session is durable before the header names its log, so a named log is never empty.
//! - An entry holds whole pages of the table as it is in memory, never bytes read back from the file.
//! - A change is published to readers and writers after its entry is written: whoever writes into a fresh block knows
//!   that the block survives the death of the process.
//! - Pages go to their place only from an image that was logged, after a sync that made its entry durable.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    io,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use parking_lot::Mutex;
use uuid::Uuid;

use crate::{
    base::{
        ids::Ids,
        units::{Extent, MIB, to_usize},
    },
    storage::{Fua, Storage},
};

use super::{
    super::{
        bat::Bat,
        format::{PAGE, PAGE_BYTES, Page, REGION_TABLE_OFFSETS},
        header::Headers,
        numbering::Entry,
        region::Repair,
        space::Space,
    },
    entry::{self, Fields},
};

/// Requests that share one entry at most: each touches two pages at most, so the entry stays under a third of the
/// smallest ring (1 + 64 of 256 pages).
const REQUESTS_PER_ENTRY_MAX: usize = 32;
/// Most changes of one request: an aligned run of as many blocks has its entries in at most two pages.
pub(in super::super) const CHANGES_PER_REQUEST_MAX: u64 = 64;

/// Pages of metadata, each at its file offset.
pub(in super::super) type LoggedPages = Vec<(u64, Arc<Page>)>;

/// A new entry for a block.
pub(in super::super) type BlockChange = (u64, Entry);

/// Why changes were not written.
#[derive(Clone, Debug)]
pub(in super::super) enum CommitError {
    /// The ring is full: a checkpoint makes room.
    Full,
    /// Nothing changed.
    Failed(Arc<io::Error>),
    /// The state of the file is unknown: the disk must stop.
    Fatal(Arc<io::Error>),
}

/// See the module.
#[derive(Debug)]
pub(in super::super) struct Journal {
    storage: Arc<dyn Storage>,
    ids: Arc<dyn Ids>,
    ring: Extent,
    /// The headers tell that the file is being written.
    begun: AtomicBool,
    /// Copies of the positions in [`State`] for those who only look.
    head: AtomicU64,
    durable: AtomicU64,
    floor: AtomicU64,
    queue: Mutex<VecDeque<Arc<Request>>>,
    state: Mutex<State>,
}

#[derive(Debug)]
struct Request {
    changes: Vec<BlockChange>,
    outcome: OnceLock<Result<(), CommitError>>,
}

#[derive(Debug)]
struct State {
    headers: Headers,
    repair: Option<Repair>,
    /// Nil while the log is empty.
    log: Uuid,
    sequence: u64,
    head: u64,
    tail: u64,
    recorded_tail: u64,
    /// A file length that is durable.
    flushed_len: u64,
    /// Pages that were logged and may not be in place, by file offset.
    dirty: BTreeMap<u64, Dirty>,
}

#[derive(Debug)]
struct Dirty {
    /// End of the last entry that holds the page.
    logged: u64,
    image: Arc<Page>,
}

/// What a sync that begins now makes durable.
#[derive(Debug)]
pub(in super::super) struct Mark {
    head: u64,
    recorded_tail: u64,
}

/// Pages to be put in place, all of them logged before `head`.
#[derive(Debug)]
pub(in super::super) struct Snapshot {
    pub(in super::super) head: u64,
    pages: LoggedPages,
}

impl Journal {
    pub(in super::super) fn new(
        storage: Arc<dyn Storage>,
        ids: Arc<dyn Ids>,
        headers: Headers,
        repair: Option<Repair>,
    ) -> Self {
        Self {
            storage,
            ids,
            ring: headers.log(),
            begun: AtomicBool::new(false),
            head: AtomicU64::new(0),
            durable: AtomicU64::new(0),
            floor: AtomicU64::new(0),
            queue: Mutex::default(),
            state: Mutex::new(State {
                headers,
                repair,
                log: Uuid::nil(),
                sequence: 1,
                head: 0,
                tail: 0,
                recorded_tail: 0,
                flushed_len: 0,
                dirty: BTreeMap::new(),
            }),
        }
    }

    /// Whether this session has written to the file.
    pub(in super::super) fn has_begun(&self) -> bool {
        self.begun.load(Ordering::Acquire)
    }

    /// Prepares the file for its first change of a session: identities of file and data in the headers, no unknown
    /// bytes past the space in use, both region tables good. An error leaves the state of the file unknown.
    pub(in super::super) fn begin(&self, space: &Space) -> io::Result<()> {
        let mut state = self.state.lock();
        if self.has_begun() {
            return Ok(());
        }
        let (file_write, data_write) = (self.ids.uuid(), self.ids.uuid());
        state.headers.update(self.storage.as_ref(), |header| {
            header.file_write = file_write;
            header.data_write = data_write;
        })?;
        space.settle(self.storage.as_ref())?;
        self.storage.sync()?;
        state.flushed_len = space.len();
        if let Some(repair) = state.repair.take() {
            let (pages, _) = repair.table.as_chunks::<PAGE>();
            let pages: Vec<_> = REGION_TABLE_OFFSETS
                .into_iter()
                .flat_map(|table| (table..).step_by(PAGE).zip(pages))
                .map(|(offset, page)| (offset, Arc::new(*page)))
                .collect();
            self.append(&mut state, pages, space)
                .map_err(|error| io::Error::other(format!("cannot repair regions: {error:?}")))?;
        }
        self.begun.store(true, Ordering::Release);
        Ok(())
    }

    /// Writes changes of the table into the log and publishes them. Whoever comes first writes one entry for all that
    /// wait.
    pub(in super::super) fn commit(
        &self,
        changes: Vec<BlockChange>,
        bat: &Bat,
        space: &Space,
    ) -> Result<(), CommitError> {
        let request = Arc::new(Request {
            changes,
            outcome: OnceLock::new(),
        });
        self.queue.lock().push_back(Arc::clone(&request));
        let mut state = self.state.lock();
        loop {
            if let Some(outcome) = request.outcome.get() {
                return outcome.clone();
            }
            let batch: Vec<Arc<Request>> = {
                let mut queue = self.queue.lock();
                let count = queue.len().min(REQUESTS_PER_ENTRY_MAX);
                queue.drain(..count).collect()
            };
            let outcome = self.commit_batch(&mut state, &batch, bat, space);
            for request in &batch {
                request
                    .outcome
                    .set(outcome.clone())
                    .expect("a request is in one batch");
            }
        }
    }

    /// Bytes of the ring that must not be overwritten, as a part of the whole, are more than half.
    pub(in super::super) fn is_low(&self) -> bool {
        2 * self.used() > self.ring.len
    }

    /// Whether it is time to put pages in place when a guest's flush syncs anyway.
    pub(in super::super) fn is_due(&self) -> bool {
        4 * self.used() > self.ring.len
    }

    /// Whether all that was published is durable.
    pub(in super::super) fn is_durable(&self) -> bool {
        self.durable.load(Ordering::Acquire) >= self.head.load(Ordering::Acquire)
    }

    /// The position that is durable.
    pub(in super::super) fn durable(&self) -> u64 {
        self.durable.load(Ordering::Acquire)
    }

    /// The position after all that was published.
    pub(in super::super) fn head(&self) -> u64 {
        self.head.load(Ordering::Acquire)
    }

    /// To be taken before a sync and given to [`synced`](Self::synced) after it.
    pub(in super::super) fn mark(&self) -> Mark {
        let state = self.state.lock();
        Mark {
            head: state.head,
            recorded_tail: state.recorded_tail,
        }
    }

    /// To be taken before a sync and put in place after it.
    pub(in super::super) fn snapshot(&self) -> Snapshot {
        let state = self.state.lock();
        Snapshot {
            head: state.head,
            pages: state
                .dirty
                .iter()
                .map(|(&offset, dirty)| (offset, Arc::clone(&dirty.image)))
                .collect(),
        }
    }

    /// The sync that began at `mark`, when the file had `len` bytes, succeeded.
    pub(in super::super) fn synced(&self, mark: &Mark, len: u64) {
        let mut state = self.state.lock();
        state.flushed_len = state.flushed_len.max(len);
        self.durable.fetch_max(mark.head, Ordering::AcqRel);
        self.floor.fetch_max(mark.recorded_tail, Ordering::AcqRel);
    }

    /// Puts pages in place.
    pub(in super::super) fn apply(&self, snapshot: &Snapshot) -> io::Result<()> {
        assert!(
            snapshot.head <= self.durable(),
            "a page goes to its place after its entry is durable"
        );
        for (offset, page) in &snapshot.pages {
            self.storage.write_at(*offset, page.as_slice(), Fua::No)?;
        }
        Ok(())
    }

    /// Everything logged before `position` is in place and durable.
    pub(in super::super) fn retire(&self, position: u64) {
        let mut state = self.state.lock();
        state.tail = state.tail.max(position);
        state.dirty.retain(|_, dirty| dirty.logged > position);
    }

    /// Writes down the tail in an entry of its own, so that the space before it can be used again after a sync.
    pub(in super::super) fn record_tail(&self, space: &Space) -> Result<(), CommitError> {
        self.append_pages(Vec::new(), space)
    }

    /// Writes pages of metadata into the log, all of them as one.
    pub(in super::super) fn append_pages(
        &self,
        pages: LoggedPages,
        space: &Space,
    ) -> Result<(), CommitError> {
        self.append(&mut self.state.lock(), pages, space)
    }

    /// Declares the log empty. Everything logged must be in place and durable.
    pub(in super::super) fn finish(&self) -> io::Result<()> {
        let mut state = self.state.lock();
        assert!(
            state.dirty.is_empty(),
            "the log is declared empty when it is"
        );
        if state.log.is_nil() {
            return Ok(());
        }
        state
            .headers
            .update(self.storage.as_ref(), |header| header.log = Uuid::nil())?;
        state.log = Uuid::nil();
        Ok(())
    }

    fn used(&self) -> u64 {
        self.head() - self.floor.load(Ordering::Acquire)
    }

    fn commit_batch(
        &self,
        state: &mut State,
        batch: &[Arc<Request>],
        bat: &Bat,
        space: &Space,
    ) -> Result<(), CommitError> {
        let changes = || batch.iter().flat_map(|request| request.changes.iter());
        let numbers: BTreeSet<u64> = changes().map(|&(block, _)| bat.page_of(block)).collect();
        let mut images: BTreeMap<u64, Box<Page>> = numbers
            .into_iter()
            .map(|number| (number, bat.page(number)))
            .collect();
        for &(block, entry) in changes() {
            let image = images
                .get_mut(&bat.page_of(block))
                .expect("each page that changes was fetched");
            bat.put(image, block, entry);
        }
        let pages = images
            .into_iter()
            .map(|(number, image)| (bat.page_offset(number), Arc::from(image)))
            .collect();
        self.append(state, pages, space)?;
        for &(block, entry) in changes() {
            bat.set(block, entry);
        }
        Ok(())
    }

    fn append(
        &self,
        state: &mut State,
        pages: LoggedPages,
        space: &Space,
    ) -> Result<(), CommitError> {
        if state.log.is_nil() {
            self.start(state, space)
                .map_err(|error| CommitError::Fatal(Arc::new(error)))?;
        }
        let len = entry::encoded_len(pages.len());
        // The page that only the entry of a checkpoint may take, and one that keeps a full ring from looking empty.
        let reserve = PAGE_BYTES * if pages.is_empty() { 1 } else { 2 };
        if self.used() + len + reserve > self.ring.len {
            return Err(CommitError::Full);
        }
        let borrowed: Vec<(u64, &Page)> = pages
            .iter()
            .map(|(offset, page)| (*offset, page.as_ref()))
            .collect();
        let bytes = entry::encode(&self.fields(state, space), &borrowed);
        self.write_ring(state.head, &bytes, Fua::No)
            .map_err(|error| CommitError::Failed(Arc::new(error)))?;
        state.sequence += 1;
        state.recorded_tail = state.tail;
        state.head += len;
        for (offset, image) in pages {
            let logged = state.head;
            state.dirty.insert(offset, Dirty { logged, image });
        }
        self.head.store(state.head, Ordering::Release);
        Ok(())
    }

    /// Starts a log of its own for this session: its first entry, durable, and then its name in the headers.
    fn start(&self, state: &mut State, space: &Space) -> io::Result<()> {
        if self.ring.len == 0 {
            return Err(io::Error::other("the image has no log to write to"));
        }
        assert_eq!(state.head, 0, "a session has one log");
        state.log = self.ids.uuid();
        let bytes = entry::encode(&self.fields(state, space), &[]);
        let log = state.log;
        let started = self.write_ring(0, &bytes, Fua::Yes).and_then(|()| {
            let storage = self.storage.as_ref();
            state.headers.update(storage, |header| header.log = log)
        });
        if let Err(error) = started {
            state.log = Uuid::nil();
            return Err(error);
        }
        state.sequence += 1;
        state.head = PAGE_BYTES;
        self.head.store(PAGE_BYTES, Ordering::Release);
        self.durable.store(PAGE_BYTES, Ordering::Release);
        Ok(())
    }

    fn fields(&self, state: &State, space: &Space) -> Fields {
        Fields {
            sequence: state.sequence,
            tail: state.tail % self.ring.len,
            log: state.log,
            flushed_file_offset: state.flushed_len / MIB * MIB,
            last_file_offset: space.end(),
        }
    }

    fn write_ring(&self, position: u64, bytes: &[u8], fua: Fua) -> io::Result<()> {
        let start = position % self.ring.len;
        let room = to_usize(self.ring.len - start);
        let (first, rest) = bytes.split_at(bytes.len().min(room));
        self.storage
            .write_at(self.ring.offset + start, first, fua)?;
        if rest.is_empty() {
            return Ok(());
        }
        self.storage.write_at(self.ring.offset, rest, fua)
    }
}
