//! What others may see of the node's pods: status pages, readiness, metrics, a successor.
//!
//! Every look takes the board's lock for a moment and nothing else; no answer waits for a pod.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, PoisonError};

use serde::Serialize;

use crate::app::handover::{Given, Open};
use crate::app::pods::{Entry, Pods};
use crate::base::netns::Netns;
use crate::capture::pods::Pod;
use crate::capture::preexisting;
use crate::flow::LocalPod;
use crate::telemetry::metrics::{CaptureLabels, Metrics};

/// Actual state of a pod's capture.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Status {
    /// metadata.uid.
    pub uid: String,
    /// Name.
    pub name: String,
    /// Namespace.
    pub namespace: String,
    /// Addresses.
    pub addresses: Vec<IpAddr>,
    /// `Captured`, `Pending`, `Failed`, `Uncaptured`.
    pub capture: &'static str,
    /// Why, for `Pending` and `Failed`.
    pub reason: String,
    /// Whether its look-ups of names are answered here: `on` or `off`; empty where it is not captured.
    pub dns: &'static str,
    /// `Fenced`, or `Unfenced: ` and why; empty where its egress is open.
    pub fence: String,
    /// Connections from before capture that are still there.
    pub preexisting: usize,
    /// Live inbound connections.
    pub inbound_connections: usize,
    /// Live outbound connections.
    pub outbound_connections: usize,
    /// Open inbound tunnels.
    pub inbound_tunnels: usize,
    /// Connections, tunnels and handshakes refused for lack of budget.
    pub refused: u64,
    /// Bytes that its flows buffer or have promised to peers to buffer.
    pub buffered_bytes: usize,
    /// How often one of its flows was slowed down because that was too much.
    pub buffer_waits: u64,
}

impl Pods {
    /// Those of a proxy that has none and waits for no list.
    pub fn none() -> Self {
        let pods = Self::default();
        pods.listed.store(true, Ordering::Relaxed);
        *pods.first.lock().unwrap_or_else(PoisonError::into_inner) = Some(BTreeSet::new());
        pods
    }

    /// Every pod's state. The count of connections from before capture is that of the last [`Self::recount`].
    pub fn status(&self) -> Vec<Status> {
        let board = self.board.lock().unwrap_or_else(PoisonError::into_inner);
        board.values().map(status).collect()
    }

    /// Counts the connections from before capture anew.
    pub async fn recount(&self) {
        let old: Vec<(String, Netns)> = {
            let board = self.board.lock().unwrap_or_else(PoisonError::into_inner);
            let with_old = board.iter().filter(|(_, entry)| !entry.old.is_empty());
            with_old.filter_map(|(uid, entry)| Some((uid.clone(), entry.netns.clone()?))).collect()
        };
        for (uid, netns) in old {
            let Ok(now) = preexisting::list(&netns, None).await else { continue };
            let mut board = self.board.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(entry) = board.get_mut(&uid) {
                entry.old.retain(|pair| now.contains(pair));
            }
        }
    }

    /// What the node waits for before it can be said to serve; empty when nothing.
    pub fn pending(&self) -> Vec<String> {
        let mut pending = Vec::new();
        if !self.listed.load(Ordering::Relaxed) {
            pending.push("the list of pods".to_owned());
        }
        pending.extend(self.problem.lock().unwrap_or_else(PoisonError::into_inner).clone());
        let board = self.board.lock().unwrap_or_else(PoisonError::into_inner);
        let first = self.first.lock().unwrap_or_else(PoisonError::into_inner);
        let name = |uid: &String| match board.get(uid) {
            Some(entry) => format!("{}/{}", entry.pod.namespace, entry.pod.name),
            None => uid.clone(),
        };
        let untried = |uid: &&String| board.get(*uid).is_none_or(|entry| entry.tried.is_none());
        pending.extend(
            first.iter().flatten().filter(untried).map(|uid| format!("the first try to capture {}", name(uid))),
        );
        let (failing, served) = (failing(&board), board.values().filter(|entry| entry.served).count());
        pending.extend(total_failure(&failing, served));
        pending
    }

