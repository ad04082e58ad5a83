//! Floor 4: throughput and latency of files and mounts, side by side.
//!
//! ```text
//!   workload   what is done: pattern, direction, size, depth          target   what it is done to: file, device, folder
//!   engine     one round: worker threads, a clock, histograms         steal    what the hypervisor took meanwhile
//!   report     medians over the rounds: JSON and a plain table        plot     latency percentiles as SVG
//! ```
//!
//! # Method
//! A virtual machine's speed changes from one second to the next, so one run of A and then one of B compares two
//! moments and not two targets. Rounds are interleaved: every workload visits every target before the next round
//! begins. Each figure is the median over the rounds, and rounds in which the hypervisor took more than a twentieth of
//! the processors are counted as noisy beside it.
//!
//! I/O is `O_DIRECT`, as virtual machines do it, so that the host's page cache answers for nobody. A queue of depth N
//! is N threads with one blocking call each: FUSE and the block layer see N requests at once, just as from an
//! asynchronous submitter, and no call into the kernel needs unsafe code. Each worker picks its own next operation; a
//! dispatcher would add a hand-over between threads to every latency.
#![forbid(unsafe_code)]

mod engine;
mod plot;
mod report;
mod steal;
mod target;
mod workload;

use std::time::Duration;

pub use self::{
    engine::Round,
    plot::latency_svg,
    report::{Figures, Report},
    target::{Against, Content, Target, TargetError},
    workload::{CANONICAL, Direction, Pattern, Workload},
};

/// How long, how often, and on what.
#[derive(Clone, Debug)]
pub struct Plan {
    /// What is done in each round, in this order.
    pub workloads: Vec<Workload>,
    /// Times that every workload visits every target.
    pub rounds: u32,
    /// Length of one visit.
    pub visit: Duration,
}

impl Plan {
    /// The canonical workloads, five rounds of one second each.
    pub fn canonical() -> Self {
        Self {
            workloads: CANONICAL.to_vec(),
            rounds: 5,
            visit: Duration::from_secs(1),
        }
    }
}

/// Why a measurement stopped.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    /// Nothing to do.
    #[error("nothing to measure: give at least one target, one workload and one round")]
    Empty,
    /// Two targets that a report could not tell apart.
    #[error("two targets are called {0:?}: give one of them another label")]
    SameLabel(String),
    /// A target can not be used for this plan.
    #[error(transparent)]
    Target(#[from] TargetError),
    /// An operation failed.
    #[error("{workload} on {target} failed at offset {offset}")]
    Io {
        /// What was done.
        workload: Workload,
        /// To which target.
        target: String,
        /// Where.
        offset: u64,
        /// Why.
        source: std::io::Error,
    },
}

/// What is about to be measured.
#[derive(Clone, Copy, Debug)]
pub struct Step<'a> {
    /// Visits done.
    pub done: usize,
    /// Visits in all.
    pub total: usize,
    /// The workload.
    pub workload: Workload,
    /// Label of the target.
    pub target: &'a str,
}

