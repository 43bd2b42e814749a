//! Load without a clock: bulk, requests one after the other, connections one after the other, connections that idle.
//! One thread, so that the generator takes little from the two proxies beside it.
//!
//! Counters are sampled when the measured part begins and ends; what is under way at either edge is counted where it
//! finishes, which is a few parts in ten thousand. Limits: closed loops say what is possible, not how long users wait;
//! latency is the other module's.

use std::cell::Cell;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::io;
use std::net::IpAddr;
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::Duration;
use std::time::Instant;

use anyhow::Context;
use hdrhistogram::Histogram;
use tokio::io::AsyncReadExt;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::sync::Notify;
use tokio::sync::Semaphore;

use crate::bench::http;
use crate::bench::server::CHUNK;
use crate::bench::work::ECHO;
use crate::bench::work::HIGHEST_NS;
use crate::bench::work::Latency;
use crate::bench::work::Line;
use crate::bench::work::Measured;
use crate::bench::work::Order;
use crate::bench::work::PORT_ONCE;
use crate::bench::work::PORT_REQUESTS;
use crate::bench::work::PORT_SINK;
use crate::bench::work::PORT_SOURCE;
use crate::bench::work::REQUEST;
use crate::bench::work::RESPONSE;
use crate::bench::work::Totals;
use crate::bench::work::Work;

/// Opening connections for [`Work::Hold`]: so many at once, well below any backlog.
const OPENING: usize = 64;
/// What is under way when the measured part ends gets this long to finish.
const FINISH: Duration = Duration::from_secs(10);

struct Shared {
    order: Order,
    filler: Vec<u8>,
    units: Cell<u64>,
    payload: Cell<u64>,
    connections: Cell<u64>,
    failed: Cell<u64>,
    error: RefCell<Option<String>>,
    stop: Cell<bool>,
    /// Wakes who waits for readiness, or for the limit.
    progress: Notify,
    /// Wakes every idle connection at the end.
    ended: Notify,
    ready: Cell<usize>,
    opening: Semaphore,
    /// Nanoseconds.
    latency: RefCell<Histogram<u64>>,
    sequence: Cell<u64>,
    answered: RefCell<BTreeMap<String, u64>>,
}

impl Shared {
    fn did(&self, units: u64, payload: u64) {
        self.units.set(self.units.get() + units);
        self.payload.set(self.payload.get() + payload);
        if self.order.limit.is_some_and(|limit| self.units.get() >= limit) {
            self.stop.set(true);
            self.progress.notify_one();
        }
    }

    fn is_ready(&self) {
        self.ready.set(self.ready.get() + 1);
        self.progress.notify_one();
    }

    fn note(&self, result: io::Result<()>) {
        if let Err(error) = result {
            self.failed.set(self.failed.get() + 1);
            self.error.borrow_mut().get_or_insert(error.to_string());
        }
    }

    async fn connect(&self, port: u16) -> io::Result<TcpStream> {
        self.connect_to(self.order.to, self.order.http.as_ref().map_or(port, |http| http.port)).await
    }

    async fn connect_to(&self, to: IpAddr, port: u16) -> io::Result<TcpStream> {
        let stream = TcpStream::connect(SocketAddr::new(to, port)).await?;
        self.connections.set(self.connections.get() + 1);
        stream.set_nodelay(true)?;
        Ok(stream)
    }

    /// One request and its response.
    async fn exchange(&self, stream: &mut TcpStream, response: &mut [u8; RESPONSE]) -> io::Result<()> {
        let sequence = self.sequence.get() + 1;
        self.sequence.set(sequence);
        if let Some(http) = &self.order.http {
            let answer = http::exchange(stream, &http.head, sequence).await?;
            http::count(&mut self.answered.borrow_mut(), &answer.server);
            return answer.check(sequence);
        }
        let mut request = [0; REQUEST];
        request.copy_from_slice(&self.filler[..REQUEST]);
        let tag = u128::from(sequence).to_be_bytes();
        request[..ECHO].copy_from_slice(&tag);
        stream.write_all(&request).await?;
        stream.read_exact(response).await?;
        if response[..ECHO] != tag {
            return Err(io::Error::other("the response to another request came back"));
        }
        Ok(())
    }
}

