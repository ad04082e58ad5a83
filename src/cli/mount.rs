//! `understudy mount`: a node with one machine, from flags.

use std::{
    collections::BTreeMap, net::SocketAddr, path::PathBuf, str::FromStr as _, sync::Arc,
    time::Duration,
};

use anyhow::Context;

use super::{
    hosting,
    output::{Output, Progress},
};
use crate::{
    base::ids::Name,
    coord::state::ReplicationState,
    delta::policy::Setting,
    disk::{Access, image::Format},
    net,
    node::{
        self,
        control::{Operate, requests},
        host::{Host, HostConfig, MachineConfig, PeerConfig, ReplicationConfig, parse_interval},
        initial_copy::InitialCopy,
        policy::Limit,
        primary::{ImageConfig, Primary, PrimaryError, ShowConfig},
        sync_flush::SyncOnFlush,
    },
};

/// The shim's own default, in the width of the flag.
const THREADS_DEFAULT: u16 = 16;
/// How often the initial copy is looked at: what waits for its last line waits no longer than this for nothing.
const COPY_SHOWN_EVERY: Duration = Duration::from_millis(50);
const _: () = assert!(
    crate::shim::THREADS_DEFAULT == 16,
    "the flag's default is the shim's"
);

/// Options of `mount`.
#[derive(Clone, Debug, clap::Args)]
pub struct MountArgs {
    /// Image files of the machine's disks; each is shown as `NAME.raw`.
    #[arg(required = true, value_name = "IMAGE")]
    images: Vec<PathBuf>,
    /// The folder to mount at: existing and empty.
    #[arg(long, value_name = "DIR")]
    at: PathBuf,
    /// The machine's name [default: the first image's name].
    #[arg(long, value_name = "NAME")]
    machine: Option<Name>,
    /// Format of the images [default: what their suffix says]. Contents are never guessed from.
    #[arg(long, value_name = "raw|vhd|vhdx")]
    format: Option<Format>,
    /// The folder that holds the parents of differencing images, below which they are looked for; never written to.
    #[arg(long, value_name = "DIR")]
    parents: Option<PathBuf>,
    /// Show the disks for reading only; the images are not changed, not even to replay a log.
    #[arg(long, conflicts_with_all = ["state", "replicate_to"])]
    read_only: bool,
    /// Let every user whom owner and mode admit open the files, as a monitor under its own user needs.
    #[arg(long)]
    all_users: bool,
    /// Owner of the files shown, as USER or USER:GROUP ids.
    #[arg(long, value_name = "UID[:GID]", value_parser = crate::shim::Owner::from_str)]
    owner: Option<crate::shim::Owner>,
    /// Folder for the tracking state: which blocks changed, what the replica has. Without it and without
    /// --replicate-to nothing is tracked [default with --replicate-to: /var/lib/understudy].
    #[arg(long, value_name = "DIR")]
    state: Option<PathBuf>,
    /// Replicate to the understudy replica at this address.
    #[arg(long, value_name = "HOST:PORT", requires = "identity")]
    replicate_to: Option<String>,
    /// Folder with this host's certificate and key (`understudy pki issue`).
    #[arg(long, value_name = "DIR")]
    identity: Option<PathBuf>,
    /// File of revoked certificates (`understudy pki revoke`), whose holders are refused.
    #[arg(long, value_name = "FILE", requires = "identity")]
    crl: Option<PathBuf>,
    /// The name in the replica's certificate [default: HOST of --replicate-to].
    #[arg(long, value_name = "NAME", requires = "replicate_to")]
    peer: Option<Name>,
    /// Address and UDP port to listen on, so that the other host can replicate back after a failover. Only the host of
    /// --replicate-to is let in.
    #[arg(long, value_name = "ADDR:PORT", requires = "replicate_to")]
    listen: Option<SocketAddr>,
    /// Time from one cut to the next, 100ms to 15m.
    #[arg(long, value_name = "TIME", default_value = "1s", value_parser = parse_interval)]
    interval: Duration,
    /// Answer the guest's flushes only when the replica has what was written before, so that nothing flushed is ever lost
    /// with this host. While the replica cannot be reached, `strict` lets the guest wait, `available` lets it go on.
    #[arg(long, value_name = "strict|available", requires = "replicate_to")]
    sync_on_flush: Option<SyncOnFlush>,
    /// Compression on the link: none, lz4, zstd, or auto for what pays.
    #[arg(long, value_name = "CODEC", default_value_t = Setting::Auto)]
    compression: Setting,
    /// Most bytes per second that are sent to the replica: 50M, with K, M or G (powers of 1024), at least 64K; or none. A
    /// machine that may send less than its guest writes has older recovery points; the guest does not notice, but for
    /// flushes with --sync-on-flush.
    #[arg(
        long,
        value_name = "LIMIT",
        default_value = "none",
        requires = "replicate_to"
    )]
    bandwidth: Limit,
    /// When the initial copy begins: now; at 22:00, the next time it is that late in UTC; at 2026-11-30T22:00:00Z; or
    /// portable, which waits for `understudy export` and `import`. `understudy copy` begins it at once. Until then
    /// changes are tracked, and there is nothing to fail over to.
    #[arg(
        long,
        value_name = "WHEN",
        default_value = "now",
        requires = "replicate_to"
    )]
    initial_copy: InitialCopy,
    /// Threads that serve the mount: the queue depth that the images see.
    #[arg(long, value_name = "N", default_value_t = THREADS_DEFAULT, value_parser = clap::value_parser!(u16).range(1..=256))]
    threads: u16,
    /// Path of the control socket [default: PID.sock in /run/understudy].
    #[arg(long, value_name = "PATH")]
    control: Option<PathBuf>,
}

