//! Long writes past the page cache (open(2), `O_DIRECT`).
//!
//! # Why
//! A replica writes its images once and seldom reads them. Through the page cache each byte costs a fresh page, a copy
//! into it and the search for dirty pages at the next sync, and it pushes out pages that somebody wants.
//!
//! # What stays as it is
//! A direct write is with the device when it returns, and durable after the next sync, which also makes the file
//! system's record of new blocks durable. The kernel keeps the page cache right: it writes back and drops cached pages
//! of the run first, so that buffered reads and writes may be mixed with direct ones.

use std::{
    cell::RefCell,
    fs::{self, File},
    io,
    os::unix::fs::{FileExt, OpenOptionsExt},
    path::Path,
    sync::atomic::{AtomicBool, Ordering},
};

use nix::{errno::Errno, fcntl::OFlag};

use crate::base::units::{BLOCK_BYTES, KIB, MIB, to_u64, to_usize};

/// Offset, length and memory address of a direct write are multiples of this, in bytes: no disk has larger logical blocks.
const ALIGNMENT: usize = to_usize(BLOCK_BYTES);
/// A shorter write goes through the page cache, which may join it with its neighbours before the device sees it.
const LEN_MIN: usize = to_usize(128 * KIB);
/// Most bytes of one write: each thread that writes keeps a buffer of this size.
const LEN_MAX: usize = to_usize(MIB);

/// A file opened for direct writes.
#[derive(Debug)]
pub(super) struct Direct {
    file: File,
    /// Set once the file system has refused: what it wants is more than [`ALIGNMENT`], or it promised too much at open.
    refused: AtomicBool,
}

impl Direct {
    /// The file at `path`, which exists; nothing if its file system knows no direct writes.
    pub(super) fn open(path: &Path) -> Option<Self> {
        let file = fs::OpenOptions::new()
            .write(true)
            .custom_flags((OFlag::O_DIRECT | OFlag::O_NOFOLLOW).bits())
            .open(path)
            .ok()?;
        Some(Self::new(file))
    }

    /// A file that was opened with `O_DIRECT`.
    pub(super) fn new(file: File) -> Self {
        Self {
            file,
            refused: AtomicBool::new(false),
        }
    }

    /// Writes as much of the start of `buf` as can be written directly, and says how much that is; the rest is for the
    /// page cache.
    pub(super) fn write(&self, offset: u64, buf: &[u8]) -> io::Result<usize> {
        let len = buf.len() / ALIGNMENT * ALIGNMENT;
        if len < LEN_MIN
            || !offset.is_multiple_of(to_u64(ALIGNMENT))
            || self.refused.load(Ordering::Relaxed)
        {
            return Ok(0);
        }
        let mut done = 0;
        while done < len {
            let piece = &buf[done..len.min(done + LEN_MAX)];
            match aligned(piece, |piece| {
                self.file.write_at(piece, offset + to_u64(done))
            }) {
                Ok(count) => {
                    done += count;
                    if count < piece.len() {
                        break;
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.raw_os_error() == Some(Errno::EINVAL as i32) => {
                    self.refused.store(true, Ordering::Relaxed);
                    break;
                }
                Err(error) => return Err(error),
            }
        }
        Ok(done)
    }
}

/// Calls `write` with the same bytes at an aligned address, which costs a copy where they have none.
fn aligned<T>(bytes: &[u8], write: impl FnOnce(&[u8]) -> T) -> T {
    thread_local! {
        static BUFFER: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
    }
    if bytes.as_ptr().align_offset(ALIGNMENT) == 0 {
        return write(bytes);
    }
    BUFFER.with_borrow_mut(|buffer| {
        buffer.resize(LEN_MAX + ALIGNMENT, 0);
        let start = buffer.as_ptr().align_offset(ALIGNMENT);
        let aligned = &mut buffer[start..][..bytes.len()];
        aligned.copy_from_slice(bytes);
        write(aligned)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::{Folder, Fua, Open, file::FileFolder};

    /// A file of zeros and the way past the page cache, where the file system of the temporary folder has one.
    fn direct(dir: &tempfile::TempDir, len: u64) -> Option<Direct> {
        let path = dir.path().join("f");
        File::create(&path).unwrap().set_len(len).unwrap();
        let direct = Direct::open(&path);
        if direct.is_none() {
            eprintln!("SKIPPED: {} knows no O_DIRECT", path.display());
        }
        direct
    }

    fn pattern(len: usize, seed: usize) -> Vec<u8> {
        (0..len)
            .map(|n| u8::try_from((n / 512 + n + seed) % 251).unwrap())
            .collect()
    }

    #[test]
    fn only_long_writes_of_whole_blocks_are_direct() {
        let dir = tempfile::tempdir().unwrap();
        let Some(direct) = direct(&dir, 4 * MIB) else {
            return;
        };
        let long = pattern(LEN_MAX * 2 + 777, 1);
        let cases = [
            (0, LEN_MIN - 1, 0),
            (0, LEN_MIN, LEN_MIN),
            (512, LEN_MIN, 0),
            (4096, LEN_MIN + 4095, LEN_MIN),
            (8192, long.len(), LEN_MAX * 2),
        ];
        for (offset, len, expected) in cases {
            // Whatever the address is: memory from the heap is seldom aligned, and once more by a single byte.
            for start in 0..=usize::from(len < long.len()) {
                let bytes = &long[start..][..len];
                let done = direct.write(offset, bytes).unwrap();
                assert_eq!(done, expected, "{len} bytes at {offset}");
                let file = fs::read(dir.path().join("f")).unwrap();
                let offset = usize::try_from(offset).unwrap();
                assert!(
                    file[offset..][..done] == bytes[..done],
                    "{len} bytes at {offset}"
                );
            }
        }
    }

    #[test]
    fn a_file_system_that_refuses_is_not_asked_again() {
        let dir = tempfile::tempdir().unwrap();
        let Some(direct) = direct(&dir, MIB) else {
            return;
        };
        // An offset that no file has is what the kernel answers with the same EINVAL.
        let bytes = pattern(LEN_MIN, 1);
        assert_eq!(direct.write(1 << 63, &bytes).unwrap(), 0);
        assert_eq!(direct.write(0, &bytes).unwrap(), 0);
        assert!(fs::read(dir.path().join("f")).unwrap() == vec![0; LEN_MAX]);
    }

    #[test]
    fn direct_and_cached_writes_see_each_other() {
        let dir = tempfile::tempdir().unwrap();
        let folder = FileFolder::open(dir.path()).unwrap();
        folder.open("f", Open::CreateNew).unwrap();
        let file = folder.open("f", Open::WriteAside).unwrap();
        let mut model = vec![0; 3 * LEN_MAX];
        file.set_len(to_u64(model.len())).unwrap();
        let mut state = 7_usize;
        for round in 0..60 {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            let (at, unit) = (state >> 33, if round % 3 == 0 { 512 } else { ALIGNMENT });
            let len = if round % 2 == 0 {
                LEN_MIN + at % LEN_MAX
            } else {
                1 + at % 5000
            };
            let offset = at % (model.len() - len) / unit * unit;
            let bytes = pattern(len, round);
            let fua = if round % 7 == 0 { Fua::Yes } else { Fua::No };
            file.write_at(to_u64(offset), &bytes, fua).unwrap();
            model[offset..][..len].copy_from_slice(&bytes);
            let mut found = vec![0; model.len()];
            file.read_at(0, &mut found).unwrap();
            assert!(found == model, "round {round}: {len} bytes at {offset}");
        }
        file.sync().unwrap();
        assert!(fs::read(dir.path().join("f")).unwrap() == model);
    }
}
