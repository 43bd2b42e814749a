//! Promise: control with `--source kube` knows what the API server has, no more and no less: the same as from files, after
//! watches that expired, restarts and outages of the API server, kinds that come and go, bad objects and missing rights.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::path::Path;
use std::time::{Duration, Instant};

use e2e::eventually::eventually;
use e2e::kube::control::Control;
use e2e::kube::{self, ApiServer, Options, crds};
use serde_json::{Value, json};

const PATIENCE: Duration = Duration::from_secs(120);

/// Our kinds, without their schemas: those are tested elsewhere.
const OURS: [(&str, &str, &str, &[&str], bool); 3] = [
    ("tulle.dev", "EgressPolicy", "egresspolicies", &["v1alpha1"], true),
    ("tulle.dev", "HTTPFault", "httpfaults", &["v1alpha1"], true),
    ("tulle.dev", "HTTPRateLimit", "httpratelimits", &["v1alpha1"], true),
];

const POLICIES: (&str, &str, &str, &[&str], bool) =
    ("security.istio.io", "AuthorizationPolicy", "authorizationpolicies", &["v1", "v1beta1"], true);

/// One object at least of each kind, and what makes a mesh of them.
const OBJECTS: &str = "
apiVersion: v1
kind: Namespace
metadata: {name: shop, labels: {tulle.dev/mesh: enabled}}
---
apiVersion: v1
kind: Node
metadata: {name: node-1, labels: {topology.kubernetes.io/zone: a, topology.kubernetes.io/region: r}}
---
apiVersion: v1
kind: ServiceAccount
metadata: {name: cart, namespace: shop}
---
apiVersion: v1
kind: Service
metadata: {name: cart, namespace: shop}
spec: {selector: {app: cart}, ports: [{name: http, port: 80, targetPort: 8080, appProtocol: http}]}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: cart-1, namespace: shop, labels: {kubernetes.io/service-name: cart}}
addressType: IPv4
ports: [{name: http, port: 8080, protocol: TCP}]
endpoints:
- {addresses: [10.44.0.1], conditions: {ready: true}, nodeName: node-1, targetRef: {kind: Pod, name: cart-0, namespace: shop}}
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: only-front, namespace: shop}
spec: {podSelector: {matchLabels: {app: cart}}, ingress: [{from: [{podSelector: {matchLabels: {app: front}}}]}]}
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: allow-front, namespace: shop}
spec: {rules: [{from: [{source: {principals: [cluster.local/ns/shop/sa/front]}}], to: [{operation: {paths: [/cart*]}}]}]}
---
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: strict, namespace: shop}
spec: {mtls: {mode: STRICT}}
---
apiVersion: security.istio.io/v1
kind: RequestAuthentication
metadata: {name: tokens, namespace: shop}
spec: {selector: {matchLabels: {app: cart}}, jwtRules: [{issuer: someone, jwks: '{\"keys\":[]}'}]}
---
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: cart, namespace: shop}
spec: {host: cart, trafficPolicy: {connectionPool: {http: {http2MaxRequests: 10}}}}
---
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: outside, namespace: shop}
spec: {hosts: [api.example.com], location: MESH_EXTERNAL, resolution: DNS, ports: [{number: 443, name: tls, protocol: TLS}]}
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: cart, namespace: shop}
spec:
  parentRefs: [{group: '', kind: Service, name: cart, port: 80}]
  rules:
  - filters:
    - {type: ExtensionRef, extensionRef: {group: tulle.dev, kind: HTTPFault, name: slow}}
    - {type: ExtensionRef, extensionRef: {group: tulle.dev, kind: HTTPRateLimit, name: few}}
    backendRefs: [{name: cart, port: 80, weight: 9}]
---
apiVersion: gateway.networking.k8s.io/v1
kind: GRPCRoute
metadata: {name: grpc, namespace: shop}
spec: {parentRefs: [{group: '', kind: Service, name: cart, port: 80}], rules: [{backendRefs: [{name: cart, port: 80}]}]}
---
apiVersion: gateway.networking.k8s.io/v1
kind: ReferenceGrant
metadata: {name: grant, namespace: shop}
spec: {from: [{group: gateway.networking.k8s.io, kind: HTTPRoute, namespace: other}], to: [{group: '', kind: Service}]}
---
apiVersion: tulle.dev/v1alpha1
kind: EgressPolicy
metadata: {name: api, namespace: shop}
spec: {rules: [{hosts: [api.example.com], ports: [{port: 443, protocol: TLS}]}]}
---
apiVersion: tulle.dev/v1alpha1
kind: HTTPFault
metadata: {name: slow, namespace: shop}
spec: {delay: {percent: 10, duration: 100ms}}
---
apiVersion: tulle.dev/v1alpha1
kind: HTTPRateLimit
metadata: {name: few, namespace: shop}
spec: {requests: 10, interval: 1h, per: Identity}
";

