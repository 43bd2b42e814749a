//! The definitions of tulle.dev in deploy/crds against what is read here: what is read without an error, the API server accepts.
//!
//! A structural check in the way of the API server (types, required, unknown fields, enumerations, patterns, bounds); rules in
//! CEL are left to the tests with a real API server, and their cases are held against the decoder here.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::document;
use crate::source::tree::parse;

fn top() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn schemas() -> BTreeMap<String, Value> {
    let mut schemas = BTreeMap::new();
    for entry in fs::read_dir(top().join("deploy/crds")).unwrap() {
        let text = fs::read_to_string(entry.unwrap().path()).unwrap();
        let definition: Value = serde_saphyr::from_str(&text).unwrap();
        let version = &definition["spec"]["versions"][0];
        let kind = definition["spec"]["names"]["kind"].as_str().unwrap().to_owned();
        assert_eq!(definition["spec"]["group"], "tulle.dev");
        assert!(version["subresources"]["status"].is_object(), "{kind} has no status subresource");
        assert!(!version["additionalPrinterColumns"].as_array().unwrap().is_empty(), "{kind} has no columns");
        assert!(definition["spec"]["names"]["shortNames"].is_array(), "{kind} has no short name");
        assert_eq!(definition["spec"]["names"]["categories"][0], "tulle");
        schemas.insert(kind, version["schema"]["openAPIV3Schema"].clone());
    }
    schemas
}

/// Every object of tulle.dev in a text of any kind: from its apiVersion to what ends a document, a fence or a here-document.
fn objects_in(text: &str) -> Vec<String> {
    let mut objects = Vec::new();
    let mut open: Option<String> = None;
    for line in text.lines() {
        let ends = matches!(line.trim(), "---" | "END" | "EOF" | "```");
        if line.starts_with("apiVersion:") || ends {
            objects.extend(open.take());
        }
        if line.starts_with("apiVersion: tulle.dev/") {
            open = Some(String::new());
        }
        if let Some(object) = &mut open {
            object.push_str(line);
            object.push('\n');
        }
    }
    objects.extend(open);
    objects
}

fn files(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        let extension = path.extension().unwrap_or_default();
        if path.is_dir() {
            files(&path, found);
        } else if ["md", "yaml", "rs"].iter().any(|known| extension == *known) {
            found.push(path);
        }
    }
}

#[test]
fn every_example_and_every_object_of_the_tests_that_is_read_fits_the_schema() {
    let schemas = schemas();
    let mut found = Vec::new();
    for folder in ["docs", "e2e/examples", "e2e/tests/testdata", "control/src/translate/testdata"] {
        files(&top().join(folder), &mut found);
    }
    let mut count = BTreeMap::<String, usize>::new();
    for file in found {
        let text = fs::read_to_string(&file).unwrap();
        for example in objects_in(&text) {
            let Ok(tree) = parse(&example) else { continue };
            if !document(&tree).errors.is_empty() {
                continue;
            }
            let object: Value = serde_saphyr::from_str(&example).unwrap();
            let kind = object["kind"].as_str().unwrap();
            let wrong = check(&schemas[kind], &object, "");
            assert!(wrong.is_empty(), "{}: {example}\n{wrong:?}", file.display());
            *count.entry(kind.to_owned()).or_default() += 1;
        }
    }
    for (kind, least) in [("EgressPolicy", 5), ("HTTPFault", 1), ("HTTPRateLimit", 2)] {
        assert!(count.get(kind).copied().unwrap_or_default() >= least, "{kind}: {count:?}");
    }
}

