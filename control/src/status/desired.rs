//! What a status is to say, from what it says and from what there is to be said. Pure.
//!
//! What is not ours stays as it is: conditions of other types, and entries of other controllers in a route's `parents`. A
//! condition of ours that says the same already stays to the letter, whatever else the API server put into it, so that the
//! result of a write leads to no other write. lastTransitionTime changes with the status of a condition only.

use serde_json::{Map, Value, json};

use crate::model::{Condition, ParentStatus, Status};

/// `controllerName` of our entries in `status.parents` of routes.
pub const CONTROLLER: &str = "tulle.dev/controller";
/// Every type that a condition of ours has, or had.
const OURS: [&str; 7] =
    ["Accepted", "AppliedToPods", "Enforced", "KeysFetched", "MeshWide", PROGRAMMED, "ResolvedRefs"];
/// Whether the nodes have it.
pub(super) const PROGRAMMED: &str = "Programmed";
/// Longest message, characters. The API server takes 32 KiB; nobody reads that.
const MAX_MESSAGE: usize = 2000;
/// Entries of all controllers that a route's status may have (Gateway API).
const MAX_PARENTS: usize = 32;

/// How far the nodes are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Programmed {
    /// It was said already, or there is nothing to say: what is there stays.
    Stays,
    /// So many of so many; the first names of the others.
    On {
        /// Nodes that have it.
        have: usize,
        /// Nodes that run pods.
        of: usize,
        /// Some that have it not.
        missing: Vec<String>,
    },
}

/// What there is to say of an object.
pub(super) struct Said<'a> {
    /// metadata.generation that it is about.
    pub generation: i64,
    /// Of the object as a whole. Not used if it is a route.
    pub conditions: &'a [Condition],
    /// Of a route.
    pub parents: &'a [ParentStatus],
    /// How far the nodes are.
    pub programmed: &'a Programmed,
    /// RFC 3339.
    pub now: &'a str,
}

/// The `conditions` of a status as they are to be.
pub(super) fn conditions(status: &Value, said: &Said<'_>) -> Vec<Value> {
    merged(list(status, "conditions"), said.conditions, said)
}

/// The `parents` of a route's status as they are to be.
pub(super) fn parents(status: &Value, said: &Said<'_>) -> Vec<Value> {
    let reference = |parent: &ParentStatus| json!(parent.parent_ref);
    let mut open: Vec<&ParentStatus> = said.parents.iter().collect();
    let mut all = Vec::new();
    for entry in list(status, "parents") {
        if entry["controllerName"] != CONTROLLER {
            all.push(entry.clone());
            continue;
        }
        if let Some(at) = open.iter().position(|parent| reference(parent) == entry["parentRef"]) {
            let parent = open.remove(at);
            let conditions = merged(list(entry, "conditions"), &parent.conditions, said);
            let mut entry = entry.as_object().cloned().unwrap_or_default();
            entry.insert("conditions".into(), conditions.into());
            all.push(entry.into());
        }
    }
    for parent in open {
        let conditions = merged(&[], &parent.conditions, said);
        all.push(json!({"parentRef": reference(parent), "controllerName": CONTROLLER, "conditions": conditions}));
    }
    all.truncate(MAX_PARENTS);
    all
}

/// Whether the status says that the nodes have this generation: of a route, at all parents of ours.
pub(super) fn is_programmed(status: &Value, generation: i64) -> bool {
    let says = |owner: &Value| {
        list(owner, "conditions")
            .iter()
            .any(|one| one["type"] == PROGRAMMED && one["status"] == "True" && one["observedGeneration"] == generation)
    };
    let mut entries = list(status, "parents").iter().filter(|entry| entry["controllerName"] == CONTROLLER).peekable();
    if entries.peek().is_none() { says(status) } else { entries.all(says) }
}

fn list<'a>(owner: &'a Value, field: &str) -> &'a [Value] {
    owner[field].as_array().map_or(&[], Vec::as_slice)
}

