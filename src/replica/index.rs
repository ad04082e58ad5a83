//! Which frame of which log holds a byte: the newest one that touches it.

use std::{collections::BTreeMap, sync::Arc};

use super::{
    error::ReplicaError,
    log::{FrameAt, LogFile},
};
use crate::{
    base::units::{DiskIndex, Extent},
    delta::FrameKind,
};

/// Runs of one disk and the frame that each belongs to; no two overlap.
#[derive(Debug, Default)]
struct ExtentMap(BTreeMap<u64, Piece>);

#[derive(Clone, Copy, Debug)]
struct Piece {
    end: u64,
    frame: usize,
}

impl ExtentMap {
    /// Gives `run` to `frame`, whoever had parts of it before.
    fn insert(&mut self, run: Extent, frame: usize) {
        let end = run.end();
        let before = self.0.range_mut(..run.offset).next_back();
        if let Some((_, piece)) = before.filter(|(_, piece)| piece.end > run.offset) {
            let old = std::mem::replace(&mut piece.end, run.offset);
            let frame = piece.frame;
            if old > end {
                self.0.insert(end, Piece { end: old, frame });
            }
        }
        while let Some((&start, &piece)) = self.0.range(run.offset..end).next() {
            self.0.remove(&start);
            if piece.end > end {
                self.0.insert(end, piece);
            }
        }
        self.0.insert(run.offset, Piece { end, frame });
    }

    /// The longest run from `offset`, at most to `end`, that belongs to one frame or to none.
    fn segment(&self, offset: u64, end: u64) -> (Extent, Option<usize>) {
        let at = self.0.range(..=offset).next_back();
        if let Some((_, piece)) = at.filter(|(_, piece)| piece.end > offset) {
            let run = Extent::new(offset, piece.end.min(end) - offset);
            return (run, Some(piece.frame));
        }
        let next = self.0.range(offset..end).next();
        let stop = next.map_or(end, |(&start, _)| start);
        (Extent::new(offset, stop - offset), None)
    }
}

/// A frame, and the log it is in.
#[derive(Clone, Copy, Debug)]
pub(super) struct FrameRef {
    pub(super) log: usize,
    pub(super) frame: FrameAt,
}

/// The index over consecutive logs.
#[derive(Debug)]
pub(super) struct LogIndex {
    logs: Vec<Arc<LogFile>>,
    frames: Vec<FrameRef>,
    disks: Vec<ExtentMap>,
}

impl LogIndex {
    /// Indexes `logs`, oldest first, of a machine with `disks` disks.
    pub(super) fn build(logs: Vec<Arc<LogFile>>, disks: usize) -> Result<Self, ReplicaError> {
        let mut index = Self {
            logs,
            frames: Vec::new(),
            disks: Vec::new(),
        };
        index.disks.resize_with(disks, ExtentMap::default);
        for number in 0..index.logs.len() {
            for frame in index.logs[number].frames()? {
                let disk = frame.header.disk.index();
                index.disks[disk].insert(frame.header.run, index.frames.len());
                index.frames.push(FrameRef { log: number, frame });
            }
        }
        Ok(index)
    }

    /// The longest run of a disk from `offset`, at most to `end`, that belongs to one frame or to none.
    pub(super) fn segment(
        &self,
        disk: DiskIndex,
        offset: u64,
        end: u64,
    ) -> (Extent, Option<usize>) {
        self.disks[disk.index()].segment(offset, end)
    }

    /// All runs of a disk that a frame holds, in order.
    pub(super) fn runs(&self, disk: DiskIndex) -> impl Iterator<Item = (Extent, usize)> {
        self.disks[disk.index()]
            .0
            .iter()
            .map(|(&start, piece)| (Extent::new(start, piece.end - start), piece.frame))
    }

    pub(super) fn frame(&self, number: usize) -> &FrameRef {
        &self.frames[number]
    }

    pub(super) fn kind(&self, number: usize) -> FrameKind {
        self.frames[number].frame.header.kind
    }

    pub(super) fn log(&self, frame: &FrameRef) -> &LogFile {
        &self.logs[frame.log]
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Against a table of one owner for each byte.
        #[test]
        fn the_newest_run_owns_its_bytes(runs in prop::collection::vec((0..64u64, 1..40u64), 0..40)) {
            let mut map = ExtentMap::default();
            let mut model = [None; 128];
            for (number, &(offset, len)) in runs.iter().enumerate() {
                map.insert(Extent::new(offset, len), number);
                for owner in &mut model[usize::try_from(offset).unwrap()..][..usize::try_from(len).unwrap()] {
                    *owner = Some(number);
                }
            }
            let mut offset = 0;
            while offset < 128 {
                let (run, owner) = map.segment(offset, 128);
                prop_assert!(run.offset == offset && run.len > 0);
                for at in run.offset..run.end() {
                    prop_assert_eq!(model[usize::try_from(at).unwrap()], owner);
                }
                offset = run.end();
            }
        }
    }
}
