//! A machine: a set of disks that are always cut together, as the sender of a replica sees it.
//!
//! # The life of an epoch
//! [`Machine::cut`] closes the open epoch; [`Machine::take`] hands out what is owed until it answers
//! [`Taken::Drained`]; [`Machine::pending`] notes what the trailer will say before it is sent;
//! [`Machine::staged`] ends the epoch when the replica has it durably. If the connection breaks,
//! [`Machine::disconnected`] makes everything owed again, and [`Machine::reconcile`] finds out on the next one what the
//! replica holds. Epoch 0 is the initial copy: [`Machine::begin_initial_copy`] opens it, and
//! [`Machine::copied`] shrinks it as parts of it become durable. A resync is an epoch that is sifted before it is cut; see
//! [`sift`](super::sift). A machine whose history began on another host starts with
//! [`Machine::continue_from`] instead; see [`swap`](super::swap).
//!
//! # Crash contract
//! The record in the node's store is durable before a call returns. Bits of an epoch are cleared after the record says
//! that the replica holds it; a crash between the two costs a resend. What a restart finds is in `open`.
#![forbid(unsafe_code)]

use std::{io, sync::Arc};

use tracing::{debug, info};

use super::{
    answers::{
        CopyScope, Counters, Cut, CutRefused, MachineError, MachineState, Reconcile, ReplicaHead,
        Standing,
    },
    core::{Closing, ClosingKind, Control, Core, Tracked},
    disk::Volume,
    open::{DiskSource, MachineOptions, OpenError, open_core},
    record::{ImageStamp, Trust},
    take::{Cursors, TakeError, Taken},
};
use crate::{
    base::{
        ids::{Lineage, MachineId, Name},
        limits::EPOCH_MAX,
        sync::{MutexGuard, atomic::Ordering},
        units::{BLOCK_BYTES, DiskIndex, Epoch, Extent},
    },
    disk::Content,
    protocol::sender::Side,
    storage::ledger::Ledger,
    track::{bits::Bits, header::Slot, locks::Traffic, state::StateDir},
};

/// A protected machine on its primary host.
#[derive(Debug)]
pub struct Machine {
    pub(super) core: Arc<Core>,
    volumes: Vec<Arc<Volume>>,
}

impl Machine {
    /// Opens the machine over its disks: `state` holds its maps and intent logs, `ledger` its record. Everything that was
    /// not durable on the replica when it was last open is owed again.
    pub fn open(
        options: MachineOptions,
        disks: Vec<DiskSource>,
        state: &StateDir,
        ledger: Arc<Ledger>,
    ) -> Result<Arc<Self>, OpenError> {
        let core = Arc::new(open_core(options, disks, state, ledger)?);
        let volumes = core.disks.iter().map(|disk| disk.index);
        let volumes = volumes
            .map(|index| Arc::new(Volume::new(Arc::clone(&core), index)))
            .collect();
        Ok(Arc::new(Self { core, volumes }))
    }

    /// Which machine it is.
    pub fn id(&self) -> MachineId {
        self.core.options.id
    }

    /// Its name.
    pub fn name(&self) -> &Name {
        &self.core.options.name
    }

    /// The disks, in the order of the disk table. What the guest writes must pass through these.
    pub fn volumes(&self) -> &[Arc<Volume>] {
        &self.volumes
    }

    /// The head that the replica acknowledged last.
    pub fn lineage(&self) -> Option<Lineage> {
        self.core.control.lock().record.lineage
    }

    /// The epoch that is open. After a merge that is the one the closing epoch went into.
    pub fn open_epoch(&self) -> Epoch {
        self.core.epochs.read().open
    }

    /// The epoch that is cut and not yet durable on the replica.
    pub fn closing_epoch(&self) -> Option<Epoch> {
        self.core.epochs.read().closing.map(|closing| closing.epoch)
    }

