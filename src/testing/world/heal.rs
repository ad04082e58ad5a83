//! The end of every run: everything is mended, an operator ends what is open, and both hosts come to hold the same.

use std::{sync::Arc, time::Duration};

use super::{Checked, World};
use crate::{
    coord::role::{Part, RoleState},
    testing::{host::Unmount, setup::Setup},
};

/// Rounds after which two healthy hosts must have come together.
const ROUNDS_MAX: u32 = 4000;
/// Rounds between two looks of the operator.
const LOOK_EVERY: u32 = 20;
/// Rounds after which the operator does not wait for the coordinator any more.
const PATIENCE: u32 = 800;

impl World {
    pub(super) fn heal(&mut self) -> Checked {
        self.note("everything is mended");
        for host in 0..2 {
            self.doom[host] = None;
            self.die(host)?;
            self.hosts[host].medium.mend();
            self.troubled[host] = false;
        }
        self.network.parted = false;
        let roomy = Arc::new(Setup {
            space_max: None,
            loss: 0,
            kills: 0,
            power_cuts: 0,
            link_cuts: 0,
            partitions: 0,
            faults: 0,
            ..(*self.setup).clone()
        });
        self.setup = Arc::clone(&roomy);
        for host in 0..2 {
            self.hosts[host].setup = Arc::clone(&roomy);
            self.wake(host)?;
        }
        for round in 0..ROUNDS_MAX {
            self.report.steps += 1;
            self.notice(100);
            self.deliver_late()?;
            self.obey()?;
            self.fold()?;
            self.dial();
            self.work()?;
            self.hear_primary()?;
            self.deliver_log()?;
            self.sync_replica()?;
            self.deliver_back()?;
            self.clock.advance(Duration::from_millis(100));
            let coordinated = self.coordinator.as_ref();
            let ended = coordinated.is_none_or(|coordinator| !coordinator.is_busy());
            if let Some((host, head)) = self.in_step()
                && ended
            {
                self.compare_all(host, head)?;
                return self.rot(host, head);
            }
            if round % LOOK_EVERY == 0 {
                self.look_after()?;
                let late = round > PATIENCE;
                self.coordinate_to_the_end(late)?;
                if ended || late {
                    self.settle_roles()?;
                }
            }
        }
        let roles = [0, 1].map(|host| self.hosts[host].role());
        Err(format!(
            "P3: two healthy hosts do not come together: {roles:?}, {:?}",
            self.coordinator
        ))
    }

    /// The operator ends what only a person may end.
    fn settle_roles(&mut self) -> Checked {
        for host in 0..2 {
            let (Some(role), other) = (self.hosts[host].role(), self.hosts[1 - host].role()) else {
                continue;
            };
            self.settle_role(host, role, other)?;
        }
        Ok(())
    }

    fn settle_role(&mut self, host: usize, role: RoleState, other: Option<RoleState>) -> Checked {
        let theirs = other.map(|other| other.part);
        let active = matches!(theirs, Some(Part::Primary));
        match role.part {
            Part::FailedOver { .. } if self.random.percent(50) => {
                let committed = self.hosts[host].commit();
                self.allow(host, "a commit", committed)?;
                self.check_serving(host)
            }
            Part::FailedOver { .. } => {
                let cancelled = self.hosts[host].cancel_failover(Unmount::Detach);
                self.allow(host, "a cancel", cancelled)?;
                self.check_replica(host)
            }
            // The other one is told that it lost when it has seen the split, too.
            Part::Split { .. } if host == 0 || !matches!(theirs, Some(Part::Split { .. })) => {
                let committed = self.hosts[host].commit();
                self.allow(host, "winning", committed).map(|_| ())
            }
            Part::Split { .. } => {
                let lost = self.hosts[host].reverse(Unmount::Detach);
                self.allow(host, "losing", lost).map(|_| ())
            }
            // The failover that it was to hand over to was cancelled: it takes the machine back.
            Part::SteppedDown { .. }
                if role.claim.is_none()
                    && matches!(theirs, Some(Part::Replica { abandoned: true })) =>
            {
                self.cancel(host, Unmount::Detach)
            }
            Part::Fenced { .. } if active => {
                let reversed = self.hosts[host].reverse(Unmount::Detach);
                self.allow(host, "a reversal", reversed).map(|_| ())
            }
            // Nobody is primary any more: the failover that this one was to follow was cancelled.
            Part::Replica { .. }
                if matches!(theirs, Some(Part::Returning { .. } | Part::Replica { .. })) =>
            {
                let promoted = self.hosts[host].promote(None, true);
                self.allow(host, "an unplanned failover", promoted)?;
                self.check_serving(host)
            }
            _ => Ok(()),
        }
    }
}
