//! Wiring: reads nothing, decides nothing, starts everything in order and stops it in the reverse one.
//!
//! Two kinds of threads: this runtime (discovery, certificates, pods, admin) and the workers (all traffic). They meet in
//! the snapshot, the certificates and a queue a worker, so that no slow page and no reconnect ever delays a byte.

mod agent;
pub mod answers;
mod cluster;
mod dump;
mod explain;
pub mod federation;
pub mod fence;
pub mod gateway;
pub mod handover;
pub mod pods;
pub mod resolver;
pub mod revocation;
mod spans;
pub mod view;
pub mod wanted;
mod ways;
pub mod worker;

use std::io;
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::Context as _;
use http::{Method, StatusCode};
use prometheus_client::registry::Registry;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{Notify, oneshot, watch};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, timeout};
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{EnvFilter, reload};
use tulle_certs::Aliases;
use tulle_proto::names;

use crate::admin::{self, Page, Routes};
use crate::app::agent::Agent;
use crate::app::answers::{Answers, VERSION};
use crate::app::fence::Fence;
use crate::app::handover::successor::{Taken, Taking, take};
use crate::app::handover::{Giver, Over};
use crate::app::pods::{Environment, Pods};
use crate::app::resolver::Names;
use crate::app::spans::Exporter;
use crate::app::ways::Ways;
use crate::app::worker::Worker;
use crate::base::drain::{Drain, Drained, Phase, drain};
use crate::base::memory;
use crate::base::netns::{Netns, NetnsThread, local_addresses};
use crate::base::sockets::{Options, PodSockets};
use crate::base::workers::Workers;
use crate::capture::pods::{ListFile, Pods as List, Source, watch_directory};
use crate::capture::rules::Kernel;
use crate::config::{LogFormat, Node, Switch};
use crate::dns::own::{OwnResolver, system_servers};
use crate::flow::proof::Proofs;
use crate::flow::{GateLimits, Limits, Shared};
use crate::hbone;
use crate::identity::{self, Control, Identities, RootCa};
use crate::outbound;
use crate::relay;
use crate::state;
use crate::telemetry::lines::{Lines, Writer};
use crate::telemetry::metrics::Metrics;
use crate::tls::{Federated, Trust};
use crate::xds;

/// How often something is looked at that has no signal.
const LOOK: Duration = Duration::from_millis(50);
/// From this size on a page's garbage is worth a walk through the heaps, bytes.
const LARGE_PAGE: usize = 256 << 10;
/// How long a drain takes at least: without a successor, listeners still accept that long.
const LAST_CALL: Duration = Duration::from_millis(200);
/// How long peers may take to end tunnels that carry nothing any more: as long as streams are taken that crossed the goodbye.
const GOODBYE: Duration = Duration::from_secs(5);
/// How long the agent may take to say that the node is not served any more.
const LAST_WORD: Duration = Duration::from_secs(3);
/// How long the records of connections that were ended by force are waited for: some 10,000 take a fraction of it.
const RECORDS: Duration = Duration::from_secs(2);

/// Runs the node proxy until it is told to stop.
///
/// # Errors
/// What keeps it from starting, with the setting to change.
pub fn run(config: Node) -> anyhow::Result<()> {
    let (config, told) = config.with_environment().map_err(anyhow::Error::msg)?;
    // Only the first one counts; a test may have installed it already.
    let _ = (*crate::tls::provider()).clone().install_default();
    raise_file_limit();
    let (level, dropped, _writer) = logging(&config)?;
    told.iter().for_each(|what| tracing::warn!("{what}"));
    let cores = std::thread::available_parallelism().map_or(2, std::num::NonZero::get);
    memory::tame(config.workers(cores).map_err(anyhow::Error::msg)? + 1);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(node(config, level, dropped))
}

type Level = Arc<dyn Fn(&str) -> Result<(), String> + Send + Sync>;

