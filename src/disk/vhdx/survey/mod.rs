//! Looking through a whole file, past every fault: what `check` reports and `inspect` shows.
//!
//! Opening stops at the first fault; a survey notes it, and goes on with what can still be read: the other header, the
//! other region table, the structures as they stand if the log cannot be replayed. It reads with the same decoders as an
//! open and never writes. What an open tolerates is a warning here, what it refuses an error; so is what Hyper-V is known
//! to refuse.

mod table;

use std::{io, sync::Arc};

use uuid::Uuid;

use crate::{
    base::units::{Extent, MIB, to_usize},
    disk::check::Report,
    storage::Storage,
};

use super::{
    Kind,
    error::OpenError,
    format::{
        self, BAT_REGION, FILE_BYTES_MAX, FILE_IDENTIFIER_BYTES, FILE_SIGNATURE, HEADER_BYTES,
        HEADER_OFFSETS, Header, METADATA_REGION, METADATA_TABLE_BYTES, MetadataEntry,
        REGION_TABLE_BYTES, REGION_TABLE_OFFSETS, RegionEntry,
    },
    header,
    inspect::{Blocks, LogState},
    locator::Locator,
    log::replay::{Overlay, Replay},
    metadata::{self, Items, Parameters},
    occupancy::Occupancy,
    region,
};

/// Bytes of a header that mean something; the rest is reserved.
const HEADER_FIELDS_BYTES: usize = 80;

/// What was found in a file. Whatever could not be read is missing, and the report says why.
#[derive(Debug)]
pub(super) struct Survey {
    pub(super) report: Report,
    /// Length of the file, after its log is replayed.
    pub(super) len: u64,
    pub(super) creator: String,
    pub(super) headers: [Option<Header>; 2],
    /// Which header counts.
    pub(super) current: Option<usize>,
    pub(super) log: LogState,
    pub(super) tables: [Option<Vec<RegionEntry>>; 2],
    pub(super) items: Vec<MetadataEntry>,
    pub(super) parameters: Option<Parameters>,
    pub(super) locator: Option<Locator>,
    pub(super) blocks: Option<Blocks>,
    /// The file, or the view of it that its log makes.
    storage: Arc<dyn Storage>,
}

impl Survey {
    /// Looks through the file in `storage`.
    pub(super) fn of(storage: &Arc<dyn Storage>) -> Self {
        let mut survey = Self {
            report: Report::default(),
            len: 0,
            creator: String::new(),
            headers: [None, None],
            current: None,
            log: LogState::Unknown,
            tables: [None, None],
            items: Vec::new(),
            parameters: None,
            locator: None,
            blocks: None,
            storage: Arc::clone(storage),
        };
        survey.measure();
        survey.read_identifier();
        survey.read_headers();
        let log = survey.read_log();
        survey.read_region_tables();
        let mut taken = Occupancy::new(survey.len);
        let places = survey.take_places(log, &mut taken);
        if let Some(region) = survey.region(METADATA_REGION) {
            survey.read_metadata(region);
        }
        if let (Some(region), Some(parameters)) = (survey.region(BAT_REGION), survey.parameters) {
            survey.read_table(region, &parameters, &places, &mut taken);
            survey.find_unused(&taken);
        }
        survey
    }

    /// The place of a region, as the first good table says.
    fn region(&self, id: Uuid) -> Option<Extent> {
        let entry = self.regions().iter().find(|entry| entry.id == id)?;
        let run = region::place(entry);
        run.checked_end()
            .is_some_and(|end| end <= FILE_BYTES_MAX)
            .then_some(run)
    }

    /// The first good table.
    fn regions(&self) -> &[RegionEntry] {
        self.tables
            .iter()
            .flatten()
            .next()
            .map_or(&[], Vec::as_slice)
    }

    fn measure(&mut self) {
        match self.storage.len() {
            Ok(len) => self.len = len,
            Err(error) => self.unread("file", 0, &error),
        }
    }

    fn read_identifier(&mut self) {
        let Some(bytes) = self.read("file identifier", 0, FILE_IDENTIFIER_BYTES) else {
            return;
        };
        let (signature, creator) = bytes.split_at(FILE_SIGNATURE.len());
        if signature != FILE_SIGNATURE {
            self.report
                .error("file identifier", 0, "it does not start with \"vhdxfile\"");
        }
        let (units, _) = creator.as_chunks::<2>();
        let units = units.iter().map(|unit| u16::from_le_bytes(*unit));
        // What is not text is shown as such.
        self.creator = char::decode_utf16(units.take_while(|&unit| unit != 0))
            .map(|unit| unit.unwrap_or(char::REPLACEMENT_CHARACTER))
            .collect();
    }

