//! Test failovers of one machine: any point, any number at once, replication undisturbed.
//!
//! A test is a record in the node's store, a folder of layers `tests/<number>` in the machine's folder, and a mount
//! `point-<epoch>-test-<number>`. Numbers count up and are not used again as long as the last one is remembered.
//!
//! # What survives
//! The record is written before anything else is made and removed after the mount is gone. So a node that comes up finds
//! every test that was running and **brings it back** at the same path with what was written in it: all that was
//! acknowledged if the process died, all that was flushed if the host did. This happens before the first merge, so the
//! point is still there. Whoever had the files open has to open them again. What lies in the folder without a record is
//! removed.

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
};

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{
    control::{CancelReport, CancelRequest, OperateError, TestRequest},
    exposure::{ExposeError, Exposure, HideError},
    status::{LastTest, TestResult, TestStatus},
};
use crate::{
    base::{
        chain::chain,
        clock::{Clock, Timestamp},
        ids::{Lineage, MachineId, Name},
    },
    replica::{MachineReplica, Point, ReplicaError},
    shim::{Mounter, Unmount},
    storage::ledger::{Ledger, LedgerError},
};

/// What the node's store knows about a running test.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct TestRecord {
    number: u32,
    point: Lineage,
    #[serde(default)]
    rescue: bool,
    cut: Timestamp,
    started: Timestamp,
    /// Where it is mounted.
    at: PathBuf,
    /// By which whoever started it knows it again.
    #[serde(default)]
    key: Option<Uuid>,
}

/// A test that is running.
#[derive(Debug)]
struct Running {
    record: TestRecord,
    exposure: Exposure,
}

/// Where the tests of a machine live.
#[derive(Clone, Debug)]
pub(super) struct TestPlaces {
    /// For layers: `tests` in the machine's folder.
    pub(super) layers: PathBuf,
    /// For mounts.
    pub(super) mounts: PathBuf,
    /// Who makes them.
    pub(super) mounter: Mounter,
}

/// The tests of one machine.
#[derive(Debug)]
pub(super) struct TestFailovers {
    id: MachineId,
    machine: Name,
    places: TestPlaces,
    ledger: Arc<Ledger>,
    clock: Arc<dyn Clock>,
    running: Mutex<BTreeMap<u32, Running>>,
}

