//! `understudy failover`, `commit`, `cancel`, `reverse`: which host a machine runs on, and back.

use std::path::PathBuf;

use anyhow::bail;

use super::{
    output::Output,
    points::{replica_socket, told},
    refused,
};
use crate::{
    base::{ids::Name, units::Epoch},
    node::{
        control::{
            self, CancelRequest, FailoverKind, FailoverReport, FailoverRequest, ReverseRequest,
            TestRequest,
        },
        status::NodeStatus,
    },
};

/// Which node is asked, and how it is answered.
#[derive(Clone, Debug, clap::Args)]
pub struct Asked {
    /// The machine.
    pub(super) machine: Name,
    /// Print JSON.
    #[arg(long)]
    pub(super) json: bool,
    /// Ask the node on this control socket instead of looking for the machine on this host.
    #[arg(long, value_name = "PATH")]
    control: Option<PathBuf>,
}

/// Which failover it is.
#[derive(Clone, Copy, Debug, clap::Args)]
#[group(required = true, multiple = false)]
pub struct Kind {
    /// On the primary, with the guest shut down: the last changes are sent, the replica takes over, this host becomes the
    /// replica. Nothing is lost and nothing is sent again. Repeat it if it was cut short; `understudy cancel` takes it back.
    #[arg(long)]
    planned: bool,
    /// On the replica, when the primary is lost: its disks become writable here at a recovery point. Look at them, then
    /// `understudy commit`, or `understudy cancel` and choose another point. Not protected until the old primary, or
    /// another host, follows.
    #[arg(long)]
    unplanned: bool,
    /// On the replica, as a test: the disks of a recovery point, writable on a layer of their own, while replication goes
    /// on. Any number of tests may run at once; `understudy cancel` removes them.
    #[arg(long)]
    test: bool,
}

/// Options of `failover`.
#[derive(Clone, Debug, clap::Args)]
pub struct FailoverArgs {
    #[command(flatten)]
    asked: Asked,
    #[command(flatten)]
    kind: Kind,
    /// The recovery point, by its epoch [default: the latest].
    #[arg(long, value_name = "EPOCH", value_parser = parse_epoch, conflicts_with = "planned")]
    point: Option<Epoch>,
    /// With --test: the rescue point, what a former primary had that nobody else has, as `understudy points` shows it.
    #[arg(long, requires = "test", conflicts_with = "point")]
    rescue: bool,
    /// With --unplanned: also while the primary is connected. It is fenced.
    #[arg(long, conflicts_with_all = ["planned", "test"])]
    force: bool,
}

/// Options of `cancel`.
#[derive(Clone, Debug, clap::Args)]
pub struct CancelArgs {
    #[command(flatten)]
    asked: Asked,
    /// Only this test failover.
    #[arg(long, value_name = "NUMBER")]
    test: Option<u32>,
    /// All test failovers, and nothing else.
    #[arg(long, conflicts_with = "test")]
    tests: bool,
    /// Give up the rescue point of a former primary, and nothing else.
    #[arg(long, conflicts_with_all = ["test", "tests"])]
    rescue: bool,
    /// Also if a disk is still in use: whoever uses it gets errors from then on.
    #[arg(long)]
    force: bool,
}

/// Options of `commit`.
#[derive(Clone, Debug, clap::Args)]
pub struct CommitArgs {
    #[command(flatten)]
    asked: Asked,
}

/// Options of `reverse`.
#[derive(Clone, Debug, clap::Args)]
pub struct ReverseArgs {
    #[command(flatten)]
    asked: Asked,
    /// Also if a disk is still in use on this host: whoever uses it gets errors from then on.
    #[arg(long)]
    force: bool,
}

fn parse_epoch(text: &str) -> Result<Epoch, String> {
    let wrong =
        |_| format!("{text:?} is not an epoch: use a number that `understudy points` shows");
    text.parse().map(Epoch).map_err(wrong)
}

