//! What is marked, owed and told, and what a restart keeps of it.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    thread,
};

use understudy::{
    base::units::{BLOCK_BYTES, DiskIndex, Epoch, Extent, to_u64, to_usize},
    disk::{Disk, DiskError, Fua},
    track::state::StateDir,
    volume::{
        CopyScope, CutRefused, MachineError, Piece, PieceContent, Reconcile, ReplicaHead,
        ResyncReason, Side, Standing, Taken,
    },
};

use super::host::{
    Blocks, Host, Runs, SIZES, blocks_in, blocks_of, drain, point, regions_of, run, sift,
    sift_nothing,
};

const MIB: u64 = 1 << 20;
const REVERSED: ResyncReason = ResyncReason::Reversed;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Restart {
    None,
    Kill,
    Close,
    OtherBoot,
}

/// Restarts the host; the blocks that are marked for it.
fn restart(host: &mut Host, how: Restart, written: &Blocks) -> Blocks {
    match how {
        Restart::None => return Blocks::new(),
        Restart::Kill => host.kill(),
        Restart::Close => host.close().unwrap(),
        Restart::OtherBoot => host.boot_again(),
    }
    host.start().unwrap();
    match how {
        Restart::OtherBoot => regions_of(written),
        _ => Blocks::new(),
    }
}

/// Compares what the machine tells with what it should, and looks at the form of it.
#[track_caller]
fn check_divergence(host: &Host, want: &Blocks) {
    let told = host.machine().divergence();
    assert_eq!(&blocks_of(&told), want);
    for pair in told.windows(2) {
        let ((disk, run), (next_disk, next)) = (pair[0], pair[1]);
        assert!(
            disk < next_disk || disk == next_disk && run.end() < next.offset,
            "{pair:?}"
        );
    }
    for (disk, run) in told {
        let size = SIZES[disk.index()];
        assert!(run.offset.is_multiple_of(BLOCK_BYTES) && run.len > 0);
        assert!(run.end().is_multiple_of(BLOCK_BYTES) || run.end() == size);
    }
}

/// The journey of a promoted host, with the process ended in some way after each step: what goes out is the union of
/// what it was told and what its guest wrote, and nothing else but the hot regions of another boot.
#[test]
fn a_continued_point_and_what_is_owed_are_one_epoch() {
    use Restart::{Close, Kill, None, OtherBoot};
    for how in [None, Kill, Close, OtherBoot] {
        let dir = tempfile::tempdir().unwrap();
        let mut host = Host::running(Some(StateDir::open(dir.path()).unwrap()));
        assert_eq!(host.machine().state().standing, Standing::Unprotected);
        // A guest that was quicker.
        host.write(1, 8192, 100, 1).unwrap();
        let mut want = Blocks::from([(1, 2)]);
        want.extend(restart(&mut host, how, &Blocks::from([(1, 2)])));

        // Also the last block of a disk, which is not a whole one.
        let rolled_back = [run(0, 4000, 200), run(0, SIZES[0] - 1, 1), run(1, 0, 0)];
        let from = point(41, 1);
        host.machine().continue_from(from, &rolled_back).unwrap();
        want.extend([(0, 0), (0, 1), (0, 768)]);
        check_divergence(&host, &want);
        let owed = host.machine().counters().owed_open_blocks;
        assert_eq!(owed, to_u64(want.len()), "owed without a new connection");
        // Marks without a write have no hot region.
        want.extend(restart(&mut host, how, &Blocks::new()));
        check_divergence(&host, &want);
        assert_eq!(host.machine().state().standing, Standing::Following);
        assert_eq!(host.machine().lineage(), Some(from));
        assert_eq!(host.machine().open_epoch(), Epoch(42));
        assert_eq!(host.machine().at_rest(), Option::None);

        host.write(0, 2 * MIB, 4096, 2).unwrap();
        want.insert((0, 512));
        let theirs: Runs = vec![run(0, 2 * MIB + 4096, 8192), run(1, MIB, 512)];
        host.machine().suspect(&theirs, REVERSED).unwrap();
        let known = host.machine().counters().owed_open_blocks;
        want.extend([(0, 513), (0, 514), (1, 256)]);
        check_divergence(&host, &want);
        let counters = host.machine().counters();
        assert_eq!(counters.owed_open_blocks, known, "{how:?}");
        assert_eq!(known + counters.suspect_blocks, to_u64(want.len()));
        want.extend(restart(&mut host, how, &Blocks::from([(0, 512)])));
        // Both steps done again by a host that does not know how far it came.
        host.machine().continue_from(from, &rolled_back).unwrap();
        host.machine().suspect(&theirs, REVERSED).unwrap();
        check_divergence(&host, &want);
        let resync = host.machine().state().resync;
        assert_eq!(resync, Some(REVERSED), "{how:?}");

        let head = ReplicaHead::At(from);
        assert_eq!(host.machine().reconcile(head).unwrap(), Reconcile::InStep);
        let suspects = host.machine().counters().suspect_blocks;
        assert_eq!(suspects, to_u64(want.len()), "all that is marked");
        assert!(matches!(host.machine().cut(), Err(CutRefused::Suspects(n)) if n == suspects));
        sift_nothing(host.machine()).unwrap();
        let cut = host.machine().cut().unwrap();
        assert_eq!(cut.epoch, Epoch(42));
        let log = drain(host.machine(), Side::Closing, cut.epoch).unwrap();
        assert_eq!(blocks_in(&log), want, "{how:?}");
        check_divergence(&host, &want);
        host.machine().pending(point(42, 2)).unwrap();
        assert_eq!(host.machine().at_rest(), Option::None);
        host.machine().staged(point(42, 2)).unwrap();
        check_divergence(&host, &Blocks::new());
        assert_eq!(host.machine().at_rest(), Some(point(42, 2)));
        // Once more, when epochs went out already: the head stays.
        host.machine().continue_from(from, &[]).unwrap();
        assert_eq!(host.machine().at_rest(), Some(point(42, 2)));
    }
}

