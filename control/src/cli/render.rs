//! JSON answers as tables and sentences for people.
//!
//! Reads the JSON leniently: a missing field is an empty cell, so that a `tulle` of another version still shows what it
//! understands. Control characters from pods' or users' names never reach the terminal.

use serde_json::Value;

/// Aligned columns; an empty table says so.
pub(super) fn table(header: &[&str], rows: Vec<Vec<String>>) -> String {
    if rows.is_empty() {
        return "none\n".into();
    }
    let mut widths: Vec<usize> = header.iter().map(|cell| cell.len()).collect();
    for row in &rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let line = |cells: &mut dyn Iterator<Item = &str>| {
        let mut text = String::new();
        for (cell, width) in cells.zip(&widths) {
            text.push_str(&format!("{cell:<width$}  "));
        }
        format!("{}\n", text.trim_end())
    };
    let mut text = line(&mut header.iter().copied());
    for row in &rows {
        text.push_str(&line(&mut row.iter().map(String::as_str)));
    }
    text
}

pub(super) fn cell(value: &Value) -> String {
    let text = match value {
        Value::Null => String::new(),
        Value::String(text) => text.clone(),
        Value::Array(list) => list.iter().map(cell).collect::<Vec<_>>().join(","),
        other => other.to_string(),
    };
    text.chars().filter(|c| !c.is_control()).collect()
}

fn rows<'a>(value: &'a Value, row: impl Fn(&'a Value) -> Vec<String>) -> Vec<Vec<String>> {
    value.as_array().into_iter().flatten().map(row).collect()
}

fn entries(value: &Value) -> impl Iterator<Item = (&String, &Value)> {
    value.as_object().into_iter().flatten()
}

pub(super) fn workloads(value: &Value) -> String {
    let header = ["NAMESPACE", "NAME", "NODE", "PROTOCOL", "STATUS", "ADDRESSES", "ACCOUNT", "POLICIES"];
    table(
        &header,
        rows(value, |item| {
            let w = &item["resource"]["workload"];
            let keys = ["namespace", "name", "node", "protocol", "status", "addresses", "serviceAccount", "policies"];
            keys.iter().map(|key| cell(&w[*key])).collect()
        }),
    )
}

pub(super) fn services(value: &Value) -> String {
    let mut header = vec!["NAMESPACE", "NAME", "ADDRESSES", "PORTS"];
    // What nodes counted is known where they can be asked.
    let counted = value.as_array().into_iter().flatten().any(|item| item["traffic"].is_object());
    if counted {
        header.extend(["REQUESTS", "FAILED", "P50", "P90", "P99", "SEEN BY"]);
    }
    table(
        &header,
        rows(value, |item| {
            let s = &item["resource"]["service"];
            let ports = s["ports"].as_array().into_iter().flatten();
            let ports: Vec<String> = ports
                .map(|p| {
                    format!(
                        "{}→{}",
                        cell(&p["port"]),
                        if p["target"] == 0 { "named".into() } else { cell(&p["target"]) }
                    )
                })
                .collect();
            let mut row = vec![cell(&s["namespace"]), cell(&s["name"]), cell(&s["addresses"]), ports.join(",")];
            if counted {
                row.extend(traffic(&item["traffic"]));
            }
            row
        }),
    )
}

/// Requests, share of failures, percentiles, and who saw it: the clients' proxies where they read requests, which is what
/// clients see, else the servers'.
fn traffic(value: &Value) -> [String; 6] {
    let Some((reporter, seen)) = ["source", "destination"].into_iter().find_map(|who| Some((who, value.get(who)?)))
    else {
        return Default::default();
    };
    let ms = |key: &str| seen[key].as_f64().map_or_else(String::new, |ms| format!("{ms:.1} ms"));
    let failed = format!("{:.1} %", seen["failedPercent"].as_f64().unwrap_or(0.0));
    [cell(&seen["requests"]), failed, ms("p50Ms"), ms("p90Ms"), ms("p99Ms"), reporter.to_owned()]
}

pub(super) fn policies(value: &Value) -> String {
    let header = ["NAME", "ACTION", "SCOPE", "RULES", "VERSION"];
    table(
        &header,
        rows(value, |item| {
            let a = &item["resource"];
            let count = a["rules"].as_array().map_or(0, Vec::len).to_string();
            let rules = if a["deniesAll"] == true { "denies all".into() } else { count };
            vec![cell(&item["name"]), cell(&a["action"]), cell(&a["scope"]), rules, cell(&item["version"])]
        }),
    )
}

