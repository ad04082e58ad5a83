//! Hosts in network namespaces of their own: links that go down, slow ones (tbf), packets that are dropped (nft).

mod net;

use std::{
    fs,
    os::unix::fs::FileExt as _,
    path::PathBuf,
    thread,
    time::{Duration, Instant},
};

use nix::{errno::Errno, fcntl::OFlag};
use understudy::{
    coord::{
        role::Part,
        state::{Health, ReplicationState},
    },
    node::{control::FailoverReport, coordinator::JobSummary, status::TestStatus},
};

use self::net::Net;
use crate::support::{
    Aligned, BLOCK, Hosts, Ledger, Load, MACHINE, Node, call, can_mount, mark, marked, open_direct,
    parsed, send,
};

/// Size of the machine's disk.
const DISK_MIB: u64 = 32;
/// How long anything may take before a test gives up; it is no measure of speed.
const PATIENCE: Duration = Duration::from_mins(2);
/// Time between two looks.
const LOOK: Duration = Duration::from_millis(20);
/// The hosts by their places in the network.
const NAMES: [&str; 3] = ["alpha", "beta", "coord"];
const ALPHA: usize = 0;
const BETA: usize = 1;
const COORD: usize = 2;
/// Where hosts listen.
const PORT: u16 = 7272;

/// Hosts, and the network between them.
struct Stage {
    // Dropped in this order: the mounts go before the network.
    hosts: Hosts,
    net: Net,
}

impl Stage {
    /// So many hosts; nothing, said loudly, where that cannot be done.
    fn new(count: usize) -> Option<Self> {
        if !can_mount() {
            return None;
        }
        let net = Net::new(count)?;
        let hosts = Hosts::new();
        hosts.issue(NAMES[COORD]);
        hosts.image("disk.vhdx", DISK_MIB);
        Some(Self { hosts, net })
    }

    fn start(&self, host: usize) -> Node {
        let name = NAMES[host];
        let file = self.hosts.path(format!("{name}.toml"));
        fs::write(&file, self.config(host)).unwrap();
        let args = ["serve", "--config", file.to_str().unwrap()];
        let enter = self.net.enter(host);
        let command = self
            .hosts
            .command(name, &args)
            .through(&["nsenter", &enter]);
        Node::start(&command, None)
    }

    fn config(&self, host: usize) -> String {
        let address = |host: usize| format!("{}:{PORT}", net::address(host));
        let (name, coord) = (NAMES[host], NAMES[COORD]);
        if host == COORD {
            return format!(
                "store = \"coord-store\"\n[coordinator]\nidentity = {coord:?}\n[coordinator.hosts]\n\
                 alpha = {:?}\nbeta = {:?}\n",
                address(ALPHA),
                address(BETA)
            );
        }
        let peer = 1 - host;
        let machine = if host == ALPHA {
            format!(
                "[machines.{MACHINE}]\nimages = [\"disk.vhdx\"]\nat = \"{}\"\npeer = \"beta\"\n",
                self.hosts.mount().display()
            )
        } else {
            String::new()
        };
        format!(
            "store = \"{name}-store\"\nidentity = {name:?}\nlisten = \"0.0.0.0:{PORT}\"\ninterval = \"100ms\"\n\
             operators = [{coord:?}]\n[peers.{}]\naddress = {:?}\n[replicas]\nkeep = 20\n{machine}",
            NAMES[peer],
            address(peer)
        )
    }

    /// The machine's disk on a host that serves it.
    fn disk(&self, host: usize) -> PathBuf {
        if host == ALPHA {
            return self.hosts.disk("disk");
        }
        let folder = self.hosts.path("beta-store").join(MACHINE).join("disks");
        folder.join("disk.raw")
    }

    fn load(&self, host: usize, ledger: Ledger) -> Load {
        Load::start(self.disk(host), ledger)
    }
}

/// Waits until the machine runs on one host, with nothing left to do, and the other one follows.
fn protected(primary: &Node, replica: &Node) {
    primary.wait("a primary with nothing left to do", |m| {
        let replicating = m.state == ReplicationState::Replicating;
        m.part == Some(Part::Primary) && replicating && m.reasons.is_empty()
    });
    replica.wait("a replica that follows", |m| {
        m.part == Some(Part::Replica { abandoned: false })
    });
}

/// A cut on the primary shows on the replica what the guest wrote.
fn assert_same(primary: &Node, replica: &Node, ledger: &mut Ledger) {
    let lineage = primary.cut();
    let test: TestStatus = parsed(replica, &["failover", MACHINE, "--test"]);
    assert_eq!(test.point, lineage);
    ledger.verify(&test.files[0]);
    assert_eq!(call(replica, &["cancel", MACHINE, "--tests"]).0, 0);
}

