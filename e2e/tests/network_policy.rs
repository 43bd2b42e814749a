//! Promise: NetworkPolicies mean between pods of the mesh what they mean in any cluster; each denial names the policies
//! that isolate; and `explain` says of each cell of the matrix what its traffic shows.
//!
//! The cases are those of the Kubernetes documentation and of its end-to-end suite for NetworkPolicy, by their names there;
//! [`cases`] has what a table can say of them.

#[path = "network_policy/cases.rs"]
mod cases;

use std::collections::BTreeMap;
use std::io::BufRead;
use std::io::BufReader;

use cases::CASES;
use cases::Case;
use cases::Cell;
use cases::DATAGRAMS;
use cases::PODS;
use e2e::eventually::eventually;
use e2e::lab::Lab;
use e2e::lab::LabConfig;
use e2e::scenario;
use e2e::scenario::network_policy as policy;
use serde_json::Value;

fn may(lab: &Lab, from: &str) -> anyhow::Result<bool> {
    Ok(scenario::call(lab, from, "http://cart.shop/")?["ok"] == true)
}

#[test]
fn the_frontend_may_reach_the_backend_and_others_may_not() -> anyhow::Result<()> {
    let Some(lab) = scenario::lab(LabConfig::of(&scenario::world(true))) else { return Ok(()) };
    for from in ["shop/web", "shop/other", "plain/guest"] {
        assert!(may(&lab, from)?, "without a policy {from} is let in");
    }
    let spec = "{podSelector: {matchLabels: {app: cart}}, ingress: [{from: [{podSelector: {matchLabels: {app: web}}}], \
                ports: [{port: 8080}]}]}";
    lab.apply_yaml(&policy("shop", "backend", spec))?;
    for (from, expected) in [("shop/web", true), ("shop/other", false), ("plain/guest", false)] {
        assert_eq!(may(&lab, from)?, expected, "{from}");
    }
    let named = "policy=\"NetworkPolicy/shop/backend\"";
    scenario::await_log(&lab, "node-2", &["NETWORK_POLICY_INGRESS", named, "sa/other"])?;
    let raw = lab.exec("shop/web", &["shop", "tcp", "cart.shop:9000", "--json"])?;
    assert!(!raw.status.success(), "another port is closed to the frontend as well");

    // Both kinds of policy must allow.
    let rules = "[{from: [{source: {principals: ['cluster.local/ns/shop/sa/other']}}]}]";
    lab.apply_yaml(&scenario::authorization("shop", "only-other", "cart", "ALLOW", rules))?;
    for from in ["shop/web", "shop/other"] {
        assert!(!may(&lab, from)?, "{from} is let in by one of them only");
    }
    lab.delete("AuthorizationPolicy", "shop/only-other")?;
    lab.delete("NetworkPolicy", "shop/backend")?;
    for from in ["shop/web", "shop/other", "plain/guest"] {
        assert!(may(&lab, from)?, "after the policy is gone {from} is let in again");
    }
    Ok(())
}

fn matrix_pod(namespace: &str, name: &str, node: u16, more: &str) -> String {
    format!(
        "---\napiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: {namespace}, labels: {{pod: {name}{more}}}}}\n\
         spec:\n  nodeName: node-{node}\n  serviceAccountName: {name}\n  containers:\n  - name: main\n    image: shop\n\
         \x20   command: [shop, serve, --tcp, '80', --tcp, '81', --udp, '7007', --udp, '7008']\n\
         \x20   ports: [{{name: serve-80, containerPort: 80}}, {{name: serve-81, containerPort: 81}}]\n"
    )
}

fn matrix_world() -> String {
    let mut text: String = ["ns-x", "ns-y", "ns-z"].map(|name| scenario::namespace(name, true)).concat();
    for (namespace, name, node) in PODS {
        text.push_str(&matrix_pod(namespace, name, node, ""));
    }
    text
}

/// Every connection between two pods.
fn cells(ports: &'static [u16]) -> impl Iterator<Item = Cell> {
    PODS.into_iter().flat_map(move |(fns, from, _)| {
        let others = PODS.into_iter().filter(move |(tns, to, _)| (*tns, *to) != (fns, from));
        others.flat_map(move |(tns, to, _)| ports.iter().map(move |port| Cell { fns, from, tns, to, port: *port }))
    })
}

type Addresses = BTreeMap<(&'static str, &'static str), String>;

fn addresses(lab: &Lab) -> anyhow::Result<Addresses> {
    PODS.into_iter().map(|(namespace, name, _)| Ok(((namespace, name), lab.pod_ip(namespace, name)?))).collect()
}

