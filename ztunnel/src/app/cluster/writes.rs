//! Writing to the API server: annotations of pods, a few at a time, and the condition of the Node.
//!
//! For each pod only the newest wish counts, and one write at a time. A write that failed is tried again with a growing
//! pause; what is wished meanwhile takes its place.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use tokio::task::JoinSet;

use crate::app::cluster::Agent;
use crate::app::cluster::state::Annotation;
use crate::app::view::Status;
use crate::cluster::Client;
use crate::cluster::publish::{Before, Condition, Schedule, Written, annotate};
use crate::identity::backoff;

/// Writes at a time: after the label of a namespace all of its pods on this node are written, and the API server has other
/// clients.
const AT_ONCE: usize = 8;
/// Pause before the next try, growing.
const RETRY: (Duration, Duration) = (Duration::from_millis(300), Duration::from_secs(15));

/// A finished write.
pub(super) enum Done {
    Annotation(Annotation, Written),
    Condition(Before, Condition, Result<(), String>),
}

#[derive(Debug, Default)]
struct Tries {
    under_way: bool,
    failures: u32,
    next: Option<Instant>,
}

/// See the module's header.
pub(super) struct Writes {
    wanted: Vec<Annotation>,
    tries: HashMap<String, Tries>,
    running: JoinSet<Done>,
    schedule: Schedule,
    before: Option<Before>,
    began: Instant,
    /// The condition is being written.
    telling: bool,
    condition_failed: Option<Instant>,
}

impl Writes {
    pub(super) fn new() -> Self {
        Self {
            wanted: Vec::new(),
            tries: HashMap::new(),
            running: JoinSet::new(),
            schedule: Schedule::default(),
            before: None,
            began: Instant::now(),
            telling: false,
            condition_failed: None,
        }
    }

    /// These are to be written; whatever was wished before is not.
    pub(super) fn want(&mut self, wanted: Vec<Annotation>) {
        self.tries.retain(|uid, tries| tries.under_way || wanted.iter().any(|one| one.uid == *uid));
        self.wanted = wanted;
    }

    pub(super) fn under_way(&self) -> bool {
        !self.wanted.is_empty()
    }

    /// Starts what may be started.
    pub(super) fn start(&mut self, agent: &Agent, now: Instant) {
        for one in &self.wanted {
            if self.running.len() >= AT_ONCE {
                return;
            }
            let tries = self.tries.entry(one.uid.clone()).or_default();
            if tries.under_way || tries.next.is_some_and(|next| now < next) {
                continue;
            }
            tries.under_way = true;
            let (client, one) = (agent.client.clone(), one.clone());
            self.running.spawn(async move {
                let written = annotate(&client, &one.namespace, &one.name, &one.uid, one.value).await;
                Done::Annotation(one, written)
            });
        }
    }

    /// The next write that ends; waits for ever while there is none.
    pub(super) async fn next(&mut self) -> Option<Done> {
        match self.running.join_next().await {
            Some(done) => done.ok(),
            None => std::future::pending().await,
        }
    }

    /// A write has ended.
    pub(super) fn done(&mut self, agent: &Agent, done: Option<Done>) {
        let (one, written) = match done {
            Some(Done::Annotation(one, written)) => (one, written),
            Some(Done::Condition(before, condition, result)) => return self.told(before, condition, result),
            None => return,
        };
        let tries = self.tries.entry(one.uid.clone()).or_default();
        tries.under_way = false;
        match written {
            Written::Done => {
                agent.state().view.annotated(&one.uid, one.value);
                self.tries.remove(&one.uid);
                tracing::info!(pod = %format!("{}/{}", one.namespace, one.name), redirection = one.value.unwrap_or("none"), "published");
            }
            // The watch will say so.
            Written::Gone => tries.next = Some(Instant::now() + RETRY.1),
            Written::Failed(reason) => {
                tries.failures = tries.failures.saturating_add(1);
                let wait = backoff(RETRY.0, RETRY.1, tries.failures, rand::random());
                tries.next = Some(Instant::now() + wait);
                let pod = format!("{}/{}", one.namespace, one.name);
                tracing::warn!(%pod, %reason, retry_in = ?wait, "the pod's state is not published");
            }
        }
    }

    /// Writes the Node's condition, if it is due.
    pub(super) fn condition(&mut self, agent: &Agent, status: &[Status]) {
        if self.telling || self.condition_failed.is_some_and(|at| at.elapsed() < RETRY.1) {
            return;
        }
        let captured = status.iter().filter(|pod| pod.capture == "Captured").count();
        let condition = Condition::of(&agent.answers.pending(), &agent.answers.pods.failing(), captured);
        if !self.schedule.is_due(&condition, self.began.elapsed()) {
            return;
        }
        self.telling = true;
        let (client, node, before) = (agent.client.clone(), agent.node.clone(), self.before.take());
        self.running.spawn(async move {
            let mut before = match before {
                Some(before) => before,
                None => Before::read(&client, &node).await,
            };
            let result = before.write(&client, &node, &condition).await;
            Done::Condition(before, condition, result)
        });
    }

    fn told(&mut self, before: Before, condition: Condition, result: Result<(), String>) {
        self.telling = false;
        self.before = Some(before);
        match result {
            Ok(()) => {
                self.condition_failed = None;
                self.schedule.written(condition, self.began.elapsed());
            }
            Err(error) => {
                if self.condition_failed.is_none() {
                    tracing::warn!(%error, "the Node's condition is not written; trying again");
                }
                self.condition_failed = Some(Instant::now());
            }
        }
    }

    /// Says that nobody serves the node any more.
    pub(super) async fn say_stopping(&mut self, client: &Client, node: &str) {
        let mut before = self.before.take().unwrap_or_default();
        if let Err(error) = before.write(client, node, &Condition::stopping()).await {
            tracing::warn!(%error, "the Node's condition does not say that ztunnel was stopped");
        }
    }
}
