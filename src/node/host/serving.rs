//! A machine that is written here: over its own images, or over a recovery point with layers that are folded into the
//! images once the failover is kept.
//!
//! # From a recovery point to plain images, while the guest writes
//! ```text
//!   layer over a view of point P          uncommitted, or just handed over
//!     -> settle: the images hold P alone -> retire: they belong to no replica any more -> record: settled
//!   layer over the images, folding        every region moved is durable in the image before the layer forgets it
//!     -> record: no layers
//!   images
//! ```
//! Each arrow is durable before the next begins, and every start goes on from the last one. A replica that is gone although
//! the record has layers that are not settled was retired: the start records what the death left out.
//! `tests/failover/deaths.rs` kills the process there.

use std::{
    sync::{
        Arc, Weak,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};

use parking_lot::Mutex;

use super::{
    member::{Member, StartError},
    record::{ImageRecord, Layers, Record},
};
use crate::{
    base::ids::Name,
    coord::role::Lease,
    disk::{Access, Disk, layered::LayeredDisk},
    node::{
        driver::chain,
        exposure::{layer_file, layers_over, open_layers},
        images::{self, ImageConfig},
        primary::{Primary, ShowConfig, Source, open_images},
        served::Served,
        tracking::Tracking,
    },
    replica::Head,
    shim::Unmount,
};

/// Pause before a fold that failed, or that test failovers hold up, is tried again.
const FOLD_AGAIN: Duration = Duration::from_secs(2);
/// Between two looks whether a fold has to stop.
const TICK: Duration = Duration::from_millis(50);

/// A machine that is written here.
#[derive(Debug)]
pub(super) struct Serving {
    pub(super) primary: Primary,
    /// The replica whose point lies below the layers.
    below: Mutex<Option<Arc<Served>>>,
    /// The same once it has given its images away: it keeps the locks on them.
    retired: Mutex<Option<Arc<Served>>>,
    layers: Vec<(Name, Arc<LayeredDisk>)>,
    folding: Mutex<Option<thread::JoinHandle<()>>>,
    stop_folding: AtomicBool,
    /// Why the fold does not go on, if it does not.
    held_up: Mutex<Option<String>>,
}

impl Serving {
    /// Opens a machine's disks, over `below` if a recovery point is what they begin with, and mounts them.
    pub(super) fn open(
        member: &Member,
        record: &Record,
        below: Option<Arc<Served>>,
    ) -> Result<Self, StartError> {
        let (mut show, images) = (member.show(), member.images(record));
        if !record.role.serves(Lease::Unneeded) {
            // A fenced host whose layers are folded before its images become a replica's.
            show.access = Access::ReadOnly;
        }
        let (layers, below) = match record.layers {
            Some(layers) if !layers.settled => {
                let below = below.map_or_else(|| member.open_replica(record), Ok)?;
                unless_retired(member, below, layers)?
            }
            layers => (layers, None),
        };
        let (disks, layers) = match (layers, &below) {
            (None, _) => {
                member.remove_layers();
                let disks = open_images(&images, show.access, &member.shared().ids)?;
                (disks, Vec::new())
            }
            (Some(layers), None) => over_images(member, &images, &layers)?,
            (Some(layers), Some(below)) => over_point(member, record, below, &layers)?,
        };
        let places = member.places().tracking();
        let tracking = Tracking {
            id: record.id,
            folder: &places,
            ledger: &member.shared().ledger,
        };
        let clock = Arc::clone(&member.shared().clock);
        make_mount_point(member, &show)?;
        let name = member.name().clone();
        // Before anybody can write: what the peer has beyond the point is owed, and so is all that is written from here.
        let begin = |machine: &crate::volume::Machine| {
            let (Some(below), Some(layers)) = (&below, &record.layers) else {
                return Ok(());
            };
            if machine.lineage().is_some() {
                return Ok(());
            }
            let later = below.store.extents_after(layers.point.epoch);
            let later = later.map_err(|error| chain(&error))?;
            machine
                .continue_from(layers.point, &later)
                .map_err(|error| chain(&error))
        };
        let primary = Primary::start(name, disks, &show, Some((tracking, &begin)), clock)?;
        Ok(Self {
            primary,
            below: Mutex::new(below),
            retired: Mutex::default(),
            layers,
            folding: Mutex::default(),
            stop_folding: AtomicBool::new(false),
            held_up: Mutex::default(),
        })
    }

    /// The replica below the layers, as long as there is one.
    pub(super) fn below(&self) -> Option<Arc<Served>> {
        self.below.lock().clone()
    }

    /// Bytes that are not folded into the images yet.
    pub(super) fn unfolded(&self) -> u64 {
        self.layers.iter().map(|(_, layer)| layer.held()).sum()
    }

    /// What holds the fold up.
    pub(super) fn held_up(&self) -> Option<String> {
        self.held_up.lock().clone()
    }

    /// Folds the layers into the images in the background, if there are any and nobody does.
    pub(super) fn fold(self: &Arc<Self>, member: Weak<Member>) -> std::io::Result<()> {
        let mut folding = self.folding.lock();
        if self.layers.is_empty() || folding.as_ref().is_some_and(|fold| !fold.is_finished()) {
            return Ok(());
        }
        self.stop_folding.store(false, Ordering::Release);
        let serving = Arc::clone(self);
        let thread = thread::Builder::new()
            .name("fold".into())
            .spawn(move || serving.fold_all(&member))?;
        *folding = Some(thread);
        Ok(())
    }

    fn fold_all(&self, member: &Weak<Member>) {
        loop {
            if self.stop_folding.load(Ordering::Acquire) {
                return;
            }
            let Some(member) = member.upgrade() else {
                return;
            };
            match self.fold_on(&member) {
                Ok(true) => {
                    *self.held_up.lock() = None;
                    return;
                }
                Ok(false) => return,
                Err(why) => {
                    tracing::warn!(machine = %member.name(), "the failover is not folded into the images yet: {why}");
                    *self.held_up.lock() = Some(why);
                }
            }
            drop(member);
            let mut waited = Duration::ZERO;
            while waited < FOLD_AGAIN && !self.stop_folding.load(Ordering::Acquire) {
                thread::sleep(TICK);
                waited += TICK;
            }
        }
    }

    /// Goes from where the record says to plain images; whether it came there.
    fn fold_on(&self, member: &Member) -> Result<bool, String> {
        let record = member.record();
        let Some(layers) = record.layers else {
            return Ok(true);
        };
        if !layers.settled {
            let Some(below) = self.below() else {
                return Err("the replica below is gone".into());
            };
            settle(member, &below, &layers)?;
            let retired = below.store.retire().map_err(|error| chain(&error))?;
            member
                .change(|record| {
                    record.layers = Some(layers.settled());
                })
                .map_err(|error| chain(&error))?;
            for ((_, layer), (_, disk)) in self.layers.iter().zip(retired) {
                layer.fold_into(disk).map_err(|error| chain(&error))?;
            }
            let below = self.below.lock().take();
            *self.retired.lock() = below;
        }
        for (name, layer) in &self.layers {
            loop {
                if self.stop_folding.load(Ordering::Acquire) {
                    return Ok(false);
                }
                let folded = layer.fold();
                if folded
                    .map_err(|error| format!("disk {name}: {}", chain(&error)))?
                    .is_none()
                {
                    break;
                }
            }
        }
        member
            .change(|record| record.layers = None)
            .map_err(|error| chain(&error))?;
        for (index, image) in member.images(&record).into_iter().enumerate() {
            self.primary.is_stamped_by(index, image.path);
        }
        tracing::info!(machine = %member.name(), epoch = %layers.point.epoch, "the failover is folded into the images");
        Ok(true)
    }

    /// Folds everything before it returns.
    pub(super) fn fold_now(&self, member: &Member) -> Result<(), String> {
        self.rest();
        self.stop_folding.store(false, Ordering::Release);
        self.fold_on(member).map(|_| ())
    }

    /// Ends the fold; it goes on with the next start.
    fn rest(&self) {
        self.stop_folding.store(true, Ordering::Release);
        if let Some(thread) = self.folding.lock().take() {
            // One that panicked has said so; the next start goes on from what is durable.
            let _ = thread.join();
        }
    }

    /// Unmounts and closes the disks. The replica below them stays open, and is returned.
    pub(super) fn close(&self, how: Unmount) -> Result<Option<Arc<Served>>, StartError> {
        self.rest();
        self.primary.stop(how)?;
        Ok(self.below.lock().take())
    }
}

/// The replica below, and the layers over one of its points. A death between retiring the replica and recording that
/// leaves none: its images hold exactly the point, and the record says so from here on.
fn unless_retired(
    member: &Member,
    below: Arc<Served>,
    layers: Layers,
) -> Result<(Option<Layers>, Option<Arc<Served>>), StartError> {
    if below.store.head() != Head::Empty {
        return Ok((Some(layers), Some(below)));
    }
    // Its locks on the images go with it.
    below.close().map_err(StartError::other)?;
    drop(below);
    let settled = layers.settled();
    tracing::info!(machine = %member.name(), epoch = %layers.point.epoch, "the replica was retired already, the fold goes on over its images");
    let recorded = member.change(|record| record.layers = Some(settled));
    recorded.map_err(StartError::other)?;
    Ok((Some(settled), None))
}

/// Brings the images to the point and nothing else.
fn settle(member: &Member, below: &Served, layers: &Layers) -> Result<(), String> {
    if below.has_tests() {
        return Err(format!(
            "test failovers are running: end them with `understudy cancel {}`",
            member.name()
        ));
    }
    below.end_upkeep();
    let settled = below.store.settle(layers.point.epoch);
    settled.map(|_| ()).map_err(|error| chain(&error))
}

type Opened = (Vec<Source>, Vec<(Name, Arc<LayeredDisk>)>);

fn over_point(
    member: &Member,
    record: &Record,
    below: &Served,
    layers: &Layers,
) -> Result<Opened, StartError> {
    let view = below
        .store
        .view(layers.point.epoch)
        .map_err(StartError::other)?;
    if view.point.lineage != layers.point {
        return Err(StartError::Other(format!(
            "recovery point {} is not the one that was failed over to",
            layers.point.epoch
        )));
    }
    let names: Vec<Name> = record
        .images
        .iter()
        .map(|image| image.name.clone())
        .collect();
    let opened = open_layers(view, &names, &member.places().layers()).map_err(StartError::other)?;
    let sources = opened.iter().zip(&record.images);
    let sources = sources
        .map(|(layer, image)| source(member, layer, image))
        .collect::<Result<_, _>>()?;
    Ok((sources, opened))
}

fn source(
    member: &Member,
    (name, layer): &(Name, Arc<LayeredDisk>),
    image: &ImageRecord,
) -> Result<Source, StartError> {
    let stamped = member.places().layers().join(layer_file(name));
    let stamp = images::stamp(&stamped).map_err(StartError::other)?;
    Ok(Source {
        name: name.clone(),
        disk: Arc::clone(layer) as Arc<dyn Disk>,
        format: image.format,
        image: member.places().0.join(&image.file),
        stamped: (stamped, stamp),
        _keep: None,
    })
}

fn over_images(
    member: &Member,
    images: &[ImageConfig],
    layers: &Layers,
) -> Result<Opened, StartError> {
    let mut sources = open_images(images, Access::ReadWrite, &member.shared().ids)?;
    let bases = sources
        .iter()
        .map(|source| (source.name.clone(), Arc::clone(&source.disk)));
    let folder = member.places().layers();
    let opened =
        layers_over(bases.collect(), layers.point.chain, &folder).map_err(StartError::other)?;
    for (source, (name, layer)) in sources.iter_mut().zip(&opened) {
        layer
            .fold_into(Arc::clone(&source.disk))
            .map_err(StartError::other)?;
        source.disk = Arc::clone(layer) as Arc<dyn Disk>;
        let stamped = folder.join(layer_file(name));
        let stamp = images::stamp(&stamped).map_err(StartError::other)?;
        source.stamped = (stamped, stamp);
    }
    Ok((sources, opened))
}

/// The folder that a promoted machine is mounted at is made; one that an operator named has to be there.
fn make_mount_point(member: &Member, show: &ShowConfig) -> Result<(), StartError> {
    if show.at != member.places().disks() {
        return Ok(());
    }
    // One that a crash left is not there for `create_dir_all`.
    match crate::shim::recover_stale(&show.at) {
        Ok(_) => {}
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        Err(error) => return Err(StartError::other(error)),
    }
    std::fs::create_dir_all(&show.at).map_err(StartError::other)
}
