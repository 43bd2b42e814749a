//! What the agent knows, and what follows from it. No I/O: time and what others say are arguments.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use crate::app::cluster::entry;
use crate::app::view::Status;
use crate::capture::pods::Pods as List;
use crate::cluster::find::Found;
use crate::cluster::plan::{self, Capture, Facts, Way, Write};
use crate::cluster::pod::Member;
use crate::cluster::saved::{Enrolled, Sandbox, Saved};
use crate::cluster::view::View;

/// Pause before a network is looked for again that was not found, growing.
const RETRY: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(5));
/// How often it is looked whether networks are still where they were found: sandboxes may be made anew without the plugin.
const CHECK: Duration = Duration::from_secs(30);
/// Sandboxes that are remembered: a node has some hundred pods, and a runtime that never says DEL must not fill the memory.
const SANDBOXES: usize = 2048;

/// Where a pod's network is.
#[derive(Clone, Debug)]
enum Network {
    /// Here, with these addresses.
    Found { found: Found, ips: Vec<IpAddr>, checked: Instant },
    /// It was not found, so often.
    Lost { why: String, failures: u32, next: Instant },
    /// The runtime took this one away; another one may follow.
    Ended { id: (u64, u64), next: Instant },
}

/// A network that is to be looked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Wanted {
    pub(super) uid: String,
    pub(super) runtime_uid: String,
    pub(super) ips: Vec<IpAddr>,
    /// Where the plugin said that it is.
    pub(super) path: Option<PathBuf>,
}

/// What became of the search for a pod's network.
#[derive(Clone, Debug)]
pub(super) struct Located {
    pub(super) uid: String,
    pub(super) ips: Vec<IpAddr>,
    pub(super) result: Result<Found, String>,
}

/// An annotation that is to be written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Annotation {
    pub(super) uid: String,
    pub(super) namespace: String,
    pub(super) name: String,
    pub(super) value: Option<&'static str>,
}

/// What follows from one look.
#[derive(Debug, Default)]
pub(super) struct Steps {
    pub(super) list: List,
    pub(super) writes: Vec<Annotation>,
    /// Addresses with probe ports of pods in the mesh.
    pub(super) probe_ports: BTreeSet<SocketAddr>,
    /// Something is on its way.
    pub(super) moving: bool,
}

/// See the module's header.
#[derive(Debug, Default)]
pub(super) struct State {
    pub(super) view: View,
    sandboxes: Vec<Sandbox>,
    networks: HashMap<String, Network>,
    ways: HashMap<String, Way>,
    /// Pods that were in the mesh when the process before this one ended.
    remembered: BTreeMap<String, Member>,
    /// Pods whose network matters.
    minded: HashSet<String>,
}

impl State {
    pub(super) fn new(root: &str, closed_by_default: bool, saved: Saved) -> Self {
        let remembered = saved.enrolled.into_iter().map(|pod| (pod.uid.clone(), pod.member())).collect();
        let view = View::new(root, closed_by_default);
        Self { view, sandboxes: saved.sandboxes, remembered, ..Self::default() }
    }

    /// Whether the API server has said everything once.
    fn is_listed(&self) -> bool {
        self.view.listed() == (true, true)
    }

    /// Pods with what they are wanted to be; before everything was said, those that are remembered stay in the mesh.
    fn members(&self, remember: bool) -> Vec<(Member, bool)> {
        let listed = self.is_listed();
        let known = self.view.pods().map(|pod| {
            let stays = !listed && self.remembered.contains_key(&pod.uid);
            (pod.clone(), stays || self.view.enrols(pod))
        });
        let mut members: Vec<(Member, bool)> = match listed || remember {
            true => known.collect(),
            // Only pods that a plugin asked about have to be served at once.
            false => known.filter(|(_, enrols)| *enrols).collect(),
        };
        if !listed && remember {
            let seen: HashSet<String> = members.iter().map(|(pod, _)| pod.uid.clone()).collect();
            let others = self.remembered.values().filter(|pod| !seen.contains(&pod.uid));
            members.extend(others.map(|pod| (pod.clone(), true)));
        }
        members
    }

