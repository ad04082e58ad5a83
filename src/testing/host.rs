//! A host of the simulation: what is durable on it, the process that runs, and how that comes into its part.
//!
//! This is `node::host` (`member`, `parts`) with everything taken away that is not an order of durable steps: mounts,
//! threads, sockets, messages for people. Where the node waits for the other host, this leaves a mark, and the world does
//! the rest at a later step.

use std::sync::Arc;

use uuid::Uuid;

use super::{
    content::Contents,
    medium::{Kind, Medium, MediumFolder},
    record::{Asked, Done, No, Record, not_now, told},
    serving::{Serving, Shown},
    session::Session,
    setup::{Bug, Setup, disk_name, geometry},
};
use crate::{
    base::{
        clock::ManualClock,
        ids::{Generation, Ids, MachineId, Name, SeededIds},
        units::DiskIndex,
    },
    coord::role::{Active, Answer, Event, Part, RoleState, Step},
    disk::{Access, Disk, Opening, image, layered::LayeredDisk},
    replica::{
        Adoption, Head, Held, MachineReplica, PointView, ReplicaError, ReplicaOptions, image_name,
    },
    storage::{Folder, Open, ledger::Ledger, memory::Choice},
    track::state::StateDir,
    volume::{self, DiskSource, ImageStamp, Machine, MachineOptions},
};

const LEDGER_FILE: &str = "node.redb";
const ROLE_KEY: &str = "role/machine";

pub(super) fn machine_id() -> MachineId {
    MachineId(Uuid::from_u128(9))
}

pub(super) fn machine_name() -> Name {
    Name::new("machine").expect("it is a plain word")
}

/// Whether a mount that is in use is left alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Unmount {
    IfUnused,
    Detach,
}

/// What runs for the machine.
#[derive(Debug)]
pub(super) enum Running {
    Idle,
    Serving(Box<Serving>),
    Following(Box<Following>),
}

impl Running {
    pub(super) fn following(store: Arc<MachineReplica>) -> Self {
        Self::Following(Box::new(Following {
            store,
            session: None,
        }))
    }
}

/// A replica that is fed here.
#[derive(Debug)]
pub(super) struct Following {
    pub(super) store: Arc<MachineReplica>,
    pub(super) session: Option<Session>,
}

/// A test failover: a point that somebody looks at and writes over.
#[derive(Debug)]
pub(super) struct Test {
    pub(super) view: PointView,
    pub(super) layers: Vec<Arc<LayeredDisk>>,
    /// What its disks hold, once it was read.
    pub(super) contents: Option<Contents>,
    pub(super) rescue: bool,
}

/// A running process.
#[derive(Debug)]
pub(super) struct Process {
    ledger: Arc<Ledger>,
    pub(super) record: Option<Record>,
    pub(super) running: Running,
    pub(super) tests: Vec<Test>,
    /// The point of a failover, kept until that is taken back.
    pub(super) held: Option<Held>,
    /// What could not be arranged.
    pub(super) trouble: Option<String>,
    /// What the other host said of the roles to the replication, and nobody has obeyed yet.
    pub(super) answered: Option<Answer>,
    /// A guest has the disks open.
    pub(super) guest: bool,
}

/// A host.
#[derive(Debug)]
pub(super) struct Host {
    pub(super) index: usize,
    pub(super) medium: Arc<Medium>,
    pub(super) folder: Arc<MediumFolder>,
    pub(super) layers: Arc<MediumFolder>,
    pub(super) tests: Arc<MediumFolder>,
    tracking: Arc<MediumFolder>,
    state: StateDir,
    boot: u64,
    pub(super) setup: Arc<Setup>,
    pub(super) clock: Arc<ManualClock>,
    ids: Arc<dyn Ids>,
    pub(super) process: Option<Process>,
    /// Links that this host has hung up.
    pub(super) hung_up: Vec<u64>,
}

