//! The tracker, the cut and the side store under a scheduler: `scripts/shuttle`, built with `--cfg shuttle` only.
//!
//! All threads of a schedule run in one, and the scheduler decides at each lock, each atomic access and between the two
//! halves of each block that is read or written which of them goes on. Half of the schedules are uniformly random, half
//! of them are PCT's, which find bugs that need few switches at the right places. Orderings weaker than sequential
//! consistency are not explored; ThreadSanitizer looks at those.
//!
//! The writers are those of `tests/cuts.rs`: each owns a pair of blocks, one on each disk, and writes a rising number
//! first to A, then to B. `UNDERSTUDY_SCHEDULES` says how many schedules are tried, `UNDERSTUDY_SCHEDULE` replays one.
#![expect(
    clippy::unwrap_used,
    reason = "a test panics on what it does not expect"
)]

mod crash;
mod cut;

use std::{collections::BTreeMap, env, io, sync::Arc};

use shuttle::{
    Config, Runner,
    rand::{Rng, thread_rng},
    scheduler::{PctScheduler, RandomScheduler, ReplayScheduler, Scheduler},
    sync::atomic::{AtomicU64, Ordering},
};
use understudy::{
    base::{
        checksum::Digest,
        clock::ManualClock,
        ids::{Lineage, MachineId, Name},
        limits::DELTA_FRAMES_MAX,
        units::{BLOCK_BYTES, Epoch, Extent, MIB, to_usize},
    },
    disk::{Access, Disk, Fua, Space, raw::RawDisk},
    storage::{
        Storage,
        ledger::Ledger,
        memory::{MemoryFolder, MemoryStorage, Power},
    },
    track::state::StateDir,
    volume::{
        CopyScope, DiskSource, ImageStamp, Machine, MachineOptions, Piece, PieceContent, Side,
        Taken,
    },
};

const SIZE: u64 = 3 * MIB;
const HALF: usize = to_usize(BLOCK_BYTES) / 2;
/// Where each writer's pair lies, in blocks of A and B. On A all are in one region, on B each is in another.
const PAIRS: [[u64; 2]; 2] = [[3, 5], [4, 300]];
/// Switches that a PCT schedule places.
const DEPTH: usize = 4;
/// Steps after which a schedule is taken for one that never ends.
const STEPS_MAX: usize = 1_000_000;

/// Runs `scenario` under many schedules.
fn explore(scenario: fn()) {
    let number = |name| env::var(name).map(|text| text.parse::<usize>().unwrap());
    let half = number("UNDERSTUDY_SCHEDULES").unwrap_or(1000).div_ceil(2);
    if let Ok(schedule) = env::var("UNDERSTUDY_SCHEDULE") {
        run(scenario, ReplayScheduler::new_from_encoded(&schedule));
        return;
    }
    run(scenario, RandomScheduler::new(half));
    run(scenario, PctScheduler::new(DEPTH, half));
}

fn run(scenario: fn(), scheduler: impl Scheduler + 'static) {
    let mut config = Config::new();
    // The machine's record lies in a real database, which wants more than shuttle's 32 KiB.
    config.stack_size = 512 * 1024;
    config.max_steps = shuttle::MaxSteps::FailAfter(STEPS_MAX);
    Runner::new(scheduler, config).run(scenario);
}

/// An image that is read and written half a block at a time, so that what is torn shows.
#[derive(Debug)]
struct Halves {
    image: Arc<MemoryStorage>,
    /// Only a place where others may go on.
    turn: AtomicU64,
}

impl Halves {
    fn others(&self) {
        self.turn.fetch_add(1, Ordering::SeqCst);
    }
}

impl Storage for Halves {
    fn len(&self) -> io::Result<u64> {
        self.image.len()
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        for (part, at) in buf.chunks_mut(HALF).zip((offset..).step_by(HALF)) {
            self.others();
            self.image.read_at(at, part)?;
        }
        Ok(())
    }

    fn write_at(&self, offset: u64, buf: &[u8], fua: Fua) -> io::Result<()> {
        for (part, at) in buf.chunks(HALF).zip((offset..).step_by(HALF)) {
            self.others();
            self.image.write_at(at, part, fua)?;
        }
        Ok(())
    }

    fn zero(&self, run: Extent, space: Space) -> io::Result<()> {
        self.others();
        self.image.zero(run, space)
    }

    fn data_after(&self, offset: u64) -> io::Result<Option<Extent>> {
        self.image.data_after(offset)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.image.set_len(len)
    }

    fn sync(&self) -> io::Result<()> {
        self.others();
        self.image.sync()
    }
}

