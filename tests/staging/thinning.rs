//! Which points stay, how logs are folded, what a cut leaves of a fold, and what gives way when space is short.

use std::io;

use understudy::{
    base::{clock::Timestamp, limits::LOGS_MAX, units::Epoch},
    delta::{Codec, Encoder, Header, LogKind},
    replica::{
        FoldReport, IngestError, MachineReplica, ReplicaOptions, Retention, Squeeze, Upkeep,
    },
    storage::{Folder, Open},
};

use super::{
    Change, GENERATION, Host, MACHINE, Model, check_points, content, entries, grow, head_epoch,
    options, send, specs,
};

fn keeping(newest: u32, hourly: u32) -> ReplicaOptions {
    ReplicaOptions {
        retention: Retention { newest, hourly },
        ..options(0)
    }
}

/// An epoch that writes the same blocks as all others like it, and some of its own.
fn hot(model: &mut Model, epoch: u64, parent: Option<u64>) -> Vec<u8> {
    let codec = Codec::ALL[usize::try_from(epoch % 3).unwrap()];
    hot_in(codec, model, epoch, parent)
}

fn hot_in(codec: Codec, model: &mut Model, epoch: u64, parent: Option<u64>) -> Vec<u8> {
    let seed = u8::try_from(epoch % 250).unwrap();
    let data = |disk, block, blocks| Change {
        disk,
        block,
        blocks,
        data: Some((seed, codec)),
    };
    let zeros = Change {
        data: None,
        ..data(1, epoch % 4, 2)
    };
    let changes = [
        data(0, 2, 6),
        data(0, 10 + epoch % 3, 2),
        data(1, 7, 2),
        zeros,
    ];
    model.epoch_of(epoch, parent, &changes)
}

/// All steps that there are to take.
fn keep_up(replica: &MachineReplica) -> Vec<Upkeep> {
    let mut steps = Vec::new();
    while let Some(step) = replica.upkeep().unwrap() {
        steps.push(step);
    }
    steps
}

fn folds(steps: &[Upkeep]) -> Vec<FoldReport> {
    let fold = |step: &Upkeep| match step {
        Upkeep::Folded(report) => Some(*report),
        Upkeep::Merged(_) => None,
    };
    steps.iter().filter_map(fold).collect()
}

fn epochs(replica: &MachineReplica) -> Vec<u64> {
    let points = replica.points();
    points.iter().map(|point| point.lineage.epoch.0).collect()
}

/// The cut of epoch `n` is at second `n`: an epoch every ten minutes, for eight hours.
#[test]
fn the_newest_and_one_of_each_hour_stay_and_read_right() {
    let host = Host::new();
    let mut model = Model::new();
    let replica = host.open_with(keeping(2, 3)).unwrap();
    replica.prepare(&specs()).unwrap();
    send(&replica, &hot(&mut model, 0, None)).unwrap();
    let mut all = Vec::new();
    let mut folded = Vec::new();
    let mut last = 0;
    for epoch in (1..=48).map(|n| n * 600) {
        send(&replica, &hot(&mut model, epoch, Some(last))).unwrap();
        last = epoch;
        all.push(epoch);
        folded.extend(folds(&keep_up(&replica)));
        // Told from the words of the policy alone.
        let newest = &all[all.len().saturating_sub(3)..];
        let hours = (epoch / 3600).saturating_sub(2)..=epoch / 3600;
        let mut expected: Vec<u64> = hours
            .filter_map(|hour| all.iter().copied().find(|epoch| epoch / 3600 == hour))
            .chain(newest.iter().copied())
            .collect();
        expected.sort_unstable();
        expected.dedup();
        assert_eq!(epochs(&replica), expected, "at {epoch}");
        check_points(&replica, &model);
    }
    assert!(folded.len() > 3, "logs were folded: {folded:?}");
    for fold in &folded {
        assert!(
            fold.logs > 1 && fold.written <= fold.bytes / 2 + 400,
            "a fold saves half: {fold:?}"
        );
    }
    let status = replica.status();
    assert!(status.logs < 18, "{} logs for 3 hours", status.logs);
    assert_eq!(status.squeeze, Squeeze::None);
    drop(replica);
    // Found again, and continued by the primary's next log.
    let replica = host.open_with(keeping(2, 3)).unwrap();
    check_points(&replica, &model);
    assert_eq!(head_epoch(&replica), Some(Epoch(last)));
    send(&replica, &hot(&mut model, last + 1, Some(last))).unwrap();
    check_points(&replica, &model);
    drop(replica);
    let replica = host.open_with(keeping(0, 0)).unwrap();
    keep_up(&replica);
    assert_eq!(epochs(&replica), [last + 1]);
    check_points(&replica, &model);
    assert_eq!(host.files().len(), 2, "{:?}", host.files());
}

