//! docs/reference.md says what the code says: the parts between `<!-- generated:… -->` marks are written from the code by
//! `make reference`, and this test fails when they differ. The rest of the page is written by hand.

#![allow(clippy::unwrap_used)]

use std::fmt::Write as _;
use std::fs;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;

use clap::{Args as _, Command};
use prometheus_client::registry::Registry;
use ztunnel::config::Node;
use ztunnel::config::cni::Installation;
use ztunnel::config::gateway::Gateway;
use ztunnel::config::istio::{NOT_FOLLOWED, Variable};
use ztunnel::outcome::{Code, DryRun, Fault, Outcome, Retry, WouldBe};
use ztunnel::telemetry::breakers::{BreakerLabels, DestinationLabels};
use ztunnel::telemetry::dns::{DnsAnswerLabels, DnsLabels};
use ztunnel::telemetry::metrics::{CaptureLabels, ElsewhereLabels, Metrics};
use ztunnel::telemetry::{ConnRecord, Direction};

#[test]
fn denial_codes_in_the_reference_are_those_of_the_code() {
    let mut table =
        "| Code | Meaning | Whose | Again? | `response_flags` | CONNECT |\n|---|---|---|---|---|---|\n".to_owned();
    for code in Code::ALL {
        let fault = match code.fault() {
            Fault::None => "nobody's",
            Fault::Client => "client",
            Fault::Destination => "destination",
            Fault::Policy => "policy",
            Fault::Mesh => "mesh",
        };
        let retry = match code.retry() {
            Retry::No => "no",
            Retry::Yes => "at once",
            Retry::Later => "later",
        };
        let (name, flag, status) = (code.name(), code.flag(), code.status().as_u16());
        let _ = writeln!(table, "| `{name}` | {} | {fault} | {retry} | `{flag}` | {status} |", code.meaning());
    }
    check("codes", &table);
}

#[test]
fn settings_in_the_reference_are_those_of_the_code() {
    check("ztunnel-settings", &settings(Node::augment_args(Command::new("ztunnel")), |_| true));
    let node = Node::augment_args(Command::new("ztunnel"));
    let own = |name: &str| node.get_arguments().all(|argument| argument.get_id() != name);
    check("gateway-settings", &settings(Gateway::augment_args(Command::new("ztunnel")), own));
    check("cni-settings", &settings(Installation::augment_args(Command::new("ztunnel")), |_| true));
}

/// A row for each argument of `command` that is `wanted` by its id.
fn settings(command: Command, wanted: impl Fn(&str) -> bool) -> String {
    let mut table = "| Flag | Variable | Default | Meaning |\n|---|---|---|---|\n".to_owned();
    let shown = command.get_arguments().filter(|argument| !argument.is_hide_set());
    for argument in shown.filter(|argument| wanted(argument.get_id().as_str())) {
        let flag = argument.get_long().unwrap_or_default();
        let variable = argument.get_env().map(|name| format!("`{}`", name.to_string_lossy())).unwrap_or_default();
        let values: Vec<_> = argument.get_default_values().iter().map(|value| value.to_string_lossy()).collect();
        let default = values.join(",");
        let default = if default.is_empty() { String::new() } else { format!("`{default}`") };
        let help = argument.get_help().map(ToString::to_string).unwrap_or_default();
        let _ = writeln!(table, "| `--{flag}` | {variable} | {default} | {help} |");
    }
    table
}

#[test]
fn variables_that_are_not_followed_are_those_of_the_code() {
    let mut table = "| Variable | Another value than | Does | Instead |\n|---|---|---|---|\n".to_owned();
    for Variable { name, usual, refused, instead } in NOT_FOLLOWED {
        let does = if *refused { "keeps the proxy from starting" } else { "is told in the log" };
        let usual = usual.iter().map(|value| format!("`{value}`")).collect::<Vec<_>>().join(", ");
        let _ = writeln!(table, "| `{name}` | {usual} | {does} | {instead} |");
    }
    check("istio-variables", &table);
}

