//! The structures of a VHDX file as they stand in its bytes (MS-VHDX section 2), and nothing about what they mean.
//!
//! Everything is little-endian; identities are in Microsoft's mixed order. Offsets and lengths are bytes. A value that
//! was decoded here has the right signature and checksum, and no more than that: `header`, `region`, `metadata`, `bat`
//! and `log` check each field before anybody uses it.
//!
//! | file offset | bytes | what |
//! |---|---|---|
//! | 0 | 64 KiB | file identifier: `vhdxfile` and the creator's name |
//! | 64 KiB, 128 KiB | 4 KiB each | the two headers |
//! | 192 KiB, 256 KiB | 64 KiB each | the two region tables |
//! | 1 MiB and up | multiples of 1 MiB | log, BAT, metadata, blocks |

use std::io::Cursor;

use binrw::{BinRead, BinWrite, binrw};
use uuid::{Uuid, uuid};

use crate::base::{
    checksum::crc32c_of,
    units::{GIB, KIB, MIB, TIB, to_usize},
};

/// The first bytes of every VHDX file.
pub(super) const FILE_SIGNATURE: &[u8; 8] = b"vhdxfile";
/// Bytes of the file identifier that are in use: signature and creator.
pub(super) const FILE_IDENTIFIER_BYTES: usize = 8 + 512;
/// Where the two headers stand.
pub(super) const HEADER_OFFSETS: [u64; 2] = [64 * KIB, 128 * KIB];
/// Bytes of a header, all covered by its checksum.
pub(super) const HEADER_BYTES: usize = 4096;
/// Where the two region tables stand.
pub(super) const REGION_TABLE_OFFSETS: [u64; 2] = [192 * KIB, 256 * KIB];
/// Bytes of a region table, all covered by its checksum.
pub(super) const REGION_TABLE_BYTES: usize = 64 * 1024;
/// Most entries of a region table, and of a metadata table.
pub(super) const TABLE_ENTRIES_MAX: usize = 2047;
/// Bytes of the metadata table at the start of its region; the items follow.
pub(super) const METADATA_TABLE_BYTES: u64 = 64 * KIB;
/// Largest metadata item, in bytes.
pub(super) const METADATA_ITEM_BYTES_MAX: u32 = 1024 * 1024;
/// The unit of the log: a page of metadata.
pub(super) const PAGE_BYTES: u64 = 4 * KIB;
/// The same as an index.
pub(super) const PAGE: usize = to_usize(PAGE_BYTES);
/// Smallest and largest block, in bytes.
pub(super) const BLOCK_BYTES_MIN: u64 = MIB;
/// See [`BLOCK_BYTES_MIN`].
pub(super) const BLOCK_BYTES_MAX: u64 = 256 * MIB;
/// Longest file that is opened or made: what 28 bits of MiB can address, Microsoft's own bound.
pub(super) const FILE_BYTES_MAX: u64 = 256 * TIB;
/// Longest log that is opened, in bytes. Windows writes 1 MiB; a dirty log is held in memory while it is replayed.
pub(super) const LOG_BYTES_MAX: u64 = GIB / 4;

/// The region that holds the block allocation table.
pub(super) const BAT_REGION: Uuid = uuid!("2DC27766-F623-4200-9D64-115E9BFD4A08");
/// The region that holds the metadata.
pub(super) const METADATA_REGION: Uuid = uuid!("8B7CA206-4790-4B9A-B8FE-575F050F886E");
/// Block size and kind.
pub(super) const FILE_PARAMETERS: Uuid = uuid!("CAA16737-FA36-4D43-B3B6-33F0AA44E76B");
/// Size of the disk in bytes.
pub(super) const VIRTUAL_DISK_SIZE: Uuid = uuid!("2FA54224-CD1B-4876-B211-5DBED83BF4B8");
/// The identity that SCSI page 0x83 shows.
pub(super) const VIRTUAL_DISK_ID: Uuid = uuid!("BECA12AB-B2E6-4523-93EF-C309E000C746");
/// Logical sector size.
pub(super) const LOGICAL_SECTOR: Uuid = uuid!("8141BF1D-A96F-4709-BA47-F233A8FAAB5F");
/// Physical sector size.
pub(super) const PHYSICAL_SECTOR: Uuid = uuid!("CDA348C7-445D-4471-9CC9-E9885251C556");
/// Where the parent of a differencing image is.
pub(super) const PARENT_LOCATOR: Uuid = uuid!("A8D35F2D-B30B-454D-ABF7-D3D84834AB0C");

