//! A host: its machines, each in the part it plays, and the listener for its peers.
//!
//! ```text
//!   config    what an operator says            file      the same as TOML
//!   policy    what a group passes on           record    what is remembered of each machine's role
//!   member    one machine: from part to part   parts     what runs in each of them
//!   serving   a machine that is written here   report    what a machine tells
//!   roles     what operators ask for           peers     what the other host asks for
//!   grow      a larger disk                    suspend   stops the replication for a while
//!   copying   when the initial copy begins     requests  which machine an operator means
//! ```
//! The store's folder holds `node.redb`, the host's records, and a folder for each machine. A machine that is not
//! configured begins with the first greeting of a host that is allowed to; from then on it belongs to that host.

mod config;
mod copying;
mod file;
mod grow;
mod member;
mod parts;
mod peers;
mod policy;
mod record;
mod report;
mod requests;
mod roles;
mod serving;
mod suspend;

use std::{
    collections::BTreeMap,
    fs, io,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use parking_lot::Mutex;
use tokio::runtime::Handle;

pub(super) use self::member::Member;
pub use self::{
    config::{
        CoordinatorConfig, HostConfig, KeptConfig, MachineConfig, PeerConfig, ReplicationConfig,
        parse_interval,
    },
    file::{ConfigError, read},
};
use self::{
    member::StartError,
    policy::Limiters,
    record::{PREFIX, Record},
};
pub use super::served::Keeping;
use super::{
    admission,
    allowance::{Allowances, space_of},
    audit::{AUDIT_FILE, Audit, Event},
    control::OperateError,
    lock_folder,
    primary::PrimaryError,
    status::MachineStatus,
};
use crate::{
    base::{
        chain::chain,
        clock::{Clock, SystemClock},
        ids::{Generation, Ids, MachineId, Name, SystemIds},
    },
    coord::role::{Part, RoleState},
    net::{Allow, BindError, Identity, IdentityError, Listener, Reason},
    protocol::{
        message::{Hello, Refusal},
        receiver::Receiver,
    },
    shim::{Unmount, UnmountError},
    storage::{
        file::FileFolder,
        ledger::{Ledger, LedgerError},
    },
};

/// Names in the store that are not machines'.
const RESERVED: [&str; 2] = ["lock", LEDGER_FILE];
const LEDGER_FILE: &str = "node.redb";
/// How often a machine is looked after that is not what it should be: fenced, stepped down, in trouble.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// How often it is looked whether a mount was taken away.
const ENDED_EVERY: Duration = Duration::from_millis(200);

/// Why a host cannot start or stop.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
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
    /// A machine's disks cannot be served.
    #[error(transparent)]
    Primary(#[from] PrimaryError),
    /// A machine cannot be brought into its part.
    #[error("machine {name}: {why}")]
    Machine {
        /// The machine.
        name: Name,
        /// Why.
        why: String,
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

impl HostError {
    fn of(machine: &Name, error: StartError) -> Self {
        match error {
            StartError::Primary(error) => error.into(),
            StartError::Other(why) => Self::Machine {
                name: machine.clone(),
                why,
            },
        }
    }

    /// The mount that somebody still uses, if that is the trouble.
    pub fn busy(&self) -> Option<&UnmountError> {
        match self {
            Self::Primary(error) => error.busy(),
            _ => None,
        }
    }
}

/// What all machines of a host share.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) config: HostConfig,
    limiters: Limiters,
    pub(super) allowances: Allowances,
    pub(super) folder: FileFolder,
    pub(super) ledger: Arc<Ledger>,
    pub(super) audit: Arc<Audit>,
    pub(super) clock: Arc<dyn Clock>,
    pub(super) ids: Arc<dyn Ids>,
    pub(super) identity: Option<Identity>,
    pub(super) runtime: Handle,
}

/// A running host.
#[derive(Debug)]
pub struct Host {
    shared: Arc<Shared>,
    members: Mutex<BTreeMap<Name, Arc<Member>>>,
    listener: tokio::sync::Mutex<Option<Listener>>,
    address: Option<SocketAddr>,
    /// Keeps other nodes out of the store.
    _lock: fs::File,
}

impl Host {
    /// Opens the store, brings every machine into its part, and listens. Blocks; called within the runtime.
    pub fn start(config: HostConfig) -> Result<Arc<Self>, HostError> {
        // Mounts in it are told by their path, which must not depend on where the process was started.
        let store = absolute(&config.store)?;
        let failed = |source| HostError::Store {
            path: store.clone(),
            source,
        };
        let identity = config.identity.as_deref();
        let identity = identity.map(|identity| Identity::load_with(identity, config.trust()));
        let identity = identity.transpose()?;
        let folder = FileFolder::open(&store).map_err(failed)?;
        raise_file_limit();
        let lock = lock_folder(&store).map_err(failed)?;
        let lock = lock.ok_or_else(|| HostError::InUse(store.clone()))?;
        let listener = match (config.listen, &identity) {
            (Some(listen), Some(identity)) => {
                let allow: Allow = config.peers.keys().cloned().collect();
                let allow = allow.operators(config.operators.iter().cloned());
                Some(Listener::bind(listen, identity, allow)?)
            }
            _ => None,
        };
        let address = listener.as_ref().map(Listener::address).transpose();
        let address = address.map_err(|error| HostError::Listener(error.to_string()))?;
        let ledger = Arc::new(Ledger::open_in(&folder, LEDGER_FILE)?);
        let clock: Arc<dyn Clock> = Arc::new(SystemClock::default());
        let audit = Audit::open(&store, Arc::clone(&clock)).map_err(failed)?;
        let shared = Arc::new(Shared {
            audit: Arc::new(audit),
            limiters: Limiters::of(&config),
            allowances: Allowances::of(&config),
            config,
            folder,
            ledger,
            clock,
            ids: Arc::new(SystemIds::default()),
            identity,
            runtime: Handle::current(),
        });
        let host = Arc::new(Self {
            shared,
            members: Mutex::default(),
            listener: tokio::sync::Mutex::new(listener),
            address,
            _lock: lock,
        });
        host.open_members()?;
        Ok(host)
    }

    /// Everything that is remembered, and everything that is configured.
    fn open_members(&self) -> Result<(), HostError> {
        let shared = &self.shared;
        let mut records = BTreeMap::new();
        for key in shared.ledger.keys(PREFIX)? {
            let name = key
                .strip_prefix(PREFIX)
                .and_then(|name| Name::new(name).ok());
            if let (Some(name), Some(record)) = (name, shared.ledger.get::<Record>(&key)?) {
                records.insert(name, record);
            }
        }
        for (name, machine) in &shared.config.machines {
            if let Some(record) = records.get_mut(name) {
                // Another host to replicate to; a machine that follows somebody goes on following him.
                if record.role.part == Part::Primary && record.peer != machine.peer {
                    record.peer.clone_from(&machine.peer);
                    shared.ledger.put(&Record::key(name), record)?;
                }
            } else {
                let record = Record::new(
                    MachineId(shared.ids.uuid()),
                    RoleState::primary(Generation::first(&*shared.ids)),
                    machine.peer.clone(),
                );
                shared.ledger.put(&Record::key(name), &record)?;
                records.insert(name.clone(), record);
            }
        }
        for (name, record) in records {
            let member = Member::new(Arc::clone(shared), name.clone(), record);
            self.members
                .lock()
                .insert(name.clone(), Arc::clone(&member));
            match member.start() {
                Ok(()) => {}
                Err(error) if shared.config.tolerant => {
                    tracing::error!(machine = %name, "not served: {}", chain(&error));
                }
                Err(error) => return Err(HostError::of(&name, error)),
            }
        }
        Ok(())
    }

    /// Where it listens.
    pub fn address(&self) -> Option<SocketAddr> {
        self.address
    }

    /// What a machine that is served here shows: its raw files.
    pub fn paths(&self) -> Vec<PathBuf> {
        let members = self.all();
        let serving = members.iter().filter_map(|member| member.serving());
        serving
            .flat_map(|serving| serving.primary.paths())
            .collect()
    }

    /// One machine's report.
    pub fn machine_status(&self, machine: &Name) -> Option<MachineStatus> {
        Some(self.member(machine)?.status())
    }

    /// Accepts peers, and looks after the machines that wait for one. Ends with an error if the listener does. Safe to
    /// cancel.
    pub async fn run(self: &Arc<Self>) -> Result<(), HostError> {
        tokio::select! {
            ended = self.accept() => ended,
            () = self.look_after() => Ok(()),
        }
    }

    async fn accept(self: &Arc<Self>) -> Result<(), HostError> {
        let mut listener = self.listener.lock().await;
        let Some(listener) = listener.as_mut() else {
            return std::future::pending().await;
        };
        loop {
            match listener.accept().await {
                Ok((link, control)) => {
                    tokio::spawn(admission::greet(Arc::clone(self), link, control));
                }
                Err(error) if error.is_final() => {
                    return Err(HostError::Listener(chain(&error)));
                }
                Err(error) => {
                    let (who, why) = error.account();
                    let error = chain(&error);
                    // A flood of strangers is no reason to flood the log.
                    if self.shared.audit.refused(who, why) {
                        tracing::warn!("a connection was refused: {error}");
                    } else {
                        tracing::debug!("a connection was refused: {error}");
                    }
                }
            }
        }
    }

    async fn look_after(self: &Arc<Self>) {
        let mut busy: BTreeMap<Name, tokio::task::JoinHandle<()>> = BTreeMap::new();
        loop {
            tokio::time::sleep(LOOK_EVERY).await;
            busy.retain(|_, task| !task.is_finished());
            for member in self.all() {
                if member.needs_care() && !busy.contains_key(member.name()) {
                    let name = member.name().clone();
                    let task = tokio::task::spawn_blocking(move || member.look_after());
                    busy.insert(name, task);
                }
            }
        }
    }

    /// Waits until the mount of a configured machine is gone, whoever took it away.
    pub async fn ended(&self) {
        loop {
            let members = self.all();
            let serving: Vec<_> = members
                .iter()
                .filter_map(|member| member.serving())
                .collect();
            if serving.iter().any(|serving| serving.was_taken_away()) {
                return;
            }
            tokio::time::sleep(ENDED_EVERY).await;
        }
    }

    /// What a coordinator needs of its own host.
    pub(super) fn shared(&self) -> &Shared {
        &self.shared
    }

    /// Bytes that the replicas of a peer's machines take.
    pub(super) fn space_of(&self, peer: &Name) -> u64 {
        let members = self.all();
        let own = members.iter().filter(|member| member.is_of(peer));
        own.map(|member| space_of(&member.places().0)).sum()
    }

    fn all(&self) -> Vec<Arc<Member>> {
        self.members.lock().values().cloned().collect()
    }

    fn member(&self, machine: &Name) -> Option<Arc<Member>> {
        self.members.lock().get(machine).cloned()
    }

    fn asked(&self, machine: &Name) -> Result<Arc<Member>, OperateError> {
        let member = self.member(machine);
        member.ok_or_else(|| OperateError::NoSuchMachine(machine.clone()))
    }

    /// The machine a greeting is about, begun if it is new.
    pub(super) fn greeted(&self, hello: &Hello, peer: &Name) -> Result<Arc<Member>, Refusal> {
        Receiver::greet(hello)?;
        self.shared.allowances.may(peer, &hello.name)?;
        let mut members = self.members.lock();
        if let Some(known) = members.get(&hello.name) {
            known.belongs_to(hello.machine, peer)?;
            return Ok(Arc::clone(known));
        }
        let name = hello.name.as_str();
        if RESERVED.contains(&name) || name.starts_with(AUDIT_FILE) {
            return Err(Refusal::NameTaken {
                name: hello.name.clone(),
            });
        }
        if !hello.claim.active {
            return Err(Refusal::NotNow {
                detail: format!("no machine called {} is known here", hello.name),
            });
        }
        let failed = |detail| Refusal::Failed { detail };
        let role = RoleState::replica(hello.claim.generation);
        let mut record = Record::new(hello.machine, role, Some(peer.clone()));
        let store = self
            .shared
            .config
            .peer(peer)
            .and_then(|peer| peer.store.as_deref());
        record.store = store
            .map(absolute)
            .transpose()
            .map_err(|error| failed(chain(&error)))?;
        let key = Record::key(&hello.name);
        self.shared.audit.record(&Event::Role {
            machine: hello.name.clone(),
            generation: role.generation,
            was: "not known here".into(),
            is: format!("{}, for {peer}", role.describe()),
        });
        let put = self.shared.ledger.put(&key, &record);
        put.map_err(|error| failed(chain(&error)))?;
        let member = Member::new(Arc::clone(&self.shared), hello.name.clone(), record);
        member.start().map_err(|error| failed(error.to_string()))?;
        members.insert(hello.name.clone(), Arc::clone(&member));
        Ok(member)
    }

    /// The machine that a call about roles is for.
    pub(super) fn called(
        &self,
        machine: MachineId,
        name: &Name,
        peer: &Name,
    ) -> Result<Arc<Member>, Refusal> {
        self.shared.allowances.may(peer, name)?;
        let member = self.member(name).ok_or_else(|| Refusal::NotNow {
            detail: format!("no machine called {name} is known here"),
        })?;
        member.belongs_to(machine, peer)?;
        Ok(member)
    }

    /// Unmounts what nobody uses, or everything with [`Unmount::Detach`], ends the links of all machines, closes all
    /// images. With a mount in use and [`Unmount::IfUnused`] it is an error after which that machine goes on. A machine
    /// that cannot be closed keeps no other one from it; of several errors, that a mount is in use is told, the others
    /// are logged.
    pub async fn stop_machines(self: &Arc<Self>, how: Unmount) -> Result<(), HostError> {
        let host = Arc::clone(self);
        let stopped = tokio::task::spawn_blocking(move || {
            let stopped = host.all().into_iter().map(|member| {
                let stopped = member.stop(how);
                stopped.map_err(|error| HostError::of(member.name(), error))
            });
            first_to_tell(stopped.filter_map(Result::err))
        });
        stopped
            .await
            .map_err(|panic| HostError::Listener(panic.to_string()))?
    }

    /// Ends all links and the listener. Nobody [runs](Self::run) the host any more.
    pub async fn close(&self) {
        if let Some(listener) = self.listener.lock().await.take() {
            listener
                .close(Reason::Stopping, "the node is being stopped")
                .await;
        }
    }
}

/// Fails with one of `errors`: with a mount in use, which can be waited for, if there is such a one. Logs the others.
fn first_to_tell(errors: impl Iterator<Item = HostError>) -> Result<(), HostError> {
    let mut told: Option<HostError> = None;
    for error in errors {
        let other = match told.take() {
            None => {
                told = Some(error);
                continue;
            }
            Some(first) if first.busy().is_none() && error.busy().is_some() => {
                told = Some(error);
                first
            }
            Some(first) => {
                told = Some(first);
                error
            }
        };
        // What is in use is told when it is tried again.
        if other.busy().is_none() {
            tracing::error!("{}", chain(&other));
        }
    }
    told.map_or(Ok(()), Err)
}

/// Each delta log that is kept is an open file; the usual soft limit of 1,024 is for programs that use select(2).
fn raise_file_limit() {
    let limits = getrlimit(Resource::RLIMIT_NOFILE);
    if let Err(error) = limits.and_then(|(_, hard)| setrlimit(Resource::RLIMIT_NOFILE, hard, hard))
    {
        tracing::warn!(%error, "cannot raise the number of files this process may open");
    }
}

fn absolute(path: &Path) -> Result<PathBuf, HostError> {
    std::path::absolute(path).map_err(|source| HostError::Store {
        path: path.to_owned(),
        source,
    })
}
