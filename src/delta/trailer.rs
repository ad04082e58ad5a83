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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::delta::{LogKind, layout::tests::header};

    /// A foot that stands at 1032.
    const FOOT: Foot = Foot {
        epoch: Epoch(2),
        cut: Timestamp(3),
        trailer_at: 1000,
        log_len: 1104,
        chain: Digest([4; 32]),
    };

    #[test]
    fn each_field_of_a_head_is_checked() {
        let head = TrailerHead {
            consistency: Consistency::Application,
            frames: 3,
            index_entries: 3,
            index_crc: 7,
        };
        let parse = |head: TrailerHead| TrailerHead::parse(&head.to_bytes(), 0);
        for consistency in [Consistency::Crash, Consistency::Application] {
            let head = TrailerHead {
                consistency,
                ..head
            };
            assert_eq!(parse(head), Ok(head));
        }
        for (index_entries, right) in [(0, true), (2, false), (4, false)] {
            let head = TrailerHead {
                index_entries,
                ..head
            };
            assert_eq!(parse(head).is_ok(), right, "{index_entries}");
            assert_eq!(head.index_len(), Some(index_entries * 32));
        }
        for (at, byte) in [(0, KIND_TRAILER - 1), (1, 2), (2, 1), (7, 1)] {
            let mut bytes = head.to_bytes()[..FRAME_HEADER_BYTES - 4].to_vec();
            bytes[at] = byte;
            seal(&mut bytes, 0);
            let bytes = bytes.try_into().unwrap();
            assert!(TrailerHead::parse(&bytes, 0).is_err(), "{at}");
        }
    }

    #[test]
    fn each_field_of_a_foot_is_checked() {
        assert_eq!(Foot::parse(&FOOT.to_bytes(), 1032), Ok(FOOT));
        for (trailer_at, log_len, at, right) in [
            (1032, 1104, 1032, true),
            (1033, 1104, 1032, false),
            (1000, 1103, 1032, false),
            (1000, 1104, 1031, false),
            (1000, u64::MAX, u64::MAX - 71, false),
        ] {
            let foot = Foot {
                trailer_at,
                log_len,
                ..FOOT
            };
            let found = Foot::parse(&foot.to_bytes(), at);
            assert_eq!(found.is_ok(), right, "{trailer_at} {log_len} {at}");
        }
        let mut bytes = FOOT.to_bytes();
        bytes[71] ^= 1;
        assert!(Foot::parse(&bytes, 1032).is_err(), "the end mark");
    }

    #[test]
    fn a_foot_that_contradicts_its_header_is_named_by_its_place() {
        let foot = Foot {
            epoch: Epoch(1),
            ..FOOT
        };
        let found = header(LogKind::Delta).point(&foot);
        assert!(
            matches!(
                found,
                Err(DecodeError::Invalid {
                    part: "foot",
                    offset: 1032,
                    ..
                })
            ),
            "{found:?}"
        );
    }
}
