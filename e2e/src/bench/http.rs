//! Requests of HTTP/1.1 in the bench: what the generators send, what the server answers, and reading both.
//!
//! An answer names the server that gave it and repeats the request's tag, so that a count of servers is a count of
//! requests that were routed, and an answer to another request is noticed. Limits: no bodies of requests, a length for
//! every body of an answer, heads up to a few KB; it reads what the bench's own ends write and what proxies make of it.

use std::collections::BTreeMap;
use std::io;
use std::io::Read;
use std::io::Write;

use tokio::io::AsyncReadExt;
use tokio::io::AsyncWriteExt;

use crate::bench::work::RESPONSE;

/// Names the server in its answers.
const SERVED_BY: &str = "x-served-by";
/// What an answer repeats.
const TAG: &str = "x-tag";
/// Longer heads are nobody's in the bench.
const LONGEST: usize = 16 << 10;

/// An answer whose last byte has come.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Answer {
    /// Status code.
    pub(super) status: u16,
    /// Who gave it; empty when a proxy did.
    pub(super) server: String,
    tag: String,
    /// Bytes of its body.
    body: usize,
}

impl Answer {
    /// That it is the expected answer to the request with this tag.
    pub(super) fn check(&self, tag: u64) -> io::Result<()> {
        if self.status != 200 || self.body != RESPONSE {
            return Err(io::Error::other(format!("status {} with {} bytes", self.status, self.body)));
        }
        if self.tag != tag.to_string() {
            return Err(io::Error::other("the response to another request came back"));
        }
        Ok(())
    }
}

/// A GET of `path`, but for its tag: as long as what a program sends, and made of the marker.
pub(super) fn head(method: &str, path: &str, marker: &str, more: &str) -> String {
    format!(
        "{method} {path} HTTP/1.1\r\nhost: shop\r\nuser-agent: bench\r\naccept: */*\r\nx-marker: {marker}\r\n{more}"
    )
}

/// The bytes of a request.
fn request(head: &str, tag: u64) -> Vec<u8> {
    format!("{head}{TAG}: {tag}\r\n\r\n").into_bytes()
}

/// Sends a request and reads its answer.
pub(super) async fn exchange<S>(stream: &mut S, head: &str, tag: u64) -> io::Result<Answer>
where
    S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin,
{
    stream.write_all(&request(head, tag)).await?;
    let mut bytes = Vec::with_capacity(4096);
    loop {
        if stream.read_buf(&mut bytes).await? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        if let Some(answer) = answer(&bytes)? {
            return Ok(answer);
        }
    }
}

/// The same on a thread that waits.
pub(super) fn exchange_blocking(stream: &mut (impl Read + Write), head: &str, tag: u64) -> io::Result<Answer> {
    stream.write_all(&request(head, tag))?;
    let (mut bytes, mut buffer) = (Vec::with_capacity(4096), [0; 4096]);
    loop {
        match stream.read(&mut buffer)? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            length => bytes.extend_from_slice(&buffer[..length]),
        }
        if let Some(answer) = answer(&bytes)? {
            return Ok(answer);
        }
    }
}

/// Answers requests one after the other until the client closes.
pub(super) async fn serve(mut stream: tokio::net::TcpStream, name: &str, filler: &[u8]) -> io::Result<()> {
    let mut bytes = Vec::with_capacity(4096);
    loop {
        while let Some(end) = end_of_head(&bytes)? {
            let tag = field(text(&bytes[..end])?, TAG).unwrap_or_default().to_owned();
            bytes.drain(..end);
            let head = format!(
                "HTTP/1.1 200 OK\r\n{SERVED_BY}: {name}\r\n{TAG}: {tag}\r\ncontent-type: text/plain\r\n\
                 content-length: {RESPONSE}\r\n\r\n"
            );
            let mut whole = head.into_bytes();
            whole.extend_from_slice(&filler[..RESPONSE]);
            stream.write_all(&whole).await?;
        }
        if stream.read_buf(&mut bytes).await? == 0 {
            return Ok(());
        }
    }
}

