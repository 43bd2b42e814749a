//! The smallest HTTP client that tests and the supervisor need: one GET or POST over one blocking connection.
//!
//! It runs on whatever thread calls it, so that it can be called inside a network namespace, where the async client's
//! pool of threads would be in the wrong one. Limits: HTTP/1.1, `Connection: close`, bodies up to 64 MiB.

use std::io::Read;
use std::io::Write;
use std::net::SocketAddr;
use std::net::TcpStream;
use std::path::Path;
use std::time::Duration;

use anyhow::Context;

use crate::netns;

/// A dump of a full lab is well below; more would be a runaway answer.
const BODY_LIMIT: u64 = 64 << 20;

/// Status and body of an answer.
#[derive(Clone, Debug)]
pub struct Answer {
    /// HTTP status code.
    pub status: u16,
    /// Body as text; bytes that are not UTF-8 are replaced.
    pub body: String,
}

/// GET `path` from `address`, every step within `timeout`.
pub fn get(address: SocketAddr, path: &str, timeout: Duration) -> anyhow::Result<Answer> {
    ask(address, &format!("GET {path} HTTP/1.1\r\n"), "", timeout)
}

/// POST of JSON to `path` at `address`, every step within `timeout`.
pub fn post(address: SocketAddr, path: &str, json: &str, timeout: Duration) -> anyhow::Result<Answer> {
    let head = format!("POST {path} HTTP/1.1\r\nContent-Type: application/json\r\nContent-Length: {}\r\n", json.len());
    ask(address, &head, json, timeout)
}

fn ask(address: SocketAddr, head: &str, body: &str, timeout: Duration) -> anyhow::Result<Answer> {
    let mut stream =
        TcpStream::connect_timeout(&address, timeout).with_context(|| format!("{address} does not accept"))?;
    stream.set_read_timeout(Some(timeout))?;
    stream.set_write_timeout(Some(timeout))?;
    write!(stream, "{head}Host: {address}\r\nConnection: close\r\nAccept: */*\r\n\r\n{body}")?;
    let path = head.split(' ').nth(1).unwrap_or_default();
    let mut bytes = Vec::new();
    stream.take(BODY_LIMIT).read_to_end(&mut bytes).with_context(|| format!("http://{address}{path} broke off"))?;
    parse(&bytes).with_context(|| format!("http://{address}{path} is not an HTTP answer"))
}

/// The same from inside the network namespace at `netns`.
pub fn get_in(netns: &Path, address: SocketAddr, path: &str, timeout: Duration) -> anyhow::Result<Answer> {
    netns::in_netns(netns, || get(address, path, timeout))?
}

fn parse(bytes: &[u8]) -> anyhow::Result<Answer> {
    let end = bytes.windows(4).position(|window| window == b"\r\n\r\n").context("no end of headers")?;
    let head = String::from_utf8_lossy(&bytes[..end]).to_ascii_lowercase();
    let status = head.split(' ').nth(1).and_then(|code| code.parse().ok()).context("no status code")?;
    let body = &bytes[end + 4..];
    let chunked = head.lines().any(|line| line.starts_with("transfer-encoding:") && line.contains("chunked"));
    let body = if chunked { unchunk(body)? } else { body.to_vec() };
    Ok(Answer { status, body: String::from_utf8_lossy(&body).into_owned() })
}

fn unchunk(mut rest: &[u8]) -> anyhow::Result<Vec<u8>> {
    let mut body = Vec::new();
    loop {
        let end = rest.windows(2).position(|window| window == b"\r\n").context("no chunk size")?;
        let size = std::str::from_utf8(&rest[..end])?.split(';').next().unwrap_or_default();
        let size = usize::from_str_radix(size.trim(), 16)?;
        rest = &rest[end + 2..];
        if size == 0 {
            return Ok(body);
        }
        anyhow::ensure!(rest.len() >= size + 2, "a chunk is cut short");
        body.extend_from_slice(&rest[..size]);
        rest = &rest[size + 2..];
    }
}

#[cfg(test)]
mod tests {
    use crate::client::parse;

    #[test]
    fn an_answer_is_read_with_length_and_chunked() {
        let plain = parse(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok").unwrap();
        assert_eq!((plain.status, plain.body.as_str()), (200, "ok"));
        let chunked =
            parse(b"HTTP/1.1 503 No\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n1\r\nc\r\n0\r\n\r\n").unwrap();
        assert_eq!((chunked.status, chunked.body.as_str()), (503, "abc"));
        assert!(parse(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n9\r\nab").is_err());
        assert!(parse(b"nonsense").is_err());
    }
}
