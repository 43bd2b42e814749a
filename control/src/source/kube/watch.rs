//! Follows one kind: lists it in pages, then watches it, for as long as the API server serves it.
//!
//! A watch that ends goes on from the version it had reached; one whose version the server has forgotten (410) begins
//! with a new list. Lists ask for the newest state, so that a list never goes back behind what a watch has shown.

use std::time::Duration;
use std::time::Instant;

use kube::Client;
use kube::api::{ListParams, WatchParams};
use kube::core::Request;
use tokio::sync::mpsc;
use tokio::sync::watch;

use crate::source::kube::json;
use crate::source::kube::kinds::{KINDS, Kind};
use crate::source::kube::known::Event;
use crate::source::kube::wire;
use crate::source::kube::wire::Failure;

/// Objects of a page.
const PAGE: u32 = 500;
/// Most of a page, where pages expire before the list is complete.
const MAX_PAGE: u32 = 8_000;
/// The server ends a watch after this long and a random part of [`WATCH_SPREAD`], so that watches move to other servers.
const WATCH_S: u32 = 200;
const WATCH_SPREAD: f64 = 90.0;
/// A watch brings a bookmark each minute; two that are missing, and the connection counts as dead.
const SILENCE: Duration = Duration::from_secs(150);
/// A watch that ends sooner without a word is a failure: otherwise it would be begun as fast as the network allows.
const SHORT: Duration = Duration::from_secs(1);
/// A list that is too old to be watched from so soon is a failure, too.
const HASTY: Duration = Duration::from_secs(10);

/// What the API server has of a kind.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Served {
    /// Not known, and why; empty: not asked yet.
    Unknown(String),
    /// Nothing.
    Absent,
    /// This version.
    In(&'static str),
}

/// Reports on a kind: its place in [`KINDS`], and what happened. Bounded: who cannot follow makes the API server wait.
pub type Reports = mpsc::Sender<(usize, Event)>;

/// Nobody wants reports any more.
pub struct Closed;

/// Follows a kind until nobody wants reports any more.
pub async fn follow(client: Client, place: usize, mut served: watch::Receiver<Served>, reports: Reports) {
    let Some(kind) = KINDS.get(place) else { return };
    let follower = Follower { client, kind, place, reports };
    loop {
        let now = served.borrow_and_update().clone();
        let session = async {
            match now {
                Served::Unknown(reason) if reason.is_empty() => {}
                Served::Unknown(reason) => follower.report(Event::Failed(reason)).await?,
                Served::Absent => follower.report(Event::Absent).await?,
                Served::In(version) => {
                    follower.report(Event::Served(version)).await?;
                    return follower.session(version).await;
                }
            }
            std::future::pending().await
        };
        tokio::select! {
            changed = served.changed() => if changed.is_err() { return },
            Closed = async { match session.await { Ok(never) => never, Err(closed) => closed } } => return,
        }
    }
}

struct Follower {
    client: Client,
    kind: &'static Kind,
    place: usize,
    reports: Reports,
}

/// Whether reports could be delivered, and what came of the request.
type Outcome<T> = Result<Result<T, Failure>, Closed>;

impl Follower {
    async fn report(&self, event: Event) -> Result<(), Closed> {
        self.reports.send((self.place, event)).await.map_err(|_| Closed)
    }

    /// Lists and watches without end.
    async fn session(&self, version: &'static str) -> Result<Closed, Closed> {
        let mut at: Option<String> = None;
        let mut page = PAGE;
        let mut failures = 0;
        let mut listed_at: Option<Instant> = None;
        loop {
            let ended = match at.take() {
                None => match self.list(version, page).await? {
                    Ok(listed) => {
                        page = PAGE;
                        listed_at = Some(Instant::now());
                        at = Some(listed);
                        Ok(())
                    }
                    Err(Failure::TooLarge) if page > 1 => {
                        page = (page / 4).max(1);
                        continue;
                    }
                    Err(error) => {
                        if error == Failure::Expired {
                            page = (page * 2).min(MAX_PAGE);
                        }
                        Err(error)
                    }
                },
                Some(from) => {
                    let begun = Instant::now();
                    let (reached, ended) = self.watch(version, from.clone()).await?;
                    let silent = begun.elapsed() < SHORT && reached == from;
                    at = Some(reached);
                    match ended {
                        Ok(()) if silent => Err(Failure::Other("the API server ends watches at once".into())),
                        Err(Failure::Expired) => {
                            at = None;
                            // At once, but not again and again.
                            if listed_at.is_some_and(|at| at.elapsed() < HASTY) {
                                Err(Failure::Expired)
                            } else {
                                Ok(())
                            }
                        }
                        other => other,
                    }
                }
            };
            match ended {
                Ok(()) => failures = 0,
                Err(failure) => {
                    self.report(Event::Failed(self.words(version, failure))).await?;
                    tokio::time::sleep(wire::pause(failures, rand::random())).await;
                    failures = failures.saturating_add(1);
                }
            }
        }
    }

