//! What the process gave up, that it works without, and that the units which confine it let it work.

use std::{fs, os::unix::fs::chown, path::Path, process::Command};

use rustix::process::configure_io_flusher_behavior;
use understudy::{coord::state::ReplicationState, node::hardening::KEPT};

use super::{serve, serve_through};
use crate::support::{
    Hosts, MACHINE, Node, PROGRAM, assert_identical, can_mount, find_program, have, mark, must,
    skip,
};

const UNITS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/systemd");
/// The user and group `nobody` of every Linux.
pub(super) const NOBODY: u32 = 65_534;
/// `PF_MEMALLOC_NOIO` of the kernel's `sched.h`: an allocation of this thread waits for no I/O.
const NO_IO: u64 = 0x0008_0000;

/// A line of `/proc/PID/task/TID/status` of every thread.
pub(super) fn of_threads(node: &Node, key: &str) -> Vec<String> {
    let tasks = fs::read_dir(format!("/proc/{}/task", node.pid())).unwrap();
    let read = |task: std::io::Result<fs::DirEntry>| {
        let status = fs::read_to_string(task.unwrap().path().join("status")).ok()?;
        let line = status.lines().find_map(|line| line.strip_prefix(key))?;
        Some(line.trim_start_matches(':').trim().to_owned())
    };
    tasks.filter_map(read).collect()
}

fn is_flusher(node: &Node) -> bool {
    let stat = fs::read_to_string(format!("/proc/{}/stat", node.pid())).unwrap();
    // After the name, which may hold anything: state, ppid, pgrp, session, tty, tpgid, flags.
    let flags = stat.rsplit(')').next().unwrap().split_whitespace().nth(6);
    flags.unwrap().parse::<u64>().unwrap() & NO_IO != 0
}

#[test]
fn a_running_host_has_given_up_what_it_does_not_need() {
    if !can_mount() {
        return;
    }
    let hosts = Hosts::new();
    let image = hosts.image("disk.raw", 8);
    let beta = serve(&hosts, "[peers.alpha]\n");
    let primary = hosts.primary(&[&image], &[]);
    primary.wait_replicating();
    let may_flush = configure_io_flusher_behavior(false).is_ok();
    if !may_flush {
        // Then the kernel refuses the hosts as well, and they say that they asked.
        assert!(primary.log().contains("not an IO flusher"));
        skip(
            "whether the kernel makes it an IO flusher: it refuses without CAP_SYS_RESOURCE, which is not in this machine's bounding set; that the host asks for it was seen",
        );
    }
    for node in [&beta, &primary] {
        let threads = of_threads(node, "NoNewPrivs");
        assert!(threads.len() > 2);
        assert!(threads.iter().all(|value| value == "1"), "{threads:?}");
        for key in ["CapPrm", "CapEff", "CapBnd", "CapInh", "CapAmb"] {
            for mask in of_threads(node, key) {
                let mask = u64::from_str_radix(&mask, 16).unwrap();
                assert_eq!(mask & !KEPT.bits(), 0, "{key} {mask:x}");
            }
        }
    }
    if may_flush {
        assert!(is_flusher(&primary) && is_flusher(&beta));
    }
}

/// Owned by nobody, so that a host which is not root can use it.
pub(super) fn give_away(path: &Path) {
    chown(path, Some(NOBODY), Some(NOBODY)).unwrap();
    if path.is_dir() {
        for entry in fs::read_dir(path).unwrap() {
            give_away(&entry.unwrap().path());
        }
    }
}

/// As the unit for replicas starts it: another user, no capability, no new privilege.
#[test]
fn a_replica_needs_no_privilege_at_all() {
    if !can_mount() || !have(&["setpriv"]) {
        return;
    }
    let hosts = Hosts::new();
    let image = hosts.image("disk.raw", 8);
    fs::create_dir(hosts.path("store")).unwrap();
    give_away(&hosts.path(""));
    let starter = [
        "setpriv",
        "--reuid=65534",
        "--regid=65534",
        "--clear-groups",
        "--no-new-privs",
        "--inh-caps=-all",
        "--bounding-set=-all",
    ];
    let beta = serve_through(&hosts, "[peers.alpha]\n", &starter);
    assert_eq!(of_threads(&beta, "CapBnd")[0], "0000000000000000");
    let primary = hosts.primary(&[&image], &[]);
    primary.wait_replicating();
    mark(&hosts.disk("disk"), 3, 1);
    primary.cut();
    let merged = beta.merged();
    assert_eq!(merged.state, ReplicationState::Replicating);
    beta.stop();
    primary.stop();
    assert_identical(&image, &hosts.path("store/vm/disk.raw"));
}

/// The figure that `systemd-analyze` gives a unit: 10 is everything that root may do.
fn exposure(unit: &str) -> f64 {
    let path = format!("{UNITS}/{unit}");
    let said = must(
        "systemd-analyze",
        ["security", "--offline=true", "--no-pager", &path],
    );
    let words = format!("Overall exposure level for {unit}: ");
    let line = said.lines().find_map(|line| line.split(&words).nth(1));
    let figure = line.unwrap_or_else(|| panic!("{said}"));
    figure.split(' ').next().unwrap().parse().unwrap()
}

