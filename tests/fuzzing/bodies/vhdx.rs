//! VHDX images: any bytes, and good images of which fields were changed and the checksums made right again.

use std::sync::{Arc, OnceLock};

use understudy::{
    base::{
        checksum::crc32c_of,
        ids::SeededIds,
        units::{KIB, MIB},
    },
    disk::{
        Access, Disk, Fua, Opening,
        image::Format,
        vhdx::{self, CreateOptions, Kind, ParentPaths, VhdxDisk},
    },
    storage::{
        Storage,
        memory::{MemoryStorage, Power},
    },
};

use super::{
    exercise::exercise,
    plan::Plan,
    sparse::{FILE_BYTES_MAX, Sparse},
};

/// Both headers, with the bytes that their checksums cover.
pub(crate) const HEADERS: [(u64, usize); 2] = [(64 * KIB, 4096), (128 * KIB, 4096)];
/// Both region tables, likewise.
pub(crate) const REGION_TABLES: [(u64, usize); 2] = [(192 * KIB, 64 << 10), (256 * KIB, 64 << 10)];
/// Where the writer puts log, metadata and table, in bytes.
pub(crate) const LOG: u64 = MIB;
pub(crate) const METADATA: u64 = 2 * MIB;
pub(crate) const BAT: u64 = 3 * MIB;
const METADATA_ITEMS: u64 = METADATA + 64 * KIB;

/// Structures and the bytes of them that mean something.
const PLACES: [(u64, u64); 9] = [
    (0, 16),
    (HEADERS[0].0, 80),
    (HEADERS[1].0, 80),
    (REGION_TABLES[0].0, 112),
    (REGION_TABLES[1].0, 112),
    (METADATA, 256),
    (METADATA_ITEMS, 512),
    (BAT, 128),
    (BAT + 32 * KIB, 64),
];
/// Changes to one image.
const EDITS_MAX: usize = 24;

/// Any bytes as a file.
pub(crate) fn open(input: &[u8]) {
    let mut plan = Plan::new(input);
    let len = plan.u8();
    let mut changes = Plan::new(plan.take(usize::from(len)));
    let file = Sparse::decode(&mut plan);
    exercise(&file, Format::Vhdx, Some(&bases()[0]), &mut changes);
}

/// The good images as inputs, with a few writes.
pub(crate) fn open_seeds() -> Vec<Vec<u8>> {
    let writes = [8, 0x20, 0, 0, 0x40, 1, 0, 0x63, 0, 0];
    let images = bases().iter();
    images
        .map(|file| [&[10], &writes[..], &file.encode()].concat())
        .collect()
}

/// A good image of which some fields say something else.
pub(crate) fn structured(input: &[u8]) {
    let mut plan = Plan::new(input);
    let number = usize::from(plan.u8()) % bases().len();
    let mut file = bases()[number].clone();
    let unsealed = plan.u8() % 16;
    for _ in 0..plan.u8() % (u8::try_from(EDITS_MAX).expect("few") + 1) {
        edit(&mut file, &mut plan);
    }
    if unsealed != 1 {
        seal(&mut file);
    }
    exercise(&file, Format::Vhdx, Some(&bases()[0]), &mut plan);
}

/// Each good image unchanged, and with one field changed.
pub(crate) fn structured_seeds() -> Vec<Vec<u8>> {
    let mut seeds = Vec::new();
    for (image, _) in (0..).zip(bases()) {
        seeds.push(vec![image, 0, 0, 8, 0x20, 0, 0, 0x40, 1, 0, 0x63]);
        for (place, _) in (0..).zip(PLACES) {
            seeds.push(vec![image, 0, 1, place, 4, 0, 2, 0, 1, 8, 0x20, 0]);
        }
    }
    seeds
}

