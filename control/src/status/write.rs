//! One write of one status: what is sent, and what became of it.
//!
//! A merge patch of the status subresource that names the object's version: lists of a status are atomic in the Gateway API
//! and Istio's kinds, so what others have put into them is sent along, and must not be older than what is there.

use std::collections::BTreeMap;
use std::time::Duration;

use kube::Client;
use kube::api::{Api, DynamicObject, Patch, PatchParams};
use kube::core::{ApiResource, GroupVersionKind};
use serde_json::{Value, json};

use crate::cluster::{FIELD_MANAGER, words};
use crate::model::ObjectKey;
use crate::source::statuses::{self, KINDS, Seen};
use crate::status::desired::{self, Said};

/// One request: shorter than a new Lease holder waits after the last one.
pub(super) const REQUEST: Duration = Duration::from_secs(4);
/// Answers that were not what was asked for, of so many objects at most.
const PECULIAR: usize = 10_000;

/// What became of a write.
#[derive(Debug, PartialEq)]
pub(super) enum Outcome {
    /// It says so now; as the API server has it.
    Written(Seen),
    /// Nothing was sent: the API server has answered this with what is there.
    Same,
    /// Somebody else changed the object: as it is now.
    Changed(Seen),
    /// The object, or its kind, is gone.
    Gone,
    /// To be tried again; the log says why.
    Failed,
}

/// The status that an object is to have; `None`: it has it.
pub(super) fn patch(key: &ObjectKey, seen: &Seen, said: &Said<'_>) -> Option<Value> {
    let (field, list) = match key.kind.as_str() {
        "HTTPRoute" | "GRPCRoute" => ("parents", desired::parents(&seen.status, said)),
        _ => ("conditions", desired::conditions(&seen.status, said)),
    };
    let before = seen.status[field].as_array().map_or(&[][..], Vec::as_slice);
    (before != list).then(|| json!({ field: list }))
}

/// Sends them.
pub(super) struct Writer {
    client: Client,
    /// What was sent and what came back, where that was something else.
    peculiar: BTreeMap<ObjectKey, (Value, Value)>,
    last_error: String,
}

impl Writer {
    /// Has written nothing.
    pub(super) fn new(client: Client) -> Self {
        Self { client, peculiar: BTreeMap::new(), last_error: String::new() }
    }

    /// The client that it writes by.
    pub(super) fn client(&self) -> &Client {
        &self.client
    }

    /// Writes what [`patch`] gave.
    pub(super) async fn write(&mut self, key: &ObjectKey, seen: &Seen, status: &Value) -> Outcome {
        if self
            .peculiar
            .get(key)
            .is_some_and(|(sent, back)| without_time(sent) == without_time(status) && *back == seen.status)
        {
            return Outcome::Same;
        }
        let Some(api) = self.api(key, seen) else { return Outcome::Gone };
        let body = json!({"metadata": {"resourceVersion": seen.version, "uid": seen.uid}, "status": status});
        let params = PatchParams { field_manager: Some(FIELD_MANAGER.to_owned()), ..PatchParams::default() };
        let patch = Patch::Merge(&body);
        let sent = tokio::time::timeout(REQUEST, api.patch_status(&key.name, &params, &patch));
        let (code, error) = match sent.await {
            Ok(Ok(object)) => {
                self.last_error.clear();
                let Some(new) = seen_in(&object) else { return Outcome::Gone };
                self.remember(key, status, &new);
                return Outcome::Written(new);
            }
            Ok(Err(kube::Error::Api(answer))) => (answer.code, answer.message.clone()),
            Ok(Err(error)) => (0, words(&error)),
            Err(_) => (0, format!("no answer within {REQUEST:?}")),
        };
        match code {
            404 => Outcome::Gone,
            409 => match tokio::time::timeout(REQUEST, api.get(&key.name)).await {
                Ok(Ok(object)) => seen_in(&object).map_or(Outcome::Gone, Outcome::Changed),
                Ok(Err(kube::Error::Api(answer))) if answer.code == 404 => Outcome::Gone,
                _ => Outcome::Failed,
            },
            code => {
                let hint = match code {
                    403 => "; control's account needs `patch` on the kind's status subresource",
                    422 => "; the kind's schema does not know what control says: compare the versions of its CRD",
                    _ => "",
                };
                let error = format!("{error}{hint}");
                if error != self.last_error {
                    let object = format!("{} {}/{}", key.kind, key.namespace, key.name);
                    tracing::warn!(object, error, "cannot write a status; tried again");
                    self.last_error = error;
                }
                Outcome::Failed
            }
        }
    }

