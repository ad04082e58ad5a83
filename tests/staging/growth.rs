//! Disks that grow: the images, all recovery points, and what a cut in the middle leaves.

use std::io;

use understudy::{
    base::units::{DiskIndex, Epoch},
    delta::{Codec, Header, LogKind, encode_data},
    disk::image::Format,
    replica::{DiskSpec, MachineReplica, ReplicaError, ReplicaOptions},
};

use super::{
    GENERATION, Host, MACHINE, Model, check_points, cuts::keeps, entries, grow, head_epoch, log_of,
    send, specs,
};

/// Bytes that each disk grows by; one of them ended with half a block.
const MORE: [u64; 2] = [5 * 4096, 3 * 4096 + 512];
const KEPT: u32 = 9;

fn grown() -> Vec<DiskSpec> {
    let mut specs = specs();
    for (spec, more) in specs.iter_mut().zip(MORE) {
        spec.geometry.size += more;
    }
    specs
}

impl Model {
    /// Every point from now on, and every earlier one, has zeros behind the old ends.
    fn grow(&mut self) {
        let histories = self.history.values_mut().chain([&mut self.disks]);
        for disks in histories {
            for (disk, more) in disks.iter_mut().zip(MORE) {
                disk.resize(disk.len() + usize::try_from(more).unwrap(), 0);
            }
        }
    }

    /// The same with disks that are cut off here.
    fn with_sizes(&self, sizes: &[u64]) -> Self {
        let mut history = self.history.clone();
        for disks in history.values_mut() {
            for (disk, &size) in disks.iter_mut().zip(sizes) {
                disk.truncate(usize::try_from(size).unwrap());
            }
        }
        Self {
            disks: self.disks.clone(),
            history,
            lineages: self.lineages.clone(),
        }
    }

    /// Epoch 3 after epoch 2: what is new in the second disk is written, across its old end.
    fn epoch_beyond(&mut self) -> Vec<u8> {
        let mut disks = entries();
        for (disk, more) in disks.iter_mut().zip(MORE) {
            disk.size += more;
        }
        let header = Header {
            machine: MACHINE,
            generation: GENERATION,
            kind: LogKind::Delta,
            parent: Some(self.lineages[&Epoch(2)]),
            disks,
        };
        self.disks[1][8 * 4096..10 * 4096].fill(0xAB);
        let frame = encode_data(DiskIndex(1), 8 * 4096, vec![0xAB; 2 * 4096], Codec::Lz4);
        let (log, lineage) = log_of(&header, &[frame], Epoch(3));
        self.history.insert(Epoch(3), self.disks.clone());
        self.lineages.insert(Epoch(3), lineage);
        log
    }
}

/// Sizes of the disks of a replica.
fn sizes(replica: &MachineReplica) -> Vec<u64> {
    let images = replica.status().images;
    images.iter().map(|image| image.geometry.size).collect()
}

fn sizes_of(specs: &[DiskSpec]) -> Vec<u64> {
    specs.iter().map(|spec| spec.geometry.size).collect()
}

/// Whether all disks of a replica have grown already. Each has its old size or its new one.
fn has_grown(replica: &MachineReplica) -> bool {
    let (found, small, large) = (sizes(replica), sizes_of(&specs()), sizes_of(&grown()));
    for (index, size) in found.iter().enumerate() {
        assert!([small[index], large[index]].contains(size), "{found:?}");
    }
    found == large
}

#[test]
fn all_points_grow_and_what_is_new_can_be_written() {
    for format in [Format::Raw, Format::Vhdx] {
        let host = Host::new();
        let options = ReplicaOptions {
            format: Some(format),
            ..super::options(KEPT)
        };
        let replica = host.open_with(options).unwrap();
        let mut model = Model::new();
        grow(&replica, &mut model, 2);
        let view = replica.view(Epoch(1)).unwrap();
        let error = replica.prepare(&grown()).unwrap_err();
        assert!(matches!(error, ReplicaError::PointInUse(_)), "{error}");
        drop(view);
        check_points(&replica, &model);
        replica.prepare(&grown()).unwrap();
        model.grow();
        check_points(&replica, &model);
        let error = replica.prepare(&specs()).unwrap_err();
        assert!(matches!(error, ReplicaError::Changed(_)), "{error}");
        let log = model.epoch_beyond();
        send(&replica, &log).unwrap();
        check_points(&replica, &model);
        drop(replica);
        // Logs from before the growth are taken up, and folded with those from after it.
        let replica = host.open_with(options).unwrap();
        check_points(&replica, &model);
        drop(replica);
        let replica = host
            .open_with(ReplicaOptions {
                format: Some(format),
                ..super::options(0)
            })
            .unwrap();
        replica.merge().unwrap();
        check_points(&replica, &model);
        assert_eq!(replica.points().len(), 1);
    }
}

