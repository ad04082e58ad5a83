//! Two hosts as processes of the real program: certificates, nodes with guards, images compared byte by byte.
//!
//! Whatever a test does, its nodes are killed by their process id, its mounts are detached and its folder is removed.
//! When a test fails, what the nodes logged is printed.

use std::{
    cell::Cell,
    fs,
    io::{self, Write as _},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};

use nix::{
    mount::{MntFlags, umount2},
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use understudy::{
    base::{
        clock::{Clock, SystemClock},
        ids::{Lineage, Name, SystemIds},
    },
    coord::state::ReplicationState,
    disk::{
        Access, Opening,
        image::{self, Format},
    },
    net::pki,
    node::{
        control,
        status::{MachineStatus, NodeStatus},
    },
    storage::file::FileStorage,
};

use super::{must, run, sparse_file};

/// How long anything may take before a test gives up; it is no measure of speed.
const PATIENCE: Duration = Duration::from_mins(1);
/// Time between two looks.
const LOOK_EVERY: Duration = Duration::from_millis(20);
/// How much of its log is shown when a test fails, in bytes.
const LOG_SHOWN: usize = 64 << 10;
/// Unit of comparison.
const MIB: usize = 1 << 20;
/// The machine that all tests replicate.
pub(crate) const MACHINE: &str = "vm";

/// The program under test.
pub(crate) const PROGRAM: &str = env!("CARGO_BIN_EXE_understudy");

/// A primary host `alpha` and a replica host `beta`, with certificates of one authority and a folder.
pub(crate) struct Hosts {
    dir: tempfile::TempDir,
    port: Cell<u16>,
}

impl Hosts {
    pub(crate) fn new() -> Self {
        let hosts = Self {
            dir: scratch(),
            port: Cell::new(0),
        };
        let now = SystemClock::default().wall();
        pki::init(&hosts.path("ca"), now).unwrap();
        hosts.issue("alpha");
        hosts.issue("beta");
        fs::create_dir(hosts.mount()).unwrap();
        hosts
    }

    /// A further identity of the same authority, in a folder of its name.
    pub(crate) fn issue(&self, host: &str) {
        let names = ["localhost", "127.0.0.1"].map(|name| name.parse().unwrap());
        let now = SystemClock::default().wall();
        let (ca, name) = (self.path("ca"), Name::new(host).unwrap());
        pki::issue(&ca, &name, &names, &self.path(host), now).unwrap();
    }

    /// Its folder stays when it is dropped; where that is.
    pub(crate) fn keep(&mut self) -> &Path {
        self.dir.disable_cleanup(true);
        self.dir.path()
    }

    pub(crate) fn path(&self, below: impl AsRef<Path>) -> PathBuf {
        self.dir.path().join(below)
    }

    /// Where the machine is mounted.
    pub(crate) fn mount(&self) -> PathBuf {
        self.path("mnt")
    }

    /// The file of a disk in the mount.
    pub(crate) fn disk(&self, name: &str) -> PathBuf {
        self.mount().join(format!("{name}.raw"))
    }

    /// A new, empty image.
    pub(crate) fn image(&self, file: &str, mib: u64) -> PathBuf {
        let path = self.path(file);
        if format_of(&path) == Format::Raw {
            sparse_file(&path, mib << 20);
        } else {
            let text = path.to_str().unwrap();
            must(
                PROGRAM,
                ["image", "create", text, "--size", &format!("{mib}M")],
            );
        }
        path
    }

    /// Starts the replica; again on the same port if it ran before.
    pub(crate) fn replica(&self, more: &[&str]) -> Node {
        let node = Node::start(&self.replica_command(&self.path("store"), more), None);
        self.port.set(node.status().listening.unwrap().port());
        node
    }

    /// What starts the replica on a store.
    pub(crate) fn replica_command(&self, store: &Path, more: &[&str]) -> NodeCommand {
        let listen = format!("127.0.0.1:{}", self.port.get());
        let (identity, store) = (text(&self.path("beta")), text(store));
        let first = ["replica", "--store", &store, "--listen", &listen];
        let rest = ["--identity", &identity, "--allow", "alpha"];
        self.command("replica", &[&first[..], &rest, more].concat())
    }

    /// Dial this port instead of the replica's.
    pub(crate) fn set_port(&self, port: u16) {
        self.port.set(port);
    }

    /// The replica's port; 0 while there is none.
    pub(crate) fn port(&self) -> u16 {
        self.port.get()
    }

    /// Starts the primary of [`MACHINE`] with these images.
    pub(crate) fn primary(&self, images: &[&Path], more: &[&str]) -> Node {
        Node::start(&self.primary_command(images, more), Some(self.mount()))
    }

    /// Starts the primary with the identity in another folder.
    pub(crate) fn primary_as(&self, identity: &str, images: &[&Path], more: &[&str]) -> Node {
        let command = self.primary_command_as(identity, images, more);
        Node::start(&command, Some(self.mount()))
    }

    /// What starts the primary.
    pub(crate) fn primary_command(&self, images: &[&Path], more: &[&str]) -> NodeCommand {
        self.primary_command_as(&text(&self.path("alpha")), images, more)
    }

    /// What starts the primary with the identity in another folder.
    pub(crate) fn primary_command_as(
        &self,
        identity: &str,
        images: &[&Path],
        more: &[&str],
    ) -> NodeCommand {
        let images: Vec<_> = images.iter().map(|image| text(image)).collect();
        let images: Vec<_> = images.iter().map(String::as_str).collect();
        let (at, state) = (text(&self.mount()), text(&self.path("state")));
        // Where no replica ever ran, nobody answers.
        let to = format!("localhost:{}", self.port.get().max(1));
        let mount = ["--at", &at, "--machine", MACHINE, "--state", &state];
        let there = ["--replicate-to", &to, "--identity", identity];
        let pace = if more.contains(&"--interval") {
            &[][..]
        } else {
            &["--interval", "200ms"]
        };
        let args = [&["mount"], &images[..], &mount, &there, pace, more].concat();
        self.command("primary", &args)
    }

    /// A node of this program with its socket and log in the folder.
    pub(crate) fn command(&self, what: &str, args: &[&str]) -> NodeCommand {
        NodeCommand {
            args: args.iter().map(|&arg| arg.to_owned()).collect(),
            through: Vec::new(),
            environment: Vec::new(),
            socket: self.path(format!("{what}.sock")),
            log: self.path(format!("{what}.log")),
        }
    }

    /// The replica's image of a disk.
    pub(crate) fn replica_image(&self, disk: &str, format: Format) -> PathBuf {
        let name = format!("{disk}.{format}");
        let mut pending = vec![self.path("store")];
        while let Some(folder) = pending.pop() {
            for entry in fs::read_dir(&folder).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() {
                    pending.push(path);
                } else if path.file_name().is_some_and(|found| *found == *name) {
                    return path;
                }
            }
        }
        panic!("the store holds no {name}");
    }
}

