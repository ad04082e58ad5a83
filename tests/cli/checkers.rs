//! `image check` beside two other checkers: `vhdx_dump.py`, which was written from the standard and lists every violation,
//! and `qemu-img check`. Where they differ the table says why.

use std::fs;

use super::understudy;
use crate::support::{have, run, scratch, shared};

/// What a checker says of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    Sound,
    Damaged,
    /// It cannot say: it does not open such images.
    Unable,
}

use Verdict::{Damaged, Sound, Unable};

/// Each image with the verdicts of this program, of `vhdx_dump.py` and of qemu-img 10.0.2, and why they differ.
const IMAGES: [(&str, Verdict, Verdict, Verdict, &str); 9] = [
    ("child512", Sound, Sound, Unable, "qemu opens no child"),
    ("eof", Damaged, Damaged, Damaged, "a block past the end"),
    (
        "nolog",
        Damaged,
        Damaged,
        Sound,
        "qemu takes a log in use without an entry for an empty one",
    ),
    (
        "ovl_meta",
        Damaged,
        Damaged,
        Damaged,
        "a block over the metadata and the BAT",
    ),
    ("par512", Sound, Sound, Sound, ""),
    (
        "resv",
        Damaged,
        Damaged,
        Sound,
        "qemu does not look at reserved bits",
    ),
    (
        "rt1bad",
        Sound,
        Damaged,
        Unable,
        "one region table of two is broken: a warning here, a violation there, and qemu reads the first one only",
    ),
    (
        "torn",
        Sound,
        Sound,
        Unable,
        "qemu opens no dirty image for reading",
    ),
    ("trunc", Damaged, Damaged, Unable, "the same"),
];

fn by_dump(tool: &str, image: &str) -> Verdict {
    let done = run("python3", [tool, image]);
    let said = String::from_utf8_lossy(&done.stdout);
    if !done.status.success() || said.contains("  !! ") {
        Damaged
    } else {
        Sound
    }
}

fn by_qemu(image: &str) -> Verdict {
    let done = run("qemu-img", ["check", "-f", "vhdx", image]);
    match done.status.code() {
        Some(0) => Sound,
        Some(2) => Damaged,
        _ => Unable,
    }
}

#[test]
fn verdicts_agree_with_other_checkers() {
    let Some(shared) = shared() else { return };
    let folder = scratch();
    let tool = shared.join("tools/vhdx_dump.py");
    let tool = tool.to_str().unwrap();
    let with_dump = have(&["python3"]);
    let with_qemu = have(&["qemu-img"]);
    let known: Vec<_> = IMAGES
        .iter()
        .map(|image| format!("{}.vhdx.gz", image.0))
        .collect();
    for entry in fs::read_dir(shared.join("disks/crafted")).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        assert!(known.contains(&name), "{name} is not in the table");
    }
    for (name, ours, of_dump, of_qemu, why) in IMAGES {
        let packed = shared.join(format!("disks/crafted/{name}.vhdx.gz"));
        let image = folder.path().join(format!("{name}.vhdx"));
        let mut bytes = flate2::read::GzDecoder::new(fs::File::open(packed).unwrap());
        std::io::copy(&mut bytes, &mut fs::File::create(&image).unwrap()).unwrap();
        let image = image.to_str().unwrap();
        let called = understudy(&["image", "check", image, "--json"]);
        let verdict = if called.code == 0 { Sound } else { Damaged };
        assert_eq!(verdict, ours, "{name} ({why}): {}", called.out);
        let report: serde_json::Value = serde_json::from_str(&called.out).unwrap();
        assert_eq!(report["errors"] == 0, verdict == Sound);
        if with_dump {
            assert_eq!(by_dump(tool, image), of_dump, "{name}: vhdx_dump.py, {why}");
        }
        if with_qemu {
            assert_eq!(by_qemu(image), of_qemu, "{name}: qemu-img, {why}");
        }
    }
}
