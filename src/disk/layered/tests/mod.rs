//! A layered disk against a model of its sectors, over power cuts at every step.

mod cuts;
mod fold;
mod random;

use std::collections::{BTreeMap, BTreeSet};

use super::*;
use crate::{
    disk::{Access, raw::RawDisk},
    storage::memory::{MemoryStorage, Power},
};

const SECTOR: u64 = 512;
/// Beyond one page of the map, and with half a block at the end.
const SIZE: u64 = 16 * 1024 * 1024 + 8192 + 512;
/// Sectors that the tests touch: the start, the border of two regions, the border of two pages of the map, the end.
const WINDOWS: [Range; 4] = [0..80, 2030..2070, 32750..32775, 32775..SIZE / SECTOR];
type Range = std::ops::Range<u64>;

const IDENTITY: Digest = Digest([3; 32]);

fn boot(number: u128) -> Uuid {
    Uuid::from_u128(number)
}

/// What the base holds in every byte of a sector; never zero.
fn base_value(sector: u64) -> u8 {
    u8::try_from(sector % 100).unwrap() + 100
}

fn base() -> Arc<dyn Disk> {
    let storage = image(&Power::new());
    Arc::new(RawDisk::open(storage, Access::ReadOnly).unwrap())
}

/// A raw image with the content of the base, durable.
fn image(power: &Arc<Power>) -> Arc<MemoryStorage> {
    let storage = MemoryStorage::new(power);
    storage.set_len(SIZE).unwrap();
    for window in WINDOWS {
        for sector in window {
            let bytes = [base_value(sector); 512];
            storage.write_at(sector * SECTOR, &bytes, Fua::No).unwrap();
        }
    }
    storage.sync().unwrap();
    storage
}

/// What a layer may be folded into.
fn raw(storage: Arc<dyn Storage>) -> Arc<dyn Disk> {
    Arc::new(RawDisk::open(storage, Access::ReadWrite).unwrap())
}

#[derive(Clone, Copy, Debug)]
enum Act {
    Write(u64, u64, u8, Fua),
    Zero(u64, u64, Space, Fua),
    Flush,
}

impl Act {
    /// Sectors, and the value they get.
    fn effect(self) -> Option<(Range, u8)> {
        match self {
            Self::Write(start, count, value, _) => Some((start..start + count, value)),
            Self::Zero(start, count, ..) => Some((start..start + count, 0)),
            Self::Flush => None,
        }
    }

    fn is_durable(self) -> bool {
        matches!(
            self,
            Self::Flush | Self::Write(.., Fua::Yes) | Self::Zero(.., Fua::Yes)
        )
    }

    fn run(self, disk: &LayeredDisk) -> Result<(), DiskError> {
        match self {
            Self::Write(start, count, value, fua) => {
                let bytes = vec![value; to_usize(count * SECTOR)];
                disk.write_at(start * SECTOR, &bytes, fua)
            }
            Self::Zero(start, count, space, fua) => {
                disk.zero(Extent::new(start * SECTOR, count * SECTOR), space, fua)
            }
            Self::Flush => disk.flush(),
        }
    }
}

/// Whole blocks, parts of blocks, over borders of regions and pages; rewritten, discarded, written again.
fn story() -> Vec<Act> {
    use Act::{Flush, Write, Zero};
    vec![
        Write(3, 2, 1, Fua::No),
        Write(8, 8, 2, Fua::Yes),
        Write(2040, 20, 3, Fua::No),
        Flush,
        Write(9, 1, 4, Fua::Yes),
        Write(4, 6, 5, Fua::No),
        Zero(2044, 10, Space::Release, Fua::No),
        Write(32760, 16, 6, Fua::No),
        Flush,
        Zero(0, 40, Space::Release, Fua::No),
        Write(16, 3, 7, Fua::No),
        Zero(50, 9, Space::Keep, Fua::Yes),
        Write(SIZE / SECTOR - 1, 1, 8, Fua::No),
        Zero(32770, SIZE / SECTOR - 32770, Space::Release, Fua::No),
        Write(0, 24, 9, Fua::No),
        Flush,
        Write(2046, 4, 10, Fua::No),
        Write(17, 1, 11, Fua::Yes),
    ]
}

/// For each sector what it may hold: one value if it is known, several if a write was not flushed.
#[derive(Clone, Default)]
struct Model(BTreeMap<u64, BTreeSet<u8>>);

impl Model {
    fn allowed(&self, sector: u64) -> BTreeSet<u8> {
        let known = self.0.get(&sector).cloned();
        known.unwrap_or_else(|| BTreeSet::from([base_value(sector)]))
    }

    /// It may have happened.
    fn may(&mut self, act: Act) {
        if let Some((sectors, value)) = act.effect() {
            for sector in sectors {
                let mut allowed = self.allowed(sector);
                allowed.insert(value);
                self.0.insert(sector, allowed);
            }
        }
    }

    /// It happened, as the last of all.
    fn did(&mut self, act: Act) {
        if let Some((sectors, value)) = act.effect() {
            for sector in sectors {
                self.0.insert(sector, BTreeSet::from([value]));
            }
        }
    }

