//! One connection to control for all that speak to it: discovery, certificates, and control's questions.
//!
//! Each connection costs control a TLS session and HTTP/2 state with their buffers, for every node of the cluster, so the
//! streams share one. It is made by whoever comes first; who comes meanwhile waits for that attempt and shares its result.
//! Who finds it broken says so, and the next one makes another. Limits: a connection with other roots than the file has now
//! is not handed out again, and ends with the last of its streams.

use std::fmt;
use std::future::Future;
use std::sync::Arc;

use tokio::sync::Mutex;
use tokio::time::Instant;
use tonic::Code;
use tonic::transport::Channel;

use crate::tls::Revoked;

/// The connection. Cheap to clone; all clones are one.
#[derive(Clone, Default)]
pub struct Link {
    state: Arc<Mutex<State>>,
    revoked: Revoked,
}

#[derive(Default)]
struct State {
    /// The connection, and the roots that it trusts.
    open: Option<(Vec<u8>, Connected)>,
    /// When and why the last attempt failed.
    failed: Option<(Instant, String)>,
    /// Connections so far.
    made: u64,
}

/// A connection to control.
#[derive(Clone, Debug)]
pub struct Connected {
    /// Makes requests.
    pub channel: Channel,
    number: u64,
}

/// Whether a request that ended so may have met a broken connection.
pub fn breaks(code: Code) -> bool {
    [Code::Unavailable, Code::Unknown, Code::Cancelled, Code::DeadlineExceeded, Code::Internal].contains(&code)
}

impl Link {
    /// `revoked`: certificates that control must not show.
    pub fn new(revoked: Revoked) -> Self {
        Self { state: Arc::default(), revoked }
    }

    pub(super) fn revoked(&self) -> &Revoked {
        &self.revoked
    }

    /// The connection with these roots, made by `connect` if there is none.
    ///
    /// # Errors
    /// What `connect` says, here or where somebody else made the attempt.
    pub(super) async fn share(
        &self,
        roots: &[u8],
        connect: impl Future<Output = Result<Channel, String>>,
    ) -> Result<Connected, String> {
        let asked = Instant::now();
        // Held while connecting, which has a deadline: others wait for the same.
        let mut state = self.state.lock().await;
        if let Some((of, connected)) = &state.open
            && of == roots
        {
            return Ok(connected.clone());
        }
        if let Some((at, why)) = &state.failed
            && *at > asked
        {
            return Err(why.clone());
        }
        state.open = None;
        match connect.await {
            Ok(channel) => {
                state.made += 1;
                let connected = Connected { channel, number: state.made };
                state.open = Some((roots.to_vec(), connected.clone()));
                Ok(connected)
            }
            Err(why) => {
                state.failed = Some((Instant::now(), why.clone()));
                Err(why)
            }
        }
    }

    /// `connected` is not handed out again.
    pub async fn broken(&self, connected: &Connected) {
        let mut state = self.state.lock().await;
        if state.open.as_ref().is_some_and(|(_, open)| open.number == connected.number) {
            state.open = None;
        }
    }
}

impl fmt::Debug for Link {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Link")
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use tonic::transport::{Channel, Endpoint};

    use super::Link;

    #[tokio::test]
    async fn one_connection_serves_all_until_it_breaks_or_the_roots_change() {
        let (link, made) = (Link::default(), AtomicUsize::new(0));
        let share = async |roots: &str| {
            let connect = async {
                made.fetch_add(1, Ordering::Relaxed);
                Ok(Endpoint::from_static("http://control").connect_lazy())
            };
            link.share(roots.as_bytes(), connect).await.unwrap()
        };
        let (first, second) = tokio::join!(share("a"), share("a"));
        assert_eq!((first.number, second.number), (1, 1));
        link.broken(&second).await;
        let third = share("a").await;
        assert_eq!(third.number, 2);
        link.broken(&first).await;
        assert_eq!(share("a").await.number, 2, "that was another one");
        assert_eq!(share("b").await.number, 3);
        assert_eq!(made.load(Ordering::Relaxed), 3);
    }

    #[tokio::test]
    async fn who_waited_for_an_attempt_shares_its_failure() {
        let (link, made) = (Link::default(), AtomicUsize::new(0));
        let share = async || {
            let connect = async {
                tokio::task::yield_now().await;
                Err::<Channel, _>(format!("failure {}", made.fetch_add(1, Ordering::Relaxed)))
            };
            link.share(&[], connect).await.unwrap_err()
        };
        let (one, two) = tokio::join!(share(), share());
        assert_eq!((one.as_str(), two.as_str()), ("failure 0", "failure 0"));
        assert_eq!(share().await, "failure 1", "who comes later tries again");
    }
}
