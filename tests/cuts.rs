//! Cuts under load: many threads write, one cuts and sends, and every completed epoch must be an instant of all disks.
//!
//! Each writer owns some pairs of blocks, one on each disk, and writes a rising number into them: first disk A, then,
//! when that is acknowledged, disk B. At any instant A is B or one more, so a replica in which it is not has mixed two
//! instants. Blocks are filled with the number, so a torn block shows as well; the numbers acknowledged before a cut and
//! submitted after it bound what the epoch may hold.
#![expect(
    clippy::unwrap_used,
    reason = "a test panics on what it does not expect"
)]

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
};

use understudy::{
    base::{
        checksum::Digest,
        clock::SystemClock,
        ids::{Lineage, MachineId, Name},
        limits::DELTA_FRAMES_MAX,
        units::{Epoch, to_usize},
    },
    disk::{Access, Disk, Fua, raw::RawDisk},
    storage::{
        Storage,
        ledger::Ledger,
        memory::{MemoryFolder, MemoryStorage, Power},
    },
    track::state::StateDir,
    volume::{
        CopyScope, Counters, DiskSource, ImageStamp, Machine, MachineOptions, Piece, PieceContent,
        Side, Taken,
    },
};

const SIZE: u64 = 4 << 20;
const BLOCK: u64 = 4096;
const WRITERS: u64 = 3;
const PAIRS: u64 = 24;

fn machine(preserve_bytes_max: u64) -> Arc<Machine> {
    let disks = ["a", "b"].map(|name| {
        let storage = MemoryStorage::new(&Power::new());
        storage.set_len(SIZE).unwrap();
        DiskSource {
            name: Name::new(name).unwrap(),
            disk: Arc::new(RawDisk::open(storage, Access::ReadWrite).unwrap()),
            stamp: ImageStamp {
                inode: 1,
                bytes: SIZE,
                modified: (0, 0),
            },
        }
    });
    let power = Power::new();
    let options = MachineOptions {
        id: MachineId(uuid::Uuid::from_u128(1)),
        name: Name::new("m").unwrap(),
        clock: Arc::new(SystemClock::default()),
        boot_id: "boot".into(),
        preserve_bytes_max,
        // Fewer than the disks have, so that regions cool and heat all the time.
        hot_regions_max: 3,
        frames_max: DELTA_FRAMES_MAX,
    };
    let state = StateDir::memory(MemoryFolder::new(&power));
    let ledger = Ledger::open(MemoryStorage::new(&power)).unwrap();
    Machine::open(options, disks.into(), &state, Arc::new(ledger)).unwrap()
}

/// What the writers did: for each pair the last number acknowledged on both disks, and the last one submitted.
#[derive(Default)]
struct Progress {
    done: Vec<AtomicU64>,
    begun: Vec<AtomicU64>,
    stop: AtomicBool,
}

impl Progress {
    fn wait_for_writes(&self, rounds: u64) {
        let sum = || numbers(&self.done).iter().sum::<u64>();
        let goal = sum() + rounds;
        while sum() < goal {
            thread::yield_now();
        }
    }
}

/// Where the pair lies on the disks: spread over regions, and not at the same place on both.
fn places(pair: u64) -> [u64; 2] {
    let block = |n: u64| n % (SIZE / BLOCK) * BLOCK;
    [block(pair * 37), block(pair * 53 + 11)]
}

fn write(machine: &Machine, progress: &Progress, writer: u64) {
    let mut number = 0;
    while !progress.stop.load(Ordering::SeqCst) {
        number += 1;
        for pair in (0..PAIRS).filter(|pair| pair % WRITERS == writer) {
            let index = to_usize(pair);
            progress.begun[index].store(number, Ordering::SeqCst);
            for (volume, at) in machine.volumes().iter().zip(places(pair)) {
                let words = number.to_le_bytes().repeat(to_usize(BLOCK / 8));
                volume.write_at(at, &words, Fua::No).unwrap();
            }
            progress.done[index].store(number, Ordering::SeqCst);
        }
    }
}

