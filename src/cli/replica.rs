//! `understudy replica`: a node that receives machines.

use std::{net::SocketAddr, path::PathBuf, sync::Arc};

use anyhow::Context;

use super::{image::parse_size, output::Output};
use crate::{
    base::{
        ids::Name,
        limits::{KEEP_HOURS_MAX, KEEP_NEWEST_MAX},
    },
    disk::image::Format,
    node::{
        self,
        control::{ControlSocket, Operate},
        secondary::{Secondary, SecondaryConfig},
    },
    replica::Retention,
};

/// Options of `replica`.
#[derive(Clone, Debug, clap::Args)]
pub struct ReplicaArgs {
    /// Folder for the replicas: images, delta logs, records.
    #[arg(long, value_name = "DIR")]
    store: PathBuf,
    /// Address and UDP port to listen on; port 0 takes a free one, which `status` shows.
    #[arg(long, value_name = "ADDR:PORT")]
    listen: SocketAddr,
    /// Folder with this host's certificate and key (`understudy pki issue`).
    #[arg(long, value_name = "DIR")]
    identity: PathBuf,
    /// A host that may replicate to here, by the name in its certificate. Nobody else may.
    #[arg(long, value_name = "NAME", required = true)]
    allow: Vec<Name>,
    /// Format of the replica's images [default: the primary's].
    #[arg(long, value_name = "raw|vhd|vhdx")]
    format: Option<Format>,
    /// Newest epochs to keep as recovery points beside the latest; 0 keeps the latest alone.
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = up_to(KEEP_NEWEST_MAX))]
    keep: u32,
    /// Hours of which the first recovery point is kept, counted back from the newest point.
    #[arg(long, value_name = "HOURS", default_value_t = 0, value_parser = up_to(KEEP_HOURS_MAX))]
    hourly: u32,
    /// Space that the recovery points of one machine may take beside its images; more than its largest epoch needs. Above
    /// half of it points are dropped, the finest first; at the limit nothing more is taken, and the primary goes on.
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    space_max: Option<u64>,
    /// Folder for the mounts of test failovers [default: `tests` in the machine's folder of the store].
    #[arg(long, value_name = "DIR")]
    tests: Option<PathBuf>,
    /// Path of the control socket [default: PID.sock in /run/understudy].
    #[arg(long, value_name = "PATH")]
    control: Option<PathBuf>,
}

fn up_to(most: u32) -> clap::builder::RangedI64ValueParser<u32> {
    clap::value_parser!(u32).range(..=i64::from(most))
}

/// Serves until SIGTERM or SIGINT.
pub async fn run(args: ReplicaArgs, out: &Output) -> anyhow::Result<()> {
    let mut stop = node::stop_signals()?;
    let socket = ControlSocket::bind(args.control.as_deref())
        .await
        .context("cannot open the control socket")?;
    let config = SecondaryConfig {
        store: args.store,
        listen: args.listen,
        identity: args.identity,
        allow: args.allow,
        format: args.format,
        retention: Retention {
            newest: args.keep,
            hourly: args.hourly,
        },
        space_max: args.space_max,
        tests: args.tests,
    };
    let secondary = Arc::new(Secondary::start(&config)?);
    out.note(&format!("accepting primaries on {}", secondary.address()));
    let server = tokio::spawn(socket.serve(Arc::clone(&secondary) as Arc<dyn Operate>));
    tokio::select! {
        () = stop.next() => {}
        failed = secondary.run() => failed?,
    }
    secondary.stop().await?;
    server.abort();
    let _ = server.await;
    Ok(())
}
