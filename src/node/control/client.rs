//! The asking side: one request, one answer.

use std::{fs, io, path::PathBuf, time::Duration};

use http_body_util::{BodyExt, Full};
use hyper_util::rt::TokioIo;
use serde::{Serialize, de::DeserializeOwned};

use super::{
    Problem, RUN_FOLDER,
    request::{
        CancelReport, CancelRequest, ExportReport, FailoverReport, FailoverRequest, FolderRequest,
        ImportReport, ResizeReport, ResizeRequest, ReverseRequest, SuspendReport, SuspendRequest,
        TestRequest, VerifyRequest,
    },
};
use crate::{
    base::{
        ids::{Lineage, Name},
        units::MIB,
    },
    net::{DialError, Reason},
    node::{
        operate::{Connected, Way},
        status::{NodeStatus, PointStatus, TestStatus},
    },
};

/// How long a client waits for an answer that needs no work.
const ANSWER_WITHIN: Duration = Duration::from_secs(10);
/// Largest answer a client reads, in bytes: a status of thousands of machines.
const ANSWER_BYTES_MAX: u64 = 16 * MIB;

/// Why a node could not be asked.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody answers there.
    #[error("no node answers on {}", path.display())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// There is no link to that host.
    #[error(transparent)]
    Dial(#[from] DialError),
    /// The conversation broke off.
    #[error("the node did not answer")]
    Broken(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The node said no.
    #[error("{0}")]
    Refused(String),
    /// The node tried and failed.
    #[error("{0}")]
    Failed(String),
}

fn broken(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> ClientError {
    ClientError::Broken(error.into())
}

/// Asks a node for its report.
pub async fn ask_status(way: impl Into<Way>) -> Result<NodeStatus, ClientError> {
    tokio::time::timeout(ANSWER_WITHIN, ask(way, "GET", "/v1/status", &()))
        .await
        .map_err(broken)?
}

/// Asks a node to cut `machine`; answers when the epoch is durable on the replica.
pub async fn ask_cut(way: impl Into<Way>, machine: &Name) -> Result<Lineage, ClientError> {
    ask(way, "POST", &path_of(machine, "cut"), &()).await
}

/// Asks a node to bring the replica of `machine` back in step; answers when that is durably begun.
pub async fn ask_resync(way: impl Into<Way>, machine: &Name) -> Result<(), ClientError> {
    ask(way, "POST", &path_of(machine, "resync"), &()).await
}

/// Asks a node to verify the replica of `machine`; answers when that is begun.
pub async fn ask_verify(
    way: impl Into<Way>,
    machine: &Name,
    request: VerifyRequest,
) -> Result<(), ClientError> {
    ask(way, "POST", &path_of(machine, "verify"), &request).await
}

/// Asks a node for the recovery points of `machine`, oldest first.
pub async fn ask_points(
    way: impl Into<Way>,
    machine: &Name,
) -> Result<Vec<PointStatus>, ClientError> {
    ask(way, "GET", &path_of(machine, "points"), &()).await
}

/// Asks a node to start a test failover of `machine`; answers when its disks can be opened.
pub async fn ask_test(
    way: impl Into<Way>,
    machine: &Name,
    request: TestRequest,
) -> Result<TestStatus, ClientError> {
    ask(way, "POST", &path_of(machine, "tests"), &request).await
}

/// Asks a node to move `machine`; answers when its disks can be opened on the one host or the other.
pub async fn ask_failover(
    way: impl Into<Way>,
    machine: &Name,
    request: FailoverRequest,
) -> Result<FailoverReport, ClientError> {
    ask(way, "POST", &path_of(machine, "failover"), &request).await
}

/// Asks a node to keep the failover of `machine`.
pub async fn ask_commit(
    way: impl Into<Way>,
    machine: &Name,
) -> Result<FailoverReport, ClientError> {
    ask(way, "POST", &path_of(machine, "commit"), &()).await
}

/// Asks a node to let `machine` follow its new primary.
pub async fn ask_reverse(
    way: impl Into<Way>,
    machine: &Name,
    request: ReverseRequest,
) -> Result<FailoverReport, ClientError> {
    ask(way, "POST", &path_of(machine, "reverse"), &request).await
}

/// Asks a node to stop replicating `machine`; answers when nothing is sent any more.
pub async fn ask_suspend(
    way: impl Into<Way>,
    machine: &Name,
    request: SuspendRequest,
) -> Result<SuspendReport, ClientError> {
    ask(way, "POST", &path_of(machine, "suspend"), &request).await
}

/// Asks a node to replicate `machine` again.
pub async fn ask_resume(way: impl Into<Way>, machine: &Name) -> Result<SuspendReport, ClientError> {
    ask(way, "POST", &path_of(machine, "resume"), &()).await
}

/// Asks a node to begin the initial copy of `machine` that waits.
pub async fn ask_copy(way: impl Into<Way>, machine: &Name) -> Result<(), ClientError> {
    ask(way, "POST", &path_of(machine, "copy"), &()).await
}

/// Asks a node to write the initial copy of `machine` to a folder of its host; answers when it is there.
pub async fn ask_export(
    way: impl Into<Way>,
    machine: &Name,
    request: &FolderRequest,
) -> Result<ExportReport, ClientError> {
    ask(way, "POST", &path_of(machine, "export"), request).await
}

/// Asks a node to take in the initial copy of `machine` from a folder of its host; answers when it is durable.
pub async fn ask_import(
    way: impl Into<Way>,
    machine: &Name,
    request: &FolderRequest,
) -> Result<ImportReport, ClientError> {
    ask(way, "POST", &path_of(machine, "import"), request).await
}

/// Asks a node to make a disk of `machine` larger; answers when its guest can use it.
pub async fn ask_resize(
    way: impl Into<Way>,
    machine: &Name,
    request: &ResizeRequest,
) -> Result<ResizeReport, ClientError> {
    ask(way, "POST", &path_of(machine, "resize"), request).await
}

/// Asks a node to take back a failover of `machine`, or to end test failovers; answers when that is done.
pub async fn ask_cancel(
    way: impl Into<Way>,
    machine: &Name,
    request: CancelRequest,
) -> Result<CancelReport, ClientError> {
    ask(way, "POST", &path_of(machine, "cancel"), &request).await
}

fn path_of(machine: &Name, what: &str) -> String {
    format!("/v1/machines/{}/{what}", url_escaped(machine.as_str()))
}

/// The sockets of all nodes of this host.
pub fn sockets() -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(RUN_FOLDER) else {
        return Vec::new();
    };
    let mut paths: Vec<_> = entries
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| {
            path.extension()
                .is_some_and(|extension| extension == "sock")
        })
        .collect();
    paths.sort();
    paths
}

