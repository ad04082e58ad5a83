//! Opening a link: resolve, connect, prove, and wait until the peer has accepted us.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use quinn::{Connection, ConnectionError};
use rustls::pki_types::ServerName;
use tokio::{
    task::JoinSet,
    time::{sleep, timeout},
};

use super::{
    bonds::{Bond, chain_of},
    identity::{self, Identity},
    link::{Control, Link, Reason},
    refusal::{Refusal, RefusedBy},
    transport::{self, HANDSHAKE_MAX, Protocol},
};
use crate::base::ids::Name;

/// Addresses of one name that are tried.
const ADDRESSES_MAX: u32 = 4;
/// Head start of one address over the next (RFC 8305 section 5): a host with an IPv6 address that leads nowhere must not
/// cost a whole handshake's patience.
const STAGGER: Duration = Duration::from_millis(250);

/// Why a link could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum DialError {
    /// Not an address.
    #[error("{0:?} is not HOST:PORT")]
    Address(String),
    /// A name that a certificate cannot hold.
    #[error("{0:?} cannot stand in a certificate: dial a DNS name or an IP address")]
    Name(String),
    /// The host's name has no address.
    #[error("cannot find the address of {address}")]
    Resolve {
        /// What was dialled.
        address: String,
        /// Why.
        source: io::Error,
    },
    /// This host has no socket for it.
    #[error("cannot open a socket to reach {address}")]
    Socket {
        /// Where to.
        address: SocketAddr,
        /// Why.
        source: io::Error,
    },
    /// Nobody answered.
    #[error("no answer from {0}: is it running, and does a firewall pass UDP to that port?")]
    Unanswered(SocketAddr),
    /// Somebody answered, and one of the two sides refused the other.
    #[error("no link to {address}: {}{}", refusal.explain(*by), said(text))]
    Refused {
        /// Who was dialled.
        address: SocketAddr,
        /// Who refused.
        by: RefusedBy,
        /// What.
        refusal: Refusal,
        /// What the peer said about it, if it said anything.
        text: String,
    },
    /// The connection broke for another reason.
    #[error("the connection to {address} broke during the handshake")]
    Broken {
        /// Who was dialled.
        address: SocketAddr,
        /// Why.
        source: ConnectionError,
    },
}

/// Opens a link for replication to `address`, as `HOST:PORT`. The peer must prove to be HOST, or `peer` where that is
/// given.
pub async fn dial(
    address: &str,
    peer: Option<&Name>,
    identity: &Identity,
) -> Result<(Link, Control), DialError> {
    dial_for(Protocol::Replicate, address, peer, identity).await
}

/// As [`dial`], for any protocol.
pub async fn dial_for(
    protocol: Protocol,
    address: &str,
    peer: Option<&Name>,
    identity: &Identity,
) -> Result<(Link, Control), DialError> {
    let host = host_of(address)?;
    let name = peer.map_or(host, Name::as_str);
    if ServerName::try_from(name).is_err() {
        return Err(DialError::Name(name.to_owned()));
    }
    let resolve = |source| DialError::Resolve {
        address: address.to_owned(),
        source,
    };
    let found = tokio::net::lookup_host(address).await.map_err(resolve)?;
    let mut attempts = JoinSet::new();
    for (turn, address) in (0..ADDRESSES_MAX).zip(found) {
        let (name, identity) = (name.to_owned(), identity.clone());
        attempts.spawn(async move {
            sleep(STAGGER * turn).await;
            timeout(HANDSHAKE_MAX, connect(protocol, address, &name, &identity))
                .await
                .unwrap_or(Err(DialError::Unanswered(address)))
        });
    }
    let mut last = resolve(io::ErrorKind::NotFound.into());
    while let Some(attempt) = attempts.join_next().await {
        match attempt.expect("an attempt neither panics nor is aborted while it is awaited") {
            Ok(link) => return Ok(link),
            // Whoever answered is the peer; its other addresses would say the same.
            Err(error @ DialError::Refused { .. }) => return Err(error),
            Err(error) => last = error,
        }
    }
    Err(last)
}

/// The host part of `HOST:PORT`; an IPv6 address stands in brackets.
pub fn host_of(address: &str) -> Result<&str, DialError> {
    let wrong = || DialError::Address(address.to_owned());
    let (host, port) = address.rsplit_once(':').ok_or_else(wrong)?;
    if !port.parse::<u16>().is_ok_and(|port| port != 0) {
        return Err(wrong());
    }
    let bare = match host.strip_prefix('[') {
        Some(rest) => rest.strip_suffix(']').ok_or_else(wrong)?,
        None if host.contains(':') => return Err(wrong()),
        None => host,
    };
    if bare.is_empty() {
        return Err(wrong());
    }
    Ok(bare)
}

