//! Floor 3: the secondary side of a machine: staging, recovery points, views, merge.
#![forbid(unsafe_code)]
