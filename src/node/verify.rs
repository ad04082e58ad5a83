//! A verification of a machine on its primary's host: how far it is, what it found, how fast it may go.
//!
//! It outlives links: what was asked and not answered is asked again. It ends with the process.

use std::time::Duration;

use super::{
    control::VerifyRequest,
    progress::rate,
    status::{FoundStatus, VerifyStatus},
};
use crate::{
    base::units::{DiskIndex, Extent},
    volume::{Machine, Verification},
};

/// Places in which a machine may differ before the verification is given up: there a resync is what is needed.
const FOUND_MAX: usize = 1 << 16;
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
    total: u64,
    left: u64,
    compared: u64,
    read: u64,
    /// Ascending for each disk as long as nothing was asked twice; runs that touch are one.
    found: Vec<(DiskIndex, Extent)>,
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
            total: left,
            left,
            compared: 0,
            read: 0,
            found: Vec::new(),
            problem: None,
        }
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
            match self.found.last_mut() {
                Some((last, before)) if *last == disk && before.end() == run.offset => {
                    before.len += run.len;
                }
                _ => self.found.push((disk, run)),
            }
        }
    }

    /// Whether it differs in more places than are remembered.
    pub(super) fn is_hopeless(&self) -> bool {
        self.found.len() > FOUND_MAX
    }

    /// What is to be sent again because of it.
    pub(super) fn to_repair(&self) -> &[(DiskIndex, Extent)] {
        if self.request.repair {
            &self.found
        } else {
            &[]
        }
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
        let named = self.found.iter().take(NAMED_MAX);
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
            differing: self.found.iter().map(|(_, run)| run.len).sum(),
            places: crate::base::units::to_u64(self.found.len()),
            found: found.collect(),
            problem: self.problem.clone(),
            rate,
            eta_s: self.left.checked_div(rate),
        }
    }
}
