//! The hot regions as the intent log's table in `src/track/intent.rs` describes its records, read without the product.

use std::collections::BTreeSet;

/// What one record of the intent log does to the hot regions.
#[derive(Clone, Debug)]
pub(crate) struct Change {
    /// Whether it is a checkpoint: nothing older counts.
    anew: bool,
    regions: Vec<u64>,
}

impl Change {
    /// The change in the record `bytes`.
    pub(crate) fn parse(bytes: &[u8]) -> Self {
        let number = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
        let count = u32::from_le_bytes(bytes[4..8].try_into().unwrap());
        let count = usize::try_from(count).unwrap();
        Self {
            anew: number(16) == 0,
            regions: (0..count).map(|index| number(24 + 8 * index)).collect(),
        }
    }

    /// The hot regions after it, if they were `hot` before.
    pub(crate) fn apply(&self, hot: &BTreeSet<u64>) -> BTreeSet<u64> {
        let kept = hot.iter().filter(|_| !self.anew);
        kept.chain(&self.regions).copied().collect()
    }
}
