//! Every byte of a delta log.
//!
//! All numbers are little-endian. Reserved bytes are written as zero and refused if they are not, so that a later
//! version can give them a meaning.
//!
//! Header, `length` bytes:
//!
//! | offset | bytes | field |
//! |---|---|---|
//! | 0   | 8  | magic, `UNDERHRL` |
//! | 8   | 2  | version, 1 |
//! | 10  | 1  | kind: 0 initial copy, 1 delta, 2 folded |
//! | 11  | 1  | flags: bit 0, the log has a parent |
//! | 12  | 4  | length of the header in bytes, with its checksum |
//! | 16  | 16 | machine, a UUID in RFC 9562 byte order |
//! | 32  | 8  | generation, number |
//! | 40  | 16 | generation, random id |
//! | 56  | 8  | epoch of the parent, zero without one |
//! | 64  | 32 | chain hash of the parent, zero without one |
//! | 96  | 2  | number of disks |
//! | 98  | 6  | reserved |
//! | 104 |    | the disks, one entry each |
//! |     | 40 | kind 2 only: the point that the log leads to, its epoch (8) and its chain hash (32) |
//! | end | 4  | CRC-32C of everything before |
//!
//! Disk entry, 17 bytes and the name:
//!
//! | offset | bytes | field |
//! |---|---|---|
//! | 0  | 8 | size in bytes |
//! | 8  | 4 | logical sector in bytes, 512 or 4096 |
//! | 12 | 4 | physical sector in bytes, 512 or 4096 |
//! | 16 | 1 | length of the name in bytes |
//! | 17 |   | name, UTF-8 |
//!
//! Frame header, 32 bytes, followed by the payload:
//!
//! | offset | bytes | field |
//! |---|---|---|
//! | 0  | 1 | kind: 1 data, 2 zero |
//! | 1  | 1 | codec of the payload: 0 none, 1 LZ4 block, 2 Zstandard frame |
//! | 2  | 2 | disk, index into the disk table |
//! | 4  | 4 | payload length in bytes |
//! | 8  | 8 | first byte of the run; a multiple of 4096 |
//! | 16 | 8 | bytes of the run; a multiple of 4096 unless it ends with the disk |
//! | 24 | 4 | CRC-32C of the raw bytes, zero for kind zero |
//! | 28 | 4 | CRC-32C of bytes 0..28 |
//!
//! Trailer: a head of 32 bytes where the next frame header would stand, the index, a foot of 72 bytes.
//!
//! | offset in the head | bytes | field |
//! |---|---|---|
//! | 0  | 1 | kind: 3 |
//! | 1  | 1 | consistency of the recovery point: 0 crash, 1 application |
//! | 2  | 6 | reserved |
//! | 8  | 8 | number of frames |
//! | 16 | 8 | entries of the index: the number of frames, or zero for a log without an index |
//! | 24 | 4 | CRC-32C of the index |
//! | 28 | 4 | CRC-32C of bytes 0..28 |
//!
//! The index repeats the frame headers in order. Where a frame stands follows from the lengths before it.
//!
//! | offset in the foot | bytes | field |
//! |---|---|---|
//! | 0  | 8  | epoch |
//! | 8  | 8  | cut time, microseconds since 1970-01-01 UTC |
//! | 16 | 8  | position of the trailer's head in the log |
//! | 24 | 8  | length of the log in bytes, with this foot |
//! | 32 | 32 | chain hash |
//! | 64 | 4  | CRC-32C of bytes 0..64 |
//! | 68 | 4  | end mark, `HRL.` |
//!
//! The golden files in `tests/golden` hold these bytes. A change that alters them makes a new version.

use std::{io::Cursor, str};

use binrw::{BinRead, BinWrite, binrw};
use uuid::Uuid;

use super::{
    error::{DecodeError, invalid},
    frame::Codec,
    trailer::Foot,
};
use crate::base::{
    checksum::{Digest, crc32c},
    ids::{Generation, Lineage, MachineId, Name},
    limits::{DISK_BYTES_MAX, DISKS_PER_MACHINE_MAX, FRAME_BYTES_MAX, NAME_BYTES_MAX},
    units::{BLOCK_BYTES, DiskIndex, Epoch, Extent, to_u64, to_usize},
};

