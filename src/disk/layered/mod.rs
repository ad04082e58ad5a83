//! A writable disk over a read-only one: what is written goes to a sparse file beside it, the base is never touched, until
//! the layer is folded into a disk that takes the base's place.
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
//! the low halves are right: nothing acknowledged is lost. A failed sync ends the disk and its trust in the low halves. A
//! failed write does neither: what was written before stays in the page cache, and the next flush writes the map again.
//! A file whose making was cut short has no valid header and is made again; nothing was written to it.
//!
//! A fold moves what the layer holds into another disk while all this goes on: `fold` says how, and what a power cut
//! leaves of it.
//!
//! # Why not a journal
//! What a guest writes in a test failover is scattered and mostly short-lived. Data in place costs one write, a discard
//! gives the space back, and a reader needs no index beyond one byte for each block that was touched: memory is 1/4096
//! of the runs of 16 MiB in which something was written.

mod fold;
mod header;
mod map;
#[cfg(test)]
mod tests;

use std::{
    io,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, Ordering},
    },
};

use parking_lot::{Mutex, RwLock};
use uuid::Uuid;

use self::{
    fold::Below,
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
    geometry: Geometry,
    /// Changes once, with all regions locked.
    below: RwLock<Below>,
    storage: Arc<dyn Storage>,
    header: Header,
    map: RwLock<Map>,
    /// Shared to use blocks where they are; exclusive to change where they are. Taken before `flushing`, that before
    /// `map` or `below`.
    regions: [RwLock<()>; LOCKS],
    flushing: Mutex<()>,
    stopped: AtomicBool,
    /// The disk that everything was folded into.
    folded: OnceLock<Arc<dyn Disk>>,
}

/// Where a part of a region is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    /// In the layer's file, which holds it.
    Layer,
    /// In the layer's file, which does not hold it yet.
    Fresh,
    /// In the disk that the layer is folded into.
    Target,
}

impl LayeredDisk {
    /// Opens the layer in `storage` over `base`, or makes one if there is none yet. `identity` names the content of the
    /// base, `boot` the present boot of the host. Syncs.
    ///
    /// A layer whose fold began before lets go of `base` at once, because that lacks what was folded: nothing can be
    /// read or written until [`fold_into`](Self::fold_into) gives it the disk that it is folded into.
    pub fn open(
        base: Arc<dyn Disk>,
        storage: Arc<dyn Storage>,
        identity: Digest,
        boot: Uuid,
    ) -> Result<Self, LayerError> {
        let geometry = base.geometry();
        let mut wanted = Header {
            size: geometry.size,
            identity,
            boot,
            folding: false,
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
            Some(found) => {
                wanted.folding = found.folding;
                let mut map = Map::read(&*storage, found.map())?;
                if found.boot != boot {
                    map.fall_back(&*storage)?;
                    storage.sync()?;
                    wanted.write(&*storage)?;
                    storage.sync()?;
                }
                map
            }
        };
        let below = if wanted.folding {
            Below::Awaited
        } else {
            Below::Base(base)
        };
        Ok(Self {
            geometry,
            below: RwLock::new(below),
            storage,
            header: wanted,
            map: RwLock::new(map),
            regions: [const { RwLock::new(()) }; LOCKS],
            flushing: Mutex::new(()),
            stopped: AtomicBool::new(false),
            folded: OnceLock::new(),
        })
    }

    /// Bytes that the layer holds in place of the disk below it.
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

    /// The parts of `run`, each of blocks whose states have the same `kind`. They stay so while the region is locked.
    fn parts<K: PartialEq>(&self, run: Extent, kind: impl Fn(State) -> K) -> Vec<(K, Extent)> {
        let map = self.map.read();
        let mut parts: Vec<(K, Extent)> = Vec::new();
        let mut at = run.offset;
        while at < run.end() {
            let (state, stop) = map.segment(at / BLOCK_BYTES, run.blocks().end);
            let end = (stop * BLOCK_BYTES).min(run.end());
            let found = kind(state);
            match parts.last_mut() {
                Some((kind, part)) if *kind == found => part.len += end - at,
                _ => parts.push((found, Extent::new(at, end - at))),
            }
            at = end;
        }
        parts
    }

