//! What a cut leaves. A fixed story is ended after every step: the power fails, the process is killed, the disk is full.
//! The cuts are enumerated, so there is no seed to note.

use std::io;

use understudy::{
    base::units::{DiskIndex, Epoch, to_usize},
    delta::{Codec, EncodedFrame, Header, LogKind, encode_data},
    replica::{Head, IngestEvent, ReplicaError},
    storage::{Folder, Fua, Open},
};

use super::{
    GENERATION, Host, MACHINE, Model, check_points, entries, grow, head_epoch, log_of, send, specs,
};

/// Says of each unsynced sector, name or length whether it is kept. The first two are the extremes.
pub(crate) fn keeps(variant: u64) -> impl FnMut() -> bool {
    let mut state = variant;
    move || match variant {
        0 => false,
        1 => true,
        _ => {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            state >> 63 == 0
        }
    }
}

/// What happened before the end of a story.
#[derive(Debug, Default)]
struct Told {
    prepared: bool,
    acknowledged: Option<Epoch>,
    /// Bytes of epoch 0 that were reported as durable.
    finished: bool,
}

const LAST_EPOCH: u64 = 4;

/// The whole life of a replica, up to the first error: an initial copy, epochs, merges, all behind an opened store.
fn tell(host: &Host, logs: &[Vec<u8>], told: &mut Told) -> Result<(), Box<dyn std::error::Error>> {
    let replica = host.open(1)?;
    replica.prepare(&specs())?;
    told.prepared = true;
    let next = head_epoch(&replica).map_or(0, |epoch| epoch.0 + 1);
    for epoch in next..=LAST_EPOCH {
        send(&replica, &logs[to_usize(epoch)])?;
        told.acknowledged = Some(Epoch(epoch));
        replica.merge()?;
    }
    told.finished = true;
    Ok(())
}

fn story() -> (Model, Vec<Vec<u8>>) {
    let mut model = Model::new();
    let logs = (0..=LAST_EPOCH).map(|epoch| model.epoch(epoch, epoch.checked_sub(1)));
    let logs = logs.collect();
    (model, logs)
}

/// What must be true when a host that told so much is opened again.
fn check_survivor(host: &Host, model: &Model, told: &Told, what: &str) {
    let replica = host
        .open(1)
        .unwrap_or_else(|error| panic!("{what}: {error:?}"));
    let head = head_epoch(&replica);
    let in_flight = told.acknowledged.map_or(Epoch::INITIAL, Epoch::next);
    assert!(
        head == told.acknowledged || head == Some(in_flight),
        "{what}: {told:?}, found {head:?}"
    );
    assert!(!told.prepared || replica.head() != Head::Empty, "{what}");
    if head.is_some_and(|head| head > Epoch::INITIAL) {
        let newest = replica.points().last().map(|point| point.lineage.epoch);
        assert_eq!(newest, head, "{what}");
    }
    assert!(
        host.files().iter().all(|name| !name.contains(".part")),
        "{what}"
    );
    check_points(&replica, model);
    drop(replica);
}

/// Goes on from what is left, to the end.
fn check_goes_on(host: &Host, model: &Model, logs: &[Vec<u8>], what: &str) {
    let mut told = Told::default();
    if let Err(error) = tell(host, logs, &mut told) {
        panic!("{what}: {error:?}");
    }
    let replica = host.open(1).unwrap();
    replica.merge().unwrap();
    assert_eq!(head_epoch(&replica), Some(Epoch(LAST_EPOCH)), "{what}");
    check_points(&replica, model);
    let status = replica.status();
    assert_eq!((status.logs, status.merging), (1, None), "{what}");
    assert_eq!(host.files().len(), 3, "{what}: {:?}", host.files());
}

/// The power is cut after every step of the story; of what was not synced nothing, everything or some is kept.
#[test]
fn a_power_cut_at_any_step_loses_nothing_acknowledged() {
    let (model, logs) = story();
    let mut cuts = 0;
    for steps in 0.. {
        let mut finished = false;
        for variant in 0..4 {
            let host = Host::new();
            host.power.cut_after(steps);
            let mut told = Told::default();
            let end = tell(&host, &logs, &mut told);
            assert_eq!(end.is_ok(), told.finished);
            host.power.restore(&mut keeps(variant));
            let what = format!("cut after step {steps}, variant {variant}");
            check_survivor(&host, &model, &told, &what);
            check_goes_on(&host, &model, &logs, &what);
            finished = told.finished;
        }
        cuts += 1;
        if finished {
            break;
        }
    }
    assert!(cuts > 80, "the cuts reach into the story: {cuts}");
}