struct Replica {
    disks: [Vec<u8>; 2],
    log: Vec<Piece>,
}

impl Replica {
    fn apply(&mut self) {
        for piece in self.log.drain(..) {
            let run = to_usize(piece.run.offset)..to_usize(piece.run.end());
            let target = &mut self.disks[piece.disk.index()][run];
            match piece.content {
                PieceContent::Data(bytes) => target.copy_from_slice(&bytes),
                PieceContent::Zero => target.fill(0),
            }
        }
    }

    fn check(&self, epoch: Epoch, done_before: &[u64], begun_after: &[u64]) {
        for pair in 0..PAIRS {
            let places = places(pair);
            let [a, b] = [0, 1].map(|disk| {
                let at = to_usize(places[disk]);
                let block = &self.disks[disk][at..at + to_usize(BLOCK)];
                let mut numbers = block
                    .chunks_exact(8)
                    .map(|word| u64::from_le_bytes(word.try_into().unwrap()));
                let first = numbers.next().unwrap();
                assert!(numbers.all(|n| n == first), "epoch {epoch}: torn block");
                first
            });
            assert!(a == b || a == b + 1, "epoch {epoch}: {a} on A and {b} on B");
            let (low, high) = (done_before[to_usize(pair)], begun_after[to_usize(pair)]);
            assert!(
                low <= b && a <= high,
                "epoch {epoch}: {low} <= {b}, {a} <= {high}"
            );
        }
    }
}

/// Sends pieces until nothing is owed; whether the epoch was merged instead.
fn send(machine: &Machine, replica: &mut Replica, side: Side, epoch: Epoch, count: usize) -> bool {
    for _ in 0..count {
        match machine.take(side, epoch, 3 * BLOCK).unwrap() {
            Taken::Piece(piece) => replica.log.push(piece),
            Taken::Drained => return false,
            Taken::Superseded => return true,
        }
    }
    false
}

fn numbers(counts: &[AtomicU64]) -> Vec<u64> {
    counts.iter().map(|n| n.load(Ordering::SeqCst)).collect()
}

fn replicate(
    machine: &Machine,
    progress: &Progress,
    epochs: u64,
    merges: u64,
    pause: u64,
) -> Counters {
    let mut replica = Replica {
        disks: [vec![0; to_usize(SIZE)], vec![0; to_usize(SIZE)]],
        log: Vec::new(),
    };
    machine.begin_initial_copy(CopyScope::Allocated).unwrap();
    assert!(!send(
        machine,
        &mut replica,
        Side::Closing,
        Epoch::INITIAL,
        usize::MAX
    ));
    replica.apply();
    let lineage = |epoch| Lineage {
        epoch,
        chain: Digest::default(),
    };
    machine.staged(lineage(Epoch::INITIAL)).unwrap();
    let (mut complete, mut attempts) = (0, 0_u64);
    while complete < epochs || machine.counters().merged_epochs < merges {
        // The log of an epoch begins while it is open.
        send(machine, &mut replica, Side::Open, machine.open_epoch(), 10);
        let before = numbers(&progress.done);
        let cut = machine.cut().unwrap();
        let after = numbers(&progress.begun);
        // Two of three epochs meet rewrites for certain, whatever the scheduler does.
        attempts += 1;
        if attempts % 3 > 0 {
            progress.wait_for_writes(pause);
        }
        if send(machine, &mut replica, Side::Closing, cut.epoch, usize::MAX) {
            continue;
        }
        machine.pending(lineage(cut.epoch)).unwrap();
        replica.apply();
        replica.check(cut.epoch, &before, &after);
        machine.staged(lineage(cut.epoch)).unwrap();
        complete += 1;
    }
    machine.counters()
}

