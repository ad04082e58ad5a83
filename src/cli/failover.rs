//! `understudy failover` and `understudy cancel`: from a replica to disks that a guest can boot from, and back.

use std::path::PathBuf;

use super::{
    output::Output,
    points::{replica_socket, told},
};
use crate::{
    base::{ids::Name, units::Epoch},
    node::control::{self, CancelRequest, TestRequest},
};

/// Options of `failover`.
#[derive(Clone, Debug, clap::Args)]
pub struct FailoverArgs {
    /// The machine.
    machine: Name,
    /// As a test: the disks of a recovery point, writable on a layer of their own, while replication goes on. Any number of
    /// tests may run at once; `understudy cancel` removes them.
    #[arg(long, required = true)]
    test: bool,
    /// The recovery point, by its epoch [default: the latest].
    #[arg(long, value_name = "EPOCH", value_parser = parse_epoch)]
    point: Option<Epoch>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
    /// Ask the node on this control socket instead of looking for the replica on this host.
    #[arg(long, value_name = "PATH")]
    control: Option<PathBuf>,
}

/// Options of `cancel`.
#[derive(Clone, Debug, clap::Args)]
pub struct CancelArgs {
    /// The machine.
    machine: Name,
    /// Only this test failover [default: all of the machine].
    #[arg(long, value_name = "NUMBER")]
    test: Option<u32>,
    /// Also if a disk is still in use: whoever uses it gets errors from then on.
    #[arg(long)]
    force: bool,
    /// Print JSON.
    #[arg(long)]
    json: bool,
    /// Ask the node on this control socket instead of looking for the replica on this host.
    #[arg(long, value_name = "PATH")]
    control: Option<PathBuf>,
}

fn parse_epoch(text: &str) -> Result<Epoch, String> {
    let wrong =
        |_| format!("{text:?} is not an epoch: use a number that `understudy points` shows");
    text.parse().map(Epoch).map_err(wrong)
}

/// Starts a test failover, and prints where its disks are.
pub async fn run(args: &FailoverArgs, out: &Output) -> anyhow::Result<()> {
    let socket = replica_socket(args.control.as_deref(), &args.machine).await?;
    let request = TestRequest { point: args.point };
    let test = told(control::ask_test(&socket, &args.machine, request).await)?;
    if args.json {
        return out.json(&test);
    }
    let (machine, number) = (&args.machine, test.number);
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

/// Ends test failovers.
pub async fn cancel(args: &CancelArgs, out: &Output) -> anyhow::Result<()> {
    let socket = replica_socket(args.control.as_deref(), &args.machine).await?;
    let request = CancelRequest {
        number: args.test,
        force: args.force,
    };
    let report = told(control::ask_cancel(&socket, &args.machine, request).await)?;
    if args.json {
        return out.json(&report);
    }
    for number in report.ended {
        out.line(&format!(
            "test failover {number} of {} ended; its mount and all that was written in it are gone",
            args.machine
        ));
    }
    Ok(())
}
