//! How blocks come, and how sectors turn to zeros.
//!
//! A block that is in the file with a bitmap of ones takes no part in this. For others one thread at a time brings that
//! about: for an absent block it takes a place and writes bitmap and entry, for one whose bitmap has gaps (no program
//! of today leaves them, but Xen and old Virtual PCs did) it clears the sectors in them and fills the bitmap.
//!
//! # Crash contract
//! New blocks: see `space`. Gaps: they are cleared, durably, before their bits are set; so a sector in a gap is zeros at
//! all times, whatever bytes were there.

use std::{io, sync::atomic::Ordering};

use crate::{
    base::units::{Extent, to_usize},
    disk::{DiskError, Space as Keeping, failed},
    storage::Fua,
};

use super::{
    disk::{Bitmap, Blocks, VhdDisk},
    space::Space,
};

impl VhdDisk {
    /// The file offset of the first byte of `block`, all sectors of which may be written to. `at` is where the guest
    /// writes.
    pub(super) fn writable(&self, blocks: &Blocks, block: u64, at: u64) -> Result<u64, DiskError> {
        let data = |place: u64| place + blocks.bat.bitmap;
        if let (Some(place), true) = (blocks.bat.place(block), blocks.bat.is_full(block)) {
            return Ok(data(place));
        }
        let mut space = blocks.space.lock();
        self.running.check()?;
        let place = match blocks.bat.place(block) {
            None => self.allocate(blocks, &mut space, block),
            Some(place) => self.fill_gaps(blocks, block, place).map(|()| place),
        };
        place.map(data).map_err(failed("write", at))
    }

    fn allocate(&self, blocks: &Blocks, space: &mut Space, block: u64) -> io::Result<u64> {
        let bat = &blocks.bat;
        let storage = self.storage.as_ref();
        let (place, sector) = space.find(bat.bitmap, bat.block_size)?;
        let end = place + bat.stride();
        if !space.holds(end) {
            let limit = space.grow(storage, end)?;
            self.sync()?;
            space.grown(limit);
        }
        storage.write_at(place, &ones(bat.bitmap), Fua::No)?;
        // Whether an entry that could not be written is in the file nobody knows: its place is not used again.
        space.take(end);
        storage.write_at(bat.entry_offset(block), &sector.to_be_bytes(), Fua::No)?;
        blocks.changes.fetch_add(1, Ordering::AcqRel);
        bat.publish(block, sector);
        Ok(place)
    }

    fn fill_gaps(&self, blocks: &Blocks, block: u64, place: u64) -> io::Result<()> {
        let Some(bitmap) = self.sectors(blocks, block, place)? else {
            return Ok(());
        };
        for gap in gaps(&bitmap, blocks.bat.block_size) {
            let run = Extent::new(place + blocks.bat.bitmap + gap.offset, gap.len);
            self.storage.zero(run, Keeping::Release)?;
        }
        self.sync()?;
        self.storage
            .write_at(place, &ones(blocks.bat.bitmap), Fua::No)?;
        blocks.changes.fetch_add(1, Ordering::AcqRel);
        blocks.bat.set_full(block);
        Ok(())
    }

    /// Makes a run read as zeros. The format knows no way to give a block up, so its place stays its own; what is
    /// released becomes a hole in it. A fixed disk keeps its space.
    pub(super) fn zero_run(&self, run: Extent, space: Keeping) -> Result<(), DiskError> {
        let Some(blocks) = &self.blocks else {
            return self
                .storage
                .zero(run, Keeping::Keep)
                .map_err(failed("zero", run.offset));
        };
        for piece in blocks.pieces(run) {
            if blocks.bat.place(piece.block).is_none() {
                continue;
            }
            let at = run.offset + piece.done;
            let data = self.writable(blocks, piece.block, at)?;
            self.storage
                .zero(Extent::new(data + piece.within, piece.len), space)
                .map_err(failed("zero", at))?;
        }
        Ok(())
    }
}

/// The parts of a block whose sectors are not in the file.
fn gaps(bitmap: &Bitmap, block_size: u64) -> Vec<Extent> {
    let mut found = Vec::new();
    let mut at = 0;
    while at < block_size {
        let (is_here, len) = bitmap.run(at, block_size - at);
        if !is_here {
            found.push(Extent::new(at, len));
        }
        at += len;
    }
    found
}

fn ones(bitmap: u64) -> Vec<u8> {
    vec![0xFF; to_usize(bitmap)]
}
