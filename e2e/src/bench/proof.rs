//! Whether a row did the work that it claims: what crossed the link, what both proxies recorded, who was kept out.
//!
//! A fast row that skipped encryption, identity, policy or accounting would win every comparison, so each is looked at
//! in the same run, with the proxies' own counters against the client's and the link's against both. Judging is pure;
//! gathering is the caller's. Limits: the contents of the link are looked at while a bounded part of each load runs
//! again, because looking at all of it would take the processor that is being measured; its byte count is checked for
//! every part of every round.

use std::fs::File;
use std::io::Read;
use std::io::Seek;
use std::io::SeekFrom;
use std::path::PathBuf;

use anyhow::Context;
use serde_json::Value;
use tulle_proto::names;

use crate::bench::work::Asked;
use crate::bench::work::Probed;
use crate::bench::work::Totals;
use crate::sniff::Sniffed;

/// Counters of one proxy for connections from the client to the server with both identities proven.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Counted {
    /// Records in the log.
    pub(super) records: u64,
    /// Connections in `istio_tcp_connections_closed_total`.
    pub(super) connections: u64,
    /// Bytes in `istio_tcp_received_bytes_total` and `istio_tcp_sent_bytes_total`.
    pub(super) bytes: u64,
}

/// What is wrong with a run through the mesh: `counted` for the client's and the server's proxy, `link` in bytes.
pub(super) fn of_counts(totals: &Totals, counted: [Counted; 2], link: u64) -> Vec<String> {
    let mut wrong = Vec::new();
    for (side, counted) in ["client's", "server's"].into_iter().zip(counted) {
        let Counted { records, connections, bytes } = counted;
        if records != totals.connections || connections != totals.connections {
            wrong.push(format!(
                "{} connections were made; the {side} proxy logged {records} with both identities and counted {connections}",
                totals.connections
            ));
        }
        if bytes < totals.payload {
            wrong.push(format!("{} payload bytes were carried; the {side} proxy counted {bytes}", totals.payload));
        }
    }
    if link < totals.payload {
        wrong.push(format!("{} payload bytes were carried; {link} bytes crossed the node link", totals.payload));
    }
    wrong
}

/// What is wrong with requests that a route was to spread: `share` of a hundred go to the second of these servers.
pub(super) fn of_route(totals: &Totals, servers: [&str; 2], share: u32) -> Vec<String> {
    let of = |server: &str| totals.answered.get(server).copied().unwrap_or_default();
    let (all, second) = (totals.answered.values().sum::<u64>(), of(servers[1]));
    let mut wrong = Vec::new();
    if of(servers[0]) + second != all || all == 0 {
        wrong.push(format!("answers came from others than {servers:?}: {:?}", totals.answered));
    }
    // One of them draws lots; five standard deviations, and a few for what is not a multiple of the share.
    let (all, part) = (all as f64, f64::from(share) / 100.0);
    let room = 5.0 * (all * part * (1.0 - part)).sqrt() + 4.0;
    if (second as f64 - all * part).abs() > room {
        wrong.push(format!("{second} of {all} requests went to {}, where {share} % should", servers[1]));
    }
    wrong
}

/// What is wrong with the records of requests: `records` of the client's and the server's proxy, `link` in bytes.
pub(super) fn of_requests(totals: &Totals, records: [u64; 2], link: u64) -> Vec<String> {
    let answered: u64 = totals.answered.values().sum();
    let mut wrong = Vec::new();
    for (side, records) in ["client's", "server's"].into_iter().zip(records) {
        if records != answered {
            wrong.push(format!(
                "{answered} requests were answered; the {side} proxy recorded {records} with the other's identity"
            ));
        }
    }
    if link < totals.payload {
        wrong.push(format!("{} payload bytes were carried; {link} bytes crossed the node link", totals.payload));
    }
    wrong
}

