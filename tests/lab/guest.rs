//! A guest that goes on: it writes until it is told to end, and after an error tries again until its disks are back.

use std::{
    fs::File,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use nix::fcntl::OFlag;

use super::history::History;
use crate::support::open_direct;

/// Between two writes: what a lap needs is many moments, not many bytes.
const PACE: Duration = Duration::from_millis(2);
/// After an error.
const AGAIN: Duration = Duration::from_millis(50);
/// How long a guest may make no progress before a test gives up; it is no measure of speed.
const PATIENCE: Duration = Duration::from_mins(1);

/// What others see of a guest while it runs.
#[derive(Debug, Default)]
struct Progress {
    stop: AtomicBool,
    begun: AtomicU64,
    answered: AtomicU64,
    flushed: AtomicU64,
    errors: AtomicU64,
}

/// A guest of one machine.
#[derive(Debug)]
pub(super) struct Guest {
    progress: Arc<Progress>,
    thread: JoinHandle<Result<History, String>>,
}

impl Guest {
    pub(super) fn start(disks: Vec<PathBuf>, history: History) -> Self {
        let progress = Arc::new(Progress::default());
        progress.begun.store(history.last(), Ordering::Release);
        let shared = Arc::clone(&progress);
        let thread = thread::spawn(move || run(&disks, history, &shared));
        Self { progress, thread }
    }

    /// The last write that was begun.
    pub(super) fn begun(&self) -> u64 {
        self.progress.begun.load(Ordering::Acquire)
    }

    /// The last write that was answered since it started; 0 if none was.
    pub(super) fn answered(&self) -> u64 {
        self.progress.answered.load(Ordering::Acquire)
    }

    /// The last write that a flush covered since it started; 0 if none was.
    pub(super) fn flushed(&self) -> u64 {
        self.progress.flushed.load(Ordering::Acquire)
    }

    /// Errors it was given.
    pub(super) fn errors(&self) -> u64 {
        self.progress.errors.load(Ordering::Acquire)
    }

    /// Waits for this many more writes.
    pub(super) fn wait_written(&self, more: u64) {
        let until = self.begun() + more;
        let began = Instant::now();
        while self.answered() < until && !self.thread.is_finished() {
            assert!(
                began.elapsed() < PATIENCE,
                "the guest makes no progress: {:?}",
                self.progress
            );
            thread::sleep(PACE);
        }
    }

    /// Ends it: what it wrote, or what it found wrong.
    pub(super) fn end(self) -> Result<History, String> {
        self.progress.stop.store(true, Ordering::Release);
        let began = Instant::now();
        while !self.thread.is_finished() {
            assert!(
                began.elapsed() < PATIENCE,
                "the guest hangs: {:?}",
                self.progress
            );
            thread::sleep(PACE);
        }
        self.thread.join().expect("a guest does not panic")
    }
}

fn run(disks: &[PathBuf], mut history: History, progress: &Progress) -> Result<History, String> {
    let stopped = || progress.stop.load(Ordering::Acquire);
    while !stopped() {
        let open = |path: &PathBuf| open_direct(path, OFlag::empty());
        let files: Result<Vec<File>, _> = disks.iter().map(open).collect();
        if let Ok(files) = files
            && let Ok(found) = history.settle(&files)
        {
            found?;
            while !stopped() && step(&files, &mut history, progress).is_ok() {
                thread::sleep(PACE);
            }
        }
        if !stopped() {
            progress.errors.fetch_add(1, Ordering::AcqRel);
            thread::sleep(AGAIN);
        }
    }
    Ok(history)
}

/// One write, and now and then a flush of all disks.
fn step(files: &[File], history: &mut History, progress: &Progress) -> std::io::Result<()> {
    progress.begun.store(history.last() + 1, Ordering::Release);
    let serial = history.write(files)?;
    progress.answered.store(serial, Ordering::Release);
    if history.flushes() {
        files.iter().try_for_each(File::sync_data)?;
        progress.flushed.store(serial, Ordering::Release);
    }
    Ok(())
}
