//! The steps about a canary: what the servers themselves logged, against the weights of the route.
//!
//! Requests are made one after another on connections that stay open, so the shares are exact to one and not a matter of
//! chance. Limits: one node's share; a route has one sequence for each node that has clients.

use std::time::Duration;

use anyhow::ensure;

use crate::demo::steps::FRONTEND;
use crate::lab::Lab;
use crate::scenario;

const URL: &str = "http://catalog.shop/canary";

/// The new version, and Services for each version alone.
const VERSIONS: &str = "
apiVersion: v1
kind: Pod
metadata: {name: catalog-next, namespace: shop, labels: {app: catalog-next}}
spec:
  serviceAccountName: catalog
  containers:
  - {name: main, image: shop, command: [shop, serve, --name, catalog-next, --http, '8080']}
---
apiVersion: v1
kind: Service
metadata: {name: catalog-next, namespace: shop}
spec: {selector: {app: catalog-next}, ports: [{name: http, port: 80, targetPort: 8080}]}
";

fn route(stable: u32, canary: u32) -> String {
    format!(
        "apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {{name: catalog, namespace: shop}}
spec:
  parentRefs: [{{group: '', kind: Service, name: catalog, port: 80}}]
  rules:
  - matches: [{{headers: [{{name: x-canary, value: always}}]}}]
    backendRefs: [{{name: catalog-next, port: 80}}]
  - backendRefs: [{{name: catalog, port: 80, weight: {stable}}}, {{name: catalog-next, port: 80, weight: {canary}}}]
"
    )
}

/// Requests that each version has logged so far: all, and those of the canary.
fn served(lab: &Lab) -> (usize, usize) {
    let count = |pod: &str| scenario::log_lines(lab, pod, &["\"path\":\"/canary\"", "\"kind\":\"http\""]).len();
    let canary = count("shop/catalog-next");
    (canary + count("shop/catalog-0") + count("shop/catalog-1"), canary)
}

/// Makes 100 requests on one connection; how many the canary served, by its own log.
fn hundred(lab: &Lab, more: &[&str]) -> anyhow::Result<usize> {
    let before = served(lab);
    let options = [&["--count", "100", "--keep-alive"], more].concat();
    scenario::all_well(&scenario::calls(lab, FRONTEND, URL, &options)?, 100)?;
    let after = served(lab);
    ensure!(after.0 - before.0 == 100, "100 requests were answered and {} were served", after.0 - before.0);
    Ok(after.1 - before.1)
}

pub(super) fn shifts(lab: &Lab) -> anyhow::Result<String> {
    lab.apply_yaml(&format!("{VERSIONS}---\n{}", route(90, 10)))?;
    let tenth = hundred(lab, &[])?;
    ensure!((9..=11).contains(&tenth), "of 100 requests at 90/10 the canary served {tenth}");
    // The edit happens while requests run; what was counted before and after belongs to them all.
    let before = served(lab);
    let load = lab.load(FRONTEND, &[URL], 100.0, &["--keep-alive"])?;
    lab.apply_yaml(&route(50, 50))?;
    // A moment after the edit belongs to the claim.
    std::thread::sleep(Duration::from_millis(300));
    let reports = load.finish()?;
    scenario::all_well(&reports, 10)?;
    let lost = served(lab).0 - before.0;
    ensure!(lost == reports.len(), "{} requests were answered during the edit and {lost} were served", reports.len());
    let half = hundred(lab, &[])?;
    ensure!((49..=51).contains(&half), "of 100 requests at 50/50 the canary served {half}");
    Ok(format!(
        "the canary served {tenth} of 100, then {half} of 100; {} requests during the edit, none lost",
        reports.len()
    ))
}

pub(super) fn pins(lab: &Lab) -> anyhow::Result<String> {
    lab.apply_yaml(&route(100, 0))?;
    let (without, with) = (hundred(lab, &[])?, hundred(lab, &["--header", "x-canary: always"])?);
    ensure!((without, with) == (0, 100), "without the header {without} of 100 reached the canary, with it {with}");
    Ok("at weight 0 the canary serves nobody but who asks for it: 100 of 100".into())
}
