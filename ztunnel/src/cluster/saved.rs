//! What the agent remembers across its own restarts, in one file of the run folder: which sandbox the CNI plugin announced
//! for which pod, and the pods that were in the mesh.
//!
//! The first because a path that the plugin named is surer than a look at processes; the second so that a restart while the
//! API server is away leaves no captured pod without a proxy. The run folder is empty after a reboot, as are the network
//! namespaces. The file is replaced by rename and holds no secret; one that cannot be read counts as absent.

use std::net::IpAddr;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::cluster::pod::Member;
use crate::cni::files;

/// Name of the file.
pub const FILE: &str = "agent.json";
/// Largest file that is read: some 400 bytes a pod, and a node has a few hundred.
const LARGEST: u64 = 4 << 20;

/// A sandbox that the CNI plugin announced.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Sandbox {
    /// CNI_CONTAINERID.
    pub container_id: String,
    /// CNI_IFNAME.
    pub if_name: String,
    /// metadata.namespace of the pod.
    pub namespace: String,
    /// metadata.name of the pod.
    pub name: String,
    /// The uid that the runtime says; empty if it says none.
    pub runtime_uid: String,
    /// CNI_NETNS.
    pub netns: PathBuf,
    /// Addresses that the plugins before ours gave.
    pub ips: Vec<IpAddr>,
}

/// A pod that was in the mesh.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Enrolled {
    /// metadata.uid.
    pub uid: String,
    /// See [`Member::runtime_uid`].
    pub runtime_uid: String,
    /// metadata.name.
    pub name: String,
    /// metadata.namespace.
    pub namespace: String,
    /// spec.serviceAccountName.
    pub service_account: String,
    /// status.podIPs.
    pub ips: Vec<IpAddr>,
    /// Ports on which the kubelet asks.
    pub probe_ports: Vec<u16>,
}

impl Enrolled {
    /// What is remembered of a pod.
    pub fn of(pod: &Member) -> Self {
        Self {
            uid: pod.uid.clone(),
            runtime_uid: pod.runtime_uid.clone(),
            name: pod.name.clone(),
            namespace: pod.namespace.clone(),
            service_account: pod.service_account.clone(),
            ips: pod.ips.clone(),
            probe_ports: pod.probe_ports.clone(),
        }
    }

    /// The pod, as far as it is remembered.
    pub fn member(self) -> Member {
        Member {
            uid: self.uid,
            runtime_uid: self.runtime_uid,
            name: self.name,
            namespace: self.namespace,
            service_account: self.service_account,
            ips: self.ips,
            probe_ports: self.probe_ports,
            ..Member::default()
        }
    }
}

/// See the module's header.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Saved {
    /// Sandboxes, the newest last.
    pub sandboxes: Vec<Sandbox>,
    /// Pods in the mesh.
    pub enrolled: Vec<Enrolled>,
}

impl Saved {
    /// Reads the file in `folder`.
    pub fn read(folder: &Path) -> Self {
        let path = folder.join(FILE);
        if !path.exists() {
            return Self::default();
        }
        let read = files::read_bounded(&path, LARGEST);
        let saved = read.and_then(|text| serde_json::from_slice(&text).map_err(|error| error.to_string()));
        saved.unwrap_or_else(|error| {
            tracing::warn!(path = %path.display(), %error, "what was remembered cannot be read; pods are looked for anew");
            Self::default()
        })
    }

    /// Replaces the file in `folder`, which is made if it is absent.
    ///
    /// # Errors
    /// What failed, where, and what to do.
    pub fn write(&self, folder: &Path) -> Result<(), String> {
        let content = serde_json::to_vec(self).map_err(|error| error.to_string())?;
        replace(folder, FILE, &content)
    }
}

/// Replaces a file that only root may read; the folder is made if it is absent.
///
/// # Errors
/// What failed, where, and what to do; the file is as it was then.
pub fn replace(folder: &Path, name: &str, content: &[u8]) -> Result<(), String> {
    files::make_folder(folder, 0o700)?;
    files::replace(&folder.join(name), content, 0o600).map(drop)
}

#[cfg(test)]
mod tests {
    use super::{Enrolled, FILE, Sandbox, Saved};
    use crate::cluster::pod::Member;

    #[test]
    fn what_is_written_is_read_and_nonsense_is_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let inside = folder.path().join("tulle");
        assert_eq!(Saved::read(&inside), Saved::default());
        let pod = Member {
            uid: "u".into(),
            runtime_uid: "r".into(),
            name: "a".into(),
            namespace: "shop".into(),
            service_account: "web".into(),
            ips: vec!["10.0.0.1".parse().unwrap()],
            probe_ports: vec![80],
            ..Member::default()
        };
        let sandbox = Sandbox {
            container_id: "c".into(),
            if_name: "eth0".into(),
            namespace: "shop".into(),
            name: "a".into(),
            runtime_uid: "u".into(),
            netns: "/run/netns/c".into(),
            ips: vec!["fd00::1".parse().unwrap()],
        };
        let saved = Saved { sandboxes: vec![sandbox], enrolled: vec![Enrolled::of(&pod)] };
        saved.write(&inside).unwrap();
        assert_eq!(Saved::read(&inside), saved);
        assert_eq!(saved.enrolled[0].clone().member(), pod);
        assert_eq!(std::fs::read_dir(&inside).unwrap().count(), 1, "nothing is left over");
        std::fs::write(inside.join(FILE), "{\"sandboxes\": 3}").unwrap();
        assert_eq!(Saved::read(&inside), Saved::default());
    }
}
