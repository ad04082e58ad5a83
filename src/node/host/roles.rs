//! What an operator asks of a machine: failover, commit, cancel, reverse.
//!
//! Each verb may be repeated: what was done already is not done again, and what was cut short goes on from where the
//! record says it is.

use std::sync::Arc;

use super::{
    member::Member,
    record::{AdoptionRecord, Layers, Record},
    serving::Serving,
};
use crate::{
    base::chain::chain,
    base::ids::{Generation, Lineage},
    coord::role::{Event, Part},
    node::{
        control::{
            CancelReport, CancelRequest, FailoverKind, FailoverReport, FailoverRequest,
            OperateError, ReverseRequest, TestRequest,
        },
        exposure::list,
        primary::Primary,
        served::Served,
        status::TestStatus,
        test_failover::choose,
    },
    replica::{Head, Point},
    shim::Unmount,
};

/// Cuts after which a machine that nobody can write must be at rest.
const CUTS_MAX: u32 = 3;

impl Member {
    /// Starts a test failover.
    pub(super) fn start_test(&self, request: TestRequest) -> Result<TestStatus, OperateError> {
        // A failover that is being folded into the images must not meet a new reader of its point.
        let _turn = self.turn();
        if self.record().role.part == Part::Primary {
            return Err(OperateError::NoSuchReplica(self.name().clone()));
        }
        self.replica()?.start_test(request)
    }

    /// Moves the machine to the other host.
    pub(super) fn failover(
        &self,
        request: &FailoverRequest,
    ) -> Result<FailoverReport, OperateError> {
        let _turn = self.turn();
        match request.kind {
            FailoverKind::Planned => self.planned(),
            FailoverKind::Unplanned => self.unplanned(request),
        }
    }

    fn planned(&self) -> Result<FailoverReport, OperateError> {
        let record = self.record();
        match record.role.part {
            Part::Primary => self.step_down(&record)?,
            Part::SteppedDown { .. } if record.role.claim.is_none() => {}
            _ => {
                return Err(OperateError::NotNow(format!(
                    "machine {}: a planned failover is started on the primary, and this host is {}",
                    self.name(),
                    record.role.describe()
                )));
            }
        }
        let generation = self.hand_over_now()?;
        Ok(self.report(format!(
            "handed over: the other host is the primary now, in generation {generation}"
        )))
    }

