//! Load by the clock: request k is due at start + k / rate, and its latency counts from then, whether or not the answer
//! before it has come. So a stall is seen by every request that it delays, not only by one (no coordinated omission).
//!
//! Threads that block, one for each connection, with a timer slack of a nanosecond: an event loop's millisecond timers
//! would hide what is measured. Limits: one request at a time on a connection, as most clients do; those that wait for
//! it wait in the schedule, and their waiting counts.

use std::collections::BTreeMap;
use std::io;
use std::io::Read;
use std::io::Write;
use std::net::Shutdown;
use std::net::SocketAddr;
use std::net::TcpStream;
use std::sync::Mutex;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering;
use std::time::Duration;
use std::time::Instant;

use hdrhistogram::Histogram;

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
use crate::bench::work::REQUEST;
use crate::bench::work::RESPONSE;
use crate::bench::work::Totals;
use crate::bench::work::Work;

/// No answer within this time is a failure.
const PATIENCE: Duration = Duration::from_secs(5);
/// Threads for connections at fixed times: at 200/s each has 40 ms for one.
const CONNECTORS: usize = 8;

struct Shared {
    order: Order,
    /// Time 0 of the schedule; the measured part is [warm, end).
    start: Instant,
    warm: Duration,
    end: Duration,
    filler: Vec<u8>,
    payload: AtomicU64,
    connections: AtomicU64,
    beside: AtomicU64,
    failed: AtomicU64,
    error: Mutex<Option<String>>,
    stop: AtomicBool,
    answered: Mutex<BTreeMap<String, u64>>,
}

impl Shared {
    fn connect(&self, port: u16) -> io::Result<TcpStream> {
        let port = self.order.http.as_ref().map_or(port, |http| http.port);
        let stream = TcpStream::connect_timeout(&SocketAddr::new(self.order.to, port), PATIENCE)?;
        self.connections.fetch_add(1, Ordering::Relaxed);
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        Ok(stream)
    }

    fn exchange(&self, stream: &mut TcpStream, sequence: u64) -> io::Result<()> {
        if let Some(http) = &self.order.http {
            let answer = http::exchange_blocking(stream, &http.head, sequence)?;
            if let Ok(mut answered) = self.answered.lock() {
                http::count(&mut answered, &answer.server);
            }
            self.payload.fetch_add((REQUEST + RESPONSE) as u64, Ordering::Relaxed);
            return answer.check(sequence);
        }
        let mut request = [0; REQUEST];
        request.copy_from_slice(&self.filler[..REQUEST]);
        let tag = u128::from(sequence).to_be_bytes();
        request[..ECHO].copy_from_slice(&tag);
        stream.write_all(&request)?;
        let mut response = [0; RESPONSE];
        stream.read_exact(&mut response)?;
        self.payload.fetch_add((REQUEST + RESPONSE) as u64, Ordering::Relaxed);
        if response[..ECHO] == tag {
            Ok(())
        } else {
            Err(io::Error::other("the response to another request came back"))
        }
    }

    fn note(&self, error: &io::Error) {
        self.failed.fetch_add(1, Ordering::Relaxed);
        if let Ok(mut first) = self.error.lock() {
            first.get_or_insert_with(|| error.to_string());
        }
    }
}

/// When request `k` of thread `thread` is due: the schedule of all is dealt out in turn.
fn due(k: u64, thread: usize, threads: usize, per_second: u32) -> Duration {
    let index = k * threads as u64 + thread as u64;
    Duration::from_nanos(index.saturating_mul(1_000_000_000) / u64::from(per_second.max(1)))
}

