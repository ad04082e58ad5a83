//! Opening a replica: what a crash left is taken up, finished or removed.

use std::sync::Arc;

use parking_lot::Mutex;

use super::{
    error::ReplicaError,
    log::{LOG_SUFFIX, LogFile, log_name},
    part::PART_SUFFIX,
    pins::Pins,
    record::{Base, Record},
    state::{Shared, State, Tally},
    status::ReplicaOptions,
    store::MachineReplica,
};
use crate::{
    base::{
        chain::chain,
        ids::{Ids, MachineId},
        units::Epoch,
    },
    storage::{Folder, Open, ledger::Ledger},
};

impl MachineReplica {
    /// Opens the replica of machine `id` in `folder`, or begins an empty one. Nobody else uses the folder.
    ///
    /// An interrupted merge is not redone here, since that may take long and a failover cannot wait for it: views are
    /// right in the middle of it, and the next [`merge`](Self::merge) starts it again.
    pub fn open(
        folder: Arc<dyn Folder>,
        ledger: Arc<Ledger>,
        ids: Arc<dyn Ids>,
        id: MachineId,
        options: ReplicaOptions,
    ) -> Result<Self, ReplicaError> {
        let shared = Arc::new(Shared {
            folder,
            ledger,
            ids,
            id,
            options,
            merging: Mutex::new(()),
            state: Mutex::default(),
            pins: Arc::<Pins>::default(),
            tally: Tally::default(),
        });
        shared.recover()?;
        Ok(Self { shared })
    }
}

impl Shared {
    fn recover(&self) -> Result<(), ReplicaError> {
        let names = self.names()?;
        for name in names.iter().filter(|name| name.ends_with(PART_SUFFIX)) {
            self.remove(name)?;
        }
        // A name that a killed process left may not be durable yet: before anything is built on it, it is made so.
        self.sync_folder()?;
        let mut state = self.state.lock();
        let record: Option<Record> = self.ledger.get(&Record::key(self.id))?;
        let Some(record) = record else {
            return Ok(());
        };
        if record.base == Base::Creating {
            self.remove_logs(&names)?;
            return self.forget(&record);
        }
        state.disks = self.open_images(&record)?;
        let found = self.find_logs(&record, &names)?;
        self.link_logs(&mut state, record, found)?;
        self.end_growth(&mut state)
    }

    /// Removes all delta logs.
    pub(super) fn remove_logs(&self, names: &[String]) -> Result<(), ReplicaError> {
        for name in names.iter().filter(|name| epoch_of(name).is_some()) {
            self.remove(name)?;
        }
        Ok(())
    }

    /// All logs that the base does not hold yet; the others are removed.
    fn find_logs(
        &self,
        record: &Record,
        names: &[String],
    ) -> Result<Vec<Arc<LogFile>>, ReplicaError> {
        let floor = record.base.floor().map(|point| point.lineage.epoch);
        let mut found = Vec::new();
        for name in names {
            let Some(epoch) = epoch_of(name) else {
                continue;
            };
            if floor.is_none_or(|floor| epoch <= floor) {
                self.remove(name)?;
                continue;
            }
            let storage = self
                .folder
                .open(name, Open::Read)
                .map_err(ReplicaError::io("open", name))?;
            let log = match LogFile::open(storage, name) {
                // Nobody was told of it: a power cut left the name of a log without its bytes.
                Err(error @ ReplicaError::Log { .. }) if is_unrecorded(record, epoch) => {
                    tracing::warn!(machine = %self.id, name, "removed: {}", chain(&error));
                    self.remove(name)?;
                    continue;
                }
                opened => opened?,
            };
            let ours = log.header().machine == self.id && record.had_disks(&log.header().disks);
            if ours && log.epoch() == epoch {
                found.push(Arc::new(log));
            } else {
                tracing::warn!(machine = %self.id, name, "a delta log of something else lies in the folder");
            }
        }
        Ok(found)
    }

    /// Links the logs from the base to the recorded head, and takes up one that was complete but not recorded.
    fn link_logs(
        &self,
        state: &mut State,
        mut record: Record,
        mut found: Vec<Arc<LogFile>>,
    ) -> Result<(), ReplicaError> {
        let floor = record.base.floor().map(|point| point.lineage);
        let mut logs = Vec::new();
        let mut at = record.head;
        while let Some(lineage) = at.filter(|_| at != floor) {
            let position = found.iter().position(|log| log.lineage() == lineage);
            let position = position.ok_or(ReplicaError::LogMissing(lineage.epoch))?;
            let log = found.swap_remove(position);
            at = log.header().parent;
            logs.push(log);
        }
        logs.reverse();

        let next = found
            .iter()
            .enumerate()
            .filter(|(_, log)| !record.discarding && log.header().parent == record.head)
            .max_by_key(|(_, log)| log.epoch())
            .map(|(position, _)| position);
        let before = record.clone();
        // Proved here: nobody was told of it.
        let next = match next.map(|position| (position, found[position].frames())) {
            Some((position, Ok(_))) => Some(found.swap_remove(position)),
            Some((_, Err(error @ ReplicaError::Log { .. }))) => {
                tracing::warn!(machine = %self.id, "not taken up: {}", chain(&error));
                None
            }
            Some((_, Err(error))) => return Err(error),
            None => None,
        };
        if let Some(log) = next {
            tracing::info!(machine = %self.id, epoch = %log.epoch(), "took up a complete delta log");
            record.head = Some(log.lineage());
            record.generation = Some(log.header().generation);
            logs.push(log);
        }
        for log in found {
            tracing::warn!(machine = %self.id, epoch = %log.epoch(), "removed a delta log that is not part of the history");
            self.remove(&log_name(log.epoch()))?;
        }
        if record.discarding {
            self.sync_folder()?;
            record.discarding = false;
        }
        state.logs = logs;
        if record == before {
            state.record = Some(record);
            Ok(())
        } else {
            self.record(state, record)
        }
    }
}

/// Whether a log of this epoch is later than what the record names.
fn is_unrecorded(record: &Record, epoch: Epoch) -> bool {
    record.head.is_none_or(|head| epoch > head.epoch)
}

/// The epoch that a log with this file name ends with.
pub(super) fn epoch_of(name: &str) -> Option<Epoch> {
    let digits = name.strip_suffix(LOG_SUFFIX)?;
    let epoch = Epoch(digits.parse().ok()?);
    (name == log_name(epoch)).then_some(epoch)
}
