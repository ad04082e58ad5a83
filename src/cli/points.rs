//! `understudy points`: what a replica can go back to, and what that would cost.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::bail;

use super::{output::Output, refused};
use crate::{
    base::{ids::Name, units::Bytes},
    coord::state::Role,
    delta::Consistency,
    node::{
        control::{self, ClientError},
        status::{MachineStatus, PointStatus},
    },
};

/// Options of `points`.
#[derive(Clone, Debug, clap::Args)]
pub struct PointsArgs {
    /// The machine.
    machine: Name,
    /// Print JSON: an array of points, oldest first.
    #[arg(long)]
    json: bool,
    /// Ask the node on this control socket instead of looking for the replica on this host.
    #[arg(long, value_name = "PATH")]
    control: Option<PathBuf>,
}

/// Prints the points, oldest first.
pub async fn run(args: &PointsArgs, out: &Output) -> anyhow::Result<()> {
    let socket = replica_socket(args.control.as_deref(), &args.machine).await?;
    let points = told(control::ask_points(&socket, &args.machine).await)?;
    if args.json {
        return out.json(&points);
    }
    if points.is_empty() {
        out.note("no recovery point yet: the initial copy is not complete");
        return Ok(());
    }
    out.line(&format!(
        "{:>10}  {:<23}  {:<22}  {:>9}  a rollback to it loses",
        "epoch", "time", "kind", "size"
    ));
    for point in &points {
        out.line(&row(point));
    }
    Ok(())
}

fn row(point: &PointStatus) -> String {
    let kind = match point.kind {
        _ if point.rescue => "rescue",
        Consistency::Crash => "crash-consistent",
        Consistency::Application => "application-consistent",
    };
    let lost = if point.rescue {
        "what a former primary had after that epoch: look at it with `failover --test --rescue`"
            .to_owned()
    } else if point.lost_ms == 0 && point.lost_bytes == 0 {
        "nothing: it is the latest".to_owned()
    } else {
        let time = span(Duration::from_millis(point.lost_ms));
        format!("{time}, {}", Bytes(point.lost_bytes))
    };
    let used = if point.tests.is_empty() {
        String::new()
    } else {
        format!("; under test {:?}", point.tests)
    };
    let size = if point.bytes == 0 {
        "in image".to_owned()
    } else {
        Bytes(point.bytes).to_string()
    };
    let (epoch, cut) = (point.point.epoch, point.cut);
    format!("{epoch:>10}  {cut:<23}  {kind:<22}  {size:>9}  {lost}{used}")
}

/// A span of time in two units.
fn span(span: Duration) -> String {
    let seconds = span.as_secs();
    match seconds {
        0..60 => format!("{:.1} s", span.as_secs_f64()),
        60..3600 => format!("{} min {} s", seconds / 60, seconds % 60),
        3600..86_400 => format!("{} h {} min", seconds / 3600, seconds / 60 % 60),
        _ => format!("{} d {} h", seconds / 86_400, seconds / 3600 % 24),
    }
}

/// The control socket of the node that keeps the replica of `machine`: the given one, or the one of this host that does.
pub(super) async fn replica_socket(
    given: Option<&Path>,
    machine: &Name,
) -> anyhow::Result<PathBuf> {
    if let Some(socket) = given {
        return Ok(socket.to_owned());
    }
    let mut nodes = 0;
    let mut coordinator = None;
    for socket in control::sockets() {
        match control::ask_status(&socket).await {
            Ok(node) => {
                nodes += 1;
                if !node.coordinates.is_empty() {
                    coordinator = Some(socket.clone());
                }
                let mut machines = node.machines.iter();
                // One that is failed over and not committed has its points still.
                let has_points =
                    |known: &MachineStatus| known.role == Role::Replica || known.recovery.is_some();
                if machines.any(|known| known.name == *machine && has_points(known)) {
                    return Ok(socket);
                }
            }
            // A socket that a killed node left behind answers nobody.
            Err(ClientError::Connect { .. }) => {}
            Err(error) => return Err(error.into()),
        }
    }
    if let Some(coordinator) = coordinator {
        // It asks the host that does.
        return Ok(coordinator);
    }
    if nodes == 0 {
        bail!("no node runs on this host: ask on the host of the replica");
    }
    Err(refused(format!(
        "no node of this host keeps a replica of a machine called {machine}"
    )))
}

/// A node's answer; what it refused is a refusal of this program.
pub(super) fn told<T>(answer: Result<T, ClientError>) -> anyhow::Result<T> {
    answer.map_err(|error| match error {
        ClientError::Refused(text) => refused(text),
        other => other.into(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_have_two_units() {
        let shown = |seconds| span(Duration::from_secs(seconds));
        assert_eq!(span(Duration::from_millis(1500)), "1.5 s");
        assert_eq!(shown(61), "1 min 1 s");
        assert_eq!(shown(7_260), "2 h 1 min");
        assert_eq!(shown(3 * 86_400 + 7_200), "3 d 2 h");
    }
}
