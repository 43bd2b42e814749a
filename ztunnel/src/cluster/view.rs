//! What is known of this node's pods and of all namespaces: events in, a view out. Pure.
//!
//! A list that begins anew replaces what was known only when it is complete, so that nothing is taken for gone because
//! a server went away half way. A pod that the CNI plugin asked about before the watch knew it stands in the view for a
//! while, by what the API server said when it was asked.

use std::collections::{BTreeMap, HashMap};
use std::time::{Duration, Instant};

use crate::cluster::pod::Member;
use crate::cni::enrolment::{Known, Labels, word};

/// How long a pod may be known from a question only. The watch follows within seconds; one that never shows it means
/// that the pod is gone.
const EARLY: Duration = Duration::from_secs(60);
/// Pods known from questions only, at a time: more than the kubelet starts at once.
const EARLY_MOST: usize = 512;

/// A piece of news.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum News {
    /// A pod, as it is now.
    Pod(Member),
    /// A pod that is gone.
    PodGone(String),
    /// All pods of this node.
    Pods(Vec<Member>),
    /// A namespace, with its labels.
    Namespace(String, Labels),
    /// A namespace that is gone.
    NamespaceGone(String),
    /// All namespaces.
    Namespaces(Vec<(String, Labels)>),
}

/// See the module's header.
#[derive(Clone, Debug, Default)]
pub struct View {
    pods: BTreeMap<String, Member>,
    early: HashMap<String, (Member, Instant)>,
    known: Known,
    listed: (bool, bool),
}

impl View {
    /// Nothing is known yet but the root namespace, and whether namespaces are closed that do not say.
    pub fn new(root: &str, egress_denied_by_default: bool) -> Self {
        let known = Known { version: 1, root_namespace: root.to_owned(), egress_denied_by_default, ..Known::default() };
        Self { known, ..Self::default() }
    }

    /// Takes a piece of news.
    pub fn take(&mut self, news: News) {
        match news {
            News::Pod(pod) => {
                self.early.remove(&pod.uid);
                self.pods.insert(pod.uid.clone(), pod);
            }
            News::PodGone(uid) => {
                self.early.remove(&uid);
                self.pods.remove(&uid);
            }
            News::Pods(all) => {
                self.pods = all.into_iter().map(|pod| (pod.uid.clone(), pod)).collect();
                self.early.retain(|uid, _| !self.pods.contains_key(uid));
                self.listed.0 = true;
            }
            News::Namespace(name, labels) => drop(self.known.namespaces.insert(name, labels)),
            News::NamespaceGone(name) => drop(self.known.namespaces.remove(&name)),
            News::Namespaces(all) => {
                self.known.namespaces = all.into_iter().collect();
                self.listed.1 = true;
            }
        }
    }

    /// Takes a pod that the watch does not know yet, and the labels of its namespace if those are not known either.
    pub fn take_early(&mut self, pod: Member, namespace: Option<Labels>, now: Instant) {
        if let Some(labels) = namespace {
            self.known.namespaces.entry(pod.namespace.clone()).or_insert(labels);
        }
        self.early.retain(|_, (_, since)| now.duration_since(*since) < EARLY);
        if !self.pods.contains_key(&pod.uid) && self.early.len() < EARLY_MOST {
            self.early.insert(pod.uid.clone(), (pod, now));
        }
    }

    /// Forgets pods that the watch never showed.
    pub fn forget_early(&mut self, now: Instant) {
        self.early.retain(|_, (_, since)| now.duration_since(*since) < EARLY);
    }

    /// What has been listed once: pods, namespaces.
    pub fn listed(&self) -> (bool, bool) {
        self.listed
    }

    /// Every pod of this node.
    pub fn pods(&self) -> impl Iterator<Item = &Member> {
        self.pods.values().chain(self.early.values().map(|(pod, _)| pod))
    }

    /// A pod by its name.
    pub fn named(&self, namespace: &str, name: &str) -> Option<&Member> {
        self.pods().find(|pod| pod.namespace == namespace && pod.name == name)
    }

    /// Labels of a namespace, if it is known.
    pub fn namespace(&self, name: &str) -> Option<&Labels> {
        self.known.namespaces.get(name)
    }

    /// What decides about pods besides their own labels.
    pub fn known(&self) -> &Known {
        &self.known
    }

    /// What the CNI plugin decides by while nobody answers it: the same, and where pods were seen to enrol themselves.
    pub fn known_to_plugin(&self) -> Known {
        let own_word = self.pods().filter(|pod| word(&pod.labels) == Some(true) && self.enrols(pod));
        Known { self_enrolling: own_word.map(|pod| pod.namespace.clone()).collect(), ..self.known.clone() }
    }

