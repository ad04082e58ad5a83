//! The metadata region: what kind of disk the file holds.

use std::sync::Arc;

use uuid::Uuid;

use crate::{
    base::{
        limits::DISK_BYTES_MAX,
        units::{Extent, to_usize},
    },
    disk::Geometry,
    storage::Storage,
};

use super::{
    Kind,
    error::OpenError,
    format::{
        self, BLOCK_BYTES_MAX, BLOCK_BYTES_MIN, FILE_PARAMETERS, LOGICAL_SECTOR,
        METADATA_ITEM_BYTES_MAX, METADATA_TABLE_BYTES, MetadataEntry, MetadataTableHeader, PAGE,
        PAGE_BYTES, PARENT_LOCATOR, PHYSICAL_SECTOR, TABLE_ENTRIES_MAX, VIRTUAL_DISK_ID,
        VIRTUAL_DISK_SIZE,
    },
    log::journal::LoggedPages,
};

const ENTRY_BYTES: usize = 32;
const IS_USER: u32 = 1;
const IS_VIRTUAL_DISK: u32 = 2;
const IS_REQUIRED: u32 = 4;
const LEAVE_BLOCKS_ALLOCATED: u32 = 1;
const HAS_PARENT: u32 = 2;

/// What the metadata say of the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Parameters {
    pub(super) geometry: Geometry,
    /// Bytes of a block.
    pub(super) block_size: u64,
    pub(super) kind: Kind,
    /// The identity that the guest sees.
    pub(super) disk_id: Uuid,
}

impl Parameters {
    /// Reads and checks the metadata in `region`.
    pub(super) fn read(storage: &dyn Storage, region: Extent) -> Result<Self, OpenError> {
        let corrupt = |problem: String| OpenError::corrupt("metadata", region.offset, problem);
        let mut table = vec![0; to_usize(METADATA_TABLE_BYTES)];
        storage
            .read_at(region.offset, &mut table)
            .map_err(OpenError::reading("metadata table", region.offset))?;
        let entries = decode_table(&table).ok_or_else(|| corrupt("not a table".into()))?;
        check_entries(&entries, region.len).map_err(corrupt)?;
        if let Some(unknown) = entries.iter().find(|entry| !may_ignore(entry)) {
            return Err(OpenError::Unsupported(format!(
                "the metadata item {}",
                unknown.id
            )));
        }
        let item = |id: Uuid, len: u32, name: &str| -> Result<Vec<u8>, OpenError> {
            let entry = entries
                .iter()
                .find(|entry| entry.id == id && entry.flags & IS_USER == 0)
                .ok_or_else(|| corrupt(format!("there is no {name}")))?;
            if entry.len != len {
                return Err(corrupt(format!("the {name} has {} bytes", entry.len)));
            }
            let offset = region.offset + u64::from(entry.offset);
            let mut bytes = vec![0; to_usize(u64::from(len))];
            storage
                .read_at(offset, &mut bytes)
                .map_err(OpenError::reading("metadata item", offset))?;
            Ok(bytes)
        };
        let file = item(FILE_PARAMETERS, 8, "file parameters")?;
        let flags = u32_at(&file, 4);
        if flags & HAS_PARENT != 0 {
            return Err(OpenError::Unsupported(
                "its parent (it is a differencing disk)".into(),
            ));
        }
        let size = item(VIRTUAL_DISK_SIZE, 8, "disk size")?;
        let logical_sector = u32_at(&item(LOGICAL_SECTOR, 4, "logical sector size")?, 0);
        let physical_sector = u32_at(&item(PHYSICAL_SECTOR, 4, "physical sector size")?, 0);
        let disk_id = item(VIRTUAL_DISK_ID, 16, "disk identity")?;
        let parameters = Self {
            geometry: Geometry {
                size: u64_at(&size, 0),
                logical_sector,
                physical_sector,
            },
            block_size: u64::from(u32_at(&file, 0)),
            kind: if flags & LEAVE_BLOCKS_ALLOCATED == 0 {
                Kind::Dynamic
            } else {
                Kind::Fixed
            },
            disk_id: Uuid::from_bytes_le(disk_id.try_into().expect("the item's length is checked")),
        };
        if flags & !(LEAVE_BLOCKS_ALLOCATED | HAS_PARENT) != 0 {
            return Err(corrupt(format!("file parameters have flags {flags:#x}")));
        }
        parameters.check().map_err(corrupt)?;
        Ok(parameters)
    }

