//! What `image inspect` says of a VHD.

use super::inspect::Rows;
use crate::{base::units::Bytes, disk::vhd};

/// Footers, header, table and parent.
pub(super) fn vhd_rows(vhd: &vhd::Inspection) -> Rows {
    let mut rows = vec![("kind", format!("{:?}", vhd.kind))];
    for (label, footer) in [("footer", &vhd.tail), ("footer copy", &vhd.head)] {
        let Some(footer) = footer else {
            if vhd.kind != vhd::Kind::Fixed || label == "footer" {
                rows.push((label, "missing".into()));
            }
            continue;
        };
        let vhd::Chs {
            cylinders,
            heads,
            sectors,
        } = footer.geometry;
        rows.push((
            label,
            format!(
                "at {:#x}, checksum {}, by {}, id {}",
                footer.offset,
                good_or_wrong(footer.checksum_good),
                footer.creator,
                footer.id
            ),
        ));
        rows.push((
            "",
            format!(
                "{} bytes, {} when it was made, geometry {cylinders}/{heads}/{sectors}",
                footer.current_size, footer.original_size
            ),
        ));
    }
    if let Some(dynamic) = &vhd.dynamic {
        rows.push((
            "header",
            format!(
                "at {:#x}, checksum {}, blocks of {}",
                dynamic.offset,
                good_or_wrong(dynamic.checksum_good),
                Bytes(dynamic.block_size)
            ),
        ));
        rows.push((
            "table",
            format!(
                "{} entries at {:#x}",
                dynamic.bat_entries, dynamic.bat_offset
            ),
        ));
        rows.push((
            "blocks",
            format!(
                "{}: {} present, {} damaged",
                dynamic.blocks, dynamic.blocks_present, dynamic.blocks_damaged
            ),
        ));
        if let Some(parent) = &dynamic.parent {
            rows.push(("parent", format!("{:?}, id {}", parent.name, parent.id)));
            for locator in &parent.locators {
                rows.push(("", format!("{} {:?}", locator.platform, locator.path)));
            }
        }
    }
    rows
}

fn good_or_wrong(good: bool) -> &'static str {
    if good { "good" } else { "wrong" }
}
