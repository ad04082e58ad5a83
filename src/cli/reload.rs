//! `understudy reload`: a host reads its certificate, its key, its authorities and the list of revoked certificates again.

use std::path::{Path, PathBuf};

use super::output::Output;
use crate::node::{control::ClientError, coordinator::ask_reload};

/// Options of `reload`.
#[derive(Clone, Debug, clap::Args)]
pub struct ReloadArgs {
    /// Path of the node's control socket [default: every node of this host].
    #[arg(long, value_name = "PATH")]
    control: Option<PathBuf>,
}

/// Asks one node or all of this host. A node that cannot use what it reads keeps what it had, and the exit code tells.
pub async fn run(args: &ReloadArgs, out: &Output) -> anyhow::Result<()> {
    let Some(socket) = &args.control else {
        let mut reloaded = 0;
        for (socket, _) in super::nodes().await? {
            match reload(&socket, out).await {
                Ok(()) => reloaded += 1,
                // A mount that replicates nothing has no identity.
                Err(ClientError::Refused(why)) => {
                    out.note(&format!("{}: {why}", socket.display()));
                }
                Err(error) => return Err(error.into()),
            }
        }
        if reloaded == 0 {
            return Err(super::refused(
                "no node of this host has an identity".into(),
            ));
        }
        return Ok(());
    };
    Ok(reload(socket, out).await?)
}

async fn reload(socket: &Path, out: &Output) -> Result<(), ClientError> {
    for reloaded in ask_reload(socket).await? {
        out.line(&reloaded.to_string());
    }
    Ok(())
}
