//! What an operator asks of a machine, as in `node::host::roles`. A verb that needs the other host leaves that to the
//! world.

use std::sync::Arc;

use super::{
    host::{Host, Running, Test, Unmount},
    record::{AdoptionRecord, Asked, No, not_now, told},
    serving::{Shown, open_layers},
    setup::Bug,
};
use crate::{
    base::{clock::Clock, ids::Lineage, units::Epoch},
    coord::role::{Event, Part, RoleState},
    disk::Disk,
    replica::Point,
};

impl Host {
    /// A planned failover begins: whether nobody can write any more.
    pub(super) fn refuse_writers(&mut self) -> Asked {
        let record = self.record();
        if record.is_none_or(|record| record.role.part != Part::Primary) {
            return not_now("a planned failover is started on the primary");
        }
        let folding = record.is_some_and(|record| record.layers.is_some());
        let guest = self.process().guest;
        let Some(serving) = self.serving_mut() else {
            return not_now("is not served here at the moment");
        };
        if folding {
            return not_now("still folds its last failover into the images");
        }
        if guest {
            return not_now("is open for writing");
        }
        serving.show(Shown::ReadOnly);
        Ok(())
    }

    /// Both hosts hold `head`, after which nothing was written. An error leaves the primary a primary.
    pub(super) fn step_down(&mut self, head: Lineage) -> Asked {
        let closed = self.idle(Unmount::IfUnused);
        if closed.is_err() {
            self.arrange()?;
            return closed;
        }
        let cut = self.clock.wall();
        let stepped = self.turn_to(&Event::StepDown { head }, |record| {
            record.adoption = Some(AdoptionRecord {
                lineage: head,
                cut,
                exact: true,
            });
        });
        if stepped.is_err() {
            self.arrange()?;
        }
        stepped.map(|_| ())
    }

    /// Promotes the replica at the point of this epoch, or at its latest one.
    pub(super) fn promote(&mut self, point: Option<Epoch>, force: bool) -> Asked {
        let Some(role) = self.role() else {
            return not_now("no such machine");
        };
        if let Part::FailedOver { point: at, .. } = role.part {
            if point.is_some_and(|epoch| epoch != at.epoch) {
                return not_now("it is failed over to another point");
            }
            return self.arrange();
        }
        let Some(store) = self.store() else {
            return not_now("there is no replica here");
        };
        let session = self
            .following()
            .and_then(|following| following.session.as_ref());
        if !force && session.is_some() {
            return not_now("the primary is connected");
        }
        let point = choose(&store.points(), point)?;
        let event = Event::Promote {
            expected: role.generation,
            point: point.lineage,
            fresh: self.fresh(),
        };
        role.apply(&event)
            .map_err(|error| No::NotNow(told(error)))?;
        self.end_session();
        self.clear_for_promotion(role)?;
        self.process().held = Some(store.hold(point.lineage.epoch).map_err(told)?);
        let promoted = self.turn_to(&event, |record| record.layer_over(point.lineage));
        if promoted.is_err() {
            self.process().held = None;
        }
        promoted?;
        self.arrange()
    }

    /// What an earlier failover left must not be found under the next one: it is gone before that is recorded.
    pub(super) fn clear_for_promotion(&mut self, role: RoleState) -> Asked {
        let left = self.setup.has(Bug::CancelKeepsLayers);
        if matches!(role.part, Part::Replica { .. }) && !left {
            self.forget_serving()?;
        }
        Ok(())
    }

    /// Keeps an unplanned failover, or this host's side of a split brain.
    pub(super) fn commit(&mut self) -> Asked {
        let event = match self.role().map(|role| role.part) {
            Some(Part::Split { .. }) => Event::Win {
                fresh: self.fresh(),
            },
            _ => Event::Commit,
        };
        self.turn_to(&event, |_| {})?;
        self.arrange()
    }

    /// Takes back a failover that is not committed.
    pub(super) fn cancel_failover(&mut self, how: Unmount) -> Asked {
        let below = if self.serving().is_some() {
            // Nobody writes any more, and the replica below is as it was.
            self.close_serving(how)?
        } else {
            self.following()
                .map(|following| Arc::clone(&following.store))
        };
        if let Some(store) = below {
            self.process().running = Running::following(store);
        } else {
            self.idle(how)?;
        }
        let cancelled = self.turn_to(&Event::Cancel, |record| record.layers = None);
        if cancelled.is_ok() {
            self.process().held = None;
        }
        if cancelled.is_ok() && !self.setup.has(Bug::CancelKeepsLayers) {
            self.forget_serving()?;
        }
        self.arrange()?;
        cancelled.map(|_| ())
    }

    /// A hand-over is taken back; the other host has to consent.
    pub(super) fn reclaim(&mut self) -> Asked {
        let fresh = self.fresh();
        self.turn_to(&Event::Reclaim { fresh }, |_| {})?;
        if self.setup.has(Bug::ReclaimedAlone) {
            self.change(|record| {
                record.role = RoleState {
                    claim: None,
                    part: Part::Primary,
                    ..record.role
                };
            })?;
        }
        Ok(())
    }

    /// Lets a host that was the primary follow the new one.
    pub(super) fn reverse(&mut self, how: Unmount) -> Asked {
        let part = self.role().map(|role| role.part);
        if let Some(Part::Split { .. }) = part {
            self.turn_to(&Event::Lose, |_| {})?;
            self.arrange()?;
        } else if !matches!(part, Some(Part::Fenced { .. } | Part::Returning { .. })) {
            self.turn_to(&Event::Reverse, |_| {})?;
        }
        if self.record().is_some_and(|record| record.layers.is_some()) {
            self.fold_before_return()?;
        }
        self.idle(how)?;
        self.turn_to(&Event::Reverse, |_| {})?;
        Ok(())
    }

    /// Shows a point on layers of their own; the point is chosen with the rescue point among them.
    pub(super) fn start_test(&mut self, pick: usize, number: u64) -> Asked {
        let Some(store) = self.store() else {
            return not_now("there is no replica here");
        };
        if self.role().is_some_and(|role| role.part == Part::Primary) {
            return not_now("the machine is the primary here");
        }
        let points = store.points();
        let rescue = store.rescue().is_some();
        let count = points.len() + usize::from(rescue);
        if count == 0 {
            return not_now("there is no point");
        }
        let (view, rescue) = match points.get(pick % count) {
            Some(point) => (store.view(point.lineage.epoch), false),
            None => (store.view_rescue(), true),
        };
        let view = view.map_err(told)?;
        let bases = view.disks.iter();
        let bases = bases
            .map(|disk| Arc::clone(disk) as Arc<dyn Disk>)
            .collect();
        let identity = view.point.lineage.chain;
        let layers = open_layers(self, &self.tests, bases, identity, &format!("{number}-"))?;
        self.process().tests.push(Test {
            view,
            layers,
            contents: None,
            rescue,
        });
        Ok(())
    }
}

fn choose(points: &[Point], epoch: Option<Epoch>) -> Asked<Point> {
    let chosen = match epoch {
        Some(epoch) => points.iter().find(|point| point.lineage.epoch == epoch),
        None => points.last(),
    };
    let chosen = chosen.copied();
    chosen.ok_or_else(|| No::NotNow("there is no such point".into()))
}
