//! Differencing images: of other programs, for other programs, and behind a mount.

use std::{
    fs,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::Arc,
};

use understudy::{
    disk::{
        Access, Disk, Fua, Opening, Space,
        image::{self, Format},
        parents::ParentRoot,
        vhdx::{self, CreateOptions, Kind, ParentPaths, VhdxDisk},
    },
    storage::{Storage, file::FileStorage},
};

use super::{MIB, assert_same, digest, ids, installed, run, sample, shared, unpack};
use crate::support::{Hosts, assert_identical, can_mount};

/// Catalogued children, each with its parent. The last two name a parent of another identity: their maker wrote the
/// bytes of the GUID in the wrong order.
const CHILDREN: [(&str, &str, bool); 5] = [
    ("crafted/child512", "crafted/par512", true),
    (
        "vhdx-rs/vhdxrs-child-512-linkfixed",
        "vhdx-rs/vhdxrs-parent-512",
        true,
    ),
    (
        "vhdx-rs/vhdxrs-child-4096-linkfixed",
        "vhdx-rs/vhdxrs-parent-4096",
        true,
    ),
    (
        "vhdx-rs/vhdxrs-child-512",
        "vhdx-rs/vhdxrs-parent-512",
        false,
    ),
    (
        "vhdx-rs/vhdxrs-child-4096",
        "vhdx-rs/vhdxrs-parent-4096",
        false,
    ),
];

/// Whether a sample of the catalogue is a child, which this file reads.
pub(super) fn is_child(file: &str) -> bool {
    CHILDREN
        .iter()
        .any(|(child, ..)| file == format!("{child}.vhdx.gz"))
}

fn open_child(path: &Path, access: Access) -> Result<VhdxDisk, vhdx::OpenError> {
    let storage = Arc::new(FileStorage::open(path, access).unwrap());
    let root = ParentRoot::new(path.parent().unwrap(), path).unwrap();
    let opening = Opening::new(access, ids()).with_parents(Arc::new(root));
    VhdxDisk::open(storage, &opening)
}

/// What 7-Zip and the independent dumper find wrong with an image. Neither knows anything of the other.
fn check_child(path: &Path) {
    if installed("7zz") {
        let (good, text) = run(std::process::Command::new("7zz")
            .args(["t", "-tvhdx"])
            .arg(path));
        let bad = text.contains("WARNING") || text.contains("ERROR");
        assert!(good && !bad, "7zz: {text}");
    }
    let dumper = shared().map(|place| place.join("tools/vhdx_dump.py"));
    if let Some(dumper) = dumper.filter(|path| path.exists()) {
        let (good, text) = run(std::process::Command::new("python3").arg(dumper).arg(path));
        let bad = text.lines().find(|line| line.contains("!!"));
        assert!(good && bad.is_none(), "vhdx_dump: {text}");
    }
}

/// The content of an image as 7-Zip sees it, which finds the parents by itself.
fn seven_zip(path: &Path) -> Option<Vec<u8>> {
    if !installed("7zz") {
        return None;
    }
    let output = std::process::Command::new("7zz")
        .args(["x", "-so", "-tvhdx"])
        .arg(path)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "7zz: {said}");
    Some(output.stdout)
}

/// The content of an image over the content of its parent as the independent dumper sees it.
fn dumped(path: &Path, parent: &Path) -> Option<Vec<u8>> {
    let dumper = shared()?.join("tools/vhdx_dump.py");
    let output = std::process::Command::new("python3")
        .args([&dumper, Path::new("--raw"), path, Path::new("--parent")])
        .arg(parent)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "vhdx_dump: {said}");
    Some(output.stdout)
}

