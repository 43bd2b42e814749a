//! The plain address translation that pods outside the mesh use to reach Services, as one nftables transaction a node.
//!
//! It does what kube-proxy does: a random ready endpoint for each connection (or for each client, with session affinity),
//! a terminating one where none is ready, those that topology hints name where all have hints; an active refusal where
//! there is none, silence where a traffic policy Local finds none on its node; ports on the nodes and external addresses.
//! Masqueraded is a pod that reaches itself, what comes to a Service from outside of the pods, and what comes from outside
//! under externalTrafficPolicy Cluster; under Local its source is kept. The text is pure and replaced as a whole; clients
//! that are bound to an endpoint are carried over from what the kernel lists ([`with_clients`]). Limits: a client that is
//! bound in the moment of a replacement may be forgotten; load balancers' source ranges are not looked at; without
//! privilege the kernel takes a transaction of some 200 KB only.

use std::collections::BTreeMap;

use crate::address;
use crate::address::Pair;
use crate::services::Distribution;
use crate::services::Member;
use crate::services::Proxy;
use crate::services::Service;
use crate::services::ServicePort;

/// The whole rule set of node `node`.
pub fn rules(services: &[Service], node: u16) -> String {
    let mut chains = String::new();
    let mut jumps = [String::new(), String::new()];
    let mut nowhere = [String::new(), String::new()];
    for service in services {
        let Some(addresses) = service.addresses else { continue };
        for port in &service.ports {
            for family in 0..2 {
                let one = OnePort::new(service, port, family, node);
                chains.push_str(&one.bound_clients());
                chains.push_str(&one.chains());
                for (address, number, to) in one.entries(addresses) {
                    let key = format!("{address} . {} . {number}", one.protocol());
                    match to {
                        To::Chain(kind) => jumps[family].push_str(&format!("      {key} : goto {},\n", one.name(kind))),
                        To::Nowhere(verdict) => nowhere[family].push_str(&format!("      {key} : {verdict},\n")),
                    }
                    if matches!(to, To::Chain(EXTERNAL)) && one.local_only() {
                        nowhere[family].push_str(&format!("      {key} : drop,\n"));
                    }
                }
            }
        }
    }
    let mut text = String::from("table inet lab_services\ndelete table inet lab_services\ntable inet lab_services {\n");
    text.push_str("  chain refusal {\n    reject\n  }\n");
    text.push_str(&chains);
    for (family, (short, _, kind)) in FAMILIES.into_iter().enumerate() {
        for (map, list) in [("services", &jumps[family]), ("nowhere", &nowhere[family])] {
            let elements = if list.is_empty() { String::new() } else { format!("    elements = {{\n{list}    }}\n") };
            text.push_str(&format!(
                "  map {map}-{short} {{\n    type {kind} . inet_proto . inet_service : verdict\n{elements}  }}\n"
            ));
        }
    }
    let (all4, all6) = address::SERVICES;
    // Translation comes first, so what still goes to a Service's address has no endpoint or no such port.
    text.push_str(&format!(
        "  chain refuse {{\n    ip daddr . meta l4proto . th dport vmap @nowhere-v4\n    ip6 daddr . meta l4proto . th dport vmap @nowhere-v6\n    ip daddr {all4} reject\n    ip6 daddr {all6} reject\n  }}\n"
    ));
    text.push_str(HOOKS);
    text
}

/// The rules with the clients that are bound now, by the kernel's listing of the table: those of endpoints and times that
/// the rules still have. What is listed of each client is how long it stays bound.
pub fn with_clients(rules: &str, listed: &str) -> String {
    let mut clients: BTreeMap<&str, &str> = BTreeMap::new();
    for set in listed.split("\tset ").skip(1) {
        let Some((name, rest)) = set.split_once(" {").filter(|(name, _)| name.starts_with(BOUND)) else { continue };
        let body = rest.split_once("\n\t}").map_or(rest, |(body, _)| body);
        let elements = body.split_once("elements = {").and_then(|(_, rest)| rest.split_once('}'));
        if let Some((elements, _)) = elements {
            clients.insert(name, elements);
        }
    }
    let mut text = String::with_capacity(rules.len());
    for line in rules.lines() {
        text.push_str(line);
        text.push('\n');
        let set = line.strip_prefix("  set ").and_then(|rest| rest.strip_suffix(" {"));
        if let Some(elements) = set.and_then(|name| clients.get(name)) {
            text.push_str(&format!("    elements = {{{elements}}}\n"));
        }
    }
    text
}