/// Every connection between two pods to `ports` by `tcp` or `udp`, one request each, and whether it was answered.
fn traffic(
    lab: &Lab,
    addresses: &Addresses,
    transport: &str,
    ports: &'static [u16],
) -> anyhow::Result<Vec<(Cell, bool)>> {
    let one = |(fns, from, _)| -> anyhow::Result<Vec<(Cell, bool)>> {
        let own = cells(ports).filter(|cell| cell.out_of(fns, from));
        let named = |cell: Cell| format!("{transport}://{}:{}", addresses[&(cell.tns, cell.to)], cell.port);
        let targets: BTreeMap<String, Cell> = own.map(|cell| (named(cell), cell)).collect();
        let mut argv = vec!["shop", "load", "--count", "1"];
        if transport == "udp" {
            argv.extend(["--timeout-ms", "2500"]);
        }
        argv.extend(targets.keys().map(String::as_str));
        let output = lab.exec(&format!("{fns}/{from}"), &argv)?;
        let reports = scenario::json_lines(&output.stdout);
        anyhow::ensure!(reports.len() == targets.len(), "{} of {} reports", reports.len(), targets.len());
        let of = |report: &Value| {
            let cell = report["target"].as_str().and_then(|target| targets.get(target));
            Ok((*cell.ok_or_else(|| anyhow::anyhow!("{report}"))?, report["ok"] == true))
        };
        reports.iter().map(of).collect()
    };
    // What is refused by datagram is silence: its clients wait side by side.
    let found: Vec<_> = std::thread::scope(|scope| {
        let clients: Vec<_> = PODS.map(|pod| scope.spawn(move || one(pod))).into_iter().collect();
        clients
            .into_iter()
            .map(|client| client.join().unwrap_or_else(|_| Err(anyhow::anyhow!("a client panicked"))))
            .collect()
    });
    Ok(found.into_iter().collect::<anyhow::Result<Vec<_>>>()?.concat())
}

fn explained(lab: &Lab, cell: Cell, transport: &str) -> anyhow::Result<bool> {
    let Cell { fns, from, tns, to, port } = cell;
    let path = format!("/debug/explain?from={fns}/{from}&to={tns}/{to}:{port}&transport={transport}");
    let answer = lab.control_get(&path)?;
    match answer["verdict"].as_str() {
        Some("allowed") => Ok(true),
        Some("denied" | "refused") => Ok(false),
        _ => anyhow::bail!("{cell:?} by {transport}: {answer}"),
    }
}

/// The policies of a case under names of their own; `protocol` is put where they leave room for it.
fn applied(lab: &Lab, case: &Case, protocol: &str) -> anyhow::Result<Vec<String>> {
    let mut names = Vec::new();
    let mut objects = String::new();
    for (index, (namespace, spec)) in case.policies.iter().enumerate() {
        objects.push_str(&policy(namespace, &format!("case-{index}"), &spec.replace("PROTOCOL", protocol)));
        names.push(format!("{namespace}/case-{index}"));
    }
    lab.apply_yaml(&objects)?;
    Ok(names)
}

#[test]
fn the_cases_of_kubernetes_come_out_as_there_and_explain_agrees() -> anyhow::Result<()> {
    let Some(lab) = scenario::lab(LabConfig::of(&matrix_world())) else { return Ok(()) };
    let addresses = addresses(&lab)?;
    let open = traffic(&lab, &addresses, "tcp", &[80, 81])?;
    assert!(open.iter().all(|(_, made)| *made), "without a policy everybody reaches everybody");
    let mut wrong = Vec::new();
    for case in CASES {
        let names = applied(&lab, case, "TCP")?;
        for (cell, made) in traffic(&lab, &addresses, "tcp", &[80, 81])? {
            let (expected, said) = ((case.expected)(cell), explained(&lab, cell, "tcp")?);
            if made != expected || said != expected {
                wrong.push(format!("{}: {cell:?}: expected {expected}, found {made}, explained {said}", case.name));
            }
        }
        for name in names {
            lab.delete("NetworkPolicy", &name)?;
        }
    }
    assert!(wrong.is_empty(), "{} cells:\n{}", wrong.len(), wrong.join("\n"));
    let after = traffic(&lab, &addresses, "tcp", &[80])?;
    assert!(after.iter().all(|(_, made)| *made), "should stop enforcing policies after they are deleted");
    Ok(())
}

