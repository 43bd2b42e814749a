//! What a packet filter outside of a pod's network lets the pod's proxy reach, as it is installed at the moment.
//!
//! Where a connection goes is decided by the newest state of the mesh, and the filter follows that a moment later. A SYN that comes
//! before is dropped, and TCP sends the next one after a second. So whoever connects waits for the filter first, [`PATIENCE`] at most:
//! after that the filter's word is taken as it is.

use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::timeout;

/// Several times what the filter takes to follow a change. Where it never will, a connection fails that much later.
const PATIENCE: Duration = Duration::from_secs(1);

/// A filter as it is installed.
pub trait Filter: Send + Sync {
    /// Whether it lets connections to `to` out of the pod with this uid.
    fn passes(&self, pod: &str, to: SocketAddr) -> bool;
}

/// One pod's way through the filter.
#[derive(Clone)]
pub struct Outlet {
    pod: Box<str>,
    filter: watch::Receiver<Arc<dyn Filter>>,
}

impl Outlet {
    /// The way of the pod with this uid.
    pub fn new(pod: &str, filter: watch::Receiver<Arc<dyn Filter>>) -> Self {
        Self { pod: pod.into(), filter }
    }

    /// Done when a connection to `to` passes, or when it has been waited for long enough.
    pub async fn wait(&self, to: SocketAddr) {
        let passes = |filter: &Arc<dyn Filter>| filter.passes(&self.pod, to);
        if passes(&self.filter.borrow()) {
            return;
        }
        let mut filter = self.filter.clone();
        // Late, or nobody keeps the filter any more: then a connection shows what there is.
        let _ = timeout(PATIENCE, filter.wait_for(passes)).await;
    }
}

impl fmt::Debug for Outlet {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "Outlet({})", self.pod)
    }
}

#[cfg(test)]
mod tests {
    use super::{Filter, Outlet, PATIENCE};
    use std::net::SocketAddr;
    use std::sync::Arc;
    use std::time::Duration;
    use tokio::sync::watch;
    use tokio::time::{Instant, sleep};

    struct Only(Vec<u16>);

    impl Filter for Only {
        fn passes(&self, pod: &str, to: SocketAddr) -> bool {
            pod != "held" || self.0.contains(&to.port())
        }
    }

    fn only(ports: &[u16]) -> Arc<dyn Filter> {
        Arc::new(Only(ports.to_vec()))
    }

    #[tokio::test(start_paused = true)]
    async fn a_connection_waits_for_the_filter_and_not_for_ever() {
        let (installed, filter) = watch::channel(only(&[1]));
        let (held, open) = (Outlet::new("held", filter.clone()), Outlet::new("open", filter));
        let to = |port: u16| SocketAddr::from(([10, 0, 0, 1], port));
        let began = Instant::now();
        held.wait(to(1)).await;
        open.wait(to(2)).await;
        assert_eq!(began.elapsed(), Duration::ZERO, "what passes does not wait");
        let half = PATIENCE / 2;
        tokio::join!(held.wait(to(2)), async {
            sleep(half).await;
            installed.send_replace(only(&[1, 2]));
        });
        assert!(began.elapsed() >= half && began.elapsed() < PATIENCE, "{:?}", began.elapsed());
        let began = Instant::now();
        held.wait(to(3)).await;
        assert!(began.elapsed() >= PATIENCE);
        drop(installed);
        let began = Instant::now();
        held.wait(to(3)).await;
        assert_eq!(began.elapsed(), Duration::ZERO, "nobody is waited for who is gone");
    }
}
