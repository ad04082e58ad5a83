//! A guest that knows what it was promised: numbered writes past the page cache, and what must be found afterwards.
//!
//! A block that was written says its own number and the serial number of the write, all over. After a death a block may
//! hold the last write that was acknowledged or one that was under way, and nothing else.

use std::{
    fs::File,
    io,
    os::unix::fs::{FileExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::JoinHandle,
};

use nix::fcntl::OFlag;

/// Unit of tracking, in bytes.
pub(crate) const BLOCK: usize = 4096;
/// Longest write, in blocks.
const RUN_MAX: u64 = 16;

/// A buffer that `O_DIRECT` accepts.
pub(crate) struct Aligned {
    bytes: Vec<u8>,
    start: usize,
    len: usize,
}

impl Aligned {
    pub(crate) fn new(len: usize) -> Self {
        let bytes = vec![0; len + BLOCK];
        let start = bytes.as_ptr().align_offset(BLOCK);
        Self { bytes, start, len }
    }

    pub(crate) fn get(&self) -> &[u8] {
        &self.bytes[self.start..][..self.len]
    }

    pub(crate) fn get_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[self.start..][..self.len]
    }
}

/// Opens a disk as a hypervisor does, without a page cache.
pub(crate) fn open_direct(path: &Path, flags: OFlag) -> io::Result<File> {
    File::options()
        .read(true)
        .write(true)
        .custom_flags((OFlag::O_DIRECT | flags).bits())
        .open(path)
}

/// Writes a number all over a block, past the page cache.
pub(crate) fn mark(disk: &Path, block: u64, number: u8) {
    let mut bytes = Aligned::new(BLOCK);
    bytes.get_mut().fill(number);
    let file = open_direct(disk, OFlag::O_DSYNC).unwrap();
    file.write_all_at(bytes.get(), block * 4096).unwrap();
}

/// The number in a block.
pub(crate) fn marked(disk: &Path, block: u64) -> u8 {
    let mut bytes = [0; BLOCK];
    let file = File::open(disk).unwrap();
    file.read_exact_at(&mut bytes, block * 4096).unwrap();
    assert!(bytes.iter().all(|byte| *byte == bytes[0]));
    bytes[0]
}

/// What a block must hold.
#[derive(Clone, Copy, Default)]
struct Known {
    acknowledged: u64,
    attempted: u64,
}

/// The memory of what was written to one disk.
pub(crate) struct Ledger {
    blocks: Vec<Known>,
    serial: u64,
    random: u64,
}

impl Ledger {
    pub(crate) fn new(disk_bytes: u64, seed: u64) -> Self {
        let blocks = usize::try_from(disk_bytes).unwrap() / BLOCK;
        Self {
            blocks: vec![Known::default(); blocks],
            serial: 0,
            random: seed | 1,
        }
    }

