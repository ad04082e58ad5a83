//! Restoring or beginning the tracking of a machine, and keeping it fresh while the machine runs.

use std::{fs, io, path::Path, sync::Arc, thread, time::Duration};

use crossbeam_channel::{RecvTimeoutError, Sender, bounded};
use parking_lot::Mutex;

use super::{driver::chain, images::OpenImage, lock_folder, primary::PrimaryError};
use crate::{
    base::{
        clock::Clock,
        ids::{Generation, Ids, MachineId, Name},
        limits::PRESERVE_BYTES_MAX,
    },
    storage::{file::FileFolder, ledger::Ledger},
    track::{intent::HOT_REGIONS_MAX, state::StateDir},
    volume::{DiskSource, Machine, MachineOptions},
};

/// Time between two looks for regions that can cool. What a power cut makes us send again shrinks with each.
const MAINTAIN_EVERY: Duration = Duration::from_mins(1);

/// What the node remembers of a machine by its name.
#[derive(Clone, Copy, Debug, serde::Serialize, serde::Deserialize)]
struct Known {
    id: MachineId,
    generation: Generation,
}

/// A machine whose writes are tracked. The lock on its state lasts as long as this value.
#[derive(Debug)]
pub(super) struct Tracked {
    pub(super) machine: Arc<Machine>,
    pub(super) id: MachineId,
    pub(super) generation: Generation,
    maintenance: Mutex<Option<Maintenance>>,
    _lock: fs::File,
}

impl Tracked {
    /// Opens the state of machine `name` in the folder `state`.
    pub(super) fn open(
        name: &Name,
        state: &Path,
        images: &[OpenImage],
        clock: &Arc<dyn Clock>,
        ids: &dyn Ids,
    ) -> Result<Self, PrimaryError> {
        let path = state.join(name.as_str());
        let failed = |source| PrimaryError::State {
            path: path.clone(),
            source,
        };
        let folder = FileFolder::open(&path).map_err(failed)?;
        let lock = lock_folder(&path).map_err(failed)?;
        let lock = lock.ok_or_else(|| PrimaryError::StateInUse(name.clone()))?;
        let ledger = Arc::new(Ledger::open_in(&folder, "node.redb")?);
        let key = format!("name/{name}");
        let known = if let Some(known) = ledger.get::<Known>(&key)? {
            known
        } else {
            let known = Known {
                id: MachineId(ids.uuid()),
                generation: Generation::first(ids),
            };
            ledger.put(&key, &known)?;
            known
        };
        let options = MachineOptions {
            id: known.id,
            name: name.clone(),
            clock: Arc::clone(clock),
            boot_id: boot_id().map_err(failed)?,
            preserve_bytes_max: PRESERVE_BYTES_MAX,
            hot_regions_max: HOT_REGIONS_MAX,
        };
        let sources = images.iter().map(|image| DiskSource {
            name: image.config.name.clone(),
            disk: Arc::clone(&image.disk),
            stamp: image.stamp,
        });
        let state = StateDir::open(&path).map_err(failed)?;
        let machine =
            Machine::open(options, sources.collect(), &state, ledger).map_err(|source| {
                PrimaryError::Track {
                    machine: name.clone(),
                    source,
                }
            })?;
        let maintenance = Mutex::new(Some(
            Maintenance::start(&machine).map_err(PrimaryError::Thread)?,
        ));
        Ok(Self {
            machine,
            id: known.id,
            generation: known.generation,
            maintenance,
            _lock: lock,
        })
    }

    /// Ends the maintenance: the machine is about to be closed.
    pub(super) fn rest(&self) {
        *self.maintenance.lock() = None;
    }
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
