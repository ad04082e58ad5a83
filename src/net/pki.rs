//! A certificate authority in a folder, and the identities it issues: all that two hosts need to trust each other.
//!
//! ```text
//!   CA folder      ca.crt  ca.key (0600)  issued        stays with the operator
//!   host folder    ca.crt  host.crt  host.key (0600)    goes to the host
//! ```
//!
//! Certificates of another authority work the same: [`super::Identity`] reads the host folder and asks nothing about
//! who wrote it.
//!
//! # Crash contract
//! A folder is written beside its place, made durable, and renamed: it is there whole or not at all. A folder with
//! anything in it is never replaced; to issue again, remove it first.

use std::{
    fs, io,
    io::Write,
    net::IpAddr,
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
    str::FromStr,
    time::Duration,
};

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose, SanType, date_time_ymd,
};
use rustls::pki_types::{CertificateDer, DnsName, pem::PemObject};

use super::{
    identity::{CA_CERTIFICATE, HOST_CERTIFICATE, HOST_KEY, key_digest, seconds},
    revoke,
};
use crate::base::{
    checksum::{Digest, Sha256},
    clock::Timestamp,
    ids::Name,
};

/// File name of the CA's private key.
pub const CA_KEY: &str = "ca.key";
/// How long a new CA is valid.
pub const CA_VALID: Duration = Duration::from_hours(10 * 365 * 24);
/// How long a new host certificate is valid; never longer than its CA.
pub const HOST_VALID: Duration = Duration::from_hours(2 * 365 * 24);
/// Certificates begin to be valid this long before they are made: the clocks of hosts differ.
const CLOCK_SKEW: Duration = Duration::from_hours(1);

/// A further name or address that a host is dialled by.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum San {
    /// A DNS name.
    Dns(String),
    /// An IP address.
    Ip(IpAddr),
}

impl FromStr for San {
    type Err = PkiError;

    fn from_str(text: &str) -> Result<Self, PkiError> {
        if let Ok(address) = text.parse() {
            return Ok(Self::Ip(address));
        }
        dns_name(text).map(Self::Dns)
    }
}

