//! Strings frames to a log: keeps the chain hash and the index, hands out header and trailer.
//!
//! The bytes of the frames do not pass through here: whoever sends them sends [`EncodedFrame::parts`] in the order in
//! which [`Encoder::frame`] was told about them.

use bytes::Bytes;

use super::{
    frame::EncodedFrame,
    layout::{FRAME_HEADER_BYTES, Header, LogKind},
    trailer::{Consistency, FOOT_BYTES, FOOT_CHAINED_BYTES, Foot, TrailerHead},
};
use crate::base::{
    checksum::{Digest, Sha256, crc32c},
    clock::Timestamp,
    ids::Lineage,
    limits::{DELTA_FRAMES_MAX, INDEX_FRAMES_MAX},
    units::{Epoch, to_u64},
};

/// The state of a log that is being written.
#[derive(Debug)]
pub struct Encoder {
    chain: Sha256,
    frames: u64,
    /// Bytes of the log so far.
    position: u64,
    /// The frame headers so far; nothing for a log without an index.
    index: Option<Vec<u8>>,
    consistency: Consistency,
    kind: LogKind,
}

/// The start of every chain hash: the parent's hash and the header.
pub(super) fn chain_start(header: &Header, header_bytes: &[u8]) -> Sha256 {
    let mut chain = Sha256::default();
    chain.update(&header.parent.map_or([0; 32], |parent| parent.chain.0));
    chain.update(header_bytes);
    chain
}

/// The end of every chain hash: the trailer's head and the foot up to the hash.
pub(super) fn chain_end(mut chain: Sha256, head: TrailerHead, foot: Foot) -> Digest {
    chain.update(&head.to_bytes());
    chain.update(&foot.to_bytes()[..FOOT_CHAINED_BYTES]);
    chain.finish()
}

/// The chain hash of the log with this header, these frame headers, in order and without gaps, and this end. A reader
/// that has the index in `frame_headers` knows by it that nothing was changed since the primary wrote it.
pub fn chain_of(
    header: &Header,
    header_bytes: &[u8],
    frame_headers: &[u8],
    head: TrailerHead,
    foot: Foot,
) -> Digest {
    let mut chain = chain_start(header, header_bytes);
    chain.update(frame_headers);
    chain_end(chain, head, foot)
}

impl Encoder {
    /// Begins a log; the bytes are its header. The header is one that [`Header::parse`] would take.
    pub fn new(header: &Header) -> (Self, Bytes) {
        let bytes = header.to_bytes();
        let encoder = Self {
            chain: chain_start(header, &bytes),
            frames: 0,
            position: to_u64(bytes.len()),
            // Nobody looks for a frame in an initial copy: it is applied from first to last.
            index: (header.kind != LogKind::Initial).then(Vec::new),
            consistency: Consistency::Crash,
            kind: header.kind,
        };
        (encoder, bytes.into())
    }

    /// Adds the frame that is sent next, unless the log [is full](Self::is_full).
    pub fn frame(&mut self, frame: &EncodedFrame) {
        let header = frame.header().to_bytes();
        self.chain.update(&header);
        self.frames += 1;
        self.position += frame.header().frame_len();
        if self.frames > INDEX_FRAMES_MAX {
            self.index = None;
        }
        if let Some(index) = &mut self.index {
            index.extend_from_slice(&header);
        }
    }

    /// Whether it is a delta that takes no more frames: its readers would refuse it.
    pub fn is_full(&self) -> bool {
        self.kind != LogKind::Initial && self.frames >= DELTA_FRAMES_MAX
    }

    /// Says what the guest was doing at the cut; without it the point is crash-consistent.
    pub fn set_consistency(&mut self, consistency: Consistency) {
        self.consistency = consistency;
    }

