//! The disk itself: opening an image, and the paths that every read and write takes.

use std::{
    fmt, io,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use parking_lot::Mutex;
use uuid::Uuid;

use crate::{
    base::units::{Extent, SECTOR_BYTES, to_usize},
    disk::{
        Access, Content, Disk, DiskError, Fua, Geometry, Opening, Space as Keeping, check_run,
        failed,
        pieces::{Piece, pieces, stored_run},
        running::Running,
    },
    storage::Storage,
};

use super::{Kind, bat::Bat, error::OpenError, open::Image, parent, space::Space};

/// Blocks that one call of `run_at` asks the storage about: a bound for its time, not for the run.
const DATA_BLOCKS_PER_RUN: u64 = 256;

/// A disk in a VHD image.
pub struct VhdDisk {
    pub(super) storage: Arc<dyn Storage>,
    geometry: Geometry,
    kind: Kind,
    id: Uuid,
    pub(super) access: Access,
    /// What a fixed disk does not have.
    pub(super) blocks: Option<Blocks>,
    /// Set by the first write: closing the image then cuts off what no block uses.
    pub(super) written: AtomicBool,
    pub(super) running: Running,
}

/// Where the blocks of a dynamic or differencing disk are.
#[derive(Debug)]
pub(super) struct Blocks {
    pub(super) bat: Bat,
    /// Held while a block comes or its bitmap changes.
    pub(super) space: Mutex<Space>,
    /// Entries and bitmaps written, and one for those that a process that died may have left in the page cache.
    pub(super) changes: AtomicU64,
    /// How many of them are durable.
    pub(super) durable: AtomicU64,
    /// Holds what a differencing disk does not.
    pub(super) parent: Option<Box<VhdDisk>>,
}

impl VhdDisk {
    /// Opens the image in `storage`, for writing after its footers were put right. A differencing disk is for reading
    /// only; its parents are opened with it.
    pub fn open(storage: Arc<dyn Storage>, opening: &Opening) -> Result<Self, OpenError> {
        let mut image = Image::read(storage.as_ref())?;
        if opening.access == Access::ReadWrite {
            if image.kind == Kind::Differencing {
                return Err(OpenError::Differencing);
            }
            image.check_seals()?;
            image.repair(storage.as_ref())?;
        }
        let mut parent = None;
        for (storage, image) in parent::read_chain(&image, &opening.parents)?
            .into_iter()
            .rev()
        {
            parent = Some(Self::new(storage, image, Access::ReadOnly, parent));
        }
        Ok(Self::new(storage, image, opening.access, parent))
    }

    fn new(storage: Arc<dyn Storage>, image: Image, access: Access, parent: Option<Self>) -> Self {
        let footer = image.current.bytes;
        let blocks = image.sparse.map(|sparse| {
            let space = Space::new(sparse.end(), sparse.taken.limit, &footer);
            Blocks {
                bat: sparse.bat,
                space: Mutex::new(space),
                changes: AtomicU64::new(1),
                durable: AtomicU64::new(0),
                parent: parent.map(Box::new),
            }
        });
        Self {
            storage,
            geometry: Geometry {
                size: image.size,
                logical_sector: 512,
                // Blocks start at any sector of the file; Windows says the same.
                physical_sector: 512,
            },
            kind: image.kind,
            id: image.current.footer.id,
            access,
            blocks,
            written: AtomicBool::new(false),
            running: Running::new("VHD"),
        }
    }

    /// How blocks get their space.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Bytes of a block; a fixed disk has none.
    pub fn block_size(&self) -> Option<u64> {
        self.blocks.as_ref().map(|blocks| blocks.bat.block_size)
    }

    /// The identity by which children know their parent.
    pub fn disk_id(&self) -> Uuid {
        self.id
    }

    /// Refuses writes to a disk that is read-only or stopped.
    fn begin_write(&self) -> Result<(), DiskError> {
        if self.access == Access::ReadOnly {
            return Err(DiskError::ReadOnly);
        }
        self.running.check()?;
        if !self.written.load(Ordering::Acquire) {
            self.written.store(true, Ordering::Release);
        }
        Ok(())
    }

    fn write_stored(&self, place: u64, part: &[u8], fua: Fua, at: u64) -> Result<(), DiskError> {
        self.storage.write_at(place, part, fua).map_err(|source| {
            if fua == Fua::Yes {
                self.running.forced_write_failed(&source);
            }
            failed("write", at)(source)
        })
    }

    /// The run of one kind at `offset` of the disk, of `len` bytes at most, which lie in the disk.
    fn run_up_to(&self, offset: u64, len: u64) -> Result<(u64, Content), DiskError> {
        let (mut done, content) = self.run_in_block(offset, len)?;
        let limit = match content {
            Content::Data => DATA_BLOCKS_PER_RUN,
            Content::Zero => u64::MAX,
        };
        for _ in 1..limit {
            if done == len {
                break;
            }
            let (more, kind) = self.run_in_block(offset + done, len - done)?;
            if kind != content {
                break;
            }
            done += more;
        }
        Ok((done, content))
    }

    /// The same, as one block or its absence explains it.
    fn run_in_block(&self, offset: u64, len: u64) -> Result<(u64, Content), DiskError> {
        let reading = failed("read", offset);
        let Some(blocks) = &self.blocks else {
            return stored_run(self.storage.as_ref(), offset, len).map_err(reading);
        };
        let block_size = blocks.bat.block_size;
        let within = offset % block_size;
        let rest = (block_size - within).min(len);
        let block = offset / block_size;
        let Some(place) = blocks.bat.place(block) else {
            return blocks.absent_run(offset, rest);
        };
        let runs = self.sectors(blocks, block, place).map_err(reading)?;
        let (is_here, len) = match runs {
            None => (true, rest),
            Some(bitmap) => bitmap.run(within, rest),
        };
        if is_here {
            stored_run(
                self.storage.as_ref(),
                place + blocks.bat.bitmap + within,
                len,
            )
            .map_err(failed("read", offset))
        } else {
            blocks.absent_run(offset, len)
        }
    }

    /// Reads from one block.
    fn read_piece(
        &self,
        blocks: &Blocks,
        piece: Piece,
        offset: u64,
        buf: &mut [u8],
    ) -> Result<(), DiskError> {
        let Some(place) = blocks.bat.place(piece.block) else {
            return blocks.read_absent(offset, buf);
        };
        let data = place + blocks.bat.bitmap + piece.within;
        let reading = |source| failed("read", offset)(source);
        let Some(bitmap) = self.sectors(blocks, piece.block, place).map_err(reading)? else {
            return self.storage.read_at(data, buf).map_err(reading);
        };
        let mut done = 0;
        while done < piece.len {
            let (is_here, len) = bitmap.run(piece.within + done, piece.len - done);
            let part = &mut buf[to_usize(done)..to_usize(done + len)];
            if is_here {
                self.storage.read_at(data + done, part).map_err(reading)?;
            } else {
                blocks.read_absent(offset + done, part)?;
            }
            done += len;
        }
        Ok(())
    }

    /// The bitmap of a block at `place`; nothing if all of it is ones.
    pub(super) fn sectors(
        &self,
        blocks: &Blocks,
        block: u64,
        place: u64,
    ) -> io::Result<Option<Bitmap>> {
        let bat = &blocks.bat;
        if bat.is_full(block) {
            return Ok(None);
        }
        let mut bytes = vec![0; to_usize(bat.bitmap)];
        self.storage.read_at(place, &mut bytes)?;
        let bitmap = Bitmap(bytes);
        let len = bat
            .block_size
            .min(self.geometry.size - block * bat.block_size);
        if bitmap.run(0, len) == (true, len) {
            bat.set_full(block);
            return Ok(None);
        }
        Ok(Some(bitmap))
    }
}

/// Which sectors of a block are in the file: one bit each, the most significant of a byte first.
#[derive(Debug)]
pub(super) struct Bitmap(Vec<u8>);

impl Bitmap {
    /// Whether the sector at byte `within` of the block is in the file, and how many bytes, of `len` at most, are like it.
    pub(super) fn run(&self, within: u64, len: u64) -> (bool, u64) {
        let bit = |sector: u64| self.0[to_usize(sector / 8)] & (0x80 >> (sector % 8)) != 0;
        let first = within / SECTOR_BYTES;
        let is_here = bit(first);
        let whole = if is_here { 0xFF } else { 0 };
        let end = (within + len).div_ceil(SECTOR_BYTES);
        let mut sector = first + 1;
        while sector < end {
            if sector.is_multiple_of(8) && self.0[to_usize(sector / 8)] == whole {
                sector += 8;
            } else if bit(sector) == is_here {
                sector += 1;
            } else {
                break;
            }
        }
        (is_here, len.min(sector * SECTOR_BYTES - within))
    }
}

impl Blocks {
    /// The pieces of a run, block by block.
    pub(super) fn pieces(&self, run: Extent) -> impl Iterator<Item = Piece> + use<> {
        pieces(run, self.bat.block_size)
    }

    /// Whether every entry and bitmap written so far is durable.
    fn is_durable(&self) -> bool {
        self.durable.load(Ordering::Acquire) >= self.changes.load(Ordering::Acquire)
    }

    /// Reads what is not in the file: the parent's, and zeros past its end.
    fn read_absent(&self, offset: u64, buf: &mut [u8]) -> Result<(), DiskError> {
        let inherited = self.parent.as_ref().map_or(0, |parent| {
            let size = parent.geometry.size;
            size.saturating_sub(offset).min(buf.len() as u64)
        });
        let (inherited, past) = buf.split_at_mut(to_usize(inherited));
        past.fill(0);
        match &self.parent {
            Some(parent) if !inherited.is_empty() => parent.read_at(offset, inherited),
            _ => Ok(()),
        }
    }

    /// The run of one kind, of `len` bytes at most, where nothing is in the file.
    fn absent_run(&self, offset: u64, len: u64) -> Result<(u64, Content), DiskError> {
        match &self.parent {
            Some(parent) if offset < parent.geometry.size => {
                parent.run_up_to(offset, len.min(parent.geometry.size - offset))
            }
            _ => Ok((len, Content::Zero)),
        }
    }
}

impl Disk for VhdDisk {
    fn geometry(&self) -> Geometry {
        self.geometry
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), DiskError> {
        let run = check_run(offset, buf.len(), self.geometry.size)?;
        let Some(blocks) = &self.blocks else {
            return self
                .storage
                .read_at(offset, buf)
                .map_err(failed("read", offset));
        };
        for piece in blocks.pieces(run) {
            let part = &mut buf[piece.range()];
            self.read_piece(blocks, piece, offset + piece.done, part)?;
        }
        Ok(())
    }

    fn write_at(&self, offset: u64, buf: &[u8], fua: Fua) -> Result<(), DiskError> {
        let run = check_run(offset, buf.len(), self.geometry.size)?;
        self.begin_write()?;
        let Some(blocks) = &self.blocks else {
            return self.write_stored(offset, buf, fua, offset);
        };
        for piece in blocks.pieces(run) {
            let at = offset + piece.done;
            let place = self.writable(blocks, piece.block, at)?;
            let part = &buf[piece.range()];
            self.write_stored(place + piece.within, part, fua, at)?;
        }
        // The data is durable; the entries and bitmaps that lead to it may not be.
        if fua == Fua::Yes && !blocks.is_durable() {
            return self.flush();
        }
        Ok(())
    }

    fn zero(&self, run: Extent, space: Keeping, fua: Fua) -> Result<(), DiskError> {
        check_run(run.offset, to_usize(run.len), self.geometry.size)?;
        self.begin_write()?;
        self.zero_run(run, space)?;
        match fua {
            Fua::Yes => self.flush(),
            Fua::No => Ok(()),
        }
    }

    fn flush(&self) -> Result<(), DiskError> {
        self.flush_disk()
    }

    fn run_at(&self, offset: u64) -> Result<(Extent, Content), DiskError> {
        check_run(offset, 1, self.geometry.size)?;
        let (len, content) = self.run_up_to(offset, self.geometry.size - offset)?;
        Ok((Extent::new(offset, len), content))
    }

    fn close(&self) -> Result<(), DiskError> {
        self.close_disk()
    }
}

impl fmt::Debug for VhdDisk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VhdDisk")
            .field("storage", &self.storage)
            .field("geometry", &self.geometry)
            .field("kind", &self.kind)
            .field("access", &self.access)
            .field("running", &self.running)
            .finish_non_exhaustive()
    }
}
