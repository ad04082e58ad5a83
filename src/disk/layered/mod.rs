//! A writable disk over a read-only one: what is written goes to a sparse file beside it, the base is never touched.
//!
//! # The file
//! | offset | content |
//! |---|---|
//! | 0 | header, see `header` |
//! | 4096 | map: one byte for each 4 KiB block of the disk |
//! | a multiple of 1 MiB | data: block `n` at `n * 4096` from here |
//!
//! Only what was written takes space. The file system must take a sparse file a little longer than the disk.
//!
//! # Two states for each block
//! A block comes from the base, from this file, or is zero. The low half of its byte in the map says what it is *now*,
//! the high half what it *certainly* is. A write puts its data into the file, then changes the low half; a flush syncs,
//! then copies the low halves to the high ones, and syncs again if that changed anything.
//!
//! # Crash contract
//! Data reaches the platter before the high half that speaks of it. So after a power cut, which is known by another
//! boot than the one in the header, the high halves are right: a block that was written and not flushed is as before or
//! as written, sector by sector, and never anything else. When only the process died, the page cache has everything, and
//! the low halves are right: nothing acknowledged is lost. A failed sync ends the disk and its trust in the low halves.
//! A file whose making was cut short has no valid header and is made again; nothing was written to it.
//!
//! # Why not a journal
//! What a guest writes in a test failover is scattered and mostly short-lived. Data in place costs one write, a discard
//! gives the space back, and a reader needs no index beyond one byte for each block that was touched: memory is 1/4096
//! of the runs of 16 MiB in which something was written.

mod header;
mod map;
#[cfg(test)]
mod tests;

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use parking_lot::{Mutex, RwLock};
use uuid::Uuid;

use self::{
    header::Header,
    map::{Map, State},
};
use super::{Content, Disk, DiskError, Fua, Geometry, Space, check_run, failed};
use crate::{
    base::{
        checksum::Digest,
        units::{BLOCK_BYTES, Extent, REGION_BYTES, to_u64, to_usize},
    },
    storage::Storage,
};

/// Locks that regions share: two writers meet by chance once in so many times.
const LOCKS: usize = 64;

