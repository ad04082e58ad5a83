//! What is done with a file that claims to be an image: everything that a host does with one, and what has to hold then.
//!
//! - Nothing panics.
//! - Checking, and opening for reading, change nothing.
//! - What opens for writing opens for reading as well and shows the same: a log replayed in memory and one replayed into
//!   the file come to the same.
//! - What was written is read back, also after the image was closed and opened again; and it does open again.

use std::sync::Arc;

use understudy::{
    base::{
        ids::SeededIds,
        units::{Extent, MIB, SECTOR_BYTES, to_u64, to_usize},
    },
    disk::{
        Access, Content, Disk, Fua, Opening, Space,
        image::{self, Format},
        parents::{Parent, Parents, ParentsError},
        vhd, vhdx,
    },
    storage::Storage,
};

use super::{plan::Plan, sparse::Sparse};

/// Runs looked at in one disk.
const RUNS_MAX: usize = 32;
/// Bytes read or written at once.
const PIECE: u64 = 4096;
/// Writes and discards.
const CHANGES_MAX: u8 = 4;
/// A first write into a block of a parent copies the block. Larger ones are left alone, they only take time.
const COPIED_MAX: u64 = MIB;

/// Gives every child the same parent.
#[derive(Debug)]
struct OneParent(Option<Arc<dyn Storage>>);

impl Parents for OneParent {
    fn find(&self, paths: &[String]) -> Result<Parent, ParentsError> {
        let none = || ParentsError::NotConfigured {
            paths: paths.to_vec(),
        };
        Ok(Parent {
            storage: self.0.clone().ok_or_else(none)?,
            name: "parent".into(),
            parents: Arc::new(Self(None)),
        })
    }
}

/// Does everything with `file`. The writes are as `plan` has them.
pub(crate) fn exercise(
    file: &Sparse,
    format: Format,
    parent: Option<&Sparse>,
    plan: &mut Plan<'_>,
) {
    let (power, storage) = file.storage();
    let storage: Arc<dyn Storage> = storage;
    let parents = OneParent(parent.map(|parent| -> Arc<dyn Storage> { parent.storage().1 }));
    let reading =
        Opening::new(Access::ReadOnly, Arc::new(SeededIds::new(7))).with_parents(Arc::new(parents));
    let writing = Opening {
        access: Access::ReadWrite,
        ..reading.clone()
    };

    let before = power.steps();
    inspect(&storage, format);
    let seen = image::open(Arc::clone(&storage), format, &reading)
        .ok()
        .map(|disk| look(disk.as_ref()));
    assert_eq!(power.steps(), before, "reading changed the file");

    let Some((disk, copies)) = open_writable(&storage, format, &writing) else {
        return;
    };
    let seen = seen.expect("what can be written can be read");
    // Where its runs end may differ, what they hold may not.
    look(disk.as_ref());
    for (offset, bytes) in seen {
        let again = read(disk.as_ref(), offset, bytes.as_ref().map_or(1, Vec::len));
        assert!(
            again == bytes,
            "opened for writing, offset {offset:#x} shows something else"
        );
    }
    if copies > COPIED_MAX {
        return;
    }
    let changes = change(disk.as_ref(), plan);
    verify(disk.as_ref(), &changes);
    if disk.flush().and_then(|()| disk.close()).is_err() {
        return;
    }
    drop(disk);
    let disk = image::open(storage, format, &reading).expect("a closed image opens again");
    verify(disk.as_ref(), &changes);
}

/// What never fails, whatever the file is.
fn inspect(storage: &Arc<dyn Storage>, format: Format) {
    let _ = image::detect(storage.as_ref());
    let _ = image::check(storage, format);
    match format {
        Format::Vhdx => drop(vhdx::inspect(storage)),
        Format::Vhd => drop(vhd::inspect(storage)),
        Format::Raw => {}
    }
}

