//! What the rounds add up to: medians, as JSON for machines and as a table for people.

use std::fmt::Write;

use hdrhistogram::Histogram;
use serde::Serialize;

use super::{
    Plan,
    engine::{Round, histogram},
    steal::NOISY,
    target::Target,
    workload::Workload,
};

/// All figures of a measurement, in the order of the plan.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Processors of this host.
    pub processors: usize,
    /// The kernel's release.
    pub kernel: String,
    /// Planned length of each visit, in seconds.
    pub visit_seconds: f64,
    /// Planned number of rounds.
    pub rounds: u32,
    /// Targets that were only read, because nobody allowed writing to them.
    pub only_read: Vec<String>,
    /// One entry for each workload on each target.
    pub figures: Vec<Figures>,
}

/// What one workload made of one target. Every figure is a median over the rounds.
#[derive(Clone, Debug, Serialize)]
pub struct Figures {
    /// What was done.
    pub workload: Workload,
    /// To which target.
    pub target: String,
    /// Operations per second.
    pub operations_per_second: f64,
    /// Bytes per second.
    pub bytes_per_second: f64,
    /// Half of the operations took no longer than this, in microseconds.
    pub p50_us: f64,
    /// 99 of 100 took no longer.
    pub p99_us: f64,
    /// 999 of 1000 took no longer.
    pub p999_us: f64,
    /// Rounds in which the hypervisor took more than a twentieth of the processors.
    pub noisy_rounds: usize,
    /// Operations per second of each round, in order: how much to believe the median.
    pub each_operations_per_second: Vec<f64>,
    /// Share of processor time stolen in each round, where the kernel tells.
    pub each_stolen: Vec<Option<f64>>,
    /// The rounds themselves.
    #[serde(skip)]
    each: Vec<Round>,
}

impl Report {
    pub(super) fn new(plan: &Plan, targets: &[Target]) -> Self {
        let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
        Self {
            processors: std::thread::available_parallelism().map_or(0, Into::into),
            kernel: kernel.trim().to_owned(),
            visit_seconds: plan.visit.as_secs_f64(),
            rounds: plan.rounds,
            only_read: targets
                .iter()
                .filter(|target| !target.writable())
                .map(|target| target.label().to_owned())
                .collect(),
            figures: Vec::new(),
        }
    }

    pub(super) fn add(&mut self, workload: Workload, target: &str, round: Round) {
        let known = self
            .figures
            .iter_mut()
            .find(|figures| figures.workload == workload && figures.target == target);
        match known {
            Some(figures) => figures.add(round),
            None => self.figures.push(Figures::new(workload, target, round)),
        }
    }

    /// The report as one JSON object.
    pub fn to_json(&self) -> String {
        serde_json::to_string_pretty(self).expect("numbers and texts are always JSON")
    }

    /// The report as a table: a line for each workload on each target, compared with the first target.
    pub fn to_table(&self) -> String {
        let width = |texts: &mut dyn Iterator<Item = usize>, least| texts.fold(least, usize::max);
        let workloads = width(
            &mut self.figures.iter().map(|f| f.workload.to_string().len()),
            8,
        );
        let targets = width(
            &mut self.figures.iter().map(|f| f.target.chars().count()),
            6,
        );
        let mut table = format!(
            "{:workloads$}  {:targets$} {:>9} {:>9} {:>9} {:>9} {:>9} {:>8}  noisy\n",
            "workload", "target", "MB/s", "IOPS", "p50 us", "p99 us", "p99.9 us", "vs first"
        );
        let mut first: Option<&Figures> = None;
        for figures in &self.figures {
            let base = first
                .filter(|first| first.workload == figures.workload)
                .unwrap_or(figures);
            first = Some(base);
            let ratio = figures.operations_per_second / base.operations_per_second.max(1e-9);
            writeln!(
                table,
                "{:workloads$}  {:targets$} {:>9.1} {:>9.0} {:>9.1} {:>9.1} {:>9.1} {ratio:>8.2}  {}/{}",
                figures.workload,
                figures.target,
                figures.bytes_per_second / 1e6,
                figures.operations_per_second,
                figures.p50_us,
                figures.p99_us,
                figures.p999_us,
                figures.noisy_rounds,
                figures.each.len(),
            )
            .expect("a String takes everything");
        }
        for target in &self.only_read {
            writeln!(table, "{target}: only read; writing needs --destroy")
                .expect("a String takes everything");
        }
        table
    }
}

