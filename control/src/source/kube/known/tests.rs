//! Reports by hand: what stays, what goes, and when it may be served. Besides, a walk that compares what is known after
//! any mix of lists and events with what the cluster has.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::{Event, Item, Known, Note};
use crate::model::{Object, Spec};
use crate::source::Standing;
use crate::source::kube::json;
use crate::source::kube::kinds::KINDS;

const NOW: i64 = 1_700_000_000;

fn place(kind: &str) -> usize {
    KINDS.iter().position(|of| of.name == kind).unwrap()
}

/// As the API server sends it, with a spec and labels.
fn item(kind: &str, name: &str, label: &str, spec: &str) -> Item {
    let text = format!(
        r#"{{"type":"ADDED","object":{{"metadata":{{"name":"{name}","namespace":"shop","labels":{{"v":"{label}"}}}},"spec":{spec}}}}}"#
    );
    match json::line(text.as_bytes(), &KINDS[place(kind)]).unwrap() {
        json::Line::Applied(item, _) => *item,
        other => panic!("{other:?}"),
    }
}

fn pod(name: &str, label: &str) -> Item {
    item("Pod", name, label, "{}")
}

fn list(known: &mut Known, kind: &str, items: Vec<Item>) -> bool {
    let at = place(kind);
    assert!(!known.apply(at, Event::Started, NOW));
    for page in items.chunks(2) {
        assert!(!known.apply(at, Event::Page(page.to_vec()), NOW), "a page alone changes nothing");
    }
    known.apply(at, Event::Listed("5".into()), NOW)
}

/// Everything but one kind was listed.
fn all_but(kind: &str) -> Known {
    let mut known = Known::default();
    for of in KINDS.iter().filter(|of| of.name != kind) {
        list(&mut known, of.name, Vec::new());
    }
    known
}

fn pods(known: &Known) -> Vec<String> {
    known.loaded().world.pods.keys().map(|(_, name)| name.clone()).collect()
}

