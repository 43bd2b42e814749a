//! The client: requests at a fixed pace, each reported with what came back and from whom.
//!
//! Names are resolved as the pod's resolv.conf says, once per connection. The pace does not wait for slow answers:
//! `load` sends on schedule so that a stall shows as many late requests and not as few. Limits: 1,000 requests in
//! flight.

use std::cell::Cell;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;
use std::time::Instant;

use anyhow::Context;
use bytes::Bytes;
use http::Request;
use http_body_util::BodyExt;
use http_body_util::Full;
use http_body_util::Limited;
use hyper::client::conn::http1::SendRequest;
use hyper_util::rt::TokioIo;
use serde_json::Value;
use serde_json::json;
use tokio::io::AsyncBufReadExt;
use tokio::io::AsyncRead;
use tokio::io::AsyncReadExt;
use tokio::io::AsyncWrite;
use tokio::io::AsyncWriteExt;
use tokio::io::BufReader;
use tokio::net::TcpStream;
use tokio::sync::Mutex;
use tokio::sync::Semaphore;
use tokio::sync::watch;

use crate::shop::Call;
use crate::shop::Family;
use crate::shop::Load;
use crate::shop::Tcp;
use crate::shop::family;
use crate::shop::now_us;
use crate::shop::secure;
use crate::shop::udp;

const BODY_LIMIT: usize = 64 << 20;
const IN_FLIGHT_MAX: usize = 1000;

/// `shop call`; true when every request was answered with a status below 400.
pub(super) async fn call(options: &Call) -> anyhow::Result<bool> {
    let target = Target::parse(&options.url)?;
    let headers: Vec<(String, String)> = options
        .header
        .iter()
        .map(|header| {
            let (name, value) = header.split_once(':').context("a header is written `name: value`")?;
            Ok((name.trim().to_owned(), value.trim().to_owned()))
        })
        .collect::<anyhow::Result<_>>()?;
    let mut client = Client {
        target,
        headers,
        data: options.data.clone(),
        family: family(options.v4, options.v6),
        keep_alive: options.keep_alive,
        sender: None,
        step: Step::default(),
    };
    let mut all_well = true;
    let began = tokio::time::Instant::now();
    for number in 0..options.count {
        if options.rate > 0.0 {
            tokio::time::sleep_until(began + Duration::from_secs_f64(number as f64 / options.rate)).await;
        }
        let report = client.attempt(number, Duration::from_millis(options.timeout_ms)).await;
        all_well &= report["ok"] == true;
        match (options.json, &report["error"]) {
            (true, _) => println!("{report}"),
            (false, Value::Null) => {
                println!(
                    "{} {:.1} ms {}",
                    report["status"],
                    report["ms"].as_f64().unwrap_or(0.0),
                    brief(&report["answer"])
                );
            }
            (false, error) => println!("failed: {}", error.as_str().unwrap_or_default()),
        }
    }
    Ok(all_well)
}

