//! Sync-on-flush: what a guest flushed is on the replica, whenever the primary dies.

use std::{
    fs, io,
    os::unix::fs::FileExt,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
};

use nix::fcntl::OFlag;
use understudy::{
    coord::state::Health,
    node::{
        control::FailoverReport,
        status::{MachineStatus, SyncState},
    },
};

use crate::support::{
    Aligned, BLOCK, Hosts, Ledger, MACHINE, Node, PROGRAM, can_mount, must, open_direct,
};

const MIB: u64 = 1 << 20;
/// Blocks that a guest numbers in turn; every guest has its own.
const SLOTS: u64 = 64;
/// Deaths of a primary, each at another moment.
const LAPS: usize = 6;
/// No epoch ends by itself within a test.
const RARELY: [&str; 2] = ["--interval", "10m"];

/// How a guest makes a write durable.
#[derive(Clone, Copy)]
enum Durably {
    Fdatasync,
    Forced,
}

/// Numbers blocks one after the other and remembers the last number that was flushed.
struct Guest {
    first: u64,
    flushed: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Option<io::Error>>,
}

impl Guest {
    /// Begins after `from` in the slots of guest `index`.
    fn start(disk: &Path, index: u64, from: u64, durably: Durably) -> Self {
        let flags = match durably {
            Durably::Fdatasync => OFlag::empty(),
            Durably::Forced => OFlag::O_DSYNC,
        };
        let file = open_direct(disk, flags).unwrap();
        let first = index * SLOTS;
        let (flushed, stop) = (
            Arc::new(AtomicU64::new(from)),
            Arc::new(AtomicBool::new(false)),
        );
        let (last, ended) = (Arc::clone(&flushed), Arc::clone(&stop));
        let thread = thread::spawn(move || {
            for number in from + 1.. {
                if ended.load(Ordering::Acquire) {
                    break;
                }
                let wrote = number_block(&file, first, number).and_then(|()| match durably {
                    Durably::Fdatasync => file.sync_data(),
                    Durably::Forced => Ok(()),
                });
                if let Err(error) = wrote {
                    return Some(error);
                }
                last.store(number, Ordering::Release);
            }
            None
        });
        Self {
            first,
            flushed,
            stop,
            thread,
        }
    }

    fn flushed(&self) -> u64 {
        self.flushed.load(Ordering::Acquire)
    }

    fn wait_flushed(&self, more: u64) {
        let until = self.flushed() + more;
        while self.flushed() < until {
            assert!(!self.thread.is_finished(), "the guest got an error");
            thread::yield_now();
        }
    }

    /// Ends by itself or with its disk: its slots, the last number it flushed, and the error it got.
    fn end(self) -> (u64, u64, Option<io::Error>) {
        self.stop.store(true, Ordering::Release);
        let error = self.thread.join().unwrap();
        (self.first, self.flushed.load(Ordering::Acquire), error)
    }
}

fn number_block(file: &fs::File, first: u64, number: u64) -> io::Result<()> {
    let mut bytes = Aligned::new(BLOCK);
    bytes.get_mut()[..8].copy_from_slice(&number.to_le_bytes());
    file.write_all_at(bytes.get(), (first + number % SLOTS) * 4096)
}

/// Every number up to `last` is there, or a later one in its place.
fn assert_holds(disk: &Path, first: u64, last: u64) {
    let file = fs::File::open(disk).unwrap();
    for number in last.saturating_sub(SLOTS - 1).max(1)..=last {
        let mut bytes = [0; 8];
        file.read_exact_at(&mut bytes, (first + number % SLOTS) * 4096)
            .unwrap();
        let found = u64::from_le_bytes(bytes);
        assert!(
            found >= number && found % SLOTS == number % SLOTS,
            "flushed {number}, found {found} of {last}"
        );
    }
}

fn primary(hosts: &Hosts, image: &Path, policy: &str) -> Node {
    let args = [&["--sync-on-flush", policy][..], &RARELY].concat();
    hosts.primary(&[image], &args)
}

