//! Running one load in the lab: the generator in the client's pod, the proxies' CPU over exactly its measured part, and
//! the counters that prove what it did.
//!
//! Counters are read before the generator starts and after it has closed everything, so that whole connections are
//! compared with whole connections. Limits: two nodes, the client on the first and the server on the second.

use std::io::BufRead;
use std::io::BufReader;
use std::net::IpAddr;
use std::path::Path;
use std::process::ChildStdout;
use std::time::Duration;
use std::time::Instant;

use anyhow::Context;
use tulle_proto::names;

use crate::bench::DIRECT;
use crate::bench::machine;
use crate::bench::proof;
use crate::bench::proof::Counted;
use crate::bench::proof::LogTail;
use crate::bench::rows::Run;
use crate::bench::rows::Test;
use crate::bench::work::Line;
use crate::bench::work::Measured;
use crate::bench::work::Order;
use crate::bench::work::Probed;
use crate::bench::work::Totals;
use crate::bench::work::Work;
use crate::bench::world;
use crate::eventually::eventually;
use crate::lab::Lab;
use crate::lab::LabConfig;
use crate::lab::Running;
use crate::scenario;
use crate::sniff::Sniffed;

/// Records are written after the connection has ended, by another thread; on a busy machine that takes a while.
const RECORDS: Duration = Duration::from_secs(5);
/// After opening idle connections, before memory is read: what grew for the moment may shrink.
const SETTLE: Duration = Duration::from_millis(1500);
/// After closing them.
pub(super) const AFTER_CLOSE: Duration = Duration::from_millis(1500);
/// Requests by the clock for a proof, milliseconds.
const PROOF_PACED_MS: u64 = 300;
/// Bounded work for a proof ends by its limit, long before this.
const PROOF_MS: u64 = 5000;

/// The lab and where its parts are.
pub(super) struct Bench {
    lab: Lab,
    marker: String,
    proxies: [u32; 2],
    servers: [u32; 2],
    addresses: [IpAddr; 2],
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
    encrypted: u64,
    plain_seen: u64,
    mesh_runs: u64,
}

/// A client that is to be refused.
pub(super) struct Denied {
    running: Running,
    began: Instant,
    log: LogTail,
}

#[derive(Clone, Copy)]
struct Sample {
    at: Instant,
    proxies: [f64; 2],
    own: f64,
    busy: f64,
}

impl Bench {
    /// Starts the lab; it ends with this value.
    pub(super) fn start(bin_dir: Option<&Path>) -> anyhow::Result<Self> {
        let marker = scenario::marker();
        let mut config = LabConfig::of(&world::objects(&marker));
        config.bin_dir = bin_dir.map(Path::to_path_buf);
        let lab = Lab::up(config)?;
        let view = lab.view()?;
        let proxy = |index: usize| view.nodes.get(index).and_then(|node| node.pid).context("a node without a proxy");
        let proxies = [proxy(0)?, proxy(1)?];
        let server = |namespace: &str| -> anyhow::Result<(u32, IpAddr)> {
            let pod = view.pod(namespace, "server").context("no server")?;
            let pid = pod.pids.values().next().copied().context("the server does not run")?;
            Ok((pid, pod.addresses.first().context("the server has no address")?.parse()?))
        };
        let (plain, mesh) = (server(world::PLAIN)?, server(world::MESH)?);
        Ok(Self { lab, marker, proxies, servers: [plain.0, mesh.0], addresses: [plain.1, mesh.1] })
    }

    fn place(variant: &str) -> (usize, String) {
        let (index, namespace) = if variant == DIRECT { (0, world::PLAIN) } else { (1, world::MESH) };
        (index, format!("{namespace}/client"))
    }

    /// One load with its figures, and what is wrong with it.
    pub(super) fn run(&self, variant: &str, work: &Work, warm_ms: u64, run_ms: u64) -> anyhow::Result<Outcome> {
        self.run_order(variant, &self.order(variant, work, warm_ms, run_ms, None))
    }

