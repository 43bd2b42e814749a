//! `tulle egress`: who talked to what outside the cluster, and the EgressPolicies that would allow exactly that.
//!
//! Nodes say what their pods tried, and egress gateways what came to them; the same attempt may so be listed twice, by each that saw it.
//! Policies are made of what nodes say alone: a gateway is a pod that somebody may start.
//! Names in it are what pods looked up or claimed, so a policy made of them is a draft for somebody to read. It holds nothing that is no
//! host name or address, each exactly as it was seen: no wildcard is guessed. What a rule allows already is not repeated.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::net::IpAddr;

use serde_json::Value;

use crate::cli::render::{self, cell};

/// What all nodes and gateways saw, kinds of several together.
pub(super) fn talks(status: &Value, namespace: Option<&str>) -> Value {
    let by = |who: &str| match seen(&status[who], namespace) {
        Value::Array(list) => list
            .into_iter()
            .map(|mut talk| {
                talk["seenBy"] = who.trim_end_matches("s").into();
                talk
            })
            .collect(),
        _ => Vec::new(),
    };
    by("nodes").into_iter().chain(by("gateways")).collect()
}

fn seen(nodes: &Value, namespace: Option<&str>) -> Value {
    let keys = ["namespace", "account", "target", "port", "spoken", "verdict", "policy"];
    let mut found: BTreeMap<Vec<String>, (Value, u64, u64)> = BTreeMap::new();
    for (_, node) in nodes.as_object().into_iter().flatten() {
        for talk in node["status"]["egress"].as_array().into_iter().flatten() {
            if namespace.is_some_and(|namespace| talk["namespace"] != namespace) {
                continue;
            }
            let key = keys.iter().map(|key| cell(&talk[*key])).collect();
            let entry = found.entry(key).or_insert_with(|| (talk.clone(), 0, 0));
            entry.1 += talk["attempts"].as_u64().unwrap_or_default();
            entry.2 += talk["bytes"].as_u64().unwrap_or_default();
        }
    }
    let one = |(mut talk, attempts, bytes): (Value, u64, u64)| {
        talk["attempts"] = attempts.into();
        talk["bytes"] = bytes.into();
        talk
    };
    found.into_values().map(one).collect()
}

/// For people.
pub(super) fn table(value: &Value) -> String {
    let header =
        ["NAMESPACE", "ACCOUNT", "TARGET", "PORT", "SPOKEN", "VERDICT", "POLICY", "ATTEMPTS", "BYTES", "SEEN BY"];
    let keys = ["namespace", "account", "target", "port", "spoken", "verdict", "policy", "attempts", "bytes", "seenBy"];
    let row = |talk: &Value| keys.iter().map(|key| cell(&talk[*key])).collect();
    render::table(&header, value.as_array().into_iter().flatten().map(row).collect())
}

/// Policies for a namespace, one for each account that did what no rule allows.
pub(super) fn policies(status: &Value, namespace: &str) -> String {
    let talks = seen(&status["nodes"], Some(namespace));
    // By account; by what is spoken and the port; names and addresses.
    type Rules = BTreeMap<(String, u64), BTreeSet<String>>;
    let mut accounts: BTreeMap<String, Rules> = BTreeMap::new();
    for talk in talks.as_array().into_iter().flatten().filter(|talk| talk["verdict"] != "allowed") {
        let (target, port) = (cell(&talk["target"]), talk["port"].as_u64().unwrap_or_default());
        if !(is_host(&target) || target.parse::<IpAddr>().is_ok()) || !(1..=65535).contains(&port) {
            continue;
        }
        let protocol = match (talk["spoken"].as_str(), target.parse::<IpAddr>()) {
            (Some("TLS"), Err(_)) => "TLS",
            (Some("HTTP"), Err(_)) => "HTTP",
            _ => "TCP",
        };
        let rules = accounts.entry(cell(&talk["account"])).or_default();
        rules.entry((protocol.to_owned(), port)).or_default().insert(target);
    }
    if accounts.is_empty() {
        return format!("# Nothing left namespace {namespace} that is not allowed already.\n");
    }
    let one = |(account, rules): (&String, &Rules)| policy(namespace, account, rules);
    accounts.iter().map(one).collect::<Vec<_>>().join("---\n")
}

