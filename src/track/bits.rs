//! A set of blocks: one bit each, changed from many threads at once without a lock.
//!
//! Beside the words stand a summary (one bit per [`PAGE_WORDS`] words that ever held a set bit) and the exact number of
//! set bits. Work on a whole map is therefore proportional to the part of the disk that was touched, not to its size.
//!
//! Setting and clearing the same block at the same time is the caller's race; region locks exclude it.
#![forbid(unsafe_code)]

use std::{io, ops::Range};

use super::state::Words;
use crate::base::{
    sync::atomic::{AtomicU64, Ordering},
    units::to_usize,
};

/// Words that share a bit of the summary: a memory page of them, which covers 128 MiB of a disk.
pub const PAGE_WORDS: u64 = 512;
const WORD_BITS: u64 = 64;
const PAGE_BITS: u64 = PAGE_WORDS * WORD_BITS;

/// A set of block indices `0..len`.
#[derive(Debug)]
pub struct Bits {
    words: Words,
    len: u64,
    pages: Box<[AtomicU64]>,
    count: AtomicU64,
}

impl Bits {
    /// Words that a set of `len` blocks needs.
    pub fn words_for(len: u64) -> usize {
        to_usize(len.div_ceil(WORD_BITS)).max(1)
    }

    /// An empty set that lasts as long as the process.
    pub fn fleeting(len: u64) -> io::Result<Self> {
        Ok(Self::over(Words::fleeting(Self::words_for(len))?, len))
    }

    /// The set in `words`; bits past `len` are cleared.
    pub fn load(words: Words, len: u64) -> Self {
        let bits = Self::over(words, len);
        for (index, word) in (0..).zip(bits.words.iter()) {
            let first = index * WORD_BITS;
            if first + WORD_BITS > len {
                word.fetch_and(mask(0..len.saturating_sub(first)), Ordering::AcqRel);
            }
            let set = u64::from(word.load(Ordering::Acquire).count_ones());
            if set > 0 {
                bits.touch(index);
                bits.count.fetch_add(set, Ordering::AcqRel);
            }
        }
        bits
    }

    fn over(words: Words, len: u64) -> Self {
        let pages = len.div_ceil(PAGE_BITS).div_ceil(WORD_BITS);
        Self {
            words,
            len,
            pages: (0..pages.max(1)).map(|_| AtomicU64::new(0)).collect(),
            count: AtomicU64::new(0),
        }
    }

    /// Number of blocks in the set.
    pub fn count(&self) -> u64 {
        self.count.load(Ordering::Acquire)
    }

    /// Adds `blocks`; the number of those that were not in the set before.
    pub fn set(&self, blocks: Range<u64>) -> u64 {
        let mut added = 0;
        for (index, mask) in spans(blocks) {
            let word = &self.words[to_usize(index)];
            // Most writes hit blocks that are marked already; a load leaves the cache line shared.
            if word.load(Ordering::Acquire) & mask == mask {
                continue;
            }
            self.touch(index);
            let old = word.fetch_or(mask, Ordering::AcqRel);
            added += u64::from((mask & !old).count_ones());
        }
        if added > 0 {
            self.count.fetch_add(added, Ordering::AcqRel);
        }
        added
    }

    /// Removes `blocks`; the number of those that were in the set.
    pub fn clear(&self, blocks: Range<u64>) -> u64 {
        let mut removed = 0;
        for (index, mask) in spans(blocks) {
            let old = self.words[to_usize(index)].fetch_and(!mask, Ordering::AcqRel);
            removed += u64::from((mask & old).count_ones());
        }
        if removed > 0 {
            self.count.fetch_sub(removed, Ordering::AcqRel);
        }
        removed
    }

    /// Whether any of `blocks` is in the set.
    pub fn any(&self, blocks: Range<u64>) -> bool {
        spans(blocks)
            .any(|(index, mask)| self.words[to_usize(index)].load(Ordering::Acquire) & mask != 0)
    }

    /// The first block of the set that lies in `within`.
    pub fn next(&self, within: Range<u64>) -> Option<u64> {
        self.first(within, true)
    }

    /// The first run of blocks of the set that lies in `within`.
    pub fn run(&self, within: Range<u64>) -> Option<Range<u64>> {
        let within = within.start..within.end.min(self.len);
        let first = self.first(within.clone(), true)?;
        let end = self.first(first..within.end, false).unwrap_or(within.end);
        Some(first..end)
    }

