//! Promise: an HTTPRoute's weights hold exactly on each node, its edits apply to the next request of a live connection, and
//! no request is lost or served twice.

use e2e::lab::Lab;
use e2e::lab::LabConfig;
use e2e::scenario;

fn route(stable: u32, canary: u32) -> String {
    format!(
        "---\napiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {{name: cart, namespace: shop}}\nspec:\n\
         \x20 parentRefs: [{{kind: Service, group: '', name: cart, port: 80}}]\n\
         \x20 rules:\n\
         \x20 - matches: [{{path: {{type: PathPrefix, value: /v}}, headers: [{{name: x-canary, value: always}}]}}]\n\
         \x20   backendRefs: [{{name: next, port: 80}}]\n\
         \x20 - matches: [{{path: {{type: PathPrefix, value: /v}}}}]\n\
         \x20   backendRefs: [{{name: cart, port: 80, weight: {stable}}}, {{name: next, port: 80, weight: {canary}}}]\n"
    )
}

/// Requests that each version has served by its own log.
fn served(lab: &Lab) -> (usize, usize) {
    let count = |pod: &str| scenario::log_lines(lab, pod, &["\"kind\":\"http\""]).len();
    (count("shop/cart"), count("shop/next"))
}

/// Makes `count` requests; how many more each version has served.
fn made(lab: &Lab, count: usize, more: &[&str]) -> anyhow::Result<(usize, usize)> {
    let before = served(lab);
    let many = count.to_string();
    let options = [&["--count", &many][..], more].concat();
    scenario::all_well(&scenario::calls(lab, "shop/web", "http://cart.shop/v", &options)?, count)?;
    let after = served(lab);
    Ok((after.0 - before.0, after.1 - before.1))
}

#[test]
fn weights_are_exact_and_an_edit_loses_nothing() -> anyhow::Result<()> {
    let mut objects = scenario::world(true);
    objects.push_str(&scenario::server("shop", "next", "next", 2));
    objects.push_str(&scenario::service("shop", "next"));
    let Some(lab) = scenario::lab(LabConfig::of(&objects)) else { return Ok(()) };
    assert_eq!(made(&lab, 20, &[])?, (20, 0), "without a route");
    lab.apply_yaml(&route(90, 10))?;
    assert_eq!(made(&lab, 100, &["--keep-alive"])?, (90, 10));
    assert_eq!(made(&lab, 100, &[])?, (90, 10), "a connection for each request");
    assert_eq!(made(&lab, 20, &["--header", "x-canary: always"])?, (0, 20), "pinned");

    let before = served(&lab);
    let load = lab.load("shop/web", &["http://cart.shop/v"], 100.0, &["--keep-alive"])?;
    for (stable, canary) in [(50, 50), (0, 100), (80, 20), (50, 50)] {
        lab.apply_yaml(&route(stable, canary))?;
        // Each version of the route gets requests of its own.
        std::thread::sleep(std::time::Duration::from_millis(200));
    }
    let reports = load.finish()?;
    scenario::all_well(&reports, 20)?;
    let after = served(&lab);
    assert_eq!(after.0 + after.1 - before.0 - before.1, reports.len(), "none lost, none served twice");
    assert_eq!(made(&lab, 100, &["--keep-alive"])?, (50, 50));

    let report = scenario::call(&lab, "shop/web", "http://cart.shop/other")?;
    assert_eq!(report["status"], 404, "no rule matches: {report}");
    scenario::await_log(&lab, "node-1", &["request complete", "HTTPRoute/shop/cart", "direction=\"outbound\""])?;
    lab.delete("HTTPRoute", "shop/cart")?;
    assert_eq!(made(&lab, 20, &[])?, (20, 0), "the route is gone");
    Ok(())
}