impl Host {
    pub(super) fn new(
        index: usize,
        setup: &Arc<Setup>,
        clock: &Arc<ManualClock>,
        seed: u64,
    ) -> Self {
        let medium = Medium::new();
        medium.forget_log_syncs(setup.has(Bug::LogNotSynced));
        let tracking = MediumFolder::new(&medium, Some(Kind::Tracking));
        Self {
            index,
            folder: MediumFolder::new(&medium, None),
            layers: MediumFolder::new(&medium, Some(Kind::Layer)),
            tests: MediumFolder::new(&medium, Some(Kind::Layer)),
            state: StateDir::memory(Arc::clone(&tracking) as Arc<dyn Folder>),
            tracking,
            medium,
            boot: 1,
            setup: Arc::clone(setup),
            clock: Arc::clone(clock),
            ids: Arc::new(SeededIds::new(seed)),
            process: None,
            hung_up: Vec::new(),
        }
    }

    pub(super) fn fresh(&self) -> Uuid {
        self.ids.uuid()
    }

    /// The machine's first images, empty, as a person makes them.
    pub(super) fn make_images(&self) -> Done {
        for index in 0..self.setup.disks {
            let file = self.folder.open(&self.file_name(index), Open::CreateNew);
            let options =
                image::CreateOptions::new(self.setup.formats[self.index], geometry(index));
            image::create(&*file.map_err(told)?, &options, &*self.ids).map_err(told)?;
        }
        self.folder.sync().map_err(told)
    }

    pub(super) fn file_name(&self, index: usize) -> String {
        image_name(&disk_name(index), self.setup.formats[self.index])
    }

    pub(super) fn is_up(&self) -> bool {
        self.process.is_some()
    }

    pub(super) fn process(&mut self) -> &mut Process {
        let process = self.process.as_mut();
        process.expect("only a host that is up is asked")
    }

    pub(super) fn record(&self) -> Option<&Record> {
        self.process.as_ref()?.record.as_ref()
    }

    pub(super) fn role(&self) -> Option<RoleState> {
        Some(self.record()?.role)
    }

    pub(super) fn serving(&self) -> Option<&Serving> {
        match &self.process.as_ref()?.running {
            Running::Serving(serving) => Some(serving),
            _ => None,
        }
    }

    pub(super) fn serving_mut(&mut self) -> Option<&mut Serving> {
        match &mut self.process.as_mut()?.running {
            Running::Serving(serving) => Some(serving),
            _ => None,
        }
    }

    pub(super) fn following(&self) -> Option<&Following> {
        match &self.process.as_ref()?.running {
            Running::Following(following) => Some(following),
            _ => None,
        }
    }

    pub(super) fn following_mut(&mut self) -> Option<&mut Following> {
        match &mut self.process.as_mut()?.running {
            Running::Following(following) => Some(following),
            _ => None,
        }
    }

    /// The store of the replica that is kept here, be it below a failover.
    pub(super) fn store(&self) -> Option<Arc<MachineReplica>> {
        match &self.process.as_ref()?.running {
            Running::Following(following) => Some(Arc::clone(&following.store)),
            Running::Serving(serving) => serving.below.clone(),
            Running::Idle => None,
        }
    }

    /// A new process: opens the node's store and reads what is remembered. What runs is arranged afterwards.
    pub(super) fn wake(&mut self) -> Done {
        let ledger = Arc::new(Ledger::open_in(&*self.folder, LEDGER_FILE).map_err(told)?);
        let mut record: Option<Record> = ledger.get(ROLE_KEY).map_err(told)?;
        // The machine is configured on the first host.
        if record.is_none() && self.index == 0 {
            let new = Record::new(RoleState::primary(Generation::first(&*self.ids)));
            ledger.put(ROLE_KEY, &new).map_err(told)?;
            record = Some(new);
        }
        self.process = Some(Process {
            ledger,
            record,
            running: Running::Idle,
            tests: Vec::new(),
            held: None,
            trouble: None,
            answered: None,
            guest: false,
        });
        Ok(())
    }

    /// Whether a start asks the other host before anything is served: it may have been replaced.
    pub(super) fn asks_first(&self) -> bool {
        let Some(role) = self.role() else {
            return false;
        };
        let fresh = role.generation.number == 1 && !self.is_tracked();
        role.part == Part::Primary && !fresh
    }

