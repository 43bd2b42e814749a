//! The plain address translation that pods outside the mesh use to reach Services, as one nftables transaction a node.
//!
//! It does what kube-proxy does and nothing more: a random ready endpoint per connection (or per client, with session
//! affinity), an active refusal where there is none, ports on the nodes and external addresses, with the traffic policies
//! Cluster and Local; masquerading only of a pod that reaches itself, and of what came to a node's port under Cluster. The
//! text is pure and replaced as a whole. Limits: affinity has no timeout; no topology hints.

use crate::address;
use crate::address::Pair;
use crate::objects::Service;
use crate::objects::ServicePort;

/// The whole rule set of node `node`.
pub fn rules(services: &[Service], node: u16) -> String {
    let mut chains = String::new();
    let mut jumps = [String::new(), String::new()];
    for service in services {
        let Some(addresses) = service.addresses else { continue };
        for port in &service.ports {
            for family in 0..2 {
                let one = OnePort { service, port, family, node };
                chains.push_str(&one.chains());
                for (address, number, chain) in one.jumps(addresses) {
                    jumps[family]
                        .push_str(&format!("      {address} . {} . {number} : goto {chain},\n", one.protocol()));
                }
            }
        }
    }
    let mut text = String::from("table inet lab_services\ndelete table inet lab_services\ntable inet lab_services {\n");
    text.push_str(&chains);
    for (family, (short, _, kind)) in FAMILIES.into_iter().enumerate() {
        let elements = match jumps[family].as_str() {
            "" => String::new(),
            list => format!("    elements = {{\n{list}    }}\n"),
        };
        text.push_str(&format!(
            "  map services-{short} {{\n    type {kind} . inet_proto . inet_service : verdict\n{elements}  }}\n"
        ));
    }
    let (all4, all6) = address::SERVICES;
    // Translation comes first, so what still goes to a Service's address has no endpoint or no such port.
    text.push_str(&format!(
        "  chain refuse {{\n    ip daddr {all4} reject with icmp port-unreachable\n    ip6 daddr {all6} reject with icmpv6 port-unreachable\n  }}\n"
    ));
    text.push_str(HOOKS);
    text
}

const FAMILIES: [(&str, &str, &str); 2] = [("v4", "ip", "ipv4_addr"), ("v6", "ip6", "ipv6_addr")];

const HOOKS: &str = "  chain services {
    ip daddr . meta l4proto . th dport vmap @services-v4
    ip6 daddr . meta l4proto . th dport vmap @services-v6
  }
  chain from-pods { type nat hook prerouting priority dstnat; jump services; }
  chain from-node { type nat hook output priority -100; jump services; }
  chain refuse-pods { type filter hook forward priority filter; jump refuse; }
  chain refuse-node { type filter hook output priority filter; jump refuse; }
  chain back { type nat hook postrouting priority srcnat; ct status dnat meta mark 0x4000 masquerade; }
}
";

/// A port of a Service in one family, on one node.
struct OnePort<'a> {
    service: &'a Service,
    port: &'a ServicePort,
    family: usize,
    node: u16,
}

