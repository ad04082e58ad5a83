//! The intent log of one disk: which regions may have writes under way to the platter.
//!
//! The body of the file is two halves of [`HALF_BYTES`] that are used in turn. A half begins with a checkpoint, a record
//! that holds all hot regions; records that add regions follow it. Records start at multiples of 4096 bytes, so that a
//! torn write cannot reach an older record even on a medium with 4 KiB sectors:
//!
//! | byte | length | field                                                                |
//! |------|--------|----------------------------------------------------------------------|
//! | 0    | 4      | CRC-32C of everything behind it, up to the last region               |
//! | 4    | 4      | number of regions `n`                                                |
//! | 8    | 8      | generation of the half, +1 at each checkpoint                        |
//! | 16   | 8      | index of the record in its half; 0 is the checkpoint                 |
//! | 24   | 8 x n  | region indices                                                       |
//!
//! Numbers are little-endian.
//!
//! # Crash contract
//! Every record is durable when the call that wrote it returns (forced unit access into space that was written before).
//! The half with the younger valid checkpoint counts, with its records up to the first that is not valid. A torn
//! checkpoint leaves the older half, a torn record was never acknowledged, so no write to the image followed it.
#![forbid(unsafe_code)]

use std::{collections::BTreeSet, io, sync::Arc};

use super::{
    header::{HEADER_BYTES, Kind, Owner},
    state::StateDir,
};
use crate::{
    base::{
        checksum::crc32c,
        units::{REGION_BYTES, to_u64, to_usize},
    },
    storage::{Fua, Storage},
};

/// Most regions that are hot at once, per disk: 16 GiB of working set, 128 KiB of checkpoint.
pub const HOT_REGIONS_MAX: usize = 16 * 1024;
/// Bytes of a half: a checkpoint and room for several hundred records before the next one is due.
pub const HALF_BYTES: u64 = 2 * 1024 * 1024;
const RECORD_ALIGN: u64 = 4096;
const RECORD_HEADER: usize = 24;

const _: () = assert!(HALF_BYTES > 8 * (HOT_REGIONS_MAX as u64 * 8 + RECORD_ALIGN));

/// The intent log of one disk, open for writing.
#[derive(Debug)]
pub struct IntentLog {
    owner: Owner,
    storage: Arc<dyn Storage>,
    generation: u64,
    /// Index of the next record of the current half.
    index: u64,
    /// Where in its half the next record goes.
    position: u64,
}

impl IntentLog {
    /// The log as an earlier mount left it with the regions in it, or nothing if there is none of this owner and these
    /// `mounts`, or none that can be read.
    pub fn find(
        state: &StateDir,
        owner: Owner,
        mounts: [u64; 2],
    ) -> io::Result<Option<(Self, BTreeSet<u64>)>> {
        let Some(storage) = owner.find(state, Kind::Intent, 2 * HALF_BYTES, mounts)? else {
            return Ok(None);
        };
        let mut best: Option<Half> = None;
        for half in 0..2 {
            let read = read_half(&*storage, half, owner.size.div_ceil(REGION_BYTES))?;
            best = match (best, read) {
                (Some(best), Some(read)) if best.generation > read.generation => Some(best),
                (best, read) => read.or(best),
            };
        }
        Ok(best.map(|half| {
            let log = Self {
                owner,
                storage,
                generation: half.generation,
                index: half.index,
                position: half.position,
            };
            (log, half.regions)
        }))
    }

    /// A new log without regions.
    pub fn create(state: &StateDir, owner: Owner, mount: u64) -> io::Result<Self> {
        let storage = owner.create(state, Kind::Intent, 2 * HALF_BYTES, mount)?;
        let mut log = Self {
            owner,
            storage,
            generation: 0,
            index: 0,
            position: HALF_BYTES,
        };
        log.checkpoint(&[])?;
        Ok(log)
    }

    /// Notes durably that the file belongs to the mount number `mount`.
    pub fn adopt(&self, mount: u64) -> io::Result<()> {
        let header = self.owner.encode(Kind::Intent, mount);
        self.storage.write_at(0, &header, Fua::Yes)
    }

    /// Whether a record that adds `count` regions fits behind the current ones.
    pub fn has_room(&self, count: usize) -> bool {
        self.position + record_bytes(count) <= HALF_BYTES
    }

    /// Adds `regions`, for which there is room, durably.
    pub fn add(&mut self, regions: &[u64]) -> io::Result<()> {
        assert!(
            self.has_room(regions.len()),
            "the caller makes room with a checkpoint"
        );
        let record = encode(self.generation, self.index, regions);
        self.write(&record)
    }

