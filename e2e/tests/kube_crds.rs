//! Promise: what the documents and examples show, an API server with our definitions takes; and what is wrong it refuses
//! with words that help.

use std::path::{Path, PathBuf};

use anyhow::Context as _;
use e2e::kube::cluster::code;
use e2e::kube::{self, Options};
use e2e::manifest;
use serde_json::Value;

fn top() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap_or_else(|| Path::new("/"))
}

/// The YAML of a page, fence by fence, each with the number of its first line.
fn fences(page: &str) -> Vec<(usize, String)> {
    let mut all = Vec::new();
    let mut open: Option<(usize, usize, String)> = None;
    for (number, line) in page.lines().enumerate() {
        let text = line.trim_start();
        let indent = line.len() - text.len();
        open = match open {
            None if text == "```yaml" => Some((number + 2, indent, String::new())),
            None => None,
            Some((at, _, yaml)) if text.starts_with("```") => {
                all.push((at, yaml));
                None
            }
            Some((at, indent, mut yaml)) => {
                yaml.push_str(line.get(indent..).unwrap_or_default());
                yaml.push('\n');
                Some((at, indent, yaml))
            }
        };
    }
    all
}

/// Objects of the documents; fences that are no whole objects are left out.
fn documents() -> anyhow::Result<Vec<(String, String)>> {
    let mut all = Vec::new();
    let mut pages: Vec<PathBuf> =
        std::fs::read_dir(top().join("docs"))?.map(|it| Ok(it?.path())).collect::<anyhow::Result<_>>()?;
    pages.push(top().join("README.md"));
    pages.sort();
    for page in pages.into_iter().filter(|path| path.extension().is_some_and(|it| it == "md")) {
        let name = page.strip_prefix(top())?.display().to_string();
        let fences = fences(&std::fs::read_to_string(&page)?).into_iter();
        all.extend(
            fences.filter(|(_, yaml)| yaml.contains("apiVersion:")).map(|(at, yaml)| (format!("{name}:{at}"), yaml)),
        );
    }
    for path in manifest::files(&top().join("e2e/examples"))? {
        all.push((path.strip_prefix(top())?.display().to_string(), std::fs::read_to_string(&path)?));
    }
    Ok(all)
}

#[test]
fn every_example_of_the_documents_is_accepted() -> anyhow::Result<()> {
    let Some(api) = kube::start(Options::default()) else { return Ok(()) };
    kube::crds::install(&api)?;
    let (mut count, mut wrong) = (0, Vec::new());
    for (place, text) in documents()? {
        let objects = match manifest::parse(&place, &text) {
            Ok(objects) => objects,
            Err(error) => {
                wrong.push(format!("{error:#}"));
                continue;
            }
        };
        for (key, mut object) in objects {
            match key.kind.as_str() {
                // What one moves away from is not for this cluster.
                "CiliumNetworkPolicy" => continue,
                // The documents leave the certificate out.
                "ClusterTrustBundle" => {
                    let mut root = rcgen::CertificateParams::default();
                    root.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
                    object["spec"]["trustBundle"] = root.self_signed(&rcgen::KeyPair::generate()?)?.pem().into();
                }
                _ => {}
            }
            if !key.namespace.is_empty() {
                let name = &key.namespace;
                api.apply(&format!("apiVersion: v1\nkind: Namespace\nmetadata: {{name: {name}}}\n"))?;
            }
            count += 1;
            let text = serde_json::to_string(&object)?;
            if let Err(error) = api.dry_run(&text) {
                wrong.push(format!("{place}: {key}: {error:#}"));
            }
        }
    }
    assert!(count >= 10, "only {count} objects were found");
    assert!(wrong.is_empty(), "{} of {count} are refused:\n{}", wrong.len(), wrong.join("\n"));
    Ok(())
}