fn wait_sync(primary: &Node, state: SyncState) -> MachineStatus {
    primary.wait("the state of sync-on-flush", |m| {
        m.sync_on_flush.unwrap().state == state
    })
}

fn wait_waiting(primary: &Node, count: usize) -> MachineStatus {
    primary.wait("waiting flushes", |m| {
        m.sync_on_flush.unwrap().waiting == count
    })
}

/// Fails over to the replica, and looks there for what the guests flushed.
fn assert_replica_holds(replica: &Node, guests: &[(u64, u64)]) {
    let socket = replica.socket().to_str().unwrap();
    let unplanned = ["failover", MACHINE, "--unplanned", "--force", "--json"];
    let said = must(PROGRAM, [&unplanned[..], &["--control", socket]].concat());
    let report: FailoverReport = serde_json::from_str(&said).unwrap();
    for &(first, last) in guests {
        assert_holds(&report.files[0], first, last);
    }
}

#[test]
fn no_flushed_block_is_missing_when_the_primary_dies() {
    if !can_mount() {
        return;
    }
    let mut chance = Ledger::new(MIB, 23);
    for lap in 0..LAPS {
        let hosts = Hosts::new();
        let image = hosts.image(["disk.vhdx", "disk.raw"][lap % 2], 64);
        let replica = hosts.replica(&[]);
        let primary = primary(&hosts, &image, "strict");
        // Before the initial copy is complete there is nothing to be in sync with.
        wait_sync(&primary, SyncState::InSync);
        let disk = hosts.disk("disk");
        let guests = [
            Guest::start(&disk, 0, 0, Durably::Fdatasync),
            Guest::start(&disk, 1, 0, Durably::Forced),
        ];
        guests[0].wait_flushed(1 + chance.pick(150));
        primary.kill();
        let ended = guests.map(|guest| {
            let (first, last, error) = guest.end();
            assert!(error.is_some(), "the disk was gone");
            (first, last)
        });
        assert_replica_holds(&replica, &ended);
    }
}

#[test]
fn flushes_that_wait_together_share_cuts() {
    if !can_mount() {
        return;
    }
    let hosts = Hosts::new();
    let image = hosts.image("disk.raw", 64);
    let _replica = hosts.replica(&[]);
    let primary = primary(&hosts, &image, "strict");
    let before = wait_sync(&primary, SyncState::InSync).traffic.epochs;
    let guests: Vec<_> = (0..12)
        .map(|index| Guest::start(&hosts.disk("disk"), index, 0, Durably::Forced))
        .collect();
    guests[0].wait_flushed(20);
    let flushed: u64 = guests.into_iter().map(|guest| guest.end().1).sum();
    let epochs = primary.machine().traffic.epochs - before;
    assert!(epochs >= 20, "one guest alone needs a cut for each flush");
    assert!(
        epochs * 4 <= flushed,
        "{epochs} epochs for {flushed} flushes of 12 guests"
    );
    // Nothing to flush, no cut.
    wait_sync(&primary, SyncState::InSync);
    primary.wait("rest", |m| m.traffic.owed == 0 && m.rpo.now_ms == Some(0));
    let before = primary.machine().traffic.epochs;
    let file = open_direct(&hosts.disk("disk"), OFlag::empty()).unwrap();
    for _ in 0..10 {
        file.sync_data().unwrap();
    }
    assert_eq!(primary.machine().traffic.epochs, before);
    drop(file);
    primary.stop();
}