/// The version this program writes, and the newest it reads.
pub const VERSION: u16 = 1;
/// Bytes that name the format, its version and the length of the header.
pub const PREAMBLE_BYTES: usize = 16;
/// Bytes of a frame header, of an index entry and of the trailer's head.
pub const FRAME_HEADER_BYTES: usize = 32;
/// Longest header in bytes.
pub const HEADER_BYTES_MAX: usize = HEADER_FIXED_BYTES
    + DISKS_PER_MACHINE_MAX * (DISK_FIXED_BYTES + NAME_BYTES_MAX)
    + POINT_BYTES
    + CRC_BYTES;

const MAGIC: [u8; 8] = *b"UNDERHRL";
const HEADER_FIXED_BYTES: usize = 104;
const DISK_FIXED_BYTES: usize = 17;
const POINT_BYTES: usize = 40;
const CRC_BYTES: usize = 4;
const FLAG_PARENT: u8 = 1;
const KIND_DATA: u8 = 1;
const KIND_ZERO: u8 = 2;
pub(super) const KIND_TRAILER: u8 = 3;

/// What a log is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogKind {
    /// Epoch 0: the content of the disks while the guest writes on. Applied in place, no recovery point by itself.
    Initial,
    /// The changes of one epoch, or of several merged into one.
    Delta,
    /// What several logs come to, made by the host that keeps them; it leads to the point of the last one. Its own chain
    /// hash proves its bytes and is no point of the machine's history.
    Folded(Lineage),
}

/// One disk of the disk table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskEntry {
    /// What people call it.
    pub name: Name,
    /// Size in bytes: 1 to [`DISK_BYTES_MAX`], a multiple of the logical sector.
    pub size: u64,
    /// Logical sector in bytes, 512 or 4096.
    pub logical_sector: u32,
    /// Physical sector in bytes, 512 or 4096.
    pub physical_sector: u32,
}

/// The start of a log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// Whose changes these are.
    pub machine: MachineId,
    /// Under which right they were made.
    pub generation: Generation,
    /// What the log is for.
    pub kind: LogKind,
    /// The point that the changes apply to; only an initial copy has none.
    pub parent: Option<Lineage>,
    /// All disks of the machine, 1 to [`DISKS_PER_MACHINE_MAX`], no name twice.
    pub disks: Vec<DiskEntry>,
}

/// What a frame says about its run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FrameKind {
    /// The payload is its content.
    Data,
    /// It reads as zeros.
    Zero,
}

/// The fixed part of a frame. Only [`FrameHeader::parse`] makes one from foreign bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrameHeader {
    /// Data or zeros.
    pub kind: FrameKind,
    /// How the payload is packed.
    pub codec: Codec,
    /// The disk it belongs to.
    pub disk: DiskIndex,
    /// The bytes of the disk it describes.
    pub run: Extent,
    /// Bytes that follow the frame header.
    pub payload_len: u32,
    /// CRC-32C of the raw bytes, zero for [`FrameKind::Zero`].
    pub crc: u32,
}

#[binrw]
#[brw(little)]
#[derive(Default)]
struct HeaderBytes {
    magic: [u8; 8],
    version: u16,
    kind: u8,
    flags: u8,
    len: u32,
    machine: [u8; 16],
    generation_number: u64,
    generation_id: [u8; 16],
    parent_epoch: u64,
    parent_chain: [u8; 32],
    disks: u16,
    reserved: [u8; 6],
}

#[binrw]
#[brw(little)]
struct DiskBytes {
    size: u64,
    logical_sector: u32,
    physical_sector: u32,
    name_len: u8,
}

#[binrw]
#[brw(little)]
struct PointBytes {
    epoch: u64,
    chain: [u8; 32],
}

#[binrw]
#[brw(little)]
struct FrameBytes {
    kind: u8,
    codec: u8,
    disk: u16,
    payload_len: u32,
    offset: u64,
    len: u64,
    crc: u32,
}

/// Writes a structure of fixed size. Vectors in memory take everything.
pub(super) fn pack<T>(value: &T, bytes: &mut Vec<u8>)
where
    T: BinWrite + binrw::meta::WriteEndian,
    for<'a> T: BinWrite<Args<'a> = ()>,
{
    let mut end = Cursor::new(&mut *bytes);
    end.set_position(
        end.get_ref()
            .len()
            .try_into()
            .expect("a length fits 64 bits"),
    );
    value.write(&mut end).expect("memory takes every write");
}

