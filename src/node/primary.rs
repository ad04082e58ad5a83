//! A primary: a machine's disks tracked, shown in a mount, replicated.
//!
//! Order matters at both ends. Start: open and lock the images, restore what tracking knows, mount, and only then dial
//! the replica: a guest never waits for a replica. Stop: unmount (no write can come any more), end the
//! replication, close the machine (flush, record that it was clean), and only then let go of the locks.

use std::{io, path::PathBuf, sync::Arc, time::Duration};

use parking_lot::Mutex;

pub use super::images::ImageConfig;
use super::{
    control::{Operate, OperateError},
    driver::{Host, Replication, Subject, Target},
    images::ImageError,
    pacing::Pacing,
    progress::Progress,
    sources::{Source, Stamped, open_images, spec},
    status::{DiskStatus, LatencyStatus, MachineStatus, NodeStatus, RpoStatus, TrafficStatus},
    sync_flush::{Flushes, SyncDisk, SyncOnFlush},
    tracking::{Tracked, Tracking},
};
use crate::{
    base::{
        clock::{Clock, SystemClock},
        ids::{Ids, Lineage, Name, SystemIds},
        units::{BLOCK_BYTES, DiskIndex, Epoch},
    },
    coord::state::{ReplicationState, Role, Signs},
    disk::{Access, Disk},
    protocol::message::DiskSpec,
    shim::{
        self, FileIndex, Mount, MountError, MountOptions, MountedDisk, Owner, Refusal, Unmount,
        UnmountError, User, Visibility, Writability,
    },
    storage::ledger::LedgerError,
    volume::{self, Machine, MachineState},
};

/// The interval that health is judged by where none is configured.
const INTERVAL_DEFAULT: Duration = Duration::from_secs(1);

impl PrimaryError {
    /// The mount that somebody still uses, if that is the trouble.
    pub fn busy(&self) -> Option<&UnmountError> {
        match self {
            Self::Unmount(busy @ UnmountError::Busy { .. }) => Some(busy),
            _ => None,
        }
    }
}

/// How a machine's disks are shown.
#[derive(Clone, Debug)]
pub struct ShowConfig {
    /// Where to mount.
    pub at: PathBuf,
    /// Whether the guest may write.
    pub access: Access,
    /// Whether it is told that it may not although the images can be written: another host is the primary.
    pub fenced: bool,
    /// Who may open the files.
    pub visibility: Visibility,
    /// Whom the files belong to, if not this process's user.
    pub owner: Option<Owner>,
    /// Threads that serve the mount.
    pub threads: usize,
}

impl ShowConfig {
    /// Writable, for this process's user, at `at`.
    pub fn new(at: PathBuf) -> Self {
        Self {
            at,
            access: Access::ReadWrite,
            fenced: false,
            visibility: Visibility::Owner,
            owner: None,
            threads: shim::THREADS_DEFAULT,
        }
    }
}

