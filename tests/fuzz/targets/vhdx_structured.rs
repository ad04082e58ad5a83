//! The target `vhdx_structured`; its body is in `tests/fuzzing/bodies`.
#![no_main]

#[path = "../../fuzzing/bodies/mod.rs"]
mod bodies;

libfuzzer_sys::fuzz_target!(|input: &[u8]| bodies::target("vhdx_structured").run(input));
