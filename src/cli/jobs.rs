//! `understudy jobs`: what a coordinator does, step by step, and a person's word in it.

use std::{
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context, bail};

use super::{output::Output, points::told, refused};
use crate::{
    base::ids::Name,
    coord::job::{At, Deed, JobId, Outcome, Step, StepState},
    node::{
        control::ClientError,
        coordinator::{JobStatus, JobSummary, ask_cancel_job, ask_continue_job, ask_job, ask_jobs},
    },
};

/// Time between two looks at a job.
const LOOK_EVERY: Duration = Duration::from_millis(200);
/// How long a coordinator that does not answer is waited for: it may be started again, and goes on.
const AWAY_MAX: Duration = Duration::from_mins(1);

/// Options of `jobs`.
#[derive(Clone, Debug, clap::Args)]
#[command(args_conflicts_with_subcommands = true)]
pub struct JobsArgs {
    #[command(subcommand)]
    wish: Option<Wish>,
    /// Only this job, with all its steps.
    id: Option<JobId>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
    /// Follow the job until it has ended. Interrupting this does not stop the job.
    #[arg(long, requires = "id", conflicts_with = "json")]
    watch: bool,
    #[command(flatten)]
    at: AtCoordinator,
}

/// Which coordinator is asked.
#[derive(Clone, Debug, clap::Args)]
pub struct AtCoordinator {
    /// Ask the node on this control socket instead of the one of this host that coordinates others.
    #[arg(long, value_name = "PATH")]
    control: Option<PathBuf>,
}

#[derive(Clone, Debug, clap::Subcommand)]
enum Wish {
    /// Stop a job. A machine that is being handed over is taken back, what has been done stays done, what cleans up is done.
    Cancel(Chosen),
    /// Let a job go on: what it asked a person to do is done.
    Continue(Chosen),
}

#[derive(Clone, Debug, clap::Args)]
struct Chosen {
    /// The job.
    id: JobId,
    #[command(flatten)]
    at: AtCoordinator,
}

/// Shows jobs, or says a word to one.
pub async fn run(args: &JobsArgs, out: &Output) -> anyhow::Result<()> {
    match &args.wish {
        Some(Wish::Cancel(Chosen { id, at })) => {
            let socket = at.socket().await?;
            let job = told(ask_cancel_job(&socket, *id).await)?;
            out.line(&format!("{}: asked to stop", title(&job)));
            return Ok(());
        }
        Some(Wish::Continue(Chosen { id, at })) => {
            let socket = at.socket().await?;
            let job = told(ask_continue_job(&socket, *id).await)?;
            out.line(&format!("{}: goes on", title(&job)));
            return Ok(());
        }
        None => {}
    }
    let socket = args.at.socket().await?;
    match args.id {
        Some(id) if args.watch => follow(&socket, id, out).await.map(|_| ()),
        Some(id) => {
            let job = told(ask_job(&socket, id).await)?;
            if args.json {
                return out.json(&job);
            }
            out.line(&headline(&JobSummary::from(&job.job)));
            for (at, step) in job.job.steps() {
                show(&job, at, step, out);
            }
            Ok(())
        }
        None => {
            let jobs = told(ask_jobs(&socket).await)?;
            if args.json {
                return out.json(&jobs);
            }
            for job in &jobs {
                out.line(&headline(job));
            }
            Ok(())
        }
    }
}

impl AtCoordinator {
    /// The control socket to ask: the given one, or that of the one node of this host that coordinates others, or that of
    /// the only node.
    pub(super) async fn socket(&self) -> anyhow::Result<PathBuf> {
        if let Some(socket) = &self.control {
            return Ok(socket.clone());
        }
        let mut nodes = super::nodes().await?;
        if nodes.is_empty() {
            bail!("no node runs on this host");
        }
        if nodes.len() > 1 {
            nodes.retain(|(_, node)| !node.coordinates.is_empty());
        }
        match &nodes[..] {
            [(socket, _)] => Ok(socket.clone()),
            nodes => Err(refused(format!(
                "{} nodes of this host coordinate others: name one with --control",
                nodes.len()
            ))),
        }
    }
}

