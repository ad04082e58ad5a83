//! How long requests take: one histogram for each operation, recorded without a lock that two threads share.
//!
//! Every thread records into a shard of its own, behind a mutex that only a reader of the figures ever contends for
//! (about 20 ns when it is free). A snapshot adds the shards up. Values are kept to two digits, which is 1 %.

use std::{
    sync::atomic::{AtomicUsize, Ordering},
    time::{Duration, Instant},
};

use hdrhistogram::Histogram;
use parking_lot::Mutex;

/// Longest latency that is told apart; longer ones count as this.
const LATENCY_MAX: Duration = Duration::from_mins(1);
/// Digits of a recorded value: 1 % error in 30 KiB a histogram, where three digits would take eight times that.
const DIGITS: u8 = 2;

/// What a request asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Operation {
    Read,
    Write,
    Flush,
    Zero,
}

/// Latencies of one kind of request since the mount was made.
#[derive(Clone, Debug)]
pub struct OperationLatency {
    histogram: Histogram<u64>,
    bytes: u64,
    errors: u64,
}

impl OperationLatency {
    fn new() -> Self {
        let longest = u64::try_from(LATENCY_MAX.as_nanos()).expect("60 s in ns fit 64 bits");
        Self {
            histogram: Histogram::new_with_max(longest, DIGITS)
                .expect("the bounds are constants that hdrhistogram accepts"),
            bytes: 0,
            errors: 0,
        }
    }

    fn add(&mut self, other: &Self) {
        self.histogram
            .add(&other.histogram)
            .expect("both histograms have the same bounds");
        self.bytes += other.bytes;
        self.errors += other.errors;
    }

    /// Requests answered with success.
    pub fn count(&self) -> u64 {
        self.histogram.len()
    }

    /// Bytes that successful requests read, wrote or zeroed.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Requests answered with an error; they are not in the histogram.
    pub fn errors(&self) -> u64 {
        self.errors
    }

    /// The latency that a share `quantile` (0 to 1) of the requests did not exceed, in nanoseconds; 0 if there were none.
    pub fn quantile_ns(&self, quantile: f64) -> u64 {
        self.histogram.value_at_quantile(quantile)
    }

    /// Median, in nanoseconds.
    pub fn p50_ns(&self) -> u64 {
        self.quantile_ns(0.5)
    }

    /// 99th percentile, in nanoseconds.
    pub fn p99_ns(&self) -> u64 {
        self.quantile_ns(0.99)
    }

    /// 99.9th percentile, in nanoseconds.
    pub fn p999_ns(&self) -> u64 {
        self.quantile_ns(0.999)
    }

    /// All recorded latencies, in nanoseconds.
    pub fn histogram(&self) -> &Histogram<u64> {
        &self.histogram
    }
}

/// Latencies of all requests of a mount, by kind.
#[derive(Clone, Debug)]
pub struct Latencies {
    /// Reads.
    pub read: OperationLatency,
    /// Writes, with or without forced unit access.
    pub write: OperationLatency,
    /// `fsync` and `fdatasync`.
    pub flush: OperationLatency,
    /// Discards and write-zeroes.
    pub zero: OperationLatency,
}

impl Latencies {
    fn new() -> Self {
        Self {
            read: OperationLatency::new(),
            write: OperationLatency::new(),
            flush: OperationLatency::new(),
            zero: OperationLatency::new(),
        }
    }

    fn of(&mut self, operation: Operation) -> &mut OperationLatency {
        match operation {
            Operation::Read => &mut self.read,
            Operation::Write => &mut self.write,
            Operation::Flush => &mut self.flush,
            Operation::Zero => &mut self.zero,
        }
    }
}

/// One thread's figures, on cache lines of its own.
#[derive(Debug)]
#[repr(align(128))]
struct Shard(Mutex<Latencies>);

/// The recorders of a mount.
#[derive(Debug)]
pub(super) struct Recorders(Box<[Shard]>);

impl Recorders {
    /// Recorders for `threads` threads.
    pub(super) fn new(threads: usize) -> Self {
        let shard = |_| Shard(Mutex::new(Latencies::new()));
        Self((0..threads.max(1)).map(shard).collect())
    }

    /// Counts a request that began at `began` and moved `bytes`, or failed.
    pub(super) fn record(&self, operation: Operation, began: Instant, bytes: Result<u64, ()>) {
        let elapsed = u64::try_from(began.elapsed().as_nanos()).unwrap_or(u64::MAX);
        let mut shard = self.0[thread_number() % self.0.len()].0.lock();
        let latency = shard.of(operation);
        match bytes {
            Ok(bytes) => {
                latency.histogram.saturating_record(elapsed);
                latency.bytes += bytes;
            }
            Err(()) => latency.errors += 1,
        }
    }

    /// The sum over all threads. Requests that end meanwhile are in it or not.
    pub(super) fn snapshot(&self) -> Latencies {
        let mut sum = Latencies::new();
        for shard in &self.0 {
            let shard = shard.0.lock();
            sum.read.add(&shard.read);
            sum.write.add(&shard.write);
            sum.flush.add(&shard.flush);
            sum.zero.add(&shard.zero);
        }
        sum
    }
}

/// A small number for the calling thread. The threads of one mount start together and so get different shards; where
/// two share one all the same, they share a lock and nothing is lost.
fn thread_number() -> usize {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    thread_local! {
        static NUMBER: usize = NEXT.fetch_add(1, Ordering::Relaxed);
    }
    NUMBER.with(|number| *number)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_threads_record_adds_up() {
        let recorders = Recorders::new(3);
        std::thread::scope(|scope| {
            for _ in 0..5 {
                scope.spawn(|| {
                    for _ in 0..100 {
                        recorders.record(Operation::Write, Instant::now(), Ok(512));
                    }
                    recorders.record(Operation::Read, Instant::now(), Err(()));
                });
            }
        });
        let sum = recorders.snapshot();
        assert_eq!((sum.write.count(), sum.write.bytes()), (500, 256_000));
        assert_eq!((sum.read.count(), sum.read.errors()), (0, 5));
        assert!(sum.write.p50_ns() <= sum.write.p999_ns());
        assert_eq!(sum.flush.p99_ns(), 0, "no request, no latency");
    }

    #[test]
    fn a_latency_beyond_the_scale_counts_as_the_longest() {
        let recorders = Recorders::new(1);
        let began = Instant::now()
            .checked_sub(LATENCY_MAX * 2)
            .expect("this host has run for two minutes");
        recorders.record(Operation::Flush, began, Ok(0));
        let longest = recorders.snapshot().flush.p50_ns();
        let scale = u64::try_from(LATENCY_MAX.as_nanos()).unwrap();
        assert!(longest >= scale / 100 * 99, "{longest}");
    }
}