#[test]
fn specs_that_cannot_be_meant_are_refused_by_the_schema_or_by_a_rule_and_always_by_the_decoder() {
    let schemas = schemas();
    // Kind, spec, where the schema refuses it; empty: a rule does, by the words of its message.
    for (kind, spec, at, rule) in [
        ("HTTPFault", "{delay: {duration: 1}}", "spec.delay.duration", ""),
        ("HTTPFault", "{delay: {duration: soon}}", "spec.delay.duration", ""),
        ("HTTPFault", "{delay: {duration: 1s, percent: 101}}", "spec.delay.percent", ""),
        ("HTTPFault", "{delay: {duration: 1s, percent: half}}", "spec.delay.percent", ""),
        ("HTTPFault", "{delay: {duration: 1s, fixed: 1s}}", "spec.delay.fixed", ""),
        ("HTTPFault", "{abort: {httpStatus: 99}}", "spec.abort.httpStatus", ""),
        ("HTTPFault", "{abort: {grpcStatus: 17}}", "spec.abort.grpcStatus", ""),
        ("HTTPFault", "{abort: {httpStatus: 503, grpcStatus: 14}}", "", "one of httpStatus and grpcStatus"),
        ("HTTPFault", "{abort: {percent: 5}}", "", "one of httpStatus and grpcStatus"),
        ("HTTPFault", "{aborts: {httpStatus: 503}}", "spec.aborts", ""),
        ("HTTPRateLimit", "{}", "spec.requests", ""),
        ("HTTPRateLimit", "{requests: 0}", "spec.requests", ""),
        ("HTTPRateLimit", "{requests: ten}", "spec.requests", ""),
        ("HTTPRateLimit", "{requests: 1, interval: 1 minute}", "spec.interval", ""),
        ("HTTPRateLimit", "{requests: 1, interval: 0s}", "", "longer than nothing"),
        ("HTTPRateLimit", "{requests: 1, per: Pod}", "spec.per", ""),
        ("HTTPRateLimit", "{requests: 1, burst: -1}", "spec.burst", ""),
        ("EgressPolicy", "{action: Allow}", "spec.action", ""),
        ("EgressPolicy", "{rules: [{}]}", "", "neither hosts nor cidrs"),
        ("EgressPolicy", "{rules: [{hosts: ['https://a.example']}]}", "spec.rules[0].hosts[0]", ""),
        ("EgressPolicy", "{rules: [{cidrs: [10.0.0.1]}]}", "spec.rules[0].cidrs[0]", ""),
        ("EgressPolicy", "{rules: [{hosts: [a.example], ports: [{port: 0}]}]}", "spec.rules[0].ports[0].port", ""),
        ("EgressPolicy", "{rules: [{hosts: [a.example], ports: [443]}]}", "spec.rules[0].ports[0]", ""),
        (
            "EgressPolicy",
            "{rules: [{hosts: [a.example], ports: [{port: 1, protocol: UDP}]}]}",
            "spec.rules[0].ports[0].protocol",
            "",
        ),
        ("EgressPolicy", "{rules: [{hosts: [a.example], tls: strip}]}", "spec.rules[0].tls", ""),
        ("EgressPolicy", "{rules: [{hosts: [a.example], originate: {}}]}", "", "originate needs tls: originate"),
        (
            "EgressPolicy",
            "{rules: [{hosts: [a.example], tls: originate, originate: {clientCertificate: ../ca}}]}",
            "spec.rules[0].originate.clientCertificate",
            "",
        ),
        (
            "EgressPolicy",
            "{rules: [{hosts: [a.example], ports: [{port: 443, protocol: TLS}], http: {methods: [GET]}}]}",
            "",
            "http cannot be seen inside TLS",
        ),
        (
            "EgressPolicy",
            "{rules: [{hosts: [a.example], tls: originate, verify: {}}]}",
            "",
            "verify is of TLS that passes through",
        ),
        (
            "EgressPolicy",
            "{rules: [{hosts: [a.example], ports: [{port: 22, protocol: TCP}], verify: {}}]}",
            "",
            "verify allows TLS only",
        ),
        (
            "EgressPolicy",
            "{ceiling: true, rules: [{hosts: [a.example], verify: {}}]}",
            "",
            "verify is for rules that allow",
        ),
        ("EgressPolicy", "{rules: [{hosts: [a.example], via: somewhere}]}", "spec.rules[0].via", ""),
        ("EgressPolicy", "{rules: [{hosts: [a.example], via: {service: x}}]}", "spec.rules[0].via.gateway", ""),
        ("EgressPolicy", "{selector: {serviceAccounts: []}}", "spec.selector.serviceAccounts", ""),
        ("EgressPolicy", "{ceiling: maybe}", "spec.ceiling", ""),
        ("EgressPolicy", "{rule: []}", "spec.rule", ""),
    ] {
        let text = format!("apiVersion: tulle.dev/v1alpha1\nkind: {kind}\nmetadata: {{name: a}}\nspec: {spec}\n");
        let object: Value = serde_saphyr::from_str(&text).unwrap();
        let wrong = check(&schemas[kind], &object, "");
        if at.is_empty() {
            assert_eq!(wrong, Vec::<String>::new(), "{spec}: meant to be left to a rule");
            let rules = schemas[kind].to_string();
            assert!(rules.contains(rule), "{kind} has no rule that says `{rule}`");
        } else {
            assert!(wrong.iter().any(|one| one.starts_with(at)), "{spec}: {wrong:?} instead of {at}");
        }
        let read = document(&parse(&text).unwrap());
        assert!(!read.errors.is_empty(), "{spec} is read without an error");
    }
}

