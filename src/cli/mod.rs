//! Floor 6: the verbs. The only place that prints.
//!
//! One file for each verb or family of verbs; [`output`] is the voice. Exit codes: 0 done, 1 the operation failed,
//! 2 wrong usage, 3 refused (fenced, not authorised, unsafe, no such thing here).
#![forbid(unsafe_code)]

pub mod audit;
pub mod bench;
pub mod copy;
pub mod demo;
pub mod export;
pub mod failover;
mod hosting;
pub mod image;
pub mod import;
pub mod jobs;
pub mod mount;
pub mod mount_helper;
pub mod output;
pub mod pki;
pub mod plan;
pub mod points;
pub mod reload;
pub mod replica;
pub mod resize;
pub mod resync;
pub mod serve;
pub mod status;
pub mod suspend;
pub mod verify;

use std::{fmt, io::IsTerminal as _, path::PathBuf, process::ExitCode};

use clap::Parser;

use self::output::Output;
use crate::node::{
    control::{self, ClientError},
    convert::ConvertError,
    hardening::{self, Duty},
    images::ImageError,
    status::NodeStatus,
};

/// Disaster recovery for the disks of virtual machines: mount VM disks, track every write, replicate, fail over.
#[derive(Debug, Parser)]
#[command(
    name = "understudy",
    version,
    propagate_version = true,
    max_term_width = 100
)]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, clap::Subcommand)]
enum Verb {
    /// Run the main job end to end on this machine and prove the result.
    Demo(demo::DemoArgs),
    /// Make a certificate authority, and identities for hosts.
    Pki(pki::PkiArgs),
    /// Show VM disks as raw files, track writes, replicate them.
    Mount(mount::MountArgs),
    /// Mount for hosts that are confined and cannot: `mount-helper` in the configuration of `serve`.
    MountHelper(mount_helper::MountHelperArgs),
    /// Receive machines from primaries and keep their replicas.
    Replica(replica::ReplicaArgs),
    /// Serve a host from a configuration file: machines that run here and replicas of others at once.
    Serve(serve::ServeArgs),
    /// Let nodes of this host read their certificates and the list of revoked ones again, without a restart.
    Reload(reload::ReloadArgs),
    /// Check the audit log of a host.
    Audit(audit::AuditArgs),
    /// Show what the nodes of this host are doing.
    Status(status::StatusArgs),
    /// List the recovery points of a machine's replica.
    Points(points::PointsArgs),
    /// Compare a machine with its replica by hashes and send what differs, while the guest runs.
    Resync(resync::ResyncArgs),
    /// Compare a machine's replica with its disks by hashes, while the guest runs, and name what differs.
    Verify(verify::VerifyArgs),
    /// Move a machine to the other host, planned or not; or start its disks from its replica as a test.
    Failover(failover::FailoverArgs),
    /// Keep an unplanned failover, or this host's side of a split brain.
    Commit(failover::CommitArgs),
    /// Take back a failover that is not committed or a hand-over; or end test failovers.
    Cancel(failover::CancelArgs),
    /// On a host that was the primary before a failover: let it follow the new one.
    Reverse(failover::ReverseArgs),
    /// Stop replicating a machine for a while: its changes are tracked, and its guest goes on.
    Suspend(suspend::SuspendArgs),
    /// Replicate a machine again that was suspended: what changed meanwhile is sent.
    Resume(suspend::ResumeArgs),
    /// Begin an initial copy now that waits for its time or for a portable disk.
    Copy(copy::CopyArgs),
    /// On the primary: write the initial copy of a machine to a portable disk, while its guest runs.
    Export(export::ExportArgs),
    /// On the replica: begin with the initial copy from a portable disk.
    Import(import::ImportArgs),
    /// Make a disk of a machine larger while its guest uses it; its replica follows.
    Resize(resize::ResizeArgs),
    /// Move several machines as a recovery plan says: check it, try it, run it.
    Plan(plan::PlanArgs),
    /// Show what a coordinator does step by step; cancel it, or let it go on after a manual action.
    Jobs(jobs::JobsArgs),
    /// Create, examine, check, convert and resize image files.
    Image(image::ImageArgs),
    /// Measure throughput and latency of files and mounts, side by side.
    Bench(bench::BenchArgs),
}