#[test]
fn a_machine_is_at_rest_only_if_nothing_happened_since_the_point() {
    let mut host = Host::running(None);
    assert_eq!(host.machine().at_rest(), None, "there is no point");
    host.machine().continue_from(point(7, 7), &[]).unwrap();
    assert_eq!(host.machine().at_rest(), Some(point(7, 7)));
    host.write(0, 0, 512, 1).unwrap();
    assert_eq!(host.machine().at_rest(), None, "a write");
    let epoch = host.machine().cut().unwrap().epoch;
    drain(host.machine(), Side::Closing, epoch).unwrap();
    assert_eq!(host.machine().at_rest(), None, "a closing epoch");
    host.machine().pending(point(8, 8)).unwrap();
    host.machine().merge();
    let epoch = host.machine().cut().unwrap().epoch;
    drain(host.machine(), Side::Closing, epoch).unwrap();
    host.machine().staged(point(9, 9)).unwrap();
    assert_eq!(host.machine().at_rest(), Some(point(9, 9)));
    // An epoch in which nothing was written.
    host.machine().cut().unwrap();
    assert_eq!(host.machine().at_rest(), None, "an empty epoch is one");
    host.machine().pending(point(10, 1)).unwrap();
    host.machine().merge();
    assert_eq!(host.machine().at_rest(), None, "a trailer on its way");
    host.kill();
    host.start().unwrap();
    assert_eq!(host.machine().at_rest(), None, "nor after a restart");
    let head = ReplicaHead::At(point(10, 1));
    assert_eq!(host.machine().reconcile(head).unwrap(), Reconcile::AckLost);
    assert_eq!(host.machine().at_rest(), Some(point(10, 1)));
    // What the peer may hold of another history means nothing for the point that is continued.
    host.machine().cut().unwrap();
    host.machine().pending(point(11, 3)).unwrap();
    host.machine().merge();
    host.machine().continue_from(point(30, 4), &[]).unwrap();
    assert_eq!(host.machine().at_rest(), Some(point(30, 4)));
    let copy = CopyScope::Allocated;
    host.machine().begin_initial_copy(copy).unwrap();
    assert_eq!(host.machine().at_rest(), None, "a copy");
    let whole: Runs = vec![run(0, 0, SIZES[0]), run(1, 0, SIZES[1])];
    assert_eq!(host.machine().divergence(), whole);
    // A copy that was under way to somebody else becomes part of the epoch.
    let held = host.machine().counters().closing_blocks;
    host.machine().continue_from(point(7, 7), &[]).unwrap();
    assert_eq!(host.machine().state().standing, Standing::Following);
    assert_eq!(host.machine().lineage(), Some(point(7, 7)));
    assert_eq!(host.machine().counters().owed_open_blocks, held);
    assert_eq!(host.machine().cut().unwrap().epoch, Epoch(8));
}

/// The flush failed: what the hot regions hold on the platter is uncertain, although the replica holds all of it.
#[test]
fn a_disk_that_cannot_be_flushed_is_not_at_rest() {
    let host = Host::running(None);
    host.machine().continue_from(point(7, 7), &[]).unwrap();
    host.write(0, 0, 512, 1).unwrap();
    let epoch = host.machine().cut().unwrap().epoch;
    drain(host.machine(), Side::Closing, epoch).unwrap();
    host.machine().staged(point(8, 8)).unwrap();
    check_divergence(&host, &Blocks::new());
    host.power.fail_after(0, std::io::ErrorKind::Other);
    assert!(host.machine().volumes()[0].flush().is_err());
    assert_eq!(host.machine().at_rest(), None);
    check_divergence(&host, &regions_of(&Blocks::from([(0, 0)])));
}

