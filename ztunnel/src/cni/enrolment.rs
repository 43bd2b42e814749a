//! Whether labels enrol a pod, and what of a cluster one has to know for that.
//!
//! One pure rule, used by the node's agent, which watches namespaces, and by the CNI plugin while the agent is away, which
//! then reads what the agent wrote last ([`Known`]). What labels mean is the same for control ([`tulle_proto::enrol`]). Where something is unknown the plugin says so instead of guessing: a pod that belongs in
//! the mesh never starts outside of it.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};
use tulle_proto::enrol;
use tulle_proto::names;

/// Labels of an object.
pub type Labels = BTreeMap<String, String>;

/// Largest file of namespaces that is read: some 100 bytes each, and Kubernetes is tested with 10,000.
pub const KNOWN_MAX: u64 = 16 << 20;

/// What decides about pods besides their own labels. The agent writes it to `namespaces.json` in the CNI state folder,
/// replaced by rename, whenever it changes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Known {
    /// 1.
    pub version: u32,
    /// The mesh's root namespace, whose pods are enrolled only if they say so themselves.
    pub root_namespace: String,
    /// Namespaces without a label of egress are closed too, as the mesh's default may say.
    #[serde(default)]
    pub egress_denied_by_default: bool,
    /// Every namespace of the cluster, with those of its labels that matter ([`relevant`]).
    pub namespaces: BTreeMap<String, Labels>,
    /// Namespaces in which a pod of this node has a label of its own that enrols it. Elsewhere a pod whose labels cannot be
    /// read is taken to do as its namespace says.
    #[serde(default)]
    pub self_enrolling: BTreeSet<String>,
}

/// The labels that [`enrolled`] reads.
pub fn relevant(labels: &Labels) -> Labels {
    let matters = [names::LABEL_MESH, names::LABEL_ISTIO_MESH, names::LABEL_EGRESS];
    labels.iter().filter(|(key, _)| matters.contains(&key.as_str())).map(|(k, v)| (k.clone(), v.clone())).collect()
}

impl Known {
    /// The file's content.
    pub fn encode(&self) -> Vec<u8> {
        serde_json::to_vec(self).unwrap_or_default()
    }

    /// Reads the file's content.
    ///
    /// # Errors
    /// What is wrong with it; then nothing is known.
    pub fn decode(content: &[u8]) -> Result<Self, String> {
        let known: Self = serde_json::from_slice(content).map_err(|error| error.to_string())?;
        if known.version != 1 {
            return Err(format!("version {}; 1 is known", known.version));
        }
        Ok(known)
    }

    /// Whether a pod of the namespace may be enrolled, whatever its own labels are: `Some` if they do not matter, `None` if
    /// they decide.
    pub fn whatever_the_pod_says(&self, namespace: &str, labels: &Labels) -> Option<bool> {
        if self.closed(namespace, labels) {
            return Some(true);
        }
        // The pods of a system namespace that does not label itself are out, whatever they say.
        (word(labels).is_none() && self.is_system(namespace)).then_some(false)
    }

    /// Whether labels enrol a pod that has a network of its own and has not finished. The pod's word before the
    /// namespace's, at each level ours before Istio's; `egress: deny` over all of them.
    pub fn enrolled(&self, namespace: &str, of_namespace: &Labels, of_pod: &Labels) -> bool {
        let (closed, system) = (self.closed(namespace, of_namespace), self.is_system(namespace));
        enrol::is_enrolled(closed, system, word(of_namespace), word(of_pod))
    }

    /// Nothing may leave it.
    pub fn closed(&self, namespace: &str, labels: &Labels) -> bool {
        let egress = labels.get(names::LABEL_EGRESS).map(String::as_str);
        enrol::is_closed(egress, self.egress_denied_by_default && !self.is_system(namespace))
    }

    fn is_system(&self, namespace: &str) -> bool {
        enrol::is_system(namespace, &self.root_namespace)
    }
}