    fn is_tracked(&self) -> bool {
        // What cannot be listed is there.
        (self.tracking.names()).map_or(true, |names| !names.is_empty())
    }

    /// The process is gone, and its guest with it.
    pub(super) fn die(&mut self) {
        self.medium.end_process(|| self.process = None);
        if self.setup.has(Bug::MapsLost) {
            self.state = StateDir::memory(Arc::clone(&self.tracking) as Arc<dyn Folder>);
        }
    }

    /// The power is cut and comes back; `kept` says what lasts of all that was not synced.
    pub(super) fn lose_power(&mut self, kept: &mut Choice<'_>) -> Done {
        self.die();
        self.medium.power.restore(kept);
        self.state.lose(kept).map_err(told)?;
        if !self.setup.has(Bug::IntentIgnored) {
            self.boot += 1;
        }
        Ok(())
    }

    /// Makes the machine known here.
    pub(super) fn remember(&mut self, record: Record) -> Done {
        let process = self.process();
        process.ledger.put(ROLE_KEY, &record).map_err(told)?;
        process.record = Some(record);
        Ok(())
    }

    /// Changes the record, durably before this returns.
    pub(super) fn change(&mut self, change: impl FnOnce(&mut Record)) -> Done {
        let process = self.process();
        let before = process.record.clone().ok_or("no such machine")?;
        let mut next = before.clone();
        change(&mut next);
        if next == before {
            return Ok(());
        }
        self.remember(next)
    }

    /// Lets an event happen to the role, and changes the record with it; durable before this returns.
    pub(super) fn turn_to(&mut self, event: &Event, also: impl FnOnce(&mut Record)) -> Asked<Step> {
        let Some(before) = self.role() else {
            return not_now("no such machine");
        };
        let step = before
            .apply(event)
            .map_err(|error| No::NotNow(told(error)))?;
        let forgotten = match event {
            Event::Promote { .. } => self.setup.has(Bug::PromotionNotDurable),
            Event::StepDown { .. } => self.setup.has(Bug::StepDownNotDurable),
            Event::Claimed(_) => self.setup.has(Bug::FencingNotDurable),
            _ => false,
        };
        let change = |record: &mut Record| {
            record.role = step.next;
            if step.next != before {
                also(record);
            }
        };
        if forgotten {
            self.process().record.as_mut().map(change);
        } else {
            self.change(change)?;
        }
        Ok(step)
    }

    /// Brings what runs in line with the record.
    pub(super) fn arrange(&mut self) -> Asked {
        let Some(role) = self.role() else {
            return Ok(());
        };
        let arranged = match role.part {
            Part::Primary | Part::FailedOver { .. } => self.serve(role),
            Part::Split { was, .. } if !matches!(was, Active::SteppedDown { .. }) => {
                self.serve(role)
            }
            Part::Fenced { .. } => self.fence(),
            Part::Split { .. } | Part::SteppedDown { .. } | Part::Returning { .. } => {
                self.idle(Unmount::IfUnused)
            }
            Part::Replica { .. } => self.follow(role),
        };
        self.process().trouble = arranged.as_ref().err().map(ToString::to_string);
        arranged
    }

    fn serve(&mut self, role: RoleState) -> Asked {
        if self.serving().is_none() {
            let below = self
                .following()
                .map(|following| Arc::clone(&following.store));
            self.end_session();
            let serving = Serving::open(self, below)?;
            self.process().running = Running::Serving(Box::new(serving));
        }
        self.end_replication();
        let folds = self.record().is_some_and(|record| record.layers.is_some());
        if let Some(serving) = self.serving_mut() {
            serving.show(Shown::Writable);
            if role.part == Part::Primary {
                serving.replicates = Some(role);
                serving.folds = folds;
            }
        }
        Ok(())
    }

    /// Ends the replication; what was under way is owed again.
    pub(super) fn end_replication(&mut self) {
        let Some(serving) = self.serving_mut() else {
            return;
        };
        serving.replicates = None;
        let ended = serving.hang_up();
        self.hung_up.extend(ended);
    }

