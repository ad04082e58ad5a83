//! Writes of an initial copy that are carried out by others, late, in another order, or not at all.

use std::{io, thread};

use understudy::{
    base::units::{DiskIndex, Epoch, Extent, KIB, MIB, to_u64, to_usize},
    delta::{Codec, EncodedFrame, encode_data, encode_zero},
    disk::image::Format,
    replica::{
        Head, Ingest, IngestError, IngestEvent, MachineReplica, ReplicaOptions, SyncTask, WriteTask,
    },
    storage::{Folder, Open},
};

use super::{Change, GENERATION, Host, MACHINE, Model, grow, log_after, one_disk, options, send};

const DISK: u64 = 2 * MIB;
/// The shortest frame that is left to others.
const LONG: u64 = 128 * KIB;

fn frame(offset: u64, len: u64, seed: u8) -> EncodedFrame {
    encode_data(DiskIndex(0), offset, vec![seed; to_usize(len)], Codec::None)
}

/// A replica of one disk, and the log of its initial copy in these frames.
fn copy(host: &Host, frames: &[EncodedFrame]) -> (MachineReplica, Vec<u8>) {
    let (entry, spec) = one_disk(DISK, Format::Raw);
    let replica = host
        .open_with(ReplicaOptions {
            sync_bytes: LONG,
            ..options(9)
        })
        .unwrap();
    replica.prepare(&[spec]).unwrap();
    let (log, _) = log_after((MACHINE, GENERATION), None, &entry, frames, 0);
    (replica, log)
}

fn image(host: &Host) -> Vec<u8> {
    let image = host.folder.open("disk.raw", Open::Read).unwrap();
    let mut bytes = vec![0; to_usize(DISK)];
    image.read_at(0, &mut bytes).unwrap();
    bytes
}

/// Feeds as much of the log as brings one write.
fn feed_to_write(ingest: &mut Ingest, log: &mut &[u8]) -> WriteTask {
    loop {
        let (piece, rest) = log.split_at(log.len().min(64));
        assert!(!piece.is_empty(), "the log has a long frame");
        *log = rest;
        assert_eq!(ingest.feed(piece).unwrap(), None);
        if let Some(task) = ingest.write_due() {
            return task;
        }
    }
}

/// Of all writes that are under way, another thread carries out the one that began last.
#[test]
fn of_a_block_the_last_frame_wins_in_whatever_order_others_write() {
    let host = Host::new();
    let mut model = vec![0; to_usize(DISK)];
    let mut state = 1_u64;
    let frames: Vec<_> = (0..400_u32)
        .map(|number| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            let offset = (state >> 33) % (DISK / 4096 - 64) * 4096;
            let seed = u8::try_from(number % 255 + 1).unwrap();
            // Long ones, and in between short ones and zeros, which do not wait for a thread.
            let (len, seed) = match number % 5 {
                0 => (4096, seed),
                1 => (16 * KIB, 0),
                _ => (LONG + (state >> 20) % 32 * 4096, seed),
            };
            let len = len.min(DISK - offset);
            model[to_usize(offset)..to_usize(offset + len)].fill(seed);
            match seed {
                0 => encode_zero(DiskIndex(0), Extent::new(offset, len)),
                _ => frame(offset, len, seed),
            }
        })
        .collect();
    let (replica, log) = copy(&host, &frames);
    let (tasks, inbox) = crossbeam_channel::unbounded::<WriteTask>();
    let hands = thread::spawn(move || {
        let mut held = Vec::new();
        let mut most = 0;
        while let Ok(task) = inbox.recv() {
            held.push(task);
            held.extend(inbox.try_iter());
            most = most.max(held.len());
            held.drain(..).rev().for_each(WriteTask::run);
        }
        most
    });
    let mut ingest = replica.begin(GENERATION).unwrap();
    for piece in log.chunks(60_000) {
        ingest.feed(piece).unwrap();
        while let Some(task) = ingest.write_due() {
            tasks.send(task).unwrap();
        }
    }
    ingest.finish().unwrap();
    drop(tasks);
    println!("at most {} at once", hands.join().unwrap());
    assert!(image(&host) == model);
}

#[test]
fn what_is_not_written_is_not_reported_as_durable() {
    let host = Host::new();
    let frames = [frame(0, LONG, 1), frame(LONG, LONG, 2)];
    let (replica, log) = copy(&host, &frames);
    let mut ingest = replica.begin(GENERATION).unwrap();
    let mut rest = &log[..];
    feed_to_write(&mut ingest, &mut rest).run();
    let sync = ingest.sync_due().unwrap().unwrap();
    let IngestEvent::Durable { frames: 1, .. } = sync.run().unwrap() else {
        panic!("one frame is durable");
    };
    // The second one is lost on its way: no sync after it says anything, and the log is lost.
    let task = feed_to_write(&mut ingest, &mut rest);
    let sync = ingest.sync_due().unwrap().unwrap();
    drop(task);
    assert!(matches!(sync.run(), Err(IngestError::Incomplete)));
    assert!(matches!(ingest.feed(rest), Err(IngestError::Incomplete)));
    drop(ingest);
    assert_eq!(replica.head(), Head::Copying);
    // Another log is taken all the same.
    let mut ingest = replica.begin(GENERATION).unwrap();
    ingest.push(&log).unwrap();
    assert!(matches!(replica.head(), Head::Copied(at) if at.epoch == Epoch::INITIAL));
}

