//! What a restart finds: from records, maps and intent logs to a machine that knows what may differ.
//!
//! | found                                             | owed afterwards                                       |
//! |---------------------------------------------------|-------------------------------------------------------|
//! | closed cleanly                                    | both maps                                             |
//! | killed, same boot                                 | both maps: mapped words survive the process           |
//! | another boot (power cut), or a flush failed       | both maps and all blocks of hot regions               |
//! | maps missing or foreign, intent log unreadable    | the whole disk                                        |
//! | image changed while closed                        | the whole disk                                        |
//! | disk grown, and nothing else                      | as it was: what is new reads as zeros on both sides   |
//! | tracking was lost                                 | all disks                                             |
//! | other disks than before                           | all disks, and the lineage is gone                    |
//!
//! A changed set of disks is no error: the guest starts, and the replica is told to copy anew. While an initial copy is
//! under way all of this is owed to epoch 0, else to the open epoch. Its number is one above all that the replica may
//! hold. Where more is marked than was written, or a resync was under way, all of it is *suspect* rather than owed: see
//! [`sift`](super::sift).
//!
//! # Crash contract
//! The two maps become one (bits are added to the first, which is synced, before the second is emptied), then the image is
//! flushed and the intent log emptied, then the files are adopted by this mount, then the record is written. A crash
//! anywhere leaves a state of which the next open makes the same or more.
#![forbid(unsafe_code)]

use std::{
    collections::BTreeSet,
    io,
    sync::{Arc, OnceLock},
};

use tracing::{info, warn};

use super::{
    core::{Closing, ClosingKind, Control, Core, Epochs, Tracked},
    grow,
    record::{DiskRecord, ImageStamp, Record, ResyncReason, Trust},
    take::Cursors,
    trouble::Trouble,
};
use crate::{
    base::{
        clock::Clock,
        ids::{MachineId, Name},
        limits::{DISK_BYTES_MAX, DISKS_PER_MACHINE_MAX},
        sync::{Mutex, RwLock, atomic::AtomicU64},
        units::{BLOCKS_PER_REGION, DiskIndex, Epoch},
    },
    disk::{Disk, DiskError},
    storage::ledger::{Ledger, LedgerError},
    track::{
        bits::Bits,
        header::{Owner, Slot},
        hot::Hot,
        intent::IntentLog,
        locks::RegionLocks,
        map::Map,
        preserve::Preserve,
        state::StateDir,
        suspects::Suspects,
    },
};

/// What a machine is opened with.
#[derive(Clone, Debug)]
pub struct MachineOptions {
    /// Which machine it is.
    pub id: MachineId,
    /// Its name, for people.
    pub name: Name,
    /// Tells the time of a cut.
    pub clock: Arc<dyn Clock>,
    /// Names the present boot of the host: the content of `/proc/sys/kernel/random/boot_id`.
    pub boot_id: String,
    /// Most memory for preserved blocks, in bytes; see [`PRESERVE_BYTES_MAX`](crate::base::limits::PRESERVE_BYTES_MAX).
    pub preserve_bytes_max: u64,
    /// Most hot regions of a disk; see [`HOT_REGIONS_MAX`](crate::track::intent::HOT_REGIONS_MAX).
    pub hot_regions_max: usize,
    /// Most frames that the log of an epoch may have: see [`take`](super::take), and
    /// [`DELTA_FRAMES_MAX`](crate::base::limits::DELTA_FRAMES_MAX).
    pub frames_max: u64,
}

/// A disk to track.
#[derive(Clone, Debug)]
pub struct DiskSource {
    /// Its name, unique in the machine.
    pub name: Name,
    /// The disk. From now on only the machine writes to it.
    pub disk: Arc<dyn Disk>,
    /// The image file as the caller saw it before opening it.
    pub stamp: ImageStamp,
}

