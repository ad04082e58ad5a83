//! Floor 3: what a machine is at the moment and how it fares, as pure functions.
//!
//! [`role`] is the role machine: generations, promotion, fencing, the way back. [`state`] holds the words a person sees:
//! the role, the replication state with the names that Hyper-V Replica gives them, and the health with its reasons.
//!
//! What a coordinator decides is here, too: [`view`] is what several hosts say of a machine and which of them has to act,
//! [`job`] the steps of an operation and what is due, [`plan`] a recovery plan and the job it makes.
#![forbid(unsafe_code)]

pub mod job;
pub mod plan;
pub mod role;
pub mod state;
pub mod view;
