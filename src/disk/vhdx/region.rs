//! The region tables: where the block allocation table and the metadata are.

use uuid::Uuid;

use crate::{
    base::units::{Extent, MIB, to_usize},
    storage::Storage,
};

use super::{
    error::OpenError,
    format::{
        self, BAT_REGION, METADATA_REGION, REGION_TABLE_BYTES, REGION_TABLE_OFFSETS, RegionEntry,
        RegionTableHeader, TABLE_ENTRIES_MAX, checksum_of,
    },
};

const ENTRY_BYTES: usize = 32;
const HEADER_BYTES: usize = 16;

/// The regions of a file.
#[derive(Debug)]
pub(super) struct Regions {
    pub(super) bat: Extent,
    pub(super) metadata: Extent,
    /// Every region, known or not: their space is taken.
    pub(super) all: Vec<(Uuid, Extent)>,
    /// The whole table, for the other copy if that is damaged.
    pub(super) repair: Option<Repair>,
}

/// A good table whose twin is not the same.
#[derive(Debug)]
pub(super) struct Repair {
    pub(super) table: Box<[u8]>,
}

impl Regions {
    /// Reads the first copy that is valid.
    pub(super) fn read(storage: &dyn Storage) -> Result<Self, OpenError> {
        let mut copies = Vec::new();
        for offset in REGION_TABLE_OFFSETS {
            let mut bytes = vec![0; REGION_TABLE_BYTES].into_boxed_slice();
            storage
                .read_at(offset, &mut bytes)
                .map_err(OpenError::reading("region table", offset))?;
            copies.push((offset, bytes));
        }
        let same = copies[0].1 == copies[1].1;
        for (offset, bytes) in copies {
            if let Some(entries) = decode(&bytes) {
                let mut regions = Self::check(&entries, offset)?;
                regions.repair = (!same).then_some(Repair { table: bytes });
                return Ok(regions);
            }
        }
        Err(OpenError::corrupt(
            "region table",
            REGION_TABLE_OFFSETS[0],
            "neither copy has a valid signature and checksum",
        ))
    }

    fn check(entries: &[RegionEntry], offset: u64) -> Result<Self, OpenError> {
        let corrupt = |problem: String| OpenError::corrupt("region table", offset, problem);
        if let Some(problem) = problems(entries).into_iter().next() {
            return Err(corrupt(problem));
        }
        if let Some(unknown) = entries.iter().find(|entry| is_needed(entry)) {
            return Err(OpenError::Unsupported(format!("the region {}", unknown.id)));
        }
        let all: Vec<(Uuid, Extent)> = entries
            .iter()
            .map(|entry| (entry.id, place(entry)))
            .collect();
        let find = |wanted: Uuid| {
            let found = all.iter().find(|(id, _)| *id == wanted);
            found
                .map(|(_, run)| *run)
                .expect("it is a problem if one is missing")
        };
        Ok(Self {
            bat: find(BAT_REGION),
            metadata: find(METADATA_REGION),
            all,
            repair: None,
        })
    }
}

/// Everything that is wrong with the entries of a table.
pub(super) fn problems(entries: &[RegionEntry]) -> Vec<String> {
    let mut problems = Vec::new();
    let mut ids = std::collections::BTreeSet::new();
    for entry in entries {
        let (id, run) = (entry.id, place(entry));
        if !run.offset.is_multiple_of(MIB)
            || run.offset < MIB
            || run.len == 0
            || !run.len.is_multiple_of(MIB)
            || run.checked_end().is_none()
        {
            let Extent { offset, len } = run;
            problems.push(format!("region {id} cannot be {len} bytes at {offset:#x}"));
        }
        if entry.required > 1 {
            problems.push(format!("region {id} has reserved bits set"));
        }
        if !ids.insert(id) {
            problems.push(format!("region {id} is there twice"));
        }
    }
    for id in [BAT_REGION, METADATA_REGION] {
        if !ids.contains(&id) {
            problems.push(format!("there is no {} region", name(id)));
        }
    }
    problems
}

/// Whether nobody may open the file who does not know this region, and nobody here does.
pub(super) fn is_needed(entry: &RegionEntry) -> bool {
    entry.required == 1 && entry.id != BAT_REGION && entry.id != METADATA_REGION
}

/// What people call a region.
pub(super) fn name(id: Uuid) -> &'static str {
    match id {
        BAT_REGION => "BAT",
        METADATA_REGION => "metadata",
        _ => "unknown",
    }
}

/// Where a region is, by its own account.
pub(super) fn place(entry: &RegionEntry) -> Extent {
    Extent::new(entry.offset, u64::from(entry.len))
}

/// The entries of the table in `bytes`, if signature, count and checksum are right.
pub(super) fn decode(bytes: &[u8]) -> Option<Vec<RegionEntry>> {
    let header: RegionTableHeader = format::decode(bytes)?;
    let count = to_usize(u64::from(header.count));
    if count > TABLE_ENTRIES_MAX || header.checksum != checksum_of([bytes, &[]]) {
        return None;
    }
    bytes[HEADER_BYTES..]
        .chunks_exact(ENTRY_BYTES)
        .take(count)
        .map(format::decode)
        .collect()
}

/// A whole table with its checksum. BAT first, as Windows writes it.
pub(super) fn encode(bat: Extent, metadata: Extent) -> Vec<u8> {
    let mut bytes = vec![0; REGION_TABLE_BYTES];
    let header = RegionTableHeader {
        checksum: 0,
        count: 2,
        reserved: 0,
    };
    format::encode(&header, &mut bytes);
    let regions = [(BAT_REGION, bat), (METADATA_REGION, metadata)];
    for ((id, run), place) in regions
        .into_iter()
        .zip(bytes[HEADER_BYTES..].chunks_exact_mut(ENTRY_BYTES))
    {
        let entry = RegionEntry {
            id,
            offset: run.offset,
            len: u32::try_from(run.len).expect("the BAT of the largest disk has 513 MiB"),
            required: 1,
        };
        format::encode(&entry, place);
    }
    format::seal(&mut bytes);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_of_windows_has_its_known_checksum() {
        let bytes = encode(Extent::new(3 * MIB, MIB), Extent::new(2 * MIB, MIB));
        assert_eq!(bytes[4..8], 0xC66B_8CAE_u32.to_le_bytes());
        assert_eq!(decode(&bytes).unwrap().len(), 2);
    }

    type Break = fn(&mut Vec<RegionEntry>);

    #[test]
    fn bad_tables_are_refused() {
        let good = decode(&encode(
            Extent::new(3 * MIB, MIB),
            Extent::new(2 * MIB, MIB),
        ))
        .unwrap();
        Regions::check(&good, 0).unwrap();
        let breaks: [(&str, Break); 7] = [
            ("no BAT", |t| {
                t.remove(0);
            }),
            ("twice", |t| t.push(t[0].clone())),
            ("unaligned", |t| t[0].offset += 4096),
            ("over the headers", |t| t[0].offset = 0),
            ("past everything", |t| t[0].offset = !(MIB - 1)),
            ("reserved", |t| t[0].required = 3),
            ("unknown and required", |t| {
                t.push(RegionEntry {
                    id: Uuid::max(),
                    offset: 9 * MIB,
                    len: 1 << 20,
                    required: 1,
                });
            }),
        ];
        for (name, change) in breaks {
            let mut table = good.clone();
            change(&mut table);
            assert!(Regions::check(&table, 0).is_err(), "{name}");
        }
    }
}
