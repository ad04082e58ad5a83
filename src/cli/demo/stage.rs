//! The demo's surroundings: programs, processes, loop devices, file systems, each with a guard that takes it down.

use std::{
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, bail, ensure};
use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sys::signal::{Signal, kill},
    unistd::{Pid, Uid},
};

use super::{MACHINE, ensure_in_time};
use crate::{
    base::ids::{Lineage, Name},
    net::pki::San,
    node::{control, status::MachineStatus},
};

/// How long a node may take to open its control socket, and to stop.
const START_WITHIN: Duration = Duration::from_secs(20);
/// Time between two looks at a node's status.
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// The programs that the demo runs.
const PROGRAMS: [&str; 4] = ["mkfs.ext4", "e2fsck", "losetup", "qemu-img"];

/// A temporary folder below `parent` that is removed when the value is dropped.
#[derive(Debug)]
pub(super) struct Scratch(PathBuf);

impl Scratch {
    pub(super) fn path(&self) -> &Path {
        &self.0
    }

    pub(super) fn close(self) -> std::io::Result<()> {
        let removed = fs::remove_dir_all(&self.0);
        std::mem::forget(self);
        removed
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Makes the demo's folder.
pub(super) fn scratch(parent: &Path) -> anyhow::Result<Scratch> {
    let path = parent.join(format!("understudy-demo-{}", std::process::id()));
    fs::create_dir(&path).with_context(|| format!("cannot create {}", path.display()))?;
    for below in ["mnt", "fs", "primary", "replica", "look"] {
        fs::create_dir(path.join(below))?;
    }
    Ok(Scratch(path))
}

/// The names a host of the demo is reached by.
pub(super) fn local_names(host: &str) -> Vec<San> {
    let names = [host, "localhost", "127.0.0.1"];
    names
        .iter()
        .map(|name| name.parse().expect("these are names and an address"))
        .collect()
}

/// A path as text, for a command line.
pub(super) fn text(path: &Path) -> anyhow::Result<String> {
    Ok(path
        .to_str()
        .with_context(|| format!("{} is not UTF-8", path.display()))?
        .to_owned())
}

/// The programs the demo needs, found before anything is changed.
#[derive(Clone, Copy, Debug)]
pub(super) struct Tools(());

impl Tools {
    pub(super) fn find() -> anyhow::Result<Self> {
        ensure!(
            Uid::effective().is_root(),
            "the demo mounts file systems: run it as root"
        );
        ensure!(
            Path::new("/dev/fuse").exists(),
            "/dev/fuse is missing: load the fuse module (modprobe fuse)"
        );
        let missing: Vec<_> = PROGRAMS
            .into_iter()
            .filter(|program| {
                Command::new(program)
                    .arg("-V")
                    .stdout(Stdio::null())
                    .stderr(Stdio::null())
                    .status()
                    .is_err()
            })
            .collect();
        ensure!(
            missing.is_empty(),
            "missing programs: {} (scripts/demo installs them)",
            missing.join(", ")
        );
        Ok(Self(()))
    }

    /// Runs one of [`PROGRAMS`] and returns what it printed; a failure carries its error output.
    #[expect(
        clippy::unused_self,
        reason = "having a value of this type proves that the programs are there"
    )]
    pub(super) fn run(self, program: &str, args: &[&str]) -> anyhow::Result<String> {
        let done = Command::new(program)
            .args(args)
            .stdin(Stdio::null())
            .output();
        let done = done.with_context(|| format!("cannot run {program}"))?;
        if !done.status.success() {
            let said = [done.stdout, done.stderr].concat();
            bail!(
                "{program} {} failed: {}",
                args.join(" "),
                String::from_utf8_lossy(&said).trim()
            );
        }
        Ok(String::from_utf8_lossy(&done.stdout).into_owned())
    }
}

/// A loop device over a file, with direct I/O as a hypervisor would do it.
#[derive(Debug)]
pub(super) struct LoopDevice {
    path: String,
}

impl LoopDevice {
    pub(super) fn attach(tools: Tools, file: &Path) -> anyhow::Result<Self> {
        let file = text(file)?;
        let said = tools.run("losetup", &["--find", "--show", "--direct-io=on", &file])?;
        Ok(Self {
            path: said.trim().to_owned(),
        })
    }

