//! The disk itself: opening an image, and the paths that every read and write takes.

use std::{
    fmt, io,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, Ordering},
    },
};

use crate::{
    base::units::{Extent, to_usize},
    disk::{Access, Content, Disk, DiskError, Fua, Geometry, Opening, Space, check_run},
    storage::Storage,
};

use super::{Kind, error::OpenError, footer::Footers};

/// A disk in a VHD image.
pub struct VhdDisk {
    storage: Arc<dyn Storage>,
    geometry: Geometry,
    access: Access,
    /// Set by the first write.
    written: AtomicBool,
    /// Why nothing may be written any more.
    stopped: OnceLock<String>,
}

impl VhdDisk {
    /// Opens the image in `storage`.
    pub fn open(storage: Arc<dyn Storage>, opening: &Opening) -> Result<Self, OpenError> {
        let footers = Footers::read(storage.as_ref())?;
        let current = footers.current()?;
        let size = current.size()?;
        match current.kind()? {
            Kind::Fixed if size > current.offset => {
                return Err(OpenError::corrupt(
                    "footer",
                    current.offset,
                    format!("the disk has {size} bytes and the file ends before"),
                ));
            }
            Kind::Fixed => {}
            Kind::Dynamic => return Err(OpenError::Unsupported("a block table".into())),
            Kind::Differencing => return Err(OpenError::Unsupported("a parent".into())),
        }
        Ok(Self {
            geometry: Geometry {
                size,
                logical_sector: 512,
                physical_sector: 512,
            },
            storage,
            access: opening.access,
            written: AtomicBool::new(false),
            stopped: OnceLock::new(),
        })
    }

    /// Nothing may be written from now on, because of `reason`.
    fn stop(&self, reason: &str) {
        if self.stopped.set(reason.to_owned()).is_ok() {
            tracing::error!(reason, "a VHD disk stopped");
        }
    }

    /// Refuses writes to a disk that is read-only or stopped.
    fn begin_write(&self) -> Result<(), DiskError> {
        if self.access == Access::ReadOnly {
            return Err(DiskError::ReadOnly);
        }
        self.check_running()?;
        if !self.written.load(Ordering::Acquire) {
            self.written.store(true, Ordering::Release);
        }
        Ok(())
    }

    fn check_running(&self) -> Result<(), DiskError> {
        match self.stopped.get() {
            Some(reason) => Err(DiskError::Stopped(reason.clone())),
            None => Ok(()),
        }
    }
}

impl Disk for VhdDisk {
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
        self.begin_write()?;
        self.storage
            .write_at(offset, buf, fua)
            .map_err(failed("write", offset))
    }

    fn zero(&self, run: Extent, _space: Space, fua: Fua) -> Result<(), DiskError> {
        check_run(run.offset, to_usize(run.len), self.geometry.size)?;
        self.begin_write()?;
        self.storage
            .zero(run, Space::Keep)
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
        self.check_running()?;
        if !self.written.load(Ordering::Acquire) {
            return Ok(());
        }
        self.storage.sync().map_err(|source| {
            self.stop("an earlier flush failed, and what it was to make durable may be lost");
            failed("flush", 0)(source)
        })
    }

    fn run_at(&self, offset: u64) -> Result<(Extent, Content), DiskError> {
        let size = self.geometry.size;
        check_run(offset, 1, size)?;
        let data = self
            .storage
            .data_after(offset)
            .map_err(failed("read", offset))?;
        let (end, content) = match data {
            Some(data) if data.offset <= offset => (data.end().min(size), Content::Data),
            Some(data) => (data.offset.min(size), Content::Zero),
            None => (size, Content::Zero),
        };
        Ok((Extent::new(offset, end - offset), content))
    }

    fn close(&self) -> Result<(), DiskError> {
        if self.access == Access::ReadOnly {
            return Ok(());
        }
        self.flush()?;
        // The first to stop the disk says why; a second close is refused.
        let _ = self.stopped.set("it was closed".into());
        Ok(())
    }
}

impl fmt::Debug for VhdDisk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VhdDisk")
            .field("storage", &self.storage)
            .field("geometry", &self.geometry)
            .field("access", &self.access)
            .field("stopped", &self.stopped)
            .finish_non_exhaustive()
    }
}

pub(super) fn failed(operation: &'static str, offset: u64) -> impl FnOnce(io::Error) -> DiskError {
    move |source| DiskError::Io {
        operation,
        offset,
        source,
    }
}
