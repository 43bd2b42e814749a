//! Promise: enrolment changes no balancing. For each kind of Service the pods that answer a client, and the address that
//! they see, are the same before the label and after it, for clients in the mesh and outside, by either address family.

use std::collections::BTreeMap;
use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::Context as _;
use e2e::eventually::eventually;
use e2e::lab::Lab;
use e2e::lab::LabConfig;
use e2e::scenario;

/// Requests for one cell. A set of 4 misses one of its pods once in some 20,000 tries.
const TRIES: usize = 40;
/// Milliseconds for each: a resolver whose datagram was lost asks again after five seconds, which is no balancing.
const PATIENT: &str = "15000";

/// Who answers `from` at `url`, and what addresses they see; nobody where nothing does.
fn answered(lab: &Lab, from: &str, url: &str, family: &str) -> anyhow::Result<(BTreeSet<String>, BTreeSet<String>)> {
    let tries = TRIES.to_string();
    let first = scenario::calls(lab, from, url, &[family, "--timeout-ms", "700"])?;
    if first[0]["ok"] != true {
        return Ok(Default::default());
    }
    let reports = scenario::calls(lab, from, url, &[family, "--count", &tries, "--timeout-ms", PATIENT])?;
    scenario::all_well(&reports, TRIES).with_context(|| format!("{from} asks {url} ({family})"))?;
    let all = |field: &str| reports.iter().filter_map(|report| report[field].as_str().map(str::to_owned)).collect();
    Ok((all("pod"), all("source")))
}

fn service(name: &str, fields: &str, port: &str) -> String {
    let selector = if fields.contains("selector") { "" } else { ", selector: {app: many}" };
    format!(
        "---\napiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: shop}}\n\
         spec: {{ports: [{{port: 80, {port}}}]{selector}{fields}}}\n"
    )
}

/// A server whose HTTP port has a name, and another number than its neighbours'.
fn server(name: &str, node: u16, port: u16) -> String {
    format!(
        "---\napiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: shop, labels: {{app: many, own: {name}}}}}\n\
         spec:\n  nodeName: node-{node}\n  serviceAccountName: many\n  containers:\n  - name: main\n\
         \x20   command: [shop, serve, --name, {name}, --http, '8080', --http, '{port}']\n\
         \x20   ports: [{{containerPort: 8080}}, {{name: web, containerPort: {port}}}]\n"
    )
}

/// It declares 8080 and never listens there, so it is not ready.
const UNREADY: &str = "---
apiVersion: v1
kind: Pod
metadata: {name: unready, namespace: shop, labels: {app: starting}}
spec:
  nodeName: node-2
  serviceAccountName: many
  containers:
  - {name: main, command: [shop, serve, --name, unready, --http, '8081'], ports: [{containerPort: 8080}]}
";

/// Applies what leaves nothing to wait for but the unready pod.
fn apply(lab: &Lab, text: &str, patience: Duration) -> anyhow::Result<()> {
    let missing = lab.try_apply("the test", text, patience)?;
    anyhow::ensure!(missing.iter().all(|line| line.contains("shop/unready")), "{missing:?}");
    Ok(())
}

/// Four servers and a client on three nodes in two zones, with one Service of each kind.
fn world() -> String {
    let mut objects = scenario::world(false);
    for (name, node, port) in [("a", 1, 8081), ("b", 2, 8082), ("c", 2, 8083), ("d", 3, 8084)] {
        objects.push_str(&server(name, node, port));
    }
    for (name, fields, port) in [
        ("plain", "", "targetPort: 8080"),
        ("named", "", "targetPort: web"),
        ("local", ", internalTrafficPolicy: Local", "targetPort: 8080"),
        ("elsewhere", ", internalTrafficPolicy: Local, selector: {own: b}", "targetPort: 8080"),
        ("zonal", ", trafficDistribution: PreferClose", "targetPort: 8080"),
        ("nodal", ", trafficDistribution: PreferSameNode", "targetPort: 8080"),
        ("far", ", trafficDistribution: PreferSameNode, selector: {own: d}", "targetPort: 8080"),
        ("sticky", ", sessionAffinity: ClientIP", "targetPort: 8080"),
        ("external", ", internalTrafficPolicy: Local, externalIPs: [192.0.2.80, '2001:db8:80::1']", "targetPort: 8080"),
        (
            "balanced",
            ", type: LoadBalancer, externalTrafficPolicy: Local}\n\
             status: {loadBalancer: {ingress: [{ip: 192.0.2.81}, {ip: '2001:db8:81::1'}]}",
            "targetPort: 8080",
        ),
        ("noded", ", type: NodePort", "targetPort: 8080, nodePort: 30080"),
        ("early", ", publishNotReadyAddresses: true, selector: {app: starting}", "targetPort: 8081"),
        ("late", ", selector: {app: starting}", "targetPort: 8081"),
        ("bare", ", clusterIP: None, selector: {own: c}", "targetPort: 8080"),
        ("alias", ", type: ExternalName, externalName: plain.shop.svc.cluster.local", "targetPort: 80"),
    ] {
        objects.push_str(&service(name, fields, port));
    }
    for (node, zone) in [(1, "z1"), (2, "z1"), (3, "z2")] {
        objects.push_str(&scenario::node(node, &format!("topology.kubernetes.io/zone: {zone}")));
    }
    objects
}

