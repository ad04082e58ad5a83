//! One machine's replica on this host: opened, received into, merged and thinned in the background, tested.

use std::{fs::File, path::PathBuf, sync::Arc, thread, time::Duration};

use crossbeam_channel::{Receiver as WakeReceiver, Sender as WakeSender, bounded};
use parking_lot::Mutex;

use super::{
    control::{CancelReport, CancelRequest, OperateError, TestRequest},
    portable::import::Importing,
    session::{ReceiveProgress, SharedProgress},
    status::{
        DiskStatus, MachineStatus, PointStatus, RecoveryStatus, TestStatus, TrafficStatus, millis,
    },
    test_failover::{TestFailovers, TestPlaces},
};
use crate::{
    base::{
        chain::chain,
        clock::Clock,
        ids::{Ids, MachineId, Name},
        units::Epoch,
    },
    coord::state::{Health, ReplicationState, Role, Signs},
    disk::{
        Geometry,
        image::{self, Format},
    },
    net::{Link, Reason},
    protocol::message::{self, Refusal},
    replica::{
        self, Head, Held, ImageStatus, MachineReplica, Point, ReplicaError, ReplicaOptions,
        Retention, Squeeze,
    },
    shim::Mounter,
    storage::{Folder, ledger::Ledger},
};

/// Pause before a failed merge is tried again.
const MERGE_AGAIN: Duration = Duration::from_secs(10);

/// The thread that merges; it ends when nobody can wake it any more.
#[derive(Debug)]
struct Upkeep {
    wake: WakeSender<()>,
    thread: thread::JoinHandle<()>,
}

/// One machine's replica and what belongs to it.
#[derive(Debug)]
pub(super) struct Served {
    pub(super) id: MachineId,
    pub(super) name: Name,
    pub(super) store: Arc<MachineReplica>,
    pub(super) progress: SharedProgress,
    pub(super) clock: Arc<dyn Clock>,
    /// The portable copy that is being taken in, if one is.
    pub(super) importing: Importing,
    tests: TestFailovers,
    /// Whether images that are there are what a new replica begins with.
    seed: bool,
    /// Where the images are.
    pub(super) folder: PathBuf,
    upkeep: Mutex<Option<Upkeep>>,
    /// The point that a failover is on.
    held: Mutex<Option<Held>>,
    /// Locks on images that lie where others could open them.
    _locks: Vec<File>,
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
            let here = tests
                .iter()
                .filter(|test| !test.rescue && test.point == point.lineage);
            PointStatus {
                point: point.lineage,
                rescue: false,
                cut: point.cut,
                kind: point.consistency,
                bytes: point.bytes,
                lost_ms: millis(latest.since(point.cut)),
                lost_bytes,
                tests: here.map(|test| test.number).collect(),
            }
        };
        let rescue = self.store.rescue().map(|rescue| {
            let point = rescue.point();
            let here = tests.iter().filter(|test| test.rescue);
            PointStatus {
                point: point.lineage,
                rescue: true,
                cut: point.cut,
                kind: point.consistency,
                bytes: 0,
                lost_ms: 0,
                lost_bytes: 0,
                tests: here.map(|test| test.number).collect(),
            }
        });
        let listed: Vec<_> = points.iter().map(describe).collect();
        rescue.into_iter().chain(listed).collect()
    }

    /// Starts a test failover.
    pub(super) fn start_test(&self, request: TestRequest) -> Result<TestStatus, OperateError> {
        self.tests.start(&self.store, request)
    }

    /// Gives the rescue point up; the merge goes on.
    pub(super) fn drop_rescue(&self) -> Result<CancelReport, OperateError> {
        if self.store.rescue().is_none() {
            return Err(OperateError::NotNow(format!(
                "machine {} has no rescue point",
                self.name
            )));
        }
        self.store
            .drop_rescue()
            .map_err(|error| OperateError::NotNow(chain(&error)))?;
        self.wake_upkeep();
        Ok(CancelReport {
            ended: Vec::new(),
            failover: Some("the rescue point of the former primary is given up".into()),
        })
    }

    /// Ends test failovers; the merge goes on where they held it back.
    pub(super) fn cancel(&self, request: CancelRequest) -> Result<CancelReport, OperateError> {
        let report = self.tests.cancel(request);
        self.wake_upkeep();
        report
    }

    /// There is something to merge or to fold.
    pub(super) fn wake_upkeep(&self) {
        if let Some(upkeep) = &*self.upkeep.lock() {
            // Full means that it was woken already.
            let _ = upkeep.wake.try_send(());
        }
    }
}

impl Drop for Served {
    /// Nobody merges any more when the point of a failover, and the locks on the images, are let go of: the layers over
    /// that point are worth nothing without it.
    fn drop(&mut self) {
        self.end_upkeep();
    }
}

