//! Taking identities back: the authority's list of revoked certificates, `ca.crl`, signed by it and copied to the hosts.
//!
//! An authority notes each identity that it issues, as a line `SERIAL NAME` of the file `issued` in its folder, before the
//! identity exists. To revoke a name is to revoke all that was ever issued to it; an identity of before there was that
//! file is revoked by its certificate.
//!
//! # Crash contract
//! A line of `issued` is durable before the identity is. The list is written beside its place, made durable and renamed:
//! there is the old one or the new one. What is on a list is on every later one.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    fs,
    io::Write as _,
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    time::Duration,
};

use rcgen::{
    CertificateRevocationListParams, KeyIdMethod, RevokedCertParams, SerialNumber, date_time_ymd,
};
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, pem::PemObject};

use super::{
    identity::seconds,
    pki::{self, PkiError, after, io_error, sync_folder},
};
use crate::base::{clock::Timestamp, ids::Name};

/// File name of the list in an authority's folder.
pub const CA_LIST: &str = "ca.crl";
/// How long a list is valid: hosts complain about one that is older.
pub const LIST_VALID: Duration = Duration::from_hours(90 * 24);
const ISSUED: &str = "issued";

/// A list that was made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct List {
    /// The file.
    pub path: PathBuf,
    /// Certificates that were not on the list before.
    pub added: usize,
    /// Certificates on the list.
    pub revoked: usize,
    /// When hosts begin to complain about it.
    pub valid_until: Timestamp,
}

/// Certificates by their serial numbers, with the time of their revocation.
type Revoked = BTreeMap<Vec<u8>, Timestamp>;

/// Revokes everything that the authority in `ca` issued to `names`, and the certificates in the files `certificates`. With
/// neither it signs the list it has for another [`LIST_VALID`].
///
/// # Errors
/// If nothing was issued to a name, or a certificate is another authority's: then nothing is revoked.
pub fn revoke(
    ca: &Path,
    names: &[Name],
    certificates: &[PathBuf],
    now: Timestamp,
) -> Result<List, PkiError> {
    let (_, issuer, _) = pki::load_ca(ca)?;
    let path = ca.join(CA_LIST);
    let (number, mut revoked) = list(&path)?;
    let before = revoked.len();
    let issued = issued(ca)?;
    for name in names {
        let same = |to: &Name| to.as_str().eq_ignore_ascii_case(name.as_str());
        let own = issued.iter().filter(|(_, to)| same(to));
        let serials: Vec<_> = own.map(|(serial, _)| serial.clone()).collect();
        if serials.is_empty() {
            return Err(PkiError::NotIssued(name.clone()));
        }
        for serial in serials {
            revoked.entry(serial).or_insert(now);
        }
    }
    for file in certificates {
        revoked.entry(serial_of(ca, file)?).or_insert(now);
    }
    let valid_until = after(now, LIST_VALID);
    let date = |at: Timestamp| date_time_ymd(1970, 1, 1) + Duration::from_micros(at.0);
    let entries = revoked.iter().map(|(serial, at)| RevokedCertParams {
        serial_number: SerialNumber::from_slice(serial),
        revocation_time: date(*at),
        reason_code: None,
        invalidity_date: None,
    });
    let params = CertificateRevocationListParams {
        this_update: date(now),
        next_update: date(valid_until),
        crl_number: SerialNumber::from(number.saturating_add(1)),
        issuing_distribution_point: None,
        revoked_certs: entries.collect(),
        key_identifier_method: KeyIdMethod::Sha256,
    };
    replace(&path, &params.signed_by(&issuer)?.pem()?)?;
    Ok(List {
        path,
        added: revoked.len() - before,
        revoked: revoked.len(),
        valid_until,
    })
}

