//! VHD images: those of others, and ours in front of others.

use understudy::disk::vhd::{self, CreateOptions, Kind};

use super::*;

/// Whether a sample of the catalogue is a VHD.
pub(super) fn is_one(sample: &Sample) -> bool {
    sample.file.contains(".vhd.")
}

/// A guest writes every byte of a raw or fixed disk: a second format's sign makes the first one doubtful.
#[test]
fn a_fixed_vhd_is_known_by_its_end_alone() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    let storage = Arc::new(FileStorage::create_new(&path).unwrap());
    let options = CreateOptions {
        size: 1 << 20,
        block_size: vhd::BLOCK_BYTES_DEFAULT,
        kind: Kind::Fixed,
    };
    vhd::create(storage.as_ref(), &options, ids().as_ref()).unwrap();
    assert_eq!(image::detect(storage.as_ref()).unwrap(), Some(Format::Vhd));
    let disk = image::open(
        Arc::clone(&storage) as _,
        Format::Vhd,
        &Opening::new(Access::ReadWrite, ids()),
    )
    .unwrap();
    assert_eq!(disk.geometry().size, 1 << 20);
    disk.write_at(0, vhdx::SIGNATURE, Fua::No).unwrap();
    assert_eq!(image::detect(storage.as_ref()).unwrap(), None);
    disk.write_at(0, &[0; 8], Fua::No).unwrap();
    disk.close().unwrap();
    storage.set_len(1 << 20).unwrap();
    assert_eq!(image::detect(storage.as_ref()).unwrap(), None);
}