#[test]
fn strict_flushes_wait_for_a_replica_that_stands_still_or_is_gone() {
    if !can_mount() {
        return;
    }
    let hosts = Hosts::new();
    let image = hosts.image("disk.vhdx", 64);
    let replica = hosts.replica(&[]);
    let primary = primary(&hosts, &image, "strict");
    wait_sync(&primary, SyncState::InSync);
    let guest = Guest::start(&hosts.disk("disk"), 0, 0, Durably::Fdatasync);
    guest.wait_flushed(3);
    replica.pause();
    // What the kernel passed on before is answered or not; the next one waits.
    wait_waiting(&primary, 1);
    let stuck = guest.flushed();
    primary.wait("a second look", |m| m.sync_on_flush.unwrap().waiting == 1);
    assert!(guest.flushed() <= stuck + 1);
    replica.resume();
    guest.wait_flushed(3);

    replica.kill();
    let away = wait_sync(&primary, SyncState::Away);
    assert_eq!(away.health, Health::Critical);
    let said = away.reasons.join("; ");
    assert!(said.contains("flushes wait for the replica"), "{said}");
    wait_waiting(&primary, 1);
    let replica = hosts.replica(&[]);
    guest.wait_flushed(3);
    let (first, last, error) = guest.end();
    assert!(error.is_none());

    // A stop ends although a flush waits, and the flush fails.
    replica.kill();
    wait_sync(&primary, SyncState::Away);
    let guest = Guest::start(&hosts.disk("disk"), 0, last + 1, Durably::Fdatasync);
    wait_waiting(&primary, 1);
    let (again, said) = (last + 1, "signal again to detach");
    primary.ask_to_stop();
    primary.wait_logged(said);
    assert_eq!(
        guest.flushed(),
        again,
        "it waits as long as the disk is there"
    );
    primary.stop();
    let (_, flushed, error) = guest.end();
    assert_eq!(flushed, again);
    assert_eq!(error.unwrap().raw_os_error(), Some(nix::libc::EIO));
    let replica = hosts.replica(&[]);
    assert_replica_holds(&replica, &[(first, last)]);
}

#[test]
fn a_strict_machine_waits_from_its_first_flush_after_a_restart() {
    if !can_mount() {
        return;
    }
    let hosts = Hosts::new();
    let image = hosts.image("disk.raw", 64);
    let replica = hosts.replica(&[]);
    let first = primary(&hosts, &image, "strict");
    let guest = Guest::start(&hosts.disk("disk"), 0, 0, Durably::Fdatasync);
    // Nobody waits for the initial copy.
    guest.wait_flushed(1);
    wait_sync(&first, SyncState::InSync);
    let (_, last, _) = guest.end();
    first.stop();
    replica.kill();
    let again = primary(&hosts, &image, "strict");
    assert_eq!(
        again.machine().sync_on_flush.unwrap().state,
        SyncState::Away
    );
    let guest = Guest::start(&hosts.disk("disk"), 0, last, Durably::Forced);
    wait_waiting(&again, 1);
    assert_eq!(guest.flushed(), last);
    let replica = hosts.replica(&[]);
    guest.wait_flushed(2);
    let (first, last, _) = guest.end();
    again.kill();
    assert_replica_holds(&replica, &[(first, last)]);
}

#[test]
fn available_goes_on_without_the_replica_and_says_so() {
    if !can_mount() {
        return;
    }
    let hosts = Hosts::new();
    let image = hosts.image("disk.vhdx", 64);
    let replica = hosts.replica(&[]);
    let primary = primary(&hosts, &image, "available");
    wait_sync(&primary, SyncState::InSync);
    let guest = Guest::start(&hosts.disk("disk"), 0, 0, Durably::Fdatasync);
    guest.wait_flushed(3);
    replica.pause();
    let away = wait_sync(&primary, SyncState::Away);
    assert_eq!(away.health, Health::Warning);
    let said = away.reasons.join("; ");
    assert!(said.contains("do not wait for the replica"), "{said}");
    guest.wait_flushed(200);
    let socket = primary.socket().to_str().unwrap();
    let shown = must(PROGRAM, ["status", "--control", socket]);
    assert!(shown.contains("available: replica away"), "{shown}");
    replica.resume();
    wait_sync(&primary, SyncState::InSync);
    let in_sync = guest.flushed();
    guest.wait_flushed(3);
    primary.kill();
    let (first, last, _) = guest.end();
    assert!(last > in_sync);
    assert_replica_holds(&replica, &[(first, last)]);
}
