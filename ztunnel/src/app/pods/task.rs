//! One pod's way: what is wanted is brought about, step by step, and what is so is posted on the board.
//!
//! Listeners come before rules and rules before their proof, so that nothing is redirected to nowhere; a release is the
//! reverse. A step that fails is told and tried again, with a growing pause.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use tokio::sync::{Semaphore, watch};
use tokio::task::JoinHandle;
use tokio::time::sleep;

use crate::app::pods::serving::{Serving, end, linger};
use crate::app::pods::{Board, Entry, Environment};
use crate::app::resolver::Names;
use crate::app::wanted::Wanted;
use crate::base::drain::{Drain, Phase, drain};
use crate::base::netns::{Netns, local_addresses, run_blocking};
use crate::capture::pods::Pod;
use crate::capture::probe::{self, Claims};
use crate::capture::rules::{Rules, rules_are_broken};
use crate::capture::{self, preexisting};
use crate::policy::datagrams::Filter;

/// How soon the redirects of a CNI agent are probed again that did not lead here: it installs them about when it hands
/// the pod over.
const PROVE: Duration = Duration::from_secs(1);
/// Pause after a failed capture, growing.
const RETRY: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(10));

/// Brings one pod to what is wanted.
pub(super) struct PodTask {
    pub(super) environment: Arc<Environment>,
    pub(super) board: Board,
    pub(super) pod: Pod,
    /// `None`: the pod is gone.
    pub(super) desired: watch::Receiver<Option<Wanted>>,
    pub(super) slots: Arc<Semaphore>,
    pub(super) stop: Arc<Drain>,
    pub(super) home: usize,
    /// An earlier serving that still carries connections: `Draining` says that the pod is captured again, being dropped
    /// that it is gone.
    pub(super) lingering: Option<Drain>,
    /// The task that had the pod before its entry changed; nothing is touched before it has ended.
    pub(super) predecessor: Option<JoinHandle<()>>,
    /// What is installed. Held while it changes, so that a late release cannot take away what a new capture brought.
    pub(super) rules: Arc<tokio::sync::Mutex<Option<Rules>>>,
    /// The filter that is installed. `None`: not known.
    pub(super) datagrams: tokio::sync::Mutex<Option<Option<Arc<Filter>>>>,
    /// Rules that an earlier proxy left behind were looked for.
    pub(super) cleaned: bool,
}

impl PodTask {
    pub(super) async fn run(mut self) {
        if let Some(predecessor) = self.predecessor.take() {
            let _ = predecessor.await;
        }
        self.post(|_| {});
        let mut pause = RETRY.0;
        let mut serving: Option<Serving> = None;
        let taken = self.environment.taken.clone();
        let mut more = taken.more();
        loop {
            let desired = self.desired.borrow_and_update().clone();
            let Some(wanted) = desired else { break };
            let done = match (serving.take(), wanted.capture) {
                (None, true) => match self.start(&wanted).await {
                    Ok(mut started) => {
                        // Only now are the connections from before known, which may have to end.
                        let adjusted = self.adjust(&mut started, &wanted).await;
                        serving = Some(started);
                        adjusted
                    }
                    Err(reason) => Err(reason),
                },
                (Some(released), false) => self.release(released, &wanted).await,
                (Some(mut running), true) => {
                    self.serve_more(&mut running).await;
                    let adjusted = self.adjust(&mut running, &wanted).await;
                    serving = Some(running);
                    adjusted
                }
                (None, false) => self.stay_out(&wanted).await,
            };
            self.post(|entry| entry.tried = Some(done.clone()));
            let again = match done {
                Ok(()) => {
                    pause = RETRY.0;
                    None
                }
                Err(reason) => {
                    tracing::warn!(pod = %self.name(), %reason, "capture failed; trying again");
                    self.state("Failed", reason);
                    pause = (pause * 2).min(RETRY.1);
                    Some(pause)
                }
            };
            let draining = self.draining();
            let unproven = serving.as_ref().is_some_and(|serving| !serving.proven);
            let cleans_later = serving.is_none() && !self.cleaned && !taken.is_alone();
            tokio::select! {
                changed = self.desired.changed() => if changed.is_err() { break },
                // Sockets of this pod that the process before this one opened after all.
                _ = more.changed(), if serving.is_some() => {}
                () = taken.alone(), if cleans_later => {}
                () = sleep(again.unwrap_or_default()), if again.is_some() => {}
                () = sleep(PROVE), if unproven => {}
                () = draining => break,
            }
        }
        self.finish(serving).await;
    }

