//! What control sees of a small cluster.

use std::collections::BTreeMap;

use serde_json::json;

use crate::manifest::Key;
use crate::manifest::Objects;
use crate::manifest::parse;
use crate::objects;
use crate::objects::Completed;
use crate::objects::Facts;
use crate::plan;
use crate::plan::Allocator;

const SHOP: &str = "
kind: Deployment
metadata: {name: cart, namespace: shop}
spec:
  replicas: 2
  template:
    metadata: {labels: {app: cart}}
    spec:
      serviceAccountName: cart
      containers: [{name: c, command: [shop], ports: [{name: web, containerPort: 8080}]}]
---
kind: Service
metadata: {name: cart, namespace: shop}
spec: {selector: {app: cart}, ports: [{name: http, port: 80, targetPort: web}, {name: dns, port: 53, protocol: UDP}]}
---
kind: Namespace
metadata: {name: world, annotations: {lab.tulle.dev/outside: \"true\"}}
---
kind: Pod
metadata: {name: api, namespace: world}
---
kind: AuthorizationPolicy
metadata: {name: any, namespace: shop}
spec: {odd: [1, {}]}
";

fn completed(ready: &[&str]) -> Completed {
    let wanted: Objects = parse("test", SHOP).unwrap().into_iter().collect();
    let mut allocator = Allocator::new(2, "seed");
    let (pods, _) = plan::pods(&wanted, &mut allocator, 2).unwrap();
    let facts: BTreeMap<_, _> = pods
        .iter()
        .map(|pod| (pod.key(), Facts { started: true, ready: ready.contains(&pod.name.as_str()), ..Facts::default() }))
        .collect();
    objects::complete(&wanted, &pods, &facts, &mut allocator, 2).unwrap()
}

#[test]
fn pods_have_everything_a_kubelet_would_report() {
    let all = completed(&["cart-0"]);
    let pod = &all.objects[&Key::new("Pod", "shop", "cart-0")];
    assert_eq!(pod["spec"]["nodeName"], "node-1");
    assert_eq!(pod["status"]["podIPs"], json!([{"ip": "10.20.1.2"}, {"ip": "fd00:10:20:1::2"}]));
    assert_eq!(pod["status"]["conditions"][0]["status"], "True");
    assert_eq!(all.objects[&Key::new("Pod", "shop", "cart-1")]["status"]["conditions"][0]["status"], "False");
}

#[test]
fn services_get_addresses_and_slices_of_both_families() {
    let all = completed(&["cart-0"]);
    let service = &all.objects[&Key::new("Service", "shop", "cart")];
    assert_eq!(service["spec"]["clusterIPs"], json!(["10.96.0.10", "fd00:10:96::a"]));
    let slice = &all.objects[&Key::new("EndpointSlice", "shop", "cart-ipv6-0")];
    assert_eq!(slice["ports"][0], json!({"name": "http", "port": 8080, "protocol": "TCP"}));
    assert_eq!(slice["endpoints"][0]["conditions"]["ready"], true);
    assert_eq!(slice["endpoints"][1]["conditions"]["ready"], false);
    assert_eq!(all.services[0].ports[0].endpoints.len(), 1, "only ready pods are balanced to");
}

#[test]
fn hosts_outside_stay_hidden_and_foreign_kinds_pass_untouched() {
    let all = completed(&[]);
    assert!(all.objects.keys().all(|key| key.namespace != "world" && key.name != "world"));
    assert_eq!(all.objects[&Key::new("AuthorizationPolicy", "shop", "any")]["spec"], json!({"odd": [1, {}]}));
    assert!(all.objects.contains_key(&Key::new("Namespace", "", "shop")));
}
