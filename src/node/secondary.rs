//! A secondary: receives machines from primaries, keeps their replicas, merges in the background.
//!
//! The store's folder holds `node.redb`, the node's records, and a folder for each machine. A machine is bound to its
//! name by its first greeting: later ones with the same name and another identity are refused, so that nobody's replica
//! is ever overwritten by a namesake.

use std::{
    collections::BTreeMap, fs, io, net::SocketAddr, path::PathBuf, sync::Arc, thread,
    time::Duration,
};

use crossbeam_channel::{Receiver as WakeReceiver, Sender as WakeSender, bounded};
use parking_lot::Mutex;

use super::{
    control::{Operate, OperateError},
    driver::chain,
    session::{self, SharedProgress},
    status::{DiskStatus, MachineStatus, NodeStatus, TrafficStatus},
};
use crate::{
    base::{
        clock::{Clock, SystemClock},
        ids::{Generation, Ids, Lineage, MachineId, Name, SystemIds},
    },
    coord::state::{Health, ReplicationState, Role, Signs},
    disk::{
        Access, Disk, Geometry,
        image::{self, Format},
    },
    net::{
        Allow, BindError, Control, ControlReceiver, ControlSender, Identity, IdentityError, Link,
        Listener, Reason,
    },
    protocol::{
        message::{self, Hello, Refusal, ToPrimary, ToReplica},
        receiver::Receiver,
    },
    replica::{
        self, Head, ImageError, ImageFormat, Images, MachineReplica, ReplicaError, ReplicaOptions,
        Retention,
    },
    storage::{
        Folder, Open, Storage,
        file::FileFolder,
        ledger::{Ledger, LedgerError},
    },
};

/// How long a peer may take to say hello.
const HELLO_WITHIN: Duration = Duration::from_secs(10);
/// How long a new connection waits for the one it replaces to end.
const REPLACE_WITHIN: Duration = Duration::from_secs(10);
/// Pause before a failed merge is tried again.
const MERGE_AGAIN: Duration = Duration::from_secs(10);

/// What to receive, and where to keep it.
#[derive(Clone, Debug)]
pub struct SecondaryConfig {
    /// Folder of the replicas.
    pub store: PathBuf,
    /// Where to listen.
    pub listen: SocketAddr,
    /// Folder of this host's identity.
    pub identity: PathBuf,
    /// Hosts that may replicate to here.
    pub allow: Vec<Name>,
    /// Format of the images, if not the primary's.
    pub format: Option<Format>,
    /// Newest epochs kept as delta logs.
    pub keep: u32,
}

