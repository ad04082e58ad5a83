//! VHD images: any bytes, and good images of which fields were changed and the checksums made right again.

use std::sync::{Arc, OnceLock};

use understudy::{
    base::{
        ids::SeededIds,
        units::{KIB, MIB},
    },
    disk::{
        Access, Disk, Fua, Opening,
        image::Format,
        vhd::{self, CreateOptions, Kind, VhdDisk},
    },
    storage::memory::{MemoryStorage, Power},
};

use super::{
    exercise::exercise,
    plan::Plan,
    sparse::{FILE_BYTES_MAX, Sparse},
};

const FOOTER: usize = 512;
/// Where the writer puts the dynamic header and the table, in bytes.
const HEADER: u64 = 512;
const BAT: u64 = 1536;
/// Where the checksums stand in footer and header, and how many bytes each covers.
const FOOTER_SEAL: (usize, usize) = (64, FOOTER);
const HEADER_SEAL: (usize, usize) = (36, 1024);

/// A VHD: any bytes for odd first bytes, a good image with changed fields for even ones.
pub(crate) fn open(input: &[u8]) {
    let mut plan = Plan::new(input);
    if plan.u8() % 2 == 1 {
        let len = plan.u8();
        let mut changes = Plan::new(plan.take(usize::from(len)));
        let file = Sparse::decode(&mut plan);
        return exercise(&file, Format::Vhd, None, &mut changes);
    }
    let number = usize::from(plan.u8()) % bases().len();
    let base = &bases()[number];
    let mut file = base.clone();
    let flags = plan.u8();
    for _ in 0..plan.u8() % 24 {
        edit(&mut file, base.len, &mut plan);
    }
    if flags % 16 != 1 {
        reseal(&mut file, HEADER, HEADER_SEAL);
        reseal(&mut file, base.len - 512, FOOTER_SEAL);
        reseal(&mut file, 0, FOOTER_SEAL);
        if flags & 0x20 != 0 {
            // Both copies say what the first one says.
            let head = file.read(0, FOOTER);
            file.write(base.len - 512, &head);
        }
    }
    exercise(&file, Format::Vhd, Some(&bases()[0]), &mut plan);
}

/// The good images as they are, as raw bytes, and with one field changed.
pub(crate) fn seeds() -> Vec<Vec<u8>> {
    let writes = [10, 8, 0x20, 0, 0, 0x40, 1, 0, 0x63, 0, 0];
    let mut seeds = Vec::new();
    for (image, file) in (0..).zip(bases()) {
        seeds.push([&[1], &writes[..], &file.encode()].concat());
        seeds.push(vec![0, image, 0, 0, 8, 0x20, 0, 0, 0x40, 1, 0, 0x63]);
        for place in 0..6 {
            seeds.push(vec![0, image, 0x20, 1, place, 4, 0, 2, 0, 1, 8, 0x20, 0]);
        }
    }
    seeds
}

/// Changes one field, or the length of the file. `end` is where the file ended.
fn edit(file: &mut Sparse, end: u64, plan: &mut Plan<'_>) {
    let (start, len) = match plan.u8() % 6 {
        0 => (0, 86),
        1 => (end - 512, 86),
        2 => (HEADER, 60),
        3 => (HEADER + 576, 192),
        4 => (BAT, 64),
        _ => {
            file.len = plan.number() % (FILE_BYTES_MAX + 1);
            return;
        }
    };
    let offset = start + plan.below(len / 2) * 2;
    let width = plan.choose(&[1, 2, 4, 8]);
    let value = plan.number();
    let bytes = if width < 8 {
        value << (64 - 8 * width)
    } else {
        value
    };
    file.write(offset, &bytes.to_be_bytes()[..width]);
}

/// Makes a checksum right: the ones' complement of the sum of all other bytes (specification, "Checksum").
fn reseal(file: &mut Sparse, offset: u64, (at, len): (usize, usize)) {
    let bytes = file.read(offset, len);
    let others = bytes[..at].iter().chain(&bytes[at + 4..]);
    let sum: u32 = others.map(|&byte| u32::from(byte)).sum();
    file.write(
        offset + u64::try_from(at).expect("a field"),
        &(!sum).to_be_bytes(),
    );
}

/// Good images: dynamic, dynamic with the smallest blocks, fixed, and one that names a parent.
fn bases() -> &'static [Sparse] {
    static BASES: OnceLock<Vec<Sparse>> = OnceLock::new();
    BASES.get_or_init(|| {
        let dynamic = made(Kind::Dynamic, 2 << 20, 40 * MIB + 512);
        let mut child = dynamic.clone();
        for footer in [0, child.len - 512] {
            child.write(footer + 60, &4u32.to_be_bytes());
            reseal(&mut child, footer, FOOTER_SEAL);
        }
        let parent = dynamic.read(68, 16);
        child.write(HEADER + 40, &parent);
        child.write(HEADER + 64, b"\0p\0a\0r\0e\0n\0t");
        reseal(&mut child, HEADER, HEADER_SEAL);
        vec![
            dynamic,
            made(Kind::Dynamic, 512 << 10, 3 * MIB),
            made(Kind::Fixed, 2 << 20, 64 * KIB),
            child,
        ]
    })
}

fn made(kind: Kind, block_size: u32, size: u64) -> Sparse {
    let storage = MemoryStorage::new(&Power::new());
    let options = CreateOptions {
        size,
        block_size,
        kind,
    };
    vhd::create(storage.as_ref(), &options, &SeededIds::new(1)).expect("a good image");
    let opening = Opening::new(Access::ReadWrite, Arc::new(SeededIds::new(2)));
    let disk = VhdDisk::open(storage.clone(), &opening).expect("a good image");
    for (number, offset) in (1..).zip([0, size / 2, size - 512]) {
        let offset = offset - offset % 512;
        disk.write_at(offset, &[number; 512], Fua::No)
            .expect("memory takes everything");
    }
    disk.close().expect("memory takes everything");
    Sparse::of(&storage)
}
