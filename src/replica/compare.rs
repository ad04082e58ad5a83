//! Comparing a point with what the primary says it holds: hashes of its blocks, or that they are zeros.
//!
//! A comparison reads and writes nothing but what it is asked about. What a disk knows to be zeros is not read.

use std::ops::Range;

use super::{error::ReplicaError, status::Point, store::MachineReplica, view::PointView};
use crate::{
    base::{
        checksum::is_zero,
        ids::Lineage,
        limits::FRAME_BYTES_MAX,
        units::{BLOCK_BYTES, Extent, to_usize},
    },
    delta::Consistency,
    disk::{Content, Disk, DiskError},
    protocol::compare::{BlockHash, Differing, Question, Sample},
};

/// Why a question has no answer.
#[derive(Debug, thiserror::Error)]
pub enum CompareError {
    /// It is beyond the limits, or about other disks.
    #[error("the primary's question about content is not acceptable: {0}")]
    Malformed(&'static str),
    /// A disk of the point cannot be read.
    #[error("cannot compare with the replica")]
    Disk(#[from] DiskError),
    /// The point cannot be opened.
    #[error("cannot compare with the replica")]
    Replica(#[from] ReplicaError),
}

impl MachineReplica {
    /// The disks exactly as the replica holds them at `at`, to compare with: its head, or an earlier point of which the logs
    /// are still there. Unlike [`view`](Self::view) also where that is no recovery point: an initial copy without the
    /// epoch after it, the images of a former primary.
    pub fn view_at(&self, at: Lineage) -> Result<PointView, ReplicaError> {
        let state = self.shared.state()?;
        let logs = state.logs.iter().filter(|log| log.epoch() <= at.epoch);
        let logs: Vec<_> = logs.cloned().collect();
        let base = state.record.as_ref().and_then(|record| record.base.floor());
        let (found, cut) = match logs.last() {
            Some(log) => (Some(log.trailer().lineage), log.trailer().cut),
            None => (
                base.map(|base| base.lineage),
                base.map(|base| base.cut).unwrap_or_default(),
            ),
        };
        let merged_beyond = state.merge_target().is_some_and(|target| at.epoch < target);
        if found != Some(at) || merged_beyond {
            return Err(ReplicaError::NoPoint(at.epoch));
        }
        let point = Point {
            lineage: at,
            cut,
            consistency: Consistency::Crash,
            bytes: 0,
        };
        self.shared.show(state, point, logs)
    }
}

impl PointView {
    /// In which blocks of the question this point holds something else.
    pub fn compare(&self, question: &Question) -> Result<Differing, CompareError> {
        let sizes: Vec<u64> = self.disks.iter().map(|disk| disk.geometry().size).collect();
        question.check(&sizes).map_err(CompareError::Malformed)?;
        let mut differing = Differing::default();
        let mut first = 0;
        for sample in &question.samples {
            let disk = &*self.disks[sample.disk.index()];
            let blocks = sample.run().blocks();
            each_block(disk, sample.run(), |block, held| {
                let index = block - blocks.start;
                if !same(sample, index, held) {
                    differing.push(first + index);
                }
            })?;
            first += blocks.end - blocks.start;
        }
        Ok(differing)
    }
}

/// What a block holds here.
#[derive(Clone, Copy)]
enum Held<'a> {
    Data(&'a [u8]),
    /// Zeros, and it is a whole one.
    Zero,
}

/// Whether block number `index` of the sample is what is `held` here.
fn same(sample: &Sample, index: u64, held: Held<'_>) -> bool {
    match (&sample.hashes, held) {
        (Some(hashes), Held::Data(bytes)) => hashes.0[to_usize(index)] == BlockHash::of(bytes),
        (Some(hashes), Held::Zero) => hashes.0[to_usize(index)] == BlockHash::of_zeros(),
        (None, Held::Data(bytes)) => is_zero(bytes),
        (None, Held::Zero) => true,
    }
}

/// Calls `look` for each block of `run`, which is made of whole blocks or ends with the disk.
fn each_block(
    disk: &dyn Disk,
    run: Extent,
    mut look: impl FnMut(u64, Held<'_>),
) -> Result<(), DiskError> {
    let mut bytes = Vec::new();
    let mut at = run.offset;
    while at < run.end() {
        let (known, kind) = disk.run_at(at)?;
        let known = known.end().min(run.end());
        let whole = known / BLOCK_BYTES * BLOCK_BYTES;
        if kind == Content::Zero && whole > at {
            for block in blocks(at, whole) {
                look(block, Held::Zero);
            }
            at = whole;
            continue;
        }
        let end = known.next_multiple_of(BLOCK_BYTES).min(run.end());
        let end = end.min(at + FRAME_BYTES_MAX);
        bytes.resize(to_usize(end - at), 0);
        disk.read_at(at, &mut bytes)?;
        for (block, content) in blocks(at, end).zip(bytes.chunks(to_usize(BLOCK_BYTES))) {
            look(block, Held::Data(content));
        }
        at = end;
    }
    Ok(())
}

fn blocks(from: u64, to: u64) -> Range<u64> {
    Extent::new(from, to - from).blocks()
}