#[test]
fn a_write_that_fails_is_told_with_its_cause() {
    let host = Host::new();
    let (replica, log) = copy(&host, &[frame(0, LONG, 1)]);
    let mut ingest = replica.begin(GENERATION).unwrap();
    let mut rest = &log[..];
    let task = feed_to_write(&mut ingest, &mut rest);
    host.power.fail_after(0, io::ErrorKind::StorageFull);
    task.run();
    // At once, and not only when the log ends.
    let error = ingest.feed(&rest[..1]).unwrap_err();
    assert!(error.is_full(), "{error:?}");
    assert!(matches!(ingest.feed(rest), Err(IngestError::Incomplete)));
}

/// The cause is told once, to whoever asks first; the others learn that it failed.
#[test]
fn a_write_that_fails_and_was_told_to_a_sync_is_not_forgotten() {
    let host = Host::new();
    let (replica, log) = copy(&host, &[frame(0, LONG, 1), frame(LONG, LONG, 2)]);
    let mut ingest = replica.begin(GENERATION).unwrap();
    let mut rest = &log[..];
    let task = feed_to_write(&mut ingest, &mut rest);
    let sync = ingest.sync_due().unwrap().unwrap();
    host.power.fail_after(0, io::ErrorKind::StorageFull);
    task.run();
    let error = sync.run().unwrap_err();
    assert!(error.is_full(), "{error:?}");
    assert!(matches!(
        ingest.feed(&rest[..1]),
        Err(IngestError::Incomplete)
    ));
}

#[test]
fn a_log_that_is_given_up_leaves_no_write_behind() {
    let host = Host::new();
    let (replica, log) = copy(&host, &[frame(0, LONG, 1), frame(LONG, LONG, 2)]);
    let mut ingest = replica.begin(GENERATION).unwrap();
    let task = feed_to_write(&mut ingest, &mut &log[..]);
    let end = thread::spawn(move || drop(ingest));
    // As long as one is under way no other log may begin, however often it is tried while the other thread gives up.
    for _ in 0..20_000 {
        assert!(matches!(replica.begin(GENERATION), Err(IngestError::Busy)));
        thread::yield_now();
    }
    task.run();
    end.join().unwrap();
    assert_eq!(image(&host)[to_usize(LONG) - 1], 1);
    replica.begin(GENERATION).unwrap();
}

/// The power fails after every step of a copy whose writes nobody asks for, and of one whose writes are asked for.
#[test]
fn frames_reported_as_durable_survive_a_power_cut() {
    let count = u8::try_from(DISK / LONG).unwrap();
    let frames: Vec<_> = (0..count)
        .map(|n| frame(u64::from(n) * LONG, LONG, n + 1))
        .collect();
    let mut most = 0;
    for steps in 0..80 {
        for asks in [false, true] {
            let host = Host::new();
            let (replica, log) = copy(&host, &frames);
            host.power.cut_after(steps);
            let mut durable = 0;
            let mut ingest = replica.begin(GENERATION).unwrap();
            for piece in log.chunks(50_000) {
                let fed = ingest.feed(piece);
                if asks && let Some(task) = ingest.write_due() {
                    task.run();
                }
                let synced = ingest.sync_due().ok().flatten().map(SyncTask::run);
                if let Some(Ok(IngestEvent::Durable { frames, .. })) = synced {
                    durable = frames;
                }
                if fed.is_err() {
                    break;
                }
            }
            drop((ingest, replica));
            host.power.restore(&mut || false);
            let image = image(&host);
            for (n, bytes) in image.chunks(to_usize(LONG)).enumerate() {
                let written = bytes.iter().all(|&byte| usize::from(byte) == n + 1);
                assert!(written || to_u64(n) >= durable, "cut after step {steps}");
            }
            most = most.max(durable);
        }
    }
    assert!(most > 10, "the cuts reach into the copy: {most}");
}

/// A long epoch goes to the platter while it arrives, not all of it at its end.
#[test]
fn a_delta_says_what_of_it_is_durable() {
    let host = Host::new();
    let mut model = Model::new();
    let replica = host.open(9).unwrap();
    grow(&replica, &mut model, 1);
    let changes = [Change {
        disk: 0,
        block: 0,
        blocks: 20,
        data: Some((7, Codec::None)),
    }];
    let log = model.epoch_of(2, Some(1), &changes);
    let events = send(&replica, &log).unwrap();
    let durable = events.iter().filter_map(|event| match event {
        IngestEvent::Durable { bytes, .. } => Some(*bytes),
        IngestEvent::Staged { .. } => None,
    });
    let durable: Vec<u64> = durable.collect();
    let expected: Vec<u64> = (1..=to_u64(log.len()) / 10_000)
        .map(|n| n * 10_000)
        .collect();
    assert_eq!(durable, expected, "every 8192 bytes, asked every 5000");
    assert!(durable.len() > 4);
}