/// What is wrong with an object, its spec, and words that the refusal must hold.
type Bad = (&'static str, &'static str, &'static str, &'static [&'static str]);

const BAD: &[Bad] = &[
    ("no spec", "EgressPolicy", "", &["spec", "Required"]),
    ("an action that is none", "EgressPolicy", "spec: {action: Deny}", &["spec.action", "Enforce"]),
    ("a misspelt field", "EgressPolicy", "spec: {rule: []}", &["spec.rule"]),
    ("a rule about nothing", "EgressPolicy", "spec: {rules: [{ports: [{port: 443}]}]}", &["neither hosts nor cidrs"]),
    ("an address as a name's pattern", "EgressPolicy", "spec: {rules: [{hosts: ['https://example.com']}]}", &["hosts"]),
    ("a port too high", "EgressPolicy", "spec: {rules: [{hosts: [a.example], ports: [{port: 70000}]}]}", &["65535"]),
    (
        "a protocol that is none",
        "EgressPolicy",
        "spec: {rules: [{hosts: [a.example], ports: [{port: 53, protocol: UDP}]}]}",
        &["protocol", "TCP"],
    ),
    ("an address without a length", "EgressPolicy", "spec: {rules: [{cidrs: ['192.0.2.1']}]}", &["cidrs"]),
    (
        "what cannot be seen",
        "EgressPolicy",
        "spec: {rules: [{hosts: [a.example], ports: [{port: 443, protocol: HTTPS}], http: {methods: [GET]}}]}",
        &["tls: originate"],
    ),
    ("another way out", "EgressPolicy", "spec: {rules: [{hosts: [a.example], via: proxy}]}", &["direct"]),
    (
        "a gateway without a name",
        "EgressPolicy",
        "spec: {rules: [{hosts: [a.example], via: {gateway: {namespace: x}}}]}",
        &["name"],
    ),
    ("a ceiling that only looks", "EgressPolicy", "spec: {ceiling: true, action: Audit}", &["ceiling"]),
    ("a fault that does nothing", "HTTPFault", "spec: {}", &["neither delay nor abort"]),
    ("a delay without units", "HTTPFault", "spec: {delay: {duration: '5', percent: 1}}", &["duration"]),
    ("an answer that is none", "HTTPFault", "spec: {abort: {percent: 1}}", &["httpStatus and grpcStatus"]),
    ("more than every request", "HTTPFault", "spec: {abort: {httpStatus: 503, percent: 101}}", &["percent", "100"]),
    ("no requests at all", "HTTPRateLimit", "spec: {requests: 0}", &["requests"]),
    ("nobody's count", "HTTPRateLimit", "spec: {requests: 5, per: Pod}", &["per", "Identity"]),
];

#[test]
fn what_is_wrong_is_refused_with_words_that_help() -> anyhow::Result<()> {
    let Some(api) = kube::start(Options::default()) else { return Ok(()) };
    api.apply(&kube::crds::own()?)?;
    let object = |kind: &str, spec: &str| {
        format!("apiVersion: tulle.dev/v1alpha1\nkind: {kind}\nmetadata: {{name: a, namespace: default}}\n{spec}\n")
    };
    api.dry_run(&object("EgressPolicy", "spec: {rules: [{hosts: ['*.example.com'], via: direct}]}"))
        .context("a good one is taken")?;
    let mut wrong = Vec::new();
    for (what, kind, spec, words) in BAD {
        match api.dry_run(&object(kind, spec)) {
            Ok(_) => wrong.push(format!("{what} is taken: {spec}")),
            Err(error) => {
                let said = format!("{error:#}");
                let refused = matches!(code(&error), Some(400 | 422 | 500));
                if !refused || words.iter().any(|word| !said.contains(word)) {
                    wrong.push(format!("{what}: {words:?} are not all in: {said}"));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    Ok(())
}

#[test]
fn definitions_are_established_and_show_columns() -> anyhow::Result<()> {
    let Some(api) = kube::start(Options::default()) else { return Ok(()) };
    let made = api.apply(&kube::crds::own()?)?;
    assert!(!made.is_empty());
    for one in made {
        let name = one["metadata"]["name"].as_str().unwrap_or_default();
        let now = api.get("CustomResourceDefinition", name)?.context("it is gone")?;
        let odd: Vec<&Value> = now["status"]["conditions"]
            .as_array()
            .into_iter()
            .flatten()
            .filter(|it| it["type"] == "NonStructuralSchema" || (it["type"] == "Established" && it["status"] != "True"))
            .collect();
        assert!(odd.is_empty(), "{name}: {odd:?}");
        let columns = now["spec"]["versions"][0]["additionalPrinterColumns"].as_array().map_or(0, Vec::len);
        assert!(columns > 0, "{name} shows nothing in a list");
    }
    Ok(())
}
