//! Glue between the kernel's requests, as fuser parses them, and [`Files`]. No decision is taken here.
//!
//! # What is negotiated, and why
//! `ASYNC_DIO`: without it a direct request blocks its submitter for the whole round trip, and a queue depth of 32
//! becomes 1. `max_background`: direct requests count as background ones; over the limit the submitter sleeps inside
//! `io_submit`, and with it all of a machine's disks, so the limit is far above any queue depth.
//! Every file is opened with `DIRECT_IO` (no page cache: nothing stale after a failover, nothing dirty that the shim
//! has not seen) and `PARALLEL_DIRECT_WRITES` (writes share the inode's lock; without it they take turns).
//! Not asked for: the write-back cache, which would delay writes past a cut, and `DIRECT_IO_ALLOW_MMAP`, which turns
//! the file back into a cached one. `mmap` with `MAP_SHARED` therefore fails with `ENODEV`.

use std::{cell::RefCell, ffi::OsStr, io, path::Path, sync::Arc, time::Duration};

use fuser::{
    AccessFlags, Errno as FuseErrno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags,
    Generation, INodeNo, InitFlags, IoctlFlags, KernelConfig, LockOwner, OpenFlags, RenameFlags,
    ReplyAttr, ReplyCreate, ReplyData, ReplyDirectory, ReplyEmpty, ReplyEntry, ReplyIoctl,
    ReplyLseek, ReplyOpen, ReplyStatfs, ReplyWrite, ReplyXattr, Request, TimeOrNow, WriteFlags,
};
use nix::{
    errno::Errno,
    fcntl::{FallocateFlags, OFlag},
};

use super::{
    file::{Opened, Seek},
    files::{Attributes, Change, Files, Inode, Kind},
};
use crate::base::{
    limits::REQUEST_BYTES_MAX,
    units::{BLOCK_BYTES, to_u64, to_usize},
};

/// Direct requests that the kernel keeps under way for all openers together: 32 in flight on each of 8 queues, twice
/// over because a request larger than [`REQUEST_BYTES_MAX`] is split, twice over again to stay clear of the limit.
const BACKGROUND_MAX: u16 = 1024;
/// Where the kernel calls the mount congested: its own share of three quarters.
const CONGESTED: u16 = BACKGROUND_MAX / 4 * 3;
/// How long the kernel may remember attributes and names. Neither changes but for the permission bits.
const REMEMBER: Duration = Duration::from_secs(1);
/// Longest name that statfs(2) reports, in bytes.
const NAME_BYTES: u32 = 255;
/// The handle of an opener that only reads, and that of one that writes.
const HANDLE_READER: FileHandle = FileHandle(0);
const HANDLE_WRITER: FileHandle = FileHandle(1);

thread_local! {
    /// What the reading thread's requests are read into; grown to the largest request once.
    static BUFFER: RefCell<AlignedBuffer> = const { RefCell::new(AlignedBuffer(Vec::new())) };
}

/// A buffer that starts on a page boundary, as direct I/O of an image below would need.
struct AlignedBuffer(Vec<u8>);

impl AlignedBuffer {
    fn first(&mut self, len: usize) -> &mut [u8] {
        let page = to_usize(BLOCK_BYTES);
        if self.0.len() < len + page {
            self.0.resize(len + page, 0);
        }
        let start = self.0.as_ptr().align_offset(page);
        &mut self.0[start..start + len]
    }
}

/// The file system that fuser serves.
#[derive(Debug)]
pub(super) struct Glue(pub Arc<Files>);

impl Glue {
    fn attr(&self, inode: INodeNo) -> Result<FileAttr, Errno> {
        self.0.attributes(Inode(inode.0)).map(file_attr)
    }

