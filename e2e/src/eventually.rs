//! Waiting for a state with a deadline: poll, and when time is up say what was seen last.
//!
//! Every wait of the lab and its tests goes through here, so that none is unbounded and none is a bare sleep that
//! hopes. Limits: polling costs one probe per interval; the interval is the resolution of the answer.

use std::fmt::Display;
use std::time::Duration;
use std::time::Instant;

/// Time between two probes: short beside everything the lab waits for, long beside one probe.
pub const INTERVAL: Duration = Duration::from_millis(20);

/// Polls until `probe` gives `Ok`; after `timeout` returns an error with `what` and the last thing seen.
pub fn eventually<T, E: Display>(
    what: &str,
    timeout: Duration,
    mut probe: impl FnMut() -> Result<T, E>,
) -> anyhow::Result<T> {
    let began = Instant::now();
    loop {
        match probe() {
            Ok(value) => return Ok(value),
            Err(last) if began.elapsed() >= timeout => {
                anyhow::bail!("{what}: not within {:.1} s; last seen: {last}", timeout.as_secs_f64())
            }
            Err(_) => std::thread::sleep(INTERVAL),
        }
    }
}
