//! Which loads are run, and which figures come of each: the table as data.
//!
//! CPU per unit of work and medians of latency are the steady figures on a small machine; rates and p99 move with
//! whatever else it does. All are printed, and none is left out for being unfavourable. Limits: loads of L4 only; those
//! of requests are beside what they are about (`l7`).

use std::collections::BTreeMap;

use crate::bench::work::Measured;
use crate::bench::work::Work;
use crate::bench::world::COLD_SERVERS;

/// A load with its name.
#[derive(Clone, Debug)]
pub(super) struct Test {
    /// Short name, unique.
    pub(super) name: &'static str,
    /// The load.
    pub(super) work: Work,
    /// Bytes, requests or connections that are enough for a proof; the link is captured meanwhile.
    pub(super) proof_limit: u64,
}

/// A proof's bulk: it must fit into the capture's buffer even if the capture does not run for a while.
pub(super) const PROOF_BYTES: u64 = 24 << 20;

/// Every load, in the order of the table.
pub(super) fn tests() -> Vec<Test> {
    let test = |name, work, proof_limit| Test { name, work, proof_limit };
    let paced = |connections, per_second, beside_upload| Work::Paced { connections, per_second, beside_upload };
    vec![
        test("upload, 1 stream", Work::Upload { streams: 1 }, PROOF_BYTES),
        test("upload, 8 streams", Work::Upload { streams: 8 }, PROOF_BYTES),
        test("download, 1 stream", Work::Download { streams: 1 }, PROOF_BYTES),
        test("download, 8 streams", Work::Download { streams: 8 }, PROOF_BYTES),
        test("requests, 16 connections", Work::Requests { connections: 16 }, 2000),
        test("requests, 64 connections", Work::Requests { connections: 64 }, 2000),
        test("200 requests/s, 1 connection", paced(1, 200, false), 0),
        test("2,000 requests/s, 16 connections", paced(16, 2000, false), 0),
        test("5,000 requests/s, 16 connections", paced(16, 5000, false), 0),
        test("1,000 requests/s, 4 connections, beside an upload", paced(4, 1000, true), PROOF_BYTES),
        test("new connections, 16 at once", Work::Connects { at_once: 16 }, 500),
        test("200 new connections/s", Work::PacedConnects { per_second: 200 }, 0),
        test("first connections between two pods, 4 at once", Work::Cold { at_once: 4 }, COLD_SERVERS as u64),
    ]
}

/// Idle connections held for the memory rows, in this order; the first must be none.
pub(super) const HELD: [usize; 3] = [0, 1000, 5000];

/// Whether more is better.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Better {
    /// More.
    Higher,
    /// Less.
    Lower,
}

/// One measured part with the CPU that the proxies of the client's and the server's node used meanwhile.
#[derive(Clone, Debug)]
pub(super) struct Run {
    /// What the generator says.
    pub(super) measured: Measured,
    /// Seconds of CPU: client's proxy, server's proxy; none without proxies.
    pub(super) cpu: Option<[f64; 2]>,
}

