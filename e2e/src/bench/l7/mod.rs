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
    let mut beside = |flood: Option<&Work>| part(place, report, (variant, test), times, flood, wrong);
    let quiet = beside(None)?;
    let mut loud = beside(Some(&ALL))?;
    if test.name == AT_HALF_LOAD {
        let probe = beside(Some(&flood_of(loud.flooded / 4.0)))?;
        loud = beside(Some(&flood_of(at_half_load(&quiet, &probe, loud.flooded))))?;
    }
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

/// Requests a second of a flood that uses half of the processors with the load beside it, by what a quarter of `most` used.
fn at_half_load(quiet: &Outcome, probe: &Outcome, most: f64) -> f64 {
    let each = (probe.load - quiet.load) / probe.flooded.max(1.0);
    let room = (0.5 - quiet.load) / each;
    // Others used so much meanwhile that nothing can be told.
    if room.is_finite() && room > 0.0 { room.min(most) } else { most / 2.0 }
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
