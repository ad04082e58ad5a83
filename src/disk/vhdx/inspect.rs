//! What is in a VHDX file, for people: every structure that an administrator may ask about, and nothing is changed.

use std::sync::Arc;

use serde::Serialize;
use uuid::Uuid;

use crate::{
    disk::{Geometry, check::Report, parents::Parents},
    storage::Storage,
};

use super::{
    Kind,
    bat::State,
    chain,
    error::OpenError,
    format::{Header, MetadataEntry, RegionEntry},
    metadata::{self, IS_REQUIRED, IS_USER, IS_VIRTUAL_DISK},
    open::{Image, Replaying},
    region,
    survey::Survey,
};

/// What is in a file. Offsets and lengths are bytes. What a damaged file does not tell is missing, and `report` says why.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Inspection {
    /// Length of the file, after its log is replayed.
    pub file_len: u64,
    /// Who made it, by its own account.
    pub creator: String,
    /// Both headers; nothing in place of a damaged one.
    pub headers: [Option<HeaderCopy>; 2],
    /// The number of the header that counts, 1 or 2.
    pub current_header: Option<usize>,
    /// Where the log is, and what it holds.
    pub log: Log,
    /// Both region tables; nothing in place of a damaged one. The first good one counts.
    pub region_tables: [Option<Vec<Region>>; 2],
    /// All metadata items, known or not.
    pub metadata: Vec<Item>,
    /// Size and sectors of the disk.
    pub geometry: Option<Geometry>,
    /// Dynamic, fixed or differencing.
    pub kind: Option<Kind>,
    /// Bytes of a block.
    pub block_size: Option<u64>,
    /// The identity that a guest sees.
    pub disk_id: Option<Uuid>,
    /// How many blocks are in which state.
    pub blocks: Option<Blocks>,
    /// What a check of the file finds.
    pub report: Report,
    /// How a differencing image names its parent.
    pub parent: Option<ParentLocator>,
}

/// How an image names its parent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ParentLocator {
    /// What the entries mean.
    pub id: Uuid,
    /// Keys and values, in the order of the file.
    pub entries: Vec<(String, String)>,
}

/// One image of the chain of parents.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Ancestor {
    /// The file.
    pub name: String,
    /// Length of the file, after its log is replayed.
    pub file_len: u64,
    /// Size and sectors of its disk.
    pub geometry: Geometry,
    /// Dynamic, fixed or differencing.
    pub kind: Kind,
    /// Bytes of a block.
    pub block_size: u64,
    /// What its child's locator names.
    pub data_write: Uuid,
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
    /// Version of the format: 1.
    pub version: u16,
    /// Version of the log: 0.
    pub log_version: u16,
}

/// The log.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Log {
    /// Where it starts.
    pub offset: u64,
    /// How long it is.
    pub len: u64,
    /// What it holds.
    #[serde(flatten)]
    pub state: LogState,
}

/// What a log holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "state", rename_all = "lowercase")]
pub enum LogState {
    /// Nothing: the file was closed.
    Clean,
    /// Entries that an open replays: the file was not closed.
    Dirty {
        /// How many.
        entries: u64,
    },
    /// It was in use and cannot be replayed.
    Damaged,
    /// No header tells.
    Unknown,
}

/// A region.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Region {
    /// Its identity.
    pub id: Uuid,
    /// `BAT`, `metadata`, or `unknown`.
    pub name: &'static str,
    /// Where it starts.
    pub offset: u64,
    /// How long it is.
    pub len: u64,
    /// Whether a program that does not know it must not open the file.
    pub required: bool,
}

/// A metadata item.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Item {
    /// Its identity.
    pub id: Uuid,
    /// What it is, if that is known.
    pub name: Option<&'static str>,
    /// Where it starts, from the start of the metadata region.
    pub offset: u32,
    /// How long it is.
    pub len: u32,
    /// It belongs to a user of the file, not to the format.
    pub user: bool,
    /// It belongs to the disk: a child gets a copy.
    pub virtual_disk: bool,
    /// A program that does not know it must not open the file.
    pub required: bool,
}

/// Blocks by their state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Blocks {
    /// All of them.
    pub total: u64,
    /// In the file.
    pub present: u64,
    /// Partly in the file, partly in the parent.
    pub partial: u64,
    /// Never written: in the parent, if there is one.
    pub not_present: u64,
    /// Known to be zeros.
    pub zero: u64,
    /// Discarded.
    pub unmapped: u64,
    /// Of no certain content; read as zeros.
    pub undefined: u64,
    /// In a state that no disk may have.
    pub reserved: u64,
    /// Sector bitmaps in the file, of a differencing image.
    pub bitmaps: u64,
}