    fn read_into(
        &self,
        inode: INodeNo,
        offset: u64,
        buf: &mut [u8],
        flags: OpenFlags,
    ) -> Result<usize, Errno> {
        let file = self.0.file(Inode(inode.0))?;
        file.read(
            offset,
            buf,
            OFlag::from_bits_retain(flags.0),
            self.0.recorders(),
        )
    }
}

impl Filesystem for Glue {
    fn init(&mut self, _: &Request, config: &mut KernelConfig) -> io::Result<()> {
        // Kernels since 3.13 offer it; an older one serves the same bytes, more slowly.
        if let Err(missing) = config.add_capabilities(InitFlags::FUSE_ASYNC_DIO) {
            tracing::warn!(
                ?missing,
                "the kernel lacks a FUSE capability: direct requests take turns"
            );
        }
        let refused = |nearest| io::Error::other(format!("fuser wants {nearest} at most"));
        let request_bytes = u32::try_from(REQUEST_BYTES_MAX).map_err(io::Error::other)?;
        config.set_max_write(request_bytes).map_err(refused)?;
        config
            .set_max_background(BACKGROUND_MAX)
            .map_err(|nearest| refused(u32::from(nearest)))?;
        config
            .set_congestion_threshold(CONGESTED)
            .map_err(|nearest| refused(u32::from(nearest)))?;
        Ok(())
    }

    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let found = self
            .0
            .child(Inode(parent.0), name)
            .and_then(|inode| self.0.attributes(inode));
        match found {
            Ok(attributes) => reply.entry(&REMEMBER, &file_attr(attributes), Generation(0)),
            Err(errno) => reply.error(told(errno)),
        }
    }

    fn getattr(&self, _: &Request, ino: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        match self.attr(ino) {
            Ok(attr) => reply.attr(&REMEMBER, &attr),
            Err(errno) => reply.error(told(errno)),
        }
    }

    fn setattr(
        &self,
        _: &Request,
        ino: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        _atime: Option<TimeOrNow>,
        _mtime: Option<TimeOrNow>,
        _ctime: Option<std::time::SystemTime>,
        _: Option<FileHandle>,
        _crtime: Option<std::time::SystemTime>,
        _chgtime: Option<std::time::SystemTime>,
        _bkuptime: Option<std::time::SystemTime>,
        _: Option<fuser::BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let change = Change {
            size,
            permissions: mode.is_some() || uid.is_some() || gid.is_some(),
        };
        let allowed = self.0.check_change(Inode(ino.0), &change);
        match allowed.and_then(|()| self.attr(ino)) {
            Ok(attr) => reply.attr(&REMEMBER, &attr),
            Err(errno) => reply.error(told(errno)),
        }
    }

    fn open(&self, _: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        let file = self.0.file(Inode(ino.0));
        match file.and_then(|file| file.open(OFlag::from_bits_retain(flags.0))) {
            Ok(opened) => {
                let handle = match opened {
                    Opened::ForReading => HANDLE_READER,
                    Opened::ForWriting => HANDLE_WRITER,
                };
                let how = FopenFlags::FOPEN_DIRECT_IO
                    | FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES
                    | FopenFlags::FOPEN_NOFLUSH;
                reply.opened(handle, how);
            }
            Err(errno) => reply.error(told(errno)),
        }
    }

    fn release(
        &self,
        _: &Request,
        ino: INodeNo,
        fh: FileHandle,
        _: OpenFlags,
        _: Option<LockOwner>,
        _flush: bool,
        reply: ReplyEmpty,
    ) {
        let opened = if fh == HANDLE_WRITER {
            Opened::ForWriting
        } else {
            Opened::ForReading
        };
        let file = self.0.file(Inode(ino.0));
        finish(file.map(|file| file.release(opened)), reply);
    }

    fn read(
        &self,
        _: &Request,
        ino: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        flags: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        // The kernel keeps to the size that was negotiated; a larger request would not fit the buffer's bound.
        if u64::from(size) > REQUEST_BYTES_MAX {
            return reply.error(FuseErrno::EINVAL);
        }
        BUFFER.with_borrow_mut(|buffer| {
            let buf = buffer.first(to_usize(u64::from(size)));
            match self.read_into(ino, offset, buf, flags) {
                Ok(count) => reply.data(&buf[..count]),
                Err(errno) => reply.error(told(errno)),
            }
        });
    }

    fn write(
        &self,
        _: &Request,
        ino: INodeNo,
        _: FileHandle,
        offset: u64,
        data: &[u8],
        _: WriteFlags,
        flags: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let flags = OFlag::from_bits_retain(flags.0);
        let file = self.0.file(Inode(ino.0));
        match file.and_then(|file| file.write(offset, data, flags, self.0.recorders())) {
            Ok(()) => match u32::try_from(data.len()) {
                Ok(count) => reply.written(count),
                Err(_) => reply.error(FuseErrno::EINVAL),
            },
            Err(errno) => reply.error(told(errno)),
        }
    }

    /// Not a promise of durability: the kernel asks it at each close, if at all.
    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        reply.ok();
    }

    fn fsync(&self, _: &Request, ino: INodeNo, _: FileHandle, _datasync: bool, reply: ReplyEmpty) {
        // Never ENOSYS: the kernel would remember it and call every later fsync a success.
        let file = self.0.file(Inode(ino.0));
        finish(file.and_then(|file| file.flush(self.0.recorders())), reply);
    }

    fn fallocate(
        &self,
        _: &Request,
        ino: INodeNo,
        _: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        let mode = FallocateFlags::from_bits_retain(mode);
        let file = self.0.file(Inode(ino.0));
        finish(
            file.and_then(|file| file.allocate(offset, length, mode, self.0.recorders())),
            reply,
        );
    }

    fn lseek(
        &self,
        _: &Request,
        ino: INodeNo,
        _: FileHandle,
        offset: i64,
        whence: i32,
        reply: ReplyLseek,
    ) {
        match self.seek(ino, offset, whence) {
            Ok(found) => reply.offset(found),
            Err(errno) => reply.error(told(errno)),
        }
    }

    fn readdir(
        &self,
        _: &Request,
        ino: INodeNo,
        _: FileHandle,
        offset: u64,
        mut reply: ReplyDirectory,
    ) {
        let entries = match self.0.entries(Inode(ino.0)) {
            Ok(entries) => entries,
            Err(errno) => return reply.error(told(errno)),
        };
        for (position, (inode, kind, name)) in
            entries.into_iter().enumerate().skip(to_usize(offset))
        {
            // The offset of an entry is that of the one after it.
            if reply.add(
                INodeNo(inode.0),
                to_u64(position + 1),
                file_type(kind),
                name,
            ) {
                break;
            }
        }
        reply.ok();
    }

    fn fsyncdir(&self, _: &Request, _: INodeNo, _: FileHandle, _datasync: bool, reply: ReplyEmpty) {
        reply.ok();
    }

    fn statfs(&self, _: &Request, _: INodeNo, reply: ReplyStatfs) {
        let usage = self.0.usage();
        let block = u32::try_from(BLOCK_BYTES).expect("a block is 4096 bytes");
        // Loop devices take this block size as their discard granularity.
        reply.statfs(usage.blocks, 0, 0, usage.files, 0, block, NAME_BYTES, block);
    }

    fn access(&self, _: &Request, _: INodeNo, _: AccessFlags, reply: ReplyEmpty) {
        // With `default_permissions` the kernel has decided already.
        reply.ok();
    }

    fn getxattr(&self, _: &Request, _: INodeNo, _: &OsStr, _size: u32, reply: ReplyXattr) {
        // Remembered by the kernel, which says EOPNOTSUPP by itself from then on.
        reply.error(FuseErrno::ENOSYS);
    }

    fn listxattr(&self, _: &Request, _: INodeNo, _size: u32, reply: ReplyXattr) {
        reply.error(FuseErrno::ENOSYS);
    }

    fn ioctl(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        _: IoctlFlags,
        _cmd: u32,
        _in_data: &[u8],
        _out_size: u32,
        reply: ReplyIoctl,
    ) {
        reply.error(FuseErrno::ENOTTY);
    }

    fn create(
        &self,
        _: &Request,
        _: INodeNo,
        _: &OsStr,
        _mode: u32,
        _umask: u32,
        _flags: i32,
        reply: ReplyCreate,
    ) {
        reply.error(FuseErrno::EPERM);
    }

    fn mknod(
        &self,
        _: &Request,
        _: INodeNo,
        _: &OsStr,
        _mode: u32,
        _umask: u32,
        _rdev: u32,
        reply: ReplyEntry,
    ) {
        reply.error(FuseErrno::EPERM);
    }

    fn mkdir(
        &self,
        _: &Request,
        _: INodeNo,
        _: &OsStr,
        _mode: u32,
        _umask: u32,
        reply: ReplyEntry,
    ) {
        reply.error(FuseErrno::EPERM);
    }

    fn unlink(&self, _: &Request, _: INodeNo, _: &OsStr, reply: ReplyEmpty) {
        reply.error(FuseErrno::EPERM);
    }

    fn rmdir(&self, _: &Request, _: INodeNo, _: &OsStr, reply: ReplyEmpty) {
        reply.error(FuseErrno::EPERM);
    }

    fn symlink(&self, _: &Request, _: INodeNo, _: &OsStr, _target: &Path, reply: ReplyEntry) {
        reply.error(FuseErrno::EPERM);
    }

    fn link(&self, _: &Request, _: INodeNo, _: INodeNo, _: &OsStr, reply: ReplyEntry) {
        reply.error(FuseErrno::EPERM);
    }

    fn rename(
        &self,
        _: &Request,
        _: INodeNo,
        _: &OsStr,
        _: INodeNo,
        _: &OsStr,
        _: RenameFlags,
        reply: ReplyEmpty,
    ) {
        reply.error(FuseErrno::EPERM);
    }
}