/// Starts a failover, and prints where the disks are.
pub async fn run(args: &FailoverArgs, out: &Output) -> anyhow::Result<()> {
    if args.kind.test {
        return test(args, out).await;
    }
    let socket = socket_of(&args.asked).await?;
    let request = FailoverRequest {
        kind: if args.kind.planned {
            FailoverKind::Planned
        } else {
            FailoverKind::Unplanned
        },
        point: args.point,
        force: args.force,
    };
    let report = told(control::ask_failover(&socket, &args.asked.machine, request).await)?;
    print(&args.asked, &report, out)
}

async fn test(args: &FailoverArgs, out: &Output) -> anyhow::Result<()> {
    let Asked {
        machine,
        json,
        control,
    } = &args.asked;
    let socket = replica_socket(control.as_deref(), machine).await?;
    let request = TestRequest {
        point: args.point,
        rescue: args.rescue,
        key: None,
    };
    let test = told(control::ask_test(&socket, machine, request).await)?;
    if *json {
        return out.json(&test);
    }
    let number = test.number;
    out.line(&format!(
        "test failover {number} of {machine} at epoch {}, cut {}",
        test.point.epoch, test.cut
    ));
    for file in &test.files {
        out.line(&format!("  {}", file.display()));
    }
    out.note(&format!(
        "clean up with: understudy cancel {machine} --test {number}"
    ));
    Ok(())
}

/// Keeps a failover.
pub async fn commit(args: &CommitArgs, out: &Output) -> anyhow::Result<()> {
    let socket = socket_of(&args.asked).await?;
    let report = told(control::ask_commit(&socket, &args.asked.machine).await)?;
    print(&args.asked, &report, out)
}

/// Lets the host that was the primary follow.
pub async fn reverse(args: &ReverseArgs, out: &Output) -> anyhow::Result<()> {
    let socket = socket_of(&args.asked).await?;
    let request = ReverseRequest { force: args.force };
    let report = told(control::ask_reverse(&socket, &args.asked.machine, request).await)?;
    print(&args.asked, &report, out)
}

/// Takes a failover back, or ends test failovers.
pub async fn cancel(args: &CancelArgs, out: &Output) -> anyhow::Result<()> {
    let Asked { machine, json, .. } = &args.asked;
    let socket = socket_of(&args.asked).await?;
    let request = CancelRequest {
        number: args.test,
        tests: args.tests,
        rescue: args.rescue,
        force: args.force,
    };
    let report = told(control::ask_cancel(&socket, machine, request).await)?;
    if *json {
        return out.json(&report);
    }
    if let Some(text) = report.failover {
        out.line(&format!("{machine}: {text}"));
    }
    for number in report.ended {
        out.line(&format!(
            "test failover {number} of {machine} ended; its mount and all that was written in it are gone"
        ));
    }
    Ok(())
}

fn print(asked: &Asked, report: &FailoverReport, out: &Output) -> anyhow::Result<()> {
    if asked.json {
        return out.json(report);
    }
    out.line(&format!("{}: {}", asked.machine, report.text));
    for file in &report.files {
        out.line(&format!("  {}", file.display()));
    }
    Ok(())
}

/// The control socket of the one node of this host that has the machine, in whatever part; or the given one.
pub(super) async fn socket_of(asked: &Asked) -> anyhow::Result<PathBuf> {
    if let Some(socket) = &asked.control {
        return Ok(socket.clone());
    }
    let nodes = super::nodes().await?;
    let none = nodes.is_empty();
    let has = |node: &NodeStatus| {
        let mut machines = node.machines.iter();
        machines.any(|known| known.name == asked.machine)
    };
    let (mut found, others): (Vec<_>, Vec<_>) = nodes.into_iter().partition(|(_, node)| has(node));
    if found.is_empty() {
        // Whoever has no part in it may know the hosts that have.
        found = others;
        found.retain(|(_, node)| !node.coordinates.is_empty());
    }
    match &found[..] {
        [(socket, _)] => Ok(socket.clone()),
        [] if none => bail!("no node runs on this host"),
        [] => Err(refused(format!(
            "no node of this host has a machine called {}",
            asked.machine
        ))),
        _ => Err(refused(format!(
            "{} nodes of this host have a machine called {}: name one with --control",
            found.len(),
            asked.machine
        ))),
    }
}
