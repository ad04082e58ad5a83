//! The stage of the fault lab: two hosts and a coordinator as processes, three machines, bad links, small disks, wrong clocks.
//!
//! ```text
//!   coord ──relay──> alpha  db (strict, VHDX + raw), web (raw)     alpha-store  alpha-images   a small file system each
//!     |                |  ^
//!     |          relay v  | relay
//!     +────relay────> beta  mail (VHDX)                            beta-store   beta-images    the same
//! ```

use std::{
    fs,
    net::UdpSocket,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use understudy::{
    base::ids::{Lineage, Name},
    coord::{role::Part, state::ReplicationState},
    node::{control, status::MachineStatus},
    testing::Random,
};

use super::{
    guest::Guest,
    history::History,
    network::{Relay, Weather},
};
use crate::support::{BLOCK, Hosts, Node, SmallFileSystem, find_program, must, runtime, skip};

/// How long anything may take before a lap fails; it is no measure of speed.
const PATIENCE: Duration = Duration::from_mins(2);
/// Links that are bad get better after so long a wait: where a twentieth of the packets is lost, a disk that was written
/// all over takes minutes, and there is nothing more to see.
const BETTER_AFTER: Duration = Duration::from_secs(30);
/// Time between two looks.
pub(super) const LOOK: Duration = Duration::from_millis(20);
/// A disk that stopped is mended by a restart of its host; how long it is waited whether something else mends it.
const RESTART_AFTER: Duration = Duration::from_secs(2);
/// The hosts that have machines, and the one that drives them.
pub(super) const NODES: [&str; 3] = ["alpha", "beta", "coord"];
/// Which of [`NODES`] is the coordinator.
pub(super) const COORD: usize = 2;
/// Size of a host's store, of which replicas and recovery points take their part, in MiB.
const STORE_MIB: u64 = 384;
/// Size of the file system that holds a host's images, in MiB.
const IMAGES_MIB: u64 = 112;

/// A machine, and the host that has its images: its name, its disks with their sizes in MiB.
struct Cast {
    name: &'static str,
    home: usize,
    group: &'static str,
    disks: &'static [(&'static str, &'static str, u64)],
}

const CAST: [Cast; 3] = [
    Cast {
        name: "db",
        home: 0,
        group: "strict",
        disks: &[("system", "vhdx", 16), ("data", "raw", 8)],
    },
    Cast {
        name: "web",
        home: 0,
        group: "plain",
        disks: &[("web", "raw", 16)],
    },
    Cast {
        name: "mail",
        home: 1,
        group: "plain",
        disks: &[("mail", "vhdx", 16)],
    },
];

/// A machine on the stage.
pub(super) struct Machine {
    cast: &'static Cast,
    /// What it was told, while nobody writes.
    history: Option<History>,
    guest: Option<Guest>,
    /// Points of which it is known between which two writes they were cut.
    pub(super) points: Vec<Known>,
    /// The last write that was flushed while a flush meant that the replica has it.
    pub(super) synced: u64,
    /// Whether it does at present.
    pub(super) strict: bool,
}

/// A cut that was asked for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Known {
    pub(super) point: Lineage,
    /// The last write answered before.
    pub(super) from: u64,
    /// The last write begun before it was answered.
    pub(super) to: u64,
}

impl Machine {
    pub(super) fn name(&self) -> &'static str {
        self.cast.name
    }

    /// What was written; nobody writes now.
    pub(super) fn history(&mut self) -> &mut History {
        self.history.as_mut().expect("no guest runs")
    }

    pub(super) fn guest(&self) -> Option<&Guest> {
        self.guest.as_ref()
    }
}

/// Everything.
pub(super) struct Stage {
    // Dropped in this order: nodes go before what they stand on.
    pub(super) nodes: [Option<Node>; 3],
    pub(super) machines: Vec<Machine>,
    /// To alpha and to beta, for their peers; to alpha and to beta, for the coordinator.
    relays: [Relay; 4],
    ports: [u16; 2],
    hosts: Hosts,
    /// Store and images of each host.
    pub(super) spaces: [[SmallFileSystem; 2]; 2],
    clock: Option<PathBuf>,
    pub(super) random: Random,
}

