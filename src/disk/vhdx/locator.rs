//! The parent locator: how a differencing image names its parent (MS-VHDX section 2.6.2.6).
//!
//! | offset | bytes | what |
//! |---|---|---|
//! | 0 | 16 | type of the locator; [`VHDX_LOCATOR`] is the only one known |
//! | 16 | 2 | reserved |
//! | 18 | 2 | number of entries |
//! | 20 | 12 each | offset of key, offset of value (4 bytes each, from the start of the item), length of each (2 bytes each) |
//!
//! Keys and values are UTF-16LE without an end mark. What they say is text from a file that nobody vouches for.

use uuid::Uuid;

use crate::base::units::to_usize;

use super::format::{VHDX_LOCATOR, u32_at};

const HEADER_BYTES: usize = 20;
const ENTRY_BYTES: usize = 12;
/// Most entries of a locator: Microsoft's own bound. Windows writes five.
const ENTRIES_MAX: usize = 256;
/// The parent's `DataWriteGuid`.
const LINKAGE: &str = "parent_linkage";
/// One more that it may have, while a merge changes it; all zeros stands for none.
const LINKAGE2: &str = "parent_linkage2";
/// Keys of paths, in the order to try them.
const PATHS: [&str; 3] = ["relative_path", "volume_path", "absolute_win32_path"];

/// A parent locator.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Locator {
    /// What its entries mean.
    pub(super) id: Uuid,
    /// Keys and values, in the order of the file.
    pub(super) entries: Vec<(String, String)>,
}

impl Locator {
    /// The locator of a child of the image whose `DataWriteGuid` is `linkage`, as Windows writes it.
    pub(super) fn new(linkage: Uuid, paths: [Option<&str>; 3]) -> Self {
        let braced = |id: Uuid| id.braced().to_string();
        let linkages = [(LINKAGE, braced(linkage)), (LINKAGE2, braced(Uuid::nil()))];
        let paths = PATHS.into_iter().zip(paths);
        let paths = paths.filter_map(|(key, path)| Some((key, path?.to_owned())));
        let entries = linkages.into_iter().chain(paths);
        Self {
            id: VHDX_LOCATOR,
            entries: entries.map(|(key, value)| (key.into(), value)).collect(),
        }
    }

    /// Reads a locator; an error says what is wrong with it.
    pub(super) fn decode(item: &[u8]) -> Result<Self, String> {
        let short = || format!("{} bytes are too few", item.len());
        let header = item.get(..HEADER_BYTES).ok_or_else(short)?;
        let id = Uuid::from_bytes_le(header[..16].try_into().expect("sixteen bytes"));
        let count = usize::from(u16_at(header, 18));
        if !(1..=ENTRIES_MAX).contains(&count) {
            return Err(format!("it has {count} entries"));
        }
        let table = item[HEADER_BYTES..]
            .get(..count * ENTRY_BYTES)
            .ok_or_else(short)?;
        let mut entries: Vec<(String, String)> = Vec::with_capacity(count);
        for entry in table.chunks_exact(ENTRY_BYTES) {
            let key = text(item, u32_at(entry, 0), u16_at(entry, 8))?;
            let value = text(item, u32_at(entry, 4), u16_at(entry, 10))?;
            if entries.iter().any(|(other, _)| *other == key) {
                return Err(format!("the key {key:?} is there twice"));
            }
            entries.push((key, value));
        }
        Ok(Self { id, entries })
    }

    /// As it stands in the metadata.
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut bytes = self.id.to_bytes_le().to_vec();
        bytes.extend([0; 2]);
        let small = |len: usize| u16::try_from(len).expect("keys and paths are short");
        bytes.extend(small(self.entries.len()).to_le_bytes());
        let mut at = HEADER_BYTES + self.entries.len() * ENTRY_BYTES;
        let mut texts = Vec::new();
        for (key, value) in &self.entries {
            let [key, value] = [key, value].map(|text| {
                let bytes = text.encode_utf16().flat_map(u16::to_le_bytes);
                bytes.collect::<Vec<u8>>()
            });
            for offset in [at, at + key.len()] {
                let offset = u32::try_from(offset).expect("an item has at most 1 MiB");
                bytes.extend(offset.to_le_bytes());
            }
            for len in [key.len(), value.len()] {
                bytes.extend(small(len).to_le_bytes());
            }
            at += key.len() + value.len();
            texts.extend(key);
            texts.extend(value);
        }
        bytes.extend(texts);
        bytes
    }

    /// The identities of which the parent must have one. All zeros stands for none and never matches.
    pub(super) fn linkages(&self) -> Vec<Uuid> {
        let linkage = |key| Uuid::try_parse(self.value(key)?).ok();
        let linkages = [LINKAGE, LINKAGE2].into_iter().filter_map(linkage);
        linkages.filter(|id| !id.is_nil()).collect()
    }

    /// The parent's paths, in the order to try them.
    pub(super) fn paths(&self) -> Vec<String> {
        let paths = PATHS.into_iter().filter_map(|key| self.value(key));
        paths.map(str::to_owned).collect()
    }

    fn value(&self, key: &str) -> Option<&str> {
        let found = self.entries.iter().find(|(other, _)| other == key);
        found.map(|(_, value)| value.as_str())
    }
}

