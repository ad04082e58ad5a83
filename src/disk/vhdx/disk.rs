//! The disk itself: opening an image, and the paths that every read and write takes.

use std::{
    fmt, io,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use parking_lot::Mutex;
use uuid::Uuid;

use crate::{
    base::units::{Extent, to_u64, to_usize},
    disk::{
        Access, Content, Disk, DiskError, Fua, Geometry, Opening, Space as Keeping, check_run,
        failed,
        pieces::{Piece, pieces, stored_run},
        running::Running,
    },
    storage::Storage,
};

use super::{
    Kind,
    bat::Bat,
    bitmap::Bits,
    chain::{self, Link},
    error::OpenError,
    flight::Flights,
    log::journal::Journal,
    metadata::Parameters,
    numbering::Source,
    open::{Image, Replaying},
    space::Space,
    write::Allocated,
};

/// Locks that share out the blocks among those who allocate and discard.
pub(super) const STRIPES: usize = 64;
/// Blocks that one call of `run_at` asks the storage about: a bound for its time, not for the run.
const DATA_BLOCKS_PER_RUN: u64 = 256;

/// A disk in a VHDX image.
pub struct VhdxDisk {
    pub(super) storage: Arc<dyn Storage>,
    /// As they were when the image was opened.
    pub(super) parameters: Parameters,
    /// Bytes of the disk now; changed while all stripes are held.
    pub(super) size: AtomicU64,
    pub(super) access: Access,
    pub(super) bat: Bat,
    /// What is not in this file, in a differencing disk.
    parent: Option<Link>,
    pub(super) space: Space,
    pub(super) journal: Journal,
    pub(super) flights: Flights,
    /// Held while a block comes or goes.
    pub(super) stripes: [Mutex<()>; STRIPES],
    /// The checkpoint under way: the log position whose pages are in place, but not yet durably.
    pub(super) checkpoint: Mutex<Option<u64>>,
    /// One past the log and the regions: the file is never shorter.
    pub(super) fixed_end: AtomicU64,
    pub(super) running: Running,
}

impl VhdxDisk {
    /// Opens the image in `storage`. A log left by a crash is replayed: into the file, or, for reading only, in memory.
    pub fn open(storage: Arc<dyn Storage>, opening: &Opening) -> Result<Self, OpenError> {
        let replay = match opening.access {
            Access::ReadOnly => Replaying::InMemory,
            Access::ReadWrite => Replaying::InPlace(opening.ids.as_ref()),
        };
        let image = Image::read(storage, &replay)?;
        let parent = chain::open(&image, opening)?;
        Ok(Self::assemble(image, opening, parent))
    }

    /// The disk in an image whose structures are read.
    pub(super) fn assemble(image: Image, opening: &Opening, parent: Option<Link>) -> Self {
        let access = opening.access;
        let Image {
            storage,
            headers,
            regions,
            parameters,
            bat,
            fixed_end,
            len,
            ..
        } = image;
        let space = Space::new(parameters.block_size, len);
        let ids = Arc::clone(&opening.ids);
        let journal = Journal::new(Arc::clone(&storage), ids, headers, regions.repair);
        Self {
            storage,
            parameters,
            size: AtomicU64::new(parameters.geometry.size),
            access,
            bat,
            parent,
            space,
            journal,
            flights: Flights::default(),
            stripes: [const { Mutex::new(()) }; STRIPES],
            checkpoint: Mutex::new(None),
            fixed_end: AtomicU64::new(fixed_end),
            running: Running::new("VHDX"),
        }
    }

    /// Whether blocks take space from the beginning.
    pub fn kind(&self) -> Kind {
        self.parameters.kind
    }

    /// Bytes of a block.
    pub fn block_size(&self) -> u64 {
        self.parameters.block_size
    }

    /// The identity that a guest sees (SCSI vital product data, page 0x83).
    pub fn disk_id(&self) -> Uuid {
        self.parameters.disk_id
    }

    /// Bytes of the disk now.
    pub(super) fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    /// The pieces of a run, block by block.
    pub(super) fn pieces(&self, run: Extent) -> impl Iterator<Item = Piece> + use<> {
        pieces(run, self.parameters.block_size)
    }

    /// Refuses writes to a disk that is read-only or stopped, and prepares the file for the first one.
    pub(super) fn begin_write(&self) -> Result<(), DiskError> {
        if self.access == Access::ReadOnly {
            return Err(DiskError::ReadOnly);
        }
        self.running.check()?;
        if self.journal.has_begun() {
            return Ok(());
        }
        self.know_space().map_err(failed("write", 0))?;
        self.journal.begin(&self.space).map_err(|source| {
            self.running
                .stop("the headers of the image cannot be written");
            failed("write", 0)(source)
        })
    }

    /// Where `block` is, if all of it is in the file; `operation` wants to know for the sake of disk offset `at`.
    pub(super) fn locate(
        &self,
        block: u64,
        operation: &'static str,
        at: u64,
    ) -> Result<Option<u64>, DiskError> {
        self.bat.location(block).map_err(failed(operation, at))
    }

    /// Reads the rest of the table, which tells what space is free. Nothing is written before that.
    pub(super) fn know_space(&self) -> io::Result<()> {
        // Whoever comes second waits until the first has told the space.
        let _checkpoint = self.checkpoint.lock();
        if let Some(taken) = self.bat.complete().map_err(OpenError::into_io)? {
            self.space.begin(&taken);
        }
        Ok(())
    }

    /// Fills `buf` from `offset`; what lies past the end of the disk reads as zeros.
    pub(super) fn read_run(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let end = offset + to_u64(buf.len());
        let len = self.size().clamp(offset, end) - offset;
        let (inside, past) = buf.split_at_mut(to_usize(len));
        past.fill(0);
        for piece in self.pieces(Extent::new(offset, len)) {
            self.read_piece(piece, &mut inside[piece.range()])?;
        }
        Ok(())
    }

    /// Reads what lies in one block.
    pub(super) fn read_piece(&self, piece: Piece, buf: &mut [u8]) -> io::Result<()> {
        let offset = piece.block * self.parameters.block_size + piece.within;
        match self.bat.source(piece.block)? {
            Source::File(place) => self.read_place(place + piece.within, buf),
            Source::Parent => self.parent().read(offset, buf),
            Source::Zeros => {
                buf.fill(0);
                Ok(())
            }
            Source::Mixed(place) => {
                let bits = self.bits(piece.block)?;
                bits.runs(piece.within, piece.len, |run| {
                    let at = run.within - piece.within;
                    let part = &mut buf[to_usize(at)..to_usize(at + run.len)];
                    if run.own {
                        self.read_place(place + run.within, part)?;
                    } else {
                        self.parent().read(offset + at, part)?;
                    }
                    Ok(true)
                })
            }
        }
    }

    fn parent(&self) -> &Link {
        self.parent
            .as_ref()
            .expect("only blocks of a differencing disk are in a parent")
    }

    fn bits(&self, block: u64) -> io::Result<Bits<'_>> {
        let sector = self.parameters.geometry.logical_sector;
        let offset = self.bat.bits(block)?;
        Ok(Bits::new(self.storage.as_ref(), offset, sector))
    }

    /// Reads from a place in the file; what the file is too short for reads as zeros.
    fn read_place(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let end = offset + to_u64(buf.len());
        let stored = self.space.len().clamp(offset, end) - offset;
        let (stored, past) = buf.split_at_mut(to_usize(stored));
        past.fill(0);
        if stored.is_empty() {
            return Ok(());
        }
        self.storage.read_at(offset, stored)
    }

    /// The run of one kind at `offset` that one block of a disk of `size` bytes or its absence explains: where it ends, and
    /// what it holds.
    pub(super) fn piece_at(&self, offset: u64, size: u64) -> io::Result<(u64, Content)> {
        let block_size = self.parameters.block_size;
        let within = offset % block_size;
        let end = (offset - within + block_size).min(size);
        let block = offset / block_size;
        match self.bat.source(block)? {
            Source::Zeros => Ok((end, Content::Zero)),
            Source::File(place) => self.stored_at(place + within, offset, end),
            Source::Parent => self.parent().piece_at(offset, end),
            Source::Mixed(place) => {
                let mut first = None;
                self.bits(block)?.runs(within, end - offset, |run| {
                    first = Some(run);
                    Ok(false)
                })?;
                let run = first.expect("the block does not end here");
                let end = offset + run.len;
                if run.own {
                    self.stored_at(place + within, offset, end)
                } else {
                    self.parent().piece_at(offset, end)
                }
            }
        }
    }

    /// The run of one kind at `offset`, which is stored at `at` of the file and ends at `end` at the latest.
    fn stored_at(&self, at: u64, offset: u64, end: u64) -> io::Result<(u64, Content)> {
        let (len, content) = stored_run(self.storage.as_ref(), at, end - offset)?;
        Ok((offset + len, content))
    }
}