/// Why a test could not be started.
#[derive(Debug, thiserror::Error)]
enum TestError {
    #[error(transparent)]
    Expose(#[from] ExposeError),
    #[error(transparent)]
    Ledger(#[from] LedgerError),
}

impl From<ReplicaError> for TestError {
    fn from(error: ReplicaError) -> Self {
        Self::Expose(error.into())
    }
}

impl TestFailovers {
    /// Brings back what was running. Called before the first merge.
    pub(super) fn open(
        (id, machine): (MachineId, &Name),
        places: TestPlaces,
        ledger: Arc<Ledger>,
        clock: Arc<dyn Clock>,
        store: &MachineReplica,
    ) -> Result<Self, LedgerError> {
        let tests = Self {
            id,
            machine: machine.clone(),
            places,
            ledger,
            clock,
            running: Mutex::default(),
        };
        for key in tests.ledger.keys(&tests.prefix())? {
            let Some(record) = tests.ledger.get::<TestRecord>(&key)? else {
                continue;
            };
            let number = record.number;
            match tests.expose(store, record.clone()) {
                Ok(running) => {
                    tracing::info!(%machine, number, at = %running.record.at.display(), "brought a test failover back");
                    tests.running.lock().insert(number, running);
                }
                Err(error) => {
                    let why = chain(&error);
                    tracing::error!(%machine, number, "a test failover cannot be brought back: {why}");
                    tests.remember(&record, TestResult::Failed(why), 0)?;
                    tests.forget(&record)?;
                }
            }
        }
        tests.sweep();
        Ok(tests)
    }

    fn prefix(&self) -> String {
        format!("test/{}/", self.id)
    }

    fn key(&self, number: u32) -> String {
        // Ten digits hold every number, and sort.
        format!("{}{number:010}", self.prefix())
    }

    fn last_key(&self) -> String {
        format!("last-test/{}", self.id)
    }

    /// The last test that was started.
    pub(super) fn last(&self) -> Option<LastTest> {
        // A record that cannot be read is no reason to have no status.
        self.ledger.get(&self.last_key()).ok().flatten()
    }

    /// All that are running, by number.
    pub(super) fn status(&self) -> Vec<TestStatus> {
        let running = self.running.lock();
        running.values().map(|test| self.describe(test)).collect()
    }

    fn describe(&self, test: &Running) -> TestStatus {
        TestStatus {
            number: test.record.number,
            point: test.record.point,
            rescue: test.record.rescue,
            cut: test.record.cut,
            started: test.record.started,
            written: test.exposure.held(),
            files: test.exposure.paths(&self.machine),
            key: test.record.key,
        }
    }

    /// Starts a test of a point, by default of the latest one. With a key that a running test has, it is that one.
    pub(super) fn start(
        &self,
        store: &MachineReplica,
        request: TestRequest,
    ) -> Result<TestStatus, OperateError> {
        let mut running = self.running.lock();
        let mut known = running.values();
        let known = known.find(|test| test.record.key.is_some() && test.record.key == request.key);
        if let Some(known) = known {
            return Ok(self.describe(known));
        }
        let chosen = choose(store, &self.machine, request)?;
        let number = self.next_number(&running);
        let record = TestRecord {
            number,
            point: chosen.lineage,
            rescue: request.rescue,
            cut: chosen.cut,
            started: self.clock.wall(),
            key: request.key,
            at: self
                .places
                .mounts
                .join(format!("point-{}-test-{number}", chosen.lineage.epoch)),
        };
        let started = self
            .ledger
            .put(&self.key(number), &record)
            .map_err(TestError::from)
            .and_then(|()| self.expose(store, record.clone()));
        match started {
            Ok(test) => {
                self.remember(&record, TestResult::Running, 0)?;
                let status = self.describe(&test);
                running.insert(number, test);
                tracing::info!(machine = %self.machine, number, epoch = %record.point.epoch, at = %record.at.display(), "test failover");
                Ok(status)
            }
            Err(error) => {
                let why = chain(&error);
                let told = self.remember(&record, TestResult::Failed(why.clone()), 0);
                told.and_then(|()| self.forget(&record))?;
                Err(OperateError::Failed(why))
            }
        }
    }

    fn next_number(&self, running: &BTreeMap<u32, Running>) -> u32 {
        let last = self.last().map_or(0, |last| last.number);
        let highest = running.keys().next_back().copied().unwrap_or(0);
        last.max(highest).saturating_add(1)
    }

    fn expose(&self, store: &MachineReplica, record: TestRecord) -> Result<Running, TestError> {
        let view = if record.rescue {
            store.view_rescue()?
        } else {
            store.view(record.point.epoch)?
        };
        if view.point.lineage != record.point {
            return Err(ReplicaError::NoPoint(record.point.epoch).into());
        }
        let images = store.status().images;
        let names: Vec<Name> = images.into_iter().map(|image| image.name).collect();
        let layers = self.layers(record.number);
        let exposure = Exposure::open(
            view,
            &names,
            &self.machine,
            &layers,
            (&record.at, &self.places.mounter),
        )?;
        Ok(Running { record, exposure })
    }

    fn layers(&self, number: u32) -> PathBuf {
        self.places.layers.join(number.to_string())
    }

    /// Ends one test or all of them: unmounts, and removes what was written. One that somebody uses stays, unless forced.
    pub(super) fn cancel(&self, request: CancelRequest) -> Result<CancelReport, OperateError> {
        let mut running = self.running.lock();
        let chosen: Vec<u32> = match request.number {
            Some(number) if running.contains_key(&number) => vec![number],
            Some(number) => {
                return Err(OperateError::NotNow(format!(
                    "machine {} has no test failover {number}",
                    self.machine
                )));
            }
            None => running.keys().copied().collect(),
        };
        if chosen.is_empty() {
            return Err(OperateError::NotNow(format!(
                "machine {} has no test failover",
                self.machine
            )));
        }
        let how = if request.force {
            Unmount::Detach
        } else {
            Unmount::IfUnused
        };
        let mut ended = Vec::new();
        let mut problems = Vec::new();
        for number in chosen {
            let Some(test) = running.get(&number) else {
                continue;
            };
            match test.exposure.hide(how) {
                Ok(()) => {
                    let written = test.exposure.held();
                    let record = test.record.clone();
                    // Lets go of the point: merges go on.
                    running.remove(&number);
                    self.remember(&record, TestResult::Ended, written)
                        .and_then(|()| self.forget(&record))?;
                    tracing::info!(machine = %self.machine, number, "test failover ended");
                    ended.push(number);
                }
                Err(error) => problems.push(format!("test failover {number}: {}", chain(&error))),
            }
        }
        if problems.is_empty() {
            return Ok(CancelReport {
                ended,
                failover: None,
            });
        }
        let mut text = problems.join("; ");
        if !ended.is_empty() {
            text = format!("{text}; ended: {ended:?}");
        }
        Err(OperateError::NotNow(format!(
            "{text}; stop whoever uses it, or repeat with --force"
        )))
    }

    /// Notes what became of a test, unless a later one was started since.
    fn remember(
        &self,
        record: &TestRecord,
        result: TestResult,
        written: u64,
    ) -> Result<(), LedgerError> {
        if self.last().is_some_and(|last| last.number > record.number) {
            return Ok(());
        }
        let ended = (result != TestResult::Running).then(|| self.clock.wall());
        let last = LastTest {
            number: record.number,
            point: record.point,
            cut: record.cut,
            started: record.started,
            ended,
            written,
            result,
        };
        self.ledger.put(&self.last_key(), &last)
    }

    /// Removes the record, then the files.
    fn forget(&self, record: &TestRecord) -> Result<(), LedgerError> {
        self.ledger.remove(&self.key(record.number))?;
        // Whatever is left, the next start sweeps away.
        remove_all(&self.layers(record.number));
        remove_empty(&record.at);
        Ok(())
    }

    /// Removes layers and mount points that no record speaks of.
    fn sweep(&self) {
        let running = self.running.lock();
        for entry in fs::read_dir(&self.places.layers)
            .into_iter()
            .flatten()
            .flatten()
        {
            let name = entry.file_name();
            let Some(name) = name.to_str() else { continue };
            match name.parse() {
                Ok(number) if !running.contains_key(&number) => remove_all(&entry.path()),
                _ => {}
            }
        }
        for entry in fs::read_dir(&self.places.mounts)
            .into_iter()
            .flatten()
            .flatten()
        {
            let at = entry.path();
            let ours = entry.file_name().to_str().is_some_and(is_mount_name);
            if ours && !running.values().any(|test| test.record.at == at) {
                match self.places.mounter.recover_stale(&at) {
                    Ok(_) => remove_empty(&at),
                    Err(error) => {
                        tracing::warn!(at = %at.display(), %error, "a mount of a test failover is left behind");
                    }
                }
            }
        }
    }

    /// Takes all tests out of the tree and makes them durable; they come back with the next start. Those who still use
    /// one get errors from now on.
    pub(super) fn rest(&self) {
        for test in std::mem::take(&mut *self.running.lock()).into_values() {
            let number = test.record.number;
            let mut hidden = test.exposure.hide(Unmount::IfUnused);
            if let Err(error @ HideError::InUse { .. }) = &hidden {
                tracing::warn!(machine = %self.machine, number, "{error}; detached, as the node stops");
                hidden = test.exposure.hide(Unmount::Detach);
            }
            if let Err(error) = hidden.and_then(|()| test.exposure.flush()) {
                tracing::error!(machine = %self.machine, number, "a test failover did not end cleanly: {}", chain(&error));
            }
        }
    }
}

impl From<LedgerError> for OperateError {
    fn from(error: LedgerError) -> Self {
        Self::Failed(chain(&error))
    }
}

/// The point that is asked for: the rescue point, that of an epoch, or the latest.
pub(super) fn choose(
    store: &MachineReplica,
    machine: &Name,
    TestRequest { point, rescue, .. }: TestRequest,
) -> Result<Point, OperateError> {
    let none = |text: String| OperateError::NotNow(text);
    if rescue {
        let rescue = store.rescue();
        return rescue
            .map(|rescue| rescue.point())
            .ok_or_else(|| none(format!("machine {machine} has no rescue point")));
    }
    let points = store.points();
    let chosen = match point {
        Some(epoch) => points.iter().find(|point| point.lineage.epoch == epoch),
        None => points.last(),
    };
    chosen.copied().ok_or_else(|| {
        none(match point {
            Some(epoch) => format!(
                "machine {machine} has no recovery point {epoch}: see `understudy points {machine}`"
            ),
            None => format!("machine {machine} has no recovery point yet"),
        })
    })
}

/// Whether a folder is one that a test was mounted at.
fn is_mount_name(name: &str) -> bool {
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    name.strip_prefix("point-")
        .and_then(|rest| rest.split_once("-test-"))
        .is_some_and(|(epoch, number)| digits(epoch) && digits(number))
}

fn remove_all(path: &Path) {
    said(path, fs::remove_dir_all(path));
}

fn remove_empty(path: &Path) {
    said(path, fs::remove_dir(path));
}

fn said(path: &Path, removed: io::Result<()>) {
    if let Err(error) = removed
        && error.kind() != io::ErrorKind::NotFound
    {
        tracing::warn!(path = %path.display(), %error, "cannot remove what a test failover left");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_our_own_mount_points_are_swept() {
        assert!(is_mount_name("point-41-test-2"));
        for other in [
            "point-41",
            "point-x-test-1",
            "point-41-test-",
            "data",
            "point-1-test-2x",
        ] {
            assert!(!is_mount_name(other), "{other}");
        }
    }
}
