//! Promise: for every cell of clients × servers × kinds of address × families × transports, the traffic does what the
//! objects say, `explain` says the same with policy, rule and route, and the access records of both nodes agree.
//!
//! What is expected is written down here once more ([`expected`]), from the meaning of the objects and not from any code
//! of the mesh. One server pod for each combination of mode, AuthorizationPolicy and NetworkPolicy, so that all of them
//! are in force at the same time. Every wrong cell is reported, not only the first.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::thread;
use std::time::Duration;

use e2e::eventually::eventually;
use e2e::lab::Lab;
use e2e::lab::LabConfig;
use e2e::scenario;
use e2e::state::View;
use serde_json::Value;

/// Targets of one command: bounded, so that a small machine keeps up.
const AT_ONCE: usize = 60;
/// Commands at a time.
const THREADS: usize = 3;

/// What AuthorizationPolicies say of a server.
const AUTHORIZATION: [&str; 4] = ["none", "allow", "deny", "dry"];
/// What NetworkPolicies let into it.
const NETWORK: [&str; 3] = ["open", "fromweb", "closed"];
const NODES: [&str; 2] = ["node-1", "node-2"];
/// Namespaces, which are the modes.
const MODES: [&str; 2] = ["permissive", "strict"];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Client {
    /// Of the mesh.
    Web,
    Other,
    /// Of the mesh, held by a NetworkPolicy of its own.
    Shut,
    /// Of the mesh, in a namespace that may not leave the cluster.
    Held,
    /// A pod outside the mesh.
    Guest,
    /// Outside the cluster.
    World,
}

const CLIENTS: [Client; 6] = [Client::Web, Client::Other, Client::Shut, Client::Held, Client::Guest, Client::World];

