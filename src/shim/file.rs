//! One disk as one file: what each request does to it, and what the caller is told.
//!
//! # Locks
//! Every request holds `disk` shared while it runs; taking the disk away ([`File::withdraw`]) waits for all of them.
//! What changes the disk also holds `writability` shared, so that once [`File::set_writable`] has returned, no write
//! is under way and none begins. A flush does not: one that waits for a replica must not hold up fencing.
//!
//! # Alignment
//! A [`Disk`] takes any run of bytes, so requests pass through as they come. A file opened with `O_DIRECT` refuses what
//! is not a multiple of the logical sector, as a block device would: without that refusal QEMU finds that one byte
//! works, gives up probing, and turns every 512-byte guest write into a read and a write of 4096.
//!
//! # Flushes
//! The kernel holds the inode's lock for the whole of an `fsync`, so there is never more than one of them under way on
//! a file and nothing to merge here; forced writes do run in parallel, and the disk below groups them.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    time::{Duration, Instant, SystemTime},
};

use nix::{
    errno::Errno,
    fcntl::{FallocateFlags, OFlag},
};
use parking_lot::{RwLock, RwLockReadGuard, RwLockWriteGuard};

use super::latency::{Operation, Recorders};
use crate::{
    base::units::{Extent, to_u64, to_usize},
    disk::{Content, Disk, DiskError, Fua, Geometry, Space},
};

/// What a writer is told when the disk must not be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// `EROFS`: the guest sees a disk that became read-only; most remount or stop cleanly.
    ReadOnly,
    /// `EIO`: the guest sees a broken disk; with QEMU's `werror=stop` the machine is paused.
    IoError,
}

/// Whether the guest may write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Writability {
    /// It may.
    Writable,
    /// Its writes are refused; reads and flushes go on.
    Refused(Refusal),
}

impl Writability {
    fn check(self) -> Result<(), Errno> {
        match self {
            Self::Writable => Ok(()),
            Self::Refused(Refusal::ReadOnly) => Err(Errno::EROFS),
            Self::Refused(Refusal::IoError) => Err(Errno::EIO),
        }
    }
}

/// Which end of a run [`File::seek`] looks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Seek {
    /// `SEEK_DATA`.
    Data,
    /// `SEEK_HOLE`.
    Hole,
}

/// What an opener may do with its handle.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Opened {
    ForReading,
    ForWriting,
}

/// A disk as a file.
#[derive(Debug)]
pub(super) struct File {
    /// `folder/name.raw`, for messages.
    label: String,
    /// Bytes. Changes only with the disk, under its lock held alone.
    size: AtomicU64,
    logical_sector: u32,
    /// Gone once the file was withdrawn.
    disk: RwLock<Option<Arc<dyn Disk>>>,
    writability: RwLock<Writability>,
    readers: AtomicUsize,
    writers: AtomicUsize,
    /// Whether the last request failed, so that trouble is told once and not for every request.
    failing: AtomicBool,
    created: (SystemTime, Instant),
    /// When a write last changed the disk, in microseconds since `created`.
    modified_us: AtomicU64,
}

impl File {
    pub(super) fn new(label: String, disk: Arc<dyn Disk>, writability: Writability) -> Self {
        let Geometry {
            size,
            logical_sector,
            ..
        } = disk.geometry();
        Self {
            label,
            size: AtomicU64::new(size),
            logical_sector,
            disk: RwLock::new(Some(disk)),
            writability: RwLock::new(writability),
            readers: AtomicUsize::new(0),
            writers: AtomicUsize::new(0),
            failing: AtomicBool::new(false),
            created: (SystemTime::now(), Instant::now()),
            modified_us: AtomicU64::new(0),
        }
    }

    /// Bytes of the file: those of the disk.
    pub(super) fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    /// When a write last changed the disk; the time of mounting if none did.
    pub(super) fn modified(&self) -> SystemTime {
        self.created.0 + Duration::from_micros(self.modified_us.load(Ordering::Relaxed))
    }

    pub(super) fn writability(&self) -> Writability {
        *self.writability.read()
    }