fn definitions() -> String {
    crds::GATEWAY_API.iter().chain(crds::ISTIO).chain(&OURS).map(|one| crds::definition(*one)).collect()
}

/// A pod as a scheduler and a kubelet make it.
fn pod(server: &ApiServer, name: &str, address: &str) -> anyhow::Result<()> {
    let app = name.rsplit_once('-').map_or(name, |(app, _)| app);
    server.apply(&format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: shop, labels: {{app: {app}}}, \
         annotations: {{ambient.istio.io/redirection: enabled}}}}\n\
         spec: {{nodeName: node-1, serviceAccountName: {app}, automountServiceAccountToken: false, \
         containers: [{{name: main, image: none, ports: [{{name: http, containerPort: 8080}}], \
         readinessProbe: {{httpGet: {{port: 8080}}}}}}]}}\n"
    ))?;
    let status = json!({"status": {"phase": "Running", "podIP": address, "podIPs": [{"ip": address}],
        "conditions": [{"type": "Ready", "status": "True"}]}});
    server.patch_status("Pod", &format!("shop/{name}"), &status)?;
    Ok(())
}

/// What control publishes, in an order of its own names.
fn resources(control: &Control) -> anyhow::Result<Vec<String>> {
    let page = control.json("/debug/resources")?;
    let mut all: Vec<String> = page.as_array().into_iter().flatten().map(Value::to_string).collect();
    all.sort();
    Ok(all)
}

/// Names of workloads that control publishes.
fn workloads(control: &Control) -> anyhow::Result<BTreeSet<String>> {
    let page = control.json("/debug/resources?type=Address")?;
    let names = page.as_array().into_iter().flatten().filter_map(|it| it["resource"]["workload"]["name"].as_str());
    Ok(names.map(str::to_owned).collect())
}

fn standing<'a>(source: &'a Value, resource: &str) -> &'a Value {
    source.as_array().into_iter().flatten().find(|kind| kind["resource"] == resource).unwrap_or(&Value::Null)
}

/// All objects of the API server as files, as `kubectl get -o json` would write them.
fn export(server: &ApiServer, kinds: &Value, dir: &Path) -> anyhow::Result<()> {
    std::fs::create_dir_all(dir)?;
    for kind in kinds.as_array().into_iter().flatten() {
        let resource = kind["resource"].as_str().unwrap_or_default();
        let (plural, group) = resource.split_once('.').unwrap_or((resource, ""));
        let version = kind["version"].as_str().unwrap_or_default();
        let api = if group.is_empty() { version.to_owned() } else { format!("{group}/{version}") };
        let root = if group.is_empty() { "/api" } else { "/apis" };
        let list = server.ask(http::Method::GET, &format!("{root}/{api}/{plural}"), "", &Value::Null)?;
        let name = list["kind"].as_str().unwrap_or_default().trim_end_matches("List").to_owned();
        let mut text = String::new();
        for item in list["items"].as_array().into_iter().flatten() {
            let mut item = item.clone();
            item["apiVersion"] = json!(api);
            item["kind"] = json!(name);
            let _ = write!(text, "---\n{item}\n");
        }
        std::fs::write(dir.join(format!("{resource}.yaml")), text)?;
    }
    Ok(())
}