/// A kind of Service, where it is dialled by each family, and who must answer clients on node 1.
type Cell = (&'static str, [&'static str; 2], &'static str);

const CELLS: [Cell; 20] = [
    ("ClusterIP", ["http://plain.shop/"; 2], "a b c d"),
    ("a port that the Service does not have", ["http://plain.shop:81/"; 2], ""),
    ("named target port", ["http://named.shop/"; 2], "a b c d"),
    ("internalTrafficPolicy Local", ["http://local.shop/"; 2], "a"),
    ("internalTrafficPolicy Local, nobody on the node", ["http://elsewhere.shop/"; 2], ""),
    ("PreferClose", ["http://zonal.shop/"; 2], "a b c"),
    ("PreferSameNode", ["http://nodal.shop/"; 2], "a"),
    ("PreferSameNode, nobody near", ["http://far.shop/"; 2], "d"),
    ("its cluster address", ["http://external.shop/"; 2], "a"),
    ("its external address", ["http://192.0.2.80/", "http://[2001:db8:80::1]/"], "a b c d"),
    ("another port of it", ["http://192.0.2.80:81/", "http://[2001:db8:80::1]:81/"], ""),
    ("load balancer", ["http://192.0.2.81/", "http://[2001:db8:81::1]/"], "a b c d"),
    ("a port of this node", ["http://10.10.0.11:30080/", "http://[fd00:10:10::b]:30080/"], "a b c d"),
    ("a port of another node", ["http://10.10.0.13:30080/", "http://[fd00:10:10::d]:30080/"], "a b c d"),
    ("publishNotReadyAddresses", ["http://early.shop/"; 2], "unready"),
    ("nobody is ready", ["http://late.shop/"; 2], ""),
    ("headless", ["http://bare.shop:8080/"; 2], "c"),
    ("ExternalName", ["http://alias.shop/"; 2], "a b c d"),
    ("a pod", ["http://10.20.3.2:8080/", "http://[fd00:10:20:3::2]:8080/"], "d"),
    ("an address that nobody has", ["http://10.20.3.99:8080/", "http://[fd00:10:20:3::99]:8080/"], ""),
];

