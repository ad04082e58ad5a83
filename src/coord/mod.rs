//! Floor 3: what a machine is at the moment and how it fares, as pure functions.
//!
//! [`role`] is the role machine: generations, promotion, fencing, the way back. [`state`] holds the words a person sees: the role, the replication state with the names that Hyper-V Replica gives
//! them, and the health with its reasons.
#![forbid(unsafe_code)]

pub mod role;
pub mod state;
