//! What a file in memory holds, and the changes that make it so.

use std::{
    collections::BTreeMap,
    sync::{Arc, LazyLock},
};

use super::{super::Space, Choice};
use crate::base::units::{Extent, SECTOR_BYTES, to_u64, to_usize};

/// Bytes of a page of the sparse content.
pub(super) const PAGE_BYTES: u64 = 4096;

type Page = [u8; to_usize(PAGE_BYTES)];

/// Shared by all pages that somebody wrote zeros to: fresh tracking files hold nothing else.
static ZEROS: LazyLock<Arc<Page>> = LazyLock::new(|| Arc::new([0; to_usize(PAGE_BYTES)]));

/// Sparse bytes: pages that are not there read as zeros.
#[derive(Clone, Debug, Default)]
pub(super) struct Bytes {
    pub(super) len: u64,
    /// Shared between the copies of a file until one of them is written.
    pub(super) pages: BTreeMap<u64, Arc<Page>>,
}

impl Bytes {
    pub(super) fn read(&self, offset: u64, buf: &mut [u8]) {
        for (at, range) in pieces(offset, buf.len(), PAGE_BYTES) {
            let within = to_usize(at % PAGE_BYTES);
            let len = range.len();
            match self.pages.get(&(at / PAGE_BYTES)) {
                Some(page) => buf[range].copy_from_slice(&page[within..within + len]),
                None => buf[range].fill(0),
            }
        }
    }

    pub(super) fn write(&mut self, offset: u64, data: &[u8]) {
        for (at, range) in pieces(offset, data.len(), PAGE_BYTES) {
            let within = to_usize(at % PAGE_BYTES);
            let data = &data[range];
            if data == ZEROS.as_slice() {
                self.pages.insert(at / PAGE_BYTES, Arc::clone(&ZEROS));
                continue;
            }
            let page = self
                .pages
                .entry(at / PAGE_BYTES)
                .or_insert_with(|| Arc::clone(&ZEROS));
            Arc::make_mut(page)[within..within + data.len()].copy_from_slice(data);
        }
        self.len = self.len.max(offset + to_u64(data.len()));
    }

    pub(super) fn zero(&mut self, run: Extent) {
        let whole = run.offset.div_ceil(PAGE_BYTES)..run.end() / PAGE_BYTES;
        let held: Vec<u64> = if whole.is_empty() {
            Vec::new()
        } else {
            self.pages.range(whole).map(|(&n, _)| n).collect()
        };
        for number in held {
            self.pages.remove(&number);
        }
        for edge in [run.offset / PAGE_BYTES, run.end() / PAGE_BYTES] {
            if let Some(page) = self.pages.get_mut(&edge) {
                let start = run.offset.max(edge * PAGE_BYTES) - edge * PAGE_BYTES;
                let end = run
                    .end()
                    .min((edge + 1) * PAGE_BYTES)
                    .saturating_sub(edge * PAGE_BYTES);
                if start < end {
                    Arc::make_mut(page)[to_usize(start)..to_usize(end)].fill(0);
                }
            }
        }
    }

    pub(super) fn set_len(&mut self, len: u64) {
        if len < self.len {
            self.zero(Extent::new(len, self.len - len));
        }
        self.len = len;
    }

    /// Makes all of a change.
    pub(super) fn apply(&mut self, change: &Change) {
        match change {
            Change::Write(offset, data) => self.write(*offset, data),
            whole => self.tear(whole, &mut || true),
        }
    }

    /// Makes the parts of a change that are `kept` when the power is cut.
    pub(super) fn tear(&mut self, change: &Change, kept: &mut Choice<'_>) {
        match change {
            Change::Write(offset, data) => {
                for (at, range) in pieces(*offset, data.len(), SECTOR_BYTES) {
                    if kept() {
                        self.write(at, &data[range]);
                    }
                }
            }
            Change::Forced(offset, data) => self.write(*offset, data),
            Change::Zero(run, space) => {
                if kept() {
                    self.zero(*run);
                    if *space == Space::Keep {
                        self.len = self.len.max(run.end());
                    }
                }
            }
            Change::SetLen(len) => {
                if kept() {
                    self.set_len(*len);
                }
            }
        }
    }
}

/// Cuts `len` bytes at `offset` where multiples of `unit` lie: (file offset, range of the buffer).
pub(super) fn pieces(
    offset: u64,
    len: usize,
    unit: u64,
) -> impl Iterator<Item = (u64, std::ops::Range<usize>)> {
    let mut done = 0;
    std::iter::from_fn(move || {
        (done < len).then(|| {
            let at = offset + to_u64(done);
            let step = to_usize(unit - at % unit).min(len - done);
            done += step;
            (at, done - step..done)
        })
    })
}

#[derive(Clone, Debug)]
pub(super) enum Change {
    Write(u64, Arc<[u8]>),
    /// A write with forced unit access: durable already, and again after any unsynced change that came before it.
    Forced(u64, Arc<[u8]>),
    Zero(Extent, Space),
    SetLen(u64),
}