    /// Until the record says that this host stepped down, every error leaves the primary a primary.
    fn step_down(&self, record: &Record) -> Result<(), OperateError> {
        let name = self.name();
        let not_now = |why: String| Err(OperateError::NotNow(format!("machine {name} {why}")));
        let Some(serving) = self.serving() else {
            return not_now("is not served here at the moment".into());
        };
        self.callee().ok_or_else(|| self.no_callee())?;
        if let Some(since) = record.suspended {
            return not_now(format!(
                "is suspended since {since}: `understudy resume {name}` first, so that its replica gets the last changes"
            ));
        }
        if record.layers.is_some() {
            return not_now(format!(
                "still folds its last failover into the images ({} bytes to go): try again later",
                serving.unfolded()
            ));
        }
        let primary = &serving.primary;
        if let Some(users) = primary.writers() {
            return not_now(format!(
                "is open for writing by {}: shut the guest down first",
                list(&users)
            ));
        }
        primary.refuse_writes();
        let closed = self.last_point(primary).and_then(|head| {
            let closed = self.idle(Unmount::IfUnused);
            Ok(closed.map(|()| head)?)
        });
        let head = match closed {
            Ok(head) => head,
            Err(error) => {
                // Replication, writers and mount as before.
                self.arrange()?;
                return Err(error);
            }
        };
        let cut = self.shared().clock.wall();
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

    /// The point that both hosts hold, after which nothing was written: proved by the maps, not assumed.
    fn last_point(&self, primary: &Primary) -> Result<Lineage, OperateError> {
        for _ in 0..CUTS_MAX {
            let head = primary.cut_now()?;
            if primary.machine().and_then(|machine| machine.at_rest()) == Some(head) {
                return Ok(head);
            }
        }
        Err(OperateError::Failed(format!(
            "machine {} does not come to rest although nobody can write",
            self.name()
        )))
    }

    fn unplanned(&self, request: &FailoverRequest) -> Result<FailoverReport, OperateError> {
        let record = self.record();
        if let Part::FailedOver { point, .. } = record.role.part {
            if request.point.is_some_and(|epoch| epoch != point.epoch) {
                return Err(OperateError::NotNow(format!(
                    "machine {0} is failed over to epoch {1}: `understudy cancel {0}` first, then choose another point",
                    self.name(),
                    point.epoch
                )));
            }
            self.arrange()?;
            return Ok(self.failed_over(point, record.role.generation));
        }
        let served = self.replica()?;
        if !request.force
            && let Some(primary) = served.progress.lock().connected.clone()
        {
            return Err(OperateError::NotNow(format!(
                "the primary of machine {} is connected (host {primary}): use --planned there, or --force to promote this replica all the same",
                self.name()
            )));
        }
        let wanted = TestRequest {
            point: request.point,
            ..TestRequest::default()
        };
        let fresh = self.shared().ids.uuid();
        let promote = |point: Point| Event::Promote {
            expected: record.role.generation,
            point: point.lineage,
            fresh,
        };
        // What is refused must not let go of the point that an earlier failover goes on from.
        let point = choose(&served.store, self.name(), wanted)?;
        self.check(&promote(point))?;
        // Nothing arrives any more from whoever fed it, before the promotion is durable.
        let over = served.end_session("this host takes over");
        self.clear_for_promotion(&record)?;
        // Until now the latest point could become another one, and the one that was looked for be merged.
        let point = choose(&served.store, self.name(), wanted)?;
        let held = served.hold(point.lineage.epoch);
        held.map_err(|error| OperateError::Failed(chain(&error)))?;
        let promoted = self.turn_to(&promote(point), |record| {
            layer_over(record, &served, point.lineage);
        });
        promoted.inspect_err(|_| served.let_go())?;
        drop(over);
        self.arrange()?;
        Ok(self.failed_over(point.lineage, self.record().role.generation))
    }

    fn failed_over(&self, point: Lineage, generation: Generation) -> FailoverReport {
        let name = self.name();
        self.report(format!(
            "failed over to epoch {}, generation {generation}; look at it, then `understudy commit {name}` to keep it or `understudy cancel {name}` to choose another point",
            point.epoch
        ))
    }

    /// A primary that stepped down hands over to this host.
    pub(super) fn take_over(
        &self,
        from: Generation,
        head: Lineage,
    ) -> Result<Generation, OperateError> {
        let _turn = self.turn();
        let record = self.record();
        let role = record.role;
        let asked_again = role.born == Some(head)
            && from.number.checked_add(1) == Some(role.generation.number)
            && role.part == Part::Primary;
        if asked_again {
            return Ok(role.generation);
        }
        let served = self.replica()?;
        let over = served.end_session("the primary hands over");
        self.clear_for_promotion(&record)?;
        let ours = match served.store.head() {
            Head::Complete(lineage) => Some(lineage),
            _ => None,
        };
        let event = Event::HandedOver {
            from,
            head,
            ours,
            fresh: self.shared().ids.uuid(),
        };
        let step = self.turn_to(&event, |record| {
            layer_over(record, &served, head);
        })?;
        drop(over);
        // The machine is this host's from here on, whatever comes: what cannot be arranged is shown and tried again.
        if let Err(error) = self.arrange() {
            tracing::error!(machine = %self.name(), "taken over, and not served yet: {}", chain(&error));
        }
        Ok(step.next.generation)
    }

    /// Keeps an unplanned failover, or this host's side of a split brain.
    pub(super) fn commit(&self) -> Result<FailoverReport, OperateError> {
        let _turn = self.turn();
        let event = match self.record().role.part {
            Part::Split { .. } => Event::Win {
                fresh: self.shared().ids.uuid(),
            },
            _ => Event::Commit,
        };
        let step = self.turn_to(&event, |_| {})?;
        self.arrange()?;
        Ok(self.report(format!(
            "kept: this host is the primary, in generation {}",
            step.next.generation
        )))
    }

    /// Takes back what is not final: a failover that is not committed, a hand-over, or else test failovers.
    pub(super) fn cancel(&self, request: CancelRequest) -> Result<CancelReport, OperateError> {
        let _turn = self.turn();
        let record = self.record();
        if request.rescue {
            return self.replica()?.drop_rescue();
        }
        match record.role.part {
            Part::FailedOver { .. } if !request.tests && request.number.is_none() => {
                self.cancel_failover(request.force)
            }
            Part::SteppedDown { .. } => {
                let event = Event::Reclaim {
                    fresh: self.shared().ids.uuid(),
                };
                self.turn_to(&event, |_| {})?;
                self.ask();
                self.arrange()?;
                let text = match self.record().role.part {
                    Part::Primary => "taken back: this host is the primary again",
                    _ => {
                        "asked back; as soon as the other host consents, this one is the primary again"
                    }
                };
                Ok(CancelReport {
                    ended: Vec::new(),
                    failover: Some(text.into()),
                })
            }
            // Test failovers of points that a committed failover still has below it hold its fold up.
            Part::Primary => match self.replica() {
                Ok(below) if below.has_tests() => below.cancel(request),
                _ => Err(OperateError::NotNow(format!(
                    "machine {} is the primary here: there is nothing to cancel",
                    self.name()
                ))),
            },
            _ => self.replica()?.cancel(request),
        }
    }

    fn cancel_failover(&self, force: bool) -> Result<CancelReport, OperateError> {
        let below = match self.serving() {
            // Nobody writes any more, and the replica below is as it was.
            Some(serving) => serving.close(how(force))?,
            None => self.following(),
        };
        if let Some(below) = &below {
            self.follows_again(Arc::clone(below));
        } else {
            self.idle(how(force))?;
        }
        let cancelled = self.turn_to(&Event::Cancel, |record| {
            record.layers = None;
            record.images.clear();
        });
        if cancelled.is_ok() {
            if let Some(below) = below {
                below.let_go();
            }
            self.forget_serving(self.record().id)?;
        }
        self.arrange()?;
        cancelled?;
        Ok(CancelReport {
            ended: Vec::new(),
            failover: Some(
                "cancelled: what was written since is gone, and the recovery points are as they were"
                    .into(),
            ),
        })
    }

    /// Lets a host that was the primary follow the new one.
    pub(super) fn reverse(&self, request: ReverseRequest) -> Result<FailoverReport, OperateError> {
        let _turn = self.turn();
        let part = self.record().role.part;
        if let Part::Split { .. } = part {
            self.turn_to(&Event::Lose, |_| {})?;
            self.arrange()?;
        } else if !matches!(part, Part::Fenced { .. } | Part::Returning { .. }) {
            // Says what this host is, and what it would have to be.
            self.turn_to(&Event::Reverse, |_| {})?;
        }
        if let Some(layers) = self.record().layers {
            self.fold_before_return(layers)?;
        }
        self.idle(how(request.force))?;
        self.turn_to(&Event::Reverse, |_| {})?;
        Ok(self.report(
            "follows the other host as soon as that one has taken the blocks in which this one may differ"
                .into(),
        ))
    }

    /// What was written over a point becomes part of the images, which a replica is made of.
    fn fold_before_return(&self, layers: Layers) -> Result<(), OperateError> {
        let serving = if let Some(serving) = self.serving() {
            serving
        } else {
            let opened = Serving::open(self, &self.record(), self.following())?;
            self.serves(opened)
        };
        tracing::info!(machine = %self.name(), epoch = %layers.point.epoch, "folds a failover before the images become a replica's");
        serving.fold_now(self).map_err(OperateError::NotNow)
    }

    fn report(&self, text: String) -> FailoverReport {
        let serving = self.serving();
        let files = serving.map(|serving| serving.primary.paths());
        FailoverReport {
            generation: self.record().role.generation,
            files: files.unwrap_or_default(),
            text,
        }
    }
}

fn how(force: bool) -> Unmount {
    if force {
        Unmount::Detach
    } else {
        Unmount::IfUnused
    }
}

/// The disks are shown on layers over `point` from now on.
fn layer_over(record: &mut Record, served: &Served, point: Lineage) {
    record.images = Member::image_records(served);
    record.layers = Some(Layers {
        point,
        settled: false,
    });
}
