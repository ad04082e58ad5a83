//! `understudy replica`: a node that receives machines.

use std::{collections::BTreeMap, net::SocketAddr, path::PathBuf};

use super::{hosting, output::Output};
use crate::{
    base::{
        ids::Name,
        limits::{KEEP_HOURS_MAX, KEEP_NEWEST_MAX},
        units::parse_size,
    },
    disk::image::Format,
    net,
    node::{
        self,
        host::{HostConfig, Keeping, PeerConfig},
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
    /// File of revoked certificates (`understudy pki revoke`), whose holders are refused.
    #[arg(long, value_name = "FILE")]
    crl: Option<PathBuf>,
    /// A host that may replicate to here, by the name in its certificate. Nobody else may.
    #[arg(long, value_name = "NAME", required_unless_present = "peer")]
    allow: Vec<Name>,
    /// The same, with the address where that host listens: after a failover this host replicates back to it.
    #[arg(long, value_name = "NAME=HOST:PORT", value_parser = parse_peer)]
    peer: Vec<(Name, String)>,
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
    /// Begin the replica of a new machine with an old copy of its images, if they lie in `STORE/<machine>/<disk>.<format>`:
    /// they are compared with the primary's disks, and only what differs is sent.
    #[arg(long)]
    seed: bool,
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
    let socket = hosting::control_socket(args.control.as_deref()).await?;
    let host = hosting::start(config(args)).await?;
    hosting::say_address(&host, "primaries", out);
    hosting::serve(host, socket, &mut stop, std::future::pending(), out).await
}

fn config(args: ReplicaArgs) -> HostConfig {
    let allowed = args.allow.into_iter();
    let mut peers: BTreeMap<Name, PeerConfig> =
        allowed.map(|name| (name, PeerConfig::default())).collect();
    for (name, address) in args.peer {
        peers.insert(name, PeerConfig::at(address));
    }
    HostConfig {
        identity: Some(args.identity),
        crl: args.crl,
        listen: Some(args.listen),
        peers,
        keeping: Keeping {
            format: args.format,
            retention: Retention {
                newest: args.keep,
                hourly: args.hourly,
            },
            space_max: args.space_max,
            seed: args.seed,
            tests: args.tests,
        },
        ..HostConfig::new(args.store)
    }
}

/// Reads `NAME=HOST:PORT`.
fn parse_peer(text: &str) -> Result<(Name, String), String> {
    let (name, address) = text
        .split_once('=')
        .ok_or_else(|| format!("{text:?} is not NAME=HOST:PORT"))?;
    let name = Name::new(name).map_err(|error| error.to_string())?;
    net::host_of(address).map_err(|error| error.to_string())?;
    Ok((name, address.to_owned()))
}