/// Does the work, saying when the measured part begins and ends.
pub(super) fn run(order: Order) -> anyhow::Result<()> {
    // Otherwise the kernel may wake a sleeper 50 µs late, which would look like the mesh's doing.
    nix::sys::prctl::set_timerslack(1)?;
    let (threads, per_second, beside) = match order.work {
        Work::Paced { connections, per_second, beside_upload } => (connections, per_second, beside_upload),
        Work::PacedConnects { per_second } => (CONNECTORS, per_second, false),
        _ => anyhow::bail!("this work does not go by the clock"),
    };
    let warm = Duration::from_millis(order.warm_ms);
    let shared = Shared {
        warm,
        end: warm + Duration::from_millis(order.run_ms),
        // Time for the connections to open before the first request is due.
        start: Instant::now() + Duration::from_millis(100),
        filler: super::filler(&order.marker, CHUNK),
        order,
        payload: AtomicU64::new(0),
        connections: AtomicU64::new(0),
        beside: AtomicU64::new(0),
        failed: AtomicU64::new(0),
        error: Mutex::new(None),
        stop: AtomicBool::new(false),
        answered: Mutex::default(),
    };
    let mut all = Histogram::<u64>::new_with_max(HIGHEST_NS, 3)?;
    std::thread::scope(|scope| -> anyhow::Result<()> {
        let shared = &shared;
        let upload = beside.then(|| scope.spawn(|| upload(shared).unwrap_or_else(|error| shared.note(&error))));
        let paced: Vec<_> =
            (0..threads).map(|thread| scope.spawn(move || one(shared, thread, threads, per_second))).collect();
        sleep_until(shared.start + shared.warm);
        let beside_before = shared.beside.load(Ordering::Relaxed);
        super::say(&Line::Begin)?;
        sleep_until(shared.start + shared.end);
        let beside_bytes = shared.beside.load(Ordering::Relaxed) - beside_before;
        for thread in paced {
            match thread.join() {
                Ok(Ok(histogram)) => all.add(&histogram)?,
                Ok(Err(error)) => shared.note(&error),
                Err(_) => shared.note(&io::Error::other("a thread panicked")),
            }
        }
        super::say(&Line::End(Measured {
            units: all.len(),
            seconds: (shared.end - shared.warm).as_secs_f64(),
            latency: Some(Latency::of(&all)),
            beside_bytes,
        }))?;
        shared.stop.store(true, Ordering::Relaxed);
        if let Some(upload) = upload {
            let _ = upload.join();
        }
        Ok(())
    })?;
    super::say(&Line::Gone(Totals {
        payload: shared.payload.load(Ordering::Relaxed),
        connections: shared.connections.load(Ordering::Relaxed),
        failed: shared.failed.load(Ordering::Relaxed),
        error: shared.error.into_inner().unwrap_or_default(),
        answered: shared.answered.into_inner().unwrap_or_default(),
    }))
}

fn sleep_until(when: Instant) {
    let wait = when.saturating_duration_since(Instant::now());
    if !wait.is_zero() {
        std::thread::sleep(wait);
    }
}

fn one(shared: &Shared, thread: usize, threads: usize, per_second: u32) -> io::Result<Histogram<u64>> {
    let mut histogram = Histogram::new_with_max(HIGHEST_NS, 3).map_err(io::Error::other)?;
    let lasting = matches!(shared.order.work, Work::Paced { .. });
    let mut stream = if lasting { Some(shared.connect(PORT_REQUESTS)?) } else { None };
    for k in 0.. {
        let due = due(k, thread, threads, per_second);
        if due >= shared.end {
            break;
        }
        let intended = shared.start + due;
        sleep_until(intended);
        match &mut stream {
            Some(stream) => shared.exchange(stream, k)?,
            None => {
                let mut stream = shared.connect(PORT_ONCE)?;
                shared.exchange(&mut stream, k)?;
                record(&mut histogram, shared, due, intended);
                // The server closes first; the schedule waits for that, the latency does not.
                let _ = stream.read(&mut [0; 1])?;
                continue;
            }
        }
        record(&mut histogram, shared, due, intended);
    }
    Ok(histogram)
}

fn record(histogram: &mut Histogram<u64>, shared: &Shared, due: Duration, intended: Instant) {
    if due >= shared.warm {
        let ns = u64::try_from(intended.elapsed().as_nanos()).unwrap_or(u64::MAX);
        // Saturating: the highest value is a minute, and patience ends long before.
        histogram.saturating_record(ns.max(1));
    }
}

fn upload(shared: &Shared) -> io::Result<()> {
    let mut stream = shared.connect(PORT_SINK)?;
    let mut sent = 0_u64;
    let limit = shared.order.limit.unwrap_or(u64::MAX);
    while !shared.stop.load(Ordering::Relaxed) && sent < limit {
        let length = stream.write(&shared.filler)? as u64;
        sent += length;
        shared.beside.store(sent, Ordering::Relaxed);
    }
    shared.payload.fetch_add(sent, Ordering::Relaxed);
    stream.shutdown(Shutdown::Write)?;
    let mut arrived = [0; 8];
    stream.read_exact(&mut arrived)?;
    if u64::from_be_bytes(arrived) == sent {
        Ok(())
    } else {
        Err(io::Error::other("not every byte of the upload arrived"))
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use crate::bench::paced::due;

    #[test]
    fn the_schedule_is_dealt_out_evenly_and_never_drifts() {
        let mut all: Vec<Duration> = (0..4).flat_map(|t| (0..250).map(move |k| due(k, t, 4, 1000))).collect();
        all.sort();
        for (index, due) in all.iter().enumerate() {
            assert_eq!(*due, Duration::from_millis(index as u64));
        }
        assert_eq!(due(5_000_000, 0, 1, 5000), Duration::from_secs(1000), "rounding must not add up");
    }
}
