//! Promise: `tulle check --strict` names exactly those who speak plaintext to a namespace, as traffic shows it, and what people
//! meet first is explained with the line that they have to change.

use std::time::Duration;

use anyhow::{Context as _, ensure};
use e2e::eventually::eventually;
use e2e::lab::{Lab, LabConfig};
use e2e::scenario;
use serde_json::Value;

/// Longer than a slow machine needs; nothing waits that long when all is well.
const PATIENCE: Duration = Duration::from_secs(60);

fn tulle(lab: &Lab, argv: &[&str]) -> anyhow::Result<(Option<i32>, String)> {
    let output = lab.exec("control", &[&["tulle"][..], argv].concat())?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    Ok((output.status.code(), text))
}

/// `tulle check --strict shop` on the lab's objects and its running control.
fn strict(lab: &Lab, more: &[&str]) -> anyhow::Result<(Option<i32>, String)> {
    let objects = lab.paths().objects().display().to_string();
    let argv = ["check", "--strict", "shop", "--files", &objects, "--control", "http://127.0.0.1:15014"];
    tulle(lab, &[&argv[..], more].concat())
}

#[test]
fn who_speaks_plaintext_is_named_and_kept_by_the_exceptions() -> anyhow::Result<()> {
    let Some(lab) = scenario::lab(LabConfig::of(&scenario::world(true))) else { return Ok(()) };
    scenario::reaches(&lab, "shop/web", "http://cart.shop/")?;
    let (code, text) = strict(&lab, &[])?;
    ensure!(code == Some(0) && text.contains("no connection without an identity was seen"), "{text}");

    scenario::reaches(&lab, "plain/guest", "http://cart.shop/")?;
    let text = eventually("the guest is named", PATIENCE, || match strict(&lab, &[]) {
        Ok((Some(1), text)) if text.contains("would refuse plain/guest of account guest") => Ok(text),
        other => Err(format!("{other:?}")),
    })?;
    for expected in [
        "error    Pod shop/cart port 8080: ",
        "kubectl label namespace plain tulle.dev/mesh=enabled",
        "name: 'plaintext-cart'",
    ] {
        ensure!(text.contains(expected), "no `{expected}` in {text}");
    }
    ensure!(!text.contains("shop/web"), "web has an identity: {text}");

    // With the exceptions in force STRICT refuses nobody who was named, and still those at other ports.
    let (_, exceptions) = strict(&lab, &["--exceptions"])?;
    lab.apply_yaml(&exceptions)?;
    lab.apply_yaml(&scenario::peer_authentication("shop", "STRICT"))?;
    scenario::reaches(&lab, "plain/guest", "http://cart.shop/")?;
    let (code, text) = strict(&lab, &[])?;
    ensure!(code == Some(0) && text.contains("stays open to plain/guest"), "{text}");
    let output = lab.exec("plain/guest", &["shop", "call", "http://cart.shop:9000/", "--json"])?;
    let report: Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
    ensure!(report["ok"] != true, "another port takes plaintext: {report}");
    Ok(())
}

/// Things that do not work, as people make them.
const MISTAKES: &str = "
---
apiVersion: v1
kind: Service
metadata: {name: typo, namespace: shop}
spec: {selector: {app: crat}, ports: [{port: 80, targetPort: 8080}]}
---
apiVersion: v1
kind: Service
metadata: {name: lost, namespace: shop}
spec: {selector: {app: cart}, ports: [{port: 80, targetPort: web}]}
---
apiVersion: v1
kind: Service
metadata: {name: heads, namespace: shop}
spec: {clusterIP: None, selector: {app: cart}, ports: [{port: 8080}]}
";

#[test]
fn what_people_meet_first_is_explained_with_what_to_change() -> anyhow::Result<()> {
    let world = format!("{}{MISTAKES}", scenario::world(true));
    let deny = scenario::authorization(
        "shop",
        "no-other",
        "cart",
        "DENY",
        "[{from: [{source: {principals: [cluster.local/ns/shop/sa/other]}}]}]",
    );
    let Some(lab) = scenario::lab(LabConfig::of(&format!("{world}{deny}"))) else { return Ok(()) };
    for (from, to, code, expected) in [
        (
            "shop/web",
            "shop/typo",
            3,
            &[
                "REFUSED",
                "hint: shop/typo selects app=crat, and no pod of namespace shop has that; nearest is pod cart, which has app=cart",
            ][..],
        ),
        ("shop/web", "shop/lost", 3, &["hint: port 80 of shop/lost leads to the container port named web"]),
        ("shop/web", "shop/cart:81", 3, &["hint: shop/cart has no TCP port 81; it has TCP 80 (http), TCP 9000 (raw)"]),
        ("shop/web", "shop/heads", 0, &["ALLOWED", "hint: shop/heads is headless"]),
        ("shop/web", "cart", 0, &["ALLOWED", "cart.shop.svc.cluster.local"]),
        (
            "plain/guest",
            "cart",
            1,
            &["the name cart means nothing to plain/guest", "there is one in shop: say cart.shop"],
        ),
        ("shop/web", "crat.shop", 1, &["there is no Service crat in namespace shop; there is cart in shop"]),
        ("shop/web", "shop/crat", 1, &["there is no service or running pod shop/crat; there is a service shop/cart"]),
        (
            "plain/guest",
            "cart.shop",
            0,
            &[
                "hint: plain/guest is not in the mesh: neither it nor namespace plain is labelled tulle.dev/mesh: enabled",
            ],
        ),
        ("shop/other", "cart:80", 3, &["denied by policy shop/no-other"]),
        (
            "shop/web",
            "api.example.com:443",
            0,
            &[
                "web → api.example.com:443: PLAIN",
                "api.example.com is outside the mesh, and what leaves namespace shop is open",
            ],
        ),
        ("shop/web", "203.0.113.9:443", 0, &["PLAIN", "outside the mesh"]),
    ] {
        let (got, text) = tulle(&lab, &["explain", from, to])?;
        ensure!(got == Some(code), "{from} {to}: exit code {got:?}: {text}");
        for one in expected {
            ensure!(text.contains(one), "{from} {to}: no `{one}` in {text}");
        }
    }
    closed(&lab)
}

/// A closed namespace: by name, with and without a rule.
fn closed(lab: &Lab) -> anyhow::Result<()> {
    lab.apply_yaml(
        "apiVersion: v1\nkind: Namespace\nmetadata: {name: shop, labels: {tulle.dev/mesh: enabled, tulle.dev/egress: deny}}\n---\n\
         apiVersion: tulle.dev/v1alpha1\nkind: EgressPolicy\nmetadata: {name: some, namespace: shop}\n\
         spec: {rules: [{hosts: [api.example.com], ports: [{port: 443, protocol: TLS}]}]}\n",
    )?;
    let (code, text) = tulle(lab, &["explain", "shop/web", "api.example.com:443"])?;
    ensure!(code == Some(0) && text.contains("if the client begins with TLS for it"), "{text}");
    let (code, text) = tulle(lab, &["explain", "shop/web", "other.example.com:443"])?;
    ensure!(code == Some(3) && text.contains("EGRESS_DENIED"), "{text}");
    let (_, json) = tulle(lab, &["explain", "shop/web", "api.example.com:443", "-o", "json"])?;
    let value: Value = serde_json::from_str(&json).context(json)?;
    ensure!(
        value["outbound"]["policy"] == "EgressPolicy/shop/some" && value["to"]["host"] == "api.example.com",
        "{value:#}"
    );
    Ok(())
}
