//! `understudy resync`: compare a machine with its replica by hashes and send what differs, while the guest runs.

use std::{path::Path, time::Duration};

use anyhow::Context;

use super::{
    failover::{Asked, socket_of},
    output::{Output, Progress},
    points::told,
};
use crate::{
    base::{ids::Name, units::Bytes},
    coord::state::ReplicationState,
    node::{
        control,
        status::{MachineStatus, ResyncStatus},
    },
};

/// Time between two looks at how far it is.
pub(super) const LOOK_EVERY: Duration = Duration::from_millis(250);

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
    let done = follow(&socket, machine, out).await?;
    if args.asked.json {
        return out.json(&done);
    }
    out.line(&format!("{machine}: {}", summary(&done)));
    Ok(())
}

/// Shows how a resync goes until it is over.
pub(super) async fn follow(
    socket: &Path,
    machine: &Name,
    out: &Output,
) -> anyhow::Result<ResyncStatus> {
    let mut watch = Watch::new("compared", out);
    loop {
        let status = watch.look(socket, machine, out).await?;
        let resync = status.resync.context("the resync was given up")?;
        watch.set(resync.compared, resync.total);
        if !resync.running {
            watch.progress.finish();
            return Ok(resync);
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

/// Long work on a machine, looked at again and again.
pub(super) struct Watch {
    pub(super) progress: Progress,
    /// Whether it was told that the work stands still.
    told: bool,
}

impl Watch {
    pub(super) fn new(what: &str, out: &Output) -> Self {
        Self {
            progress: out.progress(what),
            told: false,
        }
    }

    /// The machine now; says once if nothing can go on.
    pub(super) async fn look(
        &mut self,
        socket: &Path,
        machine: &Name,
        out: &Output,
    ) -> anyhow::Result<MachineStatus> {
        let node = control::ask_status(socket).await?;
        let mut machines = node.machines.into_iter();
        let status = machines.find(|known| known.name == *machine);
        let status = status.context("the machine is not there any more")?;
        if !self.told && is_held_up(&status) {
            self.told = true;
            out.note(&format!("waits: {}", status.reasons.join("; ")));
        }
        Ok(status)
    }

    pub(super) fn set(&mut self, done: u64, total: u64) {
        self.progress.set(done.min(total), total);
    }
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
