//! Floor 4: disks as raw files in a FUSE mount.
#![forbid(unsafe_code)]