type Seen = BTreeMap<(&'static str, &'static str, &'static str), BTreeSet<String>>;

/// Asks every cell, and fails where the answer is not the expected one. Returns what addresses were seen.
fn ask(lab: &Lab, when: &str) -> anyhow::Result<Seen> {
    let mut wrong = BTreeMap::new();
    let mut sources = Seen::new();
    for (name, urls, expected) in CELLS {
        let expected: BTreeSet<String> = expected.split_whitespace().map(str::to_owned).collect();
        for (family, url) in ["-4", "-6"].into_iter().zip(urls) {
            for client in ["shop/web", "plain/guest"] {
                let (pods, seen) = answered(lab, client, url, family).with_context(|| when.to_owned())?;
                if pods != expected {
                    wrong.insert((name, family, client), pods);
                }
                sources.insert((name, family, client), seen);
            }
        }
    }
    assert!(wrong.is_empty(), "{when}: {wrong:#?}");
    // Affinity: which pod it is may differ, but it is one.
    for client in ["shop/web", "plain/guest"] {
        for family in ["-4", "-6"] {
            let (pods, _) = answered(lab, client, "http://sticky.shop/", family)?;
            assert_eq!(pods.len(), 1, "{when}, {client} {family}: {pods:?}");
        }
    }
    Ok(sources)
}

#[test]
fn each_kind_of_service_is_answered_by_the_same_pods_before_and_after_the_label() -> anyhow::Result<()> {
    let config = LabConfig { nodes: 3, ..LabConfig::of(&world()) };
    let Some(lab) = scenario::lab(config) else { return Ok(()) };
    apply(&lab, UNREADY, Duration::from_secs(5))?;
    let before = ask(&lab, "before the label")?;
    apply(&lab, &scenario::namespace("shop", true), Duration::from_secs(15))?;
    assert_eq!(scenario::pod_status(&lab, "node-1", "web")?["capture"], "Captured");
    let after = ask(&lab, "after the label")?;
    for (cell, seen) in &before {
        // The cluster masquerades what goes to an external address, so that answers come back; a tunnel needs no such
        // thing, and the pods see who it is.
        if cell.0 == "its external address" && cell.2 == "shop/web" {
            let own = lab.pod_ip("shop", "web")?;
            assert!(cell.1 == "-6" || after[cell] == BTreeSet::from([own]), "{cell:?}: {:?}", after[cell]);
        } else {
            assert_eq!(*seen, after[cell], "the address that is seen: {cell:?}");
        }
    }

    lab.delete("Pod", "shop/unready")?;
    // The nearest are left when they have gone, inside and outside alike.
    for name in ["a", "b", "c"] {
        lab.delete("Pod", &format!("shop/{name}"))?;
    }
    for client in ["shop/web", "plain/guest"] {
        let who = |url: &str, family: &str| Ok::<_, anyhow::Error>(answered(&lab, client, url, family)?.0);
        let rest = BTreeSet::from(["d".to_owned()]);
        assert_eq!(who("http://zonal.shop/", "-4")?, rest, "{client}: the zone is empty");
        assert_eq!(who("http://nodal.shop/", "-6")?, rest, "{client}: the node and the zone are empty");
        assert_eq!(who("http://local.shop/", "-4")?, BTreeSet::new(), "{client}: nobody on this node");
    }
    let line = scenario::await_log(&lab, "node-1", &["NO_ENDPOINT", "internalTrafficPolicy: Local"])?;
    assert!(line.contains("local.shop"), "{line}");
    Ok(())
}

/// A slice of three endpoints by hand: (ready, serving, terminating) of each address. It names no pods, as slices of a
/// Service without a selector need not.
fn slice(states: [(bool, bool, bool); 3], ips: &[String; 3]) -> String {
    let mut text = "---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\n\
         metadata: {name: by-hand, namespace: shop, labels: {kubernetes.io/service-name: by-hand}}\n\
         addressType: IPv4\nports: [{port: 8080}]\nendpoints:\n"
        .to_owned();
    for (ip, (ready, serving, terminating)) in ips.iter().zip(states) {
        text.push_str(&format!(
            "- {{addresses: ['{ip}'], conditions: {{ready: {ready}, serving: {serving}, terminating: {terminating}}}}}\n"
        ));
    }
    text
}

#[test]
fn conditions_of_endpoints_decide_who_gets_traffic() -> anyhow::Result<()> {
    let mut objects = scenario::world(true);
    for (name, node) in [("a", 1), ("b", 2), ("c", 2)] {
        objects.push_str(&scenario::server("shop", name, name, node));
    }
    objects.push_str(
        "---\napiVersion: v1\nkind: Service\nmetadata: {name: by-hand, namespace: shop}\nspec: {ports: [{port: 80}]}\n",
    );
    let Some(lab) = scenario::lab(LabConfig::of(&objects)) else { return Ok(()) };
    let ips = [lab.pod_ip("shop", "a")?, lab.pod_ip("shop", "b")?, lab.pod_ip("shop", "c")?];
    let (ready, leaving, gone) = ((true, true, false), (false, true, true), (false, false, true));
    let not_yet = (false, false, false);
    let cases = [
        ("all ready", [ready; 3], "a b c"),
        ("one is not ready", [ready, not_yet, ready], "a c"),
        ("one leaves", [leaving, ready, not_yet], "b"),
        ("two leave and nobody is ready", [leaving, not_yet, leaving], "a c"),
        ("one leaves and does not serve", [gone, leaving, gone], "b"),
        ("nobody serves", [gone, gone, not_yet], ""),
        ("ready again", [not_yet, ready, not_yet], "b"),
    ];
    for (name, states, expected) in cases {
        let expected: BTreeSet<String> = expected.split_whitespace().map(str::to_owned).collect();
        lab.apply_yaml(&slice(states, &ips))?;
        eventually(name, scenario::PATIENCE, || {
            let seen = answered(&lab, "shop/web", "http://by-hand.shop/", "-4").map_err(|error| error.to_string())?.0;
            if seen == expected { Ok(()) } else { Err(format!("{seen:?}")) }
        })?;
    }
    Ok(())
}