/// Why a secondary cannot start or stop.
#[derive(Debug, thiserror::Error)]
pub enum SecondaryError {
    /// The store's folder cannot be used.
    #[error("cannot use the store {}", path.display())]
    Store {
        /// The folder.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// Another node uses the store.
    #[error("the store {} is in use by another node", .0.display())]
    InUse(PathBuf),
    /// The node's records failed.
    #[error(transparent)]
    Ledger(#[from] LedgerError),
    /// A replica in the store cannot be opened.
    #[error("cannot open the replica of machine {name}")]
    Replica {
        /// The machine.
        name: Name,
        /// Why.
        #[source]
        source: ReplicaError,
    },
    /// This host's certificate is not usable.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// The address cannot be listened on.
    #[error(transparent)]
    Bind(#[from] BindError),
    /// The listener died.
    #[error("the listener ended: {0}")]
    Listener(String),
}

/// One machine's replica and what belongs to it.
#[derive(Debug)]
pub(super) struct Served {
    pub(super) id: MachineId,
    pub(super) name: Name,
    pub(super) store: Arc<MachineReplica>,
    pub(super) progress: SharedProgress,
    pub(super) clock: Arc<dyn Clock>,
    folder: PathBuf,
    wake: WakeSender<()>,
    /// The connection that feeds it: one at a time.
    turn: tokio::sync::Mutex<()>,
    link: Mutex<Option<Link>>,
}

impl Served {
    /// There is something to merge.
    pub(super) fn wake_merge(&self) {
        // Full means that it was woken already.
        let _ = self.wake.try_send(());
    }
}

#[derive(Debug)]
struct Shared {
    config: SecondaryConfig,
    clock: Arc<dyn Clock>,
    ledger: Arc<Ledger>,
    folder: FileFolder,
    machines: Mutex<BTreeMap<Name, Arc<Served>>>,
    merges: Mutex<Vec<thread::JoinHandle<()>>>,
    _lock: fs::File,
}

/// A running secondary.
#[derive(Debug)]
pub struct Secondary {
    shared: Arc<Shared>,
    listener: tokio::sync::Mutex<Option<Listener>>,
    address: SocketAddr,
}

impl Secondary {
    /// Opens the store with all its replicas and listens. Called within the runtime.
    pub fn start(config: SecondaryConfig) -> Result<Self, SecondaryError> {
        let path = &config.store;
        let failed = |source| SecondaryError::Store {
            path: path.clone(),
            source,
        };
        let identity = Identity::load(&config.identity)?;
        let folder = FileFolder::open(path).map_err(failed)?;
        let lock = fs::File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(path.join("lock"))
            .map_err(failed)?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(fs::TryLockError::WouldBlock) => return Err(SecondaryError::InUse(path.clone())),
            Err(fs::TryLockError::Error(source)) => return Err(failed(source)),
        }
        let ledger = Arc::new(Ledger::open(
            folder.open("node.redb", Open::Create).map_err(failed)?,
        )?);
        let listener = Listener::bind(
            config.listen,
            &identity,
            config.allow.iter().cloned().collect::<Allow>(),
        )?;
        let address = listener
            .address()
            .map_err(|error| SecondaryError::Listener(error.to_string()))?;
        let clock: Arc<dyn Clock> = Arc::new(SystemClock::default());
        let (machines, merges) = (Mutex::default(), Mutex::default());
        let shared = Arc::new(Shared {
            config,
            clock,
            ledger,
            folder,
            machines,
            merges,
            _lock: lock,
        });
        shared.open_known()?;
        tracing::info!(%address, "accepting primaries");
        Ok(Self {
            shared,
            listener: tokio::sync::Mutex::new(Some(listener)),
            address,
        })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Accepts primaries until the listener ends, which is always an error.
    pub async fn run(&self) -> Result<(), SecondaryError> {
        let mut listener = self.listener.lock().await;
        let Some(listener) = listener.as_mut() else {
            return Err(SecondaryError::Listener("closed".into()));
        };
        loop {
            match listener.accept().await {
                Ok((link, control)) => {
                    tokio::spawn(greet(Arc::clone(&self.shared), link, control));
                }
                Err(error) if error.is_final() => {
                    return Err(SecondaryError::Listener(chain(&error)));
                }
                Err(error) => tracing::warn!("a connection was refused: {}", chain(&error)),
            }
        }
    }

    /// Ends all connections, waits for merges, closes the images.
    pub async fn stop(&self) -> Result<(), SecondaryError> {
        if let Some(listener) = self.listener.lock().await.take() {
            listener
                .close(Reason::Stopping, "the replica is being stopped")
                .await;
        }
        let served: Vec<_> = std::mem::take(&mut *self.shared.machines.lock())
            .into_values()
            .collect();
        for machine in &served {
            // The session is over when it gives its turn back.
            drop(machine.turn.lock().await);
        }
        let closing: Vec<_> = served
            .iter()
            .map(|machine| (machine.name.clone(), Arc::clone(&machine.store)))
            .collect();
        drop(served);
        let merges = std::mem::take(&mut *self.shared.merges.lock());
        let closed = tokio::task::spawn_blocking(move || {
            for merge in merges {
                // A merge that panicked has said so; the next open redoes it.
                let _ = merge.join();
            }
            closing.iter().try_for_each(|(name, store)| {
                store.close().map_err(|source| SecondaryError::Replica {
                    name: name.clone(),
                    source,
                })
            })
        });
        closed
            .await
            .map_err(|panic| SecondaryError::Listener(panic.to_string()))?
    }
}

impl Operate for Secondary {
    fn status(&self) -> NodeStatus {
        let machines: Vec<_> = self.shared.machines.lock().values().cloned().collect();
        NodeStatus {
            version: env!("CARGO_PKG_VERSION").into(),
            pid: std::process::id(),
            listening: Some(self.address),
            at: self.shared.clock.wall(),
            machines: machines.iter().map(|machine| machine.status()).collect(),
        }
    }

    fn cut(&self, machine: &Name) -> Result<Lineage, OperateError> {
        Err(OperateError::NoSuchMachine(machine.clone()))
    }
}

impl Served {
    fn status(&self) -> MachineStatus {
        let store = self.store.status();
        let progress = self.progress.lock();
        let state = match store.head {
            _ if progress.problem.is_some() => ReplicationState::Error,
            Head::Empty => ReplicationState::WaitingForInitialReplication,
            Head::Copying | Head::Copied(_) => ReplicationState::InitialReplicationInProgress,
            Head::Complete(_) => ReplicationState::Replicating,
        };
        let now = self.clock.wall();
        let mut rpo = progress.rpo.status(now, false);
        if rpo.now_ms.is_none() {
            // Nothing received since this node started: the last point is as old as its cut.
            rpo.now_ms = store
                .last_cut
                .map(|cut| super::status::millis(now.since(cut)));
        }
        let signs = Signs {
            state,
            stopped: progress.problem.clone(),
            disk: None,
            interval: Duration::from_secs(1),
            rpo: rpo.now_ms.map(Duration::from_millis),
        };
        let (health, reasons) = match (&progress.connected, signs.health()) {
            (None, (health, mut reasons)) => {
                reasons.push("the primary is not connected".into());
                (health.max(Health::Warning), reasons)
            }
            (Some(_), judged) => judged,
        };
        let disks = store.images.iter().map(|image| DiskStatus {
            name: image.name.clone(),
            size: image.geometry.size,
            image: self.folder.join(&image.file).display().to_string(),
            format: image.format.to_string(),
            path: None,
        });
        MachineStatus {
            name: self.name.clone(),
            id: self.id,
            role: Role::Replica,
            state,
            health,
            reasons,
            generation: store.generation.unwrap_or(Generation {
                number: 0,
                id: uuid::Uuid::nil(),
            }),
            peer: progress.connected.clone(),
            durable: store.head.lineage(),
            base_epoch: store.base,
            rpo,
            copy: None,
            traffic: TrafficStatus {
                raw: store.counters.image_written,
                sent: store.counters.received,
                epochs: progress.epochs,
                ..TrafficStatus::default()
            },
            write_latency: None,
            disks: disks.collect(),
        }
    }
}

/// Images in every format that [`image`] knows.
#[derive(Debug)]
struct AllImages(Arc<dyn Ids>);

impl AllImages {
    fn format(format: ImageFormat) -> Result<Format, ImageError> {
        match format {
            ImageFormat::Raw => Ok(Format::Raw),
            ImageFormat::Vhdx => Ok(Format::Vhdx),
            ImageFormat::Vhd => {
                Err("VHD images cannot be written; choose a format with --format".into())
            }
        }
    }
}

impl Images for AllImages {
    fn create(
        &self,
        storage: Arc<dyn Storage>,
        format: ImageFormat,
        geometry: Geometry,
    ) -> Result<(), ImageError> {
        Ok(image::create(
            &*storage,
            Self::format(format)?,
            geometry,
            None,
            &*self.0,
        )?)
    }

    fn open(
        &self,
        storage: Arc<dyn Storage>,
        format: ImageFormat,
        access: Access,
    ) -> Result<Arc<dyn Disk>, ImageError> {
        Ok(image::open(
            storage,
            Self::format(format)?,
            access,
            Arc::clone(&self.0),
        )?)
    }
}

/// The record that binds a name to a machine.
fn name_key(name: &Name) -> String {
    format!("replica-name/{name}")
}

impl Shared {
    /// Opens every replica that the records name.
    fn open_known(self: &Arc<Self>) -> Result<(), SecondaryError> {
        for key in self.ledger.keys("replica-name/")? {
            let Some(name) = key
                .strip_prefix("replica-name/")
                .and_then(|name| Name::new(name).ok())
            else {
                continue;
            };
            let Some(id) = self.ledger.get::<MachineId>(&key)? else {
                continue;
            };
            let served = self
                .open(&name, id)
                .map_err(|source| SecondaryError::Replica {
                    name: name.clone(),
                    source,
                })?;
            self.machines.lock().insert(name, served);
        }
        Ok(())
    }

    fn open(&self, name: &Name, id: MachineId) -> Result<Arc<Served>, ReplicaError> {
        let folder = self
            .folder
            .folder(name.as_str())
            .map_err(io_error("open", name))?;
        let images = Arc::new(AllImages(Arc::new(SystemIds::default())));
        let options = ReplicaOptions {
            format: self.config.format.map(|format| match format {
                Format::Raw => ImageFormat::Raw,
                Format::Vhdx => ImageFormat::Vhdx,
            }),
            retention: Retention {
                newest: self.config.keep,
            },
            log_bytes_max: None,
            sync_bytes: ReplicaOptions::SYNC_BYTES,
        };
        let store = Arc::new(MachineReplica::open(
            folder,
            Arc::clone(&self.ledger),
            images,
            id,
            options,
        )?);
        let (wake, woken) = bounded(1);
        let merging = (Arc::clone(&store), name.clone());
        let thread = thread::Builder::new()
            .name("merge".into())
            .spawn(move || merge(&woken, &merging.0, &merging.1));
        self.merges
            .lock()
            .push(thread.map_err(io_error("start the merge thread of", name))?);
        let served = Arc::new(Served {
            id,
            name: name.clone(),
            store,
            progress: SharedProgress::default(),
            clock: Arc::clone(&self.clock),
            folder: self.folder.path().join(name.as_str()),
            wake,
            turn: tokio::sync::Mutex::default(),
            link: Mutex::default(),
        });
        served.wake_merge();
        Ok(served)
    }

    /// The replica a greeting is about, opened or begun, if this primary may feed it.
    fn admit(&self, hello: &Hello) -> Result<Arc<Served>, Refusal> {
        let failed = |error: &dyn std::error::Error| Refusal::Failed {
            detail: chain(error),
        };
        let mut machines = self.machines.lock();
        let known = machines.get(&hello.name).cloned();
        if let Some(known) = &known
            && known.id != hello.machine
        {
            return Err(Refusal::NameTaken {
                name: hello.name.clone(),
            });
        }
        Receiver::greet(
            hello,
            known
                .as_ref()
                .and_then(|known| known.store.status().generation),
        )?;
        let disks = hello
            .disks
            .iter()
            .map(disk_spec)
            .collect::<Result<Vec<_>, _>>()?;
        let served = match known {
            Some(served) => served,
            None => {
                self.ledger
                    .put(&name_key(&hello.name), &hello.machine)
                    .map_err(|error| failed(&error))?;
                let served = self
                    .open(&hello.name, hello.machine)
                    .map_err(|error| failed(&error))?;
                machines.insert(hello.name.clone(), Arc::clone(&served));
                served
            }
        };
        drop(machines);
        served
            .store
            .prepare(&disks)
            .map_err(|error| Refusal::Disks {
                detail: chain(&error),
            })?;
        Ok(served)
    }
}

fn disk_spec(spec: &message::DiskSpec) -> Result<replica::DiskSpec, Refusal> {
    let format = match spec.format.as_str() {
        "raw" => ImageFormat::Raw,
        "vhd" => ImageFormat::Vhd,
        "vhdx" => ImageFormat::Vhdx,
        other => {
            return Err(Refusal::Malformed {
                detail: format!("disk {} has the unknown format {other:?}", spec.name),
            });
        }
    };
    let geometry = Geometry {
        size: spec.size,
        logical_sector: spec.logical_sector,
        physical_sector: spec.physical_sector,
    };
    Ok(replica::DiskSpec {
        name: spec.name.clone(),
        geometry,
        format,
    })
}

fn io_error(operation: &'static str, name: &Name) -> impl FnOnce(io::Error) -> ReplicaError {
    move |source| ReplicaError::Io {
        operation,
        name: name.to_string(),
        source,
    }
}

/// Folds logs into the images whenever there are more than are kept; ends when the machine is let go of.
fn merge(woken: &WakeReceiver<()>, store: &MachineReplica, name: &Name) {
    while woken.recv().is_ok() {
        loop {
            match store.merge() {
                Ok(Some(report)) => tracing::debug!(machine = %name, ?report, "merged"),
                Ok(None) => break,
                Err(error) => {
                    tracing::error!(machine = %name, "cannot merge: {}", chain(&error));
                    match woken.recv_timeout(MERGE_AGAIN) {
                        Err(crossbeam_channel::RecvTimeoutError::Disconnected) => return,
                        Ok(()) | Err(crossbeam_channel::RecvTimeoutError::Timeout) => {}
                    }
                }
            }
        }
    }
}

/// The first minute of a connection: who is it, and may it?
async fn greet(shared: Arc<Shared>, link: Link, control: Control) {
    let Control {
        sender,
        mut receiver,
    } = control;
    let hello = match hello(&mut receiver).await {
        Ok(hello) => hello,
        Err(detail) => return refuse(sender, link, Refusal::Malformed { detail }).await,
    };
    let peer = link.peer().name.clone();
    let generation = hello.generation;
    let machine = hello.name.clone();
    let admitted = tokio::task::spawn_blocking(move || shared.admit(&hello)).await;
    let served = match admitted {
        Ok(Ok(served)) => served,
        Ok(Err(refusal)) => {
            tracing::warn!(%machine, primary = %peer, "refused: {refusal}");
            return refuse(sender, link, refusal).await;
        }
        Err(panic) => {
            return refuse(
                sender,
                link,
                Refusal::Failed {
                    detail: panic.to_string(),
                },
            )
            .await;
        }
    };
    // A primary that dials again has lost its link, whether or not this side has noticed: the new one takes over.
    if let Some(old) = served.link.lock().replace(link.clone()) {
        old.close(Reason::Busy, "replaced by a newer connection");
    }
    let Ok(_turn) = tokio::time::timeout(REPLACE_WITHIN, served.turn.lock()).await else {
        return refuse(sender, link, Refusal::Busy).await;
    };
    tracing::info!(%machine, primary = %peer, "receiving");
    served.progress.lock().connected = Some(peer.to_string());
    session::serve(Arc::clone(&served), generation, link, sender, receiver).await;
    served.progress.lock().connected = None;
    tracing::info!(%machine, primary = %peer, "no longer receiving");
}

async fn hello(receiver: &mut ControlReceiver) -> Result<Hello, String> {
    let first = tokio::time::timeout(HELLO_WITHIN, receiver.receive()).await;
    let bytes = first
        .map_err(|_| "no greeting in time")?
        .map_err(|error| chain(&error))?
        .ok_or("no greeting")?;
    match message::decode_to_replica(&bytes).map_err(|error| chain(&error))? {
        ToReplica::Hello(hello) => Ok(hello),
        ToReplica::Current { .. } => Err("the first message is not a greeting".into()),
    }
}

async fn refuse(mut sender: ControlSender, link: Link, refusal: Refusal) {
    let text = refusal.to_string();
    // The primary may be gone already; then it will ask again.
    let _ = sender
        .send(message::encode(&ToPrimary::Refused(refusal)).into())
        .await;
    sender.finish();
    // Closing at once would throw the refusal away; the primary closes when it has read it.
    let _ = tokio::time::timeout(HELLO_WITHIN, link.closed()).await;
    link.close(Reason::Done, &text);
}
