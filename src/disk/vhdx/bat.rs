//! The block allocation table: where each block of the disk is in the file.
//!
//! The table is in memory, one atomic word for each entry, in groups of 8192: finding a block takes no lock, one load
//! from the array of groups, which is small and stays in the cache, and one of the entry. A group that holds nothing takes
//! no space. Memory is at most 8 bytes for each block of the disk (256 KiB for 1 TiB in 32 MiB blocks, 512 MiB for the
//! largest disk in the smallest blocks) and 24 bytes for each group that the largest disk would have (193 KiB at most).
//!
//! # When it is read
//! At open, group by group from the start, but no more than [`OPEN_BYTES`] of it; holes of the file cost nothing. That is
//! all of the table of a disk of 16 TiB in 32 MiB blocks, or of 512 GiB in 1 MiB blocks, or of any size if it is empty. What is
//! left is read a group at a time when somebody looks there, and all of it before the session's first write. So opening
//! takes a bounded time and yet nothing is written into a file before every entry has been checked: only then is it known
//! that no two blocks share space, and which space is free. A group is checked before anybody sees an entry of it; the
//! first one that is damaged is an error for whoever wants any group after that. The price is paid by the first write of
//! a session in a very large table: seconds, once, for 500 MiB of it from a cold disk.
//!
//! Every 2^23 sectors, a chunk, one entry for a sector bitmap stands between those of the blocks; a disk without
//! parent leaves it zero. Entries past the last block are padding: ignored when read, kept as they are.

