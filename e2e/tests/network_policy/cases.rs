//! What is asked of NetworkPolicies, case by case: the policies, and the connections of the matrix that they leave.
//!
//! By their names, the cases of Kubernetes' end-to-end suite (1.36, `test/e2e/network/netpol`) with policies of our own
//! making, and the examples of its documentation. What cannot be said by a table that does not change is in the functions
//! beside it: four cases of updates, three of blocks with the address of a pod, and the end of all policies. Those of SCTP are
//! asked of `explain` alone, as few kernels here speak it.

/// Pods of the matrix: namespace, name, node. Each has the label `pod` and serves on 80, called serve-80, and on 81.
pub(crate) const PODS: [(&str, &str, u16); 7] = [
    ("ns-x", "a", 1),
    ("ns-x", "b", 2),
    ("ns-x", "c", 1),
    ("ns-y", "a", 2),
    ("ns-y", "b", 1),
    ("ns-z", "a", 1),
    ("ns-z", "b", 2),
];

/// One connection of the matrix.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cell {
    /// Namespace of the client.
    pub(crate) fns: &'static str,
    /// Its name.
    pub(crate) from: &'static str,
    /// Namespace of the server.
    pub(crate) tns: &'static str,
    /// Its name.
    pub(crate) to: &'static str,
    /// Destination port.
    pub(crate) port: u16,
}

impl Cell {
    /// Whether it goes to this pod.
    fn into(self, namespace: &str, name: &str) -> bool {
        (self.tns, self.to) == (namespace, name)
    }

    /// Whether it comes from this pod.
    pub(crate) fn out_of(self, namespace: &str, name: &str) -> bool {
        (self.fns, self.from) == (namespace, name)
    }
}

#[derive(Clone, Copy)]
pub(crate) struct Case {
    /// As the suite calls it.
    pub(crate) name: &'static str,
    /// Namespace and spec of each policy.
    pub(crate) policies: &'static [(&'static str, &'static str)],
    /// Whether a connection is made under them.
    pub(crate) expected: fn(Cell) -> bool,
}

/// Whether a pod of the matrix runs on node 2, whose pods have addresses of 10.20.2.0/24.
fn on_second(namespace: &str, name: &str) -> bool {
    PODS.contains(&(namespace, name, 2))
}

pub(crate) const CASES: &[Case] = &[
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
    Case {
        name: "should enforce policy to allow traffic only from a pod in a different namespace based on PodSelector and NamespaceSelector",
        policies: &[(
            "ns-x",
            "{podSelector: {matchLabels: {pod: a}}, ingress: [{from: [{namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: ns-y}}, podSelector: {matchLabels: {pod: a}}}]}]}",
        )],
        expected: |c| !c.into("ns-x", "a") || c.out_of("ns-y", "a"),
    },
    Case {
        name: "should enforce policy to allow traffic based on NamespaceSelector with MatchLabels using default ns label",
        policies: &[(
            "ns-y",
            "{podSelector: {matchLabels: {pod: b}}, ingress: [{from: [{namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: ns-z}}}]}]}",
        )],
        expected: |c| !c.into("ns-y", "b") || c.fns == "ns-z",
    },
    Case {
        name: "should enforce policy based on NamespaceSelector with MatchExpressions using default ns label",
        policies: &[(
            "ns-x",
            "{podSelector: {matchLabels: {pod: a}}, policyTypes: [Egress], egress: [{to: [{namespaceSelector: {matchExpressions: [{key: kubernetes.io/metadata.name, operator: NotIn, values: [ns-y]}]}}]}]}",
        )],
        expected: |c| !c.out_of("ns-x", "a") || c.tns != "ns-y",
    },
    Case {
        name: "should support allow-all policy",
        policies: &[("ns-x", "{podSelector: {}, ingress: [{}]}")],
        expected: |_| true,
    },
    Case {
        name: "should deny ingress from pods on other namespaces",
        policies: &[("ns-x", "{podSelector: {}, ingress: [{from: [{podSelector: {}}]}]}")],
        expected: |c| c.tns != "ns-x" || c.fns == "ns-x",
    },
    Case {
        name: "should deny egress from all pods in a namespace",
        policies: &[("ns-y", "{podSelector: {}, policyTypes: [Egress], egress: []}")],
        expected: |c| c.fns != "ns-y",
    },
    Case {
        name: "should enforce egress policy allowing traffic to a server in a different namespace based on PodSelector and NamespaceSelector",
        policies: &[(
            "ns-x",
            "{podSelector: {matchLabels: {pod: a}}, policyTypes: [Egress], egress: [{to: [{namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: ns-y}}, podSelector: {matchLabels: {pod: a}}}]}]}",
        )],
        expected: |c| !c.out_of("ns-x", "a") || c.into("ns-y", "a"),
    },
    Case {
        name: "should enforce multiple ingress policies with ingress allow-all policy taking precedence",
        policies: &[
            ("ns-x", "{podSelector: {}, ingress: [{ports: [{port: serve-80}]}]}"),
            ("ns-x", "{podSelector: {}, ingress: [{}]}"),
        ],
        expected: |_| true,
    },
    Case {
        name: "should enforce multiple egress policies with egress allow-all policy taking precedence",
        policies: &[
            ("ns-x", "{podSelector: {}, policyTypes: [Egress], egress: [{ports: [{port: 80}]}]}"),
            ("ns-x", "{podSelector: {}, policyTypes: [Egress], egress: [{}]}"),
        ],
        expected: |_| true,
    },
    Case {
        name: "should properly isolate pods that are selected by a policy allowing SCTP, even if the plugin doesn't support SCTP",
        policies: &[(
            "ns-y",
            "{podSelector: {matchLabels: {pod: a}}, ingress: [{ports: [{protocol: SCTP, port: 7007}]}]}",
        )],
        expected: |c| !c.into("ns-y", "a"),
    },
];

/// The suite's cases of UDP, and of SCTP: the policies say `PROTOCOL` where the one or the other belongs.
pub(crate) const DATAGRAMS: &[Case] = &[
    Case {
        name: "should support a 'default-deny-ingress' policy",
        policies: &[("ns-x", "{podSelector: {}, policyTypes: [Ingress]}")],
        expected: |c| c.tns != "ns-x",
    },
    Case {
        name: "should enforce policy based on Ports",
        policies: &[(
            "ns-x",
            "{podSelector: {matchLabels: {pod: a}}, ingress: [{from: [{namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: ns-y}}}], ports: [{protocol: PROTOCOL, port: 7008}]}]}",
        )],
        expected: |c| !c.into("ns-x", "a") || (c.fns == "ns-y" && c.port == 7008),
    },
    Case {
        name: "should enforce policy to allow traffic only from a pod in a different namespace based on PodSelector and NamespaceSelector",
        policies: &[(
            "ns-x",
            "{podSelector: {matchLabels: {pod: a}}, ingress: [{from: [{namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: ns-y}}, podSelector: {matchLabels: {pod: a}}}]}]}",
        )],
        expected: |c| !c.into("ns-x", "a") || c.out_of("ns-y", "a"),
    },
    Case {
        name: "should deny egress from pods based on PodSelector",
        policies: &[("ns-x", "{podSelector: {matchLabels: {pod: a}}, policyTypes: [Egress]}")],
        expected: |c| !c.out_of("ns-x", "a"),
    },
    Case {
        name: "should enforce ingress policy allowing any port traffic to a server on a specific protocol",
        policies: &[("ns-x", "{podSelector: {matchLabels: {pod: a}}, ingress: [{ports: [{protocol: TCP}]}]}")],
        expected: |c| !c.into("ns-x", "a"),
    },
];
