//! Disks that fail: the real program under strace, which makes calls on chosen files return `EIO`.
//!
//! A host has two machines. The files of one of them go bad; the other one, and whoever uses it, must not notice.

mod inject;

use std::{
    fs::{self, File},
    io,
    net::UdpSocket,
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use nix::{errno::Errno, fcntl::OFlag};
use understudy::{
    base::ids::{Lineage, Name},
    coord::state::{Health, ReplicationState},
    node::{
        control::ask_cut,
        status::{MachineStatus, TestStatus},
    },
};

use self::inject::Injection;
use crate::support::{
    Aligned, BLOCK, Hosts, Ledger, Node, call, can_mount, have, mark, marked, open_direct, parsed,
    runtime,
};

/// The machine whose files go bad.
const BAD: &str = "bad";
/// The other one.
const GOOD: &str = "good";
/// How long anything may take before a test gives up; it is no measure of speed.
const PATIENCE: Duration = Duration::from_mins(1);
/// Time between two looks.
const LOOK: Duration = Duration::from_millis(20);
/// Size of a disk.
const DISK_MIB: u64 = 16;
/// Requests within which a call that fails must have been met.
const REQUESTS: u64 = 2_000;

/// A host `alpha` with both machines, and `beta`, which has their replicas.
struct Stage {
    hosts: Hosts,
    ports: [u16; 2],
    image: PathBuf,
}

impl Stage {
    /// With the bad machine's disk in this format; nothing, said loudly, where nothing can be injected.
    fn new(format: &str) -> Option<Self> {
        if !can_mount() || !have(&["strace"]) {
            return None;
        }
        let hosts = Hosts::new();
        let image = hosts.image(&format!("{BAD}.{format}"), DISK_MIB);
        hosts.image(&format!("{GOOD}.raw"), DISK_MIB);
        for machine in [BAD, GOOD] {
            fs::create_dir(hosts.path(format!("mnt-{machine}"))).unwrap();
        }
        // Held together until both are known, so that they differ.
        let sockets = [(); 2].map(|()| UdpSocket::bind("127.0.0.1:0").unwrap());
        let ports = [0, 1].map(|index: usize| sockets[index].local_addr().unwrap().port());
        Some(Self {
            hosts,
            ports,
            image,
        })
    }

    fn alpha(&self) -> Node {
        let machine = |name: &str, image: &Path| {
            let at = self.hosts.path(format!("mnt-{name}"));
            let (image, at) = (image.display(), at.display());
            format!("[machines.{name}]\nimages = [\"{image}\"]\nat = \"{at}\"\npeer = \"beta\"\n")
        };
        let good = self.hosts.path(format!("{GOOD}.raw"));
        let machines = [machine(BAD, &self.image), machine(GOOD, &good)].concat();
        self.serve("alpha", 0, ("beta", 1), &machines)
    }

    fn beta(&self) -> Node {
        self.serve("beta", 1, ("alpha", 0), "")
    }

    fn serve(&self, name: &str, own: usize, (peer, theirs): (&str, usize), more: &str) -> Node {
        let text = format!(
            "store = \"{name}-store\"\nidentity = \"{name}\"\nlisten = \"127.0.0.1:{}\"\ninterval = \"100ms\"\n\
             [replicas]\nkeep = 3\n[peers.{peer}]\naddress = \"127.0.0.1:{}\"\n{more}",
            self.ports[own], self.ports[theirs]
        );
        let config = self.hosts.path(format!("{name}.toml"));
        fs::write(&config, text).unwrap();
        let args = ["serve", "--config", config.to_str().unwrap()];
        Node::start(&self.hosts.command(name, &args), None)
    }

    fn disk(&self, machine: &str) -> PathBuf {
        self.hosts.path(format!("mnt-{machine}/{machine}.raw"))
    }

    /// The files below a folder of the stage.
    fn files(&self, folder: &str) -> Vec<PathBuf> {
        let mut pending = vec![self.hosts.path(folder)];
        let mut files = Vec::new();
        while let Some(folder) = pending.pop() {
            for entry in fs::read_dir(folder).unwrap() {
                let path = entry.unwrap().path();
                let list = if path.is_dir() {
                    &mut pending
                } else {
                    &mut files
                };
                list.push(path);
            }
        }
        files
    }
}

/// Both hosts, and what the bad machine's guest was told.
struct Play {
    stage: Stage,
    alpha: Node,
    beta: Node,
    ledger: Ledger,
    marks: u8,
}

impl Play {
    fn new(format: &str, seed: u64) -> Option<Self> {
        let stage = Stage::new(format)?;
        let (alpha, beta) = (stage.alpha(), stage.beta());
        let mut play = Self {
            stage,
            alpha,
            beta,
            ledger: Ledger::new(DISK_MIB << 20, seed),
            marks: 0,
        };
        play.in_step();
        Some(play)
    }

    /// The guest's disk, opened as a hypervisor does.
    fn guest(&self) -> File {
        open_direct(&self.stage.disk(BAD), OFlag::empty()).unwrap()
    }

    /// The bad machine replicates, and its replica holds what its guest was told.
    fn in_step(&mut self) {
        wait(&self.alpha, BAD, "replication", |m| {
            m.state == ReplicationState::Replicating
        });
        let guest = self.guest();
        for _ in 0..20 {
            let first = self.ledger.pick(4_000);
            self.ledger.write(&guest, first, 16).unwrap();
        }
        guest.sync_data().unwrap();
        drop(guest);
        self.ledger.verify(&self.stage.disk(BAD));
        let lineage = cut(&self.alpha, BAD);
        let test: TestStatus = parsed(&self.beta, &["failover", BAD, "--test"]);
        assert_eq!(test.point, lineage);
        self.ledger.verify(&test.files[0]);
        assert_eq!(call(&self.beta, &["cancel", BAD, "--tests"]).0, 0);
        self.others_go_on();
    }

    /// The other machine is written, and stays in step.
    fn others_go_on(&mut self) {
        self.marks += 1;
        let disk = self.stage.disk(GOOD);
        mark(&disk, 7, self.marks);
        assert_eq!(marked(&disk, 7), self.marks);
        let lineage = cut(&self.alpha, GOOD);
        let good = wait(&self.beta, GOOD, "the cut", |m| m.durable == Some(lineage));
        assert_eq!(good.health, Health::Normal, "{good:#?}");
        let good = wait(&self.alpha, GOOD, "health", |m| m.health == Health::Normal);
        assert_eq!(good.state, ReplicationState::Replicating);
    }

    /// Alpha dies or is stopped, and comes back on storage that works.
    fn restart(mut self, killed: bool) -> Self {
        if killed {
            self.alpha.kill();
        } else {
            // A disk that stopped is not closed cleanly, and the end says so. The other machine is.
            let closed = |log: &str| log.matches("closed machine=good").count();
            let before = closed(&self.alpha.log());
            self.alpha.ask_to_stop();
            let (_, log) = self.alpha.ended();
            assert_eq!(closed(&log), before + 1, "{log}");
        }
        self.alpha = self.stage.alpha();
        self
    }

    /// How often the bad machine was copied as a whole.
    fn copies(&self) -> usize {
        let log = self.alpha.log();
        let copies = log
            .lines()
            .filter(|line| line.contains("reconciled=CopyNeeded"));
        copies.filter(|line| line.contains("machine=bad")).count()
    }
}

/// Waits until a machine of a node is as wished.
fn wait(
    node: &Node,
    machine: &str,
    what: &str,
    wished: impl Fn(&MachineStatus) -> bool,
) -> MachineStatus {
    node.wait(what, |m| m.name.as_str() == machine && wished(m))
}

/// What a node says of the bad machine, as soon as it is critical.
fn critical(node: &Node) -> String {
    let bad = wait(node, BAD, "alarm", |m| m.health == Health::Critical);
    bad.reasons.join("; ")
}

/// Cuts; a link that is lost at this moment is no reason to give up.
fn cut(node: &Node, machine: &str) -> Lineage {
    let machine = Name::new(machine).unwrap();
    let began = Instant::now();
    loop {
        match runtime().block_on(ask_cut(node.socket(), &machine)) {
            Ok(lineage) => return lineage,
            Err(error) => assert!(began.elapsed() < PATIENCE, "no cut: {error}"),
        }
        std::thread::sleep(LOOK);
    }
}

/// What a guest does until it is given an error.
#[derive(Clone, Copy, Debug)]
enum Request {
    Read,
    Write,
    Flush,
    Forced,
}

impl Request {
    /// The call that fails.
    fn call(self) -> &'static str {
        match self {
            Self::Read => "pread64",
            Self::Write | Self::Forced => "pwrite64",
            Self::Flush => "fdatasync",
        }
    }

    /// Asked again and again; the error, and after how many requests.
    fn until_it_fails(self, play: &mut Play) -> (io::Error, u64) {
        let flags = match self {
            Self::Forced => OFlag::O_DSYNC,
            _ => OFlag::empty(),
        };
        let guest = open_direct(&play.stage.disk(BAD), flags).unwrap();
        let mut bytes = Aligned::new(BLOCK);
        for request in 1..=REQUESTS {
            let block = play.ledger.pick(4_000);
            let done = match self {
                Self::Read => guest.read_exact_at(bytes.get_mut(), block * 4096),
                Self::Write | Self::Forced => play.ledger.write(&guest, block, 1),
                Self::Flush => {
                    let written = play.ledger.write(&guest, block, 1);
                    written.and_then(|()| guest.sync_data())
                }
            };
            if let Err(error) = done {
                return (error, request);
            }
        }
        panic!("{self:?}: no error in {REQUESTS} requests");
    }

    /// Whether it leaves unknown what is on the platter, so that the disk has to stop.
    fn is_final(self) -> bool {
        matches!(self, Self::Flush | Self::Forced)
    }
}

