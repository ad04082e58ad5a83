//! The program as people and scripts meet it: exit codes, one clear line for what went wrong, nothing touched.

mod checkers;
mod images;
mod nodes;
mod peers;

use std::{collections::BTreeMap, fs, path::Path};

use crate::support::{PROGRAM, can_mount, have, must, run, scratch, sparse_file};

/// What a call of the program came to.
struct Called {
    code: i32,
    out: String,
    err: String,
}

/// Runs the program to its end.
fn understudy(args: &[&str]) -> Called {
    let done = run(PROGRAM, args);
    Called {
        code: done.status.code().unwrap_or(-1),
        out: String::from_utf8(done.stdout).unwrap(),
        err: String::from_utf8(done.stderr).unwrap(),
    }
}

/// Asserts that a failure is told in one line that holds all of `words`, and is no panic.
fn assert_said(err: &str, words: &[&str]) {
    assert!(!err.contains("panicked"), "{err}");
    let lines: Vec<_> = err
        .lines()
        .filter(|line| line.starts_with("understudy: "))
        .collect();
    let [line] = lines[..] else {
        panic!("not one line: {err}");
    };
    for word in words {
        assert!(line.contains(word), "{word:?} is not in: {line}");
    }
}

/// Every file below a folder with its content.
fn everything(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut found = BTreeMap::new();
    let mut pending = vec![dir.to_owned()];
    while let Some(folder) = pending.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let name = path.to_str().unwrap().to_owned();
            if path.is_dir() {
                found.insert(name, Vec::new());
                pending.push(path);
            } else {
                found.insert(name, fs::read(&path).unwrap());
            }
        }
    }
    found
}

/// Runs `args` in `dir`, which must fail with `code`, say all of `words` in one line and change nothing.
fn assert_refused(dir: &Path, args: &[&str], code: i32, words: &[&str]) {
    let before = everything(dir);
    let called = understudy(args);
    assert_eq!(called.code, code, "{args:?}: {}{}", called.out, called.err);
    assert_said(&called.err, words);
    assert!(everything(dir) == before, "{args:?} changed something");
}

#[test]
fn wrong_usage_is_2() {
    let long = "x".repeat(300);
    let mount = ["mount", "a.raw", "--at", "/nowhere"];
    let wrong: [&[&str]; 12] = [
        &[],
        &["unknown"],
        &["mount"],
        &["mount", "a.raw"],
        &["mount", "a.raw", "--at", "/nowhere", "--interval", "1h"],
        &["mount", "a.raw", "--at", "/nowhere", "--interval", "1"],
        &["mount", "a.raw", "--at", "/nowhere", "--format", "qcow2"],
        &[
            "replica",
            "--store",
            "x",
            "--listen",
            "nobody",
            "--identity",
            "y",
            "--allow",
            "z",
        ],
        &[
            "replica",
            "--store",
            "x",
            "--listen",
            "127.0.0.1:0",
            "--identity",
            "y",
        ],
        &["image", "create", "x.vhdx"],
        &["image", "create", "x.vhdx", "--size", "much"],
        &["status", "../x"],
    ];
    for args in wrong {
        let called = understudy(args);
        assert_eq!(called.code, 2, "{args:?}: {}", called.err);
        assert!(!called.err.contains("panicked"), "{}", called.err);
        assert!(called.out.is_empty(), "{}", called.out);
    }
    for machine in ["../x", "", ".", "a/b", &long] {
        let called = understudy(&[&mount[..], &["--machine", machine]].concat());
        assert_eq!(called.code, 2, "{machine}: {}", called.err);
        assert!(called.err.contains("--machine"), "{}", called.err);
    }
    let alone = understudy(&[&mount[..], &["--replicate-to", "b:1"]].concat());
    assert_eq!(alone.code, 2);
    assert!(alone.err.contains("--identity"), "{}", alone.err);
    for args in [["--help"], ["--version"]] {
        assert_eq!(understudy(&args).code, 0);
    }
}

#[test]
fn images_that_are_none_are_refused_untouched() {
    if !can_mount() {
        return;
    }
    let folder = scratch();
    let dir = folder.path();
    let at = |name: &str| dir.join(name).to_str().unwrap().to_owned();
    fs::create_dir(dir.join("mnt")).unwrap();
    let good = at("good.vhdx");
    must(PROGRAM, ["image", "create", &good, "--size", "64M"]);
    let bytes = fs::read(&good).unwrap();
    for (name, len) in [
        ("empty", 0),
        ("stub", 100),
        ("head", 1 << 16),
        ("cut", 1 << 20),
    ] {
        fs::write(
            dir.join(format!("{name}.vhdx")),
            &bytes[..len.min(bytes.len())],
        )
        .unwrap();
    }
    fs::write(
        dir.join("elf.vhdx"),
        &fs::read("/bin/true").unwrap()[..8192],
    )
    .unwrap();
    fs::write(dir.join("notes.txt"), "not a disk at all\n").unwrap();
    fs::write(dir.join("odd.raw"), [1; 1000]).unwrap();
    fs::write(dir.join("empty.raw"), []).unwrap();
    fs::create_dir(dir.join("folder.raw")).unwrap();
    let cases: [(&str, &[&str]); 11] = [
        ("missing.vhdx", &["missing.vhdx"]),
        ("missing.raw", &["missing.raw"]),
        ("empty.vhdx", &["empty.vhdx", "vhdx"]),
        ("stub.vhdx", &["stub.vhdx", "vhdx"]),
        ("head.vhdx", &["head.vhdx", "vhdx"]),
        ("cut.vhdx", &["cut.vhdx", "vhdx"]),
        ("elf.vhdx", &["elf.vhdx", "vhdx"]),
        ("notes.txt", &["notes.txt", "--format"]),
        ("odd.raw", &["odd.raw", "1000"]),
        ("empty.raw", &["empty.raw"]),
        ("folder.raw", &["folder.raw"]),
    ];
    let mnt = at("mnt");
    for (name, words) in cases {
        assert_refused(dir, &["mount", &at(name), "--at", &mnt], 1, words);
        let inspected = understudy(&["image", "inspect", &at(name)]);
        assert_eq!(inspected.code, 1, "{name}: {}", inspected.out);
        assert_said(&inspected.err, &[name]);
    }
    let text = at("notes.txt");
    let forced = ["mount", &text, "--at", &mnt, "--format", "vhdx"];
    assert_refused(dir, &forced, 1, &["notes.txt", "vhdx"]);
    let twice = ["mount", &good, &good, "--at", &mnt];
    assert_refused(dir, &twice, 1, &["good"]);
}

