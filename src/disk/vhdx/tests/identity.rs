//! What the headers say of who wrote what, and how the file grows: the rules that other programs rely on (MS-VHDX 2.2.2).

use super::*;
use crate::{
    disk::{Fua, Space},
    storage::memory::Power,
};

/// Both headers, the older one first.
fn headers(storage: &Arc<MemoryStorage>) -> [HeaderCopy; 2] {
    let storage: Arc<dyn Storage> = Arc::clone(storage) as _;
    let inspection = inspect(&storage);
    let mut headers = inspection.headers.map(Option::unwrap);
    headers.sort_by_key(|header| header.sequence);
    headers
}

fn current(storage: &Arc<MemoryStorage>) -> HeaderCopy {
    let [_, current] = headers(storage);
    current
}

fn image() -> Arc<MemoryStorage> {
    new_image(&Power::new(), &options(10 << 20, Kind::Dynamic))
}

#[test]
fn the_first_write_of_a_session_gives_new_identities_and_later_ones_do_not() {
    let storage = image();
    let before = current(&storage);
    let disk = open(&storage).unwrap();
    disk.read_at(0, &mut [0; 512]).unwrap();
    assert_eq!(current(&storage), before, "a look changes nothing");
    disk.write_at(0, &[1; 512], Fua::No).unwrap();
    let written = current(&storage);
    assert_ne!(written.file_write, before.file_write);
    assert_ne!(written.data_write, before.data_write);
    disk.write_at(5 << 20, &[2; 512], Fua::No).unwrap();
    disk.zero(
        crate::base::units::Extent::new(0, 1 << 20),
        Space::Release,
        Fua::No,
    )
    .unwrap();
    disk.close().unwrap();
    let closed = current(&storage);
    assert_eq!(closed.file_write, written.file_write);
    assert_eq!(closed.data_write, written.data_write);
    assert!(closed.log.is_nil());
}

#[test]
fn a_replayed_log_keeps_what_children_know_their_parent_by() {
    let storage = image();
    let disk = open(&storage).unwrap();
    disk.write_at(0, &[1; 512], Fua::No).unwrap();
    drop(disk);
    let left = current(&storage);
    assert!(!left.log.is_nil(), "the session was not closed");
    open(&storage).unwrap();
    let replayed = current(&storage);
    assert!(replayed.log.is_nil());
    assert_ne!(replayed.file_write, left.file_write);
    assert_eq!(replayed.data_write, left.data_write);
}

#[test]
fn another_size_is_other_data() {
    let storage = image();
    let before = current(&storage);
    let disk = open(&storage).unwrap();
    disk.resize(20 << 20).unwrap();
    disk.close().unwrap();
    let resized = current(&storage);
    assert_ne!(resized.file_write, before.file_write);
    assert_ne!(resized.data_write, before.data_write);
}

#[test]
fn both_headers_are_good_after_each_change_and_one_number_apart() {
    let storage = image();
    let disk = open(&storage).unwrap();
    let mut last = current(&storage).sequence;
    for step in 0..3 {
        match step {
            0 => disk.write_at(0, &[1; 512], Fua::Yes).unwrap(),
            1 => disk.resize(30 << 20).unwrap(),
            _ => disk.close().unwrap(),
        }
        let [older, newer] = headers(&storage);
        assert_eq!(newer.sequence, older.sequence + 1);
        // A resize goes through the log: the identities of the session are new already.
        assert_eq!(newer.sequence > last, step != 1, "step {step}");
        let told = |header: &HeaderCopy| (header.file_write, header.data_write, header.log);
        assert_eq!(told(&newer), told(&older));
        last = newer.sequence;
    }
}

#[test]
fn the_file_grows_in_large_steps_and_is_cut_off_at_the_end() {
    let storage = image();
    let empty = storage.len().unwrap();
    let disk = open(&storage).unwrap();
    disk.write_at(0, &[1; 512], Fua::No).unwrap();
    let grown = storage.len().unwrap();
    assert!(grown >= empty + (32 << 20), "{empty} to {grown}");
    for block in 1..10 {
        disk.write_at(block << 20, &[1; 512], Fua::No).unwrap();
    }
    assert_eq!(
        storage.len().unwrap(),
        grown,
        "nine blocks fit into one step"
    );
    disk.close().unwrap();
    assert_eq!(storage.len().unwrap(), empty + (10 << 20));
}