fn logging(config: &Node) -> anyhow::Result<(Level, Lines, Writer)> {
    let (writer, guard) = Lines::start(io::stdout()).context("no thread for the log")?;
    let dropped = writer.clone();
    let filter =
        EnvFilter::try_new(&config.log).with_context(|| format!("RUST_LOG {:?} is not a filter", config.log))?;
    let (filter, handle) = reload::Layer::new(filter);
    let lines = tracing_subscriber::fmt::layer().with_writer(writer).with_ansi(false);
    let registry = tracing_subscriber::registry().with(filter);
    match config.log_format {
        LogFormat::Plain => registry.with(lines).try_init(),
        LogFormat::Json => registry.with(lines.json().flatten_event(true)).try_init(),
    }
    .context("the log is initialised twice")?;
    let level: Level = Arc::new(move |text| {
        let filter = EnvFilter::try_new(text).map_err(|error| format!("{text:?} is not a filter: {error}"))?;
        handle.reload(filter).map_err(|error| error.to_string())
    });
    Ok((level, dropped, guard))
}

async fn node(config: Node, level: Level, dropped: Lines) -> anyhow::Result<()> {
    let taking = config.handover.as_deref().map(take).transpose()?.flatten();
    let taken = taking.as_ref().map(|taking| taking.taken.clone()).unwrap_or_default();
    let mut registry = Registry::default();
    let metrics = Arc::new(Metrics::new(&mut registry));
    let exporter = Exporter::start(&config, &metrics)?;
    let (writer, reader) = state::store();
    let trust = trust(&config, &reader)?;
    let ways = Ways::new(&config, &trust.revoked);
    let identities = identity::identities(ways.ca, config.secret_ttl, trust.clone());
    let shared = shared(&config, reader.clone(), identities.clone(), metrics);
    let outside = outside(&config)?;
    let (workers, count) = start_workers(&config, &shared, &outside)?;

    let (monitor, pods) = (xds::Monitor::default(), Pods::default());
    let answers = Answers {
        node: config.node_name.as_str().into(),
        shared: shared.clone(),
        pods: pods.clone(),
        monitor: monitor.clone(),
        before: taken.clone(),
        gateway: None,
        more: None,
    };
    let (stop, stopping) = drain();
    let stop = Arc::new(stop);
    let pages = pages(&answers, Arc::new(registry), stop.clone(), level, dropped);
    let (replaced, was_replaced) = drain();
    let replaced = Arc::new(replaced);
    let mut admin = None;
    if taking.is_none() {
        // One that takes another's place shows its pages when it has.
        admin = Some(bind_admin(&config)?);
        serve_admin(&pages, admin.iter().flatten(), &was_replaced)?;
    }

    if let Some(path) = config.crl_path.clone() {
        tokio::spawn(revocation::watch(path, trust.revoked, identities.clone(), stopping.clone()));
    }
    tokio::spawn(identities.run(reached(stopping.clone(), Phase::Forced)));
    discover(&config, None, ways.xds.clone(), writer, monitor, stopping.clone());
    tokio::spawn(federation::watch(reader.clone(), trust.federated));
    tokio::spawn(watch_node_addresses(reader.clone()));
    tokio::spawn(give_back_memory(pods.clone()));
    if let Some(taking) = &taking {
        taking.known(&reader).await?;
    }
    let (pods_stop, _) = drain();
    let (attended, over) = (Arc::new(AtomicBool::new(false)), Arc::new(Over::default()));
    let fence = fence(&config, attended.clone(), reader.clone()).await?;
    tokio::spawn(fence.clone().run(stopping.clone()));
    let ends = (taken.clone(), was_replaced.clone());
    let cluster = cluster(&config, &answers).await?;
    let (begin, begun) = oneshot::channel();
    let watched = cluster.map(|agent| (agent, begun));
    let (pods_drain, agent) =
        start_pods(&config, &shared, &workers, &pods, pods_stop, ends, (outside, fence), watched)?;
    let giver = |admin: Vec<TcpListener>| Giver {
        pods: pods.clone(),
        admin,
        attended: attended.clone(),
        replaced: replaced.clone(),
        stop: stop.clone(),
        before: taken.clone(),
        over: over.clone(),
    };
    match (taking, admin, &config.handover) {
        (Some(taking), ..) => take_over(&config, taking, &pods, &pages, &was_replaced, giver).await?,
        (None, Some(admin), Some(path)) => {
            // Without it a successor cannot begin before this process has ended.
            if let Err(error) = giver(admin).wait(path) {
                tracing::warn!(path = %path.display(), %error, "no successor can take this process's listeners");
            }
        }
        (None, ..) => {}
    }
    // From here on this process is the one that serves.
    let _ = begin.send(());
    answer_control(&config, None, ways.xds, answers, was_replaced);
    tracing::info!(node = %config.node_name, workers = count, version = VERSION, "started");

    let mut terminate = signal(SignalKind::terminate())?;
    let told = wait_for_stop(&mut terminate, &stopping).await?;
    wait_for_successor(&attended, &stopping, config.termination_deadline).await;
    tracing::info!(deadline = ?config.termination_deadline, "draining");
    [&stop, &pods_drain].into_iter().for_each(|drain| drain.advance(Phase::Draining));
    wait_for_end(&pods, &workers, config.termination_deadline).await;
    tracing::info!("drained");
    // It has one last thing to say, unless the API server is away.
    let _ = timeout(LAST_WORD, agent).await;
    [&pods_drain, &stop].into_iter().for_each(|drain| drain.advance(Phase::Forced));
    finish_records(&pods).await;
    exporter.finish().await;
    if !told && replaced.watch().is_draining() {
        stay(&config, &over, &mut terminate).await;
    }
    Ok(())
}