pub(super) fn network_policies(value: &Value) -> String {
    let header = ["NAMESPACE", "NAME", "INGRESS", "EGRESS", "VERSION"];
    table(
        &header,
        rows(value, |item| {
            let p = &item["resource"];
            let rules = |direction: &str| match p[direction].as_array() {
                _ if !p["unreadable"].is_null() && !p[direction].is_null() => "isolated: unreadable".into(),
                None => "open".into(),
                Some(rules) if rules.is_empty() => "isolated".into(),
                Some(rules) => format!("{} rules", rules.len()),
            };
            let (namespace, name) = (cell(&p["namespace"]), cell(&p["name"]));
            vec![namespace, name, rules("ingress"), rules("egress"), cell(&item["version"])]
        }),
    )
}

pub(super) fn trust_bundles(value: &Value) -> String {
    let header = ["TRUST DOMAIN", "ROOT (SHA-256)", "VERSION"];
    let roots = |item: &Value| item["resource"]["roots"].as_array().cloned().unwrap_or_default();
    let row =
        |item: &Value, root: &Value| vec![cell(&item["resource"]["trustDomain"]), cell(root), cell(&item["version"])];
    let all = value.as_array().into_iter().flatten();
    table(&header, all.flat_map(|item| roots(item).iter().map(|root| row(item, root)).collect::<Vec<_>>()).collect())
}

pub(super) fn nodes(value: &Value) -> String {
    let header = ["NODE", "CONNECTED", "ACKED", "ATTACHED", "VERSION", "REJECTED"];
    let rows = entries(value).map(|(name, node)| {
        let keys = ["connected", "acked_generation", "attached", "version", "nacks"];
        let mut row = vec![name.clone()];
        row.extend(keys.iter().map(|key| cell(&node[*key])));
        row
    });
    table(&header, rows.collect())
}

pub(super) fn conditions(value: &Value) -> String {
    let header = ["KIND", "OBJECT", "CONDITION", "STATUS", "REASON", "MESSAGE"];
    let mut all = Vec::new();
    for object in value.as_array().into_iter().flatten() {
        for condition in object["conditions"].as_array().into_iter().flatten() {
            let (namespace, name) = (cell(&object["namespace"]), cell(&object["name"]));
            let path = if namespace.is_empty() { name } else { format!("{namespace}/{name}") };
            let mut row = vec![cell(&object["kind"]), path];
            row.extend(["type", "status", "reason", "message"].iter().map(|key| cell(&condition[*key])));
            all.push(row);
        }
    }
    table(&header, all)
}

pub(super) fn certificates(value: &Value) -> String {
    let header = ["NODE", "IDENTITY", "STATE", "SERIAL", "NOT AFTER", "ERROR"];
    table(
        &header,
        rows(value, |item| {
            let expiry = item["notAfter"].as_i64().filter(|at| *at > 0);
            let expiry = expiry.and_then(|at| jiff::Timestamp::from_second(at).ok());
            vec![
                cell(&item["node"]),
                cell(&item["identity"]),
                cell(&item["state"]),
                cell(&item["serial"]),
                expiry.map_or_else(String::new, |at| at.to_string()),
                cell(&item["error"]),
            ]
        }),
    )
}

