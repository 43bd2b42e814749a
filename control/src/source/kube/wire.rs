//! Requests to the API server, their answers within limits, and what their failures mean to people.
//!
//! kube's own watcher is not used: it does not say that a watch has begun again after an outage, which is what tells
//! stale objects from current ones, and it holds whole objects. Its client is.

use std::time::Duration;

use http_body_util::{BodyExt, Limited};
use kube::Client;
use kube::client::Body;
use tokio::time::timeout;

use crate::base::causes;
use crate::source::kube::kinds::Kind;

/// Largest answer in one piece, bytes: 500 pods have some 5 MB. Beyond it a page is asked for with fewer objects.
const MAX_ANSWER: usize = 64 * 1024 * 1024;
/// Largest line of a watch. The API server takes no object above 3 MiB; JSON escapes can make six of one byte.
const MAX_LINE: usize = 24 * 1024 * 1024;
/// Until an answer is complete. A page of large objects over a slow link takes some seconds.
const ANSWER: Duration = Duration::from_secs(60);
/// Until the head of an answer is there.
const HEAD: Duration = Duration::from_secs(30);
/// Most of the text of a refusal that is read.
const MAX_REFUSAL: usize = 64 * 1024;

/// Why there is no answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Failure {
    /// It is larger than [`MAX_ANSWER`].
    TooLarge,
    /// The version or page asked for is not kept any more: list again.
    Expired,
    /// There is no such thing.
    NotFound,
    /// Anything else, in words.
    Other(String),
}

/// A complete answer.
pub async fn get(client: &Client, request: http::Request<Vec<u8>>, what: &str) -> Result<Vec<u8>, Failure> {
    let whole = async {
        let body = open(client, request, what).await?;
        match Limited::new(body, MAX_ANSWER).collect().await {
            Ok(body) => Ok(body.to_bytes().to_vec()),
            Err(error) if error.is::<http_body_util::LengthLimitError>() => Err(Failure::TooLarge),
            Err(error) => Err(broken(what, &*error)),
        }
    };
    timeout(ANSWER, whole).await.unwrap_or_else(|_| {
        Err(Failure::Other(format!("the API server did not answer about {what} within {} s", ANSWER.as_secs())))
    })
}

/// The lines of a watch.
pub struct Lines {
    body: Body,
    read: Vec<u8>,
    what: String,
}

/// Begins a watch.
pub async fn lines(client: &Client, request: http::Request<Vec<u8>>, what: &str) -> Result<Lines, Failure> {
    let opened = timeout(HEAD, open(client, request, what)).await.unwrap_or_else(|_| {
        Err(Failure::Other(format!("the API server did not begin to report {what} within {} s", HEAD.as_secs())))
    })?;
    Ok(Lines { body: opened, read: Vec::new(), what: what.to_owned() })
}

impl Lines {
    /// The next line; none at the end of the watch, which may come at any time. Not even a bookmark within `silence` is a
    /// failure: the connection may be dead.
    pub async fn next(&mut self, silence: Duration) -> Result<Option<Vec<u8>>, Failure> {
        let mut looked = 0;
        loop {
            if let Some(end) = self.read[looked..].iter().position(|byte| *byte == b'\n') {
                let rest = self.read.split_off(looked + end + 1);
                let mut line = std::mem::replace(&mut self.read, rest);
                line.pop();
                if line.is_empty() {
                    looked = 0;
                    continue;
                }
                return Ok(Some(line));
            }
            looked = self.read.len();
            if looked > MAX_LINE {
                return Err(Failure::Other(format!("the API server sent a report on {} without end", self.what)));
            }
            match timeout(silence, self.body.frame()).await {
                Err(_) => {
                    let seconds = silence.as_secs();
                    let text = format!("the API server was silent about {} for {seconds} s", self.what);
                    return Err(Failure::Other(text));
                }
                // What is left without an end of line was cut off; it comes again.
                Ok(None) => return Ok(None),
                Ok(Some(Err(error))) => return Err(broken(&self.what, &error)),
                Ok(Some(Ok(frame))) => {
                    if let Some(data) = frame.data_ref() {
                        self.read.extend_from_slice(data);
                    }
                }
            }
        }
    }
}

