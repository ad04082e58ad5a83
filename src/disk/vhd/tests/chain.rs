//! Differencing disks: sectors of their own, the parent's, and parents that are not the right ones.

use super::*;
use crate::{
    base::units::to_usize,
    disk::{
        Fua,
        parents::{MemoryParents, ParentsError},
        vhd::format::{FOOTER_BYTES, HEADER_BYTES, seal},
    },
};

const SIZE: u64 = 4 * BLOCK + 1024;

/// The bytes of a closed image in which each write of `writes` (offset, length, byte) was made.
fn written(size: u64, kind: Kind, seed: u64, writes: &[(u64, usize, u8)]) -> Vec<u8> {
    let storage = MemoryStorage::new(&Power::new());
    create(
        storage.as_ref(),
        &options(size, kind),
        &SeededIds::new(seed),
    )
    .unwrap();
    let disk = open(&storage).unwrap();
    for &(at, len, byte) in writes {
        disk.write_at(at, &vec![byte; len], Fua::No).unwrap();
    }
    disk.close().unwrap();
    storage.bytes()
}

/// Makes a differencing image of a dynamic one: the sectors that hold `hidden` become the parent's.
fn child_of(parent: &[u8], name: &str, mut child: Vec<u8>, hidden: u8) -> Vec<u8> {
    let tail = child.len() - FOOTER_BYTES;
    let parent_id = &parent[parent.len() - FOOTER_BYTES + 68..][..16];
    for footer in [0, tail] {
        child[footer + 60..footer + 64].copy_from_slice(&4u32.to_be_bytes());
    }
    child[512 + 40..512 + 56].copy_from_slice(parent_id);
    for (at, unit) in name.encode_utf16().enumerate() {
        child[512 + 64 + at * 2..][..2].copy_from_slice(&unit.to_be_bytes());
    }
    for entry in child[1536..2048].to_vec().as_chunks::<4>().0 {
        let place = to_usize(u64::from(u32::from_be_bytes(*entry)) * 512);
        if *entry == [0xFF; 4] {
            continue;
        }
        for sector in 0..1024 {
            let data = place + 512 + sector * 512;
            if child[data] == hidden {
                child[place + sector / 8] &= !(0x80 >> (sector % 8));
            }
        }
    }
    for footer in [0, tail] {
        seal(&mut child[footer..footer + FOOTER_BYTES], 64);
    }
    seal(&mut child[512..512 + HEADER_BYTES], 36);
    child
}

fn open_chain(child: &[u8], parents: &[(&str, &[u8])]) -> Result<VhdDisk, OpenError> {
    let files = parents.iter().map(|(name, bytes)| {
        let storage: Arc<dyn Storage> = MemoryStorage::with_bytes(bytes);
        ((*name).to_owned(), storage)
    });
    let parents = MemoryParents::new(files.collect());
    let opening = Opening::new(Access::ReadOnly, ids()).with_parents(Arc::new(parents));
    VhdDisk::open(MemoryStorage::with_bytes(child), &opening)
}

/// Child, parent and grandparent; the parent is shorter than the child, the grandparent fixed.
fn chain() -> (Vec<u8>, Vec<u8>, Vec<u8>, Vec<u8>) {
    let grand = written(SIZE, Kind::Fixed, 1, &[(0, to_usize(SIZE), 1)]);
    let parent = written(
        3 * BLOCK,
        Kind::Dynamic,
        2,
        &[(BLOCK + 512, 1024, 2), (2 * BLOCK, 512, 2)],
    );
    // What the dynamic image did not write is zeros: the grandparent's in the differencing one.
    let parent = child_of(&grand, "grand.vhd", parent, 0);
    let child = written(
        SIZE,
        Kind::Dynamic,
        3,
        &[(1024, 512, 3), (4 * BLOCK, 512, 3)],
    );
    let child = child_of(&parent, "parent.vhd", child, 0);
    let mut model = vec![0; to_usize(SIZE)];
    model[..to_usize(3 * BLOCK)].fill(1);
    for (at, len, byte) in [
        (BLOCK + 512, 1024, 2),
        (2 * BLOCK, 512, 2),
        (1024, 512, 3),
        (4 * BLOCK, 512, 3),
    ] {
        model[to_usize(at)..to_usize(at) + len].fill(byte);
    }
    (child, parent, grand, model)
}

#[test]
fn sectors_come_from_the_first_image_that_has_them() {
    let (child, parent, grand, model) = chain();
    let files: [(&str, &[u8]); 2] = [("parent.vhd", &parent), ("grand.vhd", &grand)];
    let disk = open_chain(&child, &files).unwrap();
    assert_eq!(disk.kind(), Kind::Differencing);
    model::check(&disk, &model);
    let mut byte = [0];
    disk.read_at(1024 + 511, &mut byte).unwrap();
    assert_eq!(byte, [3]);
    disk.read_at(1024 + 512, &mut byte).unwrap();
    assert_eq!(byte, [1]);
}

