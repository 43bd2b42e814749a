//! The node's pods, as `TULLE_PODS` lists them, a CNI agent has handed them over ([`crate::capture::zds`]), or the cluster
//! says.
//!
//! The file is YAML or JSON and is replaced by rename. A list that cannot be read changes nothing: the pods in force stay,
//! and the error says where it is wrong. One bad entry rejects itself only; what it said before stays in force, because a
//! pod that is in the mesh must not fall out of it by a mistake.

use std::collections::HashSet;
use std::io::{self, Read as _};
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use notify::Watcher as _;
use serde::Deserialize;
use tokio::sync::{Notify, watch};

use crate::base::netns::Netns;
use crate::capture::zds::Added;

/// Largest list that is read: some 300 bytes a pod, and a node has a few hundred.
const LARGEST: u64 = 16 << 20;

/// One pod of the node.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Pod {
    /// metadata.uid.
    pub uid: String,
    /// metadata.name.
    pub name: String,
    /// metadata.namespace.
    pub namespace: String,
    /// spec.serviceAccountName; `default` if empty.
    #[serde(default)]
    pub service_account: String,
    /// Path of its network namespace.
    pub netns: PathBuf,
    /// status.podIPs.
    #[serde(default)]
    pub ips: Vec<IpAddr>,
    /// Captured at once (true), not (false), or as control says (absent).
    #[serde(default)]
    pub enrolled: Option<bool>,
    /// Ports of the kubelet's probes.
    #[serde(default)]
    pub probe_ports: Vec<u16>,
    /// The pod's resolv.conf as the node sees it. Its name server is asked where it cannot be found out which one the pod
    /// asked.
    #[serde(default)]
    pub resolv_conf: Option<PathBuf>,
    /// Its network namespace as it was handed over or found, instead of a path.
    #[serde(skip)]
    pub handle: Option<Netns>,
    /// The agent that handed it over installs the redirect rules.
    #[serde(skip)]
    pub by_agent: bool,
    /// Why its network namespace is not known.
    #[serde(skip)]
    pub lost: Option<String>,
    /// Nothing may leave its namespace, by labels; holds until control has said.
    #[serde(skip)]
    pub closed: bool,
}

impl Pod {
    /// A pod as an agent hands it over: it is to be served at once.
    pub fn handed(added: Added, handle: Netns, ips: Vec<IpAddr>) -> Self {
        let Added { uid, name, namespace, service_account } = added;
        Self {
            uid,
            name,
            namespace,
            service_account,
            netns: PathBuf::new(),
            ips,
            enrolled: Some(true),
            probe_ports: Vec::new(),
            resolv_conf: None,
            handle: Some(handle),
            by_agent: true,
            lost: None,
            closed: false,
        }
    }

    /// Its network namespace.
    ///
    /// # Errors
    /// That it cannot be opened, and why.
    pub fn open(&self) -> Result<Netns, String> {
        match (&self.handle, &self.lost) {
            (Some(handle), _) => Ok(handle.clone()),
            (None, Some(why)) => Err(format!("the network namespace is not known: {why}")),
            (None, None) => Netns::open(&self.netns)
                .map_err(|error| format!("cannot open the network namespace {}: {error}", self.netns.display())),
        }
    }
}

/// A list, and what was wrong with single entries.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pods {
    /// Good entries.
    pub pods: Vec<Pod>,
    /// One sentence for each bad one.
    pub errors: Vec<String>,
    /// These are all: who is not among them is gone, or is a bad entry.
    pub complete: bool,
}

/// Reads a list.
///
/// # Errors
/// If it is not a list at all; line and column where the parser stopped.
pub fn parse(text: &str) -> Result<Pods, String> {
    if text.trim().is_empty() {
        return Err("the file is empty; a node without pods is written as []".to_owned());
    }
    let entries: Vec<serde_json::Value> = serde_saphyr::from_str(text).map_err(|error| error.to_string())?;
    let mut pods = Pods { complete: true, ..Pods::default() };
    let mut seen = HashSet::new();
    for (index, entry) in entries.into_iter().enumerate() {
        let pod = serde_json::from_value::<Pod>(entry).map_err(|error| error.to_string()).and_then(check);
        match pod {
            Ok(pod) if seen.insert(pod.uid.clone()) => pods.pods.push(pod),
            Ok(pod) => {
                pods.errors.push(format!("entry {index}: uid {} is listed twice; the first one counts", pod.uid))
            }
            Err(error) => pods.errors.push(format!("entry {index}: {error}")),
        }
    }
    Ok(pods)
}

fn check(mut pod: Pod) -> Result<Pod, String> {
    for (field, value) in [("uid", &pod.uid), ("name", &pod.name), ("namespace", &pod.namespace)] {
        check_name(field, value)?;
    }
    if pod.enrolled != Some(false) && pod.ips.is_empty() {
        return Err(format!("pod {}/{} has no ips; give status.podIPs", pod.namespace, pod.name));
    }
    if pod.service_account.is_empty() {
        "default".clone_into(&mut pod.service_account);
    }
    pod.ips = pod.ips.iter().map(IpAddr::to_canonical).collect();
    Ok(pod)
}