impl Stage {
    pub(super) fn new(seed: u64) -> Self {
        let mut random = Random::new(seed);
        let hosts = Hosts::new();
        hosts.issue(NODES[COORD]);
        let space = |name: &str, mib: u64| {
            SmallFileSystem::new(&hosts.path(format!("{name}.fs")), &hosts.path(name), mib)
        };
        let spaces = [0, 1].map(|host: usize| {
            [
                space(&format!("{}-store", NODES[host]), STORE_MIB),
                space(&format!("{}-images", NODES[host]), IMAGES_MIB),
            ]
        });
        let machines = (1..).zip(&CAST).map(|(tag, cast)| {
            fs::create_dir(hosts.path(format!("mnt-{}", cast.name))).unwrap();
            for (disk, format, mib) in cast.disks {
                hosts.image(
                    &format!("{}-images/{disk}.{format}", NODES[cast.home]),
                    *mib,
                );
            }
            let blocks = |disk: &(&str, &str, u64)| (disk.2 << 20) / u64::try_from(BLOCK).unwrap();
            let blocks: Vec<_> = cast.disks.iter().map(blocks).collect();
            Machine {
                cast,
                history: Some(History::new(tag, &blocks, random.next())),
                guest: None,
                points: Vec::new(),
                synced: 0,
                strict: false,
            }
        });
        let machines = machines.collect();
        // Held together until both are known, so that they differ.
        let sockets = [(); 2].map(|()| UdpSocket::bind("127.0.0.1:0").unwrap());
        let ports = [0, 1].map(|host: usize| sockets[host].local_addr().unwrap().port());
        drop(sockets);
        let relays = [0, 1, 0, 1].map(|to: usize| Relay::new(ports[to], random.next()));
        let clock = clock(&hosts);
        let mut stage = Self {
            nodes: [None, None, None],
            machines,
            relays,
            ports,
            hosts,
            spaces,
            clock,
            random,
        };
        for node in 0..NODES.len() {
            stage.set_clock(node, 0);
            stage.start(node);
        }
        stage
    }

    /// Its folder stays; where that is.
    pub(super) fn keep(&mut self) -> &Path {
        self.hosts.keep()
    }

    /// What a node logs.
    pub(super) fn log(&self, node: usize) -> PathBuf {
        self.hosts.path(format!("{}.log", NODES[node]))
    }

    pub(super) fn node(&self, node: usize) -> &Node {
        self.nodes[node].as_ref().expect("the node lives")
    }

    pub(super) fn start(&mut self, node: usize) {
        let name = NODES[node];
        let file = self.hosts.path(format!("{name}.toml"));
        fs::write(&file, self.config(node)).unwrap();
        let args = ["serve", "--config", file.to_str().unwrap()];
        let mut command = self.hosts.command(name, &args);
        if let Some(clock) = &self.clock {
            let offset = self.hosts.path(format!("{name}.clock"));
            command = command
                .env("LD_PRELOAD", clock.to_str().unwrap())
                .env("LAB_CLOCK", offset.to_str().unwrap());
        }
        self.nodes[node] = Some(Node::start(&command, None));
    }

    pub(super) fn kill(&mut self, node: usize) {
        self.nodes[node].take().expect("the node lives").kill();
    }

    fn config(&self, node: usize) -> String {
        let coord = NODES[COORD];
        if node == COORD {
            let [alpha, beta] = [2, 3].map(|relay: usize| self.relays[relay].address());
            return format!(
                "store = \"coord-store\"\n[coordinator]\nidentity = {coord:?}\n[coordinator.hosts]\n\
                 alpha = {alpha:?}\nbeta = {beta:?}\n"
            );
        }
        let (name, peer, port) = (NODES[node], NODES[1 - node], self.ports[node]);
        let address = self.relays[1 - node].address();
        let text = format!(
            "store = \"{name}-store\"\nidentity = {name:?}\nlisten = \"127.0.0.1:{port}\"\ninterval = \"100ms\"\n\
             operators = [{coord:?}]\n[peers.{peer}]\naddress = {address:?}\n[replicas]\nkeep = 8\n\
             [groups.strict]\nsync-on-flush = \"strict\"\n[groups.plain]\n"
        );
        let machine = |cast: &Cast| {
            let (machine, group) = (cast.name, cast.group);
            if cast.home != node {
                // What it is replicated with when it runs here.
                return format!("[replicas.machines.{machine}]\ngroup = {group:?}\n");
            }
            let image = |disk: &(&str, &str, u64)| format!("{name}-images/{}.{}", disk.0, disk.1);
            let images: Vec<_> = cast.disks.iter().map(image).collect();
            format!(
                "[machines.{machine}]\nimages = {images:?}\nat = \"mnt-{machine}\"\npeer = {peer:?}\ngroup = {group:?}\n"
            )
        };
        let machines: String = CAST.iter().map(machine).collect();
        text + &machines
    }

    /// Moves a node's wall clock to so many seconds after the true time; whether it has one of its own.
    pub(super) fn set_clock(&self, node: usize, seconds: i64) -> bool {
        // Written in place: the node maps the file.
        let file = fs::File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(self.hosts.path(format!("{}.clock", NODES[node])));
        let bytes = seconds.to_le_bytes();
        std::os::unix::fs::FileExt::write_all_at(&file.unwrap(), &bytes, 0).unwrap();
        self.clock.is_some()
    }

    /// All links are like this from now on.
    pub(super) fn set_weather(&self, weather: Weather) {
        for relay in &self.relays {
            relay.set(weather);
        }
    }

    /// Between two looks at something that is waited for since `began`; fails with what was seen if that is too long ago.
    pub(super) fn wait_on(&self, began: Instant, seen: impl FnOnce() -> String) {
        let waited = began.elapsed();
        assert!(waited < PATIENCE, "{}", seen());
        if waited > BETTER_AFTER {
            self.set_weather(Weather::default());
        }
        thread::sleep(LOOK);
    }

