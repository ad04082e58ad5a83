//! The integration tests: one binary, a module for each behaviour.

/// Links between hosts: who gets in, who does not and why, and what arrives.
mod net;
