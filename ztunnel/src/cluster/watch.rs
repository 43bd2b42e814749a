//! Watching the API server: this node's pods, and the labels of all namespaces.
//!
//! A watch that ends is resumed where it was; one that is too old to be resumed lists anew, and that list replaces what was
//! known when it is complete ([`crate::cluster::view`]). A server that is away is asked again with a growing pause, and
//! changes nothing meanwhile. Each event is cut down to some hundred bytes before it is kept, and waits in a bounded queue.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use futures_util::{Stream, StreamExt as _};
use k8s_openapi::api::core::v1;
use kube::core::PartialObjectMeta;
use kube::runtime::watcher::{self, Event};
use kube::{Api, Client};
use tokio::sync::{mpsc, watch};
use tokio::time::sleep;

use crate::cluster::pod::Member;
use crate::cluster::view::News;
use crate::cluster::{QUESTION, said};
use crate::cni::enrolment::{Labels, relevant};
use crate::identity::backoff;

/// Pause before the server is asked again, growing.
const RETRY: (Duration, Duration) = (Duration::from_millis(300), Duration::from_secs(10));
/// The server ends a watch after so many seconds; a connection that died without a word is noticed some seconds later.
const LIFE: u32 = 120;
/// A watch that has not failed again for so long is well: a try takes some seconds, and the longest pause is in between.
const WELL: Duration = Duration::from_secs(20);
/// News that wait to be taken. The taker is quick; when it is not, the watch waits and the server keeps the rest.
const QUEUE: usize = 256;

/// What a watch has come to: empty when it is well, else why it is not.
pub type Health = watch::Receiver<String>;

/// Watches the pods of `node` and all namespaces, as long as the receiver lives.
pub fn start(client: &Client, node: &str) -> (mpsc::Receiver<News>, [Health; 2]) {
    let (news, taken) = mpsc::channel(QUEUE);
    let config = watcher::Config::default().timeout(LIFE);
    let pods =
        watcher::watcher(Api::<v1::Pod>::all(client.clone()), config.clone().fields(&format!("spec.nodeName={node}")));
    let (well, pods_health) = watch::channel("not asked yet".to_owned());
    let of_pods = Kind {
        what: "pods",
        one: |pod: &v1::Pod| Member::of(pod).map(|pod| (pod.uid.clone(), pod)),
        apply: |_, pod| News::Pod(pod),
        gone: News::PodGone,
        all: |pods: BTreeMap<String, Member>| News::Pods(pods.into_values().collect()),
    };
    tokio::spawn(run(pods, of_pods, news.clone(), well));
    let namespaces = watcher::watcher(Api::<PartialObjectMeta<v1::Namespace>>::all(client.clone()), config);
    let (well, namespaces_health) = watch::channel("not asked yet".to_owned());
    let of_namespaces = Kind {
        what: "namespaces",
        one: |namespace: &PartialObjectMeta<v1::Namespace>| {
            let meta = &namespace.metadata;
            Some((meta.name.clone()?, meta.labels.as_ref().map(relevant).unwrap_or_default()))
        },
        apply: News::Namespace,
        gone: News::NamespaceGone,
        all: |all: BTreeMap<String, _>| News::Namespaces(all.into_iter().collect()),
    };
    tokio::spawn(run(namespaces, of_namespaces, news, well));
    (taken, [pods_health, namespaces_health])
}

/// How the events of a kind become news.
struct Kind<O, T> {
    what: &'static str,
    /// The key and what is kept of an object; `None`: nothing.
    one: fn(&O) -> Option<(String, T)>,
    apply: fn(String, T) -> News,
    gone: fn(String) -> News,
    all: fn(BTreeMap<String, T>) -> News,
}

async fn run<O, T: Debug>(
    events: impl Stream<Item = watcher::Result<Event<O>>>,
    kind: Kind<O, T>,
    news: mpsc::Sender<News>,
    health: watch::Sender<String>,
) {
    let mut events = pin!(events);
    let mut failures = 0u32;
    let mut listing = BTreeMap::new();
    let mut listed = false;
    loop {
        let event = tokio::select! {
            event = events.next() => event,
            () = news.closed() => return,
            // A watch that was resumed says so by saying nothing.
            () = sleep(WELL), if listed && failures > 0 => {
                failures = 0;
                health.send_replace(String::new());
                continue;
            }
        };
        let found = match event {
            Some(Ok(Event::Init)) => {
                listing.clear();
                None
            }
            Some(Ok(Event::InitApply(object))) => {
                listing.extend((kind.one)(&object));
                None
            }
            Some(Ok(Event::InitDone)) => {
                listed = true;
                Some((kind.all)(std::mem::take(&mut listing)))
            }
            Some(Ok(Event::Apply(object))) => (kind.one)(&object).map(|(key, value)| (kind.apply)(key, value)),
            Some(Ok(Event::Delete(object))) => (kind.one)(&object).map(|(key, _)| (kind.gone)(key)),
            Some(Err(error)) => {
                failures = failures.saturating_add(1);
                let wait = backoff(RETRY.0, RETRY.1, failures, rand::random());
                let why = format!("{} cannot be watched: {}", kind.what, of_watch(&error));
                tracing::warn!(retry_in = ?wait, reason = %why, "the last known state holds");
                health.send_replace(why);
                sleep(wait).await;
                continue;
            }
            None => return,
        };
        if let Some(found) = found {
            failures = 0;
            health.send_if_modified(|why| !std::mem::take(why).is_empty());
            if news.send(found).await.is_err() {
                return;
            }
        }
    }
}

fn of_watch(error: &watcher::Error) -> Arc<str> {
    match error {
        watcher::Error::InitialListFailed(error)
        | watcher::Error::WatchStartFailed(error)
        | watcher::Error::WatchFailed(error) => said(error).into(),
        watcher::Error::WatchError(status) => status.message.as_str().into(),
        watcher::Error::NoResourceVersion => "an object came without a resourceVersion".into(),
    }
}

/// How long a question may take while a CNI plugin waits.
pub const PATIENCE: Duration = QUESTION;

/// Asks for one pod. `None`: there is none of that name.
///
/// # Errors
/// What the API server says.
pub async fn pod(client: &Client, namespace: &str, name: &str) -> Result<Option<Member>, String> {
    let pods: Api<v1::Pod> = Api::namespaced(client.clone(), namespace);
    let found = pods.get_opt(name).await.map_err(|error| said(&error))?;
    Ok(found.as_ref().and_then(Member::of))
}

/// Asks for the labels of a namespace that matter; one that does not exist has none.
///
/// # Errors
/// What the API server says.
pub async fn namespace(client: &Client, name: &str) -> Result<Labels, String> {
    let namespaces: Api<v1::Namespace> = Api::all(client.clone());
    let found = namespaces.get_metadata_opt(name).await.map_err(|error| said(&error))?;
    Ok(found.and_then(|found| found.metadata.labels).as_ref().map(relevant).unwrap_or_default())
}
