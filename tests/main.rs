//! The integration tests: one binary, a module for each behaviour.

mod crash;
mod cuts;
mod model;
