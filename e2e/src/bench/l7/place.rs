//! The lab of the bench of requests: starting it, one part of a load in it, and the counters that prove what was done.
//!
//! Each variant has its clients and servers; what differs is who is between them. Records are lines of both sides' logs,
//! read before a part begins and after all of its connections have closed, and CPU is that of every proxy between them
//! over exactly the measured part. Limits: the lab's two node proxies run also while others are measured, idle.

use std::net::IpAddr;
use std::net::Ipv4Addr;
use std::net::SocketAddr;
use std::path::Path;
use std::path::PathBuf;
use std::time::Duration;
use std::time::Instant;

use anyhow::Context;

use crate::bench::DIRECT;
use crate::bench::ENVOY;
use crate::bench::TULLE;
use crate::bench::generator::Generator;
use crate::bench::http;
use crate::bench::l7::envoy;
use crate::bench::l7::envoy::Role;
use crate::bench::l7::envoy::Sidecar;
use crate::bench::l7::world;
use crate::bench::machine;
use crate::bench::machine::Sample;
use crate::bench::measure::PROOF_MS;
use crate::bench::measure::PROOF_PACED_MS;
use crate::bench::measure::RECORDS;
use crate::bench::measure::WORKERS;
use crate::bench::proof;
use crate::bench::proof::LogTail;
use crate::bench::rows::Run;
use crate::bench::rows::Test;
use crate::bench::work::Asked;
use crate::bench::work::Http;
use crate::bench::work::Order;
use crate::bench::work::PORT_HTTP;
use crate::bench::work::Totals;
use crate::bench::work::Work;
use crate::bench::world::POLICIES;
use crate::eventually::eventually;
use crate::lab::Lab;
use crate::lab::LabConfig;
use crate::lab::Running;

/// For the first answer of a variant: sidecars start, routes arrive.
const STARTED: Duration = Duration::from_secs(30);
/// The header must decide so many times.
const PINNED: u64 = 50;
/// Connections of the flood.
const FLOOD: usize = 64;
/// All that it can ask: each connection asks again as soon as it is answered.
pub(super) const ALL: Work = Work::Requests { connections: FLOOD };

/// The lab and the variants in it.
pub(super) struct Place {
    lab: Lab,
    marker: String,
    sides: Vec<Side>,
    /// For the counters of the node link: a process on the servers' node.
    far: u32,
}

/// Where the parts of a variant are, and how a record of it is told.
struct Side {
    variant: &'static str,
    namespace: &'static str,
    to: SocketAddr,
    /// Processes of the client's side and of the server's.
    proxies: [Vec<u32>; 2],
    servers: Vec<u32>,
    logs: [Vec<PathBuf>; 2],
    /// A record of an answered request of an account: on the client's side, on the server's.
    words: [fn(&str) -> Vec<String>; 2],
    /// What a record of a refusal by policy holds besides.
    denied_by: String,
    _sidecars: Vec<Sidecar>,
    probes: Vec<Probe>,
}

/// Requests that are refused once a second.
struct Probe {
    what: &'static str,
    running: Running,
    began: Instant,
    logs: Vec<LogTail>,
    words: Vec<String>,
}

/// A part with what was found wrong with it.
pub(super) struct Outcome {
    pub(super) run: Run,
    pub(super) wrong: Vec<String>,
    /// Share of the processors that other processes used.
    pub(super) others: f64,
    /// Requests a second of the flood beside it.
    pub(super) flooded: f64,
    /// Share of the processors that all of it used.
    pub(super) load: f64,
}

/// A flood by the clock.
pub(super) fn flood_of(per_second: f64) -> Work {
    Work::Paced { connections: FLOOD, per_second: per_second.round().max(1.0) as u32, beside_upload: false }
}

