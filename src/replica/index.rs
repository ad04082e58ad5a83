//! Which frame of which log holds a byte: the newest one that touches it.

use std::{collections::BinaryHeap, sync::Arc};

use super::{
    error::ReplicaError,
    log::{FrameAt, LogFile},
};
use crate::{
    base::units::{DiskIndex, Extent},
    delta::FrameKind,
};

/// Runs of one disk and the frame that each belongs to, in order; no two overlap. A sorted list, made in one sweep: a tree
/// that takes a million scattered runs one by one takes longer than somebody who opens a point wants to wait.
#[derive(Debug, Default)]
struct ExtentMap(Vec<Piece>);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Piece {
    start: u64,
    end: u64,
    frame: usize,
}

impl ExtentMap {
    /// Gives each byte to the frame with the highest number of those that hold it.
    fn new(mut runs: Vec<Piece>) -> Self {
        runs.sort_unstable_by_key(|run| run.start);
        let mut pieces: Vec<Piece> = Vec::with_capacity(runs.len());
        // Frames that began and may not have ended, the newest on top.
        let mut open: BinaryHeap<(usize, u64)> = BinaryHeap::new();
        let mut coming = runs.iter().peekable();
        let mut at = 0;
        loop {
            while open.peek().is_some_and(|&(_, end)| end <= at) {
                open.pop();
            }
            let next = coming.peek().map(|run| run.start);
            match (open.peek(), next) {
                (None, None) => return Self(pieces),
                (None, Some(start)) => at = start,
                (Some(&(frame, end)), next) => {
                    let stop = next.map_or(end, |start| start.min(end));
                    match pieces.last_mut() {
                        Some(last) if last.frame == frame && last.end == at => last.end = stop,
                        _ => pieces.push(Piece {
                            start: at,
                            end: stop,
                            frame,
                        }),
                    }
                    at = stop;
                }
            }
            while let Some(run) = coming.next_if(|run| run.start <= at) {
                open.push((run.frame, run.end));
            }
        }
    }

    /// The longest run from `offset`, at most to `end`, that belongs to one frame or to none.
    fn segment(&self, offset: u64, end: u64) -> (Extent, Option<usize>) {
        let next = self.0.partition_point(|piece| piece.end <= offset);
        let (stop, frame) = match self.0.get(next) {
            Some(piece) if piece.start <= offset => (piece.end.min(end), Some(piece.frame)),
            Some(piece) => (piece.start.min(end), None),
            None => (end, None),
        };
        (Extent::new(offset, stop - offset), frame)
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
        for log in &index.logs {
            log.announce_frames();
        }
        let mut runs = vec![Vec::new(); disks];
        for number in 0..index.logs.len() {
            for frame in index.logs[number].frames()? {
                let disk = frame.header.disk.index();
                let run = frame.header.run;
                runs[disk].push(Piece {
                    start: run.offset,
                    end: run.end(),
                    frame: index.frames.len(),
                });
                index.frames.push(FrameRef { log: number, frame });
            }
        }
        index.disks = runs.into_iter().map(ExtentMap::new).collect();
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
        self.disks[disk.index()].0.iter().map(|piece| {
            (
                Extent::new(piece.start, piece.end - piece.start),
                piece.frame,
            )
        })
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
            let mut model = [None; 128];
            let mut pieces = Vec::new();
            for (frame, &(start, len)) in runs.iter().enumerate() {
                pieces.push(Piece { start, end: start + len, frame });
                for owner in &mut model[usize::try_from(start).unwrap()..][..usize::try_from(len).unwrap()] {
                    *owner = Some(frame);
                }
            }
            let map = ExtentMap::new(pieces);
            prop_assert!(map.0.is_sorted_by(|a, b| a.end <= b.start && (a.end, a.frame) != (b.start, b.frame)));
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