async fn give_back_memory(pods: Pods) {
    let connections = move || {
        let (inbound, outbound) = pods.connections();
        inbound + outbound
    };
    memory::give_back_after_peaks(connections).await;
}

/// The fence of the node, if there is to be one.
async fn fence(config: &Node, attended: Arc<AtomicBool>, reader: state::Reader) -> anyhow::Result<Arc<Fence>> {
    let own = (config.fence == Switch::On).then(|| Netns::open(Path::new("/proc/self/ns/net")));
    let own = own.transpose().context("the node's own network cannot be fenced (TULLE_FENCE=off does without)")?;
    let lock = config.handover.as_ref().map(|path| path.with_extension("fence"));
    Ok(Fence::new(own, lock, attended, reader).await)
}

/// In a cluster, a process that was replaced waits to be ended, or for the end of who serves.
async fn stay(config: &Node, over: &Over, terminate: &mut Signal) {
    if let (Switch::On, Some(desk)) = (config.cluster.cluster, &config.handover) {
        tracing::info!("a successor serves; waiting to be ended, or for its end");
        tokio::select! { () = over.stay(desk) => {}, _ = terminate.recv() => {} }
    }
}

/// As many as the settings say, each watching its own connections.
fn start_workers(config: &Node, shared: &Shared, outside: &OwnResolver) -> anyhow::Result<(Workers<Worker>, usize)> {
    let cores = std::thread::available_parallelism().map_or(2, std::num::NonZero::get);
    let count = config.workers(cores).map_err(anyhow::Error::msg)?;
    let own = outbound::Outside { names: outside.clone(), proofs: Arc::new(Proofs::new(RootCa::System)) };
    let context = shared.clone();
    let workers = Workers::start(count, move |_| Worker::new(&context, own.clone())).context("cannot start workers")?;
    let watched = shared.reader.clone();
    workers.run_all(move |worker| {
        worker.entered.watch(watched.clone());
        worker.out.live.watch(watched.clone());
    });
    Ok((workers, count))
}

/// What all flows share.
fn shared(config: &Node, reader: state::Reader, identities: Identities, metrics: Arc<Metrics>) -> Shared {
    Shared {
        reader,
        identities,
        metrics,
        hbone: hbone_config(config),
        relay: relay::Limits { half_open: config.half_open_timeout },
        network: config.network.as_str().into(),
        cluster: config.cluster_id.as_str().into(),
        limits: Arc::default(),
        destinations: Arc::default(),
    }
}