    fn remember(&mut self, key: &ObjectKey, status: &Value, new: &Seen) {
        let kept =
            status.as_object().is_some_and(|fields| fields.iter().all(|(name, value)| new.status[name] == *value));
        if kept {
            self.peculiar.remove(key);
        } else if self.peculiar.len() < PECULIAR {
            self.peculiar.insert(key.clone(), (status.clone(), new.status.clone()));
        }
    }

    fn api(&self, key: &ObjectKey, seen: &Seen) -> Option<Api<DynamicObject>> {
        let (group, version) = seen.api_version.split_once('/')?;
        let (_, _, plural) = KINDS.iter().find(|(of, kind, _)| *of == group && *kind == key.kind)?;
        let resource = ApiResource::from_gvk_with_plural(&GroupVersionKind::gvk(group, version, &key.kind), plural);
        Some(Api::namespaced_with(self.client.clone(), &key.namespace, &resource))
    }
}

/// Two statuses that differ in the time alone say the same.
fn without_time(status: &Value) -> Value {
    let mut status = status.clone();
    let entries = status.as_object_mut().into_iter().flat_map(|fields| fields.values_mut());
    let entries = entries.filter_map(Value::as_array_mut).flatten();
    for entry in entries {
        let Some(fields) = entry.as_object_mut() else { continue };
        fields.remove("lastTransitionTime");
        // Of a route, they are one level deeper.
        let nested = fields.get_mut("conditions").and_then(Value::as_array_mut);
        for condition in nested.into_iter().flatten() {
            if let Some(fields) = condition.as_object_mut() {
                fields.remove("lastTransitionTime");
            }
        }
    }
    status
}

fn seen_in(object: &DynamicObject) -> Option<Seen> {
    statuses::read(&serde_json::to_value(object).ok()?).map(|(_, seen)| seen)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Condition;
    use crate::status::desired::Programmed;

    #[test]
    fn what_is_there_already_is_no_patch() {
        let key = ObjectKey { kind: "EgressPolicy".into(), namespace: "shop".into(), name: "out".into() };
        let mut seen = Seen {
            api_version: "tulle.dev/v1alpha1".into(),
            uid: "u".into(),
            version: "1".into(),
            generation: 2,
            status: Value::Null,
        };
        let conditions = [Condition::holding("Accepted", "Accepted", "fine".into())];
        let said = Said {
            generation: 2,
            conditions: &conditions,
            parents: &[],
            programmed: &Programmed::Stays,
            now: "2026-01-01T00:00:00Z",
        };
        let first = patch(&key, &seen, &said).expect("something to say");
        seen.status = first.clone();
        assert_eq!(patch(&key, &seen, &said), None);
        let nothing = Said { conditions: &[], ..said };
        assert_eq!(patch(&key, &seen, &nothing), Some(json!({"conditions": []})));
        seen.status = Value::Null;
        assert_eq!(patch(&key, &seen, &nothing), None, "nothing was ever said");
        let later = without_time(&first);
        assert_eq!(later["conditions"][0]["lastTransitionTime"], Value::Null);
        assert_eq!(later["conditions"][0]["type"], "Accepted");
        let route = json!({"parents": [{"parentRef": {"name": "x"}, "conditions": [{"lastTransitionTime": "t", "type": "A"}]}]});
        assert_eq!(
            without_time(&route),
            json!({"parents": [{"parentRef": {"name": "x"}, "conditions": [{"type": "A"}]}]})
        );
    }
}
