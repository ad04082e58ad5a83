//! `understudy replica`: a node that receives machines.

use std::{net::SocketAddr, path::PathBuf, sync::Arc};

use anyhow::Context;

use super::output::Output;
use crate::{
    base::ids::Name,
    disk::image::Format,
    node::{
        self,
        control::{ControlSocket, Operate},
        secondary::{Secondary, SecondaryConfig},
    },
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
    /// Recovery points to keep as delta logs beside the images; 0 keeps only the latest state.
    #[arg(long, value_name = "N", default_value_t = 0)]
    keep: u32,
    /// Path of the control socket [default: PID.sock in /run/understudy].
    #[arg(long, value_name = "PATH")]
    control: Option<PathBuf>,
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
        keep: args.keep,
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
