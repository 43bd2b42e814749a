//! A pod that is being served: its listeners, opened or taken over, what ends them, and the last part of a release. What
//! ends is told apart (connections, tunnels, names), because a released pod keeps its tunnels for a while.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::time::sleep;
use tulle_proto::names::{PORT_HBONE, PORT_INBOUND_PLAINTEXT, PORT_OUTBOUND};

use crate::app::handover::Open;
use crate::app::handover::successor::Taken;
use crate::app::pods::task::PodTask;
use crate::app::resolver::{GivenNames, NamesEnd};
use crate::app::worker::{Listeners, serve_pod};
use crate::base::drain::{Drain, Drained, Phase, drain};
use crate::base::netns::Netns;
use crate::base::sockets::PodSockets;
use crate::capture::rules::Rules;
use crate::capture::{self, preexisting};
use crate::flow::{LocalPod, PodName};

/// How long port 15008 stays open after release: peers learn of it later than we.
const LINGER: Duration = Duration::from_secs(30);
/// How often a released pod is looked at, whether anything still flows.
const LINGER_LOOK: Duration = Duration::from_secs(1);

/// A pod that is being served.
pub(super) struct Serving {
    pub(super) netns: Netns,
    pub(super) local: Arc<LocalPod>,
    pub(super) captured: Drain,
    pub(super) tunnels: Drain,
    pub(super) flows: Drain,
    pub(super) names: Drain,
    pub(super) open: Vec<Open>,
    /// How many TCP sockets wait for connections in it.
    pub(super) listening: usize,
    /// What the process before this one said of the pod: connections from before capture, and fingerprints.
    pub(super) inherited: Option<Inherited>,
    /// A probe went through the rules.
    pub(super) proven: bool,
}

pub(super) struct Inherited {
    pub(super) old: BTreeSet<preexisting::Pair>,
    pub(super) rules: Option<u64>,
    pub(super) datagrams: Option<u64>,
}

impl PodTask {
    /// Serves sockets of this pod that came late, besides its own: clients may stand in their queues.
    pub(super) async fn serve_more(&self, serving: &mut Serving) {
        while let Some(claim) = self.environment.taken.claim(&self.pod.uid, serving.netns.id()) {
            let (listeners, names) = (claim.listeners, Some(claim.names));
            match self
                .serve(&serving.local, listeners, names, [&serving.captured, &serving.tunnels, &serving.names])
                .await
            {
                Ok((open, listening)) => {
                    serving.open.push(open);
                    serving.listening += listening;
                }
                Err(reason) => tracing::warn!(pod = %self.name(), %reason, "late sockets are not served"),
            }
        }
        self.post(|entry| entry.open.clone_from(&serving.open));
    }

    pub(super) async fn listen(&self, netns: Netns) -> Result<Serving, String> {
        let env = &self.environment;
        let sockets = PodSockets::new(netns.clone(), env.netns.clone(), env.options.clone());
        let sockets = Arc::new(sockets.behind(env.fence.outlet(&self.pod.uid)));
        let claim = env.taken.claim(&self.pod.uid, netns.id());
        let (listeners, names, inherited) = match claim {
            Some(claim) => {
                let adopt =
                    |one| sockets.adopt(one).map_err(|error| format!("a listener cannot be taken over: {error}"));
                let Listeners { outbound, plaintext, hbone } = &claim.listeners;
                [outbound, plaintext, hbone].into_iter().try_for_each(adopt)?;
                let inherited = Inherited { old: claim.old, rules: claim.rules, datagrams: claim.datagrams };
                (claim.listeners, Some(claim.names), Some(inherited))
            }
            None => {
                let port = async |port: u16| {
                    let failed = |error| format!("cannot listen on port {port} in the pod: {error}");
                    sockets.listen(port).await.map_err(failed)
                };
                let (outbound, plaintext) = (port(PORT_OUTBOUND).await?, port(PORT_INBOUND_PLAINTEXT).await?);
                (Listeners { outbound, plaintext, hbone: port(PORT_HBONE).await? }, None, None)
            }
        };
        let [captured, tunnels, names_end] = [(); 3].map(|()| drain().0);
        let (flows, flows_watch) = drain();
        let name = PodName {
            uid: &self.pod.uid,
            name: &self.pod.name,
            namespace: &self.pod.namespace,
            service_account: &self.pod.service_account,
            cluster: &env.shared.cluster,
        };
        let local = Arc::new(LocalPod::new(name, self.pod.ips.clone(), sockets, flows_watch, env.limits));
        let (open, listening) = self.serve(&local, listeners, names, [&captured, &tunnels, &names_end]).await?;
        // From here on a successor can have them.
        self.post(|entry| {
            entry.netns = Some(netns.clone());
            entry.local = Some(local.clone());
            entry.open = vec![open.clone()];
        });
        Ok(Serving {
            netns,
            local,
            captured,
            tunnels,
            flows,
            names: names_end,
            open: vec![open],
            listening,
            inherited,
            proven: false,
        })
    }

    /// Serves the pod at `listeners`, and its names; `ends` are those of redirected connections, tunnels and datagrams. Gives
    /// also how many TCP sockets that are.
    async fn serve(
        &self,
        local: &Arc<LocalPod>,
        listeners: Listeners,
        names: Option<GivenNames>,
        ends: [&Drain; 3],
    ) -> Result<(Open, usize), String> {
        let env = &self.environment;
        let [captured, tunnels, datagrams] = ends.map(Drain::watch);
        let served = serve_pod(&env.workers, self.home, &env.shared, local, listeners, &captured, &tunnels);
        let mut sockets = served.map_err(|error| error.to_string())?.to_vec();
        let mut listening = sockets.len();
        if let Some(resolver) = &env.names {
            let ends = NamesEnd { streams: &captured, datagrams: &datagrams };
            let names = resolver.serve(env, self.home, &self.pod, local, names, ends).await?;
            // One for datagrams and one for streams at each address.
            listening += names.len() / 2;
            sockets.extend(names);
        }
        Ok((Open::new(sockets), listening))
    }
}

/// The last part of a release: until nothing flows any more, the pod is captured `again`, it is gone (then `again` is
/// forced), or the proxy stops.
pub(super) async fn linger(
    serving: Serving,
    again: Drained,
    stop: Drained,
    rules: Arc<tokio::sync::Mutex<Option<Rules>>>,
    taken: Arc<Taken>,
) {
    tokio::select! { () = sleep(LINGER) => {}, () = again.draining() => {}, () = stop.draining() => {} }
    serving.tunnels.advance(Phase::Draining);
    serving.flows.advance(Phase::Draining);
    let live = || serving.local.inbound.load(Ordering::Relaxed) + serving.local.outbound.load(Ordering::Relaxed);
    while live() > 0 {
        tokio::select! { () = sleep(LINGER_LOOK) => {}, () = again.forced() => break, () = stop.forced() => break }
    }
    end(&serving);
    // A process from before may still have connections of this pod, which need the rules.
    tokio::select! { () = taken.alone() => {}, () = again.draining() => {}, () = stop.forced() => {} }
    // Under the lock, so that a new capture is either seen here or installs after us.
    let mut installed = rules.lock().await;
    if !again.is_draining() && !stop.is_draining() {
        *installed = None;
        if let Err(error) = capture::remove(&serving.netns).await {
            tracing::warn!(%error, "the rules of a released pod could not be removed");
        }
    }
}

pub(super) fn end(serving: &Serving) {
    for drain in [&serving.captured, &serving.tunnels, &serving.flows, &serving.names] {
        drain.advance(Phase::Forced);
    }
}