/// A second cut while the first one is being repaired.
#[test]
fn a_power_cut_while_recovering_loses_nothing_either() {
    let (model, logs) = story();
    for steps in (0..400).step_by(13) {
        for again in 0..12 {
            let host = Host::new();
            host.power.cut_after(steps);
            let mut told = Told::default();
            let _ = tell(&host, &logs, &mut told);
            host.power.restore(&mut keeps(steps));
            host.power.cut_after(again);
            let before = told.acknowledged;
            told.acknowledged = None;
            let _ = tell(&host, &logs, &mut told);
            told.acknowledged = told.acknowledged.max(before);
            host.power.restore(&mut keeps(again + 1));
            let what = format!("cut after step {steps}, again after {again}");
            let replica = host
                .open(1)
                .unwrap_or_else(|error| panic!("{what}: {error:?}"));
            assert!(head_epoch(&replica) >= told.acknowledged, "{what}");
            check_points(&replica, &model);
            drop(replica);
            check_goes_on(&host, &model, &logs, &what);
        }
    }
}

/// The process is killed after every step: all that was written is there, nothing was closed.
#[test]
fn a_killed_process_loses_nothing() {
    let (model, logs) = story();
    for steps in 0.. {
        let host = Host::new();
        host.power.cut_after(steps);
        let mut told = Told::default();
        let _ = tell(&host, &logs, &mut told);
        host.power.restore(&mut || true);
        check_survivor(&host, &model, &told, &format!("killed after step {steps}"));
        if told.finished {
            break;
        }
    }
}

/// Each changing call in turn finds the disk full, once. The replica says so and stays what it was; the same open store
/// takes the epoch when there is space again, or, where a failed sync stopped an image, a reopened one does.
#[test]
fn a_full_disk_at_any_step_is_an_error_and_no_more() {
    let (model, logs) = story();
    let mut failures = 0;
    for steps in 0.. {
        let host = Host::new();
        host.power.fail_after(steps, io::ErrorKind::StorageFull);
        let what = format!("full at step {steps}");
        let mut told = Told::default();
        let end = tell(&host, &logs, &mut told);
        if end.is_err() {
            failures += 1;
            check_survivor(&host, &model, &told, &what);
        } else if host.power.steps() <= steps {
            break;
        }
        check_goes_on(&host, &model, &logs, &what);
    }
    assert!(
        failures > 80,
        "the failures reach into the story: {failures}"
    );
}

/// A process that dies between the rename and the sync of the folder leaves a name that is not durable. The next one
/// tells the primary that it has the epoch: from then on a power cut must not take it away.
#[test]
fn what_a_reopened_replica_claims_survives_a_power_cut() {
    let (model, logs) = story();
    for steps in 0.. {
        let host = Host::new();
        host.power.fail_after(steps, io::ErrorKind::Other);
        let mut told = Told::default();
        let end = tell(&host, &logs, &mut told);
        if end.is_ok() && host.power.steps() <= steps {
            break;
        }
        let claimed = head_epoch(&host.open(1).unwrap());
        host.power.restore(&mut || false);
        let replica = host.open(1).unwrap();
        assert_eq!(head_epoch(&replica), claimed, "failed at step {steps}");
        check_points(&replica, &model);
    }
}

/// A primary that is told a head forgets what it had sent beyond. So whatever fails once, the replica has nothing more
/// than it said when it is opened the next time.
#[test]
fn the_head_that_a_primary_is_told_is_all_there_is() {
    let (_, logs) = story();
    let mut failures = 0;
    for steps in 0.. {
        let host = Host::new();
        let replica = host.open(9).unwrap();
        replica.prepare(&specs()).unwrap();
        let before = host.power.steps();
        host.power.fail_after(steps, io::ErrorKind::Other);
        let failed = logs.iter().any(|log| send(&replica, log).is_err());
        if !failed && host.power.steps() <= before + steps {
            break;
        }
        failures += u32::from(failed);
        let Ok(told) = replica.settled_head() else {
            continue;
        };
        drop(replica);
        let found = host.open(9).unwrap().head();
        assert_eq!(found.lineage(), told.lineage(), "failed at step {steps}");
    }
    assert!(failures > 20, "{failures}");
}

/// A power cut may leave the name of a log that nobody was told of without its bytes, or with some of another one's.
#[test]
fn a_name_without_its_log_is_no_log() {
    let (model, logs) = story();
    let mut damaged = logs[3].clone();
    let at = damaged.len() - 100;
    damaged[at] ^= 1;
    for bytes in [&[][..], &logs[3][..100], &damaged] {
        let host = Host::new();
        let replica = host.open(9).unwrap();
        replica.prepare(&specs()).unwrap();
        for log in &logs[..3] {
            send(&replica, log).unwrap();
        }
        drop(replica);
        let name = format!("{:020}.hrl", 3);
        let file = host.folder.open(&name, Open::CreateNew).unwrap();
        file.write_at(0, bytes, Fua::Yes).unwrap();

        let replica = host.open(9).unwrap();
        assert_eq!(head_epoch(&replica), Some(Epoch(2)));
        assert!(!host.files().contains(&name));
        send(&replica, &logs[3]).unwrap();
        check_points(&replica, &model);
    }
}

