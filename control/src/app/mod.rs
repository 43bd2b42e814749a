//! Wiring of `control serve`: one engine that turns objects into resources, and the servers around it.
//!
//! Start order: CA, listeners, source, engine; nothing is served before the first translation is published. On SIGTERM
//! streams end with UNAVAILABLE, so that nodes connect to another replica at once, and the process leaves within the
//! grace period even if somebody does not let go.

pub mod engine;
mod grpc;
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

use crate::admin;
use crate::authn;
use crate::base;
use crate::ca;
use crate::cluster;
use crate::config::{Serve, Source, Token};
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
    Kube(cluster::Client),
}

async fn source(serve: &Serve) -> anyhow::Result<From> {
    Ok(match &serve.source {
        Source::Files(folder) => {
            anyhow::ensure!(folder.is_dir(), "--source files:{}: there is no such folder", folder.display());
            From::Files(folder.clone())
        }
        Source::Kube => From::Kube(cluster::client(serve.kubeconfig.as_deref()).await?),
    })
}

/// Starts everything and returns once the listeners are bound.
pub async fn start(serve: Serve) -> anyhow::Result<Running> {
    let from = source(&serve).await?;
    let key_settings = serve.keys().map_err(anyhow::Error::msg)?;
    let now = base::unix_now();
    let authority = Authority::open(&serve.ca_dir, now).context("cannot open the CA")?;
    let verifier = Arc::new(authn::Verifier::new(authority.token_key())?);
    let authority = Arc::new(ArcSwap::from_pointee(authority));
    let server_tls = tls::ServerTls::new(&authority.load(), serve.server_names(), now)?;
    let grpc_listener = bind(serve.grpc_listen, "--grpc-listen").await?;
    let http_listener = bind(serve.http_listen, "--http-listen").await?;
    let (stop_sender, stop) = base::stop();

    let (loaded_sender, loaded) = watch::channel(None);
    let (followed_sender, followed) = watch::channel(Arc::default());
    let (engine, outputs) = engine::new(serve.settings());
    let (fetched_sender, fetched) = watch::channel(KeySources::default());
    let node_states = Arc::new(xds::server::Nodes::default());
    let registry = Arc::new(nodes::Registry::default());
    let counters = Arc::new(ca::server::Counters::default());
    let (told, trust) = watch::channel(tls::trust(&authority.load()));
    let services = grpc::Services {
        xds: xds::server::Server::new(
            Arc::clone(&verifier),
            outputs.published.clone(),
            Arc::clone(&node_states),
            stop.clone(),
        ),
        ca: ca::server::Server {
            verifier: Arc::clone(&verifier),
            authority: Arc::clone(&authority),
            accounts: outputs.accounts.clone(),
            trust_domain: serve.trust_domain.clone(),
            root_namespace: serve.root_namespace.clone(),
            counters: Arc::clone(&counters),
        },
        nodes: nodes::Server {
            verifier,
            registry: Arc::clone(&registry),
            root_namespace: serve.root_namespace.clone(),
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
    };
    let (grpc, http) = (grpc_listener.local_addr()?, http_listener.local_addr()?);
    let tasks = vec![
        match from {
            From::Files(folder) => tokio::spawn(source::files::watch::run(folder, loaded_sender, stop.clone())),
            From::Kube(client) => {
                let outputs = source::kube::Outputs { loaded: loaded_sender, followed: followed_sender };
                tokio::spawn(source::kube::run(client, outputs, stop.clone()))
            }
        },
        tokio::spawn(engine.run(loaded, fetched, stop.clone())),
        tokio::spawn(keys::run(key_settings, outputs.key_sources, fetched_sender, stop.clone())),
        tokio::spawn(tls::renew(serve.ca_dir.clone(), authority, server_tls.clone(), told, stop.clone())),
        tokio::spawn(grpc::serve(grpc_listener, server_tls, services, stop.clone())),
        tokio::spawn(admin::serve(http_listener, state, stop)),
    ];
    tracing::info!(%grpc, %http, "control is up");
    Ok(Running { grpc, http, stop: stop_sender, tasks })
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