/// Whether the rules remember clients.
pub fn has_clients(rules: &str) -> bool {
    rules.contains("flags dynamic,timeout")
}

/// Begins the names of sets of clients.
const BOUND: &str = "bound-";
/// Clients of one endpoint; more are not remembered.
const CLIENTS: usize = 65_535;

const FAMILIES: [(&str, &str, &str); 2] = [("v4", "ip", "ipv4_addr"), ("v6", "ip6", "ipv6_addr")];

const HOOKS: &str = "  chain services {
    ip daddr . meta l4proto . th dport vmap @services-v4
    ip6 daddr . meta l4proto . th dport vmap @services-v6
  }
  chain from-pods { type nat hook prerouting priority dstnat; jump services; }
  chain from-node { type nat hook output priority -100; jump services; }
  chain refuse-own { type filter hook input priority filter; ct state new jump refuse; }
  chain refuse-pods { type filter hook forward priority filter; ct state new jump refuse; }
  chain refuse-node { type filter hook output priority filter; ct state new jump refuse; }
  chain back { type nat hook postrouting priority srcnat; ct status dnat meta mark 0x4000 masquerade; }
}
";

/// What answers at an address and port.
#[derive(Clone, Copy)]
enum To {
    /// The chain of this kind.
    Chain(&'static str),
    /// Nothing, with this verdict.
    Nowhere(&'static str),
}

/// What comes to the cluster address.
const INTERNAL: &str = "int";
/// What comes to ports of nodes and to external addresses.
const EXTERNAL: &str = "ext";
/// The choice among all endpoints.
const ALL: &str = "all";
/// The choice among the node's own.
const LOCAL: &str = "loc";

/// A port of a Service in one family, on one node.
struct OnePort<'a> {
    service: &'a Service,
    port: &'a ServicePort,
    family: usize,
    node: u16,
    /// Those that clients of this node get under the policy Cluster.
    all: Vec<Member>,
    /// Those of this node, for the policy Local.
    local: Vec<Member>,
}

impl<'a> OnePort<'a> {
    fn new(service: &'a Service, port: &'a ServicePort, family: usize, node: u16) -> Self {
        let own: Vec<Member> = port.endpoints.iter().filter(|one| one.node == node).copied().collect();
        let all = hinted(service, usable(&port.endpoints), node);
        Self { service, port, family, node, all, local: usable(&own) }
    }

    fn protocol(&self) -> &'static str {
        if self.port.tcp { "tcp" } else { "udp" }
    }

    fn name(&self, kind: &str) -> String {
        let (namespace, name) = &self.service.key;
        format!("{kind}-{namespace}-{name}-{}-{}-{}", self.protocol(), self.port.port, FAMILIES[self.family].0)
    }

    /// What comes from outside finds nobody on this node, and may go nowhere else.
    fn local_only(&self) -> bool {
        self.service.proxy.external_local && self.local.is_empty()
    }

    /// What is dialled, and what answers.
    fn entries(&self, addresses: Pair) -> Vec<(String, u16, To)> {
        let proxy = &self.service.proxy;
        let internal = match (self.all.is_empty(), proxy.internal_local && self.local.is_empty()) {
            (true, _) => To::Nowhere("goto refusal"),
            (false, true) => To::Nowhere("drop"),
            (false, false) => To::Chain(INTERNAL),
        };
        let mut entries = vec![(addresses.texts()[self.family].clone(), self.port.port, internal)];
        let external = if self.all.is_empty() { To::Nowhere("goto refusal") } else { To::Chain(EXTERNAL) };
        let of_family = proxy.addresses.iter().filter(|ip| ip.is_ipv6() == (self.family == 1));
        entries.extend(of_family.map(|ip| (ip.to_string(), self.port.port, external)));
        let node_port = proxy.node_ports.get(&(self.port.port, self.port.tcp));
        let nodes = [address::node(self.node), address::node_outside(self.node)];
        let of_nodes = node_port.into_iter().flat_map(|number| nodes.map(|own| (own, *number)));
        entries.extend(of_nodes.map(|(own, number)| (own.texts()[self.family].clone(), number, external)));
        entries
    }

