//! Packs blocks into frames on worker threads and hands them back in the order in which they were taken.
//!
//! The order is what makes the last frame of a block its newest content: a block that is taken, rewritten and taken
//! again must arrive twice in that order, however long each packing took. So every piece gets a slot in a queue when it
//! is submitted, and the frame is put into that slot by whichever worker packed it.
//!
//! Zeros need no packing, and a frame of them may be long: pieces of zeros that follow each other become one frame. A
//! guest that discards a disk of many TiB would otherwise need more frames than a log may have.

use std::{collections::VecDeque, sync::Arc, thread, time::Duration};

use bytes::Bytes;
use crossbeam_channel::{Receiver, Sender, bounded};
use parking_lot::Mutex;

use crate::{
    base::{
        clock::Clock,
        units::{DiskIndex, Extent, GIB, to_u64},
    },
    delta::{
        EncodedFrame, encode_zero,
        policy::{Policy, Setting, encode_sampled},
    },
};

/// Frames between `submit` and `next`, at most: enough that a worker never waits for the link's round trip, and a
/// bound on memory of this many MiB twice over.
const DEPTH: usize = 8;

/// Most bytes of a frame of zeros: what a replica makes zeros of in one step.
const ZEROS_MAX: u64 = GIB;

/// The content of a run that is to be packed.
#[derive(Debug)]
pub(super) enum Raw {
    /// These bytes.
    Data(Bytes),
    /// Zeros.
    Zero,
}

/// The place of a frame in the order.
#[derive(Debug)]
enum Slot {
    /// A worker packs it.
    Packing(Receiver<EncodedFrame>),
    /// Zeros, which may become more as long as nothing is behind them.
    Zeros(DiskIndex, Extent),
}

struct Job {
    disk: DiskIndex,
    run: Extent,
    raw: Bytes,
    done: Sender<EncodedFrame>,
}

/// A bounded, ordered packing pipeline.
#[derive(Debug)]
pub(super) struct Pipeline {
    jobs: Option<Sender<Job>>,
    slots: VecDeque<Slot>,
    policy: Arc<Mutex<Policy>>,
    workers: Vec<thread::JoinHandle<()>>,
}

impl Pipeline {
    /// A pipeline with `workers` threads.
    pub(super) fn start(
        setting: Setting,
        workers: u16,
        clock: &Arc<dyn Clock>,
    ) -> std::io::Result<Self> {
        let policy = Arc::new(Mutex::new(Policy::new(setting, workers)));
        let (sender, receiver) = bounded::<Job>(DEPTH);
        let workers = (0..workers)
            .map(|index| {
                let (jobs, policy, clock) =
                    (receiver.clone(), Arc::clone(&policy), Arc::clone(clock));
                thread::Builder::new()
                    .name(format!("pack-{index}"))
                    .spawn(move || pack(&jobs, &policy, &*clock))
            })
            .collect::<Result<_, _>>()?;
        Ok(Self {
            jobs: Some(sender),
            slots: VecDeque::new(),
            policy,
            workers,
        })
    }

    /// Whether another piece may be submitted.
    pub(super) fn has_room(&self) -> bool {
        self.slots.len() < DEPTH
    }

    /// Gives a piece to the workers. Only with [`has_room`](Self::has_room).
    pub(super) fn submit(&mut self, disk: DiskIndex, run: Extent, raw: Raw) {
        assert!(self.has_room(), "the caller asks for room first");
        let slot = match raw {
            Raw::Zero => match self.slots.back_mut() {
                Some(Slot::Zeros(before, zeros))
                    if *before == disk
                        && zeros.end() == run.offset
                        && zeros.len + run.len <= ZEROS_MAX =>
                {
                    zeros.len += run.len;
                    return;
                }
                _ => Slot::Zeros(disk, run),
            },
            Raw::Data(raw) => {
                let (done, slot) = bounded(1);
                let jobs = self
                    .jobs
                    .as_ref()
                    .expect("the pipeline runs until it is dropped");
                jobs.send(Job {
                    disk,
                    run,
                    raw,
                    done,
                })
                .expect("workers run until the pipeline is dropped");
                Slot::Packing(slot)
            }
        };
        self.slots.push_back(slot);
    }

    /// The next frame in order, if it is packed and can become no longer.
    pub(super) fn ready(&mut self) -> Option<EncodedFrame> {
        let frame = match self.slots.front()? {
            Slot::Packing(slot) => slot.try_recv().ok()?,
            Slot::Zeros(..) if self.slots.len() == 1 => return None,
            Slot::Zeros(disk, run) => encode_zero(*disk, *run),
        };
        self.slots.pop_front();
        Some(frame)
    }

    /// The next frame in order, waiting for it; nothing if none is under way.
    pub(super) fn next(&mut self) -> Option<EncodedFrame> {
        Some(match self.slots.pop_front()? {
            Slot::Packing(slot) => slot.recv().expect("a worker answers every job"),
            Slot::Zeros(disk, run) => encode_zero(disk, run),
        })
    }

