//! `understudy import`: a replica begins with the initial copy that a portable disk brings.

use std::path::PathBuf;

use super::{
    export::{folder, watched},
    failover::{Asked, socket_of},
    output::Output,
    points::told,
};
use crate::{base::units::Bytes, node::control};

/// Options of `import`.
#[derive(Clone, Debug, clap::Args)]
pub struct ImportArgs {
    #[command(flatten)]
    asked: Asked,
    /// The folder of this host in which MACHINE.hrl lies, as `understudy export` made it.
    #[arg(value_name = "FOLDER")]
    folder: PathBuf,
}

/// Imports, and shows how far it is.
pub async fn run(args: &ImportArgs, out: &Output) -> anyhow::Result<()> {
    let machine = &args.asked.machine;
    let socket = socket_of(&args.asked).await?;
    let request = folder(&args.folder)?;
    let asked = control::ask_import(&socket, machine, &request);
    let report = told(watched(&socket, machine, "verified and imported", asked, out).await)?;
    if args.asked.json {
        return out.json(&report);
    }
    out.line(&format!(
        "{machine}: {} imported; with the next connection the primary sends what changed since the export",
        Bytes(report.bytes)
    ));
    Ok(())
}
