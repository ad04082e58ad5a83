//! The structures of a VHD file as they stand in its bytes (Microsoft, "Virtual Hard Disk Image Format Specification",
//! version 1.0, 2006), and nothing about what they mean.
//!
//! Everything is big-endian, but for the text of a parent locator. Offsets and lengths are bytes where nothing else is
//! said; an entry of the table counts sectors of 512 bytes.
//!
//! | file offset | bytes | what |
//! |---|---|---|
//! | last 512 bytes | 512 | footer, in every VHD |
//! | 0 | 512 | copy of the footer; the data itself in a fixed VHD |
//! | 512 | 1024 | dynamic header: block size, where the table is, who the parent is |
//! | 1536 | 4 for each block, padded to a sector | block allocation table |
//! | wherever the table says | bitmap of sectors, padded to a sector, then the block | blocks |

use std::io::Cursor;

use binrw::{BinRead, BinWrite, binrw};
use uuid::Uuid;

use crate::base::units::{GIB, KIB, MIB, SECTOR_BYTES, to_u64, to_usize};

/// The first bytes of every footer.
pub(super) const FOOTER_SIGNATURE: &[u8; 8] = b"conectix";
/// Bytes of a footer, all covered by its checksum.
pub(super) const FOOTER_BYTES: usize = 512;
/// The same as a length.
pub(super) const FOOTER_LEN: u64 = to_u64(FOOTER_BYTES);
/// Bytes of a dynamic header, all covered by its checksum.
pub(super) const HEADER_BYTES: usize = 1024;
/// The same as a length.
pub(super) const HEADER_LEN: u64 = to_u64(HEADER_BYTES);
/// "Nothing follows", in offsets.
pub(super) const NO_OFFSET: u64 = u64::MAX;
/// The only version there is of footer and header: 1.0.
pub(super) const VERSION: u32 = 0x0001_0000;
/// The feature bit that is always set.
pub(super) const FEATURE_RESERVED: u32 = 2;
/// An entry of the table without block.
pub(super) const ABSENT: u32 = u32::MAX;
/// Largest disk, in bytes: 0xFF000000 sectors, the bound of Windows.
pub(super) const SIZE_MAX: u64 = 2040 * GIB;
/// Smallest block, in bytes: the bound of the Windows API. With it the table of the largest disk takes 16 MiB.
pub(super) const BLOCK_BYTES_MIN: u64 = 512 * KIB;
/// Largest block, in bytes: that of VHDX. The format has no bound; its bitmap, which is read whole, takes 64 KiB.
pub(super) const BLOCK_BYTES_MAX: u64 = 256 * MIB;
/// The geometry of disks that are too large for one: cylinders, heads, sectors per track.
pub(super) const GEOMETRY_MAX: Chs = Chs {
    cylinders: 65535,
    heads: 16,
    sectors: 255,
};

/// The creator whose disks everybody reads in their current size.
pub(super) const WINDOWS: [u8; 4] = *b"win ";

/// Kinds of disk in a footer.
pub(super) const KIND_FIXED: u32 = 2;
/// See [`KIND_FIXED`].
pub(super) const KIND_DYNAMIC: u32 = 3;
/// See [`KIND_FIXED`].
pub(super) const KIND_DIFFERENCING: u32 = 4;

/// Cylinders, heads, sectors per track: how old guests address a disk.
#[binrw]
#[brw(big)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Chs {
    /// Cylinders.
    pub cylinders: u16,
    /// Heads.
    pub heads: u8,
    /// Sectors per track.
    pub sectors: u8,
}

impl Chs {
    /// The geometry for a disk of `size` bytes; it covers at most that much (specification, "CHS Calculation").
    pub(super) fn of(size: u64) -> Self {
        let largest = GEOMETRY_MAX.bytes() / SECTOR_BYTES;
        let total = (size / SECTOR_BYTES).min(largest);
        let (sectors, heads, tracks) = if total >= 65535 * 16 * 63 {
            (255, 16, total / 255)
        } else {
            let tracks = total / 17;
            let heads = tracks.div_ceil(1024).max(4);
            if tracks < heads * 1024 && heads <= 16 {
                (17, heads, tracks)
            } else if total / 31 < 16 * 1024 {
                (31, 16, total / 31)
            } else {
                (63, 16, total / 63)
            }
        };
        let narrow = "the largest geometry fits its fields";
        Self {
            cylinders: u16::try_from(tracks / heads).expect(narrow),
            heads: u8::try_from(heads).expect(narrow),
            sectors: sectors.try_into().expect(narrow),
        }
    }

