//! A random walk through small worlds: after each change of an object, what is translated from what changed must equal
//! what is translated from the beginning, resources, conditions and accounts alike.
//!
//! Names, labels and addresses are few, so that objects meet: addresses with two pods, slices that name pods that come
//! later, policies of three ranks, port names with several numbers. A dependency that nobody follows shows after some
//! hundred steps. `TULLE_WALKS` asks for more than the usual number of walks.

use std::collections::BTreeMap;
use std::collections::BTreeSet;

use proptest::prelude::*;

use crate::resource::Kind;
use crate::source::files::Files;
use crate::translate::{Memory, Settings, Translation, translate};

/// Choices out of one number.
struct Dice(u64);

impl Dice {
    fn pick<'a>(&mut self, among: &[&'a str]) -> &'a str {
        // Knuth's multiplier; the high bits are the good ones.
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        among[((self.0 >> 33) as usize) % among.len()]
    }

    fn meta(&mut self, kind: &str, name: &str, namespaces: &[&str]) -> String {
        let namespace = self.pick(namespaces);
        let year = self.pick(&["2024", "2025"]);
        format!("name: {kind}{name}, namespace: {namespace}, creationTimestamp: '{year}-01-01T00:00:00Z'")
    }
}

const SPACES: &[&str] = &["a", "b"];
const RANKS: &[&str] = &["a", "b", "tulle-system", "istio-system"];
const SELECTORS: &[&str] = &[
    "{matchLabels: {app: x}}",
    "{matchLabels: {app: y}}",
    "{matchLabels: {app: x, tier: t}}",
    "{matchExpressions: [{key: tier, operator: Exists}]}",
    "{}",
];
const IPS: &[&str] = &["10.0.0.1", "10.0.0.2", "10.0.0.3", "10.0.0.4", "10.0.0.5", "10.0.0.6"];

fn namespace(dice: &mut Dice, name: &str) -> String {
    let name = RANKS[name.len() % RANKS.len()];
    let labels = dice.pick(&["tulle.dev/mesh: enabled", "tulle.dev/egress: deny", "tulle.dev/mesh: odd", "team: red"]);
    format!("apiVersion: v1\nkind: Namespace\nmetadata: {{name: {name}, labels: {{{labels}}}}}\n")
}

fn node(dice: &mut Dice, name: &str) -> String {
    let zone = dice.pick(&["z1", "z2"]);
    let labels = format!("topology.kubernetes.io/zone: {zone}");
    let labels = dice.pick(&[&labels, &labels, "kubernetes.io/arch: x"]).to_owned();
    format!("apiVersion: v1\nkind: Node\nmetadata: {{name: n{}, labels: {{{labels}}}}}\n", name.len() % 2)
}

fn pod(dice: &mut Dice, name: &str) -> String {
    let meta = dice.meta("p", name, SPACES);
    let labels = dice.pick(&["app: x", "app: y", "app: x, tier: t", "tulle.dev/mesh: disabled, app: x", ""]);
    let deleting = dice.pick(&["", "", "", ", deletionTimestamp: '2026-01-01T00:00:00Z'"]);
    let (node, account) = (dice.pick(&["n0", "n1", "n1", "''"]), dice.pick(&["s", "t"]));
    let host = dice.pick(&["", "", "", "hostNetwork: true,"]);
    let named = dice.pick(&["", "", "hostname: h, subdomain: s,"]);
    let port = dice.pick(&["", "{name: web, containerPort: 8080}", "{name: web, containerPort: 8081}"]);
    let (ip, other) = (dice.pick(IPS), dice.pick(IPS));
    let ips = dice.pick(&["", &format!(", podIPs: [{{ip: {ip}}}, {{ip: {other}}}]")]).to_owned();
    let (ready, phase) = (dice.pick(&["True", "True", "False"]), dice.pick(&["Running", "Running", "Succeeded"]));
    format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{{meta}, labels: {{{labels}}}{deleting}}}\n\
         spec: {{nodeName: {node}, serviceAccountName: {account}, {host} {named} containers: [{{name: c, ports: [{port}]}}]}}\n\
         status: {{phase: {phase}, podIP: {ip}{ips}, conditions: [{{type: Ready, status: '{ready}'}}]}}\n"
    )
}

fn service(dice: &mut Dice, name: &str) -> String {
    let meta = dice.meta("s", name, SPACES);
    let selector = dice.pick(&["{app: x}", "{app: y}", "{app: x, tier: t}", "{}"]);
    let address = dice.pick(&["10.96.0.1", "10.96.0.2", "192.0.2.1", "None"]);
    let external = dice.pick(&["", "", "externalIPs: [192.0.2.1],", "externalIPs: [192.0.2.1, 10.0.0.1],"]);
    let more = dice.pick(&[
        "",
        "",
        "publishNotReadyAddresses: true,",
        "internalTrafficPolicy: Local,",
        "trafficDistribution: PreferClose,",
        "type: ExternalName, externalName: x.example,",
    ]);
    let target = dice.pick(&["web", "8080"]);
    format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{{meta}}}\nspec: {{clusterIP: {address}, selector: {selector}, {external} {more} \
         ports: [{{name: http, port: 80, targetPort: {target}}}, {{name: dns, port: 53, protocol: UDP, targetPort: {target}}}]}}\n"
    )
}

