//! The agent's decisions, look by look, with files in the place of network namespaces.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use super::{Located, State, Steps};
use crate::app::view::Status;
use crate::base::netns::Netns;
use crate::cluster::find::Found;
use crate::cluster::pod::Member;
use crate::cluster::saved::{Enrolled, Sandbox, Saved};
use crate::cluster::view::News;

fn pod(name: &str) -> Member {
    Member {
        uid: format!("uid-{name}"),
        runtime_uid: format!("uid-{name}"),
        name: name.into(),
        namespace: "shop".into(),
        service_account: "default".into(),
        ips: vec!["10.0.0.2".parse().unwrap()],
        probe_ports: vec![8080],
        ..Member::default()
    }
}

fn status(name: &str, capture: &'static str) -> Status {
    Status {
        uid: format!("uid-{name}"),
        name: name.into(),
        namespace: "shop".into(),
        addresses: Vec::new(),
        capture,
        reason: String::new(),
        dns: "",
        fence: String::new(),
        preexisting: 0,
        inbound_connections: 0,
        outbound_connections: 0,
        inbound_tunnels: 0,
        refused: 0,
        buffered_bytes: 0,
        buffer_waits: 0,
    }
}

/// A world of one folder, whose files are networks.
struct Node {
    folder: tempfile::TempDir,
    state: State,
    now: Instant,
    in_use: bool,
}

impl Node {
    fn new(saved: Saved) -> Self {
        let folder = tempfile::tempdir().unwrap();
        Self { folder, state: State::new("tulle-system", false, saved), now: Instant::now(), in_use: false }
    }

    fn listed(mut self, pods: Vec<Member>, labels: &[(&str, &str)]) -> Self {
        let labels: BTreeMap<String, String> = labels.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        self.state.view.take(News::Pods(pods));
        self.state.view.take(News::Namespaces(vec![("shop".to_owned(), labels)]));
        self
    }

    fn label(&mut self, value: &str) {
        let labels = BTreeMap::from([("tulle.dev/mesh".to_owned(), value.to_owned())]);
        self.state.view.take(News::Namespace("shop".into(), labels));
    }

    fn network(&self, name: &str) -> Found {
        let path: PathBuf = self.folder.path().join(name);
        if !path.exists() {
            File::create(&path).unwrap();
        }
        Found { netns: Netns::of(File::open(&path).unwrap().into()).unwrap(), path }
    }

    fn look(&mut self, status: &[Status], remember: bool) -> Steps {
        let in_use = self.in_use;
        self.state.step(status, |_| in_use, remember, self.now)
    }

    /// The uids that are looked for.
    fn sought(&mut self) -> Vec<String> {
        self.state.seek(self.now).unwrap_or_default().into_iter().map(|wanted| wanted.uid).collect()
    }

    fn found(&mut self, name: &str, result: Result<Found, &str>) {
        let located = Located { uid: format!("uid-{name}"), ips: pod(name).ips, result: result.map_err(str::to_owned) };
        self.state.located(vec![located], self.now);
    }

    fn later(&mut self, seconds: u64) {
        self.now += Duration::from_secs(seconds);
    }
}

fn written(steps: &Steps) -> Vec<(&str, Option<&str>)> {
    steps.writes.iter().map(|one| (one.name.as_str(), one.value)).collect()
}

#[test]
fn an_annotation_makes_no_pod_another_one_s() {
    let sandbox = |name: &str, uid: &str| Sandbox {
        container_id: "c".into(),
        if_name: "eth0".into(),
        namespace: "shop".into(),
        name: name.into(),
        runtime_uid: uid.into(),
        netns: "/run/netns/c".into(),
        ips: pod("a").ips,
    };
    // In another namespace somebody says of a pod that the kubelet runs it under the first one's uid.
    let posing = |uid: &str| Member {
        namespace: "evil".into(),
        runtime_uid: uid.into(),
        ips: Vec::new(),
        labels: BTreeMap::from([("tulle.dev/mesh".to_owned(), "enabled".to_owned())]),
        ..pod("b")
    };
    let mut node = Node::new(Saved::default()).listed(vec![pod("a"), posing("uid-a")], &[]);
    node.state.sandbox_began(sandbox("a", "uid-a"), "uid-a", None, node.now);
    let steps = node.look(&[], false);
    let listed: Vec<&str> = steps.list.pods.iter().map(|pod| pod.uid.as_str()).collect();
    assert_eq!((listed, node.sought()), (vec!["uid-a"], Vec::new()));
    // All of the node's pods say whose a process is, not only those that are looked for.
    assert!(node.state.runtime_uids().contains("uid-a"));
}

