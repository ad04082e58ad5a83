//! Hosts that are confined as their unit confines them, and a mount helper outside: what they do with it, and what the
//! death of either leaves.

use std::{
    collections::BTreeSet,
    fs,
    io::Write as _,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    time::Duration,
};

use nix::mount::MsFlags;
use understudy::node::status::TestStatus;

use super::{
    hardening::{NOBODY, give_away, of_threads},
    mount_helper::{GUEST, Helper, able, as_user, is_dead, mounts},
};
use crate::support::{Hosts, MACHINE, Node, call, mark, marked, parsed};

/// Writes `number` all over one block of a disk, as that user, durably.
fn mark_as(user: u32, disk: &Path, block: u64, number: u8) {
    let mut content = tempfile::NamedTempFile::new().unwrap();
    content.write_all(&[number; 4096]).unwrap();
    fs::set_permissions(content.path(), fs::Permissions::from_mode(0o644)).unwrap();
    let done = as_user(
        user,
        [
            "dd".into(),
            format!("if={}", content.path().display()),
            format!("of={}", disk.display()),
            "bs=4096".into(),
            format!("seek={block}"),
            "count=1".into(),
            "conv=notrunc,fsync".into(),
            "oflag=direct".into(),
        ],
    );
    assert!(
        done.status.success(),
        "{}",
        String::from_utf8_lossy(&done.stderr)
    );
}

/// What one block of a disk holds, as that user reads it.
fn marked_as(user: u32, disk: &Path, block: u64) -> u8 {
    let done = as_user(
        user,
        [
            "dd".into(),
            format!("if={}", disk.display()),
            "bs=4096".into(),
            format!("skip={block}"),
            "count=1".into(),
        ],
    );
    assert!(
        done.status.success(),
        "{}",
        String::from_utf8_lossy(&done.stderr)
    );
    let first = done.stdout[0];
    assert_eq!(done.stdout, [first; 4096]);
    first
}

/// Two hosts as their unit starts them: user nobody, no capability, a mount namespace that is a slave of ours, no
/// `/dev/fuse`. What they show is mounted by a helper outside.
struct Confined {
    hosts: Hosts,
    image: PathBuf,
    ports: [u16; 2],
}

impl Confined {
    fn new() -> Self {
        let hosts = Hosts::new();
        let image = hosts.image("disk.raw", 16);
        give_away(&hosts.path(""));
        fs::set_permissions(hosts.path(""), fs::Permissions::from_mode(0o711)).unwrap();
        fs::set_permissions(hosts.mount(), fs::Permissions::from_mode(0o700)).unwrap();
        let sockets = [(); 2].map(|()| std::net::UdpSocket::bind("127.0.0.1:0").unwrap());
        let ports = [0, 1].map(|index: usize| sockets[index].local_addr().unwrap().port());
        Self {
            hosts,
            image,
            ports,
        }
    }

    /// As systemd has it: what is mounted outside is seen by the hosts as well.
    fn seen_inside() -> Self {
        let stage = Self::new();
        let dir = stage.hosts.path("");
        let none = None::<&str>;
        nix::mount::mount(Some(&dir), &dir, none, MsFlags::MS_BIND, none).unwrap();
        nix::mount::mount(none, &dir, none, MsFlags::MS_SHARED, none).unwrap();
        stage
    }

    fn helper(&self) -> Helper {
        Helper::start(NOBODY, self.hosts.path("helper.sock"), &self.hosts.path(""))
    }

    /// The host on which the machine lives.
    fn alpha(&self) -> Node {
        let machine = format!(
            "[machines.{MACHINE}]\nimages = [\"{}\"]\nat = \"{}\"\npeer = \"beta\"\nall-users = true\nowner = \"{GUEST}:{GUEST}\"\n",
            self.image.display(),
            self.hosts.mount().display()
        );
        self.serve("alpha", 0, ("beta", 1), &machine)
    }

    fn beta(&self) -> Node {
        self.serve("beta", 1, ("alpha", 0), "")
    }

    fn serve(&self, name: &str, own: usize, (peer, theirs): (&str, usize), more: &str) -> Node {
        let config = self.hosts.path(format!("{name}.toml"));
        let text = format!(
            "store = \"{name}-store\"\nidentity = \"{name}\"\nlisten = \"127.0.0.1:{}\"\ninterval = \"100ms\"\n\
             mount-helper = \"helper.sock\"\n[peers.{peer}]\naddress = \"127.0.0.1:{}\"\n{more}",
            self.ports[own], self.ports[theirs]
        );
        fs::write(&config, text).unwrap();
        let confine = "mount --bind /dev/null /dev/fuse && exec setpriv --reuid=65534 --regid=65534 --clear-groups \
                       --no-new-privs --inh-caps=-all --bounding-set=-all \"$@\"";
        let starter = [
            "unshare",
            "-m",
            "--propagation",
            "slave",
            "sh",
            "-c",
            confine,
            "sh",
        ];
        let command = self
            .hosts
            .command(name, &["serve", "--config", config.to_str().unwrap()]);
        Node::start(&command.through(&starter), None)
    }

    fn disk(&self) -> PathBuf {
        self.hosts.disk("disk")
    }

    /// Whether the machine is shown outside.
    fn is_mounted(&self) -> bool {
        let shown = shown(&self.hosts.mount(), "self");
        !shown.is_empty()
    }
}

/// What is shown below `dir` in the mount namespace of a process.
fn shown(dir: &Path, process: &str) -> Vec<String> {
    let mut mounts = mounts(dir, process);
    mounts.retain(|line| line.contains(" - fuse.understudy "));
    mounts
}