impl Figures {
    fn new(workload: Workload, target: &str, round: Round) -> Self {
        let mut figures = Self {
            workload,
            target: target.to_owned(),
            operations_per_second: 0.0,
            bytes_per_second: 0.0,
            p50_us: 0.0,
            p99_us: 0.0,
            p999_us: 0.0,
            noisy_rounds: 0,
            each_operations_per_second: Vec::new(),
            each_stolen: Vec::new(),
            each: Vec::new(),
        };
        figures.add(round);
        figures
    }

    fn add(&mut self, round: Round) {
        self.each_operations_per_second.push(rate(&round));
        self.each_stolen.push(round.stolen);
        self.each.push(round);
        self.operations_per_second = median(self.each_operations_per_second.clone());
        self.bytes_per_second = self.operations_per_second * float(self.workload.operation_bytes);
        let percentile = |quantile| {
            let each = self.each.iter();
            median(each.map(|round| micros(&round.latency, quantile)).collect())
        };
        (self.p50_us, self.p99_us, self.p999_us) =
            (percentile(0.5), percentile(0.99), percentile(0.999));
        let noisy = |stolen: &&Option<f64>| stolen.is_some_and(|stolen| stolen > NOISY);
        self.noisy_rounds = self.each_stolen.iter().filter(noisy).count();
    }

    /// The latencies of all rounds together, in nanoseconds.
    pub fn latency(&self) -> Histogram<u64> {
        let mut all = histogram();
        for round in &self.each {
            all.add(&round.latency)
                .expect("all histograms have the same bounds");
        }
        all
    }
}

fn rate(round: &Round) -> f64 {
    float(round.operations) / round.elapsed.as_secs_f64().max(1e-9)
}

fn micros(latency: &Histogram<u64>, quantile: f64) -> f64 {
    float(latency.value_at_quantile(quantile)) / 1e3
}

#[expect(
    clippy::cast_precision_loss,
    reason = "figures are shown with a few digits"
)]
pub(super) fn float(value: u64) -> f64 {
    value as f64
}

/// The middle value; of two middle ones their mean.
fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => 0.0,
        len if len % 2 == 1 => values[middle],
        _ => f64::midpoint(values[middle - 1], values[middle]),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::bench::CANONICAL;

    fn round(operations: u64, nanos: u64, stolen: f64) -> Round {
        let mut latency = histogram();
        latency.record_n(nanos, operations).unwrap();
        Round {
            operations,
            elapsed: Duration::from_secs(1),
            latency,
            stolen: Some(stolen),
        }
    }

    fn report() -> Report {
        let mut report = Report::new(&Plan::canonical(), &[]);
        for (operations, stolen) in [(100, 0.0), (900, 0.5), (200, 0.01)] {
            report.add(CANONICAL[0], "raw", round(operations, 10_000, stolen));
            report.add(CANONICAL[0], "mount", round(operations / 2, 20_000, stolen));
        }
        report
    }

    #[test]
    fn one_wild_round_moves_no_figure() {
        let report = report();
        let [raw, mount] = &report.figures[..] else {
            panic!("two targets");
        };
        assert!((raw.operations_per_second - 200.0).abs() < 1e-6);
        assert!((mount.operations_per_second - 100.0).abs() < 1e-6);
        assert!((raw.p50_us - 10.0).abs() < 0.1, "{}", raw.p50_us);
        assert!((mount.p999_us - 20.0).abs() < 0.1);
        assert_eq!(raw.noisy_rounds, 1);
        assert_eq!(raw.latency().len(), 1200);
        assert!((median(vec![4.0, 1.0, 3.0, 2.0]) - 2.5).abs() < 1e-9);
    }

    #[test]
    fn the_table_compares_with_the_first_target() {
        let table = report().to_table();
        let line = |target: &str| {
            let found = table.lines().find(|line| line.contains(target));
            found
                .unwrap()
                .split_whitespace()
                .map(str::to_owned)
                .collect::<Vec<_>>()
        };
        assert_eq!(&line("raw")[8..], ["10.0", "10.0", "10.0", "1.00", "1/3"]);
        assert_eq!(&line("mount")[8..], ["20.0", "20.0", "20.0", "0.50", "1/3"]);
        let json: serde_json::Value = serde_json::from_str(&report().to_json()).unwrap();
        assert_eq!(json["figures"][1]["workload"], "sequential read 1 MiB x1");
        assert_eq!(json["figures"][1]["each_operations_per_second"][1], 450.0);
    }
}
