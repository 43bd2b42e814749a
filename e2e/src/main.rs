//! The `lab` program, which is also the pods' `shop` when called by that name. Everything is in the library, so that
//! tests use the same code; this file only starts it. Limits: none of its own.

use std::process::ExitCode;

fn main() -> ExitCode {
    e2e::cli::main()
}
