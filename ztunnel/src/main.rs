//! The node proxy. The library has everything, so that tests and the sabotaged build can use it.

fn main() -> std::process::ExitCode {
    ztunnel::cli::main()
}