#[test]
fn children_of_other_programs_read_as_their_makers_meant() {
    let Some(shared) = shared() else { return };
    let dir = tempfile::tempdir().unwrap();
    let path_of = |file: &str| dir.path().join(Path::new(file).file_name().unwrap());
    for (child, parent, is_right) in CHILDREN {
        let [path, parent_path] = [child, parent].map(|file| {
            let path = path_of(file).with_extension("vhdx");
            let packed = shared.join("disks").join(format!("{file}.vhdx.gz"));
            unpack(&packed, &path).unwrap();
            path
        });
        let before = [&path, &parent_path].map(|path| fs::read(path).unwrap());
        let opened = open_child(&path, Access::ReadOnly);
        if !is_right {
            let error = opened.unwrap_err();
            let vhdx::OpenError::Linkage {
                expected, found, ..
            } = &error
            else {
                panic!("{child}: {error:?}");
            };
            let swapped = uuid::Uuid::from_bytes_le(*expected[0].as_bytes());
            assert_eq!(swapped, *found, "the reason is the order of the bytes");
            open_child(&path, Access::ReadWrite).unwrap_err();
            let after = [&path, &parent_path].map(|path| fs::read(path).unwrap());
            assert!(after == before, "{child}: a refusal left its traces");
            continue;
        }
        let expected = sample(&format!("{child}.vhdx.gz")).raw_sha256;
        let disk = opened.unwrap();
        assert_eq!(Some(digest(&disk)), expected, "{child}");
        // Written to: a sector in each block, whatever its state, and back again.
        let mut content = vec![0; usize::try_from(disk.geometry().size).unwrap()];
        disk.read_at(0, &mut content).unwrap();
        drop(disk);
        let disk = open_child(&path, Access::ReadWrite).unwrap();
        let sector = u64::from(disk.geometry().logical_sector);
        let block = usize::try_from(disk.block_size()).unwrap();
        for at in (0..content.len()).step_by(block) {
            let at = at + 5 * usize::try_from(sector).unwrap();
            let held = content[at..at + 4096].to_vec();
            disk.write_at(at as u64, &[7; 4096], Fua::Yes).unwrap();
            disk.write_at(at as u64, &held, Fua::No).unwrap();
        }
        disk.close().unwrap();
        let disk = open_child(&path, Access::ReadOnly).unwrap();
        assert_eq!(Some(digest(&disk)), expected, "{child}, written to");
        assert!(fs::read(&parent_path).unwrap() == before[1]);
        if let Some(theirs) = seven_zip(&path) {
            assert!(theirs == content, "{child}: 7zz reads something else");
        }
    }
}

/// Bytes that differ everywhere.
fn pattern(seed: u8, len: usize) -> Vec<u8> {
    let mut state = u32::from(seed) + 1;
    let next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        state.to_le_bytes()[3]
    };
    std::iter::repeat_with(next).take(len).collect()
}

fn create_child(parent: &Path, path: &Path, block_size: u32) -> VhdxDisk {
    let storage = FileStorage::create_new(path).unwrap();
    let file: Arc<dyn Storage> = Arc::new(FileStorage::open(parent, Access::ReadOnly).unwrap());
    let paths = ParentPaths {
        relative: Some(format!(
            r".\{}",
            parent.file_name().unwrap().to_str().unwrap()
        )),
        ..ParentPaths::default()
    };
    vhdx::create_child(&storage, &file, &paths, block_size, ids().as_ref()).unwrap();
    open_child(path, Access::ReadWrite).unwrap()
}

fn create_parent(path: &Path, options: &CreateOptions) -> VhdxDisk {
    let storage = Arc::new(FileStorage::create_new(path).unwrap());
    vhdx::create(storage.as_ref(), options, ids().as_ref()).unwrap();
    VhdxDisk::open(storage, &Opening::new(Access::ReadWrite, ids())).unwrap()
}

/// Writes and discards here and there, in a disk and in what it should hold.
fn scribble(disk: &dyn Disk, content: &mut [u8], seed: u8) {
    let size = content.len();
    for (number, at) in (0..size - 70_000)
        .step_by(700_001 + usize::from(seed))
        .enumerate()
    {
        let len = 512 * (1 + number % 130);
        let bytes = pattern(seed ^ u8::try_from(number % 251).unwrap(), len);
        if number % 4 == 3 {
            let run = understudy::base::units::Extent::new(at as u64, 3 * MIB);
            let len = run.len.min(size as u64 - run.offset);
            let run = understudy::base::units::Extent::new(run.offset, len);
            disk.zero(run, Space::Release, Fua::No).unwrap();
            content[at..at + usize::try_from(len).unwrap()].fill(0);
        }
        disk.write_at(at as u64, &bytes, Fua::No).unwrap();
        content[at..at + len].copy_from_slice(&bytes);
    }
}

