//! Merging: folding the oldest logs into the base images.
//!
//! In one pass, the last version of each block only, in the order of the disk. Every frame is checked against its
//! CRC-32C once more on the way. Nothing is read but the logs.
//!
//! # Crash contract
//! Before the first byte the record says that a merge to point T began; after the images are durable it says that they
//! are at T; then the logs up to T are removed. A cut in between leaves one of these three states. In the first the merge
//! starts again: all logs it needs are there, and writing a block twice does no harm.

use std::sync::{Arc, atomic::Ordering};

use super::{
    error::ReplicaError,
    index::LogIndex,
    log::{LogFile, log_name},
    record::{Base, BasePoint, DiskRecord, Record},
    retention::Kept,
    state::{Shared, State},
    store::{MachineReplica, disk_failed},
    view::FrameCache,
};
use crate::{
    base::{
        ids::Lineage,
        units::{DiskIndex, Epoch, to_u64, to_usize},
    },
    delta::FrameKind,
    disk::{Disk, Fua, Space},
};

/// What a merge did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MergeReport {
    /// Epoch of the base images before.
    pub from: Epoch,
    /// The point they are at now.
    pub to: Lineage,
    /// Logs folded and removed.
    pub logs: usize,
    /// Bytes read from the logs.
    pub read: u64,
    /// Bytes written to the images; runs of zeros are not counted.
    pub written: u64,
}

/// A merge that was decided upon.
struct Plan {
    record: Record,
    from: BasePoint,
    to: BasePoint,
    logs: Vec<Arc<LogFile>>,
    disks: Vec<Arc<dyn Disk>>,
}

impl MachineReplica {
    /// Folds the logs that retention does not need into the images, if there are any and no view needs an older point.
    /// Takes as long as it takes; logs are received and views read meanwhile.
    pub fn merge(&self) -> Result<Option<MergeReport>, ReplicaError> {
        let shared = &*self.shared;
        let _merging = shared.merging.lock();
        let count = shared.surplus(&*shared.state()?);
        shared.merge_oldest(count)
    }
}

impl Shared {
    /// How many of the oldest logs should be folded.
    pub(super) fn surplus(&self, state: &State) -> usize {
        // Everything before the oldest point that is kept; that one is in the images then.
        let decisions = state.decisions(self.options.retention, &self.pins);
        let count = decisions.iter().position(|kept| *kept != Kept::No);
        let count = count.unwrap_or(0);
        // What was begun is finished.
        let begun = state.merge_target();
        let begun = begun.map_or(0, |to| logs_up_to(state, to));
        count.max(begun)
    }

    /// Folds the `count` oldest logs, or as many of them as open views allow. The caller holds `merging`.
    pub(super) fn merge_oldest(&self, count: usize) -> Result<Option<MergeReport>, ReplicaError> {
        let Some(plan) = self.plan(&*self.state()?, count) else {
            return Ok(None);
        };
        // The logs are proved before the record says that the images are no point any more.
        let index = LogIndex::build(plan.logs.clone(), plan.disks.len())?;
        {
            let mut state = self.state()?;
            // A view may have been opened on an older point meanwhile: it goes first.
            if self.plan(&state, count).map(|now| now.to) != Some(plan.to) {
                return Ok(None);
            }
            let base = Base::Merging {
                from: plan.from,
                to: plan.to,
            };
            let record = state.record.clone().ok_or(ReplicaError::NotPrepared)?;
            self.record(&mut state, Record { base, ..record })?;
        }
        let (read, written) = self.apply(&plan, &index)?;
        {
            let mut state = self.state()?;
            let base = Base::At(plan.to);
            let record = state.record.clone().ok_or(ReplicaError::NotPrepared)?;
            self.record(&mut state, Record { base, ..record })?;
            state.logs.drain(..plan.logs.len());
        }
        for log in &plan.logs {
            self.remove(&log_name(log.epoch()))?;
        }
        self.sync_folder()?;
        tracing::debug!(machine = %self.id, epoch = %plan.to.lineage.epoch, logs = plan.logs.len(), "merged");
        Ok(Some(MergeReport {
            from: plan.from.lineage.epoch,
            to: plan.to.lineage,
            logs: plan.logs.len(),
            read,
            written,
        }))
    }

    fn plan(&self, state: &State, count: usize) -> Option<Plan> {
        let count = match self.pins.oldest() {
            Some(oldest) => count.min(logs_up_to(state, oldest)),
            None => count,
        };
        let record = state.record.clone()?;
        if record.rescue.is_some() {
            return None;
        }
        let from = record.base.floor()?;
        let logs = state.logs.get(..count)?.to_vec();
        let trailer = logs.last()?.trailer();
        Some(Plan {
            record,
            from,
            to: BasePoint {
                lineage: trailer.lineage,
                cut: trailer.cut,
                consistency: trailer.consistency,
                exact: true,
            },
            logs,
            disks: state.disks.clone(),
        })
    }

    /// Writes the last version of each block, and makes the images durable. Bytes read and written.
    fn apply(&self, plan: &Plan, index: &LogIndex) -> Result<(u64, u64), ReplicaError> {
        let (mut read, mut written) = (0, 0);
        let disks = plan.disks.iter().zip(&plan.record.disks).zip(0..);
        for ((image, record), number) in disks {
            let done = self.apply_disk(index, DiskIndex(number), image, record)?;
            read += done.0;
            written += done.1;
        }
        for (image, record) in plan.disks.iter().zip(&plan.record.disks) {
            image
                .flush()
                .map_err(|source| disk_failed(&record.name, source))?;
        }
        Ok((read, written))
    }

    fn apply_disk(
        &self,
        index: &LogIndex,
        disk: DiskIndex,
        image: &Arc<dyn Disk>,
        record: &DiskRecord,
    ) -> Result<(u64, u64), ReplicaError> {
        let frames = FrameCache::default();
        let (mut read, mut written) = (0, 0);
        for (run, number) in index.runs(disk) {
            let header = index.frame(number).frame.header;
            let done = match header.kind {
                FrameKind::Zero => image.zero(run, Space::Release, Fua::No),
                FrameKind::Data => {
                    let (content, fresh) = frames.content(index, number)?;
                    let start = to_usize(run.offset - header.run.offset);
                    let part = &content[start..][..to_usize(run.len)];
                    read += fresh;
                    written += to_u64(part.len());
                    let tally = &self.tally;
                    tally.log_read.fetch_add(fresh, Ordering::Relaxed);
                    tally.image_written.fetch_add(run.len, Ordering::Relaxed);
                    image.write_at(run.offset, part, Fua::No)
                }
            };
            done.map_err(|source| disk_failed(&record.name, source))?;
        }
        Ok((read, written))
    }
}

/// Number of logs up to `epoch`.
fn logs_up_to(state: &State, epoch: Epoch) -> usize {
    state
        .logs
        .iter()
        .take_while(|log| log.epoch() <= epoch)
        .count()
}
