//! The API server's audit log: who asked for what, when, and what came of it. It is how a test proves what programs did
//! and did not do, such as write a status only once.
//!
//! One line of JSON a request, read by a pure function. Bodies are logged of what changes an object (but not of secrets
//! and tokens), so that a test can tell what was written. Limits: a line that is being written is left out; read
//! again.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::Context as _;
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// What the server is told to log: requests when they have been answered, watches also when they begin.
pub const POLICY: &str = "\
apiVersion: audit.k8s.io/v1
kind: Policy
omitStages: [RequestReceived]
rules:
- level: None
  users: [system:apiserver]
- level: None
  nonResourceURLs: ['/readyz*', '/livez*', '/healthz*']
- level: Metadata
  resources:
  - {group: '', resources: [secrets, serviceaccounts/token]}
  - {group: authentication.k8s.io, resources: [tokenreviews]}
- level: Request
  verbs: [create, update, patch, delete, deletecollection]
- level: Metadata
";

/// One request, or the beginning of a watch.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Event {
    /// `ResponseComplete`, or `ResponseStarted` of a watch.
    pub stage: String,
    /// `get`, `list`, `watch`, `create`, `update`, `patch`, `delete`, …
    pub verb: String,
    /// Who asked, such as `system:serviceaccount:tulle-system:control`.
    pub user: String,
    /// What asked.
    pub agent: String,
    /// Group of the resource; empty: the core.
    pub group: String,
    /// Plural name of the resource; empty: no resource was asked for.
    pub resource: String,
    /// `status`, `token`, …, or empty.
    pub subresource: String,
    /// Namespace, or empty.
    pub namespace: String,
    /// Name of the object, or empty.
    pub name: String,
    /// Path and query.
    pub uri: String,
    /// HTTP status; 0 when there was none.
    pub code: u64,
    /// When it arrived, as RFC 3339 text.
    pub received: String,
    /// When this was written, as RFC 3339 text.
    pub logged: String,
    /// What was sent, where it is logged.
    pub body: Value,
}

impl Event {
    /// Whether it was to change something.
    pub fn writes(&self) -> bool {
        matches!(self.verb.as_str(), "create" | "update" | "patch" | "delete" | "deletecollection")
    }

    /// `verb resource/subresource`.
    pub fn what(&self) -> String {
        match (self.resource.as_str(), self.subresource.as_str()) {
            ("", _) => format!("{} {}", self.verb, self.uri.split('?').next().unwrap_or_default()),
            (resource, "") => format!("{} {resource}", self.verb),
            (resource, sub) => format!("{} {resource}/{sub}", self.verb),
        }
    }
}

/// Reads a log; lines that are not whole are left out.
pub fn read(path: &Path) -> anyhow::Result<Vec<Event>> {
    let bytes = match std::fs::read(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Vec::new(),
        read => read.with_context(|| format!("{} cannot be read", path.display()))?,
    };
    Ok(parse(&String::from_utf8_lossy(&bytes)))
}

fn parse(text: &str) -> Vec<Event> {
    let lines = text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    lines.map(|line| event(&line)).collect()
}

fn event(line: &Value) -> Event {
    let text = |pointer: &str| line.pointer(pointer).and_then(Value::as_str).unwrap_or_default().to_owned();
    Event {
        stage: text("/stage"),
        verb: text("/verb"),
        user: text("/user/username"),
        agent: text("/userAgent"),
        group: text("/objectRef/apiGroup"),
        resource: text("/objectRef/resource"),
        subresource: text("/objectRef/subresource"),
        namespace: text("/objectRef/namespace"),
        name: text("/objectRef/name"),
        uri: text("/requestURI"),
        code: line.pointer("/responseStatus/code").and_then(Value::as_u64).unwrap_or_default(),
        received: text("/requestReceivedTimestamp"),
        logged: text("/stageTimestamp"),
        body: line.pointer("/requestObject").cloned().unwrap_or_default(),
    }
}

/// Requests by who asked and what was asked.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Summary(pub BTreeMap<String, BTreeMap<String, u64>>);

impl Summary {
    /// Counts events; the beginning of a watch counts, its end does not.
    pub fn of(events: &[Event]) -> Self {
        let mut all = Self::default();
        for event in events {
            let ended = event.verb == "watch" && event.stage == "ResponseComplete";
            if !ended {
                // `name/version (system) commit`: the version of a program is no evidence.
                let agent = event.agent.split(['/', ' ']).next().unwrap_or_default().to_owned();
                *all.0.entry(agent).or_default().entry(event.what()).or_default() += 1;
            }
        }
        all
    }
}

#[cfg(test)]
mod tests {
    use crate::kube::audit::{Summary, parse};

    #[test]
    fn events_are_read_and_counted_by_agent() {
        let line = |verb: &str, stage: &str, sub: &str| {
            format!(
                r#"{{"stage":"{stage}","verb":"{verb}","requestURI":"/api/v1/pods?x=1","user":{{"username":"admin"}},
                "userAgent":"tulle-control/0.1 (linux)","objectRef":{{"resource":"pods","namespace":"shop","name":"a",
                "subresource":"{sub}"}},"responseStatus":{{"code":200}},"requestObject":{{"a":1}}}}"#
            )
            .replace('\n', "")
        };
        let text = [
            line("patch", "ResponseComplete", "status"),
            line("watch", "ResponseStarted", ""),
            line("watch", "ResponseComplete", ""),
            "{\"stage\":\"Resp".to_owned(),
        ];
        let events = parse(&text.join("\n"));
        assert_eq!(events.len(), 3, "half a line is left out");
        assert!(events[0].writes() && events[0].code == 200 && events[0].body["a"] == 1);
        let counts = &Summary::of(&events).0["tulle-control"];
        assert_eq!((counts["patch pods/status"], counts["watch pods"]), (1, 1));
    }
}
