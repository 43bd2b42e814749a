//! One bounded question to the API server: the labels of a namespace or a pod.
//!
//! For the plugin while the agent is away. A run of it is one process for one pod, so there is no client to keep and no runtime
//! to start: a blocking socket, TLS, one request of HTTP/1.0 (whose answer ends with the connection and is never in chunks), all
//! before one deadline. Only metadata is asked for. Nothing is retried: the container runtime does that.

use std::io::{self, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream, ToSocketAddrs as _};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};
use serde::Deserialize;

use crate::cni::enrolment::Labels;
use crate::cni::kubeconfig::Access;

/// Largest answer that is read: an object has at most 1.5 MiB in etcd, and its metadata a fraction of that.
pub const ANSWER_MAX: usize = 3 << 20;
/// Addresses of the server that are tried.
const ADDRESSES: usize = 4;

/// Why there is no answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ApiError {
    /// The server says that there is no such object.
    NotFound,
    /// Anything else.
    Failed(String),
}

/// The labels of the object at `path` of the API.
///
/// # Errors
/// That there is none, or why it is not known.
pub fn labels(access: &Access, path: &str, until: Instant) -> Result<Labels, ApiError> {
    let answer = ask(access, path, until).map_err(ApiError::Failed)?;
    read(&answer)
}

/// The labels in an answer.
///
/// # Errors
/// That the server says no, or what is wrong with it.
pub fn read(answer: &[u8]) -> Result<Labels, ApiError> {
    #[derive(Deserialize)]
    struct Object {
        metadata: Metadata,
    }
    #[derive(Deserialize)]
    struct Metadata {
        #[serde(default)]
        labels: Option<Labels>,
    }
    let (status, body) = response(answer).map_err(ApiError::Failed)?;
    match status {
        200 => {
            let object: Object = serde_json::from_slice(body)
                .map_err(|error| ApiError::Failed(format!("the API server's answer cannot be read: {error}")))?;
            Ok(object.metadata.labels.unwrap_or_default())
        }
        404 => Err(ApiError::NotFound),
        401 => Err(ApiError::Failed(
            "the API server does not take the plugin's token (401); the token dies with the agent's pod, and the next one writes a new one".to_owned(),
        )),
        403 => Err(ApiError::Failed(
            "the API server forbids it (403); the service account of the agent needs to get pods and namespaces".to_owned(),
        )),
        other => Err(ApiError::Failed(format!("the API server answered {other}"))),
    }
}

/// Status and body of an answer of HTTP/1.
fn response(answer: &[u8]) -> Result<(u16, &[u8]), String> {
    let split = answer.windows(4).position(|window| window == b"\r\n\r\n");
    let end = split.ok_or("the API server's answer ends before its headers do")?;
    let head = std::str::from_utf8(&answer[..end]).map_err(|_| "the API server's answer is no HTTP")?;
    let (first, headers) = head.split_once("\r\n").unwrap_or((head, ""));
    let status = first.strip_prefix("HTTP/1.").and_then(|rest| rest.get(2..5)).and_then(|code| code.parse().ok());
    let status: u16 = status.ok_or("the API server's answer is no HTTP")?;
    let body = &answer[end + 4..];
    for (name, value) in headers.split("\r\n").filter_map(|line| line.split_once(':')) {
        if name.eq_ignore_ascii_case("transfer-encoding") {
            return Err(
                "the API server's answer is in chunks, which HTTP/1.0 has not; is a proxy in between?".to_owned()
            );
        }
        if name.eq_ignore_ascii_case("content-length") && value.trim().parse() != Ok(body.len()) {
            return Err("the API server's answer was cut off".to_owned());
        }
    }
    Ok((status, body))
}

fn ask(access: &Access, path: &str, until: Instant) -> Result<Vec<u8>, String> {
    let (host, port) = access.host_and_port()?;
    let name = access.tls_server_name.clone().unwrap_or_else(|| host.clone());
    let name = ServerName::try_from(name).map_err(|error| format!("the server's name cannot be checked: {error}"))?;
    let connection = ClientConnection::new(Arc::new(config(access)?), name).map_err(|error| error.to_string())?;
    let failed = |error: io::Error| match error.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => {
            format!("the API server {host}:{port} did not answer in time")
        }
        _ => format!("the API server {host}:{port}: {error}"),
    };
    let socket = connect(&host, port, until).map_err(failed)?;
    let mut stream = StreamOwned::new(connection, socket);
    let authorization =
        access.token.as_ref().map(|token| format!("Authorization: Bearer {token}\r\n")).unwrap_or_default();
    if authorization.trim_end().contains(['\r', '\n']) {
        return Err("the plugin's token has more than one line".to_owned());
    }
    let accept = "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1";
    let request = format!(
        "GET {path} HTTP/1.0\r\nHost: {host}\r\nUser-Agent: tulle-cni\r\nAccept: {accept}\r\n{authorization}\r\n"
    );
    limit(&stream.sock, until).map_err(failed)?;
    stream.write_all(request.as_bytes()).and_then(|()| stream.flush()).map_err(failed)?;
    let mut answer = Vec::new();
    let mut chunk = [0; 16 << 10];
    loop {
        limit(&stream.sock, until).map_err(failed)?;
        match stream.read(&mut chunk) {
            Ok(0) => return Ok(answer),
            // Without TLS's goodbye; what was cut off shows in its length, or is no JSON.
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(answer),
            Ok(length) => answer.extend_from_slice(&chunk[..length]),
            Err(error) => return Err(failed(error)),
        }
        if answer.len() > ANSWER_MAX {
            return Err(format!("the API server's answer has more than {ANSWER_MAX} bytes"));
        }
    }
}