#[test]
fn the_units_confine_what_they_start() {
    if !have(&["systemd-analyze"]) {
        return;
    }
    for (unit, most) in [
        ("understudy-replica.service", 1.1),
        ("understudy.service", 1.5),
        // Mounts that the hypervisor sees rule out a mount namespace, and what needs one: two of these points.
        ("understudy-mount.service", 2.8),
    ] {
        let figure = exposure(unit);
        assert!(figure <= most, "{unit}: {figure}");
    }
}

/// What a unit lets through must hold what the program does: every system call of a host whose disks are mounted for it, of a
/// replica that receives and merges, and of a mount helper is looked up in the unit's list.
#[test]
fn the_units_let_every_system_call_through_that_is_made() {
    if !can_mount() || !have(&["systemd-analyze", "strace"]) {
        return;
    }
    let hosts = Hosts::new();
    let image = hosts.image("disk.raw", 8);
    let [near, far, helping] = ["near", "far", "helping"].map(|name| hosts.path(name));
    let probe = Command::new("strace")
        .args(["-o", "/dev/null", "true"])
        .status();
    if !probe.is_ok_and(|status| status.success()) {
        return skip("strace cannot trace here");
    }
    let beta = serve_through(&hosts, "[peers.alpha]\n", &traced(&far));
    let words = traced(&helping);
    let mut helper = Command::new(words[0])
        .args(&words[1..])
        .args([PROGRAM, "mount-helper", "--socket"])
        .arg(hosts.path("helper.sock"))
        .arg("--beneath")
        .arg(hosts.path(""))
        .spawn()
        .unwrap();
    let config = hosts.path("alpha.toml");
    let text = format!(
        "store = \"state\"\nidentity = \"alpha\"\nmount-helper = \"helper.sock\"\n\
         [peers.beta]\naddress = \"localhost:{}\"\n\
         [machines.{MACHINE}]\nimages = [{image:?}]\nat = {:?}\npeer = \"beta\"\n",
        hosts.port(),
        hosts.mount()
    );
    fs::write(&config, text).unwrap();
    let command = hosts.command("alpha", &["serve", "--config", config.to_str().unwrap()]);
    let primary = Node::start(&command.through(&traced(&near)), Some(hosts.mount()));
    primary.wait_replicating();
    mark(&hosts.disk("disk"), 3, 1);
    primary.cut();
    beta.merged();
    for node in [&primary, &beta] {
        stop_traced(node);
    }
    drop((primary, beta));
    let traced = format!("/proc/{0}/task/{0}/children", helper.id());
    let traced = fs::read_to_string(traced).unwrap();
    must("kill", traced.split_whitespace());
    helper.wait().unwrap();
    for (unit, calls) in [
        ("understudy-replica.service", far),
        ("understudy.service", near),
        ("understudy-mount.service", helping),
    ] {
        let allowed = allowed(unit);
        let made = fs::read_to_string(calls).unwrap();
        let made: Vec<_> = made
            .lines()
            .filter(|line| line.starts_with(|c: char| c == ' ' || c.is_ascii_digit()))
            .filter_map(|line| line.split_whitespace().last())
            .filter(|call| *call != "total")
            .collect();
        assert!(made.len() > 30, "{made:?}");
        let refused: Vec<_> = made
            .iter()
            .filter(|call| !allowed.contains(&(**call).to_owned()))
            .collect();
        let known = refused.iter().all(|call| MAY_FAIL.contains(call));
        assert!(known, "{unit} refuses {refused:?}");
    }
}

/// What starts a program so that its system calls are counted.
fn traced(to: &Path) -> [&str; 5] {
    ["strace", "-f", "-c", "-o", to.to_str().unwrap()]
}

/// Calls that the program tries and does without: dropping capabilities, which the unit has done before; the receive buffer and
/// the file limit, which it has set; what a thread of the C library asks of the scheduler.
const MAY_FAIL: [&&str; 2] = [&"capset", &"prlimit64"];

/// SIGTERM to the traced program: strace would end, and its program go on without it.
fn stop_traced(node: &Node) {
    use nix::{
        sys::signal::{Signal, kill},
        unistd::Pid,
    };
    let pid = node.status().pid;
    kill(Pid::from_raw(i32::try_from(pid).unwrap()), Signal::SIGTERM).unwrap();
    while Path::new(&format!("/proc/{pid}/task/{pid}")).exists()
        && fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| !stat.contains(") Z "))
    {
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
}

/// The system calls that a unit lets through.
fn allowed(unit: &str) -> Vec<String> {
    let text = fs::read_to_string(format!("{UNITS}/{unit}")).unwrap();
    let mut allowed: Vec<String> = Vec::new();
    for line in text
        .lines()
        .filter_map(|line| line.strip_prefix("SystemCallFilter="))
    {
        let (words, take) = line
            .strip_prefix('~')
            .map_or((line, true), |words| (words, false));
        for word in words.split_whitespace() {
            let mut calls = Vec::new();
            expand(word, &mut calls);
            if take {
                allowed.extend(calls);
            } else {
                allowed.retain(|call| !calls.contains(call));
            }
        }
    }
    allowed.push("execve".into());
    allowed
}

fn expand(word: &str, into: &mut Vec<String>) {
    if !word.starts_with('@') {
        into.push(word.to_owned());
        return;
    }
    let said = must(
        find_program("systemd-analyze").unwrap().to_str().unwrap(),
        ["syscall-filter", "--no-pager", word],
    );
    for line in said.lines().skip(1).map(str::trim) {
        if !line.is_empty() && !line.starts_with('#') {
            expand(line, into);
        }
    }
}
