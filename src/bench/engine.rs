//! One visit of one workload to one target: workers in a closed loop until the time is over.
//!
//! Each worker has an aligned buffer, a histogram and a stream of random numbers of its own; they share the target's
//! descriptor, the position of sequential workloads and nothing else.

use std::{
    io,
    os::unix::fs::FileExt,
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    thread,
    time::{Duration, Instant},
};

use hdrhistogram::Histogram;

use super::{
    BenchError,
    steal::Ticks,
    target::Target,
    workload::{Direction, Pattern, Workload},
};
use crate::base::units::to_usize;

/// Alignment of buffers, offsets and lengths: satisfies direct I/O on every device in use.
const ALIGNMENT: usize = 4096;
/// Longest latency that is told apart, in nanoseconds; slower ones count as this.
const LATENCY_MAX: u64 = 600_000_000_000;

/// What one visit measured.
#[derive(Clone, Debug)]
pub struct Round {
    /// Operations that were completed.
    pub operations: u64,
    /// How long they took, from the first start to the last end.
    pub elapsed: Duration,
    /// Latency of each operation, in nanoseconds.
    pub latency: Histogram<u64>,
    /// Share of processor time that the hypervisor took, where the kernel tells.
    pub stolen: Option<f64>,
}

/// Runs `workload` on `target` for about `length`. Equal `round`s use equal offsets.
pub(super) fn measure(
    workload: Workload,
    target: &Target,
    length: Duration,
    round: u32,
) -> Result<Round, BenchError> {
    let visit = Visit {
        workload,
        target,
        slots: target.len() / workload.operation_bytes,
        next: AtomicU64::new(0),
        failed: AtomicBool::new(false),
        length,
        started: Instant::now(),
    };
    let ticks = Ticks::now();
    let outcomes = thread::scope(|scope| {
        let workers: Vec<_> = (0..workload.depth)
            .map(|worker| {
                let seed = (u64::from(round) << 32) | u64::from(worker);
                let visit = &visit;
                scope.spawn(move || visit.work(seed))
            })
            .collect();
        workers
            .into_iter()
            .map(|worker| worker.join().expect("a worker returns its errors"))
            .collect::<Vec<_>>()
    });
    let elapsed = visit.started.elapsed();
    let stolen = ticks.and_then(|before| Some(Ticks::now()?.stolen_since(before)));
    let mut latency = histogram();
    for outcome in outcomes {
        let worker = outcome.map_err(|(offset, source)| BenchError::Io {
            workload,
            target: target.label().to_owned(),
            offset,
            source,
        })?;
        latency
            .add(&worker)
            .expect("all histograms have the same bounds");
    }
    Ok(Round {
        operations: latency.len(),
        elapsed,
        latency,
        stolen,
    })
}

/// What the workers of a visit share.
struct Visit<'a> {
    workload: Workload,
    target: &'a Target,
    /// Operations that fit the target.
    slots: u64,
    /// Operations begun by a sequential workload.
    next: AtomicU64,
    failed: AtomicBool,
    length: Duration,
    started: Instant,
}

impl Visit<'_> {
    fn work(&self, seed: u64) -> Result<Histogram<u64>, (u64, io::Error)> {
        let mut noise = Noise::new(seed);
        let mut buffer = Buffer::new(to_usize(self.workload.operation_bytes));
        noise.fill(buffer.bytes());
        let mut latency = histogram();
        while self.started.elapsed() < self.length && !self.failed.load(Ordering::Relaxed) {
            let slot = match self.workload.pattern {
                Pattern::Sequential => self.next.fetch_add(1, Ordering::Relaxed),
                Pattern::Random => noise.next(),
            };
            let offset = (slot % self.slots) * self.workload.operation_bytes;
            let bytes = buffer.bytes();
            // No two writes are alike, so nothing on the way can save one of them.
            bytes[..8].copy_from_slice(&noise.next().to_le_bytes());
            let begun = Instant::now();
            if let Err(error) = self.operate(offset, bytes) {
                self.failed.store(true, Ordering::Relaxed);
                return Err((offset, error));
            }
            let nanos = u64::try_from(begun.elapsed().as_nanos()).unwrap_or(u64::MAX);
            latency.saturating_record(nanos);
        }
        Ok(latency)
    }

    fn operate(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        let file = self.target.file();
        match self.workload.direction {
            Direction::Read => file.read_exact_at(bytes, offset),
            Direction::Write => file.write_all_at(bytes, offset),
            Direction::WriteSync => {
                file.write_all_at(bytes, offset)?;
                file.sync_data()
            }
        }
    }
}

pub(super) fn histogram() -> Histogram<u64> {
    Histogram::new_with_bounds(1, LATENCY_MAX, 3).expect("the bounds are constants that fit")
}

/// A buffer that begins at a multiple of [`ALIGNMENT`].
struct Buffer {
    memory: Vec<u8>,
    start: usize,
    len: usize,
}

impl Buffer {
    fn new(len: usize) -> Self {
        let memory = vec![0; len + ALIGNMENT];
        let misaligned = memory.as_ptr().addr() % ALIGNMENT;
        Self {
            memory,
            start: (ALIGNMENT - misaligned) % ALIGNMENT,
            len,
        }
    }

    fn bytes(&mut self) -> &mut [u8] {
        &mut self.memory[self.start..self.start + self.len]
    }
}

/// Repeatable numbers that do not compress (`SplitMix64`: Steele, Lea, Flood 2014).
#[derive(Debug)]
pub(super) struct Noise(u64);

impl Noise {
    pub(super) fn new(seed: u64) -> Self {
        Self(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    pub(super) fn fill(&mut self, bytes: &mut [u8]) {
        for chunk in bytes.chunks_mut(8) {
            let word = self.next().to_le_bytes();
            let len = chunk.len();
            chunk.copy_from_slice(&word[..len]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::units::{BLOCK_BYTES, to_u64};

    #[test]
    fn buffers_are_aligned_wherever_the_allocator_puts_them() {
        let mut buffers: Vec<_> = [1, 512, 4096, 1 << 20].map(Buffer::new).into();
        for buffer in &mut buffers {
            let len = buffer.len;
            let bytes = buffer.bytes();
            assert_eq!(bytes.len(), len);
            assert_eq!(bytes.as_ptr().addr() % ALIGNMENT, 0);
        }
        assert_eq!(to_u64(ALIGNMENT), BLOCK_BYTES);
    }
}
