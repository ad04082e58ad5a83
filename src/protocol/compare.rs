//! Comparing by hashes: which blocks hold the same on the primary and the replica.
//!
//! The primary asks with a [`Question`]: hashes of some of its blocks, or that they are zeros. The replica hashes the
//! same blocks of the point the question names and answers in which of them it holds something else ([`Differing`]). Both
//! are bounded by named limits, and are checked before anything is done with them.
//!
//! # Why 16 bytes of SHA-256 are enough
//! Two blocks that differ are taken for equal with a chance of 2^-128; over all blocks of 64 TiB that is 2^-94. Somebody who
//! writes a disk on purpose so that two of his blocks have one hash needs 2^64 steps, and gains a block of his own disk that
//! is stale on the replica.

use std::{fmt, ops::Range, sync::OnceLock};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use crate::base::{
    checksum::Sha256,
    ids::Lineage,
    limits::MESSAGE_BYTES_MAX,
    units::{BLOCK_BYTES, DiskIndex, Extent, MIB, to_u64, to_usize},
};

/// Blocks that one question tells by their hashes, at most: 1 MiB to read and to hash on either side.
pub const HASHES_MAX: u64 = MIB / BLOCK_BYTES;
/// Blocks that one question says are zeros, at most: 64 MiB, which the replica may have to read.
pub const ZERO_BLOCKS_MAX: u64 = 64 * MIB / BLOCK_BYTES;
/// Runs of one question, at most.
pub const SAMPLES_MAX: usize = 128;
/// Questions on the way, at most: with [`HASHES_MAX`] enough for 600 MB/s over a round trip of 50 ms.
pub const QUESTIONS_MAX: u64 = 32;

/// Bytes of a block's hash.
const HASH_BYTES: usize = 16;
const BLOCKS_MAX: u64 = HASHES_MAX + ZERO_BLOCKS_MAX;

const _: () = assert!(
    MESSAGE_BYTES_MAX > to_usize(HASHES_MAX) * HASH_BYTES * 2 + SAMPLES_MAX * 100 + 1024,
    "the largest question fits a message"
);
const _: () = assert!(
    MESSAGE_BYTES_MAX > to_usize(BLOCKS_MAX) / 2 * 14 + 1024,
    "the answer in which every other block differs fits a message"
);

/// The beginning of the SHA-256 of one block, or of what a disk has of its last one.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct BlockHash([u8; HASH_BYTES]);

impl BlockHash {
    /// Of these bytes, at most a block.
    pub fn of(block: &[u8]) -> Self {
        let mut hash = Sha256::default();
        hash.update(block);
        let mut bytes = [0; HASH_BYTES];
        bytes.copy_from_slice(&hash.finish().0[..HASH_BYTES]);
        Self(bytes)
    }

    /// Of a whole block of zeros.
    pub fn of_zeros() -> Self {
        static BLOCK: OnceLock<BlockHash> = OnceLock::new();
        *BLOCK.get_or_init(|| Self::of(&[0; to_usize(BLOCK_BYTES)]))
    }
}

impl fmt::Debug for BlockHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// Hashes of blocks that follow each other; in text one string of hexadecimal digits.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Hashes(pub Vec<BlockHash>);

impl Hashes {
    /// Of the blocks of `bytes`, which begin with a block.
    pub fn of(bytes: &[u8]) -> Self {
        let blocks = bytes.chunks(to_usize(BLOCK_BYTES));
        Self(blocks.map(BlockHash::of).collect())
    }
}

impl Serialize for Hashes {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let digit = |nibble: u8| char::from_digit(nibble.into(), 16).expect("a nibble is a digit");
        let bytes = self.0.iter().flat_map(|hash| hash.0);
        let text: String = bytes
            .flat_map(|byte| [digit(byte >> 4), digit(byte & 15)])
            .collect();
        serializer.serialize_str(&text)
    }
}

impl<'de> Deserialize<'de> for Hashes {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        parse(text.as_bytes()).ok_or_else(|| de::Error::custom("these are no hashes of blocks"))
    }
}

fn parse(digits: &[u8]) -> Option<Hashes> {
    let value = |digit: &u8| {
        let value = char::from(*digit).to_digit(16)?;
        u8::try_from(value).ok()
    };
    let (texts, rest) = digits.as_chunks::<{ HASH_BYTES * 2 }>();
    let hash = |text: &[u8; HASH_BYTES * 2]| {
        let mut hash = [0; HASH_BYTES];
        for (byte, [high, low]) in hash.iter_mut().zip(text.as_chunks::<2>().0) {
            *byte = value(high)? << 4 | value(low)?;
        }
        Some(BlockHash(hash))
    };
    let hashes = texts.iter().map(hash).collect::<Option<_>>()?;
    rest.is_empty().then_some(Hashes(hashes))
}

/// A run of one disk in a question.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sample {
    /// The disk.
    pub disk: DiskIndex,
    /// Where the run begins, in bytes: at a block.
    pub offset: u64,
    /// Its length in bytes: whole blocks, or to the end of the disk.
    pub len: u64,
    /// The hash of each block; nothing if all of them are zeros.
    pub hashes: Option<Hashes>,
}

