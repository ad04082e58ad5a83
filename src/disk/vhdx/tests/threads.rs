//! Many threads on one disk: each owns some sectors of every block, so all of them meet in the same fresh blocks.

use std::thread;

use super::*;
use crate::{
    base::units::Extent,
    disk::{Fua, Space},
    storage::memory::Power,
};

const THREADS: u64 = 8;
const BLOCKS: u64 = 24;

#[test]
fn writes_into_the_same_fresh_blocks_all_survive() {
    let storage = new_image(&Power::new(), &options(BLOCKS << 20, Kind::Dynamic));
    let disk = open(&storage).unwrap();
    thread::scope(|scope| {
        for owner in 0..THREADS {
            let disk = &disk;
            scope.spawn(move || {
                for block in 0..BLOCKS {
                    let at = (block << 20) + owner * 4096;
                    let byte = u8::try_from(owner + 1).unwrap();
                    disk.write_at(at, &[byte; 4096], Fua::No).unwrap();
                    if block % THREADS == owner {
                        disk.flush().unwrap();
                    }
                }
            });
        }
    });
    let check = |disk: &VhdxDisk| {
        for (at, part) in read_all(disk).chunks_exact(4096).enumerate() {
            let owner = at % 256;
            let byte = if owner < 8 {
                u8::try_from(owner + 1).unwrap()
            } else {
                0
            };
            assert!(part.iter().all(|&found| found == byte), "page {at:#x}");
        }
    };
    check(&disk);
    drop(disk);
    let disk = open(&storage).unwrap();
    check(&disk);
    disk.close().unwrap();
    check(&open(&storage).unwrap());
}

/// Each thread writes, discards and rereads blocks of its own while all of them share the space: a byte of another
/// thread in one's block means that a place was given away while somebody could still reach it.
#[test]
fn discards_and_writes_of_many_threads_do_not_meet() {
    let storage = new_image(&Power::new(), &options(BLOCKS << 20, Kind::Dynamic));
    let disk = open(&storage).unwrap();
    thread::scope(|scope| {
        for owner in 0..THREADS {
            let disk = &disk;
            scope.spawn(move || {
                let mut random = Random(owner);
                let mut held = vec![[0u8; 3]; 256];
                for turn in 0..300u64 {
                    let own = random.below(3);
                    let block = own * THREADS + owner;
                    let column = usize::try_from(own).unwrap();
                    let page = random.below(256);
                    match random.below(8) {
                        0 => {
                            let run = Extent::new(block << 20, 1 << 20);
                            disk.zero(run, Space::Release, Fua::No).unwrap();
                            for pages in &mut held {
                                pages[column] = 0;
                            }
                        }
                        1 => disk.flush().unwrap(),
                        _ => {
                            let byte = u8::try_from(1 + owner * 16 + turn % 16).unwrap();
                            let at = (block << 20) + page * 4096;
                            disk.write_at(at, &[byte; 4096], Fua::No).unwrap();
                            held[usize::try_from(page).unwrap()][column] = byte;
                        }
                    }
                    let mut bytes = vec![0; 1 << 20];
                    disk.read_at(block << 20, &mut bytes).unwrap();
                    for (part, pages) in bytes.chunks_exact(4096).zip(&held) {
                        assert!(
                            part.iter().all(|&found| found == pages[column]),
                            "{owner} {turn}"
                        );
                    }
                }
            });
        }
    });
    let before = read_all(&disk);
    drop(disk);
    assert!(read_all(&open(&storage).unwrap()) == before);
}

/// One block, discarded while others write it: whatever the order, a sector is zeros or one write's, and stays what it
/// was once seen after everybody has stopped.
#[test]
fn a_discard_meets_writes_of_the_same_block() {
    let storage = new_image(&Power::new(), &options(4 << 20, Kind::Dynamic));
    let disk = open(&storage).unwrap();
    thread::scope(|scope| {
        for owner in 1..=4u8 {
            let disk = &disk;
            scope.spawn(move || {
                for turn in 0..200u64 {
                    let block = turn % 2;
                    disk.write_at((block << 20) + 4096, &[owner; 4096], Fua::No)
                        .unwrap();
                }
            });
        }
        scope.spawn(|| {
            for _ in 0..100 {
                let run = Extent::new(0, 2 << 20);
                disk.zero(run, Space::Release, Fua::No).unwrap();
                disk.flush().unwrap();
            }
        });
    });
    let before = read_all(&disk);
    for (at, part) in before.chunks_exact(4096).enumerate() {
        assert!(
            part.iter().all(|&byte| byte == part[0]),
            "page {at:#x} is mixed"
        );
        assert!(part[0] <= 4 && (at % 256 == 1 || part[0] == 0));
    }
    drop(disk);
    assert!(read_all(&open(&storage).unwrap()) == before);
}

/// The disk grows, its table moves, and it shrinks again, while others write, read and discard: nobody's data changes.
#[test]
fn a_disk_is_resized_while_it_is_in_use() {
    let storage = new_image(
        &Power::new(),
        &options((BLOCKS << 20) - 4096, Kind::Dynamic),
    );
    let disk = open(&storage).unwrap();
    thread::scope(|scope| {
        for owner in 0..4u64 {
            let disk = &disk;
            scope.spawn(move || {
                for turn in 0..200u64 {
                    let block = (turn * 7 % (BLOCKS / 4)) * 4 + owner;
                    let at = (block << 20) + 4096;
                    let byte = u8::try_from(turn % 251 + 1).unwrap();
                    disk.write_at(at, &[byte; 4096], Fua::No).unwrap();
                    let mut held = [0; 4096];
                    disk.read_at(at, &mut held).unwrap();
                    assert_eq!(held, [byte; 4096], "{owner} {turn}");
                    if turn % 16 == 0 {
                        let run = Extent::new(block << 20, (1 << 20) - 4096);
                        disk.zero(run, Space::Release, Fua::No).unwrap();
                    }
                    if turn % 32 == 0 {
                        disk.flush().unwrap();
                    }
                }
            });
        }
        for size in [
            (BLOCKS + 8) << 20,
            129 << 30,
            BLOCKS << 20,
            40 << 20,
            1 << 40,
        ] {
            disk.resize(size).unwrap();
            assert_eq!(disk.geometry().size, size);
        }
    });
    let mut before = vec![0; usize::try_from(BLOCKS << 20).unwrap()];
    disk.read_at(0, &mut before).unwrap();
    disk.write_at((1 << 40) - 4096, &[7; 4096], Fua::No)
        .unwrap();
    drop(disk);
    let disk = open(&storage).unwrap();
    let mut after = vec![0; before.len()];
    disk.read_at(0, &mut after).unwrap();
    assert!(before == after);
    let mut held = [0; 4096];
    disk.read_at((1 << 40) - 4096, &mut held).unwrap();
    assert_eq!(held, [7; 4096]);
    disk.close().unwrap();
}