async fn connect(
    protocol: Protocol,
    address: SocketAddr,
    name: &str,
    identity: &Identity,
) -> Result<(Link, Control), DialError> {
    let unspecified: IpAddr = match address {
        SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let local = SocketAddr::new(unspecified, 0);
    let endpoint = transport::endpoint(local, identity.reset(), None)
        .map_err(|source| DialError::Socket { address, source })?;
    let proof = identity.proof();
    let config = transport::client_config(proof.client(protocol));
    let connecting = endpoint
        .connect_with(config, address, name)
        .map_err(|source| DialError::Socket {
            address,
            source: io::Error::other(source),
        })?;
    let connection = connecting
        .await
        .map_err(|error| connection_failed(address, error))?;
    let peer = peer_name(&connection).map_err(|text| refused(address, Refusal::Unnamed, text))?;
    let dialled = ServerName::try_from(name.to_owned()).ok();
    let bond = Arc::new(Bond::new(connection, peer.clone(), dialled));
    identity
        .note(&bond, &proof)
        .map_err(|refusal| refused(address, refusal, String::new()))?;
    let link = Link::new(Arc::clone(&bond), protocol, peer, Some(endpoint));
    accepted(address, link, &bond.connection).await
}

fn refused(address: SocketAddr, refusal: Refusal, text: String) -> DialError {
    DialError::Refused {
        address,
        by: RefusedBy::Us,
        refusal,
        text,
    }
}

/// Waits for the listener's first message: only now has it checked our certificate and its allow list.
async fn accepted(
    address: SocketAddr,
    link: Link,
    connection: &Connection,
) -> Result<(Link, Control), DialError> {
    let greeted = async {
        let (send, recv) = connection.open_bi().await.ok()?;
        let mut control = Control::new(&link, send, recv);
        control.sender.send(Bytes::new()).await.ok()?;
        let greeting = control.receiver.receive().await.ok()??;
        greeting.is_empty().then_some(control)
    };
    let control = greeted
        .await
        .ok_or_else(|| connection_failed(address, why_closed(connection)))?;
    Ok((link, control))
}

/// Why a connection without a greeting ended. If it did not, the peer does not keep to the protocol: we end it.
pub(super) fn why_closed(connection: &Connection) -> ConnectionError {
    // Closing first would put our reason in the place of the peer's.
    connection.close_reason().unwrap_or_else(|| {
        connection.close(Reason::Protocol.code(), b"no greeting");
        ConnectionError::LocallyClosed
    })
}

/// Who the certificate of a finished handshake says the peer is.
pub(super) fn peer_name(connection: &Connection) -> Result<Name, String> {
    let chain = chain_of(connection);
    let first = chain.first().ok_or("it showed no certificate")?;
    identity::name_of(first)
}

fn connection_failed(address: SocketAddr, error: ConnectionError) -> DialError {
    match (Refusal::of(&error), &error) {
        (Some((by, refusal)), _) => DialError::Refused {
            address,
            by,
            refusal,
            text: text_of(&error),
        },
        (None, ConnectionError::TimedOut) => DialError::Unanswered(address),
        (None, _) => DialError::Broken {
            address,
            source: error,
        },
    }
}

/// What the other side's program, or our TLS library, said about the end of a connection.
pub(super) fn text_of(error: &ConnectionError) -> String {
    match error {
        ConnectionError::ApplicationClosed(close) => {
            String::from_utf8_lossy(&close.reason).into_owned()
        }
        ConnectionError::TransportError(error) => error.reason.clone(),
        _ => String::new(),
    }
}

/// ` (text)`, or nothing.
pub(super) fn said(text: &str) -> String {
    if text.is_empty() {
        String::new()
    } else {
        format!(" ({text})")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_host_and_port() {
        for (address, host) in [
            ("replica-2:7400", "replica-2"),
            ("10.0.0.1:1", "10.0.0.1"),
            ("[fd00::1]:7400", "fd00::1"),
        ] {
            assert_eq!(host_of(address).unwrap(), host);
        }
        for bad in [
            "",
            "host",
            ":7400",
            "host:",
            "host:0",
            "host:70000",
            "fd00::1:7400",
            "[fd00::1:7400",
            "[]:1",
        ] {
            assert!(host_of(bad).is_err(), "{bad:?}");
        }
    }
}