/// The figures of a run.
pub(super) fn figures(work: &Work, run: &Run) -> Vec<(&'static str, f64)> {
    let Measured { units, seconds, latency, beside_bytes } = &run.measured;
    let units = *units as f64;
    let mut figures = Vec::new();
    // A run that did nothing has no figures; its failure is reported elsewhere.
    if units == 0.0 || *seconds <= 0.0 {
        return figures;
    }
    let mut cpu = |names: [&'static str; 3], scale: f64| {
        if let Some([client, server]) = run.cpu {
            let used = [client + server, client, server];
            figures.extend(names.into_iter().zip(used.map(|used| used * scale / units)));
        }
    };
    match work {
        Work::Upload { .. } | Work::Download { .. } => {
            cpu(CPU_GB, 1e9);
            figures.insert(0, (GBITS, units * 8.0 / 1e9 / seconds));
        }
        Work::Requests { .. } => {
            cpu(CPU_REQUEST, 1e6);
            figures.insert(0, (REQUESTS, units / seconds));
        }
        Work::Connects { .. } | Work::Cold { .. } => {
            cpu(CPU_CONNECTION, 1e6);
            figures.insert(0, (CONNECTIONS, units / seconds));
        }
        Work::Paced { beside_upload, .. } => {
            // Beside an upload the CPU is mostly the upload's.
            if !*beside_upload {
                cpu(CPU_REQUEST, 1e6);
            }
            if *beside_upload {
                figures.push((GBITS, *beside_bytes as f64 * 8.0 / 1e9 / seconds));
            }
        }
        Work::PacedConnects { .. } => cpu(CPU_CONNECTION, 1e6),
        Work::Hold { .. } => {}
    }
    if let Some(latency) = latency {
        let percentiles = [(P50, latency.p50), (P90, latency.p90), (P99, latency.p99)];
        match work {
            // Of a few dozen connections the 99th of a hundred says nothing.
            Work::Cold { .. } => figures.insert(1, percentiles[0]),
            _ => drop(figures.splice(0..0, percentiles)),
        }
    }
    figures
}

/// Requests for each second of CPU, of both proxies.
pub(super) const PER_CPU: &str = "requests/CPU-s, both proxies";
/// Latency beyond that without a proxy, in the same round.
pub(super) const ADDED: [(&str, &str); 2] = [(P50, "added p50 µs"), (P99, "added p99 µs")];
/// The 99th of a hundred beside a flood, by that before it.
pub(super) const BESIDE: &str = "p99 beside : p99 quiet";
/// Both, and what the flood was.
pub(super) const P99_QUIET: &str = "p99 µs, quiet";
pub(super) const P99_BESIDE: &str = "p99 µs, beside";
pub(super) const FLOODED: &str = "requests/s of the flood";
/// How much of the machine was used meanwhile.
pub(super) const LOADED: &str = "% of the processors, all of it";
const GBITS: &str = "Gbit/s";
const REQUESTS: &str = "requests/s";
const CONNECTIONS: &str = "connections/s";
const P50: &str = "p50 µs";
const P90: &str = "p90 µs";
const P99: &str = "p99 µs";
/// Of both proxies, the client's, the server's.
const CPU_GB: [&str; 3] = ["CPU-s/GB, both proxies", "CPU-s/GB, client's proxy", "CPU-s/GB, server's proxy"];
pub(super) const CPU_REQUEST: [&str; 3] =
    ["CPU-µs/request, both proxies", "CPU-µs/request, client's proxy", "CPU-µs/request, server's proxy"];
const CPU_CONNECTION: [&str; 3] =
    ["CPU-µs/connection, both proxies", "CPU-µs/connection, client's proxy", "CPU-µs/connection, server's proxy"];
/// Names of the memory rows: client's proxy, server's proxy.
pub(super) const RSS: [&str; 2] = ["RSS MB, client's proxy", "RSS MB, server's proxy"];
/// The growth from none to the most idle connections, for each.
pub(super) const PER_CONNECTION: [&str; 2] = ["KB/connection, client's proxy", "KB/connection, server's proxy"];

/// The growth from one number of known workloads to the next, mean of both proxies.
pub(super) const PER_WORKLOAD: &str = "KB/workload";
/// Control's memory, and its growth with the proxies attached.
pub(super) const RSS_CONTROL: &str = "RSS MB, control";
pub(super) const PER_PROXY: &str = "KiB/proxy, control";
/// CPU for each new pod: client's proxy, server's proxy, control.
pub(super) const CPU_POD: [&str; 3] =
    ["CPU-ms/pod, client's proxy", "CPU-ms/pod, server's proxy", "CPU-ms/pod, control"];
/// Percentiles of what takes milliseconds.
pub(super) const TIMES: [(&str, f64); 4] = [("p50 ms", 0.5), ("p90 ms", 0.9), ("p99 ms", 0.99), ("worst ms", 1.0)];

