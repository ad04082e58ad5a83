//! `understudy status`: what the nodes of this host say, for people or as JSON.

use std::{path::PathBuf, time::Duration};

use anyhow::{Context, bail};

use super::{output::Output, refused};
use crate::{
    base::{ids::Name, units::Bytes},
    coord::state::Role,
    node::{
        control,
        status::{MachineStatus, NodeStatus},
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
    let mut nodes = Vec::new();
    for socket in control::sockets() {
        // A socket that a killed node left behind answers nobody: it is no node.
        match control::ask_status(&socket).await {
            Ok(node) => nodes.push(node),
            Err(control::ClientError::Connect { .. }) => {}
            Err(error) => return Err(error.into()),
        }
    }
    if nodes.is_empty() {
        bail!(
            "no node runs on this host: start one with `understudy mount` or `understudy replica`"
        );
    }
    Ok(nodes)
}

fn show(args: &StatusArgs, nodes: &[NodeStatus], out: &Output) -> anyhow::Result<()> {
    let mut nodes = nodes.to_vec();
    if let Some(machine) = &args.machine {
        nodes
            .iter_mut()
            .for_each(|node| node.machines.retain(|m| m.name == *machine));
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
    let row = |label: &str, value: String| out.line(&format!("  {label:<16} {value}"));
    out.line(&format!("{} ({})", machine.name, machine.role));
    row("state", machine.state.to_string());
    row("health", machine.health.to_string());
    for reason in &machine.reasons {
        row("", reason.clone());
    }
    row("generation", machine.generation.to_string());
    if let Some(peer) = &machine.peer {
        row(
            if machine.role == Role::Primary {
                "replica"
            } else {
                "primary"
            },
            peer.clone(),
        );
    }
    let durable = machine.durable.map_or_else(
        || "none yet".into(),
        |l| format!("{} ({:.12})", l.epoch, l.chain.to_string()),
    );
    row("durable epoch", durable);
    if let Some(base) = machine.base_epoch {
        row("image epoch", base.to_string());
    }
    if let Some(copy) = &machine.copy {
        let percent = if copy.total == 0 {
            100
        } else {
            copy.done.saturating_mul(100) / copy.total
        };
        let eta = copy.eta_s.map_or_else(|| "-".into(), |s| format!("{s} s"));
        let (done, total, rate) = (Bytes(copy.done), Bytes(copy.total), Bytes(copy.rate));
        row(
            "initial copy",
            format!("{done} of {total} ({percent} %), {rate}/s, ETA {eta}"),
        );
    }
    let ms = |value: Option<u64>| value.map_or_else(|| "-".into(), |ms| format!("{ms} ms"));
    let rpo = &machine.rpo;
    row(
        "RPO",
        format!(
            "now {}, p50 {}, p99 {}",
            ms(rpo.now_ms),
            ms(rpo.p50_ms),
            ms(rpo.p99_ms)
        ),
    );
    let t = &machine.traffic;
    row("owed", Bytes(t.owed).to_string());
    row(
        "epochs",
        format!("{} durable, {} merged", t.epochs, t.merged),
    );
    let verb = if machine.role == Role::Primary {
        "sent"
    } else {
        "received"
    };
    row(
        verb,
        format!(
            "{} on the wire for {} of blocks, {} folded away",
            Bytes(t.sent),
            Bytes(t.raw),
            Bytes(t.folded)
        ),
    );
    if let Some(l) = &machine.write_latency {
        row(
            "write latency",
            format!(
                "p50 {:.0} us, p99 {:.0} us, p99.9 {:.0} us",
                l.p50_us, l.p99_us, l.p999_us
            ),
        );
    }
    for disk in &machine.disks {
        let at = disk
            .path
            .as_ref()
            .map_or_else(String::new, |path| format!(" at {path}"));
        row(
            "disk",
            format!(
                "{} {} in {} ({}){at}",
                disk.name,
                Bytes(disk.size),
                disk.image,
                disk.format
            ),
        );
    }
}