/// An operation that was refused rather than tried: exit code 3.
#[derive(Debug)]
pub struct Refused(String);

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Refused {}

/// A refusal with this text.
fn refused(text: String) -> anyhow::Error {
    Refused(text).into()
}

/// Runs the program with the process's arguments.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    let out = Output::default();
    start_log();
    match run(cli.verb, &out) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            out.failure(&error);
            ExitCode::from(exit_code(&error))
        }
    }
}

fn run(verb: Verb, out: &Output) -> anyhow::Result<()> {
    match verb {
        Verb::Demo(args) => demo::run(&args, out),
        Verb::Pki(args) => pki::run(&args, out),
        Verb::Image(args) => image::run(&args, out),
        Verb::Bench(args) => bench::run(&args, out),
        Verb::Mount(args) => host_runtime(Duty::Disks)?.block_on(mount::run(args, out)),
        Verb::Replica(args) => host_runtime(Duty::Replicas)?.block_on(replica::run(args, out)),
        Verb::MountHelper(args) => mount_helper::run(&args, out),
        Verb::Serve(args) => serve::run(args, out),
        Verb::Audit(args) => audit::run(&args, out),
        Verb::Reload(args) => runtime()?.block_on(reload::run(&args, out)),
        Verb::Status(args) => runtime()?.block_on(status::run(&args, out)),
        Verb::Points(args) => runtime()?.block_on(points::run(&args, out)),
        Verb::Resync(args) => runtime()?.block_on(resync::run(&args, out)),
        Verb::Verify(args) => runtime()?.block_on(verify::run(&args, out)),
        Verb::Failover(args) => runtime()?.block_on(failover::run(&args, out)),
        Verb::Commit(args) => runtime()?.block_on(failover::commit(&args, out)),
        Verb::Cancel(args) => runtime()?.block_on(failover::cancel(&args, out)),
        Verb::Plan(args) => runtime()?.block_on(plan::run(&args, out)),
        Verb::Jobs(args) => runtime()?.block_on(jobs::run(&args, out)),
        Verb::Reverse(args) => runtime()?.block_on(failover::reverse(&args, out)),
        Verb::Suspend(args) => runtime()?.block_on(suspend::suspend(&args, out)),
        Verb::Resume(args) => runtime()?.block_on(suspend::resume(&args, out)),
        Verb::Copy(args) => runtime()?.block_on(copy::run(&args, out)),
        Verb::Export(args) => runtime()?.block_on(export::run(&args, out)),
        Verb::Import(args) => runtime()?.block_on(import::run(&args, out)),
        Verb::Resize(args) => runtime()?.block_on(resize::run(&args, out)),
    }
}

/// All nodes of this host, with their control sockets. A socket that a killed node left behind answers nobody: it is no node.
async fn nodes() -> Result<Vec<(PathBuf, NodeStatus)>, ClientError> {
    let mut nodes = Vec::new();
    for socket in control::sockets() {
        match control::ask_status(&socket).await {
            Ok(node) => nodes.push((socket, node)),
            Err(ClientError::Connect { .. }) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(nodes)
}

/// The runtime of a host, whose threads have given up what it does not need.
fn host_runtime(duty: Duty) -> std::io::Result<tokio::runtime::Runtime> {
    hardening::harden(duty);
    runtime()
}

fn runtime() -> std::io::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
}

/// `RUST_LOG` chooses what is logged, on standard error; by default what an operator should know.
fn start_log() {
    let filter = tracing_subscriber::EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_target(false)
        .init();
}

fn exit_code(error: &anyhow::Error) -> u8 {
    if error.chain().any(is_refusal) { 3 } else { 1 }
}

fn is_refusal(cause: &(dyn std::error::Error + 'static)) -> bool {
    cause.is::<Refused>()
        || matches!(cause.downcast_ref(), Some(ImageError::InUse(_)))
        || cause.downcast_ref().is_some_and(ConvertError::is_refusal)
        || cause.is::<crate::protocol::message::Refusal>()
        || cause
            .downcast_ref::<crate::net::DialError>()
            .is_some_and(|e| matches!(e, crate::net::DialError::Refused { .. }))
}
