//! What several replicas of control know together: each node is attached to one of them, which alone can ask it.
//!
//! Pure, on their JSON answers. What all of them know alike (resources, conditions) is one replica's. Limits: percentiles of two
//! replicas cannot be joined, so where both counted requests of a service none is shown; an explanation needs a replica to which
//! the nodes of both ends are attached.

use std::collections::BTreeSet;

use serde_json::{Map, Value, json};

use crate::cli::Failure;

/// One answer to a question at `path`, of all.
pub(super) fn joined(path: &str, answers: Vec<Result<Value, Failure>>) -> Result<Value, Failure> {
    let mut good = Vec::new();
    let mut failure = None;
    for answer in answers {
        match answer {
            Ok(value) => good.push(value),
            Err(error) => failure = failure.or(Some(error)),
        }
    }
    let Some(first) = good.first().cloned() else {
        return Err(failure.unwrap_or_else(|| Failure::wrong("no replica of control was asked")));
    };
    if good.len() == 1 {
        return Ok(first);
    }
    Ok(match path.split('?').next().unwrap_or(path) {
        "/debug/status" => {
            let nodes: Vec<&Value> = good.iter().map(|one| &one["nodes"]).collect();
            let mut value = first.clone();
            value["nodes"] = nodes_of(&nodes, |node| node["status"].is_object());
            value
        }
        "/debug/nodes" => nodes_of(&good.iter().collect::<Vec<_>>(), |node| node["attached"] == true),
        "/debug/traffic" => traffic(&good),
        "/debug/callers" => callers(&good),
        "/debug/explain" => good.iter().find(|one| is_whole(one)).cloned().unwrap_or(first),
        _ => first,
    })
}

/// Whether both ends answered.
fn is_whole(explanation: &Value) -> bool {
    let endpoints = explanation["endpoints"].as_array();
    endpoints.is_none_or(|all| all.iter().all(|one| one["error"].is_null()))
}

/// By node, the answer of the replica that it talks to.
fn nodes_of(answers: &[&Value], knows: fn(&Value) -> bool) -> Value {
    let mut all = Map::new();
    for (name, node) in answers.iter().flat_map(|nodes| nodes.as_object().into_iter().flatten()) {
        let better = |old: &Value| (knows(node), node["connected"] == true) > (knows(old), old["connected"] == true);
        let Some(old) = all.get_mut(name) else {
            all.insert(name.clone(), node.clone());
            continue;
        };
        // Its stream of resources may be another replica's than its stream of questions.
        let stream = if node["connected"] == true { node.clone() } else { old.clone() };
        if better(old) {
            *old = node.clone();
        }
        for key in ["connected", "acked_generation", "nacks"] {
            if !stream[key].is_null() {
                old[key] = stream[key].clone();
            }
        }
    }
    Value::Object(all)
}

fn traffic(answers: &[Value]) -> Value {
    let mut all = json!({});
    for (service, seen) in answers.iter().flat_map(|one| one.as_object().into_iter().flatten()) {
        for (reporter, numbers) in seen.as_object().into_iter().flatten() {
            let old = all[service][reporter].take();
            all[service][reporter] = if old.is_null() { numbers.clone() } else { sum(&old, numbers) };
        }
    }
    all
}

fn sum(a: &Value, b: &Value) -> Value {
    let total = |key: &str| a[key].as_u64().unwrap_or_default() + b[key].as_u64().unwrap_or_default();
    let (requests, failed) = (total("requests"), total("failed"));
    let percent = if requests == 0 { 0.0 } else { failed as f64 * 100.0 / requests as f64 };
    json!({"requests": requests, "failed": failed, "failedPercent": percent})
}