fn merged(before: &[Value], wanted: &[Condition], said: &Said<'_>) -> Vec<Value> {
    let programmed = programmed(said.programmed);
    let mut open: Vec<&Condition> = wanted.iter().filter(|one| OURS.contains(&one.kind)).chain(&programmed).collect();
    let mut all = Vec::new();
    for one in before {
        let Some(kind) = one["type"].as_str().filter(|kind| OURS.contains(kind)) else {
            all.push(one.clone());
            continue;
        };
        if let Some(at) = open.iter().position(|wanted| wanted.kind == kind) {
            all.push(condition(Some(one), open.remove(at), said));
        } else if kind == PROGRAMMED && *said.programmed == Programmed::Stays && !wanted.is_empty() {
            all.push(one.clone());
        }
    }
    all.extend(open.into_iter().map(|wanted| condition(None, wanted, said)));
    all
}

fn programmed(how: &Programmed) -> Option<Condition> {
    let Programmed::On { have, of, missing } = how else { return None };
    if have == of {
        return Some(Condition::holding(PROGRAMMED, PROGRAMMED, format!("Programmed on {have} of {of} nodes")));
    }
    let more = if of - have > missing.len() { ", …" } else { "" };
    let message = format!("Programmed on {have} of {of} nodes; not yet on {}{more}", missing.join(", "));
    Some(Condition::failing(PROGRAMMED, "Pending", message))
}

