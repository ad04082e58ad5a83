//! What is measured: a file, a block device, or a test file of our own in a folder.
//!
//! A file that somebody gave us is only read, unless writing was allowed in so many words: a benchmark that overwrote
//! a disk would be the worst data loss this program could cause.

use std::{
    convert::Infallible,
    fs::{self, File, OpenOptions},
    io::{self, Seek, SeekFrom, Write},
    os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    str::FromStr,
};

use nix::{fcntl::OFlag, sys::stat};

use super::{engine::Noise, workload::Workload};
use crate::base::units::{Bytes, MIB, to_usize};

/// A target as a user names it: `PATH`, or `LABEL=PATH` where the label has no `/`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Against {
    /// What stands for it in the report.
    pub label: Option<String>,
    /// Where it is.
    pub path: PathBuf,
}

impl FromStr for Against {
    type Err = Infallible;

    fn from_str(text: &str) -> Result<Self, Infallible> {
        let (label, path) = match text.split_once('=') {
            Some((label, path)) if !label.is_empty() && !label.contains('/') => {
                (Some(label.to_owned()), path)
            }
            _ => (None, text),
        };
        Ok(Self {
            label,
            path: path.into(),
        })
    }
}

/// What may happen to the content of a target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// It stays as it is: only reads.
    Keep,
    /// It may be overwritten.
    Destroy,
}

/// Why a target cannot be measured.
#[derive(Debug, thiserror::Error)]
pub enum TargetError {
    /// Nothing there.
    #[error("{} does not exist", .0.display())]
    Missing(PathBuf),
    /// Something that holds no bytes.
    #[error("{} is neither a file nor a block device nor a folder", .0.display())]
    Kind(PathBuf),
    /// No write access.
    #[error("{} cannot be written: its file system is mounted read-only or its permissions forbid it", .0.display())]
    ReadOnly(PathBuf),
    /// A device that somebody uses.
    #[error("{} is in use (mounted, or part of another device): it is not overwritten", .0.display())]
    InUse(PathBuf),
    /// The file system has no direct I/O.
    #[error("{} cannot be opened for direct I/O (O_DIRECT): choose a file on another file system", .0.display())]
    NoDirect(PathBuf),
    /// Less than every worker needs.
    #[error("{} has {}, but {workload} needs at least {}", path.display(), Bytes(*len), Bytes(*needed))]
    TooSmall {
        /// The target.
        path: PathBuf,
        /// What it has, in bytes.
        len: u64,
        /// The most demanding workload.
        workload: Workload,
        /// What that needs, in bytes.
        needed: u64,
    },
    /// Opening, filling or measuring it failed.
    #[error("cannot {doing} {}", path.display())]
    Io {
        /// What was tried.
        doing: &'static str,
        /// On which file.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
}

/// An open target. A test file of our own is removed when it is dropped.
#[derive(Debug)]
pub struct Target {
    label: String,
    path: PathBuf,
    file: File,
    len: u64,
    writable: bool,
    own: bool,
}

impl Target {
    /// Opens `path`. In a folder a test file of `own_bytes` is made and filled; an existing file or device is only
    /// read unless its content may be destroyed. `label` stands for it in the report; without one its path does.
    pub fn open(
        path: &Path,
        label: Option<&str>,
        content: Content,
        own_bytes: u64,
    ) -> Result<Self, TargetError> {
        let kind = match fs::metadata(path) {
            Ok(data) => data.file_type(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(TargetError::Missing(path.to_owned()));
            }
            Err(error) => return Err(failed("look at", path)(error)),
        };
        let label = label.map_or_else(|| path.display().to_string(), str::to_owned);
        if kind.is_dir() {
            let file = path.join(format!(".understudy-bench-{}", std::process::id()));
            return Self::create(file, label, own_bytes);
        }
        if !kind.is_file() && !kind.is_block_device() {
            return Err(TargetError::Kind(path.to_owned()));
        }
        let writable = content == Content::Destroy;
        let file = open_direct(path, writable)?;
        // Files and devices alike tell their length at their end.
        let len = (&file)
            .seek(SeekFrom::End(0))
            .map_err(failed("measure", path))?;
        Ok(Self {
            label,
            path: path.to_owned(),
            file,
            len,
            writable,
            own: false,
        })
    }

    /// Makes a test file: written in full, so that no figure is that of a hole or of a first write.
    fn create(path: PathBuf, label: String, len: u64) -> Result<Self, TargetError> {
        let created = OpenOptions::new().write(true).create_new(true).open(&path);
        let mut plain = created.map_err(|error| match error.kind() {
            io::ErrorKind::ReadOnlyFilesystem | io::ErrorKind::PermissionDenied => {
                TargetError::ReadOnly(path.clone())
            }
            _ => failed("create", &path)(error),
        })?;
        let filled = fill(&mut plain, len)
            .map_err(failed("fill", &path))
            .and_then(|()| open_direct(&path, true));
        match filled {
            Ok(file) => Ok(Self {
                label,
                path,
                file,
                len,
                writable: true,
                own: true,
            }),
            Err(error) => {
                // The first error is the one worth telling.
                let _ = fs::remove_file(&path);
                Err(error)
            }
        }
    }

    /// What stands for it in a report.
    pub fn label(&self) -> &str {
        &self.label
    }