    fn words(&self, version: &str, failure: Failure) -> String {
        let what = wire::named(self.kind);
        match failure {
            Failure::Other(text) => text,
            Failure::Expired => format!("the list of {what} expired before its end; it is asked for again"),
            Failure::NotFound => format!("the API server does not serve {what} in version {version} (404)"),
            Failure::TooLarge => {
                format!("one object of {what} is larger than any answer that is read; make it smaller")
            }
        }
    }

    /// All objects; the version to watch from.
    async fn list(&self, version: &'static str, mut limit: u32) -> Outcome<String> {
        let what = wire::named(self.kind);
        self.report(Event::Started).await?;
        let mut next = None;
        loop {
            let wanted = ListParams { limit: Some(limit), continue_token: next.take(), ..ListParams::default() };
            let request = match Request::new(self.kind.path(version)).list(&wanted) {
                Ok(request) => request,
                Err(error) => return Ok(Err(Failure::Other(error.to_string()))),
            };
            let bytes = match wire::get(&self.client, request, &what).await {
                Ok(bytes) => bytes,
                Err(Failure::TooLarge) if limit > 1 && wanted.continue_token.is_some() => {
                    // The rest of the list may come in smaller pages.
                    limit = (limit / 4).max(1);
                    next = wanted.continue_token;
                    continue;
                }
                Err(failure) => return Ok(Err(failure)),
            };
            let kind = self.kind;
            // A page takes some ten milliseconds, and streams of nodes share these threads.
            let read = tokio::task::spawn_blocking(move || json::page(&bytes, kind)).await;
            let page = match read {
                Ok(Ok(page)) => page,
                Ok(Err(error)) => {
                    let text = format!("the API server's list of {what} cannot be read: {error}");
                    return Ok(Err(Failure::Other(text)));
                }
                Err(_) => return Ok(Err(Failure::Other(format!("reading the list of {what} failed inside control")))),
            };
            self.report(Event::Page(page.items)).await?;
            if page.next.is_empty() {
                self.report(Event::Listed(page.version.clone())).await?;
                return Ok(Ok(page.version));
            }
            next = Some(page.next);
        }
    }

    /// Reports changes until the watch ends. Gives the version that was reached, and how it ended.
    async fn watch(&self, version: &'static str, mut at: String) -> Result<(String, Result<(), Failure>), Closed> {
        let what = wire::named(self.kind);
        let seconds = WATCH_S + (rand::random::<f64>() * WATCH_SPREAD) as u32;
        let wanted = WatchParams { timeout: Some(seconds), bookmarks: true, ..WatchParams::default() };
        let request = match Request::new(self.kind.path(version)).watch(&wanted, &at) {
            Ok(request) => request,
            Err(error) => return Ok((at, Err(Failure::Other(error.to_string())))),
        };
        let mut lines = match wire::lines(&self.client, request, &what).await {
            Ok(lines) => lines,
            Err(failure) => return Ok((at, Err(failure))),
        };
        self.report(Event::Heard(None)).await?;
        loop {
            let line = match lines.next(SILENCE).await {
                Ok(Some(line)) => line,
                Ok(None) => return Ok((at, Ok(()))),
                Err(failure) => return Ok((at, Err(failure))),
            };
            let event = match json::line(&line, self.kind) {
                Ok(json::Line::Applied(item, reached)) => {
                    at.clone_from(&reached);
                    Event::Applied(item, reached)
                }
                Ok(json::Line::Gone { namespace, name, version: reached }) => {
                    at.clone_from(&reached);
                    Event::Gone(namespace, name, reached)
                }
                Ok(json::Line::Bookmark(reached)) => {
                    at.clone_from(&reached);
                    Event::Heard(Some(reached))
                }
                Ok(json::Line::Failed(status, message)) => {
                    return Ok((at, Err(wire::refused(status, &message, &what))));
                }
                Err(error) => {
                    // Whatever it was about is not known now: ask for everything.
                    tracing::warn!(
                        error,
                        what,
                        "a report of the API server cannot be read; everything is listed again"
                    );
                    return Ok((at, Err(Failure::Expired)));
                }
            };
            self.report(event).await?;
        }
    }
}
