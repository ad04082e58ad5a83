//! `understudy plan`: several machines moved as a recovery plan says, by a coordinator.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, bail};

use super::{
    jobs::{self, AtCoordinator},
    output::Output,
    points::told,
};
use crate::{
    base::ids::Name,
    coord::job::Kind,
    node::coordinator::{PlanRequest, ask_check, ask_run},
};

/// Options of `plan`.
#[derive(Clone, Debug, clap::Args)]
pub struct PlanArgs {
    #[command(subcommand)]
    verb: PlanVerb,
}

#[derive(Clone, Debug, clap::Subcommand)]
enum PlanVerb {
    /// Say what keeps a plan from being run as things are now: mistakes in it, machines that are not where they should be.
    Check(CheckArgs),
    /// Start a test failover of every machine, in the order of the plan, with its actions for tests; then clean up.
    Test(TestArgs),
    /// Move every machine, in the order of the plan, with its actions.
    Run(RunArgs),
}

#[derive(Clone, Debug, clap::Args)]
struct Of {
    /// The plan, a TOML file.
    file: PathBuf,
    /// Print JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    at: AtCoordinator,
}

/// Options of `plan check`.
#[derive(Clone, Debug, clap::Args)]
struct CheckArgs {
    #[command(flatten)]
    of: Of,
}

/// Options of `plan test`.
#[derive(Clone, Debug, clap::Args)]
struct TestArgs {
    #[command(flatten)]
    of: Of,
}

/// Options of `plan run`.
#[derive(Clone, Debug, clap::Args)]
struct RunArgs {
    #[command(flatten)]
    of: Of,
    #[command(flatten)]
    kind: KindArgs,
    /// The host on which all machines are wanted; those that are there already stay.
    #[arg(long, value_name = "HOST")]
    to: Option<Name>,
    /// With --unplanned: also while the primaries are connected. With --reverse: also if disks are still in use there.
    #[arg(long, conflicts_with_all = ["planned", "commit", "cancel"])]
    force: bool,
}

/// Which failover it is.
#[derive(Clone, Copy, Debug, clap::Args)]
#[group(required = true, multiple = false)]
#[expect(
    clippy::struct_excessive_bools,
    reason = "clap takes exactly one of the flags"
)]
struct KindArgs {
    /// With the primaries, the guests shut down. The first error stops the plan; run it again with --to to go on.
    #[arg(long)]
    planned: bool,
    /// Without the primaries. What can be done is done, and the errors are reported in the end.
    #[arg(long)]
    unplanned: bool,
    /// Keep the unplanned failovers.
    #[arg(long)]
    commit: bool,
    /// Take the unplanned failovers back that are not committed.
    #[arg(long)]
    cancel: bool,
    /// Let the hosts that were the primaries follow the new ones.
    #[arg(long)]
    reverse: bool,
}

impl KindArgs {
    fn kind(self) -> Kind {
        match self {
            Self { planned: true, .. } => Kind::Planned,
            Self {
                unplanned: true, ..
            } => Kind::Unplanned,
            Self { commit: true, .. } => Kind::Commit,
            Self { cancel: true, .. } => Kind::Cancel,
            Self { .. } => Kind::Reverse,
        }
    }
}

/// Checks, tests or runs a plan.
pub async fn run(args: &PlanArgs, out: &Output) -> anyhow::Result<()> {
    match &args.verb {
        PlanVerb::Check(CheckArgs { of }) => check(of, out).await,
        PlanVerb::Test(TestArgs { of }) => carry_out(of, Kind::Test, false, None, out).await,
        PlanVerb::Run(RunArgs {
            of,
            kind,
            to,
            force,
        }) => carry_out(of, kind.kind(), *force, to.clone(), out).await,
    }
}

async fn check(of: &Of, out: &Output) -> anyhow::Result<()> {
    let text = read(&of.file)?;
    let socket = of.at.socket().await?;
    let wrong = told(ask_check(&socket, &text).await)?;
    if of.json {
        out.json(&wrong)?;
    } else {
        for wrong in &wrong {
            out.line(wrong);
        }
    }
    if !wrong.is_empty() {
        bail!("{}: {} complaints", of.file.display(), wrong.len());
    }
    if !of.json {
        out.line(&format!("{}: no complaints", of.file.display()));
    }
    Ok(())
}

async fn carry_out(
    of: &Of,
    kind: Kind,
    force: bool,
    to: Option<Name>,
    out: &Output,
) -> anyhow::Result<()> {
    let text = read(&of.file)?;
    let socket = of.at.socket().await?;
    let request = PlanRequest {
        text,
        kind,
        force,
        to,
    };
    let begun = told(ask_run(&socket, &request).await)?;
    let id = begun.job.id;
    let job = if of.json {
        jobs::wait(&socket, id, out).await?
    } else {
        out.line(&format!(
            "{}; `understudy jobs cancel {id}` stops it",
            jobs::title(&begun)
        ));
        jobs::follow(&socket, id, out).await?
    };
    if of.json {
        out.json(&job)?;
    }
    jobs::conclude(&job)
}

fn read(file: &Path) -> anyhow::Result<String> {
    fs::read_to_string(file).with_context(|| format!("cannot read the plan {}", file.display()))
}
