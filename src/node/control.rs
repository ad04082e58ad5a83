//! The control socket: HTTP and JSON over a Unix socket that only the node's user can open.
//!
//! | method and path | answer |
//! | --- | --- |
//! | `GET /v1/status` | [`NodeStatus`] |
//! | `POST /v1/machines/{name}/cut` | the [`Lineage`] of a cut made now, once it is durable on the replica |
//! | `GET /v1/machines/{name}/points` | a [`PointStatus`] for each recovery point, oldest first |
//! | `POST /v1/machines/{name}/tests` with a [`TestRequest`] | the [`TestStatus`] of a test failover that was started |
//! | `POST /v1/machines/{name}/failover` with a [`FailoverRequest`] | a [`FailoverReport`] |
//! | `POST /v1/machines/{name}/commit` | a [`FailoverReport`] |
//! | `POST /v1/machines/{name}/cancel` with a [`CancelRequest`] | a [`CancelReport`] of what was taken back or cleaned up |
//! | `POST /v1/machines/{name}/reverse` with a [`ReverseRequest`] | a [`FailoverReport`] |
//!
//! A node binds `<run folder>/<pid>.sock`, or the path it was given; `status` asks every socket of the run folder. The
//! same requests come over the network from [operators](super::operate).
//! Errors are `{"error": "..."}` with status 404 (no such machine), 409 (not in this state), 422 (not understood) or 500.

use std::{
    fs, io,
    os::unix::{fs::DirBuilderExt, fs::PermissionsExt},
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use axum::{
    Json, Router,
    extract::{Path as UrlPath, State},
    http::StatusCode,
    response::{IntoResponse, Response},
    routing::{get, post},
};
use http_body_util::{BodyExt, Full};
use hyper_util::rt::TokioIo;
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use tokio::net::{UnixListener, UnixStream};
use uuid::Uuid;

use super::{
    LEFT_OPEN_AGAIN, LEFT_OPEN_MAX,
    operate::{Connected, Way},
    status::{NodeStatus, PointStatus, TestStatus},
};
use crate::{
    base::{
        ids::{Generation, Lineage, Name},
        units::{Epoch, MIB},
    },
    net::{DialError, Reason},
};

/// Where nodes bind their sockets unless told otherwise.
pub const RUN_FOLDER: &str = "/run/understudy";
/// How long a client waits for an answer that needs no work.
const ANSWER_WITHIN: Duration = Duration::from_secs(10);
/// Largest answer a client reads, in bytes: a status of thousands of machines.
const ANSWER_BYTES_MAX: u64 = 16 * MIB;

/// What a node lets its operator see and do. Calls may block.
pub trait Operate: Send + Sync + 'static {
    /// The node's report.
    fn status(&self) -> NodeStatus;

    /// Cuts a machine now and waits until the epoch is durable on its replica.
    fn cut(&self, machine: &Name) -> Result<Lineage, OperateError>;

    /// The recovery points of a machine's replica, oldest first.
    fn points(&self, machine: &Name) -> Result<Vec<PointStatus>, OperateError> {
        Err(OperateError::NoSuchReplica(machine.clone()))
    }

    /// Shows a recovery point as writable disks, beside the replication.
    fn start_test(&self, machine: &Name, _: TestRequest) -> Result<TestStatus, OperateError> {
        Err(OperateError::NoSuchReplica(machine.clone()))
    }

    /// Moves the machine to the other host.
    fn failover(&self, machine: &Name, _: FailoverRequest) -> Result<FailoverReport, OperateError> {
        Err(OperateError::NoSuchMachine(machine.clone()))
    }

    /// Keeps a failover.
    fn commit(&self, machine: &Name) -> Result<FailoverReport, OperateError> {
        Err(OperateError::NoSuchMachine(machine.clone()))
    }

    /// Lets a host that was the primary follow the new one.
    fn reverse(&self, machine: &Name, _: ReverseRequest) -> Result<FailoverReport, OperateError> {
        Err(OperateError::NoSuchMachine(machine.clone()))
    }

    /// Takes back what is not final: an uncommitted failover, a hand-over, or else test failovers, of which what was
    /// written in them is removed.
    fn cancel(&self, machine: &Name, _: CancelRequest) -> Result<CancelReport, OperateError> {
        Err(OperateError::NoSuchReplica(machine.clone()))
    }
}

/// Which point to test.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TestRequest {
    /// Its epoch; the latest point if there is none.
    #[serde(default)]
    pub point: Option<Epoch>,
    /// The rescue point instead.
    #[serde(default)]
    pub rescue: bool,
    /// Asked again with the same key while the test runs, it is the same test.
    #[serde(default)]
    pub key: Option<Uuid>,
}

/// How a machine is moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FailoverKind {
    /// With the primary: nothing is lost.
    Planned,
    /// Without it.
    Unplanned,
}

