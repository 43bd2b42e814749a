//! Requests: what a route and policies about methods and paths cost, beside no proxy and beside Envoy that does the same.
//!
//! A client asks for one name; a route sends a tenth to a second version, or all that carry a header; the server's side
//! lets it in by who it is, by method and by path. Each request is one of HTTP/1.1 on a lasting connection. What makes a
//! row count is checked in the same run: who answered, a record of each request on both sides with the other's identity,
//! what crossed the link, and refusals once a second. Limits: one client and two servers, on two nodes of one machine.

pub(super) mod envoy;
mod place;
mod world;

use std::path::Path;

use crate::bench::DIRECT;
use crate::bench::ENVOY;
use crate::bench::Options;
use crate::bench::TULLE;
use crate::bench::l7::place::ALL;
use crate::bench::l7::place::Outcome;
use crate::bench::l7::place::Place;
use crate::bench::l7::place::flood_of;
use crate::bench::note;
use crate::bench::report::Failure;
use crate::bench::report::Report;
use crate::bench::rows;
use crate::bench::rows::Test;
use crate::bench::rows::figures;
use crate::bench::work::Work;

/// Names of these loads begin so.
pub(super) const NAMED: &str = "HTTP";
/// Beside which all that a neighbour can ask goes on.
const BESIDE: &str = "HTTP, 1,000 requests/s, 4 connections, beside another pod's flood";
/// Beside which a neighbour asks as much as leaves half of the processors free.
const AT_HALF_LOAD: &str = "HTTP, 1,000 requests/s, 4 connections, beside a flood at half load";

/// Corrections of the flood's rate at the most, and how near to half of the processors is near enough.
const TRIES: usize = 4;
const NEAR_HALF: f64 = 0.04;
/// Its two parts take so many times as long as others: the hundredth that is asked about is then of thousands, and what
/// the machine does for some milliseconds now and then is less than that.
const LONGER: u64 = 4;

/// The loads.
fn tests() -> Vec<Test> {
    let test = |name, work| Test { name, work, proof_limit: 1000 };
    let paced = |connections, per_second| Work::Paced { connections, per_second, beside_upload: false };
    vec![
        test("HTTP, requests, 16 connections", Work::Requests { connections: 16 }),
        test("HTTP, requests, 64 connections", Work::Requests { connections: 64 }),
        test("HTTP, 200 requests/s, 1 connection", paced(1, 200)),
        test("HTTP, 2,000 requests/s, 16 connections", paced(16, 2000)),
        test(BESIDE, paced(4, 1000)),
        test(AT_HALF_LOAD, paced(4, 1000)),
    ]
}

/// Runs them all; what fails is in the report.
pub(super) fn run(options: &Options, bin_dir: &Path, envoy: Option<&Path>, report: &mut Report) {
    let tests: Vec<Test> = tests().into_iter().filter(|test| test.name.contains(&options.only)).collect();
    if tests.is_empty() {
        return;
    }
    eprintln!("lab bench: starting a lab for requests");
    let variants: Vec<&'static str> = [DIRECT, TULLE].into_iter().chain(envoy.map(|_| ENVOY)).collect();
    let result = Place::start(bin_dir, envoy, &variants).map(|mut place| {
        for variant in &variants {
            match place.begin(variant) {
                Ok(lines) => report.proven.extend(lines),
                Err(error) => fail(report, &tests, variant, &error),
            }
        }
        for round in 0..options.rounds() {
            for (index, test) in tests.iter().enumerate() {
                let mut said = format!("round {}/{} · {}", round + 1, options.rounds(), test.name);
                for at in rows::rotation(variants.len(), round, index) {
                    said += &load(&place, report, variants[at], test, (round, options.times()));
                }
                eprintln!("{said}");
            }
        }
        for variant in &variants {
            match place.end(variant) {
                Ok(lines) => report.proven.extend(lines),
                Err(error) => fail(report, &tests, variant, &error),
            }
        }
    });
    if let Err(error) = result {
        fail(report, &tests, TULLE, &error);
    }
    added(report, &tests);
}

fn fail(report: &mut Report, tests: &[Test], variant: &'static str, error: &anyhow::Error) {
    let wrong = format!("{error:#}");
    let failure = |test: &Test| Failure { test: test.name.to_owned(), variant, wrong: wrong.clone() };
    report.failures.extend(tests.iter().map(failure));
}

/// One load on one variant, with its proof in the first round; returns words about it.
fn load(
    place: &Place,
    report: &mut Report,
    variant: &'static str,
    test: &Test,
    (round, times): (usize, (u64, u64)),
) -> String {
    let mut wrong = Vec::new();
    let found = if [BESIDE, AT_HALF_LOAD].contains(&test.name) {
        beside(place, report, variant, test, times, &mut wrong)
    } else {
        part(place, report, (variant, test), times, None, &mut wrong).map(|outcome| {
            let mut found = figures(&test.work, &outcome.run);
            let used = found.iter().find(|(name, _)| *name == rows::CPU_REQUEST[0]).map(|(_, used)| 1e6 / used);
            found.extend(used.map(|requests| (rows::PER_CPU, requests)));
            found
        })
    };
    let found = found.unwrap_or_default();
    let said = found.first().map_or_else(String::new, |(name, value)| format!(" · {variant} {value:.2} {name}"));
    found.into_iter().for_each(|(name, value)| note(report, test.name, name, variant, value));
    if round == 0 {
        match place.prove(variant, test) {
            Ok(more) => wrong.extend(more),
            Err(error) => wrong.push(format!("no proof: {error:#}")),
        }
    }
    let failure = |wrong| Failure { test: test.name.to_owned(), variant, wrong };
    report.failures.extend(wrong.into_iter().map(failure));
    said
}

