//! Every parser of bytes that come from somebody else, each as a function of bytes that panics when a promise is broken.
//!
//! The functions are used twice: by the programs in `fuzz_targets/`, which search without end (nightly, cargo-fuzz), and
//! by `fuzz_smoke.rs` in the tests of `ztunnel` and `control`, which run a bounded number of structured mutations on
//! stable in `make test`. A promise is more than "no panic": what was accepted must survive being written and read again.

pub mod control;
pub mod mutate;
pub mod node;
