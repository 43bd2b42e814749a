//! One HTTP GET to control, with deadlines. Control listens on loopback without TLS; use a port-forward from afar.
//!
//! Limits: ten seconds, 256 MiB; an answer of 10,000 workloads has about 10 MiB.

use std::time::Duration;

use http_body_util::BodyExt;
use http_body_util::Empty;
use http_body_util::Limited;
use hyper::body::Bytes;
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::net::TcpStream;

use crate::cli::Failure;

/// Nodes get five seconds to answer control; this leaves room for it.
const DEADLINE: Duration = Duration::from_secs(10);
const MAX_BYTES: usize = 256 * 1024 * 1024;

/// Percent-encodes a query value.
pub(super) fn escape(text: &str) -> String {
    text.bytes()
        .map(|byte| match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'/' | b':' => char::from(byte).to_string(),
            other => format!("%{other:02X}"),
        })
        .collect()
}

/// The JSON answer of control, or what went wrong and what to try.
pub(super) fn get(base: &str, path: &str) -> Result<Value, Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| Failure::wrong(error.to_string()))?;
    runtime.block_on(async {
        match tokio::time::timeout(DEADLINE, request(base, path)).await {
            Ok(answer) => answer,
            Err(_) => Err(Failure::wrong(format!("control at {base} did not answer within 10 s"))),
        }
    })
}

/// The status and the text of control's answer; for kubelet, which gives it less time.
pub(super) fn status(base: &str, path: &str, deadline: Duration) -> Result<(u16, String), Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| Failure::wrong(error.to_string()))?;
    let answer = runtime.block_on(async { tokio::time::timeout(deadline, exchange(base, path)).await });
    let (status, body) =
        answer.map_err(|_| Failure::wrong(format!("control at {base} did not answer within {deadline:?}")))??;
    Ok((status.as_u16(), String::from_utf8_lossy(&body).into_owned()))
}

async fn request(base: &str, path: &str) -> Result<Value, Failure> {
    let (status, body) = exchange(base, path).await?;
    let value: Value = serde_json::from_slice(&body).unwrap_or(Value::Null);
    if status.is_success() && !value.is_null() {
        return Ok(value);
    }
    let text = value["error"].as_str().map_or_else(
        || format!("control at {base} answered {status} to {path}: is it a Tulle control plane?"),
        str::to_owned,
    );
    Err(Failure::wrong(text))
}

async fn exchange(base: &str, path: &str) -> Result<(http::StatusCode, Bytes), Failure> {
    let unreachable = |error: String| {
        Failure::wrong(format!("cannot reach control at {base}: {error}; is it running, and is --control right?"))
    };
    let Some(authority) = base.strip_prefix("http://").map(|rest| rest.trim_end_matches('/')) else {
        return Err(Failure::wrong(format!("--control {base}: only http://host:port is possible")));
    };
    let with_port = if authority.rsplit_once(':').is_some_and(|(_, port)| port.parse::<u16>().is_ok()) {
        authority.to_owned()
    } else {
        format!("{authority}:80")
    };
    let stream = TcpStream::connect(&with_port).await.map_err(|e| unreachable(e.to_string()))?;
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(|e| unreachable(e.to_string()))?;
    let driver = tokio::spawn(connection);
    let request = http::Request::get(path)
        .header("host", authority)
        .body(Empty::<Bytes>::new())
        .map_err(|e| unreachable(e.to_string()))?;
    let response = sender.send_request(request).await.map_err(|e| unreachable(e.to_string()))?;
    let status = response.status();
    let body = Limited::new(response.into_body(), MAX_BYTES)
        .collect()
        .await
        .map_err(|e| unreachable(e.to_string()))?
        .to_bytes();
    driver.abort();
    Ok((status, body))
}
