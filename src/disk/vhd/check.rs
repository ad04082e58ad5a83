//! Checks a VHD file against the rules of the format, without changing it.

use std::{error::Error as _, sync::Arc};

use crate::{
    base::units::Bytes,
    disk::{check::Report, vhd::Kind},
    storage::Storage,
};

use super::{
    footer::Footers,
    open::{Image, Sparse},
};

/// Everything that is wrong with the file in `storage`. Parents are not looked at.
pub fn check(storage: &Arc<dyn Storage>) -> Report {
    let mut report = Report::default();
    let storage = storage.as_ref();
    let image = match Image::read_leniently(storage) {
        Ok(image) => image,
        Err(error) => {
            let source = error.source().map(|source| format!(": {source}"));
            let text = format!("{error}{}", source.unwrap_or_default());
            report.error("file", None, text);
            return report;
        }
    };
    check_footers(&image, &mut report);
    if let Some(sparse) = &image.sparse {
        check_sparse(&image, sparse, &mut report);
    } else if image.current.offset > image.size {
        let unused = image.current.offset - image.size;
        report.warning("file", image.size, format!("{} unused", Bytes(unused)));
    }
    report
}

fn check_footers(image: &Image, report: &mut Report) {
    let current = &image.current;
    if !current.sealed {
        report.error("footer", current.offset, "its checksum is wrong");
    }
    if current.footer.saved_state != 0 {
        let text = "the machine was suspended with this disk: writing to it may break the machine";
        report.warning("footer", current.offset, text);
    }
    if image.kind == Kind::Fixed {
        return;
    }
    let Footers { tail, head } = &image.footers;
    for (found, at, place) in [(tail, image.len, "end"), (head, 0, "start")] {
        match found {
            None => report.warning("footer", at, format!("the {place} of the file has none")),
            Some(found) if !found.sealed => {
                report.warning("footer", found.offset, "its checksum is wrong");
            }
            Some(found) if found.bytes != current.bytes => {
                report.warning("footer", found.offset, "the copies differ");
            }
            Some(_) => {}
        }
    }
}

fn check_sparse(image: &Image, sparse: &Sparse, report: &mut Report) {
    if !sparse.header.sealed {
        report.error("header", sparse.header.offset, "its checksum is wrong");
    }
    sparse.bat.faults(&sparse.taken, &mut |fault| {
        report.error("BAT", fault.offset, fault.to_string());
        true
    });
    if image.kind == Kind::Differencing && sparse.header.parent_paths(&sparse.locators).is_empty() {
        report.error("header", sparse.header.offset, "it names no parent");
    }
    let blocks = sparse.bat.present().count();
    let blocks = u64::try_from(blocks).unwrap_or(u64::MAX);
    let structures = sparse.taken.structures.iter().map(|(_, run)| run.len);
    let used = structures.sum::<u64>() + blocks.saturating_mul(sparse.bat.stride());
    let unused = sparse.taken.limit.saturating_sub(used);
    // Less than a block is what alignment leaves.
    if unused > sparse.bat.stride() + blocks.saturating_mul(4096) {
        let text = format!("{} that no block uses", Bytes(unused));
        report.warning("file", None, text);
    }
}
