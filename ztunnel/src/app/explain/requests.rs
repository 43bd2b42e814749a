//! A single request in a question of control: from the wire, and what both ends do with it.
//!
//! The decisions are those of `outbound` and `inbound`; this only brings them into words. Limits: a head as large as the
//! proxy would take from a client.

use std::net::SocketAddr;

use http::{HeaderName, HeaderValue, Method, Request, Uri, header};
use tulle_certs::SpiffeId;
use tulle_proto::node::{
    EndpointChoice, InboundAnswer, OutboundAnswer, ProxyAnswer, RequestAnswer, RequestHead, RequestHeader,
};

use crate::app::explain::{deny, eject, endpoints, rule_index};
use crate::inbound::explained_request;
use crate::lb::Destinations;
use crate::outbound::decide::Plan;
use crate::outbound::explained::{Becomes, Explained, explained};
use crate::outbound::waypoint_decides;
use crate::outcome::DryRun;
use crate::state::{Snapshot, Workload};

/// Most headers and bytes of a head; nobody asks about more.
const MAX_HEADERS: usize = 100;
const MAX_BYTES: usize = 64 * 1024;

/// The request that is asked about.
///
/// # Errors
/// What of it no client could send.
pub(super) fn request(head: &RequestHead) -> Result<Request<()>, String> {
    let bytes: usize = head.headers.iter().map(|header| header.name.len() + header.value.len()).sum();
    if head.headers.len() > MAX_HEADERS || bytes + head.path.len() > MAX_BYTES {
        return Err(format!("a request has at most {MAX_HEADERS} headers and {MAX_BYTES} bytes in its head"));
    }
    let method = Method::from_bytes(head.method.as_bytes()).map_err(|_| format!("`{}` is no method", head.method))?;
    let target: Uri = head.path.parse().map_err(|_| format!("`{}` is no path", head.path))?;
    let mut request = Request::new(());
    *request.method_mut() = method;
    *request.uri_mut() = target;
    let value = |text: &str| HeaderValue::from_str(text).map_err(|_| format!("`{text}` is no value of a header"));
    if !head.host.is_empty() {
        request.headers_mut().insert(header::HOST, value(&head.host)?);
    }
    for header in &head.headers {
        let name =
            HeaderName::try_from(&header.name).map_err(|_| format!("`{}` is no name of a header", header.name))?;
        request.headers_mut().append(name, value(&header.value)?);
    }
    Ok(request)
}

fn head(request: &Request<()>) -> RequestHead {
    let text = |value: &HeaderValue| String::from_utf8_lossy(value.as_bytes()).into_owned();
    let headers = request.headers().iter().filter(|(name, _)| **name != header::HOST);
    RequestHead {
        method: request.method().to_string(),
        path: request.uri().path_and_query().map_or_else(|| "/".to_owned(), ToString::to_string),
        host: request.headers().get(header::HOST).map(text).unwrap_or_default(),
        headers: headers.map(|(name, value)| RequestHeader { name: name.to_string(), value: text(value) }).collect(),
    }
}

