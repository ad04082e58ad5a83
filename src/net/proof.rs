//! What the files of an identity mean to the TLS library: proving ourselves, and judging whoever proves itself to us.
//!
//! A proof is made from the files as a whole and never changed. A [reload](super::Reread::take) makes another one:
//! handshakes that begin from then on use it, and the peers of the links that are open are judged by it once more.
//!
//! # Why an expired list of revoked certificates still counts
//! A list whose `nextUpdate` is past is complained about at each start and reload, and obeyed: who is on it stays out. To
//! refuse everybody instead would end all replication on the day on which somebody forgot to copy a file, and a machine
//! without a replica is what this program is there to prevent. What is lost is the proof that nobody was revoked since.
//! A certificate whose authority has no list in the file is refused: a list that names somebody else says nothing of it.

use std::{path::Path, sync::Arc, time::Duration};

use quinn::{
    ServerConfig,
    crypto::rustls::{QuicClientConfig, QuicServerConfig},
};
use rustls::{
    CertificateError, RootCertStore,
    client::{WebPkiServerVerifier, danger::ServerCertVerifier},
    pki_types::{
        CertificateDer, CertificateRevocationListDer, PrivateKeyDer, ServerName, UnixTime,
    },
    server::{VerifierBuilderError, WebPkiClientVerifier, danger::ClientCertVerifier},
};

use super::{
    crl,
    identity::{
        CA_CERTIFICATE, Facts, HOST_CERTIFICATE, HOST_KEY, IdentityError, load_certificates,
        load_key, load_roots,
    },
    refusal::Refusal,
    transport::{self, Protocol, ResetKey},
};
use crate::base::{clock::Timestamp, ids::Name};

/// A certificate that ends within this time is complained about at each start.
const EXPIRY_NEAR: Duration = Duration::from_hours(30 * 24);

/// Both sides of TLS, from one reading of the files.
pub(super) struct Proof {
    pub(super) name: Name,
    pub(super) valid_until: Timestamp,
    pub(super) reset: ResetKey,
    /// Certificates that the list names; nothing without a list.
    pub(super) revoked: Option<usize>,
    pub(super) server: Arc<ServerConfig>,
    replicate: Arc<QuicClientConfig>,
    operate: Arc<QuicClientConfig>,
    callers: Arc<dyn ClientCertVerifier>,
    called: Arc<WebPkiServerVerifier>,
}

impl std::fmt::Debug for Proof {
    /// Without the key.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Proof")
            .field("name", &self.name)
            .finish_non_exhaustive()
    }
}

impl Proof {
    /// Reads the folder `dir`, and the list of revoked certificates if there is to be one.
    pub(super) fn load(
        dir: &Path,
        crl: Option<&Path>,
        now: Timestamp,
    ) -> Result<Self, IdentityError> {
        let (host_path, key_path) = (dir.join(HOST_CERTIFICATE), dir.join(HOST_KEY));
        let roots = Arc::new(load_roots(&dir.join(CA_CERTIFICATE))?);
        let chain = load_certificates(&host_path)?;
        let facts = checked(&host_path, &chain[0], now)?;
        let key = load_key(&key_path)?;
        let lists = crl.map(|path| crl::load(path, now)).transpose()?;
        let revoked = lists.as_ref().map(|lists| lists.revoked);
        let (callers, called) = verifiers(&roots, lists.map(|lists| lists.der))
            .map_err(|source| IdentityError::unusable(dir, &key_path, source))?;
        let refused = |source| IdentityError::unusable(dir, &key_path, source);
        let server = transport::server_crypto(Arc::clone(&callers), chain.clone(), key.clone_key())
            .map_err(refused)?;
        let client = |protocol| client(&called, &chain, &key, protocol).map_err(refused);
        Ok(Self {
            name: facts.name,
            valid_until: facts.not_after,
            reset: ResetKey::of(&key),
            revoked,
            server: listening(server),
            replicate: client(Protocol::Replicate)?,
            operate: client(Protocol::Operate)?,
            callers,
            called,
        })
    }

