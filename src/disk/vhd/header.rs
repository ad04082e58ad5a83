//! The dynamic header: block size, where the table is, who the parent is.

use crate::{
    base::units::{Extent, SECTOR_BYTES},
    storage::Storage,
};

use super::{
    error::OpenError,
    format::{
        BLOCK_BYTES_MAX, BLOCK_BYTES_MIN, FOOTER_LEN, HEADER_BYTES, HEADER_LEN, Header, Locator,
        VERSION,
    },
};

/// Longest text of a parent locator, in bytes: twice the longest path of Windows.
const LOCATOR_BYTES_MAX: u32 = 128 * 1024;
/// A path relative to the child, in UTF-16, little-endian.
const RELATIVE: [u8; 4] = *b"W2ru";
/// An absolute path of Windows, likewise.
const ABSOLUTE: [u8; 4] = *b"W2ku";

/// A header that was read; each field says what it may.
#[derive(Clone, Debug)]
pub(super) struct Checked {
    pub(super) offset: u64,
    pub(super) header: Header,
    /// Whether its checksum is right.
    pub(super) sealed: bool,
}

impl Checked {
    /// Reads the header at `offset` of a file of `len` bytes, for a disk of `size` bytes.
    pub(super) fn read(
        storage: &dyn Storage,
        offset: u64,
        size: u64,
        len: u64,
    ) -> Result<Self, OpenError> {
        let refuse = |problem: String| OpenError::corrupt("header", offset, problem);
        let inside = offset.checked_add(HEADER_LEN).is_some_and(|end| end <= len);
        if offset < FOOTER_LEN || !inside {
            return Err(refuse(
                "it lies outside of the file, or over the footer".into(),
            ));
        }
        let mut bytes = [0; HEADER_BYTES];
        storage
            .read_at(offset, &mut bytes)
            .map_err(OpenError::reading("header", offset))?;
        let Some(header) = Header::decode(&bytes) else {
            return Err(refuse("it does not start with \"cxsparse\"".into()));
        };
        let sealed = Header::is_sealed(&bytes);
        let checked = Self {
            offset,
            header,
            sealed,
        };
        checked.check(size, len).map_err(refuse)?;
        Ok(checked)
    }

    /// The table's place, with all the entries it claims.
    pub(super) fn bat(&self) -> Extent {
        let Header {
            bat_offset,
            entries,
            ..
        } = self.header;
        Extent::new(bat_offset, u64::from(entries) * 4)
    }

    /// The text of each locator that may hold a path, and where it stands. `len` is the length of the file.
    pub(super) fn locators(
        &self,
        storage: &dyn Storage,
        len: u64,
    ) -> Result<Vec<(Locator, String)>, OpenError> {
        let mut found = Vec::new();
        for locator in self.header.locators {
            if locator.platform == [0; 4] {
                continue;
            }
            let place = locator.offset;
            let refuse = |problem| Err(OpenError::corrupt("parent locator", place, problem));
            if locator.len > LOCATOR_BYTES_MAX {
                return refuse(format!("it has {} bytes", locator.len));
            }
            let end = place.checked_add(u64::from(locator.len));
            if end.is_none_or(|end| end > len) {
                return refuse("it lies past the end of the file".into());
            }
            let mut bytes = vec![0; usize::try_from(locator.len).expect("a few KiB")];
            storage
                .read_at(place, &mut bytes)
                .map_err(OpenError::reading("parent locator", place))?;
            let text = match locator.platform {
                RELATIVE | ABSOLUTE => {
                    utf16(bytes.as_chunks().0.iter().copied().map(u16::from_le_bytes))
                }
                _ => String::from_utf8_lossy(&bytes).into_owned(),
            };
            found.push((locator, text));
        }
        Ok(found)
    }

    /// What the child calls its parent.
    pub(super) fn parent_name(&self) -> String {
        utf16(self.header.parent_name.iter().copied())
    }

    /// The paths at which the parent may be, in the order to try them: relative, absolute, name.
    pub(super) fn parent_paths(&self, locators: &[(Locator, String)]) -> Vec<String> {
        let of = |platform: [u8; 4]| {
            locators
                .iter()
                .filter(move |(locator, _)| locator.platform == platform)
                .map(|(_, text)| text.clone())
        };
        let mut paths: Vec<String> = of(RELATIVE)
            .chain(of(ABSOLUTE))
            .chain([self.parent_name()])
            .filter(|path| !path.is_empty())
            .collect();
        paths.dedup();
        paths
    }

    fn check(&self, size: u64, len: u64) -> Result<(), String> {
        let Header {
            bat_offset,
            version,
            entries,
            block_size,
            ..
        } = self.header;
        if version >> 16 != VERSION >> 16 {
            return Err(format!("its version is {version:#x}"));
        }
        let block_size = u64::from(block_size);
        if !block_size.is_power_of_two()
            || !(BLOCK_BYTES_MIN..=BLOCK_BYTES_MAX).contains(&block_size)
        {
            return Err(format!(
                "blocks of {block_size} bytes, not a power of two from {BLOCK_BYTES_MIN} to {BLOCK_BYTES_MAX}"
            ));
        }
        let needed = size.div_ceil(block_size);
        if u64::from(entries) < needed {
            return Err(format!("{entries} table entries for {needed} blocks"));
        }
        let end = bat_offset.checked_add(u64::from(entries) * 4);
        if !bat_offset.is_multiple_of(SECTOR_BYTES) || end.is_none_or(|end| end > len) {
            return Err(format!(
                "the table at {bat_offset:#x} is not on a sector or reaches past the end of the file"
            ));
        }
        let own = Extent::new(self.offset, HEADER_LEN);
        let bat = self.bat();
        if bat_offset < FOOTER_LEN || overlap(own, bat) {
            return Err(format!(
                "the table at {bat_offset:#x} lies over the footer or the header"
            ));
        }
        Ok(())
    }
}

/// Whether two runs share a byte.
pub(super) fn overlap(a: Extent, b: Extent) -> bool {
    let end = |run: Extent| run.offset.saturating_add(run.len);
    a.offset < end(b) && b.offset < end(a)
}

/// Text up to its first NUL; what is not text is shown as such.
fn utf16(units: impl Iterator<Item = u16>) -> String {
    char::decode_utf16(units.take_while(|&unit| unit != 0))
        .map(|unit| unit.unwrap_or(char::REPLACEMENT_CHARACTER))
        .collect()
}
