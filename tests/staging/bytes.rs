//! What a byte received costs the replica's disks, counted where it leaves the program: every call to a file.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use understudy::{
    base::{
        ids::{Lineage, SystemIds},
        limits::LOG_RESIDENT_BYTES_MAX,
        units::{DiskIndex, Epoch, MIB, to_usize},
    },
    delta::{Codec, encode_data},
    disk::image::Format,
    replica::{MachineReplica, ReplicaOptions, Retention},
    storage::{Folder, file::FileFolder, ledger::Ledger},
};

use super::{
    GENERATION, Host, MACHINE, log_after,
    observed::{Call, observed},
    one_disk, options, send,
};

/// Bytes that went through.
#[derive(Debug, Default)]
struct Meter {
    read: AtomicU64,
    written: AtomicU64,
}

const DISK_BYTES: u64 = 256 * MIB;
const EPOCHS: u64 = 20;
/// Blocks of 4 KiB that an epoch writes: 2 MiB.
const BLOCKS: u64 = 512;

/// Sends epochs ten minutes apart in which block `n` of epoch `e` is written at `place(e, n)`, folds and merges as a
/// node does, and in the end brings everything into the images. Bytes written and read for each byte received.
fn cost(retention: Retention, format: Format, place: impl Fn(u64, u64) -> u64) -> (f64, f64, u64) {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let meter = Arc::new(Meter::default());
    let files: Arc<dyn Folder> = Arc::new(FileFolder::open(dir.path()).unwrap());
    let counter = Arc::clone(&meter);
    let folder = observed(files, move |_, call| {
        let (count, bytes) = match call {
            Call::Read(bytes) => (&counter.read, bytes),
            Call::Write(bytes) => (&counter.written, bytes),
            Call::Change(_) | Call::Sync => return,
        };
        count.fetch_add(bytes, Ordering::Relaxed);
    });
    let ledger = Arc::new(Ledger::open_in(&*folder, "node.redb").unwrap());
    let options = ReplicaOptions {
        retention,
        sync_bytes: MIB,
        ..options(0)
    };
    let ids = Arc::new(SystemIds::default());
    let machine = folder.folder("machine").unwrap();
    let replica = MachineReplica::open(machine, ledger, ids, MACHINE, options).unwrap();
    let (disk, spec) = one_disk(DISK_BYTES, format);
    replica.prepare(&[spec]).unwrap();
    let mut parent: Option<Lineage> = None;
    let mut before = (0, 0, 0);
    for epoch in 0..=EPOCHS {
        // The initial copy is empty: what counts is the daily life.
        let blocks = (0..BLOCKS).filter(|_| epoch > 0);
        let frame = |block: u64| {
            let mut raw = [0; 4096];
            for (word, bytes) in (0..).zip(raw.as_chunks_mut::<8>().0) {
                *bytes = (epoch << 40 | block << 20 | word).to_le_bytes();
            }
            encode_data(
                DiskIndex(0),
                place(epoch, block) * 4096,
                raw.to_vec(),
                Codec::None,
            )
        };
        let frames: Vec<_> = blocks.map(frame).collect();
        let who = (MACHINE, GENERATION);
        let (log, lineage) = log_after(who, parent, &disk, &frames, epoch * 600);
        send(&replica, &log).unwrap();
        parent = Some(lineage);
        while replica.upkeep().unwrap().is_some() {}
        if epoch == 0 {
            before = totals(&replica, &meter);
        }
    }
    let folded = replica.status().counters.folded;
    replica.settle(Epoch(EPOCHS * 600)).unwrap();
    let after = totals(&replica, &meter);
    let received = after.0 - before.0;
    assert!(received > EPOCHS * BLOCKS * 4096);
    let each = |bytes: u64| f64::from(u32::try_from(bytes * 1000 / received).unwrap()) / 1000.0;
    (each(after.1 - before.1), each(after.2 - before.2), folded)
}

fn totals(replica: &MachineReplica, meter: &Meter) -> (u64, u64, u64) {
    let received = replica.status().counters.received;
    let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
    (received, load(&meter.written), load(&meter.read))
}

/// Blocks that no other epoch touches.
fn scattered(epoch: u64, block: u64) -> u64 {
    (epoch - 1) * BLOCKS + block
}

/// Three quarters of an epoch are written again by the next.
fn hot(epoch: u64, block: u64) -> u64 {
    if block.is_multiple_of(4) {
        scattered(epoch, block)
    } else {
        block
    }
}

#[test]
fn two_bytes_are_written_for_a_byte_received_and_none_is_read() {
    let latest = Retention {
        newest: 0,
        hourly: 0,
    };
    let thinned = Retention {
        newest: 3,
        hourly: 2,
    };
    for format in [Format::Raw, Format::Vhdx] {
        for (what, retention, place, folds) in [
            (
                "latest only, scattered",
                latest,
                scattered as fn(u64, u64) -> u64,
                false,
            ),
            ("latest only, hot", latest, hot, false),
            ("thinned, scattered", thinned, scattered, false),
            ("thinned, hot", thinned, hot, true),
        ] {
            let (written, read, folded) = cost(retention, format, place);
            println!("{format}, {what}: {written} written, {read} read, {folded} folded");
            assert!(written <= 2.1, "{format}, {what}: {written} written");
            assert!(written > 1.0, "{format}, {what}: {written} written");
            assert!(read <= 0.1, "{format}, {what}: {read} read");
            assert_eq!(folded > 0, folds, "{format}, {what}: {folded} folded");
        }
    }
    assert!(
        to_usize(BLOCKS * 4096 * EPOCHS) < 64 << 20,
        "all of it fits into memory"
    );
}

/// The newest logs are merged from memory, as many as there is room for, the others from their files.
#[test]
fn logs_beyond_the_room_in_memory_are_read_from_their_files() {
    // Two have room, three do not.
    const LOG: u64 = LOG_RESIDENT_BYTES_MAX / 2 - MIB;
    let (disk, spec) = one_disk(3 * LOG, Format::Raw);
    let host = Host::new();
    let replica = host.open(0).unwrap();
    replica.prepare(&[spec]).unwrap();
    let mut parent = None;
    for epoch in 0..=3 {
        // The initial copy is empty; then one third after the other is written.
        let pieces = (0..LOG / MIB).filter(|_| epoch > 0).map(|n| {
            let bytes = vec![u8::try_from(epoch).unwrap(); to_usize(MIB)];
            encode_data(
                DiskIndex(0),
                (epoch - 1) * LOG + n * MIB,
                bytes,
                Codec::None,
            )
        });
        let pieces: Vec<_> = pieces.collect();
        let (log, lineage) = log_after((MACHINE, GENERATION), parent, &disk, &pieces, epoch);
        send(&replica, &log).unwrap();
        parent = Some(lineage);
    }
    let merged = replica.merge().unwrap().unwrap();
    assert_eq!((merged.logs, merged.written), (3, 3 * LOG));
    assert!(
        (LOG..LOG + MIB).contains(&merged.read),
        "the oldest third: {merged:?}"
    );
}
