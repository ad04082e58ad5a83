//! Opening an image: from bytes to checked structures, in the order in which they depend on each other: footers, dynamic
//! header, table.

use crate::{
    base::units::{Extent, SECTOR_BYTES},
    storage::{Fua, Storage},
};

use super::{
    Kind,
    bat::{Bat, Taken},
    error::OpenError,
    footer::{Footers, Found},
    format::{FOOTER_LEN, HEADER_LEN, Locator},
    header::Checked,
};

/// The structures of a file, checked each for itself and against each other.
#[derive(Debug)]
pub(super) struct Image {
    pub(super) footers: Footers,
    /// The footer that counts.
    pub(super) current: Found,
    pub(super) kind: Kind,
    /// Bytes of the disk.
    pub(super) size: u64,
    /// Length of the file.
    pub(super) len: u64,
    /// What a fixed file does not have.
    pub(super) sparse: Option<Sparse>,
}

/// The structures of a dynamic or differencing file.
#[derive(Debug)]
pub(super) struct Sparse {
    pub(super) header: Checked,
    pub(super) locators: Vec<(Locator, String)>,
    pub(super) bat: Bat,
    pub(super) taken: Taken,
}

impl Image {
    /// Reads the file in `storage`.
    pub(super) fn read(storage: &dyn Storage) -> Result<Self, OpenError> {
        let image = Self::read_leniently(storage)?;
        if let Some(Sparse { bat, taken, .. }) = &image.sparse {
            let mut first = None;
            bat.faults(taken, &mut |fault| {
                first = Some(fault);
                false
            });
            if let Some(fault) = first {
                return Err(OpenError::corrupt("BAT", fault.offset, fault.to_string()));
            }
        }
        Ok(image)
    }

    /// Reads the file in `storage`, but for where its blocks are.
    pub(super) fn read_leniently(storage: &dyn Storage) -> Result<Self, OpenError> {
        let len = storage.len().map_err(OpenError::reading("file", 0))?;
        let footers = Footers::read(storage)?;
        let current = footers.current()?.clone();
        let (kind, size) = (current.kind()?, current.size()?);
        let sparse = if kind == Kind::Fixed {
            if size > current.offset {
                return Err(OpenError::corrupt(
                    "footer",
                    current.offset,
                    format!("the disk has {size} bytes, and the file has fewer before it"),
                ));
            }
            None
        } else {
            Some(Sparse::read(storage, &footers, &current, size, len)?)
        };
        Ok(Self {
            footers,
            current,
            kind,
            size,
            len,
            sparse,
        })
    }

    /// Refuses structures with a wrong checksum, which reading puts up with.
    pub(super) fn check_seals(&self) -> Result<(), OpenError> {
        let header = self.sparse.as_ref().map(|sparse| &sparse.header);
        let header = header.map(|header| ("header", header.offset, header.sealed));
        for (part, offset, sealed) in [("footer", self.current.offset, self.current.sealed)]
            .into_iter()
            .chain(header)
        {
            if !sealed {
                let problem = "its checksum is wrong; it can be read, and not written to";
                return Err(OpenError::corrupt(part, offset, problem));
            }
        }
        Ok(())
    }

    /// Puts right what of the two footers is missing or unlike the one that counts. Durable when it returns.
    pub(super) fn repair(&mut self, storage: &dyn Storage) -> Result<(), OpenError> {
        let Some(sparse) = &mut self.sparse else {
            return Ok(());
        };
        let good = |found: &Option<Found>| {
            found
                .as_ref()
                .is_some_and(|found| found.bytes == self.current.bytes)
        };
        let (tail, head) = (good(&self.footers.tail), good(&self.footers.head));
        if tail && head {
            return Ok(());
        }
        tracing::warn!(tail, head, "a footer of the image is put right");
        let bytes = self.current.bytes;
        if !head {
            storage
                .write_at(0, &bytes, Fua::No)
                .map_err(OpenError::writing("footer", 0))?;
        }
        if !tail {
            let end = sparse.end().next_multiple_of(SECTOR_BYTES);
            storage
                .write_at(end, &bytes, Fua::No)
                .and_then(|()| storage.set_len(end + FOOTER_LEN))
                .map_err(OpenError::writing("footer", end))?;
            sparse.taken.limit = end;
            self.len = end + FOOTER_LEN;
        }
        storage.sync().map_err(OpenError::writing("footer", 0))
    }
}

impl Sparse {
    fn read(
        storage: &dyn Storage,
        footers: &Footers,
        current: &Found,
        size: u64,
        len: u64,
    ) -> Result<Self, OpenError> {
        let header = Checked::read(storage, current.footer.header_offset, size, len)?;
        let locators = header.locators(storage, len)?;
        let bat = Bat::read(storage, &header, size)?;
        let mut structures = vec![
            ("footer", Extent::new(0, FOOTER_LEN)),
            ("header", Extent::new(header.offset, HEADER_LEN)),
            ("BAT", header.bat()),
        ];
        structures.extend(locators.iter().map(|(locator, _)| {
            let place = Extent::new(locator.offset, u64::from(locator.len));
            ("parent locator", place)
        }));
        let limit = match &footers.tail {
            Some(tail) if tail.bytes == current.bytes => tail.offset,
            _ => len,
        };
        Ok(Self {
            header,
            locators,
            bat,
            taken: Taken { structures, limit },
        })
    }

    /// One past the last byte in use, but for the footer behind it.
    pub(super) fn end(&self) -> u64 {
        let structures = self.taken.structures.iter().map(|(_, run)| run.end());
        structures.fold(self.bat.end(), u64::max)
    }
}
