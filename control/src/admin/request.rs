//! A single request in a question of `tulle explain`: from the query, and as people see what becomes of it.
//!
//! Pure. What a request means is the nodes' to say; here it is only carried. Limits: a token is part of the query, so it
//! stays between `tulle` and control, which listens on loopback, and is in no answer.

use serde_json::{Value, json};
use tulle_proto::node::{ProxyAnswer, RequestAnswer, RequestHead, RequestHeader};

use crate::admin::explain::Ask;
use crate::admin::target::Target;

/// The request that is asked about. `None`: the question is about a connection.
///
/// # Errors
/// What cannot be read of it.
pub(super) fn head(ask: &Ask, target: &Target) -> Result<Option<RequestHead>, String> {
    if [&ask.method, &ask.path, &ask.host, &ask.headers].iter().all(|part| part.is_none()) {
        return Ok(None);
    }
    if ask.transport.as_deref().is_some_and(|transport| transport != "tcp") {
        return Err("a request needs TCP".to_owned());
    }
    let path = ask.path.clone().unwrap_or_else(|| "/".to_owned());
    if !path.starts_with('/') {
        return Err(format!("the path `{path}` does not begin with a slash"));
    }
    let header = |line: &str| {
        let (name, value) = line.split_once(':').ok_or_else(|| format!("`{line}` is not `name: value`"))?;
        Ok(RequestHeader { name: name.trim().to_ascii_lowercase(), value: value.trim().to_owned() })
    };
    let lines = ask.headers.as_deref().unwrap_or_default().lines().filter(|line| !line.is_empty());
    let headers = lines.map(header).collect::<Result<Vec<_>, String>>()?;
    if headers.iter().any(|header| header.name == "host") {
        return Err("say the host by --host, not by a header".to_owned());
    }
    let method = ask.method.clone().unwrap_or_else(|| "GET".to_owned());
    let host = ask.host.clone().unwrap_or_else(|| host(target));
    Ok(Some(RequestHead { method, path, host, headers }))
}

/// What clients of a target put into `Host` when they know no better.
fn host(target: &Target) -> String {
    if let Some(host) = &target.host {
        return if target.port == 80 { host.clone() } else { format!("{host}:{}", target.port) };
    }
    let name = match (target.service.split_once('/'), target.addresses.first()) {
        (Some((_, hostname)), _) => hostname.to_owned(),
        (None, Some(address)) if address.is_ipv6() => format!("[{address}]"),
        (None, Some(address)) => address.to_string(),
        (None, None) => String::new(),
    };
    if target.port == 80 { name } else { format!("{name}:{}", target.port) }
}

/// What the source does with it, as JSON. Header values are left out: one of them may be a token.
pub(super) fn leaving(head: &RequestHead, answer: &RequestAnswer) -> Value {
    json!({
        "method": head.method,
        "path": head.path,
        "host": head.host,
        "read": answer.read,
        "route": answer.route,
        "limits": answer.limits,
        "answers": answer.answers.iter().map(answered).collect::<Vec<_>>(),
    })
}

fn answered(answer: &ProxyAnswer) -> Value {
    json!({"status": answer.status, "sharePercent": answer.share_percent, "text": answer.text})
}

#[cfg(test)]
mod tests {
    use super::head;
    use crate::admin::explain::Ask;
    use crate::admin::target::Target;

    #[test]
    fn a_request_is_what_the_query_says_of_it() {
        let target = |service: &str, port: u16| Target {
            addresses: vec!["2001:db8::1".parse().unwrap()],
            port,
            service: service.to_owned(),
            host: None,
        };
        let text = |text: &str| Some(text.to_owned());
        assert_eq!(head(&Ask::default(), &target("a/b", 80)), Ok(None));
        let ask = Ask { path: text("/a?b"), headers: text("X-One: 1\nx-two:2"), ..Ask::default() };
        let found = head(&ask, &target("shop/cart.shop", 80)).unwrap().unwrap();
        assert_eq!((&*found.method, &*found.path, &*found.host), ("GET", "/a?b", "cart.shop"));
        let headers: Vec<_> = found.headers.iter().map(|one| (&*one.name, &*one.value)).collect();
        assert_eq!(headers, [("x-one", "1"), ("x-two", "2")]);
        let ask = Ask { method: text("POST"), ..Ask::default() };
        assert_eq!(head(&ask, &target("", 8080)).unwrap().unwrap().host, "[2001:db8::1]:8080");
        for bad in [
            Ask { path: text("a"), ..Ask::default() },
            Ask { headers: text("no colon"), ..Ask::default() },
            Ask { headers: text("Host: a"), ..Ask::default() },
            Ask { path: text("/"), transport: text("udp"), ..Ask::default() },
        ] {
            assert!(head(&bad, &target("", 80)).is_err(), "{bad:?}");
        }
    }
}
