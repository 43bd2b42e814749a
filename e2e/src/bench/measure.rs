//! Running one load in the lab: the generator in the client's pod, the proxies' CPU over exactly its measured part, and
//! the counters that prove what it did.
//!
//! Counters are read before the generator starts and after it has closed everything, so that whole connections are
//! compared with whole connections. Limits: two nodes for each mesh, clients on the first and servers on the second.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::Path;
use std::time::Duration;
use std::time::Instant;

use anyhow::Context;
use tulle_proto::names;

use crate::bench::DIRECT;
use crate::bench::PEER;
use crate::bench::TULLE;
use crate::bench::generator::Generator;
use crate::bench::machine;
use crate::bench::machine::Sample;
use crate::bench::proof;
use crate::bench::proof::Counted;
use crate::bench::proof::LogTail;
use crate::bench::rows::Run;
use crate::bench::rows::Test;
use crate::bench::work::Order;
use crate::bench::work::Probed;
use crate::bench::work::Totals;
use crate::bench::work::Work;
use crate::bench::world;
use crate::bench::world::Mesh;
use crate::eventually::eventually;
use crate::lab::Lab;
use crate::lab::LabConfig;
use crate::lab::Running;
use crate::scenario;
use crate::sniff::Sniffed;
use crate::state::PodView;
use crate::state::View;

/// Records are written after the connection has ended, by another thread; on a busy machine that takes a while.
pub(super) const RECORDS: Duration = Duration::from_secs(5);
/// After opening idle connections, before memory is read: what grew for the moment may shrink.
const SETTLE: Duration = Duration::from_millis(1500);
/// After closing them: allocators that give memory back take their time, some seconds usually.
pub(super) const AFTER_CLOSE: Duration = Duration::from_secs(10);
/// Workers of each proxy.
pub(super) const WORKERS: &str = "2";
/// Requests by the clock for a proof, milliseconds.
pub(super) const PROOF_PACED_MS: u64 = 300;
/// Bounded work for a proof ends by its limit, long before this.
pub(super) const PROOF_MS: u64 = 5000;

/// The proxies finish a cold connection's books after its answer; that is part of its cost.
const AFTERMATH: Duration = Duration::from_millis(100);

/// The lab and where its parts are.
pub(super) struct Bench {
    lab: Lab,
    marker: String,
    sides: Vec<Side>,
    cold_clients: usize,
}

/// Where the parts of a variant are.
struct Side {
    variant: &'static str,
    /// None: no mesh.
    mesh: Option<Mesh>,
    namespace: &'static str,
    /// Proxies of the client's and the server's node; without a mesh those of the first two nodes, to watch them idle.
    proxies: [u32; 2],
    server: u32,
    to: IpAddr,
    /// The cold servers.
    others: Vec<IpAddr>,
}

impl Side {
    fn of(view: &View, variant: &'static str, mesh: Option<Mesh>) -> anyhow::Result<Self> {
        let namespace = mesh.map_or(world::PLAIN, |mesh| mesh.namespace);
        let proxy = |node: u16| {
            let node = view.nodes.iter().find(|it| it.name == format!("node-{node}"));
            node.and_then(|node| node.pid).context("a node without a proxy")
        };
        let address = |pod: &PodView| -> anyhow::Result<IpAddr> {
            Ok(pod.addresses.first().with_context(|| format!("{} has no address", pod.name))?.parse()?)
        };
        let server = view.pod(namespace, "server").context("no server")?;
        let [near, far] = mesh.map_or(world::OURS.nodes, |mesh| mesh.nodes);
        let others = (0..world::COLD_SERVERS).filter_map(|index| view.pod(namespace, &world::cold_server(index)));
        Ok(Self {
            variant,
            mesh,
            namespace,
            proxies: [proxy(near)?, proxy(far)?],
            server: server.pids.values().next().copied().context("the server does not run")?,
            to: address(server)?,
            others: others.map(address).collect::<anyhow::Result<_>>()?,
        })
    }