/// A failover.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FailoverRequest {
    /// Planned on the primary, unplanned on the replica.
    pub kind: FailoverKind,
    /// Unplanned: the epoch to go to; the latest point if there is none.
    #[serde(default)]
    pub point: Option<Epoch>,
    /// Unplanned: also while the primary is connected.
    #[serde(default)]
    pub force: bool,
}

/// What a change of roles led to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FailoverReport {
    /// The generation that this host obeys or is active in.
    pub generation: Generation,
    /// The machine's disks, as raw files, if they are served here now.
    pub files: Vec<PathBuf>,
    /// What was done, and what comes next.
    pub text: String,
}

/// How a former primary follows the new one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ReverseRequest {
    /// Also if a disk is still in use here, whose user gets errors from then on.
    #[serde(default)]
    pub force: bool,
}

/// What to take back, or which test failovers to end.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CancelRequest {
    /// One of them; all if there is none.
    #[serde(default)]
    pub number: Option<u32>,
    /// All test failovers, and nothing else.
    #[serde(default)]
    pub tests: bool,
    /// The rescue point, and nothing else.
    #[serde(default)]
    pub rescue: bool,
    /// Also those that somebody uses, who gets errors from then on.
    #[serde(default)]
    pub force: bool,
}

/// What was ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CancelReport {
    /// Numbers of the test failovers.
    pub ended: Vec<u32>,
    /// What became of the failover that was taken back.
    #[serde(default)]
    pub failover: Option<String>,
}

/// Why an operator's wish was not done.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OperateError {
    /// The node serves no such machine as primary.
    #[error("no machine called {0} is primary here")]
    NoSuchMachine(Name),
    /// The node keeps no replica of such a machine.
    #[error("no replica of a machine called {0} is kept here")]
    NoSuchReplica(Name),
    /// It was tried and did not succeed.
    #[error("{0}")]
    Failed(String),
    /// The machine is not in a state in which this can be done.
    #[error("{0}")]
    NotNow(String),
}

impl OperateError {
    fn code(&self) -> StatusCode {
        match self {
            Self::NoSuchMachine(_) | Self::NoSuchReplica(_) => StatusCode::NOT_FOUND,
            Self::Failed(_) => StatusCode::INTERNAL_SERVER_ERROR,
            Self::NotNow(_) => StatusCode::CONFLICT,
        }
    }
}

/// The body of an answer that is not a success.
#[derive(Debug, Serialize, Deserialize)]
struct Problem {
    error: String,
}

/// A bound control socket; its file is removed when this is dropped.
#[derive(Debug)]
pub struct ControlSocket {
    path: PathBuf,
    listener: Option<UnixListener>,
}

impl ControlSocket {
    /// Binds `path`, or a name of its own in [`RUN_FOLDER`]. A socket file that nobody listens on is replaced.
    pub async fn bind(path: Option<&Path>) -> io::Result<Self> {
        let path = if let Some(path) = path {
            path.to_owned()
        } else {
            fs::DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(RUN_FOLDER)?;
            Path::new(RUN_FOLDER).join(format!("{}.sock", std::process::id()))
        };
        if path.exists() {
            let began = Instant::now();
            while UnixStream::connect(&path).await.is_ok() {
                if began.elapsed() >= LEFT_OPEN_MAX {
                    return Err(io::Error::new(
                        io::ErrorKind::AddrInUse,
                        "another node listens on this control socket",
                    ));
                }
                tokio::time::sleep(LEFT_OPEN_AGAIN).await;
            }
            fs::remove_file(&path)?;
        }
        let listener = UnixListener::bind(&path)?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600))?;
        Ok(Self {
            path,
            listener: Some(listener),
        })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Answers requests until the task is dropped.
    pub async fn serve(mut self, requests: Router) -> io::Result<()> {
        let listener = self.listener.take().expect("a socket is served once");
        axum::serve(listener, requests).await
    }
}