    /// Whether write workloads may run on it.
    pub fn writable(&self) -> bool {
        self.writable
    }

    pub(super) fn file(&self) -> &File {
        &self.file
    }

    pub(super) fn len(&self) -> u64 {
        self.len
    }

    /// Refuses a workload whose workers would all meet on the same few bytes.
    pub(super) fn check_size(&self, workload: Workload) -> Result<(), TargetError> {
        let needed = workload.operation_bytes * u64::from(workload.depth);
        if self.len < needed {
            return Err(TargetError::TooSmall {
                path: self.path.clone(),
                len: self.len,
                workload,
                needed,
            });
        }
        Ok(())
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        if self.own
            && let Err(error) = fs::remove_file(&self.path)
        {
            tracing::warn!("cannot remove {}: {error}", self.path.display());
        }
    }
}

fn open_direct(path: &Path, write: bool) -> Result<File, TargetError> {
    let mut flags = OFlag::O_DIRECT;
    if write
        && let Ok(data) = fs::metadata(path)
        && data.file_type().is_block_device()
    {
        if is_read_only(data.rdev()) {
            return Err(TargetError::ReadOnly(path.to_owned()));
        }
        // On a block device, and without O_CREAT, this fails while it is mounted (open(2)).
        flags |= OFlag::O_EXCL;
    }
    let opened = OpenOptions::new()
        .read(true)
        .write(write)
        .custom_flags(flags.bits())
        .open(path);
    opened.map_err(|error| match error.kind() {
        io::ErrorKind::ReadOnlyFilesystem | io::ErrorKind::PermissionDenied if write => {
            TargetError::ReadOnly(path.to_owned())
        }
        io::ErrorKind::ResourceBusy => TargetError::InUse(path.to_owned()),
        io::ErrorKind::InvalidInput => TargetError::NoDirect(path.to_owned()),
        _ => failed("open", path)(error),
    })
}

/// Linux opens a read-only device for writing and fails the writes, so it is asked before.
fn is_read_only(device: u64) -> bool {
    let (major, minor) = (stat::major(device), stat::minor(device));
    fs::read_to_string(format!("/sys/dev/block/{major}:{minor}/ro"))
        .is_ok_and(|answer| answer.trim() == "1")
}

fn fill(file: &mut File, len: u64) -> io::Result<()> {
    let mut noise = Noise::new(0);
    let mut chunk = vec![0; to_usize(MIB)];
    let mut left = len;
    while left > 0 {
        noise.fill(&mut chunk);
        let step = left.min(MIB);
        file.write_all(&chunk[..to_usize(step)])?;
        left -= step;
    }
    file.sync_all()
}

fn failed(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> TargetError {
    let path = path.to_owned();
    move |source| TargetError::Io {
        doing,
        path,
        source,
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    /// A loop device over a file, detached when it is dropped.
    struct Loop(String);

    impl Loop {
        /// Nothing without the right or the means to attach one.
        fn attach(file: &Path, options: &[&str]) -> Option<Self> {
            let mut losetup = Command::new("losetup");
            losetup.args(["--find", "--show"]).args(options).arg(file);
            match losetup.output() {
                Ok(output) if output.status.success() => {
                    let device = String::from_utf8(output.stdout).unwrap();
                    Some(Self(device.trim().to_owned()))
                }
                other => {
                    eprintln!("SKIPPED: no loop device: {other:?}");
                    None
                }
            }
        }
    }

    impl Drop for Loop {
        fn drop(&mut self) {
            let _ = Command::new("losetup").args(["-d", &self.0]).status();
        }
    }

    fn open(device: &Loop, content: Content) -> Result<Target, TargetError> {
        Target::open(Path::new(&device.0), None, content, MIB)
    }

    #[test]
    fn a_device_in_use_is_not_overwritten() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("disk");
        fs::write(&file, vec![0; 4 << 20]).unwrap();
        let Some(device) = Loop::attach(&file, &[]) else {
            return;
        };
        let target = open(&device, Content::Destroy).unwrap();
        assert_eq!(target.len(), 4 << 20);
        // Whoever claims a device as a mount does, that is with O_EXCL, is its user.
        let refused = open(&device, Content::Destroy).unwrap_err();
        assert!(matches!(refused, TargetError::InUse(_)), "{refused}");
        assert!(!open(&device, Content::Keep).unwrap().writable());
    }

    #[test]
    fn a_read_only_device_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("disk");
        fs::write(&file, vec![0; 1 << 20]).unwrap();
        let Some(device) = Loop::attach(&file, &["--read-only"]) else {
            return;
        };
        let refused = open(&device, Content::Destroy).unwrap_err();
        assert!(matches!(refused, TargetError::ReadOnly(_)), "{refused}");
        open(&device, Content::Keep).unwrap();
    }

    #[test]
    fn labels_stand_before_paths() {
        let parse = |text: &str| text.parse::<Against>().unwrap();
        assert_eq!(parse("host=/a/b=c").label.as_deref(), Some("host"));
        assert_eq!(parse("host=/a/b=c").path, Path::new("/a/b=c"));
        assert_eq!(parse("/a/b=c").label, None);
        assert_eq!(parse("=x").path, Path::new("=x"));
    }
}
