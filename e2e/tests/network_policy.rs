//! Promise: NetworkPolicies mean between pods of the mesh what they mean in any cluster; each denial names the policies
//! that isolate; and `explain` says of each cell of the matrix what its traffic shows.
//!
//! The cases are those of the Kubernetes documentation and of its end-to-end suite for NetworkPolicy, by their names there.

use std::collections::BTreeMap;
use std::io::BufRead;
use std::io::BufReader;

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

/// Pods of the matrix: namespace, name, node. Each has the label `pod` and serves on 80, called serve-80, and on 81.
const PODS: [(&str, &str, u16); 7] = [
    ("ns-x", "a", 1),
    ("ns-x", "b", 2),
    ("ns-x", "c", 1),
    ("ns-y", "a", 2),
    ("ns-y", "b", 1),
    ("ns-z", "a", 1),
    ("ns-z", "b", 2),
];

fn matrix_pod(namespace: &str, name: &str, node: u16, more: &str) -> String {
    format!(
        "---\napiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: {namespace}, labels: {{pod: {name}{more}}}}}\n\
         spec:\n  nodeName: node-{node}\n  serviceAccountName: {name}\n  containers:\n  - name: main\n    image: shop\n\
         \x20   command: [shop, serve, --tcp, '80', --tcp, '81', --udp, '7007']\n\
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

/// One connection of the matrix.
#[derive(Clone, Copy, Debug)]
struct Cell {
    /// Namespace of the client.
    fns: &'static str,
    /// Its name.
    from: &'static str,
    /// Namespace of the server.
    tns: &'static str,
    /// Its name.
    to: &'static str,
    port: u16,
}

impl Cell {
    /// Whether it goes to this pod.
    fn into(self, namespace: &str, name: &str) -> bool {
        (self.tns, self.to) == (namespace, name)
    }

    /// Whether it comes from this pod.
    fn out_of(self, namespace: &str, name: &str) -> bool {
        (self.fns, self.from) == (namespace, name)
    }
}

struct Case {
    name: &'static str,
    /// Namespace and spec of each policy.
    policies: &'static [(&'static str, &'static str)],
    expected: fn(Cell) -> bool,
}

/// Whether a pod of the matrix runs on node 2, whose pods have addresses of 10.20.2.0/24.
fn on_second(namespace: &str, name: &str) -> bool {
    PODS.contains(&(namespace, name, 2))
}

const CASES: &[Case] = &[
    Case {
        name: "the documentation's first example: a block with an exception, a namespace and pods; a block on one port",
        policies: &[(
            "ns-x",
            "{podSelector: {matchLabels: {pod: a}}, policyTypes: [Ingress, Egress], \
              ingress: [{from: [{ipBlock: {cidr: 10.20.0.0/16, except: [10.20.1.0/24]}}, \
                                {namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: ns-z}}}, \
                                {podSelector: {matchLabels: {pod: b}}}], ports: [{protocol: TCP, port: 80}]}], \
              egress: [{to: [{ipBlock: {cidr: 10.20.2.0/24}}], ports: [{protocol: TCP, port: 81}]}]}",
        )],
        expected: |c| {
            let from = on_second(c.fns, c.from) || c.fns == "ns-z" || c.out_of("ns-x", "b");
            (!c.into("ns-x", "a") || (from && c.port == 80))
                && (!c.out_of("ns-x", "a") || (on_second(c.tns, c.to) && c.port == 81))
        },
    },
    Case {
        name: "a namespace by the label of its name, both ways (documentation)",
        policies: &[
            (
                "ns-y",
                "{podSelector: {}, policyTypes: [Egress], egress: [{to: [{namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: ns-x}}}]}]}",
            ),
            (
                "ns-x",
                "{podSelector: {}, ingress: [{from: [{namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: ns-y}}}]}]}",
            ),
        ],
        expected: |c| (c.fns != "ns-y" || c.tns == "ns-x") && (c.tns != "ns-x" || c.fns == "ns-y"),
    },
    Case {
        name: "a range of ports that holds the one and not the other, on both sides of it (documentation)",
        policies: &[(
            "ns-x",
            "{podSelector: {matchLabels: {pod: a}}, ingress: [{ports: [{port: 32, endPort: 80}, {port: 82, endPort: 32768}]}]}",
        )],
        expected: |c| !c.into("ns-x", "a") || c.port == 80,
    },
    Case {
        name: "should support a 'default-deny-ingress' policy",
        policies: &[("ns-x", "{podSelector: {}, policyTypes: [Ingress]}")],
        expected: |c| c.tns != "ns-x",
    },
    Case {
        name: "default deny all egress traffic (documentation)",
        policies: &[("ns-x", "{podSelector: {}, policyTypes: [Egress]}")],
        expected: |c| c.fns != "ns-x",
    },
    Case {
        name: "should support a 'default-deny-all' policy",
        policies: &[("ns-x", "{podSelector: {}, policyTypes: [Ingress, Egress]}")],
        expected: |c| c.tns != "ns-x" && c.fns != "ns-x",
    },
    Case {
        name: "allow all ingress traffic, beside a denial of all (documentation)",
        policies: &[
            ("ns-x", "{podSelector: {}, policyTypes: [Ingress]}"),
            ("ns-x", "{podSelector: {}, ingress: [{}], policyTypes: [Ingress]}"),
        ],
        expected: |_| true,
    },
    Case {
        name: "allow all egress traffic, beside a denial of all (documentation)",
        policies: &[
            ("ns-x", "{podSelector: {}, policyTypes: [Egress]}"),
            ("ns-x", "{podSelector: {}, egress: [{}], policyTypes: [Egress]}"),
        ],
        expected: |_| true,
    },
    Case {
        name: "should enforce policy to allow traffic from pods within server namespace based on PodSelector",
        policies: &[(
            "ns-x",
            "{podSelector: {matchLabels: {pod: a}}, ingress: [{from: [{podSelector: {matchLabels: {pod: c}}}]}]}",
        )],
        expected: |c| !c.into("ns-x", "a") || c.out_of("ns-x", "c"),
    },
    Case {
        name: "should enforce policy to allow ingress traffic for a target",
        policies: &[
            ("ns-x", "{podSelector: {}, policyTypes: [Ingress]}"),
            ("ns-x", "{podSelector: {matchLabels: {pod: a}}, ingress: [{}]}"),
        ],
        expected: |c| c.tns != "ns-x" || c.to == "a",
    },
    Case {
        name: "should enforce policy to allow ingress traffic from pods in all namespaces",
        policies: &[("ns-x", "{podSelector: {matchLabels: {pod: a}}, ingress: [{from: [{namespaceSelector: {}}]}]}")],
        expected: |_| true,
    },
    Case {
        name: "should enforce policy to allow traffic only from a different namespace, based on NamespaceSelector",
        policies: &[(
            "ns-x",
            "{podSelector: {matchLabels: {pod: a}}, ingress: [{from: [{namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: ns-y}}}]}]}",
        )],
        expected: |c| !c.into("ns-x", "a") || c.fns == "ns-y",
    },
    Case {
        name: "should enforce policy based on PodSelector with MatchExpressions",
        policies: &[(
            "ns-x",
            "{podSelector: {matchExpressions: [{key: pod, operator: In, values: [a]}]}, ingress: [{from: [{podSelector: {matchExpressions: [{key: pod, operator: NotIn, values: [b, x]}]}}]}]}",
        )],
        expected: |c| !c.into("ns-x", "a") || c.out_of("ns-x", "c"),
    },
    Case {
        name: "should enforce policy based on NamespaceSelector with MatchExpressions",
        policies: &[(
            "ns-x",
            "{podSelector: {matchLabels: {pod: a}}, ingress: [{from: [{namespaceSelector: {matchExpressions: [{key: kubernetes.io/metadata.name, operator: In, values: [ns-y, ns-z]}]}}]}]}",
        )],
        expected: |c| !c.into("ns-x", "a") || c.fns != "ns-x",
    },
    Case {
        name: "should enforce policy based on PodSelector or NamespaceSelector",
        policies: &[(
            "ns-x",
            "{podSelector: {matchLabels: {pod: a}}, ingress: [{from: [{namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: ns-y}}}, {podSelector: {matchLabels: {pod: b}}}]}]}",
        )],
        expected: |c| !c.into("ns-x", "a") || c.fns == "ns-y" || c.out_of("ns-x", "b"),
    },
    Case {
        name: "should enforce policy based on PodSelector and NamespaceSelector",
        policies: &[(
            "ns-x",
            "{podSelector: {matchLabels: {pod: a}}, ingress: [{from: [{namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: ns-y}}, podSelector: {matchLabels: {pod: b}}}]}]}",
        )],
        expected: |c| !c.into("ns-x", "a") || c.out_of("ns-y", "b"),
    },
    Case {
        name: "should enforce policy based on Multiple PodSelectors and NamespaceSelectors",
        policies: &[(
            "ns-x",
            "{podSelector: {matchLabels: {pod: a}}, ingress: [{from: [{namespaceSelector: {matchExpressions: [{key: kubernetes.io/metadata.name, operator: NotIn, values: [ns-x]}]}, podSelector: {matchExpressions: [{key: pod, operator: NotIn, values: [a]}]}}]}]}",
        )],
        expected: |c| !c.into("ns-x", "a") || (c.fns != "ns-x" && c.from != "a"),
    },
    Case {
        name: "should enforce policy based on any PodSelectors",
        policies: &[(
            "ns-x",
            "{podSelector: {matchLabels: {pod: a}}, ingress: [{from: [{podSelector: {matchLabels: {pod: b}}}, {podSelector: {matchLabels: {pod: c}}}]}]}",
        )],
        expected: |c| !c.into("ns-x", "a") || c.fns == "ns-x",
    },
    Case {
        name: "should enforce policy based on Ports",
        policies: &[(
            "ns-x",
            "{podSelector: {matchLabels: {pod: a}}, ingress: [{from: [{namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: ns-y}}}], ports: [{port: 81}]}]}",
        )],
        expected: |c| !c.into("ns-x", "a") || (c.fns == "ns-y" && c.port == 81),
    },
    Case {
        name: "should enforce multiple, stacked policies with overlapping podSelectors",
        policies: &[
            (
                "ns-x",
                "{podSelector: {matchLabels: {pod: a}}, ingress: [{from: [{namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: ns-y}}}], ports: [{port: 81}]}]}",
            ),
            (
                "ns-x",
                "{podSelector: {matchLabels: {pod: a}}, ingress: [{from: [{namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: ns-y}}}], ports: [{port: 80}]}]}",
            ),
        ],
        expected: |c| !c.into("ns-x", "a") || c.fns == "ns-y",
    },
    Case {
        name: "should allow ingress access on one named port",
        policies: &[("ns-x", "{podSelector: {matchLabels: {pod: a}}, ingress: [{ports: [{port: serve-81}]}]}")],
        expected: |c| !c.into("ns-x", "a") || c.port == 81,
    },
    Case {
        name: "should allow ingress access from namespace on one named port",
        policies: &[(
            "ns-x",
            "{podSelector: {matchLabels: {pod: a}}, ingress: [{from: [{namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: ns-y}}}], ports: [{port: serve-80}]}]}",
        )],
        expected: |c| !c.into("ns-x", "a") || (c.fns == "ns-y" && c.port == 80),
    },
    Case {
        name: "should allow egress access on one named port",
        policies: &[(
            "ns-x",
            "{podSelector: {matchLabels: {pod: a}}, policyTypes: [Egress], egress: [{ports: [{port: serve-80}]}]}",
        )],
        expected: |c| !c.out_of("ns-x", "a") || c.port == 80,
    },
    Case {
        name: "should deny egress from pods based on PodSelector",
        policies: &[("ns-x", "{podSelector: {matchLabels: {pod: a}}, policyTypes: [Egress]}")],
        expected: |c| !c.out_of("ns-x", "a"),
    },
    Case {
        name: "should work with Ingress, Egress specified together",
        policies: &[(
            "ns-x",
            "{podSelector: {matchLabels: {pod: a}}, policyTypes: [Ingress, Egress], ingress: [{from: [{namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: ns-y}}}], ports: [{port: 80}]}], egress: [{to: [{namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: ns-z}}}], ports: [{port: 81}]}]}",
        )],
        expected: |c| {
            (!c.into("ns-x", "a") || (c.fns == "ns-y" && c.port == 80))
                && (!c.out_of("ns-x", "a") || (c.tns == "ns-z" && c.port == 81))
        },
    },
    Case {
        name: "should support denying of egress traffic on the client side (even if the server explicitly allows this traffic)",
        policies: &[
            (
                "ns-x",
                "{podSelector: {matchLabels: {pod: a}}, policyTypes: [Egress], egress: [{to: [{namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: ns-y}}, podSelector: {matchLabels: {pod: a}}}]}]}",
            ),
            (
                "ns-y",
                "{podSelector: {matchLabels: {pod: b}}, ingress: [{from: [{namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: ns-x}}, podSelector: {matchLabels: {pod: a}}}]}]}",
            ),
        ],
        expected: |c| {
            (!c.out_of("ns-x", "a") || c.into("ns-y", "a")) && (!c.into("ns-y", "b") || c.out_of("ns-x", "a"))
        },
    },
    Case {
        name: "should enforce policies to check ingress and egress policies can be controlled independently based on PodSelector",
        policies: &[
            (
                "ns-x",
                "{podSelector: {matchLabels: {pod: a}}, policyTypes: [Egress], egress: [{to: [{podSelector: {matchLabels: {pod: b}}}]}]}",
            ),
            (
                "ns-x",
                "{podSelector: {matchLabels: {pod: a}}, policyTypes: [Ingress], ingress: [{from: [{podSelector: {matchLabels: {pod: c}}}]}]}",
            ),
        ],
        expected: |c| {
            (!c.out_of("ns-x", "a") || c.into("ns-x", "b")) && (!c.into("ns-x", "a") || c.out_of("ns-x", "c"))
        },
    },
    Case {
        name: "should enforce ingress policy allowing any port traffic to a server on a specific protocol",
        policies: &[("ns-x", "{podSelector: {matchLabels: {pod: a}}, ingress: [{ports: [{protocol: TCP}]}]}")],
        expected: |_| true,
    },
    Case {
        name: "should not allow access by TCP when a policy specifies only UDP",
        policies: &[(
            "ns-x",
            "{podSelector: {matchLabels: {pod: a}}, ingress: [{ports: [{protocol: UDP, port: 81}]}]}",
        )],
        expected: |c| !c.into("ns-x", "a"),
    },
    Case {
        name: "should not mistakenly treat 'protocol: SCTP' as 'protocol: TCP', even if the plugin doesn't support SCTP",
        policies: &[(
            "ns-x",
            "{podSelector: {matchLabels: {pod: a}}, ingress: [{ports: [{protocol: SCTP, port: 80}]}]}",
        )],
        expected: |c| !c.into("ns-x", "a"),
    },
    Case {
        name: "targeting a range of ports (documentation)",
        policies: &[(
            "ns-x",
            "{podSelector: {matchLabels: {pod: a}}, policyTypes: [Egress], egress: [{ports: [{port: 81, endPort: 90}]}]}",
        )],
        expected: |c| !c.out_of("ns-x", "a") || c.port == 81,
    },
    Case {
        name: "targeting multiple namespaces by label (documentation)",
        policies: &[(
            "ns-x",
            "{podSelector: {matchLabels: {pod: a}}, policyTypes: [Egress], egress: [{to: [{namespaceSelector: {matchExpressions: [{key: kubernetes.io/metadata.name, operator: In, values: [ns-x, ns-z]}]}}]}]}",
        )],
        expected: |c| !c.out_of("ns-x", "a") || c.tns != "ns-y",
    },
];

/// Every connection between two pods to `port`, one request each, and whether it was made.
fn traffic(lab: &Lab, addresses: &BTreeMap<(&str, &str), String>, ports: &[u16]) -> anyhow::Result<Vec<(Cell, bool)>> {
    let mut found = Vec::new();
    for (fns, from, _) in PODS {
        let mut targets = BTreeMap::new();
        for (tns, to, _) in PODS.into_iter().filter(|(tns, to, _)| (*tns, *to) != (fns, from)) {
            for port in ports {
                let address = &addresses[&(tns, to)];
                targets.insert(format!("tcp://{address}:{port}"), Cell { fns, from, tns, to, port: *port });
            }
        }
        let mut argv = vec!["shop", "load", "--count", "1"];
        argv.extend(targets.keys().map(String::as_str));
        let output = lab.exec(&format!("{fns}/{from}"), &argv)?;
        let reports = scenario::json_lines(&output.stdout);
        anyhow::ensure!(reports.len() == targets.len(), "{} of {} reports", reports.len(), targets.len());
        for report in reports {
            let cell = report["target"].as_str().and_then(|target| targets.get(target));
            found.push((*cell.ok_or_else(|| anyhow::anyhow!("{report}"))?, report["ok"] == true));
        }
    }
    Ok(found)
}

fn explained(lab: &Lab, cell: Cell) -> anyhow::Result<bool> {
    let Cell { fns, from, tns, to, port } = cell;
    let answer = lab.control_get(&format!("/debug/explain?from={fns}/{from}&to={tns}/{to}:{port}"))?;
    match answer["verdict"].as_str() {
        Some("allowed") => Ok(true),
        Some("denied" | "refused") => Ok(false),
        _ => anyhow::bail!("{cell:?}: {answer}"),
    }
}

#[test]
fn the_cases_of_kubernetes_come_out_as_there_and_explain_agrees() -> anyhow::Result<()> {
    let Some(lab) = scenario::lab(LabConfig::of(&matrix_world())) else { return Ok(()) };
    let mut addresses = BTreeMap::new();
    for (namespace, name, _) in PODS {
        addresses.insert((namespace, name), lab.pod_ip(namespace, name)?);
    }
    let open = traffic(&lab, &addresses, &[80, 81])?;
    assert!(open.iter().all(|(_, made)| *made), "without a policy everybody reaches everybody");
    let mut wrong = Vec::new();
    for case in CASES {
        let names: Vec<String> = (0..case.policies.len()).map(|index| format!("case-{index}")).collect();
        let objects = case.policies.iter().zip(&names).map(|((namespace, spec), name)| policy(namespace, name, spec));
        lab.apply_yaml(&objects.collect::<String>())?;
        for (cell, made) in traffic(&lab, &addresses, &[80, 81])? {
            let (expected, said) = ((case.expected)(cell), explained(&lab, cell)?);
            if made != expected || said != expected {
                wrong.push(format!("{}: {cell:?}: expected {expected}, found {made}, explained {said}", case.name));
            }
        }
        for ((namespace, _), name) in case.policies.iter().zip(&names) {
            lab.delete("NetworkPolicy", &format!("{namespace}/{name}"))?;
        }
    }
    assert!(wrong.is_empty(), "{} cells:\n{}", wrong.len(), wrong.join("\n"));
    let after = traffic(&lab, &addresses, &[80])?;
    assert!(after.iter().all(|(_, made)| *made), "should stop enforcing policies after they are deleted");
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
    // should enforce except clause while egress access to server in CIDR block
    let egress = |except: &str| {
        format!(
            "{{podSelector: {{matchLabels: {{pod: a}}}}, policyTypes: [Egress], egress: [{{to: [{{ipBlock: {{cidr: 0.0.0.0/0, except: [{except}]}}}}]}}]}}"
        )
    };
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