    /// Reads within one region, which is locked.
    fn read_piece(&self, below: &Below, offset: u64, buf: &mut [u8]) -> Result<(), DiskError> {
        let mut rest = buf;
        for (state, part) in self.parts(Extent::new(offset, to_u64(rest.len())), |state| state) {
            let (bytes, behind) = rest.split_at_mut(to_usize(part.len));
            match state {
                State::Base => below.disk()?.read_at(part.offset, bytes)?,
                State::Zero => bytes.fill(0),
                State::Held => self
                    .storage
                    .read_at(self.at(part.offset), bytes)
                    .map_err(failed("read", part.offset))?,
            }
            rest = behind;
        }
        Ok(())
    }

    /// Writes bytes within one region. Whether they are durable already, which is tried only if `fua` asks for it.
    fn write_piece(&self, run: Extent, buf: &[u8], fua: Fua) -> Result<bool, DiskError> {
        {
            let _shared = self.lock(run.offset).read();
            let below = self.below()?;
            let parts = self.parts(run, |state| below.place(state));
            if parts.iter().all(|(place, _)| *place != Place::Fresh) {
                return self.write_parts(&below, &parts, buf, fua);
            }
        }
        let _alone = self.lock(run.offset).write();
        let below = self.below()?;
        let parts = self.parts(run, |state| below.place(state));
        self.write_parts(&below, &parts, buf, fua)
    }

    /// The same where the places are known. The lock of the region is held, exclusively if any is [`Place::Fresh`].
    fn write_parts(
        &self,
        below: &Below,
        parts: &[(Place, Extent)],
        buf: &[u8],
        fua: Fua,
    ) -> Result<bool, DiskError> {
        // The disk may have stopped while this waited for the lock.
        self.check_write()?;
        let mut durable = true;
        let mut rest = buf;
        for &(place, part) in parts {
            let (bytes, behind) = rest.split_at(to_usize(part.len));
            match place {
                Place::Target => below.disk()?.write_at(part.offset, bytes, fua)?,
                Place::Layer => {
                    // Where the map is certain already, one forced write says it all.
                    let certain = fua == Fua::Yes && self.map.read().all_certain(part.blocks());
                    let forced = if certain { Fua::Yes } else { Fua::No };
                    self.storage
                        .write_at(self.at(part.offset), bytes, forced)
                        .map_err(failed("write", part.offset))?;
                    durable &= certain;
                }
                Place::Fresh => {
                    self.write_fresh(below, part, bytes)?;
                    durable = false;
                }
            }
            rest = behind;
        }
        Ok(durable)
    }

    /// Brings blocks into the file, with `buf` as the bytes of `run` and the rest of them as they are.
    fn write_fresh(&self, below: &Below, run: Extent, buf: &[u8]) -> Result<(), DiskError> {
        let whole = self.whole_blocks(run);
        let mut bytes = vec![0; to_usize(whole.len)];
        let (before, after) = (
            to_usize(run.offset - whole.offset),
            to_usize(whole.end() - run.end()),
        );
        let tail = bytes.len() - after;
        self.read_piece(below, whole.offset, &mut bytes[..before])?;
        self.read_piece(below, run.end(), &mut bytes[tail..])?;
        bytes[before..tail].copy_from_slice(buf);
        self.storage
            .write_at(self.at(whole.offset), &bytes, Fua::No)
            .and_then(|()| self.mark(whole, State::Held))
            .map_err(failed("write", run.offset))
    }

    /// Makes whole blocks within one region read as zeros.
    fn zero_blocks(&self, run: Extent, space: Space) -> Result<(), DiskError> {
        let _alone = self.lock(run.offset).write();
        self.check_write()?;
        let below = self.below()?;
        for (in_target, part) in self.parts(run, |state| below.place(state) == Place::Target) {
            if in_target {
                below.disk()?.zero(part, space, Fua::No)?;
            } else {
                self.zero_held(part, space)
                    .map_err(failed("zero", part.offset))?;
            }
        }
        Ok(())
    }