    /// Begins the initial copy: what the disks hold becomes owed to epoch 0, which is closing, and epoch 1 opens. The
    /// lineage is gone. An initial copy under way begins anew. Reads the allocation of all disks first.
    pub fn begin_initial_copy(&self, scope: CopyScope) -> Result<(), MachineError> {
        let mut control = self.control()?;
        let mut takes = self.core.takes.lock();
        // Marked and durable before the record says that a copy is under way: what is not marked is never copied. What
        // changes its allocation meanwhile is written, and so marked, in this map as well.
        let blocks = self.core.disks.iter().map(|disk| held(disk, scope));
        let blocks: Vec<Bits> = blocks.collect::<Result<_, _>>()?;
        let open = self.mark_held(&mut control, &blocks)?;
        self.record(&mut control, "the initial copy", |record| {
            record.copying = true;
            record.lineage = None;
            record.origin = None;
            record.pending = None;
            record.resync = None;
        })?;
        let mut epochs = self.core.epochs.write();
        epochs.slot = open.other();
        epochs.open = Epoch::INITIAL.next();
        epochs.closing = Some(Closing {
            epoch: Epoch::INITIAL,
            kind: ClosingKind::Copy,
        });
        epochs.breaks += 1;
        for disk in &self.core.disks {
            disk.suspects.clear();
            disk.owed(open).add(disk.map(open));
        }
        drop(epochs);
        *takes = Cursors::default();
        drop(takes);
        info!(machine = %self.name(), blocks = self.counters().closing_blocks, "initial copy begins");
        Ok(())
    }

    /// Closes the open epoch on all disks at one instant.
    pub fn cut(&self) -> Result<Cut, CutRefused> {
        let mut control = self.core.control.lock();
        if control.closed {
            return Err(CutRefused::Closed);
        }
        if let Some(reason) = self.core.lost.get() {
            return Err(CutRefused::TrackingLost(reason.clone()));
        }
        if let Some(epoch) = self.closing_epoch() {
            return Err(CutRefused::Closing(epoch));
        }
        if control.record.lineage.is_none() {
            return Err(CutRefused::NoCopy);
        }
        if let Err((disk, source)) = self.core.clear_stale() {
            // Reported by the machine's state, whatever becomes of the record.
            let _ = self.core.lose_tracking_under(&mut control, disk, &source);
            return Err(CutRefused::Sync(source));
        }
        self.core.join_runs();
        let (epoch, time, slot) = {
            let mut epochs = self.core.epochs.write();
            match self.core.suspect_count() {
                0 => {}
                suspects => return Err(CutRefused::Suspects(suspects)),
            }
            let (epoch, slot) = (epochs.open, epochs.slot);
            epochs.closing = Some(Closing {
                epoch,
                kind: ClosingKind::Delta,
            });
            epochs.open = epoch.next();
            epochs.slot = slot.other();
            (epoch, self.core.options.clock.wall(), slot)
        };
        // The closing map takes no more bits, so this is the number at the cut.
        let blocks = self
            .core
            .disks
            .iter()
            .map(|disk| disk.map(slot).count())
            .sum();
        debug!(machine = %self.name(), %epoch, blocks, "cut");
        Ok(Cut {
            epoch,
            time,
            blocks,
        })
    }

    /// Takes the next run that is owed to `epoch`, which must be the one on that `side`, and reads it: at most `max`
    /// bytes, not less than a block and not more than a frame. It is then no longer owed. Calls are made one after the
    /// other; what is taken goes into the log in that order, or [`Machine::disconnected`] must be called.
    pub fn take(&self, side: Side, epoch: Epoch, max: u64) -> Result<Taken, TakeError> {
        self.core.take(side, epoch, max)
    }

    /// Notes durably what the head will be once the trailer arrives. Called before the trailer is sent, so that a lost
    /// acknowledgement is recognised later.
    pub fn pending(&self, lineage: Lineage) -> Result<(), MachineError> {
        let mut control = self.control()?;
        self.check_drained(lineage.epoch)?;
        self.record(&mut control, "the pending epoch", |record| {
            record.pending = Some(lineage);
        })
    }

    /// The closing epoch is durable on the replica: its blocks are not owed any more, whatever happens.
    pub fn staged(&self, lineage: Lineage) -> Result<(), MachineError> {
        let mut control = self.control()?;
        self.staged_under(&mut control, lineage)
    }

    /// Parts of the initial copy are durable on the replica: a restart need not send them again. Runs of which something
    /// is still owed, and all runs when no initial copy is under way, are ignored.
    pub fn copied(&self, runs: &[(DiskIndex, Extent)]) {
        let _control = self.core.control.lock();
        let epochs = self.core.epochs.read();
        if epochs
            .closing
            .is_none_or(|closing| closing.kind != ClosingKind::Copy)
        {
            return;
        }
        let slot = epochs.slot.other();
        for (disk, run) in runs {
            let Some(disk) = self.core.disks.get(disk.index()) else {
                continue;
            };
            let inside = run.checked_end().is_some_and(|end| end <= disk.size);
            if inside && !disk.owed(slot).any(run.blocks()) {
                disk.map(slot).clear(run.blocks());
            }
        }
    }