/// Tells each step of a job as it comes, until the job has ended.
pub(super) async fn follow(socket: &Path, id: JobId, out: &Output) -> anyhow::Result<JobStatus> {
    let mut told_states = Vec::new();
    loop {
        let job = look(socket, id, out).await?;
        let states: Vec<_> = job
            .job
            .steps()
            .map(|(_, step)| step.state.clone())
            .collect();
        for (index, (at, step)) in job.job.steps().enumerate() {
            if step.state != StepState::Waiting && told_states.get(index) != Some(&step.state) {
                show(&job, at, step, out);
            }
        }
        told_states = states;
        if let Some(ended) = job.job.ended {
            out.line(&format!("{}: {}", title(&job), ended.outcome));
            return Ok(job);
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

/// Waits until a job has ended, without a word.
pub(super) async fn wait(socket: &Path, id: JobId, out: &Output) -> anyhow::Result<JobStatus> {
    loop {
        let job = look(socket, id, out).await?;
        if job.job.ended.is_some() {
            return Ok(job);
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

/// Asks for a job, patiently: a coordinator that is started again goes on with it.
async fn look(socket: &Path, id: JobId, out: &Output) -> anyhow::Result<JobStatus> {
    let mut away: Option<Instant> = None;
    loop {
        let error = match ask_job(socket, id).await {
            Err(error @ (ClientError::Connect { .. } | ClientError::Broken(_))) => error,
            answer => return told(answer),
        };
        match away {
            None => {
                out.note("the coordinator is away; when it is back, it goes on");
                away = Some(Instant::now());
            }
            Some(since) if since.elapsed() >= AWAY_MAX => {
                return Err(error)
                    .context(format!("job {id} goes on when the coordinator is back"));
            }
            Some(_) => {}
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

/// The end of a job as the end of this program.
pub(super) fn conclude(job: &JobStatus) -> anyhow::Result<()> {
    match job.job.ended.map(|ended| ended.outcome) {
        Some(Outcome::Done) | None => Ok(()),
        Some(Outcome::Cancelled) => bail!("{} was cancelled", title(job)),
        Some(Outcome::Failed) => {
            let failures = job.job.steps();
            let failures = failures.filter_map(|(_, step)| match &step.state {
                StepState::Failed(failure) => Some(failure.why.as_str()),
                _ => None,
            });
            let failures: Vec<_> = failures.collect();
            bail!("{}: {}", title(job), failures.join("; "))
        }
    }
}

/// What people call a job.
pub(super) fn title(status: &JobStatus) -> String {
    name(&JobSummary::from(&status.job))
}

fn name(job: &JobSummary) -> String {
    if let Some(plan) = &job.plan {
        return format!("job {} (plan {plan}, {})", job.id, job.kind);
    }
    let machines: Vec<_> = job.machines.iter().map(Name::as_str).collect();
    format!("job {} ({} {})", job.id, job.kind, machines.join(" "))
}

fn headline(job: &JobSummary) -> String {
    let is = match job.ended {
        Some(ended) => format!("{}, {}", ended.outcome, ended.at),
        None if job.waits => "waits for a person".into(),
        None if job.cancel => "is being cancelled".into(),
        None => "under way".into(),
    };
    format!("{}, begun {}: {is}", name(job), job.begun)
}

fn show(status: &JobStatus, at: At, step: &Step, out: &Output) {
    let deed = &step.deed;
    let stage = status
        .job
        .stages
        .get(at.stage)
        .map_or("", |stage| &stage.name);
    let (is, output) = match &step.state {
        StepState::Waiting => ("waits for its turn".to_owned(), ""),
        StepState::UnderWay if matches!(deed, Deed::Manual { .. }) => (
            format!(
                "waits for you: `understudy jobs continue {}`",
                status.job.id
            ),
            "",
        ),
        StepState::UnderWay => {
            let note = status.notes.iter().find(|(other, _)| *other == at);
            (
                note.map_or_else(
                    || "under way".into(),
                    |(_, note)| format!("under way: {note}"),
                ),
                "",
            )
        }
        StepState::Done(report) => (format!("done: {}", report.text), report.output.as_str()),
        StepState::Failed(failure) => (format!("failed: {}", failure.why), failure.output.as_str()),
        StepState::Undone(text) => (format!("undone: {text}"), ""),
        StepState::Skipped => ("skipped".to_owned(), ""),
    };
    out.line(&format!("  {stage}: {deed}: {is}"));
    for line in output.lines() {
        out.line(&format!("    | {line}"));
    }
    if let StepState::Done(report) = &step.state {
        for file in &report.files {
            out.line(&format!("    {}", file.display()));
        }
    }
}