#[test]
fn places_that_cannot_be_mounted_at_are_refused() {
    if !can_mount() {
        return;
    }
    let folder = scratch();
    let dir = folder.path();
    let at = |name: &str| dir.join(name).to_str().unwrap().to_owned();
    sparse_file(&dir.join("disk.raw"), 1 << 20);
    fs::write(dir.join("file"), "x").unwrap();
    fs::create_dir(dir.join("full")).unwrap();
    fs::write(dir.join("full/thing"), "x").unwrap();
    for place in ["file", "full", "missing"] {
        let (image, place_path) = (at("disk.raw"), at(place));
        assert_refused(dir, &["mount", &image, "--at", &place_path], 1, &[place]);
    }
}

#[test]
fn images_are_made_once_and_shown() {
    let folder = scratch();
    let dir = folder.path();
    for (name, format) in [("a.vhdx", "vhdx"), ("a.raw", "raw")] {
        let path = dir.join(name).to_str().unwrap().to_owned();
        let create = ["image", "create", &path, "--size", "64M"];
        assert_eq!(understudy(&create).code, 0);
        assert_refused(dir, &create, 3, &[name]);
        let shown = understudy(&["image", "inspect", &path, "--json"]);
        let value: serde_json::Value = serde_json::from_str(&shown.out).unwrap();
        assert_eq!(value["format"], format);
        assert_eq!(value["geometry"]["size"], 64 << 20);
        assert_eq!(value["data_bytes"], 0);
        let text = understudy(&["image", "inspect", &path]);
        assert!(text.out.contains("64"), "{}", text.out);
    }
    let odd = dir.join("odd.vhdx").to_str().unwrap().to_owned();
    let create = [
        "image",
        "create",
        &odd,
        "--size",
        "64M",
        "--block-size",
        "3M",
    ];
    assert_refused(dir, &create, 1, &["odd.vhdx"]);
    let create = ["image", "create", &odd, "--size", "1000"];
    assert_refused(dir, &create, 1, &["odd.vhdx"]);
}

#[test]
fn identities_are_never_overwritten() {
    let folder = scratch();
    let dir = folder.path();
    let (ca, host) = (dir.join("ca"), dir.join("web"));
    let (ca, host) = (ca.to_str().unwrap(), host.to_str().unwrap());
    assert_eq!(understudy(&["pki", "init", ca]).code, 0);
    let issue = [
        "pki", "issue", ca, "web", "--san", "10.0.0.1", "--out", host,
    ];
    assert_eq!(understudy(&issue).code, 0);
    assert_refused(dir, &issue, 1, &["web"]);
    assert_refused(dir, &["pki", "init", ca], 1, &["ca"]);
    let nobody = dir.join("nobody");
    let nobody = nobody.to_str().unwrap();
    assert_refused(
        dir,
        &["pki", "issue", nobody, "x", "--out", host],
        1,
        &["nobody"],
    );
    assert_eq!(understudy(&["pki", "issue", ca, "../x"]).code, 2);
    assert_eq!(
        understudy(&["pki", "issue", ca, "x", "--san", "a b"]).code,
        2
    );
}

#[test]
fn without_nodes_status_says_how_to_start_one() {
    let folder = scratch();
    let socket = folder.path().join("none.sock");
    let called = understudy(&["status", "--control", socket.to_str().unwrap()]);
    assert_eq!(called.code, 1);
    assert_said(&called.err, &["none.sock"]);
    if !can_mount() || !have(&["unshare"]) {
        return;
    }
    // Nodes of other people may run on this host; in a namespace of its own the folder of sockets is empty.
    let script = format!("mount -t tmpfs none /run && exec {PROGRAM} status");
    let done = run("unshare", ["--mount", "sh", "-c", &script]);
    assert_eq!(done.status.code(), Some(1));
    assert_said(
        &String::from_utf8_lossy(&done.stderr),
        &["understudy mount", "understudy replica"],
    );
}

#[test]
fn the_demo_proves_itself() {
    if !can_mount() || !have(&["mkfs.ext4", "e2fsck", "losetup", "qemu-img"]) {
        return;
    }
    let folder = scratch();
    let dir = folder.path().to_str().unwrap().to_owned();
    let called = understudy(&["demo", "--load", "1", "--size", "1", "--scratch", &dir]);
    assert_eq!(called.code, 0, "{}{}", called.out, called.err);
    let last = called.out.lines().last().unwrap();
    let epoch = last
        .strip_prefix("demo: replica identical at epoch ")
        .unwrap();
    assert!(epoch.parse::<u64>().unwrap() >= 1, "{last}");
    assert!(everything(folder.path()).is_empty(), "the demo cleans up");
}