/// Learns what the mesh is, from control or from a file in its place. `gateway`: the name of an egress gateway.
fn discover(
    config: &Node,
    gateway: Option<&str>,
    control: Control,
    writer: state::Writer,
    monitor: xds::Monitor,
    stopping: Drained,
) {
    let end = reached(stopping, Phase::Forced);
    match config.local_xds.clone() {
        Some(path) => drop(tokio::spawn(xds::local::run(path, writer, monitor, end))),
        None => drop(tokio::spawn(xds::run(xds_config(config, gateway, control), writer, monitor, end))),
    }
}

/// Whom this node believes from the start; the roots of other trust domains follow from control.
fn trust(config: &Node, reader: &state::Reader) -> anyhow::Result<Trust> {
    let aliases = Aliases::new(config.trust_domain_aliases.iter().cloned());
    reader.set_aliases(aliases.clone());
    let revoked = revocation::load(config.crl_path.as_deref())?;
    Ok(Trust { aliases, revoked, federated: Federated::default() })
}

/// Answers control's questions while this process is the one that serves; `gateway_pod`: it is an egress gateway, in this pod.
fn answer_control(config: &Node, gateway_pod: Option<&str>, control: Control, answers: Answers, replaced: Drained) {
    // With a file in the place of discovery nobody may be there to ask.
    if config.local_xds.is_some() {
        return;
    }
    let (node_name, gateway_pod) = (config.node_name.clone(), gateway_pod.unwrap_or_default().to_owned());
    let service = xds::NodeConfig { control, node_name, version: VERSION.to_owned(), gateway_pod };
    let answer = move |question| answers.answer(question);
    tokio::spawn(xds::run_node_service(service, answer, reached(replaced, Phase::Draining)));
}

/// Looks names up that lead out of the cluster, from the node's own network.
fn outside(config: &Node) -> anyhow::Result<OwnResolver> {
    let server = |text: &String| {
        let ip = text.parse::<IpAddr>().map(|ip| SocketAddr::new(ip, 53));
        ip.or_else(|_| text.parse()).with_context(|| format!("TULLE_NAME_SERVERS: {text:?} is no address"))
    };
    let mut servers = config.name_servers.iter().map(server).collect::<anyhow::Result<Vec<_>>>()?;
    if servers.is_empty() {
        let path = Path::new("/etc/resolv.conf");
        servers = system_servers(path).unwrap_or_else(|error| {
            tracing::warn!(%error, "no name server is known for names outside the cluster; set TULLE_NAME_SERVERS");
            Vec::new()
        });
    }
    let netns = Netns::open(Path::new("/proc/self/ns/net")).context("the node's own network cannot be opened")?;
    let thread = NetnsThread::start().context("cannot start the namespace thread")?;
    let options = Options { mark: 0, keepalive: None, user_timeout: None, reuse_port: false };
    Ok(OwnResolver::new(Arc::new(PodSockets::new(netns, thread, options)), servers))
}

/// The agent of a node in a cluster.
async fn cluster(config: &Node, answers: &Answers) -> anyhow::Result<Option<Arc<cluster::Agent>>> {
    Ok(match config.cluster.cluster {
        Switch::On => Some(cluster::Agent::new(config, answers).await?),
        Switch::Off => None,
    })
}

/// What watches the cluster, and the word that this process serves.
type Watched = (Arc<cluster::Agent>, oneshot::Receiver<()>);