    fn chains(&self) -> String {
        let proxy = &self.service.proxy;
        let (all, local) = (self.name(ALL), self.name(LOCAL));
        let (word, pods) = (FAMILIES[self.family].1, [address::PODS.0, address::PODS.1][self.family]);
        let mut text = self.choice(ALL, &self.all);
        if proxy.internal_local || proxy.external_local {
            text.push_str(&self.choice(LOCAL, &self.local));
        }
        let internal = if proxy.internal_local { &local } else { &all };
        if !(self.all.is_empty() || proxy.internal_local && self.local.is_empty()) {
            let chain = self.name(INTERNAL);
            text.push_str(&format!(
                "  chain {chain} {{\n    {word} saddr != {pods} meta mark set 0x4000\n    goto {internal}\n  }}\n"
            ));
        }
        // Nothing leads to a chain for what comes from outside where nothing can.
        if self.all.is_empty() || (proxy.addresses.is_empty() && proxy.node_ports.is_empty()) {
            return text;
        }
        // Under Cluster the answer must come back this way, from whatever node the endpoint is on. Under Local, clients in
        // the cluster use all endpoints all the same; others keep their source, and go nowhere if there is none here.
        let rules = match (proxy.external_local, self.local.is_empty()) {
            (false, _) => format!("meta mark set 0x4000\n    goto {all}"),
            (true, empty) => format!(
                "{word} saddr {pods} goto {all}\n    fib saddr type local meta mark set 0x4000\n    fib saddr type local goto {all}{}",
                if empty { String::new() } else { format!("\n    goto {local}") }
            ),
        };
        text.push_str(&format!("  chain {} {{\n    {rules}\n  }}\n", self.name(EXTERNAL)));
        text
    }

    /// Name of the set of an endpoint's clients, where clients are bound. Other times are another set.
    fn bound(&self, endpoint: &Member) -> Option<String> {
        let seconds = self.service.proxy.affinity?;
        let address: String = endpoint.pair.texts()[self.family]
            .chars()
            .map(|c| if c.is_ascii_alphanumeric() { c } else { '_' })
            .collect();
        let service = self.name(BOUND.trim_end_matches('-'));
        Some(format!("{service}-{address}-{}-{seconds}s", endpoint.port))
    }

    /// The sets of bound clients, which all choices of this port share.
    fn bound_clients(&self) -> String {
        let kind = FAMILIES[self.family].2;
        let seconds = self.service.proxy.affinity.unwrap_or_default();
        let names = self.port.endpoints.iter().filter_map(|endpoint| self.bound(endpoint));
        names
            .map(|name| {
                format!(
                    "  set {name} {{\n    type {kind}\n    size {CLIENTS}\n    flags dynamic,timeout\n    timeout {seconds}s\n  }}\n"
                )
            })
            .collect()
    }

    /// A random endpoint for each connection, or that to which the client is bound.
    fn choice(&self, kind: &str, endpoints: &[Member]) -> String {
        if endpoints.is_empty() {
            return String::new();
        }
        let (name, word, protocol) = (self.name(kind), FAMILIES[self.family].1, self.protocol());
        let mut text = String::new();
        let (mut bound, mut choice) = (String::new(), String::new());
        for (index, endpoint) in endpoints.iter().enumerate() {
            let Member { pair, port, .. } = endpoint;
            let address = &pair.texts()[self.family];
            let target = if self.family == 0 { format!("{address}:{port}") } else { format!("[{address}]:{port}") };
            // One alone is no choice: a chain and a map less, which count where many Services are one transaction.
            let alone = endpoints.len() == 1 && self.service.proxy.affinity.is_none();
            let own = if alone { name.clone() } else { format!("{name}-{index}") };
            let mut remember = String::new();
            if let Some(set) = self.bound(endpoint) {
                remember = format!("    update @{set} {{ {word} saddr }}\n");
                bound.push_str(&format!("    {word} saddr @{set} goto {own}\n"));
            }
            text.push_str(&format!(
                "  chain {own} {{\n{remember}    {word} saddr {address} meta mark set 0x4000\n    meta l4proto {protocol} dnat {word} to {target}\n  }}\n"
            ));
            if alone {
                return text;
            }
            choice.push_str(&format!("{index} : goto {own}, "));
        }
        text.push_str(&format!(
            "  chain {name} {{\n{bound}    numgen random mod {} vmap {{ {choice}}}\n  }}\n",
            endpoints.len()
        ));
        text
    }
}

/// Ready endpoints; where there is none, those that leave and still serve.
fn usable(endpoints: &[Member]) -> Vec<Member> {
    let ready: Vec<Member> = endpoints.iter().filter(|one| one.ready).copied().collect();
    if ready.is_empty() { endpoints.iter().filter(|one| one.leaving).copied().collect() } else { ready }
}

