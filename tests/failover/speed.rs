//! How long it takes from the command to the first byte of a test failover, on a large machine. A measurement, not a
//! verdict: `cargo test --release failover::speed -- --ignored --nocapture`.

use std::{
    fs,
    os::unix::fs::FileExt,
    sync::Arc,
    time::{Duration, Instant},
};

use nix::fcntl::{OFlag, PosixFadviseAdvice, posix_fadvise};
use understudy::{
    base::{
        ids::SystemIds,
        units::{DiskIndex, GIB, MIB},
    },
    delta::{Codec, encode_data},
    disk::image::Format,
    node::status::TestStatus,
    replica::{MachineReplica, ReplicaOptions, Retention},
    storage::{Folder, file::FileFolder, ledger::Ledger},
};

use crate::{
    staging::{log_after, one_disk},
    support::{Aligned, BLOCK, Hosts, MACHINE, PROGRAM, can_mount, open_direct, run},
};

const DISK_BYTES: u64 = 64 * GIB;
const LOGS: u64 = 1000;
/// Scattered blocks of 4 KiB in each log.
const BLOCKS: u64 = 1000;

/// A store with a machine of 64 GiB whose image has every block of 32 MiB, and with 1,000 logs above it; the epoch
/// before them.
fn fill_store(hosts: &Hosts) -> u64 {
    let image = hosts.image("disk.vhdx", DISK_BYTES / MIB);
    let replica = hosts.replica(&[]);
    let primary = hosts.primary(&[&image], &[]);
    primary.wait_replicating();
    let disk = open_direct(&hosts.disk("disk"), OFlag::empty()).unwrap();
    let mut block = Aligned::new(BLOCK);
    block.get_mut().fill(7);
    for offset in (0..DISK_BYTES).step_by(32 << 20) {
        disk.write_all_at(block.get(), offset).unwrap();
    }
    drop(disk);
    let first = primary.cut();
    let machine = primary.machine();
    let (id, generation) = (machine.id.unwrap(), machine.generation.unwrap());
    primary.stop();
    replica.merged();
    replica.stop();

    let folder = FileFolder::open(&hosts.path("store")).unwrap();
    let ledger = Arc::new(Ledger::open_in(&folder, "node.redb").unwrap());
    let options = ReplicaOptions {
        format: None,
        retention: Retention {
            newest: 1000,
            hourly: 0,
        },
        space_max: None,
        sync_bytes: GIB,
    };
    let machine = folder.folder(MACHINE).unwrap();
    let ids = Arc::new(SystemIds::default());
    let replica = MachineReplica::open(machine, ledger, ids, id, options).unwrap();
    let (disk, _) = one_disk(DISK_BYTES, Format::Vhdx);
    let mut parent = first;
    for number in 1..=LOGS {
        let raw = [u8::try_from(number % 250).unwrap() + 1; 4096];
        let frames = (0..BLOCKS).map(|n| {
            let offset = (n * 7_919 + number * 104_729) % (DISK_BYTES / 4096) * 4096;
            encode_data(DiskIndex(0), offset, raw.to_vec(), Codec::None)
        });
        let frames: Vec<_> = frames.collect();
        let epoch = first.epoch.0 + number;
        let (log, lineage) = log_after((id, generation), Some(parent), &disk, &frames, epoch);
        let mut ingest = replica.begin(generation).unwrap();
        ingest.push(&log).unwrap();
        ingest.finish().unwrap();
        parent = lineage;
    }
    assert_eq!(replica.status().logs, 1000);
    replica.close().unwrap();
    first.epoch.0
}

/// From the command to the first byte of the disk.
fn first_byte(socket: &str, point: u64) -> Duration {
    let point = point.to_string();
    let began = Instant::now();
    let args = ["failover", MACHINE, "--test", "--json", "--point", &point];
    let done = run(PROGRAM, [&args[..], &["--control", socket]].concat());
    assert!(done.status.success(), "{done:?}");
    let test: TestStatus = serde_json::from_slice(&done.stdout).unwrap();
    let mut byte = [0];
    let file = fs::File::open(&test.files[0]).unwrap();
    file.read_exact_at(&mut byte, 0).unwrap();
    let took = began.elapsed();
    assert_ne!(byte, [0]);
    took
}

/// Lets the kernel forget the content of all files of the machine.
fn forget(hosts: &Hosts) {
    for entry in fs::read_dir(hosts.path("store").join(MACHINE)).unwrap() {
        let path = entry.unwrap().path();
        if path.is_file() {
            let file = fs::File::open(path).unwrap();
            file.sync_all().unwrap();
            posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED).unwrap();
        }
    }
}

#[test]
#[ignore = "a measurement: needs 5 GiB of disk and some minutes"]
fn from_the_command_to_the_first_byte() {
    if !can_mount() {
        return;
    }
    let hosts = Hosts::new();
    let first = fill_store(&hosts);
    let replica = hosts.replica(&["--keep", "1000"]);
    let socket = replica.socket().to_str().unwrap();
    for (what, point, cold) in [
        (
            "latest point, logs not in the page cache",
            first + LOGS,
            true,
        ),
        ("latest point, warm", first + LOGS, false),
        ("the 500th of 1,000 points", first + LOGS / 2, false),
        ("latest point, cold again", first + LOGS, true),
    ] {
        if cold {
            forget(&hosts);
        }
        let took = first_byte(socket, point);
        eprintln!("{what}: {} ms to the first byte", took.as_millis());
    }
    let logs = LOGS * BLOCKS * 4096 / MIB;
    eprintln!("1,000 logs of {BLOCKS} scattered blocks, {logs} MiB in all, over 64 GiB");
    let cancelled = run(PROGRAM, ["cancel", MACHINE, "--control", socket]);
    assert!(cancelled.status.success(), "{cancelled:?}");
    replica.stop();
}
