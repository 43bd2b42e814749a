//! What it costs to leave the cluster by name: the same loads on a host outside, from a pod in no mesh, from one that its own node
//! lets out, and from one whose only way is an egress gateway.
//!
//! A lab of its own, whose client's namespace is closed and has twenty policies. In the two ways of the mesh the client speaks to
//! the address that its name server gave it for a name of the host; the rule says TCP, so that no byte is waited for. Limits: one
//! replica of the gateway, on another node; what leaves crosses the outside link in plain text, as the generator sends it; no peer,
//! which would need other objects for the same.

use std::net::IpAddr;
use std::path::Path;
use std::time::Instant;

use anyhow::Context;
use tulle_proto::names;

use crate::bench::DIRECT;
use crate::bench::Options;
use crate::bench::TULLE;
use crate::bench::generator::Generator;
use crate::bench::machine;
use crate::bench::measure::PROOF_MS;
use crate::bench::measure::RECORDS;
use crate::bench::measure::WORKERS;
use crate::bench::note;
use crate::bench::proof;
use crate::bench::proof::LogTail;
use crate::bench::report::Failure;
use crate::bench::report::Report;
use crate::bench::rows;
use crate::bench::rows::Run;
use crate::bench::work::Order;
use crate::bench::work::PORTS;
use crate::bench::work::Probed;
use crate::bench::work::Totals;
use crate::bench::work::Work;
use crate::bench::world;
use crate::eventually::eventually;
use crate::internet;
use crate::lab::Lab;
use crate::lab::LabConfig;
use crate::lab::Running;
use crate::scenario;

/// The closed namespace.
const CLOSED: &str = "bench";
/// Who may leave.
const CLIENT: &str = "spiffe://cluster.local/ns/bench/sa/client";
/// The same as its own node knows it, also where no tunnel proves an identity.
const CLIENT_POD: &str = "src.workload=\"client\" src.namespace=\"bench\"";
/// Who may not.
const DENIED: &str = "src.workload=\"denied\" src.namespace=\"bench\"";
/// The gateway as the node's record has it.
const GATEWAY: &str = "spiffe://cluster.local/ns/egress/sa/out";

/// A way out: what rows call it, and the host's name that leads there.
struct Way {
    name: &'static str,
    host: &'static str,
    by_gateway: bool,
}

const WAYS: [Way; 2] = [
    Way { name: "outside, from the node", host: "near.example.test", by_gateway: false },
    Way { name: "outside, by a gateway", host: "far.example.test", by_gateway: true },
];