/// What is left of `endpoints` for clients of `node` when all of them have hints and some name it, or its zone. An
/// endpoint's hints are its own node and zone.
fn hinted(service: &Service, endpoints: Vec<Member>, node: u16) -> Vec<Member> {
    let Proxy { distribution, zones, .. } = &service.proxy;
    let near = |near: &dyn Fn(&Member) -> bool| endpoints.iter().filter(|one| near(one)).copied().collect::<Vec<_>>();
    if *distribution == Distribution::Anywhere
        || !endpoints.iter().all(|one| one.ready && zones.contains_key(&one.node))
    {
        return endpoints;
    }
    let own = near(&|one| *distribution == Distribution::Node && one.node == node);
    let zone = near(&|one| zones.contains_key(&node) && zones.get(&one.node) == zones.get(&node));
    [own, zone].into_iter().find(|nearest| !nearest.is_empty()).unwrap_or(endpoints)
}

#[cfg(test)]
mod tests {
    use crate::address;
    use crate::kubeproxy::has_clients;
    use crate::kubeproxy::rules;
    use crate::kubeproxy::with_clients;
    use crate::services::Distribution;
    use crate::services::Member;
    use crate::services::Proxy;
    use crate::services::Service;
    use crate::services::ServicePort;

    fn pod(node: u16) -> Member {
        Member::ready(address::pod(node, 2), 8080, node)
    }

    fn service(endpoints: Vec<Member>, proxy: Proxy) -> Service {
        Service {
            key: ("shop".into(), "cart".into()),
            addresses: Some(address::service(10)),
            ports: vec![ServicePort { name: String::new(), port: 80, tcp: true, endpoints }],
            pods: vec![],
            external: None,
            proxy,
        }
    }

    #[test]
    fn each_node_chooses_as_the_policies_say() {
        let zones = [(1, "z1".to_owned()), (2, "z1".to_owned()), (3, "z2".to_owned())];
        let near = |distribution| Proxy { distribution, zones: zones.clone().into(), ..Proxy::default() };
        let leaving = |node| Member { ready: false, leaving: true, ..pod(node) };
        let local = Proxy { internal_local: true, ..Proxy::default() };
        let all = || vec![pod(1), pod(2), pod(3)];
        // What the Service has, the node, and the nodes of the endpoints that its own clients get.
        let cases = [
            ("all", all(), Proxy::default(), 1, "1 2 3"),
            ("the ready ones", vec![leaving(1), pod(2)], Proxy::default(), 1, "2"),
            ("those that leave, if nobody else is there", vec![leaving(1), leaving(2)], Proxy::default(), 1, "1 2"),
            ("its own", all(), local.clone(), 2, "2"),
            ("its own that leaves", vec![leaving(1), pod(2)], local.clone(), 1, "1"),
            ("nobody", vec![pod(2)], local, 1, "drop"),
            ("nobody at all", vec![], Proxy::default(), 1, "goto refusal"),
            ("its zone's", all(), near(Distribution::Zone), 1, "1 2"),
            ("its zone is empty", vec![pod(3)], near(Distribution::Zone), 1, "3"),
            ("its own before its zone's", all(), near(Distribution::Node), 2, "2"),
            ("its zone's before all", vec![pod(2), pod(3)], near(Distribution::Node), 1, "2"),
            ("all, for a node without zone", all(), near(Distribution::Zone), 4, "1 2 3"),
            ("all, if one has no hint", vec![pod(1), pod(4)], near(Distribution::Zone), 1, "1 4"),
        ];
        for (name, endpoints, proxy, node, expected) in cases {
            let text = rules(&[service(endpoints, proxy.clone())], node);
            let key = "10.96.0.10 . tcp . 80 : ";
            let to = text.split(key).nth(1).and_then(|rest| rest.split(',').next()).unwrap_or_default();
            let got = if to == "goto int-shop-cart-tcp-80-v4" {
                let kind = if proxy.internal_local { "loc" } else { "all" };
                let targets = text.split("chain ").filter(|chain| chain.starts_with(&format!("{kind}-")));
                let nodes = targets.filter_map(|chain| chain.split("dnat ip to 10.20.").nth(1)?.split('.').next());
                nodes.collect::<Vec<_>>().join(" ")
            } else {
                to.to_owned()
            };
            assert_eq!(got, expected, "{name}: {text}");
            assert_eq!(text.matches("fd00:10:96::a . tcp . 80").count(), text.matches(key).count(), "{name}");
        }
    }