    /// Bytes that it can address.
    pub(super) fn bytes(self) -> u64 {
        u64::from(self.cylinders) * u64::from(self.heads) * u64::from(self.sectors) * SECTOR_BYTES
    }
}

/// A footer without its reserved bytes.
#[binrw]
#[brw(big, magic = b"conectix")]
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Footer {
    pub(super) features: u32,
    pub(super) version: u32,
    /// Where the dynamic header is; [`NO_OFFSET`] in a fixed VHD.
    pub(super) header_offset: u64,
    /// Seconds since 2000-01-01 00:00 UTC.
    pub(super) created: u32,
    pub(super) creator: [u8; 4],
    pub(super) creator_version: u32,
    pub(super) creator_host: [u8; 4],
    /// Size of the disk when it was made, in bytes.
    pub(super) original_size: u64,
    /// Size of the disk, in bytes.
    pub(super) current_size: u64,
    pub(super) geometry: Chs,
    pub(super) kind: u32,
    pub(super) checksum: u32,
    #[br(map = Uuid::from_bytes)]
    #[bw(map = |id| *id.as_bytes())]
    pub(super) id: Uuid,
    /// Not zero: the machine was suspended with this disk.
    pub(super) saved_state: u8,
}

impl Footer {
    /// Where the checksum stands in its bytes.
    const CHECKSUM_AT: usize = 64;

    /// As it stands in the file, with its checksum.
    pub(super) fn encode(&self) -> [u8; FOOTER_BYTES] {
        encode(self, Self::CHECKSUM_AT)
    }

    /// The footer in `bytes`, whatever its checksum; nothing if the signature is another one.
    pub(super) fn decode(bytes: &[u8; FOOTER_BYTES]) -> Option<Self> {
        decode(bytes)
    }

    /// Whether the checksum is that of the bytes.
    pub(super) fn is_sealed(bytes: &[u8; FOOTER_BYTES]) -> bool {
        is_sealed(bytes, Self::CHECKSUM_AT)
    }
}

/// A dynamic header without its reserved bytes.
#[binrw]
#[brw(big, magic = b"cxsparse")]
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Header {
    /// Always [`NO_OFFSET`].
    pub(super) next: u64,
    pub(super) bat_offset: u64,
    pub(super) version: u32,
    /// Entries of the table; at least one for each block.
    pub(super) entries: u32,
    pub(super) block_size: u32,
    pub(super) checksum: u32,
    /// The parent's footer has the same.
    #[br(map = Uuid::from_bytes)]
    #[bw(map = |id| *id.as_bytes())]
    pub(super) parent_id: Uuid,
    /// Seconds since 2000-01-01 00:00 UTC; Windows 10 writes 0.
    pub(super) parent_created: u32,
    pub(super) reserved: u32,
    /// UTF-16, big-endian.
    pub(super) parent_name: [u16; 256],
    pub(super) locators: [Locator; 8],
}

/// Where the parent may be found, on one platform.
#[binrw]
#[brw(big)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Locator {
    pub(super) platform: [u8; 4],
    /// Sectors by the specification, bytes in the files of Windows: of no use.
    pub(super) space: u32,
    pub(super) len: u32,
    pub(super) reserved: u32,
    pub(super) offset: u64,
}

impl Header {
    /// Where the checksum stands in its bytes.
    const CHECKSUM_AT: usize = 36;

    /// As it stands in the file, with its checksum.
    pub(super) fn encode(&self) -> [u8; HEADER_BYTES] {
        encode(self, Self::CHECKSUM_AT)
    }

    /// The header in `bytes`, whatever its checksum; nothing if the signature is another one.
    pub(super) fn decode(bytes: &[u8; HEADER_BYTES]) -> Option<Self> {
        decode(bytes)
    }