/// What is done, with the bytes, requests or connections that are enough for a proof.
fn loads() -> [(&'static str, Work, u64); 4] {
    [
        ("upload, 1 stream", Work::Upload { streams: 1 }, rows::PROOF_BYTES),
        ("requests, 16 connections", Work::Requests { connections: 16 }, 2000),
        (
            "2,000 requests/s, 16 connections",
            Work::Paced { connections: 16, per_second: 2000, beside_upload: false },
            0,
        ),
        ("200 new connections/s", Work::PacedConnects { per_second: 200 }, 0),
    ]
}

/// Every object.
fn objects(marker: &str) -> String {
    let mut text = format!(
        "---\napiVersion: v1\nkind: Namespace\nmetadata: {{name: {CLOSED}, labels: {{tulle.dev/mesh: enabled, tulle.dev/egress: deny}}}}\n"
    );
    text += &world::client(CLOSED, "client", "client", 1);
    text += &world::client(CLOSED, "denied", "denied", 1);
    text += &scenario::namespace(world::PLAIN, false);
    text += &world::client(world::PLAIN, "client", "client", 1);
    text += &(internet::gateway_service() + &internet::gateway("out-0", 2));
    let hosts = WAYS.map(|way| way.host).join(",");
    text += &format!(
        "---\napiVersion: v1\nkind: Namespace\nmetadata: {{name: out, annotations: {{lab.tulle.dev/outside: 'true'}}}}\n\
         ---\napiVersion: v1\nkind: Pod\nmetadata: {{name: server, namespace: out, annotations: {{lab.tulle.dev/hostnames: '{hosts}'}}}}\n\
         spec:\n  containers:\n  - name: main\n    image: none\n\
         \x20   command: [lab, bench-agent, serve, --marker, {marker}]\n"
    );
    for (name, account, host, more) in policies() {
        let ports: Vec<String> = PORTS.iter().map(|port| format!("{{port: {port}, protocol: TCP}}")).collect();
        text += &format!(
            "---\napiVersion: tulle.dev/v1alpha1\nkind: EgressPolicy\nmetadata: {{name: {name}, namespace: {CLOSED}}}\n\
             spec:\n  selector: {{serviceAccounts: [{account}]}}\n  rules:\n  - hosts: [{host}]\n    ports: [{}]\n{more}",
            ports.join(", ")
        );
    }
    text
}

/// Name, account, host and the rest of the rule of each policy. All but the last select the client.
fn policies() -> Vec<(String, &'static str, String, &'static str)> {
    let via = "    via: {gateway: {namespace: egress, name: out}}\n";
    let way = |way: &Way| {
        let more = if way.by_gateway { via } else { "" };
        (way.host.replace('.', "-"), "client", way.host.to_owned(), more)
    };
    let mut policies: Vec<_> = WAYS.iter().map(way).collect();
    let absent = |index| (format!("absent-{index}"), "client", format!("absent-{index}.example.test"), "");
    policies.extend((policies.len()..world::POLICIES - 1).map(absent));
    policies.push(("denied".to_owned(), "denied", "elsewhere.example.test".to_owned(), ""));
    policies
}

/// The lab, and where its parts are.
struct Place {
    lab: Lab,
    marker: String,
    server: IpAddr,
    /// Processes: proxies of both nodes, the gateway.
    nodes: [u32; 2],
    gateway: u32,
}

impl Place {
    fn start(bin_dir: &Path) -> anyhow::Result<Self> {
        let marker = scenario::marker();
        let mut config = LabConfig::of(&objects(&marker));
        config.bin_dir = Some(bin_dir.to_path_buf());
        for component in ["ztunnel", "gateway"] {
            for (name, value) in [("ZTUNNEL_WORKER_THREADS", WORKERS), ("RUST_LOG", "info")] {
                config = config.env(component, name, value);
            }
        }
        let lab = Lab::up(config)?;
        let view = lab.view()?;
        let node = |name: &str| view.nodes.iter().find(|it| it.name == name).and_then(|node| node.pid);
        let gateway = view.pod("egress", "out-0").and_then(|pod| pod.pids.values().next().copied());
        Ok(Self {
            server: lab.pod_ip("out", "server")?.parse()?,
            nodes: [node("node-1").context("no proxy")?, node("node-2").context("no proxy")?],
            gateway: gateway.context("no gateway")?,
            marker,
            lab,
        })
    }

    /// The address that the client's name server gives it for the name of a way out.
    fn address(&self, way: &Way) -> anyhow::Result<IpAddr> {
        let place = format!("{CLOSED}/client");
        let said = eventually("the name is known", scenario::PATIENCE, || {
            self.lab.exec_ok(&place, &["getent", "ahostsv4", way.host])
        })?;
        let address: IpAddr = said.split_whitespace().next().context("no address")?.parse()?;
        anyhow::ensure!(address != self.server, "{} was not bound: {address}", way.host);
        Ok(address)
    }

    /// A load without the mesh, or by a way out; its totals, and what is wrong with it.
    fn run(&self, way: Option<&Way>, order: &Order) -> anyhow::Result<(Run, Totals, Vec<String>)> {
        let mut counters = way.map(|way| Counters::begin(self, way)).transpose()?;
        let mut generator = Generator::start(&self.lab, &place(way), order)?;
        generator.expect_begin()?;
        let before = self.used(way)?;
        let measured = generator.expect_end()?;
        let after = self.used(way)?;
        let totals = generator.expect_gone()?;
        let mut wrong = proof::of_totals(&totals);
        if let Some(counters) = &mut counters {
            wrong.extend(counters.judge(self, &totals)?);
        }
        Ok((Run { measured, cpu: way.map(|_| [after[0] - before[0], after[1] - before[1]]) }, totals, wrong))
    }

    /// Seconds of CPU of the client's node, and of the gateway where it is on the way.
    fn used(&self, way: Option<&Way>) -> anyhow::Result<[f64; 2]> {
        let by_gateway = way.is_some_and(|way| way.by_gateway);
        let gateway = if by_gateway { machine::cpu_seconds(self.gateway)? } else { 0.0 };
        Ok([machine::cpu_seconds(self.nodes[0])?, gateway])
    }

    fn order(&self, work: &Work, to: IpAddr, times: (u64, u64), limit: Option<u64>) -> Order {
        Order::to(to, work, times, limit, &self.marker)
    }

    /// A bounded part again with the client's node link captured: to a gateway it carries TLS and nothing else, and of what leaves
    /// at the node it carries nothing.
    fn prove(&self, way: &Way, order: &Order) -> anyhow::Result<Vec<String>> {
        let sniffer = self.lab.sniff("node-1", &[&self.marker])?;
        let (_, totals, mut wrong) = self.run(Some(way), order)?;
        let mut seen = sniffer.finish()?;
        if way.by_gateway {
            wrong.extend(proof::of_capture(&totals, &seen));
        } else {
            seen.tcp_ports.retain(|port, _| *port != names::PORT_CONTROL_GRPC);
            if !seen.tcp_ports.is_empty() {
                wrong.push(format!("what left at the node crossed the link between nodes: {:?}", seen.tcp_ports));
            }
        }
        Ok(wrong)
    }
}

/// The pod from which a load comes.
fn place(way: Option<&Way>) -> String {
    format!("{}/client", way.map_or(world::PLAIN, |_| CLOSED))
}

/// Records of those who see a way out, and bytes of the links, from a moment on.
struct Counters {
    by_gateway: bool,
    /// Logs with the words of each record of this way.
    logs: Vec<(LogTail, Vec<String>, u64)>,
    /// `out0` of both nodes, and the client's link to other nodes.
    links: [u64; 3],
}

impl Counters {
    fn begin(place: &Place, way: &Way) -> anyhow::Result<Self> {
        let host = format!("egress.host=\"{}\"", way.host);
        let words = |who: &str, more: &str| [who, "egress=\"allowed\"", &host, more].map(str::to_owned).to_vec();
        let log = |of: &str| LogTail::at_end(place.lab.paths().log(of));
        let mut logs = vec![(log("node-1")?, words(CLIENT_POD, if way.by_gateway { GATEWAY } else { "" }), 0)];
        if way.by_gateway {
            logs.push((log("egress_out-0")?, words(CLIENT, ""), 0));
        }
        Ok(Self { by_gateway: way.by_gateway, logs, links: links(place)? })
    }

    /// What is wrong, once every record had time to be written.
    fn judge(&mut self, place: &Place, totals: &Totals) -> anyhow::Result<Vec<String>> {
        let complete = eventually("records of every connection", RECORDS, || -> anyhow::Result<()> {
            for (log, words, count) in &mut self.logs {
                *count += log.count(&words.iter().map(String::as_str).collect::<Vec<_>>())?;
            }
            let missing = self.logs.iter().any(|(.., count)| *count < totals.connections);
            anyhow::ensure!(!missing, "some are missing");
            Ok(())
        });
        // What is missing is said with numbers below.
        drop(complete);
        let now = links(place)?;
        let carried = [0, 1, 2].map(|link| now[link].saturating_sub(self.links[link]));
        let records: Vec<u64> = self.logs.iter().map(|(.., count)| *count).collect();
        Ok(judged(self.by_gateway, totals, &records, carried))
    }
}

/// See [`Counters`].
fn links(place: &Place) -> anyhow::Result<[u64; 3]> {
    let [near, far] = place.nodes;
    Ok([machine::link_bytes(near, "out0")?, machine::link_bytes(far, "out0")?, machine::link_bytes(near, "eth0")?])
}

/// What is wrong: each who is on the way has one record of each connection, and the bytes took that way and no other.
fn judged(by_gateway: bool, totals: &Totals, records: &[u64], [near, far, between]: [u64; 3]) -> Vec<String> {
    let mut wrong = Vec::new();
    for (who, records) in ["client's node", "gateway"].into_iter().zip(records) {
        if *records != totals.connections {
            let made = totals.connections;
            wrong.push(format!("{made} connections were made; the {who} logged {records} of the client and the host"));
        }
    }
    let payload = totals.payload;
    let (taken, not): (&[(&str, u64)], (&str, u64)) = match by_gateway {
        true => (
            &[("between the nodes", between), ("of the gateway's node to the outside", far)],
            ("of the client's node to the outside", near),
        ),
        false => (&[("of the client's node to the outside", near)], ("between the nodes", between)),
    };
    for (name, bytes) in taken {
        if *bytes < payload {
            wrong.push(format!("{payload} payload bytes were carried; {bytes} crossed the link {name}"));
        }
    }
    if not.1 >= payload {
        wrong.push(format!("{payload} payload bytes were carried; {} crossed the link {}", not.1, not.0));
    }
    wrong
}

/// Who must not get out, once a second, by the host's own address.
struct Denied {
    running: Running,
    began: Instant,
    log: LogTail,
}

impl Denied {
    fn start(place: &Place) -> anyhow::Result<Self> {
        let log = LogTail::at_end(place.lab.paths().log("node-1"))?;
        let argv = ["lab", "bench-agent", "probe", "--to", &place.server.to_string()];
        Ok(Self { running: place.lab.spawn(&format!("{CLOSED}/denied"), &argv)?, began: Instant::now(), log })
    }

    fn finish(mut self) -> anyhow::Result<String> {
        let seconds = self.began.elapsed().as_secs_f64();
        let output = self.running.finish()?;
        let probed: Probed = serde_json::from_slice(&output.stdout).context("the denied client said nothing")?;
        let mut refusals = 0;
        let all = eventually("its refusals are recorded", RECORDS, || -> anyhow::Result<()> {
            refusals += self.log.count(&[DENIED, "EGRESS_DENIED"])?;
            anyhow::ensure!(refusals >= probed.attempts, "some are missing");
            Ok(())
        });
        drop(all);
        let wrong = proof::of_denied(&probed, seconds, refusals);
        anyhow::ensure!(wrong.is_empty(), "{}", wrong.join("; "));
        Ok(format!("outside: {} connections of a pod without a rule, one a second, were refused", probed.attempts))
    }
}

/// Each load by each way out, and without the mesh; loads whose name holds `--only`.
pub(super) fn run(options: &Options, bin_dir: &Path, report: &mut Report) {
    let rows: Vec<(&Way, String, Work, u64)> = WAYS
        .iter()
        .flat_map(|way| loads().map(|(name, work, limit)| (way, format!("{}: {name}", way.name), work, limit)))
        .filter(|(_, name, ..)| name.contains(&options.only))
        .collect();
    if rows.is_empty() {
        return;
    }
    eprintln!("lab bench: out of the cluster");
    if let Err(error) = all(options, bin_dir, &rows, report) {
        for (_, name, ..) in &rows {
            fail(report, name, TULLE, format!("{error:#}"));
        }
    }
}

fn all(
    options: &Options,
    bin_dir: &Path,
    rows: &[(&Way, String, Work, u64)],
    report: &mut Report,
) -> anyhow::Result<()> {
    let place = Place::start(bin_dir)?;
    let published = place.lab.control_get("/debug/resources")?.to_string().matches("EgressPolicy/bench/").count();
    anyhow::ensure!(published >= world::POLICIES, "{published} of {} policies are published", world::POLICIES);
    let denied = Denied::start(&place)?;
    for round in 0..options.rounds() {
        for (index, (way, name, work, limit)) in rows.iter().enumerate() {
            for at in rows::rotation(2, round, index) {
                let (variant, way, to) =
                    if at == 0 { (DIRECT, None, place.server) } else { (TULLE, Some(*way), place.address(way)?) };
                let (run, _, wrong) = place.run(way, &place.order(work, to, options.times(), None))?;
                for (figure, value) in rows::figures(work, &run) {
                    note(report, name, figure, variant, value);
                }
                wrong.into_iter().for_each(|wrong| fail(report, name, variant, wrong));
                if let Some(way) = way.filter(|_| round == 0) {
                    let times = (0, if *limit == 0 { options.times().1 } else { PROOF_MS });
                    let order = place.order(work, to, times, (*limit > 0).then_some(*limit));
                    place.prove(way, &order)?.into_iter().for_each(|wrong| fail(report, name, variant, wrong));
                }
            }
        }
        eprintln!("round {}/{} · out of the cluster", round + 1, options.rounds());
    }
    report.proven.push(denied.finish()?);
    Ok(())
}

fn fail(report: &mut Report, test: &str, variant: &'static str, wrong: String) {
    report.failures.insert(Failure { test: test.to_owned(), variant, wrong });
}

#[cfg(test)]
mod tests {
    use crate::bench::egress::judged;
    use crate::bench::egress::objects;
    use crate::bench::work::Totals;
    use crate::bench::world::POLICIES;

    #[test]
    fn there_are_as_many_policies_as_elsewhere() {
        assert_eq!(objects("m").matches("kind: EgressPolicy").count(), POLICIES);
    }

    #[test]
    fn bytes_that_took_another_way_prove_nothing() {
        let totals = Totals { payload: 1000, connections: 3, ..Totals::default() };
        assert!(judged(false, &totals, &[3], [1100, 0, 10]).is_empty());
        assert!(judged(true, &totals, &[3, 3], [10, 1100, 1200]).is_empty());
        for (by_gateway, records, links, what) in [
            (false, &[3][..], [1100, 0, 1100], "over another node"),
            (false, &[3], [900, 0, 10], "not to the outside"),
            (true, &[3, 3], [1100, 1100, 1200], "past the gateway"),
            (true, &[3, 3], [10, 1100, 900], "not from the client's node"),
            (true, &[3, 2], [10, 1100, 1200], "without a record of the gateway"),
            (true, &[4, 3], [10, 1100, 1200], "with two records of one connection"),
        ] {
            assert_eq!(judged(by_gateway, &totals, records, links).len(), 1, "{what}");
        }
    }
}
