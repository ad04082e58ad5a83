//! A primary: a machine's images opened, tracked, shown in a mount, replicated.
//!
//! Order matters at both ends. Start: open and lock the images, restore what tracking knows, mount, and only then dial
//! the replica: a guest never waits for a replica. Stop: unmount (no write can come any more), end the
//! replication, close the machine (flush, record that it was clean), and only then let go of the locks.

use std::{io, path::PathBuf, sync::Arc, time::Duration};

use parking_lot::Mutex;
use tokio::runtime::Handle;

pub use super::images::ImageConfig;
use super::{
    control::{Operate, OperateError},
    driver::{Host, Replication, Subject, Target},
    images::{ImageError, OpenImage, stamp},
    progress::{Phase, Progress},
    status::{DiskStatus, LatencyStatus, MachineStatus, NodeStatus, RpoStatus, TrafficStatus},
    tracking::Tracked,
};
use crate::{
    base::{
        clock::{Clock, SystemClock},
        ids::{Ids, Lineage, Name, SystemIds},
        units::{BLOCK_BYTES, DiskIndex, Epoch},
    },
    coord::state::{ReplicationState, Role, Signs},
    delta::policy::Setting,
    disk::{Access, Disk},
    net::{Identity, IdentityError},
    protocol::message::DiskSpec,
    shim::{
        self, Mount, MountError, MountOptions, MountedDisk, Owner, Unmount, UnmountError,
        Visibility, Writability,
    },
    storage::ledger::LedgerError,
    volume::{self, MachineState},
};

/// The interval that health is judged by where none is configured.
const INTERVAL_DEFAULT: Duration = Duration::from_secs(1);

/// A machine to serve.
#[derive(Clone, Debug)]
pub struct PrimaryConfig {
    /// The machine's name.
    pub machine: Name,
    /// Its images.
    pub images: Vec<ImageConfig>,
    /// Where to mount.
    pub at: PathBuf,
    /// Whether the guest may write.
    pub access: Access,
    /// Who may open the files.
    pub visibility: Visibility,
    /// Whom the files belong to, if not this process's user.
    pub owner: Option<Owner>,
    /// Threads that serve the mount.
    pub threads: usize,
    /// Folder of the tracking state; nothing is tracked without it.
    pub state: Option<PathBuf>,
    /// Where to replicate to.
    pub replication: Option<ReplicationConfig>,
}

