//! How blocks come and go.
//!
//! Both happen under the lock of the block's stripe, so one thread allocates and the others find the block present.
//! Reads and writes of present blocks take no part in this: a write that found a block before its discard is ordered
//! before it, whatever the time at which its bytes reach the old place, because nobody can look there any more and the
//! place rests until the write has ended.

use std::io;

use crate::{
    base::units::{Extent, to_u64, to_usize},
    disk::{DiskError, Space as Keeping},
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
        if let Some(place) = self.bat.location(block) {
            return Ok(place);
        }
        let offset = block * self.parameters.block_size;
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
            if keeps || !self.is_whole(piece) {
                self.zero_piece(run, piece, if keeps { Keeping::Keep } else { space })?;
            } else if self.bat.location(piece.block).is_some() {
                whole.push(piece.block);
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

    /// Gives up the places of whole blocks of one window.
    fn discard(&self, blocks: &[u64]) -> Result<(), DiskError> {
        let Some(&first) = blocks.first() else {
            return Ok(());
        };
        let _stripes: Vec<_> = blocks
            .iter()
            .map(|&block| self.stripes[stripe(block)].lock())
            .collect();
        let given_up: Vec<(u64, u64)> = blocks
            .iter()
            .filter_map(|&block| Some((block, self.bat.location(block)?)))
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
        for (_, place) in given_up {
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
