//! Disks that grow: the images, all recovery points, and what a cut in the middle leaves.

use understudy::{
    base::units::{DiskIndex, Epoch},
    delta::{Codec, Header, LogKind, encode_data},
    disk::image::Format,
    replica::{DiskSpec, MachineReplica, ReplicaError},
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

/// Whether the disks of a replica with points have grown already.
fn has_grown(replica: &MachineReplica) -> bool {
    let images = replica.status().images;
    let sizes: Vec<_> = images.iter().map(|image| image.geometry.size).collect();
    let of =
        |specs: Vec<DiskSpec>| -> Vec<_> { specs.iter().map(|spec| spec.geometry.size).collect() };
    assert!(sizes == of(specs()) || sizes == of(grown()), "{sizes:?}");
    sizes == of(grown())
}

#[test]
fn all_points_grow_and_what_is_new_can_be_written() {
    for format in [Format::Raw, Format::Vhdx] {
        let host = Host::new();
        let options = understudy::replica::ReplicaOptions {
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
            .open_with(understudy::replica::ReplicaOptions {
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
    let mut cuts = 0;
    for steps in 0.. {
        let mut finished = false;
        for variant in 0..4 {
            let host = Host::new();
            let (mut small, mut large) = (Model::new(), Model::new());
            let replica = host.open(KEPT).unwrap();
            grow(&replica, &mut small, 2);
            for epoch in 0..=2 {
                large.epoch(epoch, epoch.checked_sub(1));
            }
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
            if has_grown(&replica) {
                check_points(&replica, &large);
            } else {
                assert_eq!(head_epoch(&replica), Some(Epoch(2)), "{what}");
                check_points(&replica, &small);
            }
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
    assert!(cuts > 40, "{cuts}");
    println!("{cuts} power cuts");
}
