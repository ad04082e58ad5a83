//! Thinning: folding neighbouring logs into one.
//!
//! Logs whose points lie between two points that are kept become one log from the parent of the first to the point of
//! the last, with the last version of each block only, in the order of the disk, in one pass. Every frame is checked
//! against its CRC-32C once more on the way; a frame that is whole is copied as it is packed.
//!
//! # How history stays provable
//! The folded log names the point it leads to in its header (see [`delta`](crate::delta)), so the log after it, and the
//! primary, go on from the same chain hash as before: the head never changes. All logs that go in are proved by their own
//! chain before the first byte is written, and the result is proved by its own hash before it replaces them.
//!
//! # Why not every epoch
//! Folding writes again what is left. Done at every chance, a replica would write each byte many times. A group of logs is
//! folded when at most half of its bytes are left, and looked at again when it has doubled: the outputs of all folds
//! together are then at most as long as what came in, less what the last one leaves for the merge, so that staging,
//! folds and merge together write at most two bytes for each byte received, and a group takes at most twice the space
//! that it must. Only above [`LOGS_MAX`] logs the longest group is folded whatever it saves.
//!
//! # Crash contract
//! The result is written to `folded.part` and synced. It is renamed over the last log of the group, which leads to the
//! same point; the folder is synced; only then the other logs of the group are removed. A cut before the rename is
//! durable leaves all logs of the group, and the next open removes the part. A cut after it leaves logs that no other log
//! continues: the next open removes them. Views opened before go on reading the logs they have open.

use std::{
    ops::Range,
    sync::{Arc, atomic::Ordering},
};

use super::{
    error::ReplicaError,
    index::LogIndex,
    log::{LogFile, log_name},
    part::Part,
    record::Base,
    retention::{Kept, Retention},
    state::{Shared, State},
    view::FrameCache,
};
use crate::{
    base::{
        ids::Lineage,
        limits::{INDEX_FRAMES_MAX, LOGS_MAX},
        units::{DiskIndex, Epoch, Extent, to_u64, to_usize},
    },
    delta::{
        EncodedFrame, Encoder, FrameKind, Header, LogKind, encode_data, encode_zero,
        layout::FRAME_HEADER_BYTES,
    },
};

/// The log that is being written.
const FOLDED_NAME: &str = "folded.part";

/// What a fold did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FoldReport {
    /// The point that the log starts from.
    pub from: Epoch,
    /// The point it leads to.
    pub to: Lineage,
    /// Logs that became one.
    pub logs: usize,
    /// Bytes they had.
    pub bytes: u64,
    /// Bytes that were read from the files.
    pub read: u64,
    /// Bytes of the one.
    pub written: u64,
}

/// What a fold must save to be worth it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Payoff {
    /// Half of the bytes, for groups that have doubled since they were looked at.
    Half,
    /// An eighth: space is short.
    Eighth,
    /// Nothing: there are too many logs.
    Any,
}

/// Neighbouring logs, of which only the last leads to a point that is kept.
#[derive(Clone, Debug)]
struct Group {
    logs: Vec<Arc<LogFile>>,
    /// The point that the first one starts from.
    from: Epoch,
    bytes: u64,
    /// Its end stays where it is; the group will not grow.
    settled: bool,
}

/// When a group was looked at last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Weighed {
    bytes: u64,
    settled: bool,
}

impl Shared {
    /// Folds one group of logs that `retention` does not tell apart, if there is one that pays. The caller holds
    /// `merging`.
    pub(super) fn fold_one(
        &self,
        retention: Retention,
        payoff: Payoff,
    ) -> Result<Option<FoldReport>, ReplicaError> {
        let (groups, crowded) = {
            let mut state = self.state()?;
            let groups = self.groups(&state, retention);
            let known: Vec<Epoch> = groups.iter().map(|group| group.from).collect();
            state.upkeep.weighed.retain(|from, _| known.contains(from));
            (groups, state.logs.len() > LOGS_MAX)
        };
        for group in &groups {
            if payoff == Payoff::Half && !self.is_due(group)? {
                continue;
            }
            if let Some(index) = self.weigh(group, payoff)? {
                return self.fold(group, &index);
            }
        }
        if crowded && payoff == Payoff::Half {
            let longest = groups.iter().max_by_key(|group| group.logs.len());
            if let Some(group) = longest
                && let Some(index) = self.weigh(group, Payoff::Any)?
            {
                return self.fold(group, &index);
            }
        }
        Ok(None)
    }