    /// Starts the other half: from here on the log holds `regions` and nothing else.
    pub fn checkpoint(&mut self, regions: &[u64]) -> io::Result<()> {
        // Changed first: after a failure nothing may follow the records of the half that is left.
        self.generation += 1;
        self.index = 0;
        self.position = 0;
        let record = encode(self.generation, self.index, regions);
        self.write(&record)
    }

    fn write(&mut self, record: &[u8]) -> io::Result<()> {
        let half = HEADER_BYTES + self.generation % 2 * HALF_BYTES;
        self.storage
            .write_at(half + self.position, record, Fua::Yes)?;
        self.index += 1;
        self.position += to_u64(record.len());
        Ok(())
    }
}

#[derive(Debug)]
struct Half {
    generation: u64,
    index: u64,
    position: u64,
    regions: BTreeSet<u64>,
}

fn read_half(storage: &dyn Storage, half: u64, regions_of_disk: u64) -> io::Result<Option<Half>> {
    let start = HEADER_BYTES + half * HALF_BYTES;
    let Some((generation, regions)) = read_record(storage, start, HALF_BYTES, 0)? else {
        return Ok(None);
    };
    let mut read = Half {
        generation,
        index: 1,
        position: record_bytes(regions.len()),
        regions: regions.into_iter().collect(),
    };
    loop {
        let room = HALF_BYTES - read.position;
        match read_record(storage, start + read.position, room, read.index)? {
            Some((generation, regions)) if generation == read.generation => {
                read.index += 1;
                read.position += record_bytes(regions.len());
                read.regions.extend(regions);
            }
            _ => break,
        }
    }
    // A valid checksum over regions that the disk does not have: not the log of this disk.
    let ours = generation % 2 == half
        && read
            .regions
            .last()
            .is_none_or(|&last| last < regions_of_disk);
    Ok(ours.then_some(read))
}

/// The record with this `index` at `offset` of the file, of which `room` bytes are left in its half. Reads no more than the
/// record: a start needs not wait for the 4 MiB of which the log rarely uses more than a few records.
fn read_record(
    storage: &dyn Storage,
    offset: u64,
    room: u64,
    index: u64,
) -> io::Result<Option<(u64, Vec<u64>)>> {
    if room == 0 {
        return Ok(None);
    }
    let mut bytes = vec![0; to_usize(RECORD_ALIGN)];
    storage.read_at(offset, &mut bytes)?;
    let count = u32::from_le_bytes(bytes[4..8].try_into().expect("four bytes"));
    let whole = record_bytes(to_usize(count.into()));
    if whole > room {
        return Ok(None);
    }
    if whole > RECORD_ALIGN {
        bytes.resize(to_usize(whole), 0);
        storage.read_at(offset, &mut bytes)?;
    }
    Ok(decode(&bytes, index))
}

fn record_bytes(regions: usize) -> u64 {
    (to_u64(RECORD_HEADER) + 8 * to_u64(regions)).next_multiple_of(RECORD_ALIGN)
}

fn encode(generation: u64, index: u64, regions: &[u64]) -> Vec<u8> {
    let count = u32::try_from(regions.len()).expect("at most HOT_REGIONS_MAX and one batch");
    let mut record = Vec::with_capacity(to_usize(record_bytes(regions.len())));
    record.extend_from_slice(&[0; 4]);
    record.extend_from_slice(&count.to_le_bytes());
    record.extend_from_slice(&generation.to_le_bytes());
    record.extend_from_slice(&index.to_le_bytes());
    for region in regions {
        record.extend_from_slice(&region.to_le_bytes());
    }
    let crc = crc32c(&record[4..]);
    record[..4].copy_from_slice(&crc.to_le_bytes());
    record.resize(to_usize(record_bytes(regions.len())), 0);
    record
}

