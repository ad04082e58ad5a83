//! The control socket: HTTP and JSON over a Unix socket that only the node's user can open.
//!
//! | method and path | answer |
//! | --- | --- |
//! | `GET /v1/status` | [`NodeStatus`] |
//! | `POST /v1/machines/{name}/cut` | the [`Lineage`] of a cut made now, once it is durable on the replica |
//! | `POST /v1/machines/{name}/resync` | `null`, once a resync is durably begun; `status` tells how it goes |
//! | `POST /v1/machines/{name}/verify` with a [`VerifyRequest`] | `null`, once a verification is begun; `status` tells how it goes |
//! | `GET /v1/machines/{name}/points` | a [`PointStatus`] for each recovery point, oldest first |
//! | `POST /v1/machines/{name}/tests` with a [`TestRequest`] | the [`TestStatus`] of a test failover that was started |
//! | `POST /v1/machines/{name}/failover` with a [`FailoverRequest`] | a [`FailoverReport`] |
//! | `POST /v1/machines/{name}/commit` | a [`FailoverReport`] |
//! | `POST /v1/machines/{name}/cancel` with a [`CancelRequest`] | a [`CancelReport`] of what was taken back or cleaned up |
//! | `POST /v1/machines/{name}/reverse` with a [`ReverseRequest`] | a [`FailoverReport`] |
//! | `POST /v1/machines/{name}/suspend` with a [`SuspendRequest`] | a [`SuspendReport`], once nothing is sent any more |
//! | `POST /v1/machines/{name}/resume` | a [`SuspendReport`] of what is over |
//! | `POST /v1/machines/{name}/copy` | `null`, once an initial copy that waited may begin |
//! | `POST /v1/machines/{name}/export` with a [`FolderRequest`] | an [`ExportReport`], once the file is complete and durable |
//! | `POST /v1/machines/{name}/import` with a [`FolderRequest`] | an [`ImportReport`], once the replica has all of it |
//! | `POST /v1/machines/{name}/resize` with a [`ResizeRequest`] | a [`ResizeReport`] |
//!
//! A node binds `<run folder>/<pid>.sock`, or the path it was given; `status` asks every socket of the run folder. The
//! same requests come over the network from [operators](super::operate).
//! Errors are `{"error": "..."}` with status 404 (no such machine), 409 (not in this state), 422 (not understood) or 500.

mod audited;
mod client;
mod request;

use std::{
    fs, io,
    os::unix::{fs::DirBuilderExt, fs::PermissionsExt},
    path::{Path, PathBuf},
    sync::Arc,
    time::Instant,
};

use axum::{
    Json, Router,
    extract::{Path as UrlPath, State},
    http::StatusCode,
    response::{IntoResponse, Response},
    routing::{get, post},
};
use serde::{Deserialize, Serialize};
use tokio::net::{UnixListener, UnixStream};

pub(super) use self::{audited::audited, client::ask};
pub use self::{
    client::{
        ClientError, ask_cancel, ask_commit, ask_copy, ask_cut, ask_export, ask_failover,
        ask_import, ask_points, ask_resize, ask_resume, ask_resync, ask_reverse, ask_status,
        ask_suspend, ask_test, ask_verify, sockets,
    },
    request::{
        CancelReport, CancelRequest, ExportReport, FailoverKind, FailoverReport, FailoverRequest,
        FolderRequest, ImportReport, ResizeReport, ResizeRequest, ReverseRequest, SuspendReport,
        SuspendRequest, TestRequest, VerifyRequest,
    },
};
use super::{
    LEFT_OPEN_AGAIN, LEFT_OPEN_MAX,
    status::{NodeStatus, PointStatus, TestStatus},
};
use crate::base::ids::{Lineage, Name};

/// Where nodes bind their sockets unless told otherwise.
pub const RUN_FOLDER: &str = "/run/understudy";

