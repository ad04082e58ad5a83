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

    /// Adds the frame that is sent next. A delta takes at most [`DELTA_FRAMES_MAX`]; its readers refuse more.
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

    /// Frames so far.
    pub fn frames(&self) -> u64 {
        self.frames
    }

    /// Frames that a delta still takes: before they are used up, the sender makes its frames longer.
    pub fn frames_left(&self) -> u64 {
        DELTA_FRAMES_MAX.saturating_sub(self.frames)
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