fn endpoint(dice: &mut Dice) -> String {
    let (ip, pod) = (dice.pick(&[IPS, &["172.16.0.1"]].concat()), dice.pick(&["p1", "p11", "p111"]));
    let reference = dice.pick(&["", &format!(", targetRef: {{kind: Pod, name: {pod}}}")]).to_owned();
    let place = dice.pick(&["", ", nodeName: n0", ", nodeName: n1", ", zone: z1"]);
    let state = dice.pick(&[
        "",
        "",
        ", conditions: {ready: false}",
        ", conditions: {ready: false, serving: true, terminating: true}",
    ]);
    let hints = dice.pick(&["", ", hints: {forZones: [{name: z1}]}", ", hints: {forZones: [{name: z2}]}"]);
    format!("{{addresses: [{ip}]{reference}{place}{state}{hints}, hostname: h}}")
}

fn slice(dice: &mut Dice, name: &str) -> String {
    let (meta, of) = (dice.meta("e", name, SPACES), dice.pick(&["s1", "s11"]));
    let endpoints = [endpoint(dice), endpoint(dice)].join(", ");
    format!(
        "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {{{meta}, labels: {{kubernetes.io/service-name: {of}}}}}\n\
         addressType: IPv4\nports: [{{name: http, port: 8080}}, {{name: dns, port: 53, protocol: UDP}}]\nendpoints: [{endpoints}]\n"
    )
}

fn legacy(dice: &mut Dice, name: &str) -> String {
    let (meta, ip) = (dice.meta("s", name, SPACES), dice.pick(&[IPS, &["172.16.0.1"]].concat()));
    let pod = dice.pick(&["", ", targetRef: {kind: Pod, name: p1}", ", nodeName: n1"]);
    format!(
        "apiVersion: v1\nkind: Endpoints\nmetadata: {{{meta}}}\nsubsets: [{{addresses: [{{ip: {ip}{pod}}}], ports: [{{name: http, port: 8080}}]}}]\n"
    )
}

fn authorization(dice: &mut Dice, name: &str) -> String {
    let (meta, selector) = (dice.meta("q", name, RANKS), dice.pick(SELECTORS));
    let selector = format!("selector: {selector},");
    let target = dice.pick(&[
        "",
        &selector,
        "targetRefs: [{kind: Service, name: s1, group: ''}],",
        "targetRefs: [{kind: Service, name: s11, group: ''}],",
    ]);
    let (target, action) = (target, dice.pick(&["ALLOW", "DENY", "AUDIT", "odd"]));
    let port = dice.pick(&["80", "81"]);
    format!(
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{{meta}}}\n\
         spec: {{{target} action: {action}, rules: [{{to: [{{operation: {{ports: ['{port}']}}}}]}}]}}\n"
    )
}

fn authentication(dice: &mut Dice, name: &str) -> String {
    let (meta, selector) = (dice.meta("m", name, RANKS), dice.pick(&SELECTORS[..3]));
    let selector = dice.pick(&["", &format!("selector: {selector},")]).to_owned();
    let mode = dice.pick(&["STRICT", "PERMISSIVE", "UNSET"]);
    format!(
        "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {{{meta}}}\nspec: {{{selector} mtls: {{mode: {mode}}}}}\n"
    )
}

fn network(dice: &mut Dice, name: &str) -> String {
    let (meta, pods, peers) = (dice.meta("k", name, SPACES), dice.pick(SELECTORS), dice.pick(SELECTORS));
    let from = dice.pick(&["", "namespaceSelector: {matchLabels: {team: red}}, ", "namespaceSelector: {}, "]);
    let port = dice.pick(&["", ", ports: [{port: web}]", ", ports: [{port: 53, protocol: UDP}]"]);
    let egress = dice.pick(&["", ", egress: [], policyTypes: [Ingress, Egress]"]);
    format!(
        "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {{{meta}}}\n\
         spec: {{podSelector: {pods}, ingress: [{{from: [{{{from}podSelector: {peers}}}]{port}}}]{egress}}}\n"
    )
}

fn route(dice: &mut Dice, name: &str) -> String {
    let (meta, kind) = (dice.meta("r", name, SPACES), dice.pick(&["HTTPRoute", "GRPCRoute"]));
    let (parent, of, backend) = (dice.pick(&["s1", "s11"]), dice.pick(SPACES), dice.pick(&["s1", "s11"]));
    format!(
        "apiVersion: gateway.networking.k8s.io/v1\nkind: {kind}\nmetadata: {{{meta}}}\n\
         spec: {{parentRefs: [{{group: '', kind: Service, name: {parent}, namespace: {of}}}], \
         rules: [{{backendRefs: [{{name: {backend}, port: 80}}]}}]}}\n"
    )
}