    /// All groups of two logs or more, oldest first. None while the images are on the way from one point to another.
    fn groups(&self, state: &State, retention: Retention) -> Vec<Group> {
        let at_rest = matches!(&state.record, Some(record) if matches!(record.base, Base::At(_)));
        if !at_rest {
            return Vec::new();
        }
        let decisions = state.decisions(retention, &self.pins);
        let mut groups = Vec::new();
        let mut from = 0;
        for (number, kept) in decisions.iter().enumerate() {
            if *kept == Kept::No {
                continue;
            }
            // Decision `n` is about the point that log `n - 1` leads to.
            let range: Range<usize> = from..number;
            from = number;
            let parent = state.logs.get(range.start);
            let parent = parent.and_then(|log| log.header().parent);
            // What lies before the oldest point that is kept is the merge's business.
            if range.len() >= 2
                && decisions[range.start] != Kept::No
                && let Some(parent) = parent
            {
                let logs = state.logs[range].to_vec();
                groups.push(Group {
                    from: parent.epoch,
                    bytes: logs.iter().map(|log| log.bytes()).sum(),
                    settled: *kept == Kept::Anchor,
                    logs,
                });
            }
        }
        groups
    }

    /// Whether a group has changed enough to be looked at.
    fn is_due(&self, group: &Group) -> Result<bool, ReplicaError> {
        let state = self.state()?;
        let weighed = state.upkeep.weighed.get(&group.from);
        Ok(weighed.is_none_or(|weighed| {
            group.bytes / 2 >= weighed.bytes || (group.settled && !weighed.settled)
        }))
    }

    /// The index over a group whose fold pays, from the logs' own indexes. What does not pay is remembered.
    fn weigh(&self, group: &Group, payoff: Payoff) -> Result<Option<LogIndex>, ReplicaError> {
        let disks = self.state()?.disks.len();
        let index = LogIndex::build(group.logs.clone(), disks)?;
        let (frames, bytes) = left_of(&index, disks);
        let pays = match payoff {
            Payoff::Half => bytes <= group.bytes / 2,
            Payoff::Eighth => bytes <= group.bytes / 8 * 7,
            Payoff::Any => true,
        };
        let mut state = self.state()?;
        let limit = self.options.space_max;
        let fits = limit.is_none_or(|limit| state.log_bytes() + bytes <= limit);
        // A log without an index would have to be scanned whenever somebody looks at a point.
        if pays && fits && frames <= INDEX_FRAMES_MAX {
            state.upkeep.folding = bytes;
            return Ok(Some(index));
        }
        let weighed = Weighed {
            bytes: group.bytes,
            settled: group.settled,
        };
        state.upkeep.weighed.insert(group.from, weighed);
        Ok(None)
    }

    fn fold(&self, group: &Group, index: &LogIndex) -> Result<Option<FoldReport>, ReplicaError> {
        let report = self.fold_group(group, index);
        self.state.lock().upkeep.folding = 0;
        if !matches!(report, Ok(Some(_)))
            && let Err(error) = self.remove(FOLDED_NAME)
        {
            tracing::warn!(machine = %self.id, %error, "cannot remove an unfinished fold now");
        }
        report
    }