    /// The names of the nodes and how each reports.
    fn nodes(&self) -> [(String, &'static str); 2] {
        let [near, far] = self.mesh.unwrap_or(world::OURS).nodes;
        [(format!("node-{near}"), "source"), (format!("node-{far}"), "destination")]
    }

    fn principal(&self, account: &str) -> String {
        self.mesh.map(|mesh| mesh.principal(account)).unwrap_or_default()
    }
}

/// A run with what was found wrong with it.
pub(super) struct Outcome {
    /// Figures come of this.
    pub(super) run: Run,
    /// Empty: proven.
    pub(super) wrong: Vec<String>,
    /// Share of the processors that other processes used.
    pub(super) others: f64,
}

/// What the proofs have seen in all.
#[derive(Debug, Default)]
pub(super) struct Proved {
    plain_seen: u64,
    /// Captured parts and encrypted bytes of each mesh.
    meshes: BTreeMap<&'static str, (u64, u64)>,
}

/// A client that is to be refused.
pub(super) struct Denied {
    variant: &'static str,
    running: Running,
    began: Instant,
    log: LogTail,
}

impl Bench {
    /// Starts the lab; it ends with this value. With `peer` there are two more nodes, whose proxies it is.
    pub(super) fn start(bin_dir: &Path, peer: Option<&Path>, cold_clients: usize) -> anyhow::Result<Self> {
        let marker = scenario::marker();
        let mut variants = vec![(DIRECT, None), (TULLE, Some(world::OURS))];
        variants.extend(peer.map(|_| (PEER, Some(world::THEIRS))));
        let meshes: Vec<Mesh> = variants.iter().filter_map(|(_, mesh)| *mesh).collect();
        let mut config = LabConfig::of(&world::objects(&marker, &meshes, cold_clients));
        config.bin_dir = Some(bin_dir.to_path_buf());
        // The same for both: their own ways to a default differ.
        for (name, value) in [("ZTUNNEL_WORKER_THREADS", WORKERS), ("RUST_LOG", "info")] {
            config = config.env("ztunnel", name, value);
        }
        for node in peer.iter().flat_map(|_| world::THEIRS.nodes) {
            config = as_peer(config, node, peer);
        }
        let lab = Lab::up(config)?;
        let view = lab.view()?;
        let sides = variants.into_iter().map(|(variant, mesh)| Side::of(&view, variant, mesh));
        let sides = sides.collect::<anyhow::Result<_>>()?;
        Ok(Self { lab, marker, sides, cold_clients })
    }

    fn side(&self, variant: &str) -> anyhow::Result<&Side> {
        self.sides.iter().find(|side| side.variant == variant).with_context(|| format!("there is no {variant}"))
    }

    /// One load with its figures, and what is wrong with it.
    pub(super) fn run(
        &self,
        variant: &str,
        work: &Work,
        round: usize,
        (warm_ms, run_ms): (u64, u64),
    ) -> anyhow::Result<Outcome> {
        let side = self.side(variant)?;
        let limit = match work {
            Work::Cold { .. } => Some(side.others.len() as u64),
            _ => None,
        };
        self.run_order(side, &client_of(work, round), &self.order(side, work, warm_ms, run_ms, limit))
    }

    fn order(&self, side: &Side, work: &Work, warm_ms: u64, run_ms: u64, limit: Option<u64>) -> Order {
        let others = match work {
            Work::Cold { .. } => side.others.clone(),
            _ => Vec::new(),
        };
        Order { others, ..Order::to(side.to, work, (warm_ms, run_ms), limit, &self.marker) }
    }

