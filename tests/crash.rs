//! The power is cut at every step of a fixed history, and the replica must still catch up exactly: whatever may differ
//! was known (promise P3).

use understudy::disk::{Fua, Space};

use crate::model::{Op, World};

fn write(disk: usize, at: u64, len: u64, fill: u8, fua: Fua) -> Op {
    Op::Write {
        disk,
        at,
        len,
        fill,
        fua,
    }
}

/// Writes into cold and hot regions, cuts, a merge, cooling, a clean end and a second mount.
fn history() -> Vec<Op> {
    let acknowledged = true;
    vec![
        Op::Take {
            count: 1,
            max: 4096,
        },
        write(0, 4096, 4096, 1, Fua::No),
        Op::Finish { acknowledged },
        write(0, 0, 6000, 2, Fua::No),
        write(1, 512, 512, 3, Fua::Yes),
        write(0, (1 << 20) - 512, 1024, 4, Fua::No),
        Op::Flush { disk: 0 },
        Op::Cut,
        write(0, 4096, 512, 5, Fua::No),
        Op::Take {
            count: 1,
            max: 4096,
        },
        Op::Finish { acknowledged },
        Op::Maintain,
        write(0, 2 << 20, 8192, 6, Fua::No),
        Op::Cut,
        Op::Merge,
        Op::Maintain,
        Op::Maintain,
        write(0, 3 << 20, 512, 7, Fua::No),
        Op::Cut,
        Op::Finish {
            acknowledged: false,
        },
        Op::Zero {
            disk: 0,
            at: 0,
            len: 2 << 20,
            space: Space::Release,
        },
        Op::Cut,
        Op::Finish { acknowledged },
        Op::Close,
        write(1, 0, 4096, 8, Fua::No),
        Op::Cut,
        Op::Finish { acknowledged },
        write(1, 8192, 4096, 9, Fua::No),
    ]
}

#[test]
fn after_a_power_cut_at_any_step_the_replica_catches_up_exactly() {
    let history = history();
    let mut cuts = 0;
    for steps in 0.. {
        let mut through = true;
        // Nothing, everything, and two mixtures of what was not synced reach the platter.
        for kept in [0, 1, 2, 3] {
            let mut world = World::new(1 << 20);
            let power = Op::CutPowerAfter { steps };
            let failed = std::iter::once(&power)
                .chain(&history)
                .any(|op| world.step(op).is_err());
            through &= !failed;
            world.power_on(kept).unwrap();
            world.settle();
            cuts += 1;
        }
        if through {
            break;
        }
    }
    assert!(cuts > 400, "the cuts reach into the history: {cuts}");
}

/// A block is marked durably and its region has cooled; its epoch is cut, merged, and the next one is cut, which empties
/// the map that held the mark. If that reached the platter before the copy of the mark did, nobody would know the block.
#[test]
fn a_mark_that_moves_to_the_other_map_is_never_in_neither() {
    for kept in 0..16_u32 {
        let mut world = World::new(1 << 20);
        for op in [
            Op::Finish { acknowledged: true },
            write(0, 0, 4096, 1, Fua::No),
            Op::Maintain,
            Op::Maintain,
            Op::Cut,
            Op::Merge,
            Op::Cut,
        ] {
            world.step(&op).unwrap();
        }
        assert_eq!(world.machine().counters().hot_regions, 0);
        let mut turn = 0;
        world
            .power_on_with(&mut || {
                turn += 1;
                kept >> (turn - 1) & 1 == 1
            })
            .unwrap();
        world.settle();
    }
}

/// One step fails once, wherever it is: the guest may see an error, the machine may stop a disk or lose its maps, but
/// after a restart nothing is forgotten.
#[test]
fn after_one_failed_step_anywhere_the_replica_catches_up_exactly() {
    let history = history();
    for steps in (0..400).step_by(3) {
        let mut world = World::new(1 << 20);
        world.power.fail_after(steps, std::io::ErrorKind::Other);
        for op in &history {
            // A restart that fails leaves no machine to go on with.
            if world.step(op).is_err() && matches!(op, Op::Close) {
                break;
            }
        }
        world.power_on(2).unwrap();
        world.settle();
    }
}
