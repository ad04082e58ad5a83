//! Checks a VHDX file against the rules of the format, without changing it.

use std::sync::Arc;

use crate::{disk::check::Report, storage::Storage};

use super::survey::Survey;

/// Everything that is wrong with the file in `storage`.
pub fn check(storage: &Arc<dyn Storage>) -> Report {
    Survey::of(storage).report
}
