//! The survey of the block allocation table: every entry against the rules, and against everything that has a place.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    sync::Arc,
};

use crate::{
    base::units::{Extent, MIB, to_usize},
    disk::check::FINDINGS_MAX,
    storage::Storage,
};

use super::{
    super::{
        Kind,
        inspect::Blocks,
        metadata::Parameters,
        numbering::{Entry, Numbering, Role, State},
        occupancy::Occupancy,
    },
    Survey,
};

const ENTRY_BYTES: u64 = 8;
/// Bytes of the table read at once.
const READ_BYTES: u64 = MIB;

/// Places that were taken already: by the entry that wanted them, and the place itself.
type Conflicts = BTreeMap<(u64, u64), Extent>;

impl Survey {
    /// Checks every entry of the table in `region`; `places` is what the log and the regions take, and their names.
    pub(super) fn read_table(
        &mut self,
        region: Extent,
        parameters: &Parameters,
        places: &[(&'static str, Extent)],
        taken: &mut Occupancy,
    ) {
        let numbering = Numbering::new(parameters);
        let used = numbering.entries();
        let held = region.len / ENTRY_BYTES;
        if held < used {
            let problem = format!("{} bytes cannot hold {used} entries", region.len);
            self.report.error("BAT", region.offset, problem);
        }
        let storage = Arc::clone(&self.storage);
        let mut table = Walk {
            survey: self,
            region,
            numbering,
            block_size: parameters.block_size,
            has_parent: parameters.kind == Kind::Differencing,
            bitmaps: BTreeSet::new(),
            needed: BTreeMap::new(),
            blocks: Blocks {
                total: numbering.blocks,
                ..Blocks::default()
            },
            conflicts: Conflicts::new(),
            kept: Vec::new(),
            junk: 0,
        };
        let walked = for_each_entry(storage.as_ref(), region, |number, entry| {
            if number < used {
                table.check(number, entry, taken);
            } else {
                table.junk += 1;
            }
        });
        table.finish(taken);
        let (mut blocks, conflicts) = (table.blocks, table.conflicts);
        blocks.not_present = blocks.total.saturating_sub(
            blocks.present
                + blocks.partial
                + blocks.zero
                + blocks.unmapped
                + blocks.undefined
                + blocks.reserved,
        );
        self.blocks = Some(blocks);
        if let Err(error) = walked {
            self.unread("BAT", region.offset, &error);
        }
        self.name_owners(region, parameters, &conflicts, places);
    }

    /// Says for each place that two want who the other is.
    fn name_owners(
        &mut self,
        region: Extent,
        parameters: &Parameters,
        conflicts: &Conflicts,
        places: &[(&'static str, Extent)],
    ) {
        if conflicts.is_empty() {
            return;
        }
        let numbering = Numbering::new(parameters);
        let mut owners: BTreeMap<(u64, u64), String> = BTreeMap::new();
        for (key, run) in conflicts {
            if let Some((name, _)) = places.iter().find(|(_, place)| place.overlaps(*run)) {
                owners.insert(*key, format!("the {name}"));
            }
        }
        let storage = Arc::clone(&self.storage);
        // The first pass reported what cannot be read.
        let _ = for_each_entry(storage.as_ref(), region, |number, entry| {
            let role = numbering.role(number);
            let Some(run) = place_of(entry, role, parameters.block_size) else {
                return;
            };
            let near = run.offset.saturating_sub(parameters.block_size)..run.end();
            for (key, wanted) in conflicts.range((near.start, 0)..(near.end, 0)) {
                if key.1 != number && wanted.overlaps(run) {
                    owners.entry(*key).or_insert_with(|| name(role));
                }
            }
        });
        for ((offset, number), run) in conflicts {
            let place = region.offset + number * ENTRY_BYTES;
            let owner = owners.get(&(*offset, *number));
            let owner = owner.map_or("something else", String::as_str);
            let who = name(numbering.role(*number));
            let problem = format!(
                "{who}: its {} bytes at {offset:#x} lie over {owner}",
                run.len
            );
            self.report.error("BAT", place, problem);
        }
    }
}

/// The first pass over the table.
struct Walk<'a> {
    survey: &'a mut Survey,
    region: Extent,
    numbering: Numbering,
    block_size: u64,
    has_parent: bool,
    /// Entries of the bitmaps that are there: one for each 4 GiB of the disk at most.
    bitmaps: BTreeSet<u64>,
    /// Entries of the bitmaps that a partial block needs, and of the first such block.
    needed: BTreeMap<u64, u64>,
    blocks: Blocks,
    conflicts: Conflicts,
    /// Places that blocks without content keep.
    kept: Vec<(u64, Extent)>,
    /// Entries behind the last one that are not zeros.
    junk: u64,
}

impl Walk<'_> {
    /// Checks one entry that is not all zeros.
    fn check(&mut self, number: u64, entry: Entry, taken: &mut Occupancy) {
        let role = self.numbering.role(number);
        if role == Role::Padding {
            self.junk += 1;
            return;
        }
        if entry.reserved() != 0 {
            self.error(
                number,
                &format!("reserved bits are set in {:#x}", entry.word()),
            );
        }
        match role {
            Role::Block(block) => self.check_block(number, block, entry, taken),
            Role::Bitmap | Role::Padding => self.check_bitmap(number, entry, taken),
        }
    }

    fn check_block(&mut self, number: u64, block: u64, entry: Entry, taken: &mut Occupancy) {
        let offset = entry.offset();
        let Some(state) = entry.state() else {
            self.blocks.reserved += 1;
            let problem = format!("state {} is reserved", entry.word() & 7);
            self.error(number, &problem);
            return;
        };
        *self.blocks.of(state) += 1;
        match state {
            State::Zero if offset != 0 => self.error(
                number,
                &format!("state ZERO with an offset of {offset:#x}, which Hyper-V refuses"),
            ),
            State::NotPresent if offset != 0 => {
                self.warning(
                    number,
                    &format!("not present with an offset of {offset:#x}"),
                );
            }
            State::NotPresent | State::Zero => {}
            State::Undefined | State::Unmapped => {
                if offset != 0 {
                    self.kept
                        .push((number, Extent::new(offset, self.block_size)));
                }
            }
            State::PartiallyPresent if !self.has_parent => {
                self.error(number, "partially present in a disk without parent");
            }
            State::FullyPresent | State::PartiallyPresent => {
                if state == State::PartiallyPresent {
                    let (bitmap, _) = self.numbering.bitmap(block);
                    self.needed.entry(bitmap).or_insert(number);
                }
                let is_last = block + 1 == self.numbering.blocks;
                self.take(number, Extent::new(offset, self.block_size), is_last, taken);
            }
        }
    }

    fn check_bitmap(&mut self, number: u64, entry: Entry, taken: &mut Occupancy) {
        match entry.state() {
            Some(state @ (State::FullyPresent | State::PartiallyPresent)) => {
                if state == State::PartiallyPresent {
                    self.warning(number, "a sector bitmap in state 7, which is a block's");
                }
                if !self.has_parent {
                    self.warning(number, "a sector bitmap in a disk without parent");
                }
                self.bitmaps.insert(number);
                self.blocks.bitmaps += 1;
                self.take(number, Extent::new(entry.offset(), MIB), false, taken);
            }
            Some(State::NotPresent) => {}
            _ => {
                let problem = format!("no sector bitmap has the state {}", entry.word() & 7);
                self.error(number, &problem);
            }
        }
    }

    fn take(&mut self, number: u64, run: Extent, is_last: bool, taken: &mut Occupancy) {
        let len = self.survey.len;
        match taken.take_block(run, is_last) {
            Ok(()) if run.end() > len => self.warning(
                number,
                &format!(
                    "the last block reaches {} bytes past the end of the file, as qemu leaves it: they read as zeros",
                    run.end() - len
                ),
            ),
            Ok(()) => {}
            // It lies inside the file and past the headers: something else is there.
            Err(_) if run.offset >= MIB && taken.holds(run, is_last) => {
                if self.conflicts.len() < FINDINGS_MAX {
                    self.conflicts.insert((run.offset, number), run);
                } else {
                    self.error(number, "its place belongs to something else");
                }
            }
            Err(problem) => self.error(number, &problem),
        }
    }

    /// What can be said when all entries were seen.
    fn finish(&mut self, taken: &mut Occupancy) {
        for (bitmap, block) in std::mem::take(&mut self.needed) {
            if !self.bitmaps.contains(&bitmap) {
                self.error(
                    block,
                    "partially present, and its sector bitmap is not there",
                );
            }
        }
        for (number, run) in std::mem::take(&mut self.kept) {
            if let Err(problem) = taken.take_block(run, false) {
                self.warning(
                    number,
                    &format!("it keeps a place that it cannot have: {problem}"),
                );
            }
        }
        if self.junk > 0 {
            let problem = format!("{} entries behind the last block are not zeros", self.junk);
            self.survey
                .report
                .warning("BAT", self.region.offset, problem);
        }
    }

    fn error(&mut self, number: u64, problem: &str) {
        let (place, problem) = self.told(number, problem);
        self.survey.report.error("BAT", place, problem);
    }

    fn warning(&mut self, number: u64, problem: &str) {
        let (place, problem) = self.told(number, problem);
        self.survey.report.warning("BAT", place, problem);
    }

    fn told(&self, number: u64, problem: &str) -> (u64, String) {
        let who = name(self.numbering.role(number));
        (
            self.region.offset + number * ENTRY_BYTES,
            format!("{who}: {problem}"),
        )
    }
}

fn name(role: Role) -> String {
    match role {
        Role::Block(block) => format!("block {block}"),
        Role::Bitmap => "sector bitmap".into(),
        Role::Padding => "padding".into(),
    }
}

/// The place that an entry takes.
fn place_of(entry: Entry, role: Role, block_size: u64) -> Option<Extent> {
    let present = matches!(
        entry.state(),
        Some(State::FullyPresent | State::PartiallyPresent)
    );
    let len = match role {
        Role::Block(_) => block_size,
        Role::Bitmap => MIB,
        Role::Padding => return None,
    };
    let run = Extent::new(entry.offset(), len);
    (present && run.checked_end().is_some()).then_some(run)
}

/// Calls `visit` with every entry of the table in `region` that is not all zeros, leaving out the file's holes.
fn for_each_entry(
    storage: &dyn Storage,
    region: Extent,
    mut visit: impl FnMut(u64, Entry),
) -> io::Result<()> {
    // A damaged region may start anywhere: entries are counted from there.
    let stored = storage.len()?.min(region.end());
    let stored = stored.saturating_sub(region.offset);
    let end = region.offset + stored / ENTRY_BYTES * ENTRY_BYTES;
    let mut at = region.offset;
    let mut buf = Vec::new();
    while at < end {
        let Some(data) = storage.data_after(at)? else {
            break;
        };
        // Whole entries, whatever the boundaries of the host's holes are.
        let skipped = data.offset.max(at) - region.offset;
        let start = region.offset + skipped / ENTRY_BYTES * ENTRY_BYTES;
        if start >= end {
            break;
        }
        let len = (data.end() - start).next_multiple_of(ENTRY_BYTES);
        at = (start + len).min(end).min(start + READ_BYTES);
        buf.resize(to_usize(at - start), 0);
        storage.read_at(start, &mut buf)?;
        for (number, word) in ((start - region.offset) / ENTRY_BYTES..).zip(buf.as_chunks::<8>().0)
        {
            let entry = Entry::from_bytes(*word);
            if entry.word() != 0 {
                visit(number, entry);
            }
        }
    }
    if end < region.end() {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(())
}
