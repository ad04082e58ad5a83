//! `understudy status`: what the nodes of this host say, for people or as JSON.

use std::{path::PathBuf, time::Duration};

use anyhow::{Context, bail};

use super::{output::Output, refused};
use crate::{
    base::{
        ids::{Lineage, Name},
        units::Bytes,
    },
    coord::state::Role,
    node::{
        control,
        policy::Limit,
        status::{
            CopyStatus, DiskStatus, LastTest, LatencyStatus, MachineStatus, NodeStatus,
            RecoveryStatus, ResyncStatus, RpoStatus, SyncStatus, TestResult, TestStatus,
            TrafficStatus, VerifyStatus,
        },
    },
};

/// Options of `status`.
#[derive(Clone, Debug, clap::Args)]
pub struct StatusArgs {
    /// Only this machine.
    machine: Option<Name>,
    /// Print JSON: an array with one report for each node.
    #[arg(long)]
    json: bool,
    /// Look again every second until interrupted.
    #[arg(long)]
    watch: bool,
    /// Ask the node on this control socket instead of all nodes of this host.
    #[arg(long, value_name = "PATH")]
    control: Option<PathBuf>,
}

/// Prints the status.
pub async fn run(args: &StatusArgs, out: &Output) -> anyhow::Result<()> {
    loop {
        let nodes = ask(args).await?;
        if args.watch && !args.json {
            out.fresh();
        }
        show(args, &nodes, out)?;
        if !args.watch {
            return Ok(());
        }
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
}

async fn ask(args: &StatusArgs) -> anyhow::Result<Vec<NodeStatus>> {
    if let Some(socket) = &args.control {
        return Ok(vec![
            control::ask_status(socket)
                .await
                .context("is the node running?")?,
        ]);
    }
    let nodes = super::nodes().await?;
    if nodes.is_empty() {
        bail!(
            "no node runs on this host: start one with `understudy mount` or `understudy replica`"
        );
    }
    Ok(nodes.into_iter().map(|(_, node)| node).collect())
}

fn show(args: &StatusArgs, nodes: &[NodeStatus], out: &Output) -> anyhow::Result<()> {
    let mut nodes = nodes.to_vec();
    if let Some(machine) = &args.machine {
        for node in &mut nodes {
            node.machines.retain(|m| m.name == *machine);
        }
        nodes.retain(|node| !node.machines.is_empty());
        if nodes.is_empty() {
            return Err(refused(format!(
                "no node of this host has a machine called {machine}"
            )));
        }
    }
    if args.json {
        return out.json(&nodes);
    }
    for node in &nodes {
        if let Some(address) = node.listening {
            out.line(&format!("node {} accepts primaries on {address}", node.pid));
        }
        if node.machines.is_empty() {
            out.line(&format!("node {} has no machine yet", node.pid));
        }
        for machine in &node.machines {
            show_machine(machine, out);
        }
    }
    Ok(())
}

fn show_machine(machine: &MachineStatus, out: &Output) {
    out.line(&format!("{} ({})", machine.name, machine.role));
    for (label, value) in rows(machine) {
        out.line(&format!("  {label:<16} {value}"));
    }
}

fn rows(machine: &MachineStatus) -> Vec<(&'static str, String)> {
    let primary = machine.role == Role::Primary;
    let mut rows = vec![
        ("state", machine.state.to_string()),
        ("health", machine.health.to_string()),
    ];
    rows.extend(machine.reasons.iter().map(|reason| ("", reason.clone())));
    rows.extend(
        machine
            .generation
            .map(|generation| ("generation", generation.to_string())),
    );
    let peer = if primary { "replica" } else { "primary" };
    rows.extend(machine.peer.clone().map(|name| (peer, name)));
    let lineage = |l: Lineage| format!("{} ({:.12})", l.epoch, l.chain.to_string());
    rows.push((
        "durable epoch",
        machine.durable.map_or_else(|| "none yet".into(), lineage),
    ));
    rows.extend(
        machine
            .base_epoch
            .map(|base| ("image epoch", base.to_string())),
    );
    rows.extend(recovery_rows(machine));
    rows.extend(catching_up_rows(machine));
    rows.extend(
        machine
            .sync_on_flush
            .map(|sync| ("sync-on-flush", sync_row(sync))),
    );
    let ms = |value: Option<u64>| value.map_or_else(|| "-".into(), |ms| format!("{ms} ms"));
    let RpoStatus {
        now_ms,
        p50_ms,
        p99_ms,
    } = machine.rpo;
    rows.push((
        "RPO",
        format!("now {}, p50 {}, p99 {}", ms(now_ms), ms(p50_ms), ms(p99_ms)),
    ));
    rows.extend(traffic_rows(&machine.traffic, primary));
    rows.extend(
        machine
            .write_latency
            .map(|l| ("write latency", latency_row(&l))),
    );
    rows.extend(machine.disks.iter().map(|disk| ("disk", disk_row(disk))));
    rows
}

fn traffic_rows(traffic: &TrafficStatus, primary: bool) -> Vec<(&'static str, String)> {
    let (sent, raw, folded) = (
        Bytes(traffic.sent),
        Bytes(traffic.raw),
        Bytes(traffic.folded),
    );
    if !primary {
        let received = format!("{sent} on the wire, {raw} written to images");
        return vec![
            ("epochs", format!("{} durable", traffic.epochs)),
            ("received", received),
        ];
    }
    let epochs = format!("{} durable, {} merged", traffic.epochs, traffic.merged);
    let sent = format!("{sent} on the wire for {raw} of blocks, {folded} folded away");
    let sending = format!("{}/s, {}", Bytes(traffic.rate), Limit(traffic.limit));
    vec![
        ("owed", Bytes(traffic.owed).to_string()),
        ("epochs", epochs),
        ("sent", sent),
        ("sending", sending),
    ]
}

/// What a replica can go back to, and how that was tried.
fn recovery_rows(machine: &MachineStatus) -> impl Iterator<Item = (&'static str, String)> {
    let recovery = machine.recovery.iter();
    let recovery = recovery.map(|recovery| ("recovery points", recovery_row(recovery)));
    let tests = machine.tests.iter().map(|test| ("test", test_row(test)));
    let last = machine.last_test.iter();
    let last = last.map(|test| ("last test", last_test_row(test)));
    recovery.chain(tests).chain(last)
}

fn recovery_row(recovery: &RecoveryStatus) -> String {
    let since = recovery
        .oldest
        .map_or_else(String::new, |oldest| format!(", the oldest of {oldest}"));
    let limit = recovery
        .space_max
        .map_or_else(String::new, |limit| format!(" of {}", Bytes(limit)));
    let used = Bytes(recovery.log_bytes);
    format!("{}{since}; {used}{limit} in delta logs", recovery.points)
}

fn test_row(test: &TestStatus) -> String {
    let files: Vec<_> = test
        .files
        .iter()
        .map(|file| file.display().to_string())
        .collect();
    format!(
        "{} of epoch {}, {} written, at {}",
        test.number,
        test.point.epoch,
        Bytes(test.written),
        files.join(" ")
    )
}

fn last_test_row(test: &LastTest) -> String {
    let (number, epoch, cut, started) = (test.number, test.point.epoch, test.cut, test.started);
    let result = match &test.result {
        TestResult::Running => "is running".to_owned(),
        TestResult::Ended => {
            let ended = test
                .ended
                .map_or_else(String::new, |at| format!(" at {at}"));
            format!("ended{ended}, {} written", Bytes(test.written))
        }
        TestResult::Failed(why) => format!("failed: {why}"),
    };
    format!("{number} of epoch {epoch} ({cut}), started {started}, {result}")
}

fn copy_row(copy: &CopyStatus) -> String {
    let percent = copy
        .done
        .saturating_mul(100)
        .checked_div(copy.total)
        .unwrap_or(100);
    let eta = copy.eta_s.map_or_else(|| "-".into(), |s| format!("{s} s"));
    let (done, total, rate) = (Bytes(copy.done), Bytes(copy.total), Bytes(copy.rate));
    format!("{done} of {total} ({percent} %), {rate}/s, ETA {eta}")
}

/// How far the initial copy, a resync and a verification are.
fn catching_up_rows(machine: &MachineStatus) -> impl Iterator<Item = (&'static str, String)> {
    let copy = machine.copy.iter();
    let copy = copy.map(|copy| ("initial copy", copy_row(copy)));
    let verify = machine.verify.iter();
    let verify = verify.map(|verify| ("verification", verify_row(verify)));
    copy.chain(machine.resync.iter().flat_map(resync_rows))
        .chain(verify)
}

fn verify_row(verify: &VerifyStatus) -> String {
    let (compared, total) = (Bytes(verify.compared), Bytes(verify.total));
    let differing = Bytes(verify.differing);
    match (&verify.problem, verify.running) {
        (Some(problem), _) => format!("given up: {problem}"),
        (None, true) => {
            let eta = verify
                .eta_s
                .map_or_else(|| "-".into(), |s| format!("{s} s"));
            let rate = Bytes(verify.rate);
            format!("{compared} of {total} compared, {differing} differ, {rate}/s, ETA {eta}")
        }
        (None, false) => format!("done: {compared} compared, {differing} differ"),
    }
}

/// Why there is or was a resync, and how far it is.
fn resync_rows(resync: &ResyncStatus) -> [(&'static str, String); 2] {
    let ResyncStatus {
        reason,
        total,
        compared,
        differing,
        rate,
        ..
    } = resync;
    let (compared, differing) = (Bytes(*compared), Bytes(*differing));
    let text = if resync.running {
        let eta = resync
            .eta_s
            .map_or_else(|| "-".into(), |s| format!("{s} s"));
        let (total, rate) = (Bytes(*total), Bytes(*rate));
        format!("{compared} of {total} compared, {differing} differ, {rate}/s, ETA {eta}")
    } else {
        format!("done: {compared} compared, {differing} differed")
    };
    [("resync", text), ("", format!("because {reason}"))]
}

fn sync_row(sync: SyncStatus) -> String {
    let SyncStatus {
        policy,
        state,
        waiting,
    } = sync;
    format!("{policy}: {state}, {waiting} flushes waiting")
}

fn latency_row(latency: &LatencyStatus) -> String {
    let LatencyStatus {
        p50_us,
        p99_us,
        p999_us,
        ..
    } = latency;
    format!("p50 {p50_us:.0} us, p99 {p99_us:.0} us, p99.9 {p999_us:.0} us")
}

fn disk_row(disk: &DiskStatus) -> String {
    let at = disk
        .path
        .as_ref()
        .map_or_else(String::new, |path| format!(" at {path}"));
    format!(
        "{} {} in {} ({}){at}",
        disk.name,
        Bytes(disk.size),
        disk.image,
        disk.format
    )
}
