//! Why a handshake did not become a link, in words that say what to do.
//!
//! TLS tells the two sides apart by who closed the connection: the side that found the fault knows it first hand, the
//! other learns it from an alert (RFC 8446 section 6.2). Both map to the same [`Refusal`], so that an operator reads
//! the same reason in both logs.

use std::fmt;

use quinn::ConnectionError;
use serde::{Deserialize, Serialize};

use super::link::Reason;

/// Who refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RefusedBy {
    /// This host refused the peer.
    Us,
    /// The peer refused this host.
    Peer,
}

/// What was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Refusal {
    /// A certificate of a CA that the other side does not trust.
    UnknownCa,
    /// A certificate that ended, or has not begun.
    Expired,
    /// A certificate without the name that was dialled.
    WrongName,
    /// No certificate at all.
    NoCertificate,
    /// A certificate that was revoked.
    Revoked,
    /// A certificate made for another use.
    WrongPurpose,
    /// Another protocol, or another version of ours.
    NoCommonProtocol,
    /// A certificate without any DNS name: a host without a name cannot be allowed.
    Unnamed,
    /// A key that is not known to belong to the name.
    WrongKey,
    /// A name that is not on the allow list.
    NotAllowed,
    /// Too many links, or the listener is stopping.
    Busy,
    /// Any other TLS alert.
    Alert(u8),
}

impl Refusal {
    /// Reads who refused what from the error that ended a connection; nothing if it was not a refusal.
    pub(super) fn of(error: &ConnectionError) -> Option<(RefusedBy, Self)> {
        match error {
            ConnectionError::TransportError(error) => {
                Self::of_code(error.code.into()).map(|refusal| (RefusedBy::Us, refusal))
            }
            ConnectionError::ConnectionClosed(close) => {
                Self::of_code(close.error_code.into()).map(|refusal| (RefusedBy::Peer, refusal))
            }
            ConnectionError::ApplicationClosed(close) => {
                let refusal = match Reason::from_code(close.error_code) {
                    Reason::NotAllowed => Self::NotAllowed,
                    Reason::Unnamed => Self::Unnamed,
                    Reason::Revoked => Self::Revoked,
                    Reason::Busy | Reason::Stopping => Self::Busy,
                    _ => return None,
                };
                Some((RefusedBy::Peer, refusal))
            }
            _ => None,
        }
    }

    /// QUIC carries TLS alerts as 0x0100 to 0x01ff (RFC 9001 section 4.8), and 0x02 when it takes no connection.
    fn of_code(code: u64) -> Option<Self> {
        if code == 0x02 {
            return Some(Self::Busy);
        }
        let alert = code.checked_sub(0x100)?;
        Some(match u8::try_from(alert).ok()? {
            42 => Self::WrongName,
            43 => Self::WrongPurpose,
            44 => Self::Revoked,
            45 => Self::Expired,
            48 => Self::UnknownCa,
            116 => Self::NoCertificate,
            120 => Self::NoCommonProtocol,
            alert => Self::Alert(alert),
        })
    }

    /// A full sentence on who refused whom and what to do about it on which host.
    pub(super) fn explain(self, by: RefusedBy) -> Explained {
        Explained { by, refusal: self }
    }
}

/// [`Refusal`] seen from one side.
#[derive(Clone, Copy, Debug)]
pub(super) struct Explained {
    by: RefusedBy,
    refusal: Refusal,
}

impl fmt::Display for Explained {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        use RefusedBy::{Peer, Us};
        f.write_str(match (self.refusal, self.by) {
            (Refusal::UnknownCa, Us) => {
                "its certificate is signed by a CA that our ca.crt does not hold: issue both identities from one CA, \
                 or add its CA to our ca.crt"
            }
            (Refusal::UnknownCa, Peer) => {
                "it does not trust the CA of our certificate: issue both identities from one CA, or add our CA to its \
                 ca.crt"
            }
            (Refusal::Expired, Us) => {
                "its certificate has expired or is not valid yet: issue it a new identity, and check both clocks"
            }
            (Refusal::Expired, Peer) => {
                "it found our certificate expired or not valid yet: issue a new identity for this host, and check both \
                 clocks"
            }
            (Refusal::WrongName, Us) => {
                "its certificate does not hold the name that was dialled: dial a name it holds, give the expected name \
                 of the peer, or issue it an identity with that name as --san"
            }
            (Refusal::WrongName, Peer) => "it finds our certificate malformed: issue a new identity",
            (Refusal::NoCertificate, Us) => {
                "it showed no certificate: every host needs an identity (`understudy pki issue`)"
            }
            (Refusal::NoCertificate, Peer) => {
                "it asks for a certificate and we showed none: every host needs an identity"
            }
            (Refusal::Revoked, Us) => "its certificate was revoked: issue it a new identity if it still belongs here",
            (Refusal::Revoked, Peer) => "our certificate was revoked: issue a new identity",
            (Refusal::WrongPurpose, Us) => {
                "its certificate is not made for this end of a connection: it needs both clientAuth and serverAuth"
            }
            (Refusal::WrongPurpose, Peer) => {
                "our certificate is not made for this end of a connection: it needs both clientAuth and serverAuth"
            }
            (Refusal::NoCommonProtocol, _) => {
                "it does not speak understudy/1: is another program on that port, or another version?"
            }
            (Refusal::Unnamed, Us) => {
                "its certificate holds no DNS name: issue it an identity with a name"
            }
            (Refusal::Unnamed, Peer) => {
                "our certificate holds no DNS name it could allow: issue an identity with a name"
            }
            (Refusal::WrongKey, Us) => {
                "its key is not one that its name may have here: add the key to [keys] if it was renewed"
            }
            (Refusal::WrongKey, Peer) => "it does not know our key: add it to its [keys]",
            (Refusal::NotAllowed, Us) => "its name is not on our allow list: add it there if it belongs here",
            (Refusal::NotAllowed, Peer) => {
                "our name is not on its allow list: add it there if this host belongs to it"
            }
            (Refusal::Busy, Us) => "there are too many links or handshakes: try again later",
            (Refusal::Busy, Peer) => "it takes no links now: try again later",
            (Refusal::Alert(alert), Us) => return write!(f, "the TLS handshake failed with alert {alert}"),
            (Refusal::Alert(alert), Peer) => {
                return write!(f, "it ended the TLS handshake with alert {alert}");
            }
        })
    }
}