fn failover(node: &Node, kind: &str) {
    let (code, _, said) = call(node, &["failover", MACHINE, kind]);
    assert_eq!(code, 0, "{said}");
}

#[test]
fn a_host_without_a_privilege_shows_tests_and_moves_a_machine() {
    if !able() {
        return;
    }
    let stage = Confined::seen_inside();
    let _helper = stage.helper();
    let (beta, alpha) = (stage.beta(), stage.alpha());
    alpha.wait_replicating();
    for node in [&alpha, &beta] {
        let namespace = |process: &str| fs::read_link(format!("/proc/{process}/ns/mnt")).unwrap();
        assert_ne!(namespace(&node.pid().to_string()), namespace("self"));
        for key in ["CapPrm", "CapEff", "CapBnd", "CapInh", "CapAmb"] {
            let masks: BTreeSet<_> = of_threads(node, key).into_iter().collect();
            assert_eq!(
                masks,
                BTreeSet::from(["0000000000000000".to_owned()]),
                "{key}"
            );
        }
    }
    // Seen outside, with fixed options, by a user that is neither root nor the host's.
    let shown_outside = shown(&stage.hosts.mount(), "self");
    let [line] = &shown_outside[..] else {
        panic!("{shown_outside:?}");
    };
    assert_eq!(
        shown(&stage.hosts.mount(), &beta.pid().to_string()).len(),
        1
    );
    for word in [
        "nosuid",
        "nodev",
        "noexec",
        "fuse.understudy understudy",
        "user_id=65534",
        "allow_other",
    ] {
        assert!(line.contains(word), "{word}: {line}");
    }
    mark_as(GUEST, &stage.disk(), 3, 7);
    assert_eq!(marked_as(GUEST, &stage.disk(), 3), 7);
    alpha.cut();

    let test: TestStatus = parsed(&beta, &["failover", MACHINE, "--test"]);
    assert_eq!(marked_as(NOBODY, &test.files[0], 3), 7);
    mark_as(NOBODY, &test.files[0], 4, 9);
    let (code, _, said) = call(&beta, &["cancel", MACHINE]);
    assert_eq!(code, 0, "{said}");
    let at = test.files[0].parent().unwrap().parent().unwrap();
    assert!(shown(at, "self").is_empty() && !at.exists());

    failover(&alpha, "--planned");
    assert!(!stage.is_mounted());
    let there = stage
        .hosts
        .path("beta-store")
        .join(MACHINE)
        .join("disks/disk.raw");
    assert_eq!(marked_as(NOBODY, &there, 3), 7);
    mark_as(NOBODY, &there, 5, 8);
    failover(&beta, "--planned");
    assert!(stage.is_mounted() && !there.exists());
    assert_eq!(marked_as(GUEST, &stage.disk(), 5), 8);
    alpha.stop();
    beta.stop();
    assert!(shown(&stage.hosts.path(""), "self").is_empty());
}

#[test]
fn a_death_of_either_leaves_what_the_next_one_can_go_on_from() {
    if !able() {
        return;
    }
    let stage = Confined::new();
    let helper = stage.helper();
    let (beta, alpha) = (stage.beta(), stage.alpha());
    alpha.wait_replicating();
    mark(&stage.disk(), 1, 1);
    alpha.cut();
    let test: TestStatus = parsed(&beta, &["failover", MACHINE, "--test"]);
    let tested = test.files[0].clone();
    mark_as(NOBODY, &tested, 2, 2);

    // Without a helper everything that is mounted is served on.
    let socket = helper.kill();
    mark(&stage.disk(), 3, 3);
    assert_eq!(marked_as(NOBODY, &tested, 2), 2);
    let (code, _, said) = call(&beta, &["cancel", MACHINE]);
    assert!(
        code != 0 && said.contains("systemctl start understudy-mount"),
        "{code}: {said}"
    );
    assert_eq!(
        marked_as(NOBODY, &tested, 2),
        2,
        "what cannot be unmounted is served on"
    );

    // Another one unmounts what the first one mounted.
    let helper = Helper::start(NOBODY, socket, &stage.hosts.path(""));
    let (code, _, said) = call(&beta, &["cancel", MACHINE]);
    assert_eq!(code, 0, "{said}");

    // A host that dies leaves a mount that says so, and its next life takes it away: here with a test that comes back.
    let test: TestStatus = parsed(&beta, &["failover", MACHINE, "--test"]);
    let tested = test.files[0].clone();
    mark_as(NOBODY, &tested, 4, 4);
    alpha.kill();
    beta.kill();
    assert!(stage.is_mounted() && is_dead(&stage.hosts.mount()));
    assert!(!tested.exists());
    let (beta, alpha) = (stage.beta(), stage.alpha());
    assert_eq!([1, 3].map(|block| marked(&stage.disk(), block)), [1, 3]);
    assert_eq!(marked_as(NOBODY, &tested, 4), 4);

    // Both die; the host is there first, and waits for its helper.
    alpha.kill();
    let socket = helper.kill();
    let beneath = stage.hosts.path("");
    let late = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(300));
        Helper::start(NOBODY, socket, &beneath)
    });
    let alpha = stage.alpha();
    let _helper = late.join().unwrap();
    alpha.wait_replicating();
    assert_eq!([1, 3].map(|block| marked(&stage.disk(), block)), [1, 3]);
    alpha.stop();
    beta.stop();
    assert!(shown(&stage.hosts.path(""), "self").is_empty());
}
