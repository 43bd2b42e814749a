//! What the API is told: whether a pod is captured (an annotation), and whether this node serves (a condition of the Node).
//!
//! Both are patches of the status subresource, so the agent needs no right to change what users write. A patch of a pod
//! carries its uid: another pod of the same name is never annotated. The decision when the condition is written is pure.

use std::time::Duration;

use k8s_openapi::api::core::v1;
use kube::api::{Patch, PatchParams};
use kube::{Api, Client};
use serde_json::json;
use tokio::time::timeout;
use tulle_proto::names;

use crate::base::unix_now;
use crate::cluster::{QUESTION, said};

/// Type of the Node's condition.
pub const CONDITION: &str = "TulleReady";
/// A node that is not ready for a moment, as while a pod is being captured, is not reported.
const SETTLES: Duration = Duration::from_secs(5);
/// The condition is written again after so long, so that one can tell an old word from a current one.
const HEARTBEAT: Duration = Duration::from_secs(300);

/// What became of a patch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Written {
    /// It is so.
    Done,
    /// There is no such pod any more.
    Gone,
    /// Why it is not so; it may be tried again.
    Failed(String),
}

/// Sets the redirection annotation of a pod; `None`: takes it away.
pub async fn annotate(client: &Client, namespace: &str, name: &str, uid: &str, value: Option<&str>) -> Written {
    let pods: Api<v1::Pod> = Api::namespaced(client.clone(), namespace);
    let patch = json!({"metadata": {"uid": uid, "annotations": {(names::ANNOTATION_REDIRECTION): value}}});
    let params = PatchParams::default();
    match timeout(QUESTION, pods.patch_status(name, &params, &Patch::Merge(&patch))).await {
        Ok(Ok(_)) => Written::Done,
        // Conflict: the uid is another one's.
        Ok(Err(kube::Error::Api(status))) if matches!(status.code, 404 | 409) => Written::Gone,
        Ok(Err(error)) => Written::Failed(said(&error)),
        Err(_) => Written::Failed(no_answer()),
    }
}

fn no_answer() -> String {
    format!("the API server did not answer within {} s", QUESTION.as_secs())
}

/// What the Node's condition says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Condition {
    /// The node serves.
    pub ready: bool,
    /// One word.
    pub reason: &'static str,
    /// For people.
    pub message: String,
}

impl Condition {
    /// By what the node waits for; nothing: it serves, but for pods whose capture fails.
    pub fn of(pending: &[String], failing: &[String], captured: usize) -> Self {
        // The API takes 32 KiB; nobody reads more than some lines.
        let joined = |what: &[String]| what.join("; ").chars().take(1000).collect::<String>();
        if pending.is_empty() && !failing.is_empty() {
            let message = format!(
                "The node serves; {captured} of its pods are captured, and {} are cut off until they can be: {}",
                failing.len(),
                joined(failing)
            );
            return Self { ready: true, reason: "SomeCaptureFailed", message };
        }
        if pending.is_empty() {
            return Self {
                ready: true,
                reason: "Serving",
                message: format!(
                    "The mesh is known, and the pods of this node that are in it are captured ({captured})"
                ),
            };
        }
        let any = |words: &str| pending.iter().any(|what| what.starts_with(words));
        let reason = match () {
            () if any("the first description") => "ControlUnknown",
            () if any("the list of pods") => "PodsUnknown",
            () if any("the first ") => "Starting",
            () if any("the capture of any pod") => "CaptureFailed",
            () => "NotReady",
        };
        let mut message = joined(pending);
        if message.is_empty() {
            message.push_str("no reason is known");
        }
        Self { ready: false, reason, message }
    }

    /// The proxy was told to stop, and nobody has taken its place.
    pub fn stopping() -> Self {
        Self {
            ready: false,
            reason: "Stopped",
            message: "ztunnel was stopped; pods of this node that are in the mesh are cut off until it is back"
                .to_owned(),
        }
    }
}

/// When the condition is written: on a change that lasts, and now and then. Pure.
#[derive(Debug, Default)]
pub struct Schedule {
    written: Option<(Condition, Duration)>,
    differs: Option<(bool, &'static str, Duration)>,
}

impl Schedule {
    /// Whether `condition` is to be written `now`, a time since any beginning.
    pub fn is_due(&mut self, condition: &Condition, now: Duration) -> bool {
        let Some((written, at)) = &self.written else {
            // The first word may wait for the first pods as well.
            let (_, _, since) = *self.differs.get_or_insert((false, "", now));
            return condition.ready || now.saturating_sub(since) >= SETTLES;
        };
        if (written.ready, written.reason) == (condition.ready, condition.reason) {
            self.differs = None;
            return now.saturating_sub(*at) >= HEARTBEAT;
        }
        match self.differs {
            Some((ready, reason, since)) if (ready, reason) == (condition.ready, condition.reason) => {
                now.saturating_sub(since) >= SETTLES
            }
            _ => {
                self.differs = Some((condition.ready, condition.reason, now));
                false
            }
        }
    }