/// Changes one field, or the length of the file.
fn edit(file: &mut Sparse, plan: &mut Plan<'_>) {
    let place = usize::from(plan.u8());
    let Some((start, len)) = PLACES.get(place % (PLACES.len() + 1)) else {
        file.len = plan.number() % (FILE_BYTES_MAX + 1);
        return;
    };
    let offset = start + plan.below(len / 2) * 2;
    let width = plan.choose(&[1, 2, 4, 8, 16]);
    let value = plan.number().to_le_bytes();
    if width == 16 {
        // An identity, or an entry from elsewhere.
        let (from, len) = PLACES[usize::from(value[0]) % PLACES.len()];
        let moved = file.read(from + u64::from(value[1]) % len, 32);
        file.write(offset, &moved);
    } else {
        file.write(offset, &value[..width]);
    }
}

/// Makes the checksums of headers and region tables right.
pub(crate) fn seal(file: &mut Sparse) {
    for (offset, len) in HEADERS.into_iter().chain(REGION_TABLES) {
        let bytes = file.read(offset, len);
        file.write(offset + 4, &checksum(&bytes).to_le_bytes());
    }
}

/// CRC-32C with the field itself, bytes 4 to 7, as zeros (MS-VHDX 2.2.2).
pub(crate) fn checksum(bytes: &[u8]) -> u32 {
    crc32c_of(&[&bytes[..4], &[0; 4], &bytes[8..]])
}

/// Good images: dynamic, fixed, with 4 KiB sectors, one that was not closed, and a child of the first.
pub(crate) fn bases() -> &'static [Sparse] {
    static BASES: OnceLock<Vec<Sparse>> = OnceLock::new();
    BASES.get_or_init(|| {
        let dynamic = made(Kind::Dynamic, 512, 40 * MIB + 512, true);
        vec![
            Sparse::of(&dynamic),
            Sparse::of(&made(Kind::Fixed, 512, 3 * MIB, true)),
            Sparse::of(&made(Kind::Dynamic, 4096, 8 * MIB, true)),
            Sparse::of(&made(Kind::Dynamic, 512, 40 * MIB, false)),
            child(&dynamic),
        ]
    })
}

fn made(kind: Kind, logical_sector: u32, size: u64, closed: bool) -> Arc<MemoryStorage> {
    let storage = MemoryStorage::new(&Power::new());
    let options = CreateOptions {
        size,
        block_size: 1 << 20,
        kind,
        logical_sector,
        physical_sector: 4096,
    };
    let ids = SeededIds::new(1);
    vhdx::create(storage.as_ref(), &options, &ids).expect("a good image");
    let opening = Opening::new(Access::ReadWrite, Arc::new(SeededIds::new(2)));
    let disk = VhdxDisk::open(storage.clone(), &opening).expect("a good image");
    for (number, offset) in (1..).zip([0, 2 * MIB + 512, size - 512]) {
        disk.write_at(offset, &[number; 512], Fua::No)
            .expect("memory takes everything");
    }
    disk.flush().expect("memory takes everything");
    if closed {
        disk.close().expect("memory takes everything");
    }
    storage
}

/// A child with a block of zeros, one that is partly its own, and the others in the parent.
fn child(parent: &Arc<MemoryStorage>) -> Sparse {
    let storage = MemoryStorage::new(&Power::new());
    let paths = ParentPaths {
        relative: Some(".\\parent.vhdx".into()),
        ..ParentPaths::default()
    };
    let parent: Arc<dyn Storage> = parent.clone();
    vhdx::create_child(
        storage.as_ref(),
        &parent,
        &paths,
        1 << 20,
        &SeededIds::new(3),
    )
    .expect("a good image");
    let mut file = Sparse::of(&storage);
    let (block, bitmap) = (file.len, file.len + MIB);
    file.write(block, &[0xB1; 1024]);
    // The bits of block 2; its chunk has 4096 blocks, and the entry of the bitmap stands behind theirs.
    file.write(bitmap + 2 * 256, &[0x0F]);
    file.len = bitmap + MIB;
    file.write(BAT + 8, &2u64.to_le_bytes());
    file.write(BAT + 16, &(block | 7).to_le_bytes());
    file.write(BAT + 4096 * 8, &(bitmap | 6).to_le_bytes());
    file
}
