//! The `understudy` program: see the library for everything but this call.

use std::process::ExitCode;

fn main() -> ExitCode {
    understudy::cli::main()
}