    /// Looks at every pod, by what became of its capture (`status`) and whether control still sends others to it.
    pub(super) fn step(
        &mut self,
        status: &[Status],
        in_use: impl Fn(&Member) -> bool,
        remember: bool,
        now: Instant,
    ) -> Steps {
        let status: HashMap<&str, &Status> = status.iter().map(|one| (one.uid.as_str(), one)).collect();
        let mut steps = Steps::default();
        steps.list.complete = self.is_listed();
        let members = self.members(remember);
        let mut ways = HashMap::new();
        self.minded.clear();
        for (member, enrols) in &members {
            let of = status.get(member.uid.as_str()).map_or("", |status| status.capture);
            let capture = match of {
                "Captured" => Capture::Captured,
                "Failed" => Capture::Failed,
                _ => Capture::Pending,
            };
            let before = self.ways.get(&member.uid).copied().unwrap_or_default();
            let redirection = member.redirection.as_deref();
            let facts = Facts { enrols: *enrols, redirection, capture, in_use: before.told && in_use(member) };
            let (way, write) = plan::step(facts, before, now);
            if self.is_listed()
                && let Write::Value(value) = write
            {
                let (uid, namespace, name) = (member.uid.clone(), member.namespace.clone(), member.name.clone());
                steps.writes.push(Annotation { uid, namespace, name, value });
            }
            steps.moving |= way.told && (capture == Capture::Pending || !enrols);
            let redirected = way.told || matches!(of, "Captured" | "Pending" | "Failed");
            self.list(member, way.told, redirected, &mut steps);
            ways.insert(member.uid.clone(), way);
        }
        self.ways = ways;
        let uids: HashSet<&str> = members.iter().map(|(member, _)| member.uid.as_str()).collect();
        if self.is_listed() {
            self.remembered.retain(|uid, _| uids.contains(uid.as_str()));
        }
        self.networks.retain(|uid, _| uids.contains(uid.as_str()));
        steps.list.pods.sort_by(|a, b| a.uid.cmp(&b.uid));
        steps
    }

    /// Puts a pod on the list, unless it has no network (any more).
    fn list(&mut self, member: &Member, told: bool, redirected: bool, steps: &mut Steps) {
        if member.host_network || member.finished {
            return;
        }
        let ips = self.addresses(member);
        if ips.is_empty() {
            return;
        }
        let mut pod = entry(&Member { ips: ips.clone(), ..member.clone() });
        pod.enrolled = Some(told);
        pod.closed = self.view.closes(member);
        // A pod that may have rules of an earlier time is opened as well, so that they can be removed.
        let minded = told || redirected || member.redirection.is_some() || self.remembered.contains_key(&member.uid);
        if minded {
            self.minded.insert(member.uid.clone());
        }
        match self.networks.get(&member.uid) {
            Some(Network::Found { found, .. }) => {
                (pod.netns, pod.handle) = (found.path.clone(), Some(found.netns.clone()));
            }
            Some(Network::Lost { why, .. }) => pod.lost = Some(why.clone()),
            Some(Network::Ended { .. }) => return,
            // It is being looked for. Until it is found or is not, these are not all: a successor would close the listeners
            // that it was given for this pod.
            None if minded => {
                steps.list.complete = false;
                return;
            }
            None => pod.lost = Some("the pod is not in the mesh".to_owned()),
        }
        if redirected {
            let ports = &member.probe_ports;
            steps.probe_ports.extend(ips.iter().flat_map(|ip| ports.iter().map(|port| SocketAddr::new(*ip, *port))));
        }
        steps.list.pods.push(pod);
    }

    /// The pod's addresses: what the API says, and before that, or where it says less, what the plugin said.
    fn addresses(&self, member: &Member) -> Vec<IpAddr> {
        let sandbox = self.sandbox(member).map(|sandbox| &sandbox.ips);
        let mut ips = match sandbox {
            Some(ips) if member.ips.iter().all(|ip| ips.contains(ip)) => ips.clone(),
            _ => member.ips.clone(),
        };
        ips.sort_unstable();
        ips.dedup();
        ips
    }

    /// The newest sandbox that the plugin announced for a pod.
    fn sandbox(&self, member: &Member) -> Option<&Sandbox> {
        self.sandboxes.iter().rev().find(|sandbox| is_of(sandbox, member))
    }

    /// The uids by which the kubelet knows the pods of this node.
    pub(super) fn runtime_uids(&self) -> HashSet<String> {
        let pods = self.view.pods().chain(self.remembered.values()).map(|pod| &pod.runtime_uid);
        pods.chain(self.sandboxes.iter().map(|sandbox| &sandbox.runtime_uid)).cloned().collect()
    }

    /// Which networks are to be looked for now; `None`: none.
    pub(super) fn seek(&mut self, now: Instant) -> Option<Vec<Wanted>> {
        let mut wanted = Vec::new();
        let mut checked = Vec::new();
        let remembered = self.remembered.values().filter(|pod| !self.view.pods().any(|known| known.uid == pod.uid));
        for member in self.view.pods().chain(remembered).filter(|pod| self.minded.contains(&pod.uid)) {
            let ips = self.addresses(member);
            let path = self.sandbox(member).map(|sandbox| sandbox.netns.clone());
            let due = match self.networks.get(&member.uid) {
                None => true,
                Some(Network::Found { ips: of, .. }) if *of != ips => true,
                Some(Network::Found { checked: at, .. }) => {
                    let due = now.saturating_duration_since(*at) >= CHECK;
                    if due {
                        checked.push(member.uid.clone());
                    }
                    due
                }
                Some(Network::Lost { next, .. } | Network::Ended { next, .. }) => now >= *next,
            };
            if due {
                let (uid, runtime_uid) = (member.uid.clone(), member.runtime_uid.clone());
                wanted.push(Wanted { uid, runtime_uid, ips, path });
            }
        }
        for uid in checked {
            if let Some(Network::Found { checked, .. }) = self.networks.get_mut(&uid) {
                *checked = now;
            }
        }
        (!wanted.is_empty()).then_some(wanted)
    }

