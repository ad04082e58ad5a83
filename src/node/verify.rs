//! A verification of a machine on its primary's host: how far it is, what it found, how fast it may go.
//!
//! It outlives links: what was asked and not answered is asked again. It outlives the process: what is left is saved now
//! and then, and when a link ends.

use std::{collections::BTreeMap, time::Duration};

use super::{
    control::VerifyRequest,
    progress::rate,
    status::{FoundStatus, VerifyStatus},
};
use crate::{
    base::units::{DiskIndex, Extent},
    volume::{Machine, SavedVerification, Verification},
};

/// Places in which a machine may differ before the verification is given up: there a resync is what is needed.
const FOUND_MAX: usize = 1 << 16;
/// Time between two records of what is left: what a death makes be compared again.
const SAVE_EVERY: Duration = Duration::from_secs(5);
/// Places that the status names.
const NAMED_MAX: usize = 100;

/// The verification that runs, or the last one since the node started.
#[derive(Debug)]
pub(super) struct Verifying {
    /// Nothing while the replication thread looks for the next question, and once it ended.
    blocks: Option<Verification>,
    request: VerifyRequest,
    began: Duration,
    ended: Option<Duration>,
    /// When the next question may be asked.
    due: Duration,
    /// When it was saved last; nothing if it never was.
    saved: Option<Duration>,
    total: u64,
    left: u64,
    compared: u64,
    read: u64,
    /// Lengths of the runs that differ, by disk and offset; runs that touch are one.
    found: BTreeMap<(DiskIndex, u64), u64>,
    problem: Option<String>,
}

impl Verifying {
    pub(super) fn new(blocks: Verification, request: VerifyRequest, now: Duration) -> Self {
        let left = blocks.left();
        Self {
            blocks: Some(blocks),
            request,
            began: now,
            ended: None,
            due: now,
            saved: None,
            total: left,
            left,
            compared: 0,
            read: 0,
            found: BTreeMap::new(),
            problem: None,
        }
    }

    /// One that an earlier process began.
    pub(super) fn resumed(saved: SavedVerification, blocks: Verification, now: Duration) -> Self {
        let request = VerifyRequest {
            repair: saved.repair,
            throttle: saved.throttle,
        };
        let begun = Self::new(blocks, request, now);
        let mut resumed = Self {
            total: saved.total,
            compared: saved.compared,
            read: saved.read,
            ..begun
        };
        for (disk, run) in saved.found {
            resumed.find(disk, run);
        }
        resumed
    }

    /// What is to be saved now: at the beginning, and when some time went by. `asked` is on the way.
    pub(super) fn due_record(
        &mut self,
        machine: &Machine,
        asked: impl Iterator<Item = (DiskIndex, Extent)>,
        now: Duration,
    ) -> Option<SavedVerification> {
        if self.saved.is_some_and(|saved| now < saved + SAVE_EVERY) {
            return None;
        }
        self.saved = Some(now);
        let mut left = machine.left_of(self.blocks.as_ref()?);
        left.extend(asked);
        Some(SavedVerification {
            left,
            found: self.found().collect(),
            total: self.total,
            compared: self.compared,
            read: self.read,
            repair: self.request.repair,
            throttle: self.request.throttle,
        })
    }

    pub(super) fn is_running(&self) -> bool {
        self.ended.is_none()
    }

    /// The blocks, if the next question may be asked; to be given back.
    pub(super) fn take_due(&mut self, now: Duration) -> Option<Verification> {
        if self.due > now {
            return None;
        }
        self.blocks.take()
    }

    /// Takes the blocks back, after `read` bytes were read for a question.
    pub(super) fn give_back(&mut self, blocks: Verification, read: u64, now: Duration) {
        self.left = blocks.left();
        self.blocks = Some(blocks);
        self.read += read;
        if let Some(throttle) = self.request.throttle.filter(|_| read > 0) {
            let micros = read.saturating_mul(1_000_000) / throttle.max(1);
            self.due = self.due.max(now) + Duration::from_micros(micros);
        }
    }

    /// The next look saves it.
    pub(super) fn save_soon(&mut self) {
        self.saved = None;
    }

    /// There was no answer about `runs`.
    pub(super) fn put_back(&mut self, runs: &[(DiskIndex, Extent)]) {
        if let Some(blocks) = &mut self.blocks {
            blocks.put_back(runs);
            self.left = blocks.left();
        }
    }

    /// `bytes` were compared, and these differ.
    pub(super) fn answered(&mut self, bytes: u64, differing: Vec<(DiskIndex, Extent)>) {
        self.compared += bytes;
        for (disk, run) in differing {
            self.find(disk, run);
        }
    }

    /// This run differs. What was compared again after a restart is found again.
    fn find(&mut self, disk: DiskIndex, run: Extent) {
        let before = self.found.range_mut(..=(disk, run.offset)).next_back();
        match before {
            Some((&(at, offset), len)) if at == disk && offset + *len >= run.offset => {
                *len = (*len).max(run.end() - offset);
            }
            _ => {
                self.found.insert((disk, run.offset), run.len);
            }
        }
    }

    fn found(&self) -> impl Iterator<Item = (DiskIndex, Extent)> {
        let runs = self.found.iter();
        runs.map(|(&(disk, offset), &len)| (disk, Extent::new(offset, len)))
    }

    /// Whether it differs in more places than are remembered.
    pub(super) fn is_hopeless(&self) -> bool {
        self.found.len() > FOUND_MAX
    }

    /// What is to be sent again because of it.
    pub(super) fn to_repair(&self) -> Vec<(DiskIndex, Extent)> {
        let repair = self.found().filter(|_| self.request.repair);
        repair.collect()
    }

    /// It is over, for this reason if it was not done.
    pub(super) fn end(&mut self, now: Duration, problem: Option<String>) {
        self.blocks = None;
        self.ended = Some(now);
        self.problem = problem;
    }

    pub(super) fn status(&self, machine: &Machine, now: Duration) -> VerifyStatus {
        let elapsed = self.ended.unwrap_or(now).saturating_sub(self.began);
        let rate = rate(self.compared, elapsed);
        let named = self.found().take(NAMED_MAX);
        let found = named.map(|(disk, run)| FoundStatus {
            disk: machine.volumes()[disk.index()].name().clone(),
            offset: run.offset,
            len: run.len,
        });
        VerifyStatus {
            running: self.is_running(),
            repair: self.request.repair,
            total: self.total,
            compared: self.compared,
            left: self.left,
            read: self.read,
            differing: self.found.values().sum(),
            places: crate::base::units::to_u64(self.found.len()),
            found: found.collect(),
            problem: self.problem.clone(),
            rate,
            eta_s: self.left.checked_div(rate),
        }
    }
}
