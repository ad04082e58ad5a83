//! One machine on this host: the part it plays, and how it goes from one to the next.
//!
//! # Rules
//! `turn` is held for the whole of a change of parts, so that events come one after the other. What the role machine
//! answers is made durable ([`Member::turn_to`]) before the host acts on it ([`Member::arrange`]); a start arranges
//! what the record says, so a change that was cut short is finished then. What cannot be arranged is kept as trouble,
//! shown, and tried again.

use std::{
    error::Error,
    sync::{
        Arc, Weak,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use parking_lot::{Mutex, MutexGuard};

use super::{
    Shared,
    config::ReplicationConfig,
    record::{Places, Record},
    serving::Serving,
};
use crate::{
    base::chain::chain,
    base::ids::{Generation, MachineId, Name},
    coord::role::{Answer, Event, Part, Step},
    disk::Access,
    node::{
        audit,
        call::{self, CallError, Callee},
        control::OperateError,
        images::ImageConfig,
        primary::{PrimaryError, ShowConfig},
        served::Served,
        sources::{open_images, spec},
    },
    protocol::message::{Hello, Refusal, Version},
    shim::Unmount,
    storage::ledger::LedgerError,
};

/// How long a host that calls its peer waits; one that was the primary serves on its own then.
const ASK_WITHIN: Duration = Duration::from_secs(3);
/// Pause between two calls of a host that waits for its peer.
const CALL_EVERY: Duration = Duration::from_secs(3);

/// Why a machine cannot be brought into its part.
#[derive(Debug, thiserror::Error)]
pub(super) enum StartError {
    #[error(transparent)]
    Primary(#[from] PrimaryError),
    #[error("{0}")]
    Other(String),
}

impl StartError {
    pub(super) fn other(error: impl Error) -> Self {
        Self::Other(chain(&error))
    }
}

impl From<StartError> for OperateError {
    fn from(error: StartError) -> Self {
        match error {
            StartError::Primary(error @ PrimaryError::Unmount(_)) => Self::NotNow(chain(&error)),
            error => Self::Failed(chain(&error)),
        }
    }
}

/// What runs for a machine.
#[derive(Clone, Debug)]
pub(super) enum Running {
    Idle,
    Serving(Arc<Serving>),
    Following(Arc<Served>),
}

/// A machine on this host.
#[derive(Debug)]
pub(in crate::node) struct Member {
    pub(super) me: Weak<Self>,
    pub(super) name: Name,
    pub(super) shared: Arc<Shared>,
    pub(super) places: Places,
    turn: Mutex<()>,
    record: Mutex<Record>,
    pub(super) running: Mutex<Running>,
    pub(super) trouble: Mutex<Option<String>>,
    called: Mutex<Option<Instant>>,
    stopped: AtomicBool,
}

impl Member {
    pub(super) fn new(shared: Arc<Shared>, name: Name, record: Record) -> Arc<Self> {
        let store = record.store.as_deref();
        let places = Places(
            store
                .unwrap_or_else(|| shared.folder.path())
                .join(name.as_str()),
        );
        Arc::new_cyclic(|me| Self {
            me: Weak::clone(me),
            name,
            shared,
            places,
            turn: Mutex::default(),
            record: Mutex::new(record),
            running: Mutex::new(Running::Idle),
            trouble: Mutex::default(),
            called: Mutex::default(),
            stopped: AtomicBool::new(false),
        })
    }

    pub(in crate::node) fn name(&self) -> &Name {
        &self.name
    }

    pub(super) fn shared(&self) -> &Shared {
        &self.shared
    }

    pub(super) fn places(&self) -> &Places {
        &self.places
    }

    pub(super) fn record(&self) -> Record {
        self.record.lock().clone()
    }

    /// Waits until nobody else changes the machine's part.
    pub(super) fn turn(&self) -> MutexGuard<'_, ()> {
        self.turn.lock()
    }

    /// Changes the record, durably before this returns.
    pub(super) fn change(&self, change: impl FnOnce(&mut Record)) -> Result<(), LedgerError> {
        let mut record = self.record.lock();
        let mut next = record.clone();
        change(&mut next);
        if next != *record {
            self.shared.ledger.put(&Record::key(&self.name), &next)?;
            *record = next;
        }
        Ok(())
    }

    /// What an event would make of the role, if it is not refused. Nothing happens.
    pub(super) fn check(&self, event: &Event) -> Result<Step, OperateError> {
        let step = self.record().role.apply(event);
        step.map_err(|refused| OperateError::NotNow(format!("machine {}: {refused}", self.name)))
    }

    /// Lets an event happen to the role, and changes the record with it; durable before this returns.
    pub(super) fn turn_to(
        &self,
        event: &Event,
        also: impl FnOnce(&mut Record),
    ) -> Result<Step, OperateError> {
        let before = self.record().role;
        let step = self.check(event)?;
        if let (Part::Fenced { .. }, Some(serving)) = (step.next.part, self.serving()) {
            // Before anybody can see that the host is fenced: what is written after that is refused.
            serving.primary.refuse_writes();
        }
        self.change(|record| {
            record.role = step.next;
            if step.next != before {
                also(record);
            }
            if step.next.part != before.part {
                record.suspended = None;
                record.initial_copy = None;
            }
        })?;
        if step.next != before {
            self.shared.audit.record(&audit::Event::Role {
                machine: self.name.clone(),
                generation: step.next.generation,
                was: before.describe().into(),
                is: step.next.describe().into(),
            });
            tracing::info!(machine = %self.name, was = before.describe(), is = step.next.describe(), generation = %step.next.generation, "role");
        }
        Ok(step)
    }

    /// Whether it is a replica that this peer feeds.
    pub(super) fn is_of(&self, peer: &Name) -> bool {
        let record = self.record.lock();
        let same = |known: &Name| known.as_str().eq_ignore_ascii_case(peer.as_str());
        record.peer.as_ref().is_some_and(same) && matches!(record.role.part, Part::Replica { .. })
    }

    /// Whether a peer may speak for the machine.
    pub(super) fn belongs_to(&self, machine: MachineId, peer: &Name) -> Result<(), Refusal> {
        let record = self.record.lock();
        if record.id != machine {
            return Err(Refusal::NameTaken {
                name: self.name.clone(),
            });
        }
        match &record.peer {
            Some(known) if !known.as_str().eq_ignore_ascii_case(peer.as_str()) => {
                Err(Refusal::NotNow {
                    detail: format!(
                        "machine {} belongs to host {known}, not to {peer}",
                        self.name
                    ),
                })
            }
            Some(_) => Ok(()),
            None => Err(Refusal::NotNow {
                detail: format!("machine {} is not replicated", self.name),
            }),
        }
    }

    /// How its disks are shown here.
    pub(super) fn show(&self) -> ShowConfig {
        let configured = self.shared.config.machines.get(&self.name);
        let mut show = configured.map_or_else(
            || ShowConfig::new(self.places.disks()),
            |machine| machine.show.clone(),
        );
        show.mounter = self.shared.config.mounter.clone();
        show
    }

    /// Its images on this host.
    pub(super) fn images(&self, record: &Record) -> Vec<ImageConfig> {
        if let Some(machine) = self.shared.config.machines.get(&self.name) {
            return machine.images.clone();
        }
        let images = record.images.iter().map(|image| ImageConfig {
            path: self.places.0.join(&image.file),
            format: image.format,
            name: image.name.clone(),
            parents: None,
        });
        images.collect()
    }

    pub(super) fn replication(&self) -> ReplicationConfig {
        let peer = self.record.lock().peer.clone();
        let config = &self.shared.config;
        config.replication_of(&self.name, peer.as_ref()).clone()
    }

    /// The other host, if it can be called.
    pub(super) fn callee(&self) -> Option<Callee> {
        let peer = self.record.lock().peer.clone()?;
        let address = self.shared.config.peer(&peer)?.address.clone()?;
        Some(Callee {
            address,
            name: Some(peer),
            identity: self.shared.identity.clone()?,
        })
    }

    pub(super) fn serving(&self) -> Option<Arc<Serving>> {
        match &*self.running.lock() {
            Running::Serving(serving) => Some(Arc::clone(serving)),
            _ => None,
        }
    }

    pub(super) fn following(&self) -> Option<Arc<Served>> {
        match &*self.running.lock() {
            Running::Following(served) => Some(Arc::clone(served)),
            _ => None,
        }
    }

    /// The replica that is kept here, be it below the disks of an uncommitted failover.
    pub(super) fn replica(&self) -> Result<Arc<Served>, OperateError> {
        let replica = match &*self.running.lock() {
            Running::Following(served) => Some(Arc::clone(served)),
            Running::Serving(serving) => serving.below(),
            Running::Idle => None,
        };
        replica.ok_or_else(|| OperateError::NoSuchReplica(self.name.clone()))
    }

    /// Brings the machine into the part that the record says, after the peer was asked whether that is still so.
    pub(super) fn start(&self) -> Result<(), StartError> {
        let _turn = self.turn();
        let record = self.record();
        let fresh = record.role.generation.number == 1 && !self.places.tracking().exists();
        if record.role.part == Part::Primary && !fresh {
            self.ask();
        }
        self.arrange()
    }

    /// Asks the peer what it thinks of this host's claim, and obeys. A peer that does not answer in time is not waited for.
    pub(super) fn ask(&self) {
        let (Some(callee), Some(hello)) = (self.callee(), self.hello()) else {
            return;
        };
        let asked = self.shared.runtime.block_on(async {
            tokio::time::timeout(ASK_WITHIN, call::claim(&callee, hello)).await
        });
        match asked {
            Ok(Ok(answer)) => {
                if let Err(error) = self.hear(answer) {
                    tracing::error!(machine = %self.name, "the peer's answer was not understood: {error}");
                }
            }
            Ok(Err(error)) => {
                tracing::info!(machine = %self.name, "the peer was not asked: {}", chain(&error));
            }
            Err(_) => tracing::info!(machine = %self.name, "the peer did not answer in time"),
        }
    }

    /// The greeting that claims the machine, if this host calls at all. Its disks are told where they are known.
    fn hello(&self) -> Option<Hello> {
        let record = self.record();
        let claim = record.role.claim()?;
        let disks = if let Some(serving) = self.serving() {
            serving.primary.specs()
        } else {
            let images = self.images(&record);
            let opened = open_images(&images, Access::ReadOnly, &self.shared.ids).ok()?;
            opened.iter().map(spec).collect()
        };
        Some(Hello {
            version: Version::CURRENT,
            machine: record.id,
            name: self.name.clone(),
            claim,
            disks,
        })
    }

    /// Obeys what the peer answered.
    fn hear(&self, answer: Answer) -> Result<(), OperateError> {
        let fresh = self.shared.ids.uuid();
        self.turn_to(&Event::Answered { answer, fresh }, |record| {
            if record.role.part == Part::Primary {
                record.adoption = None;
            }
        })?;
        Ok(())
    }

    /// The peer answered the replication's greeting. Returns at once.
    pub(super) fn answered(&self, answer: Answer) {
        let Some(member) = self.me.upgrade() else {
            return;
        };
        self.shared.runtime.spawn_blocking(move || {
            let _turn = member.turn();
            if member.stopped.load(Ordering::Acquire) {
                return;
            }
            let before = member.record().role;
            let heard = member.hear(answer);
            let heard = heard.and_then(|()| {
                if member.record().role == before {
                    return Ok(());
                }
                Ok(member.arrange()?)
            });
            if let Err(error) = heard {
                tracing::error!(machine = %member.name, "what the peer says of the roles cannot be obeyed: {error}");
            }
        });
    }

    /// From now on `opened` is what runs.
    pub(super) fn serves(&self, opened: Serving) -> Arc<Serving> {
        let serving = Arc::new(opened);
        *self.running.lock() = Running::Serving(Arc::clone(&serving));
        serving
    }

    /// Whether delta logs of `generation` may be taken in.
    pub(in crate::node) fn follows(&self, generation: Generation) -> bool {
        self.record.lock().role.follows(generation)
    }

    /// From now on `served` is what runs: a failover was cancelled.
    pub(super) fn follows_again(&self, served: Arc<Served>) {
        *self.running.lock() = Running::Following(served);
    }

    /// Whether somebody has to look after the machine now and then.
    pub(super) fn needs_care(&self) -> bool {
        let role = self.record.lock().role;
        // A primary that learned only when it started that a failover was cancelled waits for consent, too.
        let waits = role.claim.is_some()
            || matches!(role.part, Part::SteppedDown { .. } | Part::Fenced { .. });
        !self.stopped.load(Ordering::Acquire) && (waits || self.trouble.lock().is_some())
    }

    /// Does what is due: lets go of disks that a fenced host's guest has left, calls the peer, tries again what failed.
    pub(super) fn look_after(&self) {
        let Some(_turn) = self.turn.try_lock() else {
            return;
        };
        if self.stopped.load(Ordering::Acquire) {
            return;
        }
        let due = self
            .called
            .lock()
            .is_none_or(|called| called.elapsed() >= CALL_EVERY);
        let before = self.record().role;
        if matches!(before.part, Part::Fenced { .. }) {
            // Still in use is no news: the guest was told that it cannot write.
            let _ = self.idle(Unmount::IfUnused);
        }
        if due {
            *self.called.lock() = Some(Instant::now());
            match before.part {
                Part::SteppedDown { .. } if before.claim.is_none() => {
                    if let Err(error) = self.hand_over_now() {
                        tracing::warn!(machine = %self.name, "{error}");
                    }
                }
                Part::SteppedDown { .. } | Part::Fenced { .. } => self.ask(),
                _ if before.claim.is_some() => self.ask(),
                _ => {}
            }
        }
        if self.record().role != before || (due && self.trouble.lock().is_some()) {
            // What is wrong is kept and shown.
            let _ = self.arrange();
        }
    }

    /// Asks the peer to take over from here, once more or for the first time.
    pub(super) fn hand_over_now(&self) -> Result<Generation, OperateError> {
        let record = self.record();
        let Part::SteppedDown { head } = record.role.part else {
            return Err(OperateError::NotNow(format!(
                "machine {} is not being handed over",
                self.name
            )));
        };
        let callee = self.callee().ok_or_else(|| self.no_callee())?;
        let (from, whom) = (record.role.generation, (record.id, self.name.clone()));
        let call = call::hand_over(&callee, whom, from, head);
        self.shared.runtime.block_on(call).map_err(|error| {
            let why = match &error {
                CallError::Refused(refusal) => refusal.to_string(),
                other => chain(other),
            };
            OperateError::Failed(format!(
                "machine {0} stepped down at epoch {1}, and its replica has not taken over yet: {why}; it is asked again; `understudy cancel {0}` makes this host the primary again",
                self.name, head.epoch
            ))
        })
    }

    pub(super) fn no_callee(&self) -> OperateError {
        OperateError::NotNow(format!(
            "no address is known of the other host of machine {}: give it to the peer in the configuration",
            self.name
        ))
    }

    /// Ends everything. With a mount in use and [`Unmount::IfUnused`] it is an error, and the machine goes on.
    pub(super) fn stop(&self, how: Unmount) -> Result<(), StartError> {
        let _turn = self.turn();
        self.stopped.store(true, Ordering::Release);
        let stopped = self.idle(how);
        if stopped.is_err() {
            self.stopped.store(false, Ordering::Release);
            // The fold goes on; the replication never stopped.
            if let Some(serving) = self.serving() {
                let _ = serving.fold(Weak::clone(&self.me));
            }
        }
        stopped
    }
}