    /// Takes what was found.
    pub(super) fn located(&mut self, located: Vec<Located>, now: Instant) {
        for Located { uid, ips, result } in located {
            let before = self.networks.get(&uid);
            let network = match (result, before) {
                // The process that led here may be another one now; the namespace is the same.
                (Ok(found), Some(Network::Found { found: old, ips: of, .. }))
                    if old.netns == found.netns && *of == ips =>
                {
                    continue;
                }
                (Ok(found), Some(Network::Ended { id, .. })) if found.netns.id() == *id => {
                    Network::Ended { id: *id, next: now + RETRY.1 }
                }
                (Ok(found), _) => Network::Found { found, ips, checked: now },
                (Err(_), Some(Network::Ended { id, .. })) => Network::Ended { id: *id, next: now + RETRY.1 },
                // What is open stays open: a look that fails says nothing about it, unless the addresses changed.
                (Err(_), Some(Network::Found { ips: of, .. })) if *of == ips => continue,
                (Err(why), before) => {
                    let failures = match before {
                        Some(Network::Lost { failures, .. }) => failures.saturating_add(1),
                        _ => 1,
                    };
                    let wait = RETRY.0.saturating_mul(1 << failures.min(6)).min(RETRY.1);
                    Network::Lost { why, failures, next: now + wait }
                }
            };
            self.networks.insert(uid, network);
        }
    }

    /// A sandbox began; `found`: its network, if the pod is in the mesh.
    pub(super) fn sandbox_began(&mut self, sandbox: Sandbox, uid: &str, found: Option<Found>, now: Instant) {
        self.sandboxes.retain(|one| (&one.container_id, &one.if_name) != (&sandbox.container_id, &sandbox.if_name));
        if self.sandboxes.len() >= SANDBOXES {
            self.sandboxes.remove(0);
        }
        let mut ips = sandbox.ips.clone();
        ips.sort_unstable();
        ips.dedup();
        self.sandboxes.push(sandbox);
        match found {
            // The same network by another path is the same.
            Some(found) => match self.networks.get(uid) {
                Some(Network::Found { found: old, ips: of, .. }) if old.netns == found.netns && *of == ips => {}
                _ => drop(self.networks.insert(uid.to_owned(), Network::Found { found, ips, checked: now })),
            },
            // Where it was before is not where it is now.
            None => drop(self.networks.remove(uid)),
        }
    }

    /// A sandbox ended; gives the network that nobody may use any more.
    pub(super) fn sandbox_ended(&mut self, container_id: &str, if_name: &str, now: Instant) -> Option<(u64, u64)> {
        let at = self.sandboxes.iter().position(|one| one.container_id == container_id && one.if_name == if_name)?;
        let ended = self.sandboxes.remove(at);
        let member = self.view.pods().find(|pod| is_of(&ended, pod))?;
        let uid = member.uid.clone();
        // A newer sandbox of the pod is not touched by the end of an older one.
        let newer = self.sandbox(member).is_some();
        let Some(Network::Found { found, .. }) = self.networks.get(&uid).filter(|_| !newer) else { return None };
        let id = found.netns.id();
        self.networks.insert(uid, Network::Ended { id, next: now + RETRY.1 });
        Some(id)
    }

    /// Sandboxes that are not among `valid`.
    pub(super) fn strangers(&self, valid: &[(String, String)]) -> Vec<(String, String)> {
        let all = self.sandboxes.iter().map(|one| (one.container_id.clone(), one.if_name.clone()));
        all.filter(|one| !valid.contains(one)).collect()
    }

    /// What is remembered for the next process.
    pub(super) fn saved(&self) -> Saved {
        let told = |uid: &str| self.ways.get(uid).is_some_and(|way| way.told);
        let mut enrolled: Vec<Enrolled> = match self.is_listed() {
            true => self.view.pods().filter(|pod| told(&pod.uid)).map(Enrolled::of).collect(),
            false => self.remembered.values().map(Enrolled::of).collect(),
        };
        enrolled.sort_by(|a, b| a.uid.cmp(&b.uid));
        Saved { sandboxes: self.sandboxes.clone(), enrolled }
    }
}

/// Whether the runtime made `sandbox` for `pod`. The uid alone does not say: which one the kubelet uses for a pod is written in
/// an annotation, and whoever may make pods in any namespace writes annotations.
fn is_of(sandbox: &Sandbox, pod: &Member) -> bool {
    let uid = sandbox.runtime_uid.as_str();
    let same = uid.is_empty() || uid == pod.runtime_uid || uid == pod.uid;
    same && sandbox.namespace == pod.namespace && sandbox.name == pod.name
}

#[cfg(test)]
mod tests;