/// An item of Microsoft's own writers: the file is not finished yet.
pub(super) const INCOMPLETE_FILE: Uuid = uuid!("71CC85F0-1B69-4E28-9558-C3BF83AE75D3");
/// The type of a parent locator that names another VHDX file.
pub(super) const VHDX_LOCATOR: Uuid = uuid!("B04AEFB7-D19E-4A81-B789-25B8E9445913");

/// A page of metadata.
pub(super) type Page = [u8; PAGE];

/// A header without its reserved bytes.
#[binrw]
#[brw(little, magic = b"head")]
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) checksum: u32,
    pub(super) sequence: u64,
    #[br(map = Uuid::from_bytes_le)]
    #[bw(map = Uuid::to_bytes_le)]
    pub(super) file_write: Uuid,
    #[br(map = Uuid::from_bytes_le)]
    #[bw(map = Uuid::to_bytes_le)]
    pub(super) data_write: Uuid,
    /// Nil: the log is empty.
    #[br(map = Uuid::from_bytes_le)]
    #[bw(map = Uuid::to_bytes_le)]
    pub(super) log: Uuid,
    pub(super) log_version: u16,
    pub(super) version: u16,
    pub(super) log_len: u32,
    pub(super) log_offset: u64,
}

/// The head of a region table.
#[binrw]
#[brw(little, magic = b"regi")]
#[derive(Clone, Debug)]
pub(super) struct RegionTableHeader {
    pub(super) checksum: u32,
    pub(super) count: u32,
    pub(super) reserved: u32,
}

/// One region.
#[binrw]
#[brw(little)]
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct RegionEntry {
    #[br(map = Uuid::from_bytes_le)]
    #[bw(map = Uuid::to_bytes_le)]
    pub(super) id: Uuid,
    pub(super) offset: u64,
    pub(super) len: u32,
    /// Bit 0: who does not know the region must not open the file.
    pub(super) required: u32,
}

/// The head of the metadata table.
#[binrw]
#[brw(little, magic = b"metadata")]
#[derive(Clone, Debug)]
pub(super) struct MetadataTableHeader {
    pub(super) reserved: u16,
    pub(super) count: u16,
    pub(super) reserved2: [u8; 20],
}

/// One metadata item; its offset counts from the start of the region.
#[binrw]
#[brw(little)]
#[derive(Clone, Debug)]
pub(super) struct MetadataEntry {
    #[br(map = Uuid::from_bytes_le)]
    #[bw(map = Uuid::to_bytes_le)]
    pub(super) id: Uuid,
    pub(super) offset: u32,
    pub(super) len: u32,
    /// Bit 0: a user's item. Bit 1: belongs to the disk, not the file. Bit 2: required.
    pub(super) flags: u32,
    pub(super) reserved: u32,
}

/// The head of a log entry.
#[binrw]
#[brw(little, magic = b"loge")]
#[derive(Clone, Debug)]
pub(super) struct LogEntryHeader {
    pub(super) checksum: u32,
    pub(super) len: u32,
    /// Ring offset of the oldest entry that was still needed.
    pub(super) tail: u32,
    pub(super) sequence: u64,
    pub(super) descriptors: u32,
    pub(super) reserved: u32,
    #[br(map = Uuid::from_bytes_le)]
    #[bw(map = Uuid::to_bytes_le)]
    pub(super) log: Uuid,
    /// A file length known to be durable when the entry was written.
    pub(super) flushed_file_offset: u64,
    /// The file length that holds everything allocated.
    pub(super) last_file_offset: u64,
}