/// Why a primary cannot start or stop.
#[derive(Debug, thiserror::Error)]
pub enum PrimaryError {
    /// An image cannot be used.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// Two images with the same name.
    #[error("two images would both be disk {0}: rename one of them")]
    DuplicateDisk(Name),
    /// The state folder cannot be used.
    #[error("cannot use the state folder {}", path.display())]
    State {
        /// The folder.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The node's store failed.
    #[error(transparent)]
    Ledger(#[from] LedgerError),
    /// Tracking cannot begin.
    #[error("cannot track machine {machine}")]
    Track {
        /// Which.
        machine: Name,
        /// Why.
        #[source]
        source: volume::OpenError,
    },
    /// A machine that was failed over cannot go on from its recovery point.
    #[error("machine {machine} cannot go on from its recovery point: {why}")]
    Begin {
        /// Which.
        machine: Name,
        /// Why.
        why: String,
    },
    /// The mount cannot be made.
    #[error(transparent)]
    Mount(#[from] MountError),
    /// The mount is still in use.
    #[error(transparent)]
    Unmount(#[from] UnmountError),
    /// A thread could not be started.
    #[error("cannot start a thread")]
    Thread(#[source] io::Error),
    /// The disks could not be closed cleanly.
    #[error(
        "machine {machine} could not be closed cleanly; what was acknowledged is safe and will be found at the next start"
    )]
    Close {
        /// Which.
        machine: Name,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

/// A machine that is being served.
#[derive(Debug)]
pub struct Primary {
    name: Name,
    clock: Arc<dyn Clock>,
    disks: Vec<Source>,
    /// Whose stamp is taken at the end, for each disk.
    stamped: Mutex<Vec<Stamped>>,
    tracked: Option<Tracked>,
    /// The guest's flushes, if they wait for the replica.
    flushes: Option<Arc<Flushes>>,
    mount: Mount,
    replication: Mutex<Option<Running>>,
    progress: Arc<Mutex<Progress>>,
}

/// A machine whose writes are tracked, before its disks are shown.
pub(super) struct Beginning<'a> {
    pub(super) tracking: Tracking<'a>,
    /// What is to be done to the machine before anybody can write.
    pub(super) begin: &'a dyn Fn(&Machine) -> Result<(), String>,
    /// Whether flushes wait for the replica.
    pub(super) sync_on_flush: Option<SyncOnFlush>,
    /// Where the generation began, if it began on this host.
    pub(super) born: Option<Lineage>,
}

/// A replication that runs, and what the status tells of it.
#[derive(Debug)]
struct Running {
    replication: Replication,
    peer: String,
    interval: Duration,
    pacing: Pacing,
}

impl Primary {
    /// Opens and mounts images that nobody tracks. Blocks while they are opened.
    pub fn show(
        name: Name,
        images: &[ImageConfig],
        show: &ShowConfig,
    ) -> Result<Self, PrimaryError> {
        let clock: Arc<dyn Clock> = Arc::new(SystemClock::default());
        let ids: Arc<dyn Ids> = Arc::new(SystemIds::default());
        let sources = open_images(images, show.access, &ids)?;
        Self::start(name, sources, show, None, clock)
    }

    /// Tracks and mounts `disks`; the machine that tracks them is shown to the caller before anybody can write.
    pub(super) fn start(
        name: Name,
        disks: Vec<Source>,
        show: &ShowConfig,
        beginning: Option<Beginning<'_>>,
        clock: Arc<dyn Clock>,
    ) -> Result<Self, PrimaryError> {
        let track = |beginning: Beginning<'_>| {
            let tracked = Tracked::open(&name, beginning.tracking, &disks, &clock)?;
            (beginning.begin)(&tracked.machine).map_err(|why| PrimaryError::Begin {
                machine: name.clone(),
                why,
            })?;
            let head = tracked.machine.lineage();
            let flushes = |policy| Arc::new(Flushes::new(policy, head, beginning.born));
            Ok::<_, PrimaryError>((tracked, beginning.sync_on_flush.map(flushes)))
        };
        let tracked = beginning.map(track).transpose()?;
        let (tracked, flushes) =
            tracked.map_or((None, None), |(tracked, flushes)| (Some(tracked), flushes));
        let mount = mount(show, &disks, tracked.as_ref(), flushes.as_ref())?;
        let stamped = disks.iter().map(|disk| disk.stamped.0.clone()).collect();
        Ok(Self {
            name,
            clock,
            disks,
            stamped: Mutex::new(stamped),
            tracked,
            flushes,
            mount,
            replication: Mutex::default(),
            progress: Arc::default(),
        })
    }

    /// Begins to replicate, in the generation of `subject`. What ran before ends first.
    pub(super) fn replicate(
        &self,
        subject: Subject,
        target: Target,
        host: Host,
    ) -> Result<(), PrimaryError> {
        let Some(tracked) = &self.tracked else {
            return Ok(());
        };
        let before = self.replication.lock().take();
        drop(before);
        let flushes = self.flushes.clone();
        if let Some(flushes) = &flushes {
            flushes.unlinked("connecting to the replica");
        }
        let (peer, interval) = (target.callee.address.clone(), target.interval);
        let pacing = target.pacing.clone();
        let machine = Arc::clone(&tracked.machine);
        let told = (Arc::clone(&self.progress), flushes);
        let replication = Replication::start(machine, subject, target, told, host)
            .map_err(PrimaryError::Thread)?;
        *self.replication.lock() = Some(Running {
            replication,
            peer,
            interval,
            pacing,
        });
        Ok(())
    }

    /// Ends the replication: the link is closed when this returns. From then on no flush waits for a replica.
    pub(super) fn end_replication(&self) {
        let running = self.replication.lock().take();
        drop(running);
        if let Some(flushes) = &self.flushes {
            flushes.alone();
        }
    }

    /// The disks, as a replica has to know them.
    pub(super) fn specs(&self) -> Vec<DiskSpec> {
        self.disks.iter().map(spec).collect()
    }

    /// What tracks the machine.
    pub(super) fn machine(&self) -> Option<&Arc<Machine>> {
        self.tracked.as_ref().map(|tracked| &tracked.machine)
    }

    /// Whether the mount is gone.
    pub(super) fn has_ended(&self) -> bool {
        *self.mount.ended().borrow()
    }

    /// Decides whether the guest may write. When this returns, no write is under way that was not judged by it. A flush
    /// that waits for the replica fails when writes are refused: it must not hold up whoever takes the machine away.
    pub(super) fn set_writable(&self, writability: Writability) {
        if let (Some(flushes), Writability::Refused(_)) = (&self.flushes, writability) {
            flushes.close("this host may no longer write the machine");
        }
        for index in 0..self.disks.len() {
            self.mount.set_writable(FileIndex(index), writability);
        }
        if let (Some(flushes), Writability::Writable) = (&self.flushes, writability) {
            flushes.open();
        }
    }

    /// Whoever has a disk open for writing, as far as this process can see; nothing if nobody has.
    pub(super) fn writers(&self) -> Option<Vec<User>> {
        let writers: usize = (0..self.disks.len())
            .map(|index| self.mount.open_writers(FileIndex(index)))
            .sum();
        (writers > 0).then(|| shim::users_of(self.mount.dir()))
    }

    /// From now on disk `index` is its image and nothing else.
    pub(super) fn is_plain(&self, index: usize) {
        let image = self.disks[index].image.clone();
        self.stamped.lock()[index] = Stamped::image(image);
    }

    /// The raw files in the mount.
    pub fn paths(&self) -> Vec<PathBuf> {
        self.disks.iter().map(|disk| self.path(disk)).collect()
    }

    /// Waits until the mount is gone, whoever took it away.
    pub async fn ended(&self) {
        let mut ended = self.mount.ended();
        // An error means that the mount's threads are gone, which is the same answer.
        let _ = ended.wait_for(|ended| *ended).await;
    }

    /// Unmounts and closes. With [`Unmount::IfUnused`] a mount in use is an error, after which everything goes on: a
    /// guest that takes its time to shut down is replicated to the end. With [`Unmount::Detach`] a flush that waits for
    /// the replica fails.
    pub fn stop(&self, how: Unmount) -> Result<(), PrimaryError> {
        self.unmount(how)?;
        self.end_replication();
        let failed = |source: Box<dyn std::error::Error + Send + Sync>| PrimaryError::Close {
            machine: self.name.clone(),
            source,
        };
        if let Some(tracked) = &self.tracked {
            tracked.rest();
            let stamped = self.stamped.lock().clone();
            let mut stamps = |disk: DiskIndex| stamped[disk.index()].take();
            return tracked
                .machine
                .close(&mut stamps)
                .map_err(|error| failed(Box::new(error)));
        }
        for disk in &self.disks {
            disk.disk.close().map_err(|error| failed(Box::new(error)))?;
        }
        Ok(())
    }

    fn unmount(&self, how: Unmount) -> Result<(), UnmountError> {
        let Some(flushes) = self.flushes.as_ref().filter(|_| how == Unmount::Detach) else {
            return self.mount.unmount(how);
        };
        // What waits is waited for by the unmount.
        flushes.close("the disks are being taken away");
        self.mount.unmount(how).inspect_err(|_| flushes.open())
    }

    /// Cuts now and waits until the epoch is durable on the replica.
    pub(super) fn cut_now(&self) -> Result<Lineage, OperateError> {
        let running = self.replication.lock();
        let pending = running
            .as_ref()
            .map(|running| running.replication.request_cut());
        // The lock is free again: a cut may take as long as the link does, and the node must be able to stop.
        drop(running);
        let pending = pending.ok_or_else(|| {
            OperateError::NotNow(format!("machine {} is not replicated", self.name))
        })?;
        pending.wait().map_err(OperateError::NotNow)
    }

    /// The machine's report, apart from its role.
    pub fn machine_status(&self) -> MachineStatus {
        let progress = self.progress.lock();
        let latency = self.mount.latencies().write;
        let running = self.replication.lock();
        let running = running.as_ref();
        let (state, stopped) = match (&self.tracked, running) {
            (Some(tracked), Some(_)) => progress.phase.state(has_point(tracked)),
            _ => (ReplicationState::Disabled, None),
        };
        let tracked = self.tracked.as_ref();
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
            state,
            health,
            reasons,
            generation: None,
            peer: running.map(|running| running.peer.clone()),
            durable: tracked.and_then(|tracked| tracked.machine.lineage()),
            base_epoch: None,
            recovery: None,
            tests: Vec::new(),
            last_test: None,
            rpo,
            sync_on_flush: sync.map(|(status, _)| status),
            copy: progress.copy_status(self.clock.monotonic()),
            traffic,
            write_latency: Some(LatencyStatus::from(&latency)),
            disks: self
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

    fn path(&self, disk: &Source) -> PathBuf {
        self.mount.dir().join(format!("{}.raw", disk.name))
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

impl Drop for Primary {
    fn drop(&mut self) {
        // The mount goes with this, and waits for what is under way.
        if let Some(flushes) = &self.flushes {
            flushes.close("the disks are being taken away");
        }
    }
}

impl Operate for Primary {
    fn status(&self) -> NodeStatus {
        NodeStatus {
            version: env!("CARGO_PKG_VERSION").into(),
            pid: std::process::id(),
            listening: None,
            at: self.clock.wall(),
            machines: vec![self.machine_status()],
        }
    }

    fn cut(&self, machine: &Name) -> Result<Lineage, OperateError> {
        if *machine == self.name {
            self.cut_now()
        } else {
            Err(OperateError::NoSuchMachine(machine.clone()))
        }
    }
}

fn mount(
    show: &ShowConfig,
    disks: &[Source],
    tracked: Option<&Tracked>,
    flushes: Option<&Arc<Flushes>>,
) -> Result<Mount, PrimaryError> {
    let mut options = MountOptions::new(&show.at);
    options.access = show.visibility;
    options.threads = show.threads;
    if let Some(owner) = show.owner {
        options.owner = owner;
    }
    let writability = if show.fenced || show.access == Access::ReadOnly {
        Writability::Refused(Refusal::ReadOnly)
    } else {
        Writability::Writable
    };
    let disks = disks.iter().enumerate().map(|(index, disk)| MountedDisk {
        folder: None,
        file_name: disk.name.clone(),
        disk: match (tracked, flushes) {
            (Some(tracked), Some(flushes)) => Arc::new(SyncDisk {
                volume: Arc::clone(&tracked.machine.volumes()[index]),
                machine: Arc::clone(&tracked.machine),
                flushes: Arc::clone(flushes),
            }),
            (Some(tracked), None) => Arc::clone(&tracked.machine.volumes()[index]) as Arc<dyn Disk>,
            (None, _) => Arc::clone(&disk.disk),
        },
        writability,
    });
    Ok(shim::mount(&options, disks.collect())?)
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
    let problems: Vec<_> = stopped.chain(lost).collect();
    (!problems.is_empty()).then(|| problems.join("; "))
}
