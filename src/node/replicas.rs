//! The replicas of a store: opened at start, begun at a first greeting, merged and thinned in the background.
//!
//! A machine is bound to its name by its first greeting: later ones with the same name and another identity are refused,
//! so that nobody's replica is ever overwritten by a namesake.

use std::{collections::BTreeMap, io, path::PathBuf, sync::Arc, thread, time::Duration};

use crossbeam_channel::{Receiver as WakeReceiver, Sender as WakeSender, bounded};
use parking_lot::Mutex;

use super::{
    control::{CancelReport, CancelRequest, OperateError, TestRequest},
    driver::chain,
    secondary::SecondaryError,
    session::SharedProgress,
    status::{
        DiskStatus, MachineStatus, PointStatus, RecoveryStatus, TestStatus, TrafficStatus, millis,
    },
    test_failover::{TestFailovers, TestPlaces},
};
use crate::{
    base::{
        clock::Clock,
        ids::{Ids, MachineId, Name, SystemIds},
    },
    coord::state::{Health, ReplicationState, Role, Signs},
    disk::{
        Geometry,
        image::{self, Format},
    },
    net::Link,
    protocol::{
        message::{self, Hello, Refusal},
        receiver::Receiver,
    },
    replica::{
        self, Head, MachineReplica, Point, ReplicaError, ReplicaOptions, Retention, Squeeze,
    },
    storage::{Folder, file::FileFolder, ledger::Ledger},
};

/// Pause before a failed merge is tried again.
const MERGE_AGAIN: Duration = Duration::from_secs(10);

/// One machine's replica and what belongs to it.
#[derive(Debug)]
pub(super) struct Served {
    pub(super) id: MachineId,
    pub(super) name: Name,
    pub(super) store: Arc<MachineReplica>,
    pub(super) progress: SharedProgress,
    pub(super) clock: Arc<dyn Clock>,
    tests: TestFailovers,
    folder: PathBuf,
    wake: WakeSender<()>,
    /// The connection that feeds it: one at a time.
    pub(super) turn: tokio::sync::Mutex<()>,
    pub(super) link: Mutex<Option<Link>>,
}

impl Served {
    /// All recovery points, oldest first.
    pub(super) fn points(&self) -> Vec<PointStatus> {
        let points = self.store.points();
        let tests = self.tests.status();
        let latest = points.last().map(|point| point.cut).unwrap_or_default();
        let mut lost_bytes: u64 = points.iter().map(|point| point.bytes).sum();
        let describe = |point: &Point| {
            lost_bytes -= point.bytes;
            let here = tests.iter().filter(|test| test.point == point.lineage);
            PointStatus {
                point: point.lineage,
                cut: point.cut,
                kind: point.consistency,
                bytes: point.bytes,
                lost_ms: millis(latest.since(point.cut)),
                lost_bytes,
                tests: here.map(|test| test.number).collect(),
            }
        };
        points.iter().map(describe).collect()
    }

    /// Starts a test failover.
    pub(super) fn start_test(&self, request: TestRequest) -> Result<TestStatus, OperateError> {
        self.tests.start(&self.store, request.point)
    }

    /// Ends test failovers; the merge goes on where they held it back.
    pub(super) fn cancel(&self, request: CancelRequest) -> Result<CancelReport, OperateError> {
        let report = self.tests.cancel(request);
        self.wake_upkeep();
        report
    }

    /// There is something to merge or to fold.
    pub(super) fn wake_upkeep(&self) {
        // Full means that it was woken already.
        let _ = self.wake.try_send(());
    }
}

/// How replicas are kept.
#[derive(Clone, Debug)]
pub(super) struct Keeping {
    /// Format of the images, if not the primary's.
    pub(super) format: Option<Format>,
    /// Which recovery points are kept.
    pub(super) retention: Retention,
    /// Bytes that the delta logs of a machine may take.
    pub(super) space_max: Option<u64>,
    /// Where test failovers are mounted, in a folder for each machine, if not in the store.
    pub(super) tests: Option<PathBuf>,
}