#[test]
fn every_kind_is_known_as_from_files_and_equal_on_two_replicas() -> anyhow::Result<()> {
    let bundles = ["--runtime-config=certificates.k8s.io/v1beta1=true", "--feature-gates=ClusterTrustBundle=true"];
    let options = Options { arguments: bundles.map(str::to_owned).to_vec() };
    let Some(server) = kube::start(options) else { return Ok(()) };
    let dir = tempfile::tempdir()?;
    server.apply(&definitions())?;
    server.apply(OBJECTS)?;
    let issued = rcgen_root()?;
    server.apply(&format!(
        "apiVersion: certificates.k8s.io/v1beta1\nkind: ClusterTrustBundle\n\
         metadata: {{name: partner, labels: {{tulle.dev/trust-domain: partner.example}}}}\n\
         spec: {{trustBundle: {}}}\n",
        json!(issued)
    ))?;
    pod(&server, "cart-0", "10.44.0.1")?;
    pod(&server, "front-0", "10.44.0.2")?;
    let one = Control::of_cluster(&dir.path().join("one"), &server.kubeconfig(), &[])?;
    let two = Control::of_cluster(&dir.path().join("two"), &server.kubeconfig(), &[])?;
    one.await_ready()?;
    two.await_ready()?;
    let source = one.json("/debug/source")?;
    for kind in source.as_array().into_iter().flatten() {
        assert_eq!(kind["standing"], "current", "{kind}");
        assert!(kind["objects"].as_u64() > Some(0), "no object of this kind was made: {kind}");
    }
    let files = dir.path().join("objects");
    export(&server, &source, &files)?;
    let from_files = Control::start(&dir.path().join("three"), &format!("files:{}", files.display()), &[])?;
    from_files.await_ready()?;
    assert_eq!(from_files.json("/debug/problems")?, json!([]));
    let expected = resources(&from_files)?;
    assert!(expected.len() > 5, "{expected:?}");
    assert_eq!(resources(&one)?, expected);
    assert_eq!(resources(&two)?, expected, "replicas agree, versions included");
    assert_eq!(one.json("/debug/conditions")?, from_files.json("/debug/conditions")?);
    // Changes arrive, and both agree again.
    pod(&server, "late-0", "10.44.0.3")?;
    server.delete("AuthorizationPolicy", "shop/allow-front")?;
    for control in [&one, &two] {
        eventually("the change is known", PATIENCE, || {
            let now = resources(control)?;
            let text = now.join("\n");
            anyhow::ensure!(text.contains("late-0") && !text.contains("allow-front"), "{text}");
            Ok::<_, anyhow::Error>(())
        })?;
    }
    assert_eq!(resources(&one)?, resources(&two)?);
    Ok(())
}

fn rcgen_root() -> anyhow::Result<String> {
    let mut params = rcgen::CertificateParams::new(Vec::new())?;
    params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    Ok(params.self_signed(&rcgen::KeyPair::generate()?)?.pem())
}

#[test]
fn after_an_expired_watch_what_vanished_goes_and_what_stayed_was_never_away() -> anyhow::Result<()> {
    let Some(mut server) = kube::start(Options::default()) else { return Ok(()) };
    let dir = tempfile::tempdir()?;
    server.apply("apiVersion: v1\nkind: Namespace\nmetadata: {name: shop, labels: {tulle.dev/mesh: enabled}}\n")?;
    for (name, address) in [("stays-0", "10.44.0.1"), ("goes-0", "10.44.0.2")] {
        pod(&server, name, address)?;
    }
    let control = Control::of_cluster(&dir.path().join("one"), &server.kubeconfig(), &[])?;
    control.await_ready()?;
    assert_eq!(workloads(&control)?.len(), 2);
    // While nobody watches: one goes, one comes, and the API server forgets how.
    control.pause();
    // What follows must not wait in the open connection of its watch.
    server.restart()?;
    server.remove("Pod", "shop/goes-0")?;
    pod(&server, "comes-0", "10.44.0.3")?;
    server.compact()?;
    server.restart()?;
    control.resume();
    let began = Instant::now();
    loop {
        let now = workloads(&control)?;
        assert!(now.contains("stays-0"), "it was never away: {now:?}");
        assert_eq!(now.contains("goes-0"), !now.contains("comes-0"), "both in one step: {now:?}");
        if now.contains("comes-0") {
            break;
        }
        assert!(began.elapsed() < PATIENCE, "{now:?} {}", control.json("/debug/source")?);
        std::thread::sleep(Duration::from_millis(5));
    }
    let again = |source: &Value| standing(source, "pods")["lists"].as_u64() >= Some(2);
    control.wait("/debug/source", "pods were listed again", again)?;
    assert_eq!(control.page("/readyz")?.status, 200);
    Ok(())
}

