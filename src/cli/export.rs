//! `understudy export`: the initial copy of a machine as a file, for a disk that is carried to the replica.

use std::path::{Path, PathBuf};

use super::{
    failover::{Asked, socket_of},
    output::Output,
    points::told,
    resync::LOOK_EVERY,
};
use crate::{
    base::{ids::Name, units::Bytes},
    node::control::{self, ClientError, FolderRequest},
};

/// Options of `export`.
#[derive(Clone, Debug, clap::Args)]
pub struct ExportArgs {
    #[command(flatten)]
    asked: Asked,
    /// An existing folder of this host, on the portable disk; the copy becomes MACHINE.hrl in it.
    #[arg(value_name = "FOLDER")]
    folder: PathBuf,
}

/// Exports, and shows how far it is.
pub async fn run(args: &ExportArgs, out: &Output) -> anyhow::Result<()> {
    let machine = &args.asked.machine;
    let socket = socket_of(&args.asked).await?;
    let request = folder(&args.folder)?;
    let asked = control::ask_export(&socket, machine, &request);
    let report = told(watched(&socket, machine, "exported", asked, out).await)?;
    if args.asked.json {
        return out.json(&report);
    }
    out.line(&format!(
        "{machine}: the initial copy is in {}, {}; what changes from now on is tracked",
        report.file.display(),
        Bytes(report.bytes)
    ));
    out.note(&format!(
        "carry it to the replica's host, and there: understudy import {machine} FOLDER"
    ));
    Ok(())
}

/// The folder as the node sees it, which was started elsewhere.
pub(super) fn folder(folder: &Path) -> anyhow::Result<FolderRequest> {
    let folder = std::path::absolute(folder)?;
    Ok(FolderRequest { folder })
}

/// Waits for the end of a copy, and shows how far it is.
pub(super) async fn watched<T>(
    socket: &Path,
    machine: &Name,
    what: &str,
    asked: impl Future<Output = Result<T, ClientError>>,
    out: &Output,
) -> Result<T, ClientError> {
    let mut progress = out.progress(what);
    let mut asked = std::pin::pin!(asked);
    let answer = loop {
        tokio::select! {
            answer = &mut asked => break answer,
            () = tokio::time::sleep(LOOK_EVERY) => {}
        }
        let node = control::ask_status(socket).await?;
        let status = node.machines.iter().find(|known| known.name == *machine);
        if let Some(copy) = status.and_then(|status| status.copy) {
            progress.set(copy.done, copy.total);
        }
    };
    progress.finish_if(answer.is_ok());
    answer
}
