//! Other sizes for closed images: what they hold afterwards, what is refused, and a power cut at every step.

use super::*;
use crate::disk::Fua;

/// A sector of data at each of `sectors`.
fn filled(power: &Arc<Power>, options: &CreateOptions, sectors: &[u64]) -> Arc<MemoryStorage> {
    let storage = image(power, options);
    let disk = open(&storage).unwrap();
    for &sector in sectors {
        disk.write_at(sector * 512, &[7; 512], Fua::No).unwrap();
    }
    disk.close().unwrap();
    storage
}

/// What the disk holds.
fn model(sectors: &[u64]) -> BTreeMap<u64, u8> {
    sectors.iter().map(|&sector| (sector, 7)).collect()
}

fn cut_everywhere(options: &CreateOptions, sectors: &[u64], size: u64) {
    let sound = |storage: &Arc<MemoryStorage>, story: &str| {
        let shared: Arc<dyn Storage> = Arc::clone(storage) as _;
        assert_eq!(check(&shared).errors, 0, "{story}");
    };
    for (step, seed) in (0..).flat_map(|step| (0..16).map(move |seed| (step, seed))) {
        let power = Power::new();
        let storage = filled(&power, options, sectors);
        power.cut_after(step);
        let done = resize(storage.as_ref(), size).is_ok();
        power.restore(&mut kept(seed + step * 16));
        let story = format!("{options:?} to {size}, cut after {step}, kept {seed}");
        let reader = open_as(Arc::clone(&storage), Access::ReadOnly)
            .unwrap_or_else(|error| panic!("{story}: {error}"));
        let now = reader.geometry().size;
        assert!(now == size || (now == options.size && !done), "{story}");
        assert_holds(&reader, &model(sectors), &story);
        sound(&storage, &story);
        // And it can be had again, and written to.
        resize(storage.as_ref(), size).unwrap_or_else(|error| panic!("{story}: {error}"));
        let disk = open(&storage).unwrap();
        assert_eq!(disk.geometry().size, size);
        assert_holds(&disk, &model(sectors), &story);
        disk.write_at(size - 512, &[9; 512], Fua::No).unwrap();
        disk.close().unwrap();
        sound(&storage, &story);
        let mut expected = model(sectors);
        expected.insert(size / 512 - 1, 9);
        assert_holds(&open(&storage).unwrap(), &expected, &story);
        if done {
            break;
        }
    }
}

#[test]
fn a_disk_has_its_old_or_its_new_size_after_a_power_cut() {
    let dynamic = options(5 * BLOCK + 1024, Kind::Dynamic);
    let fixed = options(5 * BLOCK + 1024, Kind::Fixed);
    let near = [0, 3 * BLOCK / 512, 5 * BLOCK / 512 + 1];
    // Within the last block; within the table; and so far that the table must move.
    for size in [5 * BLOCK + 4096, 40 * BLOCK, 300 * BLOCK] {
        cut_everywhere(&dynamic, &near, size);
    }
    for size in [5 * BLOCK + 1536, 5 * BLOCK + 8192, 9 * BLOCK] {
        cut_everywhere(&fixed, &near, size);
    }
    let low = [0, 2 * BLOCK / 512];
    for size in [3 * BLOCK, 5 * BLOCK] {
        cut_everywhere(&dynamic, &low, size);
        cut_everywhere(&fixed, &low, size);
    }
    cut_everywhere(&fixed, &low, 2 * BLOCK + 512);
}

#[test]
fn data_is_not_cut_off() {
    for (kind, smallest) in [(Kind::Dynamic, 3 * BLOCK), (Kind::Fixed, 2 * BLOCK + 512)] {
        let storage = filled(
            &Power::new(),
            &options(9 * BLOCK, kind),
            &[0, 2 * BLOCK / 512],
        );
        let before = storage.bytes();
        let refused = resize(storage.as_ref(), 2 * BLOCK).unwrap_err();
        let ResizeError::InUse { smallest: told } = refused else {
            panic!("{refused}");
        };
        assert_eq!(told, smallest);
        assert!(storage.bytes() == before, "a refusal changes nothing");
        resize(storage.as_ref(), smallest).unwrap();
        assert_eq!(open(&storage).unwrap().geometry().size, smallest);
    }
}

#[test]
fn what_was_cut_off_reads_as_zeros_when_it_comes_back() {
    let storage = filled(&Power::new(), &options(5 * BLOCK, Kind::Dynamic), &[]);
    let disk = open(&storage).unwrap();
    disk.write_at(4 * BLOCK, &vec![7; 512 * 1024], Fua::No)
        .unwrap();
    // The rest of the last block, which nobody sees now.
    let place = disk.blocks.as_ref().unwrap().bat.place(4).unwrap();
    disk.close().unwrap();
    let footer = {
        let storage = image(&Power::new(), &options(4 * BLOCK + 512, Kind::Dynamic));
        storage.bytes()[..512].to_vec()
    };
    storage.write_at(0, &footer, Fua::No).unwrap();
    let tail = storage.len().unwrap() - 512;
    storage.write_at(tail, &footer, Fua::No).unwrap();
    let mut hidden = [0; 512];
    storage.read_at(place + 128 * 1024, &mut hidden).unwrap();
    assert_eq!(hidden, [7; 512]);
    resize(storage.as_ref(), 5 * BLOCK).unwrap();
    let bytes = read_all(&open(&storage).unwrap());
    let at = usize::try_from(4 * BLOCK).unwrap();
    assert_eq!(bytes[at..at + 512], [7; 512]);
    assert!(bytes[at + 512..].iter().all(|&byte| byte == 0));
}

#[test]
fn sizes_that_a_vhd_cannot_have_are_refused() {
    let storage = MemoryStorage::new(&Power::new());
    for size in [0, 1000, (2040 << 30) + 512, u64::MAX] {
        for kind in [Kind::Dynamic, Kind::Fixed] {
            let refused = create(storage.as_ref(), &options(size, kind), ids().as_ref());
            assert!(matches!(refused, Err(CreateError::Options(_))), "{size}");
        }
    }
    for block_size in [0, 1 << 18, 3 << 19, 1 << 29] {
        let options = CreateOptions {
            block_size,
            ..options(BLOCK, Kind::Dynamic)
        };
        assert!(create(storage.as_ref(), &options, ids().as_ref()).is_err());
    }
    let parent = options(BLOCK, Kind::Differencing);
    assert!(create(storage.as_ref(), &parent, ids().as_ref()).is_err());
    assert_eq!(storage.len().unwrap(), 0, "and leave nothing behind");
    create(
        storage.as_ref(),
        &options(2040 << 30, Kind::Dynamic),
        ids().as_ref(),
    )
    .unwrap();
    let again = create(
        storage.as_ref(),
        &options(BLOCK, Kind::Dynamic),
        ids().as_ref(),
    );
    assert!(matches!(again, Err(CreateError::NotEmpty(_))));
    let disk = open(&storage).unwrap();
    disk.write_at((2040 << 30) - 512, &[1; 512], Fua::No)
        .unwrap();
    disk.close().unwrap();
    assert!(matches!(
        resize(storage.as_ref(), 2041 << 30),
        Err(ResizeError::Size(_))
    ));
}