    /// Not captured: makes sure that no rules are left from another time.
    async fn stay_out(&mut self, wanted: &Wanted) -> Result<(), String> {
        if !wanted.known {
            // Rules that are there stay: better no traffic than traffic past the mesh.
            self.state("Uncaptured", "control has not said yet whether the pod is in the mesh".into());
            return Ok(());
        }
        // Rules that a draining process still needs for its connections stay, too.
        if !self.cleaned && self.lingering.is_none() && self.environment.taken.is_alone() {
            let _slot = self.slots.acquire().await.map_err(|error| error.to_string())?;
            if let Ok(netns) = self.pod.open()
                && capture::installed(&netns).await.is_ok()
            {
                capture::remove(&netns).await.map_err(|error| format!("rules of an earlier capture stay: {error}"))?;
            }
            self.cleaned = true;
        }
        self.state("Uncaptured", String::new());
        self.let_out(wanted).await;
        Ok(())
    }

    /// A pod that is not captured leaves the fence, too, as soon as control has said that it is open.
    async fn let_out(&self, wanted: &Wanted) {
        if wanted.tcp_only == Some(false)
            && self.environment.fence.may_hold(&self.pod.uid).await
            && let Ok(netns) = self.pod.open()
        {
            self.fence(&netns, Some(false)).await;
        }
    }

    pub(super) fn name(&self) -> String {
        format!("{}/{}", self.pod.namespace, self.pod.name)
    }

    fn draining(&self) -> impl Future<Output = ()> + use<> {
        let stop = self.stop.watch();
        async move { stop.draining().await }
    }

    pub(super) fn post(&self, change: impl FnOnce(&mut Entry)) {
        let mut board = self.board.lock().unwrap_or_else(PoisonError::into_inner);
        let entry = board.entry(self.pod.uid.clone()).or_insert_with(|| Entry {
            pod: self.pod.clone(),
            state: "Uncaptured",
            reason: String::new(),
            old: BTreeSet::new(),
            netns: None,
            local: None,
            open: Vec::new(),
            rules: None,
            datagrams: None,
            fence: None,
            served: false,
            tried: None,
        });
        change(entry);
    }

    pub(super) fn state(&self, state: &'static str, reason: String) {
        self.post(|entry| {
            entry.state = state;
            entry.reason = reason;
        });
    }

    /// Listeners, rules, proof; in this order, so that nothing is redirected to nowhere.
    async fn start(&mut self, wanted: &Wanted) -> Result<Serving, String> {
        self.state("Pending", "installing".into());
        if let Some(lingering) = &self.lingering {
            lingering.advance(Phase::Draining);
        }
        let _slot = self.slots.acquire().await.map_err(|error| error.to_string())?;
        let netns = self.pod.open()?;
        self.check_owner(&netns).await?;
        self.cleaned = false;
        let mut serving = self.listen(netns).await?;
        let inherited = serving.inherited.as_ref();
        let mut rules = self.rules(wanted, inherited.map_or(&BTreeSet::new(), |it| &it.old));
        if wanted.tcp_only.is_none() {
            // Control has not said; what an earlier proxy installed stays until it does.
            rules.tcp_only =
                capture::installed(&serving.netns).await.is_ok_and(|table| table.contains("filter_output"));
        }
        self.inherit(inherited, &rules, wanted.datagrams.as_ref()).await;
        self.install(&serving.netns, rules, wanted.datagrams.clone()).await?;
        if !self.is_by_agent()
            && let Err(reason) = self.prove(&mut serving).await
        {
            end(&serving);
            return Err(reason);
        }
        let old = match &serving.inherited {
            // The tunnels of the process before this one would look like strangers.
            Some(inherited) => inherited.old.clone(),
            None => {
                let listening = Some(serving.listening);
                preexisting::list(&serving.netns, listening).await.map_err(|error| error.to_string())?
            }
        };
        tracing::info!(pod = %self.name(), preexisting = old.len(), by_agent = self.is_by_agent(), "captured");
        self.post(|entry| {
            entry.state = if serving.proven { "Captured" } else { "Pending" };
            entry.reason = String::new();
            entry.old = old;
        });
        Ok(serving)
    }

