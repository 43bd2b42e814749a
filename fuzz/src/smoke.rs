//! Targets on stable and for a bounded time: good input, damaged in the usual ways, and noise.
//!
//! Included by the `fuzz_smoke` test of each crate, which gives its targets and their seeds; `PROPTEST_CASES` sets how
//! often. A failing case is printed, shrunk; the tree is not written to.

use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};

use crate::mutate;

type Target = (&'static str, fn(&[u8]));

fn runner() -> TestRunner {
    TestRunner::new(Config { failure_persistence: None, ..Config::default() })
}

/// Gives each target its seeds, whole and damaged.
pub fn damaged(targets: &[Target], seeds: fn(&str) -> Vec<Vec<u8>>) {
    for (name, target) in targets {
        let seeds = seeds(name);
        seeds.iter().for_each(|seed| target(seed));
        let edits = prop::collection::vec(any::<mutate::Edit>(), 1..8);
        let result = runner().run(&(0..seeds.len(), edits), |(seed, edits)| {
            target(&mutate::mutate(&seeds[seed], &edits));
            Ok(())
        });
        result.unwrap_or_else(|error| panic!("{name}: {error}"));
    }
}

/// Gives each target bytes that mean nothing.
pub fn noise(targets: &[Target]) {
    for (name, target) in targets {
        let result = runner().run(&prop::collection::vec(any::<u8>(), 0..200), |bytes| {
            target(&bytes);
            Ok(())
        });
        result.unwrap_or_else(|error| panic!("{name}: {error}"));
    }
}