/// Why a CA or an identity could not be made.
#[derive(Debug, thiserror::Error)]
pub enum PkiError {
    /// There is something where the new folder should be.
    #[error("{} is not empty: nothing is overwritten, remove it first or choose another folder", .0.display())]
    Exists(PathBuf),
    /// Reading or writing failed.
    #[error("cannot {doing} {}", path.display())]
    Io {
        /// What was tried.
        doing: &'static str,
        /// On which file or folder.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// A host name that cannot stand in a certificate.
    #[error("{0:?} is not a DNS name: use letters, digits, hyphens and dots")]
    NotDns(String),
    /// The CA's files are damaged, or not a CA's.
    #[error("{} is not usable as a CA: {problem}", path.display())]
    BadCa {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// A name that the CA knows nothing of.
    #[error(
        "nothing was issued to {0} that this authority knows of: name its certificate with --certificate"
    )]
    NotIssued(Name),
    /// A certificate that cannot be revoked here.
    #[error("the certificate in {} cannot be revoked here: {problem}", path.display())]
    BadCertificate {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// A certificate or a list could not be made.
    #[error("cannot make the certificate or list")]
    Make(#[from] rcgen::Error),
}

/// Makes a new CA in the folder `dir`, which must not exist or be empty.
pub fn init(dir: &Path, now: Timestamp) -> Result<(), PkiError> {
    let key = KeyPair::generate()?;
    let mut fingerprint = Sha256::default();
    fingerprint.update(key.public_key_raw());
    // A name of its own tells two authorities apart in every error message and in every other tool.
    let name = format!("understudy CA {:.8}", fingerprint.finish().to_string());
    let mut params = ca_params(&name);
    set_validity(&mut params, now, after(now, CA_VALID));
    let certificate = params.self_signed(&key)?;
    write_folder(
        dir,
        &[
            (CA_CERTIFICATE, &certificate.pem(), 0o644),
            (CA_KEY, &key.serialize_pem(), 0o600),
        ],
    )
}

/// Issues the identity of host `name` into the folder `out`, which must not exist or be empty.
///
/// `name` is what other hosts allow and what the certificate proves; `sans` are further names and addresses the host
/// is dialled by. The CA in `ca` must have been made by [`init`]. Returns the [`key_digest`] of the identity.
pub fn issue(
    ca: &Path,
    name: &Name,
    sans: &[San],
    out: &Path,
    now: Timestamp,
) -> Result<Digest, PkiError> {
    let (ca_pem, issuer, ca_until) = load_ca(ca)?;
    check_free(out)?;
    let mut params = CertificateParams::default();
    params.distinguished_name = common_name(name.as_str());
    params.subject_alt_names = alternative_names(name, sans)?;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    // One certificate for both ends: which host dials depends on who is primary.
    params.extended_key_usages = vec![
        ExtendedKeyUsagePurpose::ServerAuth,
        ExtendedKeyUsagePurpose::ClientAuth,
    ];
    params.use_authority_key_identifier_extension = true;
    set_validity(&mut params, now, after(now, HOST_VALID).min(ca_until));
    let key = KeyPair::generate()?;
    let certificate = params.signed_by(&key, &issuer)?;
    // Whoever exists can be revoked: noted first.
    revoke::note(ca, certificate.der(), name)?;
    write_folder(
        out,
        &[
            (CA_CERTIFICATE, &ca_pem, 0o644),
            (HOST_CERTIFICATE, &certificate.pem(), 0o644),
            (HOST_KEY, &key.serialize_pem(), 0o600),
        ],
    )?;
    Ok(key_digest(certificate.der()).expect("a certificate that was just made can be read"))
}

/// Reads a CA folder: its certificate as PEM, what signs with it, and when it ends.
pub(super) fn load_ca(
    dir: &Path,
) -> Result<(String, Issuer<'static, KeyPair>, Timestamp), PkiError> {
    let (certificate_path, key_path) = (dir.join(CA_CERTIFICATE), dir.join(CA_KEY));
    let pem = read(&certificate_path)?;
    let bad = |path: &Path, problem: &str| PkiError::BadCa {
        path: path.to_owned(),
        problem: problem.to_owned(),
    };
    let key = KeyPair::from_pem(&read(&key_path)?)
        .map_err(|_| bad(&key_path, "no private key in PEM form"))?;
    let der = ca_certificate(dir)?;
    let (_, parsed) = x509_parser::parse_x509_certificate(&der)
        .map_err(|_| bad(&certificate_path, "no X.509 certificate"))?;
    if parsed.public_key().subject_public_key.data.as_ref() != key.public_key_raw() {
        return Err(bad(
            &key_path,
            "the private key is not that of ca.crt beside it",
        ));
    }
    let name = parsed
        .subject()
        .iter_common_name()
        .next()
        .and_then(|name| name.as_str().ok())
        .unwrap_or_default();
    let params = ca_params(name);
    // The issuer named in what we sign must be this subject to the byte, or no chain leads from one to the other.
    let own = params.self_signed(&key)?;
    let (_, own) = x509_parser::parse_x509_certificate(own.der())
        .map_err(|_| bad(&certificate_path, "its name cannot be repeated"))?;
    if own.subject().as_raw() != parsed.subject().as_raw() || !parsed.is_ca() {
        let problem = "it was made by another tool: issue with that tool";
        return Err(bad(&certificate_path, problem));
    }
    let until = seconds(parsed.validity().not_after.timestamp());
    Ok((pem, Issuer::new(params, key), until))
}

/// The certificate of a CA folder.
pub(super) fn ca_certificate(dir: &Path) -> Result<CertificateDer<'static>, PkiError> {
    let path = dir.join(CA_CERTIFICATE);
    let pem = read(&path)?;
    CertificateDer::from_pem_slice(pem.as_bytes()).map_err(|_| PkiError::BadCa {
        path,
        problem: "no certificate in PEM form".to_owned(),
    })
}

fn ca_params(name: &str) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = common_name(name);
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params
}