/// Serves until SIGTERM, SIGINT or an unmount.
pub async fn run(args: MountArgs, out: &Output) -> anyhow::Result<()> {
    let mut stop = node::stop_signals()?;
    let socket = hosting::control_socket(args.control.as_deref()).await?;
    match config(args)? {
        What::Untracked {
            machine,
            images,
            show,
        } => {
            let primary =
                tokio::task::spawn_blocking(move || Primary::show(machine, &images, &show));
            let primary = Arc::new(primary.await??);
            hosting::say_paths(&primary.paths(), out);
            let server =
                tokio::spawn(socket.serve(requests(Arc::clone(&primary) as Arc<dyn Operate>)));
            tokio::select! {
                () = stop.next() => {}
                () = primary.ended() => out.note(TAKEN_AWAY),
            }
            let stopping = |how| {
                let primary = Arc::clone(&primary);
                async move {
                    let stopped = tokio::task::spawn_blocking(move || primary.stop(how)).await;
                    stopped.expect("stopping does not panic")
                }
            };
            node::shut_down(
                &mut stop,
                |text| out.note(text),
                stopping,
                PrimaryError::busy,
            )
            .await?;
            server.abort();
            let _ = server.await;
        }
        What::Host { machine, config } => {
            let host = hosting::start(*config).await?;
            hosting::say_paths(&host.paths(), out);
            hosting::say_address(&host, "peers", out);
            let progress = out.progress("initial copy");
            let shown = tokio::spawn(show_copy(Arc::clone(&host), machine, progress));
            let taken = Arc::clone(&host);
            let over = async {
                taken.ended().await;
                out.note(TAKEN_AWAY);
            };
            let served = hosting::serve(host, socket, &mut stop, over, out).await;
            shown.abort();
            served?;
        }
    }
    Ok(())
}

const TAKEN_AWAY: &str = "the mount was taken away: stopping";

/// Shows the initial copy while it runs.
async fn show_copy(host: Arc<Host>, machine: Name, mut progress: Progress) {
    let mut seen = false;
    loop {
        let (watched, copy) = {
            let (host, machine) = (Arc::clone(&host), machine.clone());
            let status = tokio::task::spawn_blocking(move || host.machine_status(&machine));
            let Ok(Some(status)) = status.await else {
                return;
            };
            (status.state, status.copy)
        };
        match (watched, copy) {
            (ReplicationState::Disabled, _) => return,
            (_, Some(copy)) => {
                seen = true;
                progress.set(copy.done, copy.total);
            }
            (ReplicationState::Replicating, None) if seen => return progress.finish(),
            _ => {}
        }
        tokio::time::sleep(COPY_SHOWN_EVERY).await;
    }
}

/// What the flags ask for.
enum What {
    /// Disks shown, and nothing remembered.
    Untracked {
        machine: Name,
        images: Vec<ImageConfig>,
        show: ShowConfig,
    },
    /// A host with one machine.
    Host {
        machine: Name,
        config: Box<HostConfig>,
    },
}

fn config(args: MountArgs) -> anyhow::Result<What> {
    let images = args
        .images
        .into_iter()
        .map(|path| Ok(ImageConfig::new(path, args.format)?.with_parents(args.parents.clone())))
        .collect::<anyhow::Result<Vec<_>>>()?;
    let first = images.first().context("a machine has at least one disk")?;
    let machine = args.machine.unwrap_or_else(|| first.name.clone());
    let show = ShowConfig {
        at: args.at,
        access: if args.read_only {
            Access::ReadOnly
        } else {
            Access::ReadWrite
        },
        fenced: false,
        visibility: if args.all_users {
            crate::shim::Visibility::AllUsers
        } else {
            crate::shim::Visibility::Owner
        },
        owner: args.owner,
        threads: usize::from(args.threads),
        mounter: crate::shim::Mounter::Itself,
    };
    let default_state = args
        .replicate_to
        .is_some()
        .then(|| PathBuf::from(node::STATE_FOLDER));
    let Some(state) = args.state.or(default_state) else {
        return Ok(What::Untracked {
            machine,
            images,
            show,
        });
    };
    let (mut peers, mut peer) = (BTreeMap::new(), None);
    if let Some(to) = args.replicate_to {
        let name = match args.peer {
            Some(name) => name,
            None => Name::new(net::host_of(&to)?)?,
        };
        peer = Some(name.clone());
        peers.insert(name, PeerConfig::at(to));
    }
    let replication = ReplicationConfig {
        interval: args.interval,
        compression: args.compression,
        sync_on_flush: args.sync_on_flush,
        bandwidth: args.bandwidth.into(),
        initial_copy: args.initial_copy,
        group: None,
    };
    let configured = MachineConfig {
        images,
        show,
        peer,
        replication: replication.clone(),
    };
    let config = Box::new(HostConfig {
        identity: args.identity,
        crl: args.crl,
        listen: args.listen,
        peers,
        replication,
        tolerant: false,
        machines: [(machine.clone(), configured)].into_iter().collect(),
        ..HostConfig::new(state.join(machine.as_str()))
    });
    Ok(What::Host { machine, config })
}
