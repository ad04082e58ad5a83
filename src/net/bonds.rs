//! The links that an identity made or accepted and that are open, so that a peer can lose its right to them.
//!
//! A link is judged when its handshake is made, and again by each [reload](super::Reread::take). What happens in between
//! is no gap: a link is first noted here and then judged by the files as they are now, and a reload first changes the
//! files and then judges what is noted here. One of the two sees the other.

use std::sync::{Arc, Weak};

use parking_lot::Mutex;
use quinn::Connection;
use rustls::pki_types::{CertificateDer, ServerName};

use super::{
    identity::{Trust, key_digest},
    link::Reason,
    proof::Proof,
    refusal::Refusal,
};
use crate::base::{clock::Timestamp, ids::Name};

/// A connection, and how its peer proved who it is. It lives as long as the handles of its link do.
pub(super) struct Bond {
    pub(super) connection: Connection,
    chain: Vec<CertificateDer<'static>>,
    /// As whom the peer was dialled, if it did not call.
    dialled: Option<ServerName<'static>>,
    name: Name,
}

impl Bond {
    pub(super) fn new(
        connection: Connection,
        name: Name,
        dialled: Option<ServerName<'static>>,
    ) -> Self {
        Self {
            chain: chain_of(&connection),
            connection,
            dialled,
            name,
        }
    }

    /// Closes the connection unless its peer holds a key that its name may have.
    pub(super) fn check_key(&self, trust: &Trust) -> Result<(), Refusal> {
        let key = self.chain.first().and_then(key_digest);
        if trust.believes(&self.name, key) {
            return Ok(());
        }
        let key = key.unwrap_or_default();
        let text = format!("the key {key} is not one that {} may have", self.name);
        self.connection
            .close(Reason::NotAllowed.code(), text.as_bytes());
        Err(Refusal::WrongKey)
    }

    /// Judges the peer, and closes the connection if it lost its right to it.
    pub(super) fn judge(&self, proof: &Proof, now: Timestamp) -> Result<(), Refusal> {
        let judged = proof.judge(&self.chain, self.dialled.as_ref(), now);
        if let Err(refusal) = judged {
            let text = match refusal {
                Refusal::Revoked => "the certificate was revoked",
                _ => "the certificate is no longer accepted",
            };
            self.connection
                .close(Reason::Revoked.code(), text.as_bytes());
        }
        judged
    }
}

/// The certificates that a peer showed, its own first.
pub(super) fn chain_of(connection: &Connection) -> Vec<CertificateDer<'static>> {
    connection
        .peer_identity()
        .and_then(|identity| identity.downcast::<Vec<CertificateDer<'static>>>().ok())
        .map(|chain| *chain)
        .unwrap_or_default()
}

/// All of an identity.
#[derive(Default)]
pub(super) struct Bonds(Mutex<Vec<Weak<Bond>>>);

impl Bonds {
    /// Notes a link. Those that are gone are forgotten, so that this holds no more than twice what is open.
    pub(super) fn note(&self, bond: &Arc<Bond>) {
        let mut bonds = self.0.lock();
        if bonds.len() == bonds.capacity() {
            bonds.retain(|bond| bond.strong_count() > 0);
        }
        bonds.push(Arc::downgrade(bond));
    }

    /// How many links with a peer are open.
    pub(super) fn open_with(&self, name: &Name) -> usize {
        let same = |bond: &&Arc<Bond>| bond.name.as_str().eq_ignore_ascii_case(name.as_str());
        self.open().iter().filter(same).count()
    }

    /// How many links are open on which the peer called.
    pub(super) fn accepted(&self) -> usize {
        let called = |bond: &&Arc<Bond>| bond.dialled.is_none();
        self.open().iter().filter(called).count()
    }

    fn open(&self) -> Vec<Arc<Bond>> {
        let bonds: Vec<_> = self.0.lock().iter().filter_map(Weak::upgrade).collect();
        let open = |bond: &Arc<Bond>| bond.connection.close_reason().is_none();
        bonds.into_iter().filter(open).collect()
    }

    /// Judges every link, and closes those whose peers lost their right to them; whose they were, and why.
    pub(super) fn judge(&self, proof: &Proof, now: Timestamp) -> Vec<(Name, Refusal)> {
        let open = self.open().into_iter();
        open.filter_map(|bond| {
            let refusal = bond.judge(proof, now).err()?;
            Some((bond.name.clone(), refusal))
        })
        .collect()
    }
}