impl Sample {
    /// Where it is.
    pub fn run(&self) -> Extent {
        Extent::new(self.offset, self.len)
    }
}

/// Where the blocks of a question are.
pub fn runs_of(samples: &[Sample]) -> Vec<(DiskIndex, Extent)> {
    let runs = samples.iter().map(|sample| (sample.disk, sample.run()));
    runs.collect()
}

/// What the primary holds in some blocks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Question {
    /// Counted from 1 on each connection; the answer carries it.
    pub number: u64,
    /// The point of the replica to compare with.
    pub at: Lineage,
    /// The runs, whose blocks are counted through from 0.
    pub samples: Vec<Sample>,
}

impl Question {
    /// Refuses a question beyond the limits, or that does not fit disks of these `sizes` in bytes.
    pub fn check(&self, sizes: &[u64]) -> Result<(), &'static str> {
        if self.samples.len() > SAMPLES_MAX {
            return Err("it asks for too many runs");
        }
        let (mut hashes, mut zeros) = (0, 0);
        for sample in &self.samples {
            let size = *sizes
                .get(sample.disk.index())
                .ok_or("it asks for a disk that is not there")?;
            let run = sample.run();
            let end = run.checked_end().filter(|end| *end <= size);
            let end = end.ok_or("it asks for blocks outside of a disk")?;
            let whole = end.is_multiple_of(BLOCK_BYTES) || end == size;
            if run.len == 0 || !run.offset.is_multiple_of(BLOCK_BYTES) || !whole {
                return Err("it asks for parts of blocks");
            }
            let blocks = run.len.div_ceil(BLOCK_BYTES);
            match &sample.hashes {
                Some(told) if to_u64(told.0.len()) != blocks => {
                    return Err("it has not one hash for each block");
                }
                Some(_) => hashes += blocks,
                // Checked one by one, so that the sum cannot overflow.
                None if blocks > ZERO_BLOCKS_MAX => return Err("it asks for too many blocks"),
                None => zeros += blocks,
            }
        }
        if hashes > HASHES_MAX || zeros > ZERO_BLOCKS_MAX {
            return Err("it asks for too many blocks");
        }
        Ok(())
    }
}

/// The answer to a question: the runs of blocks in which the replica holds something else, as the number of the first one
/// and how many. Ascending, not touching.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Differing(Vec<(u64, u64)>);

impl Differing {
    /// Adds block `number`, which is above all that are in it.
    pub fn push(&mut self, number: u64) {
        match self.0.last_mut() {
            Some((first, count)) if *first + *count == number => *count += 1,
            _ => self.0.push((number, 1)),
        }
    }

    /// Where the blocks are, if this is an answer about the blocks of these `runs`.
    pub fn places(&self, runs: &[(DiskIndex, Extent)]) -> Option<Vec<(DiskIndex, Extent)>> {
        let blocks = runs.iter().map(|(_, run)| run.len.div_ceil(BLOCK_BYTES));
        let mut places = Vec::new();
        for numbers in self.runs(blocks.sum())? {
            let mut first = 0;
            for (disk, run) in runs {
                let here = first..first + run.len.div_ceil(BLOCK_BYTES);
                first = here.end;
                let from = numbers.start.max(here.start);
                let to = numbers.end.min(here.end);
                if from < to {
                    let offset = run.offset + (from - here.start) * BLOCK_BYTES;
                    let end = run.offset + (to - here.start) * BLOCK_BYTES;
                    places.push((*disk, Extent::new(offset, end.min(run.end()) - offset)));
                }
            }
        }
        Some(places)
    }

