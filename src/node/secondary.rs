//! A secondary: receives machines from primaries and keeps their replicas.
//!
//! The store's folder holds `node.redb`, the node's records, and a folder for each machine. What is in it is the business
//! of `replicas`; who may feed it, of `admission`.

use std::{
    fs, io,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
};

use nix::sys::resource::{Resource, getrlimit, setrlimit};

use super::{
    admission,
    control::{CancelReport, CancelRequest, Operate, OperateError, TestRequest},
    driver::chain,
    lock_folder,
    replicas::{Keeping, Replicas, Served},
    status::{NodeStatus, PointStatus, TestStatus},
};
use crate::{
    base::{
        clock::{Clock, SystemClock},
        ids::{Lineage, Name},
    },
    disk::image::Format,
    net::{Allow, BindError, Identity, IdentityError, Listener, Reason},
    replica::{ReplicaError, Retention},
    storage::{
        file::FileFolder,
        ledger::{Ledger, LedgerError},
    },
};

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
    /// Which recovery points are kept.
    pub retention: Retention,
    /// Bytes that the delta logs of a machine may take beside its images.
    pub space_max: Option<u64>,
    /// Where test failovers are mounted, in a folder for each machine; in the machine's folder of the store if not said.
    pub tests: Option<PathBuf>,
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

/// A running secondary.
#[derive(Debug)]
pub struct Secondary {
    replicas: Arc<Replicas>,
    listener: tokio::sync::Mutex<Option<Listener>>,
    address: SocketAddr,
    clock: Arc<dyn Clock>,
    /// Keeps other nodes out of the store.
    _lock: fs::File,
}

impl Secondary {
    /// Opens the store with all its replicas and listens. Called within the runtime.
    pub fn start(config: &SecondaryConfig) -> Result<Self, SecondaryError> {
        let path = &config.store;
        let failed = |source| SecondaryError::Store {
            path: path.clone(),
            source,
        };
        let identity = Identity::load(&config.identity)?;
        // Mounts in it are told by their path, which must not depend on where the process was started.
        let folder = FileFolder::open(&absolute(path)?).map_err(failed)?;
        raise_file_limit();
        let lock = lock_folder(path).map_err(failed)?;
        let lock = lock.ok_or_else(|| SecondaryError::InUse(path.clone()))?;
        let allow: Allow = config.allow.iter().cloned().collect();
        let listener = Listener::bind(config.listen, &identity, allow)?;
        let address = listener
            .address()
            .map_err(|error| SecondaryError::Listener(error.to_string()))?;
        let ledger = Arc::new(Ledger::open_in(&folder, "node.redb")?);
        let clock: Arc<dyn Clock> = Arc::new(SystemClock::default());
        let keeping = Keeping {
            format: config.format,
            retention: config.retention,
            space_max: config.space_max,
            tests: config.tests.as_deref().map(absolute).transpose()?,
        };
        let replicas = Arc::new(Replicas::open_all(
            folder,
            ledger,
            keeping,
            Arc::clone(&clock),
        )?);
        tracing::info!(%address, "accepting primaries");
        let listener = tokio::sync::Mutex::new(Some(listener));
        Ok(Self {
            replicas,
            listener,
            address,
            clock,
            _lock: lock,
        })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Accepts primaries until the listener ends, which is always an error. Safe to cancel.
    pub async fn run(&self) -> Result<(), SecondaryError> {
        let mut listener = self.listener.lock().await;
        let closed = || SecondaryError::Listener("closed".into());
        let listener = listener.as_mut().ok_or_else(closed)?;
        loop {
            match listener.accept().await {
                Ok((link, control)) => {
                    tokio::spawn(admission::greet(Arc::clone(&self.replicas), link, control));
                }
                Err(error) if error.is_final() => {
                    return Err(SecondaryError::Listener(chain(&error)));
                }
                Err(error) => tracing::warn!("a connection was refused: {}", chain(&error)),
            }
        }
    }

    fn served(&self, machine: &Name) -> Result<Arc<Served>, OperateError> {
        let served = self.replicas.get(machine);
        served.ok_or_else(|| OperateError::NoSuchReplica(machine.clone()))
    }

    /// Ends all connections, hides test failovers until the next start, waits for merges, closes the images.
    pub async fn stop(&self) -> Result<(), SecondaryError> {
        if let Some(listener) = self.listener.lock().await.take() {
            listener
                .close(Reason::Stopping, "the replica is being stopped")
                .await;
        }
        for served in self.replicas.all() {
            // A session is over when it gives its turn back.
            drop(served.turn.lock().await);
        }
        let replicas = Arc::clone(&self.replicas);
        let closed = tokio::task::spawn_blocking(move || replicas.close()).await;
        closed.map_err(|panic| SecondaryError::Listener(panic.to_string()))?
    }
}

impl Operate for Secondary {
    fn status(&self) -> NodeStatus {
        NodeStatus {
            version: env!("CARGO_PKG_VERSION").into(),
            pid: std::process::id(),
            listening: Some(self.address),
            at: self.clock.wall(),
            machines: self
                .replicas
                .all()
                .iter()
                .map(|served| served.status())
                .collect(),
        }
    }

    fn cut(&self, machine: &Name) -> Result<Lineage, OperateError> {
        Err(OperateError::NoSuchMachine(machine.clone()))
    }

    fn points(&self, machine: &Name) -> Result<Vec<PointStatus>, OperateError> {
        Ok(self.served(machine)?.points())
    }

    fn start_test(&self, machine: &Name, request: TestRequest) -> Result<TestStatus, OperateError> {
        self.served(machine)?.start_test(request)
    }

    fn cancel(&self, machine: &Name, request: CancelRequest) -> Result<CancelReport, OperateError> {
        self.served(machine)?.cancel(request)
    }
}

/// Each delta log that is kept is an open file; the usual soft limit of 1,024 is for programs that use select(2).
fn raise_file_limit() {
    let limits = getrlimit(Resource::RLIMIT_NOFILE);
    if let Err(error) = limits.and_then(|(_, hard)| setrlimit(Resource::RLIMIT_NOFILE, hard, hard))
    {
        tracing::warn!(%error, "cannot raise the number of files this process may open");
    }
}

fn absolute(path: &Path) -> Result<PathBuf, SecondaryError> {
    std::path::absolute(path).map_err(|source| SecondaryError::Store {
        path: path.to_owned(),
        source,
    })
}