    fn check(&self, disk: &dyn Disk, what: &str) {
        for window in WINDOWS {
            for sector in window {
                let mut bytes = [0xEE; 512];
                disk.read_at(sector * SECTOR, &mut bytes).unwrap();
                let allowed = self.allowed(sector);
                assert!(
                    bytes.iter().all(|byte| *byte == bytes[0]) && allowed.contains(&bytes[0]),
                    "{what}: sector {sector} holds {}, not one of {allowed:?}",
                    bytes[0]
                );
            }
        }
    }
}

fn open(storage: &Arc<MemoryStorage>, boot_number: u128) -> Result<LayeredDisk, LayerError> {
    let storage: Arc<dyn Storage> = Arc::clone(storage) as _;
    LayeredDisk::open(base(), storage, IDENTITY, boot(boot_number))
}

/// Runs the story to the first error. What is certain, what the page cache would show, and whether all was told.
fn tell(disk: &LayeredDisk) -> (Model, Model, bool) {
    let (mut certain, mut shown) = (Model::default(), Model::default());
    for act in story() {
        certain.may(act);
        let before = shown.clone();
        shown.may(act);
        if act.run(disk).is_err() {
            return (certain, shown, false);
        }
        shown = before;
        shown.did(act);
        match act {
            Act::Flush => certain = shown.clone(),
            _ if act.is_durable() => certain.did(act),
            _ => {}
        }
    }
    (certain, shown, true)
}

/// The layer's file holds no data: of the last block, which the disk ends in, zeros may be left.
fn assert_given_back(layer: &dyn Storage, disk: &LayeredDisk) {
    let left = layer.data_after(disk.header.data_at()).unwrap();
    if let Some(left) = left {
        assert!(
            left.end() == layer.len().unwrap() && left.len < BLOCK_BYTES,
            "{left:?}"
        );
        let mut bytes = vec![1; to_usize(left.len)];
        layer.read_at(left.offset, &mut bytes).unwrap();
        assert!(bytes.iter().all(|byte| *byte == 0));
    }
}

#[test]
fn what_is_written_is_read_and_the_base_stays() {
    let storage = MemoryStorage::new(&Power::new());
    let disk = open(&storage, 1).unwrap();
    let (_, shown, done) = tell(&disk);
    assert!(done);
    shown.check(&disk, "open");
    let mut at = 0;
    while at < SIZE {
        let (run, content) = disk.run_at(at).unwrap();
        assert!(run.offset == at && run.len > 0);
        if content == Content::Zero {
            let mut bytes = vec![1; to_usize(run.len)];
            disk.read_at(at, &mut bytes).unwrap();
            assert!(bytes.iter().all(|byte| *byte == 0));
        }
        at = run.end();
    }
    let held = disk.held();
    assert!(held > 0 && held < 40 * BLOCK_BYTES, "sparse: {held}");
    disk.close().unwrap();
    assert!(matches!(disk.flush(), Err(DiskError::Stopped(_))));
    for boot_number in [1, 2] {
        let disk = open(&storage, boot_number).unwrap();
        shown.check(&disk, "closed and opened again");
        assert_eq!(disk.held(), held);
    }
}

/// The power fails after every step of the making and of the story; of what was not synced nothing, everything or some
/// is kept. Then again while the next boot opens it.
#[test]
fn a_power_cut_at_any_step_leaves_what_was_flushed() {
    let mut cuts = 0;
    for steps in 0.. {
        let mut done = false;
        for variant in 0..6u64 {
            let what = format!("cut after step {steps}, variant {variant}");
            let power = Power::new();
            let storage = MemoryStorage::new(&power);
            power.cut_after(steps);
            let (certain, _, told) = match open(&storage, 1) {
                Ok(disk) => tell(&disk),
                Err(_) => <_>::default(),
            };
            done = told;
            let mut state = variant;
            let mut keep = || {
                state = state
                    .wrapping_mul(6_364_136_223_846_793_005)
                    .wrapping_add(variant | 1);
                variant == 1 || (variant > 1 && state >> 63 == 0)
            };
            power.restore(&mut keep);
            power.cut_after(steps % 5);
            let _ = open(&storage, 2);
            power.restore(&mut keep);
            let disk = open(&storage, 3).unwrap_or_else(|error| panic!("{what}: {error}"));
            certain.check(&disk, &what);
            // It goes on as a disk.
            let act = Act::Write(5, 9, 77, Fua::Yes);
            act.run(&disk).unwrap();
            power.restore(&mut || false);
            let mut certain = certain;
            certain.did(act);
            certain.check(&open(&storage, 4).unwrap(), &what);
        }
        cuts += 1;
        if done {
            break;
        }
    }
    assert!(cuts > 40, "the cuts reach into the story: {cuts}");
}

/// The process is killed after every step: the next one, in the same boot, finds all that was acknowledged.
#[test]
fn a_killed_process_loses_nothing() {
    for steps in 0.. {
        let power = Power::new();
        let storage = MemoryStorage::new(&power);
        power.cut_after(steps);
        let (_, shown, done) = match open(&storage, 1) {
            Ok(disk) => tell(&disk),
            Err(_) => <_>::default(),
        };
        power.restore(&mut || true);
        let disk = open(&storage, 1).unwrap();
        shown.check(&disk, &format!("killed after step {steps}"));
        if done {
            break;
        }
    }
}