#[test]
fn nothing_is_served_before_each_kind_was_listed_or_is_known_to_be_absent() {
    let mut known = all_but("HTTPRoute");
    let at = place("HTTPRoute");
    let waiting = |known: &Known| known.loaded().waiting;
    assert_eq!(waiting(&known).len(), 1);
    assert!(waiting(&known)[0].starts_with("httproutes.gateway.networking.k8s.io: "), "{:?}", waiting(&known));
    assert!(known.apply(at, Event::Failed("the API server forbids it".into()), NOW), "the reason is told");
    assert!(waiting(&known)[0].contains("forbids"), "{:?}", waiting(&known));
    assert!(!known.apply(at, Event::Failed("the API server forbids it".into()), NOW), "but once");
    assert!(known.apply(at, Event::Heard(None), NOW), "the reason is over");
    assert!(!waiting(&known)[0].contains("forbids"), "{:?}", waiting(&known));
    assert!(known.apply(at, Event::Absent, NOW));
    assert!(waiting(&known).is_empty());
    // It appears later: what is served goes on, without it until it was listed.
    known.apply(at, Event::Served("v1"), NOW);
    assert!(known.apply(at, Event::Failed("down".into()), NOW), "it is not known, and that is told");
    assert!(list(&mut known, "HTTPRoute", vec![item("HTTPRoute", "r", "1", r#"{"parentRefs":[],"rules":[]}"#)]));
    assert_eq!(known.loaded().world.routes.len(), 1);
    assert!(waiting(&known).is_empty());
}

#[test]
fn a_list_replaces_what_was_known_in_one_step_and_says_nothing_before_its_end() {
    let mut known = all_but("");
    assert!(list(&mut known, "Pod", vec![pod("a", "1"), pod("b", "1"), pod("c", "1")]));
    let before = known.loaded().world;
    // The same list again: nothing happened, and nothing is copied.
    assert!(!list(&mut known, "Pod", vec![pod("a", "1"), pod("b", "1"), pod("c", "1")]));
    assert!(known.kinds[place("Pod")].staged.is_none());
    // A list that fails half way.
    let at = place("Pod");
    known.apply(at, Event::Started, NOW);
    known.apply(at, Event::Page(vec![pod("z", "1")]), NOW);
    known.apply(at, Event::Failed("connection reset".into()), NOW);
    assert!(!known.apply(at, Event::Listed("9".into()), NOW), "without its beginning it says nothing");
    assert_eq!(known.loaded().world, before);
    // And one that tells of changes, a new and a vanished pod.
    assert!(list(&mut known, "Pod", vec![pod("a", "2"), pod("c", "1"), pod("d", "1")]));
    assert_eq!(pods(&known), ["a", "c", "d"]);
    assert_eq!(known.loaded().world.pods.get(&("shop".into(), "a".into())).unwrap().meta.label("v"), Some("2"));
    assert_eq!(known.followed()[at].objects, 3);
}

#[test]
fn events_without_a_difference_change_nothing() {
    let mut known = all_but("");
    let at = place("Pod");
    assert!(known.apply(at, Event::Applied(Box::new(pod("a", "1")), "6".into()), NOW));
    assert!(!known.apply(at, Event::Applied(Box::new(pod("a", "1")), "7".into()), NOW), "only its version is new");
    assert!(known.apply(at, Event::Applied(Box::new(pod("a", "2")), "8".into()), NOW));
    assert!(known.apply(at, Event::Gone("shop".into(), "a".into(), "9".into()), NOW));
    assert!(!known.apply(at, Event::Gone("shop".into(), "a".into(), "9".into()), NOW));
    assert!(!known.apply(at, Event::Heard(Some("11".into())), NOW));
    let followed = &known.followed()[at];
    assert_eq!((followed.objects, followed.events, followed.resource_version.as_str()), (0, 5, "11"));
    assert!(!known.apply(KINDS.len(), Event::Absent, NOW), "there is no such kind");
}

#[test]
fn an_outage_keeps_everything_and_tells_since_when() {
    let mut known = all_but("");
    list(&mut known, "Pod", vec![pod("a", "1")]);
    known.notes();
    let at = place("Pod");
    assert!(!known.apply(at, Event::Failed("connection refused".into()), NOW + 60));
    assert!(!known.apply(at, Event::Failed("connection refused".into()), NOW + 90));
    assert_eq!(pods(&known), ["a"]);
    assert!(known.loaded().waiting.is_empty(), "it was served already");
    let followed = &known.followed()[at];
    assert_eq!((followed.standing, followed.heard, followed.failures), (Standing::Stale, NOW, 2));
    assert_eq!(known.notes().len(), 1, "a reason is logged once");
    // A watch that begins again is news enough, also if nothing happens on it.
    assert!(!known.apply(at, Event::Heard(None), NOW + 120));
    let followed = &known.followed()[at];
    assert_eq!((followed.standing, followed.heard), (Standing::Current, NOW + 120));
    assert!(matches!(known.notes().as_slice(), [Note::Info(text)] if text.contains("answers again")));
}

#[test]
fn objects_of_a_kind_that_goes_are_gone() {
    let mut known = all_but("");
    let good = || item("AuthorizationPolicy", "p", "1", r#"{"action":"DENY"}"#);
    let bad = item("AuthorizationPolicy", "q", "1", r#"{"action":"NO"}"#);
    list(&mut known, "AuthorizationPolicy", vec![good(), bad]);
    assert_eq!((known.loaded().world.authorization_policies.len(), known.loaded().problems.len()), (2, 1));
    let at = place("AuthorizationPolicy");
    assert!(known.apply(at, Event::Absent, NOW));
    assert!(known.loaded().world.authorization_policies.is_empty() && known.loaded().problems.is_empty());
    assert_eq!(known.followed()[at].standing, Standing::Absent);
    assert!(!known.apply(at, Event::Absent, NOW));
    known.apply(at, Event::Served("v1"), NOW);
    assert!(list(&mut known, "AuthorizationPolicy", vec![good()]));
}

#[test]
fn a_bad_object_keeps_its_last_good_version_and_a_policy_without_one_fails_closed() {
    let mut known = all_but("");
    let at = place("AuthorizationPolicy");
    let (good, bad) = (r#"{"action":"DENY"}"#, r#"{"action":"NO"}"#);
    let apply = |known: &mut Known, spec: &str| {
        let item = item("AuthorizationPolicy", "p", "1", spec);
        known.apply(at, Event::Applied(Box::new(item), "6".into()), NOW)
    };
    let readable = |known: &Known| {
        let policy = known.loaded().world.authorization_policies.get(&("shop".into(), "p".into())).cloned();
        matches!(policy.unwrap().spec, Spec::Good(_))
    };
    assert!(apply(&mut known, bad));
    assert!(!readable(&known));
    let problem = known.loaded().problems[0].clone();
    assert_eq!((problem.object.as_str(), problem.field.as_str()), ("AuthorizationPolicy shop/p", "spec.action"));
    assert!(problem.message.contains("fails closed"), "{problem}");
    assert!(apply(&mut known, good));
    assert!(readable(&known) && known.loaded().problems.is_empty());
    assert!(apply(&mut known, bad));
    assert!(readable(&known), "the last good version stays");
    assert!(known.loaded().problems[0].message.contains("last good version"), "{}", known.loaded().problems[0]);
    assert!(!apply(&mut known, bad), "nothing new");
    // A list tells the same, and a restart of the watch does not forget.
    assert!(!list(&mut known, "AuthorizationPolicy", vec![item("AuthorizationPolicy", "p", "1", bad)]));
    assert!(readable(&known));
    assert!(list(&mut known, "AuthorizationPolicy", Vec::new()));
    assert!(known.loaded().world.authorization_policies.is_empty() && known.loaded().problems.is_empty());
    // Of another kind it is left out, until it is repaired.
    let pods_at = place("Pod");
    let broken = item("Pod", "x", "1", r#"{"nodeName":7}"#);
    assert!(known.apply(pods_at, Event::Applied(Box::new(broken), "7".into()), NOW));
    assert!(known.loaded().problems[0].message.contains("left out"));
    assert!(known.apply(pods_at, Event::Applied(Box::new(pod("x", "1")), "8".into()), NOW));
    assert!(known.loaded().problems.is_empty() && pods(&known) == ["x"]);
    assert!(known.loaded().waiting.is_empty());
}

#[test]
fn an_object_without_a_readable_name_keeps_the_first_world_back() {
    let mut known = all_but("AuthorizationPolicy");
    let odd = item("AuthorizationPolicy", "UPPER", "1", "{}");
    assert!(odd.nameless);
    list(&mut known, "AuthorizationPolicy", vec![odd]);
    assert_eq!(known.loaded().waiting.len(), 1, "{:?}", known.loaded().waiting);
    list(&mut known, "AuthorizationPolicy", Vec::new());
    assert!(known.loaded().waiting.is_empty());
}

#[test]
fn a_bundle_that_loses_its_label_is_nobodys() {
    let bundle = |labels: &str| {
        let text = format!(
            r#"{{"type":"ADDED","object":{{"metadata":{{"name":"b","labels":{labels}}},"spec":{{"trustBundle":"x"}}}}}}"#
        );
        match json::line(text.as_bytes(), &KINDS[place("ClusterTrustBundle")]).unwrap() {
            json::Line::Applied(item, version) => Event::Applied(item, version),
            other => panic!("{other:?}"),
        }
    };
    let mut known = all_but("");
    let at = place("ClusterTrustBundle");
    assert!(known.apply(at, bundle(r#"{"tulle.dev/trust-domain":"other.org"}"#), NOW));
    assert_eq!(known.loaded().world.trust_bundles.len(), 1);
    assert!(known.apply(at, bundle("{}"), NOW));
    assert!(known.loaded().world.trust_bundles.is_empty() && known.loaded().problems.is_empty());
}

#[test]
fn the_number_of_problems_that_are_shown_is_bounded() {
    let mut known = all_but("");
    let items = (0..super::MAX_PROBLEMS + 5).map(|n| item("Pod", &format!("p{n}"), "1", "5")).collect();
    list(&mut known, "Pod", items);
    let problems = known.loaded().problems;
    assert_eq!(problems.len(), super::MAX_PROBLEMS + 1);
    assert_eq!(problems.last().unwrap().message, "5 more objects cannot be read");
}

proptest! {
    #[test]
    fn after_any_mix_of_lists_and_events_the_cluster_is_known(
        steps in prop::collection::vec((0u8..12, prop::option::weighted(0.7, 0u8..3), prop::bool::weighted(0.1)), 1..200),
    ) {
        let at = place("Pod");
        let mut known = all_but("");
        let mut cluster: BTreeMap<String, String> = BTreeMap::new();
        for (name, label, relist) in steps {
            let name = format!("p{name}");
            let before = known.loaded().world;
            let event = match label {
                Some(label) => {
                    cluster.insert(name.clone(), label.to_string());
                    Event::Applied(Box::new(pod(&name, &label.to_string())), "6".into())
                }
                None => {
                    cluster.remove(&name);
                    Event::Gone("shop".into(), name, "6".into())
                }
            };
            let changed = if relist {
                // The event was missed; a list makes up for it.
                list(&mut known, "Pod", cluster.iter().map(|(name, label)| pod(name, label)).collect())
            } else {
                known.apply(at, event, NOW)
            };
            let loaded = known.loaded();
            let found: BTreeMap<String, String> = loaded
                .world
                .objects("Pod")
                .map(|object| match object {
                    Object::Pod(pod) => (pod.meta.name.clone(), pod.meta.label("v").unwrap_or_default().to_owned()),
                    other => panic!("{other:?}"),
                })
                .collect();
            prop_assert_eq!(&found, &cluster);
            prop_assert_eq!(known.followed()[at].objects, cluster.len());
            prop_assert_eq!(changed, loaded.world != before);
        }
    }
}
