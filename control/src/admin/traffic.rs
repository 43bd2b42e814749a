//! What nodes counted of the requests to services, joined: numbers and exact percentiles.
//!
//! Nodes send how many requests took how long, not percentiles, because percentiles of several nodes cannot be joined. Both
//! ends of a request may have read it, so what clients' proxies saw and what servers' proxies saw are told apart. Limits: the
//! last five to ten minutes, and nodes that answer; an older one does not know the question.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Value, json};
use tulle_proto::node::node_message::Answer;
use tulle_proto::node::node_question::Question;
use tulle_proto::node::{ServiceSeen, TrafficQuestion};

use crate::admin::State;

/// Of one service and reporter, over all nodes.
#[derive(Default)]
struct Sum {
    failed: u64,
    /// Requests by microseconds.
    times: BTreeMap<u64, u64>,
}

/// `<namespace>/<hostname>` → reporter → numbers, as these nodes saw it.
pub(super) async fn seen_by(state: &State, nodes: BTreeSet<String>) -> Value {
    let asked = nodes.iter().map(|node| state.registry.ask(node, Question::Traffic(TrafficQuestion {})));
    let answers = futures_util::future::join_all(asked).await;
    let seen = answers.into_iter().filter_map(|answer| match answer {
        Ok(Answer::Traffic(traffic)) => Some(traffic.services),
        _ => None,
    });
    joined(seen.flatten())
}

fn joined(seen: impl IntoIterator<Item = ServiceSeen>) -> Value {
    let mut all: BTreeMap<(String, String), Sum> = BTreeMap::new();
    for one in seen {
        let sum = all.entry((one.service, one.reporter)).or_default();
        sum.failed += one.failed;
        for (time, count) in one.micros.into_iter().zip(one.counts) {
            *sum.times.entry(time).or_default() += count;
        }
    }
    let mut value = json!({});
    for ((service, reporter), sum) in all {
        value[service][reporter] = numbers(&sum);
    }
    value
}

fn numbers(sum: &Sum) -> Value {
    let requests: u64 = sum.times.values().sum();
    let percentile = |percent: u64| {
        // The smallest time that so many did not exceed.
        let wanted = (requests * percent).div_ceil(100).max(1);
        let mut so_far = 0;
        let time = sum.times.iter().find(|(_, count)| {
            so_far += **count;
            so_far >= wanted
        });
        time.map(|(micros, _)| *micros as f64 / 1e3)
    };
    json!({
        "requests": requests,
        "failed": sum.failed,
        "failedPercent": if requests == 0 { 0.0 } else { sum.failed as f64 * 100.0 / requests as f64 },
        "p50Ms": percentile(50),
        "p90Ms": percentile(90),
        "p99Ms": percentile(99),
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;
    use tulle_proto::node::ServiceSeen;

    use super::joined;

    #[test]
    fn percentiles_are_those_of_all_requests_of_all_nodes() {
        let seen = |reporter: &str, failed: u64, times: &[(u64, u64)]| ServiceSeen {
            service: "shop/cart.shop".into(),
            reporter: reporter.into(),
            failed,
            micros: times.iter().map(|(time, _)| *time).collect(),
            counts: times.iter().map(|(_, count)| *count).collect(),
        };
        let value = joined([
            seen("source", 1, &[(1_000, 50), (2_000, 39)]),
            seen("source", 0, &[(1_000, 1), (30_000, 10)]),
            seen("destination", 0, &[(500, 1)]),
        ]);
        let source =
            json!({"requests": 100, "failed": 1, "failedPercent": 1.0, "p50Ms": 1.0, "p90Ms": 2.0, "p99Ms": 30.0});
        assert_eq!(value["shop/cart.shop"]["source"], source);
        assert_eq!(value["shop/cart.shop"]["destination"]["p99Ms"], 0.5);
        assert_eq!(joined([]), json!({}));
    }
}
