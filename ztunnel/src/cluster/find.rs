//! Finding a pod's network namespace: at the path that the CNI plugin named, else by looking at every process of the node
//! for one in the pod's cgroup.
//!
//! What is found is opened at once, and the open handle is what is used: a process id or a path may mean something else a
//! moment later. A namespace counts only if it owns the pod's addresses and is not the node's own, so that no pod ever gets
//! another one's identity. All of it runs on threads of its own. Limits: a pod none of whose processes is visible here (a
//! runtime with virtual machines, a `/proc` of another pid namespace) is not found, and its state says so.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs;
use std::io::{self, Read as _};
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use crate::base::netns::{Netns, local_addresses, run_blocking};
use crate::cluster::cgroup::pod_uids;

/// Network namespaces of one pod that are looked into: it may make more, and the first ones are its sandbox's.
const MOST: usize = 16;
/// Bytes of a `cgroup` file that are read; version 1 has a line for each controller.
const CGROUP: u64 = 64 << 10;

/// A namespace, and where it was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// The open handle.
    pub netns: Netns,
    /// For people.
    pub path: PathBuf,
}

/// A pod whose namespace is looked for.
#[derive(Clone, Debug)]
pub struct Sought {
    /// The uid by which its cgroups name it.
    pub runtime_uid: String,
    /// Addresses that the namespace must own.
    pub ips: Vec<IpAddr>,
}

/// Looks at every process below `proc` for those of the pods that are sought. `known`: the uids of all pods of the node, by which a
/// process is its own pod's whatever it calls the cgroups that it made.
///
/// # Errors
/// For each pod, why no namespace counts. As a whole, that there is no thread for it.
pub async fn by_process(
    proc: PathBuf,
    sought: Vec<Sought>,
    mut known: HashSet<String>,
) -> io::Result<Vec<(String, Result<Found, String>)>> {
    let wanted: Vec<String> = sought.iter().map(|pod| pod.runtime_uid.clone()).collect();
    known.extend(wanted.iter().cloned());
    let scanned = tokio::task::spawn_blocking(move || scan(&proc, &wanted, &known)).await;
    let mut candidates = scanned.map_err(|error| io::Error::other(format!("the look at /proc ended: {error}")))??;
    let mut found = Vec::with_capacity(sought.len());
    for pod in sought {
        let result = match candidates.remove(&pod.runtime_uid) {
            None => Err("no process of the pod was found in a network namespace of its own".to_owned()),
            Some(namespaces) => first_owner(namespaces, &pod.ips).await,
        };
        found.push((pod.runtime_uid, result));
    }
    Ok(found)
}

async fn first_owner(candidates: Vec<Found>, ips: &[IpAddr]) -> Result<Found, String> {
    let mut why = String::new();
    for found in candidates {
        match owns(&found.netns, ips).await {
            Ok(()) => return Ok(found),
            Err(reason) => why = format!("{} {reason}", found.path.display()),
        }
    }
    Err(why)
}

/// Opens the namespace at `path` as the node names it, and makes sure that it is the pod's. `proc`: where the node's own
/// `/proc` is, because this process may not see the node's files at the same place.
///
/// # Errors
/// Why it is not: it cannot be opened, is the node's own, or does not own the addresses.
pub async fn at_path(path: &Path, proc: &Path, ips: &[IpAddr]) -> Result<Found, String> {
    let inside = proc.join("1/root").join(path.strip_prefix("/").unwrap_or(path));
    let netns = Netns::open(path).or_else(|error| Netns::open(&inside).map_err(|_| error));
    let netns = netns.map_err(|error| format!("cannot be opened: {error}"))?;
    let own = Netns::open(Path::new("/proc/self/ns/net")).map_err(|error| error.to_string())?;
    if netns == own {
        return Err("is the node's own, which no pod of the mesh may have".to_owned());
    }
    owns(&netns, ips).await?;
    Ok(Found { netns, path: path.to_owned() })
}

/// Whether the namespace has all of the pod's addresses.
async fn owns(netns: &Netns, ips: &[IpAddr]) -> Result<(), String> {
    let has = run_blocking(netns, local_addresses).await.map_err(|error| format!("is of no use: {error}"))?;
    match ips.iter().find(|ip| !has.contains(ip)) {
        None => Ok(()),
        Some(ip) => Err(format!("does not own the pod's address {ip}; is it another pod's?")),
    }
}

