//! What every verb that runs a host does alike: open the control socket, start, serve until a signal, stop.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::Context;

use super::output::Output;
use crate::node::{
    self, StopSignals,
    control::ControlSocket,
    coordinator::Coordinator,
    host::{Host, HostConfig, HostError},
};

/// Binds the control socket of a node.
pub(super) async fn control_socket(path: Option<&Path>) -> anyhow::Result<ControlSocket> {
    let bound = ControlSocket::bind(path).await;
    bound.context("cannot open the control socket")
}

/// Starts a host.
pub(super) async fn start(config: HostConfig) -> anyhow::Result<Arc<Host>> {
    let host = tokio::task::spawn_blocking(move || Host::start(config));
    Ok(host.await??)
}

pub(super) fn say_paths(paths: &[PathBuf], out: &Output) {
    for path in paths {
        out.note(&format!("serving {}", path.display()));
    }
}

/// Says where the host listens, if it does, for whom.
pub(super) fn say_address(host: &Host, whom: &str, out: &Output) {
    if let Some(address) = host.address() {
        out.note(&format!("accepting {whom} on {address}"));
    }
}

/// Serves until SIGTERM, SIGINT or `over`, then stops.
pub(super) async fn serve(
    host: Arc<Host>,
    socket: ControlSocket,
    stop: &mut StopSignals,
    over: impl Future<Output = ()>,
    out: &Output,
) -> anyhow::Result<()> {
    let coordinating = Arc::clone(&host);
    let coordinator = tokio::task::spawn_blocking(move || Coordinator::start(&coordinating));
    let coordinator = coordinator.await??;
    let server = tokio::spawn(socket.serve(coordinator.requests()));
    tokio::select! {
        () = stop.next() => {}
        () = over => {}
        failed = host.run() => failed?,
    }
    coordinator.stop();
    shut_down(&host, stop, out).await?;
    server.abort();
    let _ = server.await;
    Ok(())
}

/// Stops a host, waiting for whoever uses its mounts.
async fn shut_down(
    host: &Arc<Host>,
    stop: &mut StopSignals,
    out: &Output,
) -> Result<(), HostError> {
    let stopping = |how| {
        let host = Arc::clone(host);
        async move { host.stop_machines(how).await }
    };
    // Links are accepted and machines are looked after until the end.
    let running = Arc::clone(host);
    let running = tokio::spawn(async move { running.run().await });
    let stopped = node::shut_down(stop, |text| out.note(text), stopping, HostError::busy).await;
    running.abort();
    let _ = running.await;
    host.close().await;
    stopped
}
