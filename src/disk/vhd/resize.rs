//! Another size for a closed image.
//!
//! What all readers take for the size is made equal (see `create`): current size, original size, and a creator whose
//! geometry nobody takes for it. The identity stays, and so does what the guest wrote.
//!
//! # Crash contract
//! A cut at any step leaves the disk with its old size or with the new one, whole. Each arrow is a sync:
//! ```text
//!   dynamic, grow:   room cleared, table where it fits, old footer behind it -> header -> footer at the end -> its copy
//!   dynamic, shrink: footer at the end -> its copy -> header
//!   fixed, grow:     the old footer, with the old size, at the new end -> room cleared -> footer with the new size
//!   fixed, shrink:   footer with the new size at the old end -> the same at the new end -> file cut off
//! ```
//! Header and footer change in one sector each. Where a cut leaves two footers that differ, the one at the end counts.

use std::io;

use crate::{
    base::units::{Extent, MIB, SECTOR_BYTES, to_u64, to_usize},
    storage::{Fua, Space as Keeping, Storage},
};

use super::{
    Kind,
    create::check_size,
    error::OpenError,
    format::{Chs, FOOTER_BYTES, FOOTER_LEN, Footer, Header, WINDOWS},
    header::Checked,
    open::{Image, Sparse},
};

/// Why an image keeps its size.
#[derive(Debug, thiserror::Error)]
pub enum ResizeError {
    /// It does not open.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The storage below failed. The disk has its old size or the new one.
    #[error("cannot change the size of the VHD file")]
    Io(#[from] io::Error),
    /// What the format does not know.
    #[error("a VHD cannot have {0}")]
    Size(String),
    /// The guest's data would be cut off.
    #[error(
        "the disk holds data up to byte {smallest}: it cannot become smaller than {smallest} bytes"
    )]
    InUse {
        /// The smallest size that is possible.
        smallest: u64,
    },
}

/// Gives the disk of the closed image in `storage` a size of `size` bytes, durably. What is new reads as zeros; only what
/// is not in use is given up: of a dynamic disk, blocks that are not in the file, of a fixed one, zeros.
pub fn resize(storage: &dyn Storage, size: u64) -> Result<(), ResizeError> {
    check_size(size).map_err(ResizeError::Size)?;
    let mut image = Image::read(storage)?;
    if image.kind == Kind::Differencing {
        return Err(OpenError::Differencing.into());
    }
    image.check_seals()?;
    image.repair(storage)?;
    if size == image.size {
        return Ok(());
    }
    let smallest = match &image.sparse {
        Some(sparse) => last_block_end(sparse).min(image.size),
        None if size < image.size => data_end(storage, Extent::new(size, image.size - size))?,
        None => 0,
    };
    if size < smallest {
        return Err(ResizeError::InUse { smallest });
    }
    let footer = Footer {
        original_size: size,
        current_size: size,
        geometry: Chs::of(size),
        creator: WINDOWS,
        ..image.current.footer.clone()
    };
    let footer = footer.encode();
    match &image.sparse {
        None if size > image.size => grow_fixed(storage, &image, size, &footer)?,
        None => shrink_fixed(storage, &image, size, &footer)?,
        Some(sparse) => {
            let mut tail = sparse.taken.limit;
            if size > image.size {
                tail = make_room(storage, &image, sparse, size)?;
            }
            for at in [tail, 0] {
                storage.write_at(at, &footer, Fua::No)?;
                storage.sync()?;
            }
            if size < image.size {
                let entries = size.div_ceil(sparse.bat.block_size);
                let header = &sparse.header;
                write_header(storage, header, header.header.bat_offset, entries)?;
            }
        }
    }
    Ok(())
}