#[test]
fn metrics_in_the_reference_are_those_of_the_code() {
    let mut registry = Registry::default();
    let metrics = Arc::new(Metrics::new(&mut registry));
    // A family without members is not on the page: one connection that ends badly and one that is refused fill all.
    let address = SocketAddr::from(([192, 0, 2, 1], 1));
    for code in [Code::ConnectFailed, Code::PolicyDenied] {
        let mut record = ConnRecord::new(metrics.clone(), Direction::Inbound, address, address);
        record.opened();
        record.finish(&Outcome::new(code, ""));
    }
    metrics.pods.get_or_create(&CaptureLabels { capture: "Captured" }).set(1);
    for would_be in [WouldBe::Denied, WouldBe::Audited] {
        metrics.without_effect(&DryRun { policy: "shop/some".into(), rule: Some(0), would_be });
    }
    metrics.elsewhere.get_or_create(&ElsewhereLabels { code: Code::ConnectFailed.name() }).inc();
    let labels = DnsLabels {
        request_query_type: "A",
        request_protocol: "udp",
        source_canonical_service: "cart".into(),
        source_canonical_revision: "v1".into(),
    };
    for family in [&metrics.dns.requests, &metrics.dns.upstream_requests, &metrics.dns.upstream_failures] {
        family.get_or_create(&labels).inc();
    }
    metrics.dns.upstream_duration.get_or_create(&labels).observe(0.001);
    let (service, breakers) = (Arc::<str>::from("cart"), &metrics.breakers);
    for family in [&breakers.overflow, &breakers.ejections, &breakers.ejections_overflow] {
        family.get_or_create(&BreakerLabels { destination_service: service.clone(), kind: "cx" }).inc();
    }
    breakers.active.get_or_create(&DestinationLabels { destination_service: service }).inc();
    metrics.dns.answers.get_or_create(&DnsAnswerLabels { source: "mesh" }).inc();
    let mut page = String::new();
    prometheus_client::encoding::text::encode(&mut page, &registry).unwrap();
    let mut table = "| Metric | Kind | Meaning |\n|---|---|---|\n".to_owned();
    for line in page.lines() {
        let Some((name, help)) = line.strip_prefix("# HELP ").and_then(|rest| rest.split_once(' ')) else { continue };
        let kind = page.lines().find_map(|line| line.strip_prefix(&format!("# TYPE {name} "))).unwrap_or("?");
        let suffix = if kind == "counter" { "_total" } else { "" };
        let _ = writeln!(table, "| `{name}{suffix}` | {kind} | {} |", help.trim_end_matches('.'));
    }
    check("ztunnel-metrics", &table);
}

#[test]
fn names_in_the_reference_are_those_of_the_contract() {
    let text = include_str!("../../proto/src/names.rs");
    let mut table = "| Name | Value | Meaning |\n|---|---|---|\n".to_owned();
    let mut meaning = String::new();
    // A constant may be broken over two lines.
    for line in text.replace("=\n    ", "= ").lines() {
        if let Some(more) = line.strip_prefix("/// ") {
            meaning = format!("{meaning} {more}").trim().to_owned();
        } else if let Some((name, value)) = line.strip_prefix("pub const ").and_then(|rest| rest.split_once(" = ")) {
            let name = name.split(':').next().unwrap_or(name);
            let value = value.trim_end_matches(';').trim_matches('"');
            let value = value.replace("std::net::Ipv4Addr::new", "").replace("std::net::Ipv6Addr::new", "");
            let _ = writeln!(table, "| `{name}` | `{value}` | {} |", meaning.replace("[`", "`").replace("`]", "`"));
            meaning.clear();
        }
    }
    check("names", &table);
}

/// Compares one part of the page, or writes it with `UPDATE` set.
fn check(part: &str, expected: &str) {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../docs/reference.md");
    // The tests of this file run side by side; the lock makes their updates one after another.
    let lock = fs::File::open(path.parent().unwrap()).unwrap();
    lock.lock().unwrap();
    let page = fs::read_to_string(&path).unwrap();
    let (open, close) = (format!("<!-- generated:{part} -->\n"), "<!-- /generated -->");
    let start = page.find(&open).unwrap_or_else(|| panic!("docs/reference.md has no {open}")) + open.len();
    let end = start + page[start..].find(close).unwrap_or_else(|| panic!("{open} is not closed"));
    if page[start..end] == *expected {
        return;
    }
    assert!(
        std::env::var_os("UPDATE").is_some(),
        "docs/reference.md ({part}) differs from the code; run `make reference`"
    );
    fs::write(&path, format!("{}{expected}{}", &page[..start], &page[end..])).unwrap();
}