    /// Whether the checksum is that of the bytes.
    pub(super) fn is_sealed(bytes: &[u8; HEADER_BYTES]) -> bool {
        is_sealed(bytes, Self::CHECKSUM_AT)
    }
}

/// Bytes of the sector bitmap in front of a block.
pub(super) fn bitmap_bytes(block_size: u64) -> u64 {
    (block_size / SECTOR_BYTES / 8).next_multiple_of(SECTOR_BYTES)
}

fn decode<T>(bytes: &[u8]) -> Option<T>
where
    T: for<'a> BinRead<Args<'a> = ()> + binrw::meta::ReadEndian,
{
    T::read(&mut Cursor::new(bytes)).ok()
}

fn encode<const LEN: usize, T>(value: &T, checksum_at: usize) -> [u8; LEN]
where
    T: for<'a> BinWrite<Args<'a> = ()> + binrw::meta::WriteEndian,
{
    let mut bytes = [0; LEN];
    value
        .write(&mut Cursor::new(&mut bytes[..]))
        .expect("the buffer has the structure's size");
    seal(&mut bytes, checksum_at);
    bytes
}

/// The checksum of a structure: the ones' complement of the sum of its bytes, the checksum's own counted as zeros.
fn checksum_of(bytes: &[u8], checksum_at: usize) -> u32 {
    let sum = |bytes: &[u8]| bytes.iter().map(|&byte| u32::from(byte)).sum::<u32>();
    !(sum(&bytes[..checksum_at]) + sum(&bytes[checksum_at + 4..]))
}

/// Puts the checksum where it belongs.
pub(super) fn seal(bytes: &mut [u8], checksum_at: usize) {
    let checksum = checksum_of(bytes, checksum_at);
    bytes[checksum_at..checksum_at + 4].copy_from_slice(&checksum.to_be_bytes());
}

fn is_sealed(bytes: &[u8], checksum_at: usize) -> bool {
    bytes[checksum_at..checksum_at + 4] == checksum_of(bytes, checksum_at).to_be_bytes()
}

const _: () = assert!(to_usize(FOOTER_LEN) == FOOTER_BYTES && FOOTER_LEN == SECTOR_BYTES);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn structures_have_the_sizes_of_the_specification() {
        let mut bytes = [0; FOOTER_BYTES];
        bytes[..8].copy_from_slice(FOOTER_SIGNATURE);
        let footer = Footer {
            saved_state: 0xEE,
            ..Footer::decode(&bytes).unwrap()
        };
        let encoded = footer.encode();
        assert_eq!(encoded.iter().rposition(|&byte| byte != 0), Some(84));
        let mut bytes = [0; HEADER_BYTES];
        bytes[..8].copy_from_slice(b"cxsparse");
        let mut header = Header::decode(&bytes).unwrap();
        header.locators[7].offset = 0xEE;
        let encoded = header.encode();
        assert_eq!(encoded.iter().rposition(|&byte| byte != 0), Some(767));
        assert!(Header::is_sealed(&encoded));
    }

    /// Sizes and what Virtual PC, or qemu for the last ones, makes of them.
    #[test]
    fn geometries_are_those_of_the_specification() {
        let of = |sectors: u64| {
            let chs = Chs::of(sectors * 512);
            (chs.cylinders, chs.heads, chs.sectors)
        };
        assert_eq!(of(1_061_888 / 512), (30, 4, 17));
        assert_eq!(of(4_212_736 / 512), (121, 4, 17));
        assert_eq!(of(20 << 11), (602, 4, 17));
        assert_eq!(of(100 << 11), (1003, 12, 17));
        assert_eq!(of(200 << 11), (825, 16, 31));
        assert_eq!(of(257 << 11), (522, 16, 63));
        assert_eq!(of(1 << 21), (2080, 16, 63));
        assert_eq!(of(136_365_211_648 / 512), (65278, 16, 255));
        assert_eq!(of(SIZE_MAX / 512), (65535, 16, 255));
        assert_eq!(of(1), (0, 4, 17));
    }
}