/// What the labels of one object say; `None`: nothing.
pub fn word(labels: &Labels) -> Option<bool> {
    enrol::wish(|key| labels.get(key).map(String::as_str))
}

#[cfg(test)]
mod tests {
    use super::{Known, Labels, relevant};

    fn labels(text: &str) -> Labels {
        text.split_whitespace()
            .filter_map(|word| word.split_once('='))
            .map(|(key, value)| {
                let key = match key {
                    "mesh" => "tulle.dev/mesh",
                    "istio" => "istio.io/dataplane-mode",
                    "egress" => "tulle.dev/egress",
                    other => other,
                };
                (key.to_owned(), value.to_owned())
            })
            .collect()
    }

    #[test]
    fn the_pod_s_word_wins_over_the_namespace_s_and_ours_over_istio_s() {
        let known = Known { version: 1, root_namespace: "tulle-system".into(), ..Known::default() };
        for (namespace, of_namespace, of_pod, expected) in [
            ("shop", "", "", false),
            ("shop", "mesh=enabled", "", true),
            ("shop", "istio=ambient", "", true),
            ("shop", "mesh=enabled", "mesh=disabled", false),
            ("shop", "mesh=enabled", "istio=none", false),
            ("shop", "mesh=disabled", "mesh=enabled", true),
            ("shop", "mesh=disabled istio=ambient", "", false),
            ("shop", "istio=none mesh=enabled", "", true),
            ("shop", "", "istio=ambient", true),
            ("shop", "", "istio=ambient mesh=disabled", false),
            ("shop", "mesh=yes", "", false),
            ("shop", "mesh=yes istio=ambient", "", true),
            ("shop", "egress=deny", "", true),
            ("shop", "egress=deny mesh=disabled", "mesh=disabled", true),
            ("shop", "egress=typo", "", true),
            ("shop", "egress=audit", "", false),
            ("shop", "egress=allow", "mesh=enabled", true),
            ("kube-system", "", "", false),
            ("kube-system", "", "mesh=enabled", false),
            ("kube-system", "mesh=enabled", "", true),
            ("istio-system", "", "istio=ambient", false),
            ("tulle-system", "", "mesh=enabled", false),
            ("tulle-system", "mesh=disabled", "mesh=enabled", true),
            ("kube-system", "egress=deny", "", true),
        ] {
            let found = known.enrolled(namespace, &labels(of_namespace), &labels(of_pod));
            assert_eq!(found, expected, "{namespace} [{of_namespace}] [{of_pod}]");
            let fixed = known.whatever_the_pod_says(namespace, &labels(of_namespace));
            assert!(fixed.is_none_or(|fixed| fixed == expected), "{namespace} [{of_namespace}]: {fixed:?}");
        }
    }

    #[test]
    fn a_mesh_that_is_closed_by_default_enrols_all_but_the_system() {
        let known = Known { egress_denied_by_default: true, root_namespace: "tulle-system".into(), ..Known::default() };
        let none = Labels::new();
        assert!(known.enrolled("shop", &none, &labels("mesh=disabled")));
        assert!(!known.enrolled("shop", &labels("egress=allow"), &none));
        assert!(!known.enrolled("kube-system", &none, &none));
        assert!(!known.enrolled("tulle-system", &none, &none));
    }

    #[test]
    fn the_file_keeps_what_matters() {
        let all = labels("mesh=enabled egress=deny app=cart");
        assert_eq!(relevant(&all), labels("mesh=enabled egress=deny"));
        let namespaces = [("shop".to_owned(), relevant(&all))].into();
        let known = Known { version: 1, root_namespace: "tulle-system".into(), namespaces, ..Known::default() };
        assert_eq!(Known::decode(&known.encode()), Ok(known));
        for text in ["", "{}", r#"{"version":2,"rootNamespace":"a","namespaces":{}}"#] {
            assert!(Known::decode(text.as_bytes()).is_err(), "{text}");
        }
    }
}