    #[test]
    fn ports_of_a_node_are_those_of_one_protocol() {
        let ports = [((80, true), 30_080), ((80, false), 30_053)].into();
        let mut both = service(vec![pod(2)], Proxy { node_ports: ports, ..Proxy::default() });
        both.ports.push(ServicePort { tcp: false, ..both.ports[0].clone() });
        let text = rules(&[both], 2);
        for (rule, there) in [
            ("10.10.0.12 . tcp . 30080 : goto ext-shop-cart-tcp-80-v4", true),
            ("10.10.0.12 . udp . 30053 : goto ext-shop-cart-udp-80-v4", true),
            (". udp . 30080", false),
            (". tcp . 30053", false),
        ] {
            assert_eq!(text.contains(rule), there, "{rule}: {text}");
        }
    }

    #[test]
    fn what_comes_from_outside_keeps_its_source_under_local_only() {
        let local = Proxy { node_ports: [((80, true), 30_080)].into(), external_local: true, ..Proxy::default() };
        let spread = Proxy { external_local: false, affinity: Some(60), ..local.clone() };
        let chain = |text: &str| {
            let start = text.find("chain ext-shop-cart-tcp-80-v4 {").unwrap_or_default();
            text[start..].split('}').next().unwrap_or_default().to_owned()
        };
        let here = rules(&[service(vec![pod(2)], local.clone())], 2);
        assert!(here.contains("10.10.0.12 . tcp . 30080 : goto ext-shop-cart-tcp-80-v4"), "{here}");
        assert!(here.contains("203.0.113.202 . tcp . 30080 : goto ext-shop-cart-tcp-80-v4"), "{here}");
        assert!(chain(&here).ends_with("goto loc-shop-cart-tcp-80-v4\n  "), "{here}");
        let elsewhere = rules(&[service(vec![pod(2)], local)], 1);
        assert!(!chain(&elsewhere).contains("goto loc-"), "{elsewhere}");
        assert!(elsewhere.contains("203.0.113.201 . tcp . 30080 : drop"), "{elsewhere}");
        let anywhere = rules(&[service(vec![pod(2)], spread)], 1);
        assert!(chain(&anywhere).contains("meta mark set 0x4000\n    goto all-"), "{anywhere}");
        let bound = "ip saddr @bound-shop-cart-tcp-80-v4-10_20_2_2-8080-60s goto all-shop-cart-tcp-80-v4-0";
        assert!(anywhere.contains(&format!("chain all-shop-cart-tcp-80-v4 {{\n    {bound}")), "{anywhere}");
    }

    #[test]
    fn bound_clients_stay_with_endpoints_and_times_that_stay() {
        let bound = |seconds| Proxy { affinity: Some(seconds), ..Proxy::default() };
        let text = rules(&[service(vec![pod(1), pod(2)], bound(60))], 1);
        assert!(has_clients(&text) && !has_clients(&rules(&[service(vec![pod(1)], Proxy::default())], 1)));
        let name = |node: u8, seconds| format!("bound-shop-cart-tcp-80-v4-10_20_{node}_2-8080-{seconds}s");
        let set = |name: &str, elements: &str| {
            format!("\tset {name} {{\n\t\ttype ipv4_addr\n\t\ttimeout 1m\n{elements}\t}}\n\n")
        };
        let two = "\t\telements = { 10.20.1.3 expires 59s,\n\t\t\t     10.20.1.4 expires 2s }\n";
        let listed =
            [set(&name(1, 60), two), set(&name(2, 60), ""), set(&name(3, 60), two), set("other", two)].concat();
        let listed = format!("table inet lab_services {{\n{listed}\tchain x {{\n\t}}\n}}\n");
        let kept = with_clients(&text, &listed);
        assert_eq!(kept.matches("elements = { 10.20.1.3 expires 59s").count(), 1, "{kept}");
        let there = kept.find("expires 2s }\n").unwrap_or_default();
        let before = kept[..there].rfind("  set ").map(|at| &kept[at..there]).unwrap_or_default();
        assert!(before.contains(&name(1, 60)), "{before}");
        let other_time = rules(&[service(vec![pod(1), pod(2)], bound(30))], 1);
        assert_eq!(with_clients(&other_time, &listed), other_time);
        assert_eq!(with_clients(&text, ""), text);
    }
}
