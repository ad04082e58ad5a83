//! What a machine on this host tells about itself.

use super::{
    member::{Member, Running},
    record::Record,
    serving::Serving,
};
use crate::{
    coord::{
        role::Part,
        state::{Health, ReplicationState, Role},
    },
    node::status::{DiskStatus, MachineStatus, RpoStatus, TrafficStatus},
};

/// What else there is to say: another state, a health at least as bad, and why.
type Remark = (Option<ReplicationState>, Health, String);

impl Member {
    /// The machine's report.
    pub(super) fn status(&self) -> MachineStatus {
        let running = self.running.lock().clone();
        let record = self.record();
        let mut status = match &running {
            Running::Serving(serving) => serving.primary.machine_status(),
            Running::Following(served) => served.status(),
            Running::Idle => self.idle_status(&record),
        };
        status.id = Some(record.id);
        status.generation = Some(record.role.generation);
        status.part = Some(record.role.part);
        status.suspended = record.suspended.or(status.suspended);
        if let Running::Serving(serving) = &running
            && let Some(below) = serving.below()
        {
            let below = below.status();
            (status.recovery, status.tests) = (below.recovery, below.tests);
            status.last_test = below.last_test;
        }
        let mut remarks: Vec<Remark> = self.about_the_role(&record).into_iter().collect();
        if let Running::Serving(serving) = &running {
            remarks.extend(self.about_serving(serving, &record));
        }
        if let Some(trouble) = &*self.trouble.lock() {
            remarks.push((
                Some(ReplicationState::Error),
                Health::Critical,
                trouble.clone(),
            ));
        }
        for (state, health, why) in remarks {
            status.state = state.unwrap_or(status.state);
            status.health = status.health.max(health);
            status.reasons.insert(0, why);
        }
        status
    }

    /// What the role means, where it is more than a primary's or a replica's.
    fn about_the_role(&self, record: &Record) -> Option<Remark> {
        use Health::{Critical, Warning};
        let name = &self.name;
        let (state, health, why) = match record.role.part {
            Part::FailedOver { point, .. } => (
                ReplicationState::FailedOverWaitingCompletion,
                Warning,
                format!(
                    "failed over to epoch {} and not protected: keep it with `understudy commit {name}`, or choose another point after `understudy cancel {name}`",
                    point.epoch
                ),
            ),
            Part::SteppedDown { head } if record.role.claim.is_some() => (
                ReplicationState::PreparedForFailover,
                Critical,
                format!(
                    "takes the machine back that it handed over at epoch {}; waits for the other host's consent",
                    head.epoch
                ),
            ),
            Part::SteppedDown { head } => (
                ReplicationState::PreparedForFailover,
                Critical,
                format!(
                    "stepped down at epoch {}; waits for the other host to take over, or for `understudy cancel {name}`",
                    head.epoch
                ),
            ),
            Part::Fenced { by } => (
                ReplicationState::Error,
                Critical,
                format!(
                    "fenced: generation {by} of this machine is active on the other host; `understudy reverse {name}` lets this host follow it"
                ),
            ),
            Part::Returning { to } => (
                ReplicationState::WaitingForStartResynchronize,
                Warning,
                format!("waits for the primary of generation {to} to bring it back in step"),
            ),
            Part::Split { other, .. } => (
                ReplicationState::Error,
                Critical,
                format!(
                    "split brain with generation {other}: `understudy reverse {name}` on the host that gives in, `understudy commit {name}` on the one that is kept"
                ),
            ),
            Part::Replica { abandoned: true } => (
                ReplicationState::Suspended,
                Warning,
                "the failover was cancelled; waits for the old primary to take the machine back"
                    .into(),
            ),
            Part::Primary | Part::Replica { .. } => return None,
        };
        Some((Some(state), health, why))
    }

    fn about_serving(&self, serving: &Serving, record: &Record) -> Vec<Remark> {
        let mut remarks = Vec::new();
        let promoted = record.role.part == Part::Primary && record.role.born.is_some();
        if promoted && self.callee().is_none() {
            remarks.push((
                Some(ReplicationState::FailedOver),
                Health::Critical,
                "not protected: no address is known of the other host, so nothing replicates to it"
                    .into(),
            ));
        }
        if promoted && record.layers.is_some() {
            let left = serving.unfolded();
            let (health, why) = match serving.held_up() {
                Some(why) => (Health::Warning, format!(", held up: {why}")),
                None => (Health::Normal, String::new()),
            };
            let text =
                format!("the failover is being folded into the images, {left} bytes to go{why}");
            remarks.push((None, health, text));
        }
        remarks
    }

    fn idle_status(&self, record: &Record) -> MachineStatus {
        let disks = self.images(record).into_iter().map(|image| DiskStatus {
            name: image.name,
            size: 0,
            image: image.path.display().to_string(),
            format: image.format.to_string(),
            path: None,
        });
        MachineStatus {
            name: self.name.clone(),
            id: Some(record.id),
            role: match record.role.part {
                Part::Replica { .. } => Role::Replica,
                _ => Role::Primary,
            },
            part: None,
            suspended: None,
            state: ReplicationState::Disabled,
            health: Health::NotApplicable,
            reasons: Vec::new(),
            generation: None,
            peer: record.peer.as_ref().map(ToString::to_string),
            durable: None,
            base_epoch: None,
            recovery: None,
            tests: Vec::new(),
            last_test: None,
            rpo: RpoStatus::default(),
            sync_on_flush: None,
            copy: None,
            resync: None,
            verify: None,
            traffic: TrafficStatus::default(),
            write_latency: None,
            disks: disks.collect(),
        }
    }
}
