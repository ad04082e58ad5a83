//! What a host proves about itself and whom it trusts: its certificate chain, its key and its CA roots, from files.
//!
//! The files may come from [`super::pki`] or from any other authority. Everything that can be wrong with them is found
//! here, when the program starts, and not at the first handshake in the night.

use std::{
    fmt, fs, io,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use rustls::{
    InconsistentKeys, RootCertStore,
    pki_types::{
        CertificateDer, PrivateKeyDer,
        pem::{self, PemObject},
    },
};
use x509_parser::prelude::{GeneralName, X509Certificate};

use super::transport::{self, Protocol, ResetKey};
use crate::base::{
    clock::{Clock, SystemClock, Timestamp},
    ids::Name,
};

/// File name of the CA certificates a host trusts.
pub const CA_CERTIFICATE: &str = "ca.crt";
/// File name of the host's certificate, followed by intermediate ones if there are any.
pub const HOST_CERTIFICATE: &str = "host.crt";
/// File name of the host's private key.
pub const HOST_KEY: &str = "host.key";
/// A certificate that ends within this time is complained about at each start.
const EXPIRY_NEAR: Duration = Duration::from_hours(30 * 24);

/// A host's identity, ready for handshakes in both directions.
#[derive(Clone)]
pub struct Identity {
    name: Name,
    valid_until: Timestamp,
    reset: ResetKey,
    server: Arc<QuicServerConfig>,
    replicate: Arc<QuicClientConfig>,
    operate: Arc<QuicClientConfig>,
}

/// Why an identity cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// A file is not there, or cannot be read.
    #[error("cannot read {}: an identity is a folder with ca.crt, host.crt and host.key; `understudy pki issue` makes one", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why it cannot be read.
        source: io::Error,
    },
    /// A file does not hold what its name says.
    #[error("{} holds no {expected} in PEM form", path.display())]
    NotPem {
        /// The file.
        path: PathBuf,
        /// What should stand in it.
        expected: &'static str,
        /// What the parser says.
        source: pem::Error,
    },
    /// A certificate that is damaged or lacks something.
    #[error("the certificate in {} is not usable: {problem}", path.display())]
    BadCertificate {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// The key and the certificate belong to different identities.
    #[error("{} is not the private key of host.crt beside it: copy both from the same identity", .0.display())]
    KeyMismatch(PathBuf),
    /// The certificate is over.
    #[error("the certificate in {} expired: issue a new identity and restart", .0.display())]
    Expired(PathBuf),
    /// The certificate has not begun.
    #[error("the certificate in {} is not valid yet: check this host's clock", .0.display())]
    NotYetValid(PathBuf),
    /// The TLS library refuses the files for another reason.
    #[error("the identity in {} is not usable", path.display())]
    Unusable {
        /// The folder.
        path: PathBuf,
        /// What the TLS library says.
        source: rustls::Error,
    },
}

impl Identity {
    /// Loads `ca.crt`, `host.crt` and `host.key` from the folder `dir`.
    pub fn load(dir: &Path) -> Result<Self, IdentityError> {
        Self::load_at(dir, SystemClock::default().wall())
    }

    /// As [`Identity::load`], for a given time of day.
    pub fn load_at(dir: &Path, now: Timestamp) -> Result<Self, IdentityError> {
        let host_path = dir.join(HOST_CERTIFICATE);
        let key_path = dir.join(HOST_KEY);
        let roots = Arc::new(load_roots(&dir.join(CA_CERTIFICATE))?);
        let chain = load_certificates(&host_path)?;
        let facts = Facts::of(&chain[0]).map_err(|problem| IdentityError::BadCertificate {
            path: host_path.clone(),
            problem,
        })?;
        if now > facts.not_after {
            return Err(IdentityError::Expired(host_path));
        }
        if now < facts.not_before {
            return Err(IdentityError::NotYetValid(host_path));
        }
        if facts.not_after.since(now) < EXPIRY_NEAR {
            tracing::warn!(
                "the certificate in {} expires in {} days: issue a new identity",
                host_path.display(),
                facts.not_after.since(now).as_secs() / (24 * 3600),
            );
        }
        let key = load_key(&key_path)?;
        let refused = |source| match source {
            rustls::Error::InconsistentKeys(InconsistentKeys::KeyMismatch) => {
                IdentityError::KeyMismatch(key_path.clone())
            }
            source => IdentityError::Unusable {
                path: dir.to_owned(),
                source,
            },
        };
        let reset = ResetKey::of(&key);
        let server = transport::server_crypto(&roots, chain.clone(), key.clone_key());
        let client = |protocol| {
            let client = transport::client_crypto(&roots, chain.clone(), key.clone_key(), protocol);
            client.map(Arc::new).map_err(refused)
        };
        Ok(Self {
            name: facts.name,
            valid_until: facts.not_after,
            reset,
            server: Arc::new(server.map_err(refused)?),
            replicate: client(Protocol::Replicate)?,
            operate: client(Protocol::Operate)?,
        })
    }

