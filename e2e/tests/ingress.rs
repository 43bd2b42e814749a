//! Promise: what comes in from outside keeps working when pods are enrolled: ports on the nodes under both traffic
//! policies, and an ingress controller (nginx) outside and inside of the mesh. STRICT refuses what is not from the mesh,
//! and says so.

use std::path::Path;

use e2e::lab::Lab;
use e2e::lab::LabConfig;
use e2e::scenario;
use serde_json::Value;

/// Addresses of the nodes on the outside link.
const NODES: [&str; 2] = ["203.0.113.201", "203.0.113.202"];
const NODES_V6: [&str; 2] = ["2001:db8:203::c9", "2001:db8:203::ca"];

fn node_port(name: &str, port: u16, policy: &str) -> String {
    format!(
        "---\napiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: shop}}\n\
         spec: {{type: NodePort, externalTrafficPolicy: {policy}, selector: {{app: cart}}, ports: [{{port: 80, targetPort: 8080, nodePort: {port}}}]}}\n"
    )
}

fn world() -> String {
    let mut objects = scenario::world(true);
    objects.push_str(&node_port("spread", 30080, "Cluster"));
    objects.push_str(&node_port("kept", 30081, "Local"));
    objects.push_str(
        "---\napiVersion: v1\nkind: Namespace\nmetadata: {name: world, annotations: {lab.tulle.dev/outside: \"true\"}}\n\
         ---\napiVersion: v1\nkind: Pod\nmetadata: {name: user, namespace: world}\n\
         spec: {containers: [{name: main, image: none}]}\n",
    );
    objects
}

fn call(lab: &Lab, from: &str, url: &str) -> anyhow::Result<Value> {
    let reports = scenario::calls(lab, from, url, &["--timeout-ms", "2000"])?;
    Ok(reports.into_iter().next().unwrap_or_default())
}

/// Whether `source` is the address of a host outside, and not of a node.
fn is_users(source: &Value) -> bool {
    source.as_str().is_some_and(|source| {
        let outside = source.starts_with("203.0.113.") || source.starts_with("2001:db8:203::");
        outside && !NODES.contains(&source) && !NODES_V6.contains(&source)
    })
}

#[test]
fn ports_of_the_nodes_reach_enrolled_pods_and_strict_says_why_not() -> anyhow::Result<()> {
    let Some(lab) = scenario::lab(LabConfig::of(&world())) else { return Ok(()) };
    // cart runs on node 2: under Cluster both nodes answer, under Local only its own, and there the client is seen.
    for (node, port, answers) in [(0, 30080, true), (1, 30080, true), (0, 30081, false), (1, 30081, true)] {
        for address in [NODES[node].to_owned(), format!("[{}]", NODES_V6[node])] {
            let report = call(&lab, "world/user", &format!("http://{address}:{port}/"))?;
            assert_eq!(report["ok"] == true, answers, "{address} port {port}: {report}");
            if answers {
                assert_eq!(is_users(&report["source"]), port == 30081, "the source under each policy: {report}");
            }
        }
    }
    // From inside the cluster too, captured or not.
    for client in ["shop/web", "plain/guest"] {
        let report = call(&lab, client, "http://10.10.0.11:30080/")?;
        assert_eq!(report["ok"], true, "{client}: {report}");
    }
    lab.apply_yaml(&scenario::peer_authentication("shop", "STRICT"))?;
    let report = call(&lab, "world/user", &format!("http://{}:30081/", NODES[1]))?;
    assert_ne!(report["ok"], true, "{report}");
    let line = scenario::await_log(&lab, "node-2", &["MTLS_REQUIRED", "dst.workload=\"cart\""])?;
    assert!(line.contains("STRICT") && line.contains("portLevelMtls"), "what is wrong, and what to do: {line}");
    assert!(line.contains(&lab.pod_ip("world", "user")?), "who it was: {line}");
    let report = call(&lab, "shop/web", "http://kept.shop/")?;
    assert_eq!(report["ok"], true, "the mesh's own clients are not concerned: {report}");
    Ok(())
}

