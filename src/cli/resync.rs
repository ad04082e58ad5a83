//! `understudy resync`: compare a machine with its replica by hashes and send what differs, while the guest runs.

use std::time::Duration;

use anyhow::Context;

use super::{
    failover::{Asked, socket_of},
    output::Output,
    points::told,
};
use crate::{
    base::units::Bytes,
    coord::state::ReplicationState,
    node::{
        control,
        status::{MachineStatus, ResyncStatus},
    },
};

/// Time between two looks at how far it is.
const LOOK_EVERY: Duration = Duration::from_millis(250);

/// Options of `resync`.
#[derive(Clone, Debug, clap::Args)]
pub struct ResyncArgs {
    #[command(flatten)]
    asked: Asked,
    /// Return as soon as it is durably begun; `understudy status` shows how it goes.
    #[arg(long)]
    no_wait: bool,
}

/// Begins a resync, and shows how it goes until its epoch is durable on the replica.
pub async fn run(args: &ResyncArgs, out: &Output) -> anyhow::Result<()> {
    let machine = &args.asked.machine;
    let socket = socket_of(&args.asked).await?;
    told(control::ask_resync(&socket, machine).await)?;
    if args.no_wait {
        out.note(&format!(
            "the resync of {machine} is begun and goes on by itself: understudy status {machine}"
        ));
        return Ok(());
    }
    let mut progress = out.progress("compared");
    let mut waits = false;
    let done = loop {
        let node = control::ask_status(&socket).await?;
        let mut machines = node.machines.into_iter();
        let status = machines.find(|known| known.name == *machine);
        let status = status.context("the machine is not there any more")?;
        if !waits && is_held_up(&status) {
            waits = true;
            out.note(&format!("waits: {}", status.reasons.join("; ")));
        }
        let resync = status.resync.context("the resync was given up")?;
        progress.set(resync.compared.min(resync.total), resync.total);
        if !resync.running {
            break resync;
        }
        tokio::time::sleep(LOOK_EVERY).await;
    };
    progress.finish();
    if args.asked.json {
        return out.json(&done);
    }
    out.line(&format!("{machine}: {}", summary(&done)));
    Ok(())
}

fn is_held_up(status: &MachineStatus) -> bool {
    matches!(
        status.state,
        ReplicationState::Suspended | ReplicationState::Error
    )
}

fn summary(resync: &ResyncStatus) -> String {
    format!(
        "in step; {} compared, {} of them differed and were sent",
        Bytes(resync.compared),
        Bytes(resync.differing)
    )
}