/// Adds one to who answered.
pub(super) fn count(answered: &mut BTreeMap<String, u64>, server: &str) {
    match answered.get_mut(server) {
        Some(count) => *count += 1,
        None => drop(answered.insert(server.to_owned(), 1)),
    }
}

fn answer(bytes: &[u8]) -> io::Result<Option<Answer>> {
    let Some(end) = end_of_head(bytes)? else { return Ok(None) };
    let head = text(&bytes[..end])?;
    let wrong = || io::Error::other(format!("no answer of HTTP/1.1: {:?}", head.lines().next().unwrap_or_default()));
    let status = head.strip_prefix("HTTP/1.1 ").and_then(|rest| rest.get(..3)?.parse().ok()).ok_or_else(wrong)?;
    let body: usize = field(head, "content-length").unwrap_or("0").parse().map_err(|_| wrong())?;
    if bytes.len() < end + body {
        return Ok(None);
    }
    let named = |name| field(head, name).unwrap_or_default().to_owned();
    Ok(Some(Answer { status, server: named(SERVED_BY), tag: named(TAG), body }))
}

/// Where the body begins.
fn end_of_head(bytes: &[u8]) -> io::Result<Option<usize>> {
    let end = bytes.windows(4).position(|window| window == b"\r\n\r\n").map(|at| at + 4);
    if end.is_none() && bytes.len() > LONGEST {
        return Err(io::Error::other("a head does not end"));
    }
    Ok(end)
}

fn text(head: &[u8]) -> io::Result<&str> {
    std::str::from_utf8(head).map_err(io::Error::other)
}

/// The first value of a field, whatever the case of its name.
fn field<'a>(head: &'a str, name: &str) -> Option<&'a str> {
    let mut fields = head.lines().skip(1).filter_map(|line| line.split_once(':'));
    fields.find(|(found, _)| found.eq_ignore_ascii_case(name)).map(|(_, value)| value.trim())
}

#[cfg(test)]
mod tests {
    use crate::bench::http::Answer;
    use crate::bench::http::answer;
    use crate::bench::http::field;
    use crate::bench::http::head;
    use crate::bench::http::request;
    use crate::bench::work::REQUEST;
    use crate::bench::work::RESPONSE;

    #[test]
    fn an_answer_is_read_when_its_last_byte_has_come() -> std::io::Result<()> {
        let whole = b"HTTP/1.1 200 OK\r\nX-Served-By: v1\r\nx-tag: 7\r\nContent-Length: 3\r\n\r\nabc";
        for length in 0..whole.len() {
            assert_eq!(answer(&whole[..length])?, None, "{length}");
        }
        let read = Answer { status: 200, server: "v1".to_owned(), tag: "7".to_owned(), body: 3 };
        assert_eq!(answer(whole)?, Some(read));
        let denied = answer(b"HTTP/1.1 403 Forbidden\r\nserver: proxy\r\n\r\n")?;
        assert_eq!(denied.map(|answer| (answer.status, answer.server)), Some((403, String::new())));
        for wrong in ["SSH-2.0\r\n\r\n", "HTTP/1.1 xx\r\n\r\n", "HTTP/1.1 200 OK\r\ncontent-length: -1\r\n\r\n"] {
            assert!(answer(wrong.as_bytes()).is_err(), "{wrong}");
        }
        Ok(())
    }

    #[test]
    fn only_the_answer_to_the_same_request_counts() {
        let good = Answer { status: 200, server: "v1".to_owned(), tag: "7".to_owned(), body: RESPONSE };
        assert!(good.check(7).is_ok());
        for bad in [
            Answer { status: 503, ..good.clone() },
            Answer { tag: "8".to_owned(), ..good.clone() },
            Answer { body: 0, ..good.clone() },
        ] {
            assert!(bad.check(7).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_request_is_at_least_as_long_as_the_raw_ones() {
        let bytes = request(&head("GET", "/api/items", "0123456789abcdef", ""), 1);
        assert!(bytes.len() >= REQUEST, "{}", bytes.len());
        assert_eq!(field(&String::from_utf8_lossy(&bytes), "x-tag"), Some("1"));
    }
}