/// nginx in front of `cart.shop`, as a pod of `namespace` on node 1 behind two ports of the nodes: `port` under Cluster and
/// the next one under Local.
fn nginx(dir: &Path, namespace: &str, port: u16, listen: u16) -> anyhow::Result<String> {
    let base = dir.join(namespace);
    std::fs::create_dir_all(&base)?;
    let base = base.display();
    let config = format!(
        "user root root; daemon off; master_process off; pid {base}/pid; error_log {base}/error.log;\n\
         events {{ worker_connections 64; }}\n\
         http {{ access_log off; client_body_temp_path {base}/b; proxy_temp_path {base}/p; fastcgi_temp_path {base}/f;\n\
         uwsgi_temp_path {base}/u; scgi_temp_path {base}/s;\n\
         resolver 10.20.1.1 valid=1s;\n\
         server {{ listen {listen}; listen [::]:{listen}; set $shop cart.shop.svc.cluster.local;\n\
         proxy_set_header X-Real-IP $remote_addr; location / {{ proxy_pass http://$shop; }} }} }}\n"
    );
    std::fs::write(dir.join(format!("{namespace}.conf")), config)?;
    let conf = dir.join(format!("{namespace}.conf"));
    let mut text = format!(
        "---\napiVersion: v1\nkind: Pod\nmetadata: {{name: nginx, namespace: {namespace}, labels: {{app: nginx}}}}\n\
         spec:\n  nodeName: node-1\n  serviceAccountName: nginx\n  containers:\n\
         \x20 - {{name: main, command: [{NGINX}, -c, '{conf}'], ports: [{{containerPort: {listen}}}]}}\n",
        conf = conf.display()
    );
    for (name, policy, port) in [("nginx", "Cluster", port), ("nginx-local", "Local", port + 1)] {
        text.push_str(&format!(
            "---\napiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: {namespace}}}\n\
             spec: {{type: NodePort, externalTrafficPolicy: {policy}, selector: {{app: nginx}},\n\
             \x20 ports: [{{port: 80, targetPort: {listen}, nodePort: {port}}}]}}\n"
        ));
    }
    Ok(text)
}

const NGINX: &str = "/usr/sbin/nginx";

/// The user's request through the controller at `port`: under Cluster by both nodes, under Local by the first, where the
/// controller runs and sees who the user is.
fn through(lab: &Lab, port: u16) -> anyhow::Result<()> {
    for (node, port, local) in [(0, port, false), (1, port, false), (0, port + 1, true)] {
        for address in [NODES[node].to_owned(), format!("[{}]", NODES_V6[node])] {
            let report = call(lab, "world/user", &format!("http://{address}:{port}/"))?;
            anyhow::ensure!(report["ok"] == true && report["pod"] == "cart", "{address} port {port}: {report}");
            let seen = &report["answer"]["headers"]["x-real-ip"];
            anyhow::ensure!(is_users(seen) == local, "{address} port {port}: the controller saw {seen}");
        }
    }
    let report = call(lab, "world/user", &format!("http://{}:{}/", NODES[1], port + 1))?;
    anyhow::ensure!(report["ok"] != true, "under Local, a node without the controller answered: {report}");
    Ok(())
}

#[test]
fn an_ingress_controller_keeps_working_outside_and_inside_of_the_mesh() -> anyhow::Result<()> {
    if !Path::new(NGINX).exists() {
        assert!(std::env::var_os("CI").is_none(), "{NGINX} is missing; .ci/tools.sh installs it");
        eprintln!("SKIPPED: {NGINX} is missing");
        return Ok(());
    }
    let dir = std::env::temp_dir().join(format!("ingress-{}-{:x}", std::process::id(), rand::random::<u32>()));
    let mut objects = world();
    objects.push_str(&scenario::namespace("meshed", true));
    objects.push_str(&nginx(&dir, "plain", 30082, 8088)?);
    objects.push_str(&nginx(&dir, "meshed", 30084, 8088)?);
    let Some(lab) = scenario::lab(LabConfig::of(&objects)) else { return Ok(()) };
    through(&lab, 30082)?;
    through(&lab, 30084)?;
    // A client of the mesh reaches it, too.
    let report = call(&lab, "shop/web", "http://nginx.meshed/")?;
    assert!(report["ok"] == true && report["pod"] == "cart", "{report}");

    // STRICT where the shop is: the controller in the mesh has an identity, the other one has none.
    lab.apply_yaml(&scenario::peer_authentication("shop", "STRICT"))?;
    through(&lab, 30084)?;
    assert_ne!(call(&lab, "world/user", &format!("http://{}:30082/", NODES[0]))?["ok"], true);
    let line = scenario::await_log(&lab, "node-2", &["MTLS_REQUIRED", "src.workload=\"nginx\""])?;
    assert!(line.contains("src.namespace=\"plain\"") && line.contains("enrol the client"), "{line}");
    let explained = lab.control_get("/debug/explain?from=plain/nginx&to=shop/cart:80")?.to_string();
    for word in ["MTLS_REQUIRED", "STRICT", "enrol the client", "portLevelMtls"] {
        assert!(explained.contains(word), "explain must say {word}: {explained}");
    }
    // As it says: enrolled, it is let in again, and nothing restarts.
    lab.apply_yaml(&scenario::namespace("plain", true))?;
    through(&lab, 30082)?;
    drop(lab);
    std::fs::remove_dir_all(&dir)?;
    Ok(())
}