use std::{
    io,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use parking_lot::Mutex;

use crate::{
    base::{
        limits::DISK_BYTES_MAX,
        units::{Extent, MIB, to_usize},
    },
    storage::Storage,
};

use super::{
    error::OpenError,
    format::{PAGE, PAGE_BYTES, Page},
    metadata::Parameters,
    numbering::{ENTRIES_PER_PAGE, ENTRY_BYTES, Entry, Numbering, Role, Source, State},
    occupancy::Occupancy,
};

/// Entries of a group, and their bytes: what is read at once.
const GROUP_ENTRIES: u64 = 8192;
const GROUP_BYTES: u64 = GROUP_ENTRIES * ENTRY_BYTES;
/// Most bytes of the table that an open reads: some milliseconds from memory, some tens of them from a slow disk.
const OPEN_BYTES: u64 = 4 * MIB;

/// The table.
pub(super) struct Bat {
    storage: Arc<dyn Storage>,
    block_size: u64,
    /// As many as the largest disk in these blocks would have, so that a disk grows without moving them.
    groups: Box<[Group]>,
    numbering: Numbering,
    /// Blocks of the disk now; `numbering` has those of the disk as it was opened.
    blocks: AtomicU64,
    /// File offset of the first entry.
    offset: AtomicU64,
    reader: Mutex<Reader>,
}

/// Entries with neighbouring numbers.
#[derive(Debug, Default)]
struct Group {
    /// Nothing: all of them are zero, or not read.
    entries: OnceLock<Box<[AtomicU64]>>,
    /// Whether it was read and checked.
    read: AtomicBool,
}

/// Who reads the table, one thread at a time.
#[derive(Debug)]
struct Reader {
    /// The space of all entries read so far; given away when all have been.
    taken: Option<Occupancy>,
    /// Groups in front of this one were read.
    next: u64,
    /// A run of the file known to be a hole.
    hole: Extent,
    /// Groups with entries that have no content and hold on to space.
    keeping: Vec<u64>,
    /// The first damaged entry: nothing is read behind it.
    damage: Option<(u64, String)>,
}

impl Bat {
    /// Reads the table in `region` as far as an open does, checks every entry read, and marks the space of its block in
    /// `taken`.
    pub(super) fn read(
        storage: Arc<dyn Storage>,
        region: Extent,
        parameters: &Parameters,
        taken: Occupancy,
    ) -> Result<Self, OpenError> {
        let numbering = Numbering::new(parameters);
        let used = numbering.entries();
        if used * ENTRY_BYTES > region.len {
            return Err(OpenError::corrupt(
                "BAT",
                region.offset,
                format!("{} bytes cannot hold {used} entries", region.len),
            ));
        }
        let largest = Numbering::of_size(parameters, DISK_BYTES_MAX).entries_with_bitmaps();
        let groups = largest.div_ceil(GROUP_ENTRIES);
        let bat = Self {
            storage,
            block_size: parameters.block_size,
            groups: (0..groups).map(|_| Group::default()).collect(),
            numbering,
            blocks: AtomicU64::new(numbering.blocks),
            offset: AtomicU64::new(region.offset),
            reader: Mutex::new(Reader {
                taken: Some(taken),
                next: 0,
                hole: Extent::new(0, 0),
                keeping: Vec::new(),
                damage: None,
            }),
        };
        bat.read_on(&mut bat.reader.lock(), OPEN_BYTES)?;
        Ok(bat)
    }

    /// Reads what is left. The first to call this is given the space that is taken.
    pub(super) fn complete(&self) -> Result<Option<Occupancy>, OpenError> {
        let mut reader = self.reader.lock();
        self.read_on(&mut reader, u64::MAX)?;
        let Some(mut taken) = reader.taken.take() else {
            return Ok(None);
        };
        for group in std::mem::take(&mut reader.keeping) {
            for (number, entry) in (group * GROUP_ENTRIES..).zip(self.entries_of(group)) {
                let is_block = matches!(self.numbering().role(number), Role::Block(_));
                // A place kept by an undefined or unmapped block must not be given away; one that cannot be is no
                // promise.
                if is_block && matches!(entry.state(), Some(State::Undefined | State::Unmapped)) {
                    let _ = taken.take_block(Extent::new(entry.offset(), self.block_size), false);
                }
            }
        }
        Ok(Some(taken))
    }

    /// Where `block` is, if all of it is in the file. An error is one of reading the table.
    pub(super) fn location(&self, block: u64) -> io::Result<Option<u64>> {
        Ok(self.get(block)?.location())
    }

    /// Where the bytes of `block` are.
    pub(super) fn source(&self, block: u64) -> io::Result<Source> {
        let entry = self.get(block)?;
        Ok(match entry.state() {
            Some(State::FullyPresent) => Source::File(entry.offset()),
            Some(State::PartiallyPresent) => Source::Mixed(entry.offset()),
            Some(State::NotPresent) if self.numbering.has_parent => Source::Parent,
            _ => Source::Zeros,
        })
    }

    /// The file offset of the first bit of `block`, one that is partially present.
    pub(super) fn bits(&self, block: u64) -> io::Result<u64> {
        let (number, within) = self.numbering.bitmap(block);
        Ok(self.entry(number)?.offset() + within)
    }

    fn get(&self, block: u64) -> io::Result<Entry> {
        self.entry(self.numbering.entry(block))
    }

    fn entry(&self, number: u64) -> io::Result<Entry> {
        let group = &self.groups[to_usize(number / GROUP_ENTRIES)];
        let held = |entries: &[AtomicU64]| {
            Entry(entries[to_usize(number % GROUP_ENTRIES)].load(Ordering::Acquire))
        };
        if let Some(entries) = group.entries.get() {
            return Ok(held(entries));
        }
        if !group.read.load(Ordering::Acquire) {
            self.read_group(&mut self.reader.lock(), number / GROUP_ENTRIES)
                .map_err(OpenError::into_io)?;
        }
        // Another thread may have read it after the first look.
        Ok(group
            .entries
            .get()
            .map_or(Entry(0), |entries| held(entries)))
    }

    /// Publishes a new entry of `block`, whose group was read.
    pub(super) fn set(&self, block: u64, entry: Entry) {
        let number = self.numbering.entry(block);
        let group = &self.groups[to_usize(number / GROUP_ENTRIES)];
        assert!(
            group.read.load(Ordering::Acquire),
            "nothing is written before all is read"
        );
        let entries = group.entries.get_or_init(no_entries);
        entries[to_usize(number % GROUP_ENTRIES)].store(entry.0, Ordering::Release);
    }

    /// Blocks of the disk.
    pub(super) fn blocks(&self) -> u64 {
        self.blocks.load(Ordering::Acquire)
    }

    /// The last block that is in the file, once the table is complete.
    pub(super) fn last_present(&self) -> Option<u64> {
        let used = self.numbering().entries();
        let last_of = |group: u64| {
            let first = group * GROUP_ENTRIES;
            let present = (first..used)
                .zip(self.entries_of(group))
                .filter(|(_, entry)| entry.location().is_some());
            present
                .filter_map(|(number, _)| match self.numbering().role(number) {
                    Role::Block(block) => Some(block),
                    Role::Bitmap | Role::Padding => None,
                })
                .last()
        };
        (0..used.div_ceil(GROUP_ENTRIES)).rev().find_map(last_of)
    }

    /// The page in which the entries of the smaller one of this table and `numbering` end, as it would stand in the file
    /// of that; nothing if they end with their page.
    pub(super) fn page_of_end(&self, numbering: Numbering) -> Option<(u64, Arc<Page>)> {
        let end = numbering.entries().min(self.numbering().entries());
        let within = end % ENTRIES_PER_PAGE;
        (within > 0).then(|| {
            let number = end / ENTRIES_PER_PAGE;
            let mut page = self.page(number);
            page[to_usize(within * ENTRY_BYTES)..].fill(0);
            (self.page_offset(number), Arc::from(page))
        })
    }

    /// The table in pieces, each at its offset from the start, without those that hold nothing.
    pub(super) fn pieces(&self) -> impl Iterator<Item = (u64, Vec<u8>)> {
        let groups = self.numbering().entries().div_ceil(GROUP_ENTRIES);
        (0..groups).filter_map(|group| {
            let bytes: Vec<u8> = self.entries_of(group).flat_map(Entry::to_bytes).collect();
            (!bytes.is_empty()).then_some((group * GROUP_BYTES, bytes))
        })
    }

    /// The disk has other blocks now, none of which come or go meanwhile, and the table perhaps another place. The entries
    /// of new blocks are zero.
    pub(super) fn resized(&self, numbering: Numbering, moved: Option<Extent>) {
        let reader = self.reader.lock();
        assert!(
            reader.taken.is_none(),
            "nothing is resized before all is read"
        );
        let (old, new) = (self.numbering().entries(), numbering.entries());
        if let Some(region) = moved {
            self.offset.store(region.offset, Ordering::Release);
        }
        for group in &self.groups[..to_usize(new.div_ceil(GROUP_ENTRIES))] {
            group.read.store(true, Ordering::Release);
        }
        self.blocks.store(numbering.blocks, Ordering::Release);
        for number in new..old {
            let group = &self.groups[to_usize(number / GROUP_ENTRIES)];
            if let Some(entries) = group.entries.get() {
                entries[to_usize(number % GROUP_ENTRIES)].store(0, Ordering::Release);
            }
        }
    }

    /// One past the last byte of the file, up to `limit`, that an entry refers to. What refers to more is the place of
    /// an unmapped block that was not there when the table was read.
    pub(super) fn end(&self, limit: u64) -> u64 {
        let ends = self.entries().filter_map(|(number, entry)| {
            let len = match (entry.state()?, self.numbering().role(number)) {
                (State::NotPresent | State::Zero, _) | (_, Role::Padding) => return None,
                (_, Role::Bitmap) => MIB,
                (_, Role::Block(_)) => self.block_size,
            };
            (entry.offset() != 0).then(|| entry.offset().saturating_add(len))
        });
        ends.filter(|&end| end <= limit).max().unwrap_or(0)
    }

    /// The number of the page that holds the entry of `block`.
    pub(super) fn page_of(&self, block: u64) -> u64 {
        self.numbering.entry(block) / ENTRIES_PER_PAGE
    }

    /// File offset of a page.
    pub(super) fn page_offset(&self, page: u64) -> u64 {
        self.offset.load(Ordering::Acquire) + page * PAGE_BYTES
    }

    /// A page as it would stand in the file now.
    pub(super) fn page(&self, page: u64) -> Box<Page> {
        let mut image = Box::new([0; PAGE]);
        let first = page * ENTRIES_PER_PAGE;
        let group = &self.groups[to_usize(first / GROUP_ENTRIES)];
        if let Some(entries) = group.entries.get() {
            let entries = &entries[to_usize(first % GROUP_ENTRIES)..];
            for (entry, bytes) in entries.iter().zip(image.chunks_exact_mut(8)) {
                bytes.copy_from_slice(&entry.load(Ordering::Acquire).to_le_bytes());
            }
        }
        image
    }

    /// Changes the entry of `block` in the image of its page.
    pub(super) fn put(&self, page: &mut Page, block: u64, entry: Entry) {
        let at = to_usize(self.numbering.entry(block) % ENTRIES_PER_PAGE * ENTRY_BYTES);
        page[at..at + 8].copy_from_slice(&entry.0.to_le_bytes());
    }

    fn numbering(&self) -> Numbering {
        Numbering {
            blocks: self.blocks(),
            ..self.numbering
        }
    }

    /// Numbers and entries of all groups that hold any, up to the last one in use.
    fn entries(&self) -> impl Iterator<Item = (u64, Entry)> {
        let used = self.numbering().entries();
        (0..used.div_ceil(GROUP_ENTRIES)).flat_map(move |group| {
            let first = group * GROUP_ENTRIES;
            (first..used).zip(self.entries_of(group))
        })
    }

    fn entries_of(&self, group: u64) -> impl Iterator<Item = Entry> {
        let entries = self.groups[to_usize(group)].entries.get();
        let entries = entries.map_or([].as_slice(), |entries| &entries[..]);
        entries
            .iter()
            .map(|entry| Entry(entry.load(Ordering::Acquire)))
    }

    /// Reads on from where reading stopped, until `budget` bytes were read.
    fn read_on(&self, reader: &mut Reader, budget: u64) -> Result<(), OpenError> {
        let groups = self.numbering().entries().div_ceil(GROUP_ENTRIES);
        let mut read = 0;
        while reader.next < groups && read < budget {
            read += self.read_group(reader, reader.next)?;
            reader.next += 1;
        }
        Ok(())
    }

    /// Reads a group, unless that was done, and checks every entry of it. Returns the bytes read.
    fn read_group(&self, reader: &mut Reader, number: u64) -> Result<u64, OpenError> {
        let group = &self.groups[to_usize(number)];
        if group.read.load(Ordering::Acquire) {
            return Ok(0);
        }
        if let Some((place, problem)) = &reader.damage {
            return Err(OpenError::corrupt("BAT", *place, problem));
        }
        let first = number * GROUP_ENTRIES;
        let count = (self.numbering().entries() - first).min(GROUP_ENTRIES);
        let run = Extent::new(
            self.offset.load(Ordering::Acquire) + first * ENTRY_BYTES,
            count * ENTRY_BYTES,
        );
        let mut read = 0;
        if !self.is_hole(reader, run)? {
            let mut bytes = vec![0; to_usize(run.len)];
            self.storage
                .read_at(run.offset, &mut bytes)
                .map_err(OpenError::reading("BAT", run.offset))?;
            read = run.len;
            let (words, _) = bytes.as_chunks::<8>();
            let words = || words.iter().map(|word| u64::from_le_bytes(*word));
            let mut bitmap = None;
            for (number, word) in (first..).zip(words()) {
                self.check(reader, number, Entry(word), &mut bitmap)?;
            }
            let keeps = |word| {
                matches!(
                    Entry(word).state(),
                    Some(State::Undefined | State::Unmapped)
                )
            };
            if words().any(keeps) {
                reader.keeping.push(number);
            }
            if words().any(|word| word != 0) {
                let entries: Box<[AtomicU64]> = words()
                    .chain(std::iter::repeat(0))
                    .take(to_usize(GROUP_ENTRIES))
                    .map(AtomicU64::new)
                    .collect();
                group.entries.set(entries).expect("a group is read once");
            }
        }
        group.read.store(true, Ordering::Release);
        Ok(read)
    }

    /// Whether the file has no data in `run` of the table.
    fn is_hole(&self, reader: &mut Reader, run: Extent) -> Result<bool, OpenError> {
        if reader.hole.offset <= run.offset && run.end() <= reader.hole.end() {
            return Ok(true);
        }
        let data = self
            .storage
            .data_after(run.offset)
            .map_err(OpenError::reading("BAT", run.offset))?;
        let end = data.map_or(u64::MAX, |data| data.offset.max(run.offset));
        reader.hole = Extent::new(run.offset, end - run.offset);
        Ok(run.end() <= end)
    }

    /// Checks an entry and takes the space of its block. `bitmap` is the last one that was asked about.
    fn check(
        &self,
        reader: &mut Reader,
        number: u64,
        entry: Entry,
        bitmap: &mut Option<(u64, bool)>,
    ) -> Result<(), OpenError> {
        let numbering = self.numbering();
        let role = numbering.role(number);
        let partial = entry.state() == Some(State::PartiallyPresent);
        let has_bitmap = match role {
            Role::Block(block) if partial => self.has_bitmap(block, bitmap)?,
            Role::Block(_) | Role::Bitmap | Role::Padding => false,
        };
        let outcome = (|| {
            if role == Role::Padding {
                return Ok(());
            }
            if entry.reserved() != 0 {
                return Err(format!("reserved bits in {:#x}", entry.0));
            }
            let has_parent = numbering.has_parent;
            let len = match (entry.state(), role) {
                (Some(State::PartiallyPresent), Role::Block(_)) if has_parent && !has_bitmap => {
                    return Err("its sector bitmap is not there".into());
                }
                (Some(State::PartiallyPresent), Role::Block(_)) if has_parent => self.block_size,
                (Some(State::FullyPresent), Role::Block(_)) => self.block_size,
                // Microsoft's own parser takes either state for a bitmap.
                (Some(State::PartiallyPresent), Role::Bitmap) if has_parent => MIB,
                (Some(State::FullyPresent), Role::Bitmap) => MIB,
                (None | Some(State::PartiallyPresent), _) => {
                    return Err(format!("state {}", entry.state_bits()));
                }
                _ => return Ok(()),
            };
            let last = role == Role::Block(numbering.blocks - 1);
            let taken = reader.taken.as_mut();
            let taken = taken.expect("it is given away after all is read");
            taken.take_block(Extent::new(entry.offset(), len), last)
        })();
        outcome.map_err(|problem| {
            let place = self.offset.load(Ordering::Acquire) + number * ENTRY_BYTES;
            let problem = format!("entry {number}: {problem}");
            reader.damage = Some((place, problem.clone()));
            OpenError::corrupt("BAT", place, problem)
        })
    }

    /// Whether the bitmap of `block`, whose entry may be in a group that is not read yet, is in the file.
    fn has_bitmap(&self, block: u64, known: &mut Option<(u64, bool)>) -> Result<bool, OpenError> {
        let (number, _) = self.numbering.bitmap(block);
        if let Some((_, there)) = known.filter(|(last, _)| *last == number) {
            return Ok(there);
        }
        let place = self.offset.load(Ordering::Acquire) + number * ENTRY_BYTES;
        let mut word = [0; 8];
        if number < self.numbering().entries() {
            self.storage
                .read_at(place, &mut word)
                .map_err(OpenError::reading("BAT", place))?;
        }
        let state = Entry::from_bytes(word).state();
        let there = matches!(state, Some(State::FullyPresent | State::PartiallyPresent));
        *known = Some((number, there));
        Ok(there)
    }
}

fn no_entries() -> Box<[AtomicU64]> {
    (0..GROUP_ENTRIES).map(|_| AtomicU64::new(0)).collect()
}

impl std::fmt::Debug for Bat {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Bat")
            .field("blocks", &self.blocks)
            .field("offset", &self.offset)
            .finish_non_exhaustive()
    }
}
