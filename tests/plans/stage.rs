//! Two hosts with two machines, and a third host that coordinates them.

use std::{
    fs,
    net::UdpSocket,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use understudy::{
    base::ids::Name,
    coord::{job::Outcome, role::Part, state::ReplicationState},
    net::Identity,
    node::{control::ask_cut, coordinator::JobStatus, operate::Way, status::MachineStatus},
};

use crate::support::{Hosts, Node, call, mark, marked, runtime};

/// How long anything may take before a test gives up; it is no measure of speed.
pub(super) const PATIENCE: Duration = Duration::from_mins(2);
/// Time between two looks.
pub(super) const LOOK: Duration = Duration::from_millis(10);
/// Between two looks at a log: less than a step that is made durable takes.
pub(super) const GLANCE: Duration = Duration::from_millis(1);
/// The machines; their images lie on `alpha`.
pub(super) const MACHINES: [&str; 2] = ["db", "web"];
/// The third host: it has no machines.
pub(super) const COORDINATOR: &str = "coord";
/// Bytes of a disk.
const DISK_MIB: u64 = 16;

/// Certificates, folders and ports of `alpha`, `beta` and [`COORDINATOR`].
pub(super) struct Stage {
    pub(super) hosts: Hosts,
    ports: [u16; 2],
}

impl Stage {
    pub(super) fn new() -> Self {
        let hosts = Hosts::new();
        hosts.issue(COORDINATOR);
        for machine in MACHINES {
            hosts.image(&format!("{machine}.raw"), DISK_MIB);
            fs::create_dir(hosts.path(format!("mnt-{machine}"))).unwrap();
        }
        // Held together until both are known, so that they differ.
        let sockets = [(); 2].map(|()| UdpSocket::bind("127.0.0.1:0").unwrap());
        let ports = [0, 1].map(|index: usize| sockets[index].local_addr().unwrap().port());
        Self { hosts, ports }
    }

    pub(super) fn alpha(&self) -> Node {
        self.alpha_with("")
    }

    /// `alpha`, which coordinates `beta` and itself.
    pub(super) fn alpha_coordinating(&self) -> Node {
        let coordinator = format!(
            "[coordinator]\nidentity = \"{COORDINATOR}\"\n[coordinator.hosts]\nbeta = {:?}\n",
            self.address(1)
        );
        self.alpha_with(&coordinator)
    }

    fn alpha_with(&self, more: &str) -> Node {
        let machine = |name: &&str| {
            let path = |path: PathBuf| path.to_str().unwrap().to_owned();
            format!(
                "[machines.{name}]\nimages = [{:?}]\nat = {:?}\npeer = \"beta\"\n",
                path(self.hosts.path(format!("{name}.raw"))),
                path(self.hosts.path(format!("mnt-{name}")))
            )
        };
        let machines: String = MACHINES.iter().map(machine).collect();
        self.serve("alpha", 0, ("beta", 1), &format!("{more}{machines}"))
    }

    pub(super) fn beta(&self) -> Node {
        self.serve("beta", 1, ("alpha", 0), "")
    }

    fn serve(&self, name: &str, own: usize, (peer, theirs): (&str, usize), more: &str) -> Node {
        let text = format!(
            "store = \"{name}-store\"\nidentity = \"{name}\"\nlisten = \"127.0.0.1:{}\"\ninterval = \"100ms\"\n\
             operators = [\"{COORDINATOR}\"]\n[replicas]\nkeep = 30\n[peers.{peer}]\naddress = \"127.0.0.1:{}\"\n{more}",
            self.ports[own], self.ports[theirs]
        );
        self.start(name, &text)
    }

    /// The third host.
    pub(super) fn coordinator(&self) -> Node {
        let text = format!(
            "store = \"coord-store\"\n[coordinator]\nidentity = \"{COORDINATOR}\"\n[coordinator.hosts]\n\
             alpha = {:?}\nbeta = {:?}\n",
            self.address(0),
            self.address(1)
        );
        self.start(COORDINATOR, &text)
    }

    /// A plan in a file of its name.
    pub(super) fn plan(&self, name: &str, groups: &str) -> String {
        let file = self.hosts.path(format!("{name}.plan"));
        fs::write(&file, format!("name = {name:?}\n{groups}")).unwrap();
        file.to_str().unwrap().to_owned()
    }

    /// A script in a file of its name; its text is for a shell.
    pub(super) fn script(&self, name: &str, text: &str) -> String {
        let file = self.hosts.path(name);
        fs::write(&file, format!("#!/bin/sh\n{text}\n")).unwrap();
        fs::set_permissions(&file, fs::Permissions::from_mode(0o700)).unwrap();
        file.to_str().unwrap().to_owned()
    }

    fn start(&self, name: &str, config: &str) -> Node {
        let file = self.hosts.path(format!("{name}.toml"));
        fs::write(&file, config).unwrap();
        let args = ["serve", "--config", file.to_str().unwrap()];
        Node::start(&self.hosts.command(name, &args), None)
    }

    /// The way to `alpha` (0) or `beta` (1) for whoever has this identity.
    pub(super) fn way(&self, host: usize, identity: &str) -> Way {
        let identity = Identity::load(&self.hosts.path(identity)).unwrap();
        let name = Name::new(["alpha", "beta"][host]).unwrap();
        Way::to(self.address(host), Some(name), identity)
    }

    /// Makes a point of everything that was written on a host.
    pub(super) fn cut(&self, host: usize) {
        let way = self.way(host, COORDINATOR);
        for machine in MACHINES {
            let machine = Name::new(machine).unwrap();
            runtime().block_on(ask_cut(&way, &machine)).unwrap();
        }
    }

    pub(super) fn address(&self, host: usize) -> String {
        format!("127.0.0.1:{}", self.ports[host])
    }

    /// A machine's disk on `alpha` (0) or `beta` (1).
    pub(super) fn disk(&self, host: usize, machine: &str) -> PathBuf {
        let file = format!("{machine}.raw");
        match host {
            0 => self.hosts.path(format!("mnt-{machine}")).join(file),
            _ => self
                .hosts
                .path("beta-store")
                .join(machine)
                .join("disks")
                .join(file),
        }
    }
}

/// A job, once it is as wished.
pub(super) fn job(coordinator: &Node, id: u64, wished: impl Fn(&JobStatus) -> bool) -> JobStatus {
    let began = Instant::now();
    loop {
        let (code, out, err) = call(coordinator, &["jobs", &id.to_string(), "--json"]);
        // One that was only just sent may not be there yet.
        if code == 0 {
            let job: JobStatus = serde_json::from_str(&out).unwrap();
            if wished(&job) {
                return job;
            }
        }
        assert!(began.elapsed() < PATIENCE, "{out}{err}");
        std::thread::sleep(LOOK);
    }
}

/// How a job ended.
pub(super) fn ended(coordinator: &Node, id: u64) -> (Outcome, JobStatus) {
    let job = job(coordinator, id, |job| job.job.ended.is_some());
    (job.job.ended.unwrap().outcome, job)
}

/// Calls a verb of a coordinator that must succeed; what it printed.
pub(super) fn does(coordinator: &Node, args: &[&str]) -> String {
    let (code, out, err) = call(coordinator, args);
    assert_eq!(code, 0, "{args:?}: {out}{err}");
    out
}

/// Calls a verb that must end with this code; all it said.
pub(super) fn fails(coordinator: &Node, args: &[&str], code: i32) -> String {
    let (found, out, err) = call(coordinator, args);
    assert_eq!(found, code, "{args:?}: {out}{err}");
    assert!(!err.contains("panicked"), "{err}");
    format!("{out}{err}")
}

/// A machine on a node.
pub(super) fn machine(node: &Node, name: &str) -> Option<MachineStatus> {
    let machines = node.status().machines;
    machines
        .into_iter()
        .find(|machine| machine.name.as_str() == name)
}

/// The part a node plays for a machine.
pub(super) fn part(node: &Node, name: &str) -> Option<Part> {
    machine(node, name)?.part
}

/// Waits until one host serves both machines, with nothing left to do, and the other one follows; which one serves.
pub(super) fn protected_somewhere(nodes: [&Node; 2]) -> usize {
    let began = Instant::now();
    loop {
        let mut hosts = [0, 1].into_iter();
        if let Some(primary) = hosts.find(|&at| are_protected(nodes[at], nodes[1 - at])) {
            return primary;
        }
        let found = nodes.map(|node| MACHINES.map(|name| machine(node, name)));
        assert!(began.elapsed() < PATIENCE, "not protected: {found:#?}");
        std::thread::sleep(LOOK);
    }
}

/// Waits until `primary` serves both machines, with nothing left to do, and `replica` follows.
pub(super) fn protected(primary: &Node, replica: &Node) {
    assert_eq!(protected_somewhere([primary, replica]), 0);
}

fn are_protected(primary: &Node, replica: &Node) -> bool {
    MACHINES.iter().all(|name| {
        let (here, there) = (machine(primary, name), machine(replica, name));
        let replicating = |machine: &MachineStatus| machine.state == ReplicationState::Replicating;
        here.is_some_and(|machine| {
            machine.part == Some(Part::Primary)
                && replicating(&machine)
                && machine.reasons.is_empty()
        }) && there.is_some_and(|machine| {
            machine.part == Some(Part::Replica { abandoned: false }) && replicating(&machine)
        })
    })
}

/// Writes a number that [`check`] finds again.
pub(super) fn write(disk: &Path, number: u8) {
    mark(disk, 7, number);
    mark(disk, 1000 + u64::from(number), number);
}

/// The disk holds the numbers up to this one.
pub(super) fn check(disk: &Path, number: u8) {
    assert_eq!(marked(disk, 7), number, "{}", disk.display());
    for earlier in 1..=number {
        assert_eq!(marked(disk, 1000 + u64::from(earlier)), earlier);
    }
    assert_eq!(marked(disk, 1001 + u64::from(number)), 0);
}
