//! The server: answers with what it saw of the request, and greets on raw TCP with the peer's address.
//!
//! Paths: `/` what was seen, `/echo` the body back, `/delay?ms=`, `/status/<code>`, `/bytes?n=`; `/become?ms=&status=&every=`
//! makes the server slow to answer every other path, or answer it so (or each n-th request only), until it is asked to become
//! something else. One JSON line
//! per request and connection goes to standard output. Limits: when asked to end it serves on for a moment, since clients
//! learn of its leaving late, then ends idle connections.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::convert::Infallible;
use std::io;
use std::net::Ipv6Addr;
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::Duration;
use std::time::Instant;

use anyhow::Context;
use bytes::Bytes;
use http::Request;
use http::Response;
use http_body_util::BodyExt;
use http_body_util::Full;
use http_body_util::Limited;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use serde_json::Value;
use serde_json::json;
use socket2::Domain;
use socket2::Socket;
use socket2::Type;
use tokio::io::AsyncBufReadExt;
use tokio::io::AsyncRead;
use tokio::io::AsyncWrite;
use tokio::io::AsyncWriteExt;
use tokio::io::BufReader;
use tokio::net::TcpListener;
use tokio::net::TcpStream;
use tokio::signal::unix::SignalKind;
use tokio::sync::watch;
use tokio_rustls::TlsAcceptor;

use crate::shop::now_us;
use crate::shop::secure;

const BODY_LIMIT: usize = 64 << 20;
/// Clients hear of a leaving pod within this time; new connections until then are served.
const LINGER: Duration = Duration::from_millis(300);
/// Then connections in use get this long.
const DRAIN: Duration = Duration::from_millis(1500);

struct Server {
    name: String,
    pod: String,
    namespace: String,
    node: String,
    count: Cell<u64>,
    mood: Cell<Mood>,
}

/// How the server behaves.
#[derive(Clone, Copy, Default)]
struct Mood {
    /// Before each answer.
    ms: u64,
    /// Of each answer.
    status: Option<u16>,
    /// Only each so many-th answer has the status; 0: each.
    every: u64,
    /// Requests since it became so.
    asked: u64,
}

/// Serves until SIGTERM or SIGINT. Fails when a port cannot be bound.
pub(super) async fn serve(name: &str, http: &[u16], tcp: &[u16], tls: &[u16]) -> anyhow::Result<()> {
    let env = |name: &str| std::env::var(name).unwrap_or_default();
    let server = Rc::new(Server {
        name: name.to_owned(),
        pod: env("POD_NAME"),
        namespace: env("POD_NAMESPACE"),
        node: env("NODE_NAME"),
        count: Cell::new(0),
        mood: Cell::default(),
    });
    let (ending, end) = watch::channel(false);
    for port in http {
        let listener = bind(*port)?;
        tokio::task::spawn_local(accept_http(listener, server.clone(), end.clone()));
    }
    for port in tcp {
        let listener = bind(*port)?;
        tokio::task::spawn_local(accept_tcp(listener, None, server.clone(), end.clone()));
    }
    for port in tls {
        let (listener, tls) = (bind(*port)?, secure::acceptor()?);
        tokio::task::spawn_local(accept_tcp(listener, Some(tls), server.clone(), end.clone()));
    }
    drop(end);
    let mut term = tokio::signal::unix::signal(SignalKind::terminate())?;
    tokio::select! {
        _ = term.recv() => {}
        _ = tokio::signal::ctrl_c() => {}
    }
    tokio::time::sleep(LINGER).await;
    let _ = ending.send(true);
    let _ = tokio::time::timeout(DRAIN, ending.closed()).await;
    Ok(())
}

/// Both families on one socket, with a queue long enough for a burst of clients.
fn bind(port: u16) -> anyhow::Result<TcpListener> {
    let make = || -> io::Result<TcpListener> {
        let socket = Socket::new(Domain::IPV6, Type::STREAM, None)?;
        socket.set_only_v6(false)?;
        socket.set_reuse_address(true)?;
        socket.set_nonblocking(true)?;
        socket.bind(&SocketAddr::from((Ipv6Addr::UNSPECIFIED, port)).into())?;
        socket.listen(1024)?;
        TcpListener::from_std(socket.into())
    };
    make().with_context(|| format!("port {port} cannot be listened on"))
}

async fn accepted(listener: &TcpListener, end: &mut watch::Receiver<bool>) -> Option<(TcpStream, SocketAddr)> {
    loop {
        tokio::select! {
            _ = end.wait_for(|ending| *ending) => return None,
            accepted = listener.accept() => match accepted {
                Ok((stream, peer)) => {
                    let _ = stream.set_nodelay(true);
                    return Some((stream, SocketAddr::new(peer.ip().to_canonical(), peer.port())));
                }
                // Out of descriptors, or the peer went away: neither is a reason to end.
                Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
            },
        }
    }
}

async fn accept_http(listener: TcpListener, server: Rc<Server>, mut end: watch::Receiver<bool>) {
    while let Some((stream, peer)) = accepted(&listener, &mut end).await {
        let (server, mut end) = (server.clone(), end.clone());
        tokio::task::spawn_local(async move {
            let service = service_fn(|request| {
                let server = server.clone();
                async move { Ok::<_, Infallible>(respond(&server, peer, request).await) }
            });
            let connection = hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service);
            tokio::pin!(connection);
            tokio::select! {
                _ = connection.as_mut() => return,
                _ = end.wait_for(|ending| *ending) => connection.as_mut().graceful_shutdown(),
            }
            let _ = connection.await;
        });
    }
}