    fn read_headers(&mut self) {
        let mut slots: [Option<[u8; HEADER_BYTES]>; 2] = [None, None];
        let mut torn = Vec::new();
        for (number, offset) in HEADER_OFFSETS.into_iter().enumerate() {
            let Some(bytes) = self.read("header", offset, HEADER_BYTES) else {
                continue;
            };
            let bytes: [u8; HEADER_BYTES] = bytes.try_into().expect("read as long as asked for");
            self.headers[number] = header::decode(&bytes);
            if self.headers[number].is_none() {
                torn.push((offset, invalid(&bytes, *b"head")));
            } else if bytes[HEADER_FIELDS_BYTES..].iter().any(|&byte| byte != 0) {
                self.report
                    .warning("header", offset, "its reserved bytes are not zeros");
            }
            slots[number] = Some(bytes);
        }
        self.current = match &self.headers {
            [None, None] => None,
            [Some(_), None] => Some(0),
            [None, Some(_)] => Some(1),
            [Some(first), Some(second)] => Some(usize::from(second.sequence > first.sequence)),
        };
        for (offset, problem) in torn {
            if self.current.is_some() {
                let problem = format!("{problem}; the other one counts");
                self.report.warning("header", offset, problem);
            } else {
                self.report.error("header", offset, problem);
            }
        }
        if let [Some(first), Some(second)] = &self.headers
            && first.sequence == second.sequence
        {
            let at = HEADER_OFFSETS[0];
            if slots[0] == slots[1] {
                self.report
                    .warning("header", at, "both are the same, as Disk2vhd makes them");
            } else {
                let problem = "both have the same sequence number and differ";
                self.report.error("header", at, problem);
            }
        }
        if let Some((number, current)) = self.current() {
            let checked = header::check(current, HEADER_OFFSETS[number]);
            self.note(checked.err());
        }
    }

    fn current(&self) -> Option<(usize, &Header)> {
        let number = self.current?;
        Some((number, self.headers[number].as_ref()?))
    }

    /// Examines the log, and sees the file through it if it is dirty. Gives its place.
    fn read_log(&mut self) -> Option<Extent> {
        let (number, current) = self.current()?;
        let (id, place) = (
            current.log,
            Extent::new(current.log_offset, u64::from(current.log_len)),
        );
        let placed = header::check(current, HEADER_OFFSETS[number]).is_ok();
        if place.len == 0 || !placed {
            self.log = if id.is_nil() {
                LogState::Clean
            } else {
                LogState::Damaged
            };
            return None;
        }
        if place.end() > self.len {
            self.report
                .error("log", place.offset, "it reaches past the end of the file");
        }
        if id.is_nil() {
            self.log = LogState::Clean;
            return Some(place);
        }
        match Replay::read(self.storage.as_ref(), place, id) {
            Ok(replay) => {
                let entries = crate::base::units::to_u64(replay.entries);
                self.log = LogState::Dirty { entries };
                if let Some(offset) = replay.torn {
                    let problem = "the entry behind the newest one is torn: what it was to change is as before";
                    self.report.warning("log", offset, problem);
                }
                let problem =
                    format!("the image was not closed: an open replays {entries} entries");
                self.report.warning("log", place.offset, problem);
                self.storage = Arc::new(Overlay::new(Arc::clone(&self.storage), replay));
                self.measure();
            }
            Err(error) => {
                self.log = LogState::Damaged;
                self.note(Some(error));
            }
        }
        Some(place)
    }

    fn read_region_tables(&mut self) {
        let mut copies = Vec::new();
        let mut broken = Vec::new();
        for (number, offset) in REGION_TABLE_OFFSETS.into_iter().enumerate() {
            let Some(bytes) = self.read("region table", offset, REGION_TABLE_BYTES) else {
                continue;
            };
            self.tables[number] = region::decode(&bytes);
            if self.tables[number].is_none() {
                broken.push((offset, invalid(&bytes, *b"regi")));
            } else {
                copies.push(bytes);
            }
        }
        let is_one_left = !copies.is_empty();
        for (offset, problem) in broken {
            if is_one_left {
                let problem = format!("{problem}; the other one counts");
                self.report.warning("region table", offset, problem);
            } else {
                self.report.error("region table", offset, problem);
            }
        }
        if let [first, second] = copies.as_slice()
            && first != second
        {
            let problem = "it is not the same as the first one, which counts";
            self.report
                .warning("region table", REGION_TABLE_OFFSETS[1], problem);
        }
        if !is_one_left {
            return;
        }
        let at = REGION_TABLE_OFFSETS[usize::from(self.tables[0].is_none())];
        for problem in region::problems(self.regions()) {
            self.report.error("region table", at, problem);
        }
        for entry in self.regions().to_vec() {
            if region::is_needed(&entry) {
                let problem = format!("the required region {} is not known here", entry.id);
                self.report.error("region table", at, problem);
            }
            if entry.required == 0 && [BAT_REGION, METADATA_REGION].contains(&entry.id) {
                let problem = format!(
                    "region {} is not marked as required, as qemu writes it",
                    entry.id
                );
                self.report.warning("region table", at, problem);
            }
        }
    }