    /// Whether mesh and list were both known once, so that it is known which pods have to be captured.
    pub fn looked(&self) -> bool {
        self.first.lock().unwrap_or_else(PoisonError::into_inner).is_some()
    }

    /// Pods whose capture fails, each with the reason. They are tried again, and cut off meanwhile.
    pub fn failing(&self) -> Vec<String> {
        failing(&self.board.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Whether `pod`, as it is listed, is served.
    ///
    /// # Errors
    /// Why not yet.
    pub(super) fn serves(&self, pod: &Pod) -> Result<(), String> {
        // A successor does.
        if self.frozen.load(Ordering::Relaxed) {
            return Ok(());
        }
        let board = self.board.lock().unwrap_or_else(PoisonError::into_inner);
        match board.get(&pod.uid).filter(|entry| entry.pod == *pod) {
            Some(entry) if entry.served => Ok(()),
            Some(entry) => Err(format!("{} {}", entry.state, entry.reason)),
            None => Err("it has not begun".to_owned()),
        }
    }

    /// Whether the pod is captured in this network.
    ///
    /// # Errors
    /// Why not yet.
    pub(super) fn captured_in(&self, uid: &str, netns: (u64, u64)) -> Result<(), String> {
        let board = self.board.lock().unwrap_or_else(PoisonError::into_inner);
        match board.get(uid) {
            None => Err("its capture has not begun".to_owned()),
            Some(entry) if entry.netns.as_ref().map(Netns::id) != Some(netns) => {
                Err(format!("{} {}, in another network", entry.state, entry.reason))
            }
            Some(entry) if entry.state == "Captured" && entry.served => Ok(()),
            Some(entry) if entry.state == "Captured" && entry.pod.closed => {
                Err("nothing may leave its namespace, and what holds it back waits for control's first word".to_owned())
            }
            Some(entry) => Err(format!("{} {}", entry.state, entry.reason)),
        }
    }

    /// Whether a pod is still served in this network.
    pub(super) fn holds(&self, netns: (u64, u64)) -> bool {
        let board = self.board.lock().unwrap_or_else(PoisonError::into_inner);
        board.values().any(|entry| entry.netns.as_ref().map(Netns::id) == Some(netns))
    }

    /// Live connections of all pods: inbound and outbound.
    pub fn connections(&self) -> (usize, usize) {
        let board = self.board.lock().unwrap_or_else(PoisonError::into_inner);
        board.values().filter_map(|entry| entry.local.as_ref()).fold((0, 0), |(inbound, outbound), pod| {
            (inbound + pod.inbound.load(Ordering::Relaxed), outbound + pod.outbound.load(Ordering::Relaxed))
        })
    }

    /// Brings the gauges of captures and of buffered bytes up to date.
    pub fn show(&self, metrics: &Metrics) {
        let board = self.board.lock().unwrap_or_else(PoisonError::into_inner);
        // All of them, so that a state that no pod has is told as 0.
        for capture in ["Captured", "Pending", "Failed", "Uncaptured"] {
            let count = board.values().filter(|entry| status(entry).capture == capture).count();
            metrics.pods.get_or_create(&CaptureLabels { capture }).set(i64::try_from(count).unwrap_or(i64::MAX));
        }
        let (mut bytes, mut pressed) = (0, 0);
        for pod in board.values().filter_map(|entry| entry.local.as_ref()) {
            bytes += pod.buffers.used();
            pressed += i64::from(pod.buffers.is_pressed());
        }
        metrics.buffered.set(i64::try_from(bytes).unwrap_or(i64::MAX));
        metrics.pressed.set(pressed);
    }

    /// Questions that the pods' name servers work on.
    pub fn questions(&self) -> usize {
        let board = self.board.lock().unwrap_or_else(PoisonError::into_inner);
        board.values().filter_map(|entry| entry.local.as_ref()).map(|pod| pod.questions.load(Ordering::Relaxed)).sum()
    }

    /// From now on the list of pods changes nothing: a successor reads it.
    pub(super) fn freeze(&self) {
        self.frozen.store(true, Ordering::Relaxed);
    }

    /// The listeners of every pod that is served, for a successor.
    pub(super) fn give(&self) -> Vec<(Given, Open)> {
        let board = self.board.lock().unwrap_or_else(PoisonError::into_inner);
        let served = board.iter().filter(|(_, entry)| entry.state != "Uncaptured");
        let given = served.filter_map(|(uid, entry)| {
            let netns = entry.netns.as_ref()?.id();
            let given = |open: &Open| Given {
                uid: uid.clone(),
                netns,
                names: name_servers(open),
                old: entry.old.iter().copied().collect(),
                rules: entry.rules,
                datagrams: entry.datagrams,
            };
            Some(entry.open.iter().map(|open| (given(open), open.clone())).collect::<Vec<_>>())
        });
        given.flatten().collect()
    }
}

fn failing(board: &BTreeMap<String, Entry>) -> Vec<String> {
    let failed = board.values().filter_map(|entry| Some((&entry.pod, entry.tried.as_ref()?.as_ref().err()?)));
    failed.map(|(pod, reason)| format!("capture of {}/{}: {reason}", pod.namespace, pod.name)).collect()
}

/// What is wrong with a node where no capture succeeds. One pod that cannot be captured is that pod's trouble, and must not
/// hold up an update of all nodes; if several fail and none succeeds, the proxy itself is not what it should be.
fn total_failure(failing: &[String], served: usize) -> Option<String> {
    let first = failing.first().filter(|_| failing.len() > 1 && served == 0)?;
    Some(format!("the capture of any pod; all {} fail: {first}", failing.len()))
}

/// Addresses at which names are answered: beside the three listeners there are a UDP and a TCP socket for each.
fn name_servers(open: &Open) -> usize {
    open.sockets.len().saturating_sub(3) / 2
}

fn status(entry: &Entry) -> Status {
    let count = |pick: fn(&LocalPod) -> &Arc<AtomicUsize>| {
        entry.local.as_ref().map_or(0, |local| pick(local).load(Ordering::Relaxed))
    };
    let again = entry.tried.as_ref().and_then(|tried| tried.as_ref().err()).filter(|_| entry.state == "Pending");
    Status {
        uid: entry.pod.uid.clone(),
        name: entry.pod.name.clone(),
        namespace: entry.pod.namespace.clone(),
        addresses: entry.pod.ips.clone(),
        // A pod that failed and is tried again has failed until that succeeds.
        capture: if again.is_some() { "Failed" } else { entry.state },
        reason: again.unwrap_or(&entry.reason).clone(),
        fence: match &entry.fence {
            None => String::new(),
            Some(Ok(())) => "Fenced".to_owned(),
            Some(Err(reason)) => format!("Unfenced: {reason}"),
        },
        dns: match entry.state {
            "Captured" if entry.open.iter().any(|open| name_servers(open) > 0) => "on",
            "Captured" => "off",
            _ => "",
        },
        preexisting: entry.old.len(),
        inbound_connections: count(|local| &local.inbound),
        outbound_connections: count(|local| &local.outbound),
        inbound_tunnels: entry.local.as_ref().map_or(0, |local| local.gate.tunnels()),
        refused: entry.local.as_ref().map_or(0, |local| local.refused.load(Ordering::Relaxed)),
        buffered_bytes: entry.local.as_ref().map_or(0, |local| local.buffers.used()),
        buffer_waits: entry.local.as_ref().map_or(0, |local| local.buffers.waits()),
    }
}

#[cfg(test)]
mod tests {
    use super::total_failure;

    #[test]
    fn one_pod_that_cannot_be_captured_is_its_own_trouble_and_several_without_any_success_are_the_nodes() {
        let failing = |count: usize| (0..count).map(|at| format!("capture of a/{at}: no")).collect::<Vec<_>>();
        for (fail, served, is_the_nodes) in
            [(0, 0, false), (0, 5, false), (1, 0, false), (1, 3, false), (2, 0, true), (9, 0, true), (9, 1, false)]
        {
            let said = total_failure(&failing(fail), served);
            assert_eq!(said.is_some(), is_the_nodes, "{fail} fail, {served} are served: {said:?}");
        }
        assert!(total_failure(&failing(2), 0).is_some_and(|said| said.contains("all 2 fail: capture of a/0: no")));
    }
}