    /// Who this host is to others: the first DNS name of its certificate.
    pub fn name(&self) -> &Name {
        &self.name
    }

    /// When the certificate ends.
    pub fn valid_until(&self) -> Timestamp {
        self.valid_until
    }

    pub(super) fn reset(&self) -> ResetKey {
        self.reset
    }

    pub(super) fn server(&self) -> Arc<QuicServerConfig> {
        Arc::clone(&self.server)
    }

    pub(super) fn client(&self, protocol: Protocol) -> Arc<QuicClientConfig> {
        Arc::clone(match protocol {
            Protocol::Replicate => &self.replicate,
            Protocol::Operate => &self.operate,
        })
    }
}

impl fmt::Debug for Identity {
    /// Without the key.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Identity")
            .field("name", &self.name)
            .field("valid_until", &self.valid_until)
            .finish_non_exhaustive()
    }
}

/// The name in a certificate that a TLS handshake has already verified.
pub(super) fn name_of(certificate: &CertificateDer<'_>) -> Result<Name, String> {
    Facts::of(certificate).map(|facts| facts.name)
}

/// What the program itself reads from a certificate; everything else is the TLS library's business.
struct Facts {
    name: Name,
    not_before: Timestamp,
    not_after: Timestamp,
}

impl Facts {
    fn of(certificate: &CertificateDer<'_>) -> Result<Self, String> {
        let (_, parsed) = x509_parser::parse_x509_certificate(certificate)
            .map_err(|error| format!("it is no X.509 certificate: {error}"))?;
        Ok(Self {
            name: first_dns_name(&parsed)?,
            not_before: seconds(parsed.validity().not_before.timestamp()),
            not_after: seconds(parsed.validity().not_after.timestamp()),
        })
    }
}

fn first_dns_name(certificate: &X509Certificate<'_>) -> Result<Name, String> {
    let names = certificate
        .subject_alternative_name()
        .map_err(|error| format!("its subject alternative names are damaged: {error}"))?;
    let first = names
        .iter()
        .flat_map(|extension| &extension.value.general_names)
        .find_map(|name| match name {
            GeneralName::DNSName(name) => Some(*name),
            _ => None,
        })
        .ok_or("it has no DNS name among its subject alternative names")?;
    Name::new(&first.to_ascii_lowercase()).map_err(|error| error.to_string())
}

/// A time before 1970 counts as 1970: all that matters is that it is past.
pub(super) fn seconds(since_1970: i64) -> Timestamp {
    let seconds = u64::try_from(since_1970).unwrap_or(0);
    Timestamp(seconds.saturating_mul(1_000_000))
}

fn load_roots(path: &Path) -> Result<RootCertStore, IdentityError> {
    let mut roots = RootCertStore::empty();
    for certificate in load_certificates(path)? {
        roots
            .add(certificate)
            .map_err(|error| IdentityError::BadCertificate {
                path: path.to_owned(),
                problem: error.to_string(),
            })?;
    }
    Ok(roots)
}

/// All certificates of a file; at least one.
fn load_certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, IdentityError> {
    let not_pem = |source| IdentityError::NotPem {
        path: path.to_owned(),
        expected: "certificate",
        source,
    };
    let certificates = CertificateDer::pem_slice_iter(&read(path)?)
        .collect::<Result<Vec<_>, _>>()
        .map_err(not_pem)?;
    if certificates.is_empty() {
        return Err(not_pem(pem::Error::NoItemsFound));
    }
    Ok(certificates)
}

fn load_key(path: &Path) -> Result<PrivateKeyDer<'static>, IdentityError> {
    let bytes = read(path)?;
    let open = fs::metadata(path).is_ok_and(|data| data.permissions().mode() & 0o077 != 0);
    if open {
        tracing::warn!(
            "{} can be read by other users of this host: chmod 600 it",
            path.display()
        );
    }
    PrivateKeyDer::from_pem_slice(&bytes).map_err(|source| IdentityError::NotPem {
        path: path.to_owned(),
        expected: "private key",
        source,
    })
}

fn read(path: &Path) -> Result<Vec<u8>, IdentityError> {
    fs::read(path).map_err(|source| IdentityError::Read {
        path: path.to_owned(),
        source,
    })
}
