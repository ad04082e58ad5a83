//! Differencing disks: a chain against an array of bytes, through power cuts, from many threads and with hostile bytes.

use std::thread;

use proptest::prelude::*;

use super::{
    crash::{self, SECTOR},
    *,
};
use crate::{
    base::units::{Extent, MIB, to_usize},
    disk::{
        Content, DiskError, Fua, Space,
        histories::Model,
        parents::{self, ParentsError},
    },
    storage::memory::Power,
};

/// Where things are in a new child of up to 4 GiB in blocks of 1 MiB.
pub(super) const LOCATOR_AT: u64 = 2 * MIB + 0x1_0028;
const SIZE_AT: u64 = 2 * MIB + 0x1_0008;
const BAT_AT: u64 = 3 * MIB;

pub(super) fn base(power: &Arc<Power>, options: &CreateOptions) -> Subject {
    Subject::new(new_image(power, options))
}

/// A child of `parent`, which is called `name` from now on.
pub(super) fn child_of(
    parent: &Subject,
    name: &str,
    block_size: u32,
    power: &Arc<Power>,
) -> Subject {
    let storage = MemoryStorage::new(power);
    let paths = ParentPaths {
        relative: Some(format!(r".\{name}")),
        ..ParentPaths::default()
    };
    let file: Arc<dyn Storage> = Arc::clone(&parent.storage) as _;
    create_child(storage.as_ref(), &file, &paths, block_size, ids().as_ref()).unwrap();
    Subject {
        storage,
        parents: Arc::new(Below {
            name: name.to_owned(),
            file,
            rest: Arc::clone(&parent.parents),
        }),
    }
}

/// One parent, and where that one finds its own.
#[derive(Debug)]
struct Below {
    name: String,
    file: Arc<dyn Storage>,
    rest: Arc<dyn Parents>,
}

impl Parents for Below {
    fn find(&self, paths: &[String]) -> Result<parents::Parent, ParentsError> {
        if paths != [format!(r".\{}", self.name)] {
            return Err(ParentsError::NotFound {
                paths: paths.to_vec(),
                root: "memory".into(),
            });
        }
        Ok(parents::Parent {
            storage: Arc::clone(&self.file),
            name: self.name.clone(),
            parents: Arc::clone(&self.rest),
        })
    }
}

pub(super) fn write_u64(image: &Subject, at: u64, value: u64) {
    let bytes = value.to_le_bytes();
    image.storage.write_at(at, &bytes, Fua::No).unwrap();
}

/// Makes `block` of a new child partially present, as other programs do: the sectors that `own` names hold `tag_of`, in
/// the place of every other one lies rubbish. `space` is the first free MiB of the file, the bitmap's is the 4th.
fn make_partial(
    image: &Subject,
    block: u64,
    space: u64,
    own: impl Fn(u64) -> bool,
    tag_of: impl Fn(u64) -> u64,
) {
    let storage = image.storage.as_ref();
    let len = storage.len().unwrap().max((space + 1) * MIB);
    storage.set_len(len).unwrap();
    write_u64(image, BAT_AT + 4096 * 8, (4 * MIB) | 6);
    write_u64(image, BAT_AT + block * 8, (space * MIB) | 7);
    let mut bits = vec![0u8; 256];
    for sector in 0..2048 {
        let tag = if own(sector) {
            bits[to_usize(sector / 8)] |= 1 << (sector % 8);
            tag_of(sector)
        } else {
            0xBAD0_BAD0_BAD0_BAD0
        };
        let bytes = tag.to_le_bytes().repeat(64);
        let at = space * MIB + sector * SECTOR;
        storage.write_at(at, &bytes, Fua::No).unwrap();
    }
    let bits_at = 4 * MIB + block * 256;
    storage.write_at(bits_at, &bits, Fua::No).unwrap();
    storage.sync().unwrap();
}

/// A child with a block of its own, two partial ones and three in the parent, of which one is zeros, in which each
/// sector has its own tag.
fn child_with_everything(power: &Arc<Power>) -> (Subject, Model) {
    let steady = Power::new();
    let parent = base(&steady, &options(crash::SIZE, Kind::Dynamic));
    let parent_tag = |sector: u64| {
        if sector / 2048 == 1 {
            0
        } else {
            (1 << 60) | sector
        }
    };
    let disk = parent.open().unwrap();
    for sector in (0..crash::SIZE / SECTOR).filter(|&sector| parent_tag(sector) != 0) {
        let bytes = parent_tag(sector).to_le_bytes().repeat(64);
        disk.write_at(sector * SECTOR, &bytes, Fua::No).unwrap();
    }
    disk.close().unwrap();
    let child = child_of(&parent, "parent.vhdx", 1 << 20, power);
    let own = |sector: u64| sector.is_multiple_of(3);
    let child_tag = |sector: u64| (2 << 60) | sector;
    make_partial(&child, 2, 5, own, |sector| child_tag(2 * 2048 + sector));
    make_partial(&child, 3, 6, own, |sector| child_tag(3 * 2048 + sector));
    let model = Model::of(crash::SIZE, |sector| match sector / 2048 {
        2 | 3 if own(sector % 2048) => child_tag(sector),
        _ => parent_tag(sector),
    });
    (child, model)
}