/// Logs whose fold saves nothing stay as they are, until there are more than a machine may have.
#[test]
fn above_the_limit_of_logs_one_is_folded_whatever_it_saves() {
    let host = Host::new();
    let mut model = Model::new();
    let hours = u32::try_from(LOGS_MAX).unwrap();
    let replica = host.open_with(keeping(1, hours)).unwrap();
    replica.prepare(&specs()).unwrap();
    send(&replica, &hot(&mut model, 0, None)).unwrap();
    let mut last = 0;
    let mut written = |epoch: u64| {
        let change = Change {
            disk: 0,
            block: epoch / 1200 % 24,
            blocks: 1,
            data: Some((u8::try_from(epoch / 1200 % 250).unwrap(), Codec::None)),
        };
        let log = model.epoch_of(epoch, Some(last), &[change]);
        last = epoch;
        log
    };
    // Three blocks in each hour, of which the first is a point for good: the other two may become one.
    let mut epochs = (1..).map(|n| n * 1200);
    while replica.status().logs < LOGS_MAX {
        send(&replica, &written(epochs.next().unwrap())).unwrap();
        assert_eq!(folds(&keep_up(&replica)), []);
    }
    assert_eq!(replica.status().counters.folded, 0);
    for _ in 0..6 {
        send(&replica, &written(epochs.next().unwrap())).unwrap();
        let crowded = replica.status().logs > LOGS_MAX;
        let folds = folds(&keep_up(&replica));
        assert_eq!(folds.len(), usize::from(crowded), "{folds:?}");
        assert!(replica.status().logs <= LOGS_MAX);
    }
    assert!(replica.status().counters.folded > 0);
    for point in replica.points().iter().rev().take(5) {
        let view = replica.view(point.lineage.epoch).unwrap();
        for (disk, expected) in view.disks.iter().zip(&model.history[&point.lineage.epoch]) {
            assert!(content(&**disk) == *expected, "{point:?}");
        }
    }
}

/// Some epochs of one hour; all but the first and the last are of no use.
fn grown(host: &Host) -> (Model, MachineReplica) {
    let mut model = Model::new();
    let replica = host.open_with(keeping(0, 9)).unwrap();
    replica.prepare(&specs()).unwrap();
    for epoch in 0..=7 {
        send(&replica, &hot(&mut model, epoch, epoch.checked_sub(1))).unwrap();
    }
    let step = replica.upkeep().unwrap();
    assert!(matches!(step, Some(Upkeep::Merged(_))), "{step:?}");
    (model, replica)
}

/// The power is cut at every step of a fold; whatever is kept of what was not synced, the points are there, and the
/// next fold is made.
#[test]
fn a_power_cut_while_folding_loses_nothing() {
    for steps in 0.. {
        let mut done = false;
        for variant in 0..6u64 {
            let what = format!("cut after step {steps}, variant {variant}");
            let host = Host::new();
            let (mut model, replica) = grown(&host);
            host.power.cut_after(steps);
            let folded = replica.upkeep();
            done = matches!(folded, Ok(Some(Upkeep::Folded(_))));
            drop(replica);
            let mut turn = variant;
            host.power.restore(&mut || {
                turn = turn * 5 + 3;
                variant == 1 || (variant > 1 && turn % 7 < 3)
            });
            let replica = host
                .open_with(keeping(0, 9))
                .unwrap_or_else(|error| panic!("{what}: {error:?}"));
            assert_eq!(epochs(&replica), [1, 7], "{what}");
            check_points(&replica, &model);
            assert!(
                host.files().iter().all(|name| !name.contains(".part")),
                "{what}"
            );
            keep_up(&replica);
            check_points(&replica, &model);
            assert_eq!(host.files().len(), 3, "{what}: {:?}", host.files());
            send(&replica, &hot(&mut model, 8, Some(7))).unwrap();
            check_points(&replica, &model);
        }
        if done {
            assert!(steps >= 10, "the cuts reach into the fold: {steps}");
            break;
        }
    }
}