    /// Gives the closing epoch up: it becomes part of the open one. What was sent of it stays good in the log it was sent
    /// into, if that goes on as the log of the open epoch; otherwise call [`Machine::disconnected`]. Does nothing
    /// without a closing epoch, and during the initial copy.
    pub fn merge(&self) {
        let _control = self.core.control.lock();
        let mut epochs = self.core.epochs.write();
        if epochs
            .closing
            .is_some_and(|closing| closing.kind == ClosingKind::Delta)
        {
            self.core.merge(&mut epochs);
            info!(machine = %self.name(), into = %epochs.open, "epoch merged");
        }
    }

    /// The logs under way are lost. Everything that is not durable on the replica is owed again: to the open epoch, and
    /// of the initial copy, which goes on, what was not [`copied`](Machine::copied) to epoch 0.
    pub fn disconnected(&self) {
        let _control = self.core.control.lock();
        self.owe_all();
    }

    /// Compares what the replica holds with what we know of it, and makes everything else owed. Called on each new
    /// connection, before anything is taken.
    pub fn reconcile(&self, head: ReplicaHead) -> Result<Reconcile, MachineError> {
        let mut control = self.control()?;
        let (lineage, pending) = (control.record.lineage, control.record.pending);
        let ReplicaHead::At(found) = head else {
            self.owe_all();
            let resumes = control.record.copying && head == ReplicaHead::Copying;
            return Ok(if resumes {
                Reconcile::CopyResumes
            } else {
                Reconcile::CopyNeeded
            });
        };
        if pending == Some(found) {
            self.acknowledge_late(&mut control, found)?;
            self.resume_resync(&control);
            return Ok(Reconcile::AckLost);
        }
        self.owe_all();
        if lineage != Some(found) {
            return Ok(Reconcile::CopyNeeded);
        }
        if pending.is_some() {
            self.record(&mut control, "the head", |record| record.pending = None)?;
        }
        self.resume_resync(&control);
        Ok(Reconcile::InStep)
    }

    /// Cools regions that have not been written for a while, so that a power cut makes less be sent again. To be called
    /// now and then, a minute apart for example; it flushes and syncs.
    pub fn maintain(&self) -> Result<(), MachineError> {
        for disk in &self.core.disks {
            let cooled = disk.hot.cool_idle(&disk.locks, &|| self.core.settle(disk));
            let cooled = cooled.or_else(|error| self.core.hot_failed(disk, &error));
            cooled.map_err(|source| MachineError::Disk {
                disk: disk.name.clone(),
                source,
            })?;
        }
        Ok(())
    }

    /// Numbers, each exact, together not of one instant.
    pub fn counters(&self) -> Counters {
        let epochs = *self.core.epochs.read();
        let (open, closing) = (epochs.slot, epochs.slot.other());
        let mut counters = Counters::default();
        for disk in &self.core.disks {
            let Traffic {
                writes,
                bytes,
                folded_blocks,
            } = disk.locks.traffic();
            counters.guest_writes += writes;
            counters.guest_bytes += bytes;
            counters.folded_blocks += folded_blocks;
            counters.open_blocks += disk.map(open).count();
            counters.owed_open_blocks += disk.owed(open).count();
            counters.suspect_blocks += disk.suspects.count();
            if epochs.closing.is_some() {
                counters.closing_blocks += disk.map(closing).count();
                counters.owed_closing_blocks += disk.owed(closing).count();
            }
            counters.hot_regions += crate::base::units::to_u64(disk.hot.count());
        }
        {
            let preserve = self.core.preserve.lock();
            counters.preserve_bytes = preserve.bytes();
            counters.owed_closing_blocks += preserve.count();
        }
        counters.merged_epochs = self.core.merged.load(Ordering::Relaxed);
        counters.preserved_blocks = self.core.preserved.load(Ordering::Relaxed);
        counters
    }