pub(in crate::node) async fn ask<T: DeserializeOwned>(
    way: impl Into<Way>,
    method: &str,
    path: &str,
    body: &impl Serialize,
) -> Result<T, ClientError> {
    let body = serde_json::to_vec(body).map_err(broken)?;
    let Connected { stream, link } = way.into().connect().await?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
        .await
        .map_err(broken)?;
    let driver = tokio::spawn(connection);
    let request = hyper::Request::builder()
        .method(method)
        .uri(path)
        .header("host", "understudy")
        .header("content-type", "application/json")
        .body(Full::<bytes::Bytes>::from(body))
        .map_err(broken)?;
    let response = sender.send_request(request).await.map_err(broken)?;
    let status = response.status();
    let limit = crate::base::units::to_usize(ANSWER_BYTES_MAX);
    let body = http_body_util::Limited::new(response.into_body(), limit)
        .collect()
        .await
        .map_err(broken)?
        .to_bytes();
    driver.abort();
    if let Some(link) = link {
        link.close(Reason::Done, "asked and answered");
    }
    if status.is_success() {
        return serde_json::from_slice(&body).map_err(broken);
    }
    let problem: Problem = serde_json::from_slice(&body).map_err(broken)?;
    Err(if status.is_server_error() {
        ClientError::Failed(problem.error)
    } else {
        ClientError::Refused(problem.error)
    })
}

/// Percent-encodes all but unreserved characters (RFC 3986 section 2.3).
fn url_escaped(text: &str) -> String {
    use std::fmt::Write;
    text.bytes().fold(String::new(), |mut out, byte| {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            out.push(char::from(byte));
        } else {
            write!(out, "%{byte:02X}").expect("writing to a string does not fail");
        }
        out
    })
}
