//! The largest disks there are, in files of the host: what an open reads of them.

use std::{os::unix::fs::FileExt, path::Path};

use super::*;
use crate::{
    base::units::{MIB, TIB, to_u64},
    disk::{Content, Fua, vhdx::numbering::Numbering},
    storage::{Space, file::FileStorage},
};

/// A file that counts what is read of it.
#[derive(Debug)]
struct Counting {
    file: FileStorage,
    read: AtomicU64,
}

impl Storage for Counting {
    fn len(&self) -> std::io::Result<u64> {
        self.file.len()
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> std::io::Result<()> {
        self.read.fetch_add(to_u64(buf.len()), Ordering::Relaxed);
        self.file.read_at(offset, buf)
    }

    fn write_at(&self, offset: u64, buf: &[u8], fua: Fua) -> std::io::Result<()> {
        self.file.write_at(offset, buf, fua)
    }

    fn zero(&self, run: crate::base::units::Extent, space: Space) -> std::io::Result<()> {
        self.file.zero(run, space)
    }

    fn data_after(&self, offset: u64) -> std::io::Result<Option<crate::base::units::Extent>> {
        self.file.data_after(offset)
    }

    fn set_len(&self, len: u64) -> std::io::Result<()> {
        self.file.set_len(len)
    }

    fn sync(&self) -> std::io::Result<()> {
        self.file.sync()
    }
}

/// A disk of 64 TiB with `present` blocks at equal distances.
fn image(place: &Path, block_size: u32, present: u64) -> u64 {
    let storage = FileStorage::create_new(place).unwrap();
    let options = CreateOptions {
        size: 64 * TIB,
        block_size,
        kind: Kind::Dynamic,
        logical_sector: 512,
        physical_sector: 4096,
    };
    create(&storage, &options, ids().as_ref()).unwrap();
    let first = storage.len().unwrap();
    let disk = open_as(Arc::new(storage), Access::ReadOnly).unwrap();
    let distance = disk.bat.blocks() / present.max(1);
    let numbering = Numbering::new(&disk.parameters);
    let file = std::fs::File::options().write(true).open(place).unwrap();
    let block_size = u64::from(block_size);
    for number in 0..present {
        let entry = numbering::Entry::present(first + number * block_size);
        let at = 3 * MIB + numbering.entry(number * distance) * 8;
        file.write_all_at(&entry.to_bytes(), at).unwrap();
    }
    file.set_len(first + present * block_size).unwrap();
    distance * block_size
}

#[test]
fn opening_the_largest_disk_reads_a_bounded_part_of_it() {
    let folder = tempfile::tempdir().unwrap();
    for block_size in [1 << 20, 2 << 20, 32 << 20] {
        for present in [0, 100_000] {
            let place = folder.path().join(format!("{block_size}-{present}.vhdx"));
            let distance = image(&place, block_size, present);
            let storage = Arc::new(Counting {
                file: FileStorage::open(&place, Access::ReadWrite).unwrap(),
                read: AtomicU64::new(0),
            });
            let disk = open(&storage).unwrap();
            let read = storage.read.load(Ordering::Relaxed);
            assert!(read < 6 * MIB, "an open reads {read} bytes");
            // A block far behind what was read, and one that is not there.
            if let Some(last) = present.checked_sub(1) {
                let last = last * distance / u64::from(block_size);
                assert!(disk.bat.location(last).unwrap().is_some());
            }
            let mut held = [0xAA; 512];
            disk.read_at(64 * TIB - 512, &mut held).unwrap();
            assert_eq!(held, [0; 512]);
            assert_eq!(disk.run_at(64 * TIB - MIB).unwrap().1, Content::Zero);
            disk.write_at(64 * TIB - 512, &[1; 512], Fua::No).unwrap();
            disk.close().unwrap();
            std::fs::remove_file(&place).unwrap();
        }
    }
}

/// What an open did not read is checked when it is wanted, and as a whole before the first write.
#[test]
fn a_damaged_entry_far_behind_is_refused_before_it_does_harm() {
    let folder = tempfile::tempdir().unwrap();
    let place = folder.path().join("damaged.vhdx");
    let distance = image(&place, 1 << 20, 100_000);
    let storage = Arc::new(FileStorage::open(&place, Access::ReadWrite).unwrap());
    let disk = open(&storage).unwrap();
    let numbering = Numbering::new(&disk.parameters);
    let of = |number: u64| numbering.entry(number * distance / MIB) * 8 + 3 * MIB;
    // The last block's entry names the place of the first one.
    let mut first = [0; 8];
    storage.read_at(of(0), &mut first).unwrap();
    storage.write_at(of(99_999), &first, Fua::No).unwrap();
    let before = storage.len().unwrap();
    disk.read_at(0, &mut [0; 512]).unwrap();
    for _ in 0..2 {
        let refused = disk.read_at(99_999 * distance, &mut [0; 512]);
        let told = format!("{:?}", refused.unwrap_err());
        assert!(told.contains("belongs to something else"), "{told}");
        disk.write_at(0, &[1; 512], Fua::No).unwrap_err();
    }
    disk.close().unwrap();
    assert_eq!(storage.len().unwrap(), before);
    let mut header = [0; 8];
    storage.read_at(0x10008, &mut header).unwrap();
    assert_eq!(u64::from_le_bytes(header), 1, "nothing was written");
}