    /// Ends the connection that feeds the replica, to its last message.
    pub(super) fn end_session(&mut self) {
        let session = self
            .following_mut()
            .and_then(|following| following.session.take());
        self.hung_up.extend(session.map(|session| session.link));
    }

    fn fence(&mut self) -> Asked {
        let shown = if self.setup.has(Bug::FencedGoesOn) {
            Shown::Writable
        } else {
            Shown::ReadOnly
        };
        let Some(serving) = self.serving_mut() else {
            return self.idle(Unmount::IfUnused);
        };
        serving.show(shown);
        self.end_replication();
        Ok(())
    }

    /// Lets go of all disks. Only a mount that is still in use leaves everything as it was.
    pub(super) fn idle(&mut self, how: Unmount) -> Asked {
        let below = match &self.process().running {
            Running::Idle => return Ok(()),
            Running::Serving(_) => match self.close_serving(how) {
                Err(No::NotNow(why)) => return Err(No::NotNow(why)),
                closed => closed,
            },
            Running::Following(following) => {
                let store = Arc::clone(&following.store);
                self.end_session();
                Ok(Some(store))
            }
        };
        // The layers and the tests hold the points below them.
        let process = self.process();
        process.running = Running::Idle;
        process.tests.clear();
        process.held = None;
        match below? {
            Some(below) => Ok(below.close().map_err(told)?),
            None => Ok(()),
        }
    }

    /// Unmounts and closes the disks that are served. The replica below them stays open, and is returned.
    pub(super) fn close_serving(&mut self, how: Unmount) -> Asked<Option<Arc<MachineReplica>>> {
        if self.process().guest && how == Unmount::IfUnused {
            return not_now("the mount is in use");
        }
        self.process().guest = false;
        self.end_replication();
        let Some(serving) = self.serving() else {
            return Ok(None);
        };
        let layered = serving.is_layered();
        let closed = serving.machine.close(&mut |disk: DiskIndex| {
            let image = self.folder.stamp(&self.file_name(disk.index()))?;
            if layered {
                return Ok(over(image, self.layer_stamp(disk.index())?));
            }
            Ok(image)
        });
        if let Some(serving) = self.serving_mut() {
            serving.show(Shown::Not);
        }
        closed.map_err(told)?;
        Ok(self.serving_mut().and_then(|serving| serving.below.take()))
    }

    fn follow(&mut self, role: RoleState) -> Asked {
        if self.following().is_some() {
            return Ok(());
        }
        self.idle(Unmount::IfUnused)?;
        self.forget_serving()?;
        let store = self.open_replica()?;
        if let Some(adoption) = self.record().and_then(|record| record.adoption) {
            if store.head() == Head::Empty {
                let adoption = Adoption {
                    lineage: adoption.lineage,
                    cut: adoption.cut,
                    exact: adoption.exact || self.setup.has(Bug::RescueSkipped),
                    generation: role.generation,
                };
                let mut specs = self.setup.specs();
                for spec in &mut specs {
                    spec.format = self.setup.formats[self.index];
                }
                store.adopt(&specs, adoption).map_err(told)?;
            }
            self.change(|record| record.adoption = None)?;
        }
        self.process().running = Running::following(store);
        Ok(())
    }

    /// Removes what a machine that is served leaves: its tracking, its layers. A replica needs neither.
    pub(super) fn forget_serving(&mut self) -> Done {
        if self.is_tracked() {
            let ledger = Arc::clone(&self.process().ledger);
            volume::forget(&ledger, machine_id(), &self.state).map_err(told)?;
            remove_all(&self.tracking)?;
            self.state = StateDir::memory(Arc::clone(&self.tracking) as Arc<dyn Folder>);
        }
        self.remove_layers()
    }

    /// Removes layers that nothing reads any more, durably.
    pub(super) fn remove_layers(&self) -> Done {
        remove_all(&self.layers)?;
        self.layers.sync().map_err(told)
    }