    /// The files of a machine's disks on a host that serves it.
    pub(super) fn disks(&self, machine: usize, host: usize) -> Vec<PathBuf> {
        let cast = self.machines[machine].cast;
        let folder = if cast.home == host {
            self.hosts.path(format!("mnt-{}", cast.name))
        } else {
            self.hosts
                .path(format!("{}-store/{}/disks", NODES[host], cast.name))
        };
        let file = |disk: &(&str, &str, u64)| folder.join(format!("{}.raw", disk.0));
        cast.disks.iter().map(file).collect()
    }

    /// Lets a machine's guest write on a host.
    pub(super) fn begin(&mut self, machine: usize, host: usize) {
        let disks = self.disks(machine, host);
        let machine = &mut self.machines[machine];
        let history = machine.history.take().expect("no guest runs");
        machine.guest = Some(Guest::start(disks, history));
    }

    /// Ends the guest of a machine, if one runs.
    pub(super) fn end(&mut self, machine: usize) {
        let machine = &mut self.machines[machine];
        let Some(guest) = machine.guest.take() else {
            return;
        };
        if machine.strict {
            machine.synced = machine.synced.max(guest.flushed());
        }
        match guest.end() {
            Ok(history) => machine.history = Some(history),
            Err(wrong) => panic!("{}, where it runs: {wrong}", machine.name()),
        }
    }

    /// Cuts a machine that runs on a host, and remembers what the point must hold.
    pub(super) fn cut(&mut self, machine: usize, host: usize) -> Result<Lineage, String> {
        let name = Name::new(self.machines[machine].name()).unwrap();
        let socket = self.node(host).socket().to_owned();
        let begun = |machine: &Machine| match (&machine.guest, &machine.history) {
            (Some(guest), _) => guest.begun(),
            (None, history) => history.as_ref().expect("no guest runs").last(),
        };
        let it = &self.machines[machine];
        let from = it.guest.as_ref().map_or_else(|| begun(it), Guest::answered);
        let cut = runtime().block_on(control::ask_cut(&socket, &name));
        let point = cut.map_err(|error| error.to_string())?;
        let to = begun(&self.machines[machine]);
        self.machines[machine]
            .points
            .push(Known { point, from, to });
        Ok(point)
    }

    /// Cuts a machine that is protected; a link that is lost at this moment is no reason to give up.
    pub(super) fn cut_now(&mut self, machine: usize, host: usize) -> Lineage {
        let began = Instant::now();
        loop {
            match self.cut(machine, host) {
                Ok(lineage) => return lineage,
                Err(error) => self.wait_on(began, || format!("no cut: {error}")),
            }
        }
    }

    /// A machine as a node reports it.
    pub(super) fn look(&self, machine: usize, node: usize) -> Option<MachineStatus> {
        let name = self.machines[machine].name();
        let machines = self.node(node).status().machines;
        machines
            .into_iter()
            .find(|machine| machine.name.as_str() == name)
    }

    /// The host on which a machine runs with nothing left to do, if the other one follows.
    fn protected_on(&self, machine: usize) -> Option<usize> {
        let looks = [0, 1].map(|host| self.look(machine, host));
        let is = |host: usize, part: Part| {
            looks[host].as_ref().is_some_and(|machine| {
                let fine = part != Part::Primary || machine.reasons.is_empty();
                fine && machine.part == Some(part) && machine.state == ReplicationState::Replicating
            })
        };
        let replica = Part::Replica { abandoned: false };
        [0, 1]
            .into_iter()
            .find(|&host| is(host, Part::Primary) && is(1 - host, replica))
    }

    /// Waits until a machine runs on one host, with nothing left to do, and the other one follows.
    pub(super) fn protected(&mut self, machine: usize) -> usize {
        let began = Instant::now();
        let mut stopped: [Option<Instant>; 2] = [None; 2];
        loop {
            if let Some(host) = self.protected_on(machine) {
                return host;
            }
            for (host, stopped) in stopped.iter_mut().enumerate() {
                if !self.has_stopped_disk(machine, host) {
                    *stopped = None;
                } else if stopped.get_or_insert_with(Instant::now).elapsed() > RESTART_AFTER {
                    *stopped = None;
                    self.kill(host);
                    self.start(host);
                }
            }
            self.wait_on(began, || {
                let looks = [0, 1].map(|host| self.look(machine, host));
                format!("not protected: {looks:#?}")
            });
        }
    }

    fn has_stopped_disk(&self, machine: usize, host: usize) -> bool {
        let said = self.look(machine, host).map(|machine| machine.reasons);
        said.is_some_and(|reasons| {
            reasons.iter().any(|reason| {
                ["takes no more writes", "tracking ended"]
                    .iter()
                    .any(|words| reason.contains(words))
            })
        })
    }
}

/// The library that gives a node a clock of its own, if it can be built; says so if not.
fn clock(hosts: &Hosts) -> Option<PathBuf> {
    if find_program("cc").is_none() {
        skip("clocks that jump: no C compiler");
        return None;
    }
    let library = hosts.path("clock.so");
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/lab/clock.c");
    let args = ["-shared", "-fPIC", "-O2", "-Wall", "-Werror", "-o"].map(PathBuf::from);
    must("cc", args.iter().chain([&library, &source]));
    Some(library)
}