/// Measures all `targets` by `plan`, telling `progress` before each visit. Write workloads pass over targets that may
/// not be written; the report says so.
pub fn run(
    plan: &Plan,
    targets: &[Target],
    progress: &mut dyn FnMut(Step<'_>),
) -> Result<Report, BenchError> {
    for (index, target) in targets.iter().enumerate() {
        let same = |other: &Target| other.label() == target.label();
        if targets[..index].iter().any(same) {
            return Err(BenchError::SameLabel(target.label().to_owned()));
        }
    }
    let visits: Vec<(Workload, &Target)> = plan
        .workloads
        .iter()
        .flat_map(|&workload| targets.iter().map(move |target| (workload, target)))
        .filter(|(workload, target)| workload.direction == Direction::Read || target.writable())
        .collect();
    if visits.is_empty() || plan.rounds == 0 {
        return Err(BenchError::Empty);
    }
    for (workload, target) in &visits {
        target.check_size(*workload)?;
    }
    let mut report = Report::new(plan, targets);
    let rounds = (0..plan.rounds).flat_map(|round| visits.iter().map(move |visit| (round, visit)));
    let total = visits.len() * usize::try_from(plan.rounds).unwrap_or(usize::MAX);
    for (done, (round, &(workload, target))) in rounds.enumerate() {
        progress(Step {
            done,
            total,
            workload,
            target: target.label(),
        });
        let measured = engine::measure(workload, target, plan.visit, round)?;
        report.add(workload, target.label(), measured);
    }
    Ok(report)
}

#[cfg(test)]
mod tests {
    use std::{fs, path::Path};

    use super::*;
    use crate::base::units::MIB;

    fn brief(workloads: &[Workload]) -> Plan {
        Plan {
            workloads: workloads.to_vec(),
            rounds: 2,
            visit: Duration::from_millis(20),
        }
    }

    /// Opens a target, or nothing where the file system has no direct I/O.
    fn open(path: &Path, content: Content) -> Option<Target> {
        match Target::open(path, None, content, 32 * MIB) {
            Err(TargetError::NoDirect(path)) => {
                eprintln!("SKIPPED: no direct I/O on {}", path.display());
                None
            }
            other => Some(other.unwrap()),
        }
    }

    #[test]
    fn every_canonical_workload_visits_a_folder_and_leaves_it_empty() {
        let dir = tempfile::tempdir().unwrap();
        let Some(target) = open(dir.path(), Content::Keep) else {
            return;
        };
        let targets = [target];
        let mut steps = Vec::new();
        let plan = brief(&CANONICAL);
        let report = run(&plan, &targets, &mut |step| {
            steps.push((step.done, step.total, step.workload));
        })
        .unwrap();
        assert_eq!(report.figures.len(), CANONICAL.len());
        for figures in &report.figures {
            assert!(figures.operations_per_second > 0.0, "{figures:?}");
            assert!(figures.p50_us <= figures.p99_us && figures.p99_us <= figures.p999_us);
            assert_eq!(figures.each_operations_per_second.len(), 2);
        }
        assert_eq!(steps.len(), 18);
        // Rounds are interleaved: the second begins with the first workload again.
        assert_eq!((steps[9].0, steps[9].1, steps[9].2), (9, 18, CANONICAL[0]));
        drop(targets);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_file_is_overwritten_only_with_permission() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("precious");
        let content = vec![7; 4 << 20];
        fs::write(&path, &content).unwrap();
        let plan = brief(&[CANONICAL[4], CANONICAL[6], CANONICAL[8]]);
        let Some(target) = open(&path, Content::Keep) else {
            return;
        };
        let report = run(&plan, &[target], &mut |_| {}).unwrap();
        assert_eq!(report.figures.len(), 1, "reading alone");
        assert!(report.to_table().contains("only read"));
        assert_eq!(fs::read(&path).unwrap(), content);

        let target = open(&path, Content::Destroy).unwrap();
        let report = run(&plan, &[target], &mut |_| {}).unwrap();
        assert_eq!(report.figures.len(), 3);
        let after = fs::read(&path).unwrap();
        assert_ne!(after, content);
        assert_eq!(after.len(), content.len());
    }

    #[test]
    fn unusable_targets_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let open = |path: &Path| Target::open(path, None, Content::Keep, MIB).unwrap_err();
        let missing = open(&dir.path().join("nowhere"));
        assert!(matches!(missing, TargetError::Missing(_)), "{missing}");
        let null = open(Path::new("/dev/null"));
        assert!(matches!(null, TargetError::Kind(_)), "{null}");
        let unwritable = open(Path::new("/proc/self"));
        assert!(
            matches!(
                unwritable,
                TargetError::ReadOnly(_) | TargetError::Io { .. }
            ),
            "{unwritable}"
        );
        let nothing = run(&Plan::canonical(), &[], &mut |_| {});
        assert!(matches!(nothing, Err(BenchError::Empty)));

        let small = dir.path().join("small");
        fs::write(&small, vec![0; 8192]).unwrap();
        let Some(target) = self::open(&small, Content::Keep) else {
            return;
        };
        let refused = run(
            &brief(&[CANONICAL[4], CANONICAL[1]]),
            &[target],
            &mut |_| {},
        );
        let error = refused.unwrap_err().to_string();
        assert!(
            error.contains("8.00 KiB") && error.contains("at least 32.0 MiB"),
            "{error}"
        );
    }
}