#[test]
fn a_failed_sync_ends_the_disk_and_the_trust_in_what_was_not_flushed() {
    let power = Power::new();
    let storage = MemoryStorage::new(&power);
    let disk = open(&storage, 1).unwrap();
    disk.write_at(0, &[1; 4096], Fua::Yes).unwrap();
    disk.write_at(0, &[2; 4096], Fua::No).unwrap();
    disk.write_at(4096, &[2; 4096], Fua::No).unwrap();
    power.fail_after(0, io::ErrorKind::Other);
    assert!(disk.flush().is_err());
    assert!(matches!(
        disk.write_at(0, &[3; 512], Fua::No),
        Err(DiskError::Stopped(_))
    ));
    let mut bytes = [0; 512];
    let disk = open(&storage, 1).unwrap();
    disk.read_at(4096, &mut bytes).unwrap();
    assert_eq!(
        bytes,
        [base_value(8); 512],
        "nobody knows whether it is on the platter"
    );
}

/// A write that failed takes nothing away: what was written before is there when only the process dies, and the next flush
/// writes the map again.
#[test]
fn a_failed_write_of_what_is_certain_loses_nothing() {
    let power = Power::new();
    let storage = MemoryStorage::new(&power);
    let disk = open(&storage, 1).unwrap();
    disk.write_at(0, &[1; 4096], Fua::No).unwrap();
    power.fail_after(1, io::ErrorKind::StorageFull);
    assert!(disk.flush().is_err());
    let holds = |disk: &LayeredDisk, value: u8| {
        let mut bytes = [0; 4096];
        disk.read_at(0, &mut bytes).unwrap();
        assert_eq!(bytes, [value; 4096]);
    };
    holds(&open(&storage, 1).unwrap(), 1);

    // Not certain yet, so a forced write has more to do than to write itself.
    disk.write_at(0, &[2; 4096], Fua::Yes).unwrap();
    power.restore(&mut || false);
    holds(&open(&storage, 2).unwrap(), 2);
}

#[test]
fn a_layer_belongs_to_its_base() {
    let storage = MemoryStorage::new(&Power::new());
    open(&storage, 1).unwrap().close().unwrap();
    let other = LayeredDisk::open(base(), storage.clone(), Digest([4; 32]), boot(1));
    assert!(matches!(other, Err(LayerError::OtherBase)));
    storage.write_at(20, &[9], Fua::No).unwrap();
    assert!(matches!(open(&storage, 1), Err(LayerError::Invalid(_))));
    let foreign = MemoryStorage::with_bytes(&[7; 8192]);
    assert!(matches!(open(&foreign, 1), Err(LayerError::Invalid(_))));
}

/// A disk that lets others go first while it is used.
#[derive(Debug)]
struct Yielding(Arc<dyn Disk>);

impl Disk for Yielding {
    fn geometry(&self) -> Geometry {
        self.0.geometry()
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), DiskError> {
        let read = self.0.read_at(offset, buf);
        std::thread::yield_now();
        read
    }

    fn write_at(&self, offset: u64, buf: &[u8], fua: Fua) -> Result<(), DiskError> {
        let written = self.0.write_at(offset, buf, fua);
        std::thread::yield_now();
        written
    }

    fn zero(&self, run: Extent, space: Space, fua: Fua) -> Result<(), DiskError> {
        self.0.zero(run, space, fua)
    }

    fn flush(&self) -> Result<(), DiskError> {
        std::thread::yield_now();
        self.0.flush()
    }

    fn run_at(&self, offset: u64) -> Result<(Extent, Content), DiskError> {
        self.0.run_at(offset)
    }

    fn close(&self) -> Result<(), DiskError> {
        self.0.close()
    }
}

/// Threads write parts of the same block at once: no part is lost to the copy of the rest from the base.
#[test]
fn neighbours_in_a_block_do_not_undo_each_other() {
    let storage = MemoryStorage::new(&Power::new());
    let base = Arc::new(Yielding(base()));
    let disk = LayeredDisk::open(base, storage, IDENTITY, boot(1)).unwrap();
    let together = std::sync::Barrier::new(8);
    std::thread::scope(|scope| {
        for part in 0..8u64 {
            let (disk, together) = (&disk, &together);
            scope.spawn(move || {
                for block in 0..200 {
                    let value = u8::try_from(part + 1).unwrap();
                    let offset = block * BLOCK_BYTES + part * SECTOR;
                    together.wait();
                    disk.write_at(offset, &[value; 512], Fua::No).unwrap();
                    if block % 50 == part {
                        disk.flush().unwrap();
                    }
                }
            });
        }
    });
    for sector in 0..1600 {
        let mut bytes = [0; 512];
        disk.read_at(sector * SECTOR, &mut bytes).unwrap();
        assert_eq!(u64::from(bytes[0]), sector % 8 + 1, "sector {sector}");
    }
    disk.close().unwrap();
}