impl Drop for ControlSocket {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

/// The requests that a node answers, wherever they come from.
pub fn requests(node: Arc<dyn Operate>) -> Router {
    Router::new()
        .route("/v1/status", get(status))
        .route("/v1/machines/{name}/cut", post(cut))
        .route("/v1/machines/{name}/points", get(points))
        .route("/v1/machines/{name}/tests", post(start_test))
        .route("/v1/machines/{name}/failover", post(failover))
        .route("/v1/machines/{name}/commit", post(commit))
        .route("/v1/machines/{name}/cancel", post(cancel))
        .route("/v1/machines/{name}/reverse", post(reverse))
        .with_state(node)
}

type Node = State<Arc<dyn Operate>>;

async fn status(State(node): Node) -> Response {
    answer(move || Ok(node.status())).await
}

async fn cut(State(node): Node, UrlPath(name): UrlPath<String>) -> Response {
    answer(move || node.cut(&machine(&name)?)).await
}

async fn points(State(node): Node, UrlPath(name): UrlPath<String>) -> Response {
    answer(move || node.points(&machine(&name)?)).await
}

async fn start_test(
    State(node): Node,
    UrlPath(name): UrlPath<String>,
    Json(request): Json<TestRequest>,
) -> Response {
    answer(move || node.start_test(&machine(&name)?, request)).await
}

async fn cancel(
    State(node): Node,
    UrlPath(name): UrlPath<String>,
    Json(request): Json<CancelRequest>,
) -> Response {
    answer(move || node.cancel(&machine(&name)?, request)).await
}

async fn failover(
    State(node): Node,
    UrlPath(name): UrlPath<String>,
    Json(request): Json<FailoverRequest>,
) -> Response {
    answer(move || node.failover(&machine(&name)?, request)).await
}

async fn commit(State(node): Node, UrlPath(name): UrlPath<String>) -> Response {
    answer(move || node.commit(&machine(&name)?)).await
}

async fn reverse(
    State(node): Node,
    UrlPath(name): UrlPath<String>,
    Json(request): Json<ReverseRequest>,
) -> Response {
    answer(move || node.reverse(&machine(&name)?, request)).await
}

fn machine(name: &str) -> Result<Name, OperateError> {
    Name::new(name).map_err(|error| OperateError::NotNow(error.to_string()))
}

pub(super) async fn answer<T: Serialize + Send + 'static>(
    work: impl FnOnce() -> Result<T, OperateError> + Send + 'static,
) -> Response {
    match tokio::task::spawn_blocking(work).await {
        Ok(Ok(value)) => Json(value).into_response(),
        Ok(Err(error)) => (
            error.code(),
            Json(Problem {
                error: error.to_string(),
            }),
        )
            .into_response(),
        Err(panic) => {
            let problem = Problem {
                error: format!("the node failed: {panic}"),
            };
            (StatusCode::INTERNAL_SERVER_ERROR, Json(problem)).into_response()
        }
    }
}

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

pub(super) fn broken(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> ClientError {
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

pub(super) async fn ask<T: DeserializeOwned>(
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::{checksum::Digest, clock::Timestamp, units::Epoch};

    struct Stage;

    impl Operate for Stage {
        fn status(&self) -> NodeStatus {
            NodeStatus {
                version: "1".into(),
                pid: 7,
                listening: None,
                at: Timestamp(9),
                machines: vec![],
                coordinates: vec![],
            }
        }

        fn cut(&self, machine: &Name) -> Result<Lineage, OperateError> {
            if machine.as_str() == "SQL Server/ß".replace('/', "-") {
                return Ok(Lineage {
                    epoch: Epoch(3),
                    chain: Digest::default(),
                });
            }
            Err(OperateError::NoSuchMachine(machine.clone()))
        }

        fn start_test(&self, _: &Name, _: TestRequest) -> Result<TestStatus, OperateError> {
            Err(OperateError::Failed("no mount".into()))
        }
    }

    #[tokio::test]
    async fn a_node_answers_on_its_socket_and_only_to_its_user() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("node.sock");
        let socket = ControlSocket::bind(Some(&path)).await.unwrap();
        assert_eq!(
            fs::metadata(&path).unwrap().permissions().mode() & 0o777,
            0o600
        );
        let server = tokio::spawn(socket.serve(requests(Arc::new(Stage))));
        assert_eq!(ask_status(&path).await.unwrap().pid, 7);
        let name = Name::new("SQL Server-ß").unwrap();
        assert_eq!(ask_cut(&path, &name).await.unwrap().epoch, Epoch(3));
        let refused = ask_cut(&path, &Name::new("x").unwrap()).await.unwrap_err();
        assert_eq!(refused.to_string(), "no machine called x is primary here");
        let none = ask_points(&path, &name).await.unwrap_err();
        assert!(matches!(none, ClientError::Refused(_)), "{none}");
        assert_eq!(
            none.to_string(),
            "no replica of a machine called SQL Server-ß is kept here"
        );
        let failed = ask_test(&path, &name, TestRequest::default())
            .await
            .unwrap_err();
        assert!(
            matches!(&failed, ClientError::Failed(text) if text == "no mount"),
            "{failed}"
        );
        let busy = ControlSocket::bind(Some(&path)).await.unwrap_err();
        assert_eq!(busy.kind(), io::ErrorKind::AddrInUse);
        server.abort();
        let _ = server.await;
        assert!(!path.exists(), "the socket file goes with the socket");
        assert!(matches!(
            ask_status(&path).await,
            Err(ClientError::Connect { .. })
        ));
    }
}
