//! Mounting, unmounting, and what a mount left behind by a killed process needs.
//!
//! # Why fuser does not mount
//! fuser can mount by itself, but reports a failure as text, falls back to a helper program, and unmounts by path when
//! a session ends, even if somebody else has mounted there since. The system calls of `point.rs` give errors that name their
//! cause and an unmount that first makes sure of what it unmounts.
//!
//! # What survives
//! A mount whose process was killed stays, and answers `ENOTCONN` to everyone, until [`Mounter::recover_stale`] or the next
//! [`mount()`] detaches it. Openers from before keep a dead file: their requests fail, none reaches a disk.
//! The shim never looks at its own mount through the file system, which could wait for itself.

use std::{
    fmt, io,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    str::FromStr,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use crossbeam_channel::{Receiver, bounded};
use nix::unistd::{getegid, geteuid};
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use super::{
    file::{File, HeldFile, Writability},
    files::Files,
    fuse::Glue,
    helper::HelperError,
    latency::Latencies,
    mounter::Mounter,
    point::{Detached, FUSE_DEVICE},
};
use crate::{base::ids::Name, disk::Disk};

/// Threads that serve a mount. A cold read or a forced write occupies one of them, so this is also the queue depth that
/// the images see. On images in the page cache 2 to 32 threads made no difference that stood out of the noise of two
/// CPUs; a thread costs up to 1 MiB for requests and 1 MiB for replies once it has seen the largest ones.
pub const THREADS_DEFAULT: usize = 16;

/// Who may open the files.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Visibility {
    /// Only the user this process runs as; root is refused as well if it is another user.
    Owner,
    /// Every user whom the files' owner and mode let in: what a monitor that runs under its own user needs.
    AllUsers,
}

/// Whom the files belong to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Owner {
    /// User id.
    pub user: u32,
    /// Group id.
    pub group: u32,
}

impl FromStr for Owner {
    type Err = String;

    /// Reads `UID` or `UID:GID`; the group of a lone user id has the same number.
    fn from_str(text: &str) -> Result<Self, String> {
        let (user, group) = text.split_once(':').unwrap_or((text, text));
        let parse = |id: &str| {
            id.parse::<u32>()
                .map_err(|_| format!("{id:?} is not a numeric id"))
        };
        Ok(Self {
            user: parse(user)?,
            group: parse(group)?,
        })
    }
}

/// Where and how to mount.
#[derive(Clone, Debug)]
pub struct MountOptions {
    /// An existing, empty folder.
    pub dir: PathBuf,
    /// Who may open the files.
    pub access: Visibility,
    /// Whom the files belong to.
    pub owner: Owner,
    /// Permission bits of the files; a file that refuses writers shows them without the writing ones.
    pub file_mode: u16,
    /// Threads that serve requests, at least one: [`THREADS_DEFAULT`] unless measured.
    pub threads: usize,
    /// Who makes the mount.
    pub mounter: Mounter,
}

impl MountOptions {
    /// A mount at `dir` that only this process's user may use.
    pub fn new(dir: impl Into<PathBuf>) -> Self {
        Self {
            dir: dir.into(),
            access: Visibility::Owner,
            owner: Owner {
                user: geteuid().as_raw(),
                group: getegid().as_raw(),
            },
            file_mode: 0o600,
            threads: THREADS_DEFAULT,
            mounter: Mounter::Itself,
        }
    }
}

/// A disk and the file it is shown as.
#[derive(Clone, Debug)]
pub struct MountedDisk {
    /// The folder the file lies in, by custom the machine's name; the root of the mount if there is none.
    pub folder: Option<Name>,
    /// The file's name without `.raw`, which the shim adds.
    pub file_name: Name,
    /// What the file holds.
    pub disk: Arc<dyn Disk>,
    /// Whether the guest may write, until [`Mount::set_writable`] says otherwise.
    pub writability: Writability,
}

/// The position of a disk in the list that was given to [`mount()`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FileIndex(pub usize);

