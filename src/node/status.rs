//! What a node tells about itself: the JSON of `status --json`, and the figures behind it.

use std::{fmt, net::SocketAddr, path::PathBuf, time::Duration};

use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::{
    base::{
        clock::Timestamp,
        ids::{Generation, Lineage, MachineId, Name},
        units::Epoch,
    },
    coord::{
        role::Part,
        state::{Health, ReplicationState, Role},
    },
    delta::Consistency,
    replica::Squeeze,
    shim::OperationLatency,
};

use super::sync_flush::SyncOnFlush;

/// One node and its machines.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct NodeStatus {
    /// Program version.
    pub version: String,
    /// Process id.
    pub pid: u32,
    /// Where it accepts primaries, if it does.
    pub listening: Option<SocketAddr>,
    /// Wall-clock time of this report.
    pub at: Timestamp,
    /// Every machine it serves, by name.
    pub machines: Vec<MachineStatus>,
    /// The hosts that it coordinates, itself among them; none if it knows no other.
    #[serde(default)]
    pub coordinates: Vec<Name>,
}

/// One machine on one node.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct MachineStatus {
    /// What people call it.
    pub name: Name,
    /// Its identity; nothing while it is not tracked.
    pub id: Option<MachineId>,
    /// The part this node plays.
    pub role: Role,
    /// The same in full: what it remembers of failovers. Nothing while nobody keeps roles for the machine.
    #[serde(default)]
    pub part: Option<Part>,
    /// Since when it is suspended: as an operator wanted it on the primary, as the primary said on the replica.
    #[serde(default)]
    pub suspended: Option<Timestamp>,
    /// Where its replication stands.
    pub state: ReplicationState,
    /// How it fares.
    pub health: Health,
    /// Why it does not fare better, one sentence each.
    pub reasons: Vec<String>,
    /// The fencing token; nothing while it is not tracked, or has not been received from yet.
    pub generation: Option<Generation>,
    /// The other side: address on the primary, certificate name on the replica.
    pub peer: Option<String>,
    /// The last epoch that is durable on the replica.
    pub durable: Option<Lineage>,
    /// Replica: the epoch that the image files hold; later ones are in delta logs.
    pub base_epoch: Option<Epoch>,
    /// Replica: what it can go back to.
    #[serde(default)]
    pub recovery: Option<RecoveryStatus>,
    /// Replica: test failovers that are running.
    #[serde(default)]
    pub tests: Vec<TestStatus>,
    /// Replica: the last test failover that was started, whatever became of it.
    #[serde(default)]
    pub last_test: Option<LastTest>,
    /// Age of the last durable point and how it was.
    pub rpo: RpoStatus,
    /// Primary: how the guest's flushes stand to the replica, if they are to wait for it.
    #[serde(default)]
    pub sync_on_flush: Option<SyncStatus>,
    /// Initial copy in progress.
    pub copy: Option<CopyStatus>,
    /// Primary: the resync in progress, or the last one since the node started.
    #[serde(default)]
    pub resync: Option<ResyncStatus>,
    /// Primary: the verification in progress, or the last one since the node started.
    #[serde(default)]
    pub verify: Option<VerifyStatus>,
    /// Bytes and counts since the node started.
    pub traffic: TrafficStatus,
    /// Latency of guest writes, primary only.
    pub write_latency: Option<LatencyStatus>,
    /// Its disks.
    pub disks: Vec<DiskStatus>,
}

/// The recovery points of a replica, and the space they take.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct RecoveryStatus {
    /// How many there are.
    pub points: usize,
    /// Cut time of the oldest.
    pub oldest: Option<Timestamp>,
    /// Bytes of the delta logs beside the images.
    pub log_bytes: u64,
    /// Bytes they may take, if there is a limit.
    pub space_max: Option<u64>,
    /// What the lack of space cost.
    pub squeeze: Squeeze,
}

/// One recovery point.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PointStatus {
    /// Its epoch and chain hash.
    pub point: Lineage,
    /// Whether it is no point of the history but the last state of a former primary, which followed that epoch: writes
    /// that nobody else has.
    #[serde(default)]
    pub rescue: bool,
    /// When the cut was made.
    pub cut: Timestamp,
    /// What it is worth to the guest.
    pub kind: Consistency,
    /// Bytes of the delta log that leads to it; 0 for the point in the images.
    pub bytes: u64,
    /// Milliseconds from its cut to that of the latest point: what a rollback to it would lose.
    pub lost_ms: u64,
    /// Bytes of the delta logs from it to the latest point: the same as an amount of data.
    pub lost_bytes: u64,
    /// Numbers of the test failovers that run on it.
    pub tests: Vec<u32>,
}