fn callers(answers: &[Value]) -> Value {
    let mut list: Vec<Value> = Vec::new();
    for caller in answers.iter().flat_map(|one| one["callers"].as_array().into_iter().flatten()) {
        let same =
            |old: &&mut Value| ["namespace", "workload", "port", "source"].iter().all(|key| old[*key] == caller[*key]);
        let Some(old) = list.iter_mut().find(same) else {
            list.push(caller.clone());
            continue;
        };
        for key in ["connections", "refused", "open"] {
            old[key] = json!(old[key].as_u64().unwrap_or_default() + caller[key].as_u64().unwrap_or_default());
        }
        old["last"] = json!(old["last"].as_i64().max(caller["last"].as_i64()));
    }
    // What one replica's nodes see is seen, and what one replica could ask needs no other.
    let names = |one: &Value| -> BTreeSet<String> {
        one["unseenPods"].as_array().into_iter().flatten().filter_map(|pod| Some(pod.as_str()?.to_owned())).collect()
    };
    let unseen = answers.iter().map(names).reduce(|a, b| a.intersection(&b).cloned().collect()).unwrap_or_default();
    let mut errors = answers.first().and_then(|one| one["errors"].as_object().cloned()).unwrap_or_default();
    errors.retain(|node, _| answers.iter().all(|one| one["errors"][node].is_string()));
    let untold: u64 = answers.iter().filter_map(|one| one["untold"].as_u64()).sum();
    json!({"callers": list, "untold": untold, "unseenPods": unseen, "errors": errors})
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::joined;
    use crate::cli::Failure;

    fn both(path: &str, a: Value, b: Value) -> Value {
        joined(path, vec![Ok(a), Ok(b)]).unwrap()
    }

    #[test]
    fn each_node_is_as_the_replica_tells_that_it_talks_to() {
        let known = json!({"status": {"ready": true}, "connected": true, "acked_generation": 7, "nacks": []});
        let other = json!({"error": "not attached", "connected": false, "acked_generation": 0, "nacks": []});
        let a = json!({"generation": 7, "nodes": {"n1": known, "n2": other}});
        let b = json!({"generation": 7, "nodes": {"n1": other, "n2": known, "n3": other}});
        let value = both("/debug/status", a, b);
        assert_eq!((&value["nodes"]["n1"], &value["nodes"]["n2"]), (&known, &known));
        assert_eq!(value["nodes"]["n3"]["error"], "not attached");
        // Its two streams are two replicas'.
        let asked = json!({"status": {}, "connected": false, "acked_generation": 0, "nacks": []});
        let fed = json!({"error": "not attached", "connected": true, "acked_generation": 9, "nacks": ["x"]});
        let value = both("/debug/status", json!({"nodes": {"n": asked}}), json!({"nodes": {"n": fed}}));
        assert_eq!(
            value["nodes"]["n"],
            json!({"status": {}, "connected": true, "acked_generation": 9, "nacks": ["x"]})
        );
    }

    #[test]
    fn an_explanation_is_the_one_that_both_ends_answered() {
        let half = json!({"verdict": "unknown", "endpoints": [{"error": "not attached"}]});
        let whole = json!({"verdict": "denied", "endpoints": [{"inbound": {}}]});
        assert_eq!(both("/debug/explain?from=a", half.clone(), whole.clone()), whole);
        assert_eq!(
            joined("/debug/explain", vec![Err(Failure::wrong("n1 is not attached")), Ok(half.clone())]).unwrap(),
            half
        );
        let none = joined("/debug/explain", vec![Err(Failure::wrong("first")), Err(Failure::wrong("second"))]);
        assert_eq!(none.unwrap_err().text, "first");
    }

    #[test]
    fn counts_add_up_and_what_one_replica_knows_is_known() {
        let seen = |requests: u64| json!({"requests": requests, "failed": 1, "failedPercent": 1.0, "p50Ms": 2.0});
        let value = both(
            "/debug/traffic",
            json!({"a/b": {"source": seen(3)}}),
            json!({"a/b": {"source": seen(1)}, "c/d": {"source": seen(5)}}),
        );
        assert_eq!(value["a/b"]["source"], json!({"requests": 4, "failed": 2, "failedPercent": 50.0}));
        assert_eq!(value["c/d"]["source"], seen(5));
        let one = |connections: u64, unseen: &[&str], errors: Value| {
            let caller = json!({"namespace": "shop", "workload": "cart", "port": 80, "source": {"address": "10.0.0.9"},
                                "connections": connections, "refused": 0, "open": 0, "last": connections});
            json!({"callers": [caller], "untold": 1, "unseenPods": unseen, "errors": errors})
        };
        let a = one(2, &["shop/x", "shop/y"], json!({"n2": "not attached", "n3": "not attached"}));
        let b = one(3, &["shop/y"], json!({"n1": "not attached", "n3": "not attached"}));
        let value = both("/debug/callers?namespace=shop", a, b);
        assert_eq!((&value["callers"][0]["connections"], &value["callers"][0]["last"]), (&json!(5), &json!(3)));
        assert_eq!((&value["unseenPods"], &value["untold"]), (&json!(["shop/y"]), &json!(2)));
        assert_eq!(value["errors"], json!({"n3": "not attached"}));
    }
}