#[test]
fn a_pod_of_a_closed_namespace_is_known_as_such_before_control_has_heard_of_it() {
    for (labels, closed) in
        [(&[("tulle.dev/egress", "deny")][..], true), (ENROLLED, false), (&[("tulle.dev/egress", "audit")], false)]
    {
        let mut node = Node::new(Saved::default()).listed(vec![pod("a")], labels);
        let network = node.network("a");
        node.look(&[], false);
        node.found("a", Ok(network));
        let steps = node.look(&[], false);
        assert_eq!(steps.list.pods[0].closed, closed, "{labels:?}");
    }
}

const ENROLLED: &[(&str, &str)] = &[("tulle.dev/mesh", "enabled")];

#[test]
fn a_labelled_pod_is_found_captured_published_and_released_again() {
    let mut node = Node::new(Saved::default()).listed(vec![pod("a")], ENROLLED);
    let steps = node.look(&[], false);
    assert!(!steps.list.complete && steps.list.pods.is_empty() && steps.moving, "its network is looked for first");
    assert_eq!(written(&steps), [("a", Some("pending"))]);
    node.state.view.annotated("uid-a", Some("pending"));
    assert_eq!(node.sought(), ["uid-a"]);
    let network = node.network("n1");
    node.found("a", Ok(network.clone()));
    let steps = node.look(&[], false);
    assert!(steps.list.complete);
    let listed = &steps.list.pods[0];
    assert_eq!((listed.enrolled, listed.handle.as_ref(), listed.by_agent), (Some(true), Some(&network.netns), false));
    assert_eq!(steps.probe_ports, ["10.0.0.2:8080".parse().unwrap()].into(), "before it is captured");
    assert!(node.sought().is_empty());
    let captured = [status("a", "Captured")];
    assert_eq!(written(&node.look(&captured, false)), [("a", Some("enabled"))]);
    node.state.view.annotated("uid-a", Some("enabled"));
    let steps = node.look(&captured, false);
    assert!(steps.writes.is_empty() && !steps.moving);

    node.label("disabled");
    node.in_use = true;
    let steps = node.look(&captured, false);
    assert_eq!((written(&steps), steps.list.pods[0].enrolled), (vec![("a", None)], Some(true)));
    node.state.view.annotated("uid-a", None);
    assert_eq!(node.look(&captured, false).list.pods[0].enrolled, Some(true), "control has not taken it back");
    node.in_use = false;
    let steps = node.look(&captured, false);
    assert_eq!(steps.list.pods[0].enrolled, Some(false));
    assert!(!steps.probe_ports.is_empty(), "it is still captured");
    let steps = node.look(&[status("a", "Uncaptured")], false);
    assert!(steps.probe_ports.is_empty() && !steps.moving);
    assert_eq!(steps.list.pods[0].handle, Some(network.netns), "what still flows needs its network");
}

#[test]
fn a_network_that_is_not_found_is_said_and_looked_for_again() {
    let mut node = Node::new(Saved::default()).listed(vec![pod("a")], ENROLLED);
    node.look(&[], false);
    node.sought();
    node.found("a", Err("nothing there"));
    let steps = node.look(&[], false);
    assert!(steps.list.pods[0].open().unwrap_err().contains("nothing there"));
    assert!(steps.list.complete, "it is not waited for");
    assert!(node.sought().is_empty(), "not at once");
    node.later(1);
    assert_eq!(node.sought(), ["uid-a"]);
    let network = node.network("n1");
    node.found("a", Ok(network));
    assert!(node.look(&[], false).list.pods[0].open().is_ok());
    // A look that fails later takes nothing away; another network that owns the addresses takes its place.
    node.later(31);
    assert_eq!(node.sought(), ["uid-a"]);
    node.found("a", Err("a moment"));
    assert!(node.look(&[], false).list.pods[0].open().is_ok());
    let other = node.network("n2");
    node.found("a", Ok(other.clone()));
    assert_eq!(node.look(&[], false).list.pods[0].handle, Some(other.netns));
}

