//! From a replica to disks that a guest can use: recovery points and test failovers, with real nodes and real mounts.

mod deaths;
mod divergence;
mod growth;
mod guest;
mod held;
mod roles;
mod space;
mod speed;
mod tests;