    /// It was written.
    pub fn written(&mut self, condition: Condition, now: Duration) {
        (self.written, self.differs) = (Some((condition, now)), None);
    }
}

/// The Node's condition as this process last saw it: whether it said ready, and since when.
#[derive(Clone, Debug, Default)]
pub struct Before(Option<(bool, String)>);

impl Before {
    /// Asks for it. Without the right to, the condition counts as new.
    pub async fn read(client: &Client, node: &str) -> Self {
        let nodes: Api<v1::Node> = Api::all(client.clone());
        let Ok(Ok(Some(node))) = timeout(QUESTION, nodes.get_opt(node)).await else { return Self(None) };
        let conditions = node.status.and_then(|status| status.conditions).unwrap_or_default();
        let own = conditions.into_iter().find(|condition| condition.type_ == CONDITION);
        Self(own.and_then(|own| Some((own.status == "True", own.last_transition_time?.0.to_string()))))
    }

    /// Writes the condition, with the time of its last change.
    ///
    /// # Errors
    /// Why it is not written.
    pub async fn write(&mut self, client: &Client, node: &str, condition: &Condition) -> Result<(), String> {
        let now = jiff::Timestamp::from_second(unix_now()).map_err(|error| error.to_string())?.to_string();
        let since = match &self.0 {
            Some((ready, since)) if *ready == condition.ready => since.clone(),
            _ => now.clone(),
        };
        let patch = json!({"status": {"conditions": [{
            "type": CONDITION,
            "status": if condition.ready { "True" } else { "False" },
            "reason": condition.reason,
            "message": condition.message,
            "lastHeartbeatTime": now,
            "lastTransitionTime": since,
        }]}});
        let nodes: Api<v1::Node> = Api::all(client.clone());
        let (params, patch) = (PatchParams::default(), Patch::Strategic(&patch));
        match timeout(QUESTION, nodes.patch_status(node, &params, &patch)).await {
            Ok(Ok(_)) => {
                self.0 = Some((condition.ready, since));
                Ok(())
            }
            Ok(Err(error)) => Err(said(&error)),
            Err(_) => Err(no_answer()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::{Condition, HEARTBEAT, SETTLES, Schedule};

    #[test]
    fn the_condition_says_what_is_waited_for() {
        let owned = |all: &[&str]| all.iter().map(|&text| text.to_owned()).collect::<Vec<_>>();
        let of = |pending: &[&str]| Condition::of(&owned(pending), &[], 3);
        assert!(of(&[]).ready && of(&[]).message.contains("(3)"));
        for (pending, reason) in [
            (&["the first description of the mesh from control: refused"][..], "ControlUnknown"),
            (&["the first try to capture a/b", "the list of pods"], "PodsUnknown"),
            (&["the first try to capture a/b"], "Starting"),
            (&["the capture of any pod; all 2 fail: capture of a/b: no netns"], "CaptureFailed"),
            (&["something"], "NotReady"),
        ] {
            let condition = of(pending);
            assert!(!condition.ready && condition.reason == reason && condition.message.contains(pending[0]));
        }
        let long = "ö".repeat(9000);
        assert!(of(&[&long]).message.len() < 4000);
        // A pod that cannot be captured is told of, and is no reason to hold up the node.
        let some = Condition::of(&[], &owned(&["capture of a/b: no netns", &long]), 3);
        assert!(some.ready && some.reason == "SomeCaptureFailed" && some.message.contains("a/b: no netns"));
        assert!(some.message.contains("3 of its pods") && some.message.len() < 4000);
    }

    #[test]
    fn only_what_lasts_is_written_and_now_and_then_all_the_same() {
        let (ready, failed) = (Condition::of(&[], &[], 0), Condition::of(&["the list of pods".into()], &[], 0));
        let at = Duration::from_secs;
        let mut schedule = Schedule::default();
        assert!(!schedule.is_due(&failed, at(0)), "it has just begun");
        assert!(schedule.is_due(&ready, at(1)));
        schedule.written(ready.clone(), at(1));
        assert!(!schedule.is_due(&ready, at(2)));
        assert!(!schedule.is_due(&failed, at(3)));
        assert!(!schedule.is_due(&ready, at(4)), "it was a moment");
        assert!(!schedule.is_due(&failed, at(5)));
        assert!(!schedule.is_due(&failed, at(5) + SETTLES / 2));
        assert!(schedule.is_due(&failed, at(5) + SETTLES));
        schedule.written(failed.clone(), at(10));
        assert!(!schedule.is_due(&failed, at(11)));
        assert!(schedule.is_due(&failed, at(10) + HEARTBEAT));
        let mut late = Schedule::default();
        assert!(!late.is_due(&failed, at(0)));
        assert!(late.is_due(&failed, SETTLES), "a node that does not become ready says so");
    }
}
