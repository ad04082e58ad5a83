//! Operating a host from elsewhere: the requests of the [control socket](super::control) over an authenticated link.
//!
//! ```text
//!   ask_*  ── HTTP/1.1 ──+── socket of this host ────────────────────────> requests ── dyn Operate
//!                        +── link (understudy-operate/1), a request each ──>   "
//!                        +── memory, a host of this very process ────────>   "
//! ```
//! A link carries one request and its answer on the link's control stream, and is closed by whoever asked: a failover that takes its
//! time holds up nobody else, and what becomes of a request is what becomes of its link. A request that was heard is
//! carried out to its end, also if the link is lost meanwhile; all of them may be asked again.
//!
//! Who may operate a host is a list of its own, denied by default: a host that replicates to another one can give it no
//! orders, and an operator can feed it nothing. Both follow from [`Protocol`], before the first byte is read.

use std::{
    fmt,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use axum::Router;
use hyper::{Method, body::Incoming, service::Service};
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::UnixStream,
};

use super::{
    call::Callee,
    control::{self, ClientError, Operate, audited},
    host::Host,
};
use crate::{
    base::ids::Name,
    net::{self, Control, Identity, Link, Protocol, Reason},
};

/// How long an operator may take to say what it wants, and to take its answer and go.
const REQUEST_WITHIN: Duration = Duration::from_secs(10);
/// Bytes under way between two ends in one process.
const PIPE_BYTES: usize = 64 * 1024;

/// The way to a node: where to send it requests.
#[derive(Clone)]
pub struct Way(Kind);

#[derive(Clone)]
enum Kind {
    Socket(PathBuf),
    Link(Callee),
    Here(Router),
}

impl Way {
    /// A host that listens on `address`, as `HOST:PORT`, asked by the operator that `identity` is. It must prove to be
    /// HOST, or `name` where that is given.
    pub fn to(address: String, name: Option<Name>, identity: Identity) -> Self {
        Self(Kind::Link(Callee {
            address,
            name,
            identity,
        }))
    }

    /// A host of this process.
    pub(super) fn here(host: &Arc<Host>) -> Self {
        let requests = control::requests(Arc::clone(host) as Arc<dyn Operate>);
        let audit = &host.shared().audit;
        Self(Kind::Here(audited(requests, "coordinator", audit)))
    }

    /// Opens a stream for one request.
    pub(super) async fn connect(self) -> Result<Connected, ClientError> {
        Ok(match self.0 {
            Kind::Socket(path) => match UnixStream::connect(&path).await {
                Ok(stream) => Connected::new(stream, None),
                Err(source) => return Err(ClientError::Connect { path, source }),
            },
            Kind::Link(host) => {
                let (address, name) = (&host.address, host.name.as_ref());
                let dialled = net::dial_for(Protocol::Operate, address, name, &host.identity).await;
                let (link, control) = dialled?;
                Connected::new(control.into_stream(), Some(link))
            }
            Kind::Here(requests) => {
                let (ours, theirs) = tokio::io::duplex(PIPE_BYTES);
                tokio::spawn(answer(requests, theirs, "this host".into()));
                Connected::new(ours, None)
            }
        })
    }
}

impl From<&Path> for Way {
    fn from(socket: &Path) -> Self {
        Self(Kind::Socket(socket.to_owned()))
    }
}

impl From<&PathBuf> for Way {
    fn from(socket: &PathBuf) -> Self {
        socket.as_path().into()
    }
}

impl From<&Way> for Way {
    fn from(way: &Way) -> Self {
        way.clone()
    }
}

impl fmt::Debug for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Kind::Socket(path) => path.fmt(f),
            Kind::Link(host) => host.address.fmt(f),
            Kind::Here(_) => f.write_str("here"),
        }
    }
}

/// A stream for one request, and the link it belongs to if there is one.
pub(super) struct Connected {
    pub(super) stream: Box<dyn Stream>,
    pub(super) link: Option<Link>,
}

impl Connected {
    fn new(stream: impl Stream + 'static, link: Option<Link>) -> Self {
        let stream = Box::new(stream);
        Self { stream, link }
    }
}

/// Bytes both ways.
pub(super) trait Stream: AsyncRead + AsyncWrite + Unpin + Send {}

impl<S: AsyncRead + AsyncWrite + Unpin + Send> Stream for S {}

/// Answers the one request of an operator's link.
pub(super) async fn serve(host: Arc<Host>, link: &Link, control: Control) {
    let operator = link.peer().name.to_string();
    let audit = Arc::clone(&host.shared().audit);
    let requests = audited(control::requests(host), &operator, &audit);
    answer(requests, control.into_stream(), operator).await;
    // Closing at once would throw the answer away; the operator closes when it has read it.
    let _ = tokio::time::timeout(REQUEST_WITHIN, link.closed()).await;
    link.close(Reason::Done, "asked and answered");
}

async fn answer(requests: Router, stream: impl Stream, operator: String) {
    let requests = TowerToHyperService::new(requests);
    let heard = hyper::service::service_fn(|request: hyper::Request<Incoming>| {
        if request.method() != Method::GET {
            tracing::info!(%operator, "asks for {}", request.uri().path());
        }
        requests.call(request)
    });
    let answered = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(REQUEST_WITHIN)
        .keep_alive(false)
        .serve_connection(TokioIo::new(stream), heard)
        .await;
    if let Err(error) = answered {
        tracing::debug!(%operator, "a request was not answered: {error}");
    }
}
