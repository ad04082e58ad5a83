//! `understudy mount`: a node with one machine, from flags.

use std::{path::PathBuf, sync::Arc, time::Duration};

use anyhow::Context;

use super::output::{Output, Progress};
use crate::{
    base::ids::Name,
    coord::state::ReplicationState,
    delta::policy::Setting,
    disk::{Access, image::Format},
    node::{
        self,
        control::{ControlSocket, Operate},
        primary::{ImageConfig, Primary, PrimaryConfig, ReplicationConfig},
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
    #[arg(long, value_name = "UID[:GID]", value_parser = parse_owner)]
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
    /// The name in the replica's certificate [default: HOST of --replicate-to].
    #[arg(long, value_name = "NAME", requires = "replicate_to")]
    peer: Option<Name>,
    /// Time from one cut to the next, 100ms to 15m.
    #[arg(long, value_name = "TIME", default_value = "1s", value_parser = parse_interval)]
    interval: Duration,
    /// Compression on the link: none, lz4, zstd, or auto for what pays.
    #[arg(long, value_name = "CODEC", default_value_t = Setting::Auto)]
    compression: Setting,
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
    let socket = ControlSocket::bind(args.control.as_deref())
        .await
        .context("cannot open the control socket")?;
    let config = config(args)?;
    let primary = tokio::task::spawn_blocking(move || {
        Primary::start(config, tokio::runtime::Handle::current())
    });
    let primary = Arc::new(primary.await??);
    for path in primary.paths() {
        out.note(&format!("serving {}", path.display()));
    }
    let server = tokio::spawn(socket.serve(Arc::clone(&primary) as Arc<dyn Operate>));
    let shown = tokio::spawn(show_copy(
        Arc::clone(&primary),
        out.progress("initial copy"),
    ));

    let ended = primary.ended();
    tokio::select! {
        () = stop.next() => {}
        () = ended => out.note("the mount was taken away: stopping"),
    }
    shown.abort();
    node::shut_down(&primary, &mut stop, |text| out.note(text)).await?;
    server.abort();
    let _ = server.await;
    Ok(())
}

/// Shows the initial copy while it runs.
async fn show_copy(primary: Arc<Primary>, mut progress: Progress) {
    let mut seen = false;
    loop {
        let (watched, copy) = {
            let primary = Arc::clone(&primary);
            let status = tokio::task::spawn_blocking(move || primary.machine_status());
            let Ok(status) = status.await else { return };
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

fn config(args: MountArgs) -> anyhow::Result<PrimaryConfig> {
    let images = args
        .images
        .into_iter()
        .map(|path| Ok(ImageConfig::new(path, args.format)?.with_parents(args.parents.clone())))
        .collect::<anyhow::Result<Vec<_>>>()?;
    let first = images.first().context("a machine has at least one disk")?;
    let machine = args.machine.unwrap_or_else(|| first.name.clone());
    let replication = match (args.replicate_to, args.identity) {
        (Some(to), Some(identity)) => Some(ReplicationConfig {
            to,
            identity,
            peer: args.peer,
            interval: args.interval,
            compression: args.compression,
        }),
        _ => None,
    };
    let default_state = replication
        .is_some()
        .then(|| PathBuf::from(node::STATE_FOLDER));
    Ok(PrimaryConfig {
        machine,
        images,
        at: args.at,
        access: if args.read_only {
            Access::ReadOnly
        } else {
            Access::ReadWrite
        },
        visibility: if args.all_users {
            crate::shim::Visibility::AllUsers
        } else {
            crate::shim::Visibility::Owner
        },
        owner: args.owner,
        threads: usize::from(args.threads),
        state: args.state.or(default_state),
        replication,
    })
}

fn parse_owner(text: &str) -> Result<crate::shim::Owner, String> {
    let (user, group) = text.split_once(':').unwrap_or((text, text));
    let parse = |id: &str| {
        id.parse::<u32>()
            .map_err(|_| format!("{id:?} is not a numeric id"))
    };
    Ok(crate::shim::Owner {
        user: parse(user)?,
        group: parse(group)?,
    })
}

/// Reads `500ms`, `1s`, `15m`.
fn parse_interval(text: &str) -> Result<Duration, String> {
    let digits = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let number: u64 = number
        .parse()
        .map_err(|_| format!("{text:?} is not a time: use 500ms, 1s or 5m"))?;
    let millis = match unit {
        "ms" => Some(number),
        "s" => number.checked_mul(1000),
        "m" => number.checked_mul(60_000),
        _ => return Err(format!("{text:?} has no unit: use ms, s or m")),
    };
    match millis {
        Some(millis @ 100..=900_000) => Ok(Duration::from_millis(millis)),
        _ => Err(format!("{text} is not between 100ms and 15m")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn intervals_have_a_unit_and_a_range() {
        assert_eq!(parse_interval("100ms"), Ok(Duration::from_millis(100)));
        assert_eq!(parse_interval("15m"), Ok(Duration::from_mins(15)));
        for bad in [
            "",
            "1",
            "s",
            "99ms",
            "16m",
            "1h",
            "-1s",
            "99999999999999999999s",
        ] {
            assert!(parse_interval(bad).is_err(), "{bad}");
        }
    }
}