/// The record with this `index` at the start of `bytes`: its generation and regions.
fn decode(bytes: &[u8], index: u64) -> Option<(u64, Vec<u64>)> {
    let word = |at: usize| {
        let word = bytes.get(at..at + 8)?;
        Some(u64::from_le_bytes(word.try_into().expect("eight bytes")))
    };
    let (crc, count) = {
        let word = word(0)?;
        (word & u64::from(u32::MAX), to_usize(word >> 32))
    };
    let end = RECORD_HEADER.checked_add(count.checked_mul(8)?)?;
    let covered = bytes.get(4..end)?;
    if u64::from(crc32c(covered)) != crc || word(16)? != index {
        return None;
    }
    let regions: Option<Vec<u64>> = (0..count).map(|n| word(RECORD_HEADER + 8 * n)).collect();
    Some((word(8)?, regions?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        base::{
            ids::MachineId,
            units::{DiskIndex, MIB},
        },
        storage::memory::{MemoryFolder, Power},
    };

    fn owner() -> Owner {
        Owner {
            machine: MachineId(uuid::Uuid::from_u128(1)),
            disk: DiskIndex(0),
            size: 1000 * MIB,
        }
    }

    /// Cuts the power at every step of a history of additions and checkpoints, with several ways in which what was
    /// being written reaches the platter: what is found are the regions of the last finished call or the one cut.
    #[test]
    fn after_a_power_cut_the_log_is_that_of_the_last_call_or_the_one_under_way() {
        let mut cuts = 0;
        for steps in 0.. {
            let mut finished = false;
            for pattern in 1..5 {
                let power = Power::new();
                let state = StateDir::memory(MemoryFolder::new(&power));
                let mut log = IntentLog::create(&state, owner(), 1).unwrap();
                power.cut_after(steps);
                let mut want = vec![BTreeSet::new()];
                let mut done = 0;
                for turn in 0..12_u64 {
                    let mut next = want.last().unwrap().clone();
                    let result = if turn % 3 == 2 {
                        next.retain(|region| region % 2 == turn / 3 % 2);
                        log.checkpoint(&next.iter().copied().collect::<Vec<_>>())
                    } else {
                        let added: Vec<u64> = (turn * 70..turn * 70 + 69).collect();
                        next.extend(added.iter().copied());
                        log.add(&added)
                    };
                    want.push(next);
                    if result.is_err() {
                        break;
                    }
                    done += 1;
                }
                finished = done == 12;
                let mut turn = 0;
                power.restore(&mut || {
                    turn += 1;
                    turn % pattern == 0
                });
                let (_, found) = IntentLog::find(&state, owner(), [1, 2]).unwrap().unwrap();
                assert!(
                    found == want[done] || want.get(done + 1) == Some(&found),
                    "cut after {steps}: {found:?}"
                );
                cuts += 1;
            }
            if finished {
                break;
            }
        }
        assert!(cuts > 40, "{cuts}");
    }

    #[test]
    fn a_torn_record_hides_only_itself() {
        let power = Power::new();
        let state = StateDir::memory(MemoryFolder::new(&power));
        let mut log = IntentLog::create(&state, owner(), 1).unwrap();
        log.add(&[1, 2]).unwrap();
        log.add(&[3]).unwrap();
        let at = HEADER_BYTES + HALF_BYTES + 2 * RECORD_ALIGN + 24;
        log.storage.write_at(at, &[9], Fua::Yes).unwrap();
        let (_, found) = IntentLog::find(&state, owner(), [1, 2]).unwrap().unwrap();
        assert_eq!(found, [1, 2].into());
        assert!(
            IntentLog::find(&state, owner(), [2, 3]).unwrap().is_none(),
            "of another mount"
        );
        let other = Owner {
            size: MIB,
            ..owner()
        };
        assert!(
            IntentLog::find(&state, other, [1, 2]).unwrap().is_none(),
            "of another disk"
        );
    }

    /// The last record that there is room for counts like any other.
    #[test]
    fn a_half_is_used_to_its_last_byte() {
        let state = StateDir::memory(MemoryFolder::new(&Power::new()));
        let owner = Owner {
            size: HALF_BYTES / RECORD_ALIGN * REGION_BYTES,
            ..owner()
        };
        let mut log = IntentLog::create(&state, owner, 1).unwrap();
        let mut added = 0;
        while log.has_room(1) {
            log.add(&[added]).unwrap();
            added += 1;
        }
        assert_eq!(log.position, HALF_BYTES);
        let (found, regions) = IntentLog::find(&state, owner, [1, 2]).unwrap().unwrap();
        assert_eq!(regions, (0..added).collect());
        assert!(!found.has_room(1) && !found.has_room(0));
    }

    #[test]
    fn any_bytes_can_be_read() {
        for fill in [0xff, 0x01] {
            let bytes = vec![fill; 8192];
            assert!(decode(&bytes, 0).is_none());
        }
        assert!(decode(&[], 0).is_none());
    }
}