async fn open(client: &Client, request: http::Request<Vec<u8>>, what: &str) -> Result<Body, Failure> {
    let answer = client.send(request.map(Body::from)).await.map_err(|error| broken(what, &error))?;
    let status = answer.status();
    if status.is_success() {
        return Ok(answer.into_body());
    }
    let text = Limited::new(answer.into_body(), MAX_REFUSAL).collect().await;
    let text = text.map(|body| body.to_bytes().to_vec()).unwrap_or_default();
    let message = serde_json::from_slice::<Refusal>(&text).unwrap_or_default().message;
    Err(refused(status.as_u16(), &message, what))
}

#[derive(serde::Deserialize, Default)]
#[serde(default)]
struct Refusal {
    message: String,
}

/// What a status other than success means.
pub fn refused(status: u16, message: &str, what: &str) -> Failure {
    let message: String = message.chars().filter(|c| !c.is_control()).take(500).collect();
    Failure::Other(match status {
        410 => return Failure::Expired,
        404 => return Failure::NotFound,
        401 => format!(
            "the API server does not accept control's credentials ({message}): check the service account's token, or the \
             user of --kubeconfig"
        ),
        403 => format!(
            "the API server forbids it ({message}): a ClusterRole bound to control's account must allow the verbs \
             list and watch on {what}"
        ),
        429 => format!("the API server is too busy to answer about {what} (429 {message}); it is asked again"),
        _ => format!("the API server answers {status} about {what} ({message}); it is asked again"),
    })
}

fn broken(what: &str, error: &(dyn std::error::Error + 'static)) -> Failure {
    Failure::Other(format!("the API server cannot be asked about {what} ({}); it is asked again", causes(error)))
}

/// The RBAC resource of a kind, as sentences name it.
pub fn named(kind: &Kind) -> String {
    let group = if kind.group.is_empty() { "\"\"" } else { kind.group };
    format!("{} of API group {group}", kind.plural)
}

/// How long to wait after this many failures in a row; `chance` in 0..1 spreads watchers and replicas.
pub fn pause(failures: u32, chance: f64) -> Duration {
    // 0.5 s, 1 s, … 15 s: an API server that comes back is noticed soon, and one that struggles gets two requests a second.
    let most = Duration::from_millis(500).saturating_mul(1 << failures.min(5)).min(Duration::from_secs(15));
    most.mul_f64(0.5 + chance.clamp(0.0, 1.0) / 2.0)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::{Failure, pause, refused};

    #[test]
    fn a_refusal_says_what_to_change() {
        let cases = [
            (401, "credentials"),
            (403, "list and watch on pods"),
            (429, "busy"),
            (500, "500 about pods"),
            (503, "asked again"),
        ];
        for (status, text) in cases {
            let Failure::Other(found) = refused(status, "no\u{1b}", "pods") else { panic!("{status}") };
            assert!(found.contains(text) && found.contains("no") && !found.contains('\u{1b}'), "{found}");
        }
        assert_eq!(refused(410, "", "pods"), Failure::Expired);
        assert_eq!(refused(404, "", "pods"), Failure::NotFound);
    }

    #[test]
    fn pauses_grow_to_a_bound_and_are_spread() {
        assert_eq!(pause(0, 1.0), Duration::from_millis(500));
        assert_eq!(pause(1, 0.0), Duration::from_millis(500));
        assert_eq!(pause(3, 1.0), Duration::from_secs(4));
        for failures in [5, 100, u32::MAX] {
            assert_eq!(pause(failures, 1.0), Duration::from_secs(15));
            assert_eq!(pause(failures, 0.0), Duration::from_millis(7500));
        }
    }
}
