//! Takes a log apart as it arrives.
//!
//! Bytes go in through [`Decoder::feed`] in pieces of any size; [`Decoder::next`] gives what is complete. Call it until it
//! gives nothing before feeding more: memory is then bounded by the largest frame and two pieces. What comes out is
//! checked: structure, checksums, runs against the disk table, at the end counts, index and chain hash. Only a log whose
//! [`Event::Trailer`] came out is whole; frames that came out before it may be applied where a half-applied log does no
//! harm.

use bytes::{Buf, BufMut, Bytes, BytesMut};

use super::{
    encoder::{chain_end, chain_start},
    error::DecodeError,
    frame::unpack,
    layout::{
        FRAME_HEADER_BYTES, FrameHeader, FrameKind, Header, LogKind, PREAMBLE_BYTES, header_len,
        is_trailer,
    },
    trailer::{FOOT_BYTES, Foot, Trailer, TrailerHead},
};
use crate::base::{
    buffers::Buffers,
    checksum::{Crc32c, Sha256},
    limits::DELTA_FRAMES_MAX,
    units::{BLOCK_BYTES, KIB, to_u64, to_usize},
};

/// A payload of at least so many bytes begins at a whole block of memory, where a disk can take it from.
const ALIGNED_LEN_MIN: usize = to_usize(128 * KIB);
/// Room behind such a payload for the rest of the piece that ends it. A longer piece costs a copy.
const PIECE_ROOM: usize = to_usize(64 * KIB);
/// Buffers of long payloads that are used in turn, if whoever takes frames holds no more of them at a time.
const BUFFERS_MAX: usize = 8;

/// What a log holds, in order: one header, frames, one trailer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// The first: whose log it is.
    Header(Header),
    /// A frame.
    Frame {
        /// Which run, and how it was packed.
        header: FrameHeader,
        /// Position of its payload in the log.
        at: u64,
        /// The content, as long as the run; nothing for a run of zeros. Long content that was not packed begins at a
        /// multiple of [`BLOCK_BYTES`] in memory, if it came in pieces of ordinary length.
        raw: Option<Bytes>,
    },
    /// The last: the log is whole.
    Trailer(Trailer),
}

/// The state of a log that is being read.
#[derive(Debug, Default)]
pub struct Decoder {
    buffer: BytesMut,
    buffers: Buffers<BUFFERS_MAX>,
    /// Log offset of the first byte in the buffer.
    position: u64,
    frames: u64,
    /// Over the frame headers, to be compared with the index.
    headers_crc: Crc32c,
    chain: Sha256,
    header: Option<Header>,
    state: State,
}

/// What the next byte belongs to.
///
/// ```text
/// Preamble -> Header -> Item -> Payload -> Item
///                        |
///                        +----> Index -> Foot -> End          any -> Failed
/// ```
#[derive(Debug, Default)]
enum State {
    #[default]
    Preamble,
    Header {
        len: usize,
    },
    Item,
    Payload(FrameHeader),
    Index(Box<Index>),
    Foot {
        head: TrailerHead,
        trailer_at: u64,
    },
    End,
    Failed,
}

/// An index that is passing by.
#[derive(Debug)]
struct Index {
    head: TrailerHead,
    trailer_at: u64,
    /// Bytes still to come.
    left: u64,
    crc: Crc32c,
}

impl Decoder {
    /// A decoder at the start of a log.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds bytes. Those after an error or after the trailer are kept until the next call of [`next`](Self::next)
    /// complains about them.
    pub fn feed(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
    }

