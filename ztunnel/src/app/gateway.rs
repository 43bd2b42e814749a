//! Wiring of `ztunnel gateway`: the same discovery, certificates, pages and drain as a node's proxy, with one listener for
//! tunnels in the place of pods.
//!
//! It is ready when the mesh is known, its certificate is there and it listens; so a Service sends it nothing before. On
//! SIGTERM it says goodbye to tunnels, and what it carries may go on for the drain time.

use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::Context as _;
use prometheus_client::registry::Registry;
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::{Instant, sleep};
use tulle_certs::SpiffeId;

use crate::app::answers::{Answers, VERSION};
use crate::app::pods::Pods;
use crate::app::spans::Exporter;
use crate::app::ways::Ways;
use crate::app::{
    GOODBYE, LAST_CALL, LOOK, Level, RECORDS, answer_control, bind_admin, discover, federation, logging, options,
    outside, pages, pod_limits, raise_file_limit, reached, revocation, serve_admin, shared, trust, wait_for_stop,
    watch_node_addresses,
};
use crate::base::drain::{Drained, Phase, drain};
use crate::base::memory;
use crate::base::netns::{Netns, NetnsThread};
use crate::base::sockets::{Options, PodSockets};
use crate::base::workers::{Accepted, Workers, spawn};
use crate::config::Node;
use crate::config::gateway::Gateway as Config;
use crate::flow::proof::Proofs;
use crate::flow::{LocalPod, PodName, Shared};
use crate::gateway::clients::ClientCertificates;
use crate::gateway::limits::{HostLimits, Hosts};
use crate::gateway::originate::Originator;
use crate::gateway::recheck::{Live, live};
use crate::gateway::{Gateway, serve};
use crate::identity::{self, RootCa};
use crate::state::{self, ServiceName};
use crate::telemetry::lines::Lines;
use crate::telemetry::metrics::Metrics;
use crate::xds;

/// Runs the egress gateway until it is told to stop.
///
/// # Errors
/// What keeps it from starting, with the setting to change.
pub fn run(config: Config) -> anyhow::Result<()> {
    let (node, told) = config.node.clone().with_environment().map_err(anyhow::Error::msg)?;
    let config = Config { node, ..config };
    config.check().map_err(anyhow::Error::msg)?;
    // Only the first one counts; a test may have installed it already.
    let _ = (*crate::tls::provider()).clone().install_default();
    raise_file_limit();
    let (level, dropped, _writer) = logging(&config.node)?;
    told.iter().for_each(|what| tracing::warn!("{what}"));
    let cores = std::thread::available_parallelism().map_or(2, std::num::NonZero::get);
    memory::tame(config.node.workers(cores).map_err(anyhow::Error::msg)? + 1);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(gateway(config, level, dropped))
}

/// What a worker owns.
struct Worker {
    live: Rc<Live>,
}

async fn gateway(config: Config, level: Level, dropped: Lines) -> anyhow::Result<()> {
    let node = &config.node;
    let mut registry = Registry::default();
    let metrics = Arc::new(Metrics::new(&mut registry));
    let exporter = Exporter::start(node, &metrics)?;
    let (writer, reader) = state::store();
    let trust = trust(node, &reader)?;
    let ways = Ways::new(node, &trust.revoked);
    let identities = identity::identities(ways.ca, node.secret_ttl, trust.clone());
    let shared = shared(node, reader.clone(), identities.clone(), metrics);
    let (stop, stopping) = drain();
    let stop = Arc::new(stop);
    let (flows, flowing) = drain();
    let gateway = make(&config, shared.clone(), flowing)?;
    let cores = std::thread::available_parallelism().map_or(2, std::num::NonZero::get);
    let count = node.workers(cores).map_err(anyhow::Error::msg)?;
    let workers = Workers::start(count, |_| Worker { live: live() }).context("cannot start workers")?;
    let watched = reader.clone();
    workers.run_all(move |worker| worker.live.watch(watched.clone()));

    let (monitor, listens) = (xds::Monitor::default(), Arc::new(AtomicBool::new(false)));
    let own = (gateway.clone(), listens.clone());
    let answers = Answers {
        node: node.node_name.as_str().into(),
        shared,
        pods: Pods::none(),
        monitor: monitor.clone(),
        before: Arc::default(),
        gateway: Some(gateway.service.clone()),
        more: Some(Arc::new(move || pending(&own.0, &own.1))),
    };
    let pages = pages(&answers, Arc::new(registry), stop.clone(), level, dropped);
    let admin = bind_admin(node)?;
    let (_replaced, was_replaced) = drain();
    answer_control(node, Some(&node.pod_name), ways.xds.clone(), answers, stopping.clone());
    serve_admin(&pages, &admin, &was_replaced)?;

    if let Some(path) = node.crl_path.clone() {
        tokio::spawn(revocation::watch(path, trust.revoked, identities.clone(), stopping.clone()));
    }
    identities.want(&[gateway.identity.clone()].into());
    tokio::spawn(identities.run(reached(stopping.clone(), Phase::Forced)));
    discover(node, Some(&config.gateway_name), ways.xds, writer, monitor, stopping.clone());
    tokio::spawn(federation::watch(reader.clone(), trust.federated));
    tokio::spawn(watch_node_addresses(reader));
    let counted = gateway.clone();
    tokio::spawn(memory::give_back_after_peaks(move || counted.pod.inbound.load(Ordering::Relaxed)));
    listen(&config, &gateway, &workers, &stopping).await?;
    listens.store(true, Ordering::Relaxed);
    tracing::info!(gateway = %config.gateway_name, identity = %gateway.identity, workers = count, version = VERSION, "started");

    wait_for_stop(&mut signal(SignalKind::terminate())?, &stopping).await?;
    tracing::info!(deadline = ?node.termination_deadline, "draining");
    stop.advance(Phase::Draining);
    flows.advance(Phase::Draining);
    wait_for_end(&gateway, &workers, node).await;
    flows.advance(Phase::Forced);
    stop.advance(Phase::Forced);
    let until = Instant::now() + RECORDS;
    while gateway.pod.inbound.load(Ordering::Relaxed) > 0 && Instant::now() < until {
        sleep(LOOK).await;
    }
    // A connection is given back a moment before its record is finished.
    sleep(LOOK).await;
    exporter.finish().await;
    Ok(())
}

