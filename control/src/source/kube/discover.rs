//! Which kinds the API server has, and in which version.
//!
//! Custom resources come and go while control runs. A watch on the names of CustomResourceDefinitions says when to look;
//! where that is not allowed, looking now and then is enough. An API server that is still starting answers 503 to what it
//! does not know yet, so its 404 may be believed; still a kind that was there is gone only after two looks.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use kube::Client;
use kube::api::{ListParams, WatchParams};
use kube::core::Request;
use serde::Deserialize;
use tokio::sync::Notify;
use tokio::sync::watch;

use crate::source::kube::kinds::Kind;
use crate::source::kube::watch::Served;
use crate::source::kube::wire;
use crate::source::kube::wire::Failure;

/// Between two looks. Each costs a request for each group, and one for each of its versions.
const POLL: Duration = Duration::from_secs(20);
/// A new definition is served some moments after it was created, so it is looked for until then.
const SETTLE: [Duration; 4] =
    [Duration::from_millis(200), Duration::from_millis(800), Duration::from_secs(2), Duration::from_secs(5)];
/// Between two attempts to watch definitions.
const RETRY: Duration = Duration::from_secs(60);

/// A kind, and who follows it.
pub type Told = (&'static Kind, watch::Sender<Served>);

#[derive(Deserialize)]
struct Group {
    versions: Vec<GroupVersion>,
}

#[derive(Deserialize)]
struct GroupVersion {
    version: String,
}

#[derive(Deserialize)]
struct Resources {
    resources: Vec<Resource>,
}

#[derive(Deserialize)]
struct Resource {
    name: String,
}

/// Plural names by version.
type Found = BTreeMap<String, BTreeSet<String>>;

/// Looks for optional kinds without end and tells their followers; all others are taken to be there.
pub async fn run(client: Client, told: Vec<Told>) {
    for (kind, served) in told.iter().filter(|(kind, _)| !kind.optional) {
        served.send_replace(kind.versions.first().map_or(Served::Absent, |version| Served::In(version)));
    }
    let optional: Vec<Told> = told.into_iter().filter(|(kind, _)| kind.optional).collect();
    let nudge = Arc::new(Notify::new());
    let looks = async {
        let mut doubts = vec![0; optional.len()];
        let mut settle = SETTLE.len();
        loop {
            look(&client, &optional, &mut doubts).await;
            // A kind that seems to be gone is looked at again soon.
            let soon = if doubts.iter().any(|doubt| *doubt > 0) { SETTLE.last() } else { SETTLE.get(settle) };
            tokio::select! {
                () = nudge.notified() => settle = 0,
                () = tokio::time::sleep(soon.copied().unwrap_or(POLL)) => settle = settle.saturating_add(1),
            }
        }
    };
    tokio::join!(looks, notice(&client, &nudge));
}

async fn look(client: &Client, optional: &[Told], doubts: &mut [u32]) {
    let groups: BTreeSet<&str> = optional.iter().map(|(kind, _)| kind.group).collect();
    let mut found = BTreeMap::new();
    for group in groups {
        let wanted = optional.iter().map(|(kind, _)| *kind).filter(|kind| kind.group == group);
        found.insert(group, versions(client, group, &wanted.flat_map(|kind| kind.versions).copied().collect()).await);
    }
    for ((kind, served), doubt) in optional.iter().zip(doubts) {
        let Some(found) = found.get(kind.group) else { continue };
        let next = step(kind, &served.borrow(), doubt, found);
        served.send_if_modified(|last| std::mem::replace(last, next.clone()) != next);
    }
}

/// What a group has, in the versions that are wanted.
async fn versions(client: &Client, group: &str, wanted: &BTreeSet<&'static str>) -> Result<Found, String> {
    let mut found = Found::new();
    let Some(all): Option<Group> = ask(client, format!("/apis/{group}"), group).await? else { return Ok(found) };
    for version in all.versions.into_iter().map(|version| version.version) {
        if wanted.contains(version.as_str())
            && let Some(list) = ask::<Resources>(client, format!("/apis/{group}/{version}"), group).await?
        {
            found.insert(version, list.resources.into_iter().map(|resource| resource.name).collect());
        }
    }
    Ok(found)
}

async fn ask<T: for<'de> Deserialize<'de>>(client: &Client, path: String, group: &str) -> Result<Option<T>, String> {
    let what = format!("API group {group}");
    let request = http::Request::get(path).body(Vec::new()).map_err(|error| error.to_string())?;
    match wire::get(client, request, &what).await {
        Ok(bytes) => serde_json::from_slice(&bytes)
            .map(Some)
            .map_err(|error| format!("the API server's answer about {what} cannot be read: {error}")),
        Err(Failure::NotFound) => Ok(None),
        Err(Failure::Other(text)) => Err(text),
        Err(other) => Err(format!("the API server's answer about {what} cannot be used: {other:?}")),
    }
}

/// What a kind's follower is told, by what it was told before and what was found now. Pure.
fn step(kind: &Kind, before: &Served, doubt: &mut u32, found: &Result<Found, String>) -> Served {
    let found = match found {
        Ok(found) => found,
        // What was known stays; its follower sees for itself whether the API server answers.
        Err(reason) if matches!(before, Served::Unknown(_)) => return Served::Unknown(reason.clone()),
        Err(_) => return before.clone(),
    };
    let here = |version: &str| found.get(version).is_some_and(|resources| resources.contains(kind.plural));
    let best = kind.versions.iter().find(|version| here(version));
    match (before, best) {
        (_, Some(version)) => {
            *doubt = 0;
            Served::In(version)
        }
        (Served::In(_), None) if *doubt == 0 => {
            *doubt = 1;
            before.clone()
        }
        (_, None) => {
            *doubt = 0;
            Served::Absent
        }
    }
}

/// Says when definitions change. Only their metadata is asked for: some have half a megabyte.
async fn notice(client: &Client, nudge: &Notify) {
    loop {
        if let Err(failure) = definitions(client, nudge).await {
            tracing::debug!(
                ?failure,
                "definitions of custom resources are not watched; they are looked for now and then"
            );
            tokio::time::sleep(RETRY).await;
        }
    }
}

async fn definitions(client: &Client, nudge: &Notify) -> Result<(), Failure> {
    let what = "customresourcedefinitions of API group apiextensions.k8s.io";
    let words = |error: &dyn std::fmt::Display| Failure::Other(error.to_string());
    let path = Request::new("/apis/apiextensions.k8s.io/v1/customresourcedefinitions");
    let one = ListParams { limit: Some(1), ..ListParams::default() };
    let list = wire::get(client, path.list_metadata(&one).map_err(|error| words(&error))?, what).await?;
    let list: Listed = serde_json::from_slice(&list).map_err(|error| words(&error))?;
    nudge.notify_one();
    let wanted = WatchParams { timeout: Some(290), bookmarks: true, ..WatchParams::default() };
    let request = path.watch_metadata(&wanted, &list.metadata.version).map_err(|error| words(&error))?;
    let mut lines = wire::lines(client, request, what).await?;
    while let Some(line) = lines.next(Duration::from_secs(150)).await? {
        let event: Change = serde_json::from_slice(&line).map_err(|error| words(&error))?;
        match event.kind.as_str() {
            "ADDED" | "MODIFIED" | "DELETED" => nudge.notify_one(),
            "ERROR" => return Err(Failure::Expired),
            _ => {}
        }
    }
    Ok(())
}

#[derive(Deserialize)]
struct Listed {
    metadata: ListedMeta,
}

#[derive(Deserialize)]
struct ListedMeta {
    #[serde(rename = "resourceVersion")]
    version: String,
}

#[derive(Deserialize)]
struct Change {
    #[serde(rename = "type")]
    kind: String,
}

#[cfg(test)]
mod tests {
    use super::{Found, step};
    use crate::source::kube::kinds::KINDS;
    use crate::source::kube::watch::Served;

    #[test]
    fn the_best_version_is_taken_and_a_kind_is_gone_only_after_two_looks() {
        let route = KINDS.iter().find(|kind| kind.name == "HTTPRoute").unwrap();
        let has = |versions: &[(&str, &str)]| -> Result<Found, String> {
            let mut found = Found::new();
            for (version, plural) in versions {
                found.entry((*version).to_owned()).or_default().insert((*plural).to_owned());
            }
            Ok(found)
        };
        let both = has(&[("v1beta1", "httproutes"), ("v1", "httproutes")]);
        let old = has(&[("v1beta1", "httproutes"), ("v1", "gateways")]);
        let (none, failed) = (has(&[]), Err("down".to_owned()));
        let unknown = Served::Unknown(String::new());
        let mut doubt = 0;
        for (before, found, expected) in [
            (&unknown, &failed, Served::Unknown("down".into())),
            (&unknown, &none, Served::Absent),
            (&unknown, &both, Served::In("v1")),
            (&Served::Absent, &old, Served::In("v1beta1")),
            (&Served::Absent, &failed, Served::Absent),
            (&Served::In("v1beta1"), &both, Served::In("v1")),
            (&Served::In("v1"), &none, Served::In("v1")),
            (&Served::In("v1"), &failed, Served::In("v1")),
            (&Served::In("v1"), &none, Served::Absent),
            (&Served::In("v1"), &none, Served::In("v1")),
            (&Served::In("v1"), &both, Served::In("v1")),
            (&Served::In("v1"), &none, Served::In("v1")),
        ] {
            assert_eq!(step(route, before, &mut doubt, found), expected, "{before:?} {found:?}");
        }
    }
}