fn text(path: &Path) -> String {
    path.to_str().unwrap().to_owned()
}

/// A folder on a real file system: what is in memory has no discard and no power to lose.
pub(crate) fn scratch() -> tempfile::TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
}

/// The format that the suffix tells.
pub(crate) fn format_of(path: &Path) -> Format {
    path.extension().unwrap().to_str().unwrap().parse().unwrap()
}

/// How a node is started.
#[derive(Clone)]
pub(crate) struct NodeCommand {
    args: Vec<String>,
    /// The program that runs it in another setting, with its arguments; none if there is no such thing.
    through: Vec<String>,
    environment: Vec<(String, String)>,
    socket: PathBuf,
    log: PathBuf,
}

impl NodeCommand {
    /// With a socket and a log of its own, beside a node of the same kind.
    pub(crate) fn rename(&mut self, name: &str) {
        self.socket.set_file_name(format!("{name}.sock"));
        self.log.set_file_name(format!("{name}.log"));
    }

    /// Run by another program, which becomes the node in the end: `nsenter --net=...`.
    pub(crate) fn through(mut self, words: &[&str]) -> Self {
        self.through = words.iter().map(|&word| word.to_owned()).collect();
        self
    }

    /// With a variable in its environment.
    pub(crate) fn env(mut self, name: &str, value: &str) -> Self {
        self.environment.push((name.to_owned(), value.to_owned()));
        self
    }

    fn spawn(&self) -> Child {
        let log = fs::File::options()
            .create(true)
            .append(true)
            .open(&self.log);
        let words = (self.through.iter().map(String::as_str)).chain([PROGRAM]);
        let words: Vec<_> = words.collect();
        Command::new(words[0])
            .args(&words[1..])
            .args(&self.args)
            .arg("--control")
            .arg(&self.socket)
            .env("RUST_LOG", "info")
            .envs(self.environment.iter().cloned())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log.unwrap())
            .spawn()
            .unwrap()
    }

    /// Runs a node that must not come up: its exit code and what it said.
    pub(crate) fn fails(&self) -> (i32, String) {
        let _ = fs::remove_file(&self.log);
        let mut child = self.spawn();
        let started = Instant::now();
        let status = loop {
            if let Some(status) = child.try_wait().unwrap() {
                break status;
            }
            if started.elapsed() > PATIENCE {
                child.kill().unwrap();
            }
            std::thread::sleep(LOOK_EVERY);
        };
        let said = fs::read_to_string(&self.log).unwrap();
        (status.code().unwrap_or(-1), said)
    }
}