    fn order(&self, variant: &str, work: &Work, warm_ms: u64, run_ms: u64, limit: Option<u64>) -> Order {
        let to = self.addresses[Self::place(variant).0];
        Order { to, work: work.clone(), warm_ms, run_ms, limit, marker: self.marker.clone() }
    }

    fn run_order(&self, variant: &str, order: &Order) -> anyhow::Result<Outcome> {
        let mesh = variant != DIRECT;
        let mut counters = if mesh { Some(Counters::begin(self)?) } else { None };
        let mut generator = Generator::start(&self.lab, &Self::place(variant).1, order)?;
        generator.expect_begin()?;
        let before = self.sample(variant, generator.pid)?;
        let measured = generator.expect_end()?;
        let after = self.sample(variant, generator.pid)?;
        let totals = generator.expect_gone()?;
        let mut wrong = proof::of_totals(&totals);
        if let Some(counters) = &mut counters {
            wrong.extend(counters.judge(self, &totals)?);
        }
        let used = [0, 1].map(|side| after.proxies[side] - before.proxies[side]);
        let span = (after.at - before.at).as_secs_f64();
        let ours = used.iter().sum::<f64>() + after.own - before.own;
        let cpus = std::thread::available_parallelism().map_or(1, usize::from) as f64;
        let others = ((after.busy - before.busy - ours) / (span * cpus)).clamp(0.0, 1.0);
        Ok(Outcome { run: Run { measured, cpu: mesh.then_some(used) }, wrong, others })
    }

    fn sample(&self, variant: &str, generator: u32) -> anyhow::Result<Sample> {
        let server = self.servers[Self::place(variant).0];
        Ok(Sample {
            at: Instant::now(),
            proxies: [machine::cpu_seconds(self.proxies[0])?, machine::cpu_seconds(self.proxies[1])?],
            own: machine::cpu_seconds(generator)? + machine::cpu_seconds(server)?,
            busy: machine::busy_seconds()?,
        })
    }

    /// A bounded part of the load again, with the node link captured.
    pub(super) fn prove(&self, variant: &str, test: &Test, proved: &mut Proved) -> anyhow::Result<Vec<String>> {
        let (run_ms, limit) = match &test.work {
            Work::Paced { beside_upload: true, .. } => (PROOF_PACED_MS, Some(test.proof_limit)),
            Work::Paced { .. } | Work::PacedConnects { .. } => (PROOF_PACED_MS, None),
            _ => (PROOF_MS, Some(test.proof_limit)),
        };
        let order = self.order(variant, &test.work, 0, run_ms, limit);
        let (totals, seen) = self.captured(variant, &order)?;
        if variant == DIRECT {
            // The capture sees plain payload where there is some, or its silence elsewhere proves nothing.
            proved.plain_seen += u64::from(seen.markers.values().any(|count| *count > 0));
            return Ok(Vec::new());
        }
        proved.mesh_runs += 1;
        proved.encrypted += seen.tls.encrypted_bytes;
        let mut wrong = proof::of_totals(&totals);
        wrong.extend(proof::of_capture(&totals, &seen));
        Ok(wrong)
    }

    /// The first connection of all, captured from the first byte of its tunnel on: later parts ride on open tunnels,
    /// so only here a handshake must be seen.
    pub(super) fn first_contact(&self, variant: &str) -> anyhow::Result<Vec<String>> {
        let order = self.order(variant, &Work::Requests { connections: 1 }, 0, PROOF_MS, Some(1));
        let (totals, seen) = self.captured(variant, &order)?;
        let mut wrong = proof::of_totals(&totals);
        wrong.extend(proof::of_capture(&totals, &seen));
        if seen.tls.client_hellos == 0 || seen.tls.server_hellos_13 == 0 {
            wrong.push("no TLS 1.3 handshake was seen on the node link".to_owned());
        }
        anyhow::ensure!(wrong.is_empty(), "the first connection: {}", wrong.join("; "));
        Ok(vec![format!("the first connection began with a TLS 1.3 handshake ({} seen)", seen.tls.server_hellos_13)])
    }

