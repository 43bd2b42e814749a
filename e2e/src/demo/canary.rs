//! The steps about a canary: what the servers themselves logged, against the weights of the route; then the same version as
//! a shadow, and as a server that fails now and then.
//!
//! Requests are made one after another on connections that stay open, so the shares are exact to one and not a matter of
//! chance. Limits: one node's share; a route has one sequence for each node that has clients.

use std::time::Duration;

use anyhow::ensure;

use crate::demo::breaker::become_;
use crate::demo::steps::FRONTEND;
use crate::eventually::eventually;
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

/// Everything to the stable version, and a copy of it to the canary.
const SHADOW: &str = "
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: catalog, namespace: shop}
spec:
  parentRefs: [{group: '', kind: Service, name: catalog, port: 80}]
  rules:
  - filters: [{type: RequestMirror, requestMirror: {backendRef: {name: catalog-next, port: 80}}}]
    backendRefs: [{name: catalog, port: 80}]
";

/// Who asks for the canary itself is answered after up to two retries.
const RETRIES: &str = "
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: catalog-next, namespace: shop}
spec:
  parentRefs: [{group: '', kind: Service, name: catalog-next, port: 80}]
  rules: [{retry: {attempts: 2, codes: [503], backoff: 1ms}, backendRefs: [{name: catalog-next, port: 80}]}]
";

pub(super) fn shadows(lab: &Lab) -> anyhow::Result<String> {
    lab.apply_yaml(SHADOW)?;
    let shown = shadowed(lab);
    // Whatever was seen, the next step finds a shadow that is well, and none.
    become_(lab, "catalog-next", "")?;
    lab.apply_yaml(&route(100, 0))?;
    shown
}

fn shadowed(lab: &Lab) -> anyhow::Result<String> {
    let made = |path: &str, count: &str| {
        let url = format!("http://catalog.shop{path}");
        scenario::calls(lab, FRONTEND, &url, &["--count", count, "--keep-alive"])
    };
    let by = |pod: &str, path: &str| {
        let path = format!("\"path\":\"{path}\"");
        scenario::log_lines(lab, pod, &["\"kind\":\"http\"", &path]).len()
    };
    // No more than may be under way together, so that none is left out on a busy machine.
    scenario::all_well(&made("/shadowed", "10")?, 10)?;
    eventually("the shadow has got its copies", Duration::from_secs(30), || {
        match by("shop/catalog-next", "/shadowed") {
            10 => Ok(()),
            other => Err(format!("{other} of 10")),
        }
    })?;
    let served = by("shop/catalog-0", "/shadowed") + by("shop/catalog-1", "/shadowed");
    ensure!(served == 10, "10 requests were answered and the catalog served {served}");
    become_(lab, "catalog-next", "ms=10000&status=500")?;
    let reports = made("/past-a-slow-shadow", "20")?;
    scenario::all_well(&reports, 20)?;
    ensure!(reports.iter().all(|report| report["name"] == "catalog"), "the shadow answered: {reports:?}");
    Ok("10 of 10 requests were copied; with a shadow that takes 10 s to fail 20 more were answered by the catalog"
        .into())
}

pub(super) fn retries(lab: &Lab) -> anyhow::Result<String> {
    lab.apply_yaml(RETRIES)?;
    become_(lab, "catalog-next", "status=503&every=5")?;
    let options = ["--count", "100", "--keep-alive"];
    let reports = scenario::calls(lab, FRONTEND, "http://catalog-next.shop/flaky", &options);
    become_(lab, "catalog-next", "")?;
    lab.delete("HTTPRoute", "shop/catalog-next")?;
    scenario::all_well(&reports?, 100)?;
    let path = "\"path\":\"/flaky\"";
    let of = |status: &str| scenario::log_lines(lab, "shop/catalog-next", &[path, status]).len();
    let (well, failed) = (of("\"status\":200"), of("\"status\":503"));
    ensure!(well == 100 && failed >= 20, "the server logged {well} answers and {failed} failures");
    Ok(format!("the server failed {failed} times, and 100 of 100 requests were answered"))
}

pub(super) fn pins(lab: &Lab) -> anyhow::Result<String> {
    lab.apply_yaml(&route(100, 0))?;
    let (without, with) = (hundred(lab, &[])?, hundred(lab, &["--header", "x-canary: always"])?);
    ensure!((without, with) == (0, 100), "without the header {without} of 100 reached the canary, with it {with}");
    Ok("at weight 0 the canary serves nobody but who asks for it: 100 of 100".into())
}