/// Whether `value` may be a name of Kubernetes, which is enough for it to be compared and printed.
///
/// # Errors
/// That it is not.
pub fn check_name(field: &str, value: &str) -> Result<(), String> {
    if value.is_empty() || value.len() > 253 || value.chars().any(|c| c.is_whitespace() || c.is_control()) {
        return Err(format!("{field} {value:?} is not a Kubernetes name"));
    }
    Ok(())
}

/// Where the list comes from.
#[derive(Debug)]
pub enum Source {
    /// A file.
    File(ListFile),
    /// A CNI agent, or what watches the cluster.
    Agent(watch::Receiver<Pods>),
}

impl Source {
    /// The list, if it changed since the last call.
    ///
    /// # Errors
    /// If it cannot be read or understood; the next call tries again.
    pub fn changed(&mut self) -> Result<Option<Pods>, String> {
        match self {
            Self::File(file) => file.changed(),
            Self::Agent(list) => Ok(list.has_changed().unwrap_or(false).then(|| list.borrow_and_update().clone())),
        }
    }
}

/// The file, and the state in which it was last read.
#[derive(Debug)]
pub struct ListFile {
    path: PathBuf,
    last: Option<(u64, SystemTime, u64)>,
}

impl ListFile {
    /// Nothing read yet.
    pub fn new(path: PathBuf) -> Self {
        Self { path, last: None }
    }

    /// The list, if it changed since the last call.
    ///
    /// # Errors
    /// If the file cannot be read or understood; the next call tries again.
    pub fn changed(&mut self) -> Result<Option<Pods>, String> {
        let named = |error: io::Error| format!("{}: {error}", self.path.display());
        let mut file = std::fs::File::open(&self.path).map_err(named)?;
        let meta = file.metadata().map_err(named)?;
        let stamp = {
            use std::os::unix::fs::MetadataExt as _;
            (meta.ino(), meta.modified().map_err(named)?, meta.len())
        };
        if self.last == Some(stamp) {
            return Ok(None);
        }
        if meta.len() > LARGEST {
            return Err(format!("{} has {} bytes; at most {LARGEST} are read", self.path.display(), meta.len()));
        }
        let mut text = String::new();
        file.read_to_string(&mut text).map_err(named)?;
        // A list that is wrong is not read again until it changes.
        self.last = Some(stamp);
        parse(&text).map(Some).map_err(|error| format!("{}: {error}", self.path.display()))
    }
}

/// Wakes `changed` when something happens in the file's directory. Polling covers what notifications miss.
pub fn watch_directory(path: &Path, changed: Arc<Notify>) -> Option<notify::RecommendedWatcher> {
    let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty())?;
    let mut watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
        // Reading the file is an event too; waking on it would read again, for ever.
        if !event.is_ok_and(|event| event.kind.is_access()) {
            changed.notify_one();
        }
    })
    .ok()?;
    watcher.watch(directory, notify::RecursiveMode::NonRecursive).ok()?;
    Some(watcher)
}

#[cfg(test)]
mod tests {
    use super::parse;

    #[test]
    fn yaml_and_json_mean_the_same() {
        let yaml = "- {uid: u1, name: a, namespace: ns, serviceAccount: s, netns: /x, ips: [10.0.0.1], enrolled: true, probePorts: [80]}\n";
        let json = r#"[{"uid":"u1","name":"a","namespace":"ns","serviceAccount":"s","netns":"/x","ips":["10.0.0.1"],"enrolled":true,"probePorts":[80]}]"#;
        let pods = parse(yaml).unwrap();
        assert_eq!(pods, parse(json).unwrap());
        assert_eq!(pods.pods[0].enrolled, Some(true));
        assert!(parse("[]").unwrap().pods.is_empty());
    }

    #[test]
    fn a_bad_entry_rejects_itself_and_says_why() {
        for (entry, says) in [
            ("{name: a, namespace: ns, netns: /x, ips: [10.0.0.1]}", "uid"),
            ("{uid: u, name: a, namespace: ns, netns: /x, ips: [10.0.0.256]}", "invalid"),
            ("{uid: u, name: a, namespace: ns, netns: /x}", "no ips"),
            ("{uid: u, name: a b, namespace: ns, netns: /x, ips: [10.0.0.1]}", "name"),
            ("{uid: u, name: a, namespace: ns, netns: /x, ips: [10.0.0.1], probePorts: [70000]}", "70000"),
            ("{uid: u, name: a, namespace: ns, netns: /x, ips: [10.0.0.1], enroled: true}", "enroled"),
            ("3", "invalid type"),
            ("{uid: g, name: a, namespace: ns, netns: /x, ips: [10.0.0.1]}", "twice"),
        ] {
            let text = format!("- {{uid: g, name: g, namespace: ns, netns: /x, ips: [10.0.0.9]}}\n- {entry}\n");
            let pods = parse(&text).unwrap();
            assert_eq!(pods.pods.len(), 1, "{entry}");
            assert!(pods.errors[0].contains(says), "{entry}: {:?}", pods.errors);
        }
    }

    #[test]
    fn something_else_than_a_list_is_an_error() {
        for text in ["", " \n", "{", "a: 1", "- [", "{\"uid\": 1}"] {
            assert!(parse(text).is_err(), "{text}");
        }
    }
}