    /// Waits for writes under way and decides about all later ones. What stays allowed waits for nothing: a forced write
    /// that waits for a replica must not hold up those that follow it.
    pub(super) fn set_writable(&self, writability: Writability) {
        let allowed = Writability::Writable;
        if writability == allowed && self.writability() == allowed {
            return;
        }
        let before = std::mem::replace(&mut *self.writability.write(), writability);
        if before != writability {
            tracing::info!(file = %self.label, ?writability, "writability changed");
        }
    }

    /// Waits for all requests under way and lets go of the disk; later requests fail with `EIO`.
    pub(super) fn withdraw(&self) {
        self.disk.write().take();
    }

    /// Waits until `until` for all requests under way; later ones wait until the guard is dropped.
    pub(super) fn hold(&self, until: Instant) -> Option<HeldFile<'_>> {
        let disk = self.disk.try_write_until(until)?;
        Some(HeldFile { file: self, disk })
    }

    /// Handles open for writing. A handle counts until the kernel releases it, shortly after its last close.
    pub(super) fn writers(&self) -> usize {
        self.writers.load(Ordering::Acquire)
    }

    /// Handles open for reading only.
    pub(super) fn readers(&self) -> usize {
        self.readers.load(Ordering::Acquire)
    }

    /// Counts an opener. One that wants to write while that is refused gets `EROFS`, whatever the refusal: an error
    /// that names the reason helps whoever starts a machine here.
    pub(super) fn open(&self, flags: OFlag) -> Result<Opened, Errno> {
        if flags & OFlag::O_ACCMODE == OFlag::O_RDONLY {
            self.readers.fetch_add(1, Ordering::AcqRel);
            return Ok(Opened::ForReading);
        }
        let writability = self.writability.read();
        writability.check().map_err(|_| Errno::EROFS)?;
        self.writers.fetch_add(1, Ordering::AcqRel);
        Ok(Opened::ForWriting)
    }

    /// Uncounts an opener.
    pub(super) fn release(&self, opened: Opened) {
        let count = match opened {
            Opened::ForReading => &self.readers,
            Opened::ForWriting => &self.writers,
        };
        count.fetch_sub(1, Ordering::AcqRel);
    }

    /// Fills `buf` from `offset` and returns how much of it lies inside the disk.
    pub(super) fn read(
        &self,
        offset: u64,
        buf: &mut [u8],
        flags: OFlag,
        recorders: &Recorders,
    ) -> Result<usize, Errno> {
        self.check_alignment(offset, to_u64(buf.len()), flags)?;
        let inside = self.size().saturating_sub(offset).min(to_u64(buf.len()));
        let buf = &mut buf[..to_usize(inside)];
        if buf.is_empty() {
            return Ok(0);
        }
        let began = Instant::now();
        let result = self.answer(self.disk()?.read_at(offset, buf));
        recorders.record(
            Operation::Read,
            began,
            result.map(|()| inside).map_err(drop),
        );
        result.map(|()| buf.len())
    }

    /// Writes all of `data`, durably if the handle or the call says so. A run that crosses the end is refused as a
    /// whole: a guest that asks for it is confused about the disk's size.
    pub(super) fn write(
        &self,
        offset: u64,
        data: &[u8],
        flags: OFlag,
        recorders: &Recorders,
    ) -> Result<(), Errno> {
        self.check_alignment(offset, to_u64(data.len()), flags)?;
        let run = self.run(offset, to_u64(data.len()))?;
        if run.len == 0 {
            return Ok(());
        }
        // O_SYNC contains the bit of O_DSYNC.
        let fua = if flags.contains(OFlag::O_DSYNC) {
            Fua::Yes
        } else {
            Fua::No
        };
        let began = Instant::now();
        let result = self.change(|disk| disk.write_at(offset, data, fua));
        recorders.record(
            Operation::Write,
            began,
            result.map(|()| run.len).map_err(drop),
        );
        result
    }

    /// Makes every acknowledged write durable.
    pub(super) fn flush(&self, recorders: &Recorders) -> Result<(), Errno> {
        let began = Instant::now();
        let result = self.answer(self.disk()?.flush());
        recorders.record(Operation::Flush, began, result.map(|()| 0).map_err(drop));
        result
    }

    /// fallocate(2). Preallocation changes nothing, since a disk always has its size; what a mode with `KEEP_SIZE`
    /// says about bytes past the end is nothing as well.
    pub(super) fn allocate(
        &self,
        offset: u64,
        len: u64,
        mode: FallocateFlags,
        recorders: &Recorders,
    ) -> Result<(), Errno> {
        let keep_size = FallocateFlags::FALLOC_FL_KEEP_SIZE;
        let space = match mode - keep_size {
            kind if kind.is_empty() => None,
            FallocateFlags::FALLOC_FL_PUNCH_HOLE if mode.contains(keep_size) => {
                Some(Space::Release)
            }
            FallocateFlags::FALLOC_FL_ZERO_RANGE => Some(Space::Keep),
            _ => return Err(Errno::EOPNOTSUPP),
        };
        let run = if mode.contains(keep_size) {
            Extent::new(offset, len.min(self.size().saturating_sub(offset)))
        } else {
            self.run(offset, len)?
        };
        let (Some(space), 1..) = (space, run.len) else {
            return self.writability.read().check();
        };
        let began = Instant::now();
        let result = self.change(|disk| disk.zero(run, space, Fua::No));
        recorders.record(
            Operation::Zero,
            began,
            result.map(|()| run.len).map_err(drop),
        );
        result
    }

    /// lseek(2) with `SEEK_DATA` or `SEEK_HOLE`: the first byte at or after `offset` of the kind. The end is a hole.
    pub(super) fn seek(&self, offset: u64, target: Seek) -> Result<u64, Errno> {
        let disk = self.disk()?;
        let mut offset = offset;
        if offset >= self.size() {
            return Err(Errno::ENXIO);
        }
        while offset < self.size() {
            let (run, content) = self.answer(disk.run_at(offset))?;
            match (target, content) {
                (Seek::Data, Content::Data) | (Seek::Hole, Content::Zero) => return Ok(offset),
                (Seek::Data, Content::Zero) | (Seek::Hole, Content::Data) => offset = run.end(),
            }
        }
        match target {
            Seek::Data => Err(Errno::ENXIO),
            Seek::Hole => Ok(self.size()),
        }
    }

    fn disk(&self) -> Result<impl std::ops::Deref<Target = Arc<dyn Disk>>, Errno> {
        RwLockReadGuard::try_map(self.disk.read(), Option::as_ref).map_err(|_| Errno::EIO)
    }

    /// Runs an operation that changes the disk, if it may be changed.
    fn change(
        &self,
        operation: impl FnOnce(&dyn Disk) -> Result<(), DiskError>,
    ) -> Result<(), Errno> {
        let disk = self.disk()?;
        let writability = self.writability.read();
        writability.check()?;
        self.answer(operation(&**disk))?;
        let elapsed = self.created.1.elapsed().as_micros();
        let elapsed = u64::try_from(elapsed).expect("a process does not run for 500,000 years");
        self.modified_us.store(elapsed, Ordering::Relaxed);
        Ok(())
    }

    /// The run, if it lies inside the disk.
    fn run(&self, offset: u64, len: u64) -> Result<Extent, Errno> {
        let run = Extent::new(offset, len);
        match run.checked_end() {
            Some(end) if len == 0 || end <= self.size() => Ok(run),
            _ => Err(Errno::EFBIG),
        }
    }

    fn check_alignment(&self, offset: u64, len: u64, flags: OFlag) -> Result<(), Errno> {
        let sector = u64::from(self.logical_sector);
        if flags.contains(OFlag::O_DIRECT) && !(offset | len).is_multiple_of(sector) {
            return Err(Errno::EINVAL);
        }
        Ok(())
    }

    /// Tells the log about the first failure after a success, and the caller about each.
    fn answer<T>(&self, result: Result<T, DiskError>) -> Result<T, Errno> {
        match result {
            Ok(value) => {
                // The load keeps the cache line shared between threads while all is well.
                if self.failing.load(Ordering::Relaxed)
                    && self.failing.swap(false, Ordering::Relaxed)
                {
                    tracing::info!(file = %self.label, "requests succeed again");
                }
                Ok(value)
            }
            Err(error) => {
                let errno = errno_of(&error);
                let trouble = matches!(errno, Errno::EIO | Errno::ENOSPC);
                if trouble && !self.failing.swap(true, Ordering::Relaxed) {
                    tracing::error!(
                        file = %self.label,
                        %errno,
                        error = &error as &dyn std::error::Error,
                        "a request failed; further failures are not logged until one succeeds"
                    );
                }
                Err(errno)
            }
        }
    }
}