    /// All runs of blocks of the set that lie in `within`, in ascending order.
    pub fn runs(&self, within: Range<u64>) -> impl Iterator<Item = Range<u64>> {
        let mut from = within.start;
        std::iter::from_fn(move || {
            let run = self.run(from..within.end)?;
            from = run.end;
            Some(run)
        })
    }

    /// What lies between neighbouring runs of the set, in ascending order. Gaps that are passed may be filled meanwhile.
    pub fn gaps(&self) -> impl Iterator<Item = Range<u64>> {
        let mut runs = self.runs(0..self.len);
        let mut from = runs.next().map(|first| first.end);
        std::iter::from_fn(move || {
            let next = runs.next()?;
            let gap = from?..next.start;
            from = Some(next.end);
            Some(gap)
        })
    }

    /// The first block of `within` that is in the set, or not in it.
    fn first(&self, within: Range<u64>, set: bool) -> Option<u64> {
        let mut at = within.start;
        let end = within.end.min(self.len);
        while at < end {
            if set && at.is_multiple_of(PAGE_BITS) && !self.touched(at / PAGE_BITS) {
                at += PAGE_BITS;
                continue;
            }
            let word = self.words[to_usize(at / WORD_BITS)].load(Ordering::Acquire);
            let word = if set { word } else { !word } >> (at % WORD_BITS);
            if word != 0 {
                let found = at + u64::from(word.trailing_zeros());
                return (found < end).then_some(found);
            }
            at = (at / WORD_BITS + 1) * WORD_BITS;
        }
        None
    }

    /// Adds every block.
    pub fn set_all(&self) {
        self.set(0..self.len);
    }

    /// Adds the blocks of `other`, which has the same length.
    pub fn add(&self, other: &Self) {
        self.add_where(other, |_| u64::MAX);
    }

    /// Adds the blocks of `other` that are not in `but`; all have the same length.
    pub fn add_without(&self, other: &Self, but: &Self) {
        assert_eq!(self.len, but.len, "all are maps of one disk");
        self.add_where(other, |index| {
            !but.words[to_usize(index)].load(Ordering::Acquire)
        });
    }

    /// Adds the blocks of `other` whose bits are set in the words that `allowed` tells.
    fn add_where(&self, other: &Self, allowed: impl Fn(u64) -> u64) {
        assert_eq!(self.len, other.len, "both are maps of one disk");
        for page in other.touched_pages() {
            for index in page_words(page, self.words.len()) {
                let mask = other.words[to_usize(index)].load(Ordering::Acquire) & allowed(index);
                if mask == 0 {
                    continue;
                }
                self.touch(index);
                let old = self.words[to_usize(index)].fetch_or(mask, Ordering::AcqRel);
                let added = u64::from((mask & !old).count_ones());
                self.count.fetch_add(added, Ordering::AcqRel);
            }
        }
    }

    /// Empties the set. Nothing may be added meanwhile.
    pub fn clear_all(&self) {
        for page in self.touched_pages() {
            for index in page_words(page, self.words.len()) {
                let word = &self.words[to_usize(index)];
                if word.load(Ordering::Acquire) != 0 {
                    let old = word.swap(0, Ordering::AcqRel);
                    self.count
                        .fetch_sub(u64::from(old.count_ones()), Ordering::AcqRel);
                }
            }
            self.pages[to_usize(page / WORD_BITS)]
                .fetch_and(!(1 << (page % WORD_BITS)), Ordering::AcqRel);
        }
    }

    /// Makes the set durable, where it has a file.
    pub fn sync(&self) -> io::Result<()> {
        self.words.sync()
    }

    /// Notes that the word `index` may hold bits. Comes before the bits, so that no search passes them by.
    fn touch(&self, index: u64) {
        let page = index / PAGE_WORDS;
        let word = &self.pages[to_usize(page / WORD_BITS)];
        let mask = 1 << (page % WORD_BITS);
        if word.load(Ordering::Acquire) & mask == 0 {
            word.fetch_or(mask, Ordering::AcqRel);
        }
    }

    fn touched(&self, page: u64) -> bool {
        self.pages[to_usize(page / WORD_BITS)].load(Ordering::Acquire) >> (page % WORD_BITS) & 1
            == 1
    }