    pub(super) fn client(&self, protocol: Protocol) -> Arc<QuicClientConfig> {
        Arc::clone(match protocol {
            Protocol::Replicate => &self.replicate,
            Protocol::Operate => &self.operate,
        })
    }

    /// Judges the certificates of a peer once more: one that was dialled as `dialled`, or else one that called.
    pub(super) fn judge(
        &self,
        chain: &[CertificateDer<'static>],
        dialled: Option<&ServerName<'static>>,
        now: Timestamp,
    ) -> Result<(), Refusal> {
        let now = UnixTime::since_unix_epoch(Duration::from_micros(now.0));
        let (first, between) = chain.split_first().ok_or(Refusal::NoCertificate)?;
        let judged = if let Some(name) = dialled {
            let verified = self
                .called
                .verify_server_cert(first, between, name, &[], now);
            verified.map(|_| ())
        } else {
            let verified = self.callers.verify_client_cert(first, between, now);
            verified.map(|_| ())
        };
        judged.map_err(|error| match error {
            rustls::Error::InvalidCertificate(CertificateError::Revoked) => Refusal::Revoked,
            rustls::Error::InvalidCertificate(
                CertificateError::Expired | CertificateError::ExpiredContext { .. },
            ) => Refusal::Expired,
            _ => Refusal::UnknownCa,
        })
    }
}

/// What a host certificate says, if it is valid now.
fn checked(
    path: &Path,
    certificate: &CertificateDer<'_>,
    now: Timestamp,
) -> Result<Facts, IdentityError> {
    let facts = Facts::of(certificate).map_err(|problem| IdentityError::BadCertificate {
        path: path.to_owned(),
        problem,
    })?;
    if now > facts.not_after {
        return Err(IdentityError::Expired(path.to_owned()));
    }
    if now < facts.not_before {
        return Err(IdentityError::NotYetValid(path.to_owned()));
    }
    if facts.not_after.since(now) < EXPIRY_NEAR {
        tracing::warn!(
            "the certificate in {} expires in {} days: issue a new identity",
            path.display(),
            facts.not_after.since(now).as_secs() / (24 * 3600),
        );
    }
    Ok(facts)
}

type Verifiers = (Arc<dyn ClientCertVerifier>, Arc<WebPkiServerVerifier>);

/// Who judges callers, and who judges those that are called: both by the same authorities and lists.
fn verifiers(
    roots: &Arc<RootCertStore>,
    lists: Option<Vec<CertificateRevocationListDer<'static>>>,
) -> Result<Verifiers, rustls::Error> {
    let provider = transport::provider();
    let mut callers =
        WebPkiClientVerifier::builder_with_provider(Arc::clone(roots), Arc::clone(&provider));
    let mut called = WebPkiServerVerifier::builder_with_provider(Arc::clone(roots), provider);
    if let Some(lists) = lists {
        callers = callers.with_crls(lists.clone());
        called = called.with_crls(lists);
    }
    let failed = |error| match error {
        VerifierBuilderError::InvalidCrl(error) => error.into(),
        error => rustls::Error::General(error.to_string()),
    };
    let callers = callers.build().map_err(failed)?;
    Ok((callers, called.build().map_err(failed)?))
}

fn client(
    called: &Arc<WebPkiServerVerifier>,
    chain: &[CertificateDer<'static>],
    key: &PrivateKeyDer<'static>,
    protocol: Protocol,
) -> Result<Arc<QuicClientConfig>, rustls::Error> {
    let chain = chain.to_vec();
    let client = transport::client_crypto(Arc::clone(called), chain, key.clone_key(), protocol);
    client.map(Arc::new)
}

fn listening(server: QuicServerConfig) -> Arc<ServerConfig> {
    Arc::new(transport::server_config(Arc::new(server)))
}
