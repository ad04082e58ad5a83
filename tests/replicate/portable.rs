//! An initial copy on a portable disk: exported while the guest writes, carried, imported; then only changes are sent.

use std::{
    fs,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use nix::{
    fcntl::OFlag,
    mount::{MntFlags, umount2},
};
use understudy::{
    coord::state::ReplicationState,
    disk::image::Format,
    node::{
        control::{ExportReport, ImportReport},
        status::MachineStatus,
    },
};

use crate::support::{
    Hosts, Ledger, Load, MACHINE, Node, PROGRAM, assert_identical, call, can_mount, must,
    open_direct,
};

const MIB: u64 = 1 << 20;
const PORTABLE: [&str; 2] = ["--initial-copy", "portable"];

/// A folder for a copy.
fn stick(hosts: &Hosts, name: &str) -> PathBuf {
    let folder = hosts.path(name);
    fs::create_dir_all(&folder).unwrap();
    folder
}

fn file(folder: &Path) -> PathBuf {
    folder.join(format!("{MACHINE}.hrl"))
}

/// Calls a verb with a folder; how far it was went to the standard error.
fn done<T: serde::de::DeserializeOwned>(node: &Node, verb: &str, folder: &Path) -> T {
    let folder = folder.to_str().unwrap();
    let (code, out, err) = call(node, &[verb, MACHINE, folder, "--json"]);
    assert_eq!(code, 0, "{err}");
    assert!(err.contains("complete"), "{err}");
    serde_json::from_str(&out).unwrap()
}

fn export(primary: &Node, folder: &Path) -> ExportReport {
    done(primary, "export", folder)
}

fn import(replica: &Node, folder: &Path) -> ImportReport {
    done(replica, "import", folder)
}

/// A verb with a folder that fails with this code; what it said.
fn fails(node: &Node, verb: &str, folder: &Path, code: i32) -> String {
    let (found, out, err) = call(node, &[verb, MACHINE, folder.to_str().unwrap()]);
    assert_eq!(found, code, "{out}{err}");
    err
}

fn waits(machine: &MachineStatus) -> bool {
    machine.state == ReplicationState::ReadyForInitialReplication
        && machine
            .reasons
            .join(" ")
            .contains("waits for a portable copy")
}

fn write(hosts: &Hosts, ledger: &mut Ledger, first: u64, count: u64) {
    let file = open_direct(&hosts.disk("disk"), OFlag::empty()).unwrap();
    for start in (first..first + count).step_by(16) {
        ledger.write(&file, start, 16).unwrap();
    }
}

/// Both images hold the same, at a point that both know.
fn end(hosts: &Hosts, image: &Path, primary: Node, replica: Node) {
    let lineage = primary.cut();
    assert_eq!(replica.merged().durable, Some(lineage));
    primary.stop();
    replica.stop();
    assert_identical(image, &hosts.replica_image("disk", Format::Raw));
}

/// The guest writes before, during and after the export, the primary dies before the copy has arrived.
#[test]
fn a_copy_is_carried_and_only_what_changed_since_is_sent() {
    if !can_mount() {
        return;
    }
    let hosts = Hosts::new();
    let image = hosts.image("disk.raw", 96);
    let replica = hosts.replica(&[]);
    let primary = hosts.primary(&[&image], &PORTABLE);
    let mut ledger = Ledger::new(96 * MIB, 91);
    write(&hosts, &mut ledger, 0, 8192);
    primary.wait("a copy that waits", waits);
    let folder = stick(&hosts, "stick");
    let load = Load::start(hosts.disk("disk"), ledger);
    load.wait_written(100);
    let exported = export(&primary, &folder);
    let mut ledger = load.finish();
    assert_eq!(exported.file, file(&folder));
    assert_eq!(exported.bytes, fs::metadata(file(&folder)).unwrap().len());
    let status = primary.wait("a copy that waits", waits);
    assert_eq!(status.traffic.sent, 0, "nothing went over the network");
    assert_eq!(status.durable, None, "the replica has nothing yet");
    let owed = status.traffic.owed;
    assert!(owed > 0, "the guest wrote during the export");
    assert_eq!(fs::read_dir(&folder).unwrap().count(), 1);

    primary.kill();
    let primary = hosts.primary(&[&image], &PORTABLE);
    let status = primary.wait("a copy that waits", waits);
    assert_eq!(
        status.traffic.owed, owed,
        "a death forgets nothing, and adds nothing"
    );
    ledger.verify(&hosts.disk("disk"));
    let imported = import(&replica, &folder);
    assert_eq!(imported.lineage, exported.lineage);
    primary.wait_replicating();
    let status = primary.machine();
    assert_eq!(status.traffic.raw, owed, "what changed, and nothing else");
    assert!(!primary.log().contains("a resync"));

    let why = fails(&replica, "import", &folder, 3);
    assert!(why.contains("needs no initial copy"), "{why}");
    let why = fails(&primary, "export", &folder, 3);
    assert!(why.contains("needs no initial copy"), "{why}");
    let why = fails(&primary, "import", &folder, 3);
    assert!(why.contains("on the replica's host"), "{why}");
    write(&hosts, &mut ledger, 64, 64);
    end(&hosts, &image, primary, replica);
}

/// A file that lies in the folder under the copy's name.
fn put(folder: &Path, bytes: &[u8]) {
    fs::write(file(folder), bytes).unwrap();
}

/// Cut short, changed in one bit, of another machine, a link, not there: each is named, and nothing is taken of any.
#[test]
fn what_is_wrong_with_a_copy_is_said_and_nothing_is_taken() {
    if !can_mount() {
        return;
    }
    let hosts = Hosts::new();
    let image = hosts.image("disk.raw", 32);
    let replica = hosts.replica(&[]);
    let primary = hosts.primary(&[&image], &PORTABLE);
    let mut ledger = Ledger::new(32 * MIB, 93);
    write(&hosts, &mut ledger, 0, 1024);
    primary.wait("a copy that waits", waits);
    let folder = stick(&hosts, "stick");
    let why = fails(&replica, "import", &folder, 3);
    assert!(why.contains("No such file"), "{why}");
    export(&primary, &folder);
    let why = fails(&primary, "export", &folder, 3);
    assert!(why.contains("exists"), "{why}");
    let why = fails(&primary, "export", &file(&folder), 3);
    assert!(why.contains("is not a folder"), "{why}");
    let good = fs::read(file(&folder)).unwrap();

    let wrong = stick(&hosts, "wrong");
    for len in [0, 7, good.len() / 2, good.len() - 1] {
        put(&wrong, &good[..len]);
        let why = fails(&replica, "import", &wrong, 1);
        assert!(why.contains("cut short"), "{len}: {why}");
    }
    put(&wrong, &[&good[..], &[0]].concat());
    let why = fails(&replica, "import", &wrong, 1);
    assert!(why.contains("is damaged"), "{why}");
    for at in [3, 40, 300, good.len() / 2, good.len() - 40, good.len() - 1] {
        let mut bad = good.clone();
        bad[at] ^= 4;
        put(&wrong, &bad);
        let why = fails(&replica, "import", &wrong, 1);
        assert!(why.contains("is damaged"), "{at}: {why}");
    }
    fs::remove_file(file(&wrong)).unwrap();
    std::os::unix::fs::symlink(file(&folder), file(&wrong)).unwrap();
    let why = fails(&replica, "import", &wrong, 3);
    assert!(why.contains("is a link"), "{why}");

    let other = {
        let hosts = Hosts::new();
        let image = hosts.image("disk.raw", 32);
        let replica = hosts.replica(&[]);
        let primary = hosts.primary(&[&image], &PORTABLE);
        primary.wait("a copy that waits", waits);
        let folder = stick(&hosts, "stick");
        export(&primary, &folder);
        primary.stop();
        replica.stop();
        fs::read(file(&folder)).unwrap()
    };
    fs::remove_file(file(&wrong)).unwrap();
    put(&wrong, &other);
    let why = fails(&replica, "import", &wrong, 3);
    assert!(why.contains("is a copy of machine"), "{why}");

    let held = replica.machine();
    assert_eq!(held.state, ReplicationState::WaitingForInitialReplication);
    let empty = fs::File::open(hosts.replica_image("disk", Format::Raw)).unwrap();
    let mut bytes = vec![1; 1024 * 4096];
    empty.read_exact_at(&mut bytes, 0).unwrap();
    assert!(bytes.iter().all(|&byte| byte == 0), "nothing was taken");
    import(&replica, &folder);
    primary.wait_replicating();
    assert!(primary.machine().traffic.raw < MIB);
    end(&hosts, &image, primary, replica);
}

#[test]
fn of_two_exports_the_later_one_counts() {
    if !can_mount() {
        return;
    }
    for later in [true, false] {
        let hosts = Hosts::new();
        let image = hosts.image("disk.raw", 32);
        let replica = hosts.replica(&[]);
        let primary = hosts.primary(&[&image], &PORTABLE);
        let mut ledger = Ledger::new(32 * MIB, 95);
        write(&hosts, &mut ledger, 0, 2048);
        primary.wait("a copy that waits", waits);
        let folders = ["first", "second"].map(|name| stick(&hosts, name));
        let first = export(&primary, &folders[0]);
        write(&hosts, &mut ledger, 512, 64);
        let second = export(&primary, &folders[1]);
        assert_ne!(first.lineage, second.lineage);
        write(&hosts, &mut ledger, 4096, 32);
        import(&replica, &folders[usize::from(later)]);
        primary.wait_replicating();
        let status = primary.machine();
        if later {
            assert_eq!(status.traffic.raw, 32 * 4096);
            assert!(status.resync.is_none());
        } else {
            // Its maps begin with the second one: everything is compared, and what differs is sent.
            let resync = status.resync.unwrap();
            assert!(resync.compared >= 31 * MIB, "{resync:?}");
            assert!(status.traffic.raw >= 96 * 4096 && status.traffic.raw < 2 * MIB);
        }
        end(&hosts, &image, primary, replica);
    }
}

/// Somebody did not want to wait for the disk.
#[test]
fn a_copy_that_went_over_the_network_meanwhile_is_not_needed() {
    if !can_mount() {
        return;
    }
    let hosts = Hosts::new();
    let image = hosts.image("disk.raw", 32);
    let replica = hosts.replica(&[]);
    let primary = hosts.primary(&[&image], &PORTABLE);
    let mut ledger = Ledger::new(32 * MIB, 97);
    write(&hosts, &mut ledger, 0, 1024);
    primary.wait("a copy that waits", waits);
    let folder = stick(&hosts, "stick");
    export(&primary, &folder);
    write(&hosts, &mut ledger, 0, 64);
    assert_eq!(call(&primary, &["copy", MACHINE]).0, 0);
    primary.wait_replicating();
    let why = fails(&replica, "import", &folder, 3);
    assert!(why.contains("needs no initial copy"), "{why}");
    end(&hosts, &image, primary, replica);
}

fn begin(node: &Node, verb: &str, folder: &Path) -> Child {
    Command::new(PROGRAM)
        .args([verb, MACHINE, folder.to_str().unwrap(), "--control"])
        .arg(node.socket())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

/// Waits until a copy is under way, or whoever asked has his answer; whether it is under way.
fn is_begun(node: &Node, asked: &mut Child) -> bool {
    loop {
        if node.machine().copy.is_some_and(|copy| copy.done > MIB) {
            return true;
        }
        if asked.try_wait().unwrap().is_some() {
            return false;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// The primary dies while it exports: the machine is as before, and exports again. The replica dies while it imports, and
/// imports again from the start.
#[test]
fn deaths_in_the_middle_cost_a_beginning() {
    if !can_mount() {
        return;
    }
    let hosts = Hosts::new();
    let image = hosts.image("disk.raw", 128);
    let replica = hosts.replica(&[]);
    let args = [&PORTABLE[..], &["--compression", "none"]].concat();
    let primary = hosts.primary(&[&image], &args);
    let mut ledger = Ledger::new(128 * MIB, 99);
    write(&hosts, &mut ledger, 0, 128 * 256);
    primary.wait("a copy that waits", waits);
    let folder = stick(&hosts, "stick");
    let mut asked = begin(&primary, "export", &folder);
    assert!(
        is_begun(&primary, &mut asked),
        "the copy is too small for this test"
    );
    primary.kill();
    asked.wait().unwrap();
    assert!(!file(&folder).exists());
    let primary = hosts.primary(&[&image], &args);
    primary.wait("a copy that waits", waits);
    ledger.verify(&hosts.disk("disk"));

    // Not by itself, but on demand: whoever suspends the machine ends an export as well.
    let mut asked = begin(&primary, "export", &folder);
    assert!(
        is_begun(&primary, &mut asked),
        "the copy is too small for this test"
    );
    assert_eq!(call(&primary, &["suspend", MACHINE]).0, 0);
    assert_eq!(asked.wait().unwrap().code(), Some(1));
    let why = fails(&primary, "export", &folder, 3);
    assert!(why.contains("understudy resume"), "{why}");
    let drafts = fs::read_dir(&folder).unwrap().count();
    assert_eq!(drafts, 1, "what the killed process left, and nothing else");
    assert_eq!(call(&primary, &["resume", MACHINE]).0, 0);
    primary.wait("a copy that waits", waits);

    let exported = export(&primary, &folder);
    let mut asked = begin(&replica, "import", &folder);
    // The second half of its reading is what takes.
    let half = |m: &MachineStatus| m.copy.is_some_and(|copy| copy.done > copy.total / 2 + MIB);
    while !half(&replica.machine()) {
        assert!(
            asked.try_wait().unwrap().is_none(),
            "the copy is too small for this test"
        );
    }
    replica.kill();
    asked.wait().unwrap();
    let replica = hosts.replica(&[]);
    assert_eq!(replica.machine().durable, None);
    write(&hosts, &mut ledger, 0, 32);
    assert_eq!(import(&replica, &folder).lineage, exported.lineage);
    primary.wait_replicating();
    assert_eq!(primary.machine().traffic.raw, 32 * 4096);
    end(&hosts, &image, primary, replica);
}

/// A small disk at `at`.
struct Small(PathBuf);

impl Drop for Small {
    fn drop(&mut self) {
        let _ = umount2(&self.0, MntFlags::MNT_DETACH);
    }
}

#[test]
fn a_disk_that_is_too_small_is_refused_before_anything_is_written() {
    if !can_mount() {
        return;
    }
    let hosts = Hosts::new();
    let image = hosts.image("disk.raw", 32);
    let replica = hosts.replica(&[]);
    let primary = hosts.primary(&[&image], &PORTABLE);
    let mut ledger = Ledger::new(32 * MIB, 101);
    write(&hosts, &mut ledger, 0, 4096);
    primary.wait("a copy that waits", waits);
    let folder = stick(&hosts, "small");
    let at = folder.to_str().unwrap();
    must("mount", ["-t", "tmpfs", "-o", "size=8M", "small", at]);
    let small = Small(folder);
    let why = fails(&primary, "export", &small.0, 3);
    assert!(why.contains("8.00 MiB free"), "{why}");
    assert_eq!(fs::read_dir(&small.0).unwrap().count(), 0);
    let status = primary.wait("a copy that waits", waits);
    assert_eq!(status.traffic.sent, 0);
    primary.stop();
    replica.stop();
}
