//! Promise: under constant change every verdict is that of a policy in force, and nobody else notices.
//!
//! Three clients send 10,000 requests while a policy and a Service's endpoints change every 100 ms: one is always
//! allowed (no failure), one always denied (no pass), one flips, and each of its verdicts must be that of a version that
//! the node had in force between the request's start and end, by the node's own log of applied versions. `SEED` repeats
//! a run.

use std::time::Duration;
use std::time::Instant;

use anyhow::Context;
use e2e::eventually::eventually;
use e2e::lab::LabConfig;
use e2e::oracle::{self, CHANGE_EVERY};
use e2e::scenario;
use rand::RngExt;
use rand::SeedableRng;
use rand::rngs::StdRng;
use serde_json::Value;

const FLIPS_MIN: usize = 200;
const REQUESTS_MIN: usize = 10_000;

#[test]
fn every_verdict_is_that_of_a_policy_in_force() -> anyhow::Result<()> {
    let Some(lab) = scenario::lab(LabConfig::of(&oracle::world())) else { return Ok(()) };
    let seed = std::env::var("SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or_else(rand::random::<u64>);
    let mut random = StdRng::seed_from_u64(seed);
    let (addresses, denying) = oracle::begin(&lab)?;

    let url = ["http://flux.shop/"];
    let allowed = lab.load("shop/web", &url, 120.0, &oracle::PATIENT)?;
    let denied = lab.load("shop/other", &url, 60.0, &oracle::PATIENT)?;
    let flipping = lab.load("shop/flip", &url, 100.0, &oracle::PATIENT)?;
    let began = Instant::now();
    let mut written = Vec::new();
    // 280 requests a second in all; a little longer than the least, since clients start at different times.
    let long_enough = Duration::from_secs_f64(REQUESTS_MIN as f64 / 280.0 + 3.0);
    while written.len() < FLIPS_MIN || began.elapsed() < long_enough {
        let deny = written.len() % 2 == 0;
        written.push((oracle::now_us(), deny));
        oracle::flip(&lab, deny)?;
        let mut present = [random.random::<bool>(), random.random(), random.random()];
        // Never empty: having no endpoint is another promise.
        present[random.random_range(0..3)] = true;
        oracle::endpoints(&lab, &addresses, &present)?;
        let next = began + CHANGE_EVERY * u32::try_from(written.len())?;
        std::thread::sleep(next.saturating_duration_since(Instant::now()));
    }
    let (allowed, denied, flipping) = (allowed.finish()?, denied.finish()?, flipping.finish()?);
    // How long a change takes is the bench's question; that each takes effect is this one's.
    let (changes, lag) = eventually("every version that was written comes into force", scenario::PATIENCE, || {
        let changes = oracle::versions(&lab)?;
        let lag = oracle::lag_us(&changes, &written, &denying).context("a written version is not in force yet")?;
        anyhow::Ok((changes, lag))
    })?;
    report(seed, &[&allowed, &denied, &flipping], &written, &changes);

    oracle::judge(&allowed, &denied, &flipping, &changes, &denying)?;
    scenario::all_well(&allowed, 1000)?;
    let (ok, not) = (scenario::failures(&flipping).len(), flipping.len());
    assert!(ok * 10 > not && ok * 10 < not * 9, "a flipping policy gives both verdicts often: {ok} of {not} denied");
    let slowest = oracle::slowest_ms(allowed.iter().chain(&denied).chain(&flipping));
    println!("the slowest change took {} ms to the node, the slowest answer {slowest:.0} ms", lag / 1000);
    let all = allowed.len() + denied.len() + flipping.len();
    assert!(all >= REQUESTS_MIN && written.len() >= FLIPS_MIN, "{all} requests, {} flips", written.len());
    Ok(())
}

fn report(seed: u64, groups: &[&Vec<Value>; 3], written: &[(u64, bool)], changes: &[oracle::Applied]) {
    let [allowed, denied, flipping] = groups.map(|group| (group.len(), scenario::failures(group).len()));
    println!(
        "seed {seed}: {} flips written, {} applied; allowed {} ({} failed), denied {} ({} refused), flipping {} ({} refused)",
        written.len(),
        changes.len(),
        allowed.0,
        allowed.1,
        denied.0,
        denied.1,
        flipping.0,
        flipping.1
    );
}
