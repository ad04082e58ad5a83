//! Accepting links: handshakes run beside each other, bounded in number and in time.
//!
//! A stranger can cost us a handshake and nothing more. The number under way is bounded, and that of one address by so much
//! less that nobody takes the places of all others; beyond a few, a caller must first prove that its address is its own
//! (QUIC Retry); one that falls silent is dropped after [`HANDSHAKE_MAX`]. Who
//! has no certificate of a trusted CA, or a name that is not on the allow list, is refused with a reason.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use bytes::Bytes;
use parking_lot::Mutex;
use quinn::{Connection, ConnectionError, Endpoint, Incoming};
use tokio::{
    sync::{Semaphore, mpsc},
    task::JoinHandle,
    time::timeout,
};

use super::{
    bonds::Bond,
    dial::{peer_name, said, text_of, why_closed},
    identity::Identity,
    link::{Control, Link, Reason},
    refusal::{Refusal, RefusedBy},
    transport::{
        self, HANDSHAKE_MAX, HANDSHAKES_MAX, HANDSHAKES_PER_ADDRESS_MAX, HANDSHAKES_UNPROVED_MAX,
        LINKS_MAX, LINKS_PER_PEER_MAX, Protocol,
    },
};
use crate::base::ids::Name;

/// Outcomes that wait for [`Listener::accept`]; refusals beyond are only logged.
const OUTCOMES_MAX: usize = 32;

/// The names a listener lets in, and what for. Whoever is not named is not let in. Names are compared without regard to
/// case.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Allow {
    replicate: BTreeSet<String>,
    operate: BTreeSet<String>,
}

impl Allow {
    /// Also lets these names in, to operate the host and for nothing else.
    #[must_use]
    pub fn operators(mut self, names: impl IntoIterator<Item = Name>) -> Self {
        self.operate.extend(lowercase(names));
        self
    }

    /// Whether `name` is let in for `protocol`.
    pub fn contains(&self, protocol: Protocol, name: &Name) -> bool {
        let names = match protocol {
            Protocol::Replicate => &self.replicate,
            Protocol::Operate => &self.operate,
        };
        names.contains(&name.as_str().to_ascii_lowercase())
    }
}

impl FromIterator<Name> for Allow {
    /// Hosts that may replicate.
    fn from_iter<I: IntoIterator<Item = Name>>(names: I) -> Self {
        Self {
            replicate: lowercase(names).collect(),
            operate: BTreeSet::new(),
        }
    }
}

fn lowercase(names: impl IntoIterator<Item = Name>) -> impl Iterator<Item = String> {
    let names = names.into_iter();
    names.map(|name| name.as_str().to_ascii_lowercase())
}

/// Why a listener could not begin.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// Somebody else has the port.
    #[error("UDP port {} of {} is in use: is another understudy running? choose another port", .0.port(), .0.ip())]
    Busy(SocketAddr),
    /// The address is not one of this host.
    #[error("{} is not an address of this host", .0.ip())]
    NotOurs(SocketAddr),
    /// Anything else.
    #[error("cannot listen on {address}")]
    Io {
        /// Where.
        address: SocketAddr,
        /// Why.
        source: io::Error,
    },
}

/// Why an attempt did not become a link.
#[derive(Debug, thiserror::Error)]
pub enum AcceptError {
    /// One of the two sides refused the other. The listener goes on.
    #[error("no link from {}{address}: {}{}", named(name.as_ref()), refusal.explain(*by), said(text))]
    Refused {
        /// Who tried.
        address: SocketAddr,
        /// Whom its certificate names, if it got that far.
        name: Option<Name>,
        /// Who refused.
        by: RefusedBy,
        /// What.
        refusal: Refusal,
        /// Details for people.
        text: String,
    },
    /// The caller fell silent or broke off. The listener goes on.
    #[error("{0} began a handshake and did not finish it")]
    Unfinished(SocketAddr),
    /// The listener is closed.
    #[error("the listener is closed")]
    Closed,
}

impl AcceptError {
    /// Who tried, and why it is no link: the same words for the same, without the port, which is another one each time.
    pub fn account(&self) -> (String, String) {
        match self {
            Self::Refused {
                address,
                name,
                by,
                refusal,
                ..
            } => {
                let who = format!("{}{}", named(name.as_ref()), address.ip());
                (who, refusal.explain(*by).to_string())
            }
            Self::Unfinished(address) => {
                let why = "it began a handshake and did not finish it";
                (address.ip().to_string(), why.into())
            }
            Self::Closed => (String::new(), self.to_string()),
        }
    }