#[test]
fn a_power_cut_at_any_step_leaves_each_sector_old_or_new() {
    for seed in 11..=12 {
        crash::cut_everywhere(&child_with_everything, seed, 24, 0..4, 1);
    }
}

#[test]
fn a_child_whose_process_is_killed_loses_nothing() {
    crash::kill_after_histories(&child_with_everything, 12);
}

#[test]
fn a_call_that_fails_once_does_no_harm_to_a_child() {
    crash::fail_everywhere(&child_with_everything, 24);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn a_chain_of_three_is_an_array_of_bytes(
        first in prop::collection::vec(model::op(), 1..16),
        second in prop::collection::vec(model::op(), 1..16),
        third in prop::collection::vec(model::op(), 1..24),
        partial in prop::option::of(0..7u64),
    ) {
        let power = Power::new();
        let mut model = vec![0; to_usize(model::SIZE)];
        let bottom = base(&power, &options(model::SIZE, Kind::Dynamic));
        model::change(&bottom, &mut model, &first);
        let middle = child_of(&bottom, "bottom", 2 << 20, &power);
        model::change(&middle, &mut model, &second);
        let below = [&bottom, &middle].map(|image| image.storage.bytes());
        let top = child_of(&middle, "middle", 1 << 20, &power);
        if let Some(block) = partial {
            make_partial(&top, block, 5, |sector| sector % 5 < 2, |_| 0x1111_1111_1111_1111);
            let start = to_usize(block * MIB);
            for (sector, bytes) in model[start..].chunks_mut(512).take(2048).enumerate() {
                if sector % 5 < 2 {
                    bytes.fill(0x11);
                }
            }
        }
        model::check(&top.open_as(Access::ReadOnly).unwrap(), &model);
        model::change(&top, &mut model, &third);
        for (image, before) in [&bottom, &middle].into_iter().zip(below) {
            assert!(image.storage.bytes() == before, "nobody writes to a parent");
        }
    }
}

/// Fills a disk with one byte.
pub(super) fn fill(image: &Subject, byte: u8) {
    let disk = image.open().unwrap();
    let size = disk.geometry().size;
    disk.write_at(0, &vec![byte; to_usize(size)], Fua::No)
        .unwrap();
    disk.close().unwrap();
}

/// Readers took a child's zeros from its parent, in more than one product.
#[test]
fn only_what_is_not_present_is_read_from_the_parent() {
    for logical_sector in [512, 4096] {
        let power = Power::new();
        let parent = base(
            &power,
            &CreateOptions {
                logical_sector,
                ..options(8 << 20, Kind::Dynamic)
            },
        );
        fill(&parent, 7);
        let child = child_of(&parent, "p", 1 << 20, &power);
        child.storage.set_len(8 * MIB).unwrap();
        for (block, entry) in [0, 1, 2, 3, (5 * MIB) | 1, (6 * MIB) | 3]
            .into_iter()
            .enumerate()
        {
            write_u64(&child, BAT_AT + block as u64 * 8, entry);
        }
        let disk = child.open_as(Access::ReadOnly).unwrap();
        for (block, bytes) in read_all(&disk).chunks(1 << 20).enumerate() {
            let expected = if [1, 2, 3, 4, 5].contains(&block) {
                0
            } else {
                7
            };
            assert!(bytes.iter().all(|&byte| byte == expected), "block {block}");
        }
        let run = |at: u64| disk.run_at(at).unwrap();
        assert_eq!(run(0), (Extent::new(0, MIB), Content::Data));
        assert_eq!(run(MIB), (Extent::new(MIB, 5 * MIB), Content::Zero));
        assert_eq!(run(6 * MIB), (Extent::new(6 * MIB, 2 * MIB), Content::Data));
    }
}

#[test]
fn what_a_child_discards_stays_hidden() {
    let power = Power::new();
    let parent = base(&power, &options(4 << 20, Kind::Dynamic));
    fill(&parent, 7);
    let child = child_of(&parent, "p", 1 << 20, &power);
    let disk = child.open().unwrap();
    for space in [Space::Release, Space::Keep] {
        let at = if space == Space::Keep { 2 * MIB } else { 0 };
        disk.zero(Extent::new(at + 512, 2 * MIB - 512), space, Fua::No)
            .unwrap();
    }
    disk.close().unwrap();
    let inspection = inspect(&(Arc::clone(&child.storage) as _));
    let blocks = inspection.blocks.unwrap();
    assert_eq!(blocks.zero, 2, "whole blocks take no space");
    assert_eq!(blocks.not_present, 0);
    let bytes = read_all(&child.open().unwrap());
    for (number, sector) in bytes.chunks(512).enumerate() {
        let expected = if number % 4096 == 0 { 7 } else { 0 };
        assert!(sector.iter().all(|&b| b == expected), "sector {number}");
    }
}