    fn zero_held(&self, run: Extent, space: Space) -> io::Result<()> {
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

    /// Makes the layer durable. The caller holds `flushing`: of two syncs at once only one may be told of an error.
    fn flush_layer(&self) -> Result<(), DiskError> {
        // Taken before the sync: what is marked later may not be covered by it.
        let uncertain = self.map.read().uncertain();
        self.sync()?;
        if uncertain.is_empty() {
            return Ok(());
        }
        self.map
            .write()
            .make_certain(&*self.storage, &uncertain)
            .map_err(failed("flush", 0))?;
        self.sync()?;
        self.map.write().settled();
        Ok(())
    }

    fn sync(&self) -> Result<(), DiskError> {
        self.storage.sync().map_err(|source| self.end(source))
    }

    /// Ends the disk after a failed sync or a failed forced write of the map: what the page cache holds of the file means
    /// nothing any more.
    fn end(&self, source: io::Error) -> DiskError {
        self.stopped.store(true, Ordering::Release);
        let distrusted = Header {
            boot: Uuid::nil(),
            folding: !matches!(*self.below.read(), Below::Base(_)),
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
        self.geometry
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), DiskError> {
        let run = check_run(offset, buf.len(), self.size())?;
        if let Some(target) = self.folded.get() {
            return target.read_at(offset, buf);
        }
        for piece in by_region(run) {
            let part = &mut buf[to_usize(piece.offset - offset)..][..to_usize(piece.len)];
            // A block that is moved meanwhile would be punched before it is read.
            let _shared = self.lock(piece.offset).read();
            self.read_piece(&self.below()?, piece.offset, part)?;
        }
        Ok(())
    }

    fn write_at(&self, offset: u64, buf: &[u8], fua: Fua) -> Result<(), DiskError> {
        let run = check_run(offset, buf.len(), self.size())?;
        if let Some(target) = self.folded.get() {
            return target.write_at(offset, buf, fua);
        }
        self.check_write()?;
        let mut durable = true;
        for piece in by_region(run) {
            let part = &buf[to_usize(piece.offset - offset)..][..to_usize(piece.len)];
            durable &= self.write_piece(piece, part, fua)?;
        }
        match fua {
            Fua::Yes if !durable => self.flush(),
            Fua::Yes | Fua::No => Ok(()),
        }
    }

    fn zero(&self, run: Extent, space: Space, fua: Fua) -> Result<(), DiskError> {
        check_run(run.offset, to_usize(run.len), self.size())?;
        if let Some(target) = self.folded.get() {
            return target.zero(run, space, fua);
        }
        self.check_write()?;
        for piece in by_region(run) {
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
                    self.write_piece(edge, &vec![0; to_usize(edge.len)], Fua::No)?;
                }
            }
            if first < last {
                self.zero_blocks(Extent::new(first, last - first), space)?;
            }
        }
        match fua {
            Fua::Yes => self.flush(),
            Fua::No => Ok(()),
        }
    }

    fn flush(&self) -> Result<(), DiskError> {
        if let Some(target) = self.folded.get() {
            return target.flush();
        }
        let _one = self.flushing.lock();
        self.check_write()?;
        self.flush_layer()?;
        self.flush_target()
    }

    fn run_at(&self, offset: u64) -> Result<(Extent, Content), DiskError> {
        check_run(offset, 1, self.size())?;
        if let Some(target) = self.folded.get() {
            return target.run_at(offset);
        }
        // The disk below does not change between the look at the map and the look at it.
        let _shared = self.lock(offset).read();
        let below = self.below()?;
        let blocks = self.size().div_ceil(BLOCK_BYTES);
        let (state, stop) = self.map.read().segment(offset / BLOCK_BYTES, blocks);
        let len = (stop * BLOCK_BYTES).min(self.size()) - offset;
        let run = Extent::new(offset, len);
        match state {
            State::Held => Ok((run, Content::Data)),
            State::Zero => Ok((run, Content::Zero)),
            State::Base => {
                let (below, content) = below.disk()?.run_at(offset)?;
                Ok((Extent::new(offset, below.len.min(len)), content))
            }
        }
    }

    /// The base belongs to whoever opened it, and is not closed. The disk that the layer is folded into belongs to this
    /// one as soon as it has it, and is closed with it, last.
    fn close(&self) -> Result<(), DiskError> {
        self.flush()?;
        self.stopped.store(true, Ordering::Release);
        match &*self.below.read() {
            Below::Target(target) => target.close(),
            Below::Base(_) | Below::Awaited => Ok(()),
        }
    }
}