impl OnePort<'_> {
    fn protocol(&self) -> &'static str {
        if self.port.tcp { "tcp" } else { "udp" }
    }

    fn name(&self, kind: &str) -> String {
        let (namespace, name) = &self.service.key;
        format!("{kind}-{namespace}-{name}-{}-{}-{}", self.protocol(), self.port.port, FAMILIES[self.family].0)
    }

    fn endpoints(&self, local: bool) -> Vec<(Pair, u16)> {
        let all = self.port.endpoints.iter().copied();
        all.filter(|(pair, _)| !local || address::node_of(*pair) == Some(self.node)).collect()
    }

    fn node_port(&self) -> Option<u16> {
        self.service.proxy.node_ports.get(&self.port.port).copied().filter(|_| self.port.tcp)
    }

    /// What is dialled, and the chain that answers.
    fn jumps(&self, addresses: Pair) -> Vec<(String, u16, String)> {
        let proxy = &self.service.proxy;
        let mut jumps = Vec::new();
        if !self.endpoints(proxy.internal_local).is_empty() {
            jumps.push((addresses.texts()[self.family].clone(), self.port.port, self.name("svc")));
        }
        if self.port.endpoints.is_empty() {
            return jumps;
        }
        let of_family = proxy.addresses.iter().filter(|ip| ip.is_ipv6() == (self.family == 1));
        jumps.extend(of_family.map(|ip| (ip.to_string(), self.port.port, self.name("ext"))));
        if let Some(number) = self.node_port() {
            for own in [address::node(self.node), address::node_outside(self.node)] {
                jumps.push((own.texts()[self.family].clone(), number, self.name("np")));
            }
        }
        jumps
    }

    fn chains(&self) -> String {
        let proxy = &self.service.proxy;
        let mut text = self.choice("svc", &self.endpoints(proxy.internal_local));
        if self.port.endpoints.is_empty() || (self.node_port().is_none() && proxy.addresses.is_empty()) {
            return text;
        }
        text.push_str(&self.choice("ext", &self.endpoints(false)));
        let (entry, own) = (self.name("np"), self.name("loc"));
        if !proxy.external_local {
            // The answer must come back this way, from whatever node the endpoint is on.
            let all = self.name("ext");
            text.push_str(&format!("  chain {entry} {{\n    meta mark set 0x4000\n    goto {all}\n  }}\n"));
        } else if self.endpoints(true).is_empty() {
            text.push_str(&format!("  chain {entry} {{\n    drop\n  }}\n"));
        } else {
            text.push_str(&self.choice("loc", &self.endpoints(true)));
            text.push_str(&format!("  chain {entry} {{\n    goto {own}\n  }}\n"));
        }
        text
    }

    /// A random endpoint for each connection, or for each client.
    fn choice(&self, kind: &str, endpoints: &[(Pair, u16)]) -> String {
        if endpoints.is_empty() {
            return String::new();
        }
        let (name, word, protocol) = (self.name(kind), FAMILIES[self.family].1, self.protocol());
        let mut text = String::new();
        let mut choice = String::new();
        for (index, (pair, port)) in endpoints.iter().enumerate() {
            let address = &pair.texts()[self.family];
            let target = if self.family == 0 { format!("{address}:{port}") } else { format!("[{address}]:{port}") };
            let own = format!("{name}-{index}");
            text.push_str(&format!(
                "  chain {own} {{\n    {word} saddr {address} meta mark set 0x4000\n    meta l4proto {protocol} dnat {word} to {target}\n  }}\n"
            ));
            choice.push_str(&format!("{index} : goto {own}, "));
        }
        let draw = match self.service.proxy.affinity {
            true => format!("jhash {word} saddr mod {}", endpoints.len()),
            false => format!("numgen random mod {}", endpoints.len()),
        };
        text.push_str(&format!("  chain {name} {{\n    {draw} vmap {{ {choice}}}\n  }}\n"));
        text
    }
}

#[cfg(test)]
mod tests {
    use crate::address;
    use crate::kubeproxy::rules;
    use crate::objects::Proxy;
    use crate::objects::Service;
    use crate::objects::ServicePort;

    #[test]
    fn a_service_becomes_a_choice_of_endpoints_and_an_empty_one_a_refusal() {
        let port = |port, endpoints| ServicePort { name: String::new(), port, tcp: true, endpoints };
        let service = Service {
            key: ("shop".into(), "cart".into()),
            addresses: Some(address::service(10)),
            ports: vec![port(80, vec![(address::pod(1, 2), 8080), (address::pod(2, 2), 8080)]), port(81, vec![])],
            pods: vec![],
            external: None,
            proxy: Proxy::default(),
        };
        let text = rules(std::slice::from_ref(&service), 1);
        assert!(text.contains("10.96.0.10 . tcp . 80 : goto svc-shop-cart-tcp-80-v4"), "{text}");
        assert!(text.contains("numgen random mod 2 vmap"), "{text}");
        assert!(text.contains("dnat ip6 to [fd00:10:20:2::2]:8080"), "{text}");
        assert!(!text.contains(". 81"), "{text}");

        let proxy =
            Proxy { node_ports: [(80, 30_080)].into(), external_local: true, affinity: true, ..Proxy::default() };
        let text = rules(&[Service { proxy, ..service }], 2);
        assert!(text.contains("10.10.0.12 . tcp . 30080 : goto np-shop-cart-tcp-80-v4"), "{text}");
        assert!(text.contains("203.0.113.202 . tcp . 30080 : goto np-shop-cart-tcp-80-v4"), "{text}");
        assert!(text.contains("chain np-shop-cart-tcp-80-v4 {\n    goto loc-"), "no masquerading under Local: {text}");
        assert!(text.contains("chain loc-shop-cart-tcp-80-v4 {\n    jhash ip saddr mod 1"), "{text}");
    }
}