/// Why a machine cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// None, or too many.
    #[error("a machine has 1 to {DISKS_PER_MACHINE_MAX} disks, this one has {0}")]
    DiskCount(usize),
    /// Two disks of one name.
    #[error("two disks of the machine are called {0}: give them different names")]
    DuplicateName(Name),
    /// Larger than anything we track.
    #[error("disk {name} has {size} bytes, more than the {DISK_BYTES_MAX} that can be tracked")]
    DiskSize {
        /// The disk.
        name: Name,
        /// Its size in bytes.
        size: u64,
    },
    /// The state folder failed.
    #[error("cannot {what} of disk {disk} in the state folder")]
    State {
        /// What was to be done.
        what: &'static str,
        /// The disk.
        disk: Name,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The image cannot be flushed, so that nothing is known of what it holds.
    #[error("cannot flush disk {disk}")]
    Flush {
        /// The disk.
        disk: Name,
        /// What it said.
        #[source]
        source: DiskError,
    },
    /// The node's store failed.
    #[error("cannot read or write the machine's record")]
    Ledger(#[from] LedgerError),
}

/// What the last mount left, as far as all disks have it in common.
struct Past {
    record: Record,
    /// Whether the machine was known.
    known: bool,
    /// Whether hot regions count: the power was cut, or an image could not be flushed.
    power_cut: bool,
}

impl Past {
    /// The disk as the last mount knew it: smaller, if it has grown.
    fn before(&self, owner: Owner) -> Owner {
        let disk = self.record.disks.get(owner.disk.index());
        let size = disk
            .filter(|_| self.known)
            .map_or(owner.size, |disk| disk.size);
        Owner { size, ..owner }
    }
}

pub(super) fn open_core(
    options: MachineOptions,
    sources: Vec<DiskSource>,
    state: &StateDir,
    ledger: Arc<Ledger>,
) -> Result<Core, OpenError> {
    check(&sources)?;
    let disk_records = sources.iter().map(|source| DiskRecord {
        name: source.name.clone(),
        size: source.disk.geometry().size,
        stamp: source.stamp,
    });
    let disk_records: Vec<DiskRecord> = disk_records.collect();
    let key = Record::key(options.id);
    let mut past = past(&ledger, &key, &options.boot_id, &disk_records)?;
    let mut disks = Vec::with_capacity(sources.len());
    for (index, source) in (0..).map(DiskIndex).zip(sources) {
        let owner = Owner {
            machine: options.id,
            disk: index,
            size: source.disk.geometry().size,
        };
        let (disk, reason) = open_disk(state, owner, source, &past, options.hot_regions_max)?;
        past.record.resync = past.record.resync.or(reason);
        disks.push(disk);
    }
    let record = Record {
        mount: past.record.mount + 1,
        boot_id: options.boot_id.clone(),
        // What could not be believed is marked by now.
        trust: Trust::Open,
        disks: disk_records,
        ..past.record
    };
    ledger.put(&key, &record)?;
    let epochs = first_epochs(&record);
    // Nobody knows any more which of the marks were known writes.
    let resync = record.resync.filter(|_| epochs.closing.is_none());
    for disk in &disks {
        match resync {
            Some(_) => disk.suspects.suspect(disk.map(Slot::A)),
            None => disk.owed(Slot::A).add(disk.map(Slot::A)),
        }
    }
    if let Some(reason) = record.resync {
        warn!(machine = %options.name, "blocks may differ from the replica: {reason}");
    }
    info!(machine = %options.name, epoch = %epochs.open, copying = record.copying, "opened");
    Ok(Core {
        preserve: Mutex::new(Preserve::new(options.preserve_bytes_max)),
        options,
        ledger,
        key,
        disks,
        control: Mutex::new(Control {
            record,
            closed: false,
        }),
        takes: Mutex::new(Cursors::default()),
        epochs: RwLock::new(epochs),
        lost: OnceLock::new(),
        merged: AtomicU64::new(0),
        preserved: AtomicU64::new(0),
        pieces: AtomicU64::new(0),
    })
}

/// The union of both maps is in slot A: the closing map of an initial copy, or the open map.
fn first_epochs(record: &Record) -> Epochs {
    let (slot, closing, open) = if record.copying {
        let closing = Closing {
            epoch: Epoch::INITIAL,
            kind: ClosingKind::Copy,
        };
        (Slot::B, Some(closing), Epoch::INITIAL.next())
    } else {
        let heads = [record.lineage, record.pending].into_iter().flatten();
        let newest = heads.map(|head| head.epoch).max();
        (Slot::A, None, newest.unwrap_or(Epoch::INITIAL).next())
    };
    Epochs {
        open,
        slot,
        closing,
        stale: false,
        breaks: 0,
    }
}

fn check(sources: &[DiskSource]) -> Result<(), OpenError> {
    if sources.is_empty() || sources.len() > DISKS_PER_MACHINE_MAX {
        return Err(OpenError::DiskCount(sources.len()));
    }
    let mut names = BTreeSet::new();
    for source in sources {
        if !names.insert(&source.name) {
            return Err(OpenError::DuplicateName(source.name.clone()));
        }
        let size = source.disk.geometry().size;
        if size > DISK_BYTES_MAX {
            return Err(OpenError::DiskSize {
                name: source.name.clone(),
                size,
            });
        }
    }
    Ok(())
}

fn past(
    ledger: &Ledger,
    key: &str,
    boot_id: &str,
    disks: &[DiskRecord],
) -> Result<Past, OpenError> {
    let found: Option<Record> = match ledger.get(key) {
        Ok(found) => found,
        Err(error @ LedgerError::Record { .. }) => {
            warn!(%key, %error, "the machine's record is not readable");
            // As if other disks had been replicated: nothing of it can be believed.
            Some(Record::default())
        }
        Err(error) => return Err(error.into()),
    };
    let known = found.is_some();
    let mut record = found.unwrap_or_default();
    let power_cut = match record.trust {
        Trust::Clean => false,
        Trust::Open | Trust::Lost => record.boot_id != boot_id,
        Trust::Suspect => true,
    };
    if known && !record.same_disks(disks) {
        record = Record {
            mount: record.mount,
            resync: Some(ResyncReason::DisksChanged),
            trust: Trust::Lost,
            ..Record::default()
        };
    }
    if record.trust == Trust::Lost {
        record.resync = record.resync.or(Some(ResyncReason::TrackingLost));
    }
    Ok(Past {
        record,
        known,
        power_cut: known && power_cut,
    })
}

/// Opens one disk with the union of what may differ in its first map; why that is the whole disk, if it is.
fn open_disk(
    state: &StateDir,
    owner: Owner,
    source: DiskSource,
    past: &Past,
    hot_regions_max: usize,
) -> Result<(Tracked, Option<ResyncReason>), OpenError> {
    let failed = |what| {
        let disk = source.name.clone();
        move |error| OpenError::State {
            what,
            disk: disk.clone(),
            source: error,
        }
    };
    let (index, mount) = (owner.disk, past.record.mount);
    let mounts = [mount, mount + 1];
    let (maps, mut reason) =
        open_maps(state, owner, past, mounts).map_err(failed("open the maps"))?;
    let before = past.before(owner);
    let intent = IntentLog::find(state, before, mounts).map_err(failed("open the intent log"))?;
    let (all, other) = (maps[0].bits(), maps[1].bits());
    let intent = intent.filter(|_| past.known);
    if past.power_cut {
        match &intent {
            Some((_, regions)) => mark_regions(all, regions, owner.size),
            None => reason = reason.or(Some(ResyncReason::IntentLost(index))),
        }
    }
    if past.known && image_changed(past, owner, source.stamp) {
        reason = reason.or(Some(ResyncReason::ImageChanged(index)));
    }
    let reason = reason.filter(|_| past.known);
    if reason.is_some() || past.record.trust == Trust::Lost {
        all.set_all();
    }
    all.add(other);
    all.sync().map_err(failed("sync the maps"))?;
    other.clear_all();
    // What the intent log speaks of may still be on its way to the platter.
    source.disk.flush().map_err(|error| OpenError::Flush {
        disk: source.name.clone(),
        source: error,
    })?;
    let intent = match intent {
        Some((mut intent, _)) if before == owner => intent.checkpoint(&[]).map(|()| intent),
        _ => IntentLog::create(state, owner, mount + 1),
    };
    let intent = intent.map_err(failed("empty the intent log"))?;
    let adopted = maps.iter().try_for_each(|map| map.adopt(mount + 1));
    adopted
        .and_then(|()| intent.adopt(mount + 1))
        .map_err(failed("adopt the files"))?;
    let blocks = owner.size.div_ceil(crate::base::units::BLOCK_BYTES);
    let owed = || Bits::fleeting(blocks).map_err(failed("find memory for the maps"));
    let disk = Tracked {
        index,
        size: owner.size,
        owed: [owed()?, owed()?],
        suspects: Suspects::fleeting(blocks).map_err(failed("find memory for the maps"))?,
        locks: RegionLocks::new(owner.size),
        hot: Hot::new(intent, owner.size, hot_regions_max),
        stopped: OnceLock::new(),
        trouble: Trouble::default(),
        maps,
        name: source.name,
        inner: source.disk,
    };
    Ok((disk, reason))
}

/// The two maps of a disk, made anew where they cannot be used; then the reason to send everything.
fn open_maps(
    state: &StateDir,
    owner: Owner,
    past: &Past,
    mounts: [u64; 2],
) -> io::Result<([Map; 2], Option<ResyncReason>)> {
    let before = past.before(owner);
    if before != owner {
        let grown = grow::maps(state, before, owner, mounts)?;
        return Ok(match grown {
            (maps, true) => (maps, None),
            (maps, false) => (maps, Some(ResyncReason::MapsLost(owner.disk))),
        });
    }
    let mut reason = None;
    let mut open = |slot| match Map::find(state, owner, slot, mounts)? {
        Some(map) if past.known => Ok::<_, io::Error>(map),
        _ => {
            reason = Some(ResyncReason::MapsLost(owner.disk));
            Map::create(state, owner, slot, mounts[1])
        }
    };
    let maps = [open(Slot::A)?, open(Slot::B)?];
    Ok((maps, reason))
}

fn mark_regions(bits: &Bits, regions: &BTreeSet<u64>, size: u64) {
    let blocks = size.div_ceil(crate::base::units::BLOCK_BYTES);
    for region in regions {
        let first = region * BLOCKS_PER_REGION;
        bits.set(first..(first + BLOCKS_PER_REGION).min(blocks));
    }
}

/// Whether somebody changed the image while it was closed. After a crash its length and times are our own doing, but a
/// disk is grown only after a clean end.
fn image_changed(past: &Past, owner: Owner, stamp: ImageStamp) -> bool {
    let Some(disk) = past.record.disks.get(owner.disk.index()) else {
        return true;
    };
    if past.record.trust == Trust::Clean {
        disk.stamp != stamp
    } else {
        disk.stamp.inode != stamp.inode || disk.size != owner.size
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        base::{
            checksum::Digest, clock::ManualClock, ids::Lineage, limits::DELTA_FRAMES_MAX,
            units::MIB,
        },
        disk::{Access, Fua, raw::RawDisk},
        storage::{
            Storage,
            memory::{MemoryFolder, MemoryStorage, Power},
        },
        volume::{CopyScope, Machine, Reconcile, ReplicaHead, Side, Standing, Taken, between},
    };

    struct Host {
        image: Arc<MemoryStorage>,
        store: Arc<MemoryStorage>,
        state: StateDir,
        stamp: ImageStamp,
        boot: &'static str,
    }

    const HEAD: Lineage = Lineage {
        epoch: Epoch::INITIAL,
        chain: Digest([1; 32]),
    };
    const BLOCKS: u64 = 4 * MIB / 4096;

    impl Host {
        /// A machine that is in step with its replica, was closed, and has one block owed.
        fn closed(state: StateDir) -> Self {
            let power = Power::new();
            let image = MemoryStorage::new(&power);
            image.set_len(4 * MIB).unwrap();
            let host = Self {
                image,
                store: MemoryStorage::new(&power),
                state,
                stamp: stamp(7),
                boot: "one",
            };
            let machine = host.open("disk");
            machine.begin_initial_copy(CopyScope::Allocated).unwrap();
            let taken = machine.take(Side::Closing, Epoch::INITIAL, MIB).unwrap();
            assert_eq!(taken, Taken::Drained);
            machine.staged(HEAD).unwrap();
            machine.volumes()[0].write_at(5000, &[1], Fua::No).unwrap();
            machine.close(&mut |_| Ok(stamp(7))).unwrap();
            host
        }

        fn open(&self, name: &str) -> Arc<Machine> {
            let image = Arc::clone(&self.image) as Arc<dyn Storage>;
            let options = MachineOptions {
                id: MachineId(uuid::Uuid::from_u128(3)),
                name: Name::new("m").unwrap(),
                clock: Arc::new(ManualClock::default()),
                boot_id: self.boot.into(),
                preserve_bytes_max: MIB,
                hot_regions_max: 16,
                frames_max: DELTA_FRAMES_MAX,
            };
            let disk = DiskSource {
                name: Name::new(name).unwrap(),
                disk: Arc::new(RawDisk::open(image, Access::ReadWrite).unwrap()),
                stamp: self.stamp,
            };
            Machine::open(options, vec![disk], &self.state, Arc::new(self.ledger())).unwrap()
        }

        fn ledger(&self) -> Ledger {
            Ledger::open(Arc::clone(&self.store) as Arc<dyn Storage>).unwrap()
        }
    }

    fn stamp(modified: i64) -> ImageStamp {
        ImageStamp {
            inode: 1,
            bytes: 4 * MIB,
            modified: (modified, 0),
        }
    }

    fn memory() -> StateDir {
        StateDir::memory(MemoryFolder::new(&Power::new()))
    }

    fn check(machine: &Machine, reason: Option<ResyncReason>, owed: u64) {
        assert_eq!(machine.state().resync, reason);
        let counters = machine.counters();
        let (owed_now, suspect) = match reason {
            None => (owed, 0),
            Some(_) => (0, owed),
        };
        assert_eq!(counters.owed_open_blocks, owed_now);
        assert_eq!(counters.suspect_blocks, suspect);
    }

    #[test]
    fn a_clean_end_owes_exactly_what_was_not_sent() {
        let machine = Host::closed(memory()).open("disk");
        check(&machine, None, 1);
        assert_eq!(machine.lineage(), Some(HEAD));
        assert_eq!(machine.state().standing, Standing::Following);
        let head = ReplicaHead::At(HEAD);
        assert_eq!(machine.reconcile(head).unwrap(), Reconcile::InStep);
        assert_eq!(machine.open_epoch(), Epoch(1));
        let empty = machine.reconcile(ReplicaHead::Empty).unwrap();
        assert_eq!(empty, Reconcile::CopyNeeded);
    }

    /// The same over mapped files: a killed process loses no mark, another boot adds the hot region.
    #[test]
    fn mapped_files_keep_marks_over_a_kill_and_hot_regions_over_a_boot() {
        let dir = tempfile::tempdir().unwrap();
        let mut host = Host::closed(StateDir::open(dir.path()).unwrap());
        let machine = host.open("disk");
        machine.volumes()[0]
            .write_at(2 * MIB, &[1], Fua::No)
            .unwrap();
        drop(machine);
        let machine = host.open("disk");
        check(&machine, None, 2);
        machine.volumes()[0]
            .write_at(2 * MIB, &[1], Fua::No)
            .unwrap();
        drop(machine);
        host.boot = "two";
        check(&host.open("disk"), None, 1 + 256);
    }

    #[test]
    fn an_image_that_changed_while_closed_is_sent_as_a_whole() {
        let mut host = Host::closed(memory());
        host.stamp = stamp(8);
        let machine = host.open("disk");
        check(
            &machine,
            Some(ResyncReason::ImageChanged(DiskIndex(0))),
            BLOCKS,
        );
        assert_eq!(
            machine.lineage(),
            Some(HEAD),
            "the replica stays a base to add to"
        );
    }

    impl Host {
        /// Notes that this program is about to write the image, and writes it.
        fn write_closed(&mut self) {
            let ledger = self.ledger();
            let (machine, disk) = (
                MachineId(uuid::Uuid::from_u128(3)),
                Name::new("disk").unwrap(),
            );
            between::will_write(&ledger, machine, &[(&disk, self.stamp)]).unwrap();
            self.stamp = stamp(self.stamp.modified.0 + 1);
        }
    }

    /// Also if the power fails between the write and the open.
    #[test]
    fn what_this_program_writes_between_two_mounts_is_no_change_by_others() {
        for boot in ["one", "two"] {
            let mut host = Host::closed(memory());
            host.write_closed();
            host.boot = boot;
            check(&host.open("disk"), None, 1);
        }
        // But it does not hide what others did before.
        let mut host = Host::closed(memory());
        host.stamp = stamp(8);
        host.write_closed();
        let changed = Some(ResyncReason::ImageChanged(DiskIndex(0)));
        check(&host.open("disk"), changed, BLOCKS);
    }

    impl Host {
        /// Grows the image by 4 MiB; whether the machine's record says that it was this program.
        fn grow(&mut self, by_us: bool) {
            self.image.set_len(8 * MIB).unwrap();
            self.stamp = ImageStamp {
                bytes: 8 * MIB,
                ..stamp(8)
            };
            if by_us {
                let ledger = self.ledger();
                let machine = MachineId(uuid::Uuid::from_u128(3));
                between::grew(&ledger, machine, &Name::new("disk").unwrap(), self.stamp).unwrap();
            }
        }
    }

    #[test]
    fn a_disk_that_we_grew_owes_what_it_owed_before() {
        let mut host = Host::closed(memory());
        host.grow(true);
        let machine = host.open("disk");
        check(&machine, None, 1);
        assert_eq!(machine.lineage(), Some(HEAD));
        let volume = &machine.volumes()[0];
        volume.write_at(8 * MIB - 1, &[1], Fua::No).unwrap();
        drop(machine);
        // From here on maps and intent log are those of a larger disk, in a crash as well.
        let machine = host.open("disk");
        check(&machine, None, 2);
        machine.volumes()[0]
            .write_at(7 * MIB, &[1], Fua::No)
            .unwrap();
        drop(machine);
        host.boot = "two";
        check(&host.open("disk"), None, 1 + 256);
    }

    #[test]
    fn a_disk_that_somebody_grew_is_sent_as_a_whole() {
        let changed = Some(ResyncReason::ImageChanged(DiskIndex(0)));
        let mut host = Host::closed(memory());
        host.grow(false);
        let machine = host.open("disk");
        check(&machine, changed, 2 * BLOCKS);
        assert_eq!(machine.lineage(), Some(HEAD));

        // After a crash the file's length and time tell nothing, but a disk of another size was not left by us.
        let mut host = Host::closed(memory());
        drop(host.open("disk"));
        host.grow(true);
        check(&host.open("disk"), changed, 2 * BLOCKS);
    }

    /// The power fails when the longer maps have their names, but the record is that of the smaller disk.
    #[test]
    fn longer_maps_are_not_believed_before_the_record_knows_of_them() {
        let mut host = Host::closed(memory());
        host.grow(true);
        let before = host.store.bytes();
        drop(host.open("disk"));
        let host = Host {
            store: MemoryStorage::with_bytes(&before),
            ..host
        };
        let lost = Some(ResyncReason::MapsLost(DiskIndex(0)));
        check(&host.open("disk"), lost, 2 * BLOCKS);
    }

    #[test]
    fn maps_that_are_gone_or_of_another_mount_mean_everything() {
        let lost = Some(ResyncReason::MapsLost(DiskIndex(0)));
        let mut host = Host::closed(memory());
        host.state = memory();
        check(&host.open("disk"), lost, BLOCKS);

        // The record is older than the files, as if the store had been restored from a backup.
        let host = Host::closed(memory());
        let old = host.store.bytes();
        for _ in 0..3 {
            drop(host.open("disk"));
        }
        let host = Host {
            store: MemoryStorage::with_bytes(&old),
            ..host
        };
        check(&host.open("disk"), lost, BLOCKS);
    }

    #[test]
    fn other_disks_need_a_new_copy_but_no_permission() {
        let machine = Host::closed(memory()).open("renamed");
        check(&machine, Some(ResyncReason::DisksChanged), BLOCKS);
        assert_eq!(machine.lineage(), None);
        let head = ReplicaHead::At(HEAD);
        assert_eq!(machine.reconcile(head).unwrap(), Reconcile::CopyNeeded);
    }

    /// The intent log cannot be written. The guest's write succeeds, the machine says what happened, and the next open
    /// sends everything.
    #[test]
    fn tracking_that_fails_does_not_fail_the_guest() {
        let power = Power::new();
        let host = Host::closed(StateDir::memory(MemoryFolder::new(&power)));
        let machine = host.open("disk");
        power.fail_after(0, io::ErrorKind::StorageFull);
        machine.volumes()[0].write_at(0, &[1], Fua::No).unwrap();
        assert!(machine.state().tracking_lost.is_some());
        assert!(machine.cut().is_err());
        machine.volumes()[0]
            .write_at(3 * MIB, &[1], Fua::No)
            .unwrap();
        drop(machine);
        check(&host.open("disk"), Some(ResyncReason::TrackingLost), BLOCKS);
    }

    #[test]
    fn a_failed_flush_stops_the_disk_and_is_remembered() {
        let host = Host::closed(memory());
        let image_power = Power::new();
        let image = MemoryStorage::new(&image_power);
        image.set_len(4 * MIB).unwrap();
        let host = Host { image, ..host };
        let machine = host.open("disk");
        let volume = &machine.volumes()[0];
        volume.write_at(3 * MIB, &[1], Fua::No).unwrap();
        image_power.fail_after(0, io::ErrorKind::Other);
        assert!(volume.flush().is_err());
        assert!(matches!(
            volume.write_at(0, &[1], Fua::No),
            Err(DiskError::Stopped(_))
        ));
        assert_eq!(machine.state().stopped.len(), 1);
        drop(machine);
        // Same boot: the marks are exact, but what the hot region holds is not.
        check(&host.open("disk"), None, 1 + 256);
    }

    /// The image is on storage of its own, which fails once; the machine is in step with its replica, but for a block.
    fn failing() -> (Arc<Power>, Host) {
        let power = Power::new();
        let image = MemoryStorage::new(&power);
        image.set_len(4 * MIB).unwrap();
        let host = Host::closed(memory());
        (power, Host { image, ..host })
    }

    #[test]
    fn a_failed_write_is_the_guests_and_is_told() {
        let (power, host) = failing();
        let machine = host.open("disk");
        let volume = &machine.volumes()[0];
        power.fail_after(0, io::ErrorKind::Other);
        assert!(volume.write_at(3 * MIB, &[1], Fua::No).is_err());
        volume.write_at(3 * MIB, &[1], Fua::No).unwrap();
        let state = machine.state();
        assert!(state.stopped.is_empty(), "{state:?}");
        let told = &state.failing[0].1;
        assert!(
            told.contains("1 requests") && told.contains("write failed"),
            "{told}"
        );
        drop(machine);
        check(&host.open("disk"), None, 2);
    }

    #[test]
    fn a_lack_of_space_is_told_until_a_write_succeeds() {
        let (power, host) = failing();
        let machine = host.open("disk");
        let volume = &machine.volumes()[0];
        // A forced write that found no space has lost nothing that was promised.
        for fua in [Fua::No, Fua::Yes] {
            power.fail_after(0, io::ErrorKind::StorageFull);
            assert!(volume.write_at(3 * MIB, &[1], fua).is_err());
            let state = machine.state();
            assert_eq!(
                (state.stopped.len(), state.failing.len()),
                (0, 1),
                "{state:?}"
            );
            volume.write_at(0, &[1], Fua::No).unwrap();
            assert!(machine.state().failing.is_empty());
        }
    }

    /// As after a failed flush: whether the earlier content of these pages reached the platter is unknown.
    #[test]
    fn a_failed_forced_write_stops_the_disk_and_is_remembered() {
        let (power, host) = failing();
        let machine = host.open("disk");
        let volume = &machine.volumes()[0];
        power.fail_after(0, io::ErrorKind::Other);
        assert!(volume.write_at(3 * MIB, &[1], Fua::Yes).is_err());
        for fua in [Fua::No, Fua::Yes] {
            let refused = volume.write_at(0, &[1], fua);
            assert!(matches!(refused, Err(DiskError::Stopped(_))), "{refused:?}");
        }
        assert_eq!(machine.state().stopped.len(), 1);
        drop(machine);
        check(&host.open("disk"), None, 1 + 256);
    }
}