#[test]
fn the_cases_of_udp_and_sctp_come_out_as_there_and_explain_agrees() -> anyhow::Result<()> {
    const PORTS: &[u16] = &[7007, 7008];
    let Some(lab) = scenario::lab(LabConfig::of(&matrix_world())) else { return Ok(()) };
    let addresses = addresses(&lab)?;
    // The filters of datagrams follow a moment after a policy was acknowledged.
    let come_true = |when: &str, expected: fn(Cell) -> bool| {
        eventually(when, scenario::PATIENCE, || {
            let cells = traffic(&lab, &addresses, "udp", PORTS).map_err(|error| format!("{error:#}"))?;
            let wrong: Vec<_> = cells.into_iter().filter(|(cell, made)| *made != expected(*cell)).collect();
            if wrong.is_empty() { Ok(()) } else { Err(format!("{} cells, of which answered: {wrong:?}", wrong.len())) }
        })
    };
    come_true("without a policy everybody answers everybody", |_| true)?;
    for case in DATAGRAMS {
        for protocol in ["UDP", "SCTP"] {
            let names = applied(&lab, case, protocol)?;
            if protocol == "UDP" {
                come_true(case.name, case.expected)?;
            }
            for cell in cells(PORTS) {
                let said = explained(&lab, cell, &protocol.to_lowercase())?;
                assert_eq!(said, (case.expected)(cell), "{protocol}: {}: {cell:?}", case.name);
            }
            for name in names {
                lab.delete("NetworkPolicy", &name)?;
            }
        }
    }
    Ok(())
}

/// Whether a pod reaches an address.
fn reaches(lab: &Lab, from: &str, address: &str, port: u16) -> anyhow::Result<bool> {
    Ok(lab.exec(from, &["shop", "tcp", &format!("{address}:{port}"), "--json"])?.status.success())
}

#[test]
fn updates_of_policies_namespaces_and_pods_take_effect() -> anyhow::Result<()> {
    let Some(lab) = scenario::lab(LabConfig::of(&matrix_world())) else { return Ok(()) };
    let target = lab.pod_ip("ns-x", "a")?;
    let from = |peer: &str| format!("{{podSelector: {{matchLabels: {{pod: a}}}}, ingress: [{{from: [{peer}]}}]}}");
    // should enforce updated policy
    lab.apply_yaml(&policy("ns-x", "edited", &from("{podSelector: {matchLabels: {pod: b}}}")))?;
    assert!(reaches(&lab, "ns-x/b", &target, 80)? && !reaches(&lab, "ns-x/c", &target, 80)?);
    lab.apply_yaml(&policy("ns-x", "edited", &from("{podSelector: {matchLabels: {pod: c}}}")))?;
    assert!(!reaches(&lab, "ns-x/b", &target, 80)? && reaches(&lab, "ns-x/c", &target, 80)?);
    // should allow ingress access from updated namespace
    lab.apply_yaml(&policy("ns-x", "edited", &from("{namespaceSelector: {matchLabels: {team: red}}}")))?;
    assert!(!reaches(&lab, "ns-y/a", &target, 80)?);
    let labelled =
        "---\napiVersion: v1\nkind: Namespace\nmetadata: {name: ns-y, labels: {tulle.dev/mesh: enabled, team: red}}\n";
    lab.apply_yaml(labelled)?;
    assert!(reaches(&lab, "ns-y/a", &target, 80)?);
    // should allow ingress access from updated pod
    lab.apply_yaml(&policy("ns-x", "edited", &from("{podSelector: {matchLabels: {pod: b, team: blue}}}")))?;
    assert!(!reaches(&lab, "ns-x/b", &target, 80)?);
    lab.apply_yaml(&matrix_pod("ns-x", "b", 2, ", team: blue"))?;
    assert!(reaches(&lab, "ns-x/b", &target, 80)?);
    // should deny ingress access to updated pod
    lab.apply_yaml(&policy("ns-z", "isolated", "{podSelector: {matchLabels: {team: green}}, policyTypes: [Ingress]}"))?;
    let other = lab.pod_ip("ns-z", "b")?;
    assert!(reaches(&lab, "ns-x/b", &other, 80)?);
    lab.apply_yaml(&matrix_pod("ns-z", "b", 2, ", team: green"))?;
    assert!(!reaches(&lab, "ns-x/b", &lab.pod_ip("ns-z", "b")?, 80)?);
    Ok(())
}

