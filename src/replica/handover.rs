//! Where replicas come from and go to, other than by an initial copy: a commit of a failover settles the images on one
//! point and gives them away, to be a primary's; a reversal adopts the images of a former primary; images that somebody put
//! there are a seed; a removal leaves nothing.

use std::sync::Arc;

use super::{
    error::ReplicaError,
    index::LogIndex,
    record::{Base, BasePoint, DiskRecord, Record},
    recover::epoch_of,
    rescue::Rescue,
    state::{Shared, State},
    status::{DiskSpec, ImageStatus},
    store::{MachineReplica, check_specs, to_record},
};
use crate::{
    base::{
        checksum::Sha256,
        clock::Timestamp,
        ids::{Generation, Lineage},
        units::{DiskIndex, Epoch, Extent},
    },
    delta::Consistency,
    disk::Disk,
};

/// What the images of a former primary hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Adoption {
    /// The point that the next log continues.
    pub lineage: Lineage,
    /// When its cut was made.
    pub cut: Timestamp,
    /// Whether the images hold exactly that point. If not, the next log has to hold every block that may differ, there
    /// is no recovery point before it, and what the images hold is kept as a rescue point.
    pub exact: bool,
    /// The generation that continues it.
    pub generation: Generation,
}

/// An image that a replica gave away, and the open disk in it.
pub type GivenImage = (ImageStatus, Arc<dyn Disk>);

impl MachineReplica {
    /// What logs after point `epoch` changed: what the old primary has and this replica will not have after
    /// [`settle`](Self::settle). By disk and offset; runs neither overlap nor touch. Keep them durable before settling,
    /// since it removes the logs.
    pub fn extents_after(&self, epoch: Epoch) -> Result<Vec<(DiskIndex, Extent)>, ReplicaError> {
        let state = self.shared.state()?;
        let known = self
            .shared
            .points(&state)
            .iter()
            .any(|point| point.lineage.epoch == epoch);
        if !known {
            return Err(ReplicaError::NoPoint(epoch));
        }
        // A point lies between logs, never inside a folded one.
        let later = state.logs.iter().filter(|log| log.epoch() > epoch);
        let later: Vec<_> = later.cloned().collect();
        let disks = state.disks.len();
        drop(state);
        let index = LogIndex::build(later, disks)?;
        let mut extents: Vec<(DiskIndex, Extent)> = Vec::new();
        for disk in (0..).take(disks).map(DiskIndex) {
            for (run, _) in index.runs(disk) {
                match extents.last_mut() {
                    Some((last, before)) if *last == disk && before.end() == run.offset => {
                        before.len += run.len;
                    }
                    _ => extents.push((disk, run)),
                }
            }
        }
        Ok(extents)
    }

    /// Drops all points but `epoch`, a rescue point too, and folds it into the base images, which hold nothing else
    /// afterwards. Views of that point stay right throughout. Refused while a log is being received or a view of another
    /// point is open. Interrupted, it is called again with the same point.
    pub fn settle(&self, epoch: Epoch) -> Result<Lineage, ReplicaError> {
        let shared = &*self.shared;
        let _merging = shared.merging.lock();
        let count = {
            let mut state = shared.state()?;
            shared.go_back(&mut state, epoch)?;
            state.logs.len()
        };
        shared.merge_oldest(count)?;
        let settled = shared.state()?.settled();
        let settled = settled.filter(|point| point.lineage.epoch == epoch);
        // Somebody may have begun to look at an older point, or to send, in the meantime.
        Ok(settled.ok_or(ReplicaError::NotSettled)?.lineage)
    }

    /// Gives the images away: durably forgets the replica, leaves its images in the folder, and hands the open disks to
    /// the caller, who writes them from now on. Refused unless the replica is settled on one point. Later calls fail.
    ///
    /// Views are not asked: one that is open reads on, through the logs it has and the disks that the caller now writes.
    /// It stays right as long as the caller writes nothing that the view has from the images; see to that, or close it.
    ///
    /// Interrupted, the replica is there, settled as it was, or it is gone and the images are complete.
    pub fn retire(&self) -> Result<Vec<GivenImage>, ReplicaError> {
        let shared = &*self.shared;
        let _merging = shared.merging.lock();
        let mut state = shared.state()?;
        if state.receiving {
            return Err(ReplicaError::Receiving);
        }
        let Some(record) = &state.record else {
            return Err(ReplicaError::NotPrepared);
        };
        if state.settled().is_none() {
            return Err(ReplicaError::NotSettled);
        }
        let images: Vec<_> = record.disks.iter().map(DiskRecord::image).collect();
        // A merge may have left some; once the record is gone nobody would know that the images hold them.
        shared.remove_logs(&shared.names()?)?;
        shared.sync_folder()?;
        shared.ledger.remove(&Record::key(shared.id))?;
        state.closed = true;
        tracing::info!(machine = %shared.id, "replica retired, its images are given away");
        Ok(images
            .into_iter()
            .zip(std::mem::take(&mut state.disks))
            .collect())
    }