/// Each call of a fold in turn finds the disk full: that is no failure of the replica, and nothing is lost.
#[test]
fn a_fold_that_finds_the_disk_full_changes_nothing() {
    for steps in 0.. {
        let host = Host::new();
        let (mut model, replica) = grown(&host);
        let before = host.power.steps();
        host.power.fail_after(steps, io::ErrorKind::StorageFull);
        let _ = replica.upkeep();
        let files = host.files();
        assert!(!files.contains(&"folded.part".into()), "{steps}: {files:?}");
        check_points(&replica, &model);
        assert_eq!(head_epoch(&replica), Some(Epoch(7)));
        if host.power.steps() - before <= steps {
            break;
        }
        drop(replica);
        let replica = host.open_with(keeping(0, 9)).unwrap();
        check_points(&replica, &model);
        send(&replica, &hot(&mut model, 8, Some(7))).unwrap();
        keep_up(&replica);
        check_points(&replica, &model);
    }
}

/// A point in use stays a point, whatever is folded around it; then it goes as well.
#[test]
fn a_point_in_use_is_not_folded_away() {
    let host = Host::new();
    let mut model = Model::new();
    let replica = host.open_with(keeping(1, 1)).unwrap();
    grow(&replica, &mut model, 0);
    let mut last = 0;
    let mut views = Vec::new();
    for epoch in 1..=40 {
        send(&replica, &hot(&mut model, epoch, Some(last))).unwrap();
        last = epoch;
        if epoch == 20 {
            views.push(replica.view(Epoch(epoch)).unwrap());
        }
        keep_up(&replica);
        check_points(&replica, &model);
    }
    assert_eq!(epochs(&replica), [1, 20, 39, 40]);
    assert!(matches!(
        replica.view(Epoch(19)),
        Err(understudy::replica::ReplicaError::NoPoint(Epoch(19)))
    ));
    for (disk, expected) in views[0].disks.iter().zip(&model.history[&Epoch(20)]) {
        assert!(content(&**disk) == *expected);
    }
    views.clear();
    assert_eq!(epochs(&replica), [1, 39, 40]);
    keep_up(&replica);
    check_points(&replica, &model);
    let report = replica.status();
    assert!(report.logs < 10, "{}", report.logs);
}

/// What a folded log says about the step between its two points is the word of the host that folded it.
#[test]
fn a_folded_log_is_not_taken_from_a_link() {
    let host = Host::new();
    let (model, replica) = grown(&host);
    let header = Header {
        machine: MACHINE,
        generation: GENERATION,
        kind: LogKind::Folded(understudy::base::ids::Lineage {
            epoch: Epoch(9),
            chain: understudy::base::checksum::Digest([1; 32]),
        }),
        parent: Some(model.lineages[&Epoch(7)]),
        disks: entries(),
    };
    let (encoder, first) = Encoder::new(&header);
    let (end, _) = encoder.finish(Epoch(9), Timestamp(9));
    let log = [&first[..], &end[..]].concat();
    assert!(matches!(send(&replica, &log), Err(IngestError::Folded)));
    assert_eq!(head_epoch(&replica), Some(Epoch(7)));
}

/// A damaged folded log is found out before anything is built on it.
#[test]
fn a_damaged_folded_log_is_named() {
    let host = Host::new();
    let (_, replica) = grown(&host);
    assert_eq!(folds(&keep_up(&replica)).len(), 1);
    drop(replica);
    let name = format!("{:020}.hrl", 7);
    let file = host.folder.open(&name, Open::Write).unwrap();
    let at = file.len().unwrap() - 72 - 32;
    let mut byte = [0];
    file.read_at(at, &mut byte).unwrap();
    file.write_at(at, &[byte[0] ^ 1], understudy::storage::Fua::No)
        .unwrap();
    let replica = host.open_with(keeping(0, 9)).unwrap();
    let error = replica.view(Epoch(7)).unwrap_err();
    assert!(error.to_string().contains(&name), "{error}");
}