    /// Whether no link will ever be accepted again.
    pub fn is_final(&self) -> bool {
        matches!(self, Self::Closed)
    }
}

/// Accepts links from hosts on an allow list.
#[derive(Debug)]
pub struct Listener {
    endpoint: Endpoint,
    outcomes: mpsc::Receiver<Result<(Link, Control), AcceptError>>,
    accepting: JoinHandle<()>,
}

impl Listener {
    /// Listens on `address` (port 0: any free one) as `identity`, for the hosts of `allow`.
    pub fn bind(address: SocketAddr, identity: &Identity, allow: Allow) -> Result<Self, BindError> {
        let server = Arc::clone(&identity.proof().server);
        let endpoint =
            transport::endpoint(address, identity.reset(), Some(server)).map_err(|source| {
                match source.kind() {
                    io::ErrorKind::AddrInUse => BindError::Busy(address),
                    io::ErrorKind::AddrNotAvailable => BindError::NotOurs(address),
                    _ => BindError::Io { address, source },
                }
            })?;
        let (sender, outcomes) = mpsc::channel(OUTCOMES_MAX);
        let accepting = tokio::spawn(accept_all(
            endpoint.clone(),
            identity.clone(),
            allow,
            sender,
        ));
        Ok(Self {
            endpoint,
            outcomes,
            accepting,
        })
    }

    /// Where it listens.
    pub fn address(&self) -> io::Result<SocketAddr> {
        self.endpoint.local_addr()
    }

    /// The next link, or the next attempt that did not become one. Go on unless the error
    /// [is final](AcceptError::is_final). Safe to cancel.
    pub async fn accept(&mut self) -> Result<(Link, Control), AcceptError> {
        self.outcomes
            .recv()
            .await
            .unwrap_or(Err(AcceptError::Closed))
    }

    /// Closes the listener and all its links, and waits until their peers have been told.
    pub async fn close(self, reason: Reason, text: &str) {
        self.accepting.abort();
        self.endpoint.close(reason.code(), text.as_bytes());
        // A peer that is gone need not be told anything.
        let _ = timeout(super::link::DRAIN_MAX, self.endpoint.wait_idle()).await;
    }
}

impl Drop for Listener {
    /// New links are refused from here on; those that were accepted live on.
    fn drop(&mut self) {
        self.accepting.abort();
        self.endpoint.set_server_config(None);
    }
}

async fn accept_all(
    endpoint: Endpoint,
    identity: Identity,
    allow: Allow,
    outcomes: mpsc::Sender<Result<(Link, Control), AcceptError>>,
) {
    let allow = Arc::new(allow);
    let handshakes = Arc::new(Semaphore::new(HANDSHAKES_MAX));
    let places = Places::default();
    while let Some(incoming) = endpoint.accept().await {
        let Ok(permit) = Arc::clone(&handshakes).try_acquire_owned() else {
            incoming.refuse();
            continue;
        };
        let Some(place) = Place::take(&places, incoming.remote_address().ip()) else {
            incoming.refuse();
            continue;
        };
        // Not what the endpoint counts: that holds on to refused callers for a while, as many as there are.
        if identity.links_accepted() >= LINKS_MAX {
            incoming.refuse();
            continue;
        }
        let under_way = HANDSHAKES_MAX - handshakes.available_permits();
        if under_way > HANDSHAKES_UNPROVED_MAX && incoming.may_retry() {
            // Fails only for a caller that has proved its address, which may_retry() has ruled out.
            let _ = incoming.retry();
            continue;
        }
        let (identity, allow, outcomes) = (identity.clone(), Arc::clone(&allow), outcomes.clone());
        tokio::spawn(async move {
            let address = incoming.remote_address();
            let outcome = timeout(HANDSHAKE_MAX, handshake(incoming, &identity, &allow))
                .await
                .unwrap_or(Err(AcceptError::Unfinished(address)));
            drop((permit, place));
            deliver(outcome, &outcomes).await;
        });
    }
}

/// Handshakes under way by the addresses they come from.
type Places = Arc<Mutex<BTreeMap<IpAddr, usize>>>;

