//! Which pod a process belongs to, by the text of its `/proc/<pid>/cgroup`. Pure; the text is the kernel's, but its paths
//! are chosen by the container runtime, and their ends by who may make cgroups of its own.
//!
//! Seen: `/kubepods/besteffort/pod<uid>/<container>` (cgroupfs), `/kubepods.slice/kubepods-pod<uid with _>.slice/…`
//! (systemd; containerd and CRI-O), `…:cri-containerd:<container>` at the end, a prefix such as `/kubelet.slice/…` or
//! `/docker/<id>/…`, and `/../../pod<uid>/…` from inside a cgroup namespace. Version 1 has a line for each controller,
//! version 2 one line.
//!
//! All uids of a path are given, the outermost first, and who asks takes the first one that is a pod of this node: a node
//! may itself run in a pod of another cluster, and a container that names a cgroup of its own after another pod stays
//! below its own pod's.

/// Lengths of a uid: a random one with dashes, and the hash of a static pod.
const LENGTHS: [usize; 2] = [36, 32];

/// The uids of pods in the paths of a `cgroup` file, the outermost first.
pub fn pod_uids(text: &str) -> impl Iterator<Item = String> {
    // hierarchy:controllers:path; a path may have colons itself.
    let paths = text.lines().filter_map(|line| line.splitn(3, ':').nth(2));
    paths
        .filter(|path| path.contains("kubepods") || path.starts_with("/.."))
        .flat_map(|path| path.split('/').filter_map(segment))
}

/// The uid in one segment of a path.
fn segment(segment: &str) -> Option<String> {
    let name = segment.split(':').next().unwrap_or_default();
    let name = name.strip_suffix(".slice").unwrap_or(name);
    let uid = match name.strip_prefix("pod") {
        Some(uid) => uid,
        None => name.contains("kubepods").then(|| name.rsplit_once("-pod")).flatten().map(|(_, uid)| uid)?,
    };
    let uid = uid.replace('_', "-").to_ascii_lowercase();
    let good = uid.bytes().all(|byte| byte.is_ascii_hexdigit() || byte == b'-');
    (good && LENGTHS.contains(&uid.len())).then_some(uid)
}

#[cfg(test)]
mod tests {
    use super::pod_uids;

    const UID: &str = "0f47a1f6-9d1c-4a1f-8b54-2f0f6f2a7c11";

    #[test]
    fn every_known_spelling_names_its_pod() {
        let slice = UID.replace('-', "_");
        for text in [
            format!("0::/kubepods/pod{UID}/abc"),
            format!("0::/kubepods/besteffort/pod{UID}/0123abcd"),
            format!(
                "0::/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{slice}.slice/cri-containerd-ab.scope"
            ),
            format!("0::/kubepods.slice/kubepods-pod{slice}.slice/crio-ab.scope/container"),
            format!("0::/kubelet.slice/kubelet-kubepods.slice/kubepods-besteffort-pod{slice}.slice/ab"),
            format!("0::/../../pod{UID}/ab"),
            format!(
                "0::/../../../kubepods-besteffort.slice/kubepods-besteffort-pod{slice}.slice/cri-containerd-ab.scope"
            ),
            format!(
                "0::/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-besteffort.slice/kubelet-kubepods-besteffort-pod{slice}.slice/ab"
            ),
            format!("12:pids:/kubepods/burstable/pod{UID}/ab\n11:cpu,cpuacct:/kubepods/burstable/pod{UID}/ab\n"),
            format!(
                "3:cpu:/\n2:memory:/system.slice/containerd.service/kubepods-besteffort-pod{slice}.slice:cri-containerd:ab\n1:name=systemd:/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod{slice}.slice/ab"
            ),
            format!("0::/docker/ff/kubepods/besteffort/pod11111111-2222-3333-4444-555555555555/x/kubepods/pod{UID}/y"),
            format!("0::/kubepods/pod{}/ab", UID.to_uppercase()),
        ] {
            assert_eq!(pod_uids(&text).last().as_deref(), Some(UID), "{text}");
        }
        let of_static = "4d4b7e3e6f5c8a9b0c1d2e3f40516273";
        assert!(pod_uids(&format!("0::/kubepods/burstable/pod{of_static}/x")).eq([of_static]));
    }

    #[test]
    fn the_outermost_pod_comes_first() {
        let outer = "11111111-2222-3333-4444-555555555555";
        let text = format!("0::/kubepods/pod{outer}/x/kubepods.slice/kubepods-pod{}.slice/y", UID.replace('-', "_"));
        assert!(pod_uids(&text).eq([outer, UID]));
    }

    #[test]
    fn what_is_of_no_pod_says_so() {
        let text = format!("0::/user.slice/pod{UID}/x");
        for text in [
            "",
            "0::/",
            "nonsense",
            "0::/kubepods",
            "0::/kubepods/podxyz/a",
            "0::/kubepods/besteffort/pod/a",
            "0::/system.slice/kubelet.service",
            "0::/kubepods/pod0f47a1f6",
            text.as_str(),
            "0::/kubepods/pod../../x",
            "::::::",
        ] {
            assert_eq!(pod_uids(text).next(), None, "{text}");
        }
    }
}