/// What is wrong with a value, by path. Keywords of other types do not apply, as in the API server.
fn check(schema: &Value, value: &Value, path: &str) -> Vec<String> {
    let mut wrong = Vec::new();
    let mut fail = |text: String| wrong.push(format!("{}: {text}", path.trim_start_matches('.')));
    let bound = |key: &str| schema[key].as_u64().map(|bound| usize::try_from(bound).unwrap());
    if let Some(kind) = schema["type"].as_str() {
        let fits = match kind {
            "object" => value.is_object(),
            "array" => value.is_array(),
            "string" => value.is_string(),
            "boolean" => value.is_boolean(),
            "integer" => value.is_i64() || value.is_u64(),
            "number" => value.is_number(),
            other => panic!("{path}: a type {other}"),
        };
        if !fits {
            fail(format!("{value} is no {kind}"));
            return wrong;
        }
    }
    if let Some(known) = schema["enum"].as_array()
        && !known.contains(value)
    {
        fail(format!("{value} is none of {known:?}"));
    }
    match value {
        Value::String(text) => {
            if bound("maxLength").is_some_and(|most| text.len() > most) {
                fail("too long".to_owned());
            }
            if let Some(pattern) = schema["pattern"].as_str()
                && !regex::Regex::new(pattern).unwrap().is_match(text)
            {
                fail(format!("`{text}` does not match {pattern}"));
            }
        }
        Value::Number(number) => {
            let number = number.as_f64().unwrap();
            if schema["minimum"].as_f64().is_some_and(|least| number < least)
                || schema["maximum"].as_f64().is_some_and(|most| number > most)
            {
                fail(format!("{number} is out of bounds"));
            }
        }
        Value::Array(items) => {
            if bound("maxItems").is_some_and(|most| items.len() > most)
                || bound("minItems").is_some_and(|least| items.len() < least)
            {
                fail(format!("{} items", items.len()));
            }
            for (index, item) in items.iter().enumerate() {
                wrong.extend(check(&schema["items"], item, &format!("{path}[{index}]")));
            }
        }
        Value::Object(map) => {
            for key in schema["required"].as_array().into_iter().flatten() {
                if map.get(key.as_str().unwrap()).is_none() {
                    wrong.push(
                        format!("{}.{}: is missing", path, key.as_str().unwrap()).trim_start_matches('.').to_owned(),
                    );
                }
            }
            for (key, item) in map {
                let at = format!("{path}.{key}");
                // The API server has schemas of its own for these.
                if path.is_empty() && ["apiVersion", "kind", "metadata"].contains(&key.as_str()) {
                    continue;
                }
                if schema["properties"].get(key).is_some() {
                    wrong.extend(check(&schema["properties"][key], item, &at));
                } else if schema["additionalProperties"].is_object() {
                    wrong.extend(check(&schema["additionalProperties"], item, &at));
                } else if schema["x-kubernetes-preserve-unknown-fields"] != true {
                    wrong.push(format!("{}: is not known", at.trim_start_matches('.')));
                }
            }
        }
        Value::Null | Value::Bool(_) => {}
    }
    wrong
}