/// Does the work, saying when the measured part begins and ends.
pub(super) async fn run(order: Order) -> anyhow::Result<()> {
    let is_cold = matches!(order.work, Work::Cold { .. });
    let (tasks, needs_ready) = match order.work {
        Work::Upload { streams } | Work::Download { streams } => (streams, streams),
        Work::Requests { connections } | Work::Hold { connections } => (connections, connections),
        Work::Connects { at_once } => (at_once, at_once),
        Work::Cold { .. } => (order.others.len(), 0),
        Work::Paced { .. } | Work::PacedConnects { .. } => anyhow::bail!("this work goes by the clock"),
    };
    let shared = Rc::new(Shared {
        filler: super::filler(&order.marker, CHUNK),
        order,
        units: Cell::default(),
        payload: Cell::default(),
        connections: Cell::default(),
        failed: Cell::default(),
        error: RefCell::default(),
        stop: Cell::default(),
        progress: Notify::new(),
        ended: Notify::new(),
        ready: Cell::default(),
        // Nobody speaks to a cold server before the measured part.
        opening: Semaphore::new(if is_cold { 0 } else { OPENING }),
        latency: RefCell::new(Histogram::new_with_max(HIGHEST_NS, 3)?),
        sequence: Cell::default(),
        answered: RefCell::default(),
    });
    let mut running = tokio::task::JoinSet::new();
    for task in 0..tasks {
        let shared = shared.clone();
        running.spawn_local(async move {
            let result = one(&shared, task).await;
            shared.note(result);
            // Also after a failure, so that nobody waits for it.
            shared.is_ready();
        });
    }
    while shared.ready.get() < needs_ready && !shared.stop.get() {
        shared.progress.notified().await;
    }
    if !shared.stop.get() {
        tokio::time::sleep(Duration::from_millis(shared.order.warm_ms)).await;
    }
    // A limit counts from the first byte: with one, all of the work is the measured part.
    let before = if shared.order.limit.is_some() { 0 } else { shared.units.get() };
    let mut began = Instant::now();
    super::say(&Line::Begin)?;
    if let Work::Cold { at_once } = shared.order.work {
        // The other side takes its samples now, and says so.
        let word = tokio::task::spawn_blocking(|| io::stdin().read_line(&mut String::new()));
        word.await.context("standard input")??;
        began = Instant::now();
        shared.opening.add_permits(at_once);
    }
    if matches!(shared.order.work, Work::Hold { .. }) {
        tokio::task::spawn_blocking(|| io::copy(&mut io::stdin(), &mut io::sink()))
            .await
            .context("standard input")??;
    } else {
        let length = Duration::from_millis(shared.order.run_ms);
        let limit = async {
            while !shared.stop.get() {
                shared.progress.notified().await;
            }
        };
        let _ = tokio::time::timeout(length, limit).await;
    }
    let seconds = began.elapsed().as_secs_f64();
    let units = shared.units.get() - before;
    let latency = is_cold.then(|| Latency::of(&shared.latency.borrow()));
    super::say(&Line::End(Measured { units, seconds, latency, ..Measured::default() }))?;
    shared.stop.set(true);
    shared.ended.notify_waiters();
    let all = async { while running.join_next().await.is_some() {} };
    if tokio::time::timeout(FINISH, all).await.is_err() {
        shared.note(Err(io::Error::other("connections did not finish within 10 s of the end")));
    }
    super::say(&Line::Gone(Totals {
        payload: shared.payload.get(),
        connections: shared.connections.get(),
        failed: shared.failed.get(),
        error: shared.error.borrow().clone(),
        answered: shared.answered.take(),
    }))
}