    /// Whether labels want `pod` in the mesh. One whose namespace is not known has a namespace without labels, as
    /// control has it.
    pub fn enrols(&self, pod: &Member) -> bool {
        static NONE: Labels = Labels::new();
        let of_namespace = self.known.namespaces.get(&pod.namespace).unwrap_or(&NONE);
        !pod.host_network && !pod.finished && self.known.enrolled(&pod.namespace, of_namespace, &pod.labels)
    }

    /// Whether labels say that nothing may leave the pod's namespace.
    pub fn closes(&self, pod: &Member) -> bool {
        static NONE: Labels = Labels::new();
        self.known.closed(&pod.namespace, self.known.namespaces.get(&pod.namespace).unwrap_or(&NONE))
    }

    /// Writes down that the annotation of a pod is now `value`, which the watch will say a little later.
    pub fn annotated(&mut self, uid: &str, value: Option<&str>) {
        let early = self.early.get_mut(uid).map(|(pod, _)| pod);
        if let Some(pod) = self.pods.get_mut(uid).or(early) {
            pod.redirection = value.map(str::to_owned);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::{EARLY, News, View};
    use crate::cluster::pod::Member;
    use crate::cni::enrolment::Labels;

    fn pod(uid: &str) -> Member {
        Member { uid: uid.into(), name: uid.into(), namespace: "shop".into(), ..Member::default() }
    }

    fn uids(view: &View) -> Vec<&str> {
        view.pods().map(|pod| pod.uid.as_str()).collect()
    }

    #[test]
    fn a_new_list_replaces_and_single_news_do_not() {
        let mut view = View::default();
        view.take(News::Pod(pod("a")));
        assert_eq!(view.listed(), (false, false));
        view.take(News::Pods(vec![pod("b"), pod("c")]));
        view.take(News::Namespaces(Vec::new()));
        assert_eq!((uids(&view), view.listed()), (vec!["b", "c"], (true, true)));
        view.take(News::PodGone("b".into()));
        view.take(News::PodGone("never".into()));
        assert_eq!(uids(&view), ["c"]);
    }

    #[test]
    fn labels_of_a_namespace_take_effect_both_ways() {
        let mut view = View::default();
        view.take(News::Pod(pod("a")));
        let enrols = |view: &View| view.enrols(view.named("shop", "a").unwrap());
        assert!(!enrols(&view), "a namespace that is not known has no labels");
        let labels = Labels::from([("tulle.dev/mesh".to_owned(), "enabled".to_owned())]);
        view.take(News::Namespace("shop".into(), labels));
        assert!(enrols(&view));
        view.take(News::NamespaceGone("shop".into()));
        assert!(!enrols(&view));
    }

    #[test]
    fn the_plugin_is_told_where_pods_enrol_themselves() {
        let mut view = View::default();
        let labels = Labels::from([("tulle.dev/mesh".to_owned(), "enabled".to_owned())]);
        view.take(News::Pods(vec![pod("a"), Member { labels: labels.clone(), namespace: "mixed".into(), ..pod("b") }]));
        view.take(News::Pod(Member { labels, namespace: "node".into(), host_network: true, ..pod("c") }));
        assert_eq!(view.known_to_plugin().self_enrolling, ["mixed".to_owned()].into());
    }

    #[test]
    fn pods_on_the_host_network_and_finished_ones_are_never_in_the_mesh() {
        let mut view = View::new("tulle-system", true);
        assert!(view.enrols(&pod("a")), "closed by default");
        let labels = Labels::from([("tulle.dev/egress".to_owned(), "deny".to_owned())]);
        view.take(News::Namespace("shop".into(), labels));
        assert!(!view.enrols(&Member { host_network: true, ..pod("a") }));
        assert!(!view.enrols(&Member { finished: true, ..pod("a") }));
    }

    #[test]
    fn a_pod_that_was_asked_about_stands_in_until_the_watch_knows() {
        let (mut view, now) = (View::default(), Instant::now());
        view.take_early(pod("a"), Some(Labels::new()), now);
        assert_eq!(uids(&view), ["a"]);
        view.annotated("a", Some("enabled"));
        assert_eq!(view.named("shop", "a").unwrap().redirection.as_deref(), Some("enabled"));
        view.take(News::Pods(Vec::new()));
        assert_eq!(uids(&view), ["a"], "a list from before it was made");
        view.take(News::Pod(pod("a")));
        view.take(News::PodGone("a".into()));
        assert!(uids(&view).is_empty());
        view.take_early(pod("b"), None, now);
        view.forget_early(now + EARLY + Duration::from_secs(1));
        assert!(uids(&view).is_empty());
    }
}
