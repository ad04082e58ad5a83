//! Floor 4: throughput and latency of files and mounts, side by side.
#![forbid(unsafe_code)]
