//! The content of one frame: packed and unpacked. Pure functions, so that as many threads as there are may call them.
//!
//! Unpacking trusts nothing: the output is exactly as long as the frame header says, which was checked against
//! [`FRAME_BYTES_MAX`] before anything was allocated, and its CRC-32C has to match.

use std::cell::RefCell;

use bytes::Bytes;

use super::{
    error::DecodeError,
    layout::{FrameHeader, FrameKind},
};
use crate::base::{
    checksum::crc32c,
    limits::FRAME_BYTES_MAX,
    units::{DiskIndex, Extent, to_u64, to_usize},
};

/// The Zstandard level: 1 keeps up with a link of about 1 Gbit/s on one core; higher ones gain a few percent for
/// half the speed.
const ZSTD_LEVEL: i32 = 1;

/// How a payload is packed.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize,
)]
#[serde(rename_all = "lowercase")]
pub enum Codec {
    /// The raw bytes.
    None,
    /// An LZ4 block.
    Lz4,
    /// A Zstandard frame.
    Zstd,
}

impl Codec {
    /// All codecs, in the order of the effort they take.
    pub const ALL: [Self; 3] = [Self::None, Self::Lz4, Self::Zstd];

    pub(super) fn to_byte(self) -> u8 {
        match self {
            Self::None => 0,
            Self::Lz4 => 1,
            Self::Zstd => 2,
        }
    }

    pub(super) fn from_byte(byte: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|codec| codec.to_byte() == byte)
    }
}

/// A frame ready to be sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EncodedFrame {
    header: FrameHeader,
    payload: Bytes,
}

impl EncodedFrame {
    /// The frame of a log again: its header, and the payload that was read behind it.
    ///
    /// # Panics
    /// If the payload does not have the length that the header says.
    pub fn copied(header: FrameHeader, payload: Bytes) -> Self {
        assert_eq!(
            u64::from(header.payload_len),
            to_u64(payload.len()),
            "the payload belongs to another frame"
        );
        Self { header, payload }
    }

    /// The frame header.
    pub fn header(&self) -> &FrameHeader {
        &self.header
    }

    /// Frame header and payload as they stand in a log, one behind the other. A payload that was not packed is the raw
    /// bytes themselves and no copy.
    pub fn parts(&self) -> [Bytes; 2] {
        let header = Bytes::copy_from_slice(&self.header.to_bytes());
        [header, self.payload.clone()]
    }
}

/// A frame of the `raw` bytes that stand at `offset` of `disk`: 1 to [`FRAME_BYTES_MAX`] of them, whole blocks unless
/// they end with the disk. Falls back to [`Codec::None`] where packing saves less than 1/16.
///
/// # Panics
/// If `raw` is empty or too long.
pub fn encode_data(
    disk: DiskIndex,
    offset: u64,
    raw: impl Into<Bytes>,
    codec: Codec,
) -> EncodedFrame {
    let raw = raw.into();
    assert!(
        !raw.is_empty() && to_u64(raw.len()) <= FRAME_BYTES_MAX,
        "a frame has 1 byte to 1 MiB, this one has {}",
        raw.len()
    );
    let (run, crc) = (Extent::new(offset, to_u64(raw.len())), crc32c(&raw));
    let (codec, payload) = match pack(&raw, codec) {
        Some(packed) => (codec, packed.into()),
        None => (Codec::None, raw),
    };
    let header = FrameHeader {
        kind: FrameKind::Data,
        codec,
        disk,
        run,
        payload_len: u32::try_from(payload.len()).expect("a frame has at most 1 MiB"),
        crc,
    };
    EncodedFrame { header, payload }
}

/// A frame that says that `run` of `disk` reads as zeros; any length, whole blocks unless it ends with the disk.
pub fn encode_zero(disk: DiskIndex, run: Extent) -> EncodedFrame {
    let header = FrameHeader {
        kind: FrameKind::Zero,
        codec: Codec::None,
        disk,
        run,
        payload_len: 0,
        crc: 0,
    };
    let payload = Bytes::new();
    EncodedFrame { header, payload }
}

/// The raw bytes of a data frame that stands at log offset `at`, checked.
pub fn unpack(header: &FrameHeader, payload: &Bytes, at: u64) -> Result<Bytes, DecodeError> {
    debug_assert_eq!(header.kind, FrameKind::Data);
    let raw = match header.codec {
        Codec::None => payload.clone(),
        codec => {
            let mut raw = vec![0; to_usize(header.run.len)];
            let count = match codec {
                Codec::Lz4 => lz4_flex::block::decompress_into(payload, &mut raw).ok(),
                _ => unpack_zstd(payload, &mut raw),
            };
            if count != Some(raw.len()) {
                return Err(DecodeError::Invalid {
                    part: "payload",
                    offset: at,
                    reason: "it does not unpack to the length of its run",
                });
            }
            Bytes::from(raw)
        }
    };
    if crc32c(&raw) == header.crc {
        Ok(raw)
    } else {
        Err(DecodeError::Checksum {
            part: "payload",
            offset: at,
        })
    }
}