/// The guest gets the error, the host says why, the other machine goes on; after a restart nothing is missing, and nothing
/// is copied as a whole.
fn an_image_fails(format: &str, requests: &[(Request, &str, bool)]) {
    let Some(mut play) = Play::new(format, 41) else {
        return;
    };
    for &(request, when, killed) in requests {
        let calls = [request.call()];
        let injection = Injection::begin(play.alpha.pid(), &[&play.stage.image], &calls, when);
        let (error, after) = request.until_it_fails(&mut play);
        assert_eq!(
            error.raw_os_error(),
            Some(Errno::EIO as i32),
            "{request:?} {when}: {error}"
        );
        let reasons = critical(&play.alpha);
        assert!(
            reasons.contains("Input/output error"),
            "{request:?} {when}: {reasons}"
        );
        assert!(
            reasons.contains("disk bad"),
            "{request:?} {when}: {reasons}"
        );
        play.others_go_on();
        let injected = injection.end();
        assert!(injected > 0, "{request:?} {when}: {injected} of {after}");
        // Working storage is not enough for a disk that has stopped; any other one goes on.
        let guest = play.guest();
        let written = play.ledger.write(&guest, 100, 1);
        assert_eq!(
            written.is_err(),
            request.is_final(),
            "{request:?} {when}: {written:?}"
        );
        drop(guest);
        play = play.restart(killed);
        play.in_step();
        assert_eq!(
            play.copies(),
            1,
            "{request:?} {when}: only the first copy was whole"
        );
    }
    play.alpha.stop();
    play.beta.stop();
}