impl Blocks {
    /// The counter of a state.
    pub(super) fn of(&mut self, state: State) -> &mut u64 {
        match state {
            State::NotPresent => &mut self.not_present,
            State::Undefined => &mut self.undefined,
            State::Zero => &mut self.zero,
            State::Unmapped => &mut self.unmapped,
            State::FullyPresent => &mut self.present,
            State::PartiallyPresent => &mut self.partial,
        }
    }
}

/// The parents of the image in `storage`, nearest first, if all of them are there and belong together. None for an
/// image that is no child.
pub fn ancestors(
    storage: &Arc<dyn Storage>,
    parents: &Arc<dyn Parents>,
) -> Result<Vec<Ancestor>, OpenError> {
    let image = Image::read(Arc::clone(storage), &Replaying::InMemory)?;
    let chain = chain::read(&image, parents)?;
    let ancestor = |(name, image): (String, Image)| Ancestor {
        name,
        file_len: image.len,
        geometry: image.parameters.geometry,
        kind: image.parameters.kind,
        block_size: image.parameters.block_size,
        data_write: image.headers.current().data_write,
    };
    Ok(chain.into_iter().map(ancestor).collect())
}

/// Reads every structure of the file in `storage`, past every fault, and changes nothing.
pub fn inspect(storage: &Arc<dyn Storage>) -> Inspection {
    let survey = Survey::of(storage);
    let header = survey
        .current
        .and_then(|number| survey.headers[number].as_ref());
    let log = Log {
        offset: header.map_or(0, |header| header.log_offset),
        len: header.map_or(0, |header| u64::from(header.log_len)),
        state: survey.log,
    };
    let parameters = survey.parameters;
    Inspection {
        file_len: survey.len,
        headers: survey
            .headers
            .each_ref()
            .map(|copy| copy.as_ref().map(header_copy)),
        current_header: survey.current.map(|number| number + 1),
        log,
        region_tables: survey.tables.each_ref().map(|table| {
            table
                .as_ref()
                .map(|table| table.iter().map(told_region).collect())
        }),
        metadata: survey.items.iter().map(told_item).collect(),
        geometry: parameters.map(|parameters| parameters.geometry),
        kind: parameters.map(|parameters| parameters.kind),
        block_size: parameters.map(|parameters| parameters.block_size),
        disk_id: parameters.map(|parameters| parameters.disk_id),
        blocks: survey.blocks,
        parent: survey.locator.map(|locator| ParentLocator {
            id: locator.id,
            entries: locator.entries,
        }),
        creator: survey.creator,
        report: survey.report,
    }
}

fn header_copy(header: &Header) -> HeaderCopy {
    HeaderCopy {
        sequence: header.sequence,
        file_write: header.file_write,
        data_write: header.data_write,
        log: header.log,
        version: header.version,
        log_version: header.log_version,
    }
}

fn told_region(entry: &RegionEntry) -> Region {
    Region {
        id: entry.id,
        name: region::name(entry.id),
        offset: entry.offset,
        len: u64::from(entry.len),
        required: entry.required & 1 == 1,
    }
}

fn told_item(entry: &MetadataEntry) -> Item {
    let is_user = entry.flags & IS_USER != 0;
    Item {
        id: entry.id,
        name: metadata::name(entry.id).filter(|_| !is_user),
        offset: entry.offset,
        len: entry.len,
        user: is_user,
        virtual_disk: entry.flags & IS_VIRTUAL_DISK != 0,
        required: entry.flags & IS_REQUIRED != 0,
    }
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
        let dirty = inspect(&storage);
        assert!(dirty.creator.starts_with("understudy "));
        let blocks = dirty.blocks.unwrap();
        assert_eq!((blocks.present, blocks.not_present), (1, 9));
        // The empty one and the block's.
        assert_eq!(dirty.log.state, LogState::Dirty { entries: 2 });
        assert_eq!(dirty.disk_id, Some(disk.disk_id()));
        assert!(dirty.report.is_sound(), "{:?}", dirty.report);
        disk.close().unwrap();
        let clean = inspect(&storage);
        assert_eq!(clean.log.state, LogState::Clean);
        assert_eq!(clean.report, Report::default());
        assert_eq!(clean.metadata.len(), 5);
        assert_eq!(clean.file_len, 5 << 20);
        let [Some(first), Some(second)] = clean.headers else {
            panic!("both headers are good");
        };
        assert_eq!(first.sequence.abs_diff(second.sequence), 1);
        assert_eq!(first.log, Uuid::nil());
        assert_eq!(clean.region_tables[0].as_ref().unwrap().len(), 2);
        assert_eq!(clean.region_tables[0], clean.region_tables[1]);
    }
}
