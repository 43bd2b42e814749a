//! Promise: enrolment changes no balancing. For each kind of Service the set of pods that answers a client is the same
//! in the mesh and outside, by either address family.

use std::collections::BTreeMap;
use std::collections::BTreeSet;

use e2e::lab::Lab;
use e2e::lab::LabConfig;
use e2e::scenario;

/// Requests for one cell. A set of 4 misses one of its pods once in a million tries.
const TRIES: usize = 50;

/// Who answers `from` at `url`, and nobody where nothing does.
fn answered(lab: &Lab, from: &str, url: &str, family: &str) -> anyhow::Result<BTreeSet<String>> {
    let tries = TRIES.to_string();
    let first = scenario::calls(lab, from, url, &[family, "--timeout-ms", "1500"])?;
    if first[0]["ok"] != true {
        return Ok(BTreeSet::new());
    }
    let reports = scenario::calls(lab, from, url, &[family, "--count", &tries])?;
    scenario::all_well(&reports, TRIES)?;
    Ok(reports.iter().filter_map(|report| report["pod"].as_str().map(str::to_owned)).collect())
}

fn service(name: &str, fields: &str, port: &str) -> String {
    format!(
        "---\napiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: shop}}\n\
         spec: {{selector: {{app: many}}, ports: [{{port: 80, {port}}}]{fields}}}\n"
    )
}

/// A server whose HTTP port has a name, and another number than its neighbours'.
fn server(name: &str, node: u16, port: u16) -> String {
    format!(
        "---\napiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: shop, labels: {{app: many}}}}\n\
         spec:\n  nodeName: node-{node}\n  serviceAccountName: many\n  containers:\n  - name: main\n\
         \x20   command: [shop, serve, --name, {name}, --http, '8080', --http, '{port}']\n\
         \x20   ports: [{{containerPort: 8080}}, {{name: web, containerPort: {port}}}]\n"
    )
}

fn world() -> String {
    let mut objects = scenario::world(true);
    for (name, node, port) in [("a", 1, 8081), ("b", 2, 8082), ("c", 2, 8083), ("d", 3, 8084)] {
        objects.push_str(&server(name, node, port));
    }
    // Says that it is ready when it listens on 8080, which it never does.
    objects.push_str(
        "---\napiVersion: v1\nkind: Pod\nmetadata: {name: unready, namespace: shop, labels: {app: many}}\n\
         spec:\n  nodeName: node-1\n  serviceAccountName: many\n  containers:\n\
         \x20 - {name: main, command: [shop, serve, --name, unready, --http, '8081'], ports: [{containerPort: 8080}]}\n",
    );
    for (name, fields, port) in [
        ("plain", "", "targetPort: 8080"),
        ("named", "", "targetPort: web"),
        ("local", ", internalTrafficPolicy: Local", "targetPort: 8080"),
        ("sticky", ", sessionAffinity: ClientIP", "targetPort: 8080"),
        ("external", ", externalIPs: [192.0.2.80, '2001:db8:80::1']", "targetPort: 8080"),
        ("early", ", publishNotReadyAddresses: true", "targetPort: 8081"),
        ("zonal", ", trafficDistribution: PreferClose", "targetPort: 8080"),
    ] {
        objects.push_str(&service(name, fields, port));
    }
    for (node, zone) in [(1, "z1"), (2, "z1"), (3, "z2")] {
        objects.push_str(&format!(
            "---\napiVersion: v1\nkind: Node\nmetadata: {{name: node-{node}, labels: {{topology.kubernetes.io/zone: {zone}}}}}\n"
        ));
    }
    objects
}

#[test]
fn each_kind_of_service_is_answered_by_the_same_pods_in_the_mesh_and_outside() -> anyhow::Result<()> {
    let config = LabConfig { nodes: 3, ..LabConfig::of(&world()) };
    let Some(lab) = scenario::lab(config) else { return Ok(()) };
    let set = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<BTreeSet<_>>();
    let all = set(&["a", "b", "c", "d"]);
    // Host, and who must answer. The same for clients inside and outside.
    let cells: Vec<(&str, [&str; 2], BTreeSet<String>)> = vec![
        ("plain", ["http://plain.shop/"; 2], all.clone()),
        ("named target port", ["http://named.shop/"; 2], all.clone()),
        ("internalTrafficPolicy Local", ["http://local.shop/"; 2], set(&["a"])),
        ("external address", ["http://192.0.2.80/", "http://[2001:db8:80::1]/"], all.clone()),
        ("another port of an external address", ["http://192.0.2.80:81/", "http://[2001:db8:80::1]:81/"], set(&[])),
        // Only the unready pod and `a` have 8081; the others refuse outside, and are left for another inside.
        ("a port that the Service does not have", ["http://plain.shop:81/"; 2], set(&[])),
    ];
    let mut wrong = BTreeMap::new();
    for (name, urls, expected) in cells {
        for (family, url) in ["-4", "-6"].into_iter().zip(urls) {
            for client in ["shop/web", "plain/guest"] {
                let seen = answered(&lab, client, url, family)?;
                if seen != expected {
                    wrong.insert((name, family, client), seen);
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");

    // Affinity: which pod it is may differ, but it is one, by both families of the mesh's client.
    for client in ["shop/web", "plain/guest"] {
        let seen = answered(&lab, client, "http://sticky.shop/", "-4")?;
        assert_eq!(seen.len(), 1, "{client}: {seen:?}");
    }
    // The lab's own translation has no hints, so this is the mesh's client alone.
    assert_eq!(answered(&lab, "shop/web", "http://zonal.shop/", "-4")?, set(&["a", "b", "c"]));
    lab.delete("Pod", "shop/a")?;
    lab.delete("Pod", "shop/b")?;
    lab.delete("Pod", "shop/c")?;
    assert_eq!(
        answered(&lab, "shop/web", "http://zonal.shop/", "-6")?,
        set(&["d"]),
        "the zone is left when it is empty"
    );
    for client in ["shop/web", "plain/guest"] {
        assert_eq!(answered(&lab, client, "http://local.shop/", "-4")?, set(&[]), "{client}: nobody on this node");
    }
    assert!(answered(&lab, "shop/web", "http://early.shop/", "-4")?.contains("unready"), "unready ones are published");
    Ok(())
}
