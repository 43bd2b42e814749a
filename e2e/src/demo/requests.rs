//! The steps about what requests may do: a path that asks for a token, and how often each caller may come.
//!
//! They have a server of their own, so that nothing that they leave behind says anything about other steps.

use anyhow::ensure;
use serde_json::{Value, json};

use crate::demo::steps::{CLERK, FRONTEND};
use crate::issuer::Issuer;
use crate::lab::Lab;
use crate::scenario;

const OPEN: &str = "http://reports.shop/open";
const PRIVATE: &str = "http://reports.shop/private/of-today";

/// The server, and the rule that what is below /private is for those who have a token.
const REPORTS: &str = "
apiVersion: v1
kind: Pod
metadata: {name: reports, namespace: shop, labels: {app: reports}}
spec:
  nodeName: node-2
  serviceAccountName: reports
  containers:
  - {name: main, image: shop, command: [shop, serve, --name, reports, --http, '8080']}
---
apiVersion: v1
kind: Service
metadata: {name: reports, namespace: shop}
spec: {selector: {app: reports}, ports: [{name: http, port: 80, targetPort: 8080}]}
";

/// Three requests an hour from each identity.
const LIMIT: &str = "
apiVersion: tulle.dev/v1alpha1
kind: HTTPRateLimit
metadata: {name: three, namespace: shop}
spec: {requests: 3, interval: 1h, per: Identity}
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: reports, namespace: shop}
spec:
  parentRefs: [{group: '', kind: Service, name: reports, port: 80}]
  rules:
  - filters: [{type: ExtensionRef, extensionRef: {group: tulle.dev, kind: HTTPRateLimit, name: three}}]
    backendRefs: [{name: reports, port: 80}]
";

fn statuses(lab: &Lab, from: &str, url: &str, more: &[&str]) -> anyhow::Result<Vec<Value>> {
    Ok(scenario::calls(lab, from, url, more)?.iter().map(|report| report["status"].clone()).collect())
}

pub(super) fn token_asked(lab: &Lab) -> anyhow::Result<String> {
    let (issuer, stranger) = (Issuer::new("one")?, Issuer::new("one")?);
    lab.apply_yaml(REPORTS)?;
    scenario::reaches(lab, FRONTEND, PRIVATE)?;
    let rules = "[{from: [{source: {notRequestPrincipals: ['*']}}], to: [{operation: {paths: [/private/*]}}]}]";
    let policy = scenario::authorization("shop", "private-reports", "reports", "DENY", rules);
    lab.apply_yaml(&format!("{}{policy}", issuer.authentication("shop", "reports", "reports")))?;
    let with = |token: String| format!("authorization: Bearer {token}");
    let good = with(issuer.token("ann", json!({}))?);
    let forged = with(stranger.token("ann", json!({}))?);
    let expired = with(issuer.token("ann", json!({"exp": 1_000_000_000}))?);
    for (what, url, more, expected) in [
        ("without a token, where none is asked for", OPEN, &[][..], 200),
        ("without a token", PRIVATE, &[], 403),
        ("with a token of the issuer", PRIVATE, &["--header", &good], 200),
        ("with a token that somebody else signed", PRIVATE, &["--header", &forged], 401),
        ("with a token of long ago", PRIVATE, &["--header", &expired], 401),
    ] {
        let found = statuses(lab, FRONTEND, url, more)?;
        ensure!(found == [expected], "{what}: {found:?} and not {expected}");
    }
    scenario::await_log(lab, "node-2", &["request complete", "status=403", "shop/private-reports", "rule=0"])?;
    Ok("403 without a token by shop/private-reports, rule 0; 401 for a forged and an old one; 200 with a good one"
        .into())
}

pub(super) fn limited(lab: &Lab) -> anyhow::Result<String> {
    lab.apply_yaml(LIMIT)?;
    for from in [FRONTEND, CLERK] {
        let found = statuses(lab, from, OPEN, &["--count", "5", "--keep-alive"])?;
        ensure!(found == [200, 200, 200, 429, 429], "five requests of {from}: {found:?}");
    }
    scenario::await_log(lab, "node-2", &["request complete", "status=429", "flags=\"RL\""])?;
    Ok("of five requests three pass and two get 429, for the frontend and, with a count of its own, for the clerk"
        .into())
}