impl Glue {
    fn seek(&self, inode: INodeNo, offset: i64, whence: i32) -> Result<i64, Errno> {
        // The other kinds of seeking are the kernel's; these two numbers are those of lseek(2).
        let target = match whence {
            3 => Seek::Data,
            4 => Seek::Hole,
            _ => return Err(Errno::EINVAL),
        };
        let offset = u64::try_from(offset).map_err(|_| Errno::ENXIO)?;
        let found = self.0.file(Inode(inode.0))?.seek(offset, target)?;
        i64::try_from(found).map_err(|_| Errno::EOVERFLOW)
    }
}

fn finish(result: Result<(), Errno>, reply: ReplyEmpty) {
    match result {
        Ok(()) => reply.ok(),
        Err(errno) => reply.error(told(errno)),
    }
}

fn told(errno: Errno) -> FuseErrno {
    FuseErrno::from_i32(errno as i32)
}

fn file_type(kind: Kind) -> FileType {
    match kind {
        Kind::Folder => FileType::Directory,
        Kind::File => FileType::RegularFile,
    }
}

fn file_attr(attributes: Attributes) -> FileAttr {
    FileAttr {
        ino: INodeNo(attributes.inode.0),
        size: attributes.size,
        // A disk reserves its size; what it really takes is the image's business, and asking for each stat is slow.
        blocks: attributes.size / 512,
        atime: attributes.modified,
        mtime: attributes.modified,
        ctime: attributes.modified,
        crtime: attributes.modified,
        kind: file_type(attributes.kind),
        perm: attributes.mode,
        nlink: attributes.links,
        uid: attributes.owner.user,
        gid: attributes.owner.group,
        rdev: 0,
        blksize: u32::try_from(BLOCK_BYTES).expect("a block is 4096 bytes"),
        flags: 0,
    }
}
