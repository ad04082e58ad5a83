//! The two headers: which one counts, and how a new one takes its place.
//!
//! # Crash contract
//! A header is never written over. The next one goes, durable, into the slot of the older one, so whatever a power cut
//! leaves of that slot, the other is whole; then the same is done once more so that both slots are good again.

use std::io;

use crate::{
    base::units::{Extent, MIB},
    storage::{Fua, Storage},
};

use super::{
    error::OpenError,
    format::{
        self, FILE_BYTES_MAX, HEADER_BYTES, HEADER_OFFSETS, Header, LOG_BYTES_MAX, checksum_of,
    },
};

/// The current header and the slot it stands in.
#[derive(Debug)]
pub(super) struct Headers {
    current: Header,
    slot: usize,
}

impl Headers {
    /// Reads both headers and takes the valid one with the greater sequence number.
    pub(super) fn read(storage: &dyn Storage) -> Result<Self, OpenError> {
        let mut found: Vec<(usize, Header, [u8; HEADER_BYTES])> = Vec::new();
        for (slot, bytes) in read_slots(storage)?.into_iter().enumerate() {
            if let Some(header) = decode(&bytes) {
                found.push((slot, header, bytes));
            }
        }
        if let [(_, first, first_bytes), (_, second, second_bytes)] = found.as_slice()
            && first.sequence == second.sequence
            && first_bytes != second_bytes
        {
            return Err(OpenError::corrupt(
                "header",
                HEADER_OFFSETS[0],
                "both copies have the same sequence number and differ",
            ));
        }
        // Of two identical copies the first counts: Disk2vhd writes them so.
        let newest = found.into_iter().rev().max_by_key(|found| found.1.sequence);
        let Some((slot, current, _)) = newest else {
            return Err(OpenError::corrupt(
                "header",
                HEADER_OFFSETS[0],
                "neither copy has a valid signature and checksum",
            ));
        };
        check(&current, HEADER_OFFSETS[slot])?;
        Ok(Self { current, slot })
    }

    /// The one that counts.
    pub(super) fn current(&self) -> &Header {
        &self.current
    }

    /// Where the log is.
    pub(super) fn log(&self) -> Extent {
        Extent::new(self.current.log_offset, u64::from(self.current.log_len))
    }

    /// Makes a changed header durable in both slots.
    pub(super) fn update(
        &mut self,
        storage: &dyn Storage,
        change: impl Fn(&mut Header),
    ) -> io::Result<()> {
        for _ in 0..2 {
            let mut next = self.current.clone();
            change(&mut next);
            next.sequence = next
                .sequence
                .checked_add(1)
                .ok_or_else(|| io::Error::other("the header's sequence number cannot grow"))?;
            let slot = 1 - self.slot;
            storage.write_at(HEADER_OFFSETS[slot], &encode(&next), Fua::Yes)?;
            *self = Self {
                current: next,
                slot,
            };
        }
        Ok(())
    }
}

/// The bytes of both slots.
fn read_slots(storage: &dyn Storage) -> Result<[[u8; HEADER_BYTES]; 2], OpenError> {
    let mut slots = [[0; HEADER_BYTES]; 2];
    for (slot, offset) in slots.iter_mut().zip(HEADER_OFFSETS) {
        storage
            .read_at(offset, slot)
            .map_err(OpenError::reading("header", offset))?;
    }
    Ok(slots)
}

/// The header in `bytes`, if signature and checksum are right.
pub(super) fn decode(bytes: &[u8; HEADER_BYTES]) -> Option<Header> {
    let header: Header = format::decode(bytes)?;
    (header.checksum == checksum_of([bytes, &[]])).then_some(header)
}

/// A whole header with its checksum.
pub(super) fn encode(header: &Header) -> [u8; HEADER_BYTES] {
    let mut bytes = [0; HEADER_BYTES];
    format::encode(header, &mut bytes);
    format::seal(&mut bytes);
    bytes
}

/// Whether the fields of a valid header, which stands at `offset`, mean something that can be opened.
pub(super) fn check(header: &Header, offset: u64) -> Result<(), OpenError> {
    if header.version != 1 {
        return Err(OpenError::Unsupported(format!(
            "version {} of the format",
            header.version
        )));
    }
    let dirty = !header.log.is_nil();
    if dirty && header.log_version != 0 {
        return Err(OpenError::Unsupported(format!(
            "version {} of the log",
            header.log_version
        )));
    }
    let len = u64::from(header.log_len);
    if len > LOG_BYTES_MAX {
        return Err(OpenError::Unsupported(format!("a log of {len} bytes")));
    }
    let placed = len % MIB == 0
        && header.log_offset.is_multiple_of(MIB)
        && (len == 0 || (header.log_offset >= MIB && header.log_offset <= FILE_BYTES_MAX));
    if !placed || (dirty && len == 0) {
        return Err(OpenError::corrupt(
            "header",
            offset,
            format!("no log can be {len} bytes at {:#x}", header.log_offset),
        ));
    }
    Ok(())
}
