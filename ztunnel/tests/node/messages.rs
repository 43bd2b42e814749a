//! HTTP as tests speak it, byte by byte: messages read and written without a library that would mend them, and routes of
//! the Service `web` as control would have sent them.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::sync::Arc;
use std::time::Duration;

use ztunnel::state::{
    Action, Backend, Change, Filters, Group, HTTP_ROUTE, HttpMatch, HttpRule, PathMatch, PathPattern, Policy, Route,
    RouteKind, RouteMatch, RouteParent, RouteRule, Scope, ServiceName, StringMatch, Turns,
};

/// One message: first line, headers, body.
pub struct Message {
    pub first: String,
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
}

impl Message {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(own, _)| own.eq_ignore_ascii_case(name)).map(|(_, value)| value.as_str())
    }

    pub fn status(&self) -> u16 {
        self.first.split(' ').nth(1).unwrap().parse().unwrap()
    }

    pub fn text(&self) -> &str {
        std::str::from_utf8(&self.body).unwrap()
    }
}

/// Reads a message with a length, in chunks, or without a body.
pub fn read(from: &mut BufReader<TcpStream>) -> Option<Message> {
    let mut line = || {
        let mut line = String::new();
        (from.read_line(&mut line).ok()? > 0).then(|| line.trim_end().to_owned())
    };
    let first = line()?;
    let mut headers = Vec::new();
    loop {
        let line = line()?;
        if line.is_empty() {
            break;
        }
        let (name, value) = line.split_once(':')?;
        headers.push((name.to_owned(), value.trim().to_owned()));
    }
    let mut message = Message { first, headers, body: Vec::new() };
    if let Some(length) = message.header("content-length").map(|value| value.parse().unwrap()) {
        message.body.resize(length, 0);
        from.read_exact(&mut message.body).ok()?;
    } else if message.header("transfer-encoding").is_some() {
        loop {
            let mut size = String::new();
            from.read_line(&mut size).ok()?;
            let size = usize::from_str_radix(size.trim(), 16).ok()?;
            let begin = message.body.len();
            message.body.resize(begin + size, 0);
            from.read_exact(&mut message.body[begin..]).ok()?;
            from.read_line(&mut String::new()).ok()?;
            if size == 0 {
                break;
            }
        }
    }
    Some(message)
}

pub struct Client(pub BufReader<TcpStream>);

impl Client {
    pub fn connect() -> Self {
        let tcp = TcpStream::connect("10.96.0.1:80").unwrap();
        tcp.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        Self(BufReader::new(tcp))
    }

    pub fn ask(&mut self, request: &str) -> Option<Message> {
        self.0.get_mut().write_all(request.as_bytes()).ok()?;
        read(&mut self.0)
    }

    pub fn get(&mut self, path: &str, headers: &str) -> Message {
        self.ask(&format!("GET {path} HTTP/1.1\r\nhost: web\r\n{headers}\r\n")).expect("an answer")
    }

    pub fn counts(&mut self, requests: usize) -> BTreeMap<String, usize> {
        let mut counts = BTreeMap::new();
        for _ in 0..requests {
            let answer = self.get("/", "");
            *counts.entry(answer.header("x-from").unwrap().to_owned()).or_default() += 1;
        }
        counts
    }
}

pub fn name(service: &str) -> ServiceName {
    ServiceName { namespace: "shop".into(), hostname: format!("{service}.shop.svc.cluster.local").into() }
}

pub fn backend(service: &str, weight: u32) -> Backend {
    Backend { service: name(service), port: 80, weight, filters: Filters::default(), invalid: None }
}

pub fn rule(matches: Vec<RouteMatch>, backends: Vec<Backend>) -> RouteRule {
    RouteRule {
        name: "".into(),
        matches,
        filters: Filters::default(),
        backends,
        request_timeout: None,
        backend_timeout: None,
        retry: None,
        session: None,
        broken: None,
        turns: Arc::new(Turns::starting_at(0)),
    }
}

pub fn prefix(path: &str) -> RouteMatch {
    RouteMatch { path: PathMatch::Prefix(path.into()), ..RouteMatch::default() }
}

pub fn route(version: &str, rules: Vec<RouteRule>) -> Change {
    Change::Route(Arc::new(Route {
        id: format!("{HTTP_ROUTE}shop/web").into(),
        version: version.into(),
        namespace: "shop".into(),
        kind: RouteKind::Http,
        created: 0,
        parents: vec![RouteParent { service: name("web"), ports: vec![80] }],
        rules,
    }))
}

/// The namespace's policy that lets requests in whose path begins with `path`, and nothing else.
pub fn allow_paths(version: &str, path: &str) -> Change {
    let paths = Group { any: vec![PathPattern::Text(StringMatch::Prefix(path.into()))], none: Vec::new() };
    let rules = [HttpRule { clauses: vec![vec![HttpMatch { paths, ..HttpMatch::default() }]] }];
    Change::Policy(Arc::new(Policy {
        id: "shop/open".into(),
        version: version.into(),
        namespace: "shop".into(),
        scope: Scope::Namespace,
        action: Action::Allow,
        dry_run: false,
        rules: Vec::new(),
        http: Some(rules.into()),
        stand_in: None,
    }))
}