#[test]
fn pods_outside_the_mesh_are_listed_and_not_opened() {
    let on_host = Member { host_network: true, ..pod("b") };
    let finished = Member { finished: true, redirection: Some("enabled".into()), ..pod("c") };
    let pending = Member { ips: Vec::new(), ..pod("d") };
    let mut node = Node::new(Saved::default()).listed(vec![pod("a"), on_host, finished, pending], &[]);
    let steps = node.look(&[], false);
    assert_eq!(steps.list.pods.len(), 1);
    assert_eq!((steps.list.pods[0].enrolled, &steps.list.pods[0].handle), (Some(false), &None));
    assert_eq!(written(&steps), [("c", None)], "a finished pod is not captured any more");
    assert!(node.sought().is_empty() && steps.probe_ports.is_empty());
    let left = Member { redirection: Some("enabled".into()), ..pod("a") };
    node.state.view.take(News::Pod(left));
    node.look(&[], false);
    assert_eq!(node.sought(), ["uid-a"], "rules of an earlier time may be there");
}

#[test]
fn what_the_plugin_says_counts_until_it_says_that_it_is_over() {
    let without = Member { ips: Vec::new(), ..pod("a") };
    let mut node = Node::new(Saved::default()).listed(vec![without], ENROLLED);
    assert!(node.look(&[], false).list.pods.is_empty());
    let network = node.network("n1");
    let sandbox = |id: &str| Sandbox {
        container_id: id.into(),
        if_name: "eth0".into(),
        namespace: "shop".into(),
        name: "a".into(),
        runtime_uid: "uid-a".into(),
        netns: "/run/netns/n1".into(),
        ips: pod("a").ips,
    };
    node.state.sandbox_began(sandbox("c1"), "uid-a", Some(network.clone()), node.now);
    let steps = node.look(&[], false);
    assert_eq!(
        (steps.list.pods[0].handle.clone(), &steps.list.pods[0].ips),
        (Some(network.netns.clone()), &pod("a").ips)
    );
    assert!(node.state.strangers(&[("c1".into(), "eth0".into())]).is_empty());
    assert_eq!(node.state.sandbox_ended("other", "eth0", node.now), None);
    assert_eq!(node.state.sandbox_ended("c1", "eth0", node.now), Some(network.netns.id()));
    node.state.view.take(News::Pod(pod("a")));
    assert!(node.look(&[], false).list.pods.is_empty(), "the network is let go");
    node.later(6);
    assert_eq!(node.sought(), ["uid-a"]);
    node.found("a", Ok(network));
    assert!(node.look(&[], false).list.pods.is_empty(), "its last process is still there");
    node.later(6);
    let next = node.network("n2");
    node.found("a", Ok(next.clone()));
    assert_eq!(node.look(&[], false).list.pods[0].handle, Some(next.netns.clone()), "a sandbox without the plugin");
    // The end of an older sandbox does not touch a newer one.
    node.state.sandbox_began(sandbox("c2"), "uid-a", Some(next.clone()), node.now);
    node.state.sandbox_began(sandbox("c3"), "uid-a", Some(next.clone()), node.now);
    assert_eq!(node.state.sandbox_ended("c2", "eth0", node.now), None);
    assert!(!node.look(&[], false).list.pods.is_empty());
}

#[test]
fn a_restart_while_the_api_server_is_away_goes_on_with_what_is_remembered() {
    let saved = Saved { sandboxes: Vec::new(), enrolled: vec![Enrolled::of(&pod("a"))] };
    let mut node = Node::new(saved.clone());
    let steps = node.look(&[], false);
    assert!(!steps.list.complete && steps.list.pods.is_empty());
    node.look(&[], true);
    assert_eq!(node.sought(), ["uid-a"]);
    let network = node.network("n1");
    node.found("a", Ok(network));
    let steps = node.look(&[], true);
    assert!(!steps.list.complete, "nobody is taken for gone");
    assert_eq!(steps.list.pods[0].enrolled, Some(true));
    assert!(steps.writes.is_empty());
    assert_eq!(node.state.saved(), saved, "nothing is forgotten meanwhile");
    // The server is back: the label was taken away while nobody listened.
    let left = Member { redirection: Some("enabled".into()), ..pod("a") };
    let mut node = node.listed(vec![left], &[]);
    let steps = node.look(&[status("a", "Captured")], true);
    assert_eq!((written(&steps), steps.list.pods[0].enrolled), (vec![("a", None)], Some(true)));
    let mut node = node.listed(Vec::new(), &[]);
    assert!(node.look(&[], true).list.pods.is_empty());
    assert!(node.state.saved().enrolled.is_empty());
}
