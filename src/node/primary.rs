//! A primary: a machine's disks tracked, shown in a mount, replicated.
//!
//! Order matters at both ends. Start: open and lock the images, restore what tracking knows, mount, and only then dial
//! the replica: a guest never waits for a replica. Stop: unmount (no write can come any more), end the
//! replication, close the machine (flush, record that it was clean), and only then let go of the locks.

mod grow;
mod status;

pub(super) use grow::GrowError;

use std::{
    io,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use parking_lot::{Mutex, RwLock};

pub use super::images::ImageConfig;
use super::{
    control::{ExportReport, Operate, OperateError, VerifyRequest},
    driver::{Host, Pending, Replication, Subject, Target},
    images::ImageError,
    pacing::Pacing,
    progress::{Phase, Progress},
    sources::{Source, Stamped, open_images, spec},
    status::NodeStatus,
    sync_flush::{Flushes, SyncDisk, SyncOnFlush},
    tracking::{Tracked, Tracking},
};
use crate::{
    base::{
        clock::{Clock, SystemClock, Timestamp},
        ids::{Ids, Lineage, Name, SystemIds},
        units::{DiskIndex, Epoch},
    },
    disk::{Access, Disk},
    protocol::message::DiskSpec,
    shim::{
        self, FileIndex, Mount, MountError, MountOptions, MountedDisk, Mounter, Owner, Refusal,
        Unmount, UnmountError, User, Visibility, Writability,
    },
    storage::ledger::LedgerError,
    volume::{self, Machine},
};

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
    /// Who makes the mount.
    pub mounter: Mounter,
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
            mounter: Mounter::Itself,
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
    /// Others once a disk has grown.
    opened: RwLock<Arc<Opened>>,
    /// Whose stamp is taken at the end, for each disk.
    stamped: Mutex<Vec<Stamped>>,
    /// The guest's flushes, if they wait for the replica.
    flushes: Option<Arc<Flushes>>,
    mount: Mount,
    replication: Mutex<Option<Running>>,
    progress: Arc<Mutex<Progress>>,
}

/// The open disks, and what tracks them.
#[derive(Debug)]
struct Opened {
    disks: Vec<Source>,
    tracked: Option<Tracked>,
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
    /// Nothing while it is suspended.
    replication: Option<Replication>,
    peer: String,
    interval: Duration,
    pacing: Pacing,
}