#[test]
fn blocks_of_addresses_hold_with_their_exceptions() -> anyhow::Result<()> {
    let Some(lab) = scenario::lab(LabConfig::of(&matrix_world())) else { return Ok(()) };
    let (xb, xc, target) = (lab.pod_ip("ns-x", "b")?, lab.pod_ip("ns-x", "c")?, lab.pod_ip("ns-x", "a")?);
    // The documentation's first example: blocks, namespaces and pods as alternatives.
    let spec = format!(
        "{{podSelector: {{matchLabels: {{pod: a}}}}, policyTypes: [Ingress], ingress: [{{from: [{{ipBlock: {{cidr: 0.0.0.0/0, \
         except: [{xb}/32, {xc}/32]}}}}, {{podSelector: {{matchLabels: {{pod: c}}}}}}], ports: [{{protocol: TCP, port: 80}}]}}]}}"
    );
    lab.apply_yaml(&policy("ns-x", "blocks", &spec))?;
    assert!(reaches(&lab, "ns-y/a", &target, 80)?, "in the block");
    assert!(!reaches(&lab, "ns-x/b", &target, 80)?, "excepted");
    assert!(reaches(&lab, "ns-x/c", &target, 80)?, "excepted, but allowed as a pod");
    assert!(!reaches(&lab, "ns-y/a", &target, 81)?, "another port");
    lab.delete("NetworkPolicy", "ns-x/blocks")?;
    let egress = |except: &str| {
        format!(
            "{{podSelector: {{matchLabels: {{pod: a}}}}, policyTypes: [Egress], egress: [{{to: [{{ipBlock: {{cidr: 0.0.0.0/0, except: [{except}]}}}}]}}]}}"
        )
    };
    // should allow egress access to server in CIDR block
    let server = lab.pod_ip("ns-y", "b")?;
    let only = format!(
        "{{podSelector: {{matchLabels: {{pod: a}}}}, policyTypes: [Egress], egress: [{{to: [{{ipBlock: {{cidr: {server}/32}}}}]}}]}}"
    );
    lab.apply_yaml(&policy("ns-x", "only", &only))?;
    assert!(reaches(&lab, "ns-x/a", &server, 80)? && !reaches(&lab, "ns-x/a", &lab.pod_ip("ns-y", "a")?, 80)?);
    lab.delete("NetworkPolicy", "ns-x/only")?;
    // should enforce except clause while egress access to server in CIDR block
    lab.apply_yaml(&policy("ns-x", "out", &egress(&format!("{xb}/32"))))?;
    assert!(!reaches(&lab, "ns-x/a", &xb, 80)? && reaches(&lab, "ns-x/a", &xc, 80)?);
    scenario::await_log(&lab, "node-1", &["NETWORK_POLICY_EGRESS", "policy=\"NetworkPolicy/ns-x/out\""])?;
    // should ensure an IP overlapping both IPBlock.CIDR and IPBlock.Except is allowed
    lab.apply_yaml(&policy("ns-x", "also", &egress(&format!("{xc}/32"))))?;
    assert!(reaches(&lab, "ns-x/a", &xb, 80)? && reaches(&lab, "ns-x/a", &xc, 80)?);
    Ok(())
}

#[test]
fn an_edit_cuts_live_connections_in_both_directions_and_names_the_policy() -> anyhow::Result<()> {
    let Some(lab) = scenario::lab(LabConfig::of(&scenario::world(true))) else { return Ok(()) };
    let (mut web, mut other) = (scenario::hold(&lab, "shop/web")?, scenario::hold(&lab, "shop/other")?);
    let cart =
        "{podSelector: {matchLabels: {app: cart}}, ingress: [{from: [{podSelector: {matchLabels: {app: other}}}]}]}";
    lab.apply_yaml(&policy("shop", "to-cart", cart))?;
    assert_eq!(web.report()?["ok"], false, "what may not come in any more ends");
    scenario::await_log(&lab, "node-2", &["POLICY_CHANGED", "NetworkPolicy/shop/to-cart", "sa/web"])?;
    let out = "{podSelector: {matchLabels: {app: other}}, policyTypes: [Egress]}";
    lab.apply_yaml(&policy("shop", "from-other", out))?;
    assert_eq!(other.report()?["ok"], false, "what may not go out any more ends");
    scenario::await_log(&lab, "node-1", &["POLICY_CHANGED", "NetworkPolicy/shop/from-other"])?;
    Ok(())
}

fn next(lines: &mut impl BufRead) -> anyhow::Result<Value> {
    let mut line = String::new();
    lines.read_line(&mut line)?;
    Ok(serde_json::from_str(&line)?)
}