    /// The runs of numbers, if this is an answer about `blocks` blocks.
    pub fn runs(&self, blocks: u64) -> Option<impl Iterator<Item = Range<u64>>> {
        let mut after = 0;
        let sound = self.0.iter().all(|&(first, count)| {
            let end = first.checked_add(count);
            let inside = first >= after && count > 0 && end.is_some_and(|end| end <= blocks);
            after = end.unwrap_or(u64::MAX);
            inside
        });
        let runs = self.0.iter().map(|&(first, count)| first..first + count);
        sound.then_some(runs)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{
        base::{checksum::Digest, units::Epoch},
        protocol::message::{ToPrimary, ToReplica, decode_to_primary, decode_to_replica, encode},
    };

    const SIZES: [u64; 2] = [128 * MIB, 10_000];

    fn question(samples: Vec<Sample>) -> Question {
        let at = Lineage {
            epoch: Epoch(7),
            chain: Digest([255; 32]),
        };
        Question {
            number: u64::MAX,
            at,
            samples,
        }
    }

    fn sample(disk: u16, offset: u64, len: u64, hashes: Option<u64>) -> Sample {
        let hashes = hashes.map(|count| Hashes(vec![BlockHash::of(b"x"); to_usize(count)]));
        Sample {
            disk: DiskIndex(disk),
            offset,
            len,
            hashes,
        }
    }

    #[test]
    fn the_hash_is_the_beginning_of_sha_256() {
        assert_eq!(
            format!("{:?}", BlockHash::of(b"abc")),
            "ba7816bf8f01cfea414140de5dae2223"
        );
        assert_eq!(BlockHash::of_zeros(), BlockHash::of(&[0; 4096]));
    }

    #[test]
    fn questions_beyond_the_limits_or_the_disks_are_refused() {
        let check = |samples| question(samples).check(&SIZES);
        assert_eq!(check(vec![sample(0, 4096, 8192, Some(2))]), Ok(()));
        assert_eq!(
            check(vec![sample(1, 8192, 1808, Some(1))]),
            Ok(()),
            "the tail"
        );
        assert_eq!(check(vec![sample(0, 0, 64 * MIB, None)]), Ok(()));
        for (bad, why) in [
            (sample(2, 0, 4096, None), "a disk that is not there"),
            (sample(1, 8192, 4096, None), "outside"),
            (sample(0, u64::MAX - 4095, 8192, None), "outside"),
            (sample(0, 0, 0, Some(0)), "parts of blocks"),
            (sample(0, 512, 4096, None), "parts of blocks"),
            (sample(0, 0, 4095, None), "parts of blocks"),
            (sample(0, 0, 8192, Some(1)), "one hash"),
            (sample(0, 0, 2 * MIB, Some(512)), "too many blocks"),
            (sample(0, 0, 65 * MIB, None), "too many blocks"),
        ] {
            let error = check(vec![bad.clone()]).unwrap_err();
            assert!(error.contains(why), "{bad:?}: {error}");
        }
        let many = vec![sample(0, 0, 4096, None); SAMPLES_MAX + 1];
        assert!(check(many).is_err());
        let together = vec![sample(0, 0, 64 * MIB, None); 2];
        assert!(check(together).is_err());
    }

    #[test]
    fn the_largest_question_and_the_largest_answer_fit_a_message() {
        let scattered = (0..to_u64(SAMPLES_MAX)).map(|n| {
            let count = HASHES_MAX / to_u64(SAMPLES_MAX);
            sample(0, n * MIB, count * BLOCK_BYTES, Some(count))
        });
        let question = ToReplica::Compare(question(scattered.collect()));
        assert_eq!(decode_to_replica(&encode(&question)).unwrap(), question);
        let mut differs = Differing::default();
        (0..BLOCKS_MAX).step_by(2).for_each(|n| differs.push(n));
        let answer = ToPrimary::Compared {
            number: u64::MAX,
            differs: Some(differs),
        };
        assert_eq!(decode_to_primary(&encode(&answer)).unwrap(), answer);
    }

    #[test]
    fn an_answer_names_places_across_runs() {
        let runs = [
            (DiskIndex(0), Extent::new(4096, 8192)),
            (DiskIndex(1), Extent::new(0, 10_000)),
        ];
        let mut differs = Differing::default();
        for number in [1, 2, 4] {
            differs.push(number);
        }
        let places = [
            (DiskIndex(0), Extent::new(8192, 4096)),
            (DiskIndex(1), Extent::new(0, 4096)),
            (DiskIndex(1), Extent::new(8192, 1808)),
        ];
        assert_eq!(differs.places(&runs).unwrap(), places);
        differs.push(5);
        assert_eq!(differs.places(&runs), None, "there are five blocks");
    }

    proptest! {
        /// Whatever a replica answers, the runs are inside of what was asked, ascending and apart; or there are none.
        #[test]
        fn an_answer_is_sound_or_nothing(pairs in prop::collection::vec((0..40_u64, 0..9_u64), 0..6), far in any::<bool>()) {
            let mut pairs = pairs;
            if far {
                pairs.push((u64::MAX, u64::MAX));
            }
            if let Some(runs) = Differing(pairs).runs(32) {
                let mut after = 0;
                for run in runs {
                    prop_assert!(run.start >= after && run.start < run.end && run.end <= 32);
                    after = run.end;
                }
            }
        }

        #[test]
        fn an_answer_holds_what_was_put_in(numbers in prop::collection::btree_set(0..200_u64, 0..60)) {
            let mut differs = Differing::default();
            for &number in &numbers {
                differs.push(number);
            }
            let found: Vec<u64> = differs.runs(200).unwrap().flatten().collect();
            prop_assert_eq!(found, numbers.into_iter().collect::<Vec<_>>());
        }

        #[test]
        fn a_mutated_question_is_read_or_refused(at in 0_usize..2000, byte in any::<u8>()) {
            let samples = vec![sample(0, 0, 8192, Some(2)), sample(1, 8192, 1808, None)];
            let mut bytes = encode(&ToReplica::Compare(question(samples)));
            let at = at % bytes.len();
            bytes[at] = byte;
            if let Ok(ToReplica::Compare(question)) = decode_to_replica(&bytes) {
                let _ = question.check(&SIZES);
            }
        }

        #[test]
        fn no_text_panics_the_hashes(text in ".{0,80}") {
            let _ = serde_json::from_value::<Hashes>(text.into());
        }
    }
}
