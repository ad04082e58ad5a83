//! Opening an image: from bytes to checked structures, in the order in which they depend on each other.
//!
//! Identifier, headers, log, and only then, as the log may change them, regions, metadata and block allocation table.

use std::{io, sync::Arc};

use uuid::Uuid;

use crate::{
    base::{
        ids::Ids,
        units::{Extent, to_u64},
    },
    storage::Storage,
};

use super::{
    Kind,
    bat::Bat,
    error::OpenError,
    format::{FILE_BYTES_MAX, FILE_SIGNATURE, HEADER_OFFSETS},
    header::Headers,
    locator::Locator,
    log::replay::{Overlay, Replay},
    metadata::{Items, Parameters},
    occupancy::Occupancy,
    region::Regions,
};

/// What becomes of a dirty log.
#[derive(Debug)]
pub(super) enum Replaying<'a> {
    /// The file stays as it is and is seen as if the log had been replayed.
    InMemory,
    /// It is replayed into the file, which gets an identity from here.
    InPlace(&'a dyn Ids),
}

/// The structures of a file, checked each for itself and against each other.
#[derive(Debug)]
pub(super) struct Image {
    /// The file, or the view of it that its log makes.
    pub(super) storage: Arc<dyn Storage>,
    pub(super) headers: Headers,
    pub(super) regions: Regions,
    pub(super) parameters: Parameters,
    /// Where the parent is, if it has one.
    pub(super) locator: Option<Locator>,
    pub(super) bat: Bat,
    pub(super) taken: Occupancy,
    /// One past the log and the regions.
    pub(super) fixed_end: u64,
    /// Length of the file.
    pub(super) len: u64,
}

impl Image {
    /// Reads the file in `storage`.
    pub(super) fn read(
        storage: Arc<dyn Storage>,
        replay: &Replaying<'_>,
    ) -> Result<Self, OpenError> {
        check_signature(storage.as_ref())?;
        let mut headers = Headers::read(storage.as_ref())?;
        let log = headers.log();
        if log.len > 0 && log.end() > file_len(storage.as_ref())? {
            return Err(OpenError::corrupt(
                "log",
                log.offset,
                "it lies past the end of the file",
            ));
        }
        let storage = replay_log(storage, replay, &mut headers)?;
        let len = file_len(storage.as_ref())?;
        let regions = Regions::read(storage.as_ref())?;
        let mut taken = Occupancy::new(len);
        take_places(&mut taken, log, &regions)?;
        let fixed_end = taken.end();
        let items = Items::read(storage.as_ref(), regions.metadata)?;
        let parameters = Parameters::read(&items)?;
        let locator = match parameters.kind {
            Kind::Differencing => Some(items.locator()?),
            Kind::Dynamic | Kind::Fixed => None,
        };
        let bat = Bat::read(storage.as_ref(), regions.bat, &parameters, &mut taken)?;
        Ok(Self {
            storage,
            headers,
            regions,
            parameters,
            locator,
            bat,
            taken,
            fixed_end,
            len,
        })
    }
}

fn take_places(taken: &mut Occupancy, log: Extent, regions: &Regions) -> Result<(), OpenError> {
    let log = (log.len > 0).then_some(("log", log));
    let regions = regions.all.iter().map(|(_, run)| ("region", *run));
    for (part, run) in log.into_iter().chain(regions) {
        taken
            .take(run)
            .map_err(|problem| OpenError::corrupt(part, run.offset, problem))?;
    }
    Ok(())
}

fn check_signature(storage: &dyn Storage) -> Result<(), OpenError> {
    let mut signature = [0; FILE_SIGNATURE.len()];
    match storage.read_at(0, &mut signature) {
        Ok(()) if signature == *FILE_SIGNATURE => Ok(()),
        Err(error) if error.kind() != io::ErrorKind::UnexpectedEof => {
            Err(OpenError::reading("file identifier", 0)(error))
        }
        _ => Err(OpenError::NotVhdx),
    }
}

fn file_len(storage: &dyn Storage) -> Result<u64, OpenError> {
    let len = storage.len().map_err(OpenError::reading("file", 0))?;
    if len > FILE_BYTES_MAX {
        return Err(OpenError::Unsupported(format!("a file of {len} bytes")));
    }
    Ok(len)
}

/// Brings about what a dirty log holds, in the file or over it.
fn replay_log(
    storage: Arc<dyn Storage>,
    how: &Replaying<'_>,
    headers: &mut Headers,
) -> Result<Arc<dyn Storage>, OpenError> {
    let log = headers.current().log;
    if log.is_nil() {
        return Ok(storage);
    }
    let place = headers.log();
    let replay = Replay::read(storage.as_ref(), place, log)?;
    let entries = to_u64(replay.entries);
    tracing::info!(entries, "the image was not closed: its log is replayed");
    let Replaying::InPlace(ids) = how else {
        return Ok(Arc::new(Overlay::new(storage, replay)));
    };
    let header_failed = || OpenError::writing("header", HEADER_OFFSETS[0]);
    let file_write = ids.uuid();
    // What a reader of the disk sees does not change: DataWriteGuid stays, or children would lose their parent.
    headers
        .update(storage.as_ref(), |header| header.file_write = file_write)
        .map_err(header_failed())?;
    replay
        .apply(storage.as_ref())
        .map_err(OpenError::writing("metadata from the log", place.offset))?;
    headers
        .update(storage.as_ref(), |header| header.log = Uuid::nil())
        .map_err(header_failed())?;
    Ok(storage)
}
