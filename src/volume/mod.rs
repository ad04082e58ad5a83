//! Floor 3: a disk that remembers what was written to it, and the machine whose disks are cut together.
#![forbid(unsafe_code)]