    fn touched_pages(&self) -> impl Iterator<Item = u64> {
        (0..self.len.div_ceil(PAGE_BITS)).filter(|&page| self.touched(page))
    }
}

/// Indices of the words of a `page` of a map of `words` words.
fn page_words(page: u64, words: usize) -> Range<u64> {
    let first = page * PAGE_WORDS;
    first..(first + PAGE_WORDS).min(crate::base::units::to_u64(words))
}

/// The words that `blocks` touch: (index, bits of it).
fn spans(blocks: Range<u64>) -> impl Iterator<Item = (u64, u64)> {
    let words = if blocks.is_empty() {
        0..0
    } else {
        blocks.start / WORD_BITS..blocks.end.div_ceil(WORD_BITS)
    };
    words.map(move |index| {
        let first = index * WORD_BITS;
        let from = blocks.start.saturating_sub(first);
        let to = (blocks.end - first).min(WORD_BITS);
        (index, mask(from..to))
    })
}

/// The bits `bits` of a word.
fn mask(bits: Range<u64>) -> u64 {
    if bits.is_empty() {
        0
    } else {
        (u64::MAX >> (WORD_BITS - (bits.end - bits.start))) << bits.start
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    #[derive(Clone, Debug)]
    enum Step {
        Set(Range<u64>),
        Clear(Range<u64>),
        ClearAll,
    }

    const LEN: u64 = 2 * PAGE_BITS + 77;

    fn range() -> impl Strategy<Value = Range<u64>> {
        // Around the edges of words and pages, and anywhere.
        let start = prop_oneof![0..LEN, 60..70u64, PAGE_BITS - 3..PAGE_BITS + 3];
        (start, prop_oneof![0..5u64, 60..200u64, 30_000..40_000u64])
            .prop_map(|(start, len)| start..(start + len).min(LEN))
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            6 => range().prop_map(Step::Set),
            3 => range().prop_map(Step::Clear),
            1 => Just(Step::ClearAll),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn it_is_a_set(steps in prop::collection::vec(step(), 1..12), look in range()) {
            let bits = Bits::fleeting(LEN).unwrap();
            let mut model = BTreeSet::new();
            for step in steps {
                match step {
                    Step::Set(blocks) => {
                        let added = blocks.clone().filter(|&block| model.insert(block)).count();
                        prop_assert_eq!(bits.set(blocks), added as u64);
                    }
                    Step::Clear(blocks) => {
                        let removed = blocks.clone().filter(|block| model.remove(block)).count();
                        prop_assert_eq!(bits.clear(blocks), removed as u64);
                    }
                    Step::ClearAll => {
                        bits.clear_all();
                        model.clear();
                    }
                }
                prop_assert_eq!(bits.count(), model.len() as u64);
            }
            let within: Vec<u64> = model.range(look.clone()).copied().collect();
            let found: Vec<u64> = bits.runs(look.clone()).flatten().collect();
            prop_assert_eq!(&found, &within);
            prop_assert_eq!(bits.any(look), !within.is_empty());
            let runs: Vec<_> = bits.runs(0..LEN).collect();
            let between: Vec<_> = runs.windows(2).map(|pair| pair[0].end..pair[1].start).collect();
            prop_assert_eq!(bits.gaps().collect::<Vec<_>>(), between);
            let copy = Bits::fleeting(LEN).unwrap();
            copy.set(100..200);
            copy.add(&bits);
            model.extend(100..200);
            prop_assert_eq!(copy.runs(0..LEN).flatten().collect::<Vec<_>>(), model.iter().copied().collect::<Vec<_>>());
            prop_assert_eq!(copy.count(), model.len() as u64);
            let part = Bits::fleeting(LEN).unwrap();
            part.add_without(&copy, &bits);
            let without: Vec<u64> = model.iter().copied().filter(|&block| !bits.any(block..block + 1)).collect();
            prop_assert_eq!(part.count(), without.len() as u64);
            prop_assert_eq!(part.runs(0..LEN).flatten().collect::<Vec<_>>(), without);
        }
    }

    #[test]
    fn bits_past_the_end_are_not_believed() {
        let words = Words::fleeting(2).unwrap();
        for word in words.iter() {
            word.store(u64::MAX, Ordering::Relaxed);
        }
        let bits = Bits::load(words, 70);
        assert_eq!(bits.count(), 70);
        assert_eq!(bits.run(0..1000), Some(0..70));
    }
}
