//! Images of other programs read as those programs meant them, and other programs find our images sound.
#![expect(
    clippy::unwrap_used,
    clippy::print_stderr,
    reason = "a test's helpers fail as the test does, and what is skipped is said aloud"
)]

mod differencing;

use std::{
    fs::{self, File},
    io::{self, Read},
    path::Path,
    process::Command,
    sync::Arc,
};

use serde::Deserialize;
use understudy::{
    base::{
        checksum::Sha256,
        ids::{Ids, SystemIds},
        units::{Extent, to_usize},
    },
    disk::{
        Access, Content, Disk, Fua, Geometry, Opening, Space,
        image::{self, Format},
        vhdx::{self, CreateOptions, Kind, VhdxDisk},
    },
    storage::{Storage, file::FileStorage},
};

mod vhd;

use crate::support::shared;

const MIB: u64 = 1 << 20;

#[derive(Deserialize)]
struct Catalog {
    disk: Vec<Sample>,
}

#[derive(Deserialize)]
struct Sample {
    file: String,
    #[serde(default)]
    refuse: bool,
    raw_sha256: Option<String>,
}

/// Samples that this program does not read yet, each with the reason. It must refuse them; none is passed in silence.
const NOT_YET: [(&str, &str); 0] = [];

fn ids() -> Arc<dyn Ids> {
    Arc::new(SystemIds::default())
}

fn reading() -> Opening {
    Opening::new(Access::ReadOnly, ids())
}

fn catalog(folder: &Path) -> Vec<Sample> {
    let text = fs::read_to_string(folder.join("catalog.toml")).unwrap();
    let catalog: Catalog = toml::from_str(&text).unwrap();
    catalog.disk
}

/// What the shared catalogue says of one file.
fn sample(file: &str) -> Sample {
    let samples = catalog(&shared().unwrap().join("disks"));
    samples
        .into_iter()
        .find(|sample| sample.file == file)
        .unwrap()
}

fn unpack(sample: &Path, target: &Path) -> io::Result<()> {
    let packed = File::open(sample)?;
    let mut unpacked: Box<dyn Read> = match sample.extension().and_then(|e| e.to_str()) {
        Some("gz") => Box::new(flate2::read::GzDecoder::new(packed)),
        Some("bz2") => Box::new(bzip2::read::MultiBzDecoder::new(packed)),
        _ => Box::new(packed),
    };
    io::copy(&mut unpacked, &mut File::create(target)?).map(drop)
}

/// SHA-256 of the whole disk; runs known to be zeros are not read.
fn digest(disk: &dyn Disk) -> String {
    let zeros = vec![0; to_usize(MIB)];
    let mut buf = zeros.clone();
    let mut digest = Sha256::default();
    let size = disk.geometry().size;
    let mut at = 0;
    while at < size {
        let (run, content) = disk.run_at(at).unwrap();
        assert!(run.offset == at && run.len > 0 && run.end() <= size);
        while at < run.end() {
            let len = to_usize((run.end() - at).min(MIB));
            match content {
                Content::Zero => digest.update(&zeros[..len]),
                Content::Data => {
                    disk.read_at(at, &mut buf[..len]).unwrap();
                    digest.update(&buf[..len]);
                }
            }
            at += len as u64;
        }
    }
    digest.finish().to_string()
}

/// Compares two disks; what both know to be zeros is not read.
fn assert_same(disk: &dyn Disk, other: &dyn Disk) {
    let size = disk.geometry().size;
    assert_eq!(size, other.geometry().size);
    let mut bytes = [vec![0; to_usize(MIB)], vec![0; to_usize(MIB)]];
    let mut at = 0;
    while at < size {
        let runs = [disk.run_at(at).unwrap(), other.run_at(at).unwrap()];
        let end = runs[0].0.end().min(runs[1].0.end());
        if runs.iter().all(|(_, content)| *content == Content::Zero) {
            at = end;
            continue;
        }
        let len = to_usize((end - at).min(MIB));
        for (disk, bytes) in [disk, other].into_iter().zip(&mut bytes) {
            disk.read_at(at, &mut bytes[..len]).unwrap();
        }
        assert!(
            bytes[0][..len] == bytes[1][..len],
            "difference near {at:#x}"
        );
        at += len as u64;
    }
}

fn open_file(path: &Path, access: Access) -> Result<Arc<dyn Disk>, String> {
    let storage = Arc::new(FileStorage::open(path, access).map_err(|e| e.to_string())?);
    let format = image::detect(storage.as_ref()).map_err(|e| e.to_string())?;
    let format = format.ok_or("no known signature")?;
    image::open(storage, format, &Opening::new(access, ids())).map_err(|e| e.to_string())
}

