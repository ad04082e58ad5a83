//! A host of the simulation: what is durable on it, and the process that runs.
//!
//! This is `node` with everything taken away that is not an order of durable steps: mounts, threads, sockets, messages for
//! people. One host is the primary, the other one keeps the replica.

use std::sync::Arc;

use uuid::Uuid;

use super::{
    content::Contents,
    conversation::Conversation,
    medium::{Kind, Medium, MediumFolder},
    session::Session,
    setup::{Bug, Setup, disk_name, geometry},
};
use crate::{
    base::{
        chain::chain,
        clock::ManualClock,
        ids::{Ids, MachineId, Name, SeededIds},
    },
    disk::{Access, Disk, Opening, image},
    replica::{MachineReplica, PointView, ReplicaOptions, image_name},
    storage::{Folder, Open, ledger::Ledger, memory::Choice},
    track::state::StateDir,
    volume::{DiskSource, ImageStamp, Machine, MachineOptions},
};

/// What became of something; a text says why not.
pub(super) type Done<T = ()> = Result<T, String>;

pub(super) fn told(error: impl std::error::Error) -> String {
    chain(&error)
}

const LEDGER_FILE: &str = "node.redb";

pub(super) fn machine_id() -> MachineId {
    MachineId(Uuid::from_u128(9))
}

pub(super) fn machine_name() -> Name {
    Name::new("machine").expect("it is a plain word")
}

/// The host that serves the guest.
#[derive(Debug)]
pub(super) struct Primary {
    pub(super) medium: Arc<Medium>,
    folder: Arc<MediumFolder>,
    tracking: Arc<MediumFolder>,
    state: StateDir,
    boot: u64,
    setup: Arc<Setup>,
    clock: Arc<ManualClock>,
    pub(super) ids: Arc<dyn Ids>,
    pub(super) process: Option<Serving>,
}

/// The process on the primary.
#[derive(Debug)]
pub(super) struct Serving {
    pub(super) machine: Arc<Machine>,
    pub(super) conversation: Option<Conversation>,
}

impl Primary {
    pub(super) fn new(setup: &Arc<Setup>, clock: &Arc<ManualClock>, seed: u64) -> Done<Self> {
        let medium = Medium::new();
        let tracking = MediumFolder::new(&medium, Some(Kind::Tracking));
        let primary = Self {
            folder: MediumFolder::new(&medium, None),
            state: StateDir::memory(Arc::clone(&tracking) as Arc<dyn Folder>),
            tracking,
            medium,
            boot: 1,
            setup: Arc::clone(setup),
            clock: Arc::clone(clock),
            ids: Arc::new(SeededIds::new(seed)),
            process: None,
        };
        for index in 0..setup.disks {
            let file = primary
                .folder
                .open(&primary.file_name(index), Open::CreateNew);
            let options = image::CreateOptions::new(setup.formats[0], geometry(index));
            image::create(&*file.map_err(told)?, &options, &*primary.ids).map_err(told)?;
        }
        primary.folder.sync().map_err(told)?;
        Ok(primary)
    }

    fn file_name(&self, index: usize) -> String {
        image_name(&disk_name(index), self.setup.formats[0])
    }

    /// A new process: opens the node's store, the images and the tracking.
    pub(super) fn wake(&mut self) -> Done {
        let ledger = Arc::new(Ledger::open_in(&*self.folder, LEDGER_FILE).map_err(told)?);
        let options = MachineOptions {
            id: machine_id(),
            name: machine_name(),
            clock: Arc::clone(&self.clock) as _,
            boot_id: format!("boot-{}", self.boot),
            preserve_bytes_max: self.setup.preserve_bytes_max,
            hot_regions_max: self.setup.hot_regions_max,
        };
        let open = |index| {
            let storage = self.folder.open(&self.file_name(index), Open::Write);
            let opening = Opening::new(Access::ReadWrite, Arc::clone(&self.ids));
            let disk = image::open(storage.map_err(told)?, self.setup.formats[0], &opening);
            Ok(DiskSource {
                name: disk_name(index),
                disk: disk.map_err(told)?,
                stamp: STAMP,
            })
        };
        let disks = (0..self.setup.disks).map(open).collect::<Done<_>>()?;
        self.process = Some(Serving {
            machine: Machine::open(options, disks, &self.state, ledger).map_err(told)?,
            conversation: None,
        });
        Ok(())
    }