    /// The same, for reading only.
    pub(super) fn attach_read_only(tools: Tools, file: &Path) -> anyhow::Result<Self> {
        let file = text(file)?;
        let said = tools.run("losetup", &["--find", "--show", "--read-only", &file])?;
        Ok(Self {
            path: said.trim().to_owned(),
        })
    }

    pub(super) fn path(&self) -> &str {
        &self.path
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        let _ = Command::new("losetup")
            .args(["--detach", &self.path])
            .status();
        // Detaching is asynchronous; the mount below cannot go before the device is free.
        let started = Instant::now();
        while started.elapsed() < Duration::from_secs(5) {
            let backing = format!(
                "/sys/block/{}/loop/backing_file",
                self.path.trim_start_matches("/dev/")
            );
            if !Path::new(&backing).exists() {
                break;
            }
            std::thread::sleep(LOOK_EVERY);
        }
    }
}

/// A mounted ext4.
#[derive(Debug)]
pub(super) struct FileSystem {
    at: PathBuf,
}

impl FileSystem {
    pub(super) fn mount(_: Tools, device: &str, at: &Path) -> anyhow::Result<Self> {
        Self::mount_with(device, at, MsFlags::empty())
    }

    /// Without replaying the journal or writing anything else.
    pub(super) fn mount_read_only(_: Tools, device: &str, at: &Path) -> anyhow::Result<Self> {
        Self::mount_with(device, at, MsFlags::MS_RDONLY)
    }

    fn mount_with(device: &str, at: &Path, flags: MsFlags) -> anyhow::Result<Self> {
        mount(Some(device), at, Some("ext4"), flags, None::<&str>)
            .with_context(|| format!("cannot mount {device} at {}", at.display()))?;
        Ok(Self { at: at.to_owned() })
    }
}

impl Drop for FileSystem {
    fn drop(&mut self) {
        if umount2(&self.at, MntFlags::empty()).is_err() {
            let _ = umount2(&self.at, MntFlags::MNT_DETACH);
        }
    }
}

/// A node process of this program.
#[derive(Debug)]
pub(super) struct Host {
    what: &'static str,
    child: Option<Child>,
    socket: PathBuf,
    log: PathBuf,
}

impl Host {
    /// A receiver with a store of its own.
    pub(super) fn replica(dir: &Path) -> anyhow::Result<Self> {
        let (store, identity) = (
            text(&dir.join("replica/store"))?,
            text(&dir.join("replica/identity"))?,
        );
        let allow = ["--listen", "127.0.0.1:0", "--allow", "primary"];
        let args = [
            &["replica", "--store", &store, "--identity", &identity],
            &allow[..],
        ]
        .concat();
        Self::start("replica", dir, &args)
    }

    /// The machine, mounted, tracked and replicated.
    pub(super) fn primary(dir: &Path, image: &Path, replica: SocketAddr) -> anyhow::Result<Self> {
        let (state, identity) = (
            text(&dir.join("primary/state"))?,
            text(&dir.join("primary/identity"))?,
        );
        let replica = format!("localhost:{}", replica.port());
        let more = [
            "--state",
            &state,
            "--replicate-to",
            &replica,
            "--identity",
            &identity,
            "--interval",
            "500ms",
        ];
        Self::mounted("primary", dir, image, &more)
    }

    /// The machine, mounted and nothing more.
    pub(super) fn untracked(dir: &Path, image: &Path) -> anyhow::Result<Self> {
        Self::mounted("untracked", dir, image, &[])
    }

    /// An image for looking at, at `<dir>/look`.
    pub(super) fn look(dir: &Path, image: &Path) -> anyhow::Result<Self> {
        let (image, at) = (text(image)?, text(&dir.join("look"))?);
        Self::start(
            "look",
            dir,
            &[
                "mount",
                &image,
                "--at",
                &at,
                "--machine",
                MACHINE,
                "--read-only",
            ],
        )
    }

    fn mounted(
        what: &'static str,
        dir: &Path,
        image: &Path,
        more: &[&str],
    ) -> anyhow::Result<Self> {
        let (image, at) = (text(image)?, text(&dir.join("mnt"))?);
        let args = [&["mount", &image, "--at", &at, "--machine", MACHINE], more].concat();
        Self::start(what, dir, &args)
    }