/// A running node. Dropping it kills it.
pub(crate) struct Node {
    child: Child,
    command: NodeCommand,
    mount: Option<PathBuf>,
}

impl Node {
    pub(crate) fn start(command: &NodeCommand, mount: Option<PathBuf>) -> Self {
        let mut node = Self {
            child: command.spawn(),
            command: command.clone(),
            mount,
        };
        let started = Instant::now();
        while node.ask().is_none() {
            if let Some(status) = node.child.try_wait().unwrap() {
                panic!("a node ended with {status}: {}", node.log());
            }
            assert!(started.elapsed() < PATIENCE, "a node does not come up");
            std::thread::sleep(LOOK_EVERY);
        }
        node
    }

    fn ask(&self) -> Option<NodeStatus> {
        runtime()
            .block_on(control::ask_status(&self.command.socket))
            .ok()
    }

    pub(crate) fn status(&self) -> NodeStatus {
        self.ask().expect("a running node answers")
    }

    /// The control socket.
    pub(crate) fn socket(&self) -> &Path {
        &self.command.socket
    }

    /// Its one machine.
    pub(crate) fn machine(&self) -> MachineStatus {
        self.status().machines.remove(0)
    }

    /// Everything it logged, over all its lives.
    pub(crate) fn log(&self) -> String {
        fs::read_to_string(&self.command.log).unwrap_or_default()
    }

    /// Waits until its machine is as wished.
    pub(crate) fn wait(
        &self,
        what: &str,
        wished: impl Fn(&MachineStatus) -> bool,
    ) -> MachineStatus {
        let started = Instant::now();
        loop {
            let status = self.status();
            if let Some(machine) = status.machines.iter().find(|machine| wished(machine)) {
                return machine.clone();
            }
            assert!(started.elapsed() < PATIENCE, "no {what}: {status:#?}");
            std::thread::sleep(LOOK_EVERY);
        }
    }

    pub(crate) fn wait_replicating(&self) -> MachineStatus {
        self.wait("replication", |m| m.state == ReplicationState::Replicating)
    }

    /// Cuts; a link that is lost at this moment is no reason to give up.
    pub(crate) fn cut(&self) -> Lineage {
        let started = Instant::now();
        loop {
            match self.try_cut() {
                Ok(lineage) => return lineage,
                Err(error) => assert!(started.elapsed() < PATIENCE, "no cut: {error}"),
            }
            std::thread::sleep(LOOK_EVERY);
        }
    }

    pub(crate) fn try_cut(&self) -> Result<Lineage, control::ClientError> {
        let machine = Name::new(MACHINE).unwrap();
        runtime().block_on(control::ask_cut(&self.command.socket, &machine))
    }

    /// Replica: waits until the images hold everything it has.
    pub(crate) fn merged(&self) -> MachineStatus {
        self.wait("merge", |m| {
            m.durable.is_some() && m.base_epoch == m.durable.map(|lineage| lineage.epoch)
        })
    }

    /// SIGKILL, as a host that loses power or a kernel that runs out of memory.
    pub(crate) fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        // The stale mount stays: the next start has to deal with it.
        self.mount = None;
    }

    /// SIGTERM, and a clean end.
    pub(crate) fn stop(self) {
        self.ask_to_stop();
        let (status, said) = self.ended();
        assert!(status.success(), "a node stopped with {status}: {said}");
    }

    /// Waits for its end: how it ended, and everything it logged.
    pub(crate) fn ended(mut self) -> (ExitStatus, String) {
        let started = Instant::now();
        let status = loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                break status;
            }
            assert!(started.elapsed() < PATIENCE, "a node does not stop");
            std::thread::sleep(LOOK_EVERY);
        };
        (status, self.log())
    }

    /// Stands still from now on, as a host that swaps or a disk that does not answer.
    pub(crate) fn pause(&self) {
        kill(self.pid(), Signal::SIGSTOP).unwrap();
    }

    /// Goes on after [`Node::pause`].
    pub(crate) fn resume(&self) {
        kill(self.pid(), Signal::SIGCONT).unwrap();
    }

    /// SIGTERM.
    pub(crate) fn ask_to_stop(&self) {
        kill(self.pid(), Signal::SIGTERM).unwrap();
    }

    /// Waits until it has logged this.
    pub(crate) fn wait_logged(&self, words: &str) {
        let started = Instant::now();
        while !self.log().contains(words) {
            assert!(started.elapsed() < PATIENCE, "not logged: {words}");
            std::thread::sleep(LOOK_EVERY);
        }
    }

    /// The most memory it has held so far, in bytes.
    pub(crate) fn memory_peak(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        let kib = line.unwrap().trim().strip_suffix(" kB").unwrap();
        kib.parse::<u64>().unwrap() << 10
    }

    /// The process.
    pub(crate) fn pid(&self) -> Pid {
        Pid::from_raw(i32::try_from(self.child.id()).unwrap())
    }
}