/// How replicas are kept.
#[derive(Clone, Debug, Default)]
pub struct Keeping {
    /// Format of the images, if not the primary's.
    pub format: Option<Format>,
    /// Which recovery points are kept.
    pub retention: Retention,
    /// Bytes that the delta logs of a machine may take.
    pub space_max: Option<u64>,
    /// Whether images that lie in the folder of a new machine are what its replica begins with.
    pub seed: bool,
    /// Where test failovers are mounted, in a folder for each machine, if not in the store.
    pub tests: Option<PathBuf>,
}

/// What a replica is opened with.
#[derive(Debug)]
pub(super) struct Opening {
    pub(super) id: MachineId,
    pub(super) name: Name,
    /// Images, delta logs and layers of tests.
    pub(super) path: PathBuf,
    /// The same as a folder, with images that lie elsewhere in their places.
    pub(super) folder: Arc<dyn Folder>,
    pub(super) ledger: Arc<Ledger>,
    pub(super) ids: Arc<dyn Ids>,
    pub(super) clock: Arc<dyn Clock>,
    pub(super) keeping: Keeping,
    /// Who mounts the disks of test failovers.
    pub(super) mounter: Mounter,
    /// Locks on images that lie where others could open them.
    pub(super) locks: Vec<File>,
    /// The point that a failover is on.
    pub(super) held: Option<Epoch>,
}

impl Served {
    /// Opens what is there, and brings back the tests that were running.
    pub(super) fn open(opening: Opening) -> Result<Arc<Self>, ReplicaError> {
        let Opening {
            id,
            name,
            path,
            folder,
            ledger,
            ids,
            clock,
            keeping,
            mounter,
            locks,
            held,
        } = opening;
        let options = ReplicaOptions {
            format: keeping.format,
            retention: keeping.retention,
            space_max: keeping.space_max,
            sync_bytes: ReplicaOptions::SYNC_BYTES,
        };
        let store = MachineReplica::open(folder, Arc::clone(&ledger), ids, id, options)?;
        let store = Arc::new(store);
        let layers = path.join("tests");
        let mounts = match &keeping.tests {
            Some(tests) => tests.join(name.as_str()),
            None => layers.clone(),
        };
        // Before the first merge: the points of tests that come back must still be there.
        let places = TestPlaces {
            layers,
            mounts,
            mounter,
        };
        let tests = TestFailovers::open((id, &name), places, ledger, Arc::clone(&clock), &store)?;
        let served = Arc::new(Self {
            id,
            name,
            store,
            progress: SharedProgress::default(),
            clock,
            importing: Importing::default(),
            tests,
            seed: keeping.seed,
            folder: path,
            upkeep: Mutex::default(),
            held: Mutex::default(),
            _locks: locks,
            turn: tokio::sync::Mutex::default(),
            link: Mutex::default(),
        });
        // So must that of a failover. Without it the replica gave its images away already.
        match held.map_or(Ok(()), |epoch| served.hold(epoch)) {
            Ok(()) | Err(ReplicaError::NoPoint(_)) => {}
            Err(error) => return Err(error),
        }
        served.start_upkeep()?;
        Ok(served)
    }

    /// Keeps a point, for a failover to it, until it is [let go](Self::let_go).
    pub(super) fn hold(&self, epoch: Epoch) -> Result<(), ReplicaError> {
        *self.held.lock() = Some(self.store.hold(epoch)?);
        Ok(())
    }

    /// There is no failover, or no more.
    pub(super) fn let_go(&self) {
        *self.held.lock() = None;
        self.wake_upkeep();
    }

    fn start_upkeep(&self) -> Result<(), ReplicaError> {
        let (wake, woken) = bounded(1);
        let (store, name) = (Arc::clone(&self.store), self.name.clone());
        let thread = thread::Builder::new()
            .name("upkeep".into())
            .spawn(move || keep_up(&woken, &store, &name));
        let thread = thread.map_err(|source| ReplicaError::Io {
            operation: "start the upkeep thread of",
            name: self.name.to_string(),
            source,
        })?;
        *self.upkeep.lock() = Some(Upkeep { wake, thread });
        self.wake_upkeep();
        Ok(())
    }

    /// Ends the connection that feeds it, if there is one, to its last message; none begins while the guard lives. Blocks;
    /// not called on a runtime thread.
    pub(super) fn end_session(&self, why: &str) -> tokio::sync::MutexGuard<'_, ()> {
        if let Some(link) = self.link.lock().take() {
            link.close(Reason::Done, why);
        }
        self.turn.blocking_lock()
    }

    /// Ends the merging; nothing is merged or folded any more.
    pub(super) fn end_upkeep(&self) {
        if let Some(Upkeep { wake, thread }) = self.upkeep.lock().take() {
            drop(wake);
            // A merge that panicked has said so; the next open redoes it.
            let _ = thread.join();
        }
    }

    /// Ends everything, hides test failovers until the next start, waits for a merge, closes the images.
    pub(super) fn close(&self) -> Result<(), ReplicaError> {
        self.importing.stop();
        drop(self.end_session("the replica is being closed"));
        self.tests.rest();
        self.end_upkeep();
        // Nothing is merged any more; the next open holds it again.
        *self.held.lock() = None;
        self.store.close()
    }

    /// Whether a test failover is running.
    pub(super) fn has_tests(&self) -> bool {
        !self.tests.status().is_empty()
    }

    /// Says which disks will be received. The images are made if there are none, or compared as a seed if they are one; they
    /// grow if the disks did.
    pub(super) fn prepare(&self, disks: &[message::DiskSpec]) -> Result<(), Refusal> {
        let specs = disks.iter().map(disk_spec).collect::<Result<Vec<_>, _>>()?;
        let seeded = if self.seed {
            self.store.seed(&specs)
        } else {
            Ok(false)
        };
        let prepared = seeded.and_then(|_| self.store.prepare(&specs));
        prepared.map_err(|error| {
            let detail = chain(&error);
            match error {
                ReplicaError::Receiving | ReplicaError::PointInUse(_) => Refusal::NotNow { detail },
                _ => Refusal::Disks { detail },
            }
        })
    }
}