    fn run_order(&self, side: &Side, client: &str, order: &Order) -> anyhow::Result<Outcome> {
        let mut counters = match side.mesh {
            Some(_) => Some(Counters::begin(self, side)?),
            None => None,
        };
        let cold = matches!(order.work, Work::Cold { .. });
        let mut generator = Generator::start(&self.lab, &format!("{}/{client}", side.namespace), order)?;
        generator.expect_begin()?;
        let before = sample(side, generator.pid)?;
        if cold {
            generator.go()?;
        }
        let measured = generator.expect_end()?;
        if cold {
            std::thread::sleep(AFTERMATH);
        }
        let after = sample(side, generator.pid)?;
        let totals = generator.expect_gone()?;
        let mut wrong = proof::of_totals(&totals);
        if let Some(counters) = &mut counters {
            wrong.extend(counters.judge(self, side, &totals)?);
        }
        let (used, others) = before.until(&after);
        Ok(Outcome { run: Run { measured, cpu: side.mesh.map(|_| used) }, wrong, others })
    }

    /// A bounded part of the load again, with the node link captured.
    pub(super) fn prove(&self, variant: &str, test: &Test, proved: &mut Proved) -> anyhow::Result<Vec<String>> {
        let side = self.side(variant)?;
        let (run_ms, limit) = match &test.work {
            Work::Paced { beside_upload: true, .. } => (PROOF_PACED_MS, Some(test.proof_limit)),
            Work::Paced { .. } | Work::PacedConnects { .. } => (PROOF_PACED_MS, None),
            _ => (PROOF_MS, Some(test.proof_limit)),
        };
        let order = self.order(side, &test.work, 0, run_ms, limit);
        // Its servers are cold to the last of the clients still.
        let (totals, seen) = self.captured(side, &client_of(&test.work, self.cold_clients - 1), &order)?;
        if side.mesh.is_none() {
            // The capture sees plain payload where there is some, or its silence elsewhere proves nothing.
            proved.plain_seen += u64::from(seen.markers.values().any(|count| *count > 0));
            return Ok(Vec::new());
        }
        let (runs, encrypted) = proved.meshes.entry(side.variant).or_default();
        *runs += 1;
        *encrypted += seen.tls.encrypted_bytes;
        let mut wrong = proof::of_totals(&totals);
        wrong.extend(proof::of_capture(&totals, &seen));
        if matches!(test.work, Work::Cold { .. }) && seen.tls.server_hellos_13 < totals.connections {
            let hellos = seen.tls.server_hellos_13;
            wrong.push(format!("{} cold connections began with only {hellos} handshakes", totals.connections));
        }
        Ok(wrong)
    }

    /// The first connection of all, captured from the first byte of its tunnel on: later parts ride on open tunnels,
    /// so only here a handshake must be seen. Besides what is proven: the cipher suite that was agreed on.
    pub(super) fn first_contact(&self, variant: &str) -> anyhow::Result<(String, String)> {
        let side = self.side(variant)?;
        let order = self.order(side, &Work::Requests { connections: 1 }, 0, PROOF_MS, Some(1));
        let (totals, seen) = self.captured(side, "client", &order)?;
        let mut wrong = proof::of_totals(&totals);
        wrong.extend(proof::of_capture(&totals, &seen));
        if seen.tls.client_hellos == 0 || seen.tls.server_hellos_13 == 0 {
            wrong.push("no TLS 1.3 handshake was seen on the node link".to_owned());
        }
        anyhow::ensure!(wrong.is_empty(), "the first connection: {}", wrong.join("; "));
        let agreed = |names: &BTreeMap<String, u64>| names.keys().cloned().collect::<Vec<_>>().join(", ");
        let (suite, group) = (agreed(&seen.tls.suites), agreed(&seen.tls.groups));
        let line = format!(
            "{variant}: the first connection began with a TLS 1.3 handshake ({} seen), suite {suite}, key exchange {group}",
            seen.tls.server_hellos_13
        );
        Ok((line, suite))
    }

    fn captured(&self, side: &Side, client: &str, order: &Order) -> anyhow::Result<(Totals, Sniffed)> {
        let sniffer = self.lab.sniff(&side.nodes()[1].0, &[&self.marker])?;
        let mut generator = Generator::start(&self.lab, &format!("{}/{client}", side.namespace), order)?;
        generator.expect_begin()?;
        if matches!(order.work, Work::Cold { .. }) {
            generator.go()?;
        }
        generator.expect_end()?;
        let totals = generator.expect_gone()?;
        Ok((totals, sniffer.finish()?))
    }

