//! The task that keeps a Lease, and what it tells those who write: until when they may.
//!
//! One request at a time, each with a deadline that is shorter than what is left between [`HELD`] and [`DURATION`]; an
//! answer that comes later is not read. On the order to stop the lease is given up, so that another replica goes on at
//! once instead of after [`DURATION`].

use std::time::Duration;

use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use k8s_openapi::jiff::Timestamp;
use kube::Client;
use kube::api::{Api, ObjectMeta, PostParams};
use tokio::sync::watch;
use tokio::time::Instant;

use crate::base::Stop;
use crate::cluster::lease::{Action, Answer, DURATION, Elector, HELD, Record};
use crate::cluster::words;

/// How long one request may take.
const REQUEST: Duration = Duration::from_secs(3);

/// Until when the lease is held; `None`: it is not.
pub type Term = Option<Instant>;

/// Whether this replica writes. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Leader(watch::Receiver<Term>);

impl Leader {
    /// From what [`run`] is given.
    pub fn new(term: watch::Receiver<Term>) -> Self {
        Self(term)
    }

    /// Whether a write that takes at most `time` may begin now.
    pub fn holds_for(&self, time: Duration) -> bool {
        self.0.borrow().is_some_and(|until| Instant::now() + time < until)
    }
}

/// Keeps the lease `name` of a namespace, until it is told to stop. `identity` must be this process's alone.
pub async fn run(
    client: Client,
    namespace: String,
    name: &'static str,
    identity: String,
    term: watch::Sender<Term>,
    mut stop: Stop,
) {
    let api: Api<Lease> = Api::namespaced(client, &namespace);
    let mut elector = Elector::new(identity.clone());
    let start = Instant::now();
    let mut last_error = String::new();
    loop {
        let now = start.elapsed();
        let action = match elector.step(now) {
            Err(wait) => {
                // Not longer than it is held: the loss must be told.
                let wait = elector.held_until(now).map_or(wait, |until| wait.min(until.saturating_sub(now)));
                tokio::select! {
                    () = stop.requested() => break,
                    () = tokio::time::sleep(wait.max(Duration::from_millis(1))) => {}
                }
                tell(&term, &elector, start);
                continue;
            }
            Ok(action) => action,
        };
        let sent = start.elapsed();
        let asked = tokio::time::timeout(REQUEST, act(&api, name, &identity, &action));
        let answer = tokio::select! {
            () = stop.requested() => break,
            answer = asked => answer,
        };
        let answer = match answer {
            Ok(Ok(answer)) => {
                last_error.clear();
                answer
            }
            Ok(Err(error)) => failed(name, words(&error), &mut last_error),
            Err(_) => failed(name, format!("no answer within {REQUEST:?}"), &mut last_error),
        };
        elector.answered(&action, sent, start.elapsed(), answer);
        tell(&term, &elector, start);
    }
    let released = elector.release(start.elapsed());
    term.send_replace(None);
    if let Some(record) = released {
        let written = tokio::time::timeout(REQUEST, write(&api, name, &record)).await;
        tracing::info!(lease = name, told = matches!(written, Ok(Ok(Answer::Is(_)))), "gave the lease up");
    }
}

fn failed(name: &str, error: String, last: &mut String) -> Answer {
    if *last != error {
        tracing::warn!(lease = name, error, "cannot read or write the Lease; tried again every few seconds");
        *last = error;
    }
    Answer::Failed
}

fn tell(term: &watch::Sender<Term>, elector: &Elector, start: Instant) {
    let until = elector.held_until(start.elapsed()).map(|until| start + until);
    let had = term.borrow().is_some();
    if had != until.is_some() {
        tracing::info!(held = until.is_some(), "the lease of those who write");
    }
    term.send_if_modified(|last| std::mem::replace(last, until) != until);
}

async fn act(api: &Api<Lease>, name: &str, identity: &str, action: &Action) -> Result<Answer, kube::Error> {
    match action {
        Action::Read => Ok(api.get_opt(name).await?.map_or(Answer::Absent, |lease| Answer::Is(record(&lease)))),
        Action::Create => {
            let record = Record { holder: identity.to_owned(), version: String::new(), transitions: 0 };
            taken(api.create(&PostParams::default(), &object(name, &record)).await)
        }
        Action::Write(record) => write(api, name, record).await,
    }
}

async fn write(api: &Api<Lease>, name: &str, record: &Record) -> Result<Answer, kube::Error> {
    match api.replace(name, &PostParams::default(), &object(name, record)).await {
        Err(kube::Error::Api(status)) if status.code == 404 => Ok(Answer::Absent),
        result => taken(result),
    }
}

fn taken(result: Result<Lease, kube::Error>) -> Result<Answer, kube::Error> {
    match result {
        Ok(lease) => Ok(Answer::Is(record(&lease))),
        Err(kube::Error::Api(status)) if status.code == 409 => Ok(Answer::Conflict),
        Err(error) => Err(error),
    }
}

fn record(lease: &Lease) -> Record {
    let spec = lease.spec.clone().unwrap_or_default();
    Record {
        holder: spec.holder_identity.unwrap_or_default(),
        version: lease.metadata.resource_version.clone().unwrap_or_default(),
        transitions: spec.lease_transitions.unwrap_or_default(),
    }
}

fn object(name: &str, record: &Record) -> Lease {
    let now = MicroTime(Timestamp::now());
    // A released one says the shortest duration, for candidates that go by it.
    let seconds = if record.holder.is_empty() { 1 } else { DURATION.as_secs() };
    Lease {
        metadata: ObjectMeta {
            name: Some(name.to_owned()),
            resource_version: Some(record.version.clone()).filter(|version| !version.is_empty()),
            ..ObjectMeta::default()
        },
        spec: Some(LeaseSpec {
            // The API server takes no empty one.
            holder_identity: Some(record.holder.clone()).filter(|holder| !holder.is_empty()),
            lease_duration_seconds: i32::try_from(seconds).ok(),
            lease_transitions: Some(record.transitions),
            renew_time: Some(now),
            ..LeaseSpec::default()
        }),
    }
}

const _: () = assert!(HELD.as_secs() + REQUEST.as_secs() < DURATION.as_secs());