    fn captured(&self, variant: &str, order: &Order) -> anyhow::Result<(Totals, Sniffed)> {
        let sniffer = self.lab.sniff("node-2", &[&self.marker])?;
        let mut generator = Generator::start(&self.lab, &Self::place(variant).1, order)?;
        generator.expect_begin()?;
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
        Ok(vec![format!(
            "{} captured parts, one for each load, carried {} MB in TLS records on port 15008 and no other TCP of the \
             pods; the same capture found the payload in each of {} parts of the direct variant",
            proved.mesh_runs,
            proved.encrypted / 1_000_000,
            proved.plain_seen,
        )])
    }

    /// That the server's proxy holds every policy.
    pub(super) fn check_policies(&self) -> anyhow::Result<String> {
        let dump = self.lab.node_admin("node-2", "/config_dump")?;
        let policies = dump["policies"].as_array().cloned().unwrap_or_default();
        let ours = format!("{}/", world::MESH);
        let count = policies.iter().filter(|policy| policy["name"].as_str().is_some_and(|it| it.starts_with(&ours)));
        let count = count.count();
        anyhow::ensure!(count == world::POLICIES, "the server's proxy holds {count} of {} policies", world::POLICIES);
        Ok(format!("{count} policies select the server and are held by its proxy"))
    }

    /// Starts the client that must be refused.
    pub(super) fn start_denied(&self) -> anyhow::Result<Denied> {
        let log = LogTail::at_end(self.lab.paths().log("node-2"))?;
        let to = self.addresses[1].to_string();
        let running =
            self.lab.spawn(&format!("{}/denied", world::MESH), &["lab", "bench-agent", "probe", "--to", &to])?;
        Ok(Denied { running, began: Instant::now(), log })
    }

    /// Ends it; an error if it ever got an answer, or was not refused by its policy.
    pub(super) fn finish_denied(&self, mut denied: Denied) -> anyhow::Result<Vec<String>> {
        let seconds = denied.began.elapsed().as_secs_f64();
        let output = denied.running.finish()?;
        let probed: Probed = serde_json::from_slice(&output.stdout).context("the denied client said nothing")?;
        // The last record may still be on its way.
        std::thread::sleep(Duration::from_millis(300));
        let refusals = denied.log.count(&[world::DENYING, &world::principal("denied")])?;
        let wrong = proof::of_denied(&probed, seconds, refusals);
        anyhow::ensure!(wrong.is_empty(), "{}", wrong.join("; "));
        Ok(vec![format!(
            "{} connections of a denied client, one a second, were refused by {}",
            probed.attempts,
            world::DENYING
        )])
    }

    /// Resident memory of both proxies, bytes.
    pub(super) fn resident(&self) -> anyhow::Result<[u64; 2]> {
        Ok([machine::resident(self.proxies[0])?, machine::resident(self.proxies[1])?])
    }

    /// The same with so many idle connections, and what is wrong with them.
    pub(super) fn hold(&self, variant: &str, connections: usize) -> anyhow::Result<([u64; 2], Vec<String>)> {
        let mut counters = Counters::begin(self)?;
        let order = self.order(variant, &Work::Hold { connections }, 0, 0, None);
        let mut generator = Generator::start(&self.lab, &Self::place(variant).1, &order)?;
        generator.expect_begin()?;
        std::thread::sleep(SETTLE);
        let resident = self.resident()?;
        generator.close_input();
        generator.expect_end()?;
        let totals = generator.expect_gone()?;
        let mut wrong = proof::of_totals(&totals);
        wrong.extend(counters.judge(self, &totals)?);
        Ok((resident, wrong))
    }

