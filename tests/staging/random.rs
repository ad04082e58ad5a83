//! Random lives of a replica: epochs of any shape over some hours, merges, folds, reopenings and views in any order.

use proptest::prelude::*;
use understudy::{
    base::units::{Epoch, to_u64},
    delta::Codec,
    replica::{ReplicaOptions, Retention},
};

use super::{
    Change, DISK_BYTES, Host, Model, check_points, content, head_epoch, options, send, specs,
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
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn every_point_of_a_random_life_is_right(acts in prop::collection::vec(any_act(), 1..30)) {
        let host = Host::new();
        let mut model = Model::new();
        let mut replica = host.open(2).unwrap();
        replica.prepare(&specs()).unwrap();
        send(&replica, &model.epoch(0, None)).unwrap();
        let mut last = 0;
        let mut open = None;
        for act in acts {
            match act {
                Act::Epoch { gap, changes } => {
                    let log = model.epoch_of(last + gap, Some(last), &changes);
                    last += gap;
                    send(&replica, &log).unwrap();
                }
                Act::Upkeep => {
                    replica.upkeep().unwrap();
                }
                Act::Reopen { retention } => {
                    open = None;
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
            }
            prop_assert_eq!(head_epoch(&replica), Some(Epoch(last)));
            check_points(&replica, &model);
            if let Some(view) = &open {
                let expected = &model.history[&view.point.lineage.epoch];
                for (disk, expected) in view.disks.iter().zip(expected) {
                    prop_assert!(content(&**disk) == *expected, "the open view changed");
                }
            }
        }
    }
}
