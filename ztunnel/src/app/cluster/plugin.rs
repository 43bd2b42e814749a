//! What the CNI plugin is answered.
//!
//! ADD of a pod in the mesh is answered once its traffic goes through the proxy, because that answer lets the pod start;
//! ADD of any other pod at once. A pod that the watch does not know yet is asked for by name. Where nothing is known the
//! runtime is told to try again: a pod of the mesh never starts outside of it.

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::time::{sleep, timeout};

use crate::app::cluster::Agent;
use crate::cluster::find::{Found, at_path};
use crate::cluster::pod::Member;
use crate::cluster::saved::Sandbox;
use crate::cluster::watch;
use crate::cni::enrolment::Labels;
use crate::cni::wire::{
    Answer, CHECK_FAILED, Command, DEADLINE, Done, NOT_AVAILABLE, Refusal, Request, TRY_AGAIN_LATER, WRONG_NETNS,
};

/// How long an ADD waits for the capture: enough less than the plugin waits that the reason still arrives.
const CAPTURE: Duration = Duration::from_secs(DEADLINE.as_secs() - 4);
/// How long a DEL waits until nothing of the pod is open any more; what is open longer does no harm but to linger.
const RELEASE: Duration = Duration::from_secs(2);
/// How often capture is looked at, which takes some tens of milliseconds.
const LOOK: Duration = Duration::from_millis(5);

impl Agent {
    /// Answers the plugin.
    pub(super) async fn answer(self: Arc<Self>, request: Request) -> Answer {
        match request.command {
            Command::Add => self.add(request).await,
            Command::Del => {
                self.del(&request.container_id, &request.if_name).await;
                Ok(Done { enrolled: false })
            }
            Command::Check => self.check(&request).await,
            Command::Status => self.status(),
            Command::Gc => {
                let valid = request.valid.unwrap_or_default();
                let valid: Vec<_> = valid.into_iter().map(|one| (one.container_id, one.if_name)).collect();
                let gone = self.state().strangers(&valid);
                for (container_id, if_name) in gone {
                    self.del(&container_id, &if_name).await;
                }
                Ok(Done { enrolled: false })
            }
        }
    }

    async fn add(&self, request: Request) -> Answer {
        let Some(pod) = self.pod(&request).await? else { return Ok(Done { enrolled: false }) };
        let name = format!("{}/{}", pod.namespace, pod.name);
        let enrolled = self.state().view.enrols(&pod);
        let found = match enrolled {
            true => Some(self.network(&request, &name).await?),
            false => None,
        };
        let id = found.as_ref().map(|found| found.netns.id());
        let sandbox = Sandbox {
            container_id: request.container_id,
            if_name: request.if_name,
            namespace: request.pod_namespace,
            name: request.pod_name,
            runtime_uid: request.pod_uid,
            netns: PathBuf::from(request.netns),
            ips: request.ips.iter().map(IpAddr::to_canonical).collect(),
        };
        self.state().sandbox_began(sandbox, &pod.uid, found, Instant::now());
        self.wake.notify_one();
        let Some(id) = id else { return Ok(Done { enrolled: false }) };
        let until = Instant::now() + CAPTURE;
        loop {
            let Err(why) = self.pods.captured_in(&pod.uid, id) else { return Ok(Done { enrolled: true }) };
            if Instant::now() >= until {
                let message = format!("pod {name} is in the mesh and not captured yet, so it does not start: {why}");
                let details =
                    "It is tried again. Look at `tulle status` and the log of ztunnel on this node.".to_owned();
                return Err(Refusal { code: TRY_AGAIN_LATER, message, details });
            }
            sleep(LOOK).await;
        }
    }

    /// The pod's network, which has to be the pod's own.
    async fn network(&self, request: &Request, name: &str) -> Result<Found, Refusal> {
        if request.ips.is_empty() {
            let message = format!("the plugins before this one gave pod {name} no address");
            return Err(Refusal::new(WRONG_NETNS, message));
        }
        let ips: Vec<_> = request.ips.iter().map(IpAddr::to_canonical).collect();
        at_path(Path::new(&request.netns), &self.settings.proc, &ips).await.map_err(|why| {
            Refusal::new(WRONG_NETNS, format!("the network namespace {} of pod {name} {why}", request.netns))
        })
    }

