//! What becomes of a pod while the node's agent does not answer: one that belongs in the mesh waits, every other one starts.
//!
//! Best is what the API server says now. Where it cannot be asked (its token dies with the agent's pod, and an outage of the API
//! must not keep a node from starting pods), what the agent wrote last decides: a namespace's own labels, and for a pod whose labels
//! cannot be read, what its namespace says, unless pods there are known to enrol themselves. A namespace that nobody knows is not
//! guessed about: its pods wait. [`decide`] is pure; who asks and reads is the caller.

use crate::cni::api::ApiError;
use crate::cni::enrolment::{Known, Labels, word};

/// What is found out about a pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Not in the mesh: it starts.
    Out,
    /// In the mesh, for this reason: it waits for the agent.
    In(String),
    /// It cannot be known, for this reason: it waits for whoever can tell.
    Unknown(String),
}

/// What the API server said of a namespace and a pod in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Asked {
    /// Labels of the namespace.
    pub namespace: Result<Labels, ApiError>,
    /// Labels of the pod.
    pub pod: Result<Labels, ApiError>,
}

/// Whether a pod of `namespace` belongs in the mesh. `known` is what the agent wrote last, or why that cannot be read.
pub fn decide(namespace: &str, root: &str, known: &Result<Known, String>, asked: &Asked) -> Verdict {
    let nothing = Known { version: 1, root_namespace: root.to_owned(), ..Known::default() };
    let rule = known.as_ref().unwrap_or(&nothing);
    let cached = rule.namespaces.get(namespace);
    let (of_namespace, said_now) = match (&asked.namespace, cached) {
        (Ok(labels), _) => (labels, true),
        (Err(_), Some(labels)) => (labels, false),
        (Err(ApiError::NotFound), None) => return Verdict::Unknown(format!("there is no namespace {namespace}")),
        (Err(ApiError::Failed(why)), None) => {
            let file = match known {
                Ok(_) => "the agent has not seen it yet".to_owned(),
                Err(why) => format!("what the agent wrote cannot be read ({why})"),
            };
            return Verdict::Unknown(format!(
                "whether namespace {namespace} is in the mesh is not known: {file}, and {why}"
            ));
        }
    };
    let source = if said_now { "its labels" } else { "its labels when the agent last saw them" };
    let enrolled = match &asked.pod {
        Ok(of_pod) => rule.enrolled(namespace, of_namespace, of_pod),
        // A pod that is gone has no labels.
        Err(ApiError::NotFound) => rule.enrolled(namespace, of_namespace, &Labels::new()),
        Err(ApiError::Failed(why)) => match rule.whatever_the_pod_says(namespace, of_namespace) {
            Some(enrolled) => enrolled,
            None if word(of_namespace) == Some(true) => true,
            None if rule.self_enrolling.contains(namespace) => {
                return Verdict::Unknown(format!(
                    "pods of namespace {namespace} enrol themselves, and the labels of this one cannot be read: {why}"
                ));
            }
            None => false,
        },
    };
    if enrolled { Verdict::In(format!("namespace {namespace} and the pod, by {source}")) } else { Verdict::Out }
}

#[cfg(test)]
mod tests {
    use super::{Asked, Verdict, decide};
    use crate::cni::api::ApiError;
    use crate::cni::enrolment::{Known, Labels};

    fn labels(value: &str) -> Labels {
        let pair = |value: &str| ("tulle.dev/mesh".to_owned(), value.to_owned());
        [value].into_iter().filter(|value| !value.is_empty()).map(pair).collect()
    }

    fn known() -> Known {
        let namespaces = [("shop", "enabled"), ("office", ""), ("own", ""), ("old", "disabled"), ("kube-system", "")];
        Known {
            version: 1,
            root_namespace: "tulle-system".into(),
            namespaces: namespaces.map(|(name, value)| (name.to_owned(), labels(value))).into(),
            self_enrolling: ["own".to_owned()].into(),
            ..Known::default()
        }
    }

    /// `?`: it could not be asked; `-`: there is none.
    fn said(text: &str) -> Result<Labels, ApiError> {
        match text {
            "?" => Err(ApiError::Failed("it did not answer in time".into())),
            "-" => Err(ApiError::NotFound),
            value => Ok(labels(value)),
        }
    }

    #[test]
    fn only_pods_that_belong_in_the_mesh_wait() {
        let none = Err("no such file".to_owned());
        for (namespace, cache, of_namespace, of_pod, expected) in [
            // The API server answers: what it says now.
            ("shop", true, "enabled", "", "in"),
            ("shop", true, "", "", "out"),
            ("office", true, "enabled", "", "in"),
            ("office", true, "", "enabled", "in"),
            ("shop", true, "enabled", "disabled", "out"),
            ("new", true, "", "", "out"),
            ("new", false, "enabled", "", "in"),
            ("new", false, "", "", "out"),
            ("shop", true, "enabled", "-", "in"),
            ("tulle-system", false, "", "enabled", "out"),
            // It does not: what the agent wrote.
            ("shop", true, "?", "?", "in"),
            ("office", true, "?", "?", "out"),
            ("old", true, "?", "?", "out"),
            ("own", true, "?", "?", "unknown"),
            ("kube-system", true, "?", "?", "out"),
            ("new", true, "?", "?", "unknown"),
            ("shop", false, "?", "?", "unknown"),
            ("new", false, "-", "?", "unknown"),
            // Half of it.
            ("shop", true, "?", "disabled", "out"),
            ("office", true, "enabled", "?", "in"),
            ("own", true, "", "?", "unknown"),
        ] {
            let file = if cache { Ok(known()) } else { none.clone() };
            let asked = Asked { namespace: said(of_namespace), pod: said(of_pod) };
            let found = match decide(namespace, "tulle-system", &file, &asked) {
                Verdict::Out => "out",
                Verdict::In(_) => "in",
                Verdict::Unknown(why) => {
                    assert!(why.contains(namespace), "{why}");
                    "unknown"
                }
            };
            assert_eq!(found, expected, "{namespace} {cache} [{of_namespace}] [{of_pod}]");
        }
    }
}