/// The same load before and beside a flood: all that there can be beside it, or so much, at a fixed rate, that half of the
/// processors is used. CPU is not told: it is the flood's.
fn beside(
    place: &Place,
    report: &mut Report,
    variant: &'static str,
    test: &Test,
    times: (u64, u64),
    wrong: &mut Vec<String>,
) -> Option<Vec<(&'static str, f64)>> {
    let mut part = |times: (u64, u64), flood: Option<&Work>| part(place, report, (variant, test), times, flood, wrong);
    let (quiet, loud) = if test.name == AT_HALF_LOAD {
        let long = (times.0, times.1 * LONGER);
        let quiet = part(long, None)?;
        let most = part(times, Some(&ALL))?;
        let mut known = vec![(0.0, quiet.load), (most.flooded, most.load)];
        for _ in 0..TRIES {
            let tried = part(times, Some(&flood_of(at_half_load(&known))))?;
            known.push((tried.flooded, tried.load));
            if (tried.load - 0.5).abs() < NEAR_HALF {
                break;
            }
        }
        (quiet, part(long, Some(&flood_of(at_half_load(&known))))?)
    } else {
        (part(times, None)?, part(times, Some(&ALL))?)
    };
    let p99 = |outcome: &Outcome| outcome.run.measured.latency.as_ref().map(|latency| latency.p99);
    let (before, beside) = (p99(&quiet)?, p99(&loud)?);
    Some(vec![
        (rows::BESIDE, beside / before),
        (rows::P99_QUIET, before),
        (rows::P99_BESIDE, beside),
        (rows::FLOODED, loud.flooded),
        (rows::LOADED, loud.load * 100.0),
    ])
}

/// Requests a second of a flood that uses half of the processors with the load beside it: on the line between the nearest
/// known rates on either side, each with the share that it used.
fn at_half_load(known: &[(f64, f64)]) -> f64 {
    let below = known.iter().filter(|(_, load)| *load < 0.5).max_by(|one, other| one.1.total_cmp(&other.1));
    let above = known.iter().filter(|(_, load)| *load >= 0.5).min_by(|one, other| one.1.total_cmp(&other.1));
    match (below, above) {
        (Some((low, less)), Some((high, more))) => low + (high - low) * (0.5 - less) / (more - less),
        // Nothing that the flood can ask for reaches half, or the load without it is beyond: the end of the scale.
        (Some((rate, _)), None) | (None, Some((rate, _))) => *rate,
        (None, None) => 0.0,
    }
}

fn part(
    place: &Place,
    report: &mut Report,
    (variant, test): (&'static str, &Test),
    times: (u64, u64),
    flood: Option<&Work>,
    wrong: &mut Vec<String>,
) -> Option<Outcome> {
    match place.run(variant, &test.work, times, flood) {
        Ok(outcome) => {
            wrong.extend(outcome.wrong.iter().cloned());
            report.others.entry((test.name.to_owned(), variant)).or_default().push(outcome.others);
            Some(outcome)
        }
        Err(error) => {
            wrong.push(format!("{error:#}"));
            None
        }
    }
}

/// Latency beyond that without a proxy, round by round.
fn added(report: &mut Report, tests: &[Test]) {
    for test in tests {
        for (of, added) in rows::ADDED {
            let Some(values) = report.values.get(&(test.name.to_owned(), of)).cloned() else { continue };
            let Some(direct) = values.get(DIRECT) else { continue };
            for (variant, values) in values.iter().filter(|(variant, _)| **variant != DIRECT) {
                values
                    .iter()
                    .zip(direct)
                    .for_each(|(value, direct)| note(report, test.name, added, variant, value - direct));
            }
        }
    }
    // Rows of one load stay together.
    let loads: Vec<String> = report.order.iter().map(|(load, _)| load.clone()).collect();
    report.order.sort_by_key(|(load, _)| loads.iter().position(|other| other == load));
}

#[cfg(test)]
mod tests {
    use super::at_half_load;

    #[test]
    fn the_rate_for_half_load_lies_between_the_nearest_known_ones() {
        for (known, expected) in [
            (&[(0.0, 0.2), (900.0, 0.8)][..], 450.0),
            (&[(0.0, 0.2), (900.0, 0.8), (450.0, 0.6)], 337.5),
            (&[(0.0, 0.2), (900.0, 0.4)], 900.0),
            (&[(0.0, 0.7), (900.0, 0.9)], 0.0),
        ] {
            assert!((at_half_load(known) - expected).abs() < 0.01, "{known:?}: {}", at_half_load(known));
        }
    }
}
