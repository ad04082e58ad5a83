//! The `understudy` program: see the library for everything but this call.
fn main() {}