#[test]
fn samples_read_as_their_makers_meant() {
    let Some(shared) = shared() else { return };
    let dir = tempfile::tempdir().unwrap();
    let (mut read, mut refused) = (0, 0);
    for sample in &catalog(&shared.join("disks")) {
        if differencing::is_child(&sample.file) || vhd::is_one(sample) {
            continue;
        }
        let path = dir.path().join("image");
        unpack(&shared.join("disks").join(&sample.file), &path).unwrap();
        let before = fs::read(&path).unwrap();
        let not_yet = NOT_YET.iter().find(|(file, _)| *file == sample.file);
        match (open_file(&path, Access::ReadOnly), not_yet) {
            (Err(error), Some((file, reason))) => eprintln!("not yet: {file}: {reason}: {error}"),
            (Err(error), None) => {
                assert!(sample.refuse, "{}: {error}", sample.file);
                refused += 1;
            }
            (Ok(_), Some(_)) => panic!("{}: opens, take it off the list", sample.file),
            (Ok(disk), None) => {
                assert!(!sample.refuse, "{}: opens", sample.file);
                let wanted = sample.raw_sha256.as_deref().unwrap();
                assert_eq!(digest(disk.as_ref()), wanted, "{}", sample.file);
                read += 1;
            }
        }
        assert!(
            fs::read(&path).unwrap() == before,
            "{}: opening for reading left its traces",
            sample.file
        );
        if not_yet.is_none() && !sample.refuse {
            reopen_for_writing(&path, sample);
        } else {
            open_file(&path, Access::ReadWrite).unwrap_err();
        }
    }
    assert!(read >= 14 && refused >= 5, "{read} read, {refused} refused");
}

#[test]
fn our_own_samples_read_as_qemu_does() {
    if !installed("qemu-io") {
        return;
    }
    let here = Path::new(env!("CARGO_MANIFEST_DIR")).join("disks");
    let dir = tempfile::tempdir().unwrap();
    let (good, text) = run(Command::new(here.join("make.sh")).arg(dir.path()));
    assert!(good, "{text}");
    for sample in &catalog(&here) {
        let path = dir.path().join(&sample.file);
        let storage = Arc::new(FileStorage::open(&path, Access::ReadOnly).unwrap());
        let format = image::detect(storage.as_ref()).unwrap();
        assert_eq!(format.is_none(), sample.file == "plain.raw");
        let format = format.unwrap_or(Format::Raw);
        let disk = image::open(storage, format, &reading()).unwrap();
        assert_eq!(
            Some(digest(disk.as_ref())),
            sample.raw_sha256,
            "{}",
            sample.file
        );
    }
}

/// What is opened for writing, written to and closed is sound to everybody and holds what it held.
fn reopen_for_writing(path: &Path, sample: &Sample) {
    let disk = open_file(path, Access::ReadWrite).unwrap();
    let last = disk.geometry().size - 4096;
    let mut held = [0; 4096];
    disk.read_at(last, &mut held).unwrap();
    disk.write_at(last, &[7; 4096], Fua::Yes).unwrap();
    disk.write_at(last, &held, Fua::No).unwrap();
    disk.close().unwrap();
    check(path, disk.geometry());
    let disk = open_file(path, Access::ReadOnly).unwrap();
    // The large ones have been hashed once.
    if disk.geometry().size <= 1 << 30 {
        assert_eq!(Some(digest(disk.as_ref())), sample.raw_sha256);
    }
}

fn run(command: &mut Command) -> (bool, String) {
    let output = command.output().unwrap();
    let mut text = String::from_utf8_lossy(&output.stdout).into_owned();
    text += &String::from_utf8_lossy(&output.stderr);
    (output.status.success(), text)
}

fn installed(tool: &str) -> bool {
    let found = Command::new("sh")
        .args(["-c", &format!("command -v {tool}")])
        .output()
        .is_ok_and(|output| output.status.success());
    if !found {
        eprintln!("SKIPPED: {tool} is not installed");
    }
    found
}

/// Asks every independent checker there is.
fn check(path: &Path, geometry: Geometry) {
    let Geometry {
        size,
        logical_sector,
        ..
    } = geometry;
    if logical_sector == 512 && installed("qemu-img") {
        let (good, text) = run(Command::new("qemu-img")
            .args(["check", "-f", "vhdx"])
            .arg(path));
        assert!(good, "qemu-img: {text}");
    }
    if installed("7zz") {
        // Both open the image and check its table; the first reads all of the disk as well.
        let verb = if size <= 1 << 30 { "t" } else { "l" };
        let (good, text) = run(Command::new("7zz").args([verb, "-tvhdx"]).arg(path));
        let bad = text.contains("WARNING") || text.contains("ERROR");
        assert!(good && !bad, "7zz: {text}");
    }
    let dumper = shared().map(|place| place.join("tools/vhdx_dump.py"));
    if let Some(dumper) = dumper.filter(|path| path.exists()) {
        let (good, text) = run(Command::new("python3").arg(dumper).arg(path));
        // Writers of other programs leave these; they are not ours to change.
        let tolerated = ["Required flag is 0", "beyond end is", "reserved bytes"];
        let bad = text
            .lines()
            .filter(|line| line.contains("!!"))
            .find(|line| !tolerated.iter().any(|what| line.contains(what)));
        assert!(good && bad.is_none(), "vhdx_dump: {text}");
    }
}

