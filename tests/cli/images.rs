//! The verbs of images: made, checked, converted, and nothing half-done left behind.

use std::{
    fs,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use super::{assert_refused, assert_said, understudy};
use crate::support::{PROGRAM, can_mount, have, must, run, scratch};

pub(super) const MIB: usize = 1 << 20;

/// Formats and kinds that an image can be made in, as options of `create` and `convert`.
pub(super) const KINDS: [(&str, &[&str]); 5] = [
    ("raw", &[]),
    ("vhdx", &["--kind", "dynamic", "--block-size", "1M"]),
    ("vhdx", &["--kind", "fixed", "--block-size", "2M"]),
    ("vhd", &["--kind", "dynamic"]),
    ("vhd", &["--kind", "fixed"]),
];

pub(super) fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// A disk of 20 MiB and a bit: data, stored zeros, holes, a page that begins late, and a tail shorter than any block.
pub(super) fn content() -> Vec<u8> {
    let mut bytes = vec![0; 20 * MIB + 3 * 512];
    let mut state = 7u64;
    for range in [
        0..MIB / 2,
        3 * MIB + 512..3 * MIB + 1024,
        9 * MIB..12 * MIB,
        20 * MIB + 512..20 * MIB + 3 * 512,
    ] {
        for byte in &mut bytes[range] {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            *byte = state.to_be_bytes()[0];
        }
    }
    bytes[10 * MIB..11 * MIB].fill(0);
    bytes
}

/// Names in a folder, hidden ones too.
fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<_> = fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

fn holes(path: &Path) -> bool {
    let meta = fs::metadata(path).unwrap();
    meta.blocks() * 512 < meta.len()
}

#[test]
fn every_format_converts_to_every_other() {
    let folder = scratch();
    let dir = folder.path();
    let bytes = content();
    let raw = dir.join("source.raw");
    fs::write(&raw, &bytes).unwrap();
    let with_qemu = have(&["qemu-img"]);
    let mut images: Vec<PathBuf> = Vec::new();
    for (number, (format, options)) in KINDS.into_iter().enumerate() {
        let image = dir.join(format!("{number}.{format}"));
        let convert = [&["image", "convert", text(&raw), text(&image)], options].concat();
        let called = understudy(&convert);
        assert_eq!(called.code, 0, "{convert:?}: {}", called.err);
        assert!(called.out.contains("converted"), "{}", called.out);
        assert!(called.err.contains("100 %"), "{}", called.err);
        let checked = understudy(&["image", "check", text(&image)]);
        assert_eq!(checked.code, 0, "{}{}", checked.out, checked.err);
        images.push(image);
    }
    for (from, source) in images.iter().enumerate() {
        for (to, (format, options)) in KINDS.into_iter().enumerate() {
            let target = dir.join(format!("{from}-{to}.{format}"));
            let before = fs::read(source).unwrap();
            let convert = [&["image", "convert", text(source), text(&target)], options].concat();
            let called = understudy(&convert);
            assert_eq!(called.code, 0, "{convert:?}: {}", called.err);
            assert!(
                fs::read(source).unwrap() == before,
                "{source:?} was changed"
            );
            if with_qemu {
                let driver = if format == "vhd" { "vpc" } else { format };
                must(
                    "qemu-img",
                    [
                        "compare",
                        "-f",
                        "raw",
                        "-F",
                        driver,
                        text(&raw),
                        text(&target),
                    ],
                );
            }
            let back = dir.join("back.raw");
            must(PROGRAM, ["image", "convert", text(&target), text(&back)]);
            assert!(
                fs::read(&back).unwrap() == bytes,
                "{target:?} holds something else"
            );
            for path in [back, target] {
                fs::remove_file(path).unwrap();
            }
        }
    }
}

#[test]
fn zeros_take_no_space_unless_asked_for() {
    let folder = scratch();
    let dir = folder.path();
    let raw = dir.join("source.raw");
    // All of it is stored, also its zeros.
    fs::write(&raw, content()).unwrap();
    assert!(!holes(&raw));
    for (number, (format, options)) in KINDS.into_iter().enumerate() {
        let sparse = dir.join(format!("{number}-sparse.{format}"));
        let full = dir.join(format!("{number}-full.{format}"));
        let convert = |target: &Path, more: &[&str]| {
            let all = [
                &["image", "convert", text(&raw), text(target)],
                options,
                more,
            ]
            .concat();
            let called = understudy(&all);
            assert_eq!(called.code, 0, "{all:?}: {}", called.err);
        };
        convert(&sparse, &[]);
        convert(&full, &["--no-sparse"]);
        assert!(holes(&sparse), "{sparse:?} stores zeros");
        assert!(!holes(&full), "{full:?} has holes");
        let back = dir.join(format!("{number}-back.raw"));
        must(PROGRAM, ["image", "convert", text(&full), text(&back)]);
        assert!(fs::read(&back).unwrap() == fs::read(&raw).unwrap());
    }
}

#[test]
fn a_conversion_waits_for_the_disk_unless_told_not_to() {
    if !have(&["strace"]) {
        return;
    }
    let folder = scratch();
    let dir = folder.path();
    let raw = dir.join("source.raw");
    fs::write(&raw, content()).unwrap();
    // What a tool does that wants its bytes on the disk: syncs, and writes past the page cache.
    let waits = |target: &Path, more: &[&str]| {
        let calls = dir.join("calls");
        let calls = text(&calls);
        let traced = [
            &[
                "-f",
                "-o",
                calls,
                "-e",
                "trace=fsync,fdatasync,sync_file_range,openat",
            ][..],
            &[PROGRAM, "image", "convert", text(&raw), text(target)],
            more,
        ];
        must("strace", traced.concat());
        let trace = fs::read_to_string(calls).unwrap();
        let is_wait = |line: &&str| {
            line.contains("sync(") || line.contains(".part") && line.contains("O_DIRECT")
        };
        trace
            .lines()
            .filter(is_wait)
            .map(str::to_owned)
            .collect::<Vec<_>>()
    };
    for (name, options) in [("a.raw", &[][..]), ("a.vhdx", &["--block-size", "1M"][..])] {
        let target = dir.join(name);
        let durable = waits(&target, options);
        assert!(
            durable.iter().any(|call| call.contains("sync(")),
            "{durable:?}"
        );
        fs::remove_file(&target).unwrap();
        let cached = waits(&target, &[options, &["--no-sync"]].concat());
        assert!(cached.is_empty(), "{cached:?}");
        let back = dir.join("back.raw");
        must(PROGRAM, ["image", "convert", text(&target), text(&back)]);
        assert!(fs::read(&back).unwrap() == fs::read(&raw).unwrap());
        fs::remove_file(&back).unwrap();
    }
}

#[test]
fn what_exists_is_never_converted_over() {
    let folder = scratch();
    let dir = folder.path();
    let at = |name: &str| text(&dir.join(name)).to_owned();
    fs::write(at("a.raw"), [5; 4096]).unwrap();
    fs::write(at("other.raw"), [6; 4096]).unwrap();
    fs::hard_link(at("a.raw"), at("linked.raw")).unwrap();
    std::os::unix::fs::symlink(at("a.raw"), at("link.raw")).unwrap();
    let source = at("a.raw");
    for (target, word) in [
        ("a.raw", "same file"),
        ("linked.raw", "same file"),
        ("link.raw", "same file"),
        ("other.raw", "exists already"),
    ] {
        let args = ["image", "convert", &source, &at(target)];
        assert_refused(dir, &args, 3, &[word, target]);
    }
    let used = fs::File::open(&source).unwrap();
    used.lock().unwrap();
    for args in [
        &["image", "convert", &source, &at("new.raw")][..],
        &["image", "check", &source],
    ] {
        assert_refused(dir, args, 3, &["a.raw", "in use"]);
    }
}

#[test]
fn a_disk_that_the_format_cannot_hold_is_refused() {
    let folder = scratch();
    let dir = folder.path();
    let at = |name: &str| text(&dir.join(name)).to_owned();
    let large = at("large.vhdx");
    must(PROGRAM, ["image", "create", &large, "--size", "3T"]);
    let sectors = at("sectors.vhdx");
    must(
        PROGRAM,
        [
            "image", "create", &sectors, "--size", "8M", "--sector", "4096",
        ],
    );
    let odd = at("odd.raw");
    fs::write(&odd, [1; 512]).unwrap();
    let cases: [(&str, &str, &[&str], &[&str]); 6] = [
        (&large, "x.vhd", &[], &["x.vhd"]),
        (&sectors, "x.vhd", &[], &["4096"]),
        (&odd, "x.vhdx", &["--sector", "4096"], &["512 bytes"]),
        (&odd, "x.raw", &["--block-size", "1M"], &["raw", "1048576"]),
        (&odd, "x.raw", &["--kind", "fixed"], &["raw", "fixed"]),
        (&odd, "x.vhdx", &["--block-size", "3M"], &["3145728"]),
    ];
    for (source, target, options, words) in cases {
        let target = at(target);
        let args = [&["image", "convert", source, &target], options].concat();
        let before = names(dir);
        let called = understudy(&args);
        assert_eq!(called.code, 1, "{args:?}: {}", called.err);
        assert_said(&called.err, words);
        assert_eq!(names(dir), before, "{args:?} left something");
    }
}

#[test]
fn a_full_disk_leaves_no_file() {
    if !can_mount() || !have(&["unshare"]) {
        return;
    }
    let folder = scratch();
    let dir = folder.path();
    let source = dir.join("source.raw");
    fs::write(&source, vec![1; 32 * MIB]).unwrap();
    let small = dir.join("small");
    fs::create_dir(&small).unwrap();
    for name in ["target.raw", "target.vhdx", "target.vhd"] {
        // The listing is taken where the small file system is mounted, and that is in the child only.
        let script = format!(
            "mount -t tmpfs -o size=8m none {small} || exit 99
             {PROGRAM} image convert {source} {small}/{name}; code=$?
             ls -A {small}; exit $code",
            small = text(&small),
            source = text(&source)
        );
        let done = run("unshare", ["--mount", "sh", "-c", &script]);
        assert_eq!(done.status.code(), Some(1));
        assert_said(
            &String::from_utf8_lossy(&done.stderr),
            &[name, "No space left"],
        );
        let left = String::from_utf8_lossy(&done.stdout);
        assert!(left.is_empty(), "{left}");
    }
}

/// Starts a conversion that takes a while, and ends it by `signal` as soon as its draft is there.
fn interrupted(dir: &Path, target: &str, signal: Signal) -> (Option<i32>, String) {
    let child = Command::new(PROGRAM)
        .args([
            "image",
            "convert",
            text(&dir.join("source.raw")),
            text(&dir.join(target)),
        ])
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    while names(dir).len() < 2 {
        std::thread::yield_now();
    }
    kill(Pid::from_raw(child.id().cast_signed()), signal).unwrap();
    let ended = child.wait_with_output().unwrap();
    let err = String::from_utf8_lossy(&ended.stderr).into_owned();
    (ended.status.code(), err)
}

#[test]
fn an_interrupted_conversion_leaves_no_file() {
    let folder = scratch();
    let dir = folder.path();
    fs::write(dir.join("source.raw"), vec![1; 512 * MIB]).unwrap();
    for (target, signal) in [
        ("target.vhdx", Signal::SIGINT),
        ("target.raw", Signal::SIGTERM),
    ] {
        let (code, err) = interrupted(dir, target, signal);
        assert_eq!(code, Some(1), "{err}");
        assert_said(&err, &["interrupted", target]);
        assert_eq!(names(dir), ["source.raw"]);
    }
    let (code, err) = interrupted(dir, "target.vhdx", Signal::SIGKILL);
    assert_eq!(code, None, "{err}");
    let left = names(dir);
    assert!(
        left.len() == 2 && left[0].starts_with(".understudy-"),
        "nothing but the draft is left: {left:?}"
    );
}

#[test]
fn formats_are_detected_only_when_asked() {
    let folder = scratch();
    let dir = folder.path();
    let at = |name: &str| text(&dir.join(name)).to_owned();
    let vhdx = at("a.vhdx");
    must(PROGRAM, ["image", "create", &vhdx, "--size", "8M"]);
    // A guest wrote the signature into its raw disk: whoever says raw gets raw.
    let raw = at("guest.raw");
    fs::copy(&vhdx, &raw).unwrap();
    let back = at("back.img");
    let called = understudy(&["image", "convert", &raw, &back]);
    assert_eq!(called.code, 0, "{}", called.err);
    assert!(fs::read(&raw).unwrap() == fs::read(&back).unwrap());
    let detected = understudy(&["image", "inspect", &raw, "--format", "detect", "--json"]);
    assert!(
        detected.err.contains("signature of vhdx"),
        "{}",
        detected.err
    );
    let value: serde_json::Value = serde_json::from_str(&detected.out).unwrap();
    assert_eq!(value["format"], "vhdx");
    let disk = at("disk.raw");
    let called = understudy(&["image", "convert", &raw, &disk, "--from", "detect"]);
    assert_eq!(called.code, 0, "{}", called.err);
    assert_eq!(fs::metadata(&disk).unwrap().len(), 8 << 20);
    let plain = at("plain");
    fs::write(&plain, [0; 1024]).unwrap();
    let none = understudy(&["image", "check", &plain, "--format", "detect"]);
    assert_eq!(none.code, 0, "{}", none.err);
    assert!(none.err.contains("taken as raw"), "{}", none.err);
    let unsaid = ["image", "check", plain.as_str()];
    assert_refused(dir, &unsaid, 1, &["--format"]);
}

#[test]
fn a_4096_byte_sector_disk_keeps_its_sectors() {
    let folder = scratch();
    let dir = folder.path();
    let at = |name: &str| text(&dir.join(name)).to_owned();
    let (source, target, raw) = (at("a.vhdx"), at("b.vhdx"), at("c.raw"));
    must(
        PROGRAM,
        [
            "image",
            "create",
            &source,
            "--size",
            "8M",
            "--sector",
            "4096",
            "--physical-sector",
            "4096",
        ],
    );
    must(PROGRAM, ["image", "convert", &source, &target]);
    let shown = understudy(&["image", "inspect", &target, "--json"]);
    let value: serde_json::Value = serde_json::from_str(&shown.out).unwrap();
    assert_eq!(value["geometry"]["logical_sector"], 4096);
    let called = understudy(&["image", "convert", &source, &raw]);
    assert_eq!(called.code, 0);
    assert!(called.err.contains("4096"), "{}", called.err);
}

#[test]
fn json_stands_alone() {
    let folder = scratch();
    let dir = folder.path();
    let image = dir.join("a.vhdx");
    must(PROGRAM, ["image", "create", text(&image), "--size", "8M"]);
    let mut bytes = fs::read(&image).unwrap();
    bytes[(64 << 10) + 100] ^= 1;
    fs::write(&image, &bytes).unwrap();
    for verb in ["check", "inspect"] {
        let called = understudy(&["image", verb, text(&image), "--json"]);
        assert_eq!(called.code, 0, "one header is left: {}", called.err);
        let _: serde_json::Value = serde_json::from_str(&called.out).unwrap();
    }
    bytes[(128 << 10) + 100] ^= 1;
    fs::write(&image, &bytes).unwrap();
    let called = understudy(&["image", "check", text(&image), "--json"]);
    assert_eq!(called.code, 1);
    let value: serde_json::Value = serde_json::from_str(&called.out).unwrap();
    assert!(value["errors"].as_u64().unwrap() >= 2, "{}", called.out);
    assert_said(&called.err, &["a.vhdx", "damaged"]);
}
