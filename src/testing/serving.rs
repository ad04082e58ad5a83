//! A machine that is written on a simulated host: over its images, or over a recovery point with layers that are folded
//! into them. This is `node::host::serving`, its fold being so many steps instead of a thread.

use std::sync::Arc;

use super::{
    content::Contents,
    conversation::Conversation,
    host::Host,
    medium::MediumFolder,
    record::{Asked, Done, Layers, not_now, told},
    setup::{Bug, disk_name},
};
use crate::{
    base::checksum::Digest,
    coord::role::RoleState,
    disk::{Disk, layered::LayeredDisk},
    replica::{Head, MachineReplica},
    storage::{Folder, Open},
    volume::{ImageStamp, Machine},
};

/// What a guest may do with the disks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Shown {
    Writable,
    ReadOnly,
    /// The mount is gone.
    Not,
}

/// A machine that is written here.
#[derive(Debug)]
pub(super) struct Serving {
    pub(super) machine: Arc<Machine>,
    layers: Vec<Arc<LayeredDisk>>,
    /// Not everything is folded into the images.
    layered: bool,
    /// The replica whose point lies below the layers.
    pub(super) below: Option<Arc<MachineReplica>>,
    pub(super) shown: Shown,
    /// Whether the layers are to be folded into the images.
    pub(super) folds: bool,
    /// The role in which it replicates.
    pub(super) replicates: Option<RoleState>,
    pub(super) conversation: Option<Conversation>,
}

type Opened = (Vec<(Arc<dyn Disk>, ImageStamp)>, Vec<Arc<LayeredDisk>>);

impl Serving {
    /// Opens a machine's disks, over `below` if a recovery point is what they begin with.
    pub(super) fn open(host: &mut Host, below: Option<Arc<MachineReplica>>) -> Done<Self> {
        let record = host.record().ok_or("no such machine")?.clone();
        let (layers, below) = match record.layers {
            Some(layers) if !layers.settled => {
                let below = below.map_or_else(|| host.open_replica(), Ok)?;
                unless_retired(host, below, layers)?
            }
            layers => (layers, None),
        };
        let (disks, opened) = match (layers, &below) {
            (None, _) => {
                // What cannot be removed now is removed before the next failover.
                let _ = host.remove_layers();
                (host.open_images()?, Vec::new())
            }
            (Some(layers), None) => over_images(host, layers)?,
            (Some(layers), Some(below)) => over_point(host, below, layers)?,
        };
        let machine = host.open_machine(disks)?;
        if let (Some(below), Some(layers)) = (&below, record.layers)
            && machine.lineage().is_none()
        {
            let later = below.extents_after(layers.point.epoch).map_err(told)?;
            machine.continue_from(layers.point, &later).map_err(told)?;
        }
        Ok(Self {
            machine,
            layered: !opened.is_empty(),
            layers: opened,
            below,
            shown: Shown::ReadOnly,
            folds: false,
            replicates: None,
            conversation: None,
        })
    }

    pub(super) fn is_layered(&self) -> bool {
        self.layered
    }

    /// Whether a guest can write.
    pub(super) fn takes_writes(&self) -> bool {
        self.shown == Shown::Writable
    }

    /// Lets the guest write or not, if there is a mount.
    pub(super) fn show(&mut self, shown: Shown) {
        if self.shown != Shown::Not {
            self.shown = shown;
        }
    }

    /// What a guest reads.
    pub(super) fn read(&self) -> Done<Contents> {
        let volumes = self.machine.volumes().iter();
        let disks = volumes.map(|volume| Arc::clone(volume) as Arc<dyn Disk>);
        Contents::read(&disks.collect::<Vec<_>>())
    }

    /// Ends the conversation; the link it used.
    pub(super) fn hang_up(&mut self) -> Option<u64> {
        let conversation = self.conversation.take()?;
        let link = conversation.link;
        conversation.leave(&self.machine);
        Some(link)
    }
}

/// A death between retiring the replica and recording that leaves none: its images hold exactly the point.
fn unless_retired(
    host: &mut Host,
    below: Arc<MachineReplica>,
    layers: Layers,
) -> Done<(Option<Layers>, Option<Arc<MachineReplica>>)> {
    if below.head() != Head::Empty {
        return Ok((Some(layers), Some(below)));
    }
    below.close().map_err(told)?;
    let settled = Layers {
        settled: true,
        ..layers
    };
    host.change(|record| record.layers = Some(settled))?;
    Ok((Some(settled), None))
}