/// The disk, and how many bytes its first write may copy.
fn open_writable(
    storage: &Arc<dyn Storage>,
    format: Format,
    opening: &Opening,
) -> Option<(Arc<dyn Disk>, u64)> {
    let storage = Arc::clone(storage);
    if format != Format::Vhdx {
        return Some((image::open(storage, format, opening).ok()?, 0));
    }
    let disk = vhdx::VhdxDisk::open(storage, opening).ok()?;
    let copies = match disk.kind() {
        vhdx::Kind::Differencing => disk.block_size(),
        vhdx::Kind::Dynamic | vhdx::Kind::Fixed => 0,
    };
    Some((Arc::new(disk), copies))
}

/// What a disk shows: the first and the last bytes of its first runs, and of itself.
fn look(disk: &dyn Disk) -> Vec<(u64, Option<Vec<u8>>)> {
    let size = disk.geometry().size;
    let mut shown = Vec::new();
    let mut show = |offset: u64, len: u64| {
        let bytes = read(disk, offset, to_usize(len));
        shown.push((offset, bytes.clone()));
        bytes
    };
    let mut at = 0;
    for _ in 0..RUNS_MAX {
        let Ok((run, content)) = disk.run_at(at) else {
            break;
        };
        assert!(run.offset == at && run.len > 0 && run.end() <= size);
        let len = run.len.min(PIECE);
        for offset in [run.offset, run.end() - len] {
            if let (Some(bytes), Content::Zero) = (show(offset, len), content) {
                assert!(bytes.iter().all(|&byte| byte == 0), "zeros that are not");
            }
        }
        at = run.end();
        if at == size {
            break;
        }
    }
    let len = size.min(PIECE);
    show(size - len, len);
    disk.read_at(size, &mut [0]).expect_err("past the end");
    shown
}

/// The bytes at `offset`, if they can be read.
fn read(disk: &dyn Disk, offset: u64, len: usize) -> Option<Vec<u8>> {
    let mut bytes = vec![0; len];
    disk.read_at(offset, &mut bytes).ok().map(|()| bytes)
}

/// Writes and discards; what was changed, and the byte that stands there now if the call said that it succeeded.
fn change(disk: &dyn Disk, plan: &mut Plan<'_>) -> Vec<(Extent, Option<u8>)> {
    let size = disk.geometry().size;
    let sectors = size / SECTOR_BYTES;
    let mut changes = Vec::new();
    for number in 1..=CHANGES_MAX {
        let kind = plan.u8();
        let offset = plan.below(sectors.max(1)) * SECTOR_BYTES;
        let offset = if kind & 8 == 0 {
            offset % (8 * MIB).min(size)
        } else {
            offset
        };
        let fua = if kind & 4 == 0 { Fua::No } else { Fua::Yes };
        let len = (size - offset).min(u64::from(kind >> 4) * SECTOR_BYTES);
        let (run, byte, done) = if kind & 3 == 3 {
            let run = Extent::new(offset, len.saturating_mul(4096).min(size - offset));
            (run, 0, disk.zero(run, Space::Release, fua))
        } else {
            let bytes = vec![number; to_usize(len)];
            (
                Extent::new(offset, len),
                number,
                disk.write_at(offset, &bytes, fua),
            )
        };
        changes.push((run, done.ok().map(|()| byte)));
    }
    changes
}

/// The first and the last bytes of each change, as the last change that touched them left them.
fn verify(disk: &dyn Disk, changes: &[(Extent, Option<u8>)]) {
    for (run, _) in changes {
        let len = run.len.min(PIECE);
        for offset in [run.offset, run.end() - len] {
            let Some(bytes) = read(disk, offset, to_usize(len)) else {
                assert!(
                    changes.iter().any(|(_, byte)| byte.is_none()),
                    "what was written cannot be read"
                );
                continue;
            };
            for (at, found) in (offset..offset + to_u64(bytes.len())).zip(bytes) {
                let last = changes
                    .iter()
                    .rev()
                    .find(|(run, _)| (run.offset..run.end()).contains(&at));
                let (_, expected) = last.expect("it lies in one at least");
                assert!(
                    expected.is_none_or(|byte| byte == found),
                    "{found} at {at:#x} of the disk after {changes:?}"
                );
            }
        }
    }
}