    pub(super) fn open_replica(&mut self) -> Done<Arc<MachineReplica>> {
        let options = ReplicaOptions {
            format: Some(self.setup.formats[self.index]),
            retention: self.setup.retention,
            space_max: self.setup.space_max,
            sync_bytes: self.setup.sync_bytes,
        };
        let folder = Arc::clone(&self.folder) as Arc<dyn Folder>;
        let (ledger, ids) = (Arc::clone(&self.process().ledger), Arc::clone(&self.ids));
        let store = MachineReplica::open(folder, ledger, ids, machine_id(), options);
        let store = store.map_err(told)?;
        let layers = self.record().and_then(|record| record.layers);
        self.process().held = match layers.map(|layers| store.hold(layers.point.epoch)) {
            None | Some(Err(ReplicaError::NoPoint(_))) => None,
            Some(held) => Some(held.map_err(told)?),
        };
        Ok(Arc::new(store))
    }

    /// The disks in the images, and what their files say of who wrote them.
    pub(super) fn open_images(&self) -> Done<Vec<(Arc<dyn Disk>, ImageStamp)>> {
        let open = |index| {
            let file = self.file_name(index);
            let stamp = self.folder.stamp(&file).map_err(told)?;
            let storage = self.folder.open(&file, Open::Write).map_err(told)?;
            let opening = Opening::new(Access::ReadWrite, Arc::clone(&self.ids));
            let format = self.setup.formats[self.index];
            Ok((image::open(storage, format, &opening).map_err(told)?, stamp))
        };
        (0..self.setup.disks).map(open).collect()
    }

    fn layer_stamp(&self, index: usize) -> std::io::Result<ImageStamp> {
        self.layers.stamp(disk_name(index).as_str())
    }

    /// Notes that layers are about to be opened, which may write them. Layers that are not there yet are not known.
    pub(super) fn will_write_layers(&mut self) -> Done {
        let names: Vec<_> = (0..self.setup.disks).map(disk_name).collect();
        let stamps = names.iter().enumerate();
        let stamps = stamps.map(|(index, name)| Some((name, self.layered_stamp(index).ok()?)));
        let Some(stamps) = stamps.collect::<Option<Vec<_>>>() else {
            return Ok(());
        };
        volume::will_write(&self.process().ledger, machine_id(), &stamps).map_err(told)
    }

    /// What tells whether somebody else wrote a disk that is a layer over an image.
    pub(super) fn layered_stamp(&self, index: usize) -> Done<ImageStamp> {
        let image = self.folder.stamp(&self.file_name(index)).map_err(told)?;
        Ok(over(image, self.layer_stamp(index).map_err(told)?))
    }

    pub(super) fn open_machine(
        &mut self,
        disks: Vec<(Arc<dyn Disk>, ImageStamp)>,
    ) -> Done<Arc<Machine>> {
        let options = MachineOptions {
            id: machine_id(),
            name: machine_name(),
            clock: Arc::clone(&self.clock) as _,
            boot_id: format!("boot-{}", self.boot),
            preserve_bytes_max: self.setup.preserve_bytes_max,
            hot_regions_max: self.setup.hot_regions_max,
            frames_max: self.setup.frames_max,
        };
        let source = |(index, (disk, stamp))| DiskSource {
            name: disk_name(index),
            disk,
            stamp,
        };
        let sources = disks.into_iter().enumerate().map(source).collect();
        let ledger = Arc::clone(&self.process().ledger);
        Machine::open(options, sources, &self.state, ledger).map_err(told)
    }

    /// Names the present boot of the host.
    pub(super) fn boot(&self) -> Uuid {
        Uuid::from_u128(u128::from(self.boot))
    }
}

/// The image's identity, and length and time of the layer that is written first.
fn over(image: ImageStamp, layer: ImageStamp) -> ImageStamp {
    ImageStamp {
        inode: image.inode,
        ..layer
    }
}

/// Removes all files of a folder, as `remove_dir_all` does: without a sync.
fn remove_all(folder: &MediumFolder) -> Done {
    for name in folder.names().map_err(told)? {
        folder.remove(&name).map_err(told)?;
    }
    Ok(())
}