#[test]
fn a_differencing_disk_is_not_written_to() {
    let (child, ..) = chain();
    let storage = MemoryStorage::with_bytes(&child);
    assert!(matches!(open(&storage), Err(OpenError::Differencing)));
    assert!(matches!(
        resize(storage.as_ref(), 9 * BLOCK),
        Err(ResizeError::Open(OpenError::Differencing))
    ));
    assert!(storage.bytes() == child);
    let shared: Arc<dyn Storage> = storage;
    let named = inspect(&shared).unwrap().dynamic.unwrap().parent.unwrap();
    assert_eq!(named.name, "parent.vhd");
    assert_eq!(check(&shared).findings, []);
}

#[test]
fn parents_that_are_not_the_right_ones_are_refused() {
    let (child, parent, grand, _) = chain();
    let missing = open_chain(&child, &[]).unwrap_err();
    assert!(matches!(
        missing,
        OpenError::Parents(ParentsError::NotFound { .. })
    ));
    let unconfigured = open_as(MemoryStorage::with_bytes(&child), Access::ReadOnly).unwrap_err();
    assert!(unconfigured.to_string().contains("--parents"));
    let other = written(SIZE, Kind::Dynamic, 9, &[]);
    let wrong = open_chain(&child, &[("parent.vhd", &other)]).unwrap_err();
    assert!(matches!(wrong, OpenError::WrongParent { .. }), "{wrong}");
    let grand_missing = open_chain(&child, &[("parent.vhd", &parent)]).unwrap_err();
    assert!(matches!(grand_missing, OpenError::Parent { .. }));
    let damaged = open_chain(&child, &[("parent.vhd", &grand[..4096])]).unwrap_err();
    assert!(matches!(damaged, OpenError::Parent { .. }));
    // A child that calls itself its parent.
    let own = child_of(&child, "own.vhd", written(SIZE, Kind::Dynamic, 3, &[]), 0);
    let looped = open_chain(&own, &[("own.vhd", &own)]).unwrap_err();
    let mut error: &dyn std::error::Error = &looped;
    while let Some(source) = error.source() {
        error = source;
    }
    assert!(error.to_string().contains("its own descendant"), "{error}");
}

/// `W2ru`, then `W2ku`, then the name; text in the order of bytes that Windows uses.
#[test]
fn locators_are_tried_before_the_name() {
    let (child, parent, grand, model) = chain();
    let with = |relative: &str, absolute: &str| {
        let mut bytes = child.clone();
        let tail = bytes.split_off(bytes.len() - FOOTER_BYTES);
        for (number, (platform, path)) in [(b"W2ku", absolute), (b"W2ru", relative)]
            .into_iter()
            .enumerate()
        {
            let text: Vec<u8> = path.encode_utf16().flat_map(u16::to_le_bytes).collect();
            let at = 512 + 576 + number * 24;
            let (len, place) = (u32::try_from(text.len()).unwrap(), bytes.len() as u64);
            bytes[at..at + 4].copy_from_slice(platform);
            bytes[at + 8..at + 12].copy_from_slice(&len.to_be_bytes());
            bytes[at + 16..at + 24].copy_from_slice(&place.to_be_bytes());
            bytes.extend(text);
            bytes.resize(bytes.len().next_multiple_of(512), 0);
        }
        seal(&mut bytes[512..512 + HEADER_BYTES], 36);
        bytes.extend(tail);
        bytes
    };
    let bytes = with(r".\near.vhd", r"C:\vm\far.vhd");
    for name in ["near.vhd", "far.vhd", "parent.vhd"] {
        let files: [(&str, &[u8]); 2] = [(name, &parent), ("grand.vhd", &grand)];
        model::check(&open_chain(&bytes, &files).unwrap(), &model);
    }
    let other = written(SIZE, Kind::Dynamic, 9, &[]);
    let files: [(&str, &[u8]); 2] = [("parent.vhd", &parent), ("near.vhd", &other)];
    let wrong = open_chain(&bytes, &files).unwrap_err();
    assert!(matches!(wrong, OpenError::WrongParent { name, .. } if name == "near.vhd"));
    let storage: Arc<dyn Storage> = MemoryStorage::with_bytes(&bytes);
    let named = inspect(&storage).unwrap().dynamic.unwrap().parent.unwrap();
    let paths: Vec<_> = named.locators.iter().map(|locator| &locator.path).collect();
    assert_eq!(paths, [r"C:\vm\far.vhd", r".\near.vhd"]);
}

#[test]
fn a_chain_has_an_end() {
    let mut image = written(BLOCK, Kind::Dynamic, 0, &[]);
    let mut files = vec![("0".to_owned(), image.clone())];
    for number in 1..300u64 {
        let next = written(BLOCK, Kind::Dynamic, number, &[]);
        image = child_of(&image, &(number - 1).to_string(), next, 0);
        files.push((number.to_string(), image.clone()));
    }
    let open_from = |number: usize| {
        let parents: Vec<(&str, &[u8])> = files
            .iter()
            .map(|(name, bytes)| (name.as_str(), bytes.as_slice()))
            .collect();
        open_chain(&files[number].1, &parents)
    };
    assert_eq!(read_all(&open_from(255).unwrap()), vec![0; to_usize(BLOCK)]);
    let mut error: &dyn std::error::Error = &open_from(256).unwrap_err();
    while let Some(source) = error.source() {
        error = source;
    }
    assert!(error.to_string().contains("more than 256"), "{error}");
}
