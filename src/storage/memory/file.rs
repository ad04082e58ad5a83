//! A file in memory.

use std::{fs::File, io, os::unix::fs::FileExt, sync::Arc};

use parking_lot::Mutex;

use super::{
    super::{Fua, Space, Storage},
    Choice, Power,
    content::{Bytes, Change, PAGE_BYTES},
};
use crate::base::units::{Extent, to_u64, to_usize};

#[derive(Debug, Default)]
struct FileState {
    current: Bytes,
    durable: Bytes,
    unsynced: Vec<Change>,
}

impl FileState {
    fn lose(&mut self, kept: &mut Choice<'_>) {
        for change in std::mem::take(&mut self.unsynced) {
            self.durable.tear(&change, kept);
        }
        self.current = self.durable.clone();
    }
}

/// A file in memory.
#[derive(Debug)]
pub struct MemoryStorage {
    power: Arc<Power>,
    state: Mutex<FileState>,
}

impl MemoryStorage {
    /// An empty file on `power`.
    pub fn new(power: &Arc<Power>) -> Arc<Self> {
        let file = Arc::new(Self {
            power: Arc::clone(power),
            state: Mutex::default(),
        });
        power.0.lock().files.push(Arc::downgrade(&file));
        file
    }

    /// A durable file that holds `bytes`, on a supply of its own.
    pub fn with_bytes(bytes: &[u8]) -> Arc<Self> {
        let mut content = Bytes::default();
        content.write(0, bytes);
        Self::with_content(content)
    }

    /// All bytes, as a reader sees them now.
    pub fn bytes(&self) -> Vec<u8> {
        let state = self.state.lock();
        let mut bytes = vec![0; to_usize(state.current.len)];
        state.current.read(0, &mut bytes);
        bytes
    }

    /// Writes the file, with its holes, into an empty one of the host.
    pub fn write_to(&self, file: &File) -> io::Result<()> {
        let content = self.content();
        file.set_len(content.len)?;
        for (number, page) in &content.pages {
            let at = number * PAGE_BYTES;
            let len = PAGE_BYTES.min(content.len.saturating_sub(at));
            file.write_all_at(&page[..to_usize(len)], at)?;
        }
        Ok(())
    }

    /// A file that holds `content`, durably.
    pub(super) fn with_content(content: Bytes) -> Arc<Self> {
        let file = Self::new(&Power::new());
        *file.state.lock() = FileState {
            durable: content.clone(),
            current: content,
            unsynced: Vec::new(),
        };
        file
    }

    /// What a reader sees now.
    pub(super) fn content(&self) -> Bytes {
        self.state.lock().current.clone()
    }

    pub(super) fn lose(&self, kept: &mut Choice<'_>) {
        self.state.lock().lose(kept);
    }

    fn change(&self, change: Change) -> io::Result<()> {
        self.power.step()?;
        let mut state = self.state.lock();
        state.current.apply(&change);
        state.unsynced.push(change);
        Ok(())
    }
}

impl Storage for MemoryStorage {
    fn len(&self) -> io::Result<u64> {
        self.power.alive()?;
        Ok(self.state.lock().current.len)
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.power.alive()?;
        let state = self.state.lock();
        if offset + to_u64(buf.len()) > state.current.len {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        state.current.read(offset, buf);
        Ok(())
    }

    fn write_at(&self, offset: u64, buf: &[u8], fua: Fua) -> io::Result<()> {
        // Forced unit access is for this run only: what else is unsynced stays so, and must not come over it later.
        self.change(match fua {
            Fua::No => Change::Write(offset, buf.into()),
            Fua::Yes => Change::Forced(offset, buf.into()),
        })
    }

    fn zero(&self, run: Extent, space: Space) -> io::Result<()> {
        self.change(Change::Zero(run, space))
    }

    fn data_after(&self, offset: u64) -> io::Result<Option<Extent>> {
        self.power.alive()?;
        let state = self.state.lock();
        let len = state.current.len;
        let first = state
            .current
            .pages
            .range(offset / PAGE_BYTES..)
            .map(|(&n, _)| n)
            .next();
        Ok(first.and_then(|first| {
            let mut last = first;
            while state.current.pages.contains_key(&(last + 1)) {
                last += 1;
            }
            let start = (first * PAGE_BYTES).max(offset);
            let end = ((last + 1) * PAGE_BYTES).min(len);
            (start < end).then(|| Extent::new(start, end - start))
        }))
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.change(Change::SetLen(len))
    }

    fn sync(&self) -> io::Result<()> {
        self.power.step()?;
        let mut state = self.state.lock();
        let FileState {
            durable, unsynced, ..
        } = &mut *state;
        for change in unsynced.drain(..) {
            durable.apply(&change);
        }
        Ok(())
    }
}
