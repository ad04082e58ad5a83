//! Where each block of a layered disk comes from: pages of one byte for each block, in memory as in the file.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    ops::Range,
};

use crate::{
    base::{
        checksum::is_zero,
        units::{BLOCK_BYTES, BLOCKS_PER_REGION, Extent, to_u64, to_usize},
    },
    storage::{Fua, Storage},
};

/// Blocks of a page.
const PAGE_BLOCKS: u64 = 4096;

const _: () = assert!(PAGE_BLOCKS.is_multiple_of(BLOCKS_PER_REGION));

/// Where a block comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    /// From the base.
    Base,
    /// From the layer's file.
    Held,
    /// It reads as zeros.
    Zero,
}

impl State {
    fn bits(self) -> u8 {
        match self {
            Self::Base => 0,
            Self::Held => 1,
            Self::Zero => 2,
        }
    }

    /// The state in the low half of `byte`. What no version wrote reads as the base, as an untouched block does.
    fn now(byte: u8) -> Self {
        match byte & 0xF {
            1 => Self::Held,
            2 => Self::Zero,
            _ => Self::Base,
        }
    }
}

type Page = Box<[u8]>;

/// The map. A page that is not there says that all its blocks come from the base.
#[derive(Debug)]
pub(super) struct Map {
    pages: BTreeMap<u64, Page>,
    /// Pages with blocks whose halves may differ.
    uncertain: BTreeSet<u64>,
    /// Pages whose high halves were written to the file and are not on the platter yet.
    settling: BTreeSet<u64>,
    /// Where the map stands in the file.
    at: u64,
    held: u64,
}

/// A page as it was before a sync.
pub(super) type Uncertain = Vec<(u64, Page)>;

impl Map {
    /// The map of a layer that holds nothing yet, for the run `place` of its file.
    pub(super) fn new(place: Extent) -> Self {
        Self {
            pages: BTreeMap::new(),
            uncertain: BTreeSet::new(),
            settling: BTreeSet::new(),
            at: place.offset,
            held: 0,
        }
    }

    /// The map in the run `place` of the file.
    pub(super) fn read(storage: &dyn Storage, place: Extent) -> io::Result<Self> {
        let mut map = Self::new(place);
        let mut at = place.offset;
        while let Some(data) = storage.data_after(at)? {
            if data.offset >= place.end() {
                break;
            }
            let first = (data.offset.max(at) - place.offset) / PAGE_BLOCKS;
            let last = (data.end().min(place.end()) - 1 - place.offset) / PAGE_BLOCKS;
            for number in first..=last {
                let start = place.offset + number * PAGE_BLOCKS;
                let len = PAGE_BLOCKS.min(place.end() - start);
                let mut page = vec![0; to_usize(PAGE_BLOCKS)].into_boxed_slice();
                storage.read_at(start, &mut page[..to_usize(len)])?;
                map.adopt(number, page);
            }
            at = place.offset + (last + 1) * PAGE_BLOCKS;
        }
        Ok(map)
    }

    fn adopt(&mut self, number: u64, page: Page) {
        if page.iter().any(|byte| byte >> 4 != byte & 0xF) {
            self.uncertain.insert(number);
        }
        let held = page.iter().filter(|byte| State::now(**byte) == State::Held);
        self.held += to_u64(held.count());
        if page.iter().any(|byte| *byte != 0) {
            self.pages.insert(number, page);
        }
    }

    /// Goes back to what is certain, in memory and in the file.
    pub(super) fn fall_back(&mut self, storage: &dyn Storage) -> io::Result<()> {
        let uncertain = std::mem::take(&mut self.uncertain);
        for number in uncertain {
            let Some(mut page) = self.pages.remove(&number) else {
                continue;
            };
            let held = page.iter().filter(|byte| State::now(**byte) == State::Held);
            self.held -= to_u64(held.count());
            for byte in &mut page {
                *byte = *byte & 0xF0 | *byte >> 4;
            }
            self.write(storage, number, &page)?;
            self.adopt(number, page);
        }
        Ok(())
    }

    fn write(&self, storage: &dyn Storage, number: u64, page: &[u8]) -> io::Result<()> {
        storage.write_at(self.at + number * PAGE_BLOCKS, page, Fua::No)
    }

    /// Bytes of blocks that the file holds.
    pub(super) fn held(&self) -> u64 {
        self.held * BLOCK_BYTES
    }

    fn byte(&self, block: u64) -> u8 {
        let page = self.pages.get(&(block / PAGE_BLOCKS));
        page.map_or(0, |page| page[to_usize(block % PAGE_BLOCKS)])
    }

    /// Whether the file holds all these blocks, and certainly so.
    pub(super) fn all_certain(&self, mut blocks: Range<u64>) -> bool {
        blocks.all(|block| {
            self.byte(block) == 0x11 && !self.settling.contains(&(block / PAGE_BLOCKS))
        })
    }

