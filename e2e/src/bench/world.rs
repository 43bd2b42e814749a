//! The lab that the bench measures in: one pair of pods in the mesh and one outside it, on the same two nodes, so that
//! what differs between rows is the mesh and nothing else; and twenty policies, so that deciding costs what it costs.
//!
//! All twenty select the server and are looked at for each connection: one lets the client in, one keeps the denied
//! client out, the others name accounts that do not come. Limits: pods are addressed directly, not through a Service.

use std::fmt::Write as _;

use crate::bench::work::PORTS;
use crate::scenario;

/// Namespace in the mesh.
pub(super) const MESH: &str = "bench";
/// Namespace outside it.
pub(super) const PLAIN: &str = "plain";
/// Number of policies.
pub(super) const POLICIES: usize = 20;
/// The policy that keeps the denied client out.
pub(super) const DENYING: &str = "bench/deny-denied";

/// The identity of an account in the mesh, without the scheme.
pub(super) fn principal(account: &str) -> String {
    format!("cluster.local/ns/{MESH}/sa/{account}")
}

/// Every object; `marker` is what the server's answers are made of.
pub(super) fn objects(marker: &str) -> String {
    let mut text = String::new();
    for (namespace, mesh) in [(MESH, true), (PLAIN, false)] {
        text += &scenario::namespace(namespace, mesh);
        text += &scenario::client(namespace, "client", 1);
        text += &server(namespace, marker);
    }
    text += &scenario::client(MESH, "denied", 1);
    for (name, action, account) in policies() {
        let mut accounts = format!("'{}'", principal(&account));
        for other in 0..2 {
            let _ = write!(accounts, ", '{}'", principal(&format!("{account}-{other}")));
        }
        let ports: Vec<String> = PORTS.iter().map(|port| format!("'{port}'")).collect();
        let rules = format!(
            "[{{from: [{{source: {{principals: [{accounts}]}}}}], to: [{{operation: {{ports: [{}]}}}}]}}]",
            ports.join(", ")
        );
        text += &scenario::authorization(MESH, &name, "server", action, &rules);
    }
    text
}

/// Name, action and account of each policy.
fn policies() -> Vec<(String, &'static str, String)> {
    let mut policies = vec![
        ("allow-client".to_owned(), "ALLOW", "client".to_owned()),
        ("deny-denied".to_owned(), "DENY", "denied".to_owned()),
    ];
    for index in 2..POLICIES {
        let action = if index % 2 == 0 { "ALLOW" } else { "DENY" };
        policies.push((format!("absent-{index}"), action, format!("absent-{index}")));
    }
    policies
}

fn server(namespace: &str, marker: &str) -> String {
    let ports: Vec<String> = PORTS.iter().map(|port| format!("{{containerPort: {port}}}")).collect();
    format!(
        "---\napiVersion: v1\nkind: Pod\nmetadata: {{name: server, namespace: {namespace}, labels: {{app: server}}}}\n\
         spec:\n  nodeName: node-2\n  serviceAccountName: server\n  containers:\n  - name: main\n    image: none\n\
         \x20   command: [lab, bench-agent, serve, --marker, {marker}]\n    ports: [{}]\n",
        ports.join(", ")
    )
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use crate::bench::world::DENYING;
    use crate::bench::world::POLICIES;
    use crate::bench::world::objects;
    use crate::bench::world::policies;

    #[test]
    fn there_are_as_many_policies_as_promised_with_names_of_their_own() {
        let names: BTreeSet<_> = policies().into_iter().map(|(name, ..)| format!("bench/{name}")).collect();
        assert_eq!(names.len(), POLICIES);
        assert!(names.contains(DENYING));
        assert_eq!(objects("m").matches("kind: AuthorizationPolicy").count(), POLICIES);
    }
}