impl Client {
    fn place(self) -> &'static str {
        match self {
            Self::Web => "clients/web",
            Self::Other => "clients/other",
            Self::Shut => "clients/shut",
            Self::Held => "fenced/held",
            Self::Guest => "plain/guest",
            Self::World => "out/world",
        }
    }

    fn name(self) -> &'static str {
        self.place().split_once('/').map_or("", |(_, name)| name)
    }

    fn in_mesh(self) -> bool {
        !matches!(self, Self::Guest | Self::World)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Server {
    mode: &'static str,
    authorization: &'static str,
    network: &'static str,
}

impl Server {
    fn all() -> impl Iterator<Item = Self> {
        MODES.into_iter().flat_map(|mode| {
            AUTHORIZATION.into_iter().flat_map(move |authorization| {
                NETWORK.into_iter().map(move |network| Self { mode, authorization, network })
            })
        })
    }

    fn service(self) -> String {
        format!("{}-{}", self.authorization, self.network)
    }

    fn pod(self) -> String {
        format!("pod-{}", self.service())
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Destination {
    Service(Server),
    Pod(Server),
    Headless(Server),
    /// A host outside the cluster: the first one is in a block that [`Client::Shut`] may reach.
    External(bool, By),
}

/// How a host outside is called. Each has a port of its own there, so that records can be told apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum By {
    Address,
    /// A name that the cluster's DNS does not own.
    Name,
    /// A Service of type ExternalName.
    Alias,
}

impl By {
    fn port(self) -> u16 {
        match self {
            Self::Address => 7001,
            Self::Name => 7002,
            Self::Alias => 7003,
        }
    }
}

impl Destination {
    fn server(self) -> Option<Server> {
        match self {
            Self::Service(server) | Self::Pod(server) | Self::Headless(server) => Some(server),
            Self::External(..) => None,
        }
    }
}

#[derive(Clone, Debug)]
struct Cell {
    client: Client,
    to: Destination,
    v6: bool,
    udp: bool,
    /// What the client is told to reach.
    url: String,
    /// The address that it dials.
    dialled: String,
    /// The application's address.
    application: String,
    /// The client's own.
    source: String,
    /// The words that explain is asked with.
    target: String,
}

/// What is to happen, or what was found: refused with a code by a policy's rule, or not.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Said {
    /// Empty: it was let through.
    code: String,
    policy: String,
    rule: Option<u64>,
    dry_run: String,
}

impl Said {
    fn refused(code: &str, policy: &str, rule: Option<u64>) -> Self {
        Self { code: code.into(), policy: policy.into(), rule, dry_run: String::new() }
    }
}

/// Where a refusal is made, and what it says. The policy and rule of one that is let through are those that allow.
struct Expected {
    at_source: bool,
    said: Said,
}

/// Whom the policies let in where others are not, and whom they deny where others are let in. They change while the mesh
/// runs: then it is the other way round.
#[derive(Clone, Copy, Debug)]
struct Round {
    liked: Client,
    disliked: Client,
}

const ROUNDS: [Round; 2] =
    [Round { liked: Client::Web, disliked: Client::Other }, Round { liked: Client::Other, disliked: Client::Web }];

/// The meaning of the objects of [`world`], with the policies of a round.
fn expected(cell: &Cell, round: Round) -> Expected {
    let source = |said| Expected { at_source: true, said };
    let destination = |said| Expected { at_source: false, said };
    let Some(server) = cell.to.server() else {
        return source(match (cell.client, cell.to, cell.v6) {
            (Client::Held, ..) => Said::refused("EGRESS_DENIED", "", None),
            (Client::Shut, Destination::External(true, _), false) => {
                Said::refused("", "NetworkPolicy/clients/shut", Some(1))
            }
            (Client::Shut, ..) => Said::refused("NETWORK_POLICY_EGRESS", "NetworkPolicy/clients/shut", None),
            _ => Said::default(),
        });
    };
    let mode = server.mode;
    match cell.client {
        Client::Shut if server.network != "open" => {
            return source(Said::refused("NETWORK_POLICY_EGRESS", "NetworkPolicy/clients/shut", None));
        }
        Client::Held if cell.udp => return source(Said::refused("EGRESS_DENIED", "", None)),
        _ => {}
    }
    match (server.network, cell.client) {
        ("open", _) => {}
        ("fromweb", client) if client == round.liked && cell.udp => {
            return destination(Said::refused("", &format!("NetworkPolicy/{mode}/fromweb"), Some(0)));
        }
        ("fromweb", client) if client == round.liked => {}
        (network, _) => {
            let policy = format!("NetworkPolicy/{mode}/{network}");
            return destination(Said::refused("NETWORK_POLICY_INGRESS", &policy, None));
        }
    }
    destination(match (server.authorization, cell.client) {
        _ if cell.udp => Said::default(),
        (_, client) if mode == "strict" && !client.in_mesh() => {
            Said::refused("MTLS_REQUIRED", "strict/tulle_strict_default", Some(0))
        }
        ("deny", client) if client == round.disliked => {
            Said::refused("POLICY_DENIED", &format!("{mode}/deny"), Some(1))
        }
        ("allow", client) if client == round.liked => Said::refused("", &format!("{mode}/allow"), Some(1)),
        ("allow", _) => Said::refused("NOT_ALLOWED", &format!("{mode}/allow"), None),
        ("dry", client) if client == round.disliked => {
            Said { dry_run: format!("{mode}/dry denied by rules[1]"), ..Said::default() }
        }
        _ => Said::default(),
    })
}

fn authorization(namespace: &str, name: &str, round: Round) -> String {
    let (action, whom) = match name {
        "allow" => ("ALLOW", round.liked),
        _ => ("DENY", round.disliked),
    };
    let account = whom.name();
    let dry_run = if name == "dry" { ", annotations: {istio.io/dry-run: 'true'}" } else { "" };
    format!(
        "---\napiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\n\
         metadata: {{name: {name}, namespace: {namespace}{dry_run}}}\n\
         spec: {{selector: {{matchLabels: {{authorization: {name}}}}}, action: {action}, rules: [\
         {{from: [{{source: {{principals: ['cluster.local/ns/clients/sa/nobody']}}}}]}}, \
         {{from: [{{source: {{principals: ['cluster.local/ns/clients/sa/{account}']}}}}]}}]}}\n"
    )
}

fn server(server: Server, node: usize) -> String {
    let Server { mode, authorization, network } = server;
    let (pod, service) = (server.pod(), server.service());
    let mut text = format!(
        "---\napiVersion: v1\nkind: Pod\n\
         metadata: {{name: {pod}, namespace: {mode}, labels: {{app: {service}, authorization: {authorization}, network: {network}}}}}\n\
         spec:\n  nodeName: node-{node}\n  serviceAccountName: {service}\n  containers:\n  - name: main\n    image: shop\n\
         \x20   command: [shop, serve, --tcp, '7001', --tcp, '7002', --tcp, '7003', --udp, '7007']\n\
         \x20   ports: [{{containerPort: 7001}}, {{containerPort: 7002}}, {{containerPort: 7003}}]\n"
    );
    for (name, address, ports) in [
        (
            service.clone(),
            "",
            "{name: raw, port: 80, targetPort: 7003}, {name: echo, port: 7000, targetPort: 7007, protocol: UDP}",
        ),
        (format!("{service}-headless"), "clusterIP: None, ", "{name: raw, port: 7002}"),
    ] {
        let _ = write!(
            text,
            "---\napiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: {mode}}}\n\
             spec: {{{address}ipFamilyPolicy: RequireDualStack, selector: {{app: {service}}}, ports: [{ports}]}}\n"
        );
    }
    text
}

fn outside(name: &str) -> String {
    format!(
        "---\napiVersion: v1\nkind: Pod\n\
         metadata: {{name: {name}, namespace: out, annotations: {{lab.tulle.dev/hostnames: {name}.example.test}}}}\n\
         spec: {{containers: [{{name: main, image: shop, \
         command: [shop, serve, --tcp, '7001', --tcp, '7002', --tcp, '7003']}}]}}\n\
         ---\napiVersion: v1\nkind: Service\nmetadata: {{name: alias-{name}, namespace: clients}}\n\
         spec: {{type: ExternalName, externalName: {name}.example.test}}\n"
    )
}

/// Everything but the policies of `clients/shut`, which name an address that is not known before.
fn world() -> String {
    let mut text: String = ["clients", "permissive", "strict"].map(|name| scenario::namespace(name, true)).concat();
    text.push_str(&scenario::namespace("plain", false));
    text.push_str(
        "---\napiVersion: v1\nkind: Namespace\nmetadata: {name: out, annotations: {lab.tulle.dev/outside: 'true'}}\n",
    );
    text.push_str("---\napiVersion: v1\nkind: Namespace\nmetadata: {name: fenced, labels: {tulle.dev/egress: deny}}\n");
    for (client, node) in CLIENTS.into_iter().zip([1, 2, 1, 2, 1, 0]).filter(|(_, node)| *node > 0) {
        let (namespace, name) = client.place().split_once('/').unwrap_or_default();
        text.push_str(&scenario::client(namespace, name, node));
    }
    for name in ["world", "near", "far"] {
        text.push_str(&outside(name));
    }
    for (index, one) in Server::all().enumerate() {
        text.push_str(&server(one, 1 + index % 2));
    }
    text.push_str(&policies(ROUNDS[0]));
    text.push_str(&scenario::peer_authentication("strict", "STRICT"));
    text
}

/// What changes from round to round.
fn policies(round: Round) -> String {
    let mut text = String::new();
    for mode in MODES {
        for name in AUTHORIZATION.into_iter().filter(|name| *name != "none") {
            text.push_str(&authorization(mode, name, round));
        }
        let from_one = format!(
            "[{{from: [{{namespaceSelector: {{matchLabels: {{kubernetes.io/metadata.name: clients}}}}, podSelector: {{matchLabels: {{app: {}}}}}}}]}}]",
            round.liked.name()
        );
        for (name, ingress) in [("fromweb", from_one.as_str()), ("closed", "[]")] {
            let spec = format!(
                "{{podSelector: {{matchLabels: {{network: {name}}}}}, policyTypes: [Ingress], ingress: {ingress}}}"
            );
            text.push_str(&scenario::network_policy(mode, name, &spec));
        }
    }
    text
}

fn at(ip: &str, port: u16) -> String {
    if ip.contains(':') { format!("[{ip}]:{port}") } else { format!("{ip}:{port}") }
}

/// Address of a pod or an outside host, and of a Service.
fn address(view: &View, namespace: &str, name: &str, v6: bool) -> anyhow::Result<String> {
    let pods = view.pods.iter().filter(|pod| pod.namespace == namespace && pod.name == name).map(|pod| &pod.addresses);
    let services = view.services.iter().filter(|one| one.namespace == namespace && one.name == name);
    let mut all = pods.chain(services.map(|service| &service.addresses)).flatten();
    let found = all.find(|ip| ip.contains(':') == v6).cloned();
    found.ok_or_else(|| anyhow::anyhow!("{namespace}/{name} has no address of the family"))
}

fn cells(view: &View) -> anyhow::Result<Vec<Cell>> {
    let mut all = Vec::new();
    for client in CLIENTS {
        let (namespace, name) = client.place().split_once('/').unwrap_or_default();
        for v6 in [false, true] {
            let source = address(view, namespace, name, v6)?;
            let mut add =
                |to: Destination, udp: bool, url: String, dialled: String, application: String, target: String| {
                    let url = format!("{}://{url}", if udp { "udp" } else { "tcp" });
                    let source = source.clone();
                    all.push(Cell { client, to, v6, udp, url, dialled, application, source, target });
                };
            for server in Server::all() {
                let (mode, service, pod) = (server.mode, server.service(), server.pod());
                let ip = address(view, mode, &pod, v6)?;
                for (udp, port) in [(false, 7001), (true, 7007)] {
                    let own = at(&ip, port);
                    add(Destination::Pod(server), udp, own.clone(), own.clone(), own, format!("{mode}/{pod}:{port}"));
                }
                // Hosts outside have neither the cluster's names nor its virtual addresses.
                if client == Client::World {
                    continue;
                }
                let vip = address(view, mode, &service, v6)?;
                for (udp, port, own) in [(false, 80, 7003), (true, 7000, 7007)] {
                    let url = format!("{service}.{mode}:{port}");
                    let target = format!("{mode}/{service}:{port}");
                    add(Destination::Service(server), udp, url, at(&vip, port), at(&ip, own), target);
                }
                let url = format!("{service}-headless.{mode}:7002");
                let target = format!("{mode}/{service}-headless:7002");
                add(Destination::Headless(server), false, url, at(&ip, 7002), at(&ip, 7002), target);
            }
            for (near, name) in [(true, "near"), (false, "far")].into_iter().filter(|_| client != Client::World) {
                for by in [By::Address, By::Name, By::Alias] {
                    let own = at(&address(view, "out", name, v6)?, by.port());
                    let url = match by {
                        By::Address => own.clone(),
                        By::Name => format!("{name}.example.test:{}", by.port()),
                        By::Alias => format!("alias-{name}.clients:{}", by.port()),
                    };
                    add(Destination::External(near, by), false, url, own.clone(), own.clone(), own);
                }
            }
        }
    }
    Ok(all)
}

/// Sends one connection or datagram for each cell; whether it was answered, by the cell's place in the list.
fn traffic(lab: &Lab, cells: &[Cell]) -> anyhow::Result<Vec<bool>> {
    let mut batches: BTreeMap<(&str, bool), Vec<usize>> = BTreeMap::new();
    for (index, cell) in cells.iter().enumerate() {
        batches.entry((cell.client.place(), cell.v6)).or_default().push(index);
    }
    let batches: Vec<(&str, bool, Vec<usize>)> = batches
        .into_iter()
        .flat_map(|((place, v6), list)| list.chunks(AT_ONCE).map(|part| (place, v6, part.to_vec())).collect::<Vec<_>>())
        .collect();
    let one = |(place, v6, part): &(&str, bool, Vec<usize>)| -> anyhow::Result<Vec<(usize, bool)>> {
        let mut argv = vec!["shop", "load", "--count", "1", "--timeout-ms", "2500", if *v6 { "-6" } else { "-4" }];
        argv.extend(part.iter().map(|index| cells[*index].url.as_str()));
        let output = lab.exec(place, &argv)?;
        let reports = scenario::json_lines(&output.stdout);
        anyhow::ensure!(reports.len() == part.len(), "{place}: {} of {} reports", reports.len(), part.len());
        let of = |index: &usize| {
            let report = reports.iter().find(|report| report["target"] == cells[*index].url.as_str());
            (*index, report.is_some_and(|report| report["ok"] == true))
        };
        Ok(part.iter().map(of).collect())
    };
    let mut made = vec![false; cells.len()];
    let found: Vec<anyhow::Result<Vec<(usize, bool)>>> = thread::scope(|scope| {
        let worker = |number: usize| {
            let (batches, one) = (&batches, &one);
            scope.spawn(move || batches.iter().skip(number).step_by(THREADS).map(one).collect::<Vec<_>>())
        };
        let workers: Vec<_> = (0..THREADS).map(worker).collect();
        workers
            .into_iter()
            .flat_map(|worker| worker.join().unwrap_or_else(|_| vec![Err(anyhow::anyhow!("panic"))]))
            .collect()
    });
    for list in found {
        for (index, ok) in list? {
            made[index] = ok;
        }
    }
    Ok(made)
}

/// The access records of both nodes: the source's by client and dialled address, the destination's by client and
/// application.
struct Records(BTreeMap<(&'static str, String, String), Vec<Value>>);

impl Records {
    /// Those that were written after the first `before` bytes of each node's log.
    fn read(lab: &Lab, before: [usize; 2]) -> Self {
        let mut all: BTreeMap<_, Vec<Value>> = BTreeMap::new();
        for (node, before) in NODES.into_iter().zip(before) {
            for line in scenario::json_lines(lab.log(node).as_bytes().get(before..).unwrap_or_default()) {
                let record = if line["fields"].is_object() { &line["fields"] } else { &line };
                let text = |key: &str| record[key].as_str().unwrap_or_default().to_owned();
                let client = text("src.addr").rsplit_once(':').map(|(ip, _)| ip.trim_matches(['[', ']']).to_owned());
                let (Some(client), Some(direction)) = (client, record["direction"].as_str()) else { continue };
                let key = match (direction, text("dst.hbone_addr")) {
                    ("outbound", _) => ("outbound", client, text("dst.addr")),
                    (_, tunnelled) if !tunnelled.is_empty() => ("inbound", client, tunnelled),
                    _ => ("inbound", client, text("dst.addr")),
                };
                all.entry(key).or_default().push(record.clone());
            }
        }
        Self(all)
    }

    fn of(&self, direction: &'static str, cell: &Cell) -> &[Value] {
        let address = if direction == "outbound" { &cell.dialled } else { &cell.application };
        self.0.get(&(direction, cell.source.clone(), address.clone())).map_or(&[], Vec::as_slice)
    }
}

/// What a record says. It names the policy of a refusal only.
fn recorded(record: &Value) -> Said {
    let text = |key: &str| record[key].as_str().unwrap_or_default().to_owned();
    Said { code: text("code"), policy: text("policy"), rule: record["rule"].as_u64(), dry_run: text("dry_run") }
}

/// What explain says: of the source if it refuses, else of the only endpoint's destination.
fn explained(answer: &Value) -> (bool, Said) {
    let of = |value: &Value| {
        let text = |key: &str| value[key].as_str().unwrap_or_default().to_owned();
        let code = Some(text("code")).filter(|code| code != "OK").unwrap_or_default();
        let dry_run = value["dryRun"].as_array().and_then(|list| list.first()?.as_str()).unwrap_or_default();
        Said { code, policy: text("policy"), rule: value["rule"].as_u64(), dry_run: dry_run.into() }
    };
    let endpoint = &answer["endpoints"][0];
    if answer["verdict"] == "refused" || endpoint.is_null() {
        (true, of(&answer["outbound"]))
    } else if endpoint["egress"]["allowed"] == false {
        (true, of(&endpoint["egress"]))
    } else {
        (false, of(&endpoint["inbound"]))
    }
}

fn explain(lab: &Lab, cell: &Cell) -> anyhow::Result<Value> {
    let from = if cell.client == Client::World { cell.source.as_str() } else { cell.client.place() };
    let family = if cell.v6 { "v6" } else { "v4" };
    let transport = if cell.udp { "udp" } else { "tcp" };
    let to = cell.target.replace('[', "%5B").replace(']', "%5D");
    lab.control_get(&format!("/debug/explain?from={from}&to={to}&transport={transport}&family={family}"))
}

/// Everything that is wrong with a cell.
fn judge(cell: &Cell, round: Round, made: bool, answer: &Value, records: &Records) -> Vec<String> {
    let mut wrong = Vec::new();
    let Expected { at_source, said: wanted } = expected(cell, round);
    let passes = wanted.code.is_empty();
    if made != passes {
        wrong.push(format!("traffic: expected {passes}, found {made}"));
    }
    let verdict = match (passes, cell.to) {
        (true, Destination::External(..)) => "plain",
        (true, _) => "allowed",
        (false, Destination::External(..)) => "refused",
        (false, _) if at_source && cell.udp => "refused",
        (false, _) => "denied",
    };
    if answer["verdict"] != verdict {
        wrong.push(format!("explain: expected {verdict}, found {}", answer["verdict"]));
    }
    let (said_at_source, said) = explained(answer);
    // Where nobody refuses, there is no one place that decides.
    if said != wanted || (!passes && said_at_source != at_source) {
        wrong.push(format!(
            "explain: expected {wanted:?} (source {at_source}), found {said:?} (source {said_at_source})"
        ));
    }
    if let Some(server) = cell.to.server().filter(|_| verdict != "refused") {
        let route = (&answer["endpoints"][0]["pod"], answer["endpoints"].as_array().map(Vec::len));
        let pod = format!("{}/{}", server.mode, server.pod());
        if *route.0 != pod.as_str() || route.1 != Some(1) {
            wrong.push(format!("explain: expected the route to {pod}, found {route:?}"));
        }
    }
    if cell.udp {
        return wrong;
    }
    // The mesh's own records: one at the source if it is enrolled, one at the destination if it came that far.
    let in_record = Said {
        policy: if passes { String::new() } else { wanted.policy.clone() },
        rule: wanted.rule.filter(|_| !passes),
        ..wanted.clone()
    };
    let arrives = cell.to.server().is_some() && (passes || !at_source);
    // A name that no rule allows does not exist for a closed pod, so nothing is dialled.
    let unknown = cell.client == Client::Held && matches!(cell.to, Destination::External(_, By::Name));
    for (direction, there) in [("outbound", cell.client.in_mesh() && !unknown), ("inbound", arrives)] {
        let found = records.of(direction, cell);
        let mut wanted = in_record.clone();
        if direction == "outbound" {
            // What is only tried stays at the destination.
            wanted.dry_run.clear();
        }
        match found {
            [one] if there => {
                let said = recorded(one);
                if said != wanted {
                    wrong.push(format!("{direction} record: expected {wanted:?}, found {said:?}"));
                }
                wrong.extend(route(cell, direction, one, answer));
            }
            [] if !there => {}
            other => wrong.push(format!("{direction} records: expected {}, found {}", u8::from(there), other.len())),
        }
    }
    wrong
}

/// The record names the endpoint and the service that explain names.
fn route(cell: &Cell, direction: &str, record: &Value, answer: &Value) -> Option<String> {
    let server = cell.to.server()?;
    let pod =
        format!("{}/{}", record["dst.namespace"].as_str().unwrap_or(""), record["dst.workload"].as_str().unwrap_or(""));
    let service = record["dst.service"].as_str().unwrap_or_default();
    let named = answer["to"]["service"].as_str().unwrap_or_default();
    let wanted = matches!(cell.to, Destination::Service(_)) && cell.client.in_mesh();
    let same_service = if wanted { !service.is_empty() && named.ends_with(service) } else { service.is_empty() };
    // A refusal at the source may name no endpoint yet.
    let same_pod = pod == format!("{}/{}", server.mode, server.pod());
    (!same_pod || !same_service)
        .then(|| format!("{direction} record: it went to {pod} of service {service:?}, explain says {named:?}"))
}

#[test]
fn traffic_explain_and_the_records_of_both_nodes_agree_on_every_cell() -> anyhow::Result<()> {
    let config = LabConfig::of(&world()).env("ztunnel", "LOG_FORMAT", "json");
    let Some(lab) = scenario::lab(config) else { return Ok(()) };
    let view = lab.view()?;
    let near = address(&view, "out", "near", false)?;
    let shut = format!(
        "{{podSelector: {{matchLabels: {{app: shut}}}}, policyTypes: [Egress], egress: [\
         {{to: [{{namespaceSelector: {{}}, podSelector: {{matchLabels: {{network: open}}}}}}]}}, \
         {{to: [{{ipBlock: {{cidr: {near}/32}}}}]}}, {{ports: [{{protocol: UDP, port: 53}}]}}]}}"
    );
    lab.apply_yaml(&scenario::network_policy("clients", "shut", &shut))?;
    let cells = cells(&view)?;
    let mut wrong = Vec::new();
    let mut before = [0; 2];
    for (index, round) in ROUNDS.into_iter().enumerate() {
        if index > 0 {
            lab.apply_yaml(&policies(round))?;
        }
        for text in play(&lab, &cells, round, before)? {
            wrong.push(format!("round {}: {text}", index + 1));
        }
        before = NODES.map(|node| lab.log(node).len());
    }
    eprintln!("{} cells in {} rounds", cells.len(), ROUNDS.len());
    assert!(wrong.is_empty(), "{} wrong of {} cells:\n{}", wrong.len(), cells.len(), wrong.join("\n"));
    Ok(())
}

/// All cells under the policies of a round; what is wrong with them.
fn play(lab: &Lab, cells: &[Cell], round: Round, before: [usize; 2]) -> anyhow::Result<Vec<String>> {
    let passes = |cell: &Cell| expected(cell, round).said.code.is_empty();
    // What is not TCP is filtered by rules that follow a moment later.
    let changing = |cell: &&Cell| {
        let from_one = cell.to.server().is_some_and(|server| server.network == "fromweb");
        cell.udp && !cell.v6 && from_one && matches!(cell.client, Client::Web | Client::Other | Client::Shut)
    };
    let last: Vec<Cell> = cells.iter().filter(changing).cloned().collect();
    eventually("datagrams are filtered", scenario::PATIENCE, || {
        let made = traffic(lab, &last).map_err(|error| error.to_string())?;
        let wrong = last.iter().zip(made).filter(|(cell, made)| passes(cell) != *made).count();
        if wrong == 0 { Ok(()) } else { Err(format!("{wrong} of {} cells are not as they shall be", last.len())) }
    })?;
    let made = traffic(lab, cells)?;
    let complete = || {
        let records = Records::read(lab, before);
        let missing =
            cells.iter().filter(|cell| !cell.udp && cell.client.in_mesh() && records.of("outbound", cell).is_empty());
        match missing.count() {
            0 => Ok(records),
            missing => Err(format!("{missing} are missing")),
        }
    };
    let records = eventually("every connection has its record", Duration::from_secs(10), complete);
    let records = records.unwrap_or_else(|_| Records::read(lab, before));
    let mut wrong = Vec::new();
    for (cell, made) in cells.iter().zip(made) {
        let answer = explain(lab, cell)?;
        for text in judge(cell, round, made, &answer, &records) {
            let Cell { client, to, v6, udp, .. } = cell;
            wrong.push(format!("{client:?} to {to:?}, v6 {v6}, udp {udp}: {text}"));
        }
    }
    Ok(wrong)
}
