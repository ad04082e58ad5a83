//! Another size for an open disk.
//!
//! Reads and writes of present blocks go on throughout; blocks come and go again afterwards. A disk shrinks only by
//! blocks that have no place in the file, so nothing is lost, and nobody who is still writing there can be disturbed.
//!
//! # Crash contract
//! One log entry changes the size in the metadata, and with it either the page of the table in which the old entries end
//! or, if the table's region is too small, both region tables. Around it:
//!
//! ```text
//!   log emptied, its tail written down   no older entry is replayed over what is written past the log here
//!   larger: what was behind the end of the disk in its last block, and in the table behind its last entry, is zeroed in
//!           place; a larger region is written at the end of the file                       nobody looks there yet
//!   sync; log entry; sync                the size is the old one or the new one
//!   smaller: entries behind the last one are zeroed in place                               nobody looks there any more
//!   fixed:   new blocks get their places, a window of them in each log entry
//! ```
//! A cut in the last step leaves a fixed disk of the new size in which some blocks have no place yet: a legal image, whose
//! blocks read as zeros and get a place when they are written. The same resize once more gives them theirs. A region that
//! was left behind stays unused until the image is opened again.

use std::sync::atomic::Ordering;

use parking_lot::Mutex;

use crate::{
    base::units::{Extent, to_usize},
    disk::{Access, DiskError, Geometry, ResizeError, Space as Keeping, failed},
    storage::Fua,
};

use super::{
    Kind,
    disk::VhdxDisk,
    error::OpenError,
    flush::Pages,
    format::PAGE_BYTES,
    log::journal::{CHANGES_PER_REQUEST_MAX, LoggedPages},
    metadata::{self, Parameters},
    numbering::Numbering,
    region::Regions,
};

impl VhdxDisk {
    /// Gives the disk another size in bytes, durably, while it is in use: larger, or smaller by blocks without a place
    /// in the file. A fixed disk keeps all of its blocks and so never shrinks.
    pub fn resize(&self, size: u64) -> Result<(), ResizeError> {
        let wanted = Parameters {
            geometry: Geometry {
                size,
                ..self.parameters.geometry
            },
            ..self.parameters
        };
        wanted
            .check()
            .map_err(|problem| ResizeError::Size { size, problem })?;
        if self.access == Access::ReadOnly {
            return Err(DiskError::ReadOnly.into());
        }
        if self.parameters.kind == Kind::Differencing {
            return Err(ResizeError::Differencing);
        }
        let stripes: Vec<_> = self.stripes.iter().map(Mutex::lock).collect();
        self.know_space().map_err(failed("resize", 0))?;
        let smallest = self.smallest();
        if size < smallest {
            return Err(ResizeError::InUse { size, smallest });
        }
        if size != self.size() {
            self.begin_write()?;
            self.change_size(size)?;
        }
        drop(stripes);
        if self.parameters.kind == Kind::Fixed {
            self.fill(size)?;
        }
        Ok(())
    }

    /// The end of the last block that has a place, or the smallest disk there is.
    fn smallest(&self) -> u64 {
        let Parameters {
            geometry,
            block_size,
            ..
        } = self.parameters;
        match self.bat.last_present() {
            Some(block) => ((block + 1) * block_size).min(self.size()),
            None => u64::from(geometry.logical_sector),
        }
    }

    /// Nobody else may make blocks come or go.
    fn change_size(&self, size: u64) -> Result<(), DiskError> {
        let resizing = || failed("resize", 0);
        let old = self.size();
        let numbering = Numbering::of_size(&self.parameters, size);
        let mut placed = self.checkpoint.lock();
        self.empty_log(&mut placed)?;
        let storage = self.storage.as_ref();
        let regions = Regions::read(storage)
            .map_err(OpenError::into_io)
            .map_err(resizing())?;
        let mut pages = metadata::pages_with_size(storage, regions.metadata, size)
            .map_err(OpenError::into_io)
            .map_err(resizing())?;
        if size > old {
            self.clear_last_block(old)?;
        }
        let moved = (numbering.entries_len() > regions.bat.len)
            .then(|| self.write_larger_table(numbering))
            .transpose()?;
        if let Some(region) = moved {
            pages.extend(regions.pages_with_bat(region));
        } else {
            pages.extend(self.bat.page_of_end(numbering));
            if size > old {
                self.clear_padding(old, size)?;
            }
        }
        self.round(&mut placed, Pages::Leave)?;
        self.log_pages(pages)?;
        self.round(&mut placed, Pages::Leave)?;
        if let Some(region) = moved {
            self.fixed_end.store(region.end(), Ordering::Release);
        }
        self.bat.resized(numbering, moved);
        self.size.store(size, Ordering::Release);
        if size < old {
            self.clear_padding(size, old)?;
        }
        Ok(())
    }

    /// Zeros what other programs may have left behind the end of the disk in its last block.
    fn clear_last_block(&self, size: u64) -> Result<(), DiskError> {
        let within = size % self.parameters.block_size;
        let _flight = self.flights.start();
        let place = self.locate(size / self.parameters.block_size, "resize", size)?;
        let Some(place) = place.filter(|_| within > 0) else {
            return Ok(());
        };
        let rest = Extent::new(place + within, self.parameters.block_size - within);
        self.storage
            .zero(rest, Keeping::Release)
            .map_err(failed("resize", size))
    }

    /// Zeros the pages of the table behind the last entry of a disk of `size` bytes, as far as one of `larger` uses them.
    fn clear_padding(&self, size: u64, larger: u64) -> Result<(), DiskError> {
        let len = |size| Numbering::of_size(&self.parameters, size).entries_len();
        let (from, to) = (
            len(size).next_multiple_of(PAGE_BYTES),
            len(larger).next_multiple_of(PAGE_BYTES),
        );
        if from == to {
            return Ok(());
        }
        let run = Extent::new(self.bat.page_offset(0) + from, to - from);
        self.storage
            .zero(run, Keeping::Release)
            .map_err(failed("resize", 0))
    }

    /// Writes the table at the end of the file, with room for `numbering`.
    fn write_larger_table(&self, numbering: Numbering) -> Result<Extent, DiskError> {
        let len = numbering.region_len();
        let write = || {
            let offset = self.space.take_end(self.storage.as_ref(), len)?;
            for (at, bytes) in self.bat.pieces() {
                self.storage.write_at(offset + at, &bytes, Fua::No)?;
            }
            Ok(Extent::new(offset, len))
        };
        write().map_err(failed("resize", 0))
    }

    fn log_pages(&self, pages: LoggedPages) -> Result<(), DiskError> {
        self.journal
            .append_pages(pages, &self.space)
            .map_err(|error| self.commit_failed("resize", 0, &error))
    }

    /// Gives every block of a disk of `size` bytes a place.
    fn fill(&self, size: u64) -> Result<(), DiskError> {
        let blocks = size.div_ceil(self.parameters.block_size);
        for first in (0..blocks).step_by(to_usize(CHANGES_PER_REQUEST_MAX)) {
            self.allocate_all(first..(first + CHANGES_PER_REQUEST_MAX).min(blocks))?;
        }
        self.flush_disk()
    }
}