async fn respond(server: &Server, peer: SocketAddr, request: Request<Incoming>) -> Response<Full<Bytes>> {
    let began = Instant::now();
    let (method, uri) = (request.method().to_string(), request.uri().clone());
    let mut headers: BTreeMap<String, String> = BTreeMap::new();
    for (name, value) in request.headers() {
        let value = String::from_utf8_lossy(value.as_bytes());
        // Lines of one name are one list (RFC 9110 §5.3).
        let before = headers.get(name.as_str()).map(|before| format!("{before},")).unwrap_or_default();
        headers.insert(name.to_string(), format!("{before}{value}"));
    }
    server.count.set(server.count.get() + 1);
    let count = server.count.get();
    let body = match Limited::new(request.into_body(), BODY_LIMIT).collect().await {
        Ok(body) => body.to_bytes(),
        Err(error) => return answer(400, format!("the body cannot be read: {error}\n").into()),
    };
    let query = |name: &str| -> Option<u64> {
        let pairs = uri.query()?.split('&').find_map(|pair| pair.strip_prefix(name)?.strip_prefix('='));
        pairs?.parse().ok()
    };
    let seen = || -> Value {
        json!({
            "name": server.name, "pod": server.pod, "namespace": server.namespace, "node": server.node,
            "source": peer.ip(), "source_port": peer.port(), "method": method, "path": uri.to_string(),
            "headers": headers, "body": String::from_utf8_lossy(&body), "count": count,
        })
    };
    let mut mood = server.mood.get();
    if uri.path() != "/become" {
        mood.asked += 1;
        server.mood.set(mood);
        mood.status = mood.status.filter(|_| mood.every == 0 || mood.asked.is_multiple_of(mood.every));
    }
    if uri.path() != "/become" && mood.ms > 0 {
        // Who does not wait for the answer drops this future, and the line at its end with it.
        log(&json!({"t_us": now_us(), "kind": "http-slow", "name": server.name, "path": uri.to_string()}));
        tokio::time::sleep(Duration::from_millis(mood.ms.min(60_000))).await;
    }
    let response = match uri.path() {
        "/become" => {
            let status = query("status").and_then(|status| u16::try_from(status).ok());
            let every = query("every").unwrap_or_default();
            server.mood.set(Mood { ms: query("ms").unwrap_or_default(), status, every, asked: 0 });
            answer(200, "so be it\n".into())
        }
        _ if mood.status.is_some() => answer(mood.status.unwrap_or(500), format!("{}\n", seen()).into()),
        "/echo" => answer(200, body.clone()),
        "/bytes" => answer(200, vec![b'x'; query("n").unwrap_or(1).min(BODY_LIMIT as u64) as usize].into()),
        "/delay" => {
            tokio::time::sleep(Duration::from_millis(query("ms").unwrap_or(100).min(60_000))).await;
            answer(200, format!("{}\n", seen()).into())
        }
        path => match path.strip_prefix("/status/").and_then(|code| code.parse().ok()) {
            Some(code) => answer(code, format!("{}\n", seen()).into()),
            None => answer(200, format!("{}\n", seen()).into()),
        },
    };
    log(&json!({
        "t_us": now_us(), "kind": "http", "name": server.name, "source": peer, "method": method, "path": uri.to_string(),
        "status": response.status().as_u16(), "ms": began.elapsed().as_secs_f64() * 1000.0,
    }));
    response
}

fn answer(status: u16, body: Bytes) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(body));
    *response.status_mut() = http::StatusCode::from_u16(status).unwrap_or(http::StatusCode::INTERNAL_SERVER_ERROR);
    response
}

async fn accept_tcp(
    listener: TcpListener,
    tls: Option<TlsAcceptor>,
    server: Rc<Server>,
    mut end: watch::Receiver<bool>,
) {
    while let Some((stream, peer)) = accepted(&listener, &mut end).await {
        let (server, tls, mut end) = (server.clone(), tls.clone(), end.clone());
        tokio::task::spawn_local(async move {
            log(&json!({"t_us": now_us(), "kind": "tcp-open", "name": server.name, "source": peer}));
            let lines = tokio::select! {
                lines = greet(&server, tls, stream, peer) => lines,
                _ = end.wait_for(|ending| *ending) => Ok(0),
            };
            let (lines, error) = match lines {
                Ok(lines) => (lines, None),
                Err(error) => (0, Some(error.to_string())),
            };
            log(
                &json!({"t_us": now_us(), "kind": "tcp-close", "name": server.name, "source": peer, "lines": lines, "error": error}),
            );
        });
    }
}

async fn greet(server: &Server, tls: Option<TlsAcceptor>, stream: TcpStream, peer: SocketAddr) -> io::Result<u64> {
    match tls {
        None => echo(server, stream, peer).await,
        Some(tls) => echo(server, tls.accept(stream).await?, peer).await,
    }
}

async fn echo(server: &Server, stream: impl AsyncRead + AsyncWrite, peer: SocketAddr) -> io::Result<u64> {
    let greeting = format!("HELLO {} {}\n", if server.pod.is_empty() { &server.name } else { &server.pod }, peer.ip());
    let (read, mut write) = tokio::io::split(stream);
    write.write_all(greeting.as_bytes()).await?;
    let mut read = BufReader::new(read);
    let mut line = Vec::new();
    let mut lines = 0;
    loop {
        line.clear();
        // Not a limit on the line but on what one line may cost before it is echoed in parts.
        let mut part = tokio::io::AsyncReadExt::take(&mut read, 64 << 10);
        if part.read_until(b'\n', &mut line).await? == 0 {
            return Ok(lines);
        }
        lines += 1;
        write.write_all(&line).await?;
    }
}

fn log(line: &Value) {
    println!("{line}");
}