/// Makes header and table of a dynamic file good for `size` bytes; tells where the footer at its end is then.
fn make_room(storage: &dyn Storage, image: &Image, sparse: &Sparse, size: u64) -> io::Result<u64> {
    let Sparse {
        header, bat, taken, ..
    } = sparse;
    // Behind the old end the last block may hold anything.
    let within = image.size % bat.block_size;
    if let (1.., Some(place)) = (within, bat.place(bat.blocks() - 1)) {
        let rest = Extent::new(place + bat.bitmap + within, bat.block_size - within);
        storage.zero(rest, Keeping::Release)?;
    }
    let entries = size.div_ceil(bat.block_size);
    let table = Extent::new(
        header.header.bat_offset,
        (entries * 4).next_multiple_of(SECTOR_BYTES),
    );
    let (old, new) = (to_usize(bat.blocks() * 4), to_usize(table.len));
    let mut bytes = vec![0xFF; new];
    storage.read_at(table.offset, &mut bytes[..old])?;
    let (table, tail) = if table.end() <= room_end(sparse) {
        storage.write_at(table.offset + to_u64(old), &bytes[old..], Fua::No)?;
        (table, taken.limit)
    } else {
        let table = Extent::new(sparse.end().next_multiple_of(SECTOR_BYTES), table.len);
        storage.write_at(table.offset, &bytes, Fua::No)?;
        storage.write_at(table.end(), &image.current.bytes, Fua::No)?;
        storage.set_len(table.end() + FOOTER_LEN)?;
        (table, table.end())
    };
    storage.sync()?;
    write_header(storage, &sparse.header, table.offset, entries)?;
    Ok(tail)
}

/// Makes the header name a table of `entries` at `bat_offset`: 7-Zip wants one entry for each block and no more.
fn write_header(
    storage: &dyn Storage,
    header: &Checked,
    bat_offset: u64,
    entries: u64,
) -> io::Result<()> {
    let changed = Header {
        bat_offset,
        entries: u32::try_from(entries).expect("2040 GiB in the smallest blocks are 2^22"),
        ..header.header.clone()
    };
    // All that changed is in its first sector.
    let sector = &changed.encode()[..to_usize(SECTOR_BYTES)];
    storage.write_at(header.offset, sector, Fua::No)?;
    storage.sync()
}

/// Where the first thing behind the table starts.
fn room_end(sparse: &Sparse) -> u64 {
    let bat = sparse.header.header.bat_offset;
    let structures = sparse.taken.structures.iter().map(|(_, run)| run.offset);
    structures
        .chain(sparse.bat.present().map(|(_, place)| place))
        .filter(|&offset| offset > bat)
        .fold(sparse.taken.limit, u64::min)
}

/// One past the last byte of the disk that a block in the file holds.
fn last_block_end(sparse: &Sparse) -> u64 {
    let last = sparse.bat.present().map(|(block, _)| block).last();
    last.map_or(0, |block| (block + 1) * sparse.bat.block_size)
}

/// One past the last sector of `run` that is not all zeros, or the run's start.
fn data_end(storage: &dyn Storage, run: Extent) -> io::Result<u64> {
    let mut found = run.offset;
    let mut buf = vec![0; to_usize(MIB)];
    let mut at = run.offset;
    while let Some(data) = storage
        .data_after(at)?
        .filter(|data| data.offset < run.end())
    {
        at = data.offset.max(at);
        let len = (data.end().min(run.end()) - at).min(MIB);
        let part = &mut buf[..to_usize(len)];
        storage.read_at(at, part)?;
        if let Some(last) = part.iter().rposition(|&byte| byte != 0) {
            found = (at + to_u64(last) + 1).next_multiple_of(SECTOR_BYTES);
        }
        at += len;
        if at >= run.end() {
            break;
        }
    }
    Ok(found)
}

fn grow_fixed(
    storage: &dyn Storage,
    image: &Image,
    size: u64,
    footer: &[u8; FOOTER_BYTES],
) -> io::Result<()> {
    let current = &image.current;
    let tail = if size <= current.offset {
        current.offset
    } else {
        // The two must not share a sector.
        let behind = (current.offset + FOOTER_LEN).next_multiple_of(SECTOR_BYTES);
        storage.write_at(size.max(behind), &current.bytes, Fua::No)?;
        storage.sync()?;
        size.max(behind)
    };
    let new = Extent::new(image.size, size - image.size);
    storage.zero(new, Keeping::Release)?;
    storage.sync()?;
    storage.write_at(tail, footer, Fua::No)?;
    storage.sync()
}

fn shrink_fixed(
    storage: &dyn Storage,
    image: &Image,
    size: u64,
    footer: &[u8; FOOTER_BYTES],
) -> io::Result<()> {
    for at in [image.current.offset, size] {
        storage.write_at(at, footer, Fua::No)?;
        storage.sync()?;
    }
    storage.set_len(size + FOOTER_LEN)?;
    storage.sync()
}
