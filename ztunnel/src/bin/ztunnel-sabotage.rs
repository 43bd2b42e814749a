//! The node proxy with one part broken on purpose, by `TULLE_BREAK`. Built only with the feature `sabotage`, for proving
//! that the demo notices.

fn main() -> std::process::ExitCode {
    ztunnel::cli::main()
}