    /// The pod that a request is about, known to the view from here on. `None`: it is not in the mesh, whatever it is.
    async fn pod(&self, request: &Request) -> Result<Option<Member>, Refusal> {
        let (namespace, name) = (&request.pod_namespace, &request.pod_name);
        let is_meant = |pod: &Member| {
            let uid = request.pod_uid.as_str();
            pod.namespace == *namespace
                && pod.name == *name
                && (uid.is_empty() || uid == pod.uid || uid == pod.runtime_uid)
        };
        {
            let state = self.state();
            let found = state.view.pods().find(|pod| is_meant(pod)).cloned();
            if let Some(pod) = found.filter(|_| state.view.listed().1) {
                return Ok(Some(pod));
            }
        }
        let later = |why: String| {
            let message = format!("it is not known whether pod {namespace}/{name} belongs in the mesh: {why}");
            let details = "It is tried again. Look at whether the API server can be reached from this node.".to_owned();
            Refusal { code: TRY_AGAIN_LATER, message, details }
        };
        let of_namespace = self.labels(namespace).await;
        if let Ok(labels) = &of_namespace
            && self.state().view.known().whatever_the_pod_says(namespace, labels) == Some(false)
        {
            return Ok(None);
        }
        let labels = of_namespace.map_err(later)?;
        let asked = timeout(watch::PATIENCE, watch::pod(&self.client, namespace, name)).await;
        let asked = asked.unwrap_or_else(|_| Err("the API server does not answer".to_owned()));
        match asked.map_err(later)? {
            Some(pod) if is_meant(&pod) => {
                self.state().view.take_early(pod.clone(), Some(labels), Instant::now());
                Ok(Some(pod))
            }
            Some(pod) => Err(later(format!("the API server has another pod of that name, with uid {}", pod.uid))),
            None => Err(later("the API server knows no such pod".to_owned())),
        }
    }

    /// Labels of a namespace: as watched, else as the API server says when it is asked.
    async fn labels(&self, namespace: &str) -> Result<Labels, String> {
        {
            let state = self.state();
            if let Some(labels) = state.view.namespace(namespace) {
                return Ok(labels.clone());
            }
        }
        let asked = timeout(watch::PATIENCE, watch::namespace(&self.client, namespace)).await;
        asked.unwrap_or_else(|_| Err("the API server does not answer".to_owned()))
    }

    async fn del(&self, container_id: &str, if_name: &str) {
        let ended = self.state().sandbox_ended(container_id, if_name, Instant::now());
        self.wake.notify_one();
        let Some(id) = ended else { return };
        let until = Instant::now() + RELEASE;
        while self.pods.holds(id) && Instant::now() < until {
            sleep(LOOK).await;
        }
    }

    async fn check(&self, request: &Request) -> Answer {
        let name = format!("{}/{}", request.pod_namespace, request.pod_name);
        let Some(pod) = self.pod(request).await? else { return Ok(Done { enrolled: false }) };
        if !self.state().view.enrols(&pod) {
            return Ok(Done { enrolled: false });
        }
        let found = self.network(request, &name).await.map_err(|refusal| Refusal { code: CHECK_FAILED, ..refusal })?;
        match self.pods.captured_in(&pod.uid, found.netns.id()) {
            Ok(()) => Ok(Done { enrolled: true }),
            Err(why) => Err(Refusal::new(CHECK_FAILED, format!("pod {name} is in the mesh and not captured: {why}"))),
        }
    }

    fn status(&self) -> Answer {
        match self.state().view.listed() {
            (true, true) => Ok(Done { enrolled: false }),
            _ => Err(Refusal::new(
                NOT_AVAILABLE,
                "the agent has not heard from the API server yet, so it cannot tell which pods belong in the mesh",
            )),
        }
    }
}