/// The packed bytes, if they are less than 15/16 of the raw ones.
fn pack(raw: &[u8], codec: Codec) -> Option<Vec<u8>> {
    let limit = raw.len() / 16 * 15;
    match codec {
        Codec::None => None,
        Codec::Lz4 => {
            let mut packed = vec![0; lz4_flex::block::get_maximum_output_size(raw.len())];
            let count = lz4_flex::block::compress_into(raw, &mut packed)
                .expect("the buffer has room for the worst case");
            packed.truncate(count);
            (count < limit).then_some(packed)
        }
        Codec::Zstd => {
            // A buffer of the limit lets zstd stop where it would not pay.
            let mut packed = vec![0; limit];
            let count = with_zstd(|zstd| zstd.compress_to_buffer(raw, packed.as_mut_slice()))?;
            packed.truncate(count);
            (count < limit).then_some(packed)
        }
    }
}

/// Unpacks into all of `raw` with this thread's decompressor, for the reason that [`with_zstd`] keeps a compressor.
fn unpack_zstd(payload: &[u8], raw: &mut [u8]) -> Option<usize> {
    thread_local! {
        static ZSTD: RefCell<Option<zstd::bulk::Decompressor<'static>>> = const { RefCell::new(None) };
    }
    ZSTD.with_borrow_mut(|slot| {
        if slot.is_none() {
            *slot = zstd::bulk::Decompressor::new().ok();
        }
        slot.as_mut()?.decompress_to_buffer(payload, raw).ok()
    })
}

/// Runs `job` with this thread's compressor: its tables of some hundred KiB are not set up again for each frame.
fn with_zstd<T>(
    job: impl FnOnce(&mut zstd::bulk::Compressor<'static>) -> std::io::Result<T>,
) -> Option<T> {
    thread_local! {
        static ZSTD: RefCell<Option<zstd::bulk::Compressor<'static>>> = const { RefCell::new(None) };
    }
    ZSTD.with_borrow_mut(|slot| {
        if slot.is_none() {
            *slot = zstd::bulk::Compressor::new(ZSTD_LEVEL).ok();
        }
        job(slot.as_mut()?).ok()
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::base::checksum::{Digest, Sha256};

    #[test]
    fn packing_that_does_not_pay_is_left_out() {
        let noise: Vec<u8> = (0..256u32)
            .flat_map(|n| digest(&n.to_le_bytes()).0)
            .collect();
        for codec in Codec::ALL {
            let frame = encode_data(DiskIndex(0), 0, noise.clone(), codec);
            assert_eq!(frame.header().codec, Codec::None, "{codec:?}");
            let text = b"the guest writes the same words again and again ".repeat(200);
            let frame = encode_data(DiskIndex(0), 0, text.clone(), codec);
            assert_eq!(frame.header().codec, codec);
            assert_eq!(unpack(frame.header(), &frame.payload, 0).unwrap(), text);
        }
    }

    fn digest(bytes: &[u8]) -> Digest {
        let mut sha = Sha256::default();
        sha.update(bytes);
        sha.finish()
    }

    #[test]
    fn a_payload_that_unpacks_to_another_length_is_refused() {
        for codec in [Codec::Lz4, Codec::Zstd] {
            let frame = encode_data(DiskIndex(0), 0, vec![7; 8192], codec);
            for len in [4096, 8191, 8193, 1 << 20] {
                let mut header = *frame.header();
                header.run.len = len;
                let refused = unpack(&header, &frame.payload, 0);
                assert!(refused.is_err(), "{codec:?} {len}");
            }
        }
    }

    proptest! {
        #[test]
        fn foreign_payloads_never_panic(
            bytes in proptest::collection::vec(any::<u8>(), 0..300),
            len in 1..70_000u64,
        ) {
            for codec in [Codec::Lz4, Codec::Zstd] {
                let mut header = *encode_zero(DiskIndex(0), Extent::new(0, len)).header();
                header.kind = FrameKind::Data;
                header.codec = codec;
                prop_assert!(unpack(&header, &Bytes::copy_from_slice(&bytes), 0).is_err());
            }
        }
    }
}
