//! The metadata region: what kind of disk the file holds.

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
        self, BLOCK_BYTES_MAX, BLOCK_BYTES_MIN, FILE_PARAMETERS, INCOMPLETE_FILE, LOGICAL_SECTOR,
        METADATA_ITEM_BYTES_MAX, METADATA_TABLE_BYTES, MetadataEntry, MetadataTableHeader,
        PARENT_LOCATOR, PHYSICAL_SECTOR, TABLE_ENTRIES_MAX, VIRTUAL_DISK_ID, VIRTUAL_DISK_SIZE,
        u32_at,
    },
    locator::Locator,
};

const ENTRY_BYTES: usize = 32;
pub(super) const IS_USER: u32 = 1;
pub(super) const IS_VIRTUAL_DISK: u32 = 2;
pub(super) const IS_REQUIRED: u32 = 4;
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
    pub(super) fn read(items: &Items<'_>) -> Result<Self, OpenError> {
        let item = |id: Uuid, len: usize, name: &str| -> Result<Vec<u8>, OpenError> {
            let bytes = items.get(id, name)?;
            if bytes.len() == len {
                return Ok(bytes);
            }
            Err(items.corrupt(format!("the {name} has {} bytes", bytes.len())))
        };
        let file = item(FILE_PARAMETERS, 8, "file parameters")?;
        let flags = u32_at(&file, 4);
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
            kind: if flags & HAS_PARENT != 0 {
                Kind::Differencing
            } else if flags & LEAVE_BLOCKS_ALLOCATED != 0 {
                Kind::Fixed
            } else {
                Kind::Dynamic
            },
            disk_id: Uuid::from_bytes_le(disk_id.try_into().expect("the item's length is checked")),
        };
        if flags & !(LEAVE_BLOCKS_ALLOCATED | HAS_PARENT) != 0 {
            return Err(items.corrupt(format!("file parameters have flags {flags:#x}")));
        }
        parameters
            .check()
            .map_err(|problem| items.corrupt(problem))?;
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

    /// The table and, from [`METADATA_TABLE_BYTES`] on, the items, packed and in the order of Windows. A differencing
    /// disk has a locator, no other one has.
    pub(super) fn encode(&self, locator: Option<&Locator>) -> Vec<u8> {
        let flags = match self.kind {
            Kind::Dynamic => 0,
            Kind::Fixed => LEAVE_BLOCKS_ALLOCATED,
            Kind::Differencing => HAS_PARENT,
        };
        let block_size = u32::try_from(self.block_size).expect("a block has at most 256 MiB");
        let mut file = block_size.to_le_bytes().to_vec();
        file.extend(u32::to_le_bytes(flags));
        let of_disk = IS_VIRTUAL_DISK | IS_REQUIRED;
        let mut items = vec![
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
        items.extend(locator.map(|locator| (PARENT_LOCATOR, IS_REQUIRED, locator.encode())));
        let mut bytes = vec![0; to_usize(METADATA_TABLE_BYTES)];
        let header = MetadataTableHeader {
            reserved: 0,
            count: u16::try_from(items.len()).expect("five items or six"),
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

/// The metadata of a file, its table checked.
#[derive(Debug)]
pub(super) struct Items<'a> {
    storage: &'a dyn Storage,
    region: Extent,
    entries: Vec<MetadataEntry>,
}

impl<'a> Items<'a> {
    /// Reads the table at the start of `region`.
    pub(super) fn read(storage: &'a dyn Storage, region: Extent) -> Result<Self, OpenError> {
        let corrupt = |problem: String| OpenError::corrupt("metadata", region.offset, problem);
        let mut table = vec![0; to_usize(METADATA_TABLE_BYTES)];
        storage
            .read_at(region.offset, &mut table)
            .map_err(OpenError::reading("metadata table", region.offset))?;
        let entries = decode_table(&table).ok_or_else(|| corrupt("not a table".into()))?;
        if let Some(problem) = problems(&entries, region.len).into_iter().next() {
            return Err(corrupt(problem));
        }
        if let Some(unknown) = entries.iter().find(|entry| !may_ignore(entry)) {
            return Err(OpenError::Unsupported(format!(
                "the metadata item {}",
                unknown.id
            )));
        }
        Ok(Self::of(storage, region, entries))
    }

    /// The items of a table that is not to be trusted: for those who look through a damaged file.
    pub(super) fn of(
        storage: &'a dyn Storage,
        region: Extent,
        entries: Vec<MetadataEntry>,
    ) -> Self {
        Self {
            storage,
            region,
            entries,
        }
    }

    /// The parent locator.
    pub(super) fn locator(&self) -> Result<Locator, OpenError> {
        let item = self.get(PARENT_LOCATOR, "parent locator")?;
        Locator::decode(&item)
            .map_err(|problem| self.corrupt(format!("the parent locator: {problem}")))
    }

    /// The bytes of an item.
    fn get(&self, id: Uuid, name: &str) -> Result<Vec<u8>, OpenError> {
        let mut entries = self.entries.iter();
        let entry = entries
            .find(|entry| entry.id == id && entry.flags & IS_USER == 0)
            .ok_or_else(|| self.corrupt(format!("there is no {name}")))?;
        let offset = self.region.offset + u64::from(entry.offset);
        // An item has at most 1 MiB.
        let mut bytes = vec![0; to_usize(u64::from(entry.len))];
        self.storage
            .read_at(offset, &mut bytes)
            .map_err(OpenError::reading("metadata item", offset))?;
        Ok(bytes)
    }

    fn corrupt(&self, problem: String) -> OpenError {
        OpenError::corrupt("metadata", self.region.offset, problem)
    }
}

/// The entries of a table, if signature and count are right.
pub(super) fn decode_table(table: &[u8]) -> Option<Vec<MetadataEntry>> {
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
pub(super) fn may_ignore(entry: &MetadataEntry) -> bool {
    let known = entry.flags & IS_USER == 0 && name(entry.id).is_some();
    known || entry.flags & IS_REQUIRED == 0
}

/// What people call a known item.
pub(super) fn name(id: Uuid) -> Option<&'static str> {
    Some(match id {
        FILE_PARAMETERS => "file parameters",
        VIRTUAL_DISK_SIZE => "disk size",
        VIRTUAL_DISK_ID => "disk identity",
        LOGICAL_SECTOR => "logical sector size",
        PHYSICAL_SECTOR => "physical sector size",
        PARENT_LOCATOR => "parent locator",
        _ => return None,
    })
}

/// Everything that is wrong with places, lengths and flags of the items, wanted or not.
pub(super) fn problems(entries: &[MetadataEntry], region_len: u64) -> Vec<String> {
    let mut problems = Vec::new();
    let mut names: Vec<(Uuid, bool)> = Vec::with_capacity(entries.len());
    let mut runs: Vec<(Extent, Uuid)> = Vec::with_capacity(entries.len());
    for entry in entries {
        let id = entry.id;
        let run = Extent::new(u64::from(entry.offset), u64::from(entry.len));
        if entry.flags & !(IS_USER | IS_VIRTUAL_DISK | IS_REQUIRED) != 0 {
            problems.push(format!("item {id} has reserved flags set"));
        }
        let user = entry.flags & IS_USER != 0;
        if user && entry.flags & IS_REQUIRED != 0 {
            problems.push(format!("item {id} is a user's and required"));
        }
        if id == INCOMPLETE_FILE {
            problems.push("its maker has not finished it".into());
        }
        if entry.len > METADATA_ITEM_BYTES_MAX
            || run.end() > region_len
            || (entry.len != 0 && run.offset < METADATA_TABLE_BYTES)
        {
            let Extent { offset, len } = run;
            problems.push(format!(
                "item {id} cannot be {len} bytes at {offset:#x} of the region"
            ));
        }
        names.push((id, user));
        if run.len > 0 {
            runs.push((run, id));
        }
    }
    names.sort_unstable();
    for twice in names.windows(2).filter(|pair| pair[0] == pair[1]) {
        problems.push(format!("item {} is there twice", twice[0].0));
    }
    runs.sort_unstable();
    for pair in runs.windows(2).filter(|pair| pair[0].0.overlaps(pair[1].0)) {
        problems.push(format!("items {} and {} overlap", pair[0].1, pair[1].1));
    }
    problems
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
        let storage = MemoryStorage::with_bytes(&bytes);
        let items = Items::read(storage.as_ref(), Extent::new(0, to_u64(bytes.len())))?;
        let parameters = Parameters::read(&items)?;
        if parameters.kind == Kind::Differencing {
            items.locator()?;
        }
        Ok(parameters)
    }

    #[test]
    fn what_is_written_is_read() {
        assert_eq!(read(parameters().encode(None)).unwrap(), parameters());
        let child = Parameters {
            kind: Kind::Differencing,
            ..parameters()
        };
        let locator = Locator::new(Uuid::max(), [Some("p"), None, None]);
        assert_eq!(read(child.encode(Some(&locator))).unwrap(), child);
        read(child.encode(None)).unwrap_err();
    }

    /// What other programs keep in a file of theirs is theirs to understand, unless they say that everybody must.
    #[test]
    fn unknown_items_are_left_alone_unless_they_are_required() {
        let with_item = |id: Uuid, flags: u32| {
            let mut bytes = parameters().encode(None);
            bytes[10] = 6;
            let entry = MetadataEntry {
                id,
                offset: 0x2_0000,
                len: 100,
                flags,
                reserved: 0,
            };
            format::encode(&entry, &mut bytes[6 * ENTRY_BYTES..7 * ENTRY_BYTES]);
            read(bytes)
        };
        let unknown = Uuid::from_u128(99);
        for flags in [0, IS_USER, IS_VIRTUAL_DISK, IS_USER | IS_VIRTUAL_DISK] {
            with_item(unknown, flags).unwrap();
        }
        // A user's item may have the name of one that the format knows.
        with_item(FILE_PARAMETERS, IS_USER).unwrap();
        for (id, flags) in [
            (unknown, IS_REQUIRED),
            (unknown, IS_REQUIRED | IS_USER),
            (INCOMPLETE_FILE, 0),
            (FILE_PARAMETERS, IS_REQUIRED),
        ] {
            with_item(id, flags).unwrap_err();
        }
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
            let mut bytes = parameters().encode(None);
            bytes[at..at + change.len()].copy_from_slice(change);
            assert!(read(bytes).is_err(), "{name}");
        }
    }
}
