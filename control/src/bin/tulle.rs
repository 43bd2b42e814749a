//! The `tulle` program, a shell around `control::cli`.
//!
//! Exit codes: 0 done, 1 something is wrong, 2 wrong usage or not in this version.

use std::process::ExitCode;

fn main() -> ExitCode {
    control::cli::main()
}