#[test]
fn without_tracking_everything_may_differ() {
    let host = Host::running(None);
    host.machine().continue_from(point(7, 7), &[]).unwrap();
    host.power.fail_after(0, std::io::ErrorKind::StorageFull);
    let refused = host.machine().suspect(&[run(0, 0, 1)], REVERSED);
    assert!(matches!(refused, Err(MachineError::State { .. })));
    assert_eq!(host.machine().at_rest(), None);
    let whole: Runs = vec![run(0, 0, SIZES[0]), run(1, 0, SIZES[1])];
    assert_eq!(host.machine().divergence(), whole);
    let refused = host.machine().suspect(&[], REVERSED);
    assert!(matches!(refused, Err(MachineError::TrackingLost(_))));
}

#[test]
fn runs_that_leave_the_disks_are_refused_and_nothing_is_marked() {
    let host = Host::running(None);
    let machine = host.machine();
    machine.continue_from(point(7, 7), &[]).unwrap();
    let good = run(0, 0, 4096);
    for (bad, text) in [
        (
            run(1, SIZES[1], 1),
            "1 bytes at offset 0x100200 lie outside of disk disk-1, which has 1049088 bytes",
        ),
        (run(0, u64::MAX, 2), "lie outside of disk disk-0"),
        (run(0, 0, u64::MAX), "lie outside of disk disk-0"),
        (
            run(2, 4096, 1),
            "offset 0x1000 of disk number 2, but the machine has 2 disks",
        ),
    ] {
        let error = machine
            .suspect(&[good, bad], REVERSED)
            .unwrap_err()
            .to_string();
        assert!(error.contains(text), "{error}");
        let refused = machine.continue_from(point(9, 9), &[good, bad]);
        assert_eq!(refused.unwrap_err().to_string(), error);
    }
    for epoch in [(1 << 62) + 1, u64::MAX] {
        let far = point(epoch, 1);
        for refused in [
            machine.continue_from(far, &[good]),
            machine.begin_resync(far),
        ] {
            assert!(matches!(refused, Err(MachineError::EpochTooHigh(_))));
        }
    }
    assert_eq!(machine.at_rest(), Some(point(7, 7)));
}

/// The peer turns out to differ in a block while an epoch is closing. Without that block the epoch would be a point of
/// the peer that the machine was never in; so it is merged, and its log goes on.
#[test]
fn a_closing_epoch_does_not_complete_without_what_is_owed() {
    let host = Host::running(None);
    let machine = host.machine();
    machine.continue_from(point(7, 7), &[]).unwrap();
    host.write(0, 0, 8192, 1).unwrap();
    machine.cut().unwrap();
    let first = match machine.take(Side::Closing, Epoch(8), 4096).unwrap() {
        Taken::Piece(piece) => piece,
        other => panic!("{other:?}"),
    };
    host.write(1, 8192, 512, 2).unwrap();
    check_divergence(&host, &Blocks::from([(0, 0), (0, 1), (1, 2)]));
    machine.suspect(&[], REVERSED).unwrap();
    assert_eq!(machine.closing_epoch(), Some(Epoch(8)), "nothing to add");
    machine.suspect(&[run(1, 0, 1)], REVERSED).unwrap();
    assert_eq!(
        (machine.closing_epoch(), machine.open_epoch()),
        (None, Epoch(9))
    );
    let taken = machine.take(Side::Closing, Epoch(8), 4096).unwrap();
    assert_eq!(taken, Taken::Superseded);
    assert!(machine.pending(point(8, 8)).is_err());
    sift_nothing(machine).unwrap();
    let epoch = machine.cut().unwrap().epoch;
    let mut log = vec![first];
    log.extend(drain(machine, Side::Closing, epoch).unwrap());
    assert_eq!(
        blocks_in(&log),
        Blocks::from([(0, 0), (0, 1), (1, 0), (1, 2)])
    );
    assert_eq!(log.len(), 4, "what was sent is not sent again");
    machine.staged(point(9, 9)).unwrap();
    assert_eq!(machine.at_rest(), Some(point(9, 9)));
}

