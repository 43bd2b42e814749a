//! The plain address translation that pods outside the mesh use to reach Services, as one nftables transaction a node.
//!
//! It does what kube-proxy does and nothing more: a random ready endpoint per connection, an active refusal where there
//! is none, masquerading only of a pod that reaches itself. The text is pure and replaced as a whole. Limits: no
//! session affinity, no NodePorts, no traffic policies.

use crate::address;
use crate::address::Pair;
use crate::objects::Service;

/// The whole rule set of a node.
pub fn rules(services: &[Service]) -> String {
    let mut chains = String::new();
    let mut jumps = [String::new(), String::new()];
    for service in services {
        let Some(addresses) = service.addresses else { continue };
        for port in &service.ports {
            let protocol = if port.tcp { "tcp" } else { "udp" };
            if port.endpoints.is_empty() {
                continue;
            }
            for (family, own) in addresses.texts().into_iter().enumerate() {
                let chosen = format!("{own} . {protocol} . {}", port.port);
                let name =
                    format!("svc-{}-{}-{protocol}-{}-{}", service.key.0, service.key.1, port.port, FAMILIES[family].0);
                jumps[family].push_str(&format!("      {chosen} : goto {name},\n"));
                chains.push_str(&service_chain(&name, family, protocol, &port.endpoints));
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

fn service_chain(name: &str, family: usize, protocol: &str, endpoints: &[(Pair, u16)]) -> String {
    let word = FAMILIES[family].1;
    let mut text = String::new();
    let mut choice = String::new();
    for (index, (pair, port)) in endpoints.iter().enumerate() {
        let address = &pair.texts()[family];
        let target = if family == 0 { format!("{address}:{port}") } else { format!("[{address}]:{port}") };
        let own = format!("{name}-{index}");
        text.push_str(&format!(
            "  chain {own} {{\n    {word} saddr {address} meta mark set 0x4000\n    meta l4proto {protocol} dnat {word} to {target}\n  }}\n"
        ));
        choice.push_str(&format!("{index} : goto {own}, "));
    }
    text.push_str(&format!("  chain {name} {{\n    numgen random mod {} vmap {{ {choice}}}\n  }}\n", endpoints.len()));
    text
}

#[cfg(test)]
mod tests {
    use crate::address;
    use crate::kubeproxy::rules;
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
        };
        let text = rules(&[service]);
        assert!(text.contains("10.96.0.10 . tcp . 80 : goto svc-shop-cart-tcp-80-v4"), "{text}");
        assert!(text.contains("numgen random mod 2 vmap"), "{text}");
        assert!(text.contains("dnat ip6 to [fd00:10:20:2::2]:8080"), "{text}");
        assert!(!text.contains(". 81"), "{text}");
    }
}