    /// Takes the space of the log and of all regions, and gives them with their names.
    fn take_places(
        &mut self,
        log: Option<Extent>,
        taken: &mut Occupancy,
    ) -> Vec<(&'static str, Extent)> {
        let regions = self
            .regions()
            .iter()
            .map(|entry| (region::name(entry.id), region::place(entry)));
        let all: Vec<_> = log
            .map(|run| ("log", run))
            .into_iter()
            .chain(regions)
            .collect();
        let mut places = vec![("headers", Extent::new(0, MIB))];
        for (name, run) in all {
            if run.checked_end().is_none() || !run.offset.is_multiple_of(MIB) {
                // The table's rules named it already.
                continue;
            }
            if let Err(problem) = taken.take(run) {
                let other = places.iter().find(|(_, other)| other.overlaps(run));
                let problem = other.map_or(problem, |(other, _)| {
                    format!("{} bytes lie over the {other}", run.len)
                });
                self.report.error(name, run.offset, problem);
            }
            places.push((name, run));
        }
        places
    }

    fn read_metadata(&mut self, region: Extent) {
        let part = "metadata";
        let table = self.read(
            "metadata table",
            region.offset,
            to_usize(METADATA_TABLE_BYTES),
        );
        let Some(table) = table else { return };
        let Some(entries) = metadata::decode_table(&table) else {
            self.report
                .error(part, region.offset, "it has no valid table");
            return;
        };
        for problem in metadata::problems(&entries, region.len) {
            self.report.error(part, region.offset, problem);
        }
        self.items.clone_from(&entries);
        for unknown in entries.iter().filter(|entry| !metadata::may_ignore(entry)) {
            let problem = format!("the required item {} is not known here", unknown.id);
            self.report.error(part, region.offset, problem);
        }
        let storage = Arc::clone(&self.storage);
        let items = Items::of(storage.as_ref(), region, entries);
        match Parameters::read(&items) {
            Ok(parameters) => self.parameters = Some(parameters),
            Err(error) => return self.note(Some(error)),
        }
        if self
            .parameters
            .is_some_and(|found| found.kind == Kind::Differencing)
        {
            match items.locator() {
                Ok(locator) => self.locator = Some(locator),
                Err(error) => self.note(Some(error)),
            }
        }
    }

    /// Warns of space that is neither in use nor known to be free.
    fn find_unused(&mut self, taken: &Occupancy) {
        let (bytes, first) = taken.unused();
        if let Some(first) = first {
            let problem = format!(
                "{bytes} bytes between structures belong to nothing, the first of them here"
            );
            self.report.warning("file", first, problem);
        }
        let end = taken.end();
        if self.len > end {
            let problem = format!("the last {} bytes belong to nothing", self.len - end);
            self.report.warning("file", end, problem);
        }
    }

    /// The bytes of a structure, if the file has them.
    fn read(&mut self, part: &'static str, offset: u64, len: usize) -> Option<Vec<u8>> {
        let mut bytes = vec![0; len];
        match self.storage.read_at(offset, &mut bytes) {
            Ok(()) => Some(bytes),
            Err(error) => {
                self.unread(part, offset, &error);
                None
            }
        }
    }

    fn unread(&mut self, part: &'static str, offset: u64, error: &io::Error) {
        let problem = match error.kind() {
            io::ErrorKind::UnexpectedEof => "the file ends before it or inside it".into(),
            _ => format!("it cannot be read: {error}"),
        };
        self.report.error(part, offset, problem);
    }

    /// Notes why an open would have stopped.
    fn note(&mut self, error: Option<OpenError>) {
        match error {
            None => {}
            Some(OpenError::Corrupt {
                part,
                offset,
                problem,
            }) => self.report.error(part, offset, problem),
            Some(OpenError::Io {
                part,
                offset,
                source,
                ..
            }) => self.unread(part, offset, &source),
            Some(error @ OpenError::Truncated { len, .. }) => {
                self.report.error("file", len, error.to_string());
            }
            Some(error) => self.report.error("file", None, error.to_string()),
        }
    }
}

/// Why a header or a region table does not count.
fn invalid(bytes: &[u8], signature: [u8; 4]) -> String {
    if bytes[..4] != signature {
        return "it has no signature".into();
    }
    let stored = u32::from_le_bytes([bytes[4], bytes[5], bytes[6], bytes[7]]);
    let computed = format::checksum_of([bytes, &[]]);
    if stored == computed {
        return "its fields cannot be read".into();
    }
    format!("its checksum is {stored:#010x} and should be {computed:#010x}")
}
