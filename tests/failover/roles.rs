//! Machines that change hosts: two real hosts, each with its own configuration, both parts at once.

use std::{
    cell::Cell,
    fs,
    net::UdpSocket,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use nix::fcntl::OFlag;
use understudy::{
    base::units::Epoch,
    coord::{
        role::Part,
        state::{Health, ReplicationState},
    },
    node::{control::FailoverReport, status::TestStatus},
};

use super::tests::{call, mark, marked, parsed, points};
use crate::support::{Hosts, MACHINE, Node, assert_identical, can_mount, open_direct};

/// Two hosts that know each other. The machine's images lie on `alpha`.
pub(super) struct Pair {
    pub(super) hosts: Hosts,
    ports: [u16; 2],
    images: Vec<PathBuf>,
    pub(super) keep: Cell<u32>,
}

/// Files of the machine's two disks where it runs.
pub(super) type Files = [PathBuf; 2];

impl Pair {
    pub(super) fn new() -> Self {
        Self::with([96, 32])
    }

    /// With disks of so many MiB.
    pub(super) fn with([system, data]: [u64; 2]) -> Self {
        let hosts = Hosts::new();
        let images = vec![
            hosts.image("system.vhdx", system),
            hosts.image("data.raw", data),
        ];
        // Held together until both are known, so that they differ.
        let sockets = [(); 2].map(|()| UdpSocket::bind("127.0.0.1:0").unwrap());
        let ports = [0, 1].map(|index: usize| sockets[index].local_addr().unwrap().port());
        Self {
            hosts,
            ports,
            images,
            keep: Cell::new(30),
        }
    }

    /// Both hosts, and the machine replicated from `alpha` to `beta`.
    pub(super) fn replicating() -> (Self, Node, Node) {
        let pair = Self::new();
        let (alpha, beta) = (pair.alpha(), pair.beta());
        alpha.wait_replicating();
        (pair, alpha, beta)
    }

    pub(super) fn alpha(&self) -> Node {
        let path = |path: &Path| path.to_str().unwrap().to_owned();
        let images: Vec<_> = self.images.iter().map(|image| path(image)).collect();
        let machine = format!(
            "[machines.{MACHINE}]\nimages = {images:?}\nat = {:?}\npeer = \"beta\"\n",
            path(&self.hosts.mount())
        );
        self.serve("alpha", 0, ("beta", 1), &machine)
    }

    pub(super) fn beta(&self) -> Node {
        self.serve("beta", 1, ("alpha", 0), "")
    }

    fn serve(&self, name: &str, own: usize, (peer, theirs): (&str, usize), more: &str) -> Node {
        let text = format!(
            "store = \"{name}-store\"\nidentity = \"{name}\"\nlisten = \"127.0.0.1:{}\"\ninterval = \"100ms\"\n\
             [replicas]\nkeep = {}\n[peers.{peer}]\naddress = \"127.0.0.1:{}\"\n{more}",
            self.ports[own],
            self.keep.get(),
            self.ports[theirs]
        );
        let config = self.hosts.path(format!("{name}.toml"));
        fs::write(&config, text).unwrap();
        let args = ["serve", "--config", config.to_str().unwrap()];
        Node::start(&self.hosts.command(name, &args), None)
    }

    pub(super) fn on_alpha(&self) -> Files {
        ["system", "data"].map(|disk| self.hosts.disk(disk))
    }

    pub(super) fn on_beta(&self) -> Files {
        ["system", "data"].map(|disk| {
            let folder = self.hosts.path("beta-store").join(MACHINE).join("disks");
            folder.join(format!("{disk}.raw"))
        })
    }

    /// Stops the primary on `alpha` and the replica on `beta`: their images hold the same.
    pub(super) fn end(&self, alpha: Node, beta: Node) {
        alpha.stop();
        beta.stop();
        // With nothing to go back to, everything goes into the images.
        self.keep.set(0);
        let beta = self.beta();
        beta.merged();
        beta.stop();
        let store = self.hosts.path("beta-store").join(MACHINE);
        for image in &self.images {
            assert_identical(image, &store.join(image.file_name().unwrap()));
        }
    }
}

/// Marks both disks, and makes a point of it.
pub(super) fn epoch(node: &Node, files: &Files, number: u8) -> Epoch {
    write(files, number);
    node.cut().epoch
}

/// Marks these disks.
pub(super) fn write(files: &[PathBuf], number: u8) {
    for file in files {
        mark(file, 7, number);
        mark(file, 1000 + u64::from(number), number);
    }
}

/// These disks hold the marks up to `number` and none beyond.
pub(super) fn check(files: &[PathBuf], number: u8) {
    for file in files {
        assert_eq!(marked(file, 7), number, "{}", file.display());
        for earlier in 1..=number {
            assert_eq!(marked(file, 1000 + u64::from(earlier)), earlier);
        }
        assert_eq!(marked(file, 1001 + u64::from(number)), 0);
    }
}

pub(super) fn verb(node: &Node, args: &[&str]) -> FailoverReport {
    parsed(node, args)
}

pub(super) fn planned(node: &Node) -> FailoverReport {
    verb(node, &["failover", MACHINE, "--planned"])
}

pub(super) fn refused(node: &Node, args: &[&str], why: &str) {
    let (code, _, err) = call(node, args);
    assert_eq!(code, 3, "{args:?}: {err}");
    assert!(err.contains(why), "{args:?}: {err}");
}

pub(super) fn part(node: &Node) -> Part {
    node.machine().part.unwrap()
}

#[test]
fn a_planned_failover_goes_there_and_back_and_sends_nothing_twice() {
    if !can_mount() {
        return;
    }
    let (pair, alpha, beta) = Pair::replicating();
    let (here, there) = (pair.on_alpha(), pair.on_beta());
    epoch(&alpha, &here, 1);
    write(&here, 2);

    // Somebody has a disk open: he is named, and nothing happens.
    let guest = open_direct(&here[0], OFlag::empty()).unwrap();
    let me = format!("(process {})", std::process::id());
    refused(&alpha, &["failover", MACHINE, "--planned"], &me);
    guest.write_all_at(&[0; 0], 0).unwrap();
    drop(guest);
    refused(
        &beta,
        &["failover", MACHINE, "--planned"],
        "started on the primary",
    );
    refused(
        &beta,
        &["failover", MACHINE, "--unplanned"],
        "the primary of machine vm is connected",
    );

    let mut sent = Vec::new();
    for round in 0..2u8 {
        let last = 2 + round * 4;
        let report = planned(&alpha);
        assert!(report.text.contains("handed over"), "{}", report.text);
        beta.wait_replicating();
        let replica = alpha.wait("a replica", |m| m.state == ReplicationState::Replicating);
        assert_eq!(replica.part, Some(Part::Replica { abandoned: false }));
        let machine = beta.machine();
        assert_eq!(machine.part, Some(Part::Primary));
        assert_eq!(machine.generation.unwrap().number, 2 + u64::from(round) * 2);
        check(&there, last);
        epoch(&beta, &there, last + 1);
        epoch(&beta, &there, last + 2);
        sent.push(alpha.machine().traffic.sent);

        beta.wait("the failover folded", |m| m.reasons.is_empty());
        planned(&beta);
        alpha.wait_replicating();
        beta.wait("a replica", |m| m.state == ReplicationState::Replicating);
        check(&here, last + 2);
        epoch(&alpha, &here, last + 3);
        epoch(&alpha, &here, last + 4);
        sent.push(beta.machine().traffic.sent);
    }
    assert!(
        sent.iter().all(|sent| *sent < 256 << 10),
        "changes and nothing else: {sent:?}"
    );
    pair.end(alpha, beta);
}

/// Fails over to the second point, then to the third one, and kills the host.
fn choose_twice(pair: &Pair, beta: Node, cuts: &[Epoch]) -> Node {
    let there = pair.on_beta();
    // The wrong point at first, and what is written in it is gone with the cancel.
    let oldest = cuts[1].to_string();
    let first = verb(
        &beta,
        &["failover", MACHINE, "--unplanned", "--point", &oldest],
    );
    assert_eq!(first.files, there);
    assert_eq!(first.generation.number, 2);
    check(&there, 2);
    mark(&there[0], 2000, 99);
    let status = beta.machine();
    assert_eq!(status.state, ReplicationState::FailedOverWaitingCompletion);
    assert!(status.reasons[0].contains("not protected"), "{status:?}");
    let other = cuts[2].to_string();
    refused(
        &beta,
        &["failover", MACHINE, "--unplanned", "--point", &other],
        "`understudy cancel vm` first",
    );
    assert_eq!(call(&beta, &["cancel", MACHINE]).0, 0);
    assert_eq!(points(&beta).last().unwrap().point.epoch, cuts[3]);

    let second = verb(
        &beta,
        &["failover", MACHINE, "--unplanned", "--point", &other],
    );
    assert_eq!(second.generation.number, 3);
    check(&there, 3);
    assert_eq!(marked(&there[0], 2000), 0, "of the cancelled failover");
    mark(&there[0], 2001, 88);
    // The layer outlives the host.
    beta.kill();
    let beta = pair.beta();
    assert_eq!(marked(&there[0], 2001), 88);
    beta
}

/// What the old primary had and nobody else has can be looked at, beside the recovery points.
fn rescued(alpha: &Node) {
    let listed = points(alpha);
    assert!(listed[0].rescue && !listed[1].rescue, "{listed:?}");
    let test: TestStatus = parsed(alpha, &["failover", MACHINE, "--test", "--rescue"]);
    assert_eq!(marked(&test.files[0], 7), 5);
    assert_eq!(marked(&test.files[0], 3000), 55);
    assert_eq!(marked(&test.files[1], 1005), 5);
    assert_eq!(marked(&test.files[1], 2002), 0, "of the new primary");
    refused(alpha, &["cancel", MACHINE, "--rescue"], "rescue point");
    assert_eq!(call(alpha, &["cancel", MACHINE]).0, 0);
}

#[test]
fn a_lost_primary_comes_back_as_a_replica_with_what_it_had_kept_aside() {
    if !can_mount() {
        return;
    }
    let (pair, alpha, beta) = Pair::replicating();
    let (here, there) = (pair.on_alpha(), pair.on_beta());
    let cuts: Vec<_> = (1..=4).map(|number| epoch(&alpha, &here, number)).collect();
    // The last writes never leave the host.
    beta.pause();
    write(&here, 5);
    mark(&here[0], 3000, 55);
    alpha.kill();
    beta.resume();
    beta.wait("the loss of the link", |m| {
        m.reasons.iter().any(|why| why.contains("not connected"))
    });

    let beta = choose_twice(&pair, beta, &cuts);
    let kept = verb(&beta, &["commit", MACHINE]);
    assert!(kept.text.contains("kept"), "{}", kept.text);
    write(&there, 4);
    mark(&there[1], 2002, 77);

    // The old primary returns: it serves nobody, and says why.
    let alpha = pair.alpha();
    let fenced = alpha.machine();
    assert!(
        matches!(fenced.part, Some(Part::Fenced { .. })),
        "{fenced:?}"
    );
    assert_eq!(fenced.health, Health::Critical);
    assert!(!here[0].exists(), "not mounted");
    refused(&alpha, &["commit", MACHINE], "fenced");
    let unprotected = beta.wait("the machine unprotected", |m| m.health == Health::Critical);
    assert!(
        unprotected.reasons[0].contains("understudy reverse"),
        "{unprotected:?}"
    );

    verb(&alpha, &["reverse", MACHINE]);
    beta.wait_replicating();
    alpha.wait("a replica", |m| m.state == ReplicationState::Replicating);
    let sent = alpha.machine().traffic.sent;
    assert!(sent < 1 << 20, "what differs and nothing else: {sent}");
    rescued(&alpha);
    epoch(&beta, &there, 5);
    beta.wait("the failover folded", |m| m.reasons.is_empty());
    check(&there, 5);
    assert_eq!(marked(&there[0], 2001), 88);
    assert_eq!(marked(&there[0], 3000), 0, "never left the old primary");

    // And home again.
    planned(&beta);
    alpha.wait_replicating();
    check(&here, 5);
    assert_eq!(marked(&here[0], 2001), 88);
    assert_eq!(marked(&here[1], 2002), 77);
    assert_eq!(marked(&here[0], 3000), 0);
    epoch(&alpha, &here, 6);
    beta.wait("a replica", |m| m.state == ReplicationState::Replicating);
    alpha.wait("the failover folded", |m| m.reasons.is_empty());
    pair.end(alpha, beta);
}

/// Beta took over at epoch 1, and block 2000 of its first disk was written since; both hosts are stopped.
fn stopped_in_a_failover() -> Option<Pair> {
    if !can_mount() {
        return None;
    }
    let (pair, alpha, beta) = Pair::replicating();
    let there = pair.on_beta();
    epoch(&alpha, &pair.on_alpha(), 1);
    alpha.stop();
    verb(&beta, &["failover", MACHINE, "--unplanned", "--force"]);
    check(&there, 1);
    mark(&there[0], 2000, 99);
    beta.stop();
    Some(pair)
}

#[test]
fn a_failover_that_is_not_committed_outlives_a_clean_stop() {
    let Some(pair) = stopped_in_a_failover() else {
        return;
    };
    let there = pair.on_beta();
    let beta = pair.beta();
    assert!(matches!(part(&beta), Part::FailedOver { .. }));
    assert_eq!(marked(&there[0], 2000), 99);
    assert_eq!(call(&beta, &["cancel", MACHINE]).0, 0);
    assert_eq!(part(&beta), Part::Replica { abandoned: true });
}

/// The layers hold what differs from the point: without it they are worth nothing.
#[test]
fn the_point_that_was_chosen_stays_although_fewer_are_kept() {
    if !can_mount() {
        return;
    }
    let (pair, alpha, beta) = Pair::replicating();
    let (here, there) = (pair.on_alpha(), pair.on_beta());
    let chosen = epoch(&alpha, &here, 1);
    for number in 2..=6 {
        epoch(&alpha, &here, number);
    }
    alpha.stop();
    let point = chosen.to_string();
    verb(
        &beta,
        &[
            "failover",
            MACHINE,
            "--unplanned",
            "--force",
            "--point",
            &point,
        ],
    );
    check(&there, 1);
    mark(&there[0], 2000, 99);
    beta.kill();
    pair.keep.set(0);
    let beta = pair.beta();
    assert!(matches!(part(&beta), Part::FailedOver { .. }));
    check(&there, 1);
    assert_eq!(marked(&there[0], 2000), 99);
    // Chosen once more: what came after it was kept as well.
    assert_eq!(call(&beta, &["cancel", MACHINE]).0, 0);
    verb(&beta, &["failover", MACHINE, "--unplanned"]);
    check(&there, 6);
}

#[test]
fn layers_that_a_cancel_could_not_remove_are_not_those_of_the_next_failover() {
    let Some(pair) = stopped_in_a_failover() else {
        return;
    };
    let there = pair.on_beta();
    let layers = pair.hosts.path("beta-store").join(MACHINE).join("layers");
    let kept = pair.hosts.path("kept");
    fs::create_dir(&kept).unwrap();
    let files = |from: &Path, to: &Path| {
        for file in fs::read_dir(from).unwrap() {
            let file = file.unwrap();
            fs::copy(file.path(), to.join(file.file_name())).unwrap();
        }
    };
    files(&layers, &kept);
    let beta = pair.beta();
    assert_eq!(call(&beta, &["cancel", MACHINE]).0, 0);
    fs::create_dir_all(&layers).unwrap();
    files(&kept, &layers);
    verb(&beta, &["failover", MACHINE, "--unplanned", "--force"]);
    check(&there, 1);
    assert_ne!(marked(&there[0], 2000), 99);
}

#[test]
fn a_promoted_host_that_dies_knows_what_changed() {
    if !can_mount() {
        return;
    }
    let (pair, alpha, beta) = Pair::replicating();
    let (here, there) = (pair.on_alpha(), pair.on_beta());
    epoch(&alpha, &here, 1);
    planned(&alpha);
    beta.wait("the failover folded", |m| {
        m.state == ReplicationState::Replicating && m.reasons.is_empty()
    });
    write(&there, 2);
    // Layers, plain images, plain images after a clean end: in none of them the images are taken for others.
    beta.kill();
    let beta = pair.beta();
    check(&there, 2);
    beta.wait_replicating();
    write(&there, 3);
    beta.stop();
    let beta = pair.beta();
    beta.wait_replicating();
    check(&there, 3);
    epoch(&beta, &there, 4);
    assert!(!beta.log().contains("blocks are sent again"));
    planned(&beta);
    alpha.wait_replicating();
    check(&here, 4);
    pair.end(alpha, beta);
}

#[test]
fn a_primary_that_meets_a_higher_generation_takes_no_more_writes() {
    if !can_mount() {
        return;
    }
    let (pair, alpha, beta) = Pair::replicating();
    let (here, there) = (pair.on_alpha(), pair.on_beta());
    epoch(&alpha, &here, 1);
    let guest = open_direct(&here[0], OFlag::empty()).unwrap();
    alpha.pause();
    verb(&beta, &["failover", MACHINE, "--unplanned", "--force"]);
    check(&there, 1);
    alpha.resume();
    alpha.wait("fencing", |m| matches!(m.part, Some(Part::Fenced { .. })));
    let mut bytes = crate::support::Aligned::new(4096);
    bytes.get_mut().fill(9);
    let refused = guest.write_all_at(bytes.get(), 0).unwrap_err();
    assert_eq!(refused.raw_os_error(), Some(nix::libc::EROFS));
    assert_eq!(marked(&here[0], 7), 1, "reads go on");

    // Cancelled: the old primary takes the machine back by itself, in a generation above both.
    assert_eq!(call(&beta, &["cancel", MACHINE]).0, 0);
    let back = alpha.wait("the machine taken back", |m| m.part == Some(Part::Primary));
    assert_eq!(back.generation.unwrap().number, 3);
    guest.write_all_at(bytes.get(), 0).unwrap();
    drop(guest);
    alpha.wait_replicating();
    epoch(&alpha, &here, 2);
    assert_eq!(part(&beta), Part::Replica { abandoned: false });
    pair.end(alpha, beta);
}

#[test]
fn a_machine_that_cannot_be_served_does_not_keep_the_others_waiting() {
    if !can_mount() {
        return;
    }
    let hosts = Hosts::new();
    let (good, late) = (hosts.image("good.raw", 8), hosts.path("late.raw"));
    let config = hosts.path("host.toml");
    let machine = |name: &str, image: &Path| {
        let at = hosts.path(format!("at-{name}"));
        fs::create_dir(&at).unwrap();
        format!("[machines.{name}]\nimages = [{image:?}]\nat = {at:?}\n")
    };
    let machines = [machine("good", &good), machine("late", &late)].concat();
    fs::write(&config, format!("store = \"store\"\n{machines}")).unwrap();
    let args = ["serve", "--config", config.to_str().unwrap()];
    let host = Node::start(&hosts.command("host", &args), None);
    let trouble = host.wait("trouble", |m| m.health == Health::Critical);
    assert_eq!(trouble.name.as_str(), "late");
    assert!(trouble.reasons[0].contains("late.raw"), "{trouble:?}");
    mark(&hosts.path("at-good/good.raw"), 7, 1);
    // The image turns up, and the machine is served without a restart.
    hosts.image("late.raw", 8);
    host.wait("the other one", |m| {
        m.name.as_str() == "late" && m.health < Health::Critical
    });
    mark(&hosts.path("at-late/late.raw"), 7, 1);
    host.stop();
}