    /// The next complete part of the log, or nothing until more bytes are fed. An error is final.
    #[expect(
        clippy::should_implement_trait,
        reason = "an iterator that gives nothing now and something later surprises"
    )]
    pub fn next(&mut self) -> Result<Option<Event>, DecodeError> {
        let step = self.step();
        if step.is_err() {
            self.state = State::Failed;
            self.buffer = BytesMut::new();
        }
        step
    }

    /// Whether the trailer came out and nothing follows it.
    pub fn is_complete(&self) -> bool {
        matches!(self.state, State::End) && self.buffer.is_empty()
    }

    fn step(&mut self) -> Result<Option<Event>, DecodeError> {
        loop {
            match std::mem::replace(&mut self.state, State::Failed) {
                State::Preamble => {
                    let Some(preamble) = self.buffer.first_chunk::<PREAMBLE_BYTES>() else {
                        self.state = State::Preamble;
                        return Ok(None);
                    };
                    let len = header_len(preamble)?;
                    self.state = State::Header { len };
                }
                State::Header { len } => {
                    let Some(bytes) = self.take(len) else {
                        self.state = State::Header { len };
                        return Ok(None);
                    };
                    let header = Header::parse(&bytes)?;
                    self.chain = chain_start(&header, &bytes);
                    self.header = Some(header.clone());
                    self.state = State::Item;
                    return Ok(Some(Event::Header(header)));
                }
                State::Item => {
                    let at = self.position;
                    let Some(bytes) = self.take_array::<FRAME_HEADER_BYTES>() else {
                        self.state = State::Item;
                        return Ok(None);
                    };
                    self.state = self.item(&bytes, at)?;
                    self.align();
                }
                State::Payload(header) => {
                    let at = self.position;
                    let Some(payload) = self.take(to_usize(u64::from(header.payload_len))) else {
                        self.state = State::Payload(header);
                        return Ok(None);
                    };
                    if payload.len() >= ALIGNED_LEN_MIN && is_aligned(&payload) {
                        self.buffers.lend(&payload);
                    }
                    let raw = match header.kind {
                        FrameKind::Data => Some(unpack(&header, &payload, at)?),
                        FrameKind::Zero => None,
                    };
                    self.state = State::Item;
                    return Ok(Some(Event::Frame { header, at, raw }));
                }
                State::Index(index) if index.left > 0 && self.buffer.is_empty() => {
                    self.state = State::Index(index);
                    return Ok(None);
                }
                State::Index(index) => self.state = self.index(index)?,
                State::Foot { head, trailer_at } => {
                    let at = self.position;
                    let Some(bytes) = self.take_array::<FOOT_BYTES>() else {
                        self.state = State::Foot { head, trailer_at };
                        return Ok(None);
                    };
                    let trailer = self.foot(head, trailer_at, &bytes, at)?;
                    self.state = State::End;
                    return Ok(Some(Event::Trailer(trailer)));
                }
                State::End if self.buffer.is_empty() => {
                    self.state = State::End;
                    return Ok(None);
                }
                State::End => return Err(DecodeError::Surplus(self.position)),
                State::Failed => return Err(DecodeError::Stopped),
            }
        }
    }

    /// Moves the beginning of a long payload to where it can be written from without moving all of it.
    fn align(&mut self) {
        let len = match &self.state {
            State::Payload(header) => to_usize(u64::from(header.payload_len)),
            _ => 0,
        };
        if len < ALIGNED_LEN_MIN || self.buffer.len() > PIECE_ROOM {
            return;
        }
        let again = self.buffers.reclaim(len + PIECE_ROOM);
        let mut aligned = again.unwrap_or_else(|| {
            let block = to_usize(BLOCK_BYTES);
            let mut fresh = BytesMut::with_capacity(block + len + PIECE_ROOM);
            let unaligned = fresh.as_ptr().align_offset(block);
            fresh.put_bytes(0, unaligned);
            fresh.advance(unaligned);
            fresh
        });
        aligned.clear();
        aligned.extend_from_slice(&self.buffer);
        self.buffer = aligned;
    }

    /// The state after a frame header or the trailer's head.
    fn item(&mut self, bytes: &[u8; FRAME_HEADER_BYTES], at: u64) -> Result<State, DecodeError> {
        if is_trailer(bytes) {
            let head = TrailerHead::parse(bytes, at)?;
            let bad = |reason| DecodeError::Invalid {
                part: "trailer",
                offset: at,
                reason,
            };
            if head.frames != self.frames {
                return Err(bad("it counts another number of frames"));
            }
            if head.index_entries != 0 && head.index_crc != self.headers_crc.finish() {
                return Err(bad("its index does not repeat the frame headers"));
            }
            let left = head
                .index_len()
                .ok_or_else(|| bad("its index is too long"))?;
            return Ok(State::Index(Box::new(Index {
                head,
                trailer_at: at,
                left,
                crc: Crc32c::default(),
            })));
        }
        let delta = matches!(&self.header, Some(header) if header.kind != LogKind::Initial);
        if delta && self.frames >= DELTA_FRAMES_MAX {
            return Err(DecodeError::Invalid {
                part: "frame header",
                offset: at,
                reason: "a delta has at most 2^24 frames",
            });
        }
        let disks = self.header.as_ref().map_or(&[][..], |header| &header.disks);
        let header = FrameHeader::parse(bytes, disks, at)?;
        self.chain.update(bytes);
        self.headers_crc.update(bytes);
        self.frames += 1;
        Ok(State::Payload(header))
    }

    /// The state after as much of the index as is there.
    fn index(&mut self, mut index: Box<Index>) -> Result<State, DecodeError> {
        let count = to_usize(index.left.min(to_u64(self.buffer.len())));
        let piece = self.take(count).expect("so many bytes are there");
        index.crc.update(&piece);
        index.left -= to_u64(count);
        if index.left > 0 {
            return Ok(State::Index(index));
        }
        if index.crc.finish() != index.head.index_crc {
            return Err(DecodeError::Checksum {
                part: "index",
                offset: index.trailer_at,
            });
        }
        Ok(State::Foot {
            head: index.head,
            trailer_at: index.trailer_at,
        })
    }

    fn foot(
        &self,
        head: TrailerHead,
        trailer_at: u64,
        bytes: &[u8; FOOT_BYTES],
        at: u64,
    ) -> Result<Trailer, DecodeError> {
        let foot = Foot::parse(bytes, at)?;
        let bad = |reason| DecodeError::Invalid {
            part: "foot",
            offset: at,
            reason,
        };
        if foot.trailer_at != trailer_at {
            return Err(bad("it points to another trailer"));
        }
        let header = self.header.as_ref().ok_or(DecodeError::Stopped)?;
        let point = header.point(&foot)?;
        let computed = chain_end(self.chain.clone(), head, foot);
        if computed != foot.chain {
            return Err(DecodeError::Chain {
                computed,
                stated: foot.chain,
            });
        }
        Ok(foot.trailer(head, point))
    }

    /// The first `len` bytes of the buffer, if they are there.
    fn take(&mut self, len: usize) -> Option<Bytes> {
        (self.buffer.len() >= len).then(|| {
            self.position += to_u64(len);
            self.buffer.split_to(len).freeze()
        })
    }

    fn take_array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let bytes = self.take(N)?;
        Some(bytes[..].try_into().expect("so many bytes were taken"))
    }
}