pub(super) fn status(value: &Value) -> String {
    let mut text = format!("Generation {}\n", cell(&value["generation"]));
    for waiting in value["waiting"].as_array().into_iter().flatten() {
        text.push_str(&format!("NOT READY: waiting for {}\n", cell(waiting)));
    }
    text.push_str(&stale(value));
    text.push('\n');
    let header = ["NODE", "CONNECTED", "ACKED", "READY", "PODS", "IN", "OUT", "TUNNELS", "VERSION", "PROBLEM"];
    let nodes = entries(&value["nodes"]).chain(entries(&value["gateways"])).map(|(name, node)| {
        let s = &node["status"];
        let mut problems = vec![cell(&node["error"]), cell(&s["pending"]), cell(&node["nacks"])];
        problems.retain(|problem| !problem.is_empty());
        vec![
            name.clone(),
            cell(&node["connected"]),
            cell(&node["acked_generation"]),
            cell(&s["ready"]),
            s["pods"].as_array().map_or(String::new(), |pods| pods.len().to_string()),
            cell(&s["inboundConnections"]),
            cell(&s["outboundConnections"]),
            cell(&s["tunnels"]),
            cell(&s["version"]),
            problems.join("; "),
        ]
    });
    text.push_str(&table(&header, nodes.collect()));
    text.push('\n');
    let header = ["POD", "NODE", "CAPTURE", "DNS", "PREEXISTING", "IN", "OUT", "REASON"];
    let mut pods = Vec::new();
    for (name, node) in entries(&value["nodes"]) {
        for pod in node["status"]["pods"].as_array().into_iter().flatten() {
            let mut row = vec![format!("{}/{}", cell(&pod["namespace"]), cell(&pod["name"])), name.clone()];
            let keys = ["capture", "dns", "preexisting", "inboundConnections", "outboundConnections", "reason"];
            row.extend(keys.iter().map(|key| cell(&pod[*key])));
            pods.push(row);
        }
    }
    text.push_str(&table(&header, pods));
    text.push_str(&problems(value));
    text
}

/// Kinds that control cannot ask the API server about, and since when.
fn stale(value: &Value) -> String {
    let mut text = String::new();
    let kinds = value["source"].as_array().into_iter().flatten();
    for kind in kinds.filter(|kind| kind["standing"] == "stale") {
        let since = match kind["heard"].as_i64().and_then(|at| jiff::Timestamp::from_second(at).ok()) {
            Some(at) if at.as_second() > 0 => format!("as of {at}"),
            _ => "never heard of".into(),
        };
        text.push_str(&format!("STALE: {} ({since}): {}\n", cell(&kind["resource"]), cell(&kind["reason"])));
    }
    text
}

fn problems(value: &Value) -> String {
    let mut text = String::new();
    for problem in value["problems"].as_array().into_iter().flatten() {
        let word = if problem["error"] == true { "error" } else { "note" };
        let parts: Vec<String> = ["object", "field", "message"]
            .iter()
            .map(|key| cell(&problem[*key]))
            .filter(|part| !part.is_empty())
            .collect();
        // What came from the API server has no file.
        let file = cell(&problem["file"]);
        let place = if file.is_empty() { file } else { format!("{file}:{}: ", cell(&problem["line"])) };
        text.push_str(&format!("{word}: {place}{}\n", parts.join(": ")));
    }
    text
}

pub(super) fn check(value: &Value) -> String {
    let mut text = problems(value);
    let failing: Vec<Value> = value["conditions"]
        .as_array()
        .into_iter()
        .flatten()
        .filter(|object| {
            let list = object["conditions"].as_array();
            list.is_some_and(|list| list.iter().any(|c| c["reason"] != "Enforced"))
        })
        .cloned()
        .collect();
    if !failing.is_empty() {
        text.push_str(&conditions(&Value::Array(failing)));
    }
    let (files, errors) = (cell(&value["files"]), cell(&value["errors"]));
    text.push_str(&format!("{files} files, {errors} errors\n"));
    text
}

