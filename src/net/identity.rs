//! What a host proves about itself and whom it trusts: its certificate chain, its key and its CA roots, from files.
//!
//! The files may come from [`super::pki`] or from any other authority. Everything that can be wrong with them is found
//! here, when the program starts or is told to read them again, and not at the first handshake in the night.

use std::{
    collections::BTreeMap,
    fmt, fs, io,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    sync::Arc,
};

use parking_lot::RwLock;
use rustls::{
    InconsistentKeys, RootCertStore,
    pki_types::{
        CertificateDer, PrivateKeyDer,
        pem::{self, PemObject},
    },
};
use serde::{Deserialize, Serialize};
use x509_parser::prelude::{GeneralName, X509Certificate};

use super::{
    bonds::{Bond, Bonds},
    proof::Proof,
    refusal::{Refusal, RefusedBy},
    transport::ResetKey,
};
use crate::base::{
    checksum::{Digest, Sha256},
    clock::{Clock, SystemClock, Timestamp},
    ids::Name,
};

/// File name of the CA certificates a host trusts.
pub const CA_CERTIFICATE: &str = "ca.crt";
/// File name of the host's certificate, followed by intermediate ones if there are any.
pub const HOST_CERTIFICATE: &str = "host.crt";
/// File name of the host's private key.
pub const HOST_KEY: &str = "host.key";
/// A host's identity, ready for handshakes in both directions. Clones share it: what is [read again](Identity::reread) is seen by all.
#[derive(Clone)]
pub struct Identity(Arc<Shared>);

/// Whom to believe beyond the authorities in the identity's folder.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Trust {
    /// File of revoked certificates, whose holders are refused.
    pub crl: Option<PathBuf>,
    /// Whoever proves to have one of these names must hold one of its keys, given by their [`key_digest`].
    pub keys: BTreeMap<Name, Vec<Digest>>,
}

impl Trust {
    /// Whether the holder of a key may have this name. Names are compared without regard to case.
    pub(super) fn believes(&self, name: &Name, key: Option<Digest>) -> bool {
        let same = |known: &Name| known.as_str().eq_ignore_ascii_case(name.as_str());
        let known = self.keys.iter().find(|(known, _)| same(known));
        known.is_none_or(|(_, keys)| key.is_some_and(|key| keys.contains(&key)))
    }
}

struct Shared {
    name: Name,
    reset: ResetKey,
    dir: PathBuf,
    trust: Trust,
    proof: RwLock<Arc<Proof>>,
    bonds: Bonds,
}

/// Files that were read again and can be used.
#[derive(Debug)]
#[must_use = "nothing has changed before they are taken"]
pub struct Reread {
    identity: Identity,
    proof: Arc<Proof>,
}

impl Reread {
    /// From here on handshakes use what the files say, and links whose peers they do not accept any more are closed with
    /// [`Reason::Revoked`](super::Reason::Revoked).
    pub fn take(self) -> Reloaded {
        let Self { identity, proof } = self;
        *identity.0.proof.write() = Arc::clone(&proof);
        Reloaded {
            name: proof.name.clone(),
            valid_until: proof.valid_until,
            revoked: proof.revoked,
            closed: identity.0.bonds.judge(&proof, now()),
        }
    }
}

/// What a reload found and did.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reloaded {
    /// Whose identity it is.
    pub name: Name,
    /// When the certificate ends.
    pub valid_until: Timestamp,
    /// Certificates that the list of revoked ones names, if there is a list.
    pub revoked: Option<usize>,
    /// The peers whose links were closed, and why.
    pub closed: Vec<(Name, Refusal)>,
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
    #[error("the certificate in {} expired: issue a new identity, and start or reload the host with it", .0.display())]
    Expired(PathBuf),
    /// The certificate has not begun.
    #[error("the certificate in {} is not valid yet: check this host's clock", .0.display())]
    NotYetValid(PathBuf),
    /// A list of revoked certificates that is damaged.
    #[error("the list of revoked certificates in {} is not usable: {problem}", path.display())]
    BadList {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// A reload that would make this host another one.
    #[error("the certificate in {} names {is}, and this host is {was}: restart it to give it another name", path.display())]
    Renamed {
        /// The file.
        path: PathBuf,
        /// The name that peers know.
        was: Name,
        /// The name in the new certificate.
        is: Name,
    },
    /// The TLS library refuses the files for another reason.
    #[error("the identity in {} is not usable", path.display())]
    Unusable {
        /// The folder.
        path: PathBuf,
        /// What the TLS library says.
        source: rustls::Error,
    },
}

impl IdentityError {
    pub(super) fn unusable(dir: &Path, key: &Path, source: rustls::Error) -> Self {
        match source {
            rustls::Error::InconsistentKeys(InconsistentKeys::KeyMismatch) => {
                Self::KeyMismatch(key.to_owned())
            }
            source => Self::Unusable {
                path: dir.to_owned(),
                source,
            },
        }
    }
}

impl Identity {
    /// Loads `ca.crt`, `host.crt` and `host.key` from the folder `dir`.
    pub fn load(dir: &Path) -> Result<Self, IdentityError> {
        Self::load_with(dir, Trust::default())
    }

