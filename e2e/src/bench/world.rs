//! The lab that the bench measures in: for each mesh a pair of nodes with the same pods on them, and the same pods once
//! more outside any mesh, so that what differs between columns is the mesh and nothing else; and twenty policies for
//! each, so that deciding costs what it costs.
//!
//! All twenty select the servers and are looked at for each connection: one lets the client in, one keeps the denied
//! client out, the others name accounts that do not come. Besides the one server of most loads there are others that
//! are spoken to once by each of a few clients, for what the first connection between two pods costs. Limits: pods are
//! addressed directly, not through a Service.

use std::fmt::Write as _;

use crate::bench::work::PORTS;
use crate::scenario;

/// Namespace outside any mesh; its pods are on the first two nodes.
pub(super) const PLAIN: &str = "plain";
/// Number of policies.
pub(super) const POLICIES: usize = 20;
/// Servers that no client has spoken to before.
pub(super) const COLD_SERVERS: usize = 32;

/// A mesh: its namespace and nodes, the client's and the server's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Mesh {
    /// Namespace of its pods.
    pub(super) namespace: &'static str,
    /// Node of the clients, node of the servers.
    pub(super) nodes: [u16; 2],
}

/// Ours.
pub(super) const OURS: Mesh = Mesh { namespace: "bench", nodes: [1, 2] };
/// The other.
pub(super) const THEIRS: Mesh = Mesh { namespace: "peer", nodes: [3, 4] };

impl Mesh {
    /// The policy that keeps the denied client out.
    pub(super) fn denying(self) -> String {
        format!("{}/deny-denied", self.namespace)
    }

    /// The identity of an account, without the scheme.
    pub(super) fn principal(self, account: &str) -> String {
        format!("cluster.local/ns/{}/sa/{account}", self.namespace)
    }
}

/// Every object; `marker` is what the servers' answers are made of, and `cold_clients` the number of clients that speak
/// to the cold servers once.
pub(super) fn objects(marker: &str, meshes: &[Mesh], cold_clients: usize) -> String {
    let mut text = scenario::namespace(PLAIN, false);
    text += &client(PLAIN, "client", "client", 1);
    text += &server(PLAIN, "server", 2, marker);
    for mesh in meshes {
        let (namespace, [near, far]) = (mesh.namespace, mesh.nodes);
        text += &scenario::namespace(namespace, true);
        text += &client(namespace, "client", "client", near);
        text += &client(namespace, "denied", "denied", near);
        (0..cold_clients).for_each(|index| text += &client(namespace, &cold_client(index), "client", near));
        text += &server(namespace, "server", far, marker);
        (0..COLD_SERVERS).for_each(|index| text += &server(namespace, &cold_server(index), far, marker));
        text += &authorizations(*mesh);
    }
    text
}

/// Name of a client that speaks to each cold server once.
pub(super) fn cold_client(index: usize) -> String {
    format!("cold-client-{index}")
}

/// Name of a server that is spoken to once by each of those.
pub(super) fn cold_server(index: usize) -> String {
    format!("cold-{index}")
}

fn authorizations(mesh: Mesh) -> String {
    let mut text = String::new();
    for (name, action, account) in policies() {
        let mut accounts = format!("'{}'", mesh.principal(&account));
        for other in 0..2 {
            let _ = write!(accounts, ", '{}'", mesh.principal(&format!("{account}-{other}")));
        }
        let ports: Vec<String> = PORTS.iter().map(|port| format!("'{port}'")).collect();
        let rules = format!(
            "[{{from: [{{source: {{principals: [{accounts}]}}}}], to: [{{operation: {{ports: [{}]}}}}]}}]",
            ports.join(", ")
        );
        text += &scenario::authorization(mesh.namespace, &name, "server", action, &rules);
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

/// A pod from which the bench runs its generators.
pub(super) fn client(namespace: &str, name: &str, account: &str, node: u16) -> String {
    format!(
        "---\napiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: {namespace}}}\n\
         spec: {{nodeName: node-{node}, serviceAccountName: {account}, containers: [{{name: main, image: none}}]}}\n"
    )
}

/// A pod that serves every kind of load; `marker` is what its answers are made of.
pub(super) fn server(namespace: &str, name: &str, node: u16, marker: &str) -> String {
    let ports: Vec<String> = PORTS.iter().map(|port| format!("{{containerPort: {port}}}")).collect();
    format!(
        "---\napiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: {namespace}, labels: {{app: server}}}}\n\
         spec:\n  nodeName: node-{node}\n  serviceAccountName: server\n  containers:\n  - name: main\n    image: none\n\
         \x20   command: [lab, bench-agent, serve, --marker, {marker}]\n    ports: [{}]\n",
        ports.join(", ")
    )
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use crate::bench::world::OURS;
    use crate::bench::world::POLICIES;
    use crate::bench::world::THEIRS;
    use crate::bench::world::objects;
    use crate::bench::world::policies;

    #[test]
    fn there_are_as_many_policies_as_promised_with_names_of_their_own() {
        let names: BTreeSet<_> = policies().into_iter().map(|(name, ..)| format!("bench/{name}")).collect();
        assert_eq!(names.len(), POLICIES);
        assert!(names.contains(&OURS.denying()));
        assert_eq!(objects("m", &[OURS], 1).matches("kind: AuthorizationPolicy").count(), POLICIES);
    }

    #[test]
    fn both_meshes_get_the_same_world_but_for_its_name_and_nodes() {
        let plain = objects("m", &[], 3);
        let of = |mesh| objects("m", &[mesh], 3).replacen(&plain, "", 1);
        let translated = of(THEIRS)
            .replace("peer", OURS.namespace)
            .replace("nodeName: node-3", "nodeName: node-1")
            .replace("nodeName: node-4", "nodeName: node-2");
        assert_eq!(translated, of(OURS));
    }
}