    /// What the captures of all rows prove together.
    pub(super) fn judge(&self, proved: &Proved) -> anyhow::Result<Vec<String>> {
        anyhow::ensure!(
            proved.plain_seen > 0,
            "the capture never saw the payload of the direct variant, so it proves nothing"
        );
        let line = |(variant, (runs, encrypted)): (&&str, &(u64, u64))| {
            format!(
                "{variant}: {runs} captured parts, one for each load, carried {} MB in TLS records on port 15008 and \
                 no other TCP of the pods; the same capture found the payload in each of {} parts of the direct variant",
                encrypted / 1_000_000,
                proved.plain_seen,
            )
        };
        Ok(proved.meshes.iter().map(line).collect())
    }

    /// That the server's proxy holds every policy.
    pub(super) fn check_policies(&self, variant: &str) -> anyhow::Result<String> {
        let side = self.side(variant)?;
        let dump = self.lab.node_admin(&side.nodes()[1].0, "/config_dump")?;
        let policies = dump["policies"].as_array().cloned().unwrap_or_default();
        let count = policies.iter().filter(|policy| proof::is_of_namespace(policy, side.namespace)).count();
        anyhow::ensure!(count == world::POLICIES, "the server's proxy holds {count} of {} policies", world::POLICIES);
        Ok(format!("{variant}: {count} policies select the server and are held by its proxy"))
    }

    /// Starts the client that must be refused.
    pub(super) fn start_denied(&self, variant: &str) -> anyhow::Result<Denied> {
        let side = self.side(variant)?;
        let log = LogTail::at_end(self.lab.paths().log(&side.nodes()[1].0))?;
        let (place, to) = (format!("{}/denied", side.namespace), side.to.to_string());
        let running = self.lab.spawn(&place, &["lab", "bench-agent", "probe", "--to", &to])?;
        Ok(Denied { variant: side.variant, running, began: Instant::now(), log })
    }

    /// Ends it; an error if it ever got an answer, or was not refused by its policy.
    pub(super) fn finish_denied(&self, mut denied: Denied) -> anyhow::Result<String> {
        let side = self.side(denied.variant)?;
        let policy = side.mesh.map(Mesh::denying).unwrap_or_default();
        let seconds = denied.began.elapsed().as_secs_f64();
        let output = denied.running.finish()?;
        let probed: Probed = serde_json::from_slice(&output.stdout).context("the denied client said nothing")?;
        // The last record may still be on its way.
        std::thread::sleep(Duration::from_millis(300));
        let refusals = denied.log.count(&[&policy, &side.principal("denied")])?;
        let wrong = proof::of_denied(&probed, seconds, refusals);
        anyhow::ensure!(wrong.is_empty(), "{}", wrong.join("; "));
        Ok(format!(
            "{}: {} connections of a denied client, one a second, were refused by {policy}",
            denied.variant, probed.attempts,
        ))
    }

    /// Resident memory of both proxies, bytes.
    pub(super) fn resident(&self, variant: &str) -> anyhow::Result<[u64; 2]> {
        let [near, far] = self.side(variant)?.proxies;
        Ok([machine::resident(near)?, machine::resident(far)?])
    }

    /// The same with so many idle connections, and what is wrong with them.
    pub(super) fn hold(&self, variant: &str, connections: usize) -> anyhow::Result<([u64; 2], Vec<String>)> {
        let side = self.side(variant)?;
        let mut counters = Counters::begin(self, side)?;
        let order = self.order(side, &Work::Hold { connections }, 0, 0, None);
        let mut generator = Generator::start(&self.lab, &format!("{}/client", side.namespace), &order)?;
        generator.expect_begin()?;
        std::thread::sleep(SETTLE);
        let resident = self.resident(variant)?;
        generator.close_input();
        generator.expect_end()?;
        let totals = generator.expect_gone()?;
        let mut wrong = proof::of_totals(&totals);
        wrong.extend(counters.judge(self, side, &totals)?);
        Ok((resident, wrong))
    }