fn policy(namespace: &str, account: &str, rules: &BTreeMap<(String, u64), BTreeSet<String>>) -> String {
    let mut text = format!(
        "# What account {account} reached and no rule allowed. Read it before you apply it.\n\
         apiVersion: tulle.dev/v1alpha1\nkind: EgressPolicy\nmetadata:\n  name: seen-{account}\n  namespace: {namespace}\n\
         spec:\n  selector:\n    serviceAccounts: ['{account}']\n  rules:\n"
    );
    for ((protocol, port), targets) in rules {
        for (key, wanted) in [("hosts", true), ("cidrs", false)] {
            let own: Vec<String> =
                targets.iter().filter(|target| is_host(target) == wanted).map(|target| listed(target)).collect();
            if own.is_empty() {
                continue;
            }
            let _ = writeln!(text, "  - {key}: [{}]", own.join(", "));
            let _ = writeln!(text, "    ports: [{{port: {port}, protocol: {protocol}}}]");
            if protocol == "HTTP" {
                text.push_str("    # Requests in plain text leave by a gateway only: add `via`.\n");
            }
        }
    }
    text
}

fn listed(target: &str) -> String {
    match target.parse::<IpAddr>() {
        Ok(ip) => format!("'{ip}/{}'", if ip.is_ipv4() { 32 } else { 128 }),
        Err(_) => format!("'{target}'"),
    }
}

fn is_host(text: &str) -> bool {
    let label = |label: &str| {
        let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || matches!(byte, b'-' | b'_');
        (1..=63).contains(&label.len()) && label.bytes().all(plain)
    };
    text.len() <= 253 && text.parse::<IpAddr>().is_err() && text.split('.').all(label)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::{policies, table, talks};

    #[test]
    fn what_was_seen_becomes_a_policy_that_allows_it_and_nothing_else() {
        let talk = |account: &str, target: &str, port: u64, spoken: &str, verdict: &str| {
            json!({"namespace": "shop", "account": account, "target": target, "port": port, "spoken": spoken,
                   "verdict": verdict, "policy": "", "attempts": 2, "bytes": 10})
        };
        let seen = [
            talk("cart", "api.example", 443, "TLS", "audited"),
            talk("cart", "b.example", 443, "TLS", "denied"),
            talk("cart", "203.0.113.9", 9000, "TCP", "audited"),
            talk("cart", "known.example", 443, "TLS", "allowed"),
            talk("cart", "x'}\n- hosts: ['*']", 443, "TLS", "audited"),
            talk("web", "2001:db8::1", 22, "TCP", "audited"),
        ];
        let status = json!({"nodes": {"a": {"status": {"egress": seen}}, "b": {"status": {"egress": [seen[0]]}}}});
        let text = policies(&status, "shop");
        for expected in [
            "serviceAccounts: ['cart']",
            "  - hosts: ['api.example', 'b.example']\n    ports: [{port: 443, protocol: TLS}]\n",
            "  - cidrs: ['203.0.113.9/32']\n    ports: [{port: 9000, protocol: TCP}]\n",
            "---\n",
            "'2001:db8::1/128'",
        ] {
            assert!(text.contains(expected), "{expected}:\n{text}");
        }
        assert!(!text.contains("known.example") && !text.contains('*'), "{text}");
        assert!(policies(&status, "other").starts_with("# Nothing left"));
        let listed = table(&talks(&status, None));
        assert!(listed.lines().any(|line| line.contains("api.example") && line.contains("  4  ")), "{listed}");
        let forged = json!({"gateways": {"gateway evil/x on a": {"status": {"egress": [seen[0]]}}}});
        assert!(policies(&forged, "shop").starts_with("# Nothing left"), "gateways make no policies");
        assert!(table(&talks(&forged, None)).contains("  gateway"));
    }
}
