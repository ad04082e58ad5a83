//! `understudy resize`: a larger disk for a machine that is in use.

use super::{
    failover::{Asked, socket_of},
    output::Output,
    points::told,
};
use crate::{
    base::{
        ids::Name,
        units::{Bytes, parse_size},
    },
    node::control::{self, ResizeRequest},
};

/// Options of `resize`.
#[derive(Clone, Debug, clap::Args)]
pub struct ResizeArgs {
    #[command(flatten)]
    asked: Asked,
    /// The disk: the image's name without its suffix, as `understudy status` shows it.
    #[arg(value_name = "DISK")]
    disk: Name,
    /// The new size that the guest sees: a number with K, M, G or T, larger than now.
    #[arg(value_name = "SIZE", value_parser = parse_size)]
    size: u64,
}

/// Grows the disk.
pub async fn run(args: &ResizeArgs, out: &Output) -> anyhow::Result<()> {
    let socket = socket_of(&args.asked).await?;
    let request = ResizeRequest {
        disk: args.disk.clone(),
        size: args.size,
    };
    let machine = &args.asked.machine;
    let report = told(control::ask_resize(&socket, machine, &request).await)?;
    if args.asked.json {
        return out.json(&report);
    }
    out.line(&format!(
        "{machine}: disk {} has {} now, it had {}",
        args.disk,
        Bytes(report.size),
        Bytes(report.before)
    ));
    out.note("tell the guest's monitor (QEMU: block_resize to the same size); partitions and file systems keep their size until the guest changes them");
    Ok(())
}