/// What is wrong with requests that must be refused with 403 once a second: `seconds` they went on, and the server's
/// proxy recorded so many `refusals` with their reason.
pub(super) fn of_refused(asked: &Asked, seconds: f64, refusals: u64) -> Vec<String> {
    let refused = asked.statuses.get("403").copied().unwrap_or_default();
    let mut wrong = Vec::new();
    // A try without an answer is one on a busy machine; an answer of a server is not.
    let passed: u64 = asked.servers.iter().filter(|(server, _)| !server.is_empty()).map(|(_, count)| count).sum();
    if passed > 0 {
        wrong.push(format!("{passed} of {} requests that must be refused were answered", asked.attempts));
    }
    if (refused as f64) < seconds / 2.0 {
        wrong.push(format!("only {refused} refusals in {seconds:.0} s: {:?}", asked.statuses));
    }
    if refusals < refused {
        wrong.push(format!("{refused} requests were refused; {refusals} records give the reason"));
    }
    wrong
}

/// What is wrong with a run however it was carried.
pub(super) fn of_totals(totals: &Totals) -> Vec<String> {
    if totals.failed == 0 {
        return Vec::new();
    }
    let first = totals.error.as_deref().unwrap_or("no reason given");
    vec![format!("{} connections or requests failed, the first: {first}", totals.failed)]
}

/// What is wrong with what crossed the node link during a run through the mesh.
pub(super) fn of_capture(totals: &Totals, seen: &Sniffed) -> Vec<String> {
    let mut wrong = Vec::new();
    let tls = &seen.tls;
    if seen.markers.values().any(|count| *count > 0) {
        wrong.push("payload was found unencrypted on the node link".to_owned());
    }
    if tls.not_tls > 0 {
        wrong.push(format!("{} directions on port 15008 carried something other than TLS records", tls.not_tls));
    }
    if tls.server_hellos_other > 0 {
        wrong.push(format!("{} handshakes chose a version other than TLS 1.3", tls.server_hellos_other));
    }
    if tls.encrypted_bytes < totals.payload {
        wrong.push(format!(
            "{} payload bytes were carried; {} encrypted bytes crossed the link",
            totals.payload, tls.encrypted_bytes
        ));
    }
    let other: Vec<String> = seen
        .tcp_ports
        .keys()
        .filter(|port| ![names::PORT_HBONE, names::PORT_CONTROL_GRPC].contains(port))
        .map(u16::to_string)
        .collect();
    if !other.is_empty() {
        wrong.push(format!("TCP beside the mesh's crossed the node link, ports {}", other.join(", ")));
    }
    wrong
}

/// What is wrong with the denied client's tries: `seconds` it ran, `refusals` that the server's proxy logged by policy.
pub(super) fn of_denied(probed: &Probed, seconds: f64, refusals: u64) -> Vec<String> {
    let mut wrong = Vec::new();
    if probed.passed > 0 {
        wrong.push(format!("{} of {} denied connections were answered", probed.passed, probed.attempts));
    }
    // A try may take as long as its patience on a busy machine, so half of one a second is enough.
    if (probed.attempts as f64) < seconds / 2.0 {
        wrong.push(format!("only {} denied connections were tried in {seconds:.0} s", probed.attempts));
    }
    if refusals + 1 < probed.attempts {
        wrong.push(format!("{} connections were denied; {refusals} refusals name the policy", probed.attempts));
    }
    wrong
}

/// Sum of the samples of `metric` whose labels hold each of `labels`.
pub(super) fn metric_sum(text: &str, metric: &str, labels: &[&str]) -> u64 {
    text.lines()
        .filter_map(|line| line.strip_prefix(metric)?.strip_prefix('{')?.rsplit_once("} "))
        .filter(|(found, _)| labels.iter().all(|label| found.contains(label)))
        .filter_map(|(_, value)| value.trim().parse::<u64>().ok())
        .sum()
}

/// Whether a policy, as a proxy's dump has it, is of a namespace: some give `namespace/name`, some both for themselves.
pub(super) fn is_of_namespace(policy: &Value, namespace: &str) -> bool {
    let name = policy["name"].as_str().unwrap_or_default();
    policy["namespace"] == namespace || name.strip_prefix(namespace).is_some_and(|rest| rest.starts_with('/'))
}

/// Workloads of the bench's crowd in a proxy's dump of what it knows: a list, or a map by name.
pub(super) fn of_crowd(dump: &Value) -> usize {
    let workloads = &dump["workloads"];
    let listed = workloads.as_array().into_iter().flatten();
    let named = workloads.as_object().into_iter().flat_map(|map| map.values());
    let is_of = |workload: &&Value| workload["namespace"].as_str().is_some_and(|name| name.starts_with("crowd-"));
    listed.chain(named).filter(is_of).count()
}