/// Space runs short: first the finest points go, then all but the latest; the latest stays right, and epochs go on.
#[test]
fn points_give_way_to_space_from_the_finest_on() {
    let host = Host::new();
    let mut model = Model::new();
    let replica = host.open_with(keeping(50, 9)).unwrap();
    grow(&replica, &mut model, 0);
    let first = hot_in(Codec::None, &mut model, 1, Some(0));
    send(&replica, &first).unwrap();
    let one = replica.status().log_bytes;
    drop(replica);
    let tight = ReplicaOptions {
        space_max: Some(one * 12),
        ..keeping(50, 9)
    };
    let replica = host.open_with(tight).unwrap();
    let mut last = 1;
    let mut next = |gap| {
        let log = hot_in(Codec::None, &mut model, last + gap, Some(last));
        last += gap;
        send(&replica, &log).unwrap();
        keep_up(&replica);
        check_points(&replica, &model);
        let status = replica.status();
        assert!(status.log_bytes <= one * 6, "{status:?}");
        assert_eq!(epochs(&replica).last(), Some(&last));
        (status.squeeze, epochs(&replica).len())
    };
    let seconds: Vec<_> = (0..30).map(|_| next(1)).collect();
    assert!(
        seconds[..4]
            .iter()
            .all(|(squeeze, _)| *squeeze == Squeeze::None),
        "{seconds:?}"
    );
    assert!(
        seconds[10..]
            .iter()
            .all(|(squeeze, points)| *squeeze == Squeeze::Finest && *points > 1),
        "{seconds:?}"
    );
    // Each of these is the first of its hour: there is nothing to fold, only the latest can stay.
    let hours: Vec<_> = (0..8).map(|_| next(3600)).collect();
    assert!(hours.contains(&(Squeeze::AllButOne, 1)), "{hours:?}");
}

/// Once retention asks for nothing from before, nothing is missing any more: neither of the newest, nor of the hours.
#[test]
fn a_squeeze_is_over_when_no_point_is_missing() {
    // The cut of epoch `n` is at second `n`; the points before epoch 3 are dropped.
    let newest: &[u64] = &[4, 5, 6];
    let hours = &[4, 5, 6, 3602, 7202, 7203];
    for (hourly, epochs) in [(0, newest), (2, hours)] {
        let host = Host::new();
        let mut model = Model::new();
        let replica = host.open_with(keeping(3, hourly)).unwrap();
        grow(&replica, &mut model, 3);
        let bytes = replica.status().log_bytes;
        drop(replica);
        let tight = ReplicaOptions {
            space_max: Some(bytes),
            ..keeping(3, hourly)
        };
        let replica = host.open_with(tight).unwrap();
        keep_up(&replica);
        assert_eq!(replica.status().squeeze, Squeeze::AllButOne);
        let mut last = 3;
        for &epoch in epochs {
            assert_eq!(replica.status().squeeze, Squeeze::AllButOne, "{epoch}");
            let small = Change {
                disk: 0,
                block: 3,
                blocks: 1,
                data: Some((9, Codec::None)),
            };
            send(&replica, &model.epoch_of(epoch, Some(last), &[small])).unwrap();
            last = epoch;
            keep_up(&replica);
        }
        assert_eq!(replica.status().squeeze, Squeeze::None);
        check_points(&replica, &model);
    }
}

/// A point in use holds everything back: then nothing more is accepted, until it is let go of.
#[test]
fn a_replica_that_can_free_nothing_refuses_and_goes_on_later() {
    let host = Host::new();
    let mut model = Model::new();
    let tight = ReplicaOptions {
        space_max: Some(120_000),
        ..options(0)
    };
    let replica = host.open_with(tight).unwrap();
    grow(&replica, &mut model, 2);
    keep_up(&replica);
    let view = replica.view(Epoch(2)).unwrap();
    let mut last = 2;
    let refused = loop {
        // Every block is another one: folding saves nothing.
        let change = |block| Change {
            disk: 0,
            block,
            blocks: 1,
            data: Some((u8::try_from(last).unwrap(), Codec::None)),
        };
        let first = last % 4 * 6;
        let changes: Vec<_> = (first..first + 6).map(change).collect();
        let log = model.epoch_of(last + 1, Some(last), &changes);
        if let Err(error) = send(&replica, &log) {
            assert!(error.is_full(), "{error}");
            break log;
        }
        last += 1;
        keep_up(&replica);
        assert!(last < 100, "nothing is ever refused");
    };
    assert_eq!(replica.status().squeeze, Squeeze::Refusing);
    assert_eq!(head_epoch(&replica), Some(Epoch(last)));
    for (disk, expected) in view.disks.iter().zip(&model.history[&Epoch(2)]) {
        assert!(content(&**disk) == *expected);
    }
    drop(view);
    keep_up(&replica);
    assert_eq!(epochs(&replica), [last]);
    send(&replica, &refused).unwrap();
    assert_eq!(epochs(&replica), [last, last + 1]);
    keep_up(&replica);
    check_points(&replica, &model);
    assert_ne!(replica.status().squeeze, Squeeze::Refusing);
}
