//! `understudy bench`: throughput and latency of files and mounts, side by side.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, ensure};

use super::output::Output;
use crate::{
    base::units::MIB,
    bench::{self, Against, Content, Plan, Report, Target},
};

/// Options of `bench`.
#[derive(Clone, Debug, clap::Args)]
pub struct BenchArgs {
    /// Targets: files, block devices, or folders, in which a test file of its own is made and removed.
    #[arg(value_name = "[LABEL=]PATH")]
    targets: Vec<Against>,
    /// A further target to compare with.
    #[arg(long, value_name = "[LABEL=]PATH")]
    against: Vec<Against>,
    /// Overwrite the given files and devices; without this they are only read.
    #[arg(long)]
    destroy: bool,
    /// Size of the test file made in a folder, in MiB.
    #[arg(long, value_name = "MIB", default_value_t = 1024, value_parser = clap::value_parser!(u64).range(64..))]
    size: u64,
    /// Interleaved rounds; figures are medians over them.
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: u32,
    /// Length of one visit of one workload to one target, in seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 1.0)]
    seconds: f64,
    /// Write every figure of every round to this file, as JSON; `-` prints it instead of the table.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Write plots of the latency percentiles into this folder, one SVG for each workload.
    #[arg(long, value_name = "DIR")]
    svg: Option<PathBuf>,
}

/// Measures and prints.
pub fn run(args: &BenchArgs, out: &Output) -> anyhow::Result<()> {
    let content = if args.destroy {
        Content::Destroy
    } else {
        Content::Keep
    };
    let named: Vec<_> = args.targets.iter().chain(&args.against).collect();
    ensure!(
        !named.is_empty(),
        "nothing to measure: name a file, a device or a folder"
    );
    ensure!(
        args.seconds > 0.0 && args.seconds <= 3600.0,
        "a visit takes more than 0 and at most 3600 seconds"
    );
    let own_bytes = args
        .size
        .checked_mul(MIB)
        .context("the test file is too large")?;
    let targets = named
        .iter()
        .map(|target| Target::open(&target.path, target.label.as_deref(), content, own_bytes))
        .collect::<Result<Vec<_>, _>>()?;
    let plan = Plan {
        rounds: args.rounds,
        visit: Duration::from_secs_f64(args.seconds),
        ..Plan::canonical()
    };
    let report = bench::run(&plan, &targets, &mut |step| {
        out.progress_line(&format!(
            "{}/{} {} on {}",
            step.done + 1,
            step.total,
            step.workload,
            step.target
        ));
    })?;
    if let Some(folder) = &args.svg {
        plot(&report, folder)?;
    }
    match &args.json {
        Some(path) if path.as_os_str() == "-" => out.line(&report.to_json()),
        Some(path) => {
            write(path, &report.to_json())?;
            out.line(&report.to_table());
        }
        None => out.line(&report.to_table()),
    }
    Ok(())
}

/// One file for each workload that was measured, named after it.
fn plot(report: &Report, folder: &Path) -> anyhow::Result<()> {
    fs::create_dir_all(folder).with_context(|| format!("cannot create {}", folder.display()))?;
    for workload in bench::CANONICAL {
        if let Some(svg) = bench::latency_svg(report, workload) {
            let name: String = workload
                .to_string()
                .replace(|c: char| !c.is_ascii_alphanumeric(), "-");
            write(&folder.join(format!("{name}.svg")), &svg)?;
        }
    }
    Ok(())
}

fn write(path: &Path, text: &str) -> anyhow::Result<()> {
    fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
}