async fn one(shared: &Shared, task: usize) -> io::Result<()> {
    match shared.order.work {
        Work::Upload { .. } => upload(shared).await,
        Work::Download { .. } => download(shared).await,
        Work::Requests { .. } => requests(shared).await,
        Work::Connects { .. } => connects(shared).await,
        Work::Cold { .. } => cold(shared, task).await,
        Work::Hold { .. } => hold(shared).await,
        Work::Paced { .. } | Work::PacedConnects { .. } => Ok(()),
    }
}

async fn upload(shared: &Shared) -> io::Result<()> {
    let mut stream = shared.connect(PORT_SINK).await?;
    shared.is_ready();
    let mut sent = 0_u64;
    while !shared.stop.get() {
        let length = stream.write(&shared.filler).await? as u64;
        sent += length;
        shared.did(length, length);
    }
    stream.shutdown().await?;
    let arrived = stream.read_u64().await?;
    if arrived != sent {
        return Err(io::Error::other(format!("{sent} bytes were sent and {arrived} arrived")));
    }
    Ok(())
}

async fn download(shared: &Shared) -> io::Result<()> {
    let mut stream = shared.connect(PORT_SOURCE).await?;
    shared.is_ready();
    let mut buffer = vec![0; CHUNK];
    while !shared.stop.get() {
        match stream.read(&mut buffer).await? as u64 {
            0 => return Err(io::Error::other("the server stopped sending")),
            length => shared.did(length, length),
        }
    }
    Ok(())
}

async fn requests(shared: &Shared) -> io::Result<()> {
    let mut stream = shared.connect(PORT_REQUESTS).await?;
    let mut response = [0; RESPONSE];
    shared.exchange(&mut stream, &mut response).await?;
    shared.did(1, (REQUEST + RESPONSE) as u64);
    shared.is_ready();
    while !shared.stop.get() {
        shared.exchange(&mut stream, &mut response).await?;
        shared.did(1, (REQUEST + RESPONSE) as u64);
    }
    Ok(())
}

async fn connects(shared: &Shared) -> io::Result<()> {
    let mut first = true;
    let mut response = [0; RESPONSE];
    while !shared.stop.get() {
        let mut stream = shared.connect(PORT_ONCE).await?;
        shared.exchange(&mut stream, &mut response).await?;
        // The server closes first; see there.
        if stream.read(&mut response).await? != 0 {
            return Err(io::Error::other("more came than one response"));
        }
        shared.did(1, (REQUEST + RESPONSE) as u64);
        if std::mem::take(&mut first) {
            shared.is_ready();
        }
    }
    Ok(())
}

async fn cold(shared: &Shared, task: usize) -> io::Result<()> {
    let _turn = shared.opening.acquire().await.map_err(io::Error::other)?;
    let to = shared.order.others.get(task).copied().unwrap_or(shared.order.to);
    let began = Instant::now();
    let mut stream = shared.connect_to(to, PORT_ONCE).await?;
    let mut response = [0; RESPONSE];
    shared.exchange(&mut stream, &mut response).await?;
    let took = began.elapsed().as_nanos() as u64;
    shared.latency.borrow_mut().saturating_record(took);
    shared.did(1, (REQUEST + RESPONSE) as u64);
    // The server closes first; see there.
    match stream.read(&mut response).await? {
        0 => Ok(()),
        _ => Err(io::Error::other("more came than one response")),
    }
}

async fn hold(shared: &Shared) -> io::Result<()> {
    let mut stream = {
        let _turn = shared.opening.acquire().await.map_err(io::Error::other)?;
        let mut stream = shared.connect(PORT_REQUESTS).await?;
        let mut response = [0; RESPONSE];
        shared.exchange(&mut stream, &mut response).await?;
        shared.did(1, (REQUEST + RESPONSE) as u64);
        stream
    };
    shared.is_ready();
    tokio::select! {
        () = shared.ended.notified() => Ok(()),
        read = stream.read_u8() => Err(match read {
            Ok(_) => io::Error::other("bytes came on an idle connection"),
            Err(error) => io::Error::other(format!("an idle connection ended: {error}")),
        }),
    }
}
