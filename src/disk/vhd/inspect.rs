//! What is in a VHD file, for people: every structure that an administrator may ask about, and nothing is changed.

use std::sync::Arc;

use serde::Serialize;
use uuid::Uuid;

use crate::{disk::Geometry, storage::Storage};

use super::{
    Kind,
    error::OpenError,
    footer::Found,
    format::Chs,
    open::{Image, Sparse},
};

/// What is in a file. Offsets and lengths are bytes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Inspection {
    /// Length of the file.
    pub file_len: u64,
    /// Fixed, dynamic or differencing.
    pub kind: Kind,
    /// Size and sectors of the disk.
    pub geometry: Geometry,
    /// The footer at the end of the file, if there is one.
    pub tail: Option<FooterCopy>,
    /// The copy at the start; a fixed file has none.
    pub head: Option<FooterCopy>,
    /// What a fixed file does not have.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dynamic: Option<Dynamic>,
}

/// A footer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct FooterCopy {
    /// Where it stands.
    pub offset: u64,
    /// Whether its checksum is right.
    pub checksum_good: bool,
    /// Who made it, by its own account, with a version.
    pub creator: String,
    /// Seconds since 2000-01-01 00:00 UTC.
    pub created: u32,
    /// Size of the disk when it was made.
    pub original_size: u64,
    /// Size of the disk.
    pub current_size: u64,
    /// Cylinders, heads and sectors.
    pub geometry: Chs,
    /// The identity by which children know their parent.
    pub id: Uuid,
    /// Whether the machine was suspended with this disk.
    pub saved_state: bool,
}

/// What only dynamic and differencing files have.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Dynamic {
    /// Where the header stands.
    pub offset: u64,
    /// Whether its checksum is right.
    pub checksum_good: bool,
    /// Where the table stands.
    pub bat_offset: u64,
    /// Entries of the table.
    pub bat_entries: u32,
    /// Bytes of a block.
    pub block_size: u64,
    /// Blocks of the disk.
    pub blocks: u64,
    /// Blocks in the file.
    pub blocks_present: u64,
    /// Blocks that lie over something else or past the end of the file.
    pub blocks_damaged: u64,
    /// Who the parent is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub parent: Option<ParentName>,
}

/// What a differencing file says of its parent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ParentName {
    /// Its identity.
    pub id: Uuid,
    /// Its name.
    pub name: String,
    /// Where it may be found.
    pub locators: Vec<ParentLocator>,
}

/// One place where the parent may be found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ParentLocator {
    /// `W2ru` relative, `W2ku` absolute, or of another system.
    pub platform: String,
    /// Where its text stands.
    pub offset: u64,
    /// How long it is.
    pub len: u32,
    /// The path.
    pub path: String,
}

/// Reads every structure of the file in `storage`. A damaged table is told, a damaged header or footer is an error.
pub fn inspect(storage: &Arc<dyn Storage>) -> Result<Inspection, OpenError> {
    let image = Image::read_leniently(storage.as_ref())?;
    let head = match image.kind {
        Kind::Fixed => None,
        Kind::Dynamic | Kind::Differencing => image.footers.head.as_ref(),
    };
    Ok(Inspection {
        file_len: image.len,
        kind: image.kind,
        geometry: Geometry {
            size: image.size,
            logical_sector: 512,
            physical_sector: 512,
        },
        tail: image.footers.tail.as_ref().map(footer_copy),
        head: head.map(footer_copy),
        dynamic: image
            .sparse
            .as_ref()
            .map(|sparse| dynamic(sparse, image.kind)),
    })
}

fn footer_copy(found: &Found) -> FooterCopy {
    let footer = &found.footer;
    let text = |bytes: [u8; 4]| bytes.escape_ascii().to_string();
    FooterCopy {
        offset: found.offset,
        checksum_good: found.sealed,
        creator: format!(
            "{} {}.{} on {}",
            text(footer.creator).trim_end(),
            footer.creator_version >> 16,
            footer.creator_version & 0xFFFF,
            text(footer.creator_host)
        ),
        created: footer.created,
        original_size: footer.original_size,
        current_size: footer.current_size,
        geometry: footer.geometry,
        id: footer.id,
        saved_state: footer.saved_state != 0,
    }
}

fn dynamic(sparse: &Sparse, kind: Kind) -> Dynamic {
    let Sparse {
        header,
        locators,
        bat,
        taken,
    } = sparse;
    let mut blocks_damaged = 0;
    bat.faults(taken, &mut |_| {
        blocks_damaged += 1;
        true
    });
    let locators = locators.iter().map(|(locator, path)| ParentLocator {
        platform: locator.platform.escape_ascii().to_string(),
        offset: locator.offset,
        len: locator.len,
        path: path.clone(),
    });
    Dynamic {
        offset: header.offset,
        checksum_good: header.sealed,
        bat_offset: header.header.bat_offset,
        bat_entries: header.header.entries,
        block_size: bat.block_size,
        blocks: bat.blocks(),
        blocks_present: bat.present().map(|_| 1).sum(),
        blocks_damaged,
        parent: (kind == Kind::Differencing).then(|| ParentName {
            id: header.header.parent_id,
            name: header.parent_name(),
            locators: locators.collect(),
        }),
    }
}