pub(super) fn explain(value: &Value) -> String {
    let (from, to, out) = (&value["from"], &value["to"], &value["outbound"]);
    let mut text = format!(
        "{} → {}{}{}: {}\n",
        if from["pod"].is_null() { cell(&from["address"]) } else { cell(&from["pod"]) },
        if to["host"].is_string() { format!("{}:{}", cell(&to["host"]), cell(&to["port"])) } else { at(to) },
        match cell(&to["transport"]) {
            other if other == "udp" || other == "sctp" => format!("/{other}"),
            _ => String::new(),
        },
        match cell(&to["service"]) {
            service if service.is_empty() => service,
            service => format!(" ({service})"),
        },
        cell(&value["verdict"]).to_uppercase(),
    );
    text.push_str(&request(&value["request"]));
    let identity = match cell(&from["identity"]) {
        none if none.is_empty() => "no identity".into(),
        identity => identity,
    };
    let node = if from["node"].is_null() { "no node of the mesh".into() } else { cell(&from["node"]) };
    text.push_str(&format!("  source node {node}: {}, as {identity}\n", cell(&out["plan"])));
    if !cell(&out["text"]).is_empty() {
        text.push_str(&format!("    {}\n", sentence(out)));
    }
    for endpoint in value["endpoints"].as_array().into_iter().flatten() {
        text.push_str(&format!(
            "  {:>5.1} % {} {} on {} by {}\n",
            endpoint["sharePercent"].as_f64().unwrap_or(0.0),
            cell(&endpoint["pod"]),
            at(endpoint),
            cell(&endpoint["node"]),
            cell(&endpoint["protocol"]),
        ));
        if let Some(why) = endpoint["ejected"].as_str() {
            text.push_str(&format!("          {why}\n"));
        }
        if endpoint["egress"].is_object() {
            text.push_str(&format!("          {}\n", sentence(&endpoint["egress"])));
        }
        let inbound = &endpoint["inbound"];
        if inbound.is_object() {
            if inbound["read"] == false {
                text.push_str("          the request is not read there; what follows is about its connection\n");
            }
            if !inbound["status"].is_null() {
                text.push_str(&format!("          answered with status {}\n", cell(&inbound["status"])));
            }
            let (allowed, sentence) = (inbound["allowed"] == true, sentence(inbound));
            let verdict = match (allowed, sentence.starts_with("allowed") || sentence.starts_with("denied")) {
                (_, true) => "",
                (true, false) => "allowed: ",
                (false, false) => "denied: ",
            };
            text.push_str(&format!("          {verdict}{sentence}\n"));
            let policy = cell(&inbound["policy"]);
            if !policy.is_empty() {
                let rule = inbound["rule"]
                    .as_u64()
                    .map_or_else(|| "no rule of it matched".into(), |rule| format!("rule {rule}"));
                text.push_str(&format!("          policy {policy}, {rule}\n"));
            }
            let audit = cell(&inbound["audit"]);
            if !audit.is_empty() {
                text.push_str(&format!("          audit: {audit}\n"));
            }
            let dry_run = cell(&inbound["dryRun"]);
            if !dry_run.is_empty() {
                text.push_str(&format!("          dry run: {dry_run}\n"));
            }
            let evaluated = cell(&inbound["evaluated"]);
            if !evaluated.is_empty() {
                text.push_str(&format!("          evaluated: {evaluated}\n"));
            }
        }
        for key in ["error", "note"] {
            if !cell(&endpoint[key]).is_empty() {
                text.push_str(&format!("          {key}: {}\n", cell(&endpoint[key])));
            }
        }
    }
    if value["endpointsNotShown"].as_u64().unwrap_or(0) > 0 {
        text.push_str(&format!("  and {} more endpoints\n", cell(&value["endpointsNotShown"])));
    }
    for hint in value["hints"].as_array().into_iter().flatten() {
        text.push_str(&format!("  hint: {}\n", cell(hint)));
    }
    let [requests, failed, p50, p90, p99, reporter] = traffic(&value["traffic"]);
    if !requests.is_empty() {
        text.push_str(&format!(
            "  lately {requests} requests, {failed} failed, p50 {p50}, p90 {p90}, p99 {p99} (seen by the {reporter})\n"
        ));
    }
    text
}

/// The request that was asked about, and what its own proxy does with it.
fn request(value: &Value) -> String {
    if !value.is_object() {
        return String::new();
    }
    let mut text = format!("  {} {} of {}\n", cell(&value["method"]), cell(&value["path"]), cell(&value["host"]));
    if !cell(&value["limits"]).is_empty() {
        text.push_str(&format!("    counts against HTTPRateLimit {}\n", cell(&value["limits"])));
    }
    for answer in value["answers"].as_array().into_iter().flatten() {
        text.push_str(&format!(
            "  {:>5.1} % answered by the source's proxy with status {}: {}\n",
            answer["sharePercent"].as_f64().unwrap_or(0.0),
            cell(&answer["status"]),
            cell(&answer["text"]),
        ));
    }
    text
}

/// Address and port.
fn at(value: &Value) -> String {
    let (address, port) = (cell(&value["address"]), cell(&value["port"]));
    if address.contains(':') { format!("[{address}]:{port}") } else { format!("{address}:{port}") }
}

fn sentence(value: &Value) -> String {
    let (code, text) = (cell(&value["code"]), cell(&value["text"]));
    if code.is_empty() || text.contains(&code) { text } else { format!("{text} [{code}]") }
}