fn condition(before: Option<&Value>, wanted: &Condition, said: &Said<'_>) -> Value {
    let status = match wanted.status {
        Status::True => "True",
        Status::False => "False",
    };
    let message: String = wanted.message.chars().take(MAX_MESSAGE).collect();
    let has = |field: &str, value: &Value| before.is_some_and(|before| before[field] == *value);
    let (generation, message) = (json!(said.generation), json!(message));
    let same_status = has("status", &json!(status));
    if let Some(before) = before
        && same_status
        && has("reason", &json!(wanted.reason))
        && has("message", &message)
        && has("observedGeneration", &generation)
    {
        return before.clone();
    }
    let since = before.map(|before| &before["lastTransitionTime"]).filter(|since| same_status && since.is_string());
    let mut new = Map::new();
    new.insert("type".into(), wanted.kind.into());
    new.insert("status".into(), status.into());
    new.insert("reason".into(), wanted.reason.into());
    new.insert("message".into(), message);
    new.insert("observedGeneration".into(), generation);
    new.insert("lastTransitionTime".into(), since.cloned().unwrap_or_else(|| said.now.into()));
    new.into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::ParentRef;

    fn said<'a>(conditions: &'a [Condition], parents: &'a [ParentStatus], programmed: &'a Programmed) -> Said<'a> {
        Said { generation: 4, conditions, parents, programmed, now: "2026-01-02T00:00:00Z" }
    }

    fn accepted() -> Condition {
        Condition::holding("Accepted", "Accepted", "fine".into())
    }

    fn old(kind: &str, status: &str, generation: i64) -> Value {
        json!({"type": kind, "status": status, "reason": "Accepted", "message": "fine",
               "observedGeneration": generation, "lastTransitionTime": "2020-01-01T00:00:00Z"})
    }

    #[test]
    fn conditions_of_others_stay_and_ours_change_only_where_they_must() {
        let on = |have, of| Programmed::On { have, of, missing: vec!["n2".into()] };
        let foreign = json!({"type": "ZtunnelAccepted", "status": "True"});
        let with = |generation, since: &str| {
            let mut one = old("Accepted", "True", generation);
            one["lastTransitionTime"] = since.into();
            one
        };
        let (before, new) = ("2020-01-01T00:00:00Z", "2026-01-02T00:00:00Z");
        let cases: Vec<(&str, Value, Vec<Condition>, Vec<Value>)> = vec![
            ("the first", json!(null), vec![accepted()], vec![with(4, new)]),
            ("nothing new", json!([old("Accepted", "True", 4)]), vec![accepted()], vec![old("Accepted", "True", 4)]),
            ("a new generation", json!([old("Accepted", "True", 3)]), vec![accepted()], vec![with(4, before)]),
            ("it turned", json!([old("Accepted", "False", 4)]), vec![accepted()], vec![with(4, new)]),
            (
                "beside another's",
                json!([foreign, old("Accepted", "True", 4)]),
                vec![accepted()],
                vec![foreign.clone(), old("Accepted", "True", 4)],
            ),
            ("gone", json!([old("Enforced", "True", 4), foreign]), vec![], vec![foreign.clone()]),
            (
                "what the server added stays",
                json!([{"type": "Accepted", "status": "True", "reason": "Accepted", "message": "fine",
                        "observedGeneration": 4, "lastProbeTime": null}]),
                vec![accepted()],
                vec![json!({"type": "Accepted", "status": "True", "reason": "Accepted", "message": "fine",
                            "observedGeneration": 4, "lastProbeTime": null})],
            ),
        ];
        for (name, status, wanted, expected) in cases {
            let status = json!({"conditions": status});
            let said = said(&wanted, &[], &Programmed::Stays);
            let found = conditions(&status, &said);
            assert_eq!(found, expected, "{name}");
            assert_eq!(conditions(&json!({"conditions": found}), &said), expected, "{name}: once more");
        }
        let wanted = [accepted()];
        let first = conditions(&json!({}), &said(&wanted, &[], &on(1, 2)));
        assert_eq!(first[1]["message"], "Programmed on 1 of 2 nodes; not yet on n2");
        assert_eq!(first[1]["status"], "False");
        let status = json!({"conditions": first});
        assert!(!is_programmed(&status, 4));
        let done = json!({"conditions": conditions(&status, &said(&wanted, &[], &on(2, 2)))});
        assert!(is_programmed(&done, 4) && !is_programmed(&done, 5));
        let stays = conditions(&done, &said(&wanted, &[], &Programmed::Stays));
        assert_eq!(json!(stays), done["conditions"]);
        assert!(conditions(&done, &said(&[], &[], &Programmed::Stays)).is_empty(), "nothing is said any more");
    }

    #[test]
    fn a_route_has_our_entry_for_each_parent_and_keeps_those_of_others() {
        let reference = |name: &str| ParentRef {
            group: Some(String::new()),
            kind: Some("Service".into()),
            name: name.into(),
            ..ParentRef::default()
        };
        let parent = |name: &str| ParentStatus { parent_ref: reference(name), conditions: vec![accepted()] };
        let entry = |name: &str, controller: &str, generation: i64| {
            json!({"parentRef": {"group": "", "kind": "Service", "name": name}, "controllerName": controller,
                   "conditions": [old("Accepted", "True", generation)]})
        };
        let status = json!({"parents": [
            entry("gone", CONTROLLER, 3), entry("web", "example.com/other", 1), entry("web", CONTROLLER, 4),
        ]});
        let wanted = [parent("api"), parent("web")];
        let found = parents(&status, &said(&[], &wanted, &Programmed::Stays));
        assert_eq!(found[..2], [entry("web", "example.com/other", 1), entry("web", CONTROLLER, 4)]);
        assert_eq!(found[2]["parentRef"], json!({"group": "", "kind": "Service", "name": "api"}));
        assert_eq!(found[2]["conditions"][0]["observedGeneration"], 4);
        assert_eq!(found.len(), 3);
        let again = json!({"parents": found});
        assert_eq!(json!(parents(&again, &said(&[], &wanted, &Programmed::Stays))), again["parents"]);
        let none = parents(&again, &said(&[], &[], &Programmed::Stays));
        assert_eq!(none, [entry("web", "example.com/other", 1)], "no parent of ours is left");
        let on = Programmed::On { have: 2, of: 2, missing: vec![] };
        let done = json!({"parents": parents(&again, &said(&[], &wanted, &on))});
        assert!(is_programmed(&done, 4));
        assert!(!is_programmed(&again, 4));
    }
}