#[test]
fn an_outage_keeps_the_world_and_says_since_when() -> anyhow::Result<()> {
    let Some(mut server) = kube::start(Options::default()) else { return Ok(()) };
    let dir = tempfile::tempdir()?;
    server.apply("apiVersion: v1\nkind: Namespace\nmetadata: {name: shop, labels: {tulle.dev/mesh: enabled}}\n")?;
    pod(&server, "cart-0", "10.44.0.1")?;
    let control = Control::of_cluster(&dir.path().join("one"), &server.kubeconfig(), &[])?;
    control.await_ready()?;
    let before = resources(&control)?;
    server.kill();
    let stale = |source: &Value| {
        ["pods", "namespaces", "services"].iter().all(|kind| standing(source, kind)["standing"] == "stale")
    };
    let source = control.wait("/debug/source", "control notices the outage", stale)?;
    let pods = standing(&source, "pods");
    assert!(pods["reason"].as_str().is_some_and(|text| text.contains("cannot be asked")), "{pods}");
    assert!(pods["heard"].as_i64() > Some(0) && pods["objects"] == 1, "{pods}");
    assert_eq!(resources(&control)?, before);
    assert_eq!(control.page("/readyz")?.status, 200, "nodes go on");
    let metrics = control.page("/metrics")?.body;
    assert!(metrics.contains("tulle_control_source_stale{resource=\"pods\"} 1"), "{metrics}");
    assert!(control.json("/debug/status")?["source"].to_string().contains("stale"));
    // One that starts meanwhile waits for everything, and says for what.
    let second = Control::of_cluster(&dir.path().join("two"), &server.kubeconfig(), &[])?;
    eventually("a new replica says what it waits for", PATIENCE, || {
        let answer = second.page("/readyz")?;
        anyhow::ensure!(answer.status == 503 && answer.body.contains("pods: the API server cannot"), "{}", answer.body);
        Ok::<_, anyhow::Error>(())
    })?;
    server.begin()?;
    server.await_ready()?;
    pod(&server, "late-0", "10.44.0.2")?;
    second.await_ready()?;
    eventually("control follows again", PATIENCE, || {
        let (now, source) = (workloads(&control)?, control.json("/debug/source")?);
        let current = standing(&source, "pods")["standing"] == "current" && !source.to_string().contains("stale");
        anyhow::ensure!(now.contains("late-0") && now.contains("cart-0") && current, "{now:?} {source}");
        Ok::<_, anyhow::Error>(())
    })?;
    assert_eq!(resources(&control)?, resources(&second)?);
    Ok(())
}

fn policy(action: &str) -> String {
    format!(
        "apiVersion: security.istio.io/v1beta1\nkind: AuthorizationPolicy\nmetadata: {{name: p, namespace: shop}}\n\
         spec: {{action: {action}, rules: [{{from: [{{source: {{namespaces: [a]}}}}]}}]}}\n"
    )
}

