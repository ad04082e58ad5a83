//! What is done to a target.

use std::fmt;

use serde::{Serialize, Serializer};

use crate::base::units::{Bytes, KIB, MIB};

/// In which order offsets follow each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Pattern {
    /// One after the other, from the start again after the end.
    Sequential,
    /// Any aligned offset, the same ones for every target.
    Random,
}

/// What is done at an offset.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Direction {
    /// Reading.
    Read,
    /// Writing.
    Write,
    /// Writing, and making it durable with fdatasync(2) before the next operation.
    WriteSync,
}

/// A pattern, a direction, a size and a depth.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Workload {
    /// Order of offsets.
    pub pattern: Pattern,
    /// Read or write.
    pub direction: Direction,
    /// Bytes of one operation; a multiple of 4 KiB.
    pub operation_bytes: u64,
    /// Operations under way at once.
    pub depth: u32,
}

impl Workload {
    const fn new(pattern: Pattern, direction: Direction, operation_bytes: u64, depth: u32) -> Self {
        Self {
            pattern,
            direction,
            operation_bytes,
            depth,
        }
    }
}

/// What a virtual disk is asked every day: streams and single blocks, one at a time and many, and commits.
pub const CANONICAL: [Workload; 9] = [
    Workload::new(Pattern::Sequential, Direction::Read, MIB, 1),
    Workload::new(Pattern::Sequential, Direction::Read, MIB, 32),
    Workload::new(Pattern::Sequential, Direction::Write, MIB, 1),
    Workload::new(Pattern::Sequential, Direction::Write, MIB, 32),
    Workload::new(Pattern::Random, Direction::Read, 4 * KIB, 1),
    Workload::new(Pattern::Random, Direction::Read, 4 * KIB, 32),
    Workload::new(Pattern::Random, Direction::Write, 4 * KIB, 1),
    Workload::new(Pattern::Random, Direction::Write, 4 * KIB, 32),
    Workload::new(Pattern::Random, Direction::WriteSync, 4 * KIB, 1),
];

impl fmt::Display for Workload {
    /// As `random read 4.00 KiB x32`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let pattern = match self.pattern {
            Pattern::Sequential => "sequential",
            Pattern::Random => "random",
        };
        let direction = match self.direction {
            Direction::Read => "read",
            Direction::Write => "write",
            Direction::WriteSync => "write+sync",
        };
        let size = Bytes(self.operation_bytes).to_string();
        let size = size.replace(".00", "");
        f.pad(&format!("{pattern} {direction} {size} x{}", self.depth))
    }
}

impl Serialize for Workload {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn workloads_have_names_of_their_own() {
        let mut names: Vec<_> = CANONICAL.iter().map(ToString::to_string).collect();
        assert_eq!(names[5], "random read 4 KiB x32");
        assert_eq!(names[8], "random write+sync 4 KiB x1");
        names.sort();
        names.dedup();
        assert_eq!(names.len(), CANONICAL.len());
    }
}