/// One of the handshakes that an address may have under way.
struct Place {
    places: Places,
    address: IpAddr,
}

impl Place {
    fn take(places: &Places, address: IpAddr) -> Option<Self> {
        let mut taken = places.lock();
        let count = taken.entry(address).or_default();
        if *count >= HANDSHAKES_PER_ADDRESS_MAX {
            return None;
        }
        *count += 1;
        Some(Self {
            places: Arc::clone(places),
            address,
        })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut taken = self.places.lock();
        if let Some(count) = taken.get_mut(&self.address) {
            *count -= 1;
            if *count == 0 {
                taken.remove(&self.address);
            }
        }
    }
}

/// Links wait for their taker; attempts that failed do not pile up.
async fn deliver(
    outcome: Result<(Link, Control), AcceptError>,
    outcomes: &mpsc::Sender<Result<(Link, Control), AcceptError>>,
) {
    if outcome.is_ok() {
        // Without a taker the link is dropped, which closes it.
        let _ = outcomes.send(outcome).await;
    } else if let Err(mpsc::error::TrySendError::Full(Err(error))) = outcomes.try_send(outcome) {
        tracing::debug!("{error}");
    }
}

async fn handshake(
    incoming: Incoming,
    identity: &Identity,
    allow: &Allow,
) -> Result<(Link, Control), AcceptError> {
    let (address, proof) = (incoming.remote_address(), identity.proof());
    let connection = async { incoming.accept_with(Arc::clone(&proof.server))?.await }
        .await
        .map_err(|error| connection_failed(address, None, &error))?;
    let name = peer_name(&connection).map_err(|text| {
        refuse(&connection, Reason::Unnamed, &text);
        refused(address, None, Refusal::Unnamed, text)
    })?;
    let Some(protocol) = Protocol::of(&connection) else {
        // The TLS library lets nobody in who names none of ours.
        let text = "no protocol was named";
        refuse(&connection, Reason::Protocol, text);
        let refusal = Refusal::NoCommonProtocol;
        return Err(refused(address, Some(name), refusal, text.into()));
    };
    if !allow.contains(protocol, &name) {
        let text = match protocol {
            Protocol::Replicate => format!("the certificate names {name}"),
            Protocol::Operate => {
                format!("the certificate names {name}, which is not one of the operators")
            }
        };
        refuse(&connection, Reason::NotAllowed, &text);
        return Err(refused(
            address,
            Some(name),
            Refusal::NotAllowed,
            String::new(),
        ));
    }
    if identity.links_with(&name) >= LINKS_PER_PEER_MAX {
        let text = format!("{name} has {LINKS_PER_PEER_MAX} links open");
        refuse(&connection, Reason::Busy, &text);
        return Err(refused(address, Some(name), Refusal::Busy, text));
    }
    let bond = Arc::new(Bond::new(connection.clone(), name.clone(), None));
    identity
        .note(&bond, &proof)
        .map_err(|refusal| refused(address, Some(name.clone()), refusal, String::new()))?;
    let link = Link::new(bond, protocol, name.clone(), None);
    let greeted = async {
        let (send, recv) = connection.accept_bi().await.ok()?;
        let mut control = Control::new(&link, send, recv);
        let greeting = control.receiver.receive().await.ok()??;
        control.sender.send(Bytes::new()).await.ok()?;
        greeting.is_empty().then_some(control)
    };
    let control = greeted
        .await
        .ok_or_else(|| connection_failed(address, Some(name), &why_closed(&connection)))?;
    Ok((link, control))
}

fn refuse(connection: &Connection, reason: Reason, text: &str) {
    connection.close(reason.code(), text.as_bytes());
}

fn refused(address: SocketAddr, name: Option<Name>, refusal: Refusal, text: String) -> AcceptError {
    AcceptError::Refused {
        address,
        name,
        by: RefusedBy::Us,
        refusal,
        text,
    }
}

fn connection_failed(
    address: SocketAddr,
    name: Option<Name>,
    error: &ConnectionError,
) -> AcceptError {
    match Refusal::of(error) {
        Some((by, refusal)) => AcceptError::Refused {
            address,
            name,
            by,
            refusal,
            text: text_of(error),
        },
        None => AcceptError::Unfinished(address),
    }
}

/// `name at `, or nothing.
fn named(name: Option<&Name>) -> String {
    name.map(|name| format!("{name} at ")).unwrap_or_default()
}