/// A file whose requests wait.
pub(super) struct HeldFile<'a> {
    file: &'a File,
    disk: RwLockWriteGuard<'a, Option<Arc<dyn Disk>>>,
}

impl HeldFile<'_> {
    /// Whether it still shows a disk.
    pub(super) fn is_shown(&self) -> bool {
        self.disk.is_some()
    }

    /// Lets the requests go on with `disk`, which has the same sectors.
    pub(super) fn release_with(mut self, disk: Arc<dyn Disk>) {
        let size = disk.geometry().size;
        let before = self.file.size.swap(size, Ordering::AcqRel);
        if before != size {
            tracing::info!(file = %self.file.label, before, size, "resized");
        }
        *self.disk = Some(disk);
    }
}

/// What the caller of a request is told. `ENOSPC` is kept apart because monitors pause a machine on it and can go on
/// once there is space; everything else that failed below is `EIO`.
fn errno_of(error: &DiskError) -> Errno {
    match error {
        DiskError::OutOfRange { .. } => Errno::EFBIG,
        DiskError::ReadOnly => Errno::EROFS,
        DiskError::Stopped(_) => Errno::EIO,
        DiskError::Io { source, .. } => match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Errno::ENOSPC,
            _ => Errno::EIO,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        disk::{Access, raw::RawDisk},
        storage::{
            Storage,
            memory::{MemoryStorage, Power},
        },
    };

    const SIZE: u64 = 1 << 20;
    const BUFFERED: OFlag = OFlag::O_RDWR;

    struct Fixture {
        power: Arc<Power>,
        file: File,
        recorders: Recorders,
    }

    impl Fixture {
        fn new() -> Self {
            let power = Power::new();
            let storage = MemoryStorage::new(&power);
            storage.set_len(SIZE).unwrap();
            let disk = RawDisk::open(storage, Access::ReadWrite).unwrap();
            let file = File::new("d.raw".into(), Arc::new(disk), Writability::Writable);
            Self {
                power,
                file,
                recorders: Recorders::new(1),
            }
        }

        fn write(&self, offset: u64, len: usize, flags: OFlag) -> Result<(), Errno> {
            self.file
                .write(offset, &vec![7; len], flags, &self.recorders)
        }

        fn read(&self, offset: u64, len: usize, flags: OFlag) -> Result<usize, Errno> {
            self.file
                .read(offset, &mut vec![0; len], flags, &self.recorders)
        }

        fn allocate(&self, offset: u64, len: u64, mode: i32) -> Result<(), Errno> {
            let mode = FallocateFlags::from_bits_retain(mode);
            self.file.allocate(offset, len, mode, &self.recorders)
        }
    }

    #[test]
    fn reads_end_and_writes_are_refused_at_the_end() {
        let fixture = Fixture::new();
        assert_eq!(fixture.read(SIZE - 100, 4096, BUFFERED), Ok(100));
        assert_eq!(fixture.read(SIZE, 4096, BUFFERED), Ok(0));
        assert_eq!(fixture.read(u64::MAX, 4096, BUFFERED), Ok(0));
        assert_eq!(fixture.write(SIZE - 512, 512, BUFFERED), Ok(()));
        for (offset, len) in [
            (SIZE - 512, 513),
            (SIZE, 1),
            (u64::MAX, 1),
            (u64::MAX - 1, 4096),
        ] {
            assert_eq!(
                fixture.write(offset, len, BUFFERED),
                Err(Errno::EFBIG),
                "{offset:#x}+{len}"
            );
        }
        assert_eq!(
            fixture.write(SIZE + 1, 0, BUFFERED),
            Ok(()),
            "nothing is always possible"
        );
    }

    #[test]
    fn direct_handles_keep_to_sectors() {
        let fixture = Fixture::new();
        let direct = BUFFERED | OFlag::O_DIRECT;
        for (offset, len) in [(0, 1), (1, 512), (512, 511), (256, 256)] {
            assert_eq!(fixture.read(offset, len, direct), Err(Errno::EINVAL));
            assert_eq!(fixture.write(offset, len, direct), Err(Errno::EINVAL));
            assert_eq!(fixture.write(offset, len, BUFFERED), Ok(()));
        }
        assert_eq!(fixture.read(512, 1536, direct), Ok(1536));
        assert_eq!(fixture.write(512, 1536, direct), Ok(()));
    }

    #[test]
    fn a_write_with_o_dsync_survives_a_power_cut_and_others_may_not() {
        for (flags, survives) in [
            (BUFFERED | OFlag::O_DSYNC, true),
            (BUFFERED | OFlag::O_SYNC, true),
            (BUFFERED, false),
        ] {
            let power = Power::new();
            let storage = MemoryStorage::new(&power);
            storage.set_len(SIZE).unwrap();
            storage.sync().unwrap();
            let disk = RawDisk::open(storage.clone(), Access::ReadWrite).unwrap();
            let file = File::new("d.raw".into(), Arc::new(disk), Writability::Writable);
            file.write(0, &[7; 512], flags, &Recorders::new(1)).unwrap();
            power.cut_after(0);
            power.restore(&mut || false);
            assert_eq!(storage.bytes()[0] == 7, survives, "{flags:?}");
        }
    }

    #[test]
    fn allocation_modes_do_what_a_disk_of_fixed_size_can() {
        let fixture = Fixture::new();
        fixture.write(0, 65536, BUFFERED).unwrap();
        let byte = |offset| {
            let mut buf = [9; 1];
            fixture
                .file
                .read(offset, &mut buf, BUFFERED, &fixture.recorders)
                .unwrap();
            buf[0]
        };
        let cases = [
            (0, 4096, 0x3, Ok(()), 0),
            (4096, 4096, 0x10, Ok(()), 0),
            (8192, 4096, 0x11, Ok(()), 0),
            (12288, 4096, 0x0, Ok(()), 7),
            (16384, 4096, 0x1, Ok(()), 7),
            (20480, SIZE, 0x0, Err(Errno::EFBIG), 7),
            (20480, SIZE, 0x10, Err(Errno::EFBIG), 7),
            (24576, 4096, 0x2, Err(Errno::EOPNOTSUPP), 7),
            (24576, 4096, 0x8, Err(Errno::EOPNOTSUPP), 7),
            (24576, 4096, 0x13, Err(Errno::EOPNOTSUPP), 7),
            (28672, u64::MAX, 0x3, Ok(()), 0),
        ];
        for (offset, len, mode, expected, left) in cases {
            assert_eq!(
                fixture.allocate(offset, len, mode),
                expected,
                "{mode:#x} at {offset:#x}"
            );
            assert_eq!(byte(offset), left, "{mode:#x} at {offset:#x}");
        }
        assert_eq!(fixture.allocate(SIZE, 4096, 0x3), Ok(()));
        fixture
            .file
            .set_writable(Writability::Refused(Refusal::ReadOnly));
        for mode in [0x0, 0x1, 0x3, 0x10] {
            assert_eq!(
                fixture.allocate(0, 4096, mode),
                Err(Errno::EROFS),
                "{mode:#x}"
            );
        }
    }

    #[test]
    fn seeking_finds_data_and_holes() {
        let fixture = Fixture::new();
        fixture.write(65536, 4096, BUFFERED).unwrap();
        let file = &fixture.file;
        let data = file.seek(0, Seek::Data).unwrap();
        assert!((4096..=65536).contains(&data), "{data}");
        let hole = file.seek(65536, Seek::Hole).unwrap();
        assert!((69632..SIZE).contains(&hole), "{hole}");
        assert_eq!(file.seek(0, Seek::Hole), Ok(0));
        assert_eq!(file.seek(hole, Seek::Data), Err(Errno::ENXIO));
        assert_eq!(file.seek(SIZE, Seek::Hole), Err(Errno::ENXIO));
        fixture.write(SIZE - 4096, 4096, BUFFERED).unwrap();
        assert_eq!(
            file.seek(SIZE - 4096, Seek::Hole),
            Ok(SIZE),
            "the end is a hole"
        );
    }

    #[test]
    fn refusing_writers_leaves_readers_and_flushes_alone() {
        let fixture = Fixture::new();
        let file = &fixture.file;
        assert_eq!(file.open(BUFFERED), Ok(Opened::ForWriting));
        assert_eq!(file.open(OFlag::O_RDONLY), Ok(Opened::ForReading));
        for (refusal, errno) in [
            (Refusal::ReadOnly, Errno::EROFS),
            (Refusal::IoError, Errno::EIO),
        ] {
            file.set_writable(Writability::Refused(refusal));
            assert_eq!(fixture.write(0, 512, BUFFERED), Err(errno));
            assert_eq!(fixture.allocate(0, 512, 0x3), Err(errno));
            assert_eq!(file.open(OFlag::O_WRONLY), Err(Errno::EROFS));
            assert_eq!(fixture.read(0, 512, BUFFERED), Ok(512));
            assert_eq!(file.flush(&fixture.recorders), Ok(()));
        }
        assert_eq!((file.writers(), file.readers()), (1, 1));
        file.release(Opened::ForWriting);
        assert_eq!((file.writers(), file.readers()), (0, 1));
        file.set_writable(Writability::Writable);
        assert_eq!(fixture.write(0, 512, BUFFERED), Ok(()));
    }

    #[test]
    fn a_withdrawn_disk_is_let_go() {
        let storage = MemoryStorage::new(&Power::new());
        storage.set_len(SIZE).unwrap();
        let disk: Arc<dyn Disk> = Arc::new(RawDisk::open(storage, Access::ReadWrite).unwrap());
        let file = File::new("d.raw".into(), disk.clone(), Writability::Writable);
        file.withdraw();
        assert_eq!(Arc::strong_count(&disk), 1);
        let recorders = Recorders::new(1);
        assert_eq!(
            file.read(0, &mut [0; 512], BUFFERED, &recorders),
            Err(Errno::EIO)
        );
        assert_eq!(
            file.write(0, &[0; 512], BUFFERED, &recorders),
            Err(Errno::EIO)
        );
        assert_eq!(file.flush(&recorders), Err(Errno::EIO));
        assert_eq!(file.seek(0, Seek::Data), Err(Errno::EIO));
    }

    #[test]
    fn a_full_file_system_is_told_apart_from_a_broken_one() {
        let fixture = Fixture::new();
        fixture.power.fail_after(0, io::ErrorKind::StorageFull);
        assert_eq!(fixture.write(0, 512, BUFFERED), Err(Errno::ENOSPC));
        let fixture = Fixture::new();
        fixture.power.fail_after(0, io::ErrorKind::Other);
        assert_eq!(fixture.write(0, 512, BUFFERED), Err(Errno::EIO));
        assert_eq!(fixture.recorders.snapshot().write.errors(), 1);
    }

    #[derive(Clone, Default)]
    struct Lines(Arc<parking_lot::Mutex<Vec<u8>>>);

    impl io::Write for Lines {
        fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
            self.0.lock().write(buf)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn trouble_is_logged_once_and_so_is_its_end() {
        let lines = Lines::default();
        let sink = lines.clone();
        let subscriber = tracing_subscriber::fmt()
            .with_writer(move || sink.clone())
            .finish();
        tracing::subscriber::with_default(subscriber, || {
            let fixture = Fixture::new();
            for _ in 0..3 {
                fixture.power.fail_after(0, io::ErrorKind::StorageFull);
                assert_eq!(fixture.write(0, 512, BUFFERED), Err(Errno::ENOSPC));
            }
            assert_eq!(fixture.write(SIZE, 512, BUFFERED), Err(Errno::EFBIG));
            for _ in 0..3 {
                assert_eq!(fixture.write(0, 512, BUFFERED), Ok(()));
            }
        });
        let logged = String::from_utf8(lines.0.lock().clone()).unwrap();
        assert_eq!(logged.matches("a request failed").count(), 1, "{logged}");
        assert_eq!(logged.matches("succeed again").count(), 1, "{logged}");
        assert_eq!(logged.lines().count(), 2, "{logged}");
    }
}
