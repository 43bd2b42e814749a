//! Passes on what objects' status says, from the same reports that make the world, to those who write it.
//!
//! It is taken out of the reports, so that a list that is not complete holds it once. A list's end tells which objects are
//! gone; until then what was known of them stays.

use std::collections::BTreeMap;
use std::collections::BTreeSet;

use crate::model::ObjectKey;
use crate::source::kube::kinds::KINDS;
use crate::source::kube::known::{Event, Item};
use crate::source::statuses::{self, Statuses};

/// Names in lists that are not complete yet, by the place of the kind in [`KINDS`].
#[derive(Default)]
pub(super) struct Noted(BTreeMap<usize, BTreeSet<(String, String)>>);

impl Noted {
    /// Takes a report before the world does.
    pub(super) fn take(&mut self, kind: usize, event: &mut Event, statuses: &Statuses) {
        let Some(of) = KINDS.get(kind).map(|kind| kind.name).filter(|name| statuses::is_kept(name)) else { return };
        match event {
            Event::Started => drop(self.0.insert(kind, BTreeSet::new())),
            Event::Page(items) => {
                for item in items {
                    if let Some(names) = self.0.get_mut(&kind) {
                        names.insert((item.namespace.clone(), item.name.clone()));
                    }
                    note(of, item, statuses);
                }
            }
            Event::Listed(_) => {
                if let Some(names) = self.0.remove(&kind) {
                    statuses.retain(of, |key| names.contains(&(key.namespace.clone(), key.name.clone())));
                }
            }
            Event::Applied(item, _) => note(of, item, statuses),
            Event::Gone(namespace, name, _) => statuses.forget(of, namespace, name),
            Event::Absent => statuses.retain(of, |_| false),
            Event::Served(_) | Event::Heard(_) | Event::Failed(_) => {}
        }
    }
}

fn note(kind: &str, item: &mut Item, statuses: &Statuses) {
    if let Some(seen) = item.seen.take() {
        let (namespace, name) = (item.namespace.clone(), item.name.clone());
        statuses.note(ObjectKey { kind: kind.to_owned(), namespace, name }, *seen);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::kube::json;

    #[test]
    fn what_a_list_does_not_have_any_more_is_forgotten_at_its_end() {
        let place = KINDS.iter().position(|kind| kind.name == "HTTPRoute").expect("it is watched");
        let page = |names: &[&str]| {
            let items: Vec<_> = names
                .iter()
                .map(|name| {
                    serde_json::json!({"metadata": {"name": name, "namespace": "shop", "resourceVersion": "5",
                    "generation": 2, "uid": "u"}, "status": {"parents": [{"x": [1, true, null, "t"]}]}})
                })
                .collect();
            let list = serde_json::json!({"metadata": {"resourceVersion": "9"}, "items": items});
            Event::Page(json::page(list.to_string().as_bytes(), &KINDS[place]).expect("a list").items)
        };
        let (mut noted, statuses) = (Noted::default(), Statuses::default());
        let mut take = |mut event| noted.take(place, &mut event, &statuses);
        let names = || statuses.keys().into_iter().map(|key| key.name).collect::<Vec<_>>();
        take(Event::Started);
        take(page(&["a", "b"]));
        take(Event::Listed("9".into()));
        assert_eq!(names(), ["a", "b"]);
        let seen = statuses.get(&statuses.keys()[0]).expect("known");
        assert_eq!((seen.generation, seen.version.as_str()), (2, "5"));
        assert_eq!(seen.api_version, "gateway.networking.k8s.io/v1");
        assert_eq!(seen.status, serde_json::json!({"parents": [{"x": [1, true, null, "t"]}]}));
        take(Event::Started);
        take(page(&["b", "c"]));
        assert_eq!(names(), ["a", "b", "c"], "not before its end");
        take(Event::Listed("10".into()));
        assert_eq!(names(), ["b", "c"]);
        take(Event::Gone("shop".into(), "c".into(), "11".into()));
        assert_eq!(names(), ["b"]);
        take(Event::Absent);
        assert!(names().is_empty());
    }
}