    /// As [`Identity::load`], for peers that pass `trust` as well.
    pub fn load_with(dir: &Path, trust: Trust) -> Result<Self, IdentityError> {
        Self::load_all(dir, trust, now())
    }

    /// As [`Identity::load`], for a given time of day.
    pub fn load_at(dir: &Path, now: Timestamp) -> Result<Self, IdentityError> {
        Self::load_all(dir, Trust::default(), now)
    }

    fn load_all(dir: &Path, trust: Trust, now: Timestamp) -> Result<Self, IdentityError> {
        let proof = Proof::load(dir, trust.crl.as_deref(), now)?;
        Ok(Self(Arc::new(Shared {
            name: proof.name.clone(),
            reset: proof.reset,
            dir: dir.to_owned(),
            trust,
            proof: RwLock::new(Arc::new(proof)),
            bonds: Bonds::default(),
        })))
    }

    /// Reads the files again, and changes nothing yet.
    ///
    /// # Errors
    /// If a file cannot be used, or the certificate has another name.
    pub fn reread(&self) -> Result<Reread, IdentityError> {
        let shared = &*self.0;
        let proof = Proof::load(&shared.dir, shared.trust.crl.as_deref(), now())?;
        if proof.name != shared.name {
            return Err(IdentityError::Renamed {
                path: shared.dir.join(HOST_CERTIFICATE),
                was: shared.name.clone(),
                is: proof.name,
            });
        }
        Ok(Reread {
            identity: self.clone(),
            proof: Arc::new(proof),
        })
    }

    /// Who this host is to others: the first DNS name of its certificate.
    pub fn name(&self) -> &Name {
        &self.0.name
    }

    /// When the certificate ends.
    pub fn valid_until(&self) -> Timestamp {
        self.proof().valid_until
    }

    /// That of the key the program was started with: a reload changes no socket.
    pub(super) fn reset(&self) -> ResetKey {
        self.0.reset
    }

    /// What handshakes use that begin now.
    pub(super) fn proof(&self) -> Arc<Proof> {
        Arc::clone(&self.0.proof.read())
    }

    /// How many links with a peer are open.
    pub(super) fn links_with(&self, name: &Name) -> usize {
        self.0.bonds.open_with(name)
    }

    /// How many links that were accepted are open.
    pub(super) fn links_accepted(&self) -> usize {
        self.0.bonds.accepted()
    }

    /// Notes a link whose handshake used `proof`, and judges it by what counts now if that is something else. Its peer must
    /// hold the key that is known of its name, if one is.
    pub(super) fn note(&self, bond: &Arc<Bond>, proof: &Arc<Proof>) -> Result<(), Refusal> {
        bond.check_key(&self.0.trust)?;
        self.0.bonds.note(bond);
        let newest = self.proof();
        if Arc::ptr_eq(&newest, proof) {
            return Ok(());
        }
        bond.judge(&newest, now())
    }
}

fn now() -> Timestamp {
    SystemClock::default().wall()
}

impl fmt::Debug for Identity {
    /// Without the key.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Identity")
            .field("name", self.name())
            .field("valid_until", &self.valid_until())
            .finish_non_exhaustive()
    }
}

impl fmt::Display for Reloaded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: valid until {}", self.name, self.valid_until)?;
        match self.revoked {
            Some(revoked) => write!(f, "; {revoked} certificates are revoked")?,
            None => write!(f, "; no list of revoked certificates")?,
        }
        for (peer, refusal) in &self.closed {
            let why = refusal.explain(RefusedBy::Us);
            write!(f, "; closed a link with {peer}: {why}")?;
        }
        Ok(())
    }
}

/// SHA-256 of the public key in a certificate (its `SubjectPublicKeyInfo` in DER form), which stays when the certificate is
/// renewed with the same key.
pub fn key_digest(certificate: &CertificateDer<'_>) -> Option<Digest> {
    let (_, parsed) = x509_parser::parse_x509_certificate(certificate).ok()?;
    let mut digest = Sha256::default();
    digest.update(parsed.public_key().raw);
    Some(digest.finish())
}

/// The name in a certificate that a TLS handshake has already verified.
pub(super) fn name_of(certificate: &CertificateDer<'_>) -> Result<Name, String> {
    Facts::of(certificate).map(|facts| facts.name)
}

/// What the program itself reads from a certificate; everything else is the TLS library's business.
pub(super) struct Facts {
    pub(super) name: Name,
    pub(super) not_before: Timestamp,
    pub(super) not_after: Timestamp,
}

impl Facts {
    pub(super) fn of(certificate: &CertificateDer<'_>) -> Result<Self, String> {
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

pub(super) fn load_roots(path: &Path) -> Result<RootCertStore, IdentityError> {
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
pub(super) fn load_certificates(
    path: &Path,
) -> Result<Vec<CertificateDer<'static>>, IdentityError> {
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

pub(super) fn load_key(path: &Path) -> Result<PrivateKeyDer<'static>, IdentityError> {
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

pub(super) fn read(path: &Path) -> Result<Vec<u8>, IdentityError> {
    fs::read(path).map_err(|source| IdentityError::Read {
        path: path.to_owned(),
        source,
    })
}