/// Where and how to replicate.
#[derive(Clone, Debug)]
pub struct ReplicationConfig {
    /// The replica, as `HOST:PORT`.
    pub to: String,
    /// Folder of this host's identity.
    pub identity: PathBuf,
    /// Name in the replica's certificate, if not the host's.
    pub peer: Option<Name>,
    /// Time from one cut to the next.
    pub interval: Duration,
    /// Compression on the link.
    pub compression: Setting,
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
    /// Another node uses the state folder.
    #[error("the state of machine {0} is in use by another node")]
    StateInUse(Name),
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
    /// The mount cannot be made.
    #[error(transparent)]
    Mount(#[from] MountError),
    /// The mount is still in use.
    #[error(transparent)]
    Unmount(#[from] UnmountError),
    /// This host's certificate is not usable.
    #[error(transparent)]
    Identity(#[from] IdentityError),
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
    config: PrimaryConfig,
    clock: Arc<dyn Clock>,
    images: Vec<OpenImage>,
    tracked: Option<Tracked>,
    mount: Mount,
    replication: Mutex<Option<Replication>>,
    progress: Arc<Mutex<Progress>>,
}

impl Primary {
    /// Opens, mounts and begins to replicate. Blocks while images are opened.
    pub fn start(config: PrimaryConfig, runtime: Handle) -> Result<Self, PrimaryError> {
        let clock: Arc<dyn Clock> = Arc::new(SystemClock::default());
        let ids: Arc<dyn Ids> = Arc::new(SystemIds::default());
        for (index, image) in config.images.iter().enumerate() {
            if config.images[..index]
                .iter()
                .any(|other| other.name == image.name)
            {
                return Err(PrimaryError::DuplicateDisk(image.name.clone()));
            }
        }
        let target = config.replication.as_ref().map(target).transpose()?;
        let open = |image| OpenImage::open(image, config.access, &ids);
        let images = config
            .images
            .iter()
            .map(open)
            .collect::<Result<Vec<_>, _>>()?;
        let state = config.state.as_ref();
        let tracked = state
            .map(|state| Tracked::open(&config.machine, state, &images, &clock, &*ids))
            .transpose()?;
        let mount = show(&config, &images, tracked.as_ref())?;
        let progress = Arc::new(Mutex::new(Progress::default()));
        let replication = match (&tracked, target) {
            (Some(tracked), Some(target)) => {
                let subject = Subject {
                    id: tracked.id,
                    name: config.machine.clone(),
                    generation: tracked.generation,
                    disks: images.iter().map(spec).collect(),
                };
                let host = Host {
                    clock: Arc::clone(&clock),
                    ids,
                    runtime,
                };
                let machine = Arc::clone(&tracked.machine);
                let started =
                    Replication::start(machine, subject, target, Arc::clone(&progress), host);
                Some(started.map_err(PrimaryError::Thread)?)
            }
            _ => None,
        };
        let replication = Mutex::new(replication);
        Ok(Self {
            config,
            clock,
            images,
            tracked,
            mount,
            replication,
            progress,
        })
    }

    /// The raw files in the mount.
    pub fn paths(&self) -> Vec<PathBuf> {
        self.images.iter().map(|image| self.path(image)).collect()
    }

    /// Waits until the mount is gone, whoever took it away.
    pub async fn ended(&self) {
        let mut ended = self.mount.ended();
        // An error means that the mount's threads are gone, which is the same answer.
        let _ = ended.wait_for(|ended| *ended).await;
    }

    /// Unmounts and closes. With [`Unmount::IfUnused`] a mount in use is an error, after which everything goes on: a
    /// guest that takes its time to shut down is replicated to the end.
    pub fn stop(&self, how: Unmount) -> Result<(), PrimaryError> {
        self.mount.unmount(how)?;
        *self.replication.lock() = None;
        let failed = |source: Box<dyn std::error::Error + Send + Sync>| PrimaryError::Close {
            machine: self.config.machine.clone(),
            source,
        };
        if let Some(tracked) = &self.tracked {
            tracked.rest();
            let mut stamps = |disk: DiskIndex| stamp(&self.images[disk.index()].config.path);
            return tracked
                .machine
                .close(&mut stamps)
                .map_err(|error| failed(Box::new(error)));
        }
        for image in &self.images {
            image
                .disk
                .close()
                .map_err(|error| failed(Box::new(error)))?;
        }
        Ok(())
    }

    /// The machine's report.
    pub fn machine_status(&self) -> MachineStatus {
        let progress = self.progress.lock();
        let latency = self.mount.latencies().write;
        let replication = self.config.replication.as_ref();
        let (state, stopped) = match (&self.tracked, replication) {
            (Some(tracked), Some(_)) => state_of(&progress.phase, has_point(tracked)),
            _ => (ReplicationState::Disabled, None),
        };
        let tracked = self.tracked.as_ref();
        let rpo = tracked.map_or_else(RpoStatus::default, |tracked| self.rpo(&progress, tracked));
        let signs = Signs {
            state,
            stopped,
            disk: tracked.and_then(|tracked| problem(&tracked.machine.state())),
            points: None,
            interval: replication.map_or(INTERVAL_DEFAULT, |replication| replication.interval),
            rpo: rpo.now_ms.map(Duration::from_millis),
        };
        let (health, reasons) = signs.health();
        let mut traffic = tracked.map_or_else(TrafficStatus::default, |tracked| {
            traffic(&progress, tracked)
        });
        traffic.written = latency.bytes();
        MachineStatus {
            name: self.config.machine.clone(),
            id: tracked.map(|tracked| tracked.id),
            role: Role::Primary,
            state,
            health,
            reasons,
            generation: tracked.map(|tracked| tracked.generation),
            peer: replication.map(|replication| replication.to.clone()),
            durable: tracked.and_then(|tracked| tracked.machine.lineage()),
            base_epoch: None,
            recovery: None,
            tests: Vec::new(),
            last_test: None,
            rpo,
            copy: progress.copy_status(self.clock.monotonic()),
            traffic,
            write_latency: Some(LatencyStatus::from(&latency)),
            disks: self
                .images
                .iter()
                .map(|image| self.disk_status(image))
                .collect(),
        }
    }

    fn rpo(&self, progress: &Progress, tracked: &Tracked) -> RpoStatus {
        let counters = tracked.machine.counters();
        let unchanged = counters.open_blocks == 0 && counters.closing_blocks == 0;
        progress.rpo.status(self.clock.wall(), unchanged)
    }

    fn path(&self, image: &OpenImage) -> PathBuf {
        self.mount.dir().join(format!("{}.raw", image.config.name))
    }

    fn disk_status(&self, image: &OpenImage) -> DiskStatus {
        DiskStatus {
            name: image.config.name.clone(),
            size: image.disk.geometry().size,
            image: image.config.path.display().to_string(),
            format: image.config.format.to_string(),
            path: Some(self.path(image).display().to_string()),
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
        if *machine != self.config.machine {
            return Err(OperateError::NoSuchMachine(machine.clone()));
        }
        let pending = self
            .replication
            .lock()
            .as_ref()
            .map(Replication::request_cut);
        // The lock is free again: a cut may take as long as the link does, and the node must be able to stop.
        let pending = pending
            .ok_or_else(|| OperateError::NotNow(format!("machine {machine} is not replicated")))?;
        pending.wait().map_err(OperateError::NotNow)
    }
}

fn target(config: &ReplicationConfig) -> Result<Target, PrimaryError> {
    Ok(Target {
        address: config.to.clone(),
        peer: config.peer.clone(),
        identity: Identity::load(&config.identity)?,
        interval: config.interval,
        compression: config.compression,
    })
}

fn spec(image: &OpenImage) -> DiskSpec {
    let geometry = image.disk.geometry();
    DiskSpec {
        name: image.config.name.clone(),
        size: geometry.size,
        logical_sector: geometry.logical_sector,
        physical_sector: geometry.physical_sector,
        format: image.config.format.to_string(),
    }
}

fn show(
    config: &PrimaryConfig,
    images: &[OpenImage],
    tracked: Option<&Tracked>,
) -> Result<Mount, PrimaryError> {
    let mut options = MountOptions::new(&config.at);
    options.access = config.visibility;
    options.threads = config.threads;
    if let Some(owner) = config.owner {
        options.owner = owner;
    }
    let writability = match config.access {
        Access::ReadOnly => Writability::Refused(shim::Refusal::ReadOnly),
        Access::ReadWrite => Writability::Writable,
    };
    let disks = images.iter().enumerate().map(|(index, image)| MountedDisk {
        folder: None,
        file_name: image.config.name.clone(),
        disk: match tracked {
            Some(tracked) => Arc::clone(&tracked.machine.volumes()[index]) as Arc<dyn Disk>,
            None => Arc::clone(&image.disk),
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

/// The state a person sees, and why replication does not go on where it does not.
fn state_of(phase: &Phase, complete: bool) -> (ReplicationState, Option<String>) {
    match phase {
        Phase::Connecting if complete => (
            ReplicationState::Suspended,
            Some("connecting to the replica".into()),
        ),
        Phase::Connecting => (ReplicationState::ReadyForInitialReplication, None),
        Phase::Copying => (ReplicationState::InitialReplicationInProgress, None),
        Phase::Replicating => (ReplicationState::Replicating, None),
        Phase::Unreachable(why) if complete => (ReplicationState::Suspended, Some(why.clone())),
        Phase::Unreachable(why) => (
            ReplicationState::ReadyForInitialReplication,
            Some(why.clone()),
        ),
        Phase::Refused(why) => (ReplicationState::Error, Some(why.clone())),
    }
}