    /// Forgets what is under way.
    pub(super) fn clear(&mut self) {
        while self.next().is_some() {}
    }

    /// Tells the policy what the link took.
    pub(super) fn sent(&self, bytes: u64, took: Duration) {
        self.policy.lock().sent(bytes, took);
    }
}

impl Drop for Pipeline {
    fn drop(&mut self) {
        self.jobs = None;
        for worker in self.workers.drain(..) {
            // A worker that panicked has said so on standard error.
            let _ = worker.join();
        }
    }
}

fn pack(jobs: &Receiver<Job>, policy: &Mutex<Policy>, clock: &dyn Clock) {
    for Job {
        disk,
        run,
        raw,
        done,
    } in jobs
    {
        let codec = policy.lock().choose(clock.monotonic());
        let started = clock.monotonic();
        let len = to_u64(raw.len());
        let frame = encode_sampled(disk, run.offset, raw, codec);
        let took = clock.monotonic().saturating_sub(started);
        policy
            .lock()
            .packed(codec, len, frame.header().frame_len(), took);
        // The pipeline may have been dropped meanwhile; then nobody wants the frame.
        let _ = done.send(frame);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::{
        clock::SystemClock,
        units::{MIB, to_usize},
    };

    fn started(setting: Setting, workers: u16) -> Pipeline {
        let clock: Arc<dyn Clock> = Arc::new(SystemClock::default());
        Pipeline::start(setting, workers, &clock).unwrap()
    }

    #[test]
    fn frames_come_back_in_the_order_they_went_in() {
        let mut pipeline = started(Setting::Zstd, 3);
        let mut expected = VecDeque::new();
        let mut seen = 0;
        for number in 0..200u64 {
            if !pipeline.has_room() {
                let frame = pipeline.next().unwrap();
                assert_eq!(Some(frame.header().run), expected.pop_front());
                seen += 1;
            }
            // Large and small pieces in turn: a later small one is packed long before an earlier large one.
            let len = if number % 2 == 0 { 1 << 20 } else { 4096 };
            let run = Extent::new(number << 20, len);
            let raw = vec![7; to_usize(len)];
            pipeline.submit(
                DiskIndex(0),
                run,
                if number % 5 == 0 {
                    Raw::Zero
                } else {
                    Raw::Data(raw.into())
                },
            );
            expected.push_back(run);
        }
        while let Some(frame) = pipeline.next() {
            assert_eq!(Some(frame.header().run), expected.pop_front());
            seen += 1;
        }
        assert_eq!((seen, expected.len()), (200, 0));
    }

    #[test]
    fn zeros_that_follow_each_other_become_one_frame() {
        let mut pipeline = started(Setting::None, 1);
        let mut zeros = |disk, offset| {
            let run = Extent::new(offset * MIB, MIB);
            pipeline.submit(DiskIndex(disk), run, Raw::Zero);
            pipeline.ready().map(|frame| *frame.header())
        };
        let frame = |disk, offset, len| {
            let run = Extent::new(offset * MIB, len * MIB);
            Some(*encode_zero(DiskIndex(disk), run).header())
        };
        // Neither another disk, nor with a gap, nor backwards, nor without an end.
        for offset in 0..5 {
            assert_eq!(zeros(0, offset), None);
        }
        assert_eq!(zeros(1, 5), frame(0, 0, 5));
        assert_eq!(zeros(1, 7), frame(1, 5, 1));
        assert_eq!(zeros(1, 6), frame(1, 7, 1));
        for offset in 7..6 + ZEROS_MAX / MIB {
            assert_eq!(zeros(1, offset), None);
        }
        let longest = frame(1, 6, ZEROS_MAX / MIB);
        assert_eq!(zeros(1, 6 + ZEROS_MAX / MIB), longest);
        let last = pipeline.next().map(|frame| *frame.header());
        assert_eq!(last, frame(1, 6 + ZEROS_MAX / MIB, 1));
        assert!(pipeline.next().is_none());
    }

    #[test]
    fn data_between_zeros_stays_between_them() {
        let mut pipeline = started(Setting::None, 1);
        let run = |block: u64| Extent::new(block * 4096, 4096);
        for (block, raw) in [
            (0, Raw::Zero),
            (1, Raw::Zero),
            (1, Raw::Data(vec![7; 4096].into())),
            (2, Raw::Zero),
        ] {
            pipeline.submit(DiskIndex(0), run(block), raw);
        }
        let frames: Vec<_> = std::iter::from_fn(|| pipeline.next()).collect();
        let runs = frames.iter().map(|frame| frame.header().run);
        let expected = [Extent::new(0, 8192), run(1), run(2)];
        assert_eq!(runs.collect::<Vec<_>>(), expected);
    }
}