fn is_aligned(bytes: &[u8]) -> bool {
    bytes.as_ptr().align_offset(to_usize(BLOCK_BYTES)) == 0
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        base::units::{DiskIndex, Extent, MIB},
        delta::{Codec, EncodedFrame, Encoder, encode_data, encode_zero, layout::tests::header},
    };

    /// The bytes of these frames, without the end of their log.
    fn bytes_of(frames: &[EncodedFrame]) -> Vec<u8> {
        let parts = frames.iter().flat_map(EncodedFrame::parts);
        parts.flat_map(|part| part.to_vec()).collect()
    }

    /// A decoder that has read the header of a log.
    fn begun(kind: LogKind) -> Decoder {
        let mut decoder = Decoder::new();
        decoder.feed(&Encoder::new(&header(kind)).1);
        assert!(matches!(decoder.next(), Ok(Some(Event::Header(_)))));
        decoder
    }

    /// Frames of so many bytes each.
    fn data(lens: &[u64]) -> Vec<EncodedFrame> {
        let frame = |&len| encode_data(DiskIndex(0), 0, vec![9; to_usize(len)], Codec::None);
        lens.iter().map(frame).collect()
    }

    fn content(event: Option<Event>) -> Option<Bytes> {
        match event {
            Some(Event::Frame { raw, .. }) => raw,
            _ => None,
        }
    }

    /// An initial copy may need more frames than a delta may have.
    #[test]
    fn a_delta_has_so_many_frames_and_no_more() {
        for (kind, taken) in [(LogKind::Delta, false), (LogKind::Initial, true)] {
            let frame = encode_zero(DiskIndex(0), Extent::new(0, BLOCK_BYTES));
            let mut decoder = begun(kind);
            decoder.frames = DELTA_FRAMES_MAX - 1;
            for last in [false, true] {
                decoder.feed(&bytes_of(std::slice::from_ref(&frame)));
                let found = decoder.next();
                assert_eq!(found.is_ok(), taken || !last, "{kind:?}: {found:?}");
            }
        }
    }

    /// Longer ones than before, which fit into nothing that came back, and shorter ones, which do.
    #[test]
    fn long_content_is_aligned_in_new_buffers_and_in_those_that_come_back() {
        let kib: Vec<u64> = [128, 160, 224, 1024, 128, 1024, 512]
            .map(|n| n * KIB)
            .into();
        let mut decoder = begun(LogKind::Delta);
        let mut found = Vec::new();
        for piece in bytes_of(&data(&kib)).chunks(60 << 10) {
            decoder.feed(piece);
            while let Some(raw) = content(decoder.next().unwrap()) {
                assert!(is_aligned(&raw), "{}", raw.len());
                assert_eq!(raw, vec![9; raw.len()]);
                found.push(to_u64(raw.len()));
            }
        }
        assert_eq!(found, kib);
        let again = decoder.buffers.reclaim(1).unwrap();
        assert!(is_aligned(&again), "it was lent");
    }

    /// Short content, and long content of which more than a piece of ordinary length is there already: one frame behind the
    /// other.
    #[test]
    fn what_need_not_be_moved_is_not() {
        for len in [16 * KIB, MIB] {
            let mut decoder = begun(LogKind::Delta);
            decoder.feed(&bytes_of(&data(&[len; 3])));
            let raws = [(); 3].map(|()| content(decoder.next().unwrap()).unwrap());
            let starts = raws.each_ref().map(|raw| raw.as_ptr().addr());
            let apart = to_usize(len) + FRAME_HEADER_BYTES;
            assert_eq!(starts.map(|start| start - starts[0]), [0, apart, 2 * apart]);
            assert!(!decoder.is_complete());
        }
    }

    #[test]
    fn a_buffer_is_lent_only_if_its_content_is_aligned() {
        let mut decoder = begun(LogKind::Delta);
        decoder.feed(&bytes_of(&data(&[MIB])));
        let raw = content(decoder.next().unwrap()).unwrap();
        assert!(!is_aligned(&raw), "it is behind its header");
        drop(raw);
        decoder.buffer = BytesMut::new();
        assert!(decoder.buffers.reclaim(1).is_none());
    }
}