/// A test failover that is running.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TestStatus {
    /// Its number, to cancel it by.
    pub number: u32,
    /// The point it started from.
    pub point: Lineage,
    /// Whether that is the rescue point.
    #[serde(default)]
    pub rescue: bool,
    /// When that was cut.
    pub cut: Timestamp,
    /// When the test was started.
    pub started: Timestamp,
    /// Bytes written in it so far.
    pub written: u64,
    /// Its disks, as raw files.
    pub files: Vec<PathBuf>,
    /// By which whoever started it knows it again.
    #[serde(default)]
    pub key: Option<Uuid>,
}

/// The last test failover of a machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LastTest {
    /// Its number.
    pub number: u32,
    /// The point it started from.
    pub point: Lineage,
    /// When that was cut.
    pub cut: Timestamp,
    /// When the test was started.
    pub started: Timestamp,
    /// When it ended, if it has.
    pub ended: Option<Timestamp>,
    /// Bytes that had been written in it when it ended.
    pub written: u64,
    /// What became of it.
    pub result: TestResult,
}

/// What became of a test failover.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TestResult {
    /// It is still there.
    Running,
    /// An operator ended it, and everything was cleaned up.
    Ended,
    /// It could not be shown, or not be brought back, and was cleaned up.
    Failed(String),
}

/// Recovery point objective as achieved.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub struct RpoStatus {
    /// Now minus the cut time of the last durable epoch, in milliseconds; zero while nothing has changed since.
    pub now_ms: Option<u64>,
    /// Median of what it reached just before each epoch became durable, in milliseconds.
    pub p50_ms: Option<u64>,
    /// 99th percentile of the same.
    pub p99_ms: Option<u64>,
}

/// Sync-on-flush of a machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SyncStatus {
    /// What becomes of a flush while the replica cannot be reached.
    pub policy: SyncOnFlush,
    /// Whether what the guest flushed is on the replica.
    pub state: SyncState,
    /// Flushes and forced writes that wait for the replica now.
    pub waiting: usize,
}

/// Whether what the guest flushed is on the replica.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SyncState {
    /// All of it.
    InSync,
    /// The link stands, and what was missed is being sent.
    CatchingUp,
    /// The replica cannot be reached, or does not answer in time.
    Away,
    /// No replica holds a point of this generation: there is nothing to be in sync with, and no flush waits.
    Alone,
}

impl fmt::Display for SyncState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::InSync => "in sync",
            Self::CatchingUp => "catching up",
            Self::Away => "replica away",
            Self::Alone => "nothing to be in sync with",
        })
    }
}

/// A running initial copy.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct CopyStatus {
    /// Bytes sent.
    pub done: u64,
    /// Bytes to send in all, as far as known.
    pub total: u64,
    /// Bytes per second since it began.
    pub rate: u64,
    /// Seconds to go at that rate.
    pub eta_s: Option<u64>,
}

/// A resync: what may differ is compared by hashes, and what differs is sent. Bytes are counted in whole blocks, since
/// the node started or the resync began, whichever is later.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ResyncStatus {
    /// Why it is needed.
    pub reason: String,
    /// Whether it is under way; if not, its epoch is durable on the replica.
    pub running: bool,
    /// Bytes that might differ.
    pub total: u64,
    /// Bytes that were compared.
    pub compared: u64,
    /// Bytes that were read here to be compared: what is known to be zeros is not read.
    pub read: u64,
    /// Bytes that were found equal, and are not sent.
    pub equal: u64,
    /// Bytes that were found to differ. What the guest wrote meanwhile is in neither of the two.
    pub differing: u64,
    /// Bytes on the wire of the questions.
    pub asked: u64,
    /// Bytes per second since it began.
    pub rate: u64,
    /// Seconds to go at that rate until everything is compared.
    pub eta_s: Option<u64>,
}

/// A verification: the replica's points are compared with the disks by hashes. Bytes are counted in whole blocks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VerifyStatus {
    /// Whether it is under way.
    pub running: bool,
    /// Whether what differs is sent again at its end.
    pub repair: bool,
    /// Bytes of all disks.
    pub total: u64,
    /// Bytes that were compared.
    pub compared: u64,
    /// Bytes that are to be compared; at its end those that were written in each epoch and could not be.
    pub left: u64,
    /// Bytes that were read here: what is known to be zeros is not read.
    pub read: u64,
    /// Bytes that differ.
    pub differing: u64,
    /// In how many places.
    pub places: u64,
    /// The first of them.
    pub found: Vec<FoundStatus>,
    /// Why it ended before it was done, if it did.
    pub problem: Option<String>,
    /// Bytes per second since it began.
    pub rate: u64,
    /// Seconds to go at that rate.
    pub eta_s: Option<u64>,
}