fn traffic(dice: &mut Dice, name: &str) -> String {
    let (meta, host) =
        (dice.meta("t", name, RANKS), dice.pick(&["s1", "s11.a.svc.cluster.local", "'*.svc.cluster.local'"]));
    format!("apiVersion: networking.istio.io/v1\nkind: DestinationRule\nmetadata: {{{meta}}}\nspec: {{host: {host}}}\n")
}

fn tokens(dice: &mut Dice, name: &str) -> String {
    let (meta, selector) = (dice.meta("j", name, RANKS), dice.pick(&SELECTORS[..3]));
    let selector = format!("selector: {selector},");
    let target = dice.pick(&["", &selector, "targetRefs: [{kind: Service, name: s1, group: ''}],"]).to_owned();
    let issuer = dice.pick(&["i", "''"]);
    format!(
        "apiVersion: security.istio.io/v1\nkind: RequestAuthentication\nmetadata: {{{meta}}}\n\
         spec: {{{target} jwtRules: [{{issuer: {issuer}}}]}}\n"
    )
}

fn egress(dice: &mut Dice, name: &str) -> String {
    let (meta, selector) = (dice.meta("x", name, RANKS), dice.pick(&SELECTORS[..3]));
    let ceiling = dice.pick(&["", "", "ceiling: true,"]);
    let gateway = dice.pick(&["", ", via: {gateway: {namespace: a, name: s1}}"]);
    let entry = dice.pick(&["", "exportTo: ['.'],", "exportTo: ['*'],"]);
    if dice.pick(&["entry", "policy", "policy"]) == "entry" {
        return format!(
            "apiVersion: networking.istio.io/v1\nkind: ServiceEntry\nmetadata: {{{meta}}}\n\
             spec: {{{entry} hosts: [api.example], ports: [{{number: 443, name: tls, protocol: TLS}}]}}\n"
        );
    }
    format!(
        "apiVersion: tulle.dev/v1alpha1\nkind: EgressPolicy\nmetadata: {{{meta}}}\n\
         spec: {{selector: {selector}, {ceiling} rules: [{{hosts: [api.example]{gateway}}}]}}\n"
    )
}

/// A kind of object: a description of the `name`th.
type Make = fn(&mut Dice, &str) -> String;

/// Kinds, those that have the most to do with others more often.
const KINDS: &[Make] = &[
    pod,
    pod,
    pod,
    service,
    service,
    slice,
    slice,
    namespace,
    node,
    legacy,
    authorization,
    authorization,
    authentication,
    network,
    network,
    route,
    route,
    traffic,
    tokens,
    egress,
    egress,
];

/// Names of what differs, which is easier to read than all there is.
fn difference(one: &Translation, other: &Translation) -> String {
    let mut found = Vec::new();
    for kind in Kind::ALL {
        for change in one.resources.of(kind).changes_since(other.resources.of(kind)) {
            found.push(format!("{kind:?} {}", change.key));
        }
    }
    if one.conditions != other.conditions {
        found.push(format!("conditions {:?}\nand {:?}", one.conditions, other.conditions));
    }
    if one.accounts != other.accounts || one.nodes != other.nodes {
        found.push("accounts".into());
    }
    found.join(", ")
}

fn walks() -> u32 {
    std::env::var("TULLE_WALKS").ok().and_then(|text| text.parse().ok()).unwrap_or(24)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: walks(), ..ProptestConfig::default() })]

    #[test]
    fn what_is_translated_from_changes_is_what_is_translated_from_the_beginning(
        steps in prop::collection::vec((0..KINDS.len(), 1usize..4, 0u8..8, any::<u64>()), 1..120),
    ) {
        let settings = Settings::default();
        let (mut files, mut memory, mut texts) = (Files::default(), Memory::default(), BTreeMap::new());
        for (index, (kind, name, what, choice)) in steps.iter().enumerate() {
            // Two files may define one object.
            let path = format!("{}-{}-{name}.yaml", u8::from(*what == 0), *kind);
            if *what == 1 {
                texts.remove(&path);
            } else {
                texts.insert(path.clone(), KINDS[*kind](&mut Dice(*choice), &"1".repeat(*name)));
            }
            let present: BTreeSet<String> = texts.keys().cloned().collect();
            let changed = texts.get(&path).map(|text| (path.clone(), Ok(text.clone().into_bytes())));
            let loaded = files.update(&present, changed.into_iter().collect());
            let little = translate(&loaded.world, &settings, &mut memory);
            let all = translate(&loaded.world, &settings, &mut Memory::default());
            prop_assert!(little == all, "step {index}, {path}:\n{:?}\n{}", texts.get(&path), difference(&little, &all));
            let again = translate(&loaded.world, &settings, &mut memory);
            prop_assert!(again == little, "nothing changed after step {index}");
        }
        let present: BTreeSet<String> = texts.keys().cloned().collect();
        let loaded = files.update(&present, Vec::new());
        let repaired = loaded.problems.iter().all(|problem| problem.message.contains("a second time"));
        if repaired {
            let all = texts.into_iter().map(|(path, text)| (path, Ok(text.into_bytes()))).collect();
            prop_assert_eq!(Files::default().update(&present, all), loaded);
        }
    }
}
