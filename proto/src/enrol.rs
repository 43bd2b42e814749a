//! What the labels of a namespace or a pod say of the mesh: one rule for control, for the nodes and for the lab.
//!
//! All three decide by it who is in the mesh, and must never differ. Tulle's label wins over Istio's of the same object,
//! whatever else it says; a value that nobody knows says nothing, but of egress, where it closes.

use crate::names;

/// What the labels of one object say; `None`: nothing. `label` looks one up.
pub fn wish<'a>(label: impl Fn(&str) -> Option<&'a str>) -> Option<bool> {
    match label(names::LABEL_MESH) {
        Some("enabled") => return Some(true),
        Some("disabled") => return Some(false),
        _ => {}
    }
    match label(names::LABEL_ISTIO_MESH) {
        Some("ambient") => Some(true),
        Some("none") => Some(false),
        _ => None,
    }
}

/// Whether nothing may leave a namespace, by its label of egress; `by_default`: what holds without one.
pub fn is_closed(egress: Option<&str>, by_default: bool) -> bool {
    egress.map_or(by_default, |mode| !matches!(mode, "allow" | "audit"))
}

/// Whether a namespace takes part only if it says so itself, and no default of the mesh is meant for it.
pub fn is_system(namespace: &str, root_namespace: &str) -> bool {
    matches!(namespace, "kube-system" | "istio-system") || namespace == root_namespace
}

/// Whether labels enrol a pod that has a network of its own and has not finished: the pod's word before the namespace's, but
/// a namespace of the system has to say something itself; a closed namespace is enrolled whatever anybody says.
pub fn is_enrolled(closed: bool, system: bool, of_namespace: Option<bool>, of_pod: Option<bool>) -> bool {
    if closed || (system && of_namespace.is_none()) {
        return closed;
    }
    of_pod.or(of_namespace).unwrap_or(false)
}

#[cfg(test)]
mod tests {
    use super::{is_closed, is_enrolled, is_system, wish};

    #[test]
    fn ours_wins_over_istio_s_and_what_nobody_knows_says_nothing() {
        for (mesh, istio, expected) in [
            (None, None, None),
            (Some("enabled"), Some("none"), Some(true)),
            (Some("disabled"), Some("ambient"), Some(false)),
            (None, Some("ambient"), Some(true)),
            (None, Some("none"), Some(false)),
            (Some("yes"), Some("ambient"), Some(true)),
            (Some("yes"), None, None),
        ] {
            let found = wish(|key| if key == "tulle.dev/mesh" { mesh } else { istio });
            assert_eq!(found, expected, "{mesh:?} {istio:?}");
        }
    }

    #[test]
    fn a_closed_namespace_is_enrolled_and_one_of_the_system_only_by_its_own_word() {
        assert!(is_closed(Some("deny"), false) && is_closed(Some("dney"), false) && is_closed(None, true));
        assert!(!is_closed(Some("audit"), true) && !is_closed(Some("allow"), true) && !is_closed(None, false));
        assert!(is_system("kube-system", "mesh") && is_system("istio-system", "mesh") && is_system("mesh", "mesh"));
        assert!(!is_system("tulle-system", "mesh"));
        for (closed, system, of_namespace, of_pod, expected) in [
            (false, false, None, None, false),
            (false, false, Some(true), None, true),
            (false, false, Some(true), Some(false), false),
            (false, false, Some(false), Some(true), true),
            (false, false, None, Some(true), true),
            (true, false, None, Some(false), true),
            (true, true, None, None, true),
            (false, true, None, Some(true), false),
            (false, true, Some(true), None, true),
            (false, true, Some(false), Some(true), true),
        ] {
            let found = is_enrolled(closed, system, of_namespace, of_pod);
            assert_eq!(found, expected, "{closed} {system} {of_namespace:?} {of_pod:?}");
        }
    }
}