    /// Ends the log at the cut of `epoch`; the bytes are its trailer. The lineage is the point it leads to. The epoch of a
    /// folded log is the one its header names.
    pub fn finish(self, epoch: Epoch, cut: Timestamp) -> (Bytes, Lineage) {
        let index = self.index.unwrap_or_default();
        let head = TrailerHead {
            consistency: self.consistency,
            frames: self.frames,
            index_entries: to_u64(index.len() / FRAME_HEADER_BYTES),
            index_crc: crc32c(&index),
        };
        let len = FRAME_HEADER_BYTES + index.len() + FOOT_BYTES;
        let mut foot = Foot {
            epoch,
            cut,
            trailer_at: self.position,
            log_len: self.position + to_u64(len),
            chain: Digest::default(),
        };
        foot.chain = chain_end(self.chain, head, foot);
        let mut bytes = Vec::with_capacity(len);
        bytes.extend_from_slice(&head.to_bytes());
        bytes.extend_from_slice(&index);
        bytes.extend_from_slice(&foot.to_bytes());
        let lineage = match self.kind {
            LogKind::Folded(point) => point,
            LogKind::Initial | LogKind::Delta => Lineage {
                epoch,
                chain: foot.chain,
            },
        };
        (bytes.into(), lineage)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        base::units::{DiskIndex, Extent},
        delta::{encode_zero, layout::tests::header},
    };

    fn frame(block: u64) -> EncodedFrame {
        encode_zero(DiskIndex(0), Extent::new(block * 4096, 4096))
    }

    /// Head, index and foot of the end of a log of `len` bytes.
    fn parts(end: &[u8], len: u64) -> (TrailerHead, &[u8], Foot) {
        let (head, rest) = end.split_first_chunk().unwrap();
        let (index, foot) = rest.split_last_chunk().unwrap();
        let foot_at = len - to_u64(FOOT_BYTES);
        let head = TrailerHead::parse(head, foot_at - to_u64(index.len())).unwrap();
        (head, index, Foot::parse(foot, foot_at).unwrap())
    }

    #[test]
    fn the_chain_hash_can_be_computed_from_the_index() {
        let header = header(LogKind::Delta);
        let (mut encoder, first) = Encoder::new(&header);
        encoder.frame(&frame(0));
        encoder.frame(&frame(1));
        let (end, lineage) = encoder.finish(Epoch(2), Timestamp(3));
        let len = to_u64(first.len() + 2 * FRAME_HEADER_BYTES + end.len());
        let (head, index, foot) = parts(&end, len);
        assert_eq!(foot.log_len, len);
        let of = |index: &[u8]| chain_of(&header, &first, index, head, foot);
        assert_eq!(of(index), lineage.chain);
        let mut other = index.to_vec();
        other[40] ^= 1;
        assert_ne!(of(&other), lineage.chain);
    }

    #[test]
    fn a_point_is_crash_consistent_unless_it_is_said_to_be_more() {
        for consistency in [None, Some(Consistency::Application)] {
            let (mut encoder, first) = Encoder::new(&header(LogKind::Delta));
            if let Some(consistency) = consistency {
                encoder.set_consistency(consistency);
            }
            let (end, _) = encoder.finish(Epoch(2), Timestamp(3));
            let (head, _, _) = parts(&end, to_u64(first.len() + end.len()));
            assert_eq!(head.consistency, consistency.unwrap_or_default());
        }
    }

    #[test]
    fn a_log_of_many_frames_has_no_index_and_a_delta_takes_no_more_than_it_may() {
        for (frames, entries) in [
            (INDEX_FRAMES_MAX, INDEX_FRAMES_MAX),
            (INDEX_FRAMES_MAX + 1, 0),
        ] {
            let (mut encoder, first) = Encoder::new(&header(LogKind::Delta));
            let frame = frame(0);
            (0..frames).for_each(|_| encoder.frame(&frame));
            let (end, _) = encoder.finish(Epoch(2), Timestamp(3));
            let frames_len = frames * to_u64(FRAME_HEADER_BYTES);
            let (head, ..) = parts(&end, to_u64(first.len() + end.len()) + frames_len);
            assert_eq!((head.frames, head.index_entries), (frames, entries));
        }
        for (kind, full) in [(LogKind::Delta, true), (LogKind::Initial, false)] {
            let (mut encoder, _) = Encoder::new(&header(kind));
            encoder.frames = DELTA_FRAMES_MAX - 1;
            assert!(!encoder.is_full());
            encoder.frame(&frame(0));
            assert_eq!(encoder.is_full(), full, "{kind:?}");
        }
    }
}
