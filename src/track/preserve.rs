//! The side store: what blocks held at the cut, kept in memory because the guest wrote them before they were sent.
//!
//! It is bounded and not durable. A full store, or a crash, aborts the epoch: the machine merges it into the next one.
//! The store knows nothing of epochs; it holds blocks of the closing epoch and is emptied when that ends.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;

use crate::base::units::{Block, DiskIndex, Extent, to_u64};

/// Memory that one block is counted with beyond its content: its key, its place in the tree, the allocator's share.
const OVERHEAD_BYTES: u64 = 128;

/// What a preserved block held.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Held {
    /// These bytes; fewer than a block at the tail of a disk.
    Data(Box<[u8]>),
    /// Zeros, this many.
    Zero(u64),
}

impl Held {
    fn memory(&self) -> u64 {
        match self {
            Self::Data(bytes) => OVERHEAD_BYTES + to_u64(bytes.len()),
            Self::Zero(_) => OVERHEAD_BYTES,
        }
    }

    fn len(&self) -> u64 {
        match self {
            Self::Data(bytes) => to_u64(bytes.len()),
            Self::Zero(len) => *len,
        }
    }
}

/// The preserved blocks of one machine.
#[derive(Debug)]
pub struct Preserve {
    blocks: BTreeMap<(DiskIndex, u64), Held>,
    bytes: u64,
    bytes_max: u64,
}

/// The side store has no room for another block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Full;

impl Preserve {
    /// An empty store of at most `bytes_max` bytes.
    pub fn new(bytes_max: u64) -> Self {
        Self {
            blocks: BTreeMap::new(),
            bytes: 0,
            bytes_max,
        }
    }

    /// Keeps some `blocks` of one disk, all or none of them.
    pub fn keep(&mut self, disk: DiskIndex, blocks: Vec<(Block, Held)>) -> Result<(), Full> {
        let more: u64 = blocks.iter().map(|(_, held)| held.memory()).sum();
        if self.bytes + more > self.bytes_max {
            return Err(Full);
        }
        self.bytes += more;
        for (block, held) in blocks {
            let before = self.blocks.insert((disk, block.0), held);
            assert!(before.is_none(), "a block is preserved once per epoch");
        }
        Ok(())
    }

    /// Takes the first blocks out that lie behind each other and are of one kind, at most `max` bytes.
    pub fn pop(&mut self, max: u64) -> Option<(DiskIndex, Extent, Held)> {
        let (&(disk, first), _) = self.blocks.first_key_value()?;
        let mut data = Vec::new();
        let mut zeros = 0;
        for block in first.. {
            let len = to_u64(data.len()) + zeros;
            match self.blocks.get(&(disk, block)) {
                Some(held) if len > 0 && len + held.len() > max => break,
                Some(Held::Data(bytes)) if zeros == 0 => data.extend_from_slice(bytes),
                Some(Held::Zero(len)) if data.is_empty() => zeros += len,
                _ => break,
            }
            self.remove(disk, block);
        }
        let held = if zeros == 0 {
            Held::Data(data.into())
        } else {
            Held::Zero(zeros)
        };
        let run = Extent::new(Block(first).offset(), held.len());
        Some((disk, run, held))
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        self.blocks.clear();
        self.bytes = 0;
    }

    /// Whether nothing is kept.
    pub fn is_empty(&self) -> bool {
        self.blocks.is_empty()
    }

    /// Number of blocks kept.
    pub fn count(&self) -> u64 {
        to_u64(self.blocks.len())
    }

    /// Memory in use, in bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    fn remove(&mut self, disk: DiskIndex, block: u64) {
        if let Some(held) = self.blocks.remove(&(disk, block)) {
            self.bytes -= held.memory();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn data(fill: u8) -> Held {
        Held::Data(vec![fill; 4096].into())
    }

    #[test]
    fn neighbours_of_one_kind_leave_together() {
        let mut preserve = Preserve::new(1 << 20);
        let blocks = vec![
            (Block(4), data(4)),
            (Block(5), data(5)),
            (Block(6), Held::Zero(4096)),
            (Block(7), Held::Zero(512)),
        ];
        preserve.keep(DiskIndex(1), blocks).unwrap();
        preserve
            .keep(DiskIndex(0), vec![(Block(9), data(9))])
            .unwrap();
        let mut runs = Vec::new();
        while let Some((disk, run, held)) = preserve.pop(8192) {
            runs.push((disk.0, run, matches!(held, Held::Zero(_))));
        }
        let want = [
            (0, Extent::new(9 * 4096, 4096), false),
            (1, Extent::new(4 * 4096, 8192), false),
            (1, Extent::new(6 * 4096, 4608), true),
        ];
        assert_eq!(runs, want);
        assert_eq!((preserve.bytes(), preserve.count()), (0, 0));
    }

    #[test]
    fn a_full_store_takes_nothing_more() {
        let mut preserve = Preserve::new(2 * (4096 + OVERHEAD_BYTES));
        let three = (0..3).map(|n| (Block(n), data(1))).collect();
        assert_eq!(preserve.keep(DiskIndex(0), three), Err(Full));
        assert!(preserve.is_empty(), "all or none");
        let two = (0..2).map(|n| (Block(n), data(1))).collect();
        assert_eq!(preserve.keep(DiskIndex(0), two), Ok(()));
        assert!(!preserve.is_empty());
        let one = vec![(Block(9), Held::Zero(4096))];
        assert_eq!(preserve.keep(DiskIndex(0), one), Err(Full));
    }
}
