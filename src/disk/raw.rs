//! A raw image: the disk's bytes and nothing else, in a file or on a block device.
//!
//! # Crash contract
//! There is no metadata. A write is with the kernel when it returns and durable at the next flush. The size is the
//! file's length, which a resize changes and syncs.

use std::{io, sync::Arc};

use super::{
    Access, Content, Disk, DiskError, Fua, Geometry, ResizeError, Space, check_run, failed,
    pieces::stored_run, running::Running,
};
use crate::{
    base::{
        checksum::is_zero,
        limits::DISK_BYTES_MAX,
        units::{Extent, MIB, SECTOR_BYTES, to_u64, to_usize},
    },
    storage::Storage,
};

/// A disk in a raw image.
#[derive(Debug)]
pub struct RawDisk {
    storage: Arc<dyn Storage>,
    geometry: Geometry,
    access: Access,
    running: Running,
}

/// Why a file is not a raw image.
#[derive(Debug, thiserror::Error)]
pub enum RawError {
    /// The file could not be examined.
    #[error("cannot find the length of the raw image")]
    Io(#[from] io::Error),
    /// Not a whole number of sectors, or none at all.
    #[error(
        "a raw image has a multiple of {SECTOR_BYTES} bytes and is not empty, this one has {0} bytes"
    )]
    Length(u64),
}

impl RawDisk {
    /// The disk in `storage`, as large as that is now.
    pub fn open(storage: Arc<dyn Storage>, access: Access) -> Result<Self, RawError> {
        let size = storage.len()?;
        if size == 0 || size % SECTOR_BYTES != 0 {
            return Err(RawError::Length(size));
        }
        let geometry = Geometry {
            size,
            logical_sector: 512,
            physical_sector: 4096,
        };
        Ok(Self {
            storage,
            geometry,
            access,
            running: Running::new("raw"),
        })
    }

    fn check_write(&self) -> Result<(), DiskError> {
        self.running.check()?;
        if self.access == Access::ReadOnly {
            Err(DiskError::ReadOnly)
        } else {
            Ok(())
        }
    }
}

/// Gives the raw image in `storage` another size in bytes, durably. What is cut off must be zeros.
pub fn resize(storage: &dyn Storage, size: u64) -> Result<(), ResizeError> {
    check_size(size).map_err(|problem| ResizeError::Size { size, problem })?;
    let smallest = data_end(storage, size).map_err(failed("read", size))?;
    if smallest > size {
        let smallest = smallest.next_multiple_of(SECTOR_BYTES);
        return Err(ResizeError::InUse { size, smallest });
    }
    let change = || {
        storage.set_len(size)?;
        storage.sync()
    };
    Ok(change().map_err(failed("resize", size))?)
}

/// Whether a raw image can have `size` bytes; if not, why.
pub(super) fn check_size(size: u64) -> Result<(), String> {
    if size == 0 || !size.is_multiple_of(SECTOR_BYTES) {
        return Err(format!("it is no multiple of {SECTOR_BYTES}, or zero"));
    }
    if size > DISK_BYTES_MAX {
        return Err(format!("{DISK_BYTES_MAX} bytes is the largest"));
    }
    Ok(())
}

/// One past the last byte at or after `from` that is not zero, or `from`.
fn data_end(storage: &dyn Storage, from: u64) -> io::Result<u64> {
    let mut end = from;
    let mut at = from;
    let mut buf = vec![0; to_usize(MIB)];
    while let Some(data) = storage.data_after(at)? {
        at = data.offset.max(at);
        let part = &mut buf[..to_usize((data.end() - at).min(MIB))];
        storage.read_at(at, part)?;
        if !is_zero(part) {
            let last = part.iter().rposition(|&byte| byte != 0);
            end = at + last.map_or(0, to_u64) + 1;
        }
        at += to_u64(part.len());
    }
    Ok(end)
}

impl Disk for RawDisk {
    fn geometry(&self) -> Geometry {
        self.geometry
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), DiskError> {
        check_run(offset, buf.len(), self.geometry.size)?;
        self.storage
            .read_at(offset, buf)
            .map_err(failed("read", offset))
    }

    fn write_at(&self, offset: u64, buf: &[u8], fua: Fua) -> Result<(), DiskError> {
        check_run(offset, buf.len(), self.geometry.size)?;
        self.check_write()?;
        self.storage.write_at(offset, buf, fua).map_err(|source| {
            if fua == Fua::Yes {
                self.running.forced_write_failed(&source);
            }
            failed("write", offset)(source)
        })
    }

