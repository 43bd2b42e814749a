//! What the bench of requests is about: one name behind which a route chooses between two versions, and twenty policies
//! that look at who asks, with which method and for which path; for our mesh as objects.
//!
//! The same policies and shares are given to Envoy (`super::envoy`), from the same data, so that both do the same. Pods
//! are alike too: in the mesh's namespace, and in one outside it for Envoy's and for no proxy at all. Limits: all but two
//! of the policies are about accounts that do not come, which costs what looking at them costs.

use crate::bench::work::PORT_HTTP;
use crate::bench::world::POLICIES;
use crate::scenario;

/// Namespace in our mesh.
pub(super) const MESH: &str = "l7";
/// Namespace outside it.
pub(super) const PLAIN: &str = "l7-plain";
/// Who asks: the one that is measured, one that is not allowed to, one that asks as much as it can.
pub(super) const CLIENTS: [&str; 3] = ["client", "denied", "flooder"];
/// Who answers.
pub(super) const VERSIONS: [&str; 2] = ["v1", "v2"];
/// The second version's part of a hundred requests.
pub(super) const CANARY: u32 = 10;
/// The header with which a request goes to the second version.
pub(super) const PIN: (&str, &str) = ("x-canary", "always");
/// What is asked for, and allowed.
pub(super) const PATH: &str = "/api/items/17";
/// What nobody may ask for.
pub(super) const ADMIN: &str = "/api/admin/users";
/// The policy that says so.
pub(super) const DENY: &str = "deny-admin";

/// A policy for the servers.
pub(super) struct Policy {
    /// Unique.
    pub(super) name: String,
    /// Or else it allows.
    pub(super) denies: bool,
    /// Accounts that ask; none: any.
    pub(super) accounts: Vec<String>,
    /// Methods; none: any.
    pub(super) methods: Vec<&'static str>,
    /// What the path begins with.
    pub(super) prefix: String,
}

/// All of them.
pub(super) fn policies() -> Vec<Policy> {
    let mut policies = vec![
        Policy {
            name: "allow-clients".to_owned(),
            denies: false,
            accounts: vec!["client".to_owned(), "flooder".to_owned()],
            methods: vec!["GET", "HEAD"],
            prefix: "/api/".to_owned(),
        },
        Policy {
            name: DENY.to_owned(),
            denies: true,
            accounts: Vec::new(),
            methods: Vec::new(),
            prefix: "/api/admin".to_owned(),
        },
    ];
    for index in policies.len()..POLICIES {
        policies.push(Policy {
            name: format!("absent-{index}"),
            denies: index % 2 == 1,
            accounts: (0..3).map(|other| format!("absent-{index}-{other}")).collect(),
            methods: vec!["GET"],
            prefix: format!("/absent-{index}/"),
        });
    }
    policies
}

/// The identity of an account, without the scheme.
pub(super) fn principal(namespace: &str, account: &str) -> String {
    format!("cluster.local/ns/{namespace}/sa/{account}")
}

/// Every object.
pub(super) fn objects(marker: &str) -> String {
    let mut text = String::new();
    for (namespace, mesh) in [(MESH, true), (PLAIN, false)] {
        text += &scenario::namespace(namespace, mesh);
        CLIENTS.iter().for_each(|name| text += &crate::bench::world::client(namespace, name, name, 1));
        VERSIONS.iter().for_each(|version| text += &server(namespace, version, marker));
    }
    for (name, selector) in [("shop", "app: server"), ("v1", "version: v1"), ("v2", "version: v2")] {
        text += &format!(
            "---\napiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: {MESH}}}\n\
             spec: {{selector: {{{selector}}}, ports: [{{name: http, port: {PORT_HTTP}}}]}}\n"
        );
    }
    let (header, value) = PIN;
    let stable = 100 - CANARY;
    text += &format!(
        "---\napiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {{name: shop, namespace: {MESH}}}\n\
         spec:\n  parentRefs: [{{group: '', kind: Service, name: shop, port: {PORT_HTTP}}}]\n  rules:\n\
         \x20 - matches: [{{path: {{value: /api}}, headers: [{{name: {header}, value: {value}}}]}}]\n\
         \x20   backendRefs: [{{name: v2, port: {PORT_HTTP}}}]\n\
         \x20 - matches: [{{path: {{value: /api}}}}]\n\
         \x20   backendRefs: [{{name: v1, port: {PORT_HTTP}, weight: {stable}}}, \
         {{name: v2, port: {PORT_HTTP}, weight: {CANARY}}}]\n"
    );
    policies().iter().for_each(|policy| text += &authorization(policy));
    text
}

fn authorization(policy: &Policy) -> String {
    let quoted = |values: &[String]| values.iter().map(|it| format!("'{it}'")).collect::<Vec<_>>().join(", ");
    let accounts: Vec<String> = policy.accounts.iter().map(|account| principal(MESH, account)).collect();
    let from = match accounts.as_slice() {
        [] => String::new(),
        accounts => format!("from: [{{source: {{principals: [{}]}}}}], ", quoted(accounts)),
    };
    let methods = match policy.methods.as_slice() {
        [] => String::new(),
        methods => format!("methods: [{}], ", methods.join(", ")),
    };
    let rules = format!("[{{{from}to: [{{operation: {{{methods}paths: ['{}*']}}}}]}}]", policy.prefix);
    scenario::authorization(MESH, &policy.name, "server", if policy.denies { "DENY" } else { "ALLOW" }, &rules)
}

fn server(namespace: &str, version: &str, marker: &str) -> String {
    format!(
        "---\napiVersion: v1\nkind: Pod\n\
         metadata: {{name: {version}, namespace: {namespace}, labels: {{app: server, version: {version}}}}}\n\
         spec:\n  nodeName: node-2\n  serviceAccountName: server\n  containers:\n  - name: main\n    image: none\n\
         \x20   command: [lab, bench-agent, serve, --marker, {marker}, --name, {version}]\n\
         \x20   ports: [{{containerPort: {PORT_HTTP}}}]\n"
    )
}

#[cfg(test)]
mod tests {
    use crate::bench::l7::world::objects;
    use crate::bench::l7::world::policies;
    use crate::bench::world::POLICIES;

    #[test]
    fn there_are_as_many_policies_as_promised_with_names_of_their_own() {
        let names: std::collections::BTreeSet<_> = policies().into_iter().map(|policy| policy.name).collect();
        assert_eq!(names.len(), POLICIES);
        assert_eq!(objects("m").matches("kind: AuthorizationPolicy").count(), POLICIES);
    }
}
