//! The footer: what the disk is. It stands at the end of the file; dynamic and differencing files have a copy at the start.
//!
//! # Which one counts
//! The one at the end, if it is good: in a fixed file the guest writes the start. It is looked for in the last 512 bytes,
//! then in the last 511, as old versions of Virtual PC left it. Where the end holds none, because writing it was cut
//! short, the copy at the start will do for files that have one.
//!
//! # Checksums
//! A footer whose checksum is wrong is damaged. There are tools that change an identity and leave the checksums of both
//! copies as they were; nothing that breaks off in the middle leaves two equal ones. Such a file is opened for reading
//! only.

use std::io;

use crate::{
    base::units::{SECTOR_BYTES, to_usize},
    storage::Storage,
};

use super::{
    Kind,
    error::OpenError,
    format::{
        FOOTER_BYTES, FOOTER_LEN, FOOTER_SIGNATURE, Footer, GEOMETRY_MAX, KIND_DIFFERENCING,
        KIND_DYNAMIC, KIND_FIXED, SIZE_MAX, VERSION,
    },
};

/// Bytes of a footer as old versions of Virtual PC wrote it: the last one is missing.
const SHORT_LEN: u64 = FOOTER_LEN - 1;
/// Who disregards what goes beyond the geometry: Virtual PC.
const VIRTUAL_PC: &[u8; 4] = b"vpc ";

/// A footer and where it was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Found {
    pub(super) offset: u64,
    pub(super) footer: Footer,
    /// As it stands in the file.
    pub(super) bytes: [u8; FOOTER_BYTES],
    /// Whether its checksum is right.
    pub(super) sealed: bool,
}

/// What of a file's footers is there.
#[derive(Clone, Debug)]
pub(super) struct Footers {
    /// At the end of the file.
    pub(super) tail: Option<Found>,
    /// At the start of the file, where a fixed one has data.
    pub(super) head: Option<Found>,
}

impl Footers {
    /// Looks for both.
    pub(super) fn read(storage: &dyn Storage) -> Result<Self, OpenError> {
        let len = storage.len().map_err(OpenError::reading("file", 0))?;
        let mut tail = None;
        for (part, at) in [
            (FOOTER_LEN, len.checked_sub(FOOTER_LEN)),
            (SHORT_LEN, len.checked_sub(SHORT_LEN)),
        ] {
            let found = at.map(|at| read_at(storage, at, part)).transpose()?;
            tail = tail.or_else(|| found.flatten());
        }
        let head = if len < FOOTER_LEN {
            None
        } else {
            read_at(storage, 0, FOOTER_LEN)?
        };
        Ok(Self { tail, head })
    }

    /// The one that counts.
    pub(super) fn current(&self) -> Result<&Found, OpenError> {
        let good = |found: &Option<Found>| found.as_ref().is_some_and(|found| found.sealed);
        let head_counts = |found: &&Found| found.footer.kind != KIND_FIXED;
        match (&self.tail, &self.head) {
            (Some(tail), _) if tail.sealed => Ok(tail),
            (_, Some(head)) if good(&self.head) && head_counts(&head) => Ok(head),
            (Some(tail), Some(head)) if tail.bytes == head.bytes && head_counts(&tail) => Ok(tail),
            (Some(found), _) | (_, Some(found)) => Err(OpenError::corrupt(
                "footer",
                found.offset,
                "its checksum is wrong, and there is no good copy",
            )),
            (None, None) => Err(OpenError::NotVhd),
        }
    }
}

/// Whether the end of the file holds the footer of a fixed VHD.
pub(super) fn is_fixed(storage: &dyn Storage) -> io::Result<bool> {
    match Footers::read(storage) {
        Ok(Footers { tail, .. }) => {
            Ok(tail.is_some_and(|tail| tail.sealed && tail.footer.kind == KIND_FIXED))
        }
        Err(OpenError::Io { source, .. }) => Err(source),
        Err(_) => Ok(false),
    }
}

impl Found {
    /// Dynamic, fixed or differencing.
    pub(super) fn kind(&self) -> Result<Kind, OpenError> {
        if self.footer.version >> 16 != VERSION >> 16 {
            let version = self.footer.version;
            return Err(OpenError::Unsupported(format!("version {version:#x}")));
        }
        match self.footer.kind {
            KIND_FIXED => Ok(Kind::Fixed),
            KIND_DYNAMIC => Ok(Kind::Dynamic),
            KIND_DIFFERENCING => Ok(Kind::Differencing),
            other => Err(OpenError::Unsupported(format!("disk type {other}"))),
        }
    }

    /// Bytes that the guest sees: the current size, but for disks of Virtual PC. That showed its guests what the
    /// geometry covers, which is less, and whoever adds the rest moves the end of the disk. For disks beyond the largest
    /// geometry it had no other size either.
    pub(super) fn size(&self) -> Result<u64, OpenError> {
        let Footer {
            current_size,
            geometry,
            creator,
            ..
        } = self.footer;
        let refuse = |problem: String| Err(OpenError::corrupt("footer", self.offset, problem));
        if current_size == 0 || !current_size.is_multiple_of(SECTOR_BYTES) {
            return refuse(format!("the disk has {current_size} bytes"));
        }
        if current_size > SIZE_MAX {
            return refuse(format!(
                "the disk has {current_size} bytes, a VHD at most {SIZE_MAX}"
            ));
        }
        let covered = geometry.bytes();
        let by_geometry = creator == *VIRTUAL_PC
            && geometry != GEOMETRY_MAX
            && (1..current_size).contains(&covered);
        Ok(if by_geometry { covered } else { current_size })
    }
}

/// The footer at `offset`, of which the file holds `len` bytes; nothing if there is none.
fn read_at(storage: &dyn Storage, offset: u64, len: u64) -> Result<Option<Found>, OpenError> {
    let mut bytes = [0; FOOTER_BYTES];
    storage
        .read_at(offset, &mut bytes[..to_usize(len)])
        .map_err(OpenError::reading("footer", offset))?;
    if !bytes.starts_with(FOOTER_SIGNATURE) {
        return Ok(None);
    }
    Ok(Footer::decode(&bytes).map(|footer| Found {
        offset,
        footer,
        bytes,
        sealed: Footer::is_sealed(&bytes),
    }))
}