impl Served {
    fn disk_status(&self, image: &ImageStatus) -> DiskStatus {
        DiskStatus {
            name: image.name.clone(),
            size: image.geometry.size,
            image: self.folder.join(&image.file).display().to_string(),
            format: image.format.to_string(),
            path: None,
        }
    }

    pub(super) fn status(&self) -> MachineStatus {
        let (store, points) = (self.store.status(), self.store.points());
        let (tests, last_test) = (self.tests.status(), self.tests.last());
        let progress = self.progress.lock();
        let suspended = progress.suspended();
        let state = replication_state(store.head, &progress);
        let now = self.clock.wall();
        let mut rpo = progress.rpo.status(now, false);
        if rpo.now_ms.is_none() {
            // Nothing received since this node started: the last point is as old as its cut.
            rpo.now_ms = store.last_cut.map(|cut| millis(now.since(cut)));
        }
        let by_the_primary =
            || suspended.map(|since| format!("suspended by the primary since {since}"));
        let signs = Signs {
            state,
            stopped: progress.problem.clone().or_else(by_the_primary),
            disk: None,
            points: squeezed(store.squeeze),
            interval: Duration::from_secs(1),
            rpo: rpo.now_ms.map(Duration::from_millis),
        };
        let copy = self.importing.status(self.clock.monotonic());
        let (health, mut reasons) = match (&progress.connected, signs.health()) {
            (None, (health, mut reasons)) if suspended.is_none() => {
                reasons.push("the primary is not connected".into());
                (health.max(Health::Warning), reasons)
            }
            (_, judged) => judged,
        };
        if copy.is_some() {
            reasons.push("a portable copy is being imported".into());
        }
        let disks = store.images.iter().map(|image| self.disk_status(image));
        MachineStatus {
            name: self.name.clone(),
            id: Some(self.id),
            role: Role::Replica,
            part: None,
            suspended,
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
            sync_on_flush: None,
            copy,
            resync: None,
            verify: None,
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

fn replication_state(head: Head, progress: &ReceiveProgress) -> ReplicationState {
    match head {
        _ if progress.problem.is_some() => ReplicationState::Error,
        Head::Empty => ReplicationState::WaitingForInitialReplication,
        Head::Copying | Head::Copied(_) => ReplicationState::InitialReplicationInProgress,
        Head::Complete(_) if progress.suspended().is_some() => ReplicationState::Suspended,
        Head::Complete(_) => ReplicationState::Replicating,
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
        Squeeze::NoRescue => {
            "space is short: the rescue point of the former primary and all recovery points but the latest were dropped"
        }
        Squeeze::Refusing => {
            "space is used up: no more changes are taken; end test failovers, make room, or raise --space-max"
        }
    };
    Some(text.to_owned())
}

pub(super) fn disk_spec(spec: &message::DiskSpec) -> Result<replica::DiskSpec, Refusal> {
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        base::{clock::SystemClock, ids::SystemIds},
        storage::memory::{MemoryFolder, Power},
    };

    /// A start that failed dropped it, and its upkeep merged on, beyond the point that it had held until then.
    #[test]
    fn nobody_merges_any_more_once_it_is_dropped() {
        let dir = tempfile::tempdir().unwrap();
        let folder = MemoryFolder::new(&Power::new());
        for _ in 0..20 {
            let ledger = Ledger::open_in(&*folder, "node.redb").unwrap();
            let opening = Opening {
                id: MachineId(uuid::Uuid::from_u128(1)),
                name: Name::new("vm").unwrap(),
                path: dir.path().to_owned(),
                folder: folder.clone(),
                ledger: Arc::new(ledger),
                ids: Arc::new(SystemIds::default()),
                clock: Arc::new(SystemClock::default()),
                keeping: Keeping::default(),
                mounter: Mounter::default(),
                locks: Vec::new(),
                held: None,
            };
            let served = Served::open(opening).unwrap();
            let store = Arc::downgrade(&served.store);
            drop(served);
            assert_eq!(store.strong_count(), 0);
        }
    }
}
