//! What stands in for a [mapping](super::mapping) where a scheduler watches each word: plain memory, no files.
#![forbid(unsafe_code)]

use std::{fs::File, io, ops::Deref};

use crate::base::sync::atomic::AtomicU64;

/// Words that last as long as this value.
#[derive(Debug)]
pub struct Mapping(Box<[AtomicU64]>);

impl Mapping {
    /// Not there: tests under a scheduler keep their state folder in memory.
    pub fn file(_file: &File, _offset: u64, _words: usize) -> io::Result<Self> {
        Err(io::ErrorKind::Unsupported.into())
    }

    /// `words` zero words.
    pub fn anonymous(words: usize) -> io::Result<Self> {
        Ok(Self((0..words).map(|_| AtomicU64::new(0)).collect()))
    }

    /// Nothing: there is no file.
    pub fn sync(&self) -> io::Result<()> {
        Ok(())
    }
}

impl Deref for Mapping {
    type Target = [AtomicU64];

    fn deref(&self) -> &[AtomicU64] {
        &self.0
    }
}
