//! Where new blocks go: the end of the file, and the places of blocks that were discarded.
//!
//! All blocks have one size, so free space is a set of places of that size.
//!
//! # Crash contract
//! A place handed out reads as zeros, durably: the end of the file was cut off and synced before the session's first
//! growth, and a place that held another block has been through all of this first, so that no power cut can show one
//! block's bytes in another:
//!
//! ```text
//!   discarded    the entry that gives it up is in the log ............ until that entry is durable
//!   waiting      I/O that looked the block up before may still write .. until all that has ended
//!   punched      reads as zeros ....................................... until the next sync
//!   free
//! ```
//! The disk's payload and the log entry that refers to it may therefore become durable in any order.

use std::{
    collections::BTreeSet,
    io,
    sync::atomic::{AtomicU64, Ordering},
};

use parking_lot::Mutex;

use crate::{
    base::units::{Extent, MIB},
    storage::{Space as Keeping, Storage},
};

use super::{flight::Flights, format::FILE_BYTES_MAX, occupancy::Occupancy};

/// The file grows by at least this much, so that most blocks find it long enough.
const GROWTH_BYTES: u64 = 32 * MIB;

/// See the module.
#[derive(Debug)]
pub(super) struct Space {
    block_size: u64,
    /// Length of the file.
    len: AtomicU64,
    /// One past the last byte in use.
    end: AtomicU64,
    places: Mutex<Places>,
}

#[derive(Debug, Default)]
struct Places {
    free: BTreeSet<u64>,
    /// Discarded places, with the log position after the entry that gave them up.
    discarded: Vec<(u64, u64)>,
    waiting: Vec<u64>,
    punched: Vec<u64>,
}

impl Space {
    /// The space of a file of `len` bytes, of which nothing else is known yet.
    pub(super) fn new(block_size: u64, len: u64) -> Self {
        Self {
            block_size,
            len: AtomicU64::new(len),
            end: AtomicU64::new(len),
            places: Mutex::default(),
        }
    }

    /// All that is `taken` is known: the file is in use up to its end, but for the gaps, which may hold anything.
    pub(super) fn begin(&self, taken: &Occupancy) {
        let gaps = taken.gaps(self.block_size);
        self.places.lock().discarded = gaps.into_iter().map(|place| (place, 0)).collect();
        self.end.store(taken.end(), Ordering::Release);
    }

    /// Length of the file; what lies behind reads as zeros.
    pub(super) fn len(&self) -> u64 {
        self.len.load(Ordering::Acquire)
    }

    /// One past the last byte in use.
    pub(super) fn end(&self) -> u64 {
        self.end.load(Ordering::Acquire)
    }

    /// Makes the file end where its last structure ends. To be synced before anything is allocated.
    pub(super) fn settle(&self, storage: &dyn Storage) -> io::Result<()> {
        let end = self.end();
        if self.len() != end {
            storage.set_len(end)?;
            self.len.store(end, Ordering::Release);
        }
        Ok(())
    }

    /// A place for one block that reads as zeros.
    pub(super) fn take(&self, storage: &dyn Storage) -> io::Result<u64> {
        let mut places = self.places.lock();
        if let Some(place) = places.free.pop_first() {
            return Ok(place);
        }
        self.grow(storage, self.block_size)
    }

    /// The end of the file, which reads as zeros, for something of `len` bytes that is no block.
    pub(super) fn take_end(&self, storage: &dyn Storage, len: u64) -> io::Result<u64> {
        let _places = self.places.lock();
        self.grow(storage, len)
    }

    /// Takes `len` bytes at the end; the caller holds the places.
    fn grow(&self, storage: &dyn Storage, len: u64) -> io::Result<u64> {
        let place = self.end();
        let end = place + len;
        if end > FILE_BYTES_MAX {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        if end > self.len() {
            let len = end.max(self.len() + GROWTH_BYTES).min(FILE_BYTES_MAX);
            storage.set_len(len)?;
            self.len.store(len, Ordering::Release);
        }
        self.end.store(end, Ordering::Release);
        Ok(place)
    }

    /// Takes back a place that was never written to.
    pub(super) fn give_back(&self, place: u64) {
        self.places.lock().free.insert(place);
    }

    /// Takes over the place of a block whose new state is in the log before `position`.
    pub(super) fn discard(&self, place: u64, position: u64) {
        self.places.lock().discarded.push((place, position));
    }

    /// Places that a sync that begins now makes free.
    pub(super) fn punched(&self) -> Vec<u64> {
        std::mem::take(&mut self.places.lock().punched)
    }

    /// The sync succeeded.
    pub(super) fn free(&self, places: Vec<u64>) {
        self.places.lock().free.extend(places);
    }

    /// Moves places on after a sync: `durable` is the log position it reached.
    pub(super) fn recycle(&self, storage: &dyn Storage, durable: u64, flights: &Flights) {
        let ready = {
            let mut places = self.places.lock();
            if places.waiting.is_empty() {
                let given_up = places
                    .discarded
                    .extract_if(.., |(_, position)| *position <= durable);
                let given_up: Vec<u64> = given_up.map(|(place, _)| place).collect();
                if given_up.is_empty() {
                    return;
                }
                places.waiting = given_up;
                flights.turn();
            }
            if !flights.have_landed() {
                return;
            }
            std::mem::take(&mut places.waiting)
        };
        let (mut punched, mut lost) = (Vec::with_capacity(ready.len()), 0u64);
        for place in ready {
            match storage.zero(Extent::new(place, self.block_size), Keeping::Release) {
                Ok(()) => punched.push(place),
                // It stays unused until the disk is opened again.
                Err(_) => lost += 1,
            }
        }
        if lost > 0 {
            tracing::warn!(
                places = lost,
                "discarded blocks cannot be cleared for reuse"
            );
        }
        self.places.lock().punched.extend(punched);
    }

    /// Cuts off what lies behind `end`. Nothing may be in flight.
    pub(super) fn truncate(&self, storage: &dyn Storage, end: u64) -> io::Result<()> {
        self.end.store(end, Ordering::Release);
        *self.places.lock() = Places::default();
        self.settle(storage)
    }
}
