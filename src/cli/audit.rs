//! `understudy audit`: whether an audit log is what was written.

use std::path::PathBuf;

use super::output::Output;
use crate::node::audit;

/// Options of `audit`.
#[derive(Clone, Debug, clap::Args)]
pub struct AuditArgs {
    #[command(subcommand)]
    verb: AuditVerb,
}

#[derive(Clone, Debug, clap::Subcommand)]
enum AuditVerb {
    /// Check that every line follows from the one before, and name the first that does not.
    Verify {
        /// The log's files, oldest first: STORE/audit.log.2 STORE/audit.log.1 STORE/audit.log.
        #[arg(required = true, value_name = "FILE")]
        files: Vec<PathBuf>,
    },
}

/// Runs the verb.
pub fn run(args: &AuditArgs, out: &Output) -> anyhow::Result<()> {
    let AuditVerb::Verify { files } = &args.verb;
    let verified = audit::verify(files)?;
    out.line(&format!(
        "{} lines hold, from number {} to {}; the digest of the last is {}",
        verified.lines, verified.first, verified.last, verified.head
    ));
    Ok(())
}