    fn fold_group(
        &self,
        group: &Group,
        index: &LogIndex,
    ) -> Result<Option<FoldReport>, ReplicaError> {
        let Some(last) = group.logs.last() else {
            return Ok(None);
        };
        let header = Header {
            kind: LogKind::Folded(last.lineage()),
            parent: group.logs[0].header().parent,
            ..last.header().clone()
        };
        let disks = header.disks.len();
        let (mut encoder, first) = Encoder::new(&header);
        let mut part = Part::create(&*self.folder, FOLDED_NAME)?;
        part.push(&first)?;
        let read = copy_frames(index, disks, &mut encoder, &mut part)?;
        let trailer = last.trailer();
        encoder.set_consistency(trailer.consistency);
        let (end, _) = encoder.finish(trailer.lineage.epoch, trailer.cut);
        part.push(&end)?;
        part.write()?;
        part.sync()?;
        let written = part.len();
        let folded = part.finish(&*self.folder)?;
        folded.frames()?;
        let tally = &self.tally;
        tally.log_read.fetch_add(read, Ordering::Relaxed);
        tally.folded.fetch_add(written, Ordering::Relaxed);
        if !self.replace(group, folded)? {
            return Ok(None);
        }
        for log in &group.logs[..group.logs.len() - 1] {
            self.remove(&log_name(log.epoch()))?;
        }
        self.sync_folder()?;
        let report = FoldReport {
            from: group.from,
            to: trailer.lineage,
            logs: group.logs.len(),
            bytes: group.bytes,
            read,
            written,
        };
        tracing::debug!(machine = %self.id, ?report, "folded");
        Ok(Some(report))
    }

    /// Puts `folded` in the place of its group, in the folder and in memory. Not if somebody has begun to use a point
    /// that would go.
    fn replace(&self, group: &Group, folded: LogFile) -> Result<bool, ReplicaError> {
        let (last, inner) = group.logs.split_last().expect("a group has two logs");
        // Held over rename and sync: whoever opens a view in between would pin a point that is gone after a restart.
        let mut state = self.state()?;
        let used = inner.iter().any(|log| self.pins.holds(log.epoch()));
        let start = state
            .logs
            .iter()
            .position(|log| Arc::ptr_eq(log, &group.logs[0]));
        let Some(start) = start.filter(|_| !used) else {
            return Ok(false);
        };
        self.folder
            .rename(FOLDED_NAME, &log_name(last.epoch()))
            .map_err(ReplicaError::io("rename", FOLDED_NAME))?;
        self.sync_folder()?;
        let end = start + group.logs.len();
        state.logs.splice(start..end, [Arc::new(folded)]);
        state.trim_residents();
        Ok(true)
    }
}

/// Writes the last version of each block. Bytes read from the logs.
fn copy_frames(
    index: &LogIndex,
    disks: usize,
    encoder: &mut Encoder,
    part: &mut Part,
) -> Result<u64, ReplicaError> {
    let cache = FrameCache::default();
    let mut read = 0;
    for disk in (0..).take(disks).map(DiskIndex) {
        for (run, number) in index.runs(disk) {
            let at = index.frame(number);
            let header = at.frame.header;
            let frame = match header.kind {
                FrameKind::Zero => encode_zero(disk, run),
                FrameKind::Data if run == header.run => {
                    let log = index.log(at);
                    let (payload, fresh) = log.payload(&at.frame)?;
                    log.unpack(&at.frame, &payload)?;
                    read += fresh;
                    EncodedFrame::copied(header, payload)
                }
                FrameKind::Data => {
                    let (content, fresh) = cache.content(index, number)?;
                    read += fresh;
                    let start = to_usize(run.offset - header.run.offset);
                    let raw = content.slice(start..start + to_usize(run.len));
                    encode_data(disk, run.offset, raw, header.codec)
                }
            };
            encoder.frame(&frame);
            for bytes in frame.parts() {
                part.push(&bytes)?;
            }
        }
    }
    Ok(read)
}

/// Frames and bytes, about, of the log that `index` would be folded into.
fn left_of(index: &LogIndex, disks: usize) -> (u64, u64) {
    let (mut frames, mut bytes) = (0, 0);
    for disk in (0..).take(disks).map(DiskIndex) {
        for (run, number) in index.runs(disk) {
            let header = &index.frame(number).frame.header;
            frames += 1;
            bytes += 2 * to_u64(FRAME_HEADER_BYTES)
                + share(u64::from(header.payload_len), run, header.run);
        }
    }
    (frames, bytes)
}

/// The part of `payload` bytes for `whole` that falls to `run`.
fn share(payload: u64, run: Extent, whole: Extent) -> u64 {
    // A frame with a payload has at most 1 MiB, so the product stays far below 64 bits.
    (payload * run.len.min(whole.len)).div_ceil(whole.len.max(1))
}