/// What a node lets its operator see and do. Calls may block.
pub trait Operate: Send + Sync + 'static {
    /// The node's report.
    fn status(&self) -> NodeStatus;

    /// Cuts a machine now and waits until the epoch is durable on its replica.
    fn cut(&self, machine: &Name) -> Result<Lineage, OperateError>;

    /// Begins to compare everything a machine holds with its replica, and to send what differs.
    fn resync(&self, machine: &Name) -> Result<(), OperateError> {
        Err(OperateError::NoSuchMachine(machine.clone()))
    }

    /// Begins to compare the points of a machine's replica with its disks.
    fn verify(&self, machine: &Name, _: VerifyRequest) -> Result<(), OperateError> {
        Err(OperateError::NoSuchMachine(machine.clone()))
    }

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

    /// Stops replicating a machine until it is resumed. Its changes are tracked.
    fn suspend(&self, machine: &Name, _: SuspendRequest) -> Result<SuspendReport, OperateError> {
        Err(OperateError::NoSuchMachine(machine.clone()))
    }

    /// Replicates a machine again that was suspended.
    fn resume(&self, machine: &Name) -> Result<SuspendReport, OperateError> {
        Err(OperateError::NoSuchMachine(machine.clone()))
    }

    /// Begins an initial copy that waits for its time or for a portable disk.
    fn copy(&self, machine: &Name) -> Result<(), OperateError> {
        Err(OperateError::NoSuchMachine(machine.clone()))
    }

    /// Writes the initial copy of a machine to a folder of this host.
    fn export(&self, machine: &Name, _: &FolderRequest) -> Result<ExportReport, OperateError> {
        Err(OperateError::NoSuchMachine(machine.clone()))
    }

    /// Takes in the initial copy of a machine from a folder of this host.
    fn import(&self, machine: &Name, _: &FolderRequest) -> Result<ImportReport, OperateError> {
        Err(OperateError::NoSuchReplica(machine.clone()))
    }

    /// Makes a disk of a machine larger while it is in use.
    fn resize(&self, machine: &Name, _: &ResizeRequest) -> Result<ResizeReport, OperateError> {
        Err(OperateError::NoSuchMachine(machine.clone()))
    }

    /// Takes back what is not final: an uncommitted failover, a hand-over, or else test failovers, of which what was
    /// written in them is removed.
    fn cancel(&self, machine: &Name, _: CancelRequest) -> Result<CancelReport, OperateError> {
        Err(OperateError::NoSuchReplica(machine.clone()))
    }
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
        .route("/v1/machines/{name}/resync", post(resync))
        .route("/v1/machines/{name}/verify", post(verify))
        .route("/v1/machines/{name}/points", get(points))
        .route("/v1/machines/{name}/tests", post(start_test))
        .route("/v1/machines/{name}/failover", post(failover))
        .route("/v1/machines/{name}/commit", post(commit))
        .route("/v1/machines/{name}/cancel", post(cancel))
        .route("/v1/machines/{name}/reverse", post(reverse))
        .route("/v1/machines/{name}/suspend", post(suspend))
        .route("/v1/machines/{name}/resume", post(resume))
        .route("/v1/machines/{name}/copy", post(copy))
        .route("/v1/machines/{name}/export", post(export))
        .route("/v1/machines/{name}/import", post(import))
        .route("/v1/machines/{name}/resize", post(resize))
        .fallback(unknown)
        .with_state(node)
}

type Node = State<Arc<dyn Operate>>;

async fn status(State(node): Node) -> Response {
    answer(move || Ok(node.status())).await
}

async fn cut(State(node): Node, UrlPath(name): UrlPath<String>) -> Response {
    answer(move || node.cut(&machine(&name)?)).await
}

async fn resync(State(node): Node, UrlPath(name): UrlPath<String>) -> Response {
    answer(move || node.resync(&machine(&name)?)).await
}

async fn verify(
    State(node): Node,
    UrlPath(name): UrlPath<String>,
    Json(request): Json<VerifyRequest>,
) -> Response {
    answer(move || node.verify(&machine(&name)?, request)).await
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

async fn suspend(
    State(node): Node,
    UrlPath(name): UrlPath<String>,
    Json(request): Json<SuspendRequest>,
) -> Response {
    answer(move || node.suspend(&machine(&name)?, request)).await
}

async fn resume(State(node): Node, UrlPath(name): UrlPath<String>) -> Response {
    answer(move || node.resume(&machine(&name)?)).await
}

async fn copy(State(node): Node, UrlPath(name): UrlPath<String>) -> Response {
    answer(move || node.copy(&machine(&name)?)).await
}

async fn export(
    State(node): Node,
    UrlPath(name): UrlPath<String>,
    Json(request): Json<FolderRequest>,
) -> Response {
    answer(move || node.export(&machine(&name)?, &request)).await
}

async fn import(
    State(node): Node,
    UrlPath(name): UrlPath<String>,
    Json(request): Json<FolderRequest>,
) -> Response {
    answer(move || node.import(&machine(&name)?, &request)).await
}

async fn resize(
    State(node): Node,
    UrlPath(name): UrlPath<String>,
    Json(request): Json<ResizeRequest>,
) -> Response {
    answer(move || node.resize(&machine(&name)?, &request)).await
}

async fn unknown() -> Response {
    let problem = Problem {
        error: "this node does not do that for whoever asks here".into(),
    };
    (StatusCode::NOT_FOUND, Json(problem)).into_response()
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