#[allow(clippy::too_many_arguments, reason = "the node's parts, once each")]
fn start_pods(
    config: &Node,
    shared: &Shared,
    workers: &Workers<Worker>,
    pods: &Pods,
    stop: Drain,
    (taken, replaced): (Arc<Taken>, Drained),
    (outside, fence): (OwnResolver, Arc<Fence>),
    watched: Option<Watched>,
) -> anyhow::Result<(Arc<Drain>, JoinHandle<()>)> {
    let changed = Arc::new(Notify::new());
    let (list, watch) = watch::channel(List::default());
    let stop = Arc::new(stop);
    let stopping = stop.watch();
    let mut agent = tokio::spawn(async {});
    let (source, watcher) = match (&config.pods, &config.inpod_uds, watched) {
        (Some(path), None, None) => (Source::File(ListFile::new(path.clone())), watch_directory(path, changed.clone())),
        (None, Some(path), None) => {
            let talker = Agent { path: path.clone(), pods: pods.clone(), list, changed: changed.clone() };
            tokio::spawn(talker.run(shared.reader.clone(), stopping));
            (Source::Agent(watch), None)
        }
        (None, None, Some((watching, begun))) => {
            let (changed, replaced) = (changed.clone(), replaced.clone());
            agent = tokio::spawn(watching.run(cluster::Ends { list, changed, begun, replaced, stop: stopping }));
            (Source::Agent(watch), None)
        }
        (None, None, None) => anyhow::bail!(
            "there is no list of pods; set TULLE_PODS to the file that lists the node's pods, INPOD_UDS to the socket of \
             the CNI agent that hands them over, or TULLE_CLUSTER=on in a Kubernetes cluster"
        ),
        _ => anyhow::bail!(
            "the node has one list of pods, and more than one of TULLE_PODS, INPOD_UDS and TULLE_CLUSTER is set; unset one"
        ),
    };
    let environment = Arc::new(Environment {
        shared: shared.clone(),
        workers: workers.clone(),
        netns: NetnsThread::start().context("cannot start the namespace thread")?,
        options: options(config),
        limits: pod_limits(config),
        preexisting: config.preexisting,
        trust_domain: config.trust_domain.clone(),
        fence: fence.clone(),
        kernel: Kernel::ask(),
        names: config
            .dns_addresses()
            .map_err(anyhow::Error::msg)?
            .map(|addresses| Names::new(&config.cluster_domain, addresses, outside)),
        taken,
        replaced,
    });
    let pods = pods.clone().run(environment, source, changed, stop.clone());
    tokio::spawn(async move {
        let _watcher = watcher;
        pods.await;
    });
    Ok((stop, agent))
}

fn options(config: &Node) -> Options {
    let keepalive = (config.keepalive_time, config.keepalive_interval, config.keepalive_retries);
    Options {
        mark: config.packet_mark,
        keepalive: config.keepalive.then_some(keepalive),
        user_timeout: config
            .user_timeout
            .then(|| config.keepalive_time + config.keepalive_interval * config.keepalive_retries),
        reuse_port: config.port_reuse,
    }
}

fn pod_limits(config: &Node) -> Limits {
    Limits {
        connections: config.pod_max_connections,
        gate: GateLimits {
            handshakes: config.pod_max_handshakes,
            rate: config.pod_max_handshake_rate,
            source_rate: config.source_max_handshake_rate,
            tunnels: config.pod_max_tunnels,
        },
        buffer: config.pod_max_buffer,
    }
}

/// Tells the snapshot which addresses the node has. Interfaces come with the first pods of some networks, so it looks
/// again and again; a probe has an address of its own, so little depends on how soon.
async fn watch_node_addresses(reader: state::Reader) {
    const LOOK: Duration = Duration::from_secs(5);
    loop {
        match local_addresses() {
            Ok(addresses) => {
                let addresses: Vec<_> = addresses.into_iter().filter(|ip| !ip.is_loopback()).collect();
                reader.set_node_addresses(&addresses);
            }
            Err(error) => tracing::warn!(%error, "the node's own addresses cannot be read; the last known ones stay"),
        }
        sleep(LOOK).await;
    }
}

async fn reached(drained: Drained, phase: Phase) {
    drained.reached(phase).await;
}

/// A signal (true), or the admin page or a successor.
async fn wait_for_stop(terminate: &mut Signal, stopping: &Drained) -> io::Result<bool> {
    let mut interrupt = signal(SignalKind::interrupt())?;
    Ok(tokio::select! {
        _ = terminate.recv() => true,
        _ = interrupt.recv() => true,
        () = stopping.draining() => false,
    })
}