    /// Ends the process in good order.
    pub(super) fn close(&mut self) -> Done {
        let Some(serving) = self.process.take() else {
            return Ok(());
        };
        if let Some(conversation) = serving.conversation {
            conversation.leave(&serving.machine);
        }
        serving.machine.close(&mut |_| Ok(STAMP)).map_err(told)
    }

    /// The process is gone.
    pub(super) fn die(&mut self) {
        self.medium.end_process(|| self.process = None);
        if self.setup.has(Bug::MapsLost) {
            self.state = StateDir::memory(Arc::clone(&self.tracking) as Arc<dyn Folder>);
        }
    }

    /// The power is cut and comes back; `kept` says what lasts of all that was not synced.
    pub(super) fn lose_power(&mut self, kept: &mut Choice<'_>) -> Done {
        self.die();
        self.medium.power.restore(kept);
        self.state.lose(kept).map_err(told)?;
        if !self.setup.has(Bug::IntentIgnored) {
            self.boot += 1;
        }
        Ok(())
    }
}

/// Nobody else writes the images here, so their stamps stay.
const STAMP: ImageStamp = ImageStamp {
    inode: 1,
    bytes: 2,
    modified: (3, 4),
};

impl Serving {
    /// What a guest reads.
    pub(super) fn read(&self) -> Done<Contents> {
        let volumes = self.machine.volumes().iter();
        let disks = volumes.map(|volume| Arc::clone(volume) as Arc<dyn Disk>);
        Contents::read(&disks.collect::<Vec<_>>())
    }
}

/// The host that keeps the replica.
#[derive(Debug)]
pub(super) struct Secondary {
    pub(super) medium: Arc<Medium>,
    pub(super) folder: Arc<MediumFolder>,
    pub(super) setup: Arc<Setup>,
    ids: Arc<dyn Ids>,
    pub(super) process: Option<Following>,
}

/// The process on the replica.
#[derive(Debug)]
pub(super) struct Following {
    pub(super) store: Arc<MachineReplica>,
    pub(super) session: Option<Session>,
    /// Points that somebody looks at, as in a test failover.
    pub(super) views: Vec<PointView>,
}

impl Secondary {
    pub(super) fn new(setup: &Arc<Setup>, seed: u64) -> Self {
        let medium = Medium::new();
        medium.forget_log_syncs(setup.has(Bug::LogNotSynced));
        Self {
            folder: MediumFolder::new(&medium, None),
            medium,
            setup: Arc::clone(setup),
            ids: Arc::new(SeededIds::new(seed)),
            process: None,
        }
    }

    /// A new process: opens the node's store and the replica.
    pub(super) fn wake(&mut self) -> Done {
        let options = ReplicaOptions {
            format: Some(self.setup.formats[1]),
            retention: self.setup.retention,
            space_max: self.setup.space_max,
            sync_bytes: self.setup.sync_bytes,
        };
        let ledger = Arc::new(Ledger::open_in(&*self.folder, LEDGER_FILE).map_err(told)?);
        let folder = Arc::clone(&self.folder) as Arc<dyn Folder>;
        let ids = Arc::clone(&self.ids);
        let store = MachineReplica::open(folder, ledger, ids, machine_id(), options);
        self.process = Some(Following {
            store: Arc::new(store.map_err(told)?),
            session: None,
            views: Vec::new(),
        });
        Ok(())
    }

    /// The process is gone.
    pub(super) fn die(&mut self) {
        self.medium.end_process(|| self.process = None);
    }

    /// The power is cut and comes back; `kept` says what lasts of all that was not synced.
    pub(super) fn lose_power(&mut self, kept: &mut Choice<'_>) {
        self.die();
        self.medium.power.restore(kept);
    }
}
