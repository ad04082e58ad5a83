//! What is in a VHDX file, for people: every structure that an administrator may ask about, and nothing is changed.

use std::sync::Arc;

use serde::Serialize;
use uuid::Uuid;

use crate::{disk::Geometry, storage::Storage};

use super::{
    Kind,
    bat::State,
    error::OpenError,
    format::{BAT_REGION, FILE_IDENTIFIER_BYTES, FILE_SIGNATURE, METADATA_REGION},
    header,
    open::{Image, Replaying},
};

/// What is in a file. Offsets and lengths are bytes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Inspection {
    /// Length of the file, after its log is replayed.
    pub file_len: u64,
    /// Who made it, by its own account.
    pub creator: String,
    /// Both headers; nothing in place of a damaged one.
    pub headers: [Option<HeaderCopy>; 2],
    /// Where the log is, and what it holds.
    pub log: Log,
    /// All regions.
    pub regions: Vec<Region>,
    /// Whether one copy of the region table is damaged or unlike the other.
    pub region_tables_differ: bool,
    /// Size and sectors of the disk.
    pub geometry: Geometry,
    /// Dynamic or fixed.
    pub kind: Kind,
    /// Bytes of a block.
    pub block_size: u64,
    /// The identity that a guest sees.
    pub disk_id: Uuid,
    /// How many blocks are in which state.
    pub blocks: Blocks,
}

/// A valid header.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct HeaderCopy {
    /// Grows with each update; the greater one counts.
    pub sequence: u64,
    /// Changes when the file is first written to after it was opened.
    pub file_write: Uuid,
    /// Changes when what a guest sees is first written to.
    pub data_write: Uuid,
    /// The log in use; nil if there is none.
    pub log: Uuid,
}

/// The log.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Log {
    /// Where it starts.
    pub offset: u64,
    /// How long it is.
    pub len: u64,
    /// Entries that an open replays: more than none means that the file was not closed.
    pub entries: u64,
}

/// A region.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Region {
    /// Its identity.
    pub id: Uuid,
    /// `bat`, `metadata`, or `unknown`.
    pub name: &'static str,
    /// Where it starts.
    pub offset: u64,
    /// How long it is.
    pub len: u64,
}

/// Blocks by their state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Blocks {
    /// All of them.
    pub total: u64,
    /// In the file.
    pub present: u64,
    /// Never written.
    pub not_present: u64,
    /// Known to be zeros.
    pub zero: u64,
    /// Discarded.
    pub unmapped: u64,
    /// Of no certain content; read as zeros.
    pub undefined: u64,
}

/// Reads every structure of the file in `storage`, as the disk would be opened for reading.
pub fn inspect(storage: &Arc<dyn Storage>) -> Result<Inspection, OpenError> {
    let image = Image::read(Arc::clone(storage), &Replaying::InMemory)?;
    let copies = header::copies(storage.as_ref())?;
    let log = image.headers.log();
    let regions = image.regions.all.iter().map(|(id, run)| Region {
        id: *id,
        name: match *id {
            BAT_REGION => "bat",
            METADATA_REGION => "metadata",
            _ => "unknown",
        },
        offset: run.offset,
        len: run.len,
    });
    Ok(Inspection {
        file_len: image.len,
        creator: creator(storage.as_ref())?,
        headers: copies.map(|copy| {
            copy.map(|header| HeaderCopy {
                sequence: header.sequence,
                file_write: header.file_write,
                data_write: header.data_write,
                log: header.log,
            })
        }),
        log: Log {
            offset: log.offset,
            len: log.len,
            entries: image.replayed,
        },
        regions: regions.collect(),
        region_tables_differ: image.regions.repair.is_some(),
        geometry: image.parameters.geometry,
        kind: image.parameters.kind,
        block_size: image.parameters.block_size,
        disk_id: image.parameters.disk_id,
        blocks: count(image.bat.states()),
    })
}

fn count(states: impl Iterator<Item = State>) -> Blocks {
    let mut blocks = Blocks::default();
    for state in states {
        blocks.total += 1;
        *match state {
            State::NotPresent => &mut blocks.not_present,
            State::Undefined => &mut blocks.undefined,
            State::Zero => &mut blocks.zero,
            State::Unmapped => &mut blocks.unmapped,
            State::FullyPresent | State::PartiallyPresent => &mut blocks.present,
        } += 1;
    }
    blocks
}

/// The creator's name up to its first NUL; what is not text is shown as such.
fn creator(storage: &dyn Storage) -> Result<String, OpenError> {
    let mut bytes = [0; FILE_IDENTIFIER_BYTES];
    storage
        .read_at(0, &mut bytes)
        .map_err(OpenError::reading("file identifier", 0))?;
    let (units, _) = bytes[FILE_SIGNATURE.len()..].as_chunks::<2>();
    let units = units
        .iter()
        .map(|unit| u16::from_le_bytes(*unit))
        .take_while(|&unit| unit != 0);
    Ok(char::decode_utf16(units)
        .map(|unit| unit.unwrap_or(char::REPLACEMENT_CHARACTER))
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        base::ids::SeededIds,
        disk::{
            Access, Disk, Fua, Opening,
            vhdx::{CreateOptions, VhdxDisk, create},
        },
        storage::memory::{MemoryStorage, Power},
    };

    #[test]
    fn an_image_is_told_as_it_is() {
        let ids = Arc::new(SeededIds::new(3));
        let storage: Arc<dyn Storage> = MemoryStorage::new(&Power::new());
        let options = CreateOptions {
            size: 10 << 20,
            block_size: 1 << 20,
            kind: Kind::Dynamic,
            logical_sector: 512,
            physical_sector: 4096,
        };
        create(storage.as_ref(), &options, ids.as_ref()).unwrap();
        let disk =
            VhdxDisk::open(Arc::clone(&storage), &Opening::new(Access::ReadWrite, ids)).unwrap();
        disk.write_at(0, &[1; 512], Fua::No).unwrap();
        let dirty = inspect(&storage).unwrap();
        assert!(dirty.creator.starts_with("understudy "));
        assert_eq!(dirty.blocks.present, 1);
        assert_eq!(dirty.blocks.not_present, 9);
        assert_eq!(dirty.log.entries, 2, "the empty one and the block's");
        assert_eq!(dirty.disk_id, disk.disk_id());
        disk.close().unwrap();
        let clean = inspect(&storage).unwrap();
        assert_eq!(clean.log.entries, 0);
        assert_eq!(clean.file_len, 5 << 20);
        let [Some(first), Some(second)] = clean.headers else {
            panic!("both headers are good");
        };
        assert_eq!(first.sequence.abs_diff(second.sequence), 1);
        assert_eq!(first.log, Uuid::nil());
        assert_eq!(clean.regions.len(), 2);
    }
}