/// One change of a log entry.
#[binrw]
#[brw(little)]
#[derive(Clone, Debug)]
pub(super) enum Descriptor {
    /// A run becomes zeros.
    #[brw(magic = b"zero")]
    Zero {
        reserved: u32,
        len: u64,
        offset: u64,
        sequence: u64,
    },
    /// A page is written: these bytes stand around those of its data sector.
    #[brw(magic = b"desc")]
    Data {
        trailing: [u8; 4],
        leading: [u8; 8],
        offset: u64,
        sequence: u64,
    },
}

/// Decodes a structure from the start of `bytes`; nothing if the signature is another one or bytes are missing.
pub(super) fn decode<T>(bytes: &[u8]) -> Option<T>
where
    T: for<'a> BinRead<Args<'a> = ()> + binrw::meta::ReadEndian,
{
    T::read(&mut Cursor::new(bytes)).ok()
}

/// The number at `at`; the caller has checked that it is there.
pub(super) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let field = bytes[at..at + 4].try_into();
    u32::from_le_bytes(field.expect("four bytes are four bytes"))
}

/// Encodes a structure at the start of `bytes`.
pub(super) fn encode<T>(value: &T, bytes: &mut [u8])
where
    T: for<'a> BinWrite<Args<'a> = ()> + binrw::meta::WriteEndian,
{
    value
        .write(&mut Cursor::new(bytes))
        .expect("the callers' buffers are larger than the structures");
}

/// The checksum of a header, a region table or a log entry: CRC-32C with the field itself, bytes 4 to 7, as zeros.
pub(super) fn checksum_of(pieces: [&[u8]; 2]) -> u32 {
    let (head, rest) = pieces[0].split_at(8);
    crc32c_of(&[&head[..4], &[0; 4], rest, pieces[1]])
}

/// Puts the checksum of `bytes` where it belongs.
pub(super) fn seal(bytes: &mut [u8]) {
    let checksum = checksum_of([bytes, &[]]);
    bytes[4..8].copy_from_slice(&checksum.to_le_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn identities_stand_in_mixed_order() {
        assert_eq!(
            BAT_REGION.to_bytes_le(),
            [
                0x66, 0x77, 0xc2, 0x2d, 0x23, 0xf6, 0x00, 0x42, 0x9d, 0x64, 0x11, 0x5e, 0x9b, 0xfd,
                0x4a, 0x08
            ]
        );
        assert_eq!(
            METADATA_REGION.to_bytes_le()[..8],
            [0x06, 0xa2, 0x7c, 0x8b, 0x90, 0x47, 0x9a, 0x4b]
        );
    }

    #[test]
    fn structures_have_the_sizes_of_the_standard() {
        let mut bytes = [0xEE; 128];
        let header = Header {
            checksum: 0,
            sequence: 1,
            file_write: Uuid::nil(),
            data_write: Uuid::nil(),
            log: Uuid::nil(),
            log_version: 0,
            version: 1,
            log_len: 1 << 20,
            log_offset: 1 << 20,
        };
        encode(&header, &mut bytes);
        assert_eq!(bytes.iter().rposition(|&b| b != 0xEE), Some(79));
        assert_eq!(decode::<Header>(&bytes), Some(header));
        let mut bytes = [0xEE; 128];
        let descriptor = Descriptor::Data {
            trailing: [1; 4],
            leading: [2; 8],
            offset: 4096,
            sequence: 9,
        };
        encode(&descriptor, &mut bytes);
        assert_eq!(&bytes[..4], b"desc");
        assert_eq!(bytes.iter().rposition(|&b| b != 0xEE), Some(31));
    }
}
