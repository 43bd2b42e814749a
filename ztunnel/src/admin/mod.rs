//! The proxy's own HTTP: admin on loopback, metrics, readiness.
//!
//! It shows what it is given and changes nothing but the log level and the drain. Each server is a table of paths; the
//! handlers are closures from `app`, so that no page can reach further than it was meant to.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::TcpListener;
use tokio::sync::Semaphore;

use crate::base::drain::Drained;

/// Connections a server takes at once: people, a scraper and a few probes.
const CONNECTIONS: usize = 64;
/// How long a client may take for its request's headers.
const HEADER_PATIENCE: Duration = Duration::from_secs(10);

/// A page.
#[derive(Debug)]
pub struct Page {
    /// Status.
    pub status: StatusCode,
    /// Media type.
    pub kind: &'static str,
    /// Content.
    pub body: String,
}

impl Page {
    /// Plain text.
    pub fn text(status: StatusCode, body: impl Into<String>) -> Self {
        Self { status, kind: "text/plain; charset=utf-8", body: body.into() }
    }

    /// JSON.
    pub fn json(value: &serde_json::Value) -> Self {
        Self { status: StatusCode::OK, kind: "application/json", body: format!("{value:#}\n") }
    }
}

/// Answers one path. Gets the method and the query.
pub type Handler = Arc<dyn Fn(Method, String) -> Pin<Box<dyn Future<Output = Page> + Send>> + Send + Sync>;

/// Paths and their handlers.
#[derive(Clone, Default)]
pub struct Routes(BTreeMap<&'static str, Handler>);

impl Routes {
    /// Adds a path.
    #[must_use]
    pub fn route<F, R>(mut self, path: &'static str, handler: F) -> Self
    where
        F: Fn(Method, String) -> R + Send + Sync + 'static,
        R: Future<Output = Page> + Send + 'static,
    {
        self.0.insert(path, Arc::new(move |method, query| Box::pin(handler(method, query))));
        self
    }

    async fn answer(&self, request: Request<Incoming>) -> Page {
        let path = request.uri().path();
        match self.0.get(path) {
            Some(handler) => handler(request.method().clone(), request.uri().query().unwrap_or("").to_owned()).await,
            None => {
                let known = self.0.keys().copied().collect::<Vec<_>>().join("\n");
                Page::text(
                    if path == "/" { StatusCode::OK } else { StatusCode::NOT_FOUND },
                    format!("paths:\n{known}\n"),
                )
            }
        }
    }
}

/// Binds `address`.
///
/// # Errors
/// With the address in the text; another process has it, usually another proxy.
pub fn bind(address: SocketAddr) -> io::Result<std::net::TcpListener> {
    let listener = std::net::TcpListener::bind(address)
        .map_err(|error| io::Error::new(error.kind(), format!("cannot listen on {address}: {error}")))?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

/// Serves `routes` until `drained`; a connection that is open then gets one more answer.
pub async fn serve(listener: std::net::TcpListener, routes: Routes, drained: Drained) {
    let listener = match TcpListener::from_std(listener) {
        Ok(listener) => listener,
        Err(error) => return tracing::error!(%error, "an admin server cannot start"),
    };
    let room = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        let Ok(permit) = room.clone().acquire_owned().await else { return };
        let accepted = tokio::select! { accepted = listener.accept() => accepted, () = drained.draining() => return };
        let tcp = match accepted {
            Ok((tcp, _)) => tcp,
            Err(error) => {
                tracing::warn!(%error, "an admin server cannot accept; trying again");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let (routes, drained) = (routes.clone(), drained.clone());
        tokio::spawn(async move {
            let _permit = permit;
            let service = service_fn(|request| {
                let routes = routes.clone();
                async move { Ok::<_, Infallible>(respond(routes.answer(request).await)) }
            });
            let connection = hyper::server::conn::http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(HEADER_PATIENCE)
                .serve_connection(TokioIo::new(tcp), service);
            tokio::pin!(connection);
            // A client that leaves early is no news.
            tokio::select! {
                _ = connection.as_mut() => return,
                () = drained.draining() => connection.as_mut().graceful_shutdown(),
            }
            let _ = connection.await;
        });
    }
}

fn respond(page: Page) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(page.body)));
    *response.status_mut() = page.status;
    response.headers_mut().insert(http::header::CONTENT_TYPE, http::HeaderValue::from_static(page.kind));
    response
}
