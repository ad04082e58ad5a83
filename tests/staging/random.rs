//! Random lives of a replica: epochs of any shape over some hours, merges, folds, reopenings, views and settlings in any
//! order, from an initial copy or from the images of a former primary.

use proptest::prelude::*;
use understudy::{
    base::units::{Epoch, to_u64, to_usize},
    delta::Codec,
    replica::{MachineReplica, PointView, ReplicaOptions, Retention},
};

use super::{
    Change, DISK_BYTES, Host, Model, check_points, content, head_epoch, options,
    rescue::{COMMON, adoption, check_rescue, differing, leave_images, parted},
    send, specs,
};

/// One thing that happens.
#[derive(Clone, Debug)]
enum Act {
    /// An epoch, so many numbers after the last one.
    Epoch { gap: u64, changes: Vec<Change> },
    /// Merges, folds, or nothing.
    Upkeep,
    /// The store is dropped and opened with another retention.
    Reopen { retention: Retention },
    /// The point that is so many before the newest is opened and stays open; the one open before is closed.
    View { back: usize },
    /// The rescue point is opened, or closed if it was open.
    Rescue,
    /// The rescue point is dropped, if nobody looks at it.
    DropRescue,
    /// The replica goes back to the point that is so many before the newest, if no other is open.
    Settle { back: usize },
}

fn any_change() -> impl Strategy<Value = Change> {
    let codec = prop::sample::select(Codec::ALL.to_vec());
    let data = prop::option::weighted(0.8, (any::<u8>(), codec));
    (0..2u16, any::<prop::sample::Index>(), 1..12u64, data).prop_map(|(disk, at, blocks, data)| {
        let size = DISK_BYTES[usize::from(disk)].div_ceil(4096);
        let block = to_u64(at.index(usize::try_from(size).unwrap()));
        Change {
            disk,
            block,
            blocks: blocks.min(size - block),
            data,
        }
    })
}

fn any_act() -> impl Strategy<Value = Act> {
    let changes = prop::collection::vec(any_change(), 0..10);
    prop_oneof![
        5 => (1..1500u64, changes).prop_map(|(gap, changes)| Act::Epoch { gap, changes }),
        3 => Just(Act::Upkeep),
        1 => (0..4u32, 0..3u32).prop_map(|(newest, hourly)| Act::Reopen {
            retention: Retention { newest, hourly },
        }),
        1 => (0..5usize).prop_map(|back| Act::View { back }),
        1 => Just(Act::Rescue),
        1 => prop_oneof![
            Just(Act::DropRescue),
            (0..4usize).prop_map(|back| Act::Settle { back }),
        ],
    ]
}

/// What the logs after each point changed is named to the byte, in order.
fn check_extents(replica: &MachineReplica, epochs: &[(u64, Vec<Change>)]) {
    for point in replica.points() {
        let epoch = point.lineage.epoch;
        let mut expected = DISK_BYTES.map(|size| vec![false; to_usize(size)]);
        let later = epochs.iter().filter(|(number, _)| *number > epoch.0);
        for change in later.flat_map(|(_, changes)| changes) {
            let disk = &mut expected[usize::from(change.disk)];
            let end = ((change.block + change.blocks) * 4096).min(to_u64(disk.len()));
            disk[to_usize(change.block * 4096)..to_usize(end)].fill(true);
        }
        let mut named = DISK_BYTES.map(|size| vec![false; to_usize(size)]);
        let extents = replica.extents_after(epoch).unwrap();
        for (disk, run) in &extents {
            assert!(run.len > 0);
            named[disk.index()][to_usize(run.offset)..to_usize(run.end())].fill(true);
        }
        assert!(named == expected, "after {epoch}: {extents:?}");
        assert!(
            extents.is_sorted_by(|(a, left), (b, right)| (a, left.end()) < (b, right.offset)),
            "{extents:?}"
        );
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn every_point_of_a_random_life_is_right(
        acts in prop::collection::vec(any_act(), 1..30),
        was_primary: bool,
    ) {
        let host = Host::new();
        let (mut model, own, mut last) = if was_primary {
            let (model, own) = parted();
            leave_images(&*host.folder, &specs(), &own);
            (model, own, COMMON)
        } else {
            let model = Model::new();
            (Model::new(), model.disks, 0)
        };
        let mut replica = host.open(2).unwrap();
        let mut differs = was_primary.then(|| differing(3, Codec::Lz4));
        if was_primary {
            replica.adopt(&specs(), adoption(&model, false)).unwrap();
        } else {
            replica.prepare(&specs()).unwrap();
            send(&replica, &model.epoch(0, None)).unwrap();
        }
        let mut epochs: Vec<(u64, Vec<Change>)> = Vec::new();
        let mut open: Option<PointView> = None;
        let mut rescue: Option<PointView> = None;
        let mut kept = was_primary;
        for act in acts {
            match act {
                Act::Epoch { gap, mut changes } => {
                    changes.extend(differs.take().into_iter().flatten());
                    let log = model.epoch_of(last + gap, Some(last), &changes);
                    last += gap;
                    epochs.push((last, changes));
                    send(&replica, &log).unwrap();
                }
                Act::Upkeep => {
                    replica.upkeep().unwrap();
                }
                Act::Reopen { retention } => {
                    (open, rescue) = (None, None);
                    drop(replica);
                    let options = ReplicaOptions {
                        retention,
                        ..options(0)
                    };
                    replica = host.open_with(options).unwrap();
                }
                Act::View { back } => {
                    let points = replica.points();
                    let point = points.iter().rev().nth(back);
                    open = point.map(|point| replica.view(point.lineage.epoch).unwrap());
                }
                Act::Rescue => {
                    let view = replica.view_rescue();
                    prop_assert_eq!(view.is_ok(), kept);
                    rescue = if rescue.is_some() { None } else { view.ok() };
                }
                Act::DropRescue => {
                    let dropped = replica.drop_rescue().is_ok();
                    prop_assert_eq!(dropped, rescue.is_none());
                    kept &= !dropped;
                }
                Act::Settle { back } => {
                    let points = replica.points();
                    let Some(point) = points.iter().rev().nth(back) else {
                        continue;
                    };
                    let epoch = point.lineage.epoch;
                    let viewed = open.as_ref().map(|view| view.point.lineage.epoch);
                    let free = rescue.is_none() && viewed.is_none_or(|viewed| viewed == epoch);
                    let settled = replica.settle(epoch);
                    prop_assert_eq!(settled.is_ok(), free, "{:?}", settled);
                    if free {
                        kept = false;
                        last = epoch.0;
                        model.disks = model.history[&epoch].clone();
                        epochs.retain(|(number, _)| *number <= last);
                        prop_assert_eq!(replica.points().len(), 1);
                    }
                }
            }
            prop_assert_eq!(head_epoch(&replica), Some(Epoch(last)));
            prop_assert_eq!(replica.rescue().is_some(), kept);
            check_points(&replica, &model);
            check_extents(&replica, &epochs);
            if kept {
                check_rescue(&replica, &own);
            }
            if let Some(view) = &open {
                let expected = &model.history[&view.point.lineage.epoch];
                for (disk, expected) in view.disks.iter().zip(expected) {
                    prop_assert!(content(&**disk) == *expected, "the open view changed");
                }
            }
        }
    }
}
