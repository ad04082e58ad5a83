//! `understudy verify`: compare a machine's replica with its disks by hashes, while the guest runs.

use anyhow::{Context, bail};

use super::{
    failover::{Asked, socket_of},
    output::Output,
    points::told,
    resync::{LOOK_EVERY, Watch, follow},
};
use crate::{
    base::units::{Bytes, parse_size},
    node::{
        control::{self, VerifyRequest},
        status::VerifyStatus,
    },
};

/// Options of `verify`.
#[derive(Clone, Debug, clap::Args)]
pub struct VerifyArgs {
    #[command(flatten)]
    asked: Asked,
    /// Send the blocks that differ again, from the primary. Without it nothing is changed.
    #[arg(long)]
    repair: bool,
    /// Read at most so many bytes in a second, for example 20M [default: as fast as it goes].
    #[arg(long, value_name = "BYTES", value_parser = parse_throttle)]
    throttle: Option<u64>,
    /// Return as soon as it is begun; `understudy status` shows how it goes.
    #[arg(long)]
    no_wait: bool,
}

fn parse_throttle(text: &str) -> Result<u64, String> {
    match parse_size(text)? {
        0 => Err("nothing can be verified without reading".into()),
        bytes => Ok(bytes),
    }
}

/// Begins a verification, shows how it goes, and names what differs.
pub async fn run(args: &VerifyArgs, out: &Output) -> anyhow::Result<()> {
    let machine = &args.asked.machine;
    let socket = socket_of(&args.asked).await?;
    let request = VerifyRequest {
        repair: args.repair,
        throttle: args.throttle,
    };
    told(control::ask_verify(&socket, machine, request).await)?;
    if args.no_wait {
        out.note(&format!(
            "the verification of {machine} is begun and goes on by itself: understudy status {machine}"
        ));
        return Ok(());
    }
    let mut watch = Watch::new("verified", out);
    let done = loop {
        let status = watch.look(&socket, machine, out).await?;
        let verify = status.verify;
        let verify = verify.context("the node was started anew: verify again")?;
        watch.set(verify.total.saturating_sub(verify.left), verify.total);
        if !verify.running {
            break verify;
        }
        tokio::time::sleep(LOOK_EVERY).await;
    };
    watch.progress.finish_if(done.problem.is_none());
    if args.repair && done.differing > 0 && done.problem.is_none() {
        follow(&socket, machine, out).await?;
    }
    if args.asked.json {
        out.json(&done)?;
    } else {
        print(&done, out);
    }
    if let Some(problem) = &done.problem {
        bail!("machine {machine} was not verified to the end: {problem}");
    }
    if done.differing > 0 && !args.repair {
        bail!(
            "{} of machine {machine} differ from its replica: find out which side is right; --repair sends the primary's",
            Bytes(done.differing)
        );
    }
    Ok(())
}

fn print(done: &VerifyStatus, out: &Output) {
    for found in &done.found {
        let (disk, offset, len) = (&found.disk, found.offset, found.len);
        out.line(&format!(
            "differs: disk {disk}, {len} bytes at offset {offset:#x}"
        ));
    }
    let named = crate::base::units::to_u64(done.found.len());
    if done.places > named {
        out.line(&format!("and {} places more", done.places - named));
    }
    if done.left > 0 {
        out.line(&format!(
            "not compared: {} that were written in each epoch",
            Bytes(done.left)
        ));
    }
    let outcome = match (done.differing, done.repair) {
        (0, _) => "no difference".to_owned(),
        (bytes, false) => format!("{} differ", Bytes(bytes)),
        (bytes, true) => format!("{} differed and were sent again", Bytes(bytes)),
    };
    out.line(&format!("{} compared: {outcome}", Bytes(done.compared)));
}
