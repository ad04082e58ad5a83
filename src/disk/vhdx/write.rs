//! How blocks come and go.
//!
//! Both happen under the lock of the block's stripe, so one thread allocates and the others find the block present.
//! Reads and writes of present blocks take no part in this: a write that found a block before its discard is ordered
//! before it, whatever the time at which its bytes reach the old place, because nobody can look there any more and the
//! place rests until the write has ended.

use std::{io, ops::Range};

use crate::{
    base::units::{Extent, to_u64, to_usize},
    disk::{DiskError, Space as Keeping, check_run},
};

use super::{
    Kind,
    bat::Entry,
    disk::{Piece, STRIPES, VhdxDisk, failed},
    log::journal::{BlockChange, CHANGES_PER_REQUEST_MAX, CommitError},
};

const _: () = assert!(
    to_usize(CHANGES_PER_REQUEST_MAX) == STRIPES,
    "a window of blocks has each stripe once, in order: its locks cannot deadlock"
);

impl VhdxDisk {
    /// The place of `block`, which was absent a moment ago.
    pub(super) fn allocate(&self, block: u64) -> Result<u64, DiskError> {
        let _stripe = self.stripes[stripe(block)].lock();
        let offset = block * self.parameters.block_size;
        // The disk may have shrunk since the caller looked; it does not while this is held.
        check_run(offset, 1, self.size())?;
        if let Some(place) = self.locate(block, "write", offset)? {
            return Ok(place);
        }
        let place = self
            .space
            .take(self.storage.as_ref())
            .map_err(failed("write", offset))?;
        let committed = self.commit(&[(block, Entry::present(place))], offset);
        if committed.is_err() {
            self.space.give_back(place);
        }
        committed.map(|()| place)
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
            if keeps || !self.is_whole(piece, size) {
                self.zero_piece(run, piece, if keeps { Keeping::Keep } else { space })?;
            } else if self
                .locate(piece.block, "zero", run.offset + piece.done)?
                .is_some()
            {
                whole.push(piece.block);
            }
        }
        if self.discard(&whole, size)? {
            Ok(())
        } else {
            self.zero_run(run, space)
        }
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

    /// Gives up the places of blocks of one window that are whole in a disk of `size` bytes. Does nothing, and says so, if
    /// the disk has another size by now: its last block may have become longer.
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
        let mut given_up: Vec<(u64, u64)> = Vec::with_capacity(blocks.len());
        for &block in blocks {
            let at = block * self.parameters.block_size;
            given_up.extend(self.locate(block, "zero", at)?.map(|place| (block, place)));
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
        for (_, place) in given_up {
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
                self.stop("the log of the image cannot be started");
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