impl Running {
    /// What there is to tell of a replication that does not run.
    fn suspended(target: &Target) -> Self {
        Self {
            replication: None,
            peer: target.callee.address.clone(),
            interval: target.interval,
            pacing: target.pacing.clone(),
        }
    }
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
        let stamped = disks.iter().map(|disk| disk.stamped.0.clone()).collect();
        let opened = Opened { disks, tracked };
        let mount = mount(show, &opened, flushes.as_ref())?;
        Ok(Self {
            name,
            clock,
            opened: RwLock::new(Arc::new(opened)),
            stamped: Mutex::new(stamped),
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
        let Some(machine) = self.machine() else {
            return Ok(());
        };
        let before = self.replication.lock().take();
        drop(before);
        let flushes = self.flushes.clone();
        if let Some(flushes) = &flushes {
            flushes.unlinked("connecting to the replica");
        }
        let mut running = Running::suspended(&target);
        let told = (Arc::clone(&self.progress), flushes);
        let replication = Replication::start(machine, subject, target, told, host)
            .map_err(PrimaryError::Thread)?;
        running.replication = Some(replication);
        *self.replication.lock() = Some(running);
        Ok(())
    }

    /// Ends the replication until [`replicate`](Self::replicate) is called again. What is under way may end first, for a
    /// moment. The guest's flushes stand as if the link were lost.
    pub(super) fn suspend(&self, target: &Target, since: Timestamp) {
        let running = self.replication.lock().replace(Running::suspended(target));
        if let Some(replication) = running.and_then(|running| running.replication) {
            replication.suspend();
        }
        self.progress.lock().phase = Phase::Suspended(since);
        if let Some(flushes) = &self.flushes {
            flushes.unlinked("the machine is suspended");
        }
    }

    /// Ends the replication: the link is closed when this returns. From then on no flush waits for a replica.
    pub(super) fn end_replication(&self) {
        let running = self.replication.lock().take();
        drop(running);
        if let Some(flushes) = &self.flushes {
            flushes.alone();
        }
    }

    /// Whether the replica has nothing, as far as is known, so that an initial copy is what comes next.
    pub(super) fn needs_copy(&self) -> bool {
        let told = matches!(self.progress.lock().phase, Phase::CopyWaits(_));
        let head = self.machine().and_then(|machine| machine.lineage());
        told || head.is_none_or(|head| head.epoch == Epoch::INITIAL)
    }

    fn opened(&self) -> Arc<Opened> {
        Arc::clone(&self.opened.read())
    }

    /// The disks, as a replica has to know them.
    pub(super) fn specs(&self) -> Vec<DiskSpec> {
        self.opened().disks.iter().map(spec).collect()
    }

    /// What tracks the machine.
    pub(super) fn machine(&self) -> Option<Arc<Machine>> {
        let opened = self.opened();
        let tracked = opened.tracked.as_ref()?;
        Some(Arc::clone(&tracked.machine))
    }

    /// Whether the mount is gone.
    pub(super) fn has_ended(&self) -> bool {
        *self.mount.ended().borrow()
    }

    /// The guest may not write from here on. Returns when no write is under way any more.
    pub(super) fn refuse_writes(&self) {
        self.set_writable(Writability::Refused(Refusal::ReadOnly));
    }

    /// Decides whether the guest may write. When this returns, no write is under way that was not judged by it. A flush
    /// that waits for the replica fails when writes are refused: it must not hold up whoever takes the machine away.
    pub(super) fn set_writable(&self, writability: Writability) {
        if let (Some(flushes), Writability::Refused(_)) = (&self.flushes, writability) {
            flushes.close("this host may no longer write the machine");
        }
        for index in 0..self.opened().disks.len() {
            self.mount.set_writable(FileIndex(index), writability);
        }
        if let (Some(flushes), Writability::Writable) = (&self.flushes, writability) {
            flushes.open();
        }
    }

    /// Whoever has a disk open for writing, as far as this process can see; nothing if nobody has.
    pub(super) fn writers(&self) -> Option<Vec<User>> {
        let writers: usize = (0..self.opened().disks.len())
            .map(|index| self.mount.open_writers(FileIndex(index)))
            .sum();
        (writers > 0).then(|| shim::users_of(self.mount.dir()))
    }

    /// From now on disk `index` is its image and nothing else.
    pub(super) fn is_plain(&self, index: usize) {
        let image = self.opened().disks[index].image.clone();
        self.stamped.lock()[index] = Stamped::image(image);
    }

    /// The raw files in the mount.
    pub fn paths(&self) -> Vec<PathBuf> {
        let opened = self.opened();
        opened.disks.iter().map(|disk| self.path(disk)).collect()
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
        let opened = self.opened();
        if let Some(tracked) = &opened.tracked {
            return self.close(tracked);
        }
        for disk in &opened.disks {
            disk.disk
                .close()
                .map_err(|error| self.unclosed(Box::new(error)))?;
        }
        Ok(())
    }

    /// Closes the disks and their tracking: no request is under way and no replication runs.
    fn close(&self, tracked: &Tracked) -> Result<(), PrimaryError> {
        tracked.rest();
        let stamped = self.stamped.lock().clone();
        let mut stamps = |disk: DiskIndex| stamped[disk.index()].take();
        let closed = tracked.machine.close(&mut stamps);
        closed.map_err(|error| self.unclosed(Box::new(error)))
    }

    fn unclosed(&self, source: Box<dyn std::error::Error + Send + Sync>) -> PrimaryError {
        PrimaryError::Close {
            machine: self.name.clone(),
            source,
        }
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
        self.request(Replication::request_cut, OperateError::NotNow)
    }

    /// Begins to compare everything with the replica.
    pub(super) fn resync_now(&self) -> Result<(), OperateError> {
        self.request(Replication::request_resync, OperateError::NotNow)
    }

    /// Begins to compare the replica's points with the disks.
    pub(super) fn verify_now(&self, request: VerifyRequest) -> Result<(), OperateError> {
        let what = |replication: &Replication| replication.request_verify(request);
        self.request(what, OperateError::NotNow)
    }

    /// Writes the initial copy into a folder.
    pub(super) fn export(&self, folder: &Path) -> Result<ExportReport, OperateError> {
        let what = |replication: &Replication| replication.request_export(folder.to_owned());
        self.request(what, |error| error)
    }

    fn request<T, E>(
        &self,
        what: impl FnOnce(&Replication) -> Pending<T, E>,
        told: impl FnOnce(E) -> OperateError,
    ) -> Result<T, OperateError> {
        let running = self.replication.lock();
        let pending = match running.as_ref() {
            None => Err(format!("machine {} is not replicated", self.name)),
            Some(running) => running.replication.as_ref().map(what).ok_or_else(|| {
                format!(
                    "machine {0} is suspended: `understudy resume {0}` first",
                    self.name
                )
            }),
        };
        // The lock is free again: a cut may take as long as the link does, and the node must be able to stop.
        drop(running);
        let pending = pending.map_err(OperateError::NotNow)?;
        let stopped = || OperateError::NotNow("replication has stopped".into());
        pending.wait().ok_or_else(stopped)?.map_err(told)
    }

    fn path(&self, disk: &Source) -> PathBuf {
        self.mount.dir().join(format!("{}.raw", disk.name))
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
            coordinates: Vec::new(),
        }
    }

