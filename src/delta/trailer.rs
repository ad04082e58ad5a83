//! The end of a log: the head of the trailer and the foot. The tables are in [`layout`](super::layout).

use std::io::Cursor;

use binrw::{BinRead, binrw};

use super::{
    error::{DecodeError, invalid},
    layout::{FRAME_HEADER_BYTES, KIND_TRAILER, pack, seal, unseal},
};
use crate::base::{
    checksum::Digest,
    clock::Timestamp,
    ids::Lineage,
    units::{Epoch, to_u64},
};

/// Bytes of the foot, the last of a log.
pub const FOOT_BYTES: usize = 72;
/// Bytes of the foot that the chain hash covers: all before it.
pub(super) const FOOT_CHAINED_BYTES: usize = 32;

const END_MARK: [u8; 4] = *b"HRL.";

/// What a recovery point is worth to the guest.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize,
)]
#[serde(rename_all = "lowercase")]
pub enum Consistency {
    /// As after a power cut.
    #[default]
    Crash,
    /// The guest was frozen at the cut.
    Application,
}

impl Consistency {
    fn to_byte(self) -> u8 {
        match self {
            Self::Crash => 0,
            Self::Application => 1,
        }
    }

    fn from_byte(byte: u8) -> Result<Self, &'static str> {
        match byte {
            0 => Ok(Self::Crash),
            1 => Ok(Self::Application),
            _ => Err("unknown consistency"),
        }
    }
}

/// What the end of a log says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Trailer {
    /// The point that the log leads to: its epoch, and the chain hash over everything that led to it.
    pub lineage: Lineage,
    /// When the cut was made.
    pub cut: Timestamp,
    /// What the guest was doing at the cut.
    pub consistency: Consistency,
    /// Frames of the log.
    pub frames: u64,
    /// Bytes of the whole log.
    pub log_len: u64,
}

/// The first part of a trailer.
#[binrw]
#[brw(little)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TrailerHead {
    #[br(temp, assert(kind == KIND_TRAILER))]
    #[bw(calc = KIND_TRAILER)]
    kind: u8,
    /// What the guest was doing at the cut.
    #[br(try_map = Consistency::from_byte)]
    #[bw(map = |consistency| consistency.to_byte())]
    pub consistency: Consistency,
    #[br(temp, assert(reserved == [0; 6]))]
    #[bw(calc = [0; 6])]
    reserved: [u8; 6],
    /// Frames of the log.
    pub frames: u64,
    /// Entries of the index: as many, or none.
    pub index_entries: u64,
    /// CRC-32C of the index.
    pub index_crc: u32,
}

/// The last bytes of a log.
#[binrw]
#[brw(little)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Foot {
    /// The epoch.
    #[br(map = Epoch)]
    #[bw(map = |epoch| epoch.0)]
    pub epoch: Epoch,
    /// When the cut was made.
    #[br(map = Timestamp)]
    #[bw(map = |cut| cut.0)]
    pub cut: Timestamp,
    /// Position of the trailer's head.
    pub trailer_at: u64,
    /// Length of the log in bytes.
    pub log_len: u64,
    /// The chain hash of these bytes.
    #[br(map = Digest)]
    #[bw(map = |chain| chain.0)]
    pub chain: Digest,
}

impl TrailerHead {
    /// The head as it stands in a log.
    pub fn to_bytes(self) -> [u8; FRAME_HEADER_BYTES] {
        let mut bytes = Vec::with_capacity(FRAME_HEADER_BYTES);
        pack(&self, &mut bytes);
        seal(&mut bytes, 0);
        bytes.try_into().expect("a trailer's head has 32 bytes")
    }

    /// The head in `bytes`, which stand at log offset `at`.
    pub fn parse(bytes: &[u8; FRAME_HEADER_BYTES], at: u64) -> Result<Self, DecodeError> {
        const PART: &str = "trailer";
        let body = unseal(bytes, PART, at)?;
        let head = Self::read(&mut Cursor::new(body)).map_err(|_| {
            invalid(
                PART,
                at,
                "a reserved byte is set, or its consistency is unknown",
            )
        })?;
        if head.index_entries != 0 && head.index_entries != head.frames {
            return Err(invalid(PART, at, "its index does not have all frames"));
        }
        Ok(head)
    }

    /// Bytes of the index, if they can be counted.
    pub fn index_len(self) -> Option<u64> {
        self.index_entries.checked_mul(to_u64(FRAME_HEADER_BYTES))
    }
}

impl Foot {
    /// The foot as it stands in a log.
    pub fn to_bytes(self) -> [u8; FOOT_BYTES] {
        let mut bytes = Vec::with_capacity(FOOT_BYTES);
        pack(&self, &mut bytes);
        seal(&mut bytes, 0);
        bytes.extend_from_slice(&END_MARK);
        bytes.try_into().expect("a foot has 72 bytes")
    }

    /// The foot in `bytes`, which stand at log offset `at`.
    pub fn parse(bytes: &[u8; FOOT_BYTES], at: u64) -> Result<Self, DecodeError> {
        const PART: &str = "foot";
        let (sealed, mark) = bytes.split_last_chunk().expect("72 bytes hold 4");
        if *mark != END_MARK {
            return Err(invalid(PART, at, "the end mark is missing"));
        }
        let body = unseal(sealed, PART, at)?;
        let foot = Self::read(&mut Cursor::new(body)).expect("64 bytes are there");
        let end = at.checked_add(to_u64(FOOT_BYTES));
        if end != Some(foot.log_len) || foot.trailer_at > at {
            return Err(invalid(PART, at, "its positions do not match"));
        }
        Ok(foot)
    }

    /// Where the foot stands in the log.
    pub(super) fn foot_at(&self) -> u64 {
        self.log_len.saturating_sub(to_u64(FOOT_BYTES))
    }

    /// What the end of a log that leads to `point` says.
    pub fn trailer(&self, head: TrailerHead, point: Lineage) -> Trailer {
        Trailer {
            lineage: point,
            cut: self.cut,
            consistency: head.consistency,
            frames: head.frames,
            log_len: self.log_len,
        }
    }
}
