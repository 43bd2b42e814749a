//! The conversation with an Istio CNI agent (`INPOD_UDS`), which hands the node's pods over instead of a file.
//!
//! An addition is acknowledged once the pod's listeners are open, because that acknowledgement lets the pod start; one
//! that takes too long is refused in time and goes on being tried, so that the agent never waits for an answer that it
//! would then take for the next one's. The agent is dialled only when control has described the mesh: until then whoever
//! served the node before does it better. While it is away everything that runs goes on, and the node is not ready.

use std::io;
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use socket2::SockAddr;
use tokio::io::Interest;
use tokio::net::UnixStream;
use tokio::sync::{Notify, watch};
use tokio::time::{Instant, sleep, timeout};

use crate::app::pods::Pods;
use crate::base::drain::Drained;
use crate::base::netns::{Netns, local_addresses, run_blocking};
use crate::base::packets::{self, Packet};
use crate::capture::pods::{Pod, Pods as List};
use crate::capture::zds::{self, Added, Handed, PACKET_MAX, Request};
use crate::identity::backoff;
use crate::state::Reader;

/// How long an addition may take: the agent waits 5 s for its acknowledgement, and takes a later one for another's.
const ADDED: Duration = Duration::from_secs(4);
/// How often it is looked at whether a pod is served, which takes some tens of milliseconds.
const LOOK: Duration = Duration::from_millis(5);
/// The agent reads one acknowledgement for each request, so there is room for it at once.
const SEND: Duration = Duration::from_secs(4);
/// Pause before a new connection, growing. The agent takes five a second.
const RETRY: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(15));

/// What is told of the pods, and to whom.
pub(super) struct Agent {
    /// Where the agent listens.
    pub path: PathBuf,
    /// What became of the pods.
    pub pods: Pods,
    /// The list, for [`Pods::run`].
    pub list: watch::Sender<List>,
    /// Wakes it.
    pub changed: Arc<Notify>,
}

impl Agent {
    /// Talks to the agent, connection after connection, until `stop` drains.
    pub(super) async fn run(self, reader: Reader, stop: Drained) {
        let mut handed = Handed::default();
        let mut failures = 0u32;
        self.not_connected("it is dialled once control has described the mesh");
        let mut changes = reader.subscribe();
        let synced = async { while !reader.load().synced() && changes.changed().await.is_ok() {} };
        tokio::select! { () = synced => {}, () = stop.draining() => return }
        loop {
            let ended = tokio::select! {
                ended = self.converse(&mut handed) => ended,
                () = stop.draining() => return,
            };
            let (useful, why) = match ended {
                Ok(()) => (true, "it closed the connection".to_owned()),
                Err(error) => (handed.list().complete, error.to_string()),
            };
            failures = if useful { 1 } else { failures.saturating_add(1) };
            let wait = backoff(RETRY.0, RETRY.1, failures, rand::random());
            tracing::warn!(socket = %self.path.display(), retry_in = ?wait, reason = why, "not connected to the CNI agent; what is served goes on");
            self.not_connected(&why);
            tokio::select! { () = sleep(wait) => {}, () = stop.draining() => return }
        }
    }

    fn not_connected(&self, why: &str) {
        let problem = format!("the pods from the CNI agent at {} (INPOD_UDS): {why}", self.path.display());
        self.pods.set_problem(Some(problem));
    }

    /// One connection, to its end.
    async fn converse(&self, handed: &mut Handed) -> io::Result<()> {
        let channel = Channel::connect(&self.path)?;
        channel.send(&zds::hello()).await?;
        handed.connected();
        tracing::info!(socket = %self.path.display(), "connected to the CNI agent");
        while let Some(packet) = channel.receive().await? {
            let done = self.take(packet, handed).await;
            if let Err(reason) = &done {
                tracing::warn!(reason, "refused what the CNI agent asked for");
            }
            channel.send(&zds::answer(done)).await?;
        }
        Ok(())
    }

    async fn take(&self, packet: Packet, handed: &mut Handed) -> Result<(), String> {
        let Packet { body, mut fds, cut } = packet;
        match zds::request(&body, fds.len(), cut)? {
            Request::Add(added) => {
                let descriptor = fds.pop().ok_or("no descriptor came")?;
                let netns = Netns::of(descriptor).map_err(|error| format!("the descriptor is of no use: {error}"))?;
                let pod = described(added, netns).await?;
                handed.add(pod.clone());
                self.publish(handed);
                self.served(&pod).await
            }
            Request::Keep(uid) => handed.keep(&uid),
            Request::Del(uid) => {
                handed.del(&uid);
                self.publish(handed);
                Ok(())
            }
            Request::SnapshotSent => {
                handed.snapshot_sent()?;
                self.pods.set_problem(None);
                self.publish(handed);
                Ok(())
            }
        }
    }

    fn publish(&self, handed: &Handed) {
        self.list.send_replace(handed.list());
        self.changed.notify_one();
    }

    /// Waits until the pod's listeners are open.
    async fn served(&self, pod: &Pod) -> Result<(), String> {
        let until = Instant::now() + ADDED;
        loop {
            let why = match self.pods.serves(pod) {
                Ok(()) => return Ok(()),
                Err(why) => why,
            };
            if Instant::now() >= until {
                return Err(format!("pod {}/{} is not served yet: {why}; it is tried again", pod.namespace, pod.name));
            }
            sleep(LOOK).await;
        }
    }
}

/// The pod, with the addresses that its namespace has.
async fn described(added: Added, netns: Netns) -> Result<Pod, String> {
    let addresses = run_blocking(&netns, local_addresses).await;
    let addresses = addresses.map_err(|error| {
        format!("the network namespace of pod {}/{} is of no use: {error}", added.namespace, added.name)
    })?;
    let is_own = |ip: &IpAddr| match ip {
        IpAddr::V4(v4) => !v4.is_loopback() && !v4.is_link_local(),
        IpAddr::V6(v6) => !v6.is_loopback() && !v6.is_unicast_link_local(),
    };
    Ok(Pod::handed(added, netns, addresses.into_iter().filter(is_own).collect()))
}

/// A connection to the agent: tokio's socket for streams, which does not look at what kind it is as long as nobody
/// streams on it.
struct Channel(UnixStream);

impl Channel {
    fn connect(path: &Path) -> io::Result<Self> {
        let socket = packets::socket()?;
        // A full queue there is an error that is tried again, and not a wait.
        socket.set_nonblocking(true)?;
        socket.connect(&SockAddr::unix(path)?)?;
        Ok(Self(UnixStream::from_std(OwnedFd::from(socket).into())?))
    }

    async fn receive(&self) -> io::Result<Option<Packet>> {
        self.0.async_io(Interest::READABLE, || packets::receive(&self.0, PACKET_MAX)).await
    }

    async fn send(&self, body: &[u8]) -> io::Result<()> {
        let sent = self.0.async_io(Interest::WRITABLE, || packets::send(&self.0, body, &[]));
        let late = |_| io::Error::new(io::ErrorKind::TimedOut, format!("it did not read for {} s", SEND.as_secs()));
        timeout(SEND, sent).await.map_err(late).flatten()
    }
}