    fn cut(&self, machine: &Name) -> Result<Lineage, OperateError> {
        if *machine == self.name {
            self.cut_now()
        } else {
            Err(OperateError::NoSuchMachine(machine.clone()))
        }
    }

    fn resync(&self, machine: &Name) -> Result<(), OperateError> {
        if *machine == self.name {
            self.resync_now()
        } else {
            Err(OperateError::NoSuchMachine(machine.clone()))
        }
    }

    fn verify(&self, machine: &Name, request: VerifyRequest) -> Result<(), OperateError> {
        if *machine == self.name {
            self.verify_now(request)
        } else {
            Err(OperateError::NoSuchMachine(machine.clone()))
        }
    }
}

/// What the guest writes to, for each disk.
fn shown(opened: &Opened, flushes: Option<&Arc<Flushes>>) -> Vec<Arc<dyn Disk>> {
    let disks = opened.disks.iter().enumerate();
    let shown = disks.map(|(index, disk)| -> Arc<dyn Disk> {
        match (&opened.tracked, flushes) {
            (Some(tracked), Some(flushes)) => Arc::new(SyncDisk {
                volume: Arc::clone(&tracked.machine.volumes()[index]),
                machine: Arc::clone(&tracked.machine),
                flushes: Arc::clone(flushes),
            }),
            (Some(tracked), None) => Arc::clone(&tracked.machine.volumes()[index]) as _,
            (None, _) => Arc::clone(&disk.disk),
        }
    });
    shown.collect()
}

fn mount(
    show: &ShowConfig,
    opened: &Opened,
    flushes: Option<&Arc<Flushes>>,
) -> Result<Mount, PrimaryError> {
    let mut options = MountOptions::new(&show.at);
    options.access = show.visibility;
    options.threads = show.threads;
    options.mounter = show.mounter.clone();
    if let Some(owner) = show.owner {
        options.owner = owner;
    }
    let writability = if show.fenced || show.access == Access::ReadOnly {
        Writability::Refused(Refusal::ReadOnly)
    } else {
        Writability::Writable
    };
    let disks = opened.disks.iter().zip(shown(opened, flushes));
    let disks = disks.map(|(disk, shown)| MountedDisk {
        folder: None,
        file_name: disk.name.clone(),
        disk: shown,
        writability,
    });
    Ok(shim::mount(&options, disks.collect())?)
}