/// The gateway by its settings.
fn make(config: &Config, shared: Shared, drained: Drained) -> anyhow::Result<Arc<Gateway>> {
    let node = &config.node;
    let identity = SpiffeId::new(&node.trust_domain, &node.pod_namespace, &node.service_account)
        .context("POD_NAMESPACE and SERVICE_ACCOUNT are no identity")?;
    let netns = Netns::open(Path::new("/proc/self/ns/net")).context("cannot open the own network namespace")?;
    let thread = NetnsThread::start().context("cannot start the namespace thread")?;
    // Nobody captures the gateway's own pod, so it needs no mark, and no privilege.
    let sockets = Arc::new(PodSockets::new(netns, thread, Options { mark: 0, ..options(node) }));
    let name = PodName {
        uid: "",
        name: &node.pod_name,
        namespace: &node.pod_namespace,
        service_account: &node.service_account,
        cluster: &node.cluster_id,
    };
    let pod = Arc::new(LocalPod::new(name, Vec::new(), sockets, drained, pod_limits(node)));
    let hostname = format!("{}.{}.svc.{}", config.gateway_name, node.pod_namespace, node.cluster_domain);
    let service = ServiceName { namespace: node.pod_namespace.as_str().into(), hostname: hostname.into() };
    let roots = || RootCa::parse(&config.gateway_root_ca);
    Ok(Arc::new(Gateway {
        shared,
        pod,
        identity,
        service: Arc::new(service),
        from: config.gateway_source.clone(),
        names: outside(node)?,
        hosts: Hosts::new(HostLimits { connections: config.host_max_connections, rate: config.host_max_rate }),
        tls: Originator::new(roots(), ClientCertificates::new(config.gateway_client_certificates.clone())),
        proofs: Proofs::new(roots()),
    }))
}

/// What the gateway waits for besides the mesh.
fn pending(gateway: &Gateway, listens: &AtomicBool) -> Vec<String> {
    let mut pending = Vec::new();
    if gateway.shared.identities.current(&gateway.identity).is_none() {
        pending.push(format!("the certificate of {}", gateway.identity));
    }
    if !listens.load(Ordering::Relaxed) {
        pending.push("its listener".to_owned());
    }
    pending
}

/// Takes tunnels until the gateway drains.
async fn listen(
    config: &Config,
    gateway: &Arc<Gateway>,
    workers: &Workers<Worker>,
    stopping: &Drained,
) -> anyhow::Result<()> {
    let port = config.gateway_port;
    let listener = gateway.pod.sockets.listen(port).await.with_context(|| {
        format!(
            "cannot listen on port {port} for tunnels; TULLE_GATEWAY_PORT sets another, to which the Service then leads"
        )
    })?;
    let gateway = gateway.clone();
    let accepted: Accepted<Worker> = Arc::new(move |worker, tcp, load| {
        let gateway = gateway.clone();
        // Made within the task: a future that is moved into another one is there twice.
        spawn(async move {
            serve(gateway, worker.live.clone(), tcp).await;
            drop(load);
        });
    });
    workers.accept(0, listener, stopping.clone(), accepted).context("the first worker takes no listener")?;
    Ok(())
}

/// Until the last connection ended, or the deadline.
async fn wait_for_end(gateway: &Gateway, workers: &Workers<Worker>, config: &Node) {
    let (began, until) = (Instant::now(), Instant::now() + config.termination_deadline);
    loop {
        sleep(LAST_CALL.min(config.termination_deadline)).await;
        let connections = gateway.pod.inbound.load(Ordering::Relaxed);
        // Tunnels without streams, whose peers have not seen the goodbye yet. One that does not heed it holds nobody up.
        let others = workers.loads() > 0 && began.elapsed() < GOODBYE;
        if connections == 0 && !others {
            tracing::info!("drained");
            return;
        }
        if Instant::now() >= until {
            tracing::warn!(connections, "the drain time is over; ending what is left");
            return;
        }
    }
}