/// Why a mount could not be made.
#[derive(Debug, thiserror::Error)]
pub enum MountError {
    /// The folder is not there or cannot be examined.
    #[error("cannot mount at {}: the folder cannot be examined", dir.display())]
    Unreachable {
        /// Where to mount.
        dir: PathBuf,
        /// What was said.
        #[source]
        source: io::Error,
    },
    /// Something other than a folder.
    #[error("cannot mount at {}: it is not a folder", .0.display())]
    NotAFolder(PathBuf),
    /// The mount would hide files.
    #[error("cannot mount at {}: the folder is not empty, and its files would be hidden; choose an empty one", .0.display())]
    NotEmpty(PathBuf),
    /// A living process serves disks there.
    #[error("cannot mount at {}: disks are already mounted there; unmount them first", .0.display())]
    AlreadyMounted(PathBuf),
    /// Two disks with the same place.
    #[error("two disks cannot both be shown as {0}; give one of them another name")]
    Duplicate(String),
    /// The folder belongs to somebody else than whoever wants to mount there.
    #[error("cannot mount at {}: the folder belongs to another user; chown it to the user of this host", .0.display())]
    NotYours(PathBuf),
    /// The mount helper did not mount.
    #[error("cannot mount at {}", dir.display())]
    Helper {
        /// Where to mount.
        dir: PathBuf,
        /// Why not.
        #[source]
        source: HelperError,
    },
    /// No FUSE on this host.
    #[error(
        "cannot open {FUSE_DEVICE}; load the module with `modprobe fuse` and give this process access to it"
    )]
    Device(#[source] io::Error),
    /// Not root.
    #[error("mounting at {} is not permitted; run as root, with CAP_SYS_ADMIN, or with a mount helper", .0.display())]
    NotPermitted(PathBuf),
    /// The kernel said no for another reason.
    #[error("cannot mount at {}", dir.display())]
    Kernel {
        /// Where to mount.
        dir: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// Mounted, but the kernel and this program did not come to terms, or no thread could be started.
    #[error("cannot serve the mount at {}", dir.display())]
    Serve {
        /// Where it was mounted.
        dir: PathBuf,
        /// What was said.
        #[source]
        source: io::Error,
    },
}

/// Why a mount is still there.
#[derive(Debug, thiserror::Error)]
pub enum UnmountError {
    /// Somebody uses it.
    #[error(
        "{} is in use: {writers} handles are open for writing, {readers} for reading; stop the machines and tools that use its files, or detach it",
        dir.display()
    )]
    Busy {
        /// Where it is mounted.
        dir: PathBuf,
        /// Handles open for writing.
        writers: usize,
        /// Handles open for reading. With none of either, a shell may have its working directory there.
        readers: usize,
    },
    /// Somebody mounted another file system over it.
    #[error("{} is hidden under another mount; unmount that first", .0.display())]
    Covered(PathBuf),
    /// The kernel said no for another reason.
    #[error("cannot unmount {}", dir.display())]
    Kernel {
        /// Where it is mounted.
        dir: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

/// How to unmount.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Unmount {
    /// Only if nobody uses it.
    IfUnused,
    /// In any case: the mount disappears from the tree, and the requests of those who hold files open fail with `EIO`.
    Detach,
}

/// Disks shown as files. Dropping it detaches the mount.
pub struct Mount {
    place: Place,
    files: Arc<Files>,
    /// Becomes `true` when the last thread has stopped serving.
    ended: watch::Receiver<bool>,
    /// Never carries anything: disconnected when the last thread has stopped serving.
    serving: Receiver<()>,
}

impl fmt::Debug for Mount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Mount")
            .field("place", &self.place)
            .finish_non_exhaustive()
    }
}

/// Shows `disks` as files below `options.dir`. A stale mount there is detached first.
pub fn mount(options: &MountOptions, disks: Vec<MountedDisk>) -> Result<Mount, MountError> {
    let files = Arc::new(Files::new(options, disks)?);
    let (attached, dir) = options.mounter.attach(&options.dir, options.access)?;
    let place = Place {
        dir,
        mounter: options.mounter.clone(),
        mark: attached.mark,
    };
    serve(attached.device, place.clone(), options, files.clone()).map_err(|source| {
        // Nothing was served yet, so nothing can be lost; that it cannot be detached would be no better an answer.
        let _ = place.detach(Unmount::Detach, &files);
        MountError::Serve {
            dir: place.dir,
            source,
        }
    })
}

impl Mount {
    /// Where it is mounted, as an absolute path without links.
    pub fn dir(&self) -> &Path {
        &self.place.dir
    }

    /// How long requests took since mounting.
    pub fn latencies(&self) -> Latencies {
        self.files.recorders().snapshot()
    }

    /// Handles open for writing on one disk. A handle counts until the kernel releases it, shortly after its last
    /// close.
    ///
    /// # Panics
    /// If the mount has no such disk.
    pub fn open_writers(&self, disk: FileIndex) -> usize {
        self.files.files()[disk.0].writers()
    }

    /// Decides whether the guest may write to one disk. When this returns, writes that were under way have ended and
    /// later ones are treated as told; flushes and reads go on all the time. A write that waits for something (a
    /// replica, in synchronous mode) is waited for as well.
    ///
    /// # Panics
    /// If the mount has no such disk.
    pub fn set_writable(&self, disk: FileIndex, writability: Writability) {
        self.files.files()[disk.0].set_writable(writability);
    }

