//! The suspects of one disk: blocks that are marked in the open map although nobody is known to have written them.
//!
//! Each is *waiting* until the replica is asked about it, then *asked* until it answers. A write ends the suspicion at
//! once, because from then on the block is known to differ. In memory only: that blocks of the open map are suspects is
//! remembered by the machine's record, and after a restart all of them are.
#![forbid(unsafe_code)]

use std::{io, ops::Range};

use super::bits::Bits;

/// See the [module](self). No block is in both sets.
#[derive(Debug)]
pub struct Suspects {
    waiting: Bits,
    asked: Bits,
}

impl Suspects {
    /// None, of a disk of `blocks` blocks.
    pub fn fleeting(blocks: u64) -> io::Result<Self> {
        Ok(Self {
            waiting: Bits::fleeting(blocks)?,
            asked: Bits::fleeting(blocks)?,
        })
    }

    /// How many there are.
    pub fn count(&self) -> u64 {
        self.waiting.count() + self.asked.count()
    }

    /// Those that the replica has to be asked about.
    pub fn waiting(&self) -> &Bits {
        &self.waiting
    }

    /// All blocks of `marked` are suspects, and none was asked about.
    pub fn suspect(&self, marked: &Bits) {
        self.asked.clear_all();
        self.waiting.add(marked);
    }

    /// The blocks of `more` are suspects too, but for those of `known`.
    pub fn suspect_without(&self, more: &Bits, known: &Bits) {
        self.waiting.add_without(more, known);
    }

    /// The replica is being asked about `blocks`, which were waiting.
    pub fn ask(&self, blocks: Range<u64>) {
        self.waiting.clear(blocks.clone());
        self.asked.set(blocks);
    }

    /// It was not asked about `blocks` after all.
    pub fn take_back(&self, blocks: Range<u64>) {
        self.asked.clear(blocks.clone());
        self.waiting.set(blocks);
    }

    /// The replica answered about `blocks`; those about which the answer still says something.
    pub fn answered(&self, blocks: Range<u64>) -> Vec<Range<u64>> {
        let meant: Vec<_> = self.asked.runs(blocks).collect();
        for run in &meant {
            self.asked.clear(run.clone());
        }
        meant
    }

    /// `blocks` are about to be written.
    pub fn written(&self, blocks: Range<u64>) {
        for set in [&self.waiting, &self.asked] {
            // Nearly always there are none, and a load leaves the cache line shared.
            if set.count() > 0 {
                set.clear(blocks.clone());
            }
        }
    }

    /// No answer comes any more: whoever was asked about waits again.
    pub fn unanswered(&self) {
        self.waiting.add(&self.asked);
        self.asked.clear_all();
    }

    /// There are none any more.
    pub fn clear(&self) {
        self.waiting.clear_all();
        self.asked.clear_all();
    }
}