#[test]
fn a_kind_that_comes_later_is_picked_up_its_bad_objects_are_named_and_when_it_goes_they_go() -> anyhow::Result<()> {
    let Some(server) = kube::start(Options::default()) else { return Ok(()) };
    let dir = tempfile::tempdir()?;
    server.apply("apiVersion: v1\nkind: Namespace\nmetadata: {name: shop, labels: {tulle.dev/mesh: enabled}}\n")?;
    pod(&server, "cart-0", "10.44.0.1")?;
    let control = Control::of_cluster(&dir.path().join("one"), &server.kubeconfig(), &[])?;
    control.await_ready()?;
    let kind = "authorizationpolicies.security.istio.io";
    assert_eq!(standing(&control.json("/debug/source")?, kind)["standing"], "absent");
    let policies = "/debug/resources?type=Authorization";
    let current = |version: &'static str| {
        move |source: &Value| {
            let kind = standing(source, kind);
            kind["standing"] == "current" && kind["version"] == version
        }
    };
    // It comes in an old version, later in a newer one besides.
    server.apply(&crds::definition((POLICIES.0, POLICIES.1, POLICIES.2, &["v1beta1"], true)))?;
    control.wait("/debug/source", "the kind is picked up", current("v1beta1"))?;
    server.apply(&policy("DENY"))?;
    control.wait(policies, "its objects are known", |page| page.to_string().contains("shop/p"))?;
    server.apply(&crds::definition((POLICIES.0, POLICIES.1, POLICIES.2, &["v1beta1", "v1"], true)))?;
    control.wait("/debug/source", "the newer version is taken", current("v1"))?;
    let good = control.json(policies)?;
    // Broken, it keeps its last good version, and is named; a new one that is broken from the start denies.
    server.apply(&policy("SHUT"))?;
    let problems = control.wait("/debug/problems", "it is named", |page| page.to_string().contains("SHUT"))?;
    let problem = &problems[0];
    assert_eq!((&problem["object"], &problem["field"]), (&json!("AuthorizationPolicy shop/p"), &json!("spec.action")));
    assert!(problem["message"].as_str().is_some_and(|text| text.contains("last good version")), "{problem}");
    assert_eq!(control.json(policies)?, good);
    server.apply(&policy("SHUT").replace("name: p,", "name: q,"))?;
    let page = control.wait(policies, "the broken one is there", |page| page.to_string().contains("shop/q"))?;
    assert!(page.to_string().contains("\"deniesAll\":true"), "{page}");
    server.apply(&policy("DENY"))?;
    server.delete("AuthorizationPolicy", "shop/q")?;
    control.wait("/debug/problems", "both are repaired", |page| *page == json!([]))?;
    // The definition goes, and its objects with it.
    server.delete("CustomResourceDefinition", "authorizationpolicies.security.istio.io")?;
    control.wait("/debug/source", "the kind is gone", |source| standing(source, kind)["standing"] == "absent")?;
    control.wait(policies, "its objects are gone", |page| !page.to_string().contains("shop/p"))?;
    assert_eq!(control.page("/readyz")?.status, 200);
    Ok(())
}

#[test]
fn what_is_forbidden_is_said_with_the_missing_rule_and_taken_up_when_it_is_allowed() -> anyhow::Result<()> {
    let Some(server) = kube::start(Options::default()) else { return Ok(()) };
    let dir = tempfile::tempdir()?;
    let rules = |core: &str| {
        format!(
            "apiVersion: rbac.authorization.k8s.io/v1\nkind: ClusterRole\nmetadata: {{name: tulle-control}}\nrules:\n\
             - {{apiGroups: [''], resources: [{core}], verbs: [list, watch]}}\n\
             - {{apiGroups: [discovery.k8s.io, networking.k8s.io, certificates.k8s.io], resources: ['*'], verbs: [list, watch]}}\n"
        )
    };
    let account = server.kubeconfig_for("tulle-system/control")?;
    server.apply(&rules("namespaces, nodes, serviceaccounts, services"))?;
    server.apply(
        "apiVersion: rbac.authorization.k8s.io/v1\nkind: ClusterRoleBinding\nmetadata: {name: tulle-control}\n\
         roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: tulle-control}\n\
         subjects: [{kind: ServiceAccount, name: control, namespace: tulle-system}]\n",
    )?;
    let control = Control::of_cluster(&dir.path().join("one"), &account, &[])?;
    eventually("control says what is missing, and nothing else", PATIENCE, || {
        let answer = control.page("/readyz")?;
        let lines: Vec<&str> = answer.body.lines().filter(|line| line.starts_with("- ")).collect();
        let told = lines.len() == 1 && lines[0].contains("list and watch on pods of API group \"\"");
        anyhow::ensure!(answer.status == 503 && told, "{}", answer.body);
        Ok::<_, anyhow::Error>(())
    })?;
    assert_eq!(control.json("/debug/resources")?, json!([]), "nothing is served without the pods");
    server.apply(&rules("namespaces, nodes, serviceaccounts, services, pods"))?;
    control.await_ready()?;
    // Its requests say whose they are.
    eventually("control's requests are in the audit log", PATIENCE, || {
        let asked = server.audit()?;
        let ours = asked.iter().filter(|event| event.agent.starts_with("tulle-control/"));
        let verbs: BTreeSet<String> = ours.map(|event| event.verb.clone()).collect();
        anyhow::ensure!(verbs.contains("list") && verbs.contains("watch"), "{verbs:?}");
        anyhow::ensure!(!verbs.iter().any(|verb| verb == "update" || verb == "delete"), "{verbs:?}");
        Ok::<_, anyhow::Error>(())
    })
}