    /// Where the machine stands, and what is wrong with it.
    pub fn state(&self) -> MachineState {
        let control = self.core.control.lock();
        let standing = if control.record.copying {
            Standing::Copying
        } else if control.record.lineage.is_some() {
            Standing::Following
        } else {
            Standing::Unprotected
        };
        let stopped = self.core.disks.iter().filter_map(|disk| {
            let reason = disk.stopped.get()?;
            Some((disk.name.clone(), reason.clone()))
        });
        let failing = self.core.disks.iter().filter_map(|disk| {
            let told = disk.trouble.told()?;
            Some((disk.name.clone(), told))
        });
        MachineState {
            standing,
            resync: control.record.resync,
            tracking_lost: self.core.lost.get().cloned(),
            stopped: stopped.collect(),
            failing: failing.collect(),
        }
    }

    /// Closes images and maps, so that the next open finds exactly what is owed. Called with no write in flight. `stamp`
    /// takes the stamp of an image file after it was closed.
    pub fn close(
        &self,
        stamp: &mut dyn FnMut(DiskIndex) -> io::Result<ImageStamp>,
    ) -> Result<(), MachineError> {
        let mut control = self.core.control.lock();
        if control.closed {
            return Err(MachineError::Closed);
        }
        // Whatever fails from here on, the images take no more writes.
        control.closed = true;
        let mut stamps = Vec::with_capacity(self.core.disks.len());
        for disk in &self.core.disks {
            let closed = disk.inner.close();
            closed.map_err(|source| MachineError::Disk {
                disk: disk.name.clone(),
                source,
            })?;
            let state = |what| move |source| state_error(what, disk.name.clone(), source);
            for map in &disk.maps {
                map.bits().sync().map_err(state("sync the maps"))?;
            }
            disk.hot.clear().map_err(state("empty the intent log"))?;
            stamps.push(stamp(disk.index).map_err(state("stamp the image"))?);
        }
        self.record(&mut control, "the end", |record| {
            // A disk that stopped, or maps that were lost, are not mended by closing them.
            if record.trust == Trust::Open {
                record.trust = Trust::Clean;
            }
            for (disk, stamp) in record.disks.iter_mut().zip(stamps) {
                disk.stamp = stamp;
            }
        })?;
        info!(machine = %self.name(), "closed");
        Ok(())
    }

