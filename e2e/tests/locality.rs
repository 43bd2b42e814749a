//! Promise: a DestinationRule's localityLbSetting gives places the shares that it names, or an order in which they are used as
//! endpoints are ejected; the servers' own answers count, and `tulle explain` says the same.

use std::collections::BTreeMap;

use e2e::eventually::eventually;
use e2e::lab::{Lab, LabConfig};
use e2e::scenario;
use serde_json::Value;

/// Pods of one Service, each on a node in another place: the client's, its region, the region that is named, another one.
const PLACES: [(&str, u16, &str, &str); 4] =
    [("near", 1, "r1", "z1"), ("zone", 2, "r1", "z2"), ("named", 3, "r3", "z1"), ("other", 4, "r2", "z1")];

fn world() -> String {
    let mut objects = scenario::namespace("shop", true) + &scenario::client("shop", "web", 1);
    for (name, node, region, zone) in PLACES {
        objects += &scenario::server("shop", name, "cart", node);
        let labels = format!("topology.kubernetes.io/region: {region}, topology.kubernetes.io/zone: {zone}");
        objects += &scenario::node(node, &labels);
    }
    // The same pods, by connections whose requests are not read.
    let bytes = "---\napiVersion: v1\nkind: Service\nmetadata: {name: bytes, namespace: shop}\n\
                 spec: {selector: {app: cart}, ports: [{name: tcp, port: 80, targetPort: 8080}]}\n";
    objects + &scenario::service("shop", "cart") + bytes
}

/// The same DestinationRule for both Services; `policy` is YAML in flow style.
fn apply(lab: &Lab, policy: &str) -> anyhow::Result<()> {
    let rule = |host: &str| {
        format!(
            "---\napiVersion: networking.istio.io/v1\nkind: DestinationRule\nmetadata: {{name: {host}, namespace: shop}}\n\
             spec: {{host: {host}, trafficPolicy: {policy}}}\n"
        )
    };
    lab.apply_yaml(&(rule("cart") + &rule("bytes")))
}

/// Who answered how many of so many calls.
fn answered(lab: &Lab, service: &str, count: usize, more: &[&str]) -> anyhow::Result<BTreeMap<String, usize>> {
    let (url, many) = (format!("http://{service}.shop/"), count.to_string());
    let reports = scenario::calls(lab, "shop/web", &url, &[&["--count", &many], more].concat())?;
    let mut pods = BTreeMap::new();
    for report in reports {
        *pods.entry(report["pod"].as_str().unwrap_or_default().to_owned()).or_default() += 1;
    }
    Ok(pods)
}

/// What `explain` says of a Service's endpoints: name and percent.
fn explained(lab: &Lab, service: &str) -> anyhow::Result<BTreeMap<String, u64>> {
    let value: Value = lab.control_get(&format!("/debug/explain?from=shop/web&to=shop/{service}:80"))?;
    let mut found: BTreeMap<String, f64> = BTreeMap::new();
    // A pod has an entry for each address of the Service.
    for endpoint in value["endpoints"].as_array().into_iter().flatten() {
        let name = endpoint["pod"].as_str().unwrap_or_default().trim_start_matches("shop/");
        *found.entry(name.to_owned()).or_default() += endpoint["sharePercent"].as_f64().unwrap_or_default();
    }
    Ok(found.into_iter().map(|(name, share)| (name, share.round() as u64)).collect())
}

#[test]
fn places_get_the_shares_that_are_named() -> anyhow::Result<()> {
    let Some(lab) = scenario::lab(LabConfig { nodes: 4, ..LabConfig::of(&world()) }) else { return Ok(()) };
    apply(&lab, "{loadBalancer: {localityLbSetting: {distribute: [{from: r1/z1/*, to: {r1/z2: 80, r3: 20}}]}}}")?;
    for (service, more) in [("cart", &["--keep-alive"][..]), ("bytes", &[])] {
        let expected = [("named", 20), ("zone", 80)].map(|(name, share)| (name.to_owned(), share));
        assert_eq!(explained(&lab, service)?, expected.into(), "{service}");
        let seen = answered(&lab, service, 400, more)?;
        assert_eq!(seen.keys().collect::<Vec<_>>(), ["named", "zone"], "{service}: {seen:?}");
        // 80 of 400 with a deviation of 8; 40 is five deviations away.
        assert!((40..=120).contains(&seen["named"]), "{service}: {seen:?}");
    }
    // Nothing is said of clients of another place.
    apply(&lab, "{loadBalancer: {localityLbSetting: {distribute: [{from: r2, to: {r2: 100}}]}}}")?;
    assert_eq!(answered(&lab, "bytes", 100, &[])?.len(), PLACES.len());
    assert_eq!(explained(&lab, "bytes")?.len(), PLACES.len());
    // Nobody is where they are sent.
    apply(&lab, "{loadBalancer: {localityLbSetting: {distribute: [{from: '*', to: {r9: 100}}]}}}")?;
    let report = scenario::call(&lab, "shop/web", "http://cart.shop/")?;
    assert_eq!(report["status"], 503, "{report}");
    scenario::await_log(&lab, "node-1", &["request complete", "localityLbSetting.distribute"])?;
    Ok(())
}

#[test]
fn places_are_left_in_the_order_that_is_named() -> anyhow::Result<()> {
    let Some(lab) = scenario::lab(LabConfig { nodes: 4, ..LabConfig::of(&world()) }) else { return Ok(()) };
    let outlier = "{consecutive5xxErrors: 1, interval: 1s, baseEjectionTime: 300s, maxEjectionPercent: 100}";
    let failover = "{localityLbSetting: {failover: [{from: r1, to: r3}]}}";
    apply(&lab, &format!("{{outlierDetection: {outlier}, loadBalancer: {failover}}}"))?;
    assert_eq!(answered(&lab, "bytes", 20, &[])?.into_keys().collect::<Vec<_>>(), ["near"], "connections");
    for (step, (name, ..)) in PLACES.into_iter().enumerate() {
        let seen = answered(&lab, "cart", 20, &["--keep-alive"])?;
        assert_eq!(seen.into_keys().collect::<Vec<_>>(), [name], "after {step} have failed");
        let mut told = explained(&lab, "cart")?;
        assert_eq!(told.len(), step + 1, "those that are passed over too: {told:?}");
        told.retain(|_, share| *share > 0);
        assert_eq!(told, BTreeMap::from([(name.to_owned(), 100)]), "after {step} have failed");
        let url = format!("http://{}:8080/become?status=503", lab.pod_ip("shop", name)?);
        scenario::all_well(&scenario::calls(&lab, "shop/web", &url, &[])?, 1)?;
        scenario::call(&lab, "shop/web", "http://cart.shop/")?;
        eventually("it is ejected", scenario::PATIENCE, || {
            match scenario::log_lines(&lab, "node-1", &["endpoint ejected"]).len() {
                ejected if ejected == step + 1 => Ok(()),
                ejected => Err(format!("{ejected} are")),
            }
        })?;
    }
    let report = scenario::call(&lab, "shop/web", "http://cart.shop/")?;
    assert_eq!(report["status"], 503, "all are ejected: {report}");
    scenario::await_log(&lab, "node-1", &["request complete", "EJECTED", "flags=\"UH\""])?;
    Ok(())
}
