//! How labels have to change so that no pod is in the mesh any more. Pure.
//!
//! Our own labels go. Istio's stay, because Istio may be there, and ours says `disabled` beside them, which wins. A namespace
//! whose egress is closed is enrolled by that alone, and it opens when Tulle goes: whoever uninstalls must have said so.

use std::collections::BTreeMap;

use serde_json::{Value, json};
use tulle_proto::enrol;
use tulle_proto::names;

/// Labels as they are.
pub(super) type Labels = BTreeMap<String, String>;

/// A namespace or pod and its labels.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Labelled {
    /// Of a pod.
    pub(super) namespace: Option<String>,
    pub(super) name: String,
    pub(super) labels: Labels,
}

/// Labels to change on one object; `None`: the label goes.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Change<'a> {
    pub(super) of: &'a Labelled,
    pub(super) labels: Vec<(&'static str, Option<&'static str>)>,
}

impl Change<'_> {
    /// As a merge patch.
    pub(super) fn patch(&self) -> Value {
        let labels: BTreeMap<_, _> = self.labels.iter().copied().collect();
        json!({"metadata": {"labels": labels}})
    }

    /// For people, and so that it can be undone by hand.
    pub(super) fn words(&self) -> String {
        let was = |key: &str| self.of.labels.get(key).map_or_else(String::new, |was| format!(" (was {was})"));
        let one = |(key, value): &(&'static str, Option<&'static str>)| match value {
            None => format!("{key} removed{}", was(key)),
            Some(value) => format!("{key}={value}{}", was(key)),
        };
        self.labels.iter().map(one).collect::<Vec<_>>().join(", ")
    }
}

/// Whether nothing may leave the namespace. A word that nobody knows closes, as the proxies have it.
fn closed(one: &Labelled, by_default: bool) -> bool {
    let egress = one.labels.get(names::LABEL_EGRESS).map(String::as_str);
    // The root namespace is the caller's matter.
    enrol::is_closed(egress, by_default && !enrol::is_system(&one.name, ""))
}

/// Namespaces that open when Tulle goes. `by_default`: those without a label are closed, the root namespace aside.
pub(super) fn opens<'a>(namespaces: &'a [Labelled], root: &str, by_default: bool) -> Vec<&'a str> {
    let open = |one: &&Labelled| closed(one, by_default && one.name != root);
    namespaces.iter().filter(open).map(|one| one.name.as_str()).collect()
}

/// What has to change on namespaces (where `pods` is false) or pods.
pub(super) fn changes<'a>(objects: &'a [Labelled], pods: bool, root: &str, by_default: bool) -> Vec<Change<'a>> {
    let mut changes = Vec::new();
    for of in objects {
        let mut labels = Vec::new();
        let has = |key: &str, value: &str| of.labels.get(key).is_some_and(|label| label == value);
        if has(names::LABEL_ISTIO_MESH, "ambient") {
            if !has(names::LABEL_MESH, "disabled") {
                labels.push((names::LABEL_MESH, Some("disabled")));
            }
        } else if has(names::LABEL_MESH, "enabled") {
            labels.push((names::LABEL_MESH, None));
        }
        if !pods && closed(of, by_default && of.name != root) {
            let after = by_default.then_some("allow");
            labels.push((names::LABEL_EGRESS, after));
        }
        if !labels.is_empty() {
            changes.push(Change { of, labels });
        }
    }
    changes
}

#[cfg(test)]
mod tests {
    use super::{Labelled, changes, opens};

    fn labelled(name: &str, labels: &str) -> Labelled {
        let labels = labels.split_whitespace().filter_map(|one| one.split_once('='));
        Labelled {
            namespace: None,
            name: name.to_owned(),
            labels: labels.map(|(key, value)| (key.to_owned(), value.to_owned())).collect(),
        }
    }

    #[test]
    fn labels_change_so_that_nobody_is_enrolled() {
        for (labels, pods, by_default, expected) in [
            ("", false, false, ""),
            ("app=x", true, false, ""),
            ("tulle.dev/mesh=enabled", false, false, "tulle.dev/mesh removed (was enabled)"),
            ("tulle.dev/mesh=enabled", true, false, "tulle.dev/mesh removed (was enabled)"),
            ("tulle.dev/mesh=disabled", false, false, ""),
            ("istio.io/dataplane-mode=none", false, false, ""),
            ("istio.io/dataplane-mode=ambient", false, false, "tulle.dev/mesh=disabled"),
            ("istio.io/dataplane-mode=ambient tulle.dev/mesh=disabled", false, false, ""),
            (
                "istio.io/dataplane-mode=ambient tulle.dev/mesh=enabled",
                true,
                false,
                "tulle.dev/mesh=disabled (was enabled)",
            ),
            ("tulle.dev/egress=deny", false, false, "tulle.dev/egress removed (was deny)"),
            ("tulle.dev/egress=deny", false, true, "tulle.dev/egress=allow (was deny)"),
            ("tulle.dev/egress=dney", false, false, "tulle.dev/egress removed (was dney)"),
            ("tulle.dev/egress=deny", true, false, ""),
            ("tulle.dev/egress=audit", false, true, ""),
            ("", false, true, "tulle.dev/egress=allow"),
        ] {
            let objects = [labelled("a", labels)];
            let words: Vec<_> = changes(&objects, pods, "root", by_default).iter().map(|one| one.words()).collect();
            assert_eq!(words.join("; "), expected, "{labels}, pods {pods}, closed by default {by_default}");
        }
    }

    #[test]
    fn namespaces_that_open_are_named() {
        let all = [
            labelled("a", "tulle.dev/egress=deny"),
            labelled("b", ""),
            labelled("root", ""),
            labelled("kube-system", ""),
        ];
        assert_eq!(opens(&all, "root", false), ["a"]);
        assert_eq!(opens(&all, "root", true), ["a", "b"]);
    }

    #[test]
    fn a_patch_removes_by_null() {
        let objects = [labelled("a", "tulle.dev/mesh=enabled")];
        let patch = changes(&objects, false, "root", false)[0].patch();
        assert_eq!(patch.to_string(), r#"{"metadata":{"labels":{"tulle.dev/mesh":null}}}"#);
    }
}