fn text(item: &[u8], offset: u32, len: u16) -> Result<String, String> {
    let (start, len) = (to_usize(u64::from(offset)), usize::from(len));
    let bytes = start
        .checked_add(len)
        .and_then(|end| item.get(start..end))
        .filter(|bytes| start > 0 && !bytes.is_empty() && bytes.len().is_multiple_of(2));
    let wrong = || format!("no text can be {len} bytes at {start:#x} of it");
    let (units, _) = bytes.ok_or_else(wrong)?.as_chunks::<2>();
    let units = units.iter().map(|unit| u16::from_le_bytes(*unit));
    let text: Result<String, _> = char::decode_utf16(units).collect();
    text.ok()
        .filter(|text| !text.contains('\0'))
        .ok_or_else(|| format!("the text at {start:#x} of it is not UTF-16"))
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: Uuid = Uuid::from_u128(0x0011_2233_4455_6677_8899_AABB_CCDD_EEFF);

    fn locator() -> Locator {
        Locator::new(ID, [Some(r".\parent.vhdx"), None, Some(r"C:\parent.vhdx")])
    }

    #[test]
    fn what_is_written_is_read() {
        let bytes = locator().encode();
        assert_eq!(Locator::decode(&bytes), Ok(locator()));
        assert_eq!(
            bytes[..20],
            [
                0xb7, 0xef, 0x4a, 0xb0, 0x9e, 0xd1, 0x81, 0x4a, 0xb7, 0x89, 0x25, 0xb8, 0xe9, 0x44,
                0x59, 0x13, 0, 0, 4, 0
            ]
        );
        let value = |key| locator().value(key).map(str::to_owned);
        assert_eq!(
            value(LINKAGE).unwrap(),
            "{00112233-4455-6677-8899-aabbccddeeff}"
        );
        assert_eq!(
            value(LINKAGE2).unwrap(),
            "{00000000-0000-0000-0000-000000000000}"
        );
    }

    #[test]
    fn linkages_are_compared_in_any_case_and_zeros_are_none() {
        let mut locator = locator();
        assert_eq!(locator.linkages(), [ID]);
        locator.entries[0].1 = locator.entries[0].1.to_uppercase();
        assert_eq!(locator.linkages(), [ID]);
        locator.entries[1].1 = Uuid::max().to_string();
        assert_eq!(locator.linkages(), [ID, Uuid::max()]);
        locator.entries[0].1 = Uuid::nil().braced().to_string();
        assert_eq!(locator.linkages(), [Uuid::max()]);
        locator.entries[1].0 = "Parent_Linkage2".into();
        assert!(locator.linkages().is_empty(), "keys have a case");
        locator.entries[0].1 = "{}".into();
        assert!(locator.linkages().is_empty());
    }

    #[test]
    fn paths_are_tried_relative_first() {
        let mut locator = locator();
        locator.entries.reverse();
        assert_eq!(locator.paths(), [r".\parent.vhdx", r"C:\parent.vhdx"]);
    }

    #[test]
    fn every_field_is_checked() {
        let breaks: [(&str, usize, &[u8]); 9] = [
            ("no entry", 18, &[0, 0]),
            ("more entries than fit", 18, &[200, 0]),
            ("too many", 18, &[1, 1]),
            ("key at zero", 20, &[0, 0, 0, 0]),
            ("key past the end", 20, &[0, 0, 0xFF, 0xFF]),
            ("value past the end", 24, &[0xFF, 0xFF, 0xFF, 0xFF]),
            ("odd length", 28, &[27, 0]),
            ("no length", 30, &[0, 0]),
            ("half a pair of surrogates", 20 + 48, &[0, 0xD8]),
        ];
        for (name, at, change) in breaks {
            let mut bytes = locator().encode();
            bytes[at..at + change.len()].copy_from_slice(change);
            assert!(Locator::decode(&bytes).is_err(), "{name}");
        }
        let mut twice = locator();
        twice.entries[1].0 = LINKAGE.into();
        Locator::decode(&twice.encode()).unwrap_err();
        for len in 0..locator().encode().len() {
            Locator::decode(&locator().encode()[..len]).unwrap_err();
        }
    }
}