#[test]
fn two_hosts_get_over_a_link_that_is_down_slow_or_lossy() {
    let Some(stage) = Stage::new(2) else { return };
    let (alpha, beta) = (stage.start(ALPHA), stage.start(BETA));
    protected(&alpha, &beta);
    let ledger = Ledger::new(DISK_MIB << 20, 3);
    let load = stage.load(ALPHA, ledger);

    // Down: the guest writes on; what it wrote is sent when the link is back.
    load.wait_written(200);
    stage.net.down(BETA);
    let suspended = alpha.wait("suspension", |m| m.state == ReplicationState::Suspended);
    assert_eq!(suspended.health, Health::Warning);
    load.wait_written(500);
    stage.net.up(BETA);
    alpha.wait_replicating();
    let mut ledger = load.finish();
    assert_same(&alpha, &beta, &mut ledger);

    // Slower than the guest: epochs get longer, and it notices nothing.
    stage.net.slow(ALPHA, "16mbit");
    let load = stage.load(ALPHA, ledger);
    let before = alpha.machine().traffic.epochs;
    load.wait_written(1_500);
    alpha.wait("epochs", |m| m.traffic.epochs >= before + 2);
    let mut ledger = load.finish();
    assert_same(&alpha, &beta, &mut ledger);
    stage.net.fast(ALPHA);

    // A fifth of all packets is lost, in both directions, also while the machine changes hosts.
    for host in [ALPHA, BETA] {
        stage.net.lossy(host, 20);
    }
    let load = stage.load(ALPHA, ledger);
    load.wait_written(500);
    let mut ledger = load.finish();
    assert_same(&alpha, &beta, &mut ledger);
    let _: FailoverReport = parsed(&alpha, &["failover", MACHINE, "--planned"]);
    protected(&beta, &alpha);
    ledger.verify(&stage.disk(BETA));
    assert!(stage.net.lost(ALPHA) > 0 && stage.net.lost(BETA) > 0);
    for host in [ALPHA, BETA] {
        stage.net.lossless(host);
    }
    let load = stage.load(BETA, ledger);
    load.wait_written(200);
    let mut ledger = load.finish();
    assert_same(&beta, &alpha, &mut ledger);
    for node in [&alpha, &beta] {
        let copies = node.log().matches("reconciled=CopyNeeded").count();
        assert!(copies <= 1, "only the first copy was whole");
    }
    alpha.stop();
    beta.stop();
}

#[test]
fn a_coordinator_gets_over_links_that_are_cut_and_a_host_that_is_cut_off_is_fenced() {
    let Some(stage) = Stage::new(3) else { return };
    let [alpha, beta, coord] = [ALPHA, BETA, COORD].map(|host| stage.start(host));
    protected(&alpha, &beta);
    let load = stage.load(ALPHA, Ledger::new(DISK_MIB << 20, 5));
    load.wait_written(300);
    let mut ledger = load.finish();

    // The coordinator loses its link while it drives, and goes on.
    let mut verb = send(&coord, &["failover", MACHINE, "--planned"]);
    while jobs(&coord).is_empty() {
        thread::sleep(LOOK);
    }
    stage.net.down(COORD);
    thread::sleep(Duration::from_secs(1));
    stage.net.up(COORD);
    verb.wait().unwrap();
    all_done(&coord);
    protected(&beta, &alpha);
    ledger.verify(&stage.disk(BETA));
    assert_same(&beta, &alpha, &mut ledger);
    let (code, out, err) = call(&coord, &["failover", MACHINE, "--planned"]);
    assert_eq!(code, 0, "{out}{err}");
    protected(&alpha, &beta);

    // The primary is cut off. It goes on, alone; the other one is promoted.
    mark(&stage.disk(ALPHA), 7, 1);
    alpha.cut();
    let guest = open_direct(&stage.disk(ALPHA), OFlag::empty()).unwrap();
    stage.net.down(ALPHA);
    write(&guest, 2).unwrap();
    for verb in [
        &["failover", MACHINE, "--unplanned", "--force"][..],
        &["commit", MACHINE],
    ] {
        let (code, out, err) = call(&coord, verb);
        assert_eq!(code, 0, "{verb:?}: {out}{err}");
    }
    assert_eq!(marked(&stage.disk(BETA), 7), 1, "the last cut");
    mark(&stage.disk(BETA), 8, 3);

    // It is back, meets the higher generation, and takes no more writes.
    stage.net.up(ALPHA);
    alpha.wait("fencing", |m| matches!(m.part, Some(Part::Fenced { .. })));
    let refused = write(&guest, 4).unwrap_err();
    assert_eq!(refused.raw_os_error(), Some(Errno::EROFS as i32));
    drop(guest);
    let (code, out, err) = call(&coord, &["reverse", MACHINE]);
    assert_eq!(code, 0, "{out}{err}");
    protected(&beta, &alpha);
    let lineage = beta.cut();
    let test: TestStatus = parsed(&alpha, &["failover", MACHINE, "--test"]);
    assert_eq!(test.point, lineage);
    assert_eq!(
        fs::read(&test.files[0]).unwrap(),
        fs::read(stage.disk(BETA)).unwrap()
    );
    assert_eq!(marked(&test.files[0], 8), 3);
    for node in [alpha, beta, coord] {
        node.stop();
    }
}

/// Writes a number all over block 7.
fn write(guest: &fs::File, number: u8) -> std::io::Result<()> {
    let mut bytes = Aligned::new(BLOCK);
    bytes.get_mut().fill(number);
    guest.write_all_at(bytes.get(), 7 * 4096)
}

fn jobs(coord: &Node) -> Vec<JobSummary> {
    parsed(coord, &["jobs"])
}

/// Waits until no job is under way.
fn all_done(coord: &Node) {
    let began = Instant::now();
    while jobs(coord).iter().any(|job| job.ended.is_none()) {
        assert!(began.elapsed() < PATIENCE, "{:#?}", jobs(coord));
        thread::sleep(LOOK);
    }
}