#[test]
fn an_error_of_a_raw_image_is_the_guests_and_is_told() {
    an_image_fails(
        "raw",
        &[
            (Request::Read, "1", true),
            (Request::Write, "3", false),
            (Request::Flush, "1", true),
            (Request::Flush, "4", false),
            (Request::Forced, "2", true),
        ],
    );
}

#[test]
fn an_error_of_a_vhdx_image_is_the_guests_and_is_told() {
    an_image_fails(
        "vhdx",
        &[
            (Request::Read, "2", false),
            (Request::Write, "1", true),
            (Request::Flush, "2", true),
            (Request::Forced, "1", false),
        ],
    );
}

/// The primary cannot note what changes: the guest goes on, and everything is compared when the host is restarted.
#[test]
fn an_error_of_the_tracking_files_is_not_the_guests() {
    let Some(mut play) = Play::new("raw", 43) else {
        return;
    };
    // After a clean end no region is hot: the first write into each has to be noted.
    play = play.restart(false);
    wait(&play.alpha, BAD, "replication", |m| {
        m.state == ReplicationState::Replicating
    });
    let files = play.stage.files("alpha-store/bad/tracking");
    let tracking: Vec<_> = files.iter().map(PathBuf::as_path).collect();
    let calls = ["pwrite64", "fdatasync", "msync"];
    let injection = Injection::begin(play.alpha.pid(), &tracking, &calls, "1+");
    let guest = play.guest();
    for block in (0..4_000).step_by(200) {
        play.ledger.write(&guest, block, 1).unwrap();
        guest.sync_data().unwrap();
    }
    drop(guest);
    let reasons = critical(&play.alpha);
    assert!(reasons.contains("tracking"), "{reasons}");
    assert!(reasons.contains("Input/output error"), "{reasons}");
    play.others_go_on();
    assert!(injection.end() > 0);
    play = play.restart(true);
    play.in_step();
    assert_eq!(play.copies(), 1, "compared, not copied");
    play.alpha.stop();
    play.beta.stop();
}

/// The replica cannot store what it receives: the guest does not notice, and what was durable there stays.
#[test]
fn an_error_of_the_replica_is_the_replicas_trouble() {
    let Some(mut play) = Play::new("vhdx", 47) else {
        return;
    };
    for (calls, when) in [(["pwrite64"], "2+"), (["fdatasync"], "1+")] {
        let mut files = play.stage.files("beta-store/bad");
        // What is being received; it is made anew for each epoch.
        files.push(play.stage.hosts.path("beta-store/bad/incoming.part"));
        let files: Vec<_> = files.iter().map(PathBuf::as_path).collect();
        let before = wait(&play.beta, BAD, "a point", |m| m.durable.is_some());
        let injection = Injection::begin(play.beta.pid(), &files, &calls, when);
        let guest = play.guest();
        for block in (0..4_000).step_by(100) {
            play.ledger.write(&guest, block, 4).unwrap();
        }
        guest.sync_data().unwrap();
        drop(guest);
        let reasons = critical(&play.beta);
        assert!(reasons.contains("Input/output error"), "{reasons}");
        let reasons = critical(&play.alpha);
        assert!(reasons.contains("Input/output error"), "{reasons}");
        play.others_go_on();
        assert!(injection.end() > 0);
        let held = wait(&play.beta, BAD, "the last point", |m| m.durable.is_some());
        let epoch = |m: &MachineStatus| m.durable.map(|lineage| lineage.epoch);
        assert!(epoch(&held) >= epoch(&before), "{held:#?}");
        play.beta.kill();
        play.beta = play.stage.beta();
        play.in_step();
        assert_eq!(play.copies(), 1, "only the first copy was whole");
    }
    play.alpha.stop();
    play.beta.stop();
}