    /// Connections and bytes that a node's metrics count between the client and the server.
    fn metrics(&self, node: &str, reporter: &str) -> anyhow::Result<Counted> {
        let (status, text) = self.lab.get(node, names::PORT_METRICS, "/metrics")?;
        anyhow::ensure!(status == 200, "{node} answers {status} for its metrics");
        let labels = [
            format!("reporter=\"{reporter}\""),
            format!("source_principal=\"spiffe://{}\"", world::principal("client")),
            format!("destination_principal=\"spiffe://{}\"", world::principal("server")),
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

/// The nodes and how each reports.
const SIDES: [(&str, &str); 2] = [("node-1", "source"), ("node-2", "destination")];

/// Counters of both proxies and of the link, from a moment on.
struct Counters {
    logs: [LogTail; 2],
    metrics: [Counted; 2],
    link: u64,
}

impl Counters {
    fn begin(bench: &Bench) -> anyhow::Result<Self> {
        let log = |node: &str| LogTail::at_end(bench.lab.paths().log(node));
        Ok(Self {
            logs: [log(SIDES[0].0)?, log(SIDES[1].0)?],
            metrics: [bench.metrics(SIDES[0].0, SIDES[0].1)?, bench.metrics(SIDES[1].0, SIDES[1].1)?],
            link: machine::link_bytes(bench.proxies[1], "eth0")?,
        })
    }

    /// What is wrong, once every record had time to be written.
    fn judge(&mut self, bench: &Bench, totals: &Totals) -> anyhow::Result<Vec<String>> {
        let identities = [world::principal("client"), world::principal("server")];
        let words = [identities[0].as_str(), identities[1].as_str()];
        let mut counted = [Counted::default(); 2];
        let complete = eventually("records of every connection", RECORDS, || -> Result<(), anyhow::Error> {
            for (side, (node, reporter)) in SIDES.into_iter().enumerate() {
                counted[side].records += self.logs[side].count(&words)?;
                let now = bench.metrics(node, reporter)?;
                counted[side].connections = now.connections.saturating_sub(self.metrics[side].connections);
                counted[side].bytes = now.bytes.saturating_sub(self.metrics[side].bytes);
            }
            let missing = counted.iter().any(|it| it.records.min(it.connections) < totals.connections);
            anyhow::ensure!(!missing, "some are missing");
            Ok(())
        });
        // What is missing is said with numbers below.
        drop(complete);
        let link = machine::link_bytes(bench.proxies[1], "eth0")? - self.link;
        Ok(proof::of_counts(totals, counted, link))
    }
}

/// A generator under way.
struct Generator {
    running: Running,
    lines: BufReader<ChildStdout>,
    pid: u32,
}

impl Generator {
    fn start(lab: &Lab, place: &str, order: &Order) -> anyhow::Result<Self> {
        let order = serde_json::to_string(order)?;
        let mut running = lab.spawn(place, &["lab", "bench-agent", "run", "--order", &order])?;
        let child = running.child().context("the generator has ended")?;
        let (pid, stdout) = (child.id(), child.stdout.take().context("no output of the generator")?);
        Ok(Self { running, lines: BufReader::new(stdout), pid })
    }

    /// The generator ends by itself after its time, so this ends too.
    fn next(&mut self) -> anyhow::Result<Line> {
        let mut line = String::new();
        if self.lines.read_line(&mut line)? == 0 {
            let mut error = String::new();
            if let Some(stderr) = self.running.child().and_then(|child| child.stderr.take()) {
                let _ = std::io::Read::read_to_string(&mut std::io::Read::take(stderr, 4096), &mut error);
            }
            anyhow::bail!("the load generator ended early: {}", error.trim());
        }
        serde_json::from_str(&line).with_context(|| format!("the load generator said {:?}", line.trim()))
    }

    fn expect_begin(&mut self) -> anyhow::Result<()> {
        match self.next()? {
            Line::Begin => Ok(()),
            other => anyhow::bail!("the load generator said {other:?} instead of beginning"),
        }
    }

    fn expect_end(&mut self) -> anyhow::Result<Measured> {
        match self.next()? {
            Line::End(measured) => Ok(measured),
            other => anyhow::bail!("the load generator said {other:?} instead of ending"),
        }
    }

    fn expect_gone(&mut self) -> anyhow::Result<Totals> {
        match self.next()? {
            Line::Gone(totals) => Ok(totals),
            other => anyhow::bail!("the load generator said {other:?} instead of its totals"),
        }
    }

    fn close_input(&mut self) {
        if let Some(child) = self.running.child() {
            drop(child.stdin.take());
        }
    }
}