/// The power is cut after every step of a growth and of the epoch behind it.
#[test]
fn a_cut_while_growing_leaves_every_point() {
    let (mut cuts, mut partly) = (0, 0);
    for steps in 0.. {
        let mut finished = false;
        for variant in 0..4 {
            let host = Host::new();
            let mut large = Model::new();
            let replica = host.open(KEPT).unwrap();
            grow(&replica, &mut large, 2);
            large.grow();
            let log = large.epoch_beyond();
            host.power.cut_after(steps);
            let tell = || -> Result<(), Box<dyn std::error::Error>> {
                replica.prepare(&grown())?;
                send(&replica, &log)?;
                Ok(())
            };
            finished = tell().is_ok();
            drop(replica);
            host.power.restore(&mut keeps(variant));
            let what = format!("cut after step {steps}, variant {variant}");
            let replica = host
                .open(KEPT)
                .unwrap_or_else(|error| panic!("{what}: {error:?}"));
            assert!(replica.points().len() >= 2, "{what}");
            if !has_grown(&replica) {
                assert_eq!(head_epoch(&replica), Some(Epoch(2)), "{what}");
            }
            check_points(&replica, &large.with_sizes(&sizes(&replica)));
            partly += u32::from(!has_grown(&replica) && sizes(&replica) != sizes_of(&specs()));
            replica.prepare(&grown()).unwrap();
            assert!(has_grown(&replica), "{what}");
            if head_epoch(&replica) == Some(Epoch(2)) {
                send(&replica, &log).unwrap();
            }
            check_points(&replica, &large);
            cuts += 1;
        }
        if finished {
            break;
        }
    }
    assert!(cuts > 40 && partly > 4, "{cuts}, {partly}");
    println!("{cuts} power cuts, {partly} between two disks");
}

/// A failover comes when some images have grown and others have not, because the primary is lost meanwhile: what the
/// guest sees ends up in images of the same size, at once or after a restart.
#[test]
fn a_failover_in_the_middle_of_a_growth_finds_images_of_its_size() {
    for format in [Format::Raw, Format::Vhdx] {
        let options = ReplicaOptions {
            format: Some(format),
            ..super::options(KEPT)
        };
        let mut partly = 0;
        for (steps, restarts) in (0..).flat_map(|steps| [(steps, false), (steps, true)]) {
            let host = Host::new();
            let mut model = Model::new();
            let replica = host.open_with(options).unwrap();
            grow(&replica, &mut model, 2);
            model.grow();
            host.power.fail_after(steps, io::ErrorKind::StorageFull);
            let done = replica.prepare(&grown()).is_ok();
            host.power.restore(&mut || true);
            let mut seen: Option<Vec<u64>> = None;
            let mut fail_over = |replica: &MachineReplica| -> Result<(), ReplicaError> {
                let view = replica.view(Epoch(2))?;
                let shown = view.disks.iter().map(|disk| disk.geometry().size);
                let shown: Vec<u64> = shown.collect();
                assert_eq!(sizes(replica), shown, "{steps}");
                assert_eq!(*seen.get_or_insert_with(|| shown.clone()), shown, "{steps}");
                replica.settle(Epoch(2))?;
                check_points(replica, &model.with_sizes(&shown));
                let given = replica.retire()?;
                let given = given.iter().map(|(_, disk)| disk.geometry().size);
                assert_eq!(given.collect::<Vec<_>>(), shown, "{steps}, {restarts}");
                partly += u32::from(![sizes_of(&specs()), sizes_of(&grown())].contains(&shown));
                Ok(())
            };
            if restarts || fail_over(&replica).is_err() {
                drop(replica);
                fail_over(&host.open_with(options).unwrap()).unwrap();
            }
            if done {
                break;
            }
        }
        assert!(partly > 1, "some had grown and some had not: {partly}");
    }
}