    fn zero(&self, run: Extent, space: Space, fua: Fua) -> Result<(), DiskError> {
        check_run(run.offset, to_usize(run.len), self.geometry.size)?;
        self.check_write()?;
        self.storage
            .zero(run, space)
            .map_err(failed("zero", run.offset))?;
        match fua {
            Fua::Yes => self.flush(),
            Fua::No => Ok(()),
        }
    }

    fn flush(&self) -> Result<(), DiskError> {
        if self.access == Access::ReadOnly {
            return Ok(());
        }
        self.check_write()?;
        self.storage.sync().map_err(|source| {
            self.running.sync_failed();
            DiskError::Io {
                operation: "flush",
                offset: 0,
                source,
            }
        })
    }

    fn run_at(&self, offset: u64) -> Result<(Extent, Content), DiskError> {
        let size = self.geometry.size;
        check_run(offset, 1, size)?;
        let (len, content) = stored_run(self.storage.as_ref(), offset, size - offset)
            .map_err(failed("read", offset))?;
        Ok((Extent::new(offset, len), content))
    }

    fn close(&self) -> Result<(), DiskError> {
        if self.access == Access::ReadOnly {
            return Ok(());
        }
        self.flush()?;
        self.running.close();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::memory::{MemoryStorage, Power};

    fn disk() -> (Arc<Power>, RawDisk) {
        let power = Power::new();
        let storage = MemoryStorage::new(&power);
        storage.set_len(1 << 20).unwrap();
        (power, RawDisk::open(storage, Access::ReadWrite).unwrap())
    }

    #[test]
    fn the_end_is_the_end() {
        let (_, disk) = disk();
        for (offset, len) in [
            ((1 << 20) - 511, 512),
            (1 << 20, 1),
            (u64::MAX, 1),
            (u64::MAX - 511, 512),
        ] {
            let refused = disk.write_at(offset, &vec![1; len], Fua::No);
            assert!(
                matches!(refused, Err(DiskError::OutOfRange { .. })),
                "{offset:#x}+{len}"
            );
        }
        disk.write_at((1 << 20) - 512, &[1; 512], Fua::No).unwrap();
    }

    #[test]
    fn only_zeros_are_cut_off() {
        let storage = MemoryStorage::new(&Power::new());
        storage.set_len(4 << 20).unwrap();
        storage.write_at(3 << 20, &[0; 4096], Fua::No).unwrap();
        storage.write_at((2 << 20) + 700, &[1], Fua::No).unwrap();
        let smallest_of = |size| match resize(storage.as_ref(), size) {
            Err(ResizeError::InUse { smallest, .. }) => Some(smallest),
            other => other.map(|()| None).unwrap(),
        };
        assert_eq!(smallest_of(1 << 20), Some((2 << 20) + 1024));
        assert_eq!(smallest_of((2 << 20) + 512), Some((2 << 20) + 1024));
        assert_eq!(storage.len().unwrap(), 4 << 20);
        assert_eq!(smallest_of((2 << 20) + 1024), None);
        assert_eq!(storage.len().unwrap(), (2 << 20) + 1024);
        assert_eq!(smallest_of(1 << 40), None);
        for size in [0, 1, 4097, DISK_BYTES_MAX + 512] {
            assert!(matches!(
                resize(storage.as_ref(), size),
                Err(ResizeError::Size { .. })
            ));
        }
        assert_eq!(storage.len().unwrap(), 1 << 40);
    }

    #[test]
    fn a_failed_flush_stops_the_disk() {
        let (power, disk) = disk();
        disk.write_at(0, &[1; 512], Fua::No).unwrap();
        power.fail_after(0, io::ErrorKind::Other);
        assert!(matches!(
            disk.flush(),
            Err(DiskError::Io {
                operation: "flush",
                ..
            })
        ));
        assert!(
            matches!(disk.flush(), Err(DiskError::Stopped(_))),
            "a second flush proves nothing"
        );
        assert!(matches!(
            disk.write_at(0, &[1; 512], Fua::No),
            Err(DiskError::Stopped(_))
        ));
        disk.read_at(0, &mut [0; 512]).unwrap();
    }
}