    /// Whether the format knows such a disk; if not, what is wrong with it.
    pub(super) fn check(&self) -> Result<(), String> {
        let Geometry {
            size,
            logical_sector,
            physical_sector,
        } = self.geometry;
        for (name, bytes) in [("logical", logical_sector), ("physical", physical_sector)] {
            if bytes != 512 && bytes != 4096 {
                return Err(format!("{name} sectors of {bytes} bytes"));
            }
        }
        if size == 0 || size > DISK_BYTES_MAX || size % u64::from(logical_sector) != 0 {
            return Err(format!("a size of {size} bytes"));
        }
        let block = self.block_size;
        if !block.is_power_of_two() || !(BLOCK_BYTES_MIN..=BLOCK_BYTES_MAX).contains(&block) {
            return Err(format!("blocks of {block} bytes"));
        }
        Ok(())
    }

    /// The table and, from [`METADATA_TABLE_BYTES`] on, the items, packed and in the order of Windows.
    pub(super) fn encode(&self) -> Vec<u8> {
        let flags = match self.kind {
            Kind::Dynamic => 0,
            Kind::Fixed => LEAVE_BLOCKS_ALLOCATED,
        };
        let block_size = u32::try_from(self.block_size).expect("a block has at most 256 MiB");
        let mut file = block_size.to_le_bytes().to_vec();
        file.extend(u32::to_le_bytes(flags));
        let of_disk = IS_VIRTUAL_DISK | IS_REQUIRED;
        let items = [
            (FILE_PARAMETERS, IS_REQUIRED, file),
            (
                VIRTUAL_DISK_SIZE,
                of_disk,
                self.geometry.size.to_le_bytes().to_vec(),
            ),
            (
                LOGICAL_SECTOR,
                of_disk,
                self.geometry.logical_sector.to_le_bytes().to_vec(),
            ),
            (
                PHYSICAL_SECTOR,
                of_disk,
                self.geometry.physical_sector.to_le_bytes().to_vec(),
            ),
            (
                VIRTUAL_DISK_ID,
                of_disk,
                self.disk_id.to_bytes_le().to_vec(),
            ),
        ];
        let mut bytes = vec![0; to_usize(METADATA_TABLE_BYTES)];
        let header = MetadataTableHeader {
            reserved: 0,
            count: 5,
            reserved2: [0; 20],
        };
        format::encode(&header, &mut bytes);
        for (number, (id, flags, content)) in items.into_iter().enumerate() {
            let entry = MetadataEntry {
                id,
                offset: u32::try_from(bytes.len()).expect("the items have a few bytes"),
                len: u32::try_from(content.len()).expect("the items have a few bytes"),
                flags,
                reserved: 0,
            };
            let place = (number + 1) * ENTRY_BYTES;
            format::encode(&entry, &mut bytes[place..place + ENTRY_BYTES]);
            bytes.extend(content);
        }
        bytes
    }
}

/// The pages of the metadata in `region` that hold the disk's size, with `size` in its place. What is in the file must be
/// what the log would leave there.
pub(super) fn pages_with_size(
    storage: &dyn Storage,
    region: Extent,
    size: u64,
) -> Result<LoggedPages, OpenError> {
    let reading = || OpenError::reading("metadata", region.offset);
    let mut table = vec![0; to_usize(METADATA_TABLE_BYTES)];
    storage
        .read_at(region.offset, &mut table)
        .map_err(reading())?;
    let entries = decode_table(&table).unwrap_or_default();
    let entry = entries
        .iter()
        .find(|entry| entry.id == VIRTUAL_DISK_SIZE && entry.flags & IS_USER == 0)
        .ok_or_else(|| OpenError::corrupt("metadata", region.offset, "there is no disk size"))?;
    let at = region.offset + u64::from(entry.offset);
    let first = at / PAGE_BYTES * PAGE_BYTES;
    let end = (at + u64::from(entry.len)).next_multiple_of(PAGE_BYTES);
    let mut bytes = vec![0; to_usize(end - first)];
    storage.read_at(first, &mut bytes).map_err(reading())?;
    let within = to_usize(at - first);
    bytes[within..within + 8].copy_from_slice(&size.to_le_bytes());
    let (pages, _) = bytes.as_chunks::<PAGE>();
    let pages = pages.iter().map(|page| Arc::new(*page));
    Ok((first..).step_by(PAGE).zip(pages).collect())
}