fn run(preserve_bytes_max: u64, epochs: u64, merges: u64, pause: u64) -> Counters {
    let machine = machine(preserve_bytes_max);
    let counts = || (0..PAIRS).map(|_| AtomicU64::new(0)).collect();
    let progress = Progress {
        done: counts(),
        begun: counts(),
        stop: AtomicBool::new(false),
    };
    thread::scope(|scope| {
        for writer in 0..WRITERS {
            let (machine, progress) = (&machine, &progress);
            scope.spawn(move || write(machine, progress, writer));
        }
        // A panic of the sender must not leave the writers running for ever.
        let result = scope
            .spawn(|| replicate(&machine, &progress, epochs, merges, pause))
            .join();
        progress.stop.store(true, Ordering::SeqCst);
        result.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

#[test]
fn a_cut_is_one_instant_of_all_disks() {
    let counters = run(1 << 20, 150, 0, PAIRS);
    assert_eq!(counters.merged_epochs, 0, "all blocks fit the side store");
    assert!(counters.preserved_blocks > 100, "{counters:?}");
}

#[test]
fn a_cut_is_one_instant_also_when_the_side_store_overflows() {
    // Room for a few blocks. What is merged goes on in the same log, and every third attempt gets through.
    let counters = run(6 * (BLOCK + 128), 30, 10, PAIRS / 2);
    assert!(counters.merged_epochs >= 10, "{counters:?}");
}

/// What tracking costs: 4 KiB random and 1 MiB sequential writes to a real file, with real maps and intent log. Prints;
/// asserts nothing. Run with `cargo test --release -- --ignored --nocapture tracked_and_untracked`.
#[test]
#[ignore = "a measurement"]
fn tracked_and_untracked_writes() {
    use understudy::storage::file::FileStorage;
    let dir = tempfile::tempdir().unwrap();
    let size = 128_u64 << 20;
    let raw = |name: &str| -> Arc<dyn Disk> {
        let storage = FileStorage::create_new(&dir.path().join(name)).unwrap();
        for at in (0..size).step_by(1 << 20) {
            storage.write_at(at, &vec![1; 1 << 20], Fua::No).unwrap();
        }
        storage.sync().unwrap();
        Arc::new(RawDisk::open(Arc::new(storage), Access::ReadWrite).unwrap())
    };
    let untracked = raw("untracked");
    let disk = DiskSource {
        name: Name::new("d").unwrap(),
        disk: raw("tracked"),
        stamp: ImageStamp {
            inode: 1,
            bytes: size,
            modified: (0, 0),
        },
    };
    let options = MachineOptions {
        id: MachineId(uuid::Uuid::from_u128(1)),
        name: Name::new("m").unwrap(),
        clock: Arc::new(SystemClock::default()),
        boot_id: "boot".into(),
        preserve_bytes_max: 1 << 28,
        hot_regions_max: 16384,
        frames_max: DELTA_FRAMES_MAX,
    };
    let state = StateDir::open(&dir.path().join("state")).unwrap();
    let ledger = Ledger::open(MemoryStorage::new(&Power::new())).unwrap();
    let machine = Machine::open(options, vec![disk], &state, Arc::new(ledger)).unwrap();
    let tracked = Arc::clone(&machine.volumes()[0]) as Arc<dyn Disk>;
    for round in 0..4 {
        for (name, disk) in [("untracked", &untracked), ("tracked", &tracked)] {
            let start = std::time::Instant::now();
            for at in (0..size).step_by(1 << 20) {
                disk.write_at(at, &vec![round; 1 << 20], Fua::No).unwrap();
            }
            let sequential = start.elapsed();
            let start = std::time::Instant::now();
            let (count, mut seed) = (200_000_u64, 1_u64);
            for _ in 0..count {
                seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                let at = (seed >> 33) % (size / BLOCK) * BLOCK;
                disk.write_at(at, &[round; 4096], Fua::No).unwrap();
            }
            let random = start.elapsed();
            println!(
                "{name}: 1 MiB sequential {sequential:?} for 128 MiB, 4 KiB random {:?} a write",
                random / u32::try_from(count).unwrap()
            );
            disk.flush().unwrap();
        }
    }
}
