//! Images with parents, and images that change their size.

use std::{fs, path::Path};

use super::{
    assert_refused, assert_said,
    images::{KINDS, MIB, content, text},
    understudy,
};
use crate::support::{PROGRAM, have, must, run, scratch};

/// The size that `inspect` tells, in bytes.
fn size(image: &Path) -> u64 {
    let shown = understudy(&["image", "inspect", text(image), "--json"]);
    let value: serde_json::Value = serde_json::from_str(&shown.out).unwrap();
    value["geometry"]["size"].as_u64().unwrap()
}

/// What is in the image, by way of a raw file that is gone afterwards.
fn bytes(image: &Path, more: &[&str]) -> Vec<u8> {
    let raw = image.with_extension("back.raw");
    let convert = [&["image", "convert", text(image), text(&raw)], more].concat();
    let called = understudy(&convert);
    assert_eq!(called.code, 0, "{convert:?}: {}", called.err);
    let bytes = fs::read(&raw).unwrap();
    fs::remove_file(raw).unwrap();
    bytes
}

#[test]
fn a_child_shows_its_parent_wherever_that_lies() {
    let folder = scratch();
    let dir = folder.path();
    let (base, children) = (dir.join("base"), dir.join("vm/web"));
    fs::create_dir(&base).unwrap();
    fs::create_dir_all(&children).unwrap();
    let (raw, parent) = (dir.join("a.raw"), base.join("golden.vhdx"));
    let mut content = content();
    content.resize(24 * MIB, 0);
    fs::write(&raw, &content).unwrap();
    must(PROGRAM, ["image", "convert", text(&raw), text(&parent)]);
    let child = children.join("disk.vhdx");
    let create = ["image", "create", text(&child), "--parent", text(&parent)];
    let made = understudy(&create);
    assert_eq!(made.code, 0, "{}", made.err);
    assert!(made.out.contains(r"..\..\base\golden.vhdx"), "{}", made.out);
    assert_eq!(understudy(&["image", "check", text(&child)]).code, 0);
    let shown = understudy(&["image", "inspect", text(&child), "--parents", text(dir)]);
    assert!(shown.out.contains("golden.vhdx"), "{}", shown.out);
    assert!(bytes(&child, &["--parents", text(dir)]) == content);
    // Without being told where parents are, or with a folder that does not hold them, it is no disk.
    let target = dir.join("b.raw");
    let convert = ["image", "convert", text(&child), text(&target)];
    assert_refused(dir, &convert, 1, &["disk.vhdx", "--parents"]);
    let outside = [&convert[..], &["--parents", text(&children)]].concat();
    assert_refused(dir, &outside, 1, &["golden.vhdx"]);
    // A parent that was written to is another one.
    let resized = understudy(&["image", "resize", text(&parent), "32M"]);
    assert_eq!(resized.code, 0, "{}", resized.err);
    let orphan = [&convert[..], &["--parents", text(dir)]].concat();
    assert_refused(dir, &orphan, 1, &["disk.vhdx", "parent"]);
}

#[test]
fn a_child_is_asked_for_in_one_way_only() {
    let folder = scratch();
    let dir = folder.path();
    let at = |name: &str| text(&dir.join(name)).to_owned();
    let (parent, child) = (at("p.vhdx"), at("c.vhdx"));
    must(PROGRAM, ["image", "create", &parent, "--size", "8M"]);
    let create = ["image", "create", child.as_str()];
    for (more, code, word) in [
        (&["--parent", &parent, "--size", "8M"][..], 2, "--size"),
        (&["--parent", &parent, "--kind", "fixed"], 2, "--kind"),
        (&[], 2, "--size"),
        (&["--parent", &parent, "--format", "vhd"], 1, "--parent"),
        (&["--parent", &at("none.vhdx")], 1, "none.vhdx"),
    ] {
        let called = understudy(&[&create[..], more].concat());
        assert_eq!(called.code, code, "{more:?}: {}", called.err);
        assert!(called.err.contains(word), "{more:?}: {}", called.err);
        assert!(!Path::new(&child).exists());
    }
}

#[test]
fn every_format_grows_and_shrinks() {
    let folder = scratch();
    let dir = folder.path();
    let raw = dir.join("source.raw");
    // What is stored ends at 12 MiB.
    let mut content = content();
    content.truncate(12 * MIB);
    content.resize(20 * MIB, 0);
    fs::write(&raw, &content).unwrap();
    let with_qemu = have(&["qemu-img"]);
    for (number, (format, options)) in KINDS.into_iter().enumerate() {
        let image = dir.join(format!("{number}.{format}"));
        let convert = [&["image", "convert", text(&raw), text(&image)], options].concat();
        let called = understudy(&convert);
        assert_eq!(called.code, 0, "{convert:?}: {}", called.err);
        // All blocks of a fixed VHDX are in use.
        let keeps_all = format == "vhdx" && options.contains(&"fixed");
        for (to, mib) in [("50M", 50), ("20M", 20)] {
            if keeps_all && mib == 20 {
                let smaller = ["image", "resize", text(&image), to];
                assert_refused(dir, &smaller, 1, &["52428800"]);
                continue;
            }
            let called = understudy(&["image", "resize", text(&image), to]);
            assert_eq!(called.code, 0, "{image:?} to {to}: {}", called.err);
            assert!(called.out.contains(format), "{}", called.out);
            assert!(called.err.contains("file systems"), "{}", called.err);
            assert_eq!(size(&image), mib << 20);
            content.resize(usize::try_from(mib << 20).unwrap(), 0);
            assert!(bytes(&image, &[]) == content, "{image:?} at {to}");
            let checked = understudy(&["image", "check", text(&image)]);
            assert_eq!(checked.code, 0, "{}{}", checked.out, checked.err);
            if with_qemu && format != "raw" {
                let driver = if format == "vhd" { "vpc" } else { format };
                let told = run("qemu-img", ["info", "-f", driver, text(&image)]);
                let told = String::from_utf8(told.stdout).unwrap();
                assert!(told.contains(&format!("({} bytes)", mib << 20)), "{told}");
            }
        }
        // What holds data stays.
        let cut_off = ["image", "resize", text(&image), "10M"];
        let smallest = if keeps_all { "52428800" } else { "12582912" };
        assert_refused(dir, &cut_off, 1, &[smallest]);
        let used = fs::File::open(&image).unwrap();
        used.lock().unwrap();
        let in_use = ["image", "resize", text(&image), "30M"];
        assert_refused(dir, &in_use, 3, &["in use"]);
    }
}

#[test]
fn sizes_that_make_no_sense_are_refused() {
    let folder = scratch();
    let dir = folder.path();
    let image = dir.join("a.vhdx");
    must(PROGRAM, ["image", "create", text(&image), "--size", "8M"]);
    for bad in ["0", "1000", "65T"] {
        let resize = ["image", "resize", text(&image), bad];
        assert_refused(dir, &resize, 1, &["a.vhdx"]);
    }
    let called = understudy(&["image", "resize", text(&image), "many"]);
    assert_eq!(called.code, 2);
    assert!(called.err.contains("many"), "{}", called.err);
    let called = understudy(&["image", "resize", text(&dir.join("none.vhdx")), "8M"]);
    assert_eq!(called.code, 1);
    assert_said(&called.err, &["none.vhdx"]);
}
