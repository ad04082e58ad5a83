//! Hosts that swap the roles of a machine: what may differ is known, owed, and sent as one ordinary epoch (design 3.5).
//!
//! `marks` looks at what is marked, `sift` at what is compared first; `cuts` ends the power at every step; `roles` lets two hosts swap at random and compares
//! their disks.

mod cuts;
pub(crate) mod host;
mod marks;
mod roles;
mod sift;