/// Epoch 0 is no recovery point: what is owed beside it belongs to epoch 1, also where the disk has a hole.
#[test]
fn what_is_owed_during_the_initial_copy_belongs_to_epoch_1() {
    let host = Host::running(None);
    let machine = host.machine();
    host.write(0, 0, 4096, 1).unwrap();
    machine.begin_initial_copy(CopyScope::Allocated).unwrap();
    machine.suspect(&[run(0, 2 * MIB, 1)], REVERSED).unwrap();
    let copy = drain(machine, Side::Closing, Epoch::INITIAL).unwrap();
    assert_eq!(blocks_in(&copy), Blocks::from([(0, 0)]));
    machine.staged(point(0, 1)).unwrap();
    machine.cut().unwrap();
    let log = drain(machine, Side::Closing, Epoch(1)).unwrap();
    assert!(log.contains(&Piece {
        disk: DiskIndex(0),
        run: Extent::new(2 * MIB, 4096),
        content: PieceContent::Zero,
    }));
}

/// Without the record and the files the machine is new: it is not the old one whose image somebody changed.
#[test]
fn a_forgotten_machine_is_new() {
    for forgotten in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let mut host = Host::running(Some(StateDir::open(dir.path()).unwrap()));
        let files = || std::fs::read_dir(dir.path()).unwrap().count();
        host.machine().continue_from(point(7, 7), &[]).unwrap();
        host.write(0, 0, 4096, 1).unwrap();
        host.close().unwrap();
        assert_eq!(files(), 6);
        // Half made by a crash; and the node's own files, which stay.
        for name in ["disk-7.map-a.new", "node.redb", "disk-07.map-a"] {
            std::fs::write(dir.path().join(name), "x").unwrap();
        }
        if forgotten {
            host.forget().unwrap();
            host.forget().unwrap();
            assert_eq!(files(), 2);
        }
        host.changed = 99;
        host.start().unwrap();
        let machine = host.machine();
        if forgotten {
            assert_eq!(machine.state().standing, Standing::Unprotected);
            assert_eq!((machine.state().resync, machine.lineage()), (None, None));
            assert_eq!(machine.counters().open_blocks, 0);
            machine.continue_from(point(20, 2), &[]).unwrap();
            assert_eq!(machine.at_rest(), Some(point(20, 2)));
        } else {
            let reason = ResyncReason::ImageChanged(DiskIndex(0));
            assert_eq!(machine.state().resync, Some(reason));
        }
    }
}

/// Guests write while the peer's runs become owed, again and again, and epochs go out: the replica, damaged by hand
/// wherever it is said to differ, ends equal.
#[test]
fn runs_become_owed_while_the_guest_writes() {
    let mut primary = Host::new(None);
    // Little room for pre-images, so that writers merge epochs too.
    primary.preserve_bytes_max = 8 * 4096;
    primary.start().unwrap();
    let replica = Host::new(None);
    let machine = primary.machine();
    machine.continue_from(point(0, 0), &[]).unwrap();
    let stop = AtomicBool::new(false);
    let mut complete = 0;
    let send = |log: &mut Vec<Piece>| {
        let epoch = machine.cut().unwrap().epoch;
        loop {
            match machine.take(Side::Closing, epoch, 8192).unwrap() {
                Taken::Piece(piece) => log.push(piece),
                Taken::Drained => break,
                Taken::Superseded => return false,
            }
        }
        replica.apply(&std::mem::take(log));
        machine.staged(point(epoch.0, 1)).unwrap();
        true
    };
    thread::scope(|scope| {
        for writer in 0..2_u64 {
            let stop = &stop;
            scope.spawn(move || {
                for turn in 0_u64.. {
                    if stop.load(Ordering::Relaxed) {
                        break;
                    }
                    let disk = to_usize(turn % 2);
                    let at = (turn * 13 + writer * 4096) * 512 % (SIZES[disk] - 8192);
                    let fill = vec![u8::try_from(turn % 251).unwrap(); 4608];
                    let written: Result<(), DiskError> =
                        machine.volumes()[disk].write_at(at, &fill, Fua::No);
                    written.expect("nothing fails here");
                }
            });
        }
        let mut log = Vec::new();
        for turn in 0..300_u64 {
            let runs: Runs = vec![run(0, turn * 9000, 5000), run(1, turn * 3000, 100)];
            if log.is_empty() {
                for (disk, run) in &runs {
                    let junk = vec![0xBA; to_usize(run.len)];
                    let image = &replica.images[disk.index()];
                    understudy::storage::Storage::write_at(&**image, run.offset, &junk, Fua::No)
                        .unwrap();
                }
            }
            machine.suspect(&runs, REVERSED).unwrap();
            sift(machine, &replica.contents()).unwrap();
            complete += u64::from(send(&mut log));
        }
        stop.store(true, Ordering::Relaxed);
        // What a merge left of the last log goes on in the next one.
        while !send(&mut log) {}
    });
    while machine.at_rest().is_none() {
        send(&mut Vec::new());
    }
    assert!(replica.contents() == primary.contents());
    assert!(complete > 0, "some epochs got through");
}