    fn start(what: &'static str, dir: &Path, args: &[&str]) -> anyhow::Result<Self> {
        let socket = dir.join(format!("{what}.sock"));
        let log = dir.join(format!("{what}.log"));
        let program = std::env::current_exe().context("cannot find this program")?;
        let child = Command::new(program)
            .args(args)
            .args(["--control", &text(&socket)?])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(fs::File::create(&log)?)
            .spawn()
            .with_context(|| format!("cannot start the {what} node"))?;
        let mut host = Self {
            what,
            child: Some(child),
            socket,
            log,
        };
        let started = Instant::now();
        while host.ask().is_err() {
            let child = host.child.as_mut().expect("it was just started");
            if let Some(status) = child.try_wait()? {
                bail!("the {what} node ended with {status}: {}", host.last_words());
            }
            ensure_in_time(started, START_WITHIN, &format!("starting the {what} node"))?;
            std::thread::sleep(LOOK_EVERY);
        }
        Ok(host)
    }

    fn last_words(&self) -> String {
        fs::read_to_string(&self.log)
            .unwrap_or_default()
            .trim()
            .to_owned()
    }

    fn ask(&self) -> anyhow::Result<crate::node::status::NodeStatus> {
        Ok(runtime()?.block_on(control::ask_status(&self.socket))?)
    }

    /// Where it accepts primaries.
    pub(super) fn listening(&self) -> anyhow::Result<SocketAddr> {
        self.ask()?
            .listening
            .context("the replica does not say where it listens")
    }

    /// Its one machine.
    pub(super) fn machine(&self) -> anyhow::Result<MachineStatus> {
        self.ask()?
            .machines
            .into_iter()
            .next()
            .with_context(|| format!("the {} node has no machine", self.what))
    }

    /// Waits until its machine is as wished.
    pub(super) fn wait(
        &self,
        patience: Duration,
        what: &str,
        wished: impl Fn(&MachineStatus) -> bool,
    ) -> anyhow::Result<()> {
        let started = Instant::now();
        loop {
            match self.machine() {
                Ok(machine) if wished(&machine) => return Ok(()),
                _ => {}
            }
            ensure_in_time(started, patience, what)
                .with_context(|| format!("the {} node says: {}", self.what, self.last_words()))?;
            std::thread::sleep(LOOK_EVERY);
        }
    }

    /// Cuts its machine and waits until the epoch is durable on the replica.
    pub(super) fn cut(&self) -> anyhow::Result<Lineage> {
        let machine = Name::new(MACHINE)?;
        Ok(runtime()?.block_on(control::ask_cut(&self.socket, &machine))?)
    }

    /// Asks it to stop, and waits for a clean end.
    pub(super) fn stop(mut self) -> anyhow::Result<()> {
        let child = self.child.as_mut().expect("a host is stopped once");
        let pid = Pid::from_raw(i32::try_from(child.id()).context("a process id fits 31 bits")?);
        kill(pid, Signal::SIGTERM).context("cannot signal a node")?;
        let started = Instant::now();
        let status = loop {
            if let Some(status) = child.try_wait()? {
                break status;
            }
            ensure_in_time(
                started,
                START_WITHIN,
                &format!("stopping the {} node", self.what),
            )?;
            std::thread::sleep(LOOK_EVERY);
        };
        self.child = None;
        ensure!(
            status.success(),
            "the {} node ended with {status}: {}",
            self.what,
            self.last_words()
        );
        Ok(())
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let pid = i32::try_from(child.id()).map(Pid::from_raw);
            if let Ok(pid) = pid {
                let _ = kill(pid, Signal::SIGTERM);
            }
            std::thread::sleep(Duration::from_millis(500));
            let _ = child.kill();
            let _ = child.wait();
            // A killed shim leaves its mount behind.
            if let Some(dir) = self.socket.parent() {
                for at in ["mnt", "look"] {
                    let _ = umount2(&dir.join(at), MntFlags::MNT_DETACH);
                }
            }
        }
    }
}

fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    Ok(tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?)
}