fn brief(answer: &Value) -> String {
    match answer {
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

/// `shop tcp`; true when every connection was greeted and echoed.
pub(super) async fn tcp(options: &Tcp) -> anyhow::Result<bool> {
    let family = family(options.v4, options.v6);
    let timeout = Duration::from_millis(options.timeout_ms);
    if let Some(pause) = options.hold_ms {
        return hold(options, family, Duration::from_millis(pause), timeout).await;
    }
    let mut all_well = true;
    for number in 0..options.count {
        let tls = options.tls.as_deref();
        let report = tcp_attempt(number, &options.address, &options.send, tls, family, timeout).await;
        all_well &= report["ok"] == true;
        match (options.json, &report["error"]) {
            (true, _) => println!("{report}"),
            (false, Value::Null) => println!("{}", report["greeting"].as_str().unwrap_or_default()),
            (false, error) => println!("failed: {}", error.as_str().unwrap_or_default()),
        }
    }
    Ok(all_well)
}

async fn tcp_attempt(
    number: u64,
    address: &str,
    line: &str,
    tls: Option<&str>,
    family: Family,
    timeout: Duration,
) -> Value {
    let (began, t_us) = (Instant::now(), now_us());
    let step = Step::default();
    let attempt = async {
        let connector = tls.map(|_| secure::connector()).transpose()?;
        let stream = connect(address, family, &step).await?;
        match tls.zip(connector.as_ref()) {
            None => talk(stream, line).await,
            Some((name, connector)) => talk(secure::connect(connector, stream, name).await?, line).await,
        }
    };
    let result = tokio::time::timeout(timeout, attempt).await.unwrap_or_else(|_| Err(late(timeout, &step)));
    let ms = began.elapsed().as_secs_f64() * 1000.0;
    match result {
        Ok(greeting) => {
            let mut words = greeting.split(' ').skip(1);
            let (pod, source) = (words.next(), words.next());
            json!({"n": number, "t_us": t_us, "end_us": now_us(), "ok": true, "ms": ms, "greeting": greeting, "pod": pod, "source": source})
        }
        Err(error) => {
            json!({"n": number, "t_us": t_us, "end_us": now_us(), "ok": false, "ms": ms, "error": format!("{error:#}")})
        }
    }
}

/// Is greeted, and has a line echoed.
async fn talk(stream: impl AsyncRead + AsyncWrite + Unpin, line: &str) -> anyhow::Result<String> {
    let mut stream = BufReader::new(stream);
    let greeting = read_line(&mut stream).await?;
    stream.get_mut().write_all(format!("{line}\n").as_bytes()).await?;
    let echoed = read_line(&mut stream).await?;
    anyhow::ensure!(echoed == line, "sent {line:?}, got {echoed:?} back");
    Ok(greeting)
}

/// One connection, kept; a line in and out at each turn, until standard input ends. Ends with a report.
async fn hold(options: &Tcp, family: Family, pause: Duration, timeout: Duration) -> anyhow::Result<bool> {
    let (end, mut ended) = watch::channel(false);
    end_at_eof(Arc::new(end));
    let mut lines = 0_u64;
    let step = Step::default();
    let late = |_| late(timeout, &step);
    let exchange = async {
        let connecting = connect(&options.address, family, &step);
        let stream = tokio::time::timeout(timeout, connecting).await.map_err(late)??;
        let mut stream = BufReader::new(stream);
        let greeting = tokio::time::timeout(timeout, read_line(&mut stream)).await.map_err(late)??;
        println!("{}", json!({"t_us": now_us(), "kind": "open", "greeting": greeting}));
        loop {
            stream.get_mut().write_all(format!("{}\n", options.send).as_bytes()).await?;
            let echoed = tokio::time::timeout(timeout, read_line(&mut stream)).await.map_err(late)??;
            anyhow::ensure!(echoed == options.send, "sent {:?}, got {echoed:?} back", options.send);
            lines += 1;
            tokio::time::sleep(pause).await;
        }
        #[allow(unreachable_code)]
        anyhow::Ok(())
    };
    let result = tokio::select! {
        result = exchange => result,
        _ = ended.wait_for(|ended| *ended) => Ok(()),
    };
    let error = result.as_ref().err().map(|error| format!("{error:#}"));
    println!("{}", json!({"t_us": now_us(), "kind": "closed", "lines": lines, "ok": error.is_none(), "error": error}));
    Ok(error.is_none())
}

/// `shop load`; true when every request succeeded.
pub(super) async fn load(options: &Load) -> anyhow::Result<bool> {
    anyhow::ensure!(options.rate > 0.0, "--rate must be above 0");
    // Whoever sends is told, and reports what is under way before it ends: a request that was served is not left out.
    let (end, ending) = watch::channel(false);
    let end = Arc::new(end);
    if options.until_eof {
        end_at_eof(end.clone());
    }
    let failures = Rc::new(Cell::new(0_u64));
    let mut targets = Vec::new();
    for target in &options.target {
        let (target, options, failures, ending) = (target.clone(), options.clone(), failures.clone(), ending.clone());
        targets.push(tokio::task::spawn_local(async move { load_one(&target, &options, &failures, ending).await }));
    }
    let mut term = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
    let all = async {
        for target in targets {
            target.await??;
        }
        anyhow::Ok(())
    };
    tokio::select! {
        result = all => result?,
        _ = term.recv() => {}
    }
    Ok(failures.get() == 0)
}

async fn load_one(
    target: &str,
    options: &Load,
    failures: &Rc<Cell<u64>>,
    mut ending: watch::Receiver<bool>,
) -> anyhow::Result<()> {
    let timeout = Duration::from_millis(options.timeout_ms);
    let room = Arc::new(Semaphore::new(IN_FLIGHT_MAX));
    let family = family(options.v4, options.v6);
    let raw = target.strip_prefix("tcp://").map(str::to_owned);
    let datagrams = target.strip_prefix("udp://").map(str::to_owned);
    let is_http = raw.is_none() && datagrams.is_none();
    let make = || -> anyhow::Result<Client> {
        Ok(Client {
            target: Target::parse(target)?,
            headers: vec![],
            data: None,
            family,
            keep_alive: options.keep_alive,
            sender: None,
            step: Step::default(),
        })
    };
    let kept = match (is_http, options.keep_alive) {
        (true, true) => Some(Rc::new(Mutex::new(make()?))),
        (true, false) => make().map(|_| None)?,
        (false, _) => None,
    };
    let began = tokio::time::Instant::now();
    let mut running = tokio::task::JoinSet::new();
    let mut number = 0;
    while options.count == 0 || number < options.count {
        let due = began + Duration::from_secs_f64(number as f64 / options.rate);
        if tokio::time::timeout_at(due, ending.wait_for(|ending| *ending)).await.is_ok() {
            break;
        }
        let permit = room.clone().acquire_owned().await?;
        let (raw, kept, failures, name) = (raw.clone(), kept.clone(), failures.clone(), target.to_owned());
        let datagrams = datagrams.clone();
        let mut own = if is_http && kept.is_none() { Some(make()?) } else { None };
        running.spawn_local(async move {
            let mut report = match (raw, kept, own.as_mut()) {
                _ if datagrams.is_some() => udp::attempt(&datagrams.unwrap_or_default(), "ping", family, timeout).await,
                (Some(address), _, _) => tcp_attempt(number, &address, "ping", None, family, timeout).await,
                (None, Some(kept), _) => kept.lock().await.attempt(number, timeout).await,
                (None, None, Some(own)) => own.attempt(number, timeout).await,
                (None, None, None) => Value::Null,
            };
            if report["ok"] != true {
                failures.set(failures.get() + 1);
            }
            report["target"] = name.into();
            println!("{report}");
            drop(permit);
        });
        while running.try_join_next().is_some() {}
        number += 1;
    }
    while running.join_next().await.is_some() {}
    Ok(())
}

fn end_at_eof(end: Arc<watch::Sender<bool>>) {
    // A thread of its own: reading standard input cannot be done without blocking.
    std::thread::spawn(move || {
        let _ = std::io::copy(&mut std::io::stdin(), &mut std::io::sink());
        let _ = end.send(true);
    });
}

struct Target {
    authority: String,
    address: String,
    path: String,
}

impl Target {
    fn parse(url: &str) -> anyhow::Result<Self> {
        if let Some(address) = url.strip_prefix("tcp://") {
            return Ok(Self { authority: address.into(), address: address.into(), path: String::new() });
        }
        let uri: http::Uri = url.parse().with_context(|| format!("{url} is not a URL"))?;
        anyhow::ensure!(uri.scheme_str() == Some("http"), "{url}: only http:// and tcp:// are spoken");
        let authority = uri.authority().context("a URL without a host")?;
        let path = uri.path_and_query().map_or("/", http::uri::PathAndQuery::as_str);
        Ok(Self {
            authority: authority.to_string(),
            address: format!("{}:{}", authority.host(), authority.port_u16().unwrap_or(80)),
            path: path.to_owned(),
        })
    }
}

struct Client {
    target: Target,
    headers: Vec<(String, String)>,
    data: Option<String>,
    family: Family,
    keep_alive: bool,
    sender: Option<SendRequest<Full<Bytes>>>,
    step: Step,
}

/// What a call waits for just now, for the message when it is late: a slow name server is not a slow server.
#[derive(Default)]
struct Step(Cell<Option<&'static str>>);

impl Client {
    async fn attempt(&mut self, number: u64, timeout: Duration) -> Value {
        let (began, t_us) = (Instant::now(), now_us());
        let result = tokio::time::timeout(timeout, self.request()).await;
        let result = result.unwrap_or_else(|_| Err(late(timeout, &self.step)));
        let ms = began.elapsed().as_secs_f64() * 1000.0;
        if result.is_err() {
            self.sender = None;
        }
        match result {
            Ok((status, body)) => {
                let answer: Value = serde_json::from_slice(&body).unwrap_or_else(|_| {
                    let text = String::from_utf8_lossy(&body[..body.len().min(200)]);
                    text.trim().to_owned().into()
                });
                json!({
                    "n": number, "t_us": t_us, "end_us": now_us(), "ok": status < 400, "status": status, "ms": ms,
                    "name": answer["name"], "pod": answer["pod"], "source": answer["source"], "answer": answer,
                })
            }
            Err(error) => {
                json!({"n": number, "t_us": t_us, "end_us": now_us(), "ok": false, "ms": ms, "error": format!("{error:#}")})
            }
        }
    }

    async fn request(&mut self) -> anyhow::Result<(u16, Bytes)> {
        let mut sender = match self.sender.take().filter(|sender| !sender.is_closed()) {
            Some(sender) => sender,
            None => {
                let stream = connect(&self.target.address, self.family, &self.step).await?;
                let (sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
                tokio::task::spawn_local(connection);
                sender
            }
        };
        sender.ready().await?;
        let mut request = Request::builder()
            .method(if self.data.is_some() { "POST" } else { "GET" })
            .uri(&self.target.path)
            .header("host", &self.target.authority)
            .header("user-agent", "shop");
        for (name, value) in &self.headers {
            request = request.header(name, value);
        }
        if !self.keep_alive {
            request = request.header("connection", "close");
        }
        let body = Full::new(Bytes::from(self.data.clone().unwrap_or_default()));
        let response = sender.send_request(request.body(body)?).await.context("the connection broke")?;
        let status = response.status().as_u16();
        let body = Limited::new(response.into_body(), BODY_LIMIT).collect().await;
        let body = body.map_err(|error| anyhow::anyhow!("the answer broke off: {error}"))?.to_bytes();
        if self.keep_alive {
            self.sender = Some(sender);
        }
        Ok((status, body))
    }
}

/// The first address of a name in the family that is asked for.
pub(super) async fn look_up(address: &str, family: Family) -> anyhow::Result<SocketAddr> {
    let found: Vec<SocketAddr> = tokio::net::lookup_host(address)
        .await
        .with_context(|| format!("{address} is not known"))?
        .filter(|found| match family {
            Family::Any => true,
            Family::V4 => found.is_ipv4(),
            Family::V6 => found.is_ipv6(),
        })
        .collect();
    found.first().copied().with_context(|| format!("{address} has no address of the asked family"))
}

async fn connect(address: &str, family: Family, step: &Step) -> anyhow::Result<TcpStream> {
    step.0.set(Some("the name"));
    let first = look_up(address, family).await?;
    step.0.set(Some("the connection"));
    let stream = TcpStream::connect(first).await.with_context(|| format!("{first} does not accept"))?;
    stream.set_nodelay(true)?;
    step.0.set(None);
    Ok(stream)
}

async fn read_line(stream: &mut BufReader<impl AsyncRead + Unpin>) -> anyhow::Result<String> {
    let mut line = String::new();
    anyhow::ensure!(stream.take(64 << 10).read_line(&mut line).await? > 0, "the peer closed the connection");
    Ok(line.trim_end().to_owned())
}

fn late(timeout: Duration, step: &Step) -> anyhow::Error {
    let waited = step.0.get().map(|step| format!(", still waiting for {step}")).unwrap_or_default();
    anyhow::anyhow!("no answer within {} ms{waited}", timeout.as_millis())
}