/// Appends the CRC-32C of all bytes from `start`.
pub(super) fn seal(bytes: &mut Vec<u8>, start: usize) {
    let crc = crc32c(&bytes[start..]);
    bytes.extend_from_slice(&crc.to_le_bytes());
}

/// The bytes in front of the CRC-32C at the end, if that matches.
pub(super) fn unseal<'a>(
    bytes: &'a [u8],
    part: &'static str,
    offset: u64,
) -> Result<&'a [u8], DecodeError> {
    let (body, stated) = bytes
        .split_last_chunk::<CRC_BYTES>()
        .ok_or_else(|| invalid(part, offset, "it is too short"))?;
    if crc32c(body) == u32::from_le_bytes(*stated) {
        Ok(body)
    } else {
        Err(DecodeError::Checksum { part, offset })
    }
}

/// Length in bytes of the header that starts with `preamble`.
pub fn header_len(preamble: &[u8; PREAMBLE_BYTES]) -> Result<usize, DecodeError> {
    let (magic, rest) = preamble.split_first_chunk().expect("16 bytes hold 8");
    if *magic != MAGIC {
        return Err(DecodeError::Magic);
    }
    let version = u16::from_le_bytes([rest[0], rest[1]]);
    if version != VERSION {
        return Err(DecodeError::Version(version));
    }
    let len = to_usize(u64::from(u32::from_le_bytes([
        rest[4], rest[5], rest[6], rest[7],
    ])));
    if (HEADER_FIXED_BYTES + CRC_BYTES..=HEADER_BYTES_MAX).contains(&len) {
        Ok(len)
    } else {
        Err(invalid("header", 0, "its length is out of range"))
    }
}

impl Header {
    /// The header as it stands in a log.
    pub fn to_bytes(&self) -> Vec<u8> {
        let names: usize = self.disks.iter().map(|disk| disk.name.as_str().len()).sum();
        let point = match self.kind {
            LogKind::Folded(point) => Some(point),
            LogKind::Initial | LogKind::Delta => None,
        };
        let len = HEADER_FIXED_BYTES
            + self.disks.len() * DISK_FIXED_BYTES
            + names
            + point.map_or(0, |_| POINT_BYTES)
            + CRC_BYTES;
        let fixed = HeaderBytes {
            magic: MAGIC,
            version: VERSION,
            kind: match self.kind {
                LogKind::Initial => 0,
                LogKind::Delta => 1,
                LogKind::Folded(_) => 2,
            },
            flags: if self.parent.is_some() {
                FLAG_PARENT
            } else {
                0
            },
            len: u32::try_from(len).expect("a header is bounded by HEADER_BYTES_MAX"),
            machine: self.machine.0.into_bytes(),
            generation_number: self.generation.number,
            generation_id: self.generation.id.into_bytes(),
            parent_epoch: self.parent.map_or(0, |parent| parent.epoch.0),
            parent_chain: self.parent.map_or([0; 32], |parent| parent.chain.0),
            disks: u16::try_from(self.disks.len()).expect("a machine has few disks"),
            reserved: [0; 6],
        };
        let mut bytes = Vec::with_capacity(len);
        pack(&fixed, &mut bytes);
        for disk in &self.disks {
            let name = disk.name.as_str().as_bytes();
            let entry = DiskBytes {
                size: disk.size,
                logical_sector: disk.logical_sector,
                physical_sector: disk.physical_sector,
                name_len: u8::try_from(name.len()).expect("a name has at most 128 bytes"),
            };
            pack(&entry, &mut bytes);
            bytes.extend_from_slice(name);
        }
        if let Some(point) = point {
            let point = PointBytes {
                epoch: point.epoch.0,
                chain: point.chain.0,
            };
            pack(&point, &mut bytes);
        }
        seal(&mut bytes, 0);
        bytes
    }