    /// Connections and bytes that a node's metrics count between the client and the server.
    fn metrics(&self, side: &Side, index: usize) -> anyhow::Result<Counted> {
        let (node, reporter) = &side.nodes()[index];
        let (status, text) = self.lab.get(node, names::PORT_METRICS, "/metrics")?;
        anyhow::ensure!(status == 200, "{node} answers {status} for its metrics");
        let labels = [
            format!("reporter=\"{reporter}\""),
            format!("source_principal=\"spiffe://{}\"", side.principal("client")),
            format!("destination_principal=\"spiffe://{}\"", side.principal("server")),
            "connection_security_policy=\"mutual_tls\"".to_owned(),
        ];
        let labels: Vec<&str> = labels.iter().map(String::as_str).collect();
        let sum = |metric: &str| proof::metric_sum(&text, metric, &labels);
        Ok(Counted {
            records: 0,
            connections: sum("istio_tcp_connections_closed_total"),
            bytes: sum("istio_tcp_received_bytes_total") + sum("istio_tcp_sent_bytes_total"),
        })
    }
}

/// The same lab with a peer as the proxy of a node.
pub(super) fn as_peer(mut config: LabConfig, node: u16, peer: Option<&Path>) -> LabConfig {
    let name = format!("node-{node}");
    config.nodes = config.nodes.max(node);
    config.programs.extend(peer.map(|peer| (name.clone(), peer.to_path_buf())));
    // Ours has no name server in the pods either.
    config = config.env(&name, "ISTIO_META_DNS_CAPTURE", "false");
    config.handed.insert(name);
    config
}

/// The pod from which a load comes: each round has a client of its own to whom the cold servers are still cold.
fn client_of(work: &Work, round: usize) -> String {
    match work {
        Work::Cold { .. } => world::cold_client(round),
        _ => "client".to_owned(),
    }
}

fn sample(side: &Side, generator: u32) -> anyhow::Result<Sample> {
    let [near, far] = side.proxies;
    Sample::take([&[near], &[far]], &[generator, side.server])
}

/// Counters of both proxies and of the link, from a moment on.
struct Counters {
    logs: [LogTail; 2],
    metrics: [Counted; 2],
    link: u64,
}

impl Counters {
    fn begin(bench: &Bench, side: &Side) -> anyhow::Result<Self> {
        let [near, far] = side.nodes();
        let log = |node: &str| LogTail::at_end(bench.lab.paths().log(node));
        Ok(Self {
            logs: [log(&near.0)?, log(&far.0)?],
            metrics: [bench.metrics(side, 0)?, bench.metrics(side, 1)?],
            link: machine::link_bytes(side.proxies[1], "eth0")?,
        })
    }

    /// What is wrong, once every record had time to be written.
    fn judge(&mut self, bench: &Bench, side: &Side, totals: &Totals) -> anyhow::Result<Vec<String>> {
        let identities = [side.principal("client"), side.principal("server")];
        let words = [identities[0].as_str(), identities[1].as_str()];
        let mut counted = [Counted::default(); 2];
        let complete = eventually("records of every connection", RECORDS, || -> Result<(), anyhow::Error> {
            for (index, counted) in counted.iter_mut().enumerate() {
                counted.records += self.logs[index].count(&words)?;
                let now = bench.metrics(side, index)?;
                counted.connections = now.connections.saturating_sub(self.metrics[index].connections);
                counted.bytes = now.bytes.saturating_sub(self.metrics[index].bytes);
            }
            let missing = counted.iter().any(|it| it.records.min(it.connections) < totals.connections);
            anyhow::ensure!(!missing, "some are missing");
            Ok(())
        });
        // What is missing is said with numbers below.
        drop(complete);
        let link = machine::link_bytes(side.proxies[1], "eth0")? - self.link;
        Ok(proof::of_counts(totals, counted, link))
    }
}