impl Disk for VhdxDisk {
    fn geometry(&self) -> Geometry {
        Geometry {
            size: self.size(),
            ..self.parameters.geometry
        }
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), DiskError> {
        let run = check_run(offset, buf.len(), self.size())?;
        let _flight = self.flights.start();
        for piece in self.pieces(run) {
            self.read_piece(piece, &mut buf[piece.range()])
                .map_err(failed("read", offset + piece.done))?;
        }
        Ok(())
    }

    fn write_at(&self, offset: u64, buf: &[u8], fua: Fua) -> Result<(), DiskError> {
        let run = check_run(offset, buf.len(), self.size())?;
        self.begin_write()?;
        let flight = self.flights.start();
        for piece in self.pieces(run) {
            let part = &buf[piece.range()];
            let at = offset + piece.done;
            let place = match self.locate(piece.block, "write", at)? {
                Some(place) => place,
                None => match self.allocate(piece, part)? {
                    Allocated::Place(place) => place,
                    Allocated::Written => continue,
                },
            };
            self.storage
                .write_at(place + piece.within, part, fua)
                .map_err(|source| {
                    if fua == Fua::Yes {
                        self.running.forced_write_failed(&source);
                    }
                    failed("write", at)(source)
                })?;
        }
        drop(flight);
        // The payload is durable; the entries that lead to it may not be.
        if fua == Fua::Yes && !self.journal.is_durable() {
            return self.flush();
        }
        Ok(())
    }

    fn zero(&self, run: Extent, space: Keeping, fua: Fua) -> Result<(), DiskError> {
        check_run(run.offset, to_usize(run.len), self.size())?;
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
        let size = self.size();
        check_run(offset, 1, size)?;
        let _flight = self.flights.start();
        let reading = failed("read", offset);
        let piece_at = |at| self.piece_at(at, size);
        let found = (|| -> io::Result<_> {
            let (mut end, content) = piece_at(offset)?;
            let limit = match content {
                Content::Data => DATA_BLOCKS_PER_RUN,
                Content::Zero => u64::MAX,
            };
            for _ in 1..limit {
                if end == size {
                    break;
                }
                let (next, kind) = piece_at(end)?;
                if kind != content {
                    break;
                }
                end = next;
            }
            Ok((Extent::new(offset, end - offset), content))
        })();
        found.map_err(reading)
    }

    fn close(&self) -> Result<(), DiskError> {
        self.close_disk()
    }
}

impl fmt::Debug for VhdxDisk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VhdxDisk")
            .field("storage", &self.storage)
            .field("parameters", &self.parameters)
            .field("access", &self.access)
            .field("running", &self.running)
            .finish_non_exhaustive()
    }
}