/// A successor that is getting ready may take half of the drain time for it: the one who asked us to stop may have
/// taken our pages for its own.
async fn wait_for_successor(attended: &AtomicBool, stopping: &Drained, deadline: Duration) {
    let until = Instant::now() + deadline / 2;
    while attended.load(Ordering::Relaxed) && !stopping.is_draining() && Instant::now() < until {
        sleep(LOOK).await;
    }
}

/// Until the last connection ended, or the deadline.
async fn wait_for_end(pods: &Pods, workers: &Workers<Worker>, deadline: Duration) {
    let (began, until) = (Instant::now(), Instant::now() + deadline);
    loop {
        sleep(LOOK.max(LAST_CALL.saturating_sub(began.elapsed())).min(deadline)).await;
        let (inbound, outbound) = pods.connections();
        // What else was accepted: handshakes, and tunnels without streams, whose peers have not seen the goodbye yet. One
        // that does not heed it holds nobody up.
        let others = workers.loads() > 0 && began.elapsed() < GOODBYE;
        if inbound + outbound + pods.questions() == 0 && !others {
            return;
        }
        if Instant::now() >= until {
            tracing::warn!(inbound, outbound, "the drain time is over; ending what is left");
            return;
        }
    }
}

/// Lets the records of what was ended reach the log: there may be thousands at once.
async fn finish_records(pods: &Pods) {
    let until = Instant::now() + RECORDS;
    while pods.connections() != (0, 0) && Instant::now() < until {
        sleep(LOOK).await;
    }
    // A connection is given back a moment before its record is finished.
    sleep(LOOK).await;
}

/// Takes the place of the process before this one.
async fn take_over(
    config: &Node,
    mut taking: Taking,
    pods: &Pods,
    pages: &[Routes; 3],
    replaced: &Drained,
    giver: impl FnOnce(Vec<TcpListener>) -> Giver,
) -> anyhow::Result<()> {
    taking.captured(pods).await;
    let admin = match taking.admin_at(&admin_addresses(config)) {
        Some(admin) => admin,
        None => bind_admin(config)?,
    };
    serve_admin(pages, &admin, replaced)?;
    taking.ready(giver(admin)).await.context("successors of this process could not find it")
}

fn xds_config(config: &Node, gateway: Option<&str>, control: Control) -> xds::Config {
    let mut metadata = config.metadata();
    if let Some(gateway) = gateway {
        metadata.insert(names::METADATA_TULLE_GATEWAY.to_owned(), gateway.into());
    }
    metadata.insert(names::METADATA_TULLE_VERSION.to_owned(), VERSION.into());
    let types: Vec<&str> = xds::own_types(config.network_policy == Switch::On).collect();
    metadata.insert(names::METADATA_TULLE_TYPES.to_owned(), types.join(",").into());
    xds::Config {
        control,
        node_name: config.node_name.clone(),
        instance_ip: config.instance_ip.clone(),
        pod_name: config.pod_name.clone(),
        pod_namespace: config.pod_namespace.clone(),
        metadata,
        network_policy: config.network_policy == Switch::On,
        on_demand: config.xds_on_demand,
        cluster_domain: config.cluster_domain.clone(),
    }
}

fn hbone_config(config: &Node) -> hbone::Config {
    hbone::Config {
        stream_window: config.stream_window,
        connection_window: config.connection_window,
        // Both ends of the range that HTTP/2 allows (RFC 9113 §6.5.2).
        frame_size: config.frame_size.clamp(16_384, (1 << 24) - 1),
        max_streams: config.pool_max_streams.max(1),
        idle: config.pool_idle,
        ..hbone::Config::default()
    }
}