#[test]
fn a_parent_may_be_smaller_or_larger() {
    for (size, name) in [(6 * MIB, "larger child"), (3 * MIB, "smaller child")] {
        let power = Power::new();
        let parent = base(&power, &options((4 << 20) + 512, Kind::Dynamic));
        fill(&parent, 7);
        let child = child_of(&parent, "p", 1 << 20, &power);
        write_u64(&child, SIZE_AT, size);
        let mut expected = vec![7; to_usize(4 * MIB + 512)];
        expected.resize(to_usize(size), 0);
        model_check(&child, &expected);
        let disk = child.open().unwrap();
        assert!(read_all(&disk) == expected, "{name}");
        // Over the parent's end, and behind it.
        for at in [4 * MIB, 5 * MIB, size - 4096] {
            if at + 4096 <= size {
                disk.write_at(at + 1024, &[9; 512], Fua::No).unwrap();
                expected[to_usize(at) + 1024..][..512].fill(9);
            }
        }
        disk.close().unwrap();
        model_check(&child, &expected);
    }
}

fn model_check(image: &Subject, expected: &[u8]) {
    let disk = image.open_as(Access::ReadOnly).unwrap();
    assert!(read_all(&disk) == expected);
    let size = disk.geometry().size;
    let mut at = 0;
    while at < size {
        let (run, content) = disk.run_at(at).unwrap();
        let bytes = &expected[to_usize(at)..to_usize(run.end())];
        assert!(content == Content::Data || bytes.iter().all(|&byte| byte == 0));
        at = run.end();
    }
}

#[test]
fn the_log_of_a_parent_is_replayed_in_memory() {
    let power = Power::new();
    let parent = base(&power, &options(4 << 20, Kind::Dynamic));
    let disk = parent.open().unwrap();
    disk.write_at(MIB, &[7; 512], Fua::No).unwrap();
    drop(disk);
    let child = child_of(&parent, "p", 1 << 20, &power);
    let before = parent.storage.bytes();
    let disk = child.open().unwrap();
    let mut held = [0; 1024];
    disk.read_at(MIB, &mut held).unwrap();
    assert_eq!((held[511], held[512]), (7, 0));
    disk.write_at(MIB + 512, &[8; 512], Fua::No).unwrap();
    disk.close().unwrap();
    assert!(
        parent.storage.bytes() == before,
        "nobody writes to a parent"
    );
    // Who opens the parent for writing replays its log, and that does not orphan the child.
    drop(parent.open().unwrap());
    child.open().unwrap();
}

#[test]
fn a_new_child_shows_the_disk_of_its_parent() {
    let power = Power::new();
    let parent = base(&power, &options((5 << 30) + 512, Kind::Dynamic));
    let child = child_of(&parent, "p", CHILD_BLOCK_BYTES_DEFAULT, &power);
    let disk = child.open_as(Access::ReadOnly).unwrap();
    assert_eq!(disk.kind(), Kind::Differencing);
    let theirs = parent.open_as(Access::ReadOnly).unwrap();
    assert_eq!(disk.geometry(), theirs.geometry());
    assert_eq!(disk.disk_id(), theirs.disk_id());
    assert_eq!(disk.block_size(), 2 << 20);
    let file: Arc<dyn Storage> = Arc::clone(&child.storage) as _;
    let inspection = inspect(&file);
    assert!(inspection.report.is_sound(), "{:?}", inspection.report);
    let locator = inspection.parent.unwrap();
    assert_eq!(locator.id, format::VHDX_LOCATOR);
    let keys: Vec<&str> = locator
        .entries
        .iter()
        .map(|(key, _)| key.as_str())
        .collect();
    assert_eq!(keys, ["parent_linkage", "parent_linkage2", "relative_path"]);
    let chain = ancestors(&file, &child.parents).unwrap();
    assert_eq!(chain.len(), 1);
    assert_eq!(chain[0].name, "p");
    let linkage = chain[0].data_write.braced().to_string();
    assert_eq!(locator.entries[0].1, linkage);
    let none = create_child(
        MemoryStorage::new(&power).as_ref(),
        &file,
        &ParentPaths::default(),
        1 << 20,
        ids().as_ref(),
    );
    assert!(matches!(none, Err(CreateError::Options(_))), "{none:?}");
    let unnamed = create(
        MemoryStorage::new(&power).as_ref(),
        &options(1 << 20, Kind::Differencing),
        ids().as_ref(),
    );
    assert!(matches!(unnamed, Err(CreateError::Options(_))));
}