    /// The header in `bytes`, which are as many as [`header_len`] says.
    pub fn parse(bytes: &[u8]) -> Result<Self, DecodeError> {
        let bad = |reason| invalid("header", 0, reason);
        let body = unseal(bytes, "header", 0)?;
        let mut cursor = Cursor::new(body);
        let fixed = HeaderBytes::read(&mut cursor).map_err(|_| bad("it is too short"))?;
        let parent = match fixed.flags {
            0 => None,
            FLAG_PARENT => Some(Lineage {
                epoch: Epoch(fixed.parent_epoch),
                chain: Digest(fixed.parent_chain),
            }),
            _ => return Err(bad("it has unknown flags")),
        };
        if parent.is_none() && (fixed.parent_epoch != 0 || fixed.parent_chain != [0; 32])
            || fixed.reserved != [0; 6]
        {
            return Err(bad("a reserved byte is set"));
        }
        let disks = parse_disks(&mut cursor, usize::from(fixed.disks))?;
        let kind = match fixed.kind {
            0 => LogKind::Initial,
            1 => LogKind::Delta,
            2 => {
                let point = PointBytes::read(&mut cursor).map_err(|_| bad("it is too short"))?;
                LogKind::Folded(Lineage {
                    epoch: Epoch(point.epoch),
                    chain: Digest(point.chain),
                })
            }
            _ => return Err(bad("its kind is unknown")),
        };
        if parent.is_some() == (kind == LogKind::Initial) {
            return Err(bad(
                "an initial copy has no parent and every other log has one",
            ));
        }
        if cursor.position() != to_u64(body.len()) {
            return Err(bad("its length does not match its content"));
        }
        Ok(Self {
            machine: MachineId(Uuid::from_bytes(fixed.machine)),
            generation: Generation {
                number: fixed.generation_number,
                id: Uuid::from_bytes(fixed.generation_id),
            },
            kind,
            parent,
            disks,
        })
    }

    /// The point that the log with this header and this foot leads to, if the two do not contradict each other.
    pub fn point(&self, foot: &Foot) -> Result<Lineage, DecodeError> {
        let bad = |reason| invalid("foot", foot.foot_at(), reason);
        let point = match self.kind {
            LogKind::Folded(point) if point.epoch != foot.epoch => {
                return Err(bad("its epoch is not the one the header names"));
            }
            LogKind::Folded(point) => point,
            LogKind::Initial | LogKind::Delta => Lineage {
                epoch: foot.epoch,
                chain: foot.chain,
            },
        };
        match self.parent {
            Some(parent) if foot.epoch <= parent.epoch => {
                Err(bad("its epoch is not after its parent's"))
            }
            None if foot.epoch != Epoch::INITIAL => Err(bad("the initial copy is epoch 0")),
            _ => Ok(point),
        }
    }
}

fn parse_disks(cursor: &mut Cursor<&[u8]>, count: usize) -> Result<Vec<DiskEntry>, DecodeError> {
    let bad = |reason| invalid("disk table", to_u64(HEADER_FIXED_BYTES), reason);
    if !(1..=DISKS_PER_MACHINE_MAX).contains(&count) {
        return Err(bad("a machine has 1 to 256 disks"));
    }
    let mut disks: Vec<DiskEntry> = Vec::with_capacity(count);
    for _ in 0..count {
        let fixed = DiskBytes::read(cursor).map_err(|_| bad("it is too short"))?;
        let start = to_usize(cursor.position());
        let name = cursor
            .get_ref()
            .get(start..start + usize::from(fixed.name_len))
            .ok_or_else(|| bad("it is too short"))?;
        cursor.set_position(cursor.position() + u64::from(fixed.name_len));
        let name = str::from_utf8(name)
            .ok()
            .and_then(|text| Name::new(text).ok())
            .ok_or_else(|| bad("a name is not valid"))?;
        if disks.iter().any(|disk| disk.name == name) {
            return Err(bad("a name is there twice"));
        }
        let sectors = [fixed.logical_sector, fixed.physical_sector];
        if sectors.iter().any(|&bytes| bytes != 512 && bytes != 4096) {
            return Err(bad("a sector has 512 or 4096 bytes"));
        }
        let size = fixed.size;
        if size == 0
            || size > DISK_BYTES_MAX
            || !size.is_multiple_of(u64::from(fixed.logical_sector))
        {
            return Err(bad("a disk has 1 sector to 64 TiB"));
        }
        disks.push(DiskEntry {
            name,
            size,
            logical_sector: fixed.logical_sector,
            physical_sector: fixed.physical_sector,
        });
    }
    Ok(disks)
}

