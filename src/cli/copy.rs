//! `understudy copy`: an initial copy that waits for its time or for a portable disk begins now.

use super::{
    failover::{Asked, socket_of},
    output::Output,
    points::told,
};
use crate::node::control;

/// Options of `copy`.
#[derive(Clone, Debug, clap::Args)]
pub struct CopyArgs {
    #[command(flatten)]
    asked: Asked,
}

/// Begins the copy.
pub async fn run(args: &CopyArgs, out: &Output) -> anyhow::Result<()> {
    let machine = &args.asked.machine;
    let socket = socket_of(&args.asked).await?;
    told(control::ask_copy(&socket, machine).await)?;
    if args.asked.json {
        return out.json(&());
    }
    out.line(&format!("{machine}: the initial copy begins now"));
    out.note(&format!("how it goes: understudy status {machine}"));
    Ok(())
}
