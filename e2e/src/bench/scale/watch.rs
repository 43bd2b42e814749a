//! A client that connects over and over and says when the verdict changes: how an effect is seen where it matters, by
//! an application, and by any proxy alike.
//!
//! It says the time at which the first try with the new verdict ended, so a figure is late by at most one try and the
//! pause before it, never early. Limits: one destination; it ends with its standard input.

use std::io::Write;
use std::net::SocketAddr;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering;
use std::time::Duration;
use std::time::Instant;

use nix::time::ClockId;
use serde::Deserialize;
use serde::Serialize;

use crate::bench::agent::answers;

/// Between two tries: short beside what is measured, long enough to leave the processors to the proxies.
const PAUSE: Duration = Duration::from_millis(2);

/// Without a change for so long, none will come and it ends: who waits for one must not wait for ever.
const PATIENCE: Duration = Duration::from_secs(30);

/// What is said when the verdict changes, and once at the beginning.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Verdict {
    /// The machine's monotonic clock, nanoseconds.
    pub(super) at_ns: u64,
    /// The server answered.
    pub(super) answered: bool,
}

/// The machine's monotonic clock, nanoseconds: the same in all its namespaces.
pub(super) fn now_ns() -> anyhow::Result<u64> {
    let now = nix::time::clock_gettime(ClockId::CLOCK_MONOTONIC)?;
    Ok(u64::try_from(now.tv_sec())? * 1_000_000_000 + u64::try_from(now.tv_nsec())?)
}

/// Tries until standard input ends, or nothing changes for long.
pub(in crate::bench) fn run(to: SocketAddr) -> anyhow::Result<()> {
    let ended = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let _ = std::io::copy(&mut std::io::stdin(), &mut std::io::sink());
            ended.store(true, Ordering::SeqCst);
        });
        let (mut last, mut changed) = (None, Instant::now());
        while !ended.load(Ordering::SeqCst) {
            let answered = answers(to);
            if last != Some(answered) {
                (last, changed) = (Some(answered), Instant::now());
                let mut out = std::io::stdout().lock();
                writeln!(out, "{}", serde_json::to_string(&Verdict { at_ns: now_ns()?, answered })?)?;
                out.flush()?;
            }
            if changed.elapsed() > PATIENCE {
                // The thread that reads would hold the process.
                std::process::exit(3);
            }
            std::thread::sleep(PAUSE);
        }
        Ok(())
    })
}
