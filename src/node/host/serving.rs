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
    path::{Path, PathBuf},
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
    record::{Layers, Record},
};
use crate::{
    base::chain::chain,
    base::ids::Name,
    coord::role::Lease,
    disk::{Access, Disk, layered::LayeredDisk},
    node::{
        exposure::{layer_file, layers_over, make_mount_point, open_layers},
        images::ImageConfig,
        primary::{Beginning, Primary},
        served::Served,
        sources::{Source, Stamped, open_images},
        tracking::Tracking,
    },
    replica::Head,
    shim::Unmount,
    volume::{self, ImageStamp, Machine},
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
    /// It is this host that takes the mount away.
    closing: AtomicBool,
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
        // A fenced host whose layers are folded before its images become a replica's shows them, and takes nothing.
        show.fenced = !record.role.serves(Lease::Unneeded);
        let (layers, below) = match record.layers {
            Some(layers) if !layers.settled => {
                let below = below.map_or_else(|| member.open_replica(record), Ok)?;
                unless_retired(member, below, layers)?
            }
            layers => (layers, None),
        };
        let (disks, layers) = match (layers, &below) {
            (None, _) => {
                // What cannot be removed now is removed before the next failover.
                if let Err(error) = member.remove_layers() {
                    tracing::warn!(machine = %member.name(), "cannot remove the layers of a failover: {error}");
                }
                let disks = open_images(&images, show.access, &member.shared().ids)?;
                (disks, Vec::new())
            }
            (Some(layers), None) => over_images(member, record, &images, &layers)?,
            (Some(layers), Some(below)) => over_point(member, record, &images, (below, &layers))?,
        };
        let places = member.places().tracking();
        let tracking = Tracking {
            id: record.id,
            folder: &places,
            ledger: &member.shared().ledger,
        };
        let clock = Arc::clone(&member.shared().clock);
        // One that an operator named has to be there.
        if show.at == member.places().disks() {
            make_mount_point(&show.at, &show.mounter).map_err(StartError::other)?;
        }
        let name = member.name().clone();
        // Before anybody can write: what the peer has beyond the point is owed, and so is all that is written from here.
        let begin = |machine: &Machine| {
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
        let beginning = Beginning {
            tracking,
            begin: &begin,
            sync_on_flush: member.replication().sync_on_flush,
            born: record.role.born,
        };
        let primary = Primary::start(name, disks, &show, Some(beginning), clock)?;
        Ok(Self {
            primary,
            below: Mutex::new(below),
            retired: Mutex::default(),
            layers,
            folding: Mutex::default(),
            stop_folding: AtomicBool::new(false),
            closing: AtomicBool::new(false),
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
        for index in 0..self.layers.len() {
            self.primary.is_plain(index);
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

    /// Whether the mount was taken away by somebody else than this host.
    pub(super) fn was_taken_away(&self) -> bool {
        // In this order: a close that begins in between has not unmounted yet.
        let ended = self.primary.has_ended();
        ended && !self.closing.load(Ordering::Acquire)
    }

    /// Unmounts and closes the disks. The replica below them stays open, and is returned.
    pub(super) fn close(&self, how: Unmount) -> Result<Option<Arc<Served>>, StartError> {
        self.rest();
        let taken_away = self.was_taken_away();
        self.closing.store(!taken_away, Ordering::Release);
        let stopped = self.primary.stop(how);
        if stopped.is_err() {
            self.closing.store(false, Ordering::Release);
        }
        stopped?;
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
    images: &[ImageConfig],
    (below, layers): (&Served, &Layers),
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
    let folder = member.places().layers();
    will_write(member, record, images)?;
    let opened = open_layers(view, &names, &folder).map_err(StartError::other)?;
    let source = |(name, layer): &(Name, Arc<LayeredDisk>)| {
        let image = images.iter().find(|image| image.name == *name);
        let image = image.ok_or_else(|| {
            StartError::Other(format!("disk {name} is not among the configured images"))
        })?;
        Ok(Source {
            name: name.clone(),
            disk: Arc::clone(layer) as Arc<dyn Disk>,
            format: image.format,
            image: image.path.clone(),
            stamped: stamped(&image.path, folder.join(layer_file(name)))?,
            lock: None,
        })
    };
    let sources = opened
        .iter()
        .map(source)
        .collect::<Result<_, StartError>>()?;
    Ok((sources, opened))
}

fn over_images(
    member: &Member,
    record: &Record,
    images: &[ImageConfig],
    layers: &Layers,
) -> Result<Opened, StartError> {
    let mut sources = open_images(images, Access::ReadWrite, &member.shared().ids)?;
    let bases = sources
        .iter()
        .map(|source| (source.name.clone(), Arc::clone(&source.disk)));
    let folder = member.places().layers();
    will_write(member, record, images)?;
    let opened =
        layers_over(bases.collect(), layers.point.chain, &folder).map_err(StartError::other)?;
    for (source, (name, layer)) in sources.iter_mut().zip(&opened) {
        layer
            .fold_into(Arc::clone(&source.disk))
            .map_err(StartError::other)?;
        source.disk = Arc::clone(layer) as Arc<dyn Disk>;
        source.stamped = stamped(&source.image, folder.join(layer_file(name)))?;
    }
    Ok((sources, opened))
}

/// Notes that the layers over these images are about to be opened, which may write them: should this process die before
/// the machine is open, they were not changed by somebody else. Layers that are not there yet are not known either.
fn will_write(member: &Member, record: &Record, images: &[ImageConfig]) -> Result<(), StartError> {
    let folder = member.places().layers();
    let stamps = images.iter().map(|image| {
        let layer = folder.join(layer_file(&image.name));
        let (_, stamp) = stamped(&image.path, layer).ok()?;
        Some((&image.name, stamp))
    });
    let Some(stamps) = stamps.collect::<Option<Vec<_>>>() else {
        return Ok(());
    };
    volume::will_write(&member.shared().ledger, record.id, &stamps).map_err(StartError::other)
}

/// What tells whether somebody else wrote an image or the layer over it, and what that tells now.
fn stamped(image: &Path, layer: PathBuf) -> Result<(Stamped, ImageStamp), StartError> {
    let stamped = Stamped {
        image: image.to_owned(),
        written: layer,
    };
    let stamp = stamped.take().map_err(StartError::other)?;
    Ok((stamped, stamp))
}
