//! `understudy serve`: a host from a configuration file: machines that run here, replicas of others, both at once.

use std::path::PathBuf;

use super::{hosting, output::Output};
use crate::{
    node::{
        self,
        hardening::Duty,
        host::{self, HostConfig},
    },
    shim::Mounter,
};

/// Options of `serve`.
#[derive(Clone, Debug, clap::Args)]
pub struct ServeArgs {
    /// The host's configuration, a TOML file.
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
    /// Read the configuration, say what is wrong with it or what every machine ends up with, and end.
    #[arg(long)]
    check: bool,
    /// Path of the control socket [default: PID.sock in /run/understudy].
    #[arg(long, value_name = "PATH")]
    control: Option<PathBuf>,
}

/// Serves until SIGTERM or SIGINT.
pub fn run(args: ServeArgs, out: &Output) -> anyhow::Result<()> {
    let config = host::read(&args.config)?;
    if args.check {
        out.line(&format!("{}: no complaints", args.config.display()));
        config.describe().iter().for_each(|line| out.line(line));
        return Ok(());
    }
    let duty = match config.mounter {
        Mounter::Itself => Duty::Disks,
        Mounter::Helper(_) => Duty::MountedDisks,
    };
    super::host_runtime(duty)?.block_on(serve(config, args.control, out))
}

async fn serve(config: HostConfig, control: Option<PathBuf>, out: &Output) -> anyhow::Result<()> {
    let mut stop = node::stop_signals()?;
    let socket = hosting::control_socket(control.as_deref()).await?;
    let host = hosting::start(config).await?;
    hosting::say_paths(&host.paths(), out);
    hosting::say_address(&host, "peers", out);
    hosting::serve(host, socket, &mut stop, std::future::pending(), out).await
}
