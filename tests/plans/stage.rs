//! Two hosts with two machines, and a third host that coordinates them.

use std::{
    fs,
    net::UdpSocket,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use understudy::{
    base::ids::Name,
    coord::{role::Part, state::ReplicationState},
    net::Identity,
    node::{operate::Way, status::MachineStatus},
};

use crate::support::{Hosts, Node, mark, marked};

/// How long anything may take before a test gives up; it is no measure of speed.
pub(super) const PATIENCE: Duration = Duration::from_mins(2);
/// Time between two looks.
pub(super) const LOOK: Duration = Duration::from_millis(10);
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
        let machine = |name: &&str| {
            let path = |path: PathBuf| path.to_str().unwrap().to_owned();
            format!(
                "[machines.{name}]\nimages = [{:?}]\nat = {:?}\npeer = \"beta\"\n",
                path(self.hosts.path(format!("{name}.raw"))),
                path(self.hosts.path(format!("mnt-{name}")))
            )
        };
        let machines: String = MACHINES.iter().map(machine).collect();
        self.serve("alpha", 0, ("beta", 1), &machines)
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

    pub(super) fn start(&self, name: &str, config: &str) -> Node {
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

/// Waits until `primary` serves both machines, with nothing left to do, and `replica` follows.
pub(super) fn protected(primary: &Node, replica: &Node) {
    let began = Instant::now();
    let fine = |name: &&str| {
        let (here, there) = (machine(primary, name), machine(replica, name));
        let replicating = |machine: &MachineStatus| machine.state == ReplicationState::Replicating;
        here.is_some_and(|machine| {
            machine.part == Some(Part::Primary)
                && replicating(&machine)
                && machine.reasons.is_empty()
        }) && there.is_some_and(|machine| {
            machine.part == Some(Part::Replica { abandoned: false }) && replicating(&machine)
        })
    };
    while !MACHINES.iter().all(|name| fine(name)) {
        let found = MACHINES.map(|name| [machine(primary, name), machine(replica, name)]);
        assert!(began.elapsed() < PATIENCE, "not protected: {found:#?}");
        std::thread::sleep(LOOK);
    }
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
