//! A file of revoked certificates: one list (CRL, RFC 5280 section 5) for each authority, in PEM form.

use std::path::Path;

use rustls::pki_types::{
    CertificateRevocationListDer,
    pem::{self, PemObject},
};

use super::identity::{IdentityError, read, seconds};
use crate::base::clock::Timestamp;

/// What a file holds.
pub(super) struct Lists {
    pub(super) der: Vec<CertificateRevocationListDer<'static>>,
    /// Certificates on all lists.
    pub(super) revoked: usize,
}

/// Reads a file; an expired list is complained about. Who signed the lists is judged with each certificate.
pub(super) fn load(path: &Path, now: Timestamp) -> Result<Lists, IdentityError> {
    let not_pem = |source| IdentityError::NotPem {
        path: path.to_owned(),
        expected: "list of revoked certificates (CRL)",
        source,
    };
    let der = CertificateRevocationListDer::pem_slice_iter(&read(path)?)
        .collect::<Result<Vec<_>, _>>()
        .map_err(not_pem)?;
    if der.is_empty() {
        return Err(not_pem(pem::Error::NoItemsFound));
    }
    let mut revoked = 0;
    for list in &der {
        let bad = |problem: String| IdentityError::BadList {
            path: path.to_owned(),
            problem,
        };
        let (_, list) =
            x509_parser::parse_x509_crl(list).map_err(|error| bad(error.to_string()))?;
        revoked += list.iter_revoked_certificates().count();
        let next = list.next_update().map(|next| seconds(next.timestamp()));
        if let Some(next) = next.filter(|&next| next < now) {
            tracing::error!(
                issuer = %list.issuer(),
                "the list of revoked certificates in {} expired at {next}: who is on it stays out, but whoever was \
                 revoked since is let in; copy a newer one and run `understudy reload`",
                path.display(),
            );
        }
    }
    Ok(Lists { der, revoked })
}
