//! Floor 4: authenticated connections: QUIC, TLS 1.3 with certificates on both sides.
//!
//! There is no mode without encryption and none without a certificate: two hosts either prove to each other who they
//! are, or no byte of a guest leaves the house.
//!
//! ```text
//!   pki          a CA, and the identities of hosts, as files
//!   revoke       takes an identity back: the authority's list of revoked certificates
//!   identity     those files: what a host proves and whom it trusts; read again without a restart
//!   proof        the same for the TLS library           crl      who was revoked
//!   bonds        the links that are open, judged again when the files were read again
//!   listener     accepts links from hosts on an allow list          dial     opens one
//!   link         one connection: a control stream of messages, log streams of bytes
//!   refusal      why a handshake did not become a link, in words that say what to do
//!   transport    limits, windows and sockets          socket   sends what the path carries
//!   backoff      when to dial again
//! ```
//!
//! What a link promises: messages arrive whole, in order and once, or the link is lost and both sides know; a log
//! stream ends only where its sender ended it, so a stream that was cut short is an error and never a short log. What
//! it does not promise: that a message that was sent has arrived. Acknowledgements are the protocol's business.
#![forbid(unsafe_code)]

pub mod backoff;
mod bonds;
mod crl;
pub mod dial;
pub mod identity;
pub mod link;
pub mod listener;
pub mod pki;
mod proof;
pub mod refusal;
pub mod revoke;
mod socket;
pub mod transport;

pub use backoff::Backoff;
pub use dial::{DialError, dial, dial_for, host_of};
pub use identity::{Identity, IdentityError, Reloaded, Reread, Trust};
pub use link::{
    Control, ControlReceiver, ControlSender, Link, LinkError, LinkStats, LogReceiver, LogSender,
    Peer, Reason,
};
pub use listener::{AcceptError, Allow, BindError, Listener};
pub use refusal::{Refusal, RefusedBy};
pub use transport::Protocol;