    /// Makes a replica of images that lie in the folder already, called as the replica would call them (see
    /// [`DiskSpec::file_name`]): those of a primary that became a replica. Nobody else writes them any more, and they
    /// were closed cleanly. Images that do not hold the point exactly become a [rescue point](super::Rescue).
    pub fn adopt(&self, disks: &[DiskSpec], adoption: Adoption) -> Result<(), ReplicaError> {
        check_specs(disks)?;
        let shared = &*self.shared;
        let mut state = shared.state()?;
        if state.record.is_some() {
            return Err(ReplicaError::Changed(
                "there is a replica already".to_owned(),
            ));
        }
        let record = Record {
            disks: disks.iter().map(|disk| to_record(disk, None)).collect(),
            base: Base::At(BasePoint {
                lineage: adoption.lineage,
                cut: adoption.cut,
                consistency: Consistency::Crash,
                exact: adoption.exact,
            }),
            head: Some(adoption.lineage),
            generation: Some(adoption.generation),
            discarding: false,
            growing: false,
            rescue: (!adoption.exact).then_some(Rescue {
                lineage: adoption.lineage,
                cut: adoption.cut,
                generation: adoption.generation,
            }),
        };
        shared.take_images(&mut state, record)?;
        tracing::info!(machine = %shared.id, epoch = %adoption.lineage.epoch, "images adopted");
        Ok(())
    }

    /// Begins with images that somebody put into the folder, called as the replica would call them (see
    /// [`DiskSpec::file_name`]): an old copy of the machine, or a part of one. Whatever they hold, the primary compares it
    /// and sends the rest; until then there is no recovery point. Whether there were any: nothing is done without, and
    /// with a replica that is there already. The first image decides, and then all of them have to be there.
    ///
    /// The point they stand for is known to nobody, so that no primary takes them for what it has sent.
    pub fn seed(&self, disks: &[DiskSpec]) -> Result<bool, ReplicaError> {
        check_specs(disks)?;
        let shared = &*self.shared;
        let mut state = shared.state()?;
        if state.record.is_some() {
            return Ok(false);
        }
        let format = shared.options.format;
        let disks: Vec<_> = disks.iter().map(|disk| to_record(disk, format)).collect();
        let names = shared.names()?;
        let first = disks.first().map(DiskRecord::file_name);
        let present = first.is_some_and(|first| names.contains(&first));
        if !present {
            return Ok(false);
        }
        let mut chain = Sha256::default();
        chain.update(b"seed");
        chain.update(&shared.ids.fresh());
        let lineage = Lineage {
            epoch: Epoch::INITIAL,
            chain: chain.finish(),
        };
        let record = Record {
            disks,
            base: Base::At(BasePoint {
                lineage,
                cut: Timestamp::default(),
                consistency: Consistency::Crash,
                exact: false,
            }),
            head: Some(lineage),
            generation: None,
            discarding: false,
            growing: false,
            rescue: None,
        };
        shared.take_images(&mut state, record)?;
        tracing::info!(machine = %shared.id, "begins with the images that were there");
        Ok(true)
    }

    /// Removes everything: images, logs and record. Refused while a view is open or a log is being received; waits for a
    /// merge. Interrupted, it is finished by the next open. Later calls fail.
    pub fn destroy(&self) -> Result<(), ReplicaError> {
        let shared = &*self.shared;
        let _merging = shared.merging.lock();
        let mut state = shared.idle_state()?;
        let Some(record) = state.record.clone() else {
            state.closed = true;
            return Ok(());
        };
        // From here on the next open removes what is left.
        let gone = Record {
            base: Base::Creating,
            ..record
        };
        shared.ledger.put(&Record::key(shared.id), &gone)?;
        *state = State {
            closed: true,
            ..State::default()
        };
        shared.remove_logs(&shared.names()?)?;
        shared.forget(&gone)?;
        tracing::info!(machine = %shared.id, "replica removed");
        Ok(())
    }
}

impl Shared {
    /// Takes images that are in the folder for those of `record`, durably.
    fn take_images(&self, state: &mut State, record: Record) -> Result<(), ReplicaError> {
        let images = self.open_images(&record)?;
        // Logs of an earlier life must not be taken up as this one's.
        self.remove_logs(&self.names()?)?;
        // Whoever put the images here may not have made their names durable.
        self.sync_folder()?;
        self.record(state, record)?;
        state.disks = images;
        Ok(())
    }

    /// Makes `epoch` the head: all that is newer goes, and a rescue point. The state is locked throughout, so that no
    /// log is staged under the name of one that is being removed.
    fn go_back(&self, state: &mut State, epoch: Epoch) -> Result<(), ReplicaError> {
        if state.receiving {
            return Err(ReplicaError::Receiving);
        }
        if let Some(other) = self.pins.other_than(epoch) {
            return Err(state.in_use(other));
        }
        let points = self.points(state);
        let point = points.iter().find(|point| point.lineage.epoch == epoch);
        let lineage = point.ok_or(ReplicaError::NoPoint(epoch))?.lineage;
        self.end_growth(state)?;
        let record = state.record.clone().ok_or(ReplicaError::NotPrepared)?;
        let back = Record {
            head: Some(lineage),
            discarding: true,
            rescue: None,
            ..record
        };
        let done = Record {
            discarding: false,
            ..back.clone()
        };
        self.record(state, back)?;
        let before = state.logs.len();
        state.logs.retain(|log| log.epoch() <= epoch);
        let dropped = before - state.logs.len();
        tracing::info!(machine = %self.id, %epoch, dropped, "settles on a recovery point");
        // By their names: an earlier attempt may have forgotten some that it could not remove, and one of which nobody
        // knows whether it was recorded is not among them.
        for name in self.names()? {
            if epoch_of(&name).is_some_and(|found| found > epoch) {
                self.remove(&name)?;
            }
        }
        self.sync_folder()?;
        state.unsure = None;
        self.record(state, done)
    }
}
