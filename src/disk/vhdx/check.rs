//! Checks a VHDX file against the rules of the format, without changing it.

use std::{error::Error as _, sync::Arc};

use crate::{disk::check::Report, storage::Storage};

use super::open::{Image, Replaying};

/// Everything that is wrong with the file in `storage`.
pub fn check(storage: &Arc<dyn Storage>) -> Report {
    let mut report = Report::default();
    if let Err(error) = Image::read(Arc::clone(storage), &Replaying::InMemory) {
        let source = error.source().map(|source| format!(": {source}"));
        report.error(
            "file",
            None,
            format!("{error}{}", source.unwrap_or_default()),
        );
    }
    report
}
