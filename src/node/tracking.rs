//! Restoring or beginning the tracking of a machine, and keeping it fresh while the machine runs.

use std::{fs, io, path::Path, sync::Arc, thread, time::Duration};

use crossbeam_channel::{RecvTimeoutError, Sender, bounded};
use parking_lot::Mutex;

use super::{primary::PrimaryError, sources::Source};
use crate::{
    base::{
        chain::chain,
        clock::Clock,
        ids::{MachineId, Name},
        limits::{DELTA_FRAMES_MAX, PRESERVE_BYTES_MAX},
    },
    storage::ledger::Ledger,
    track::{intent::HOT_REGIONS_MAX, state::StateDir},
    volume::{DiskSource, Machine, MachineOptions},
};

/// Time between two looks for regions that can cool. What a power cut makes us send again shrinks with each.
const MAINTAIN_EVERY: Duration = Duration::from_mins(1);

/// Where a machine's tracking lives.
#[derive(Clone, Copy, Debug)]
pub(super) struct Tracking<'a> {
    pub(super) id: MachineId,
    /// For maps and intent logs.
    pub(super) folder: &'a Path,
    pub(super) ledger: &'a Arc<Ledger>,
}

/// A machine whose writes are tracked.
#[derive(Debug)]
pub(super) struct Tracked {
    pub(super) machine: Arc<Machine>,
    maintenance: Mutex<Option<Maintenance>>,
}

impl Tracked {
    /// Opens the tracking of machine `name`.
    pub(super) fn open(
        name: &Name,
        tracking: Tracking<'_>,
        disks: &[Source],
        clock: &Arc<dyn Clock>,
    ) -> Result<Self, PrimaryError> {
        let machine = open(name, tracking, disks, clock)?;
        let maintenance = Maintenance::start(&machine).map_err(PrimaryError::Thread)?;
        Ok(Self {
            machine,
            maintenance: Mutex::new(Some(maintenance)),
        })
    }

    /// Ends the maintenance: the machine is about to be closed.
    pub(super) fn rest(&self) {
        *self.maintenance.lock() = None;
    }
}

/// Opens a machine over its disks, with nobody to keep it fresh.
pub(super) fn open(
    name: &Name,
    tracking: Tracking<'_>,
    disks: &[Source],
    clock: &Arc<dyn Clock>,
) -> Result<Arc<Machine>, PrimaryError> {
    let failed = |source| PrimaryError::State {
        path: tracking.folder.to_owned(),
        source,
    };
    fs::create_dir_all(tracking.folder).map_err(failed)?;
    let options = MachineOptions {
        id: tracking.id,
        name: name.clone(),
        clock: Arc::clone(clock),
        boot_id: boot_id().map_err(failed)?,
        preserve_bytes_max: PRESERVE_BYTES_MAX,
        hot_regions_max: HOT_REGIONS_MAX,
        frames_max: DELTA_FRAMES_MAX,
    };
    let sources = disks.iter().map(|disk| DiskSource {
        name: disk.name.clone(),
        disk: Arc::clone(&disk.disk),
        stamp: disk.stamped.1,
    });
    let state = StateDir::open(tracking.folder).map_err(failed)?;
    let ledger = Arc::clone(tracking.ledger);
    Machine::open(options, sources.collect(), &state, ledger).map_err(|source| {
        PrimaryError::Track {
            machine: name.clone(),
            source,
        }
    })
}

/// Names the present boot of the host.
pub(super) fn boot_id() -> io::Result<String> {
    Ok(fs::read_to_string("/proc/sys/kernel/random/boot_id")?
        .trim()
        .to_owned())
}

/// A thread that cools regions now and then; it ends when this is dropped.
#[derive(Debug)]
struct Maintenance {
    stop: Option<Sender<()>>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Maintenance {
    fn start(machine: &Arc<Machine>) -> io::Result<Self> {
        let (stop, stopped) = bounded::<()>(0);
        let machine = Arc::clone(machine);
        let thread = thread::Builder::new().name("maintain".into()).spawn(move || {
            while stopped.recv_timeout(MAINTAIN_EVERY) == Err(RecvTimeoutError::Timeout) {
                if let Err(error) = machine.maintain() {
                    // The machine's state says the same; whoever writes will be told by the disk.
                    tracing::error!(machine = %machine.name(), "cannot cool regions: {}", chain(&error));
                }
            }
        })?;
        Ok(Self {
            stop: Some(stop),
            thread: Some(thread),
        })
    }
}

impl Drop for Maintenance {
    fn drop(&mut self) {
        self.stop = None;
        if let Some(thread) = self.thread.take() {
            // A panic in there has been printed; the machine is closed all the same.
            let _ = thread.join();
        }
    }
}
