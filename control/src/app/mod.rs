//! Wiring of `control serve`: one engine that turns objects into resources, and the servers around it.
//!
//! Start order: CA, listeners, source, engine; nothing is served before the first translation is published. On SIGTERM
//! streams end with UNAVAILABLE, so that nodes connect to another replica at once, and the process leaves within the
//! grace period even if somebody does not let go.

pub mod engine;
mod grpc;
mod in_cluster;
mod tls;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use arc_swap::ArcSwap;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tulle_certs::ca::Authority;
use tulle_proto::names::LABEL_TUNNEL;

use crate::admin;
use crate::authn;
use crate::base;
use crate::ca;
use crate::cluster;
use crate::cluster::authority::Mirror;
use crate::config::{Published, Serve, Source, Token};
use crate::keys;
use crate::model::KeySources;
use crate::nodes;
use crate::source;
use crate::xds;

/// How long a stop may take.
const GRACE: Duration = Duration::from_secs(5);

/// A running control plane.
pub struct Running {
    /// Where xDS and the CA listen.
    pub grpc: SocketAddr,
    /// Where HTTP listens.
    pub http: SocketAddr,
    /// Where metrics alone are, if anywhere.
    pub metrics: Option<SocketAddr>,
    stop: base::StopSender,
    tasks: Vec<tokio::task::JoinHandle<()>>,
}

impl Running {
    /// Stops and waits, at most the grace period.
    pub async fn stop(self) {
        self.stop.send_replace(true);
        let all = async {
            for task in self.tasks {
                let _ = task.await;
            }
        };
        if tokio::time::timeout(GRACE, all).await.is_err() {
            tracing::warn!("not everything stopped within {GRACE:?}; leaving anyway");
        }
    }
}

/// Where objects come from, ready to be read.
enum From {
    Files(PathBuf),
    Kube(cluster::Client, Option<Box<Mirror>>),
}

async fn source(serve: &Serve) -> anyhow::Result<From> {
    Ok(match &serve.source {
        Source::Files(folder) => {
            anyhow::ensure!(folder.is_dir(), "--source files:{}: there is no such folder", folder.display());
            From::Files(folder.clone())
        }
        Source::Kube => {
            let client = cluster::client(serve.kubeconfig.as_deref()).await?;
            let (namespace, secret) = (&serve.root_namespace, &serve.ca_secret);
            let mirror = match secret.is_empty() {
                true => None,
                false => Some(Box::new(
                    Mirror::open(client.clone(), namespace, secret, &serve.ca_plugged_secret, &serve.ca_dir).await,
                )),
            };
            From::Kube(client, mirror)
        }
    })
}

/// Starts everything and returns once the listeners are bound.
pub async fn start(serve: Serve) -> anyhow::Result<Running> {
    let from = source(&serve).await?;
    let key_settings = serve.keys().map_err(anyhow::Error::msg)?;
    let now = base::unix_now();
    let authority = Authority::open(&serve.ca_dir, now).context("cannot open the CA")?;
    let own = authn::Verifier::new(authority.token_key())?;
    let authority = Arc::new(ArcSwap::from_pointee(authority));
    let server_tls = tls::ServerTls::new(&authority.load(), serve.server_names(), now)?;
    let grpc_listener = bind(serve.grpc_listen, "--grpc-listen").await?;
    let http_listener = bind(serve.http_listen, "--http-listen").await?;
    let metrics_listener = match serve.metrics_listen {
        Some(address) => Some(bind(address, "--metrics-listen").await?),
        None => None,
    };
    let (stop_sender, stop) = base::stop();
    let identity = in_cluster::identity();

    let (loaded_sender, loaded) = watch::channel(None);
    let (followed_sender, followed) = watch::channel(Arc::default());
    let (engine, outputs) = engine::new(serve.settings());
    let reviews = match &from {
        From::Files(_) => None,
        From::Kube(client, _) => Some(in_cluster::reviews(client, serve.token_audience.clone(), outputs.view.clone())),
    };
    let authn = Arc::new(authn::Authn::new(own, reviews));
    let (fetched_sender, fetched) = watch::channel(KeySources::default());
    let node_states = Arc::new(xds::server::Nodes::default());
    let registry = Arc::new(nodes::Registry::default());
    let counters = Arc::new(ca::server::Counters::default());
    let (told, trust) = watch::channel(tls::trust(&authority.load()));
    let services = grpc::Services {
        xds: xds::server::Server::new(
            Arc::clone(&authn),
            serve.root_namespace.clone(),
            outputs.published.clone(),
            Arc::clone(&node_states),
            stop.clone(),
        ),
        ca: ca::server::Server {
            authn: Arc::clone(&authn),
            authority: Arc::clone(&authority),
            accounts: outputs.accounts.clone(),
            trust_domain: serve.trust_domain.clone(),
            root_namespace: serve.root_namespace.clone(),
            counters: Arc::clone(&counters),
        },
        nodes: nodes::Server {
            authn,
            registry: Arc::clone(&registry),
            root_namespace: serve.root_namespace.clone(),
            gateways: knows_gateways(outputs.view.clone()),
            trust,
            stop: stop.clone(),
        },
    };
    let state = admin::State {
        view: outputs.view,
        published: outputs.published,
        node_states,
        registry,
        counters,
        authority: Arc::clone(&authority),
        settings: serve.settings(),
        followed,
        others: match &from {
            From::Files(_) => None,
            From::Kube(client, _) => {
                Some(in_cluster::others(client.clone(), serve.root_namespace.clone(), identity.clone()))
            }
        },
    };
    let (grpc, http) = (grpc_listener.local_addr()?, http_listener.local_addr()?);
    let mut tasks = vec![
        tokio::spawn(engine.run(loaded, fetched, stop.clone())),
        tokio::spawn(keys::run(key_settings, outputs.key_sources, fetched_sender, stop.clone())),
        tokio::spawn(tls::renew(serve.ca_dir.clone(), authority, server_tls.clone(), told, stop.clone())),
        tokio::spawn(grpc::serve(grpc_listener, server_tls, services, stop.clone())),
        tokio::spawn(admin::serve(http_listener, state.clone(), stop.clone())),
    ];
    let metrics = metrics_listener.as_ref().map(TcpListener::local_addr).transpose()?;
    let shown = state.clone();
    tasks.extend(metrics_listener.map(|listener| tokio::spawn(admin::scrape::serve(listener, state, stop.clone()))));
    match from {
        From::Files(folder) => tasks.push(tokio::spawn(source::files::watch::run(folder, loaded_sender, stop))),
        From::Kube(client, mirror) => {
            let plugged = mirror.is_some().then(|| plugged(&serve)).flatten();
            let publishes = mirror.is_some() && serve.cluster_trust_bundle == Published::Auto;
            let published = publishes.then(|| serve.ca_dir.clone());
            let mirror = mirror.map(|mirror| *mirror);
            let parts = in_cluster::Parts { client, identity, shown, mirror, plugged, published };
            tasks.extend(in_cluster::start(parts, loaded_sender, followed_sender, &stop));
        }
    }
    tracing::info!(%grpc, %http, "control is up");
    Ok(Running { grpc, http, metrics, stop: stop_sender, tasks })
}