/// A place where primary and replica differ.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FoundStatus {
    /// The disk.
    pub disk: Name,
    /// Where the first block that differs begins, in bytes.
    pub offset: u64,
    /// Bytes of the blocks that differ.
    pub len: u64,
}

/// What went over the wire.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub struct TrafficStatus {
    /// Bytes of changed blocks not yet sent.
    pub owed: u64,
    /// Bytes the guest wrote.
    pub written: u64,
    /// Bytes of blocks sent or received, before compression.
    pub raw: u64,
    /// Delta-log bytes sent or received.
    pub sent: u64,
    /// Bytes the guest wrote that never had to travel because a later write replaced them within the epoch.
    pub folded: u64,
    /// Epochs that became durable.
    pub epochs: u64,
    /// Epochs merged into the next one because the pre-images did not fit or the link was lost.
    pub merged: u64,
    /// Primary: delta-log bytes that were sent in each of the last seconds.
    #[serde(default)]
    pub rate: u64,
    /// Primary: most of them that may be sent in a second at this time, if there is a limit.
    #[serde(default)]
    pub limit: Option<u64>,
}

/// Percentiles of a latency, in microseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct LatencyStatus {
    /// Operations measured.
    pub count: u64,
    /// Median.
    pub p50_us: f64,
    /// 99th percentile.
    pub p99_us: f64,
    /// 99.9th percentile.
    pub p999_us: f64,
}

impl From<&OperationLatency> for LatencyStatus {
    fn from(latency: &OperationLatency) -> Self {
        let micros = |ns| Duration::from_nanos(ns).as_secs_f64() * 1e6;
        Self {
            count: latency.count(),
            p50_us: micros(latency.p50_ns()),
            p99_us: micros(latency.p99_ns()),
            p999_us: micros(latency.p999_ns()),
        }
    }
}

/// One disk of a machine.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct DiskStatus {
    /// The image's name without its suffix.
    pub name: Name,
    /// Bytes the guest sees.
    pub size: u64,
    /// The image file.
    pub image: String,
    /// Its format.
    pub format: String,
    /// The raw file in the mount, primary only.
    pub path: Option<String>,
}

/// Collects the age of the last durable point just before it is replaced: the worst a failover at any moment would
/// have cost.
#[derive(Debug)]
pub struct RpoRecord {
    last_cut: Option<Timestamp>,
    reached_ms: Histogram<u64>,
}

impl Default for RpoRecord {
    fn default() -> Self {
        let reached_ms = Histogram::new(3).expect("three digits are in range");
        Self {
            last_cut: None,
            reached_ms,
        }
    }
}

impl RpoRecord {
    /// The epoch cut at `cut` became durable at `now`.
    pub fn durable(&mut self, cut: Timestamp, now: Timestamp) {
        let replaced = self.last_cut.unwrap_or(cut);
        self.reached_ms
            .saturating_record(millis(now.since(replaced)));
        self.last_cut = Some(cut);
    }

    /// Nothing changed up to `at`: the point is as good as new.
    pub fn current(&mut self, at: Timestamp) {
        if self.last_cut.is_some_and(|cut| cut < at) {
            self.last_cut = Some(at);
        }
    }

    /// The cut time of the last durable point.
    pub fn last_cut(&self) -> Option<Timestamp> {
        self.last_cut
    }

    /// The figures at `now`. `unchanged`: nothing has been written since the last cut.
    pub fn status(&self, now: Timestamp, unchanged: bool) -> RpoStatus {
        let percentile =
            |q| (!self.reached_ms.is_empty()).then(|| self.reached_ms.value_at_quantile(q));
        let age = self
            .last_cut
            .map(|cut| if unchanged { 0 } else { millis(now.since(cut)) });
        RpoStatus {
            now_ms: age,
            p50_ms: percentile(0.5),
            p99_ms: percentile(0.99),
        }
    }
}

/// Whole milliseconds of a duration.
pub fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rpo_reached_is_the_age_of_the_point_that_was_replaced() {
        let mut record = RpoRecord::default();
        let at = |ms: u64| Timestamp(ms * 1000);
        assert_eq!(record.status(at(0), false).now_ms, None);
        record.durable(at(1000), at(1200));
        record.durable(at(2000), at(2500));
        let status = record.status(at(2700), false);
        assert_eq!(status.now_ms, Some(700));
        assert!(
            (1499..=1502).contains(&status.p99_ms.unwrap()),
            "the point of 1.0 s stood until 2.5 s: {status:?}"
        );
        assert_eq!(
            record.status(at(9000), true).now_ms,
            Some(0),
            "nothing changed: nothing would be lost"
        );
    }
}