    /// The state of `block`, and the first block up to `end` that has another, or `end`.
    pub(super) fn segment(&self, block: u64, end: u64) -> (State, u64) {
        let state = State::now(self.byte(block));
        let mut at = block;
        while at < end {
            let number = at / PAGE_BLOCKS;
            let stop = ((number + 1) * PAGE_BLOCKS).min(end);
            match self.pages.get(&number) {
                None if state != State::Base => return (state, at),
                // The next page that says anything may be far away.
                None => {
                    let next = self.pages.range(number..).next();
                    at = next.map_or(end, |(next, _)| (next * PAGE_BLOCKS).min(end));
                }
                Some(page) => {
                    let start = to_usize(at % PAGE_BLOCKS);
                    let bytes = &page[start..][..to_usize(stop - at)];
                    let other = bytes.iter().position(|byte| State::now(*byte) != state);
                    match other {
                        Some(other) => return (state, at + to_u64(other)),
                        None => at = stop,
                    }
                }
            }
        }
        (state, end)
    }

    /// Changes what blocks are now, first in the file.
    pub(super) fn set(
        &mut self,
        storage: &dyn Storage,
        blocks: Range<u64>,
        state: State,
    ) -> io::Result<()> {
        let mut at = blocks.start;
        while at < blocks.end {
            let number = at / PAGE_BLOCKS;
            let stop = ((number + 1) * PAGE_BLOCKS).min(blocks.end);
            let changed: Vec<u8> = (at..stop)
                .map(|block| self.byte(block) & 0xF0 | state.bits())
                .collect();
            storage.write_at(self.at + at, &changed, Fua::No)?;
            let fresh = || vec![0; to_usize(PAGE_BLOCKS)].into_boxed_slice();
            let page = self.pages.entry(number).or_insert_with(fresh);
            let page = &mut page[to_usize(at % PAGE_BLOCKS)..][..changed.len()];
            let count = |bytes: &[u8]| {
                let held = bytes
                    .iter()
                    .filter(|byte| State::now(**byte) == State::Held);
                to_u64(held.count())
            };
            self.held = self.held + count(&changed) - count(page);
            page.copy_from_slice(&changed);
            self.uncertain.insert(number);
            at = stop;
        }
        Ok(())
    }

    /// The first region in which the layer says anything.
    pub(super) fn first_region(&self) -> Option<u64> {
        let (number, page) = self.pages.iter().find(|(_, page)| !is_zero(page))?;
        let first = page.iter().position(|byte| *byte != 0)?;
        Some((number * PAGE_BLOCKS + to_u64(first)) / BLOCKS_PER_REGION)
    }

    /// Blocks of one region come from below again, which the file says already, durably. Memory is given back.
    pub(super) fn let_go(&mut self, blocks: Range<u64>) {
        let number = blocks.start / PAGE_BLOCKS;
        let Some(page) = self.pages.get_mut(&number) else {
            return;
        };
        let start = to_usize(blocks.start % PAGE_BLOCKS);
        let bytes = &mut page[start..][..to_usize(blocks.end - blocks.start)];
        let held = bytes
            .iter()
            .filter(|byte| State::now(**byte) == State::Held);
        self.held -= to_u64(held.count());
        bytes.fill(0);
        if is_zero(page) {
            self.pages.remove(&number);
            self.uncertain.remove(&number);
        }
    }

    /// The pages with blocks that are not certain.
    pub(super) fn uncertain(&self) -> Uncertain {
        let pages = self.uncertain.iter();
        pages
            .filter_map(|number| Some((*number, self.pages.get(number)?.clone())))
            .collect()
    }

    /// What blocks were when `before` was taken is certain once the file is synced, and [`settled`](Self::settled) says so.
    pub(super) fn make_certain(
        &mut self,
        storage: &dyn Storage,
        before: &Uncertain,
    ) -> io::Result<()> {
        for (number, before) in before {
            let Some(page) = self.pages.get(number) else {
                continue;
            };
            let mut page = page.clone();
            for (byte, before) in page.iter_mut().zip(before) {
                *byte = *byte & 0xF | before << 4;
            }
            self.settling.insert(*number);
            // In the file first: if that fails, it is tried again with the next flush.
            self.write(storage, *number, &page)?;
            if page.iter().all(|byte| byte >> 4 == byte & 0xF) {
                self.uncertain.remove(number);
            }
            self.pages.insert(*number, page);
        }
        Ok(())
    }

    /// The file was synced after [`make_certain`](Self::make_certain).
    pub(super) fn settled(&mut self) {
        self.settling.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::memory::MemoryStorage;

    /// A forced write between the change of the high halves and the sync was acknowledged with its data alone, and a
    /// power cut took the high half that spoke of it.
    #[test]
    fn nothing_is_certain_before_the_map_is_on_the_platter() {
        let storage = MemoryStorage::with_bytes(&[0; 8192]);
        let mut map = Map::new(Extent::new(4096, 16));
        map.set(&*storage, 3..5, State::Held).unwrap();
        assert_eq!(map.segment(3, 16), (State::Held, 5));
        assert!(!map.all_certain(3..5));
        let before = map.uncertain();
        map.make_certain(&*storage, &before).unwrap();
        assert!(!map.all_certain(3..5));
        map.settled();
        assert!(map.all_certain(3..5) && !map.all_certain(3..6));
    }
}