impl Place {
    /// Starts the lab with these variants.
    pub(super) fn start(bin_dir: &Path, program: Option<&Path>, variants: &[&'static str]) -> anyhow::Result<Self> {
        let marker = format!("bench-payload-{}", std::process::id());
        let mut config = LabConfig::of(&world::objects(&marker));
        config.bin_dir = Some(bin_dir.to_path_buf());
        for (name, value) in [("ZTUNNEL_WORKER_THREADS", WORKERS), ("RUST_LOG", "info")] {
            config = config.env("ztunnel", name, value);
        }
        let lab = Lab::up(config)?;
        let nodes: Vec<u32> = lab.view()?.nodes.iter().filter_map(|node| node.pid).collect();
        let [near, far] = nodes[..] else { anyhow::bail!("{} of two nodes have a proxy", nodes.len()) };
        let mut sides = Vec::new();
        for variant in variants {
            sides.push(match (*variant, program) {
                (TULLE, _) => ours(&lab, near, far)?,
                (ENVOY, Some(program)) => theirs(&lab, program)?,
                _ => direct(&lab)?,
            });
        }
        Ok(Self { lab, marker, sides, far })
    }

    fn side(&self, variant: &str) -> anyhow::Result<&Side> {
        self.sides.iter().find(|side| side.variant == variant).with_context(|| format!("there is no {variant}"))
    }

    fn head(&self, method: &str, path: &str, more: &str) -> String {
        http::head(method, path, &self.marker, more)
    }

    /// Waits until a variant answers, proves what its header decides, and starts asking what must be refused.
    pub(super) fn begin(&mut self, variant: &str) -> anyhow::Result<Vec<String>> {
        let side = self.side(variant)?;
        let ask = |head: &str, count: u64| -> anyhow::Result<Asked> {
            let (place, to) = (format!("{}/client", side.namespace), side.to.to_string());
            let argv = ["lab", "bench-agent", "ask", "--to", &to, "--head", head, "--count", &count.to_string()];
            serde_json::from_str(&self.lab.exec_ok(&place, &argv)?).context("what was asked")
        };
        let plain = self.head("GET", world::PATH, "");
        eventually(&format!("{variant} answers requests"), STARTED, || {
            let asked = ask(&plain, 1)?;
            anyhow::ensure!(asked.statuses.contains_key("200"), "{:?}", asked.statuses);
            Ok(())
        })?;
        if variant == DIRECT {
            return Ok(Vec::new());
        }
        let (name, value) = world::PIN;
        let pinned = ask(&self.head("GET", world::PATH, &format!("{name}: {value}\r\n")), PINNED)?;
        let second = pinned.servers.get(world::VERSIONS[1]).copied().unwrap_or_default();
        anyhow::ensure!(second == PINNED, "of {PINNED} requests with {name} went elsewhere: {:?}", pinned.servers);
        let mut lines = vec![format!(
            "{variant}, HTTP: {PINNED} of {PINNED} requests with {name}: {value} went to {}",
            world::VERSIONS[1]
        )];
        if variant == TULLE {
            let dump = self.lab.node_admin("node-2", "/config_dump")?;
            let held = dump["policies"].as_array().into_iter().flatten();
            let held = held.filter(|policy| proof::is_of_namespace(policy, world::MESH)).count();
            anyhow::ensure!(held == POLICIES, "the servers' proxy holds {held} of {POLICIES} policies");
            lines.push(format!("{variant}, HTTP: {held} policies select the servers and are held by their proxy"));
        }
        let probes = [
            ("a path that a policy denies", "client", self.head("GET", world::ADMIN, ""), side.denied_by.clone()),
            (
                "a method that none allows",
                "client",
                self.head("POST", world::PATH, "content-length: 0\r\n"),
                "POST".into(),
            ),
            ("an identity that none allows", "denied", plain, "/sa/denied".into()),
        ];
        let mut started = Vec::new();
        for (what, account, head, word) in probes {
            let (place, to) = (format!("{}/{account}", side.namespace), side.to.to_string());
            let logs = side.logs[1].iter().map(|log| LogTail::at_end(log.clone())).collect::<anyhow::Result<_>>()?;
            let argv = ["lab", "bench-agent", "ask", "--to", &to, "--head", &head];
            let running = self.lab.spawn(&place, &argv)?;
            let words = vec!["status=403".to_owned(), word];
            started.push(Probe { what, running, began: Instant::now(), logs, words });
        }
        if let Some(side) = self.sides.iter_mut().find(|side| side.variant == variant) {
            side.probes = started;
        }
        Ok(lines)
    }

    /// Ends asking for what must be refused; an error if anything was not.
    pub(super) fn end(&mut self, variant: &str) -> anyhow::Result<Vec<String>> {
        let side = self.sides.iter_mut().find(|side| side.variant == variant).context("no such variant")?;
        let mut lines = Vec::new();
        for mut probe in side.probes.drain(..) {
            let seconds = probe.began.elapsed().as_secs_f64();
            let output = probe.running.finish()?;
            let asked: Asked = serde_json::from_slice(&output.stdout).context("the refused client said nothing")?;
            let refused = asked.statuses.get("403").copied().unwrap_or_default();
            let words: Vec<&str> = probe.words.iter().map(String::as_str).collect();
            let mut refusals = 0;
            let _ = eventually("records of every refusal", RECORDS, || -> anyhow::Result<()> {
                for log in &mut probe.logs {
                    refusals += log.count(&words)?;
                }
                anyhow::ensure!(refusals >= refused, "some are missing");
                Ok(())
            });
            let wrong = proof::of_refused(&asked, seconds, refusals);
            anyhow::ensure!(wrong.is_empty(), "{}: {}", probe.what, wrong.join("; "));
            lines.push(format!(
                "{variant}, HTTP: {refused} requests, one a second, were refused with 403: {}",
                probe.what
            ));
        }
        Ok(lines)
    }

    fn order(&self, side: &Side, work: &Work, times: (u64, u64), limit: Option<u64>) -> Order {
        Order {
            http: Some(Http { port: side.to.port(), head: self.head("GET", world::PATH, "") }),
            ..Order::to(side.to.ip(), work, times, limit, &self.marker)
        }
    }

    /// One part with its figures; with `flood` another pod does that meanwhile.
    pub(super) fn run(
        &self,
        variant: &str,
        work: &Work,
        times: (u64, u64),
        flood: Option<&Work>,
    ) -> anyhow::Result<Outcome> {
        let side = self.side(variant)?;
        let place = |client: &str| format!("{}/{client}", side.namespace);
        let mut records = Records::begin(side, "client", self.far)?;
        let mut flooder = None;
        if let Some(flood) = flood {
            // Longer than the part beside it, which begins once the flood is there.
            let order = self.order(side, flood, (0, times.0 + times.1 + 1000), None);
            let mut generator = Generator::start(&self.lab, &place("flooder"), &order)?;
            generator.expect_begin()?;
            flooder = Some(generator);
        }
        let mut generator = Generator::start(&self.lab, &place("client"), &self.order(side, work, times, None))?;
        let sample = |generator: &Generator| {
            let mut own = [&[generator.pid][..], &side.servers].concat();
            own.extend(flooder.as_ref().map(|flooder| flooder.pid));
            Sample::take([&side.proxies[0], &side.proxies[1]], &own)
        };
        generator.expect_begin()?;
        let before = sample(&generator)?;
        let measured = generator.expect_end()?;
        let after = sample(&generator)?;
        let totals = generator.expect_gone()?;
        let mut wrong = proof::of_totals(&totals);
        let mut flooded = 0.0;
        if let Some(mut flooder) = flooder {
            let flood = flooder.expect_end()?;
            wrong.extend(
                proof::of_totals(&flooder.expect_gone()?).into_iter().map(|wrong| format!("the flood: {wrong}")),
            );
            flooded = flood.units as f64 / flood.seconds.max(f64::EPSILON);
        }
        wrong.extend(records.judge(side, &totals, self.far)?);
        let (used, others) = before.until(&after);
        let cpu = (variant != DIRECT).then_some(used);
        Ok(Outcome { run: Run { measured, cpu }, wrong, others, flooded, load: before.load(&after) - others })
    }

    /// A bounded part of the load again, with the node link captured.
    pub(super) fn prove(&self, variant: &str, test: &Test) -> anyhow::Result<Vec<String>> {
        let side = self.side(variant)?;
        let (run_ms, limit) = match test.work {
            Work::Paced { .. } => (PROOF_PACED_MS, None),
            _ => (PROOF_MS, Some(test.proof_limit)),
        };
        let sniffer = self.lab.sniff("node-2", &[&self.marker])?;
        let order = self.order(side, &test.work, (0, run_ms), limit);
        let mut generator = Generator::start(&self.lab, &format!("{}/client", side.namespace), &order)?;
        generator.expect_begin()?;
        generator.expect_end()?;
        let totals = generator.expect_gone()?;
        let seen = sniffer.finish()?;
        if variant == DIRECT {
            // Or else the silence of the others would prove nothing.
            let found = seen.markers.values().any(|count| *count > 0);
            return Ok(if found { vec![] } else { vec!["the capture did not see the payload of requests".to_owned()] });
        }
        let mut wrong = proof::of_totals(&totals);
        wrong.extend(proof::of_capture(&totals, &seen));
        Ok(wrong)
    }
}

fn address(lab: &Lab, namespace: &str, pod: &str) -> anyhow::Result<IpAddr> {
    Ok(lab.pod_ip(namespace, pod)?.parse()?)
}

fn servers(lab: &Lab, namespace: &str) -> anyhow::Result<Vec<u32>> {
    let view = lab.view()?;
    let pids =
        world::VERSIONS.iter().filter_map(|version| view.pod(namespace, version)).flat_map(|pod| pod.pids.values());
    let pids: Vec<u32> = pids.copied().collect();
    anyhow::ensure!(pids.len() == world::VERSIONS.len(), "{} of two servers run", pids.len());
    Ok(pids)
}

/// No proxy, no route, no policy: the first version alone.
fn direct(lab: &Lab) -> anyhow::Result<Side> {
    Ok(Side {
        variant: DIRECT,
        namespace: world::PLAIN,
        to: SocketAddr::new(address(lab, world::PLAIN, world::VERSIONS[0])?, PORT_HTTP),
        proxies: [vec![], vec![]],
        servers: servers(lab, world::PLAIN)?,
        logs: [vec![], vec![]],
        words: [|_| vec![], |_| vec![]],
        denied_by: String::new(),
        _sidecars: Vec::new(),
        probes: Vec::new(),
    })
}

fn ours(lab: &Lab, near: u32, far: u32) -> anyhow::Result<Side> {
    let view = lab.view()?;
    let shop = view.services.iter().find(|it| it.namespace == world::MESH && it.name == "shop");
    let to = shop.and_then(|service| service.addresses.first()).context("the Service has no address")?;
    // Both name both, as proven in the tunnel's handshake.
    let words = |account: &str| {
        let of = |account| format!("spiffe://{}", world::principal(world::MESH, account));
        vec!["request complete".to_owned(), "status=200".to_owned(), of(account), of("server")]
    };
    Ok(Side {
        variant: TULLE,
        namespace: world::MESH,
        to: SocketAddr::new(to.parse()?, PORT_HTTP),
        proxies: [vec![near], vec![far]],
        servers: servers(lab, world::MESH)?,
        logs: ["node-1", "node-2"].map(|node| vec![lab.paths().log(node)]),
        words: [words, words],
        denied_by: format!("{}/{}", world::MESH, world::DENY),
        _sidecars: Vec::new(),
        probes: Vec::new(),
    })
}

fn theirs(lab: &Lab, program: &Path) -> anyhow::Result<Side> {
    let addresses: Vec<String> =
        world::VERSIONS.iter().map(|it| lab.pod_ip(world::PLAIN, it)).collect::<anyhow::Result<_>>()?;
    let clients = world::CLIENTS.iter().map(|it| (*it, *it, Role::Client(&addresses)));
    let servers_ = world::VERSIONS.iter().map(|it| (*it, "server", Role::Server));
    let sidecars: Vec<Sidecar> = clients
        .chain(servers_)
        .map(|(pod, account, role)| envoy::start(lab, program, pod, account, &role))
        .collect::<anyhow::Result<_>>()?;
    let (near, far) = sidecars.split_at(world::CLIENTS.len());
    let pids = |part: &[Sidecar]| part.iter().map(|it| it.pid).collect::<Vec<_>>();
    let logs = |part: &[Sidecar]| part.iter().map(|it| it.log.clone()).collect::<Vec<_>>();
    let of = |account: &str| {
        let peer = format!("peer=spiffe://{} tls=TLSv1.3", world::principal(world::PLAIN, account));
        vec!["status=200".to_owned(), peer]
    };
    Ok(Side {
        variant: ENVOY,
        namespace: world::PLAIN,
        to: SocketAddr::new(Ipv4Addr::LOCALHOST.into(), envoy::PORT),
        proxies: [pids(near), pids(far)],
        servers: servers(lab, world::PLAIN)?,
        // Only the measured client's: each has its own.
        logs: [logs(&near[..1]), logs(far)],
        words: [
            |_| {
                vec![
                    "status=200".to_owned(),
                    format!("peer=spiffe://{} tls=TLSv1.3", world::principal(world::PLAIN, "server")),
                ]
            },
            of,
        ],
        denied_by: format!("[{}]", world::DENY),
        _sidecars: sidecars,
        probes: Vec::new(),
    })
}

/// Records of both sides and bytes of the link, from a moment on.
struct Records {
    logs: [Vec<LogTail>; 2],
    words: [Vec<String>; 2],
    link: u64,
}

impl Records {
    fn begin(side: &Side, account: &str, far: u32) -> anyhow::Result<Self> {
        let tails =
            |logs: &[PathBuf]| logs.iter().map(|log| LogTail::at_end(log.clone())).collect::<anyhow::Result<_>>();
        Ok(Self {
            logs: [tails(&side.logs[0])?, tails(&side.logs[1])?],
            words: [side.words[0](account), side.words[1](account)],
            link: machine::link_bytes(far, "eth0")?,
        })
    }

    /// What is wrong, once every record had time to be written.
    fn judge(&mut self, side: &Side, totals: &Totals, far: u32) -> anyhow::Result<Vec<String>> {
        let link = machine::link_bytes(far, "eth0")? - self.link;
        if side.variant == DIRECT {
            return Ok(Vec::new());
        }
        let answered: u64 = totals.answered.values().sum();
        let mut records = [0; 2];
        // What is missing is said with numbers below.
        let _ = eventually("records of every request", RECORDS, || -> anyhow::Result<()> {
            for ((logs, words), records) in self.logs.iter_mut().zip(&self.words).zip(&mut records) {
                let words: Vec<&str> = words.iter().map(String::as_str).collect();
                for log in logs {
                    *records += log.count(&words)?;
                }
            }
            anyhow::ensure!(records.iter().all(|count| *count >= answered), "some are missing");
            Ok(())
        });
        let mut wrong = proof::of_requests(totals, records, link);
        wrong.extend(proof::of_route(totals, world::VERSIONS, world::CANARY));
        Ok(wrong)
    }
}
