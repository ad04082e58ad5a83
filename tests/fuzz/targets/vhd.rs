//! The target `vhd`; its body is in `tests/fuzzing/bodies`.
#![no_main]

#[path = "../../fuzzing/bodies/mod.rs"]
mod bodies;

libfuzzer_sys::fuzz_target!(|input: &[u8]| bodies::target("vhd").run(input));
