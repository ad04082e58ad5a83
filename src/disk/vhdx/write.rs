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

use std::{io, ops::Range};

use crate::{
    base::{
        checksum::is_zero,
        units::{Extent, MIB, to_u64, to_usize},
    },
    disk::{Content, DiskError, Fua, Space as Keeping, check_run, failed, pieces::Piece},
};

use super::{
    Kind,
    disk::{STRIPES, VhdxDisk},
    log::journal::{BlockChange, CHANGES_PER_REQUEST_MAX, CommitError},
    numbering::{Entry, Source},
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
        let offset = block * self.parameters.block_size;
        // The disk may have shrunk since the caller looked; it does not while this is held.
        check_run(offset, 1, self.size())?;
        let source = self.source(block, "write", offset)?;
        if let Source::File(place) = source {
            return Ok(Allocated::Place(place));
        }
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
        let len = self.parameters.block_size.min(self.size() - start);
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
                        self.running.forced_write_failed(&error);
                        failed("write", start + within)(error)
                    })?;
            }
            within = window.end();
        }
        Ok(())
    }

    /// Places for all of some neighbouring blocks, which share no stripe.
    pub(super) fn allocate_all(&self, blocks: Range<u64>) -> Result<(), DiskError> {
        let _stripes: Vec<_> = blocks
            .clone()
            .map(|block| self.stripes[stripe(block)].lock())
            .collect();
        let offset = blocks.start * self.parameters.block_size;
        let mut changes: Vec<BlockChange> = Vec::new();
        let take = || {
            for block in blocks {
                if block < self.bat.blocks() && self.locate(block, "write", offset)?.is_none() {
                    let place = self.space.take(self.storage.as_ref());
                    let place = place.map_err(failed("write", offset))?;
                    changes.push((block, Entry::present(place)));
                }
            }
            Ok(())
        };
        let taken: Result<(), DiskError> = take();
        if changes.is_empty() {
            return taken;
        }
        let done = taken.and_then(|()| self.commit(&changes, offset));
        if done.is_err() {
            let places = changes.iter().filter_map(|(_, entry)| entry.location());
            places.for_each(|place| self.space.give_back(place));
        }
        done
    }

    /// Makes a run read as zeros.
    pub(super) fn zero_run(&self, run: Extent, space: Keeping) -> Result<(), DiskError> {
        let keeps = space == Keeping::Keep || self.parameters.kind == Kind::Fixed;
        let window_of = |block: u64| block / CHANGES_PER_REQUEST_MAX;
        let size = self.size();
        let mut whole: Vec<u64> = Vec::new();
        for piece in self.pieces(run) {
            if whole
                .first()
                .is_some_and(|&first| window_of(first) != window_of(piece.block))
            {
                if !self.discard(&whole, size)? {
                    return self.zero_run(run, space);
                }
                whole.clear();
            }
            let is_whole = self.is_whole(piece, size);
            match self.source(piece.block, "zero", run.offset + piece.done)? {
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
        if self.discard(&whole, size)? {
            Ok(())
        } else {
            self.zero_run(run, space)
        }
    }

    fn source(&self, block: u64, operation: &'static str, at: u64) -> Result<Source, DiskError> {
        self.bat.source(block).map_err(failed(operation, at))
    }

    /// Zeros within a block that keeps its place.
    fn zero_piece(&self, run: Extent, piece: Piece, space: Keeping) -> Result<(), DiskError> {
        let _flight = self.flights.start();
        let at = run.offset + piece.done;
        let Some(place) = self.locate(piece.block, "zero", at)? else {
            return Ok(());
        };
        self.storage
            .zero(Extent::new(place + piece.within, piece.len), space)
            .map_err(failed("zero", at))
    }

    fn reads_as_zeros(&self, run: Extent, piece: Piece) -> Result<bool, DiskError> {
        let start = run.offset + piece.done;
        let size = self.size();
        let mut at = start;
        while at < start + piece.len {
            let (end, content) = self.piece_at(at, size).map_err(failed("zero", at))?;
            if content == Content::Data {
                return Ok(false);
            }
            at = end;
        }
        Ok(true)
    }

    /// Gives up whole blocks of one window, with their places. They become zeros: without an entry of their own the
    /// parent would be seen. They are whole in a disk of `size` bytes; if it has another size by now, the last one may have
    /// become longer: then nothing is done, and that is said.
    fn discard(&self, blocks: &[u64], size: u64) -> Result<bool, DiskError> {
        let Some(&first) = blocks.first() else {
            return Ok(true);
        };
        let _stripes: Vec<_> = blocks
            .iter()
            .map(|&block| self.stripes[stripe(block)].lock())
            .collect();
        if self.size() != size {
            return Ok(false);
        }
        let mut given_up: Vec<(u64, Option<u64>)> = Vec::with_capacity(blocks.len());
        for &block in blocks {
            match self.source(block, "zero", block * self.parameters.block_size)? {
                Source::File(place) | Source::Mixed(place) => given_up.push((block, Some(place))),
                Source::Parent => given_up.push((block, None)),
                Source::Zeros => {}
            }
        }
        if given_up.is_empty() {
            return Ok(true);
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
        Ok(true)
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
                Err(error) => return Err(self.commit_failed("write", offset, &error)),
            }
        }
    }

    /// What an entry that was not written means for `operation` at disk offset `at`.
    pub(super) fn commit_failed(
        &self,
        operation: &'static str,
        at: u64,
        error: &CommitError,
    ) -> DiskError {
        failed(operation, at)(match error {
            CommitError::Full => io::Error::other("the log of the image is full"),
            CommitError::Failed(error) => same(error),
            CommitError::Fatal(error) => {
                self.running.stop("the log of the image cannot be started");
                same(error)
            }
        })
    }

    fn is_whole(&self, piece: Piece, size: u64) -> bool {
        let block_size = self.parameters.block_size;
        let end = piece.block * block_size + piece.within + piece.len;
        piece.within == 0 && (piece.len == block_size || end == size)
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
