//! Taking a tunnel in: TLS with the identity of whoever it is for, HTTP/2, and each CONNECT handed on.
//!
//! The same for a pod and for a gateway; what a stream may do is theirs to decide. Who the peer is comes from its
//! certificate, and counts only as long as that does.

use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use rustls::pki_types::CertificateDer;
use tokio::net::TcpStream;
use tokio::time::{sleep, timeout};
use tokio_rustls::TlsAcceptor;
use tulle_certs::{SpiffeId, Usage};

use crate::base::budget::Budget;
use crate::base::cut::Cut;
use crate::base::lent::Lent;
use crate::base::pace::Paced;
use crate::base::unix_now;
use crate::base::window::Window;
use crate::flow::{LocalPod, Shared};
use crate::hbone::server::{self, Incoming};
use crate::hbone::{READ_BUFFER, TLS_BUFFER};
use crate::outcome::{Code, Outcome};
use crate::tls::{WorkloadCert, peer_identity, refusal};

/// How long a new connection may stay silent. A proxy's ClientHello follows its SYN at once.
const FIRST_BYTE: Duration = Duration::from_secs(5);

/// What a tunnel proved, shared by its streams.
pub struct Proven {
    /// The other end.
    pub peer: SocketAddr,
    /// Where it arrived.
    pub local: SocketAddr,
    /// Who the peer proved to be.
    pub source_identity: SpiffeId,
    /// Who we proved to be.
    pub own_identity: SpiffeId,
    /// Its receive window.
    pub window: Rc<Window>,
    /// The peer's certificate was taken back, or its trust domain is not believed any more: streams end.
    pub cut: Cut<Outcome>,
}

/// Serves one tunnel of `ends` (the peer, and where it arrived) to its end. `cert` is waited for once the peer has said
/// something.
///
/// # Errors
/// Why there was no tunnel, or how it failed.
pub async fn serve(
    shared: &Shared,
    pod: &LocalPod,
    tcp: TcpStream,
    (peer, local): (SocketAddr, SocketAddr),
    cert: impl Future<Output = Result<Arc<WorkloadCert>, Outcome>>,
    mut handle: impl FnMut(&Rc<Proven>, Incoming),
) -> Result<(), Outcome> {
    // Held as long as the tunnel is open.
    let _tunnel = pod.tunnel(peer.ip())?;
    // Who says nothing takes no place among the handshakes.
    let first = timeout(FIRST_BYTE, tcp.readable()).await;
    if !matches!(first, Ok(Ok(()))) {
        return Err(Outcome::new(Code::TlsFailed, "the peer sent nothing after connecting"));
    }
    let permit = pod.handshake(peer.ip()).await?;
    let cert = cert.await?;
    let transport = Paced::new(Lent::new(READ_BUFFER, tcp));
    let accept = TlsAcceptor::from(cert.server_config()).accept(transport);
    let mut tls = timeout(shared.hbone.handshake_timeout, accept)
        .await
        .map_err(|_| Outcome::new(Code::TlsFailed, "the peer did not finish the TLS handshake in time"))?
        .map_err(|error| refusal(&error, ""))?;
    let session = tls.get_mut().1;
    session.set_buffer_limit(Some(TLS_BUFFER));
    let source_identity =
        peer_identity(session.peer_certificates()).map_err(|error| Outcome::new(Code::TlsFailed, error))?;
    let shown = session.peer_certificates().unwrap_or_default().to_vec();
    let lifetime = shown.first().map_or(Duration::ZERO, remaining);
    drop(permit);

    shared.metrics.tunnels.inc();
    let gauge = shared.metrics.tunnels.clone();
    let window = receive_window(shared, &pod.buffers);
    let proven = Rc::new(Proven {
        peer,
        local,
        source_identity,
        own_identity: cert.identity.clone(),
        window: window.clone(),
        cut: Cut::default(),
    });
    let distrusted = async {
        let outcome = cert.distrusted(&shown, Usage::Client).await;
        tracing::warn!(%peer, reason = %outcome, "tunnel is cut");
        proven.cut.order(outcome);
    };
    let expired = async {
        tokio::select! { () = sleep(lifetime) => {}, _ = proven.cut.ordered() => {} }
    };
    let served = server::serve(tls, shared.hbone, pod.drained.clone(), expired, &window, |incoming| {
        handle(&proven, incoming);
    });
    tokio::pin!(served);
    // Watched as long as anything flows, and looked at first: lists may have changed during the handshake.
    let result = tokio::select! {
        biased;
        () = distrusted => served.await,
        result = &mut served => result,
    };
    gauge.dec();
    result
}

fn receive_window(shared: &Shared, budget: &Arc<Budget>) -> Rc<Window> {
    Window::new(budget, shared.hbone.stream_window, shared.hbone.connection_window)
}

/// How long the peer's certificate is still valid.
fn remaining(leaf: &CertificateDer<'_>) -> Duration {
    let left = tulle_certs::not_after(leaf).map_or(0, |end| end.saturating_sub(unix_now()));
    Duration::from_secs(u64::try_from(left).unwrap_or(0))
}

/// There is no connection yet when a tunnel fails, so there is no record; the log still says who failed and how.
pub fn failed(shared: &Shared, pod: &LocalPod, (peer, local): (SocketAddr, SocketAddr), outcome: &Outcome) {
    shared.metrics.handshakes_failed.inc();
    tracing::warn!(
        target: "access",
        {
        src.addr = %peer,
        dst.addr = %local,
        dst.workload = &*pod.name,
        dst.namespace = &*pod.namespace,
        direction = "inbound",
        code = outcome.code.name(),
        error = &*outcome.detail
        },
        "tunnel failed"
    );
}