/// Notes what is about to be issued, durably.
pub(super) fn note(
    ca: &Path,
    certificate: &CertificateDer<'_>,
    name: &Name,
) -> Result<(), PkiError> {
    let path = ca.join(ISSUED);
    let (_, certificate) = x509_parser::parse_x509_certificate(certificate)
        .expect("a certificate that was just made can be read");
    let line = format!("{} {name}\n", hex(certificate.raw_serial()));
    fs::OpenOptions::new()
        .append(true)
        .create(true)
        .mode(0o600)
        .open(&path)
        .and_then(|mut file| {
            file.write_all(line.as_bytes())?;
            file.sync_all()
        })
        .map_err(io_error("write", &path))?;
    sync_folder(ca)
}

/// Serial numbers and names, as far as they were noted. A line that a power cut left unfinished belongs to an identity
/// that never came to be.
fn issued(ca: &Path) -> Result<Vec<(Vec<u8>, Name)>, PkiError> {
    let path = ca.join(ISSUED);
    let text = match fs::read_to_string(&path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => String::new(),
        read => read.map_err(io_error("read", &path))?,
    };
    let lines = text.lines().filter_map(|line| {
        let (serial, name) = line.split_once(' ')?;
        Some((unhex(serial)?, Name::new(name).ok()?))
    });
    Ok(lines.collect())
}

/// The number of the list that is there, and who is on it.
fn list(path: &Path) -> Result<(u64, Revoked), PkiError> {
    let pem = match fs::read(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            return Ok((0, Revoked::new()));
        }
        read => read.map_err(io_error("read", path))?,
    };
    let bad = |problem: &str| PkiError::BadCa {
        path: path.to_owned(),
        problem: problem.to_owned(),
    };
    let der = CertificateRevocationListDer::from_pem_slice(&pem)
        .map_err(|_| bad("no list of revoked certificates in PEM form"))?;
    let (_, list) =
        x509_parser::parse_x509_crl(&der).map_err(|_| bad("no list of revoked certificates"))?;
    let number = list.crl_number().map_or(0, |number| {
        let digits = number.to_bytes_be();
        let digits = digits.iter().rev().take(8).rev();
        digits.fold(0, |number, &digit| number << 8 | u64::from(digit))
    });
    let revoked = list.iter_revoked_certificates().map(|revoked| {
        let at = seconds(revoked.revocation_date.timestamp());
        (revoked.raw_serial().to_vec(), at)
    });
    Ok((number, revoked.collect()))
}

/// The serial number of a certificate of this authority.
fn serial_of(ca: &Path, file: &Path) -> Result<Vec<u8>, PkiError> {
    let bad = |problem: &str| PkiError::BadCertificate {
        path: file.to_owned(),
        problem: problem.to_owned(),
    };
    let certificate =
        CertificateDer::from_pem_slice(&fs::read(file).map_err(io_error("read", file))?)
            .map_err(|_| bad("no certificate in PEM form"))?;
    let (_, certificate) = x509_parser::parse_x509_certificate(&certificate)
        .map_err(|_| bad("no X.509 certificate"))?;
    let own = pki::ca_certificate(ca)?;
    let (_, own) = x509_parser::parse_x509_certificate(&own)
        .map_err(|_| bad("its authority cannot be read"))?;
    if own.subject().as_raw() != certificate.issuer().as_raw() {
        return Err(bad("another authority issued it"));
    }
    Ok(certificate.raw_serial().to_vec())
}

fn replace(path: &Path, text: &str) -> Result<(), PkiError> {
    let mut partial = path.as_os_str().to_owned();
    partial.push(format!(".{}.partial", std::process::id()));
    let partial = PathBuf::from(partial);
    let written = fs::File::create(&partial).and_then(|mut file| {
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        fs::rename(&partial, path)
    });
    if written.is_err() {
        // The first error is the one worth telling.
        let _ = fs::remove_file(&partial);
    }
    written.map_err(io_error("write", path))?;
    sync_folder(path.parent().unwrap_or_else(|| Path::new(".")))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        write!(text, "{byte:02x}").expect("writing to a string does not fail");
        text
    })
}

fn unhex(text: &str) -> Option<Vec<u8>> {
    let pairs = text.as_bytes().chunks(2);
    let byte = |pair: &[u8]| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok();
    pairs.map(byte).collect()
}