/// All replicas of a store.
#[derive(Debug)]
pub(super) struct Replicas {
    folder: FileFolder,
    ledger: Arc<Ledger>,
    keeping: Keeping,
    clock: Arc<dyn Clock>,
    machines: Mutex<BTreeMap<Name, Arc<Served>>>,
    merges: Mutex<Vec<thread::JoinHandle<()>>>,
}

impl Served {
    pub(super) fn status(&self) -> MachineStatus {
        let store = self.store.status();
        let points = self.store.points();
        let (tests, last_test) = (self.tests.status(), self.tests.last());
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
            rpo.now_ms = store.last_cut.map(|cut| millis(now.since(cut)));
        }
        let signs = Signs {
            state,
            stopped: progress.problem.clone(),
            disk: None,
            points: squeezed(store.squeeze),
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
            id: Some(self.id),
            role: Role::Replica,
            state,
            health,
            reasons,
            generation: store.generation,
            peer: progress.connected.clone(),
            durable: store.head.lineage(),
            base_epoch: store.base,
            recovery: Some(RecoveryStatus {
                points: points.len(),
                oldest: points.first().map(|point| point.cut),
                log_bytes: store.log_bytes,
                space_max: store.space_max,
                squeeze: store.squeeze,
            }),
            tests,
            last_test,
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

/// What the lack of space means for an operator, if it cost something.
fn squeezed(squeeze: Squeeze) -> Option<String> {
    let text = match squeeze {
        Squeeze::None => return None,
        Squeeze::Finest => {
            "space is short: the finest recovery points were dropped, the hourly ones are kept"
        }
        Squeeze::AllButOne => {
            "space is short: all recovery points were dropped but the latest and what is in use"
        }
        Squeeze::NoRescue => "space was short: the rescue point of the former primary was given up",
        Squeeze::Refusing => {
            "space is used up: no more changes are taken; end test failovers, make room, or raise --space-max"
        }
    };
    Some(text.to_owned())
}

/// Records with this prefix bind a name to a machine.
const NAME_PREFIX: &str = "replica-name/";

impl Replicas {
    /// Opens every replica that the records name.
    pub(super) fn open_all(
        folder: FileFolder,
        ledger: Arc<Ledger>,
        keeping: Keeping,
        clock: Arc<dyn Clock>,
    ) -> Result<Self, SecondaryError> {
        let (machines, merges) = (Mutex::default(), Mutex::default());
        let replicas = Self {
            folder,
            ledger,
            keeping,
            clock,
            machines,
            merges,
        };
        for key in replicas.ledger.keys(NAME_PREFIX)? {
            let Some(name) = key
                .strip_prefix(NAME_PREFIX)
                .and_then(|name| Name::new(name).ok())
            else {
                continue;
            };
            let Some(id) = replicas.ledger.get::<MachineId>(&key)? else {
                continue;
            };
            let opened = replicas.open(&name, id);
            let served = opened.map_err(|source| SecondaryError::Replica {
                name: name.clone(),
                source,
            })?;
            replicas.machines.lock().insert(name, served);
        }
        Ok(replicas)
    }

    /// One of them.
    pub(super) fn get(&self, name: &Name) -> Option<Arc<Served>> {
        self.machines.lock().get(name).cloned()
    }

    /// All of them, by name.
    pub(super) fn all(&self) -> Vec<Arc<Served>> {
        self.machines.lock().values().cloned().collect()
    }

    /// Waits for merges and closes the images. No session is left, and none begins.
    pub(super) fn close(&self) -> Result<(), SecondaryError> {
        let served = std::mem::take(&mut *self.machines.lock());
        for served in served.values() {
            served.tests.rest();
        }
        let stores: Vec<_> = served
            .into_values()
            .map(|served| (served.name.clone(), Arc::clone(&served.store)))
            .collect();
        // A merge thread ends when nobody can wake it any more.
        for merge in std::mem::take(&mut *self.merges.lock()) {
            // A merge that panicked has said so; the next open redoes it.
            let _ = merge.join();
        }
        stores.into_iter().try_for_each(|(name, store)| {
            store
                .close()
                .map_err(|source| SecondaryError::Replica { name, source })
        })
    }

    fn open(&self, name: &Name, id: MachineId) -> Result<Arc<Served>, ReplicaError> {
        let folder = self
            .folder
            .folder(name.as_str())
            .map_err(io_error("open", name))?;
        let ids: Arc<dyn Ids> = Arc::new(SystemIds::default());
        let options = ReplicaOptions {
            format: self.keeping.format,
            retention: self.keeping.retention,
            space_max: self.keeping.space_max,
            sync_bytes: ReplicaOptions::SYNC_BYTES,
        };
        let store = Arc::new(MachineReplica::open(
            folder,
            Arc::clone(&self.ledger),
            ids,
            id,
            options,
        )?);
        let path = self.folder.path().join(name.as_str());
        let layers = path.join("tests");
        let mounts = match &self.keeping.tests {
            Some(tests) => tests.join(name.as_str()),
            None => layers.clone(),
        };
        // Before the first merge: the points of tests that come back must still be there.
        let tests = TestFailovers::open(
            (id, name),
            TestPlaces { layers, mounts },
            Arc::clone(&self.ledger),
            Arc::clone(&self.clock),
            &store,
        )?;
        let (wake, woken) = bounded(1);
        let merging = (Arc::clone(&store), name.clone());
        let thread = thread::Builder::new()
            .name("upkeep".into())
            .spawn(move || keep_up(&woken, &merging.0, &merging.1));
        self.merges
            .lock()
            .push(thread.map_err(io_error("start the upkeep thread of", name))?);
        let served = Arc::new(Served {
            id,
            name: name.clone(),
            store,
            progress: SharedProgress::default(),
            clock: Arc::clone(&self.clock),
            tests,
            folder: path,
            wake,
            turn: tokio::sync::Mutex::default(),
            link: Mutex::default(),
        });
        served.wake_upkeep();
        Ok(served)
    }

    /// The replica a greeting is about, opened or begun, if this primary may feed it.
    pub(super) fn admit(&self, hello: &Hello) -> Result<Arc<Served>, Refusal> {
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
        let served = if let Some(served) = known {
            served
        } else {
            self.ledger
                .put(&format!("{NAME_PREFIX}{}", hello.name), &hello.machine)
                .map_err(|error| failed(&error))?;
            let served = self
                .open(&hello.name, hello.machine)
                .map_err(|error| failed(&error))?;
            machines.insert(hello.name.clone(), Arc::clone(&served));
            served
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
    let format = spec
        .format
        .parse()
        .map_err(|error: image::FormatError| Refusal::Malformed {
            detail: format!("disk {}: {error}", spec.name),
        })?;
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

/// Merges and folds logs whenever there are more than are kept; ends when the machine is let go of.
fn keep_up(woken: &WakeReceiver<()>, store: &MachineReplica, name: &Name) {
    while woken.recv().is_ok() {
        loop {
            match store.upkeep() {
                Ok(Some(step)) => tracing::debug!(machine = %name, ?step, "upkeep"),
                Ok(None) => break,
                Err(error) => {
                    tracing::error!(machine = %name, "cannot merge or fold delta logs: {}", chain(&error));
                    match woken.recv_timeout(MERGE_AGAIN) {
                        Err(crossbeam_channel::RecvTimeoutError::Disconnected) => return,
                        Ok(()) | Err(crossbeam_channel::RecvTimeoutError::Timeout) => {}
                    }
                }
            }
        }
    }
}