/// Adds what the source does with a request of its own. `answer` says what it does with the connection.
pub(super) fn leaving(
    snapshot: &Snapshot,
    (network, destinations): (&str, &Destinations),
    source: &Workload,
    destination: SocketAddr,
    asked: Request<()>,
    answer: &mut OutboundAnswer,
) {
    let as_sent = head(&asked);
    let Some(Explained { route, limits, outcomes }) =
        explained(snapshot, source, (network, destinations), destination, asked)
    else {
        answer.endpoints.iter_mut().for_each(|endpoint| endpoint.request = Some(as_sent.clone()));
        return;
    };
    answer.endpoints.clear();
    let (mut answers, mut bound) = (Vec::new(), None);
    for (share, becomes) in outcomes {
        match becomes {
            Becomes::Answered { status, text } => {
                answers.push(ProxyAnswer { status: status.into(), share_percent: share * 100.0, text });
            }
            Becomes::Sent(sent) => {
                let scaled = |endpoint: EndpointChoice| EndpointChoice {
                    share_percent: endpoint.share_percent * share,
                    request: Some(head(&sent.request)),
                    ..endpoint
                };
                let mut found = endpoints(snapshot, destinations, source, &sent.plan, sent.at);
                if let Some(service) =
                    sent.plan.service().filter(|service| !waypoint_decides(snapshot, source, service))
                {
                    eject(snapshot, destinations, source, service, sent.at.port(), &mut found);
                }
                if let Some(why) = sent.bound {
                    bound = Some(why);
                    only(&sent.plan, &mut found);
                }
                answer.endpoints.extend(found.into_iter().map(scaled));
            }
        }
    }
    let tunnel = answer.endpoints.iter().any(|endpoint| endpoint.protocol == "hbone");
    let sent = !answer.endpoints.is_empty();
    answer.plan = if tunnel {
        "hbone"
    } else if sent {
        "plain"
    } else {
        "answer"
    }
    .to_owned();
    (answer.code, answer.policy, answer.rule) = Default::default();
    answer.source_identity = if tunnel { source.identity.to_string() } else { String::new() };
    answer.text = match &route {
        Some(route) => format!("the request is read here, and {route} decides"),
        None => "the request is read here, and no route decides it".to_owned(),
    };
    if let Some(why) = bound {
        answer.text.push_str("; ");
        answer.text.push_str(why);
    }
    let route = route.unwrap_or_default();
    answer.request = Some(RequestAnswer { read: true, route, limits, answers, status: 0 });
}

/// Leaves the plan's endpoint, which gets all.
fn only(plan: &Plan, endpoints: &mut Vec<EndpointChoice>) {
    let Some(workload) = plan.destination() else { return };
    endpoints.retain(|endpoint| endpoint.uid == *workload.uid);
    // By rights there is one; of several ports or addresses each is as likely.
    let share = 100.0 / endpoints.len().max(1) as f64;
    endpoints.iter_mut().for_each(|endpoint| endpoint.share_percent = share);
}

/// Puts what the destination says of a request in the place of what it says of its connection, which may enter. `ends` as
/// in `inbound`; `now` is Unix seconds, for tokens.
pub(super) fn entering(
    snapshot: &Snapshot,
    workload: &Workload,
    ends: (Option<&SpiffeId>, std::net::IpAddr, SocketAddr),
    asked: Request<()>,
    now: i64,
    answer: &mut InboundAnswer,
) {
    let mut said = RequestAnswer { read: true, ..RequestAnswer::default() };
    match explained_request(snapshot, workload, ends, asked, now) {
        Ok(verdict) => {
            answer.text = verdict.text();
            answer.policy = verdict.policy.as_deref().unwrap_or_default().to_owned();
            answer.rule = rule_index(verdict.rule);
            (answer.audit, answer.dry_run) = DryRun::texts(verdict.dry_run.iter());
        }
        Err((status, outcome)) => {
            said.status = status.into();
            deny(answer, outcome);
        }
    }
    answer.request = Some(said);
}

#[cfg(test)]
mod tests {
    use tulle_proto::node::{RequestHead, RequestHeader};

    use super::{head, request};

    #[test]
    fn a_head_comes_back_as_it_was_and_what_is_none_is_refused() {
        let of = |method: &str, path: &str, host: &str, headers: &[(&str, &str)]| RequestHead {
            method: method.into(),
            path: path.into(),
            host: host.into(),
            headers: headers
                .iter()
                .map(|(name, value)| RequestHeader { name: (*name).into(), value: (*value).into() })
                .collect(),
        };
        let good = of("GET", "/a?b=c", "cart", &[("x-one", "1"), ("x-one", "2")]);
        assert_eq!(head(&request(&good).unwrap()), good);
        for bad in [
            of("G T", "/", "cart", &[]),
            of("GET", "a b", "cart", &[]),
            of("GET", "/", "ca\nrt", &[]),
            of("GET", "/", "cart", &[("a b", "")]),
            of("GET", "/", "cart", &[("a", &"x".repeat(70_000))]),
        ] {
            assert!(request(&bad).is_err(), "{bad:?}");
        }
    }
}
