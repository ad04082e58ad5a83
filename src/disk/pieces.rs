//! What the formats do alike with runs: cut one at the borders of blocks, and ask the file what it holds of one.

use std::{io, ops::Range};

use super::Content;
use crate::{
    base::units::{Extent, to_usize},
    storage::Storage,
};

/// A run within one block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Piece {
    pub(super) block: u64,
    /// Bytes from the start of the block.
    pub(super) within: u64,
    pub(super) len: u64,
    /// Bytes from the start of the run asked for.
    pub(super) done: u64,
}

impl Piece {
    /// Its place in the buffer of the run asked for.
    pub(super) fn range(self) -> Range<usize> {
        to_usize(self.done)..to_usize(self.done + self.len)
    }
}

/// The pieces of a run, block by block.
pub(super) fn pieces(run: Extent, block_size: u64) -> impl Iterator<Item = Piece> {
    let mut done = 0;
    std::iter::from_fn(move || {
        let at = run.offset + done;
        let within = at % block_size;
        let len = (run.len - done).min(block_size - within);
        let piece = Piece {
            block: at / block_size,
            within,
            len,
            done,
        };
        done += len;
        (len > 0).then_some(piece)
    })
}

/// The run of one kind at `offset` of the file: its bytes, `len` at most, and what they are. What lies past the end of the
/// file is zeros.
pub(super) fn stored_run(
    storage: &dyn Storage,
    offset: u64,
    len: u64,
) -> io::Result<(u64, Content)> {
    let end = offset + len;
    Ok(match storage.data_after(offset)? {
        Some(data) if data.offset <= offset => (data.end().min(end) - offset, Content::Data),
        Some(data) => (data.offset.min(end) - offset, Content::Zero),
        None => (len, Content::Zero),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_is_cut_at_the_borders_of_blocks() {
        let cut = |offset, len| -> Vec<_> {
            pieces(Extent::new(offset, len), 4096)
                .map(|piece| (piece.block, piece.within, piece.range()))
                .collect()
        };
        assert_eq!(cut(4096, 0), []);
        assert_eq!(cut(4096, 4096), [(1, 0, 0..4096)]);
        assert_eq!(
            cut(4095, 4098),
            [(0, 4095, 0..1), (1, 0, 1..4097), (2, 0, 4097..4098)]
        );
    }
}