/// The smallest value that `share` of all values do not exceed.
pub(super) fn percentile(values: &[f64], share: f64) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let rank = (sorted.len() as f64 * share).ceil() as usize;
    sorted.get(rank.saturating_sub(1)).copied()
}

/// Whether a figure is in the table; the others are in the file only.
pub(super) fn in_table(name: &str) -> bool {
    [CPU_GB, CPU_REQUEST, CPU_CONNECTION].iter().all(|names| !names[1..].contains(&name))
}

/// How a figure is shown.
pub(super) fn shape(name: &str) -> (usize, Better) {
    match name {
        REQUESTS | CONNECTIONS | PER_CPU | FLOODED => (0, Better::Higher),
        BESIDE => (2, Better::Lower),
        LOADED => (0, Better::Lower),
        GBITS => (2, Better::Higher),
        P50 | P90 | P99 | P99_QUIET | P99_BESIDE => (0, Better::Lower),
        _ if ADDED.iter().any(|(_, added)| *added == name) => (0, Better::Lower),
        PER_WORKLOAD => (2, Better::Lower),
        _ if CPU_GB.contains(&name) => (3, Better::Lower),
        _ => (1, Better::Lower),
    }
}

/// Middle of the values; of an even number the mean of the two in the middle.
pub(super) fn median(values: &[f64]) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    let high = *sorted.get(middle)?;
    Some(if sorted.len() % 2 == 1 { high } else { (sorted[middle - 1] + high) / 2.0 })
}

/// Order of `count` variants in a round: it rotates, so that none is always first after a pause.
pub(super) fn rotation(count: usize, round: usize, test: usize) -> Vec<usize> {
    (0..count).map(|index| (index + round + test) % count).collect()
}

/// Values by row name, then figure, then variant.
pub(super) type Values = BTreeMap<(String, &'static str), BTreeMap<&'static str, Vec<f64>>>;

#[cfg(test)]
mod tests {
    use crate::bench::rows::Run;
    use crate::bench::rows::figures;
    use crate::bench::rows::median;
    use crate::bench::rows::percentile;
    use crate::bench::rows::rotation;
    use crate::bench::rows::tests;
    use crate::bench::work::Measured;
    use crate::bench::work::Work;

    #[test]
    fn medians_do_not_follow_one_outlier() {
        assert_eq!(median(&[]), None);
        assert_eq!(median(&[3.0, 1.0, 900.0]), Some(3.0));
        assert_eq!(median(&[4.0, 2.0]), Some(3.0));
    }

    #[test]
    fn a_percentile_is_a_value_that_was_seen() {
        let values: Vec<f64> = (1..=200).rev().map(f64::from).collect();
        for (share, expected) in [(0.5, 100.0), (0.99, 198.0), (1.0, 200.0), (0.0, 1.0)] {
            assert_eq!(percentile(&values, share), Some(expected), "{share}");
        }
        assert_eq!(percentile(&[], 0.5), None);
    }

    #[test]
    fn every_variant_is_first_equally_often() {
        assert_eq!(rotation(3, 0, 0), [0, 1, 2]);
        assert_eq!(rotation(3, 1, 0), [1, 2, 0]);
        assert_eq!(rotation(3, 1, 1), [2, 0, 1]);
    }

    #[test]
    fn names_of_tests_are_unique() {
        let names: std::collections::BTreeSet<_> = tests().iter().map(|test| test.name).collect();
        assert_eq!(names.len(), tests().len());
    }

    #[test]
    fn figures_are_per_unit_and_nothing_is_divided_by_nothing() {
        let measured = Measured { units: 2_000_000_000, seconds: 2.0, ..Measured::default() };
        let run = Run { measured, cpu: Some([1.0, 0.5]) };
        let values: Vec<f64> =
            figures(&Work::Upload { streams: 1 }, &run).into_iter().map(|(_, value)| value).collect();
        assert_eq!(values, [8.0, 0.75, 0.5, 0.25]);
        let nothing = Run { measured: Measured::default(), cpu: None };
        assert!(figures(&Work::Upload { streams: 1 }, &nothing).is_empty());
    }
}