/// Why a file is not the layer that is wanted.
#[derive(Debug, thiserror::Error)]
pub enum LayerError {
    /// The storage below failed.
    #[error("cannot use the layer's file")]
    Io(#[from] io::Error),
    /// The content is something else, or of a later version.
    #[error("the file is not a layer that this program can read: {0}")]
    Invalid(&'static str),
    /// It was written over another base.
    #[error("the layer was written over another disk or another point of it")]
    OtherBase,
}

/// A base with a layer over it.
#[derive(Debug)]
pub struct LayeredDisk {
    base: Arc<dyn Disk>,
    storage: Arc<dyn Storage>,
    header: Header,
    map: RwLock<Map>,
    /// A block that is not in the file yet is brought there under its region's lock, held exclusively.
    regions: [RwLock<()>; LOCKS],
    flushing: Mutex<()>,
    stopped: AtomicBool,
}

impl LayeredDisk {
    /// Opens the layer in `storage` over `base`, or makes one if there is none yet. `identity` names the content of the
    /// base, `boot` the present boot of the host. Syncs.
    pub fn open(
        base: Arc<dyn Disk>,
        storage: Arc<dyn Storage>,
        identity: Digest,
        boot: Uuid,
    ) -> Result<Self, LayerError> {
        let wanted = Header {
            size: base.geometry().size,
            identity,
            boot,
        };
        let map = match Header::read(&*storage)? {
            None => {
                // An earlier attempt may have left a length, and nothing else that counts.
                storage.set_len(0)?;
                storage.set_len(wanted.data_at() + wanted.size)?;
                storage.sync()?;
                wanted.write(&*storage)?;
                storage.sync()?;
                Map::new(wanted.map())
            }
            Some(found) if (found.size, found.identity) != (wanted.size, identity) => {
                return Err(LayerError::OtherBase);
            }
            Some(found) if found.boot == boot => Map::read(&*storage, found.map())?,
            Some(found) => {
                let mut map = Map::read(&*storage, found.map())?;
                map.fall_back(&*storage)?;
                storage.sync()?;
                wanted.write(&*storage)?;
                storage.sync()?;
                map
            }
        };
        Ok(Self {
            base,
            storage,
            header: wanted,
            map: RwLock::new(map),
            regions: [const { RwLock::new(()) }; LOCKS],
            flushing: Mutex::new(()),
            stopped: AtomicBool::new(false),
        })
    }

    /// Bytes that the layer holds in place of the base's.
    pub fn held(&self) -> u64 {
        self.map.read().held()
    }

    fn size(&self) -> u64 {
        self.header.size
    }

    fn check_write(&self) -> Result<(), DiskError> {
        if self.stopped.load(Ordering::Acquire) {
            Err(DiskError::Stopped(
                "an earlier flush failed, or the disk was closed".into(),
            ))
        } else {
            Ok(())
        }
    }

    fn lock(&self, offset: u64) -> &RwLock<()> {
        &self.regions[to_usize(offset / REGION_BYTES) % LOCKS]
    }

    /// Where a byte of the disk stands in the file.
    fn at(&self, offset: u64) -> u64 {
        self.header.data_at() + offset
    }

    /// Writes bytes within one region.
    fn write_piece(&self, offset: u64, buf: &[u8]) -> io::Result<()> {
        let run = Extent::new(offset, to_u64(buf.len()));
        {
            let _shared = self.lock(offset).read();
            if self.map.read().all_held(run.blocks()) {
                return self.storage.write_at(self.at(offset), buf, Fua::No);
            }
        }
        let _alone = self.lock(offset).write();
        let whole = self.whole_blocks(run);
        let mut bytes = vec![0; to_usize(whole.len)];
        let (before, after) = (
            to_usize(run.offset - whole.offset),
            to_usize(whole.end() - run.end()),
        );
        if before > 0 {
            self.read(whole.offset, &mut bytes[..before])
                .map_err(io::Error::other)?;
        }
        if after > 0 {
            let tail = bytes.len() - after;
            self.read(run.end(), &mut bytes[tail..])
                .map_err(io::Error::other)?;
        }
        bytes[before..before + buf.len()].copy_from_slice(buf);
        self.storage
            .write_at(self.at(whole.offset), &bytes, Fua::No)?;
        self.mark(whole, State::Held)
    }

    /// Where the map is certain already, one forced write says it all. Whether that was so.
    fn write_certain(&self, run: Extent, buf: &[u8]) -> io::Result<bool> {
        if run.regions().count() != 1 {
            return Ok(false);
        }
        let _shared = self.lock(run.offset).read();
        if !self.map.read().all_certain(run.blocks()) {
            return Ok(false);
        }
        self.storage.write_at(self.at(run.offset), buf, Fua::Yes)?;
        Ok(true)
    }

    /// Makes whole blocks within one region read as zeros.
    fn zero_blocks(&self, run: Extent, space: Space) -> io::Result<()> {
        let _alone = self.lock(run.offset).write();
        let data = Extent::new(self.at(run.offset), run.len);
        match space {
            Space::Keep => {
                self.storage.zero(data, Space::Keep)?;
                self.mark(run, State::Held)
            }
            Space::Release => {
                self.mark(run, State::Zero)?;
                self.storage.zero(data, Space::Release)
            }
        }
    }

    fn mark(&self, run: Extent, state: State) -> io::Result<()> {
        let mut map = self.map.write();
        map.set(&*self.storage, run.blocks(), state)
    }

    /// `run`, extended to whole blocks, of which the last may be cut off by the end of the disk.
    fn whole_blocks(&self, run: Extent) -> Extent {
        let blocks = run.blocks();
        let start = blocks.start * BLOCK_BYTES;
        let end = (blocks.end * BLOCK_BYTES).min(self.size());
        Extent::new(start, end - start)
    }

    fn read(&self, offset: u64, buf: &mut [u8]) -> Result<(), DiskError> {
        let end = offset + to_u64(buf.len());
        let (mut at, mut rest) = (offset, buf);
        while at < end {
            let (state, stop) = self
                .map
                .read()
                .segment(at / BLOCK_BYTES, end.div_ceil(BLOCK_BYTES));
            let stop = (stop * BLOCK_BYTES).min(end);
            let (part, behind) = rest.split_at_mut(to_usize(stop - at));
            match state {
                State::Base => self.base.read_at(at, part)?,
                State::Zero => part.fill(0),
                State::Held => self
                    .storage
                    .read_at(self.at(at), part)
                    .map_err(failed("read", at))?,
            }
            (at, rest) = (stop, behind);
        }
        Ok(())
    }

    fn sync(&self) -> Result<(), DiskError> {
        self.storage.sync().map_err(|source| self.end(source))
    }

    /// Ends the disk after a failed sync, or a failed write of what is certain: what the page cache holds of the file
    /// means nothing any more.
    fn end(&self, source: io::Error) -> DiskError {
        self.stopped.store(true, Ordering::Release);
        let distrusted = Header {
            boot: Uuid::nil(),
            ..self.header
        };
        if let Err(error) = distrusted.write(&*self.storage) {
            tracing::warn!(%error, "cannot note in a layer that its flush failed");
        }
        failed("flush", 0)(source)
    }
}

/// The parts of a run that lie in one region each.
fn by_region(run: Extent) -> impl Iterator<Item = Extent> {
    let mut at = run.offset;
    std::iter::from_fn(move || {
        (at < run.end()).then(|| {
            let end = ((at / REGION_BYTES + 1) * REGION_BYTES).min(run.end());
            let piece = Extent::new(at, end - at);
            at = end;
            piece
        })
    })
}

impl Disk for LayeredDisk {
    fn geometry(&self) -> Geometry {
        self.base.geometry()
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), DiskError> {
        check_run(offset, buf.len(), self.size())?;
        self.read(offset, buf)
    }

    fn write_at(&self, offset: u64, buf: &[u8], fua: Fua) -> Result<(), DiskError> {
        let run = check_run(offset, buf.len(), self.size())?;
        self.check_write()?;
        let forced = fua == Fua::Yes
            && self
                .write_certain(run, buf)
                .map_err(failed("write", offset))?;
        if forced {
            return Ok(());
        }
        for piece in by_region(run) {
            let start = to_usize(piece.offset - offset);
            self.write_piece(piece.offset, &buf[start..][..to_usize(piece.len)])
                .map_err(failed("write", piece.offset))?;
        }
        match fua {
            Fua::Yes => self.flush(),
            Fua::No => Ok(()),
        }
    }

    fn zero(&self, run: Extent, space: Space, fua: Fua) -> Result<(), DiskError> {
        check_run(run.offset, to_usize(run.len), self.size())?;
        self.check_write()?;
        for piece in by_region(run) {
            let failed = |source| failed("zero", piece.offset)(source);
            let first = piece.offset.next_multiple_of(BLOCK_BYTES).min(piece.end());
            // The last block may be cut off by the end of the disk; then it is whole all the same.
            let last = if piece.end() == self.size() {
                piece.end()
            } else {
                (piece.end() / BLOCK_BYTES * BLOCK_BYTES).max(first)
            };
            for edge in [
                Extent::new(piece.offset, first - piece.offset),
                Extent::new(last, piece.end() - last),
            ] {
                if edge.len > 0 {
                    self.write_piece(edge.offset, &vec![0; to_usize(edge.len)])
                        .map_err(failed)?;
                }
            }
            if first < last {
                self.zero_blocks(Extent::new(first, last - first), space)
                    .map_err(failed)?;
            }
        }
        match fua {
            Fua::Yes => self.flush(),
            Fua::No => Ok(()),
        }
    }

    fn flush(&self) -> Result<(), DiskError> {
        let _one = self.flushing.lock();
        self.check_write()?;
        // Taken before the sync: what is marked later may not be covered by it.
        let uncertain = self.map.read().uncertain();
        self.sync()?;
        if uncertain.is_empty() {
            return Ok(());
        }
        self.map
            .write()
            .make_certain(&*self.storage, &uncertain)
            .map_err(|source| self.end(source))?;
        self.sync()?;
        self.map.write().settled();
        Ok(())
    }

    fn run_at(&self, offset: u64) -> Result<(Extent, Content), DiskError> {
        check_run(offset, 1, self.size())?;
        let blocks = self.size().div_ceil(BLOCK_BYTES);
        let (state, stop) = self.map.read().segment(offset / BLOCK_BYTES, blocks);
        let len = (stop * BLOCK_BYTES).min(self.size()) - offset;
        let run = Extent::new(offset, len);
        match state {
            State::Held => Ok((run, Content::Data)),
            State::Zero => Ok((run, Content::Zero)),
            State::Base => {
                let (below, content) = self.base.run_at(offset)?;
                Ok((Extent::new(offset, below.len.min(len)), content))
            }
        }
    }

    fn close(&self) -> Result<(), DiskError> {
        self.flush()?;
        self.stopped.store(true, Ordering::Release);
        Ok(())
    }
}
