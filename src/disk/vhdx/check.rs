//! Checks a VHDX file against the rules of the format, without changing it.

use std::sync::Arc;

use crate::{disk::check::Report, storage::Storage};

use super::open::{Image, Replaying};

/// Everything that is wrong with the file in `storage`.
pub fn check(storage: &Arc<dyn Storage>) -> Report {
    Report::of_opening(Image::read(Arc::clone(storage), &Replaying::InMemory))
}
