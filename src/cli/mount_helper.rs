//! `understudy mount-helper`: mounts for a host of the same user that must not be able to mount itself.

use std::path::PathBuf;

use super::output::Output;
use crate::{
    node::hardening::{self, Duty},
    shim::helper::Server,
};

/// Options of `mount-helper`.
#[derive(Clone, Debug, clap::Args)]
pub struct MountHelperArgs {
    /// The socket on which hosts of this user ask for mounts: `mount-helper` in their configuration.
    #[arg(long, value_name = "PATH")]
    socket: PathBuf,
    /// A folder beneath which they may have empty folders of this user mounted at; more than one may be given.
    #[arg(long, required = true, value_name = "DIR")]
    beneath: Vec<PathBuf>,
}

/// Answers requests until the process is ended.
pub fn run(args: &MountHelperArgs, out: &Output) -> anyhow::Result<()> {
    hardening::harden(Duty::Mounting);
    let server = Server::bind(&args.socket, &args.beneath)?;
    out.note(&format!(
        "mounting for hosts that ask on {}",
        args.socket.display()
    ));
    Ok(server.run()?)
}
