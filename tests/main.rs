//! The integration tests: one binary, a module for each behaviour.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on should stop")]

mod cli;
mod crash;
mod cuts;
mod delta;
mod errors;
mod failover;
mod formats;
mod fuzzing;
mod lab;
mod model;
mod mount;
mod namespaces;
mod net;
mod plans;
mod power;
mod replicate;
mod roles;
#[cfg(shuttle)]
mod schedules;
mod security;
mod simulate;
mod staging;
mod support;
mod swap;
mod tidy;
