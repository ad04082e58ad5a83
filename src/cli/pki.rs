//! `understudy pki`: certificates for a house that has no authority of its own.

use std::path::PathBuf;

use super::output::Output;
use crate::{
    base::{
        clock::{Clock, SystemClock},
        ids::Name,
    },
    net::{
        pki::{self, San},
        revoke,
    },
};

/// Options of `pki`.
#[derive(Clone, Debug, clap::Args)]
pub struct PkiArgs {
    #[command(subcommand)]
    verb: PkiVerb,
}

#[derive(Clone, Debug, clap::Subcommand)]
enum PkiVerb {
    /// Make a certificate authority in an empty or new folder.
    Init {
        /// The authority's folder; keep `ca.key` in it secret.
        dir: PathBuf,
    },
    /// Issue the identity of a host.
    Issue {
        /// The authority's folder.
        dir: PathBuf,
        /// The host's name: what others allow, and what they dial unless --san says more.
        name: Name,
        /// A further DNS name or IP address the host is dialled by.
        #[arg(long, value_name = "NAME|ADDRESS")]
        san: Vec<San>,
        /// Folder of the identity [default: the host's name, in the current folder].
        #[arg(long, value_name = "DIR")]
        out: Option<PathBuf>,
    },
    /// Revoke identities: signs the list of revoked certificates, DIR/ca.crl, which hosts take as `crl`. Without a name or a
    /// certificate it signs the list anew for another 90 days.
    Revoke {
        /// The authority's folder.
        dir: PathBuf,
        /// Revoke everything that was issued to this name.
        name: Vec<Name>,
        /// Revoke the certificate in this file (`host.crt`).
        #[arg(long, value_name = "FILE")]
        certificate: Vec<PathBuf>,
    },
}

/// Runs the verb.
pub fn run(args: &PkiArgs, out: &Output) -> anyhow::Result<()> {
    let now = SystemClock::default().wall();
    match &args.verb {
        PkiVerb::Init { dir } => {
            pki::init(dir, now)?;
            out.line(&format!(
                "made a certificate authority in {}",
                dir.display()
            ));
        }
        PkiVerb::Issue {
            dir,
            name,
            san,
            out: target,
        } => {
            let target = target
                .clone()
                .unwrap_or_else(|| PathBuf::from(name.as_str()));
            let key = pki::issue(dir, name, san, &target, now)?;
            out.line(&format!(
                "issued the identity of {name} in {}: copy the folder to that host; its key is {key}",
                target.display()
            ));
        }
        PkiVerb::Revoke {
            dir,
            name,
            certificate,
        } => {
            let list = revoke::revoke(dir, name, certificate, now)?;
            out.line(&format!(
                "{}: {} revoked, {} of them now; copy it to every host by {} and run `understudy reload` there",
                list.path.display(),
                list.revoked,
                list.added,
                list.valid_until,
            ));
        }
    }
    Ok(())
}
