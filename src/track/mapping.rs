//! Memory that is a file: the one module of the program with unsafe code.
//!
//! A [`Mapping`] is a slice of [`AtomicU64`]. Mapped from a file (`MAP_SHARED`) its words are the page cache's own: they
//! survive the death of the process without any system call, and a power cut after [`Mapping::sync`]. Mapped from
//! nothing it is memory that costs nothing until it is touched, which is what maps of mostly clean disks want.
//!
//! # Why it is sound
//! The words are only ever reached through atomics, so that another process that maps or writes the same file can make
//! them wrong but not undefined. The file's length is checked before it is mapped; a file that somebody truncates
//! while it is mapped raises SIGBUS, which no code can prevent: the state folder belongs to the program alone. Its
//! blocks are allocated when the file is made, so that a full file system does not raise SIGBUS either.

#![expect(
    unsafe_code,
    reason = "mmap(2) hands out memory; see `Why it is sound`"
)]

use std::{
    fs::File, io, num::NonZeroUsize, ops::Deref, os::fd::AsFd, ptr::NonNull,
    sync::atomic::AtomicU64,
};

use nix::{
    libc::c_void,
    sys::mman::{MapFlags, MsFlags, ProtFlags, mmap, mmap_anonymous, msync, munmap},
};

use crate::base::units::to_u64;

/// Atomic words in a memory mapping, unmapped when dropped.
#[derive(Debug)]
pub struct Mapping {
    start: NonNull<c_void>,
    words: usize,
    /// Whether there is a file to sync.
    backed: bool,
}

// SAFETY: the mapping is owned by this value alone and reached only as `&[AtomicU64]`, which may be sent and shared.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// The `words` words of `file` from byte `offset`, a multiple of the page size. The file must be long enough.
    pub fn file(file: &File, offset: u64, words: usize) -> io::Result<Self> {
        let bytes = bytes_of(words)?;
        let end = offset.checked_add(to_u64(bytes.get()));
        if end.is_none_or(|end| file.metadata().is_ok_and(|meta| meta.len() < end)) {
            return Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                "the file is shorter than the words to map",
            ));
        }
        let offset = i64::try_from(offset).map_err(io::Error::other)?;
        // SAFETY: a new mapping at an address of the kernel's choice overlaps nothing of ours.
        let start = unsafe {
            mmap(
                None,
                bytes,
                ProtFlags::PROT_READ | ProtFlags::PROT_WRITE,
                MapFlags::MAP_SHARED,
                file.as_fd(),
                offset,
            )
        }?;
        Ok(Self {
            start,
            words,
            backed: true,
        })
    }

    /// `words` zero words without a file.
    pub fn anonymous(words: usize) -> io::Result<Self> {
        let bytes = bytes_of(words)?;
        // SAFETY: a new mapping at an address of the kernel's choice overlaps nothing of ours.
        let start = unsafe {
            mmap_anonymous(
                None,
                bytes,
                ProtFlags::PROT_READ | ProtFlags::PROT_WRITE,
                MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE,
            )
        }?;
        Ok(Self {
            start,
            words,
            backed: false,
        })
    }

    /// Makes all words stored so far durable. Like any failed sync, a failed one proves that nothing can be trusted.
    pub fn sync(&self) -> io::Result<()> {
        if !self.backed {
            return Ok(());
        }
        // SAFETY: the range is the one that was mapped and is still mapped.
        unsafe {
            msync(
                self.start,
                self.words * size_of::<AtomicU64>(),
                MsFlags::MS_SYNC,
            )
        }?;
        Ok(())
    }
}

impl Deref for Mapping {
    type Target = [AtomicU64];

    fn deref(&self) -> &[AtomicU64] {
        // SAFETY: the mapping holds `words` initialised words (a file's bytes or zeros, and every bit pattern is a
        // u64), is aligned to a page, lives as long as `self`, and is only ever changed through atomics.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr().cast::<AtomicU64>(), self.words) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the range was mapped by the constructor, and no borrow of it outlives `self`.
        let unmapped = unsafe { munmap(self.start, self.words * size_of::<AtomicU64>()) };
        debug_assert!(unmapped.is_ok(), "munmap(2) of an own mapping");
    }
}

fn bytes_of(words: usize) -> io::Result<NonZeroUsize> {
    words
        .checked_mul(size_of::<AtomicU64>())
        .and_then(NonZeroUsize::new)
        .ok_or_else(|| {
            io::Error::new(
                io::ErrorKind::InvalidInput,
                "a mapping holds at least one word",
            )
        })
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering;

    use super::*;

    #[test]
    fn words_of_a_file_outlive_the_mapping_without_a_sync() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(8192).unwrap();
        let mapping = Mapping::file(&file, 4096, 512).unwrap();
        mapping[511].store(7, Ordering::Relaxed);
        drop(mapping);
        let again = Mapping::file(&file, 4096, 512).unwrap();
        assert_eq!(again[511].load(Ordering::Relaxed), 7);
        again.sync().unwrap();
    }

    #[test]
    fn a_file_that_is_too_short_is_refused_before_it_can_raise_sigbus() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(8191).unwrap();
        assert!(Mapping::file(&file, 4096, 512).is_err());
        assert!(Mapping::anonymous(0).is_err());
        assert!(Mapping::anonymous(1).unwrap()[0].load(Ordering::Relaxed) == 0);
    }
}
