//! Log output: plain or JSON, level by `RUST_LOG`, on standard error.
//!
//! Counters live beside the code that counts and are put on a page by `admin`.

use std::io::IsTerminal;

use tracing_subscriber::EnvFilter;

/// Installs the process's log writer; a second call changes nothing.
pub fn init(json: bool) {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr);
    let _ = if json { builder.json().try_init() } else { builder.try_init() };
}