/// A log that is read on from where it was left.
#[derive(Debug)]
pub(super) struct LogTail {
    path: PathBuf,
    at: u64,
}

impl LogTail {
    /// From the end as of now.
    pub(super) fn at_end(path: PathBuf) -> anyhow::Result<Self> {
        let at = std::fs::metadata(&path).with_context(|| format!("{} cannot be read", path.display()))?.len();
        Ok(Self { path, at })
    }

    /// Number of whole lines since then that hold each of `words`.
    pub(super) fn count(&mut self, words: &[&str]) -> anyhow::Result<u64> {
        let mut file = File::open(&self.path).with_context(|| format!("{} cannot be read", self.path.display()))?;
        file.seek(SeekFrom::Start(self.at))?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)?;
        let whole = bytes.iter().rposition(|byte| *byte == b'\n').map_or(0, |last| last + 1);
        self.at += whole as u64;
        let text = String::from_utf8_lossy(&bytes[..whole]);
        Ok(text.lines().filter(|line| words.iter().all(|word| line.contains(word))).count() as u64)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use crate::bench::proof::Counted;
    use crate::bench::proof::LogTail;
    use crate::bench::proof::is_of_namespace;
    use crate::bench::proof::metric_sum;
    use crate::bench::proof::of_capture;
    use crate::bench::proof::of_counts;
    use crate::bench::proof::of_denied;
    use crate::bench::proof::of_refused;
    use crate::bench::proof::of_requests;
    use crate::bench::proof::of_route;
    use crate::bench::proof::of_totals;
    use crate::bench::work::Asked;
    use crate::bench::work::Probed;
    use crate::bench::work::Totals;
    use crate::sniff::Sniffed;
    use crate::sniff::Tls;

    #[test]
    fn a_run_is_proven_only_if_every_counter_agrees() {
        let totals = Totals { payload: 1000, connections: 3, ..Totals::default() };
        let good = Counted { records: 3, connections: 3, bytes: 1000 };
        assert!(of_counts(&totals, [good, good], 1400).is_empty());
        for (what, one, link) in [
            ("a record is missing", Counted { records: 2, ..good }, 1400),
            ("a record came twice", Counted { records: 4, ..good }, 1400),
            ("a connection was not counted", Counted { connections: 0, ..good }, 1400),
            ("bytes were not counted", Counted { bytes: 999, ..good }, 1400),
            ("bytes took another way", good, 900),
        ] {
            assert_eq!(of_counts(&totals, [good, one], link).len(), 1, "{what}");
        }
        assert!(of_totals(&totals).is_empty());
        assert_eq!(of_totals(&Totals { failed: 1, ..totals }).len(), 1);
    }

    #[test]
    fn a_route_is_proven_by_the_servers_that_answered() {
        let of = |v1: u64, v2: u64, v3: u64| {
            let answered = [("v1", v1), ("v2", v2), ("v3", v3)].map(|(name, count)| (name.to_owned(), count));
            let totals = Totals { answered: answered.into_iter().filter(|it| it.1 > 0).collect(), ..Totals::default() };
            of_route(&totals, ["v1", "v2"], 10).len()
        };
        assert_eq!(of(9000, 1000, 0), 0);
        assert_eq!(of(9100, 900, 0), 0, "lots were drawn");
        assert_eq!(of(10_000, 0, 0), 1, "nothing was routed");
        assert_eq!(of(5000, 5000, 0), 1, "other shares");
        assert_eq!(of(8999, 1000, 1), 1, "another server");
        assert_eq!(of(0, 0, 0), 1, "no answer at all");
    }

    #[test]
    fn each_request_has_a_record_on_both_sides() {
        let answered = [("v1".to_owned(), 9), ("v2".to_owned(), 1)].into();
        let totals = Totals { payload: 1000, answered, ..Totals::default() };
        assert!(of_requests(&totals, [10, 10], 1000).is_empty());
        for (records, link) in [([9, 10], 1000), ([10, 11], 1000), ([10, 10], 999)] {
            assert_eq!(of_requests(&totals, records, link).len(), 1, "{records:?} {link}");
        }
    }