fn common_name(name: &str) -> DistinguishedName {
    let mut distinguished = DistinguishedName::new();
    distinguished.push(DnType::CommonName, name);
    distinguished
}

/// `name` first: the first DNS name of a certificate is who its holder is.
fn alternative_names(name: &Name, sans: &[San]) -> Result<Vec<SanType>, PkiError> {
    let own = San::Dns(dns_name(name.as_str())?);
    std::iter::once(&own)
        .chain(sans.iter().filter(|san| **san != own))
        .map(|san| match san {
            San::Ip(address) => Ok(SanType::IpAddress(*address)),
            San::Dns(name) => {
                let name = dns_name(name)?;
                Ok(SanType::DnsName(name.try_into()?))
            }
        })
        .collect()
}

/// Host names are compared without regard to case; in certificates they stand in small letters.
fn dns_name(text: &str) -> Result<String, PkiError> {
    match DnsName::try_from(text) {
        Ok(name) => Ok(name.as_ref().to_ascii_lowercase()),
        Err(_) => Err(PkiError::NotDns(text.to_owned())),
    }
}

fn set_validity(params: &mut CertificateParams, now: Timestamp, until: Timestamp) {
    let epoch = date_time_ymd(1970, 1, 1);
    params.not_before = epoch + Duration::from_micros(now.0).saturating_sub(CLOCK_SKEW);
    params.not_after = epoch + Duration::from_micros(until.0);
}

pub(super) fn after(now: Timestamp, valid: Duration) -> Timestamp {
    let micros = u64::try_from(valid.as_micros()).expect("validities are some years");
    Timestamp(now.0.saturating_add(micros))
}

fn read(path: &Path) -> Result<String, PkiError> {
    fs::read_to_string(path).map_err(io_error("read", path))
}

pub(super) fn io_error(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> PkiError {
    let path = path.to_owned();
    move |source| PkiError::Io {
        doing,
        path,
        source,
    }
}

/// Refuses a folder with anything in it.
fn check_free(target: &Path) -> Result<(), PkiError> {
    if fs::read_dir(target).is_ok_and(|mut entries| entries.next().is_some()) {
        return Err(PkiError::Exists(target.to_owned()));
    }
    Ok(())
}

/// Makes the folder `target` with `files` of (name, text, mode): whole or not at all.
fn write_folder(target: &Path, files: &[(&str, &str, u32)]) -> Result<(), PkiError> {
    check_free(target)?;
    let parent = match target.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    };
    fs::create_dir_all(parent).map_err(io_error("create", parent))?;
    let mut partial = target.as_os_str().to_owned();
    partial.push(format!(".{}.partial", std::process::id()));
    let partial = PathBuf::from(partial);
    let written = write_files(&partial, files).and_then(|()| {
        // rename(2) replaces an empty folder and nothing else.
        fs::rename(&partial, target).map_err(|error| match error.kind() {
            io::ErrorKind::DirectoryNotEmpty | io::ErrorKind::AlreadyExists => {
                PkiError::Exists(target.to_owned())
            }
            _ => io_error("create", target)(error),
        })
    });
    if written.is_err() {
        // The first error is the one worth telling; what is left over carries `.partial` in its name.
        let _ = fs::remove_dir_all(&partial);
        return written;
    }
    sync_folder(parent)
}

fn write_files(dir: &Path, files: &[(&str, &str, u32)]) -> Result<(), PkiError> {
    fs::DirBuilder::new()
        .mode(0o700)
        .create(dir)
        .map_err(io_error("create", dir))?;
    for (name, text, mode) in files {
        let path = dir.join(name);
        fs::OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(*mode)
            .open(&path)
            .and_then(|mut file| {
                file.write_all(text.as_bytes())?;
                file.sync_all()
            })
            .map_err(io_error("write", &path))?;
    }
    sync_folder(dir)
}

pub(super) fn sync_folder(dir: &Path) -> Result<(), PkiError> {
    fs::File::open(dir)
        .and_then(|dir| dir.sync_all())
        .map_err(io_error("sync", dir))
}
