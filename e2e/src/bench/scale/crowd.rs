//! The crowd: pods that are in control's source and on no node of the lab, so that a few proxies know as many workloads
//! as those of a big cluster do.
//!
//! Ten pods belong to a Deployment with an account and a Service of its own, two hundred to a namespace, and a pod has
//! what a real one has where a proxy is told of it: an owner, labels, a uid, an address, a node. Files are written
//! behind the lab's back, into the folder that control reads. Limits: nothing answers at their addresses.

use std::fmt::Write as _;
use std::net::Ipv4Addr;
use std::path::Path;

use anyhow::Context;

use crate::state::replace;

/// Pods in one file.
pub(super) const PER_FILE: usize = 100;
/// Pods of one Deployment, behind one Service.
const PER_SERVICE: usize = 10;
/// Pods in one namespace.
const PER_NAMESPACE: usize = 200;
/// Nodes that they are said to be on.
const NODES: usize = 250;
/// First address of pods and of Services: shared address space (RFC 6598), which the lab does not use.
const PODS: u32 = u32::from_be_bytes([100, 64, 0, 0]);
const SERVICES: u32 = u32::from_be_bytes([100, 112, 0, 0]);

/// Services among so many pods.
pub(super) fn services(pods: usize) -> usize {
    pods / PER_SERVICE
}

/// Makes the crowd in control's folder so large: a multiple of [`PER_FILE`].
pub(super) fn write(objects: &Path, from: usize, to: usize) -> anyhow::Result<()> {
    let folder = objects.join("crowd");
    std::fs::create_dir_all(&folder)?;
    for file in from / PER_FILE..to / PER_FILE {
        let path = folder.join(file_name(file));
        replace(&path, &manifests(file)).with_context(|| format!("{} cannot be written", path.display()))?;
    }
    Ok(())
}

/// Name of a file, as control names it in `/debug/sync` below `crowd/`.
pub(super) fn file_name(file: usize) -> String {
    format!("{file:05}.yaml")
}

/// The pods and Services of one file.
fn manifests(file: usize) -> String {
    let mut text = String::new();
    for index in file * PER_FILE..(file + 1) * PER_FILE {
        let (of_service, of_namespace) = (index / PER_SERVICE, index / PER_NAMESPACE);
        if index % PER_NAMESPACE == 0 {
            let _ = write!(
                text,
                "---\napiVersion: v1\nkind: Namespace\nmetadata: {{name: crowd-{of_namespace}, labels: {{tulle.dev/mesh: enabled}}}}\n"
            );
        }
        if index % PER_SERVICE == 0 {
            text += &service(of_service, of_namespace);
        }
        text += &pod(index, of_service, of_namespace);
    }
    text
}

fn service(number: usize, namespace: usize) -> String {
    let address = Ipv4Addr::from(SERVICES + number as u32);
    format!(
        "---\napiVersion: v1\nkind: Service\nmetadata: {{name: app-{number}, namespace: crowd-{namespace}}}\n\
         spec: {{clusterIP: {address}, selector: {{app: app-{number}}}, ports: [{{name: http, port: 80, targetPort: 8080}}]}}\n"
    )
}

fn pod(index: usize, service: usize, namespace: usize) -> String {
    let address = Ipv4Addr::from(PODS + index as u32);
    // Hashes of templates and suffixes of pods, as a Deployment gives them.
    let set = format!("app-{service}-{:010x}", 0x5d4f_7c9b_u64 + service as u64);
    format!(
        "---\napiVersion: v1\nkind: Pod\nmetadata:\n  name: {set}-{index:05x}\n  namespace: crowd-{namespace}\n\
         \x20 uid: 6f1c9a52-3b7d-4e08-9a41-{index:012x}\n  labels: {{app: app-{service}, pod-template-hash: '{:010x}'}}\n\
         \x20 ownerReferences: [{{apiVersion: apps/v1, kind: ReplicaSet, name: {set}, uid: a, controller: true}}]\n\
         spec: {{nodeName: far-{}, serviceAccountName: app-{service}, containers: [{{name: main, image: none, ports: [{{containerPort: 8080}}]}}]}}\n\
         status: {{phase: Running, podIP: {address}, podIPs: [{{ip: {address}}}], conditions: [{{type: Ready, status: 'True'}}]}}\n",
        0x5d4f_7c9b_u64 + service as u64,
        index % NODES,
    )
}

#[cfg(test)]
mod tests {
    use crate::bench::scale::crowd;

    #[test]
    fn a_crowd_has_as_many_pods_and_services_as_it_says() {
        let text: String = (0..4).map(crowd::manifests).collect();
        let count = |kind: &str| text.matches(&format!("kind: {kind}\n")).count();
        assert_eq!((count("Pod"), count("Service"), count("Namespace")), (400, crowd::services(400), 2));
        let mut addresses: Vec<&str> =
            text.lines().filter_map(|line| line.split_once("podIP: ")?.1.split(',').next()).collect();
        addresses.dedup();
        assert_eq!(addresses.len(), 400, "each has an address of its own");
    }
}
