//! VHD images: those of others, and ours in front of others.

use std::os::unix::fs::MetadataExt;

use understudy::disk::{
    parents::ParentRoot,
    vhd::{self, CreateOptions, Kind},
};

use super::*;

/// Samples in which no checksum is right, because an identity was changed by hand: they are for reading only.
const UNSEALED: [&str; 2] = ["dfvfs/image.vhd.gz", "dfvfs/image-differential.vhd.gz"];
/// An empty disk of Virtual PC: it ends where its geometry ends.
const EMPTY: (&str, u64) = ("qemu/virtualpc-dynamic.vhd.bz2", 136_363_130_880);

/// Whether a sample of the catalogue is a VHD.
pub(super) fn is_one(sample: &Sample) -> bool {
    sample.file.contains(".vhd.")
}

fn open_as(path: &Path, access: Access) -> Result<Arc<dyn Disk>, image::OpenError> {
    let storage = FileStorage::open(path, access).unwrap();
    let parents = ParentRoot::new(path.parent().unwrap(), path).unwrap();
    let opening = Opening::new(access, ids()).with_parents(Arc::new(parents));
    image::open(Arc::new(storage), Format::Vhd, &opening)
}

fn create(path: &Path, options: &CreateOptions) {
    let storage = FileStorage::create_new(path).unwrap();
    vhd::create(&storage, options, ids().as_ref()).unwrap();
}

#[test]
fn vhd_samples_read_as_their_makers_meant() {
    let Some(shared) = shared() else { return };
    let catalog = fs::read_to_string(shared.join("disks/catalog.toml")).unwrap();
    let catalog: Catalog = toml::from_str(&catalog).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let samples: Vec<_> = catalog.disk.iter().filter(|disk| is_one(disk)).collect();
    let place = |sample: &Sample| dir.path().join(&sample.file).with_extension("");
    for sample in &samples {
        fs::create_dir_all(place(sample).parent().unwrap()).unwrap();
        unpack(&shared.join("disks").join(&sample.file), &place(sample)).unwrap();
    }
    for sample in &samples {
        assert!(!sample.refuse);
        let (path, file) = (place(sample), sample.file.as_str());
        let before = fs::read(&path).unwrap();
        let disk = open_as(&path, Access::ReadOnly).unwrap_or_else(|e| panic!("{file}: {e}"));
        if let Some(wanted) = &sample.raw_sha256 {
            assert_eq!(digest(disk.as_ref()), *wanted, "{file}");
        } else {
            assert_eq!((file, disk.geometry().size), EMPTY);
            let all = Extent::new(0, EMPTY.1);
            assert_eq!(disk.run_at(0).unwrap(), (all, Content::Zero));
        }
        drop(disk);
        assert!(fs::read(&path).unwrap() == before, "{file}: changed");
        let storage: Arc<dyn Storage> =
            Arc::new(FileStorage::open(&path, Access::ReadOnly).unwrap());
        let seen = image::detect(storage.as_ref()).unwrap();
        assert_eq!(seen, Some(Format::Vhd), "{file}");
        let unsealed = UNSEALED.contains(&file);
        let report = image::check(&storage, Format::Vhd);
        assert_eq!(report.is_sound(), !unsealed, "{file}: {report:?}");
        let writable = open_as(&path, Access::ReadWrite);
        assert_eq!(writable.is_err(), unsealed, "{file}");
        if let Ok(disk) = writable {
            write_and_restore(disk.as_ref());
            drop(disk);
            let disk = open_as(&path, Access::ReadOnly).unwrap();
            if let Some(wanted) = &sample.raw_sha256 {
                assert_eq!(digest(disk.as_ref()), *wanted, "{file}: written to");
            }
        }
    }
    assert_eq!(samples.len(), 9);
}

fn write_and_restore(disk: &dyn Disk) {
    let last = disk.geometry().size - 4096;
    let mut held = [0; 4096];
    disk.read_at(last, &mut held).unwrap();
    disk.write_at(last, &[7; 4096], Fua::Yes).unwrap();
    disk.write_at(last, &held, Fua::No).unwrap();
    disk.close().unwrap();
}

/// Whether Python has a module.
fn has_module(name: &str) -> bool {
    let (found, _) = run(Command::new("python3").args(["-c", &format!("import {name}")]));
    if !found {
        eprintln!("SKIPPED: Python has no module {name}");
    }
    found
}

