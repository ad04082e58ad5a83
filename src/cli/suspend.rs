//! `understudy suspend`, `resume`: a machine that is not replicated for a while.

use super::{
    failover::{Asked, socket_of},
    output::Output,
    points::told,
};
use crate::node::control::{self, SuspendRequest};

/// Options of `suspend`.
#[derive(Clone, Debug, clap::Args)]
pub struct SuspendArgs {
    #[command(flatten)]
    asked: Asked,
    /// Also with --sync-on-flush strict, whose guest's flushes wait until the machine is resumed.
    #[arg(long)]
    force: bool,
}

/// Options of `resume`.
#[derive(Clone, Debug, clap::Args)]
pub struct ResumeArgs {
    #[command(flatten)]
    asked: Asked,
}

/// Suspends the machine.
pub async fn suspend(args: &SuspendArgs, out: &Output) -> anyhow::Result<()> {
    let machine = &args.asked.machine;
    let socket = socket_of(&args.asked).await?;
    let request = SuspendRequest { force: args.force };
    let report = told(control::ask_suspend(&socket, machine, request).await)?;
    if args.asked.json {
        return out.json(&report);
    }
    if let Some(since) = report.since {
        out.line(&format!(
            "{machine}: suspended since {since}; its changes are tracked until `understudy resume {machine}`"
        ));
    }
    Ok(())
}

/// Resumes the machine.
pub async fn resume(args: &ResumeArgs, out: &Output) -> anyhow::Result<()> {
    let machine = &args.asked.machine;
    let socket = socket_of(&args.asked).await?;
    let report = told(control::ask_resume(&socket, machine).await)?;
    if args.asked.json {
        return out.json(&report);
    }
    out.line(&match report.since {
        Some(since) => format!("{machine}: resumed; it was suspended since {since}"),
        None => format!("{machine}: it was not suspended"),
    });
    Ok(())
}
