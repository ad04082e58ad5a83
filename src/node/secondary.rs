//! A secondary: receives machines from primaries and keeps their replicas.
//!
//! The store's folder holds `node.redb`, the node's records, and a folder for each machine. What is in it is the business
//! of `replicas`; who may feed it, of `admission`.

use std::{fs, io, net::SocketAddr, path::PathBuf, sync::Arc};

use super::{
    admission,
    control::{Operate, OperateError},
    driver::chain,
    replicas::{Keeping, Replicas},
    status::NodeStatus,
};
use crate::{
    base::{
        clock::{Clock, SystemClock},
        ids::{Lineage, Name},
    },
    disk::image::Format,
    net::{Allow, BindError, Identity, IdentityError, Listener, Reason},
    replica::ReplicaError,
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
        let folder = FileFolder::open(path).map_err(failed)?;
        let lock = fs::File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(path.join("lock"));
        let lock = lock.map_err(failed)?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(fs::TryLockError::WouldBlock) => return Err(SecondaryError::InUse(path.clone())),
            Err(fs::TryLockError::Error(source)) => return Err(failed(source)),
        }
        let allow: Allow = config.allow.iter().cloned().collect();
        let listener = Listener::bind(config.listen, &identity, allow)?;
        let address = listener
            .address()
            .map_err(|error| SecondaryError::Listener(error.to_string()))?;
        let ledger = Arc::new(Ledger::open_in(&folder, "node.redb")?);
        let clock: Arc<dyn Clock> = Arc::new(SystemClock::default());
        let keeping = Keeping {
            format: config.format,
            newest: config.keep,
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

    /// Ends all connections, waits for merges, closes the images.
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
}
