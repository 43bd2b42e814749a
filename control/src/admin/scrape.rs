//! Metrics for whoever reaches control's pod: one page, and nothing else of what control knows.
//!
//! The port is open to the cluster, so strangers may come: a connection carries one request, has little time, and there are
//! few of them at once; who comes then is turned away and the scrape after it passes. Nodes and health do not depend on it.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use http::{Method, Request, Response, StatusCode, header};
use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::time::{sleep, timeout};

use crate::admin::{State, metrics};
use crate::base::Stop;

/// Connections at once. A collector has one, and two replicas of it ask at the same time.
const AT_ONCE: usize = 16;
/// For the request to arrive, and for all of it: Prometheus gives up after 10 s.
const HEAD: Duration = Duration::from_secs(5);
const WHOLE: Duration = Duration::from_secs(10);
/// After a connection could not be taken, as when there are no descriptors left.
const PAUSE: Duration = Duration::from_millis(200);
/// What `/metrics` is.
const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Serves `/metrics` until it is told to stop.
pub async fn serve(listener: TcpListener, state: State, mut stop: Stop) {
    let slots = Arc::new(Semaphore::new(AT_ONCE));
    loop {
        let accepted = tokio::select! {
            () = stop.requested() => return,
            accepted = listener.accept() => accepted,
        };
        let Ok((stream, _)) = accepted else {
            sleep(PAUSE).await;
            continue;
        };
        // Closed at once: waiting would fill the kernel's queue, and the collector would learn of it later.
        let Ok(slot) = Arc::clone(&slots).try_acquire_owned() else { continue };
        let state = state.clone();
        tokio::spawn(async move {
            // Whoever is too slow, or breaks off, asks again.
            let _ = timeout(WHOLE, exchange(stream, state)).await;
            drop(slot);
        });
    }
}

async fn exchange(stream: TcpStream, state: State) -> hyper::Result<()> {
    let service = service_fn(|request: Request<Incoming>| {
        let answer = page(request.method(), request.uri().path(), &state);
        async move { Ok::<_, Infallible>(answer) }
    });
    http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD)
        .keep_alive(false)
        .serve_connection(TokioIo::new(stream), service)
        .await
}

fn page(method: &Method, path: &str, state: &State) -> Response<Full<Bytes>> {
    let (status, kind, text) = match (path, method) {
        ("/metrics", &Method::GET) => (StatusCode::OK, OPEN_METRICS, metrics::text(state)),
        ("/metrics", _) => (StatusCode::METHOD_NOT_ALLOWED, "text/plain", "metrics are read with GET\n".to_owned()),
        _ => (StatusCode::NOT_FOUND, "text/plain", "there is /metrics here, and nothing else\n".to_owned()),
    };
    let mut response = Response::new(Full::new(Bytes::from(text)));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, http::HeaderValue::from_static(kind));
    response
}