#[test]
fn datagrams_are_held_to_the_policies_of_both_ends() -> anyhow::Result<()> {
    let mut world = matrix_world();
    world.push_str(
        "---\napiVersion: v1\nkind: Service\nmetadata: {name: echo, namespace: ns-x}\n\
         spec: {selector: {pod: a}, ports: [{name: echo, port: 7000, targetPort: 7007, protocol: UDP}]}\n",
    );
    let Some(lab) = scenario::lab(LabConfig::of(&world)) else { return Ok(()) };
    let target = lab.pod_ip("ns-x", "a")?;
    let answered = |from: &str, address: &str| {
        anyhow::Ok(lab.exec(from, &["shop", "udp", address, "--json", "--timeout-ms", "1500"])?.status.success())
    };
    let direct = format!("{target}:7007");
    for from in ["ns-x/b", "ns-x/c", "ns-y/a"] {
        assert!(answered(from, &direct)?, "without a policy {from} is answered");
    }
    let into = "{podSelector: {matchLabels: {pod: a}}, ingress: [{from: [{podSelector: {matchLabels: {pod: b}}}], ports: [{protocol: UDP, port: 7007}]}]}";
    lab.apply_yaml(&policy("ns-x", "udp-in", into))?;
    let eventually = |from: &str, address: &str, expected: bool| {
        e2e::eventually::eventually(&format!("{from} to {address}: {expected}"), scenario::PATIENCE, || match answered(
            from, address,
        ) {
            Ok(found) if found == expected => Ok(()),
            other => Err(format!("{other:?}")),
        })
    };
    eventually("ns-x/c", &direct, false)?;
    assert!(answered("ns-x/b", &direct)? && !answered("ns-y/a", &direct)?);
    lab.delete("NetworkPolicy", "ns-x/udp-in")?;
    eventually("ns-y/a", &direct, true)?;

    // A virtual address is as good as what is behind it.
    let out = |pod: &str| {
        format!(
            "{{podSelector: {{matchLabels: {{pod: c}}}}, policyTypes: [Egress], egress: [{{to: [{{podSelector: {{matchLabels: {{pod: {pod}}}}}}}], ports: [{{protocol: UDP, port: 7007}}]}}]}}"
        )
    };
    let services = lab.control_get("/debug/resources?type=Address")?;
    let service = services.as_array().into_iter().flatten().find(|one| one["resource"]["service"]["name"] == "echo");
    let vip = service.and_then(|one| one["resource"]["service"]["addresses"][0].as_str()).unwrap_or_default();
    let vip = format!("{vip}:7000");
    assert!(answered("ns-x/c", &vip)?);
    lab.apply_yaml(&policy("ns-x", "udp-out", &out("b")))?;
    eventually("ns-x/c", &vip, false)?;
    assert!(!answered("ns-x/c", &direct)?);
    lab.apply_yaml(&policy("ns-x", "udp-out", &out("a")))?;
    eventually("ns-x/c", &vip, true)?;
    assert!(answered("ns-x/c", &direct)?);
    Ok(())
}

#[test]
fn an_edit_ends_the_answers_of_a_flow_that_it_forbids() -> anyhow::Result<()> {
    let Some(lab) = scenario::lab(LabConfig::of(&matrix_world())) else { return Ok(()) };
    let target = format!("{}:7007", lab.pod_ip("ns-x", "a")?);
    let watch = |from: &str| -> anyhow::Result<_> {
        let mut running = lab.spawn(from, &["shop", "udp", &target, "--stream"])?;
        let stdout = running.child().and_then(|child| child.stdout.take());
        let mut lines = BufReader::new(stdout.ok_or_else(|| anyhow::anyhow!("no output"))?);
        anyhow::ensure!(next(&mut lines)?["kind"] == "open", "{from} is not answered");
        Ok((running, lines))
    };
    // Who sent the one datagram says nothing more: what passes from here on are replies.
    let (_b, mut left) = watch("ns-x/b")?;
    let (_c, mut right) = watch("ns-x/c")?;
    let (_y, mut other) = watch("ns-y/b")?;
    let out = "{podSelector: {matchLabels: {pod: b}}, policyTypes: [Egress]}";
    let into = "{podSelector: {matchLabels: {pod: a}}, ingress: [{from: [{podSelector: {matchLabels: {pod: b}}}, \
                {namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: ns-y}}}]}]}";
    lab.apply_yaml(&(policy("ns-x", "out", out) + &policy("ns-x", "in", into)))?;
    let ended = next(&mut left)?;
    assert_eq!(ended["whole"], false, "what the client may not ask any more is not answered: {ended}");
    let ended = next(&mut right)?;
    assert_eq!(ended["whole"], false, "nor what the server may not be asked: {ended}");
    let ended = next(&mut other)?;
    assert_eq!(ended["whole"], true, "an allowed flow lives on: {ended}");
    Ok(())
}
