//! What a person asks for: failovers, commits, cancels, reversals, at random moments, also the wrong ones.

use super::{Checked, Death, World};
use crate::{
    base::units::Epoch,
    coord::role::Part,
    testing::{Bug, host::Unmount},
};

/// Steps that a planned failover waits for its last epoch, at most.
const LAST_EPOCH_STEPS: u32 = 120;
/// Cuts after which a machine that nobody can write must be at rest.
const CUTS_MAX: u32 = 3;

/// What may be asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verb {
    Planned,
    Unplanned,
    Commit,
    Cancel,
    Reverse,
    DropRescue,
}

impl World {
    /// A person does something: most often what fits.
    pub(super) fn operate(&mut self) -> Checked {
        let host = self.random.index(2);
        let Some(role) = self.hosts[host].role() else {
            return Ok(());
        };
        let fitting: &[Verb] = match role.part {
            Part::Primary => &[Verb::Planned],
            Part::SteppedDown { .. } => &[Verb::Planned, Verb::Cancel],
            Part::Replica { .. } => &[Verb::Unplanned, Verb::Unplanned, Verb::DropRescue],
            Part::FailedOver { .. } => &[Verb::Commit, Verb::Cancel],
            Part::Fenced { .. } | Part::Returning { .. } => &[Verb::Reverse],
            Part::Split { .. } => &[Verb::Commit, Verb::Reverse],
        };
        let any = &[
            Verb::Planned,
            Verb::Unplanned,
            Verb::Commit,
            Verb::Cancel,
            Verb::Reverse,
            Verb::DropRescue,
        ];
        let verb = if self.random.percent(85) {
            self.random.pick(fitting)
        } else {
            self.random.pick(any)
        };
        // Power cuts and kills come in the middle of it, too.
        if self.random.percent(self.setup.loss) {
            let death = self.random.pick(&[Death::Kill, Death::PowerCut]);
            self.dooms(host, death);
        }
        if self.random.percent(60) {
            self.guest_leaves(host);
        }
        self.ask_for(host, verb)
    }

    fn ask_for(&mut self, host: usize, verb: Verb) -> Checked {
        self.note(&format!("host {host} is asked for: {verb:?}"));
        let how = if self.random.percent(60) {
            Unmount::Detach
        } else {
            Unmount::IfUnused
        };
        match verb {
            Verb::Planned => self.planned(host),
            Verb::Unplanned => {
                let point = self.some_point(host);
                let force = self.random.percent(70);
                let promoted = self.hosts[host].promote(point, force);
                self.allow(host, "an unplanned failover", promoted)?;
                self.check_serving(host)
            }
            Verb::Commit => {
                let committed = self.hosts[host].commit();
                self.allow(host, "a commit", committed)?;
                self.check_serving(host)
            }
            Verb::Cancel => self.cancel(host, how),
            Verb::Reverse => {
                let reversed = self.hosts[host].reverse(how);
                self.allow(host, "a reversal", reversed).map(|_| ())
            }
            Verb::DropRescue => {
                let Some(store) = self.hosts[host].store() else {
                    return Ok(());
                };
                // It may be looked at.
                let _ = store.drop_rescue();
                Ok(())
            }
        }
    }

    /// The epoch of a recovery point that somebody chooses; nothing for the latest one.
    fn some_point(&mut self, host: usize) -> Option<Epoch> {
        let points = self.hosts[host].store()?.points();
        if points.is_empty() || self.random.percent(30) {
            return None;
        }
        Some(self.random.pick(&points).lineage.epoch)
    }

    pub(super) fn cancel(&mut self, host: usize, how: Unmount) -> Checked {
        match self.hosts[host].role().map(|role| role.part) {
            Some(Part::SteppedDown { .. }) => {
                let reclaimed = self.hosts[host].reclaim();
                if self.allow(host, "taking back", reclaimed)?.is_some() {
                    self.ask(host)?;
                    self.arrange(host)?;
                }
                Ok(())
            }
            Some(Part::FailedOver { .. }) => {
                let cancelled = self.hosts[host].cancel_failover(how);
                self.allow(host, "a cancel", cancelled)?;
                self.check_replica(host)
            }
            // Test failovers are ended elsewhere.
            _ => Ok(()),
        }
    }

    /// A planned failover, from the last cut to the hand-over.
    pub(super) fn planned(&mut self, host: usize) -> Checked {
        if matches!(
            self.hosts[host].role().map(|role| role.part),
            Some(Part::SteppedDown { .. })
        ) {
            return self.hand_over(host);
        }
        let refused = self.hosts[host].refuse_writers();
        if self.allow(host, "a planned failover", refused)?.is_none() {
            return Ok(());
        }
        for _ in 0..CUTS_MAX {
            if !self.last_epoch(host)? {
                break;
            }
            let Some(serving) = self.hosts[host].serving() else {
                return Ok(());
            };
            let early = self.setup.has(Bug::StepsDownTooEarly);
            let at_rest = serving.machine.at_rest();
            let head = if early {
                serving.machine.lineage()
            } else {
                at_rest
            };
            if let Some(head) = head {
                let stepped = self.hosts[host].step_down(head);
                if (self.allow(host, "stepping down", stepped)?).is_some() {
                    return self.hand_over(host);
                }
                return Ok(());
            }
        }
        // Replication, writers and mount as before.
        if self.hosts[host].is_up() {
            self.arrange(host)?;
        }
        Ok(())
    }

    /// Cuts once more and waits until the epoch is durable on the replica; whether it is.
    fn last_epoch(&mut self, host: usize) -> Result<bool, String> {
        let lineage = |world: &Self| {
            let serving = world.hosts[host].serving();
            serving.and_then(|serving| serving.machine.lineage())
        };
        let before = lineage(self);
        if self.setup.has(Bug::StepsDownTooEarly) {
            return Ok(before.is_some());
        }
        self.request_cut();
        for _ in 0..LAST_EPOCH_STEPS {
            self.report.steps += 1;
            self.pass()?;
            self.bury()?;
            if self.feeds(host).is_none() {
                return Ok(false);
            }
            // An initial copy alone is no point.
            let now = lineage(self).filter(|now| now.epoch != Epoch::INITIAL);
            if now.is_some() && now != before {
                return Ok(true);
            }
        }
        Ok(false)
    }
}