/// Frames of an initial copy that were reported as durable are in the images after any cut: the primary does not send
/// them again.
#[test]
fn durable_frames_of_an_initial_copy_survive_a_power_cut() {
    let frames: Vec<EncodedFrame> = (0..20)
        .map(|block: u8| {
            let raw = [block + 1; 4096];
            encode_data(
                DiskIndex(0),
                u64::from(block) * 4096,
                raw.to_vec(),
                Codec::None,
            )
        })
        .collect();
    let header = Header {
        machine: MACHINE,
        generation: GENERATION,
        kind: LogKind::Initial,
        parent: None,
        disks: entries(),
    };
    let (log, _) = log_of(&header, &frames, Epoch::INITIAL);
    let mut most = 0;
    for steps in 0..60 {
        let host = Host::new();
        let replica = host.open(1).unwrap();
        replica.prepare(&specs()).unwrap();
        host.power.cut_after(steps);
        let mut durable = 0;
        let mut ingest = replica.begin(GENERATION).unwrap();
        for piece in log.chunks(3000) {
            for event in ingest.push(piece).unwrap_or_default() {
                if let IngestEvent::Durable { frames, .. } = event {
                    durable = frames;
                }
            }
        }
        drop(ingest);
        drop(replica);
        host.power.restore(&mut || false);
        let image = host.folder.open("disk-0.raw", Open::Read).unwrap();
        for block in 0..durable {
            let mut bytes = [0; 4096];
            image.read_at(block * 4096, &mut bytes).unwrap();
            assert_eq!(u64::from(bytes[4095]), block + 1, "cut after step {steps}");
        }
        most = most.max(durable);
    }
    assert!(most > 10, "the cuts reach into the copy: {most}");
}

/// A replica that is removed is there or gone, whenever the power fails.
#[test]
fn removing_survives_a_power_cut_at_any_step() {
    for steps in 0.. {
        let mut done = false;
        for variant in 0..3 {
            let host = Host::new();
            let mut model = Model::new();
            let replica = host.open(9).unwrap();
            grow(&replica, &mut model, 2);
            host.power.cut_after(steps);
            done = replica.destroy().is_ok();
            let gone = replica.head() == Head::Empty && replica.status().images.is_empty();
            assert!(gone || !done, "step {steps}");
            let closed = matches!(replica.prepare(&specs()), Err(ReplicaError::Closed));
            assert!(closed || !done, "step {steps}");
            drop(replica);
            host.power.restore(&mut keeps(variant));
            let replica = host.open(9).unwrap();
            if replica.head() == Head::Empty {
                assert!(host.files().is_empty(), "step {steps}: {:?}", host.files());
                let mut model = Model::new();
                grow(&replica, &mut model, 2);
            } else {
                assert!(!done, "step {steps}");
                check_points(&replica, &model);
                assert_eq!(replica.points().len(), 2);
            }
        }
        if done {
            assert!(steps > 5, "the cuts reach into the removal: {steps}");
            break;
        }
    }
}

/// A commit of a failover that is cut at any step, and then repeated, ends where it should; before that, the replica is
/// at the old head or at the chosen point.
#[test]
fn settling_survives_a_power_cut_at_any_step() {
    let chosen = Epoch(2);
    for steps in 0.. {
        let mut done = false;
        for variant in 0..3 {
            let host = Host::new();
            let mut model = Model::new();
            let replica = host.open(9).unwrap();
            grow(&replica, &mut model, 4);
            host.power.cut_after(steps);
            done = replica.settle(chosen).is_ok();
            drop(replica);
            host.power.restore(&mut keeps(variant));
            let replica = host.open(9).unwrap();
            let head = head_epoch(&replica).unwrap();
            assert!(
                head == chosen || (head == Epoch(4) && !done),
                "step {steps}: {head}"
            );
            check_points(&replica, &model);
            replica.settle(chosen).unwrap();
            assert_eq!(replica.points().len(), 1);
            check_points(&replica, &model);
            assert_eq!(host.files().len(), 2, "step {steps}");
        }
        if done {
            assert!(steps > 10, "the cuts reach into the settling: {steps}");
            break;
        }
    }
}

/// Without reopening: what failed for space is repeated on the same store.
#[test]
fn an_epoch_that_found_the_disk_full_is_taken_later() {
    let (model, logs) = story();
    for steps in 0.. {
        let host = Host::new();
        let replica = host.open(9).unwrap();
        replica.prepare(&specs()).unwrap();
        for log in &logs[..3] {
            send(&replica, log).unwrap();
        }
        let before = host.power.steps();
        host.power.fail_after(steps, io::ErrorKind::StorageFull);
        let first = send(&replica, &logs[3]);
        let what = format!("full at step {steps}");
        if let Err(error) = first {
            assert_eq!(head_epoch(&replica), Some(Epoch(2)), "{what}: {error}");
            check_points(&replica, &model);
            let second = send(&replica, &logs[3]);
            // The node's store takes nothing any more after a failed commit; everything else can be repeated.
            if second.is_err() {
                drop(replica);
                check_goes_on(&host, &model, &logs, &what);
                continue;
            }
            assert_eq!(head_epoch(&replica), Some(Epoch(3)), "{what}");
        } else if host.power.steps() - before <= steps {
            break;
        }
        check_points(&replica, &model);
        let names = host.files();
        assert!(
            names.iter().all(|name| !name.contains(".part")),
            "{what}: {names:?}"
        );
    }
}
