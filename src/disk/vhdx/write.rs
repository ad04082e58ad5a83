//! How blocks come and go.
//!
//! Both happen under the lock of the block's stripe, so one thread allocates and the others find the block present.
//! Reads and writes of present blocks take no part in this: a write that found a block before its discard is ordered
//! before it, whatever the time at which its bytes reach the old place, because nobody can look there any more and the
//! place rests until the write has ended.
//!
//! # Blocks of a parent
//! The first write into a block of which the parent holds something, all or some sectors, copies up: the block's content
//! with the new bytes in it goes into the place, durably, and only then the table says that the block is fully present.
//! So a sector is old, which means the parent's, or new after a power cut, as everywhere else, and the entry may become
//! durable at any time. A partially present block that another program left keeps its place and is completed there: what
//! is written under a zero bit nobody sees before the entry changes.
//!
//! New bits in sector bitmaps, the other way that the format has, would cost more here. A bit that becomes durable before
//! its sector would show zeros in place of the parent's bytes, so each write into a sector of the parent would have to be
//! durable before the log entry with its bits may be written; and that entry cannot wait for the guest's flush, because an
//! acknowledged write must survive the death of the process. That is one forced write for each write of the guest, up to
//! 4096 times for a block of 2 MiB, in place of one for the block. The price is a copy of at most one block, and the space
//! of its sectors that are not zeros. What would change this choice: children with blocks far larger than the 2 MiB that
//! Windows and [`create_child`](super::create_child) give them.

use std::io;

use crate::{
    base::{
        checksum::is_zero,
        units::{Extent, MIB, to_u64, to_usize},
    },
    disk::{Content, DiskError, Fua, Space as Keeping},
};

use super::{
    Kind,
    bat::{Entry, Source},
    disk::{Piece, STRIPES, VhdxDisk, failed},
    log::journal::{BlockChange, CHANGES_PER_REQUEST_MAX, CommitError},
};

const _: () = assert!(
    to_usize(CHANGES_PER_REQUEST_MAX) == STRIPES,
    "a window of blocks has each stripe once, in order: its locks cannot deadlock"
);

/// Bytes of a block that are copied up at once: a block of the usual size in one forced write.
const COPY_BYTES: u64 = 2 * MIB;

/// How a block that was absent a moment ago can be written to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Allocated {
    /// At its place, which holds what the block held before.
    Place(u64),
    /// The bytes are there already, durably.
    Written,
}

impl VhdxDisk {
    /// Gives the block of `piece`, into which `bytes` are to be written, a place.
    pub(super) fn allocate(&self, piece: Piece, bytes: &[u8]) -> Result<Allocated, DiskError> {
        let block = piece.block;
        let _stripe = self.stripes[stripe(block)].lock();
        let source = self.bat.source(block);
        if let Source::File(place) = source {
            return Ok(Allocated::Place(place));
        }
        let offset = block * self.parameters.block_size;
        if let Source::Mixed(place) = source {
            self.copy_up(piece, bytes, place, source)?;
            self.commit(&[(block, Entry::present(place))], offset)?;
            return Ok(Allocated::Written);
        }
        let place = self
            .space
            .take(self.storage.as_ref())
            .map_err(failed("write", offset))?;
        let change = [(block, Entry::present(place))];
        if source == Source::Zeros {
            let committed = self.commit(&change, offset);
            if committed.is_err() {
                self.space.give_back(place);
            }
            return committed.map(|()| Allocated::Place(place));
        }
        let copied = self.copy_up(piece, bytes, place, source);
        let committed = copied.and_then(|()| self.commit(&change, offset));
        if committed.is_err() {
            // It holds bytes that an entry may lead to: one whose write failed may be in the ring as a whole. The next
            // entry goes over that one, and once it is durable nothing leads there any more.
            self.space.discard(place, self.journal.head() + 1);
        }
        committed.map(|()| Allocated::Written)
    }

    /// Makes `place` hold, durably, what the block of `piece` reads as, with `bytes` where the piece begins.
    fn copy_up(
        &self,
        piece: Piece,
        bytes: &[u8],
        place: u64,
        source: Source,
    ) -> Result<(), DiskError> {
        let start = piece.block * self.parameters.block_size;
        let size = self.parameters.geometry.size;
        let len = self.parameters.block_size.min(size - start);
        let new = Extent::new(piece.within, to_u64(bytes.len()));
        let mut buf = vec![0; to_usize(len.min(COPY_BYTES))];
        let mut within = 0;
        while within < len {
            let window = Extent::new(within, (len - within).min(COPY_BYTES));
            let buf = &mut buf[..to_usize(window.len)];
            let (from, to) = (
                new.offset.clamp(within, window.end()),
                new.end().clamp(within, window.end()),
            );
            if to - from < window.len {
                let old = Piece {
                    within,
                    len: window.len,
                    ..piece
                };
                self.read_piece(old, buf)
                    .map_err(failed("read", start + within))?;
            }
            if from < to {
                buf[to_usize(from - within)..to_usize(to - within)].copy_from_slice(
                    &bytes[to_usize(from - new.offset)..to_usize(to - new.offset)],
                );
            }
            // A place taken for this reads as zeros; one that is completed may hold anything.
            if source != Source::Parent || !is_zero(buf) {
                self.storage
                    .write_at(place + within, buf, Fua::Yes)
                    .map_err(|error| {
                        self.stop_unless_full(&error);
                        failed("write", start + within)(error)
                    })?;
            }
            within = window.end();
        }
        Ok(())
    }

