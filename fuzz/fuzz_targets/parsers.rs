//! All targets in one program, because each needs the whole mesh linked in: `TARGET=connect cargo +nightly fuzz run parsers`.
//!
//! Without `TARGET` the first byte of the input chooses, which is good for a night's run over everything.

#![no_main]

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use tulle_fuzz::{control, node};

static CHOSEN: LazyLock<Vec<fn(&[u8])>> = LazyLock::new(|| {
    let wanted = std::env::var("TARGET").ok();
    let all = node::TARGETS.iter().chain(control::TARGETS);
    let chosen: Vec<_> = all.filter(|(name, _)| wanted.as_deref().is_none_or(|wanted| wanted == *name)).collect();
    assert!(!chosen.is_empty(), "TARGET={wanted:?} is none of the targets in fuzz/src");
    chosen.iter().map(|(_, target)| *target).collect()
});

fuzz_target!(|data: &[u8]| match (&CHOSEN[..], data) {
    ([one], data) => one(data),
    (many, [first, rest @ ..]) => many[usize::from(*first) % many.len()](rest),
    _ => {}
});