fn decode_table(table: &[u8]) -> Option<Vec<MetadataEntry>> {
    let header: MetadataTableHeader = format::decode(table)?;
    let count = usize::from(header.count);
    if count > TABLE_ENTRIES_MAX {
        return None;
    }
    table[ENTRY_BYTES..]
        .chunks_exact(ENTRY_BYTES)
        .take(count)
        .map(format::decode)
        .collect()
}

/// Whether the item is known, or need not be.
fn may_ignore(entry: &MetadataEntry) -> bool {
    let known = [
        FILE_PARAMETERS,
        VIRTUAL_DISK_SIZE,
        VIRTUAL_DISK_ID,
        LOGICAL_SECTOR,
        PHYSICAL_SECTOR,
        PARENT_LOCATOR,
    ];
    let known = entry.flags & IS_USER == 0 && known.contains(&entry.id);
    known || entry.flags & IS_REQUIRED == 0
}

/// Places, lengths and flags of all items, wanted or not.
fn check_entries(entries: &[MetadataEntry], region_len: u64) -> Result<(), String> {
    let mut names: Vec<(Uuid, bool)> = Vec::with_capacity(entries.len());
    let mut runs: Vec<Extent> = Vec::with_capacity(entries.len());
    for entry in entries {
        let id = entry.id;
        let user = entry.flags & IS_USER != 0;
        let run = Extent::new(u64::from(entry.offset), u64::from(entry.len));
        if entry.flags & !(IS_USER | IS_VIRTUAL_DISK | IS_REQUIRED) != 0 {
            return Err(format!("item {id} has reserved flags set"));
        }
        if entry.len > METADATA_ITEM_BYTES_MAX
            || run.end() > region_len
            || (entry.len != 0 && run.offset < METADATA_TABLE_BYTES)
        {
            return Err(format!(
                "item {id} cannot be {} bytes at {:#x} of the region",
                run.len, run.offset
            ));
        }
        names.push((id, user));
        if run.len > 0 {
            runs.push(run);
        }
    }
    names.sort_unstable();
    if let Some(twice) = names.windows(2).find(|pair| pair[0] == pair[1]) {
        return Err(format!("item {} is there twice", twice[0].0));
    }
    runs.sort_unstable();
    if runs.windows(2).any(|pair| pair[0].end() > pair[1].offset) {
        return Err("two items overlap".into());
    }
    Ok(())
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let field = bytes[at..at + 4].try_into();
    u32::from_le_bytes(field.expect("four bytes are four bytes"))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let field = bytes[at..at + 8].try_into();
    u64::from_le_bytes(field.expect("eight bytes are eight bytes"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        base::units::{MIB, to_u64},
        storage::memory::MemoryStorage,
    };

    fn parameters() -> Parameters {
        Parameters {
            geometry: Geometry {
                size: 5 << 30,
                logical_sector: 512,
                physical_sector: 4096,
            },
            block_size: 32 * MIB,
            kind: Kind::Fixed,
            disk_id: Uuid::from_u128(7),
        }
    }

    fn read(mut bytes: Vec<u8>) -> Result<Parameters, OpenError> {
        bytes.resize(to_usize(MIB), 0);
        Parameters::read(
            MemoryStorage::with_bytes(&bytes).as_ref(),
            Extent::new(0, to_u64(bytes.len())),
        )
    }

    #[test]
    fn what_is_written_is_read() {
        assert_eq!(read(parameters().encode()).unwrap(), parameters());
    }

    #[test]
    fn every_field_is_checked() {
        let breaks: [(&str, usize, &[u8]); 9] = [
            ("signature", 0, b"M"),
            ("count", 10, &[0xFF, 0xFF]),
            ("item over the table", 32 + 16, &[0, 0, 0, 0]),
            ("item past the region", 32 + 16, &[0, 0, 0x10, 0]),
            ("reserved flag", 32 + 24, &[0x0C]),
            ("block size", 0x10000, &[0, 0, 0x30, 0]),
            ("differencing", 0x10004, &[2]),
            ("size", 0x10008, &[1]),
            ("sector", 0x10010, &[0, 4]),
        ];
        for (name, at, change) in breaks {
            let mut bytes = parameters().encode();
            bytes[at..at + change.len()].copy_from_slice(change);
            assert!(read(bytes).is_err(), "{name}");
        }
    }
}