    /// Makes a run read as zeros.
    pub(super) fn zero_run(&self, run: Extent, space: Keeping) -> Result<(), DiskError> {
        let keeps = space == Keeping::Keep || self.parameters.kind == Kind::Fixed;
        let window_of = |block: u64| block / CHANGES_PER_REQUEST_MAX;
        let mut whole: Vec<u64> = Vec::new();
        for piece in self.pieces(run) {
            if whole
                .first()
                .is_some_and(|&first| window_of(first) != window_of(piece.block))
            {
                self.discard(&whole)?;
                whole.clear();
            }
            let is_whole = self.is_whole(piece);
            match self.bat.source(piece.block) {
                Source::Zeros => {}
                Source::File(_) if keeps || !is_whole => {
                    self.zero_piece(run, piece, if keeps { Keeping::Keep } else { space })?;
                }
                Source::Parent if self.reads_as_zeros(run, piece)? => {}
                Source::Parent | Source::Mixed(_) if !is_whole => {
                    self.allocate(piece, &[])?;
                    self.zero_piece(run, piece, space)?;
                }
                // Not even a block that is to keep its space gets any for being zeros.
                Source::File(_) | Source::Parent | Source::Mixed(_) => whole.push(piece.block),
            }
        }
        self.discard(&whole)
    }

    /// Zeros within a block that keeps its place.
    fn zero_piece(&self, run: Extent, piece: Piece, space: Keeping) -> Result<(), DiskError> {
        let _flight = self.flights.start();
        let Some(place) = self.bat.location(piece.block) else {
            return Ok(());
        };
        self.storage
            .zero(Extent::new(place + piece.within, piece.len), space)
            .map_err(failed("zero", run.offset + piece.done))
    }

    fn reads_as_zeros(&self, run: Extent, piece: Piece) -> Result<bool, DiskError> {
        let start = run.offset + piece.done;
        let mut at = start;
        while at < start + piece.len {
            let (end, content) = self.piece_at(at).map_err(failed("zero", at))?;
            if content == Content::Data {
                return Ok(false);
            }
            at = end;
        }
        Ok(true)
    }

    /// Gives up whole blocks of one window, with their places. They become zeros: without an entry of their own the
    /// parent would be seen.
    fn discard(&self, blocks: &[u64]) -> Result<(), DiskError> {
        let Some(&first) = blocks.first() else {
            return Ok(());
        };
        let _stripes: Vec<_> = blocks
            .iter()
            .map(|&block| self.stripes[stripe(block)].lock())
            .collect();
        let given_up: Vec<(u64, Option<u64>)> = blocks
            .iter()
            .filter_map(|&block| match self.bat.source(block) {
                Source::File(place) | Source::Mixed(place) => Some((block, Some(place))),
                Source::Parent => Some((block, None)),
                Source::Zeros => None,
            })
            .collect();
        if given_up.is_empty() {
            return Ok(());
        }
        let changes: Vec<BlockChange> = given_up
            .iter()
            .map(|&(block, _)| (block, Entry::ZERO))
            .collect();
        self.commit(&changes, first * self.parameters.block_size)?;
        let position = self.journal.head();
        for place in given_up.into_iter().filter_map(|(_, place)| place) {
            self.space.discard(place, position);
        }
        Ok(())
    }

    /// Writes changes of the table, making room in the log if need be.
    fn commit(&self, changes: &[BlockChange], offset: u64) -> Result<(), DiskError> {
        assert!(to_u64(changes.len()) <= CHANGES_PER_REQUEST_MAX);
        loop {
            if self.journal.is_low() {
                self.make_room()?;
            }
            match self
                .journal
                .commit(changes.to_vec(), &self.bat, &self.space)
            {
                Ok(()) => return Ok(()),
                Err(CommitError::Full) => self.make_room()?,
                Err(CommitError::Failed(error)) => {
                    return Err(failed("write", offset)(same(&error)));
                }
                Err(CommitError::Fatal(error)) => {
                    self.stop("the log of the image cannot be started");
                    return Err(failed("write", offset)(same(&error)));
                }
            }
        }
    }

    fn is_whole(&self, piece: Piece) -> bool {
        let block_size = self.parameters.block_size;
        let end = piece.block * block_size + piece.within + piece.len;
        piece.within == 0 && (piece.len == block_size || end == self.parameters.geometry.size)
    }
}

fn stripe(block: u64) -> usize {
    to_usize(block % to_u64(STRIPES))
}

/// An error for each of those who shared a log entry; the operating system's number is kept.
fn same(error: &io::Error) -> io::Error {
    match error.raw_os_error() {
        Some(number) => io::Error::from_raw_os_error(number),
        None => io::Error::new(error.kind(), error.to_string()),
    }
}
