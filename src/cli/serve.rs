//! `understudy serve`: a host from a configuration file: machines that run here, replicas of others, both at once.

use std::{path::PathBuf, sync::Arc};

use anyhow::Context;

use super::{
    mount::{host_shut_down, say_paths},
    output::Output,
};
use crate::node::{
    self,
    control::{ControlSocket, Operate},
    host::{self, Host},
};

/// Options of `serve`.
#[derive(Clone, Debug, clap::Args)]
pub struct ServeArgs {
    /// The host's configuration, a TOML file.
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
    /// Read the configuration, say what is wrong with it, and end.
    #[arg(long)]
    check: bool,
    /// Path of the control socket [default: PID.sock in /run/understudy].
    #[arg(long, value_name = "PATH")]
    control: Option<PathBuf>,
}

/// Serves until SIGTERM or SIGINT.
pub async fn run(args: ServeArgs, out: &Output) -> anyhow::Result<()> {
    let config = host::read(&args.config)?;
    if args.check {
        out.line(&format!("{}: no complaints", args.config.display()));
        return Ok(());
    }
    let mut stop = node::stop_signals()?;
    let socket = ControlSocket::bind(args.control.as_deref())
        .await
        .context("cannot open the control socket")?;
    let host = tokio::task::spawn_blocking(move || Host::start(config));
    let host = host.await??;
    say_paths(&host.paths(), out);
    if let Some(address) = host.address() {
        out.note(&format!("accepting peers on {address}"));
    }
    let server = tokio::spawn(socket.serve(Arc::clone(&host) as Arc<dyn Operate>));
    tokio::select! {
        () = stop.next() => {}
        failed = host.run() => failed?,
    }
    host_shut_down(&host, &mut stop, out).await?;
    server.abort();
    let _ = server.await;
    Ok(())
}