/// The Secret of another CA that is followed, if one is named.
fn plugged(serve: &Serve) -> Option<(cluster::plugged::Names, PathBuf)> {
    let names = cluster::plugged::Names {
        namespace: serve.root_namespace.clone(),
        authority: serve.ca_secret.clone(),
        other: serve.ca_plugged_secret.clone(),
    };
    (!names.other.is_empty()).then(|| (names, serve.ca_dir.clone()))
}

async fn bind(address: SocketAddr, flag: &str) -> anyhow::Result<TcpListener> {
    TcpListener::bind(address).await.with_context(|| format!("cannot listen on {address} ({flag})"))
}

/// Runs until SIGTERM or SIGINT.
pub async fn serve(serve: Serve) -> anyhow::Result<()> {
    use tokio::signal::unix::SignalKind;
    let mut terminate = tokio::signal::unix::signal(SignalKind::terminate())?;
    let mut interrupt = tokio::signal::unix::signal(SignalKind::interrupt())?;
    let running = start(serve).await?;
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    tracing::info!("stopping");
    running.stop().await;
    Ok(())
}

/// The text that `control token` prints.
pub fn token(token: &Token) -> anyhow::Result<String> {
    let (namespace, service_account) = match &token.service_account {
        None => (token.root_namespace.clone(), tulle_proto::names::NODE_SERVICE_ACCOUNT.to_owned()),
        Some(text) => {
            let (namespace, account) =
                text.split_once('/').with_context(|| format!("`{text}` is not <namespace>/<account>"))?;
            (namespace.to_owned(), account.to_owned())
        }
    };
    // Refuse here what no certificate could say.
    tulle_certs::SpiffeId::new("cluster.local", &namespace, &service_account)?;
    let now = base::unix_now();
    let authority = Authority::open(&token.ca_dir, now).context("cannot open the CA")?;
    let caller = authn::Caller { namespace, service_account, node: token.node.clone() };
    let life_s = i64::try_from(token.ttl.as_secs()).unwrap_or(i64::MAX);
    Ok(authn::Issuer::new(authority.token_key())?.issue(&caller, now, life_s)?)
}

/// Tells by the objects in force who is an egress gateway: an unfinished pod of the caller's account on its node, which ends tunnels
/// itself.
fn knows_gateways(view: watch::Receiver<Arc<admin::View>>) -> nodes::KnowsGateway {
    Arc::new(move |caller, pod| {
        let key = (caller.namespace.clone(), pod.to_owned());
        let found = Arc::clone(&view.borrow()).world().pods.get(&key).cloned();
        found.is_some_and(|pod| {
            pod.service_account == caller.service_account
                && caller.node.as_ref() == Some(&pod.node)
                && !pod.finished()
                && pod.meta.labels.get(LABEL_TUNNEL).is_some_and(|value| value == "http")
        })
    })
}