fn create(path: &Path, options: &CreateOptions) -> VhdxDisk {
    let storage = Arc::new(FileStorage::create_new(path).unwrap());
    vhdx::create(storage.as_ref(), options, ids().as_ref()).unwrap();
    VhdxDisk::open(storage, &Opening::new(Access::ReadWrite, ids())).unwrap()
}

const DYNAMIC: CreateOptions = CreateOptions {
    size: (4 << 30) + (9 << 20),
    block_size: 1 << 20,
    kind: Kind::Dynamic,
    logical_sector: 512,
    physical_sector: 4096,
};

#[test]
fn other_programs_find_our_images_sound() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image.vhdx");
    let raw = dir.path().join("image.raw");
    let mib = |n: u32| n << 20;
    // 7-Zip opens no image, of qemu's either, whose size is not a multiple of 1 MiB.
    let cases = [
        DYNAMIC,
        CreateOptions {
            size: 600 << 20,
            block_size: mib(32),
            ..DYNAMIC
        },
        CreateOptions {
            size: 600 << 20,
            block_size: mib(256),
            ..DYNAMIC
        },
        CreateOptions {
            size: 301 << 20,
            block_size: mib(2),
            kind: Kind::Fixed,
            ..DYNAMIC
        },
        CreateOptions {
            size: 200 << 20,
            block_size: mib(8),
            logical_sector: 4096,
            ..DYNAMIC
        },
        CreateOptions {
            physical_sector: 512,
            size: 3 << 20,
            ..DYNAMIC
        },
    ];
    for options in cases {
        let disk = create(&path, &options);
        check(&path, disk.geometry());
        let reference = FileStorage::create_new(&raw).unwrap();
        reference.set_len(options.size).unwrap();
        // Around every boundary there is: blocks, the end of the first chunk, the end of the disk.
        let chunk = u64::from(options.logical_sector) << 23;
        let block = u64::from(options.block_size);
        let near = [0, block, 2 * block, chunk, options.size];
        for (number, at) in (1u8..).zip(near) {
            let start = at.min(options.size).saturating_sub(12288);
            let bytes = vec![number; to_usize((options.size - start).min(24576))];
            disk.write_at(start, &bytes, Fua::No).unwrap();
            reference.write_at(start, &bytes, Fua::No).unwrap();
        }
        let discarded = Extent::new(block, block.min(options.size - block));
        disk.zero(discarded, Space::Release, Fua::No).unwrap();
        reference.zero(discarded, Space::Release).unwrap();
        disk.close().unwrap();
        check(&path, disk.geometry());
        if options.logical_sector == 512 && installed("qemu-img") {
            let (same, text) = run(Command::new("qemu-img")
                .args(["compare", "-f", "vhdx", "-F", "raw"])
                .args([&path, &raw]));
            assert!(same, "{options:?}: {text}");
        }
        let reference = Arc::new(reference);
        let reference = image::open(reference, Format::Raw, &reading()).unwrap();
        assert_same(
            open_file(&path, Access::ReadOnly).unwrap().as_ref(),
            reference.as_ref(),
        );
        fs::remove_file(&path).unwrap();
        fs::remove_file(&raw).unwrap();
    }
}

#[test]
fn qemu_replays_the_log_of_an_image_that_was_not_closed() {
    if !installed("qemu-img") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image.vhdx");
    let disk = create(&path, &DYNAMIC);
    for at in [0, 7 * MIB, 4095 * MIB, 4097 * MIB] {
        disk.write_at(at + 512, &[9; 512], Fua::No).unwrap();
    }
    drop(disk);
    let copy = dir.path().join("copy.vhdx");
    fs::copy(&path, &copy).unwrap();
    let (good, text) = run(Command::new("qemu-img")
        .args(["check", "-r", "all", "-f", "vhdx"])
        .arg(&path));
    assert!(good, "{text}");
    let ours = open_file(&copy, Access::ReadOnly).unwrap();
    let theirs = open_file(&path, Access::ReadOnly).unwrap();
    let mut held = [0; 512];
    ours.read_at(4097 * MIB + 512, &mut held).unwrap();
    assert_eq!(held, [9; 512]);
    assert_same(ours.as_ref(), theirs.as_ref());
}

#[test]
fn raw_is_never_guessed() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    let storage = FileStorage::create_new(&path).unwrap();
    assert_eq!(image::detect(&storage).unwrap(), None);
    let geometry = Geometry {
        size: 1 << 20,
        logical_sector: 512,
        physical_sector: 4096,
    };
    image::create(
        &storage,
        &image::CreateOptions::new(Format::Raw, geometry),
        ids().as_ref(),
    )
    .unwrap();
    assert_eq!(image::detect(&storage).unwrap(), None);
    image::create(
        &storage,
        &image::CreateOptions::new(Format::Vhdx, geometry),
        ids().as_ref(),
    )
    .unwrap_err();
    assert_eq!("vhdx".parse(), Ok(Format::Vhdx));
    assert!("VHDX ".parse::<Format>().is_err());
}