fn pages(answers: &Answers, registry: Arc<Registry>, stop: Arc<Drain>, level: Level, dropped: Lines) -> [Routes; 3] {
    let page = |answers: &Answers, make: fn(&Answers) -> serde_json::Value| {
        let answers = answers.clone();
        move |_, _| {
            let answers = answers.clone();
            async move {
                let page = Page::json(&make(&answers));
                // What it was put together from is free now, in pieces that no heap gives back by itself.
                if page.body.len() > LARGE_PAGE {
                    memory::give_back();
                }
                page
            }
        }
    };
    let admin_routes = Routes::default()
        .route("/status", page(answers, Answers::status_json))
        .route("/config_dump", page(answers, Answers::config_dump))
        .route("/debug/destinations", page(answers, Answers::destinations_json))
        .route("/debug/versions", page(answers, Answers::versions_json))
        .route("/logging", move |method, query| {
            let level = level.clone();
            async move { set_level(&method, &query, &level) }
        })
        .route("/quitquitquit", move |method, _| {
            let stop = stop.clone();
            async move {
                if method != Method::POST {
                    return Page::text(StatusCode::METHOD_NOT_ALLOWED, "POST stops the proxy\n");
                }
                stop.advance(Phase::Draining);
                Page::text(StatusCode::OK, "draining\n")
            }
        });
    let metrics_routes = ["/metrics", "/stats/prometheus"].into_iter().fold(Routes::default(), |routes, path| {
        let (registry, metrics, dropped) = (registry.clone(), answers.shared.metrics.clone(), dropped.clone());
        let (pods, shown) = (answers.pods.clone(), answers.clone());
        routes.route(path, move |_, _| {
            pods.show(&metrics);
            shown.show_ejected();
            metrics.log_dropped.set(dropped.dropped());
            let mut body = String::new();
            let encoded = prometheus_client::encoding::text::encode(&mut body, &registry);
            async move {
                match encoded {
                    Ok(()) => Page {
                        status: StatusCode::OK,
                        kind: "application/openmetrics-text; version=1.0.0; charset=utf-8",
                        body,
                    },
                    Err(error) => Page::text(StatusCode::INTERNAL_SERVER_ERROR, error.to_string()),
                }
            }
        })
    });
    let ready = answers.clone();
    let readiness_routes = Routes::default().route("/healthz/ready", move |_, _| {
        let (pending, failing) = (ready.pending(), ready.pods.failing());
        async move {
            if pending.is_empty() {
                let failing: String = failing.iter().map(|what| format!("but not the {what}\n")).collect();
                Page::text(StatusCode::OK, format!("ready\n{failing}"))
            } else {
                let text = format!("not ready, pending: {}\n", pending.join(", "));
                Page::text(StatusCode::INTERNAL_SERVER_ERROR, text)
            }
        }
    });
    [admin_routes, metrics_routes, readiness_routes]
}

fn admin_addresses(config: &Node) -> [SocketAddr; 3] {
    [config.admin_address, config.metrics_address, config.readiness_address]
}

fn bind_admin(config: &Node) -> io::Result<Vec<TcpListener>> {
    admin_addresses(config).into_iter().map(admin::bind).collect()
}

/// Serves the pages until a successor does. The listeners stay with the caller, for it.
fn serve_admin<'a>(
    pages: &[Routes; 3],
    listeners: impl IntoIterator<Item = &'a TcpListener>,
    replaced: &Drained,
) -> io::Result<()> {
    for (routes, listener) in pages.iter().zip(listeners) {
        tokio::spawn(admin::serve(listener.try_clone()?, routes.clone(), replaced.clone()));
    }
    Ok(())
}

fn set_level(method: &Method, query: &str, level: &Level) -> Page {
    let wanted = query.split('&').find_map(|pair| pair.strip_prefix("level="));
    match (method, wanted) {
        (&Method::POST, Some(wanted)) => match level(wanted) {
            Ok(()) => Page::text(StatusCode::OK, format!("the log filter is {wanted}\n")),
            Err(error) => Page::text(StatusCode::BAD_REQUEST, format!("{error}\n")),
        },
        _ => Page::text(StatusCode::BAD_REQUEST, "POST /logging?level=<filter>, for example level=debug\n"),
    }
}

/// Two descriptors a connection: the default limit of 1024 would be 500 connections.
fn raise_file_limit() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    if let Ok((_, hard)) = getrlimit(Resource::RLIMIT_NOFILE)
        && let Err(error) = setrlimit(Resource::RLIMIT_NOFILE, hard, hard)
    {
        tracing::warn!(%error, "cannot raise the limit of open files");
    }
}