/// Prints the SHA-256 of a disk as libvhdi and dissect.hypervisor read it.
const LIBVHDI: &str = "
import sys, hashlib, pyvhdi
f = pyvhdi.file(); f.open(sys.argv[1]); h = hashlib.sha256(); n = f.get_media_size()
while n > 0: b = f.read_buffer(min(n, 1 << 20)); h.update(b); n -= len(b)
print(h.hexdigest())";
const DISSECT: &str = "
import sys, hashlib
from dissect.hypervisor.disk.vhd import VHD
f = VHD(open(sys.argv[1], 'rb')); h = hashlib.sha256(); n = f.size
while n > 0: b = f.read(min(n, 1 << 20)); h.update(b); n -= len(b)
print(h.hexdigest())";

/// Asks every independent reader there is whether the disk in `path` is that in `raw`.
fn assert_all_agree(path: &Path, raw: &Path, story: &str) {
    let reference = Arc::new(FileStorage::open(raw, Access::ReadOnly).unwrap());
    let opening = Opening::new(Access::ReadOnly, ids());
    let reference = image::open(reference, Format::Raw, &opening).unwrap();
    let ours = open_as(path, Access::ReadOnly).unwrap();
    assert_same(ours.as_ref(), reference.as_ref());
    let storage: Arc<dyn Storage> = Arc::new(FileStorage::open(path, Access::ReadOnly).unwrap());
    let report = image::check(&storage, Format::Vhd);
    assert_eq!(report.findings, [], "{story}");
    if installed("qemu-img") {
        let (same, text) = run(Command::new("qemu-img")
            .args(["compare", "-f", "vpc", "-F", "raw"])
            .args([path, raw]));
        assert!(same, "{story}: qemu-img: {text}");
    }
    let wanted = digest(reference.as_ref());
    if installed("7zz") {
        let command = "7zz x -so -tvhd \"$0\" | sha256sum";
        let (_, text) = run(Command::new("sh").args(["-c", command]).arg(path));
        assert!(text.contains(&wanted), "{story}: 7zz: {text}");
        let (good, text) = run(Command::new("7zz").args(["t", "-tvhd"]).arg(path));
        let bad = text.contains("WARNING") || text.contains("ERROR");
        assert!(good && !bad, "{story}: 7zz: {text}");
    }
    for (module, script) in [("pyvhdi", LIBVHDI), ("dissect.hypervisor", DISSECT)] {
        if has_module(module) {
            let (good, text) = run(Command::new("python3").args(["-c", script]).arg(path));
            assert!(good && text.contains(&wanted), "{story}: {module}: {text}");
        }
    }
}

/// Writes around every boundary there is, and discards a block, in the image and in the raw file.
fn change(path: &Path, raw: &Path, block: u64) {
    let disk = open_as(path, Access::ReadWrite).unwrap();
    let size = disk.geometry().size;
    let reference = FileStorage::open(raw, Access::ReadWrite).unwrap();
    for (number, at) in (1u8..).zip([0, block, 3 * block, size / 2, size]) {
        let start = at.min(size).saturating_sub(12288);
        let bytes = vec![number; to_usize((size - start).min(24576))];
        disk.write_at(start, &bytes, Fua::No).unwrap();
        reference.write_at(start, &bytes, Fua::No).unwrap();
    }
    let discarded = Extent::new(block, block.min(size - block));
    disk.zero(discarded, Space::Release, Fua::No).unwrap();
    reference.zero(discarded, Space::Keep).unwrap();
    disk.write_at(block + 512, &[0xEE; 512], Fua::No).unwrap();
    reference
        .write_at(block + 512, &[0xEE; 512], Fua::No)
        .unwrap();
    disk.close().unwrap();
}

const DYNAMIC: CreateOptions = CreateOptions {
    size: (9 << 20) + 512,
    block_size: vhd::BLOCK_BYTES_DEFAULT,
    kind: Kind::Dynamic,
};