    #[test]
    fn a_refusal_counts_with_its_reason_only() {
        let asked = |forbidden: u64, passed: u64| Asked {
            attempts: forbidden + passed,
            statuses: [("403".to_owned(), forbidden), ("200".to_owned(), passed)].into(),
            servers: [(String::new(), forbidden), ("v1".to_owned(), passed)].into(),
        };
        assert!(of_refused(&asked(10, 0), 10.0, 10).is_empty());
        assert_eq!(of_refused(&asked(10, 0), 10.0, 9).len(), 1, "refused by something else");
        assert_eq!(of_refused(&asked(10, 0), 100.0, 10).len(), 1, "too few tries");
        assert_eq!(of_refused(&asked(10, 1), 10.0, 10).len(), 1, "answered");
    }

    #[test]
    fn a_capture_proves_encryption_only_if_it_saw_enough_and_nothing_else() {
        let totals = Totals { payload: 100, ..Totals::default() };
        let good = Sniffed {
            tcp_ports: [(15008, 300), (15012, 5)].into(),
            markers: [("m".to_owned(), 0)].into(),
            tls: Tls { encrypted_bytes: 150, encrypted_records: 3, ..Tls::default() },
            ..Sniffed::default()
        };
        assert!(of_capture(&totals, &good).is_empty());
        let bad = [
            Sniffed { markers: [("m".to_owned(), 1)].into(), ..good.clone() },
            Sniffed { tcp_ports: [(9001, 1)].into(), ..good.clone() },
            Sniffed { tls: Tls { not_tls: 1, ..good.tls.clone() }, ..good.clone() },
            Sniffed { tls: Tls { server_hellos_other: 1, ..good.tls.clone() }, ..good.clone() },
            Sniffed { tls: Tls::default(), ..good.clone() },
        ];
        for seen in bad {
            assert_eq!(of_capture(&totals, &seen).len(), 1, "{seen:?}");
        }
    }

    #[test]
    fn denial_is_proven_by_tries_that_were_refused_by_policy() {
        let probed = Probed { attempts: 10, passed: 0 };
        assert!(of_denied(&probed, 10.0, 10).is_empty());
        assert_eq!(of_denied(&probed, 10.0, 3).len(), 1, "refused by something else");
        assert_eq!(of_denied(&probed, 100.0, 10).len(), 1, "too few tries");
        assert_eq!(of_denied(&Probed { attempts: 10, passed: 1 }, 10.0, 10).len(), 1);
    }

    #[test]
    fn metrics_are_summed_by_labels() {
        let text = "# HELP x y\nx_total{a=\"1\",b=\"2\"} 5\nx_total{a=\"1\",b=\"3\"} 7\nx_total{a=\"9\"} 1\nxx_total{a=\"1\"} 8\n";
        assert_eq!(metric_sum(text, "x_total", &["a=\"1\""]), 12);
        assert_eq!(metric_sum(text, "x_total", &["a=\"1\"", "b=\"3\""]), 7);
        assert_eq!(metric_sum(text, "none", &[]), 0);
    }

    #[test]
    fn policies_are_told_by_namespace_in_either_proxys_words() {
        for (policy, of) in [
            (json!({"name": "bench/a"}), true),
            (json!({"name": "a", "namespace": "bench"}), true),
            (json!({"name": "benches/a"}), false),
            (json!({"name": "bench", "namespace": "other"}), false),
            (json!({}), false),
        ] {
            assert_eq!(is_of_namespace(&policy, "bench"), of, "{policy}");
        }
    }

    #[test]
    fn a_log_is_read_on_and_half_a_line_is_left() -> anyhow::Result<()> {
        let dir = tempfile::tempdir()?;
        let path = dir.path().join("log");
        std::fs::write(&path, "old a\n")?;
        let mut tail = LogTail::at_end(path.clone())?;
        std::fs::write(&path, "old a\nnew a b\nhalf a")?;
        assert_eq!(tail.count(&["a"])?, 1);
        std::fs::write(&path, "old a\nnew a b\nhalf a b\n")?;
        assert_eq!(tail.count(&["a", "b"])?, 1);
        Ok(())
    }
}