/// Runs a verb against a node: exit code, standard output, standard error.
pub(crate) fn call(node: &Node, args: &[&str]) -> (i32, String, String) {
    let socket = node.socket().to_str().unwrap();
    let done = run(PROGRAM, [args, &["--control", socket]].concat());
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (
        done.status.code().unwrap(),
        text(done.stdout),
        text(done.stderr),
    )
}

/// Sends a verb, and does not wait for it.
pub(crate) fn send(node: &Node, args: &[&str]) -> Child {
    Command::new(PROGRAM)
        .args(args)
        .arg("--control")
        .arg(node.socket())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

pub(crate) fn parsed<T: serde::de::DeserializeOwned>(node: &Node, args: &[&str]) -> T {
    let (code, out, err) = call(node, &[args, &["--json"]].concat());
    assert_eq!((code, err.as_str()), (0, ""), "{args:?}");
    serde_json::from_str(&out).unwrap()
}

impl Drop for Node {
    fn drop(&mut self) {
        if self.child.try_wait().is_ok_and(|ended| ended.is_none()) {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
        if let Some(mount) = &self.mount {
            let _ = umount2(mount, MntFlags::MNT_DETACH);
        }
        if std::thread::panicking() {
            let name = self
                .command
                .log
                .file_name()
                .unwrap()
                .to_string_lossy()
                .into_owned();
            let log = self.log();
            let from = log.floor_char_boundary(log.len().saturating_sub(LOG_SHOWN));
            let _ = writeln!(io::stderr(), "---- {name}\n{}----", &log[from..]);
        }
    }
}

impl Drop for Hosts {
    fn drop(&mut self) {
        // A primary that was killed last leaves its mount behind, a replica those of its test failovers.
        let table = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        let places = table.lines().filter_map(|line| line.split(' ').nth(4));
        for place in places.filter(|place| Path::new(place).starts_with(self.dir.path())) {
            let _ = umount2(place, MntFlags::MNT_DETACH);
        }
    }
}

pub(crate) fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap()
}

/// An image, opened for reading.
pub(crate) fn open_image(path: &Path) -> Arc<dyn understudy::disk::Disk> {
    let storage = FileStorage::open(path, Access::ReadOnly).unwrap();
    let opening = Opening::new(Access::ReadOnly, Arc::new(SystemIds::default()));
    image::open(Arc::new(storage), format_of(path), &opening).unwrap()
}

/// Compares the disks in two closed images, by this program and by QEMU.
pub(crate) fn assert_identical(primary: &Path, replica: &Path) {
    let (ours, theirs) = (open_image(primary), open_image(replica));
    assert_eq!(ours.geometry().size, theirs.geometry().size);
    let (mut here, mut there) = (vec![0; MIB], vec![0; MIB]);
    let size = usize::try_from(ours.geometry().size).unwrap();
    for start in (0..size).step_by(MIB) {
        let len = MIB.min(size - start);
        let offset = u64::try_from(start).unwrap();
        ours.read_at(offset, &mut here[..len]).unwrap();
        theirs.read_at(offset, &mut there[..len]).unwrap();
        if let Some(at) = (0..len).find(|&at| here[at] != there[at]) {
            let block = (start + at) / 4096;
            panic!(
                "block {block} differs: primary {:02x?}.., replica {:02x?}..",
                &here[at..len.min(at + 32)],
                &there[at..len.min(at + 32)]
            );
        }
    }
    if super::find_program("qemu-img").is_none() {
        return super::skip("the comparison of qemu-img: not installed");
    }
    let formats = [primary, replica].map(|path| format_of(path).to_string());
    let said = must(
        "qemu-img",
        [
            "compare",
            "-f",
            &formats[0],
            "-F",
            &formats[1],
            &text(primary),
            &text(replica),
        ],
    );
    assert!(said.contains("identical"), "{said}");
}
