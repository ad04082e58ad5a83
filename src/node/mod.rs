//! Floor 5: a host: configuration, the loops that drive the floors below, the control socket.
#![forbid(unsafe_code)]

pub mod control;
pub mod status;
