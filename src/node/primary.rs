//! A primary: a machine's images opened, tracked, shown in a mount, replicated.
//!
//! Order matters at both ends. Start: open and lock the images, restore what tracking knows, mount, and only then dial
//! the replica: a guest never waits for a replica. Stop: end the replication, unmount (no write can come any more),
//! close the machine (flush, record that it was clean), and only then let go of the locks.

use std::{fs, io, path::PathBuf, sync::Arc, time::Duration};

use parking_lot::Mutex;
use tokio::runtime::Handle;

pub use super::images::ImageConfig;
use super::{
    control::{Operate, OperateError},
    driver::{Host, Replication, Subject, Target},
    images::{ImageError, OpenImage, stamp},
    progress::{Phase, Progress},
    status::{DiskStatus, LatencyStatus, MachineStatus, NodeStatus, RpoStatus, TrafficStatus},
};
use crate::{
    base::{
        clock::{Clock, SystemClock},
        ids::{Generation, Ids, Lineage, MachineId, Name, SystemIds},
        limits::PRESERVE_BYTES_MAX,
        units::{BLOCK_BYTES, DiskIndex},
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
    storage::{
        file::FileFolder,
        ledger::{Ledger, LedgerError},
    },
    track::{intent::HOT_REGIONS_MAX, state::StateDir},
    volume::{self, DiskSource, Machine, MachineOptions, MachineState},
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

/// What stands between the guest and the images.
#[derive(Debug)]
enum Tracking {
    Off,
    On {
        machine: Arc<Machine>,
        id: MachineId,
        generation: Generation,
        _lock: fs::File,
    },
}

/// A machine that is being served.
#[derive(Debug)]
pub struct Primary {
    config: PrimaryConfig,
    clock: Arc<dyn Clock>,
    images: Vec<OpenImage>,
    tracking: Tracking,
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
        let images = config
            .images
            .iter()
            .map(|image| OpenImage::open(image, config.access, &ids))
            .collect::<Result<Vec<_>, _>>()?;
        let tracking = track(&config, &images, &clock, &*ids)?;
        let mount = show(&config, &images, &tracking)?;
        let progress = Arc::new(Mutex::new(Progress::default()));
        let replication = match (&tracking, target) {
            (
                Tracking::On {
                    machine,
                    id,
                    generation,
                    ..
                },
                Some(target),
            ) => {
                let subject = Subject {
                    id: *id,
                    name: config.machine.clone(),
                    generation: *generation,
                    disks: images.iter().map(spec).collect(),
                };
                let host = Host {
                    clock: Arc::clone(&clock),
                    ids,
                    runtime,
                };
                let machine = Arc::clone(machine);
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
            tracking,
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

    /// Unmounts and closes. With [`Unmount::IfUnused`] a mount in use is an error, after which everything but the
    /// replication goes on.
    pub fn stop(&self, how: Unmount) -> Result<(), PrimaryError> {
        *self.replication.lock() = None;
        self.mount.unmount(how)?;
        let failed = |source: Box<dyn std::error::Error + Send + Sync>| PrimaryError::Close {
            machine: self.config.machine.clone(),
            source,
        };
        match &self.tracking {
            Tracking::On { machine, .. } => {
                let mut stamps = |disk: DiskIndex| stamp(&self.images[disk.index()].config.path);
                machine
                    .close(&mut stamps)
                    .map_err(|error| failed(Box::new(error)))
            }
            Tracking::Off => self
                .images
                .iter()
                .try_for_each(|image| image.disk.close())
                .map_err(|e| failed(Box::new(e))),
        }
    }

    /// The machine's report.
    pub fn machine_status(&self) -> MachineStatus {
        let progress = self.progress.lock();
        let now = self.clock.wall();
        let latency = self.mount.latencies().write;
        let mut status = MachineStatus {
            name: self.config.machine.clone(),
            id: MachineId(uuid::Uuid::nil()),
            role: Role::Primary,
            state: ReplicationState::Disabled,
            health: crate::coord::state::Health::NotApplicable,
            reasons: Vec::new(),
            generation: Generation {
                number: 0,
                id: uuid::Uuid::nil(),
            },
            peer: self
                .config
                .replication
                .as_ref()
                .map(|replication| replication.to.clone()),
            durable: None,
            base_epoch: None,
            rpo: RpoStatus::default(),
            copy: progress.copy_status(self.clock.monotonic()),
            traffic: TrafficStatus {
                written: latency.bytes(),
                ..TrafficStatus::default()
            },
            write_latency: Some(LatencyStatus::from(&latency)),
            disks: self
                .images
                .iter()
                .map(|image| self.disk_status(image))
                .collect(),
        };
        let mut disk_problem = None;
        let mut stopped = None;
        if let Tracking::On {
            machine,
            id,
            generation,
            ..
        } = &self.tracking
        {
            let counters = machine.counters();
            status.id = *id;
            status.generation = *generation;
            status.durable = machine.lineage();
            status.rpo = progress.rpo.status(
                now,
                counters.open_blocks == 0 && counters.closing_blocks == 0,
            );
            status.traffic.owed =
                (counters.owed_open_blocks + counters.owed_closing_blocks) * BLOCK_BYTES;
            status.traffic.raw = progress.raw;
            status.traffic.sent = progress.sent;
            status.traffic.folded = counters.folded_blocks * BLOCK_BYTES;
            status.traffic.epochs = progress.epochs;
            status.traffic.merged = counters.merged_epochs;
            disk_problem = problem(&machine.state());
            if self.config.replication.is_some() {
                (status.state, stopped) = state_of(&progress.phase, status.durable.is_some());
            }
        }
        let interval = self
            .config
            .replication
            .as_ref()
            .map_or(INTERVAL_DEFAULT, |replication| replication.interval);
        let rpo = status.rpo.now_ms.map(Duration::from_millis);
        let signs = Signs {
            state: status.state,
            stopped,
            disk: disk_problem,
            interval,
            rpo,
        };
        (status.health, status.reasons) = signs.health();
        status
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
        let answer = match &*self.replication.lock() {
            Some(replication) => replication.request_cut(),
            None => {
                return Err(OperateError::NotNow(format!(
                    "machine {machine} is not replicated"
                )));
            }
        };
        // The lock is free again: a cut may take as long as the link does, and the node must be able to stop.
        answer.wait().map_err(OperateError::NotNow)
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

/// What the node remembers of a machine by its name.
#[derive(Clone, Copy, Debug, serde::Serialize, serde::Deserialize)]
struct Known {
    id: MachineId,
    generation: Generation,
}

/// Restores or begins the tracking of a machine.
fn track(
    config: &PrimaryConfig,
    images: &[OpenImage],
    clock: &Arc<dyn Clock>,
    ids: &dyn Ids,
) -> Result<Tracking, PrimaryError> {
    let Some(state) = &config.state else {
        return Ok(Tracking::Off);
    };
    let path = state.join(config.machine.as_str());
    let failed = |source| PrimaryError::State {
        path: path.clone(),
        source,
    };
    let folder = FileFolder::open(&path).map_err(failed)?;
    let lock = fs::File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(path.join("lock"))
        .map_err(failed)?;
    match lock.try_lock() {
        Ok(()) => {}
        Err(fs::TryLockError::WouldBlock) => {
            return Err(PrimaryError::StateInUse(config.machine.clone()));
        }
        Err(fs::TryLockError::Error(source)) => return Err(failed(source)),
    }
    let store = crate::storage::Folder::open(&folder, "node.redb", crate::storage::Open::Create)
        .map_err(failed)?;
    let ledger = Arc::new(Ledger::open(store)?);
    let key = format!("name/{}", config.machine);
    let known = match ledger.get::<Known>(&key)? {
        Some(known) => known,
        None => {
            let known = Known {
                id: MachineId(ids.uuid()),
                generation: Generation::first(ids),
            };
            ledger.put(&key, &known)?;
            known
        }
    };
    let boot_id = fs::read_to_string("/proc/sys/kernel/random/boot_id")
        .map_err(failed)?
        .trim()
        .to_owned();
    let options = MachineOptions {
        id: known.id,
        name: config.machine.clone(),
        clock: Arc::clone(clock),
        boot_id,
        preserve_bytes_max: PRESERVE_BYTES_MAX,
        hot_regions_max: HOT_REGIONS_MAX,
    };
    let sources = images.iter().map(|image| DiskSource {
        name: image.config.name.clone(),
        disk: Arc::clone(&image.disk),
        stamp: image.stamp,
    });
    let state_dir = StateDir::open(&path).map_err(failed)?;
    let machine =
        Machine::open(options, sources.collect(), &state_dir, ledger).map_err(|source| {
            PrimaryError::Track {
                machine: config.machine.clone(),
                source,
            }
        })?;
    Ok(Tracking::On {
        machine,
        id: known.id,
        generation: known.generation,
        _lock: lock,
    })
}

fn show(
    config: &PrimaryConfig,
    images: &[OpenImage],
    tracking: &Tracking,
) -> Result<Mount, PrimaryError> {
    let mut options = MountOptions::new(&config.at);
    options.access = config.visibility;
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
        disk: match tracking {
            Tracking::Off => Arc::clone(&image.disk),
            Tracking::On { machine, .. } => Arc::clone(&machine.volumes()[index]) as Arc<dyn Disk>,
        },
        writability,
    });
    Ok(shim::mount(&options, disks.collect())?)
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