/// The network namespaces of the processes of `wanted` pods, the first ones of each.
fn scan(proc: &Path, wanted: &[String], known: &HashSet<String>) -> io::Result<BTreeMap<String, Vec<Found>>> {
    let own = Netns::open(Path::new("/proc/self/ns/net"))?;
    let mut pids: Vec<u32> = fs::read_dir(proc)
        .map_err(|error| io::Error::new(error.kind(), format!("{} cannot be listed: {error}", proc.display())))?
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .collect();
    // A sandbox is older than what runs in it.
    pids.sort_unstable();
    let mut found: BTreeMap<String, Vec<Found>> = BTreeMap::new();
    let mut seen: HashMap<String, Vec<(u64, u64)>> = HashMap::new();
    for pid in pids {
        let folder = proc.join(pid.to_string());
        // A process that has ended meanwhile is nobody's.
        let Ok(text) = cgroup(&folder) else { continue };
        let owner = pod_uids(&text).find(|uid| known.contains(uid));
        let Some(uid) = owner.filter(|uid| wanted.contains(uid)) else { continue };
        let path = folder.join("ns/net");
        let Ok(netns) = Netns::open(&path) else { continue };
        let ids = seen.entry(uid.clone()).or_default();
        if netns == own || ids.contains(&netns.id()) || ids.len() >= MOST {
            continue;
        }
        ids.push(netns.id());
        found.entry(uid).or_default().push(Found { netns, path });
    }
    Ok(found)
}

fn cgroup(folder: &Path) -> io::Result<String> {
    let mut text = String::new();
    fs::File::open(folder.join("cgroup"))?.take(CGROUP).read_to_string(&mut text)?;
    Ok(text)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;
    use std::path::Path;

    use super::{Sought, at_path, by_process, scan};

    const UID: &str = "0f47a1f6-9d1c-4a1f-8b54-2f0f6f2a7c11";
    const OTHER: &str = "11111111-2222-3333-4444-555555555555";

    /// A `/proc` with processes whose network "namespace" is a file of its own, or this process's.
    fn process(proc: &Path, pid: u32, cgroup: &str, netns: &Path) {
        let folder = proc.join(pid.to_string());
        fs::create_dir_all(folder.join("ns")).unwrap();
        fs::write(folder.join("cgroup"), cgroup).unwrap();
        symlink(netns, folder.join("ns/net")).unwrap();
    }

    #[test]
    fn processes_lead_to_their_pods_and_nobody_else_does() {
        let folder = tempfile::tempdir().unwrap();
        let files: Vec<_> = ["a", "b", "c"].map(|name| folder.path().join(name)).into();
        files.iter().for_each(|file| fs::write(file, "").unwrap());
        let proc = folder.path().join("proc");
        fs::create_dir_all(proc.join("sys")).unwrap();
        let in_pod = |uid: &str| format!("0::/kubepods/pod{uid}/x\n");
        process(&proc, 20, &in_pod(UID), &files[1]);
        process(&proc, 3, &in_pod(UID), &files[0]);
        process(&proc, 21, &in_pod(UID), &files[0]);
        process(&proc, 22, &in_pod(UID), Path::new("/proc/self/ns/net"));
        process(&proc, 23, "0::/system.slice/sshd.service\n", &files[2]);
        process(&proc, 24, &in_pod(OTHER), &files[2]);
        process(&proc, 25, &in_pod(UID), &folder.path().join("gone"));
        // A cgroup that a container of the other pod made itself and named after this one.
        process(&proc, 26, &format!("0::/kubepods/pod{OTHER}/x/kubepods/pod{UID}\n"), &files[2]);
        let known = [UID.to_owned(), OTHER.to_owned()];
        let found = scan(&proc, &known, &known.clone().into()).unwrap();
        let paths = |uid: &str| found[uid].iter().map(|one| one.path.clone()).collect::<Vec<_>>();
        assert_eq!(
            paths(UID),
            [proc.join("3/ns/net"), proc.join("20/ns/net")],
            "each namespace once, the oldest first"
        );
        assert_eq!(paths(OTHER), [proc.join("24/ns/net")]);
        // The same while nobody looks for the other pod.
        let alone = scan(&proc, &known[..1], &known.clone().into()).unwrap();
        assert_eq!(alone[UID].len(), 2, "{alone:?}");
        assert!(scan(&proc, &["unknown".to_owned()], &known.into()).unwrap().is_empty());
        assert!(scan(&folder.path().join("absent"), &[], &[].into()).is_err());
    }

    #[tokio::test]
    async fn the_node_s_own_network_and_what_is_none_are_refused() {
        let proc = Path::new("/proc");
        let own = at_path(Path::new("/proc/self/ns/net"), proc, &[]).await.unwrap_err();
        assert!(own.contains("node's own"), "{own}");
        let absent = at_path(Path::new("/run/netns/there-is-none"), proc, &[]).await.unwrap_err();
        assert!(absent.contains("cannot be opened"), "{absent}");
        let sought = Sought { runtime_uid: OTHER.into(), ips: Vec::new() };
        let results = by_process(proc.to_owned(), vec![sought], [].into()).await.unwrap();
        assert!(results[0].1.as_ref().unwrap_err().contains("no process of the pod"));
    }
}