/// Whether the 32 bytes where a frame header would stand are the trailer's head.
pub fn is_trailer(bytes: &[u8; FRAME_HEADER_BYTES]) -> bool {
    bytes[0] == KIND_TRAILER
}

impl FrameHeader {
    /// The frame header as it stands in a log.
    pub fn to_bytes(&self) -> [u8; FRAME_HEADER_BYTES] {
        let fixed = FrameBytes {
            kind: match self.kind {
                FrameKind::Data => KIND_DATA,
                FrameKind::Zero => KIND_ZERO,
            },
            codec: self.codec.to_byte(),
            disk: self.disk.0,
            payload_len: self.payload_len,
            offset: self.run.offset,
            len: self.run.len,
            crc: self.crc,
        };
        let mut bytes = Vec::with_capacity(FRAME_HEADER_BYTES);
        pack(&fixed, &mut bytes);
        seal(&mut bytes, 0);
        bytes.try_into().expect("a frame header has 32 bytes")
    }

    /// The frame header in `bytes`, which stand at log offset `at`, checked against the disk table: whoever has one
    /// may apply it.
    pub fn parse(
        bytes: &[u8; FRAME_HEADER_BYTES],
        disks: &[DiskEntry],
        at: u64,
    ) -> Result<Self, DecodeError> {
        const PART: &str = "frame header";
        let bad = |reason| invalid(PART, at, reason);
        let body = unseal(bytes, PART, at)?;
        let fixed = FrameBytes::read(&mut Cursor::new(body)).expect("28 bytes are there");
        let codec = Codec::from_byte(fixed.codec).ok_or_else(|| bad("its codec is unknown"))?;
        let run = Extent::new(fixed.offset, fixed.len);
        let disk = disks
            .get(usize::from(fixed.disk))
            .ok_or_else(|| bad("it names a disk that the machine does not have"))?;
        let end = run
            .checked_end()
            .filter(|&end| run.len > 0 && end <= disk.size)
            .ok_or_else(|| bad("its run does not lie inside the disk"))?;
        if !run.offset.is_multiple_of(BLOCK_BYTES)
            || (!end.is_multiple_of(BLOCK_BYTES) && end != disk.size)
        {
            return Err(bad("its run is not made of whole blocks"));
        }
        let payload = u64::from(fixed.payload_len);
        let kind = match fixed.kind {
            KIND_DATA if run.len > FRAME_BYTES_MAX => return Err(bad("it is too long")),
            KIND_DATA if codec == Codec::None && payload != run.len => {
                return Err(bad("its payload is not as long as its run"));
            }
            KIND_DATA if codec != Codec::None && payload >= run.len => {
                return Err(bad("its payload is longer than its run"));
            }
            KIND_DATA => FrameKind::Data,
            KIND_ZERO if payload != 0 || fixed.crc != 0 || codec != Codec::None => {
                return Err(bad("a run of zeros has no payload"));
            }
            KIND_ZERO => FrameKind::Zero,
            _ => return Err(bad("its kind is unknown")),
        };
        Ok(Self {
            kind,
            codec,
            disk: DiskIndex(fixed.disk),
            run,
            payload_len: fixed.payload_len,
            crc: fixed.crc,
        })
    }

    /// Bytes of the frame in a log.
    pub fn frame_len(&self) -> u64 {
        to_u64(FRAME_HEADER_BYTES) + u64::from(self.payload_len)
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A header of one disk of a GiB; the parent is epoch 1.
    pub(in super::super) fn header(kind: LogKind) -> Header {
        Header {
            machine: MachineId(Uuid::from_u128(1)),
            generation: Generation {
                number: 1,
                id: Uuid::from_u128(2),
            },
            kind,
            parent: (kind != LogKind::Initial).then_some(Lineage {
                epoch: Epoch(1),
                chain: Digest::default(),
            }),
            disks: vec![DiskEntry {
                name: Name::new("d").unwrap(),
                size: 1 << 30,
                logical_sector: 512,
                physical_sector: 4096,
            }],
        }
    }
}