fn over_point(host: &mut Host, below: &MachineReplica, layers: Layers) -> Done<Opened> {
    let view = below.view(layers.point.epoch).map_err(told)?;
    if view.point.lineage != layers.point {
        return Err("the recovery point is not the one that was failed over to".into());
    }
    let bases = view.disks.into_iter().map(|disk| disk as Arc<dyn Disk>);
    host.will_write_layers()?;
    let opened = open_layers(host, &host.layers, bases.collect(), layers.point.chain, "")?;
    Ok((stamped(host, &opened)?, opened))
}

fn over_images(host: &mut Host, layers: Layers) -> Done<Opened> {
    let images = host.open_images()?;
    let bases = images.iter().map(|(disk, _)| Arc::clone(disk)).collect();
    host.will_write_layers()?;
    let opened = open_layers(host, &host.layers, bases, layers.point.chain, "")?;
    for (layer, (image, _)) in opened.iter().zip(images) {
        layer.fold_into(image).map_err(told)?;
    }
    Ok((stamped(host, &opened)?, opened))
}

/// The disks, each with what tells whether somebody else wrote it.
fn stamped(host: &Host, layers: &[Arc<LayeredDisk>]) -> Done<Vec<(Arc<dyn Disk>, ImageStamp)>> {
    let stamp = |(index, layer)| {
        let layer: &Arc<LayeredDisk> = layer;
        Ok((
            Arc::clone(layer) as Arc<dyn Disk>,
            host.layered_stamp(index)?,
        ))
    };
    layers.iter().enumerate().map(stamp).collect()
}

/// A layer over each of these disks, whose content is called `identity`, in files with this prefix.
pub(super) fn open_layers(
    host: &Host,
    folder: &MediumFolder,
    bases: Vec<Arc<dyn Disk>>,
    identity: Digest,
    prefix: &str,
) -> Done<Vec<Arc<LayeredDisk>>> {
    let open = |(index, base)| {
        let name = format!("{prefix}{}", disk_name(index));
        let storage = folder.open(&name, Open::Create).map_err(told)?;
        let layer = LayeredDisk::open(base, storage, identity, host.boot());
        Ok(Arc::new(layer.map_err(told)?))
    };
    let opened = bases.into_iter().enumerate().map(open);
    let opened = opened.collect::<Done<_>>()?;
    folder.sync().map_err(told)?;
    Ok(opened)
}

impl Host {
    /// Goes one step from where the record says to plain images; whether it came there.
    pub(super) fn fold_on(&mut self) -> Asked<bool> {
        let Some(layers) = self.record().and_then(|record| record.layers) else {
            return Ok(true);
        };
        if !layers.settled {
            self.settle(layers)?;
            return Ok(false);
        }
        let forgets = self.setup.has(Bug::CommitForgetsLayer);
        let serving = self
            .serving()
            .ok_or_else(|| "nothing is served".to_owned())?;
        for layer in serving.layers.iter().filter(|_| !forgets) {
            if layer.fold().map_err(told)?.is_some() {
                return Ok(false);
            }
        }
        self.change(|record| record.layers = None)?;
        if let Some(serving) = self.serving_mut() {
            serving.layered = false;
            serving.folds = false;
        }
        Ok(true)
    }

    fn settle(&mut self, layers: Layers) -> Asked {
        if !self.process().tests.is_empty() {
            return not_now("test failovers are running");
        }
        let below = self.serving().and_then(|serving| serving.below.clone());
        let Some(below) = below else {
            return not_now("the replica below is gone");
        };
        below.settle(layers.point.epoch).map_err(told)?;
        let retired = below.retire().map_err(told)?;
        self.change(|record| {
            record.layers = Some(Layers {
                settled: true,
                ..layers
            });
        })?;
        if let Some(serving) = self.serving_mut() {
            for (layer, (_, disk)) in serving.layers.iter().zip(retired) {
                layer.fold_into(disk).map_err(told)?;
            }
            serving.below = None;
        }
        Ok(())
    }

    /// Folds everything before the images become a replica's.
    pub(super) fn fold_before_return(&mut self) -> Asked {
        if self.serving().is_none() {
            let below = self.store();
            let serving = Serving::open(self, below)?;
            self.process().running = super::host::Running::Serving(Box::new(serving));
        }
        while !self.fold_on()? {}
        Ok(())
    }
}