#[test]
fn other_programs_read_our_vhd_images() {
    let dir = tempfile::tempdir().unwrap();
    let (path, raw) = (dir.path().join("a.vhd"), dir.path().join("a.raw"));
    let cases = [
        DYNAMIC,
        CreateOptions {
            block_size: 512 * 1024,
            ..DYNAMIC
        },
        CreateOptions {
            block_size: 16 << 20,
            size: 34 << 20,
            ..DYNAMIC
        },
        CreateOptions {
            kind: Kind::Fixed,
            ..DYNAMIC
        },
    ];
    for options in cases {
        let story = format!("{options:?}");
        create(&path, &options);
        let reference = FileStorage::create_new(&raw).unwrap();
        reference.set_len(options.size).unwrap();
        assert_all_agree(&path, &raw, &story);
        change(&path, &raw, u64::from(options.block_size));
        assert_all_agree(&path, &raw, &story);
        // Larger: the table moves when there are many blocks more; and back to where data ends.
        for size in [options.size + 512, 1 << 30, options.size + (10 << 20)] {
            let storage = FileStorage::open(&path, Access::ReadWrite).unwrap();
            vhd::resize(&storage, size).unwrap();
            reference.set_len(size).unwrap();
            assert_eq!(
                open_as(&path, Access::ReadOnly).unwrap().geometry().size,
                size
            );
            if size < 100 << 20 {
                assert_all_agree(&path, &raw, &format!("{story}, then {size}"));
            }
        }
        change(&path, &raw, u64::from(options.block_size));
        assert_all_agree(&path, &raw, &story);
        if installed("qemu-io") {
            for (format, file) in [("vpc", &path), ("raw", &raw)] {
                let (good, text) = run(Command::new("qemu-io")
                    .args(["-f", format, "-c", "write -P 0x5A 10M 3M"])
                    .arg(file));
                assert!(good, "{story}: {text}");
            }
            let (ours, theirs) = [(&path, Format::Vhd), (&raw, Format::Raw)]
                .map(|(file, format)| {
                    let storage = Arc::new(FileStorage::open(file, Access::ReadOnly).unwrap());
                    let opening = Opening::new(Access::ReadOnly, ids());
                    image::open(storage, format, &opening).unwrap()
                })
                .into();
            assert_same(ours.as_ref(), theirs.as_ref());
        }
        fs::remove_file(&path).unwrap();
        fs::remove_file(&raw).unwrap();
    }
}

#[test]
fn images_of_qemu_are_written_to() {
    if !installed("qemu-img") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (path, raw) = (dir.path().join("q.vhd"), dir.path().join("q.raw"));
    for options in [
        "subformat=dynamic",
        "subformat=dynamic,force_size=on",
        "subformat=fixed",
        "subformat=fixed,force_size=on",
    ] {
        let (good, text) = run(Command::new("qemu-img")
            .args(["create", "-f", "vpc", "-o", options])
            .arg(&path)
            .arg("11M"));
        assert!(good, "{text}");
        let size = open_as(&path, Access::ReadOnly).unwrap().geometry().size;
        let reference = FileStorage::create_new(&raw).unwrap();
        reference.set_len(size).unwrap();
        change(&path, &raw, 2 << 20);
        assert_all_agree(&path, &raw, options);
        fs::remove_file(&path).unwrap();
        fs::remove_file(&raw).unwrap();
    }
}

/// A discard gives the space of whole blocks back.
#[test]
fn a_discard_gives_space_back_to_the_host() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.vhd");
    create(&path, &DYNAMIC);
    let disk = open_as(&path, Access::ReadWrite).unwrap();
    disk.write_at(0, &vec![1; 8 << 20], Fua::No).unwrap();
    disk.flush().unwrap();
    let taken = |path: &Path| fs::metadata(path).unwrap().blocks() * 512;
    assert!(taken(&path) >= 8 << 20);
    disk.zero(Extent::new(0, 8 << 20), Space::Release, Fua::Yes)
        .unwrap();
    assert!(taken(&path) < 1 << 20, "{}", taken(&path));
    disk.close().unwrap();
}

/// A guest writes every byte of a raw or fixed disk: a second format's sign makes the first one doubtful.
#[test]
fn a_fixed_vhd_is_known_by_its_end_alone() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    let options = CreateOptions {
        size: 1 << 20,
        kind: Kind::Fixed,
        ..DYNAMIC
    };
    create(&path, &options);
    let detect = || {
        let storage = FileStorage::open(&path, Access::ReadOnly).unwrap();
        image::detect(&storage).unwrap()
    };
    assert_eq!(detect(), Some(Format::Vhd));
    let disk = open_as(&path, Access::ReadWrite).unwrap();
    assert_eq!(disk.geometry().size, 1 << 20);
    disk.write_at(0, vhdx::SIGNATURE, Fua::No).unwrap();
    assert_eq!(detect(), None);
    disk.write_at(0, &[0; 8], Fua::No).unwrap();
    disk.close().unwrap();
    let storage = FileStorage::open(&path, Access::ReadWrite).unwrap();
    storage.set_len(1 << 20).unwrap();
    assert_eq!(detect(), None);
}