#[test]
fn a_partial_block_needs_its_bitmap() {
    let power = Power::new();
    let parent = base(&power, &options(4 << 20, Kind::Dynamic));
    let child = child_of(&parent, "p", 1 << 20, &power);
    make_partial(&child, 1, 5, |_| true, |_| 3);
    child.open_as(Access::ReadOnly).unwrap();
    for (name, entry) in [
        ("no bitmap", 0),
        ("zero", 2),
        ("reserved", 4),
        ("over the block", (5 * MIB) | 6),
        ("past the end", (6 * MIB) | 6),
    ] {
        write_u64(&child, BAT_AT + 4096 * 8, entry);
        let error = child.open_as(Access::ReadOnly).unwrap_err();
        assert!(
            matches!(error, OpenError::Corrupt { part: "BAT", .. }),
            "{name}: {error}"
        );
    }
    // Microsoft's own parser takes 7 for 6 in a bitmap's entry.
    write_u64(&child, BAT_AT + 4096 * 8, (4 * MIB) | 7);
    child.open_as(Access::ReadOnly).unwrap();
    // What stands behind the last block is nobody's.
    write_u64(&child, BAT_AT + 4 * 8, (5 * MIB) | 6);
    child.open_as(Access::ReadOnly).unwrap();
}

#[test]
fn writes_of_many_threads_into_blocks_of_the_parent_all_survive() {
    const THREADS: u64 = 8;
    const BLOCKS: u64 = 16;
    let power = Power::new();
    let parent = base(&power, &options(BLOCKS << 20, Kind::Dynamic));
    fill(&parent, 77);
    let child = child_of(&parent, "p", 1 << 20, &power);
    make_partial(
        &child,
        3,
        5,
        |sector| sector >= 1024,
        |_| 0x4D4D_4D4D_4D4D_4D4D,
    );
    let disk = child.open().unwrap();
    thread::scope(|scope| {
        for owner in 0..THREADS {
            let disk = &disk;
            scope.spawn(move || {
                for block in 0..BLOCKS {
                    let at = (block << 20) + owner * 4096;
                    let byte = u8::try_from(owner + 1).unwrap();
                    disk.write_at(at, &[byte; 4096], Fua::No).unwrap();
                    let mut held = [0; 4096];
                    disk.read_at(at, &mut held).unwrap();
                    assert_eq!(held, [byte; 4096]);
                }
            });
        }
    });
    drop(disk);
    let disk = child.open().unwrap();
    for (page, bytes) in read_all(&disk).chunks(4096).enumerate() {
        let owner = page % 256;
        let expected = if owner < 8 {
            u8::try_from(owner + 1).unwrap()
        } else {
            77
        };
        assert!(bytes.iter().all(|&byte| byte == expected), "page {page}");
    }
}

#[test]
fn a_parent_that_fails_is_named() {
    let power = Power::new();
    let parents = Power::new();
    let parent = base(&parents, &options(4 << 20, Kind::Dynamic));
    fill(&parent, 7);
    let child = child_of(&parent, "p.vhdx", 1 << 20, &power);
    let disk = child.open().unwrap();
    parents.cut_after(0);
    let failed = |error: DiskError| match error {
        DiskError::Io { source, .. } => source.to_string(),
        other => panic!("{other}"),
    };
    let error = failed(disk.read_at(0, &mut [0; 512]).unwrap_err());
    assert!(error.contains("p.vhdx"), "{error}");
    failed(disk.write_at(0, &[1; 512], Fua::No).unwrap_err());
    parents.restore(&mut || true);
    disk.write_at(0, &[1; 512], Fua::No).unwrap();
    let mut held = [0; 1024];
    disk.read_at(0, &mut held).unwrap();
    assert_eq!((held[511], held[512]), (1, 7), "nothing was lost meanwhile");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 128, ..ProptestConfig::default() })]

    #[test]
    fn changed_children_do_no_harm(
        changes in prop::collection::vec(
            (prop_oneof![
                hostile::place(),
                to_usize(LOCATOR_AT)..to_usize(LOCATOR_AT) + 300,
                to_usize(BAT_AT) + 4096 * 8..to_usize(BAT_AT) + 4097 * 8,
                to_usize(4 * MIB)..to_usize(4 * MIB) + 1024,
            ], any::<u8>()),
            1..5,
        ),
    ) {
        let (child, _) = child_with_everything(&Power::new());
        let mut bytes = child.storage.bytes();
        for (at, byte) in changes {
            bytes[at] = byte;
        }
        hostile::reseal(&mut bytes);
        hostile::use_it(&bytes, &child.parents);
    }
}
