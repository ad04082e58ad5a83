//! What a primary tells of itself.

use std::time::Duration;

use super::{Primary, Source, Tracked};
use crate::{
    base::{
        ids::Lineage,
        units::{BLOCK_BYTES, Epoch},
    },
    coord::state::{ReplicationState, Role, Signs},
    node::{
        progress::{Phase, Progress},
        status::{DiskStatus, LatencyStatus, MachineStatus, RpoStatus, TrafficStatus},
    },
    volume::MachineState,
};

/// The interval that health is judged by where none is configured.
const INTERVAL_DEFAULT: Duration = Duration::from_secs(1);

impl Primary {
    /// The machine's report, apart from its role.
    pub fn machine_status(&self) -> MachineStatus {
        let progress = self.progress.lock();
        let latency = self.mount.latencies().write;
        let running = self.replication.lock();
        let running = running.as_ref();
        let opened = self.opened();
        let (state, stopped) = match (&opened.tracked, running) {
            (Some(tracked), Some(_)) => replication_state(&progress, tracked),
            _ => (ReplicationState::Disabled, None),
        };
        let tracked = opened.tracked.as_ref();
        let rpo = tracked.map_or_else(RpoStatus::default, |tracked| self.rpo(&progress, tracked));
        let signs = Signs {
            state,
            stopped,
            disk: tracked.and_then(|tracked| problem(&tracked.machine.state())),
            points: None,
            interval: running.map_or(INTERVAL_DEFAULT, |running| running.interval),
            rpo: rpo.now_ms.map(Duration::from_millis),
        };
        let (mut health, mut reasons) = signs.health();
        let sync = self.flushes.as_ref().map(|flushes| flushes.status());
        if let Some((_, Some((worse, why)))) = &sync {
            health = health.max(*worse);
            reasons.push(why.clone());
        }
        let mut traffic = tracked.map_or_else(TrafficStatus::default, |tracked| {
            traffic(&progress, tracked)
        });
        traffic.written = latency.bytes();
        traffic.rate = progress.meter.rate(self.clock.monotonic());
        let wall = self.clock.wall();
        traffic.limit = running.and_then(|running| running.pacing.limit(wall));
        MachineStatus {
            name: self.name.clone(),
            id: tracked.map(|tracked| tracked.machine.id()),
            role: Role::Primary,
            part: None,
            suspended: None,
            state,
            health,
            reasons,
            generation: None,
            peer: running.map(|running| running.peer.clone()),
            durable: tracked.and_then(|tracked| acknowledged(&progress, tracked)),
            base_epoch: None,
            recovery: None,
            tests: Vec::new(),
            last_test: None,
            rpo,
            sync_on_flush: sync.map(|(status, _)| status),
            copy: progress.copy_status(self.clock.monotonic()),
            resync: tracked.and_then(|tracked| {
                let suspect = tracked.machine.counters().suspect_blocks * BLOCK_BYTES;
                progress.resync_status(self.clock.monotonic(), suspect)
            }),
            verify: tracked.and_then(|tracked| {
                let verify = progress.verify.as_ref()?;
                Some(verify.status(&tracked.machine, self.clock.monotonic()))
            }),
            traffic,
            write_latency: Some(LatencyStatus::from(&latency)),
            disks: opened
                .disks
                .iter()
                .map(|disk| self.disk_status(disk))
                .collect(),
        }
    }

    fn rpo(&self, progress: &Progress, tracked: &Tracked) -> RpoStatus {
        let counters = tracked.machine.counters();
        let unchanged = counters.open_blocks == 0 && counters.closing_blocks == 0;
        progress.rpo.status(self.clock.wall(), unchanged)
    }

    fn disk_status(&self, disk: &Source) -> DiskStatus {
        DiskStatus {
            name: disk.name.clone(),
            size: disk.disk.geometry().size,
            image: disk.image.display().to_string(),
            format: disk.format.to_string(),
            path: Some(self.path(disk).display().to_string()),
        }
    }
}

/// How the replication is, and why it is not well.
fn replication_state(progress: &Progress, tracked: &Tracked) -> (ReplicationState, Option<String>) {
    let state = progress.phase.state(has_point(tracked));
    match (state, tracked.machine.state().resync) {
        ((ReplicationState::Replicating, _), Some(reason)) => {
            (ReplicationState::Resynchronizing, Some(reason.to_string()))
        }
        (state, _) => state,
    }
}

fn traffic(progress: &Progress, tracked: &Tracked) -> TrafficStatus {
    let counters = tracked.machine.counters();
    TrafficStatus {
        owed: (counters.owed_open_blocks + counters.owed_closing_blocks) * BLOCK_BYTES,
        written: counters.guest_bytes,
        raw: progress.raw,
        sent: progress.sent,
        folded: counters.folded_blocks * BLOCK_BYTES,
        epochs: progress.epochs,
        merged: counters.merged_epochs,
        ..TrafficStatus::default()
    }
}

/// The head that the replica has acknowledged. Epoch 0 may be on a portable disk instead, until a link has shown that it
/// is not.
fn acknowledged(progress: &Progress, tracked: &Tracked) -> Option<Lineage> {
    let linked = matches!(progress.phase, Phase::Copying | Phase::Replicating);
    let head = tracked.machine.lineage();
    head.filter(|head| head.epoch > Epoch::INITIAL || linked)
}

/// Whether the replica has acknowledged a recovery point, which an initial copy alone is not.
fn has_point(tracked: &Tracked) -> bool {
    tracked
        .machine
        .lineage()
        .is_some_and(|head| head.epoch > Epoch::INITIAL)
}

/// What is wrong with the machine's disks or their tracking, if anything is.
fn problem(state: &MachineState) -> Option<String> {
    let stopped = state
        .stopped
        .iter()
        .map(|(disk, why)| format!("disk {disk} takes no more writes: {why}"));
    let lost = state
        .tracking_lost
        .iter()
        .map(|why| format!("tracking ended, a resync is needed: {why}"));
    let failing = state
        .failing
        .iter()
        .map(|(disk, what)| format!("disk {disk}: {what}"));
    let problems: Vec<_> = stopped.chain(lost).chain(failing).collect();
    (!problems.is_empty()).then(|| problems.join("; "))
}