    /// Lets all requests wait, on all disks, until what is returned is dropped or given other disks. Nothing if requests
    /// that are under way do not end `within` that time: those of a disk that failed, or that wait for a replica.
    pub fn hold(&self, within: Duration) -> Option<Held<'_>> {
        let until = Instant::now() + within;
        let files = self.files.files().iter();
        let held: Vec<_> = files.map(|file| file.hold(until)).collect::<Option<_>>()?;
        held.iter().all(HeldFile::is_shown).then_some(Held(held))
    }

    /// Becomes `true` once nobody can reach the disks any more: after an unmount, by this process or by a person.
    pub fn ended(&self) -> watch::Receiver<bool> {
        self.ended.clone()
    }

    /// Blocks until [`ended`](Self::ended) is `true`.
    pub fn wait(&self) {
        // The channel carries nothing, so the only answer is that its other end is gone.
        let _ = self.serving.recv();
    }

    /// Unmounts. On success no request is under way, none will reach a disk, and the disks are let go of. On failure
    /// everything is as it was. A mount that has ended already is a success.
    pub fn unmount(&self, how: Unmount) -> Result<(), UnmountError> {
        // Once it has ended, whatever is mounted there is somebody else's, even under the same device number.
        if !*self.ended.borrow() {
            self.place.detach(how, &self.files)?;
            tracing::info!(dir = %self.dir().display(), "unmounted");
        }
        self.files.withdraw();
        Ok(())
    }
}

/// Files whose requests wait: no disk is in use.
pub struct Held<'a>(Vec<HeldFile<'a>>);

impl fmt::Debug for Held<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Held").field(&self.0.len()).finish()
    }
}

impl Held<'_> {
    /// Lets the requests go on with other disks, in the order of those given to [`mount()`]. A size that differs is seen
    /// by whoever asks for it within a second, which is how long the kernel believes the old one.
    pub fn release_with(self, disks: Vec<Arc<dyn Disk>>) {
        for (file, disk) in self.0.into_iter().zip(disks) {
            file.release_with(disk);
        }
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        if let Err(error) = self.unmount(Unmount::Detach) {
            tracing::warn!(
                error = &error as &dyn std::error::Error,
                "a mount is left behind"
            );
            self.files.withdraw();
        }
    }
}

/// Where a mount is attached.
#[derive(Clone, Debug)]
struct Place {
    dir: PathBuf,
    mounter: Mounter,
    /// What the kernel's table calls the mount, to know it again.
    mark: String,
}

impl Place {
    /// Takes the mount out of the tree, if it is there and nobody else's is on top of it. Only for a mount that has not
    /// ended: the kernel does not give its device number to another one before.
    fn detach(&self, how: Unmount, files: &Files) -> Result<(), UnmountError> {
        let writers = files.files().iter().map(File::writers).sum();
        let readers = files.files().iter().map(File::readers).sum();
        let busy = UnmountError::Busy {
            dir: self.dir.clone(),
            writers,
            readers,
        };
        match self.mounter.detach(&self.dir, &self.mark, how) {
            // A person unmounted it lazily: only those who hold files open are left.
            Ok(Detached::Gone) if how == Unmount::IfUnused && writers + readers > 0 => Err(busy),
            Ok(Detached::Done | Detached::Gone) => Ok(()),
            Ok(Detached::Busy) => Err(busy),
            Ok(Detached::Covered) => Err(UnmountError::Covered(self.dir.clone())),
            Err(source) => Err(UnmountError::Kernel {
                dir: self.dir.clone(),
                source,
            }),
        }
    }
}

/// Comes to terms with the kernel and starts the threads.
fn serve(
    device: OwnedFd,
    place: Place,
    options: &MountOptions,
    files: Arc<Files>,
) -> io::Result<Mount> {
    let access = match options.access {
        Visibility::Owner => fuser::SessionACL::Owner,
        Visibility::AllUsers => fuser::SessionACL::All,
    };
    let mut config = fuser::Config::default();
    config.n_threads = Some(options.threads.max(1));
    let session = fuser::Session::from_fd(Glue(files.clone()), device, access, config)?;
    let (ended_sender, ended) = watch::channel(false);
    let (serving_sender, serving) = bounded(0);
    let mount = Mount {
        place: place.clone(),
        files: files.clone(),
        ended,
        serving,
    };
    thread::Builder::new().name("shim".into()).spawn(move || {
        run(session, &place, &files);
        ended_sender.send_replace(true);
        drop(serving_sender);
    })?;
    tracing::info!(dir = %mount.dir().display(), disks = mount.files.files().len(), "mounted");
    Ok(mount)
}

/// Serves until the kernel ends the connection. If serving fails before that, the guest is better off with errors than
/// with requests that nobody answers.
fn run(session: fuser::Session<Glue>, place: &Place, files: &Files) {
    let dir = place.dir.display();
    match session.run() {
        Ok(()) => tracing::info!(%dir, "the mount has ended"),
        Err(error) => {
            tracing::error!(%dir, %error, "the mount is given up: serving it failed");
            if let Err(error) = place.detach(Unmount::Detach, files) {
                tracing::warn!(
                    error = &error as &dyn std::error::Error,
                    "a mount is left behind"
                );
            }
            files.withdraw();
        }
    }
}