/// A host with two disks.
struct Host {
    power: Arc<Power>,
    images: [Arc<MemoryStorage>; 2],
    state: StateDir,
    store: Arc<MemoryStorage>,
}

impl Host {
    fn new() -> Self {
        let power = Power::new();
        let images = [(); 2].map(|()| {
            let image = MemoryStorage::new(&power);
            image.set_len(SIZE).unwrap();
            image.sync().unwrap();
            image
        });
        Self {
            images,
            state: StateDir::memory(MemoryFolder::new(&power)),
            store: MemoryStorage::new(&power),
            power,
        }
    }

    fn open(&self, boot: &str, preserve_bytes_max: u64, hot_regions_max: usize) -> Arc<Machine> {
        let disks = ["a", "b"].into_iter().zip(&self.images);
        let disks = disks.map(|(name, image)| {
            let image = Halves {
                image: Arc::clone(image),
                turn: AtomicU64::new(0),
            };
            DiskSource {
                name: Name::new(name).unwrap(),
                disk: Arc::new(RawDisk::open(Arc::new(image), Access::ReadWrite).unwrap()),
                stamp: ImageStamp {
                    inode: 1,
                    bytes: SIZE,
                    modified: (0, 0),
                },
            }
        });
        let options = MachineOptions {
            id: MachineId(uuid::Uuid::from_u128(1)),
            name: Name::new("m").unwrap(),
            clock: Arc::new(ManualClock::default()),
            boot_id: boot.into(),
            preserve_bytes_max,
            hot_regions_max,
            frames_max: DELTA_FRAMES_MAX,
        };
        let store = Arc::clone(&self.store) as Arc<dyn Storage>;
        let ledger = Arc::new(Ledger::open(store).unwrap());
        Machine::open(options, disks.collect(), &self.state, ledger).unwrap()
    }

    /// The number in a block of an image.
    fn number(&self, disk: usize, block: u64) -> [u64; 2] {
        let mut bytes = vec![0; 2 * HALF];
        let at = block * BLOCK_BYTES;
        self.images[disk].read_at(at, &mut bytes).unwrap();
        halves(&bytes)
    }
}

/// The numbers in both halves of a block.
fn halves(block: &[u8]) -> [u64; 2] {
    [0, HALF].map(|at| u64::from_le_bytes(block[at..at + 8].try_into().unwrap()))
}

fn filled(number: u64) -> Vec<u8> {
    number.to_le_bytes().repeat(2 * HALF / 8)
}

/// What a replica holds: the numbers of the blocks that are not zero, by disk and block.
#[derive(Clone, Debug, Default)]
struct Replica {
    blocks: BTreeMap<(usize, u64), u64>,
    log: Vec<Piece>,
}

impl Replica {
    fn number(&self, disk: usize, block: u64) -> u64 {
        self.blocks.get(&(disk, block)).copied().unwrap_or(0)
    }

    fn apply(&mut self) {
        for piece in self.log.drain(..) {
            for (index, block) in piece.run.blocks().enumerate() {
                let number = match &piece.content {
                    PieceContent::Zero => 0,
                    PieceContent::Data(bytes) => {
                        let [first, second] = halves(&bytes[index * 2 * HALF..]);
                        assert_eq!(first, second, "a torn block");
                        first
                    }
                };
                self.blocks.insert((piece.disk.index(), block), number);
            }
        }
    }
}

enum Sent {
    All,
    Some,
    Superseded,
}

/// Sends at most `count` pieces of `epoch`.
fn send(
    machine: &Machine,
    replica: &mut Replica,
    side: Side,
    epoch: Epoch,
    count: usize,
) -> Result<Sent, Box<dyn std::error::Error>> {
    for _ in 0..count {
        match machine.take(side, epoch, 2 * BLOCK_BYTES)? {
            Taken::Piece(piece) => replica.log.push(piece),
            Taken::Drained => return Ok(Sent::All),
            Taken::Superseded => return Ok(Sent::Superseded),
        }
    }
    Ok(Sent::Some)
}

fn lineage(epoch: Epoch) -> Lineage {
    Lineage {
        epoch,
        chain: Digest::default(),
    }
}

/// Copies the machine's disks, which nobody writes yet.
fn copy(machine: &Machine, replica: &mut Replica) {
    machine.begin_initial_copy(CopyScope::Allocated).unwrap();
    let sent = send(machine, replica, Side::Closing, Epoch::INITIAL, usize::MAX);
    assert!(matches!(sent, Ok(Sent::All)));
    replica.apply();
    machine.staged(lineage(Epoch::INITIAL)).unwrap();
}