#[test]
fn other_programs_read_our_children() {
    let dir = tempfile::tempdir().unwrap();
    let dynamic = CreateOptions {
        size: 21 << 20,
        block_size: 1 << 20,
        kind: Kind::Dynamic,
        logical_sector: 512,
        physical_sector: 4096,
    };
    let cases = [
        (dynamic, 2 << 20),
        (
            CreateOptions {
                kind: Kind::Fixed,
                ..dynamic
            },
            1 << 20,
        ),
        (
            CreateOptions {
                logical_sector: 4096,
                physical_sector: 512,
                block_size: 4 << 20,
                ..dynamic
            },
            2 << 20,
        ),
    ];
    for (number, (options, block_size)) in cases.into_iter().enumerate() {
        let path = |name: &str| dir.path().join(format!("{name}{number}.vhdx"));
        let (parent, child, grandchild) = (path("parent"), path("child"), path("grandchild"));
        let mut content = vec![0; usize::try_from(options.size).unwrap()];
        let disk = create_parent(&parent, &options);
        scribble(&disk, &mut content, 1);
        disk.close().unwrap();
        let mut below = content.clone();
        for (above, image, seed) in [(&parent, &child, 2), (&child, &grandchild, 3)] {
            let disk = create_child(above, image, block_size);
            scribble(&disk, &mut content, seed);
            disk.close().unwrap();
            check_child(image);
            let raw: PathBuf = dir.path().join("parent.raw");
            fs::write(&raw, &below).unwrap();
            for theirs in [seven_zip(image), dumped(image, &raw)]
                .into_iter()
                .flatten()
            {
                assert!(theirs == content, "{image:?} of {options:?}");
            }
            let disk = open_child(image, Access::ReadOnly).unwrap();
            let raw = reference(&raw, &content);
            assert_same(&disk, raw.as_ref());
            below.clone_from(&content);
        }
    }
}

fn reference(path: &Path, content: &[u8]) -> Arc<dyn Disk> {
    fs::write(path, content).unwrap();
    let storage = Arc::new(FileStorage::open(path, Access::ReadOnly).unwrap());
    image::open(storage, Format::Raw, &super::reading()).unwrap()
}

/// A child behind a mount is a disk like any other: it is read through its chain, written to, tracked and replicated,
/// and the replica's image is whole by itself.
#[test]
fn a_mounted_child_is_tracked_and_its_replica_is_whole() {
    if !can_mount() {
        return;
    }
    let hosts = Hosts::new();
    let folder = hosts.path("images");
    fs::create_dir(&folder).unwrap();
    let (parent, image) = (folder.join("base.vhdx"), folder.join("disk.vhdx"));
    let options = CreateOptions {
        size: 32 << 20,
        block_size: 1 << 20,
        kind: Kind::Dynamic,
        logical_sector: 512,
        physical_sector: 4096,
    };
    let mut content = vec![0; 32 << 20];
    let disk = create_parent(&parent, &options);
    scribble(&disk, &mut content, 1);
    disk.close().unwrap();
    let disk = create_child(&parent, &image, 2 << 20);
    scribble(&disk, &mut content, 2);
    disk.close().unwrap();
    drop(disk);
    let replica = hosts.replica(&[]);

    let (code, said) = hosts.primary_command(&[&image], &[]).fails();
    assert!(code == 1 && said.contains("--parents"), "{code}: {said}");
    let empty = hosts.path("empty");
    fs::create_dir(&empty).unwrap();
    let elsewhere = ["--parents", empty.to_str().unwrap()];
    let (code, said) = hosts.primary_command(&[&image], &elsewhere).fails();
    assert!(code == 1 && said.contains("base.vhdx"), "{code}: {said}");

    let before = fs::read(&parent).unwrap();
    let here = ["--parents", folder.to_str().unwrap()];
    let primary = hosts.primary(&[&image], &here);
    primary.wait_replicating();
    let file = fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(hosts.disk("disk"))
        .unwrap();
    let mut held = vec![0; content.len()];
    file.read_exact_at(&mut held, 0).unwrap();
    assert!(held == content, "the mount shows the chain");
    let busy = fs::File::open(&parent).unwrap().try_lock();
    assert!(busy.is_err(), "nobody else opens the parent for writing");
    for at in [0, 5 * MIB + 4096, 31 * MIB] {
        file.write_all_at(&[9; 4096], at).unwrap();
        let at = usize::try_from(at).unwrap();
        content[at..at + 4096].fill(9);
    }
    drop(file);
    let lineage = primary.cut();
    assert_eq!(replica.merged().durable, Some(lineage));
    primary.stop();
    replica.stop();

    assert!(
        fs::read(&parent).unwrap() == before,
        "a parent is never written to"
    );
    let copy = hosts.replica_image("disk", Format::Vhdx);
    let raw = hosts.path("content.raw");
    let expected = reference(&raw, &content);
    assert_same(
        &open_child(&image, Access::ReadOnly).unwrap(),
        expected.as_ref(),
    );
    assert_identical(&raw, &copy);
    let storage = Arc::new(FileStorage::open(&copy, Access::ReadOnly).unwrap());
    let whole = VhdxDisk::open(storage, &super::reading()).unwrap();
    assert_eq!(whole.kind(), Kind::Dynamic);
}