    pub(super) fn control(&self) -> Result<MutexGuard<'_, Control>, MachineError> {
        let control = self.core.control.lock();
        if control.closed {
            return Err(MachineError::Closed);
        }
        match self.core.lost.get() {
            Some(reason) => Err(MachineError::TrackingLost(reason.clone())),
            None => Ok(control),
        }
    }

    pub(super) fn record(
        &self,
        control: &mut Control,
        what: &'static str,
        change: impl FnOnce(&mut super::record::Record),
    ) -> Result<(), MachineError> {
        let stored = self.core.store(control, change);
        stored.map_err(|source| MachineError::Record { what, source })
    }

    /// Refuses if `epoch` is not closing or something of it was not taken.
    fn check_drained(&self, epoch: Epoch) -> Result<(), MachineError> {
        let epochs = self.core.epochs.read();
        if epochs.closing.is_none_or(|closing| closing.epoch != epoch) {
            return Err(MachineError::NotClosing(epoch));
        }
        let slot = epochs.slot.other();
        let owed = self.core.disks.iter().map(|disk| disk.owed(slot).count());
        let owed = owed.sum::<u64>() + self.core.preserve.lock().count();
        if owed > 0 {
            return Err(MachineError::Owed { epoch, owed });
        }
        Ok(())
    }

    fn staged_under(&self, control: &mut Control, lineage: Lineage) -> Result<(), MachineError> {
        self.check_drained(lineage.epoch)?;
        self.record(control, "the head", |record| {
            record.lineage = Some(lineage);
            record.pending = None;
            record.resync = None;
            record.copying = false;
        })?;
        let slot = {
            let mut epochs = self.core.epochs.write();
            epochs.closing = None;
            epochs.slot.other()
        };
        self.core.pieces.store(0, Ordering::Relaxed);
        for disk in &self.core.disks {
            disk.map(slot).clear_all();
        }
        Ok(())
    }

    /// The replica holds the epoch whose acknowledgement never came.
    fn acknowledge_late(&self, control: &mut Control, head: Lineage) -> Result<(), MachineError> {
        if self.check_drained(head.epoch).is_ok() {
            self.staged_under(control, head)?;
            self.owe_all();
            return Ok(());
        }
        // It was merged, so its blocks are marked in the open epoch: more than needed, never less.
        self.record(control, "the head", |record| {
            record.lineage = Some(head);
            record.pending = None;
            record.copying = false;
        })?;
        self.abort_closing();
        self.owe_all();
        let mut epochs = self.core.epochs.write();
        epochs.open = epochs.open.max(head.epoch.next());
        Ok(())
    }

    /// Merges the closing epoch, be it the initial copy.
    pub(super) fn abort_closing(&self) {
        let mut epochs = self.core.epochs.write();
        if epochs.closing.is_some() {
            self.core.merge(&mut epochs);
        }
    }

    /// A resync that is under way goes on over a new connection.
    fn resume_resync(&self, control: &Control) {
        if control.record.resync.is_some() && !control.record.copying {
            self.suspect_marked();
        }
    }

    fn owe_all(&self) {
        let mut epochs = self.core.epochs.write();
        match epochs.closing.map(|closing| closing.kind) {
            Some(ClosingKind::Delta) => self.core.merge(&mut epochs),
            Some(ClosingKind::Copy) | None => epochs.breaks += 1,
        }
        self.core.pieces.store(0, Ordering::Relaxed);
        let (open, closing) = (epochs.slot, epochs.slot.other());
        for disk in &self.core.disks {
            disk.suspects.unanswered();
            disk.owed(open)
                .add_without(disk.map(open), disk.suspects.waiting());
            if epochs.closing.is_some() {
                disk.owed(closing).add(disk.map(closing));
            }
        }
    }

    fn clear_stale(&self, control: &mut Control) -> Result<(), MachineError> {
        let cleared = self.core.clear_stale();
        cleared.map_err(|(disk, source)| self.sync_failed(control, disk, source))
    }

    /// A failed sync is final: what it was to make durable is lost from the page cache or not, nobody knows.
    pub(super) fn sync_failed(
        &self,
        control: &mut Control,
        disk: &Tracked,
        source: io::Error,
    ) -> MachineError {
        match self.core.lose_tracking_under(control, disk, &source) {
            Ok(()) => state_error("sync the maps", disk.name.clone(), source),
            Err(source) => MachineError::Disk {
                disk: disk.name.clone(),
                source,
            },
        }
    }

    /// Merges the closing epoch and durably marks `blocks` of each disk in the open map, whose slot it returns.
    pub(super) fn mark_held(
        &self,
        control: &mut Control,
        blocks: &[Bits],
    ) -> Result<Slot, MachineError> {
        self.abort_closing();
        self.clear_stale(control)?;
        let open = self.core.epochs.read().slot;
        for (disk, blocks) in self.core.disks.iter().zip(blocks) {
            disk.map(open).add(blocks);
            if let Err(source) = disk.map(open).sync() {
                return Err(self.sync_failed(control, disk, source));
            }
        }
        Ok(open)
    }
}

/// The blocks that a copy of `scope` sends.
pub(super) fn held(disk: &Tracked, scope: CopyScope) -> Result<Bits, MachineError> {
    let held = fleeting(disk)?;
    if scope == CopyScope::Everything {
        held.set_all();
        return Ok(held);
    }
    let mut offset = 0;
    while offset < disk.size {
        let run = disk.inner.run_at(offset);
        let (run, content) = run.map_err(|source| MachineError::Disk {
            disk: disk.name.clone(),
            source,
        })?;
        if content == Content::Data {
            held.set(run.blocks());
        }
        offset = run.end().max(offset + BLOCK_BYTES.min(disk.size - offset));
    }
    Ok(held)
}

/// An empty map in memory.
pub(super) fn fleeting(disk: &Tracked) -> Result<Bits, MachineError> {
    Bits::fleeting(disk.blocks().end)
        .map_err(|source| state_error("find memory for a map", disk.name.clone(), source))
}

/// Refuses a point behind which epochs could run out of numbers: it comes from another host.
pub(super) fn check_epoch(point: Lineage) -> Result<(), MachineError> {
    if point.epoch.0 > EPOCH_MAX {
        return Err(MachineError::EpochTooHigh(point.epoch));
    }
    Ok(())
}

fn state_error(what: &'static str, disk: Name, source: io::Error) -> MachineError {
    MachineError::State { what, disk, source }
}