    /// A number below `limit` (xorshift, which is all the chance that a load needs).
    pub(crate) fn pick(&mut self, limit: u64) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random % limit
    }

    /// Writes one run of blocks; a failed write may have happened in any of its blocks.
    pub(crate) fn write(&mut self, disk: &File, first: u64, count: u64) -> io::Result<()> {
        self.serial += 1;
        let mut buffer = Aligned::new(usize::try_from(count).unwrap() * BLOCK);
        for (block, bytes) in (first..).zip(buffer.get_mut().chunks_mut(BLOCK)) {
            fill(bytes, block, self.serial);
            self.at(block).attempted = self.serial;
        }
        disk.write_all_at(buffer.get(), first * u64::try_from(BLOCK).unwrap())?;
        for block in first..first + count {
            let known = self.at(block);
            known.acknowledged = known.attempted;
        }
        Ok(())
    }

    fn at(&mut self, block: u64) -> &mut Known {
        &mut self.blocks[usize::try_from(block).unwrap()]
    }

    /// Writes runs at random places until told to stop or until the disk is gone; returns what ended it.
    fn churn(&mut self, disk: &File, stop: &AtomicBool, written: &AtomicU64) -> Option<io::Error> {
        let blocks = u64::try_from(self.blocks.len()).unwrap();
        while !stop.load(Ordering::Relaxed) {
            let count = 1 + self.pick(RUN_MAX);
            // Half of the writes go to an eighth of the disk: blocks that are written again and again.
            let range = if self.pick(2) == 0 {
                blocks / 8
            } else {
                blocks
            };
            let first = self.pick(range - count);
            if let Err(error) = self.write(disk, first, count) {
                return Some(error);
            }
            written.fetch_add(count, Ordering::Relaxed);
        }
        None
    }

    /// Reads the whole disk and compares. What is found is what is known from now on.
    pub(crate) fn verify(&mut self, disk: &Path) {
        let file = open_direct(disk, OFlag::empty()).unwrap();
        let mut buffer = Aligned::new(256 * BLOCK);
        let mut wanted = vec![0; BLOCK];
        let total = self.blocks.len();
        for start in (0..total).step_by(256) {
            let count = 256.min(total - start);
            let bytes = &mut buffer.get_mut()[..count * BLOCK];
            file.read_exact_at(bytes, u64::try_from(start * BLOCK).unwrap())
                .unwrap();
            for (index, bytes) in (start..).zip(bytes.chunks(BLOCK)) {
                let block = u64::try_from(index).unwrap();
                let found = u64::from_le_bytes(bytes[8..16].try_into().unwrap());
                let known = &mut self.blocks[index];
                assert!(
                    found == known.acknowledged || found == known.attempted,
                    "block {block} holds write {found}; {} was acknowledged, {} attempted",
                    known.acknowledged,
                    known.attempted
                );
                fill(&mut wanted, block, found);
                assert!(
                    *bytes == wanted[..],
                    "block {block} holds half of write {found}"
                );
                *known = Known {
                    acknowledged: found,
                    attempted: found,
                };
            }
        }
    }

    /// Whether anything was ever written.
    pub(crate) fn writes(&self) -> u64 {
        self.serial
    }
}

/// The content of `block` after write `serial`; zeros if there was none.
fn fill(bytes: &mut [u8], block: u64, serial: u64) {
    if serial == 0 {
        bytes.fill(0);
        return;
    }
    let pattern = serial.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ block;
    for word in bytes.chunks_mut(8) {
        word.copy_from_slice(&pattern.to_le_bytes());
    }
    bytes[..8].copy_from_slice(&block.to_le_bytes());
    bytes[8..16].copy_from_slice(&serial.to_le_bytes());
}

/// A thread that writes to a disk.
pub(crate) struct Load {
    thread: JoinHandle<(Ledger, Option<io::Error>)>,
    stop: Arc<AtomicBool>,
    written: Arc<AtomicU64>,
}

impl Load {
    pub(crate) fn start(disk: PathBuf, mut ledger: Ledger) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let written = Arc::new(AtomicU64::new(0));
        let (stopping, counting) = (Arc::clone(&stop), Arc::clone(&written));
        let thread = std::thread::spawn(move || {
            let file = open_direct(&disk, OFlag::empty()).unwrap();
            let error = ledger.churn(&file, &stopping, &counting);
            (ledger, error)
        });
        Self {
            thread,
            stop,
            written,
        }
    }

    /// Blocks acknowledged so far.
    pub(crate) fn written(&self) -> u64 {
        self.written.load(Ordering::Relaxed)
    }

    /// Waits until this many more blocks were acknowledged.
    pub(crate) fn wait_written(&self, more: u64) {
        let until = self.written() + more;
        while self.written() < until {
            assert!(!self.thread.is_finished(), "the load ended by itself");
            std::thread::sleep(std::time::Duration::from_millis(2));
        }
    }

    /// Ends it: no write may have failed.
    pub(crate) fn finish(self) -> Ledger {
        self.stop.store(true, Ordering::Relaxed);
        let (ledger, error) = self.thread.join().unwrap();
        assert!(error.is_none(), "the guest saw {error:?}");
        ledger
    }

    /// Waits until the death of the primary ends it.
    pub(crate) fn ended(self) -> Ledger {
        let (ledger, error) = self.thread.join().unwrap();
        assert!(error.is_some(), "the guest did not notice the death");
        ledger
    }
}
