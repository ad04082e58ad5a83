//! The power ends at every step of what a promoted host does, and of forgetting.

use understudy::{
    storage::Folder,
    volume::{ResyncReason, Side, Standing},
};

use super::host::{Blocks, Host, Outcome, Runs, blocks_of, drain, point, run, sift_nothing};

/// What the host may rely on so far.
#[derive(Default)]
struct Promised {
    /// Blocks that must be told as differing.
    marked: Blocks,
    continued: bool,
}

fn theirs(turn: u64) -> Runs {
    vec![run(0, turn * 40_960, 5000), run(1, turn * 8192, 4096)]
}

/// Promoted, told twice what differs, once of it while an epoch is closing; regions cool, epochs are merged and cut.
fn promoted(host: &mut Host, promised: &mut Promised) -> Outcome {
    host.write(0, 1 << 20, 4096, 1)?;
    promised.marked.insert((0, 256));
    host.machine().continue_from(point(5, 5), &theirs(0))?;
    promised.continued = true;
    promised.marked.extend(blocks_of(&theirs(0)));
    host.machine().suspect(&theirs(1), ResyncReason::Reversed)?;
    promised.marked.extend(blocks_of(&theirs(1)));
    host.write(1, 0, 4096, 2)?;
    promised.marked.insert((1, 0));
    let machine = host.machine();
    machine.maintain()?;
    machine.maintain()?;
    sift_nothing(machine)?;
    machine.cut()?;
    machine.suspect(&theirs(2), ResyncReason::Reversed)?;
    promised.marked.extend(blocks_of(&theirs(2)));
    sift_nothing(machine)?;
    let epoch = machine.cut()?.epoch;
    drain(machine, Side::Closing, epoch)?;
    machine.disconnected();
    machine.cut()?;
    host.kill();
    host.start()?;
    host.machine().suspect(&theirs(3), ResyncReason::Reversed)?;
    promised.marked.extend(blocks_of(&theirs(3)));
    host.close()?;
    host.start()?;
    host.machine().suspect(&theirs(4), ResyncReason::Reversed)?;
    promised.marked.extend(blocks_of(&theirs(4)));
    Ok(())
}

/// Whatever was promised is told after the power cut, without a guest write that would have made its region hot.
#[test]
fn after_a_power_cut_everything_owed_is_owed() {
    let mut cuts = 0;
    for steps in 0.. {
        let mut through = true;
        for kept in 0..4_u64 {
            let mut host = Host::running(None);
            host.power.cut_after(steps);
            let mut promised = Promised::default();
            through &= promoted(&mut host, &mut promised).is_ok();
            let mut turn = 0;
            host.lose_power(&mut || {
                turn += 1;
                kept > 0 && turn % kept == 0
            })
            .unwrap();
            host.start().unwrap();
            let machine = host.machine();
            let following = machine.state().standing == Standing::Following;
            assert!(following || !promised.continued, "{steps}");
            machine.continue_from(point(5, 5), &theirs(0)).unwrap();
            let told = blocks_of(&machine.divergence());
            let lost: Vec<_> = promised.marked.difference(&told).collect();
            assert!(lost.is_empty(), "cut after {steps}, {kept}: {lost:?} lost");
            cuts += 1;
        }
        if through {
            break;
        }
    }
    assert!(cuts > 150, "the cuts reach into the history: {cuts}");
}

/// Forgetting is cut at every step; called again it ends, and even without that the machine is either the old one, which
/// says so, or new.
#[test]
fn after_a_power_cut_a_machine_is_forgotten_by_another_call() {
    for steps in 0.. {
        let mut done = false;
        for kept in 0..6_u64 {
            for again in [true, false] {
                let mut host = Host::running(None);
                host.machine().continue_from(point(5, 5), &[]).unwrap();
                host.write(0, 0, 4096, 1).unwrap();
                host.close().unwrap();
                host.power.cut_after(steps);
                done = host.forget().is_ok();
                let mut turn = kept;
                host.lose_power(&mut || {
                    turn += 1;
                    turn % 3 < kept / 2
                })
                .unwrap();
                if again {
                    host.forget().unwrap();
                    assert_eq!(names(host.state.folder()), [""; 0]);
                }
                host.start().unwrap();
                let machine = host.machine();
                let open = machine.counters().open_blocks;
                match machine.lineage() {
                    Some(_) => assert!(!again && !done && open > 0, "{steps}"),
                    None => {
                        assert_eq!((machine.state().resync, open), (None, 0), "{steps}");
                    }
                }
            }
        }
        if done {
            assert!(steps > 8, "the cuts reach into the call: {steps}");
            break;
        }
    }
}

fn names(folder: &dyn Folder) -> Vec<String> {
    folder.names().unwrap()
}