fn connect(host: &str, port: u16, until: Instant) -> io::Result<TcpStream> {
    let addresses: Vec<SocketAddr> = (host, port).to_socket_addrs()?.take(ADDRESSES).collect();
    let mut last = io::Error::new(io::ErrorKind::NotFound, "its name has no address");
    for address in addresses {
        match TcpStream::connect_timeout(&address, left(until)?) {
            Ok(socket) => return Ok(socket),
            Err(error) => last = error,
        }
    }
    Err(last)
}

fn left(until: Instant) -> io::Result<Duration> {
    let left = until.saturating_duration_since(Instant::now());
    if left.is_zero() { Err(io::ErrorKind::TimedOut.into()) } else { Ok(left) }
}

fn limit(socket: &TcpStream, until: Instant) -> io::Result<()> {
    let left = left(until)?;
    socket.set_read_timeout(Some(left))?;
    socket.set_write_timeout(Some(left))
}

fn config(access: &Access) -> Result<ClientConfig, String> {
    let mut roots = RootCertStore::empty();
    for root in CertificateDer::pem_slice_iter(access.roots.as_bytes()) {
        let added = root.map_err(|error| error.to_string()).and_then(|root| roots.add(root).map_err(|e| e.to_string()));
        added.map_err(|error| format!("the roots of the plugin's kubeconfig cannot be used: {error}"))?;
    }
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let builder = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| error.to_string())?
        .with_root_certificates(roots);
    let Some((certificate, key)) = &access.certificate else { return Ok(builder.with_no_client_auth()) };
    let unusable = |error: String| format!("the client certificate of the plugin's kubeconfig cannot be used: {error}");
    let chain: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(certificate.as_bytes()).collect();
    let chain = chain.map_err(|error| unusable(error.to_string()))?;
    // What the parser says could quote the key.
    let key = PrivateKeyDer::from_pem_slice(key.as_bytes());
    let key = key.map_err(|_| unusable("its key is not a private key in PEM".to_owned()))?;
    builder.with_client_auth_cert(chain, key).map_err(|error| unusable(error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::{ApiError, read};

    #[test]
    fn an_answer_is_taken_whole_or_not_at_all() {
        let body =
            r#"{"kind":"PartialObjectMetadata","metadata":{"name":"shop","labels":{"tulle.dev/mesh":"enabled"}}}"#;
        let answer = |status: &str, headers: &str| format!("HTTP/1.1 {status}\r\n{headers}\r\n{body}").into_bytes();
        let length = format!("Content-Length: {}\r\n", body.len());
        for headers in ["", length.as_str()] {
            assert_eq!(read(&answer("200 OK", headers)).unwrap()["tulle.dev/mesh"], "enabled");
        }
        assert!(read(b"HTTP/1.0 200 OK\r\n\r\n{\"metadata\":{}}").unwrap().is_empty());
        assert_eq!(read(&answer("404 Not Found", "")), Err(ApiError::NotFound));
        let cut = answer("200 OK", &length);
        for (bytes, says) in [
            (answer("401 Unauthorized", ""), "401"),
            (answer("403 Forbidden", ""), "pods and namespaces"),
            (answer("500 Oh", ""), "500"),
            (answer("200 OK", "Transfer-Encoding: chunked\r\n"), "chunks"),
            (cut[..cut.len() - 1].to_vec(), "cut off"),
            (b"HTTP/1.1 200 OK\r\nContent".to_vec(), "before its headers"),
            (b"SSH-2.0-x\r\n\r\n".to_vec(), "no HTTP"),
            (b"HTTP/1.1 2\r\n\r\n".to_vec(), "no HTTP"),
            (b"HTTP/1.1 200 OK\r\n\r\n{}".to_vec(), "cannot be read"),
        ] {
            let Err(ApiError::Failed(why)) = read(&bytes) else { panic!("{says}") };
            assert!(why.contains(says), "{says}: {why}");
        }
    }
}