    /// Whether redirects are not ours to install.
    pub(super) fn is_by_agent(&self) -> bool {
        self.pod.by_agent
    }

    /// Proves that the rules bring the pod's connections here.
    pub(super) async fn prove(&self, serving: &mut Serving) -> Result<(), String> {
        // A sabotaged build skips the proof, which would find the sabotage out.
        if !rules_are_broken() {
            let names = self.environment.names.as_ref().map_or(&[][..], Names::addresses);
            let claims = Claims { addresses: &self.pod.ips, names, by_agent: self.is_by_agent() };
            probe::verify(&serving.netns, claims).await?;
        }
        serving.proven = true;
        Ok(())
    }

    /// A path may lead to another pod's namespace by now; its traffic must not get this pod's identity.
    async fn check_owner(&self, netns: &Netns) -> Result<(), String> {
        let has = run_blocking(netns, local_addresses).await.map_err(|error| error.to_string())?;
        match self.pod.ips.iter().find(|ip| !has.contains(ip)) {
            None => Ok(()),
            Some(ip) => Err(format!(
                "the network namespace {} does not own the pod's address {ip}; is it another pod's?",
                self.pod.netns.display()
            )),
        }
    }

    /// Back to plain networking. What flows goes on; tunnels that peers still open are served for a while.
    async fn release(&mut self, serving: Serving, wanted: &Wanted) -> Result<(), String> {
        let rules = Rules { released: true, v6: self.pod.ips.iter().any(IpAddr::is_ipv6), ..Rules::default() };
        // Out of the fence first, which would drop what goes past the proxy.
        self.let_out(wanted).await;
        // A failure is told and tried again by `stay_out`, which finds the table.
        let released = self.install(&serving.netns, rules, Some(None)).await;
        serving.captured.advance(Phase::Draining);
        tracing::info!(pod = %self.name(), "released");
        let (again, watch) = drain();
        let taken = self.environment.taken.clone();
        tokio::spawn(linger(serving, watch, self.stop.watch(), self.rules.clone(), taken));
        if released.is_ok() {
            self.lingering = Some(again);
            self.state("Uncaptured", String::new());
        }
        released
    }

    /// The pod is gone, or the proxy stops. The rules stay either way: a namespace that is still there although the pod
    /// is not listed any more fails closed.
    async fn finish(self, serving: Option<Serving>) {
        let stop = self.stop.watch();
        if !stop.is_draining() {
            if let Some(serving) = serving {
                end(&serving);
                if self.is_by_agent() {
                    // The agent takes its own rules back; the pod may go on outside the mesh.
                    let nothing = Rules { by_agent: true, ..Rules::default() };
                    let _ = self.install(&serving.netns, nothing, Some(None)).await;
                }
                let pod = self.pod.uid.clone();
                self.environment.workers.run_all(move |worker| worker.out.pool.forget(&pod));
            }
            self.environment.fence.gone(&self.pod.uid).await;
            self.board.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.pod.uid);
            return;
        }
        if let Some(serving) = serving {
            // A successor accepts from the very same sockets: what is in their queues is its own now.
            let listeners = if self.environment.replaced.is_draining() { Phase::Forced } else { Phase::Draining };
            serving.captured.advance(listeners);
            serving.tunnels.advance(listeners);
            if listeners == Phase::Forced {
                serving.names.advance(listeners);
            }
            serving.flows.advance(Phase::Draining);
            stop.forced().await;
            end(&serving);
        } else if self.lingering.is_some() {
            // Its flows would end with the word that they may go on.
            stop.forced().await;
        }
    }
}
